"""The entropy coder: lossless on anything, the same bytes for any number of threads, safe on anything."""

import hashlib
import lzma
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf import _codec, codec
from pgolf.codec import CodecError


def gaussian(rows: int, columns: int, scale: float = 2.4, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, scale, (rows, columns))
    return np.clip(np.round(values), -128, 127).astype(np.int8)


# Octal polynomials (h0, h1) by number of states, in the order of a stream's kinds 1 to 5.
TRELLISES = {4: (0o5, 0o2), 8: (0o13, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24), 256: (0o515, 0o362)}


def on_trellis(wanted: np.ndarray, states: int) -> np.ndarray:
    """Each entry (within [-126, 126]) moved to the nearest one that the trellis allows, down the columns from s = 0."""
    h0, h1 = TRELLISES[states]
    state = np.zeros(wanted.shape[1], np.int64)
    result = np.empty(wanted.shape, np.int8)
    for i, row in enumerate(wanted):
        parity = state & 1
        k = np.floor((row - parity) / 2 + 0.5).astype(np.int64)
        result[i] = 2 * k + parity
        state = (state >> 1) ^ np.where(parity, h0 >> 1, 0) ^ np.where(k & 1, h1 >> 1, 0)
    return result


def walk(rows: int, columns: int, states: int, scale: float = 4.8, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, scale, (rows, columns))
    return on_trellis(np.clip(values, -126, 126), states)


def header(coded: bytes) -> tuple[int, int]:
    """(transpose, kind) of a group's only stream: its first four bits, of which ones take the lower half."""
    bits = ~coded[4] & 255
    return bits >> 7, (bits >> 4) & 7


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


@pytest.mark.parametrize("states", TRELLISES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 2), (100, 30), (30, 100), (70, 70)])
@pytest.mark.parametrize("scale", [0.0, 0.5, 4.8, 60.0, 1000.0])
def test_trellis_matrices_come_back(states: int, shape: tuple[int, int], scale: float) -> None:
    assert_round_trip([walk(*shape, states, scale, seed) for seed in range(3)])


@pytest.mark.parametrize("kind, states", list(enumerate(TRELLISES, 1)))
@pytest.mark.parametrize("shape, transpose", [((900, 100), 0), ((100, 900), 1)])
def test_a_trellis_saves_the_bit_of_parity(kind: int, states: int, shape: tuple[int, int], transpose: int) -> None:
    """In both orientations; one wrong parity anywhere makes the whole stream plain."""
    matrices = [walk(*shape, states, seed=seed) for seed in range(2)]
    coded = codec.encode_matrices(matrices)
    assert header(coded) == (transpose, kind)
    assert_round_trip(matrices)
    for place in [(0, 0, 0), (0, 50, 60), (1, shape[0] - 1, shape[1] - 1)]:
        broken = [matrix.copy() for matrix in matrices]
        broken[place[0]][place[1:]] ^= 1
        plain = codec.encode_matrices(broken)
        assert header(plain) == (transpose, 0)
        assert_round_trip(broken)
        assert len(coded) < len(plain) - 0.95 * sum(matrix.size for matrix in matrices) / 8


def test_a_trellis_starts_anew_in_each_matrix() -> None:
    """What obeys a trellis only as one tall matrix is plain as two."""
    tall = walk(401, 100, 64)
    assert header(codec.encode_matrices([tall])) == (0, 4)
    halves = [tall[:200], tall[200:400]]
    assert header(codec.encode_matrices(halves)) == (0, 0)
    assert_round_trip(halves)


def test_trellis_entries_come_close_to_their_entropy_given_parity() -> None:
    matrix = walk(512, 1024, 64)
    entropy = 0.0
    for parity in (0, 1):
        _, counts = np.unique(matrix[matrix % 2 == parity], return_counts=True)
        entropy -= (counts * np.log2(counts / counts.sum())).sum() / 8
    assert len(codec.encode_matrices([matrix])) < 1.01 * entropy


def test_parities_of_a_trellis_leave_prediction_as_it_is() -> None:
    """A row like an earlier one, here its double or half in steps, is cheap on a trellis as well."""
    base = gaussian(400, 512, 16.0).astype(np.float64)
    near = base[np.random.default_rng(1).permutation(400)] + np.random.default_rng(2).integers(-1, 2, base.shape)
    near = np.clip(near, -126, 126)
    alone = len(codec.encode_matrices([on_trellis(base, 64)]))
    both = len(codec.encode_matrices([on_trellis(np.concatenate([base, near]), 64)]))
    assert both - alone < 0.6 * alone


@pytest.mark.parametrize("transpose", [False, True])
def test_sizes_of_matrices_add_up(transpose: bool) -> None:
    shape = (90, 600) if transpose else (600, 90)
    zeros = np.zeros(shape, np.int8)
    groups = [
        [gaussian(*shape, 30.0), zeros, gaussian(*shape, 3.0)],
        [walk(*shape, 64)],
        [],
        [zeros[:0], zeros[:0], zeros[:9]],
        [gaussian(1500, 1500, 1.0, seed) for seed in range(2)],  # a stream each
    ]
    coded = codec.encode_groups(groups)
    sizes = codec.sizes(groups, threads=2)
    for data, group, parts in zip(coded, groups, sizes, strict=True):
        assert len(parts) == len(group) and sum(parts) == len(data)
        assert codec.matrix_sizes(data, [matrix.shape for matrix in group]) == parts
    wide, none, narrow = sizes[0]
    assert none < 300 and wide > 1.5 * narrow > 0  # by ten times their scales: about 7 and 3.6 bits an entry
    assert sizes[4] == [len(data) for data in codec.encode_groups([[matrix] for matrix in groups[4]])]


