"""The trellis search in C++ beside its NumPy reference: the ratio of their times, and the seconds for a matrix; and the
solve of a whole model, on a GPU beside the C++ version in threads.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pgolf import _trellis
from pgolf.codec import TRELLISES
from pgolf.ops import _native
from pgolf.quantize.trellis import Problem, factorize, reference_column, solve_all

ROWS, COLUMNS = 512, 2048  # of the record's second MLP matrix


@pytest.mark.parametrize("states", TRELLISES)
def test_quantize(benchmark, full: bool, states: int) -> None:
    draw = np.random.default_rng(0)
    cols = COLUMNS if full else COLUMNS // 8
    weight = draw.normal(0, 5.5, (cols, ROWS)).astype(np.float32)
    upper = np.triu(draw.normal(0, 0.02, (cols, cols)) + np.eye(cols)).astype(np.float32)
    step, variance = np.ones(ROWS, np.float32), np.full(ROWS, 30, np.float32)
    factor = np.ones(cols, np.float32)
    levels = benchmark(_trellis.quantize, weight, upper, step, variance, factor, states, 0.364, 128)

    start = time.perf_counter()
    expected, _ = reference_column(weight[0], upper[0, 0], step, factor[0], variance, states, 0.364)
    seconds = (time.perf_counter() - start) * cols  # without the feedback
    np.testing.assert_array_equal(levels[0], expected)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["entries per second"] = weight.size / benchmark.stats.stats.median
        benchmark.extra_info["seconds over NumPy"] = benchmark.stats.stats.median / seconds


def model(layers: int, dim: int, hidden: int, vocabulary: int, device: torch.device) -> dict[str, Problem]:
    """Random weights behind factorized Hessians of correlated inputs; query, key and value of a layer share theirs."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    found: dict[str, Problem] = {}

    def add(rows: tuple[int, ...], cols: int) -> None:
        x = normal(2 * cols, cols // 8) @ normal(cols // 8, cols) + normal(2 * cols, cols)
        factor = factorize(x.T @ x)
        for r in rows:
            weight = normal(r, cols)
            found[f"matrix {len(found)}"] = Problem(weight, factor, 12.0 * weight.std(dim=1) / 62)

    add((vocabulary,), dim)
    for _ in range(layers):
        add((dim, dim // 2, dim // 2), dim)
        add((dim,), dim)
        add((hidden,), dim)
        add((dim,), hidden)
    return found


def seconds_of(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of `step`, everything it enqueued included."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def test_whole_model(device: torch.device, full: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Factorizations are not timed."""
    cuda = device.type == "cuda"
    if cuda and (reason := _native.why_not(device)):
        pytest.skip(f"no kernels to time: {reason}")
    problems = model(11, 512, 2048, 8192, device) if cuda else model(2, 64, 256, 512, device)
    results = solve_all(problems)
    where = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    weights = sum(problem.weight.numel() for problem in problems.values())
    lines = [f"\ntrellis, 64 states: {len(problems)} matrices, {weights:,} weights on {where}"]
    lines.append(
        f"  solve_all                {seconds_of(lambda: solve_all(problems), device, 5 if full else 2):8.3f} s"
    )
    wrong = 0
    if cuda:
        copies = {name: Problem(w.cpu(), factor, step.cpu()) for name, (w, factor, step) in problems.items()}
        start = time.perf_counter()
        expected = solve_all(copies)
        taken = time.perf_counter() - start
        lines.append(f"  in C++, {torch.get_num_threads():3} threads      {taken:8.3f} s")
        wrong = sum(int((results[name].q != expected[name].q).sum()) for name in problems)
        lines.append(f"  levels that differ: {wrong}")
    with capsys.disabled():
        print("\n".join(lines))
    assert wrong == 0
