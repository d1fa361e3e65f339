"""The coder beside xz on synthetic weights: size and time as ratios, kept in the benchmark's extra information."""

import lzma
import time

import numpy as np
import pytest

from pgolf import codec


@pytest.fixture(scope="module")
def weights(full: bool) -> np.ndarray:
    """Gaussian entries as the 6-bit quantizer leaves them, [rows, 512]."""
    values = np.random.default_rng(0).normal(0, 2.4, (4096 if full else 512, 512))
    return np.clip(np.round(values), -32, 31).astype(np.int8)


@pytest.fixture(scope="module")
def xz(weights: np.ndarray) -> tuple[int, float, float]:
    """Bytes, seconds to compress and to decompress with xz -9e."""
    start = time.perf_counter()
    data = lzma.compress(weights.T.tobytes(), preset=9 | lzma.PRESET_EXTREME)
    middle = time.perf_counter()
    lzma.decompress(data)
    return len(data), middle - start, time.perf_counter() - middle


def test_encode(benchmark, weights: np.ndarray, xz: tuple[int, float, float]) -> None:
    coded = benchmark(codec.encode_matrices, [weights], threads=1)
    report(benchmark, weights, xz[1])
    benchmark.extra_info["bytes over xz"] = len(coded) / xz[0]
    assert len(coded) < xz[0]


def test_decode(benchmark, weights: np.ndarray, xz: tuple[int, float, float]) -> None:
    coded = codec.encode_matrices([weights])
    (decoded,) = benchmark(codec.decode_matrices, coded, [weights.shape], threads=1)
    report(benchmark, weights, xz[2])
    np.testing.assert_array_equal(decoded, weights)


def report(benchmark, weights: np.ndarray, seconds_xz: float) -> None:
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["entries per second"] = weights.size / seconds
    benchmark.extra_info["seconds over xz"] = seconds / seconds_xz
