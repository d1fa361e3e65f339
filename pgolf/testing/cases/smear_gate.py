"""Inputs of SmearGate."""

import torch

from pgolf.ops import smear_gate
from pgolf.testing.operator import Arguments, Operator, Shape, nbytes


def _make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    """shape = (B, T, D, W); about one token in ten begins a document, the very first and the last among them."""
    batch, length, dim, window = shape
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 10, (batch, length), generator=draw)
    ids[:, 0] = ids[:, -1] = 1
    parameter_type = torch.promote_types(dtype, torch.float32)
    e = torch.randn(batch, length, dim, generator=draw).to(device, dtype).requires_grad_()
    weight = (torch.randn(1, window, generator=draw) / window**0.5).to(device, parameter_type).requires_grad_()
    lam = torch.randn(1, generator=draw).to(device, parameter_type).requires_grad_()
    return e, ids.to(device), weight, lam, 1


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="smear_gate",
        op=smear_gate.smear_gate_op,
        reference=smear_gate.reference,
        make=_make,
        shapes=(
            (1, 1, 8, 1),  # no previous token at all
            (3, 1, 16, 12),
            (1, 2, 24, 24),  # the window is the whole row
            (2, 63, 64, 12),
            (2, 65, 100, 33),  # rows of no whole number of 16-byte vectors, window beyond a warp
            (1, 200, 13, 5),  # odd rows
            (3, 129, 520, 12),
        ),
        large=(1, 98304, 512, 12),
        small=(1, 8192, 512, 12),
        forward_bytes=lambda a: nbytes(a[0], a[0], a[1]),
        backward_bytes=lambda a: nbytes(a[0], a[0], a[0], a[1]),
    ),
)
