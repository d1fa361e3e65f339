"""Inputs of AdamW's step."""

from collections.abc import Callable

import torch
from torch import Tensor

from pgolf.ops import adamw
from pgolf.testing.operator import Arguments, Function, Operator, Shape, nbytes

RANK, DIM, KV_DIM, VOCAB, SLOTS, DOCUMENTS = 80, 512, 256, 8192, 17, 24
# Of the recipe's adapters: of k, o and mlp in every executed layer, and of the head.
ADAPTERS = DOCUMENTS * RANK * (SLOTS * (3 * DIM + KV_DIM + 2 * DIM) + DIM + VOCAB)


def _make(beta1: float) -> Callable[[Shape, torch.dtype, torch.device, int], Arguments]:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        """shape = (n,): a few steps into a run. dtype: of the gradient and of the copy."""
        draw = torch.Generator().manual_seed(seed)
        weight, mean, grad = (scale * torch.randn(shape, generator=draw) for scale in (4e-2, 1e-3, 1e-3))
        square = 1e-6 * torch.rand(shape, generator=draw)
        tensors = [tensor.to(device) for tensor in (weight, mean, square, grad)]
        grad = tensors.pop().to(dtype)
        count = torch.tensor(1 + seed, device=device)
        numbers = (1e-2, beta1, 0.99, 1e-10, 0.5)
        return tensors[0], tensors[1] if beta1 else None, tensors[2], grad, torch.zeros_like(grad), count, *numbers

    return make


def _apart(function: Function) -> Function:
    """A step in place as the tensors that it makes, in memory of their own."""

    def step(
        weight: Tensor,
        mean: Tensor | None,
        square: Tensor,
        grad: Tensor,
        copy: Tensor,
        count: Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> tuple[Tensor, ...]:
        new = [None if tensor is None else tensor.clone() for tensor in (weight, mean, square)]
        rounded = torch.empty_like(copy)
        function(*new, grad, rounded, count, lr, beta1, beta2, eps, weight_decay)
        return *(tensor for tensor in new if tensor is not None), rounded

    return step


def _fused() -> Function:
    from pgolf.testing.baselines import adamw as baselines

    return _apart(baselines.fused)


def _bytes(arguments: Arguments) -> int:
    """The state copied, then read and written; the gradient read, the copy written."""
    state = [tensor for tensor in arguments[:3] if tensor is not None]
    return 4 * nbytes(*state) + nbytes(arguments[3], arguments[4])


def _row(name: str, beta1: float, large: Shape) -> Operator:
    return Operator(
        name=name,
        op=_apart(adamw.adamw_op),
        custom_op=adamw.adamw_op,
        reference=_apart(adamw.reference),
        make=_make(beta1),
        shapes=((1,), (2,), (5,), (1023,), (2048,), (2049,), (4099,), (1_000_003,)),
        large=large,
        large_check=(8_000_000,),
        small=(1_000_000,),
        forward_bytes=_bytes,
        baselines={"torch fused": _fused},
    )


OPERATORS: tuple[Operator, ...] = (
    _row("adamw", 0.0, (ADAPTERS,)),
    _row("adamw_mean", 0.9, (ADAPTERS // 4,)),
)
