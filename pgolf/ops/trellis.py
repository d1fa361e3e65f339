"""Trellis-coded GPTQ's column loop: each column's levels by a search down its rows, its error repaid by the columns
behind it.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf import _trellis
from pgolf.codec import TRELLISES
from pgolf.ops import _native


def reference(
    weight: Tensor,
    upper: Tensor,
    row_step: Tensor,
    row_variance: Tensor,
    column_factor: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    states: int,
    rate: float,
    block: int = 128,
) -> Tensor:
    """The column loop in C++ on the CPU, matrices side by side in threads; arguments as in `trellis`."""
    flat = [t.detach().cpu().numpy() for t in (weight, upper, row_step, row_variance, column_factor)]

    def solve(arrays: Iterable[NDArray[np.float32]]) -> NDArray[np.int8]:
        work, upper, step, variance, factor = arrays
        return _trellis.quantize(work, upper, step, variance, factor, states, rate, block)

    problems = list(_matrices(flat, rows, cols))
    with ThreadPoolExecutor(max(1, min(len(problems), torch.get_num_threads()))) as pool:
        levels = [found.ravel() for found in pool.map(solve, problems)]
    return torch.from_numpy(np.concatenate([np.empty(0, np.int8), *levels])).to(weight.device)


def _matrices(
    flat: list[NDArray[np.float32]], rows: Sequence[int], cols: Sequence[int]
) -> Iterator[tuple[NDArray[np.float32], ...]]:
    """Each matrix's part of the flat arrays, in its shape."""
    at = [0] * len(flat)
    for height, width in zip(rows, cols, strict=True):
        shapes = ((width, height), (width, width), (height,), (height,), (width,))
        sizes = [int(np.prod(shape)) for shape in shapes]
        yield tuple(
            array[start : start + size].reshape(shape)
            for array, start, size, shape in zip(flat, at, sizes, shapes, strict=True)
        )
        at = [start + size for start, size in zip(at, sizes, strict=True)]


def trellis(
    weight: Tensor,
    upper: Tensor,
    row_step: Tensor,
    row_variance: Tensor,
    column_factor: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    states: int = 64,
    rate: float = 0.364,
    block: int = 128,
) -> Tensor:
    """Quantize K matrices of any shapes, column by column in the order of processing; for c = 0, 1, ... and each column
    j > c, with step[r, c] = row_step[r] * column_factor[c],

        t[:, c] = the levels that the trellis allows and that minimize, over the rows r, the sum of
                  (w[r, c] / step[r, c] - t[r, c])^2 + rate * bits(t[r, c])
        w[:, j] -= (w[:, c] - t[:, c] step[:, c]) / U[c, c] * U[c, j]

    where bits(t) = t^2 / (2 variance ln 2), the length of t under a Gaussian. The variance of an entry in squared steps
    is its row's times its column's, which is the mean over rows of (w / step)^2 / row variance; at least 1/3, that of a
    level's own cell.

    Papers: trellis-coded quantization, Marcellin and Fischer 1990; GPTQ, arXiv:2210.17323.

    Args:
        weight: float32, finite: the matrices one behind the other, each stored as [cols, rows].
        upper: float32, each [cols, cols], U: UᵀU is the inverse Hessian in that order; only its upper triangle is used.
        row_step: float32, each [rows], at least 0; rows of step 0 get levels near 0.
        row_variance: float32, each [rows], at least 0; rows of variance 0 do not count for the columns' variances.
        column_factor: float32, each [cols], positive.
        rows: of each matrix.
        cols: of each matrix.
        states: of the trellis, 4, 8, 32, 64 or 256; `pgolf.quantize.trellis` says how levels obey it.
        rate: what a bit is worth, in squared steps.
        block: columns whose errors are gathered; changes the time and nothing else. The kernel has its own.

    Returns:
        int8, as weight: levels within [-127, 127]. Not differentiable.

    The levels are the same, each of them, on every CPU and GPU: all operations are float32 (a few sums float64) in a
    fixed order. ValueError names the argument that does not fit.

    Runs the CUDA kernel where it was built for the device, a block of threads for each matrix, so that many take as
    long as the one of the most entries; else `reference`.
    """
    arguments = (weight, upper, row_step, row_variance, column_factor, list(rows), list(cols), states, rate, block)
    if _native.available(weight.device):
        result: Tensor = trellis_op(*arguments)
        return result
    _check(*arguments)
    return reference(*arguments)


