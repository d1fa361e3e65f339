"""GPTQ: round a matrix column by column, each column's error repaid by the columns still to come.

Papers: GPTQ, arXiv:2210.17323; the protected column groups are AWQ-lite, after arXiv:2306.00978.
Constants: recipe section 4. The loop over columns is the operator `pgolf.ops.gptq`, for many matrices at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.ops.gptq import gptq

Ranges = Sequence[tuple[int, int]]  # (first column, number of columns)

SCALE_FLOOR = 1e-10  # below fp16: such a row is stored with scale 0 and comes back as zeros
PLAIN, PROTECTED = 0, 1  # the operator's groups of columns


class Problem(NamedTuple):
    """One matrix to quantize, so that the change of its outputs, trace(E H Eᵀ), is small."""

    weight: Tensor  # [rows, cols], y = x Wᵀ
    hessian: Tensor  # [cols, cols], XᵀX of the inputs up to a factor; matrices with the same inputs share the tensor
    clip: float  # range of a row in its standard deviations; the largest integer stands for it
    bits: int  # width of the integers, 2 to 8
    protected: Ranges = ()  # columns kept at a width and a row scale of their own


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


class Factor(NamedTuple):
    """What a Hessian says about the columns of the matrices behind it."""

    dead: Tensor  # bool [cols]: columns whose input is always zero
    order: Tensor  # int64 [cols]: the order of processing
    upper: Tensor  # [cols, cols]: U, where UᵀU is the inverse of the damped Hessian in that order
    valid: Tensor  # bool []: whether the damped Hessian is positive definite; without it U means nothing


def largest(bits: int) -> int:
    """The largest magnitude of a symmetric `bits`-bit integer."""
    return (1 << (bits - 1)) - 1


def half_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """A scale as it is stored (fp16) and as the solver must divide by it (float32, floored)."""
    stored = scale.half()
    return stored, stored.float().clamp_min(SCALE_FLOOR)


def inverse_factor(hessian: Tensor, damping: float, dtype: torch.dtype) -> Factor:
    """Prepare a Hessian, computing in `dtype`; asynchronous on a GPU.

    `order` takes columns by falling diagonal, so that the inputs that matter most are rounded while the most columns
    are left to repay them.
    """
    hessian = hessian.to(dtype, copy=True)
    diagonal = hessian.diagonal()  # a view: what is written to it is written to the Hessian
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1)
    diagonal += damping * diagonal.mean()
    order = torch.argsort(diagonal, descending=True, stable=True)
    lower, failed = torch.linalg.cholesky_ex(hessian[order][:, order])
    unit = torch.eye(len(order), dtype=dtype, device=hessian.device)
    lower = torch.where(failed == 0, lower, unit)  # a failed factor may end the inversion, before `valid` is read
    upper, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return Factor(dead, order, upper, (failed + failed_again == 0) & upper.diagonal().isfinite().all())


def solve(
    weight: Tensor,
    hessian: Tensor,
    clip: float,
    bits: int,
    block: int = 128,
    damping: float = 0.01,
    protected: Ranges = (),
    protected_bits: int = 8,
    dtype: torch.dtype | None = None,
) -> GptqResult:
    """Quantize one matrix: `solve_all` of it alone; arguments as there and in `Problem`."""
    problem = Problem(weight, hessian, clip, bits, protected)
    ((_, result),) = solve_all({"the matrix": problem}, block, damping, protected_bits, dtype)
    return result


def solve_all(
    problems: Mapping[str, Problem],
    block: int = 128,
    damping: float = 0.01,
    protected_bits: int = 8,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, GptqResult]]:
    """Quantize many matrices; yields (name, result) as they are solved, on a GPU all of one shape at once.

    Args:
        problems: the matrices by name. A Hessian may be on another device than its weight.
        block: columns whose errors are gathered before the rest of a matrix is corrected.
        damping: added to a Hessian's diagonal, as a share of its mean.
        protected_bits: width of the integers in protected ranges, 2 to 8.
        dtype: what is computed in: by default float64 on a GPU, and on the CPU float32 in the record's order of
            operations. It matters where a weight, errors repaid, is a tie to within its precision: the row's columns
            behind that one then repay another error.

    Returns:
        Results on the weights' device.

    Raises:
        torch.linalg.LinAlgError: naming a matrix whose damped Hessian is not positive definite.
    """
    factors: dict[int, Factor] = {}  # by Hessian: query, key and value of a layer share theirs
    for names in _batches(problems):
        batch = [problems[name] for name in names]
        device = batch[0].weight.device
        precision = dtype or (torch.float64 if device.type == "cuda" else torch.float32)
        for hessian in (problem.hessian for problem in batch):
            if id(hessian) not in factors:
                factors[id(hessian)] = inverse_factor(hessian.to(device), damping, precision)
        found = [factors[id(problem.hessian)] for problem in batch]
        for name, valid in zip(names, torch.stack([factor.valid for factor in found]).tolist(), strict=True):
            if not valid:
                raise torch.linalg.LinAlgError(f"the Hessian of {name} cannot be inverted")
        yield from zip(names, _solve_batch(batch, found, block, protected_bits), strict=True)


def _batches(problems: Mapping[str, Problem]) -> list[list[str]]:
    """The matrices to solve together: on a GPU those of one shape; on the CPU, which gains nothing by it, one."""
    batches: dict[object, list[str]] = {}
    for name, (weight, *_) in problems.items():
        batches.setdefault(name if weight.device.type == "cpu" else weight.shape, []).append(name)
    return list(batches.values())


def _solve_batch(
    problems: Sequence[Problem], factors: Sequence[Factor], block: int, protected_bits: int
) -> list[GptqResult]:
    """Solve matrices of one shape on one device."""
    weight = torch.stack([problem.weight.float() for problem in problems])
    device = weight.device
    limits = [[largest(problem.bits) for problem in problems], [largest(protected_bits)] * len(problems)]
    limit = torch.tensor(limits, dtype=torch.int32, device=device)
    clip = torch.tensor([[problem.clip] for problem in problems], device=device)
    # Of the original row: dead columns still count. Summed in float64, or devices would differ in an fp16 scale's bit.
    spread = clip * weight.double().std(dim=2).float()
    stored, divisor = half_scale(spread / limit[..., None])

    group = torch.full((len(problems), weight.shape[2]), PLAIN, dtype=torch.uint8, device=device)
    for columns, problem in zip(group, problems, strict=True):
        for start, size in problem.protected:
            columns[start : start + size] = PROTECTED
    order = torch.stack([factor.order for factor in factors])
    places = order[:, None].expand_as(weight)
    dead = torch.stack([factor.dead for factor in factors])
    ordered = weight.masked_fill_(dead[:, None], 0).gather(2, places)
    upper = torch.stack([factor.upper for factor in factors])
    q = gptq(ordered, upper, divisor, group.gather(1, order), limit, block)
    natural = torch.empty_like(q).scatter_(2, places, q)
    return [
        GptqResult(natural[i], stored[PLAIN, i], stored[PROTECTED, i] if problem.protected else None)
        for i, problem in enumerate(problems)
    ]
