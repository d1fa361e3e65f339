"""The last seconds of training: what the artifact keeps in floating point, trained through the frozen levels.

Rounding moves the loss to first order too: a matrix comes back a little too small or turned, and every layer behind it
was trained on the original. The steps of the matrices' rows, the layers' scales, mixes and gains are one number for
some hundred weights; fitting them again to the training loss takes that part back at no cost in bytes. After others'
tuning of norms and scales behind a quantizer (arXiv:2309.02784, arXiv:2308.13137), here on the training loss itself.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf import banks, parallel
from pgolf.data.loader import Batch
from pgolf.errors import PgolfError
from pgolf.model import GPT

BETAS = (0.9, 0.99)
WARM_UP = 5  # steps until Adam's second moments mean something
EMBEDDING = "tok_emb.weight"

State = dict[str, np.ndarray]


class Tuned(NamedTuple):
    """What training changed, float32 on the CPU."""

    factors: dict[str, Tensor]  # [rows] of every matrix, by name: what its rows' steps are to be multiplied by
    small: dict[str, Tensor]  # other parameters' values
    losses: list[float]  # mean training loss of each step, nats


def tune(model: GPT, batches: Iterable[Batch], small: Collection[str], steps: int, lr: float) -> Tuned:
    """Train the row factors of all matrices, and the parameters named in `small`, by Adam on the training loss.

    Args:
        model: holds the rounded weights; they are moved.
        batches: one for each step, of training data; under torch.distributed every rank brings its own, as many.
        small: names of parameters that are neither a bank nor the embedding.
        steps: the learning rate rises over the first `WARM_UP` and falls to zero with the last.
        lr: of the factors and of the parameters alike; all of them are of the order of one.

    Raises PgolfError when the loss is not finite.
    """
    named = dict(model.named_parameters())
    matrices = {name: named[name] for name in (EMBEDDING, *banks.BANKS)}
    rounded = {name: parameter.detach().clone() for name, parameter in matrices.items()}
    change = {
        name: parameter.new_zeros(parameter.shape[:-1], requires_grad=True) for name, parameter in matrices.items()
    }
    chosen = {name: named[name] for name in sorted(small)}
    free = [*change.values(), *chosen.values()]
    optimizer = torch.optim.Adam(free, lr=lr, betas=BETAS)
    losses = []
    for step, batch in zip(range(steps), batches, strict=False):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
        model.zero_grad(set_to_none=True)
        device = model.tok_emb.weight.device
        loss = model.train_loss(
            batch.inputs.to(device), batch.targets.to(device), batch.cu_seqlens.to(device), batch.max_seqlen
        )
        loss.backward()
        losses.append(loss.detach())
        for name, parameter in matrices.items():
            assert parameter.grad is not None
            change[name].grad = (parameter.grad * rounded[name]).sum(dim=-1)
        parallel.mean_([one.grad for one in free if one.grad is not None])
        optimizer.step()
        with torch.no_grad():
            for name, parameter in matrices.items():
                torch.mul(rounded[name], 1 + change[name][..., None], out=parameter)
    model.zero_grad(set_to_none=True)
    seen = torch.stack(losses).tolist() if losses else []
    if not np.isfinite(seen).all():
        raise PgolfError("the loss is not finite on the quantized weights; lower quantize.tune_lr")
    layers = model.config.num_layers
    factors = {
        name: 1 + value.detach().cpu()
        for bank, rows in change.items()
        for name, value in zip(
            banks.slice_names(bank, layers) if bank in banks.BANKS else [bank],
            rows.unbind() if bank in banks.BANKS else [rows],
            strict=True,
        )
    }
    return Tuned(factors, {name: parameter.detach().cpu() for name, parameter in chosen.items()}, seen)


def apply(state: State, tuned: Tuned) -> State:
    """The state of `quantize_trellis` with the tuned numbers in place of its own, fp16 as they are; levels as before.

    Raises PgolfError for a number that does not fit in fp16.
    """
    result = dict(state)
    for name, factor in tuned.factors.items():
        key = f"{name}.scale" if f"{name}.q" in state else name
        value = state[key].astype(np.float32)
        scaled = value * factor.numpy().reshape(-1, *[1] * (value.ndim - 1))
        result[key] = _half(name, scaled)
    for name, tensor in tuned.small.items():
        result[name] = _half(name, tensor.numpy())
    return result


def _half(name: str, value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    if not np.isfinite(half).all():
        raise PgolfError(f"{name} does not fit in fp16 (largest 65504) after tuning; lower quantize.tune_lr")
    return half
