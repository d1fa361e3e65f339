"""The trellis search in C++ beside its NumPy reference: the ratio of their times, and the seconds for a matrix."""

import time

import numpy as np
import pytest

from pgolf import _trellis
from pgolf.quantize.trellis import TRELLISES, reference_column

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
