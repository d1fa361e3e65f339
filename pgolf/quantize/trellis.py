"""Trellis-coded quantization inside GPTQ: a column's levels are chosen together, by a search down its rows.

Levels are integers in [-127, 127] that obey a trellis: from state s = 0 in the first row, t = 2k + (s & 1), and the
next state follows from s and the low bit of k. Whoever decodes a column knows the parity of its next level beforehand,
so a level costs a bit less than its step would suggest; a search over all paths wins back most of what the missing
choice costs. The search and the loop over columns are the operator `pgolf.ops.trellis`, for many matrices at once;
`reference_column` is one column in NumPy.

Papers: trellis-coded quantization, Marcellin and Fischer 1990; its entropy-coded form, JPEG 2000 part 2 and
VVC's dependent quantization (ITU-T H.266); GPTQ, arXiv:2210.17323.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.codec import TRELLISES
from pgolf.dequantize import column_factor
from pgolf.errors import PgolfError
from pgolf.ops.trellis import trellis
from pgolf.quantize import gptq

LARGEST = 127
OCTAVE = 8  # column steps in a factor of two: `dequantize.column_factor`
STEP_LIMIT = 3 * OCTAVE  # a column's factor stays within 1/8 and 8
CELL_VARIANCE = np.float32(1 / 3)  # of a uniform number in a level's cell, which is two steps wide
SQUARE_UNIT = 2.0**-24  # squares of weights in steps are summed as multiples of it
COLUMN_SUMS = 512  # that a column's mean is gathered in

Floats = NDArray[np.float32]


class Problem(NamedTuple):
    """One matrix to quantize."""

    weight: Tensor  # [rows, cols], y = x Wᵀ, finite
    hessian: Tensor | gptq.Factor  # [cols, cols], XᵀX of the inputs up to a factor, or what `factorize` made of it
    row_step: Tensor  # [rows], half of the step that a scalar quantizer would have


class TrellisResult(NamedTuple):
    """Levels and steps of one matrix, columns in their natural order; on the CPU."""

    q: Tensor  # int8 [rows, cols], the levels
    scale: Tensor  # fp16 [rows], the rows' steps
    step: Tensor | None  # int8 [cols], factors of the columns' steps in 1/8 octaves; None: all one


def factorize(hessian: Tensor, damping: float = 0.01) -> gptq.Factor:
    """What `solve` needs of a Hessian, in float64 on its device: for matrices, or tries, that share it."""
    return gptq.inverse_factor(hessian, damping, torch.float64)


def solve(
    weight: Tensor,
    hessian: Tensor | gptq.Factor,
    row_step: Tensor,
    states: int = 64,
    rate: float = 0.364,
    damping: float = 0.01,
    block: int = 128,
    column_steps: bool = True,
) -> TrellisResult:
    """Quantize one matrix: `solve_all` of it alone; arguments as there and in `Problem`.

    On a CPU it is one thread and mostly without the interpreter lock.
    """
    prepared = _prepare(Problem(weight, hessian, row_step), damping, column_steps)
    (result,) = _solve_batch([prepared], states, rate, block)
    return result


def solve_all(
    problems: Mapping[str, Problem],
    states: int = 64,
    rate: float = 0.364,
    damping: float = 0.01,
    block: int = 128,
    column_steps: bool = True,
) -> dict[str, TrellisResult]:
    """Quantize matrices of any shapes so that of each trace(E H Eᵀ), with E in units of the row's step, plus `rate`
    times the coded bits is small.

    It runs where the weights are, all on one device: on a GPU a whole model takes as long as its largest matrix, on the
    CPU torch's number of threads work side by side. Given the same factors, both yield the same levels.

    Args:
        problems: the matrices by name. A row whose largest weight lies beyond 127 of its steps gets the step that makes
            it 127; what counts is the step rounded to fp16. A Hessian that matrices share is factorized once; it may be
            on another device than they are.
        states: of the trellis: 4, 8, 32, 64 or 256.
        rate: what a bit is worth, in squared steps.
        damping: added to a Hessian's diagonal, as a share of its mean; a factor given has its own.
        block: columns whose errors are gathered on the CPU; changes the time and nothing else.
        column_steps: give each column a step of its own, by how little it matters: see `_column_steps`.

    Returns:
        By name levels that obey the trellis in every column; columns without input, and rows of zeros, come back as
        zeros.

    Raises, naming the matrix:
        PgolfError: a weight that is not finite, or a row whose step does not fit in fp16.
        torch.linalg.LinAlgError: a damped Hessian is not positive definite.
        ValueError: an argument that does not fit.
    """
    factors: dict[int, gptq.Factor] = {}
    prepared = []
    for name, problem in problems.items():
        hessian = problem.hessian
        if isinstance(hessian, Tensor):
            if id(hessian) not in factors:
                factors[id(hessian)] = factorize(hessian, damping)
            problem = problem._replace(hessian=factors[id(hessian)])
        try:
            prepared.append(_prepare(problem, damping, column_steps))
        except PgolfError as error:
            raise PgolfError(f"{name}: {error}") from error
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined, unused-ignore]
            raise type(error)(f"{name}: {error}") from error
    return dict(zip(problems, _solve_batch(prepared, states, rate, block), strict=True))


class _Prepared(NamedTuple):
    """What the operator takes of one matrix, on the weight's device, and what its result needs besides."""

    work: Tensor  # float32 [cols, rows], columns in the order of processing
    upper: Tensor  # float32 [cols, cols]
    row_step: Tensor  # float32 [rows]
    row_variance: Tensor  # float32 [rows]
    column_factor: Tensor  # float32 [cols]
    order: Tensor  # int64 [cols]
    scale: Tensor  # fp16 [rows], on the CPU
    step: Tensor | None  # int8 [cols], on the CPU


