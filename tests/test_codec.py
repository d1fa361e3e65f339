"""The entropy coder: lossless on anything, the same bytes for any number of threads, safe on anything."""

import hashlib
import lzma
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf import codec
from pgolf.codec import CodecError


def gaussian(rows: int, columns: int, scale: float = 2.4, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, scale, (rows, columns))
    return np.clip(np.round(values), -128, 127).astype(np.int8)


def assert_round_trip(matrices: list[np.ndarray]) -> None:
    coded = codec.encode_matrices(matrices, threads=2)
    decoded = codec.decode_matrices(coded, [matrix.shape for matrix in matrices], threads=1)
    for index, (got, wanted) in enumerate(zip(decoded, matrices, strict=True)):
        np.testing.assert_array_equal(got, wanted, err_msg=f"matrix {index}", strict=True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=5),
    st.integers(0, 8),
    st.integers(0, 2**32 - 1),
)
def test_matrices_of_any_shape_and_width_come_back(shapes: list[tuple[int, int]], bits: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    low, high = -(2**bits // 2), max(2**bits // 2, 1)
    assert_round_trip([generator.integers(low, high, shape).astype(np.int8) for shape in shapes])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 3000), (3000, 1), (2, 2), (700, 5), (5, 700), (40, 600)])
@pytest.mark.parametrize("scale", [0.0, 0.3, 2.4, 30.0, 1000.0])
def test_extreme_shapes_and_scales_come_back(shape: tuple[int, int], scale: float) -> None:
    assert_round_trip([gaussian(*shape, scale), gaussian(*shape, scale, seed=1)])


@pytest.mark.parametrize("value, most", [(-1, 1000), (0, 400), (-128, 20_000), (127, 20_000)])
def test_a_constant_costs_little(value: int, most: int) -> None:
    matrix = np.full((300, 400), value, np.int8)
    assert_round_trip([matrix])
    assert len(codec.encode_matrices([matrix])) < most


def test_adversarial_matrices_come_back() -> None:
    columns = np.arange(256)
    alternating = np.where((columns[:, None] + columns) % 2, 127, -128).astype(np.int8)
    repeated = np.tile(gaussian(8, 300, 60.0), (20, 1))
    steps = np.repeat(np.array([-128, 127, 0, 1], np.int8), 64)[:, None] * np.ones((1, 200), np.int8)
    assert_round_trip([alternating, repeated, -1 - repeated, steps, np.ascontiguousarray(steps.T)])


def test_more_than_one_stream_comes_back() -> None:
    assert_round_trip([gaussian(1500, 1500, seed=seed) for seed in range(2)])


def test_views_are_coded_by_value() -> None:
    matrix = gaussian(60, 80)
    assert codec.encode_matrices([matrix.T]) == codec.encode_matrices([matrix.T.copy()])
    assert codec.encode_matrices([matrix[::2]]) == codec.encode_matrices([matrix[::2].copy()])


def test_threads_change_nothing() -> None:
    groups = [
        [gaussian(64, 96, seed=i) for i in range(3)],
        [gaussian(50, 50)],
        [],
        [gaussian(9, 300), gaussian(300, 9)],
    ]
    coded = [codec.encode_groups(groups, threads) for threads in (1, 2, 5)]
    assert coded[0] == coded[1] == coded[2]
    pairs = [(data, [matrix.shape for matrix in group]) for data, group in zip(coded[0], groups, strict=True)]
    for threads in (1, 2, 5):
        for got, wanted in zip(codec.decode_groups(pairs, threads), groups, strict=True):
            assert all((a == b).all() for a, b in zip(got, wanted, strict=True))


def test_bytes_are_frozen() -> None:
    """A change of these digests is a change of format: raise artifact.VERSION with it."""
    # Arithmetic on integers, not a generator: numpy may change its distributions.
    index = np.arange(96 * 64, dtype=np.uint64)
    noise = (index * index * np.uint64(2654435761) + index * np.uint64(40503)) >> np.uint64(9)
    small = ((noise % np.uint64(13)) + (noise // np.uint64(13)) % np.uint64(9)).astype(np.int8) - np.int8(10)
    matrices = [small.reshape(96, 64), small.reshape(64, 96), noise.astype(np.uint8).view(np.int8).reshape(-1, 8)]
    coded = codec.encode_matrices(matrices) + codec.encode_bytes(b"frozen bytes " * 20)
    assert hashlib.sha256(coded).hexdigest() == FROZEN, "the coder writes other bytes than version 1 did"


FROZEN = "71b24c9feed6f53136f20308ebdd79956a80dc4bb24872efff880a910792e455"


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=3000))
def test_bytes_come_back(data: bytes) -> None:
    assert codec.decode_bytes(codec.encode_bytes(data), len(data)) == data


