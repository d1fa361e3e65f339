"""The trellis quantizer: an optimal search, the same in C++ and NumPy, and the gain it is there for."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf import _trellis, codec
from pgolf.errors import PgolfError
from pgolf.quantize import gptq, trellis
from pgolf.quantize.trellis import TRELLISES, TrellisResult, reference_column, solve

RATE = 0.364


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def hessian(cols: int, seed: int = 1, spread: float = 0.4) -> Tensor:
    """Of correlated inputs whose sizes differ."""
    draw = torch.Generator().manual_seed(seed)
    shared = max(cols // 8, 1)
    x = 0.3 * torch.randn(4 * cols, shared, generator=draw) @ torch.randn(shared, cols, generator=draw)
    x = (x + torch.randn(4 * cols, cols, generator=draw)) * torch.exp(spread * torch.randn(cols, generator=draw))
    return x.T @ x / len(x)


def steps(weight: Tensor, c: float = 13.0) -> Tensor:
    return c * weight.std(dim=1) / 62


def broken(q: Tensor, states: int) -> int:
    """Entries that the trellis, as the artifact's format defines it, does not allow."""
    h0, h1 = TRELLISES[states]
    state, wrong = np.zeros(q.shape[1], np.int64), 0
    for t in q.numpy().astype(np.int64):
        wrong += int(((t ^ state) & 1).sum())
        k = (t - (state & 1)) >> 1
        state = (state >> 1) ^ ((state & 1) * (h0 >> 1)) ^ ((k & 1) * (h1 >> 1))
    return wrong


def same(a: TrellisResult, b: TrellisResult) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def one_column(column: np.ndarray, states: int, rate: float = RATE, variance: float = 30.0) -> np.ndarray:
    """Levels of weights given in steps."""
    one = np.ones(len(column), np.float32)
    unit = np.ones((1, 1), np.float32)
    column = np.asarray(column, np.float32)
    levels = _trellis.quantize(column[None], unit, one, variance * one, unit[0], states, rate, 128)
    return levels[0].astype(np.int64)


def paths(rows: int, states: int, largest: int) -> np.ndarray:
    """Every sequence of levels within +-largest that the trellis allows, [paths, rows]."""
    h0, h1 = TRELLISES[states]
    found = []
    for ks in itertools.product(range(-largest, largest + 1), repeat=rows):
        state, levels = 0, []
        for k in ks:
            levels.append(2 * k + (state & 1))
            state = (state >> 1) ^ ((state & 1) * (h0 >> 1)) ^ ((k & 1) * (h1 >> 1))
        if max(map(abs, levels)) <= largest:
            found.append(levels)
    return np.array(found)


@pytest.mark.parametrize("states", [4, 8])
@pytest.mark.parametrize("variance", [30.0, 1.0])
def test_no_path_is_cheaper(states: int, variance: float) -> None:
    every = paths(6, states, 3)
    draw = np.random.default_rng(0)
    for _ in range(20):
        x = draw.uniform(-1.4, 1.4, 6)
        spread = max(variance * np.mean(x**2 / variance), 1 / 3)
        bits = every**2 / (2 * spread * math.log(2))
        costs = ((x - every) ** 2 + RATE * bits).sum(axis=1)
        levels = one_column(x, states, variance=variance)
        (place,) = np.flatnonzero((every == levels).all(axis=1))
        assert costs[place] <= costs.min() + 1e-5


@pytest.mark.parametrize("states", TRELLISES)
def test_agrees_with_numpy(states: int) -> None:
    """Every level, through three blocks of feedback, with an empty row, rows of other sizes and a clamped weight."""
    draw = np.random.default_rng(states)
    cols, rows = 11, 21
    weight = draw.normal(0, 0.1, (cols, rows)).astype(np.float32)
    weight[:, 3] = 0
    weight[2, 5] = 40
    upper = np.triu(draw.normal(0, 0.3, (cols, cols)) + 2 * np.eye(cols)).astype(np.float32)
    row_step = draw.uniform(0.01, 0.05, rows).astype(np.float32)
    row_step[3] = 0
    factor = np.exp2(draw.integers(-8, 9, cols) / 8).astype(np.float32)
    variance = trellis.row_variance(torch.from_numpy(weight), torch.from_numpy(row_step)).numpy()

    expected, work = np.empty((cols, rows), np.int8), weight.copy()
    for c in range(cols):
        expected[c], error = reference_column(work[c], upper[c, c], row_step, factor[c], variance, states, RATE)
        work[c + 1 :] -= upper[c, c + 1 :, None] * error
    for block in (4, 1, 128):
        got = _trellis.quantize(weight, upper, row_step, variance, factor, states, RATE, block)
        np.testing.assert_array_equal(got, expected)
    assert expected.max() >= 126 and len(np.unique(expected)) > 20


