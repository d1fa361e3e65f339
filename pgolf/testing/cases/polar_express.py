"""Inputs of Muon's direction."""

import torch
from torch import Tensor

from pgolf.ops import polar_express
from pgolf.testing.operator import Arguments, Function, Operator, Shape, nbytes


def _make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    """shape = (n, rows, cols); the momentum is that of about ten steps. dtype: of the gradient."""
    draw = torch.Generator().manual_seed(seed)
    grad = torch.randn(shape, generator=draw) * 1e-3
    momentum = torch.randn(shape, generator=draw) * 3e-3
    return grad.to(device, dtype), momentum.to(device, torch.bfloat16), 0.95


def op(grad: Tensor, momentum: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """The direction and the new momentum, in a tensor of its own."""
    updated = momentum.clone()
    return polar_express.polar_express_op(grad, updated, mu), updated


def reference(grad: Tensor, momentum: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    updated = momentum.clone()
    return polar_express.reference(grad, updated, mu), updated


def _flops(arguments: Arguments) -> int:
    """Of all products in full."""
    batch, rows, cols = arguments[0].shape
    side, length = min(rows, cols), max(rows, cols)
    return len(polar_express.POLAR_EXPRESS) * batch * 2 * side * side * (2 * length + side)


def _compiled() -> Function:
    from pgolf.testing.baselines import polar_express as baselines

    return baselines.compiled(reference)


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="polar_express",
        op=op,
        custom_op=polar_express.polar_express_op,
        reference=reference,
        make=_make,
        shapes=(
            (1, 8, 8),
            (2, 16, 24),
            (2, 24, 16),
            (3, 136, 72),  # tall, no whole number of tiles
            (2, 64, 2056),  # rows beyond 2,048 values
            (2, 264, 520),
            (2, 520, 264),
            (1, 512, 512),
        ),
        large=(22, 512, 512),
        more_large=((22, 256, 512), (11, 2048, 512), (11, 512, 2048)),
        small=(2, 128, 256),
        forward_bytes=lambda a: nbytes(a[0], a[1], a[1], a[1]),
        forward_flops=_flops,
        builds=("generic", "sm90"),
        aligned=True,
        baselines={"torch.compile": _compiled},
    ),
)
