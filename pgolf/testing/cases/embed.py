"""Inputs of the fused embedding."""

import torch
from torch import Tensor

from pgolf.ops import embed
from pgolf.testing.operator import Arguments, Operator, Shape, nbytes

BOS = 1


def draw_ids(batch: int, length: int, vocab: int, draw: torch.Generator) -> Tensor:
    """Ids [batch, length], about as unevenly frequent as a text's: the k-th in proportion to 1 / k.

    One token in fifty begins a document, the very last among them. Ids 0 and vocab - 1 never occur; vocab >= 4.
    """
    ids = 1 + (vocab - 3) ** torch.rand(batch, length, generator=draw, dtype=torch.float64)
    ids = ids.long().clamp(2, vocab - 2)
    ids[torch.rand(batch, length, generator=draw) < 0.02] = BOS
    ids[-1, -1] = BOS
    return ids


def _make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    """shape = (B, T, D, V, W)."""
    batch, length, dim, vocab, window = shape
    draw = torch.Generator().manual_seed(seed)
    ids = draw_ids(batch, length, vocab, draw)
    parameter_type = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(vocab, dim, generator=draw).to(device, dtype).requires_grad_()
    gate_weight = (torch.randn(1, window, generator=draw) / window**0.5).to(device, parameter_type).requires_grad_()
    # Below 1, so that a token does not take itself away where it is repeated: that leaves rounding errors alone.
    lam = (1.6 * torch.rand(1, generator=draw) - 0.8).to(device, parameter_type).requires_grad_()
    # One epsilon for all types, so that the result in float64 is that of the same function.
    return ids.to(device), weight, gate_weight, lam, BOS, None, embed.machine_epsilon(dtype)


def result_of(*arguments: object) -> Tensor:
    """The custom operator without what it keeps for its backward."""
    x0: Tensor = embed.embed_op(*arguments)[0]
    return x0


def _forward_bytes(arguments: Arguments) -> int:
    ids, weight = arguments[:2]
    return nbytes(ids, weight) + ids.numel() * weight.shape[1] * weight.itemsize


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="embed",
        op=result_of,
        custom_op=embed.embed_op,
        reference=embed.reference,
        make=_make,
        shapes=(
            (1, 1, 8, 4, 1),  # no previous token at all
            (3, 1, 16, 5, 12),
            (1, 4, 24, 50, 24),  # the window is the whole row
            (2, 63, 64, 50, 12),
            (2, 65, 100, 40, 33),  # rows of no whole number of 16-byte vectors, window beyond a warp
            (1, 200, 13, 33, 5),  # odd rows
            (1, 1500, 512, 31, 12),  # long runs of one id, over several warps and blocks
            (2, 300, 520, 70, 12),  # rows that a warp does not hold whole
            (3, 129, 1160, 1000, 600),
        ),
        large=(1, 98304, 512, 8192, 12),
        small=(1, 8192, 512, 8192, 12),
        forward_bytes=_forward_bytes,
        # The result's gradient and the ids read, the embedding read and its gradient written.
        backward_bytes=lambda a: _forward_bytes(a) + nbytes(a[1]),
    ),
)