@pytest.mark.parametrize("states", [4, 64])
def test_ties_are_broken_alike(states: int) -> None:
    draw = np.random.default_rng(0)
    one, unit = np.ones(8, np.float32), np.ones((1, 1), np.float32)
    for _ in range(5):
        x = draw.integers(-3, 4, 8).astype(np.float32)  # whole numbers, and bits for nothing: equal paths
        expected, _ = reference_column(x, unit[0, 0], one, unit[0, 0], one, states, 0.0)
        np.testing.assert_array_equal(one_column(x, states, rate=0.0), expected)

    # The first row costs least, so that it takes an odd k where that helps the others: -2 is as near to zero as 2.
    variance, rate, first = one.copy(), 1e5, []
    variance[0] = 1e9
    for _ in range(20):
        x = draw.uniform(-100, 100, 8).astype(np.float32)
        x[0] = 0
        expected, _ = reference_column(x, unit[0, 0], one, unit[0, 0], variance, states, rate)
        (levels,) = _trellis.quantize(x[None], unit, one, variance, unit[0], states, rate, 128)
        np.testing.assert_array_equal(levels, expected)
        first.append(levels[0])
    assert -2 in first and 2 not in first


@pytest.mark.parametrize("states", TRELLISES)
@pytest.mark.parametrize("column_steps", [False, True])
def test_levels_obey_the_trellis(states: int, column_steps: bool) -> None:
    weight = weights(67, 133)
    result = solve(weight, hessian(133), steps(weight), states=states, column_steps=column_steps)
    assert result.q.dtype == torch.int8 and result.scale.dtype == torch.float16
    assert (result.step is not None) == column_steps
    assert broken(result.q, states) == 0
    other = 4 if states != 4 else 8
    assert broken(result.q, other) > 1000
    error = (weight - trellis.dequantize(result)).square().mean()
    assert error < 0.05 * weight.square().mean()


def entropy(values: Tensor) -> float:
    """Bits, all told, of integers coded with one ideal histogram."""
    count = torch.unique(values, return_counts=True)[1].double()
    return -float((count * (count / count.sum()).log2()).sum())