def test_text_is_smaller_than_with_xz() -> None:
    text = open(codec.__file__, "rb").read()
    coded = codec.encode_bytes(text)
    assert codec.decode_bytes(coded, len(text)) == text
    assert len(coded) < len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def test_random_bytes_hardly_grow() -> None:
    data = np.random.default_rng(0).bytes(20000)
    assert len(codec.encode_bytes(data)) < 1.03 * len(data)


def test_gaussian_entries_come_close_to_their_entropy() -> None:
    matrix = gaussian(512, 1024)
    _, counts = np.unique(matrix, return_counts=True)
    entropy = -(counts * np.log2(counts / matrix.size)).sum() / 8
    assert len(codec.encode_matrices([matrix])) < 1.01 * entropy


def test_a_row_like_an_earlier_one_is_cheap() -> None:
    base = gaussian(400, 512, 8.0)
    generator = np.random.default_rng(1)
    near = base[generator.permutation(400)] + generator.integers(-1, 2, base.shape).astype(np.int8)
    alone, both = len(codec.encode_matrices([base])), len(codec.encode_matrices([np.concatenate([base, near])]))
    assert both - alone < 0.6 * alone


@pytest.mark.golden
def test_golden_groups_are_smaller_than_with_xz_and_brotli(golden) -> None:
    brotli = pytest.importorskip("brotli")
    groups: dict[str, list[np.ndarray]] = {}
    with np.load(golden("quant_model.npz"), allow_pickle=False) as arrays:
        for name in arrays.files:
            if name.startswith("quant.") and name.endswith(".q"):
                role = re.sub(r"^quant\.(blocks\.\d+\.)?", "", name)
                groups.setdefault(role, []).append(arrays[name])
    assert groups
    for role, matrices in groups.items():
        assert_round_trip(matrices)
        ours = len(codec.encode_matrices(matrices))
        plain = np.concatenate([matrix.T.reshape(-1) for matrix in matrices]).tobytes()
        xz = len(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME))
        assert ours < min(xz, len(brotli.compress(plain, quality=11))), role


def test_damaged_streams_are_refused_or_decoded() -> None:
    """Flipped, cut and extended streams end in CodecError or some matrices of the right shapes: never otherwise."""
    matrices = [gaussian(40, 60), gaussian(40, 60, 20.0), gaussian(70, 30)]
    shapes = [matrix.shape for matrix in matrices]
    coded = codec.encode_matrices(matrices)
    generator = np.random.default_rng(0)
    refused = 0
    for trial in range(300):
        damaged = bytearray(coded)
        if trial % 3 == 0:
            damaged = damaged[: generator.integers(0, len(coded))]
        elif trial % 3 == 1:
            damaged[generator.integers(0, len(coded))] ^= 1 << generator.integers(0, 8)
        else:
            start = generator.integers(8, len(coded))
            damaged[start : start + 40] = generator.bytes(40)
        try:
            decoded = codec.decode_matrices(bytes(damaged), shapes, threads=1)
        except CodecError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert [matrix.shape for matrix in decoded] == shapes
    assert refused > 200  # every cut, and nearly every other damage


@pytest.mark.parametrize("data", [b"", b"\0", b"\xff" * 3, b"\0" * 64, b"\xff" * 64])
def test_streams_that_no_encoder_wrote_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        codec.decode_matrices(data, [(100, 100)])
    with pytest.raises(CodecError):
        codec.decode_bytes(data, 100)


def test_shapes_that_cannot_be_in_the_data_are_refused_before_allocating() -> None:
    coded = codec.encode_matrices([gaussian(10, 10)])
    tracemalloc.start()
    try:
        for shape in [(2**30, 1), (2**15, 2**15), (2**31 - 1, 2**31 - 1), (2**31, 1), (-1, 5), (1, 10**30)]:
            with pytest.raises(CodecError):
                codec.decode_matrices(coded, [shape])
        for size in (-1, 2**40, 10**30):
            with pytest.raises(CodecError):
                codec.decode_bytes(codec.encode_bytes(b"abc"), size)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_wrong_list_of_shapes_is_refused() -> None:
    coded = codec.encode_matrices([gaussian(30, 40), gaussian(20, 40)])
    for shapes in ([], [(30, 40)], [(30, 40)] * 3, [(30, 40), (20, 39)], [(30, 40), (21, 40)]):
        with pytest.raises(CodecError):
            codec.decode_matrices(coded, shapes)


def test_only_int8_matrices_are_coded() -> None:
    for bad in (np.zeros((2, 2), np.int16), np.zeros(4, np.int8)):
        with pytest.raises(CodecError, match="int8 with 2 dimensions"):
            codec.encode_matrices([bad])
    with pytest.raises(CodecError, match="threads"):
        codec.encode_matrices([], threads=0)
