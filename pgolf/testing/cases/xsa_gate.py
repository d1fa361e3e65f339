"""Inputs of XSA and the heads' gates: both, and each alone."""

import torch
from torch import Tensor

from pgolf.ops import xsa_gate
from pgolf.testing.operator import Arguments, Operator, Shape, nbytes

SHAPES = (
    (1, 1, 1, 1, 8),
    (2, 3, 4, 2, 8),  # a lane of the kernel has all of a head
    (1, 3, 3, 1, 16),  # an odd group: the kernel takes two heads of it at once
    (2, 65, 4, 2, 64),
    (1, 129, 8, 4, 64),  # the recipe's heads
    (2, 33, 6, 6, 40),  # no groups; a head is no power of two lanes wide
    (1, 50, 5, 1, 128),
    (3, 37, 9, 3, 72),
    (1, 30, 4, 2, 10),  # no multiple of 8: no kernel
    (1, 12, 2, 1, 136),  # too wide for the kernel
)
LARGE = (1, 98304, 8, 4, 64)
SMALL = (1, 8192, 8, 4, 64)


def _draw(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, v, a view of wider rows as the model's, and gate; shape = (B, T, H, Hk, d)."""
    batch, length, heads, kv_heads, dim = shape
    draw = torch.Generator().manual_seed(seed)
    y = torch.randn(batch, length, heads, dim, generator=draw).to(device, dtype)
    rows = torch.randn(batch, length, heads + 2 * kv_heads, dim, generator=draw).to(device, dtype)
    gate = torch.rand(batch, length, heads, generator=draw).to(device, dtype)
    return y.requires_grad_(), rows[:, :, heads + kv_heads :].requires_grad_(), gate.requires_grad_()


def _make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    return _draw(shape, dtype, device, seed)


def _make_ungated(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    return _draw(shape, dtype, device, seed)[:2]


def _make_gate(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    y, _, gate = _draw(shape, dtype, device, seed)
    return y, gate


def gate_alone(y: Tensor, gate: Tensor) -> Tensor:
    """The gates without XSA."""
    return xsa_gate.xsa_gate(y, y.detach(), gate, xsa=False)


def gate_reference(y: Tensor, gate: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    return xsa_gate.reference(y, y, gate, xsa=False)


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="xsa_gate",
        op=xsa_gate.xsa_gate,
        reference=xsa_gate.reference,
        make=_make,
        shapes=SHAPES,
        large=LARGE,
        small=SMALL,
        forward_bytes=lambda a: nbytes(*a, a[0]),
        backward_bytes=lambda a: nbytes(a[0], *a, *a),
    ),
    Operator(
        name="xsa",
        op=xsa_gate.xsa_gate,
        reference=xsa_gate.reference,
        make=_make_ungated,
        shapes=SHAPES,
        large=LARGE,
        small=SMALL,
        forward_bytes=lambda a: nbytes(*a, a[0]),
        backward_bytes=lambda a: nbytes(a[0], *a, *a),
    ),
    Operator(
        name="head_gate",
        op=gate_alone,
        reference=gate_reference,
        make=_make_gate,
        shapes=SHAPES,
        large=LARGE,
        small=SMALL,
        forward_bytes=lambda a: nbytes(*a, a[0]),
        backward_bytes=lambda a: nbytes(a[0], *a, *a),
    ),
)
