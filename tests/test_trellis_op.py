"""Trellis-coded GPTQ for many matrices: the operator, its kernel, and the solve around it, the same on every device.

What the registry's rows cover is in test_ops.py; the search itself and its gain are in test_trellis.py.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf.codec import TRELLISES
from pgolf.errors import PgolfError
from pgolf.ops import _native
from pgolf.ops.trellis import reference, trellis, trellis_op
from pgolf.quantize.trellis import Problem, TrellisResult, factorize, reference_column, solve, solve_all

CUDA = torch.device("cuda", 0)
RATE = 0.364
Shapes = list[tuple[int, int]]  # (rows, cols)


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; skips where there is none with kernels built for it."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return CUDA


def draw(shapes: Shapes, states: int = 64, seed: int = 0, rate: float = RATE) -> tuple[Any, ...]:
    """Arguments; every matrix has a weight beyond all levels and, where it has enough of them, a row of zeros and a
    column of its own, whose input never meets the others'."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for rows, cols in shapes:
        weight = 0.1 * torch.randn(cols, rows, generator=generator)
        weight[-1, -1] = -40
        upper = torch.randn(cols, cols, generator=generator).triu(1) / cols**0.5
        step = 0.01 + 0.04 * torch.rand(rows, generator=generator)
        if cols > 3:
            upper[2] = 0
            upper[:, 2] = 0
            weight[2] = 0
        if rows > 3:
            weight[:, 1] = 0
            step[1] = 0
        upper += torch.diag(0.5 + torch.rand(cols, generator=generator))
        variance = torch.where(step > 0, 0.01 / step.square(), 0)
        factor = torch.exp2(torch.randint(-8, 9, (cols,), generator=generator) / 8)
        parts.append([tensor.reshape(-1) for tensor in (weight, upper, step, variance, factor)])
    flat = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    return *flat, [rows for rows, _ in shapes], [cols for _, cols in shapes], states, rate


def on(device: torch.device, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)


def differing(device: torch.device, arguments: tuple[Any, ...]) -> int:
    """Levels of the kernel that are not the C++ version's."""
    return int((trellis_op(*on(device, arguments)).cpu() != trellis_op(*arguments)).sum())


BY_HAND = (
    torch.tensor([1.2, 2.9, -0.5, 1.0]),
    torch.tensor([2.0, 1.0, torch.nan, 1.0]),
    torch.ones(2),
    torch.ones(2),
    torch.ones(2),
    [2],
    [2],
    4,
    0.0,
)
# Column 0: 0 is no nearer to 1.2 than 2 is worth, which makes the next level odd, as 2.9 would have it. Its errors are
# -0.4 and -0.05, which column 1 is repaid: -0.1 and 1.05. Now 0 leaves the next level even.
LEVELS_BY_HAND = torch.tensor([2, 3, 0, 2], dtype=torch.int8)


@pytest.mark.parametrize("function", [trellis, trellis_op, reference])
def test_by_hand(function: Callable[..., Tensor]) -> None:
    assert torch.equal(function(*BY_HAND), LEVELS_BY_HAND)


@pytest.mark.parametrize("states", TRELLISES)
def test_equals_numpy(states: int) -> None:
    shapes = [(3, 4), (1, 1), (40, 5), (1, 6), (6, 1)]
    arguments = draw(shapes, states)
    levels = trellis(*arguments).split([rows * cols for rows, cols in shapes])
    flat = [tensor.numpy() for tensor in arguments[:5]]
    at = [0] * 5
    for found, (rows, cols) in zip(levels, shapes, strict=True):
        sizes = (rows * cols, cols * cols, rows, rows, cols)
        work, upper, step, variance, factor = (
            array[start : start + size] for array, start, size in zip(flat, at, sizes, strict=True)
        )
        at = [start + size for start, size in zip(at, sizes, strict=True)]
        work, upper = work.reshape(cols, rows).copy(), upper.reshape(cols, cols)
        for c in range(cols):
            expected, error = reference_column(work[c], upper[c, c], step, factor[c], variance, states, RATE)
            np.testing.assert_array_equal(found.view(cols, rows)[c].numpy(), expected)
            work[c + 1 :] -= upper[c, c + 1 :, None] * error
    assert torch.cat(levels).abs().max() >= 126


def test_a_column_longer_than_its_sums() -> None:
    """C++ and NumPy gather a column's mean alike when several rows share a sum."""
    arguments = draw([(1300, 1)], states=4)
    weight, upper, step, variance, factor = (tensor.numpy() for tensor in arguments[:5])
    expected, _ = reference_column(weight, upper[0], step, factor[0], variance, 4, RATE)
    np.testing.assert_array_equal(trellis(*arguments).numpy(), expected)