def _prepare(problem: Problem, damping: float, column_steps: bool) -> _Prepared:
    """Only operations that give the same bits on every device run on the weight's: what is left is a number a row or
    column, and goes through NumPy."""
    weight, hessian, row_step = problem
    factor = factorize(hessian, damping) if isinstance(hessian, Tensor) else hessian
    rows, cols = weight.shape
    if factor.order.shape != (cols,) or row_step.shape != (rows,):
        got = f"{list(weight.shape)}, {list(factor.upper.shape)} and {list(row_step.shape)}"
        raise ValueError(
            f"trellis: weight, hessian, row_step: expected [rows, cols], [cols, cols] and [rows], got {got}"
        )
    if not factor.valid:
        raise torch.linalg.LinAlgError("the Hessian cannot be inverted")
    device = weight.device
    order, dead, upper = factor.order.to(device), factor.dead.to(device), factor.upper.to(device)
    natural = weight.detach().float()
    if not natural.isfinite().all():
        raise PgolfError("a matrix holds infinite or undefined weights; training diverged, quantize an earlier one")
    natural = natural.masked_fill(dead, 0)
    peak = natural.abs().amax(dim=1).cpu().numpy() if cols else np.zeros(rows, np.float32)
    wanted = row_step.detach().double().cpu().numpy()
    with np.errstate(over="ignore"):
        scale = np.maximum(wanted, peak / LARGEST).astype(np.float16)
    if not (np.isfinite(scale).all() and (wanted >= 0).all()):
        raise PgolfError(
            "a row's step is negative, undefined or beyond fp16 (largest 65504); are its weights too large?"
        )

    step = torch.from_numpy(scale.astype(np.float32)).to(device)
    work = natural.T[order].contiguous()
    index = np.zeros(cols, np.int8)
    if column_steps:
        pivot = np.empty(cols)
        pivot[order.cpu().numpy()] = upper.diagonal().double().cpu().numpy()
        most = in_steps(natural.T, step).abs().amax(dim=1) if rows else natural.new_zeros(cols)
        index = _column_steps(most.cpu().numpy(), pivot, dead.cpu().numpy())
    return _Prepared(
        work=work,
        upper=upper.float(),
        row_step=step,
        row_variance=row_variance(work, step),
        column_factor=torch.from_numpy(column_factor(index)).to(device)[order],
        order=order,
        scale=torch.from_numpy(scale),
        step=torch.from_numpy(index) if column_steps else None,
    )


