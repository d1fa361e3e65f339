"""GPTQ's column loop: round the columns of a matrix in order, each one's error repaid by the columns behind it."""

import torch
from torch import Tensor

from pgolf.ops import _native


def reference(weight: Tensor, factor: Tensor, scale: Tensor, group: Tensor, limit: Tensor, block: int = 128) -> Tensor:
    """The column loop in plain PyTorch, matrix by matrix, computed in factor's dtype; arguments as in `gptq`."""
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for k in range(len(weight)):
        q[k] = _solve_one(weight[k], factor[k], scale[:, k], group[k], limit[:, k], block)
    return q


def _solve_one(weight: Tensor, factor: Tensor, scale: Tensor, group: Tensor, limit: Tensor, block: int) -> Tensor:
    cols = weight.shape[1]
    # Transposed, a column is contiguous: the loop below runs once a column and is bound by memory.
    work = weight.to(factor.dtype).T.contiguous()
    integers = torch.empty_like(work)
    steps = scale.to(factor.dtype)
    groups, limits, pivots = group.tolist(), limit.tolist(), factor.diagonal().tolist()
    for first in range(0, cols, block):
        last = min(first + block, cols)
        errors = torch.empty_like(work[first:last])
        for j in range(first, last):
            step, most = steps[groups[j]], limits[groups[j]]
            torch.div(work[j], step, out=integers[j]).round_().clamp_(-most, most)
            error = torch.sub(work[j], integers[j] * step, out=errors[j - first]).div_(pivots[j])
            work[j + 1 : last].sub_(torch.outer(factor[j, j + 1 : last], error))
        work[last:].sub_(factor[first:last, last:].T @ errors)
    return integers.T.to(torch.int8)


def gptq(weight: Tensor, factor: Tensor, scale: Tensor, group: Tensor, limit: Tensor, block: int = 128) -> Tensor:
    """Round K matrices of one shape column by column; for j = 0, 1, ... and every column c > j

        q[j] = clamp(round(w[j] / s), -m, m);  w[c] -= (w[j] - q[j] s) / U[j, j] * U[j, c]

    with the step s and the largest integer m of column j's group; halves round to even.

    Papers: GPTQ, arXiv:2210.17323; recipe section 4.

    Args:
        weight: [K, rows, cols] float32, finite, columns in the order of processing.
        factor: [K, cols, cols], U: UᵀU is the inverse Hessian in that order; only its upper triangle is used. float64;
            on the CPU also float32.
        scale: [groups, K, rows] float32, positive: the steps of each group of columns.
        group: [K, cols] uint8, below `groups`: which group a column is in.
        limit: [groups, K] int32, at most 127: the largest integer of each group.
        block: columns whose errors are gathered before the columns behind them are corrected by one product.

    Returns:
        int8 [K, rows, cols], columns in the order of processing. Not differentiable.

    Everything is computed in factor's dtype. The order of the sums (`block`; the kernel has its own) decides only where
    w / s is a tie to within that precision. ValueError names the argument that does not fit.

    Runs the CUDA kernel where it was built for the device, else `reference`.
    """
    if _native.available(weight.device):
        result: Tensor = gptq_op(weight, factor, scale, group, limit, block)
        return result
    _check(weight, factor, scale, group, limit, block)
    return reference(weight, factor, scale, group, limit, block)


def _expect(fits: bool, argument: str, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"gptq: {argument}: expected {expected}, got {got}")


def _check(weight: Tensor, factor: Tensor, scale: Tensor, group: Tensor, limit: Tensor, block: int) -> None:
    """ValueError with one line naming the first argument that does not fit."""
    _expect(weight.dim() == 3, "weight", "shape [K, rows, cols]", list(weight.shape))
    count, rows, cols = weight.shape
    _expect(factor.shape == (count, cols, cols), "factor", f"shape {[count, cols, cols]}", list(factor.shape))
    fits = scale.dim() == 3 and scale.shape[1:] == (count, rows) and 1 <= scale.shape[0] <= 256
    _expect(fits, "scale", f"shape [groups, {count}, {rows}] with 1 to 256 groups", list(scale.shape))
    groups = scale.shape[0]
    _expect(group.shape == (count, cols), "group", f"shape {[count, cols]}", list(group.shape))
    _expect(limit.shape == (groups, count), "limit", f"shape {[groups, count]}", list(limit.shape))
    _expect(block >= 1, "block", "at least 1", block)
    types = (torch.float64,) if factor.is_cuda else (torch.float32, torch.float64)
    names = " or ".join(str(t) for t in types)
    _expect(factor.dtype in types, "factor", names, factor.dtype)
    for name, tensor, dtype in (
        ("weight", weight, torch.float32),
        ("factor", factor, factor.dtype),
        ("scale", scale, torch.float32),
        ("group", group, torch.uint8),
        ("limit", limit, torch.int32),
    ):
        _expect(tensor.dtype == dtype, name, dtype, tensor.dtype)
        _expect(tensor.device == weight.device, name, f"a tensor on {weight.device} as weight", tensor.device)


@torch.library.custom_op("pgolf::gptq", mutates_args=(), device_types="cpu")
def gptq_op(weight: Tensor, factor: Tensor, scale: Tensor, group: Tensor, limit: Tensor, block: int = 128) -> Tensor:
    _check(weight, factor, scale, group, limit, block)
    return reference(weight, factor, scale, group, limit, block)


@gptq_op.register_kernel("cuda")
def _cuda(weight: Tensor, factor: Tensor, scale: Tensor, group: Tensor, limit: Tensor, block: int = 128) -> Tensor:
    _check(weight, factor, scale, group, limit, block)
    weight, factor, scale = weight.contiguous(), factor.contiguous(), scale.contiguous()
    group, limit = group.contiguous(), limit.contiguous()
    q = torch.empty_like(weight, dtype=torch.int8)
    errors = torch.empty_like(weight, dtype=torch.float64)
    matrices, rows, cols = weight.shape
    with torch.cuda.device(weight.device):
        _native.require().gptq(
            **_native.target(weight),
            weight=weight.data_ptr(),
            factor=factor.data_ptr(),
            scale=scale.data_ptr(),
            group=group.data_ptr(),
            limit=limit.data_ptr(),
            q=q.data_ptr(),
            errors=errors.data_ptr(),
            matrices=matrices,
            rows=rows,
            cols=cols,
            groups=scale.shape[0],
        )
    return q


@gptq_op.register_fake
def _fake(weight: Tensor, factor: Tensor, scale: Tensor, group: Tensor, limit: Tensor, block: int = 128) -> Tensor:
    _check(weight, factor, scale, group, limit, block)
    return torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