def test_matrices_do_not_meet() -> None:
    shapes = [(30, 7), (1, 4), (9, 40)]
    together = trellis(*draw(shapes)).split([rows * cols for rows, cols in shapes])
    arguments = draw(shapes)
    at = [0] * 5
    for (rows, cols), found in zip(shapes, together, strict=True):
        sizes = (rows * cols, cols * cols, rows, rows, cols)
        own = [t[start : start + size] for t, start, size in zip(arguments, at, sizes, strict=False)]
        at = [start + size for start, size in zip(at, sizes, strict=True)]
        assert torch.equal(trellis(*own, [rows], [cols], 64, RATE), found)


def test_nothing_in_nothing_out() -> None:
    for rows, cols in (([], []), ([0], [3]), ([3], [0])):
        sizes = (0, sum(c * c for c in cols), sum(rows), sum(rows), sum(cols))
        levels = trellis_op(*(torch.ones(size) for size in sizes), rows, cols, 64, RATE)
        assert levels.shape == (0,) and levels.dtype == torch.int8


WEIGHT, UPPER, STEP, VARIANCE, FACTOR, ROWS, COLS, STATES, _ = draw([(3, 4), (2, 5)])


@pytest.mark.parametrize("function", [trellis, trellis_op])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": WEIGHT[1:]}, "weight: expected shape [22], got [21]"),
        ({"weight": WEIGHT.double()}, "weight: expected torch.float32, got torch.float64"),
        ({"upper": UPPER.view(1, -1)}, "upper: expected shape [41], got [1, 41]"),
        ({"row_step": STEP[:4]}, "row_step: expected shape [5], got [4]"),
        ({"row_variance": VARIANCE.half()}, "row_variance: expected torch.float32, got torch.float16"),
        ({"column_factor": FACTOR.to("meta")}, "column_factor: expected a tensor on cpu as weight, got meta"),
        ({"cols": [4]}, "cols: expected 2 numbers as rows, got 1"),
        ({"rows": [3, -2]}, "rows: expected numbers from 0 to 2^30 - 1, got [3, -2]"),
        ({"states": 16}, "states: expected one of [4, 8, 32, 64, 256], got 16"),
        ({"block": 0}, "block: expected at least 1, got 0"),
    ],
)
def test_arguments_are_checked(function: Callable[..., Tensor], change: dict[str, Any], message: str) -> None:
    fitting = {
        "weight": WEIGHT,
        "upper": UPPER,
        "row_step": STEP,
        "row_variance": VARIANCE,
        "column_factor": FACTOR,
        "rows": ROWS,
        "cols": COLS,
        "states": STATES,
        "rate": RATE,
    }
    with pytest.raises(ValueError, match=f"^{re.escape('trellis: ' + message)}$"):
        function(**(fitting | change))


# --- Many matrices ----------------------------------------------------------------------------------------------------


