"""GPTQ's column loop and the solve of many matrices around it; the registry's tests compare kernel and reference."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf.ops import _native
from pgolf.ops.gptq import gptq, gptq_op, reference
from pgolf.quantize.gptq import GptqResult, Problem, inverse_factor, solve, solve_all

CUDA = torch.device("cuda", 0)
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; skips where there is none with kernels built for it."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return CUDA


def draw(count: int, rows: int, cols: int, groups: int = 3, seed: int = 0) -> Arguments:
    """Random arguments; the columns of every matrix lie in `groups` groups, each with its own steps and limit."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, rows, cols, generator=generator)
    factor = torch.randn(count, cols, cols, generator=generator, dtype=torch.float64).triu(1) / cols**0.5
    factor += torch.diag_embed(0.5 + torch.rand(count, cols, generator=generator, dtype=torch.float64))
    scale = 0.02 + 0.2 * torch.rand(groups, count, rows, generator=generator)
    group = torch.randint(groups, (count, cols), generator=generator, dtype=torch.uint8)
    limit = torch.randint(1, 128, (groups, count), generator=generator, dtype=torch.int32)
    return weight, factor, scale, group, limit


def row_by_row(weight: Tensor, factor: Tensor, scale: Tensor, group: Tensor, limit: Tensor) -> tuple[Tensor, float]:
    """The definition, written once more with NumPy in float64: (integers, the smallest distance from a tie)."""
    w, u, s = (tensor.double().numpy().copy() for tensor in (weight, factor, scale))
    q, margin = np.zeros(w.shape), np.inf
    for k, r in np.ndindex(*w.shape[:2]):
        for j, g in enumerate(group[k].tolist()):
            quotient, most = w[k, r, j] / s[g, k, r], int(limit[g, k])
            margin = min(margin, abs(quotient - np.floor(quotient) - 0.5))
            q[k, r, j] = np.clip(np.rint(quotient), -most, most)
            w[k, r, j + 1 :] -= (w[k, r, j] - q[k, r, j] * s[g, k, r]) / u[k, j, j] * u[k, j, j + 1 :]
    return torch.from_numpy(q).to(torch.int8), margin


def tile_by_tile(weight: Tensor, factor: Tensor, scale: Tensor, group: Tensor, limit: Tensor, tile: int) -> Tensor:
    """One matrix in the kernel's order: a tile's columns meet all earlier errors first, then round among themselves."""
    w, u, s = (tensor.double().numpy().copy() for tensor in (weight[0], factor[0], scale[:, 0]))
    groups, limits = group[0].tolist(), limit[:, 0].tolist()
    q, errors = np.zeros(w.shape), np.zeros(w.shape)
    for first in range(0, w.shape[1], tile):
        columns = slice(first, first + tile)
        for k in range(first):
            w[:, columns] -= errors[:, k, None] * u[k, columns]
        for j in range(*columns.indices(w.shape[1])):
            step, most = s[groups[j]], limits[groups[j]]
            q[:, j] = np.clip(np.rint(w[:, j] / step), -most, most)
            errors[:, j] = (w[:, j] - q[:, j] * step) / u[j, j]
            w[:, j + 1 : first + tile] -= errors[:, j, None] * u[j, j + 1 : first + tile]
    return torch.from_numpy(q).to(torch.int8)[None]