def _solve_batch(prepared: list[_Prepared], states: int, rate: float, block: int) -> list[TrellisResult]:
    if states not in TRELLISES:
        raise ValueError(f"trellis: states: expected one of {list(TRELLISES)}, got {states}")
    if not prepared:
        return []
    # The matrix that takes longest is started first.
    largest_first = sorted(range(len(prepared)), key=lambda i: -prepared[i].work.numel())
    ordered = [prepared[i] for i in largest_first]
    levels = trellis(
        weight=torch.cat([p.work.reshape(-1) for p in ordered]),
        upper=torch.cat([p.upper.reshape(-1) for p in ordered]),
        row_step=torch.cat([p.row_step for p in ordered]),
        row_variance=torch.cat([p.row_variance for p in ordered]),
        column_factor=torch.cat([p.column_factor for p in ordered]),
        rows=[p.work.shape[1] for p in ordered],
        cols=[p.work.shape[0] for p in ordered],
        states=states,
        rate=rate,
        block=block,
    ).split([p.work.numel() for p in ordered])
    results = {}
    for place, p, found in zip(largest_first, ordered, levels, strict=True):
        q = torch.empty_like(p.work, dtype=torch.int8)
        q[p.order] = found.view(p.work.shape)
        results[place] = TrellisResult(q.T.contiguous().cpu(), p.scale, p.step)
    return [results[place] for place in range(len(prepared))]


def _column_steps(most: Floats, pivot: NDArray[np.float64], dead: NDArray[np.bool_]) -> NDArray[np.int8]:
    """int8 [cols]: 8 log2 of the columns' factors, from the largest weight of each in steps of its row.

    A column's error, as large as its step, costs (step / U_cc)^2 once the columns behind it have repaid what they can;
    for a given number of bits the sum is smallest when every column costs the same, so steps go with U_cc. Their
    geometric mean is one. A column keeps a step large enough for its largest weight, the rows' steps as they are.
    """
    index = np.zeros(len(pivot))
    live = ~dead
    if live.any():
        octaves = np.log2(pivot[live])
        index[live] = np.rint(OCTAVE * (octaves - octaves.mean())).clip(-STEP_LIMIT, STEP_LIMIT)
    with np.errstate(divide="ignore"):
        # A row's largest is at 127 steps, but for fp16's rounding.
        fits = np.ceil(OCTAVE * np.log2(most / LARGEST, dtype=np.float64) - 1e-2)
    return np.maximum(index, fits).clip(-LARGEST, LARGEST).astype(np.int8)


def in_steps(work: Tensor, row_step: Tensor) -> Tensor:
    """Weights [cols, rows] in steps of their row; 0 in a row of step 0."""
    return torch.where(row_step > 0, work / row_step, torch.zeros_like(work))


def row_variance(work: Tensor, row_step: Tensor) -> Tensor:
    """float32 [rows]: mean over columns of (weight / step)^2, from columns [cols, rows]; 0 for a row of step 0.

    Squares are summed as integers, whose sum is the same in any order.
    """
    squares = (in_steps(work, row_step).double().square() / SQUARE_UNIT).round().long()
    return (squares.sum(dim=0).double() * (SQUARE_UNIT / max(len(work), 1))).float()


def dequantize(result: TrellisResult) -> Tensor:
    """float32 [rows, cols]: levels times the steps of their row and column."""
    weight = result.q.float() * result.scale.float()[:, None]
    return weight if result.step is None else weight * torch.from_numpy(column_factor(result.step.numpy()))


def distortion(weight: Tensor, result: TrellisResult, hessian: Tensor) -> float:
    """trace(E H Eᵀ) in float64: the squared change of the outputs, summed over the inputs behind the Hessian."""
    error = (weight.cpu() - dequantize(result)).double()
    return float(((error @ hessian.cpu().double()) * error).sum())