def _expect(fits: bool, argument: str, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"trellis: {argument}: expected {expected}, got {got}")


def _check(
    weight: Tensor,
    upper: Tensor,
    row_step: Tensor,
    row_variance: Tensor,
    column_factor: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    states: int,
    rate: float,
    block: int,
) -> None:
    """ValueError with one line naming the first argument that does not fit."""
    _expect(len(cols) == len(rows), "cols", f"{len(rows)} numbers as rows", len(cols))
    for name, numbers in (("rows", rows), ("cols", cols)):
        _expect(all(0 <= n < 1 << 30 for n in numbers), name, "numbers from 0 to 2^30 - 1", list(numbers))
    _expect(block >= 1, "block", "at least 1", block)
    _expect(states in TRELLISES, "states", f"one of {list(TRELLISES)}", states)
    for name, tensor, size in (
        ("weight", weight, sum(r * c for r, c in zip(rows, cols, strict=True))),
        ("upper", upper, sum(c * c for c in cols)),
        ("row_step", row_step, sum(rows)),
        ("row_variance", row_variance, sum(rows)),
        ("column_factor", column_factor, sum(cols)),
    ):
        _expect(tensor.shape == (size,), name, f"shape {[size]}", list(tensor.shape))
        _expect(tensor.dtype == torch.float32, name, torch.float32, tensor.dtype)
        _expect(tensor.device == weight.device, name, f"a tensor on {weight.device} as weight", tensor.device)


@torch.library.custom_op("pgolf::trellis", mutates_args=(), device_types="cpu")
def trellis_op(
    weight: Tensor,
    upper: Tensor,
    row_step: Tensor,
    row_variance: Tensor,
    column_factor: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    states: int,
    rate: float,
    block: int = 128,
) -> Tensor:
    _check(weight, upper, row_step, row_variance, column_factor, rows, cols, states, rate, block)
    return reference(weight, upper, row_step, row_variance, column_factor, rows, cols, states, rate, block)


@trellis_op.register_kernel("cuda")
def _cuda(
    weight: Tensor,
    upper: Tensor,
    row_step: Tensor,
    row_variance: Tensor,
    column_factor: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    states: int,
    rate: float,
    block: int = 128,
) -> Tensor:
    _check(weight, upper, row_step, row_variance, column_factor, rows, cols, states, rate, block)
    native = _native.require()
    upper, row_step = upper.contiguous(), row_step.contiguous()
    row_variance, column_factor = row_variance.contiguous(), column_factor.contiguous()
    work = weight.clone(memory_format=torch.contiguous_format)
    levels = torch.empty_like(work, dtype=torch.int8)
    scratch = sum(native.trellis_scratch(rows=height, states=states) for height in rows)
    words = torch.empty(scratch, dtype=torch.int32, device=weight.device)
    with torch.cuda.device(weight.device):
        native.trellis(
            **_native.target(weight),
            work=work.data_ptr(),
            upper=upper.data_ptr(),
            row_step=row_step.data_ptr(),
            row_variance=row_variance.data_ptr(),
            column_factor=column_factor.data_ptr(),
            words=words.data_ptr(),
            levels=levels.data_ptr(),
            rows=list(rows),
            cols=list(cols),
            states=states,
            rate=rate,
        )
    return levels


@trellis_op.register_fake
def _fake(
    weight: Tensor,
    upper: Tensor,
    row_step: Tensor,
    row_variance: Tensor,
    column_factor: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    states: int,
    rate: float,
    block: int = 128,
) -> Tensor:
    _check(weight, upper, row_step, row_variance, column_factor, rows, cols, states, rate, block)
    return torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