@pytest.mark.parametrize("shape", [(8192, 300), (2048, 2048)])
def test_a_large_matrix_is_cut_into_parts_and_comes_back(shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape)
    group = [gaussian(16, 8), matrix, gaussian(16, 8, seed=1)]
    (data,) = codec.encode_groups([group])
    shapes = [one.shape for one in group]
    (found,) = codec.decode_groups([(data, shapes)])
    assert all(np.array_equal(one, wanted) for one, wanted in zip(found, group, strict=True))
    assert sum(codec.matrix_sizes(data, shapes)) == len(data)
    assert len(codec._parts(shape)) == 2


@given(st.integers(0, 10**8), st.integers(0, 10**4))
def test_parts_are_even_and_small_enough(rows: int, columns: int) -> None:
    parts = codec._parts((rows, columns))
    widths = [part.stop - part.start for part in parts]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert sum(widths) == columns
    assert max(widths) - min(widths) <= 1
    assert (max(widths) - 1) * rows <= codec.PART_ENTRIES
    assert len(parts) == 1 or rows * columns > codec.PART_ENTRIES


def test_parts_keep_the_trellis() -> None:
    rows, columns = 2048, 1300
    cut = codec.encode_matrices([walk(rows, columns, 64)])
    whole = codec.encode_matrices([walk(rows, columns // 2, 64)])
    free = codec.encode_matrices([gaussian(rows, columns, 4.8)])
    assert len(codec._parts((rows, columns))) == 2
    assert len(cut) == pytest.approx(2 * len(whole), rel=2e-3)
    assert len(cut) < len(free) - 0.9 * rows * columns / 8


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
        [walk(64, 96, 8, seed=i) for i in range(3)],
        [walk(96, 64, states) for states in TRELLISES],
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
    for states in TRELLISES:
        matrices += [on_trellis(2.0 * small.reshape(shape), states) for shape in [(128, 48), (48, 128)]]
    coded = codec.encode_matrices(matrices) + codec.encode_bytes(b"frozen bytes " * 20)
    assert hashlib.sha256(coded).hexdigest() == FROZEN, "the coder writes other bytes than before"


FROZEN = "2d1c26fbbd465e8a9007545d84ae6d1a438418cc1563e1f79ea978fb00f6f32e"


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


@pytest.mark.parametrize(
    "matrices",
    [
        pytest.param([gaussian(40, 60), gaussian(40, 60, 20.0), gaussian(70, 30)], id="plain"),
        pytest.param([walk(40, 60, 64), walk(40, 60, 64, 40.0, 1), walk(70, 30, 4), walk(20, 50, 256)], id="trellis"),
    ],
)
def test_damaged_streams_are_refused_or_decoded(matrices: list[np.ndarray]) -> None:
    """Flipped, cut and extended streams end in CodecError or some matrices of the right shapes: never otherwise."""
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


def test_a_stream_of_another_kind_is_refused_or_decoded() -> None:
    """Every kind in the header of a stream that was coded with another, and of noise; two kinds do not exist."""
    beyond_int8 = 0
    for matrix in (gaussian(90, 40, 40.0), walk(90, 40, 64, 40.0), walk(40, 90, 64, 40.0)):
        coded = codec.encode_matrices([matrix])
        for seed in range(20):
            noise = coded[:5] + np.random.default_rng(seed).bytes(len(coded) - 5) if seed else coded
            for kind in range(8):
                first = (noise[4] & 0x8F) | ((~kind & 7) << 4)
                edited = noise[:4] + bytes([first]) + noise[5:]
                assert header(edited) == (header(coded)[0], kind)
                try:
                    decoded = codec.decode_matrices(edited, [matrix.shape])[0]
                except CodecError as error:
                    assert ("trellis that does not exist" in str(error)) == (kind > 5)
                    beyond_int8 += "no int8" in str(error)
                else:
                    assert kind <= 5 and decoded.shape == matrix.shape
    assert beyond_int8 > 0


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


@pytest.mark.parametrize("step", [-16256, -4096, -1, 0, 1, 2047, 2048, 16256])
def test_every_version_of_linear_prediction_gives_the_same_integers(step: int) -> None:
    generator = np.random.default_rng(abs(step))
    weights = generator.integers(-32768, 32768, 512)
    entries = generator.integers(-127, 128, 512)
    moved = (weights + ((step * entries + 2048) >> 12)).astype(np.int16)  # modulo 2^16
    versions = _codec.linear_versions(weights.tolist(), entries.tolist(), step)
    assert versions
    for total, found in versions:
        assert total == weights @ entries
        assert found == moved.tolist()
