"""GPTQ: round a matrix column by column, each column's error repaid by the columns still to come.

Papers: GPTQ, arXiv:2210.17323; the protected column groups are AWQ-lite, after arXiv:2306.00978.
Constants: recipe section 4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]  # (first column, number of columns)

SCALE_FLOOR = 1e-10  # below fp16: such a row is stored with scale 0 and comes back as zeros


class GptqResult(NamedTuple):
    """Integers and row scales of one matrix; columns in their natural order."""

    q: Tensor  # int8 [rows, cols]
    scale: Tensor  # fp16 [rows]
    scale_hi: Tensor | None  # fp16 [rows], for protected columns; None when there are none

    def dequantize(self, protected: Ranges = ()) -> Tensor:
        """float32 [rows, cols]: integers times the scale of their row and range."""
        weight = self.q.float() * self.scale.float()[:, None]
        if self.scale_hi is not None:
            for start, size in protected:
                columns = slice(start, start + size)
                weight[:, columns] = self.q[:, columns].float() * self.scale_hi.float()[:, None]
        return weight


def largest(bits: int) -> int:
    """The largest magnitude of a symmetric `bits`-bit integer."""
    return (1 << (bits - 1)) - 1


def half_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """A scale as it is stored (fp16) and as the solver must divide by it (float32, floored)."""
    stored = scale.half()
    return stored, stored.float().clamp_min(SCALE_FLOOR)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Prepare a Hessian: (dead columns [cols] bool, order [cols] int64, U [cols, cols] upper).

    `order` takes columns by falling diagonal, so that the inputs that matter most are rounded while the most columns
    are left to repay them; U is the upper Cholesky factor of the inverse of the damped Hessian in that order.
    Raises torch.linalg.LinAlgError when the damped Hessian is not positive definite.
    """
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()  # a view: what is written to it is written to the Hessian
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    order = torch.argsort(diagonal, descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    return dead, order, torch.linalg.cholesky(inverse, upper=True)


def solve(
    weight: Tensor,
    hessian: Tensor,
    clip: float,
    bits: int,
    block: int = 128,
    damping: float = 0.01,
    protected: Ranges = (),
    protected_bits: int = 8,
) -> GptqResult:
    """Quantize `weight` so that the change of its outputs, trace(E H Eᵀ), is small.

    Args:
        weight: [rows, cols], y = x Wᵀ.
        hessian: [cols, cols], XᵀX of the inputs up to a factor.
        clip: range of a row in its standard deviations; the largest integer stands for it.
        bits: width of the integers, 2 to 8.
        block: columns whose errors are gathered before the rest of the matrix is corrected.
        damping: added to the Hessian's diagonal, as a share of its mean.
        protected: column ranges kept at `protected_bits` with a row scale of their own.
        protected_bits: width of the integers in protected ranges, 2 to 8.

    Returns:
        GptqResult on the device of `weight`.

    Raises:
        torch.linalg.LinAlgError: the damped Hessian is not positive definite.
    """
    rows, cols = weight.shape
    dead, order, factor = inverse_factor(hessian, damping)

    spread = clip * weight.float().std(dim=1)  # of the original row: dead columns still count
    scale, divisor = half_scale(spread / largest(bits))
    scale_hi, divisor_hi = half_scale(spread / largest(protected_bits))
    is_protected = torch.zeros(cols, dtype=torch.bool)
    for start, size in protected:
        is_protected[start : start + size] = True
    plain, wide = (divisor, largest(bits)), (divisor_hi, largest(protected_bits))
    grids = [wide if hi else plain for hi in is_protected[order.cpu()].tolist()]

    # Transposed, a column is contiguous: the loop below runs once a column and is bound by memory.
    work = weight.float().masked_fill(dead, 0).T[order].contiguous()
    integers = torch.empty_like(work)
    pivots = factor.diagonal().tolist()
    for first in range(0, cols, block):
        last = min(first + block, cols)
        errors = torch.empty(last - first, rows, device=work.device)
        for j in range(first, last):
            by, limit = grids[j]
            torch.div(work[j], by, out=integers[j]).round_().clamp_(-limit, limit)
            error = torch.sub(work[j], integers[j] * by, out=errors[j - first]).div_(pivots[j])
            work[j + 1 : last].sub_(torch.outer(factor[j, j + 1 : last], error))
        work[last:].sub_(factor[first:last, last:].T @ errors)

    natural = torch.argsort(order)
    q = integers[natural].T.to(torch.int8).contiguous()
    return GptqResult(q, scale, scale_hi if protected else None)