# --- The operator -----------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    weight = torch.tensor([[[1.5, 0.75, -9.0], [2.5, -0.25, 2.0]]])
    factor = torch.tensor([[[2.0, 1.0, 4.0], [0.0, 1.0, 2.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    scale = torch.tensor([[[1.0, 1.0]], [[0.5, 0.25]]])
    group = torch.tensor([[0, 1, 0]], dtype=torch.uint8)
    limit = torch.tensor([[3], [7]], dtype=torch.int32)
    # Row 0: 1.5 -> 2, error -0.25; then 0.75 + 0.25 = 1 -> 2 halves, error 0; -9 + 1 = -8 -> -3.
    # Row 1: 2.5 -> 2, error 0.25; then -0.25 - 0.25 = -0.5 -> -2 quarters; 2 - 1 = 1.
    expected = torch.tensor([[[2, 2, -3], [2, -2, 1]]], dtype=torch.int8)
    for function in (gptq, gptq_op, reference):
        assert torch.equal(function(weight, factor, scale, group, limit), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 17), (3, 5, 66), (1, 4, 130)])
def test_equals_the_definition(shape: tuple[int, int, int]) -> None:
    arguments = draw(*shape)
    expected, margin = row_by_row(*arguments)
    assert margin > 1e-9  # else these draws decide nothing
    for block in (1, 7, 64, 128, 1000):
        assert torch.equal(gptq(*arguments, block=block), expected), block


@pytest.mark.parametrize("cols", [1, 63, 64, 65, 200])
def test_the_kernels_order_gives_the_same_integers(cols: int) -> None:
    arguments = draw(1, 40, cols, seed=cols)
    assert torch.equal(tile_by_tile(*arguments, tile=64), gptq(*arguments))


def test_what_is_below_the_diagonal_does_not_matter() -> None:
    weight, factor, *rest = draw(2, 5, 70)
    noise = torch.full_like(factor, torch.nan).tril(-1)
    assert torch.equal(gptq(weight, factor + noise, *rest), gptq(weight, factor, *rest))


def assert_rows_are_apart(device: torch.device) -> None:
    weight, *rest = (tensor.to(device) for tensor in draw(2, 20, 140))
    expected = gptq_op(weight, *rest)
    for value in (torch.nan, torch.inf, 1e30):
        wrong = weight.clone()
        wrong[1, 3, 5] = value
        keep = torch.ones(2, 20, dtype=torch.bool)
        keep[1, 3] = False
        assert torch.equal(gptq_op(wrong, *rest)[keep], expected[keep]), value


def test_rows_are_apart() -> None:
    assert_rows_are_apart(torch.device("cpu"))


def test_nothing_in_nothing_out() -> None:
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        q = gptq_op(*draw(*shape))
        assert q.shape == shape and q.dtype == torch.int8


WEIGHT, FACTOR, SCALE, GROUP, LIMIT = draw(2, 3, 4, groups=2)


@pytest.mark.parametrize("function", [gptq, gptq_op])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WEIGHT[0], FACTOR, SCALE, GROUP, LIMIT), "weight: expected shape [K, rows, cols], got [3, 4]"),
        ((WEIGHT.double(), FACTOR, SCALE, GROUP, LIMIT), "weight: expected torch.float32, got torch.float64"),
        ((WEIGHT, FACTOR[:1], SCALE, GROUP, LIMIT), "factor: expected shape [2, 4, 4], got [1, 4, 4]"),
        (
            (WEIGHT, FACTOR.half(), SCALE, GROUP, LIMIT),
            "factor: expected torch.float32 or torch.float64, got torch.float16",
        ),
        (
            (WEIGHT, FACTOR, SCALE[0], GROUP, LIMIT),
            "scale: expected shape [groups, 2, 3] with 1 to 256 groups, got [2, 3]",
        ),
        (
            (WEIGHT, FACTOR, SCALE[:0], GROUP, LIMIT[:0]),
            "scale: expected shape [groups, 2, 3] with 1 to 256 groups, got [0, 2, 3]",
        ),
        ((WEIGHT, FACTOR, SCALE.double(), GROUP, LIMIT), "scale: expected torch.float32, got torch.float64"),
        ((WEIGHT, FACTOR, SCALE, GROUP[:, :3], LIMIT), "group: expected shape [2, 4], got [2, 3]"),
        ((WEIGHT, FACTOR, SCALE, GROUP.long(), LIMIT), "group: expected torch.uint8, got torch.int64"),
        ((WEIGHT, FACTOR, SCALE, GROUP, LIMIT[:1]), "limit: expected shape [2, 2], got [1, 2]"),
        ((WEIGHT, FACTOR, SCALE, GROUP, LIMIT.long()), "limit: expected torch.int32, got torch.int64"),
        ((WEIGHT, FACTOR, SCALE, GROUP, LIMIT, 0), "block: expected at least 1, got 0"),
        ((WEIGHT, FACTOR, SCALE, GROUP, LIMIT.to("meta")), "limit: expected a tensor on cpu as weight, got meta"),
    ],
)
def test_arguments_are_checked(function: Callable[..., Tensor], arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('gptq: ' + message)}$"):
        function(*arguments)


