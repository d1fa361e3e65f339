"""The largest micro-batch that a GPU's memory holds: what `train.micro_batch=auto` means."""

import torch

from pgolf import parallel, schedule
from pgolf.config import Config
from pgolf.errors import PgolfError
from pgolf.model import GPT
from pgolf.optim import Optimizer

PROBES = (8192, 16384)  # tokens; memory grows in proportion between and beyond them
SHARE = 0.94  # of what is free: the rest is for the allocator's gaps, cuBLAS and the graphs themselves


def largest_micro_batch(config: Config, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of the largest micro-batch that divides a rank's part of a step and fits on `device`.

    Two small micro-steps in the schedule's most demanding mode are measured. All ranks get the smallest of their
    answers. Raises PgolfError on a CPU, and where not even a small one fits.
    """
    if device.type != "cuda":
        raise PgolfError("train.micro_batch=auto needs a CUDA GPU; give a number of tokens")
    settings = config.train
    share = settings.step_tokens // parallel.world_size()
    context, looping = schedule.modes(settings)[-1]
    model = GPT(config.model).initialize(config.seed).to(device)
    model.dtype, model.looping = dtype, looping and config.model.num_loops > 0
    optimizer = Optimizer(model, settings)
    peaks = []
    for tokens in (PROBES[0], *PROBES):  # the first allocates gradients and workspaces
        torch.cuda.reset_peak_memory_stats(device)
        ids = torch.randint(2, config.model.vocab_size, (1, tokens), device=device)
        bounds = torch.arange(0, tokens + context, context, dtype=torch.int32, device=device).clamp_max(tokens)
        model.train_loss(ids, ids, bounds, context).backward()
        peaks.append(torch.cuda.max_memory_allocated(device))
    state = torch.cuda.memory_allocated(device) + 8 * sum(p.numel() for p in optimizer.rest.values())  # AdamW's moments
    per_token = (peaks[2] - peaks[1]) / (PROBES[1] - PROBES[0])
    free, _ = torch.cuda.mem_get_info(device)
    room = SHARE * (free + torch.cuda.memory_reserved(device)) - state
    del model, optimizer
    torch.cuda.empty_cache()
    fits = parallel.smallest(room / per_token)
    sizes = [share // parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= fits]
    if not sizes:
        raise PgolfError(
            f"not even one token fits: {room / 2**20:,.0f} MiB of GPU memory are free; use a smaller model"
        )
    return sizes[0]