def estimate_bits(q: Tensor) -> float:
    """Bits that an adaptive entropy coder needs for the levels [rows, cols], without running one.

    An entry's spread is taken as its row's times its column's (the root of the mean square); entries of about the same
    spread, to half an octave, share a histogram for each parity. The sum of their entropies, and for each learned
    number (a spread, an occupied cell of a histogram) the usual half of the logarithm of the entries behind it.
    """
    rows, cols = q.shape
    level = q.cpu().numpy()
    square = np.square(level, dtype=np.int16)
    by_row, by_column = square.sum(axis=1, dtype=np.int64), square.sum(axis=0, dtype=np.int64)
    total = int(by_row.sum())  # integers: the same sums in any order
    if total == 0:
        return 0.0
    half_octaves = [np.log2(np.maximum(sums, 0.25)).astype(np.float32) for sums in (by_row, by_column)]
    group = np.rint(half_octaves[0][:, None] + half_octaves[1] - np.float32(math.log2(total))).astype(np.int32)
    group -= group.min()
    cells = np.bincount((group * 256 + 128 + level).ravel(), minlength=256 * (int(group.max()) + 1))
    count = cells.reshape(-1, 128, 2).transpose(0, 2, 1).astype(np.float64)  # [group, parity, k]
    behind = np.broadcast_to(count.sum(axis=2, keepdims=True), count.shape)
    used = count > 0
    count, behind = count[used], behind[used]
    entropy = float((count * np.log2(behind / count)).sum())
    learned = float(np.log2(behind + 1).sum()) + rows * math.log2(cols) + cols * math.log2(rows)
    return entropy + 0.5 * learned


def reference_column(
    weight: Floats,
    pivot: np.float32,
    row_step: Floats,
    column_factor: np.float32,
    row_variance: Floats,
    states: int,
    rate: float,
) -> tuple[NDArray[np.int8], Floats]:
    """One column [rows], by an exact search over every level: (levels int8 [rows], error float32 [rows]).

    Each operation is rounded to float32 in the order of `csrc/trellis`, so that the two agree in every level. `error`
    is what GPTQ takes from column j behind this one, times U[c, j].
    """
    h0, h1 = TRELLISES[states]
    step = row_step * column_factor
    x = np.divide(weight, step, out=np.zeros_like(weight), where=step > 0)
    held = row_variance > 0
    shares = np.divide(x.astype(np.float64) * x, row_variance, out=np.zeros(len(x)), where=held)
    share = np.float32(_column_sum(shares) / held.sum()) if held.any() else np.float32(0)
    # Bits of t under a Gaussian: t^2 / (2 variance ln 2) + constant; the square is completed.
    worth = np.float32(float(np.float32(rate)) / (2 * math.log(2)))
    scale = np.float32(1) + worth / np.maximum(row_variance * share, CELL_VARIANCE)
    target = x / scale

    levels = np.array(sorted(range(-LARGEST, LARGEST + 1), key=lambda t: (abs(t), t)))
    classes = [levels[levels % 4 == c] for c in range(4)]  # t mod 4 = 2 (k & 1) + (s & 1)
    cost = np.full(states, np.float32(1e30))
    cost[0] = 0
    came_from = np.zeros((len(x), states), np.int16)
    level_to = np.zeros((len(x), states), np.int8)
    for r in range(len(x)):
        after = np.full(states, np.float32(np.inf))
        best = []  # of each class: (cost, level)
        for options in classes:
            away = target[r] - options.astype(np.float32)
            costs = scale[r] * (away * away)
            best.append((costs.min(), options[costs.argmin()]))
        for odd in (0, 1):
            for s in range(states):
                price, level = best[2 * odd + (s & 1)]
                total = cost[s] + price
                following = (s >> 1) ^ ((s & 1) * (h0 >> 1)) ^ (odd * (h1 >> 1))
                if total < after[following]:
                    after[following] = total
                    came_from[r, following], level_to[r, following] = s, level
        cost = after
    state = int(np.argmin(cost))
    chosen = np.zeros(len(x), np.int8)
    for r in reversed(range(len(x))):
        chosen[r] = level_to[r, state]
        state = came_from[r, state]
    return chosen, (weight - chosen.astype(np.float32) * step) / pivot


def _column_sum(values: NDArray[np.float64]) -> float:
    """In the order of `csrc/trellis`: every COLUMN_SUMS-th value, one after the other; then these sums, by halves."""
    padded = np.pad(values, (0, -len(values) % COLUMN_SUMS)).reshape(-1, COLUMN_SUMS)
    sums: NDArray[np.float64] = padded.cumsum(axis=0)[-1]
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return float(sums[0])
