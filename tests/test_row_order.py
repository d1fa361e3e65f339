"""The row order: small cases worked out by hand and by brute force, ties, and what it refuses."""

import re

import pytest
import torch

from pgolf.ops import _native
from pgolf.ops.row_order import MAX_COLS, MAX_ROWS, reference, row_order, row_order_op

CUDA = torch.device("cuda", 0)

IMPLEMENTATIONS = pytest.mark.parametrize("function", [row_order, row_order_op, reference])


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; skips where there is none with kernels built for it."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return CUDA


def brute_force(rows: list[list[int]]) -> list[int]:
    """The definition in Python."""
    order = [0] if rows else []
    while len(order) < len(rows):
        last = rows[order[-1]]
        left = (r for r in range(len(rows)) if r not in order)
        order.append(min(left, key=lambda r: (sum(abs(a - b) for a, b in zip(rows[r], last, strict=True)), r)))
    return order


def matrix(rows: int, cols: int, seed: int, span: int = 128) -> torch.Tensor:
    """Random int8 values from -span to span - 1."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-span, span, (rows, cols), generator=draw).to(torch.int8)


@IMPLEMENTATIONS
def test_by_hand(function) -> None:
    q = torch.tensor([[0, 0], [9, 9], [1, 1], [-1, 0], [8, 10]], dtype=torch.int8)
    order = function(q)  # from 0 the nearest is 3 (1 away), then 2 (3), then 1 (16) before 4 (16), then 4
    assert order.tolist() == [0, 3, 2, 1, 4]
    assert order.dtype == torch.int64


@IMPLEMENTATIONS
def test_extreme_values_are_255_apart(function) -> None:
    # From row 0 row 1 is 255 + 255 away, row 2 only 254 + 255: an 8-bit difference would wrap around.
    q = torch.tensor([[-128, 127], [127, -128], [126, -128], [-128, -128]], dtype=torch.int8)
    assert function(q).tolist() == [0, 3, 2, 1]


def far_apart() -> torch.Tensor:
    """Rows 17,850,000 apart, more than 24 bits hold; to row 0 row 3 is the nearest, by one column."""
    q = torch.full((4, 70000), -128, dtype=torch.int8)
    q[1], q[2, 1:], q[3, 2:] = 127, 127, 127
    return q


@IMPLEMENTATIONS
def test_large_distances_are_exact(function) -> None:
    assert function(far_apart()).tolist() == [0, 3, 2, 1]


@IMPLEMENTATIONS
@pytest.mark.parametrize("rows", [0, 1, 2, 40])
def test_equal_rows_keep_their_order(function, rows: int) -> None:
    assert function(torch.full((rows, 6), -3, dtype=torch.int8)).tolist() == list(range(rows))


@IMPLEMENTATIONS
def test_no_columns_is_all_ties(function) -> None:
    assert function(torch.empty(4, 0, dtype=torch.int8)).tolist() == [0, 1, 2, 3]


@IMPLEMENTATIONS
@pytest.mark.parametrize("span", [1, 2, 128])
@pytest.mark.parametrize(("rows", "cols"), [(3, 1), (17, 2), (40, 5), (33, 300)])
def test_matches_the_definition(function, rows: int, cols: int, span: int) -> None:
    for seed in range(3):
        q = matrix(rows, cols, seed, span)
        assert function(q).tolist() == brute_force(q.tolist())


def test_is_a_permutation_of_shorter_steps() -> None:
    q = matrix(200, 16, 0)
    order = row_order(q)
    assert order.sort().values.tolist() == list(range(200))
    wide = q.int()

    def length(rows: torch.Tensor) -> int:
        return int((rows[1:] - rows[:-1]).abs().sum())

    assert length(wide[order]) < 0.8 * length(wide)


def test_views_and_their_memory_are_taken() -> None:
    q = matrix(30, 40, 1)
    part = q[::2, 3:36]
    kept = q.clone()
    assert row_order(part).tolist() == brute_force(part.tolist())
    assert torch.equal(q, kept)


def test_compiles_in_one_graph() -> None:
    q = matrix(20, 7, 2)
    compiled = torch.compile(row_order, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q), reference(q))


Q = torch.zeros(4, 4, dtype=torch.int8)


@pytest.mark.parametrize("function", [row_order, row_order_op])
@pytest.mark.parametrize(
    ("q", "message"),
    [
        (Q[0], "row_order: q: expected shape [rows, cols], got [4]"),
        (Q[None], "row_order: q: expected shape [rows, cols], got [1, 4, 4]"),
        (Q.int(), "row_order: q: expected torch.int8, got torch.int32"),
        (Q.float(), "row_order: q: expected torch.int8, got torch.float32"),
        (Q[:1, :1].expand(MAX_ROWS + 1, 1), "row_order: q: expected at most 65536 rows, got 65537"),
        (Q[:1, :1].expand(1, MAX_COLS + 1), "row_order: q: expected at most 1048576 columns, got 1048577"),
    ],
)
def test_arguments_are_checked(function, q: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(q)


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("span", [1, 2, 128])
@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (1, 0), (5, 0), (4, 1), (130, 65), (1025, 7), (1500, 16)])
def test_kernel_matches_the_cpu(gpu: torch.device, rows: int, cols: int, span: int) -> None:
    q = matrix(rows, cols, rows, span)
    assert row_order(q.to(gpu)).tolist() == row_order(q).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("offset", range(5))
def test_kernel_takes_any_address(gpu: torch.device, offset: int) -> None:
    q = matrix(70, 32, 3)
    room = torch.empty(q.numel() + offset, dtype=torch.int8, device=gpu)
    moved = room[offset:].view(q.shape)
    moved.copy_(q)
    assert row_order(moved).tolist() == row_order(q).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "cols"), [(4097, 4), (8193, 3), (12289, 8), (20000, 12)])
def test_kernel_with_more_rows_than_one_round_of_loads(gpu: torch.device, rows: int, cols: int) -> None:
    q = matrix(rows, cols, 4, 8).to(gpu)  # few values, so that nearly every step is a tie
    order = row_order(q)
    assert torch.equal(order.sort().values, torch.arange(rows, device=gpu))
    assert_each_step_is_nearest(q, order, range(0, rows - 1, 97))


def assert_each_step_is_nearest(q: torch.Tensor, order: torch.Tensor, steps: range) -> None:
    """Each of `steps` goes to the first of the nearest rows that come later in the order."""
    place, wide = order.argsort(), q.int()
    for step in steps:
        distance = (wide - wide[order[step]]).abs().sum(1).masked_fill(place <= step, 2**31)
        assert int(distance.argmin()) == int(order[step + 1]), f"step {step}"


@pytest.mark.gpu
def test_kernel_orders_the_embedding(gpu: torch.device) -> None:
    draw = torch.Generator().manual_seed(5)
    q = (torch.randn(8192, 512, generator=draw) * 15).round().clamp(-63, 63).to(gpu, torch.int8)
    order = row_order(q)
    assert torch.equal(order.sort().values, torch.arange(8192, device=gpu))
    assert_each_step_is_nearest(q, order, range(0, 8191, 31))


@pytest.mark.gpu
def test_kernel_adds_up_large_distances(gpu: torch.device) -> None:
    assert row_order(far_apart().to(gpu)).tolist() == [0, 3, 2, 1]
