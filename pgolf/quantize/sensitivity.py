"""How much the loss minds an error in each row of each matrix: a diagonal Fisher, from gradients on training data.

To second order a change E of a matrix costs 1/2 Σ_r F_r (E H Eᵀ)_rr nats a token, with H the mean of x xᵀ over its
inputs and F_r the mean square of the gradient of a token's loss with respect to output r (Kronecker-factored
curvature, arXiv:1503.05671, with the outputs' part kept to its diagonal). Gradients are those of the sum of the losses,
so that a position's includes what it does to later ones. A looped layer makes the same error in every pass, and on
about the same inputs: a position's gradients are added over the passes before they are squared.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pgolf import parallel
from pgolf.config import ModelConfig
from pgolf.errors import PgolfError
from pgolf.quantize.hessian import Observed

LOGITS_AT_ONCE = 1 << 24  # entries of the tokens x vocabulary matrix held together

Slice = tuple[Tensor, Tensor, Tensor | None, int | None]  # (inputs, targets [1, T], cu_seqlens, max_seqlen)


class Sensitivity(NamedTuple):
    """Mean squared gradients by matrix, float32; the tied embedding has its two uses apart."""

    outputs: dict[str, Tensor]  # [rows]: of a matrix's outputs, for the embedding of the logits
    inputs: Tensor  # [vocabulary]: of a row's entries where the row is an input, times how often it is


class Trained(Observed, Protocol):
    """What `collect` needs of a model beyond the hook: its constants and its embedding."""

    config: ModelConfig
    tok_emb: torch.nn.Embedding

    def parameters(self) -> Iterable[Tensor]: ...


def take(inputs: Tensor, targets: Tensor, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> Slice:
    """The first `tokens` of a packed batch; the segment that this cuts ends there."""
    return inputs[:, :tokens], targets[:, :tokens], cu_seqlens.clamp_max(min(tokens, inputs.shape[1])), max_seqlen


class _Collector:
    """The model's observer during a forward with gradients: sums of squares over the tokens seen."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self._passes: dict[str, Tensor] = {}  # [tokens, rows]: gradients of this slice, added over a layer's passes
        self.normed: Tensor | None = None  # of the input embedding behind its norm, [model_dim]

    def add(self, names: tuple[str, ...], x: Tensor, outputs: tuple[Tensor, ...]) -> None:
        if not x.is_floating_point():
            (start,) = outputs
            start.requires_grad_()  # where the graph begins: the parameters are frozen
            start.register_hook(self._add_normed)
            return
        for name, output in zip(names, outputs, strict=bool(outputs)):
            output.register_hook(lambda gradient, name=name: self._add_pass(name, gradient))

    def _add_pass(self, name: str, gradient: Tensor) -> None:
        self._passes[name] = self._passes[name] + gradient if name in self._passes else gradient

    def close(self) -> None:
        """The slice's backward is through: square what it gave."""
        for name, gradient in self._passes.items():
            self.add_square(name, gradient)
        self._passes = {}

    def add_square(self, name: str, gradient: Tensor) -> None:
        square = gradient.reshape(-1, gradient.shape[-1]).float().square().sum(dim=0)
        self.outputs[name] = self.outputs[name] + square if name in self.outputs else square

    def _add_normed(self, gradient: Tensor) -> None:
        square = gradient.reshape(-1, gradient.shape[-1]).float().square().sum(dim=0)
        self.normed = square if self.normed is None else self.normed + square


def collect(
    model: Trained,
    slices: Iterable[Slice],
    device: torch.device | str,
    dtype: torch.dtype,
    all_reduce: bool = False,
) -> Sensitivity:
    """Forward and backward over `slices`; of each only sums of squares stay, no gradient of a weight is computed.

    The loss is the training loss (its softcap), the model computes in `dtype`; with `all_reduce` the result is
    averaged over the ranks. An input row's share is taken behind the norm that follows the embedding, which divides
    by the row's own root mean square: the mean squared gradient there, over the row's mean square, times its share of
    the tokens. Raises PgolfError without slices.
    """
    collector = _Collector()
    count = torch.zeros(model.config.vocab_size, device=device)
    own_dtype = model.dtype
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.observer, model.dtype = collector.add, dtype
    try:
        for inputs, targets, cu_seqlens, max_seqlen in slices:
            ids = inputs.to(device)
            with torch.enable_grad():
                h = model.hidden(ids, None if cu_seqlens is None else cu_seqlens.to(device), max_seqlen)
            h.backward(_head(model, h.detach(), targets.to(device), collector))
            collector.close()
            count.index_add_(0, ids.flatten(), torch.ones(ids.numel(), device=device))  # bincount waits for a GPU
    finally:
        model.observer, model.dtype = None, own_dtype
        for parameter in frozen:
            parameter.requires_grad_(True)
    if collector.normed is None:
        raise PgolfError("calibration saw no batch; give quantize more training data")
    tokens = count.sum()
    outputs = {name: total / tokens for name, total in collector.outputs.items()}
    mean_square = model.tok_emb.weight.detach().float().square().mean(dim=1)
    # A row of zeros has no direction to lose: it counts as the mean row does.
    mean_square = torch.where(mean_square > 0, mean_square, mean_square.mean().clamp_min(1e-30))
    inputs_share = (count / tokens) * (collector.normed.mean() / tokens) / mean_square
    if all_reduce:
        parallel.mean_([*outputs.values(), inputs_share])
    return Sensitivity(outputs, inputs_share)


def _head(model: Trained, h: Tensor, targets: Tensor, collector: _Collector) -> Tensor:
    """The gradient of the summed losses by h [1, T, D]; that by the logits is squared, some tokens at a time."""
    cap = model.config.logit_softcap
    weight = model.tok_emb.weight.detach().to(h.dtype)
    flat, wanted = h.reshape(-1, h.shape[-1]), targets.flatten()
    result = torch.empty_like(flat)
    at_once = max(1, LOGITS_AT_ONCE // len(weight))
    for start in range(0, len(flat), at_once):
        part = slice(start, start + at_once)
        bent = torch.tanh((flat[part] @ weight.T).float() / cap)
        gradient = torch.softmax(cap * bent, dim=1)
        gradient.scatter_add_(1, wanted[part, None], -torch.ones_like(wanted[part, None], dtype=gradient.dtype))
        gradient *= 1 - bent.square()
        collector.add_square("tok_emb.weight", gradient)
        result[part] = gradient.to(h.dtype) @ weight
    return result.view_as(h)