def hessian_of(cols: int, seed: int) -> Tensor:
    """XᵀX of strongly correlated inputs, of which two are always zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols // 4, cols, generator=generator)
    x = torch.randn(4 * cols, len(mix), generator=generator) @ mix
    x += 0.3 * torch.randn(4 * cols, cols, generator=generator)
    x[:, [1, cols // 2]] = 0
    return x.T @ x / 16


def model() -> dict[str, Problem]:
    """A small model's matrices; two share a Hessian, one has a row of zeros, one a weight beyond its row's steps."""
    generator = torch.Generator().manual_seed(0)
    problems: dict[str, Problem] = {}
    for layer in range(2):
        shared, hidden = hessian_of(96, layer), hessian_of(160, 10 + layer)
        up = hessian_of(96, 20 + layer)
        for name, rows, hessian in (("q", 96, shared), ("k", 40, shared), ("up", 600, up), ("down", 96, hidden)):
            weight = 0.02 * torch.randn(rows, hessian.shape[0], generator=generator)
            problems[f"{layer}.{name}"] = Problem(weight, hessian, 13.0 * weight.std(dim=1) / 62)
    problems["0.k"].weight[7] = 0
    problems["0.up"].weight[5, 30] = 3
    return problems


def same(a: TrellisResult, b: TrellisResult) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_many_equal_one() -> None:
    problems = model()
    results = solve_all(problems)
    assert list(results) == list(problems) and solve_all({}) == {}
    for name, problem in problems.items():
        assert results[name].q.shape == problem.weight.shape
        assert same(results[name], solve(*problem)), name
        assert same(results[name], solve(problem.weight, factorize(problem.hessian), problem.row_step)), name
    plain = solve_all(problems, column_steps=False)
    assert all(result.step is not None for result in results.values())
    assert all(result.step is None for result in plain.values())


def test_a_matrix_that_cannot_be_solved_is_named() -> None:
    problems = model()
    for change, error, message in (
        ({"hessian": -torch.eye(96)}, torch.linalg.LinAlgError, "1.up: the Hessian cannot be inverted"),
        (
            {"weight": torch.full((600, 96), torch.nan)},
            PgolfError,
            "1.up: a matrix holds infinite or undefined weights",
        ),
        ({"row_step": torch.ones(5)}, ValueError, "1.up: trellis: weight, hessian, row_step: expected "),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            solve_all(problems | {"1.up": problems["1.up"]._replace(**change)})


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_by_hand_on_the_gpu(gpu: torch.device) -> None:
    assert torch.equal(trellis_op(*on(gpu, BY_HAND)).cpu(), LEVELS_BY_HAND)


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [RATE, 0.0, 1e5])
@pytest.mark.parametrize("states", TRELLISES)
def test_kernel_equals_cpp(gpu: torch.device, states: int, rate: float) -> None:
    shapes = [
        (1, 1),
        (1, 40),
        (40, 1),
        (2, 3),
        (23, 3),
        (24, 2),
        (25, 5),
        (30, 7),
        (47, 5),
        (49, 9),
        (385, 6),
        (700, 5),
    ]
    shapes += [(130, 17), (300, 130), (37, 270)]
    assert differing(gpu, draw(shapes, states, seed=states, rate=rate)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("states", [4, 64])
def test_kernel_breaks_ties_alike(gpu: torch.device, states: int) -> None:
    """Whole numbers, and bits for nothing: many paths cost the same."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = [50, 200, 7], [20, 9, 30]
    sizes = [r * c for r, c in zip(rows, cols, strict=True)]
    weight = torch.randint(-4, 5, (sum(sizes),), generator=generator).float()
    upper = torch.cat([torch.eye(c).add(torch.ones(c, c).triu(1) / 4).view(-1) for c in cols])
    one = torch.ones(sum(rows))
    assert differing(gpu, (weight, upper, one, one, torch.ones(sum(cols)), rows, cols, states, 0.0)) == 0


@pytest.mark.gpu
def test_kernel_at_full_size(gpu: torch.device) -> None:
    assert differing(gpu, draw([(2048, 512), (512, 2048), (256, 512)])) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "states"), [(5000, 64), (1500, 256)])
def test_kernel_where_words_do_not_fit(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, rows: int, states: int
) -> None:
    monkeypatch.setattr(_native, "_shared_memory", lambda device: 96 * 1024)
    assert differing(gpu, draw([(rows, 3), (90, 4)], states)) == 0


@pytest.mark.gpu
def test_kernel_for_more_matrices_than_a_launch_takes(gpu: torch.device) -> None:
    assert differing(gpu, draw([(1 + i % 5, 1 + i % 3) for i in range(300)], 4)) == 0


@pytest.mark.gpu
def test_kernel_ignores_what_is_below_the_diagonal(gpu: torch.device) -> None:
    weight, upper, *rest = on(gpu, draw([(50, 140)]))
    noise = torch.full((140, 140), torch.nan, device=gpu).tril(-1).view(-1)
    assert torch.equal(trellis_op(weight, upper + noise, *rest), trellis_op(weight, upper, *rest))


@pytest.mark.gpu
def test_nothing_in_nothing_out_on_the_gpu(gpu: torch.device) -> None:
    for rows, cols in (([], []), ([0], [3]), ([3], [0])):
        sizes = (0, sum(c * c for c in cols), sum(rows), sum(rows), sum(cols))
        assert trellis_op(*(torch.ones(size, device=gpu) for size in sizes), rows, cols, 64, RATE).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("column_steps", [False, True])
def test_a_model_on_the_gpu_equals_the_cpu(gpu: torch.device, column_steps: bool) -> None:
    problems = {name: problem._replace(hessian=factorize(problem.hessian)) for name, problem in model().items()}
    there = {name: Problem(weight.to(gpu), factor, step.to(gpu)) for name, (weight, factor, step) in problems.items()}
    expected, results = (solve_all(given, column_steps=column_steps) for given in (problems, there))
    for name, result in results.items():
        assert same(result, expected[name]), name
