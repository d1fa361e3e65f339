"""LQER: what GPTQ left over, W - Wq, given back as a low-rank product A B of very few bits.

Paper: LQER, arXiv:2402.02446. Constants: recipe section 4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.quantize.gptq import half_scale


class LowRank(NamedTuple):
    """A [rows, rank] and B [rank, cols] as int8 tensors, with fp16 scales."""

    a: Tensor
    a_scale: Tensor
    b: Tensor
    b_scale: Tensor


def factors(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` product: A = U S [rows, rank], B = Vᵀ [rank, cols] (signs are arbitrary)."""
    u, s, vt = torch.linalg.svd(residual.float(), full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]


def asymmetric(residual: Tensor, rank: int, group: int) -> LowRank:
    """A as int2 in [-2, 1] with one scale []; B as int4 in [-8, 7] with a scale per `group` entries, row by row.

    Both ranges are uneven, hence the half: the scale puts the largest magnitude between the two ends.
    `group` must divide the number of entries of B.
    """
    a, b = factors(residual, rank)
    a_scale, a_divisor = half_scale(a.abs().amax() / 1.5)
    groups = b.reshape(-1, group)
    b_scale, b_divisor = half_scale(groups.abs().amax(dim=1) / 7.5)
    a_int = (a / a_divisor).round().clamp(-2, 1)
    b_int = (groups / b_divisor[:, None]).round().clamp(-8, 7).reshape(b.shape)
    return LowRank(a_int.char(), a_scale, b_int.char(), b_scale)


def symmetric(residual: Tensor, rank: int) -> LowRank:
    """A and B as int4 in [-7, 7], each with a scale per row: [rows] and [rank]."""
    packed: list[Tensor] = []
    for matrix in factors(residual, rank):
        scale, divisor = half_scale(matrix.abs().amax(dim=1) / 7)
        packed += [(matrix / divisor[:, None]).round().clamp(-7, 7).char(), scale]
    return LowRank(*packed)