# --- Many matrices ----------------------------------------------------------------------------------------------------


def hessian_of(cols: int, seed: int) -> Tensor:
    """XᵀX of strongly correlated inputs, of which two are always zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols // 4, cols, generator=generator)
    x = torch.randn(4 * cols, len(mix), generator=generator) @ mix + 0.3 * torch.randn(
        4 * cols, cols, generator=generator
    )
    x[:, [1, cols // 2]] = 0
    return x.T @ x / 16


def model() -> dict[str, Problem]:
    """A small model's matrices in an order that mixes shapes; query and key share a Hessian."""
    generator = torch.Generator().manual_seed(0)
    problems: dict[str, Problem] = {}
    for layer in range(2):
        shared, hidden = hessian_of(96, layer), hessian_of(160, 10 + layer)
        for name, rows, hessian, clip, bits, protected in (
            ("q", 96, shared, 13.0, 6, ()),
            ("k", 40, shared, 13.0, 6, [(32, 32)] if layer else ()),
            ("up", 160, hessian_of(96, 20 + layer), 11.5, 5, ()),
            ("down", 96, hidden, 11.5, 6, [(0, 16), (64, 16)] if layer else ()),
        ):
            weight = torch.randn(rows, hessian.shape[0], generator=generator)
            problems[f"{layer}.{name}"] = Problem(weight, hessian, clip, bits, protected)
    return problems


def column_by_column(problem: Problem, result: GptqResult) -> Tensor:
    """The integers by the textbook in float64: after each column the inverse Hessian itself is reduced by it."""
    weight, hessian = problem.weight.double().clone(), problem.hessian.double().clone()
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    hessian[dead, dead] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    protected = {j for start, size in problem.protected for j in range(start, start + size)}
    q = torch.zeros_like(weight)
    for j in torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist():
        wide = j in protected
        scale = result.scale_hi if wide else result.scale
        assert scale is not None
        step, most = scale.double(), 127 if wide else 2 ** (problem.bits - 1) - 1
        q[:, j] = (weight[:, j] / step).round().clamp(-most, most)
        weight -= ((weight[:, j] - q[:, j] * step) / inverse[j, j])[:, None] * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q.to(torch.int8)


def test_many_equal_one_and_the_textbook() -> None:
    problems = model()
    results = dict(solve_all(problems, block=48, dtype=torch.float64))
    assert list(results) == list(problems)
    for name, problem in problems.items():
        alone = solve(*problem[:4], protected=problem.protected, dtype=torch.float64)
        assert torch.equal(results[name].q, alone.q), name
        assert torch.equal(results[name].scale, alone.scale), name
        assert (results[name].scale_hi is None) == (not problem.protected), name
        assert torch.equal(results[name].q, column_by_column(problem, results[name])), name


def test_float32_moves_few_integers() -> None:
    problems = model()
    for (name, working), (_, exact) in zip(solve_all(problems), solve_all(problems, dtype=torch.float64), strict=True):
        assert (working.q != exact.q).float().mean() < 0.005, name
        assert torch.equal(working.scale, exact.scale), name


