"""Inputs of QK-norm, rotary embedding and query gain."""

import torch

from pgolf.ops import qk_rope
from pgolf.testing.operator import Arguments, Operator, Shape, nbytes


def _make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    """shape = (B, T, H, Hk, d, r); angles as the model's, of base 10,000."""
    batch, length, heads, kv_heads, dim, half = shape
    draw = torch.Generator().manual_seed(seed)
    parameter_type = torch.promote_types(dtype, torch.float32)
    qkv = torch.randn(batch, length, (heads + 2 * kv_heads) * dim, generator=draw)
    gain = 1 + torch.rand(heads, generator=draw)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * 10000.0 ** -(torch.arange(half) / max(half, 1))
    cos, sin = (x.to(device, parameter_type) for x in (angle.cos(), angle.sin()))
    leaves = (qkv.to(device, dtype).requires_grad_(), gain.to(device, parameter_type).requires_grad_())
    return *leaves, cos, sin, kv_heads


def _values_bytes(arguments: Arguments) -> int:
    """Of the values alone, a part of qkv that the forward does not touch."""
    qkv, gain, _, _, kv_heads = arguments
    return nbytes(qkv) // (len(gain) + 2 * kv_heads) * int(kv_heads)


def _forward_bytes(arguments: Arguments) -> int:
    return 2 * (nbytes(arguments[0]) - _values_bytes(arguments)) + nbytes(*arguments[1:4])


def _backward_bytes(arguments: Arguments) -> int:
    """Gradients of q, k and twice v read, q and k read, qkv's gradient written."""
    return 3 * nbytes(arguments[0]) + nbytes(arguments[1], *arguments[1:4])


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="qk_rope",
        op=qk_rope.qk_rope,
        reference=qk_rope.reference,
        make=_make,
        shapes=(
            (1, 1, 1, 1, 8, 0),  # nothing turns
            (2, 3, 4, 2, 8, 2),  # a lane of the kernel has all of a head
            (1, 3, 2, 1, 16, 8),  # and here half of one: all columns turn
            (2, 65, 4, 2, 64, 8),  # the kernel's chunks of heads not full
            (2, 33, 8, 4, 64, 8),  # the recipe's heads
            (3, 50, 8, 4, 64, 5),  # columns of a lane that do not turn together
            (1, 70, 5, 3, 40, 16),  # a head is no power of two lanes wide
            (2, 40, 4, 2, 128, 64),
            (1, 37, 9, 3, 72, 13),  # more heads than a block takes
            (1, 20, 20, 10, 64, 32),
            (1, 30, 2, 1, 10, 3),  # no multiple of 8: no kernel
            (1, 12, 1, 1, 136, 8),  # too wide for the kernel
        ),
        large=(1, 98304, 8, 4, 64, 8),
        small=(1, 8192, 8, 4, 64, 8),
        forward_bytes=_forward_bytes,
        backward_bytes=_backward_bytes,
    ),
)
