"""Row order: each row of an integer matrix followed by its nearest neighbour, for coders that profit from that."""

import torch
from torch import Tensor

from pgolf.ops import _native

MAX_ROWS = 1 << 16
MAX_COLS = 1 << 20


def reference(q: Tensor) -> Tensor:
    """The row order in plain PyTorch, a few operators a step, none of which waits for the device.

    q and the result are those of `row_order`.
    """
    table = q.to(torch.int16)
    order = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    beyond = torch.full_like(order, 255 * q.shape[1] + 1)
    rows, visited = torch.arange(len(q), device=q.device), torch.zeros_like(order, dtype=torch.bool)
    for step in range(1, len(q)):
        current = order[step - 1 : step]
        visited |= rows == current
        distance = (table - table.index_select(0, current)).abs().sum(1, dtype=torch.int32)
        order[step] = torch.where(visited, beyond, distance).argmin()  # the first of equals
    return order


def row_order(q: Tensor) -> Tensor:
    """A permutation of the rows of q: it begins with row 0, and goes on with the nearest row not in it yet.

    q [rows, cols] int8, any values; rows <= 65,536, cols <= 1,048,576. Nearest is by L1 distance (the sum of absolute
    differences), and of equally near rows the lowest. Returns int64 [rows], for `q[order]`; the inverse is
    `order.argsort()`. ValueError names the argument that does not fit. The record sorts rows so (recipe section 4).

    Runs the CUDA kernels where they were built for the device: they keep the distances of all pairs, 4 rows^2 bytes
    (256 MiB for 8,192 rows). Elsewhere PyTorch searches step by step, in memory of a few times q. All give one result.
    """
    if q.is_cuda and not _native.available(q.device):
        _check(q)
        return _search(q)
    return row_order_op(q)


def _expect(fits: bool, argument: str, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"row_order: {argument}: expected {expected}, got {got}")


def _check(q: Tensor) -> None:
    """ValueError with one line saying what does not fit."""
    _expect(q.dim() == 2, "q", "shape [rows, cols]", list(q.shape))
    _expect(q.dtype == torch.int8, "q", torch.int8, q.dtype)
    _expect(q.shape[0] <= MAX_ROWS, "q", f"at most {MAX_ROWS} rows", q.shape[0])
    _expect(q.shape[1] <= MAX_COLS, "q", f"at most {MAX_COLS} columns", q.shape[1])


def _search(q: Tensor) -> Tensor:
    """The row order by one scan of the remaining rows a step; visited rows are dropped when they are an eighth."""
    if not len(q):
        return torch.empty(0, dtype=torch.int64, device=q.device)
    order = [0]
    row, table = q[0].to(torch.int16), q[1:].to(torch.int16)
    numbers = list(range(1, len(q)))
    dropped = torch.zeros(len(numbers), dtype=torch.bool, device=q.device)
    waiting = 0  # rows of `table` that are visited
    while len(order) < len(q):
        distance = (table - row).abs_().sum(1, dtype=torch.int32)
        nearest = int(distance.masked_fill_(dropped, 255 * MAX_COLS + 1).argmin())  # the first of equals
        order.append(numbers[nearest])
        row = table[nearest]
        dropped[nearest] = True
        waiting += 1
        if 8 * waiting >= len(numbers):
            kept = (~dropped).nonzero().squeeze(1)
            numbers = [numbers[i] for i in kept.tolist()]
            table, dropped, waiting = table[kept], dropped[kept], 0
    return torch.tensor(order, device=q.device)


@torch.library.custom_op("pgolf::row_order", mutates_args=(), device_types="cpu")
def row_order_op(q: Tensor) -> Tensor:
    _check(q)
    return _search(q)


@row_order_op.register_kernel("cuda")
def _cuda(q: Tensor) -> Tensor:
    _check(q)
    module = _native.require()
    q = q.contiguous()
    rows, cols = q.shape
    order = torch.empty(rows, dtype=torch.int64, device=q.device)
    distances = torch.empty(module.row_order_scratch(rows), dtype=torch.int32, device=q.device)
    with torch.cuda.device(q.device):
        module.row_order(
            **_native.target(q),
            q=q.data_ptr(),
            distances=distances.data_ptr(),
            order=order.data_ptr(),
            rows=rows,
            cols=cols,
        )
    return order


@row_order_op.register_fake
def _fake(q: Tensor) -> Tensor:
    _check(q)
    return torch.empty(q.shape[0], dtype=torch.int64, device=q.device)