def scalar_curve(weight: Tensor, hessian: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Bits an entry and log2 distortion of GPTQ with rounding, at rising bits."""
    points = []
    for c in (18, 14, 11, 9, 7):
        result = gptq.solve(weight, hessian, clip=c * 127 / 31, bits=8)
        error = (weight - result.dequantize()).double()
        lost = float(((error @ hessian.double()) * error).sum())
        points.append((entropy(result.q) / result.q.numel(), math.log2(lost)))
    bits, lost = np.array(points).T
    return bits, lost


@pytest.mark.parametrize(
    ("states", "column_steps", "most"), [(4, False, 0.81), (8, False, 0.79), (64, False, 0.765), (64, True, 0.72)]
)
def test_beats_rounding_at_equal_bits(states: int, column_steps: bool, most: float) -> None:
    weight, inputs = weights(512, 256), hessian(256)
    bits, lost = scalar_curve(weight, inputs)
    result = solve(weight, inputs, steps(weight, 11.5), states=states, column_steps=column_steps)
    if column_steps:  # the columns' histograms differ, so that one for all would hide the gain
        spent = trellis.estimate_bits(result.q) / result.q.numel()
    else:
        spent = sum(entropy(result.q[(result.q & 1) == parity]) for parity in (0, 1)) / result.q.numel()
    assert 3.3 < spent < 3.7
    at_equal_bits = np.interp(spent, bits, lost)
    ratio = trellis.distortion(weight, result, inputs) / 2**at_equal_bits
    assert 0.5 < ratio < most


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("c", [10.0, 18.0])
def test_estimate_is_near_the_coder(heavy: bool, c: float) -> None:
    weight = weights(512, 512)
    if heavy:
        weight = torch.from_numpy(np.random.default_rng(0).laplace(0, 0.02, weight.shape)).float()
    result = solve(weight, hessian(512), steps(weight, c))
    coded = 8 * len(codec.encode_matrices([result.q.numpy()]))
    assert trellis.estimate_bits(result.q) == pytest.approx(coded, rel=0.01)


@pytest.mark.parametrize("states", TRELLISES)
def test_clamped_levels_keep_their_parity(states: int) -> None:
    draw = np.random.default_rng(0)
    for sign in (1, -1, draw.choice([-1, 1], 200)):
        levels = one_column(200.0 * sign * np.ones(200), states, variance=4e4)
        assert broken(torch.from_numpy(levels)[:, None], states) == 0
        assert np.abs(levels).max() <= 127 and (sign * levels).min() >= 124


def test_a_row_that_does_not_fit_gets_a_larger_step() -> None:
    weight = weights(8, 16)
    weight[2, 5], weight[4] = 3.0, 0.0
    asked = steps(weights(8, 16))
    result = solve(weight, hessian(16), asked, column_steps=False)
    assert result.scale[2].item() == pytest.approx(3 / 127, rel=1e-3)
    others = [r for r in range(8) if r != 2]
    assert torch.equal(result.scale[others], asked.half()[others])
    assert abs(trellis.dequantize(result)[2, 5].item() - 3) < 0.05


def test_a_column_keeps_a_step_that_fits() -> None:
    weight, inputs = weights(64, 32), torch.eye(32)
    inputs[7, 7] = 1e6
    loose = solve(weight, inputs, steps(weight))
    assert loose.step is not None and loose.step[7] == -trellis.STEP_LIMIT
    weight[:, 7] *= 4
    tight = solve(weight, inputs, steps(weights(64, 32)))
    assert tight.step is not None and loose.step[7] < tight.step[7] < 0
    assert (tight.q[:, 7].abs() < 127).all()


def test_columns_that_matter_less_get_larger_steps() -> None:
    weight, inputs = weights(32, 4), torch.diag(torch.tensor([1.0, 4.0, 16.0, 64.0]))
    weight[5] = 0
    result = solve(weight, inputs, steps(weight), damping=0.0)
    assert result.step is not None
    assert result.step.tolist() == [12, 4, -4, -12]  # d^-0.5, geometric mean one


def test_dead_columns_are_zero() -> None:
    weight, inputs = weights(40, 24), hessian(24)
    inputs[[3, 17]] = 0
    inputs[:, [3, 17]] = 0
    result = solve(weight, inputs, steps(weight))
    assert result.step is not None and not result.step[[3, 17]].any()
    assert not result.q[:, [3, 17]].any() and broken(result.q, 64) == 0
    assert result.q[:, 4].any()
    nothing = solve(weight, torch.zeros(24, 24), steps(weight))
    assert not nothing.q.any()


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1)])
def test_one_row_or_column(shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    step = torch.full(shape[:1], 0.004)
    for states in TRELLISES:
        result = solve(weight, hessian(shape[1]), step, states=states)
        assert result.q.shape == shape and broken(result.q, states) == 0
        assert (trellis.dequantize(result) - weight).abs().max() < 0.03


def test_zeros_stay_zeros() -> None:
    for step in (torch.zeros(12), torch.ones(12)):
        result = solve(torch.zeros(12, 20), hessian(20), step)
        assert not result.q.any() and trellis.dequantize(result).count_nonzero() == 0
        assert trellis.estimate_bits(result.q) == 0


def test_threads_and_blocks_leave_no_trace() -> None:
    weight = [weights(96, 160, seed) for seed in range(6)]
    factor = trellis.factorize(hessian(160))
    alone = [solve(w, factor, steps(w)) for w in weight]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda w: solve(w, factor, steps(w)), weight))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert not same(alone[0], alone[1])
    assert all(same(alone[0], solve(weight[0], factor, steps(weight[0]), block=b)) for b in (1, 7, 1000))
    assert same(alone[0], solve(weight[0], hessian(160), steps(weight[0])))


def test_distortion_counts_correlations() -> None:
    result = TrellisResult(torch.tensor([[2, 3]], dtype=torch.int8), torch.tensor([0.5]).half(), None)
    weight, inputs = torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    assert trellis.distortion(weight, result, inputs) == 3 * 1 - 2 * 0.5 + 2 * 0.25
    scaled = result._replace(step=torch.tensor([8, -4], dtype=torch.int8))
    torch.testing.assert_close(trellis.dequantize(scaled), torch.tensor([[2.0, 1.5 / math.sqrt(2)]]))


def test_refusals() -> None:
    weight, inputs, step = weights(4, 6), hessian(6), torch.full((4,), 0.01)
    with pytest.raises(ValueError, match="states: expected one of"):
        solve(weight, inputs, step, states=16)
    with pytest.raises(ValueError, match="weight, hessian, row_step"):
        solve(weight, inputs, step[:3])
    with pytest.raises(torch.linalg.LinAlgError):
        solve(weight, -inputs, step)
    for bad in (math.nan, math.inf):
        with pytest.raises(PgolfError, match="infinite or undefined weights"):
            solve(weight.clone().fill_(bad), inputs, step)
    with pytest.raises(PgolfError, match="beyond fp16"):
        solve(weight + 1e8, inputs, step)
    for bad in (-1.0, math.nan):
        with pytest.raises(PgolfError, match="a row's step"):
            solve(weight, inputs, step.clone().fill_(bad))
    one = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="row_step"):
        _trellis.quantize(one, one, np.ones(2, np.float32), one[0], one[0], 4, RATE, 128)
    with pytest.raises(ValueError, match="block"):
        _trellis.quantize(one, one, one[0], one[0], one[0], 4, RATE, 0)