def test_factor_of_the_inverse() -> None:
    hessian = hessian_of(96, 0)
    factor = inverse_factor(hessian, 0.01, torch.float64)
    damped = hessian.double() + torch.diag(factor.dead.double())
    damped += 0.01 * damped.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    ordered = damped[factor.order][:, factor.order]
    assert factor.dead.nonzero().flatten().tolist() == [1, 48]
    assert bool((ordered.diagonal().diff() <= 0).all())
    assert not factor.upper.tril(-1).any()
    torch.testing.assert_close(factor.upper.T @ factor.upper @ ordered, torch.eye(96, dtype=torch.float64))


@pytest.mark.parametrize("bad", [-torch.eye(96), torch.ones(96, 96), torch.full((96, 96), torch.nan)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hessian_that_cannot_be_inverted_is_named(bad: Tensor, dtype: torch.dtype) -> None:
    problems = model()
    problems["1.up"] = problems["1.up"]._replace(hessian=bad)
    with pytest.raises(torch.linalg.LinAlgError, match="the Hessian of 1.up cannot be inverted"):
        list(solve_all(problems, damping=0.0, dtype=dtype))


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_kernel_by_many_groups(gpu: torch.device) -> None:
    arguments = draw(3, 50, 333, groups=7)
    assert torch.equal(gptq_op(*(tensor.to(gpu) for tensor in arguments)).cpu(), gptq_op(*arguments))


@pytest.mark.gpu
def test_kernel_keeps_rows_apart(gpu: torch.device) -> None:
    assert_rows_are_apart(gpu)


@pytest.mark.gpu
def test_kernel_ignores_what_is_below_the_diagonal(gpu: torch.device) -> None:
    weight, factor, *rest = (tensor.to(gpu) for tensor in draw(2, 50, 140))
    noise = torch.full_like(factor, torch.nan).tril(-1)
    assert torch.equal(gptq_op(weight, factor + noise, *rest), gptq_op(weight, factor, *rest))


@pytest.mark.gpu
def test_kernel_reads_no_group_that_is_not_there(gpu: torch.device) -> None:
    weight, factor, scale, group, limit = (tensor.to(gpu) for tensor in draw(1, 5, 70))
    beyond = torch.where(group == 2, 255, group)
    assert torch.equal(gptq_op(weight, factor, scale, beyond, limit), gptq_op(weight, factor, scale, group, limit))


@pytest.mark.gpu
def test_nothing_in_nothing_out_on_the_gpu(gpu: torch.device) -> None:
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert gptq_op(*(tensor.to(gpu) for tensor in draw(*shape))).shape == shape


@pytest.mark.gpu
def test_a_model_on_the_gpu_equals_the_cpu_in_float64(gpu: torch.device) -> None:
    problems = model()
    there = {name: problem._replace(weight=problem.weight.to(gpu)) for name, problem in problems.items()}
    on_gpu, on_cpu = dict(solve_all(there)), dict(solve_all(problems, dtype=torch.float64))
    assert on_gpu.keys() == on_cpu.keys()
    for name, expected in on_cpu.items():
        result = on_gpu[name]
        assert result.q.is_cuda and torch.equal(result.q.cpu(), expected.q), name
        assert torch.equal(result.scale.cpu(), expected.scale), name
        assert (result.scale_hi is None) == (expected.scale_hi is None), name


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [-torch.eye(96), torch.ones(96, 96), torch.full((96, 96), torch.nan)])
def test_a_hessian_that_cannot_be_inverted_is_named_on_the_gpu(gpu: torch.device, bad: Tensor) -> None:
    problems = {name: problem._replace(weight=problem.weight.to(gpu)) for name, problem in model().items()}
    problems["1.up"] = problems["1.up"]._replace(hessian=bad)
    with pytest.raises(torch.linalg.LinAlgError, match="the Hessian of 1.up cannot be inverted"):
        list(solve_all(problems, damping=0.0))
