"""The global phase of test-time training: a few SGD steps of the network itself on documents already scored."""

import contextlib
import math
from collections.abc import Iterator

import torch
from numpy.typing import NDArray
from torch import nn

from pgolf import parallel
from pgolf.config import TTTConfig
from pgolf.model import GPT
from pgolf.score import boundaries, pad_boundaries, to_device, world


@contextlib.contextmanager
def gradients(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Every parameter with (or without) gradients inside the block; the flags come back, gradients are dropped."""
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(wanted)
    try:
        yield
    finally:
        for parameter, flag in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(flag).grad = None


def cosine_lr(config: TTTConfig, chunk: int, chunks: int) -> float:
    """SGD learning rate in chunk `chunk` of `chunks`."""
    return config.global_lr * 0.5 * (1 + math.cos(math.pi * chunk / max(chunks - 1, 1)))


def global_phase(model: GPT, stream: NDArray, config: TTTConfig) -> None:
    """Train all weights of `model`, in place, on `stream` (scored documents, each with its following BOS).

    recipe section 5. The stream is cut into chunks of `global_chunk` tokens with a learning rate each; the last,
    which may be short, is skipped. Of a chunk the whole rows of `eval_seq_len` are used, at most `global_rows` a
    step, `global_epochs` times over. Ranks share a chunk's rows and average their gradients; with one rank the
    result is that of a single device, with more it differs by the uneven shares, as in the record.
    PgolfError when another rank has ended, or when the ranks' weights are no longer the same.
    """
    parallel.barrier()  # ranks come when their share is scored; those that wait do so on the CPU
    rank, size = world()
    device = model.tok_emb.weight.device
    width = config.eval_seq_len
    chunks = -(-(len(stream) - 1) // config.global_chunk)
    rows = config.global_chunk // width  # every chunk but the last, which is skipped, is whole
    first, last = rows * rank // size, rows * (rank + 1) // size
    most = -(-rows // size)  # every rank takes as many steps as the one with most rows: gradients are reduced in each
    with gradients(model, True):
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=config.global_lr, momentum=config.global_momentum)
        for chunk in range(chunks - 1):
            optimizer.param_groups[0]["lr"] = cosine_lr(config, chunk, chunks)
            for step in list(range(0, most, config.global_rows)) * config.global_epochs:
                begin, end = min(first + step, last), min(first + step + config.global_rows, last)
                if begin < end:
                    origin = chunk * config.global_chunk
                    _backward(model, stream[origin + begin * width : origin + end * width + 1], width)
                if size > 1:
                    _average(parameters, begin < end, device)
                if config.global_clip > 0:
                    nn.utils.clip_grad_norm_(parameters, config.global_clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    parallel.check_same(model.parameters(), "adapted weights")


def _backward(model: GPT, tokens: NDArray, limit: int) -> None:
    """Gradient of the mean training loss of tokens [T + 1], in segments at BOS and at `limit`."""
    device = model.tok_emb.weight.device
    edges = pad_boundaries(boundaries(tokens[:-1], limit), device)
    ids = to_device(tokens, device)[None]
    model.train_loss(ids[:, :-1], ids[:, 1:], edges, limit).backward()


def _average(parameters: list[nn.Parameter], has_rows: bool, device: torch.device) -> None:
    """Mean gradient over the ranks that had rows in this step; every rank must call it."""
    holders = torch.tensor(float(has_rows), device=device)
    parallel.sum_(holders)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parallel.sum_(parameter.grad)
        parameter.grad /= holders
