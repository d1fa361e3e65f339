"""The container: what goes in comes out, its bytes are frozen, and a damaged or hostile file is refused by name."""

import hashlib
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pgolf import artifact, codec
from pgolf.artifact import ArtifactError
from pgolf.dequantize import dequantize
from pgolf.errors import PgolfError

HEADER = struct.Struct("<8sIIIQ")


def small_state() -> dict[str, np.ndarray]:
    """Every kind of array; from integers alone, so that the bytes are the same everywhere."""
    index = np.arange(4096, dtype=np.int64)
    ints = ((index * 7919) % 31 + (index * index * 31) % 17 - 23).astype(np.int8)
    state: dict[str, np.ndarray] = {"tok_emb.weight.q": ints.reshape(128, 32)}
    for layer in (10, 2):
        state[f"blocks.{layer}.mlp.fc.weight.q"] = (ints[: 64 * 32] + np.int8(layer)).reshape(64, 32)
        state[f"blocks.{layer}.mlp.fc.weight.scale"] = (index[:64] / 64 + layer).astype(np.float16)
    return state | {
        "tok_emb.weight.scale": (index[:128] / 128).astype(np.float16),
        "tok_emb.weight.awqg_start": np.array([16], np.int16),
        "tok_emb.weight.awqg_size": np.array(8, np.int16),
        "softcap_pos": np.array(30.5, np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "empty.q": np.zeros((3, 0), np.int8),
        "step": np.array(2**40, np.int64),
        "blocks.2.attn.attn_gate_w.gq": ints[:48].reshape(4, 12),
    }


def written(path: Path) -> bytes:
    artifact.save(
        path, small_state(), {"recipe": "demo", "list": [1, 2.5, None, "é"]}, b"print('hello')\n" * 9, threads=1
    )
    return path.read_bytes()


def sealed(body: bytes) -> bytes:
    """A file with its size and checksum made to fit, so that a reader looks further."""
    body = HEADER.pack(*HEADER.unpack_from(body)[:4], len(body) + 32) + body[HEADER.size :]
    return body + hashlib.sha256(body).digest()


def with_table(data: bytes, edit) -> bytes:
    """The file with its table changed by `edit`, sealed again."""
    magic, version, coded_size, size, _ = HEADER.unpack_from(data)
    table = json.loads(codec.decode_bytes(data[HEADER.size : HEADER.size + coded_size], size))
    edited = edit(table)
    text = edited if isinstance(edited, bytes) else json.dumps(table if edited is None else edited).encode()
    coded = codec.encode_bytes(text)
    body = HEADER.pack(magic, version, len(coded), len(text), 0) + coded + data[HEADER.size + coded_size : -32]
    return sealed(body)


def test_everything_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "model.pgolf"
    state = small_state()
    size = artifact.save(path, state, {"a": [1, {"b": None}]}, b"code")
    loaded = artifact.load(path, threads=2)
    assert size == path.stat().st_size
    assert loaded.metadata == {"a": [1, {"b": None}]} and loaded.source == b"code"
    assert set(loaded.state) == set(state)
    for name, wanted in state.items():
        np.testing.assert_array_equal(loaded.state[name], wanted, err_msg=name, strict=True)
    layers = [name for name in loaded.state if name.endswith("fc.weight.q")]
    assert layers == ["blocks.2.mlp.fc.weight.q", "blocks.10.mlp.fc.weight.q"]


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    bits = np.array([0x8000, 0x7C00, 0xFC00, 0x7E01, 1, 0x3C00], np.uint16)
    state = {"a": bits.view(np.float16), "b.q": np.array([[-128, 127]], np.int8), "c": np.arange(3, dtype=">i4")}
    artifact.save(tmp_path / "m", state, {})
    loaded = artifact.load(tmp_path / "m").state
    assert (loaded["a"].view(np.uint16) == bits).all() and (loaded["b.q"] == state["b.q"]).all()
    assert (loaded["c"] == [0, 1, 2]).all() and loaded["c"].dtype == np.int32


def test_nothing_is_a_valid_content(tmp_path: Path) -> None:
    artifact.save(tmp_path / "m", {}, {})
    assert artifact.load(tmp_path / "m") == artifact.Artifact({}, {}, b"")


def test_levels_are_copied_from_another_artifact() -> None:
    """With the other arrays changed, the bytes are those of coding everything anew."""
    random = np.random.default_rng(0)
    state = {"a.q": random.integers(-9, 9, (30, 20)).astype(np.int8), "a.scale": random.random(30).astype(np.float16)}
    before = artifact.pack(state, {"n": 1}, b"code")
    state["a.scale"] = random.random(30).astype(np.float16)
    assert artifact.pack(state, {"n": 2}, b"code", levels=before) == artifact.pack(state, {"n": 2}, b"code")
    for other in ({"a.q": state["a.q"][:9]}, {"b.q": state["a.q"]}):
        with pytest.raises(ArtifactError, match="holds other matrices"):
            artifact.pack(other, {}, levels=before)
    with pytest.raises(ArtifactError, match="the artifact to take levels from is damaged"):
        artifact.pack(state, {}, levels=before[:-1] + bytes([before[-1] ^ 1]))


def test_bytes_are_frozen(tmp_path: Path) -> None:
    """A change of this digest is a change of format: raise VERSION with it."""
    assert hashlib.sha256(written(tmp_path / "m")).hexdigest() == FROZEN


FROZEN = "cf330e952ab2c1941b3ac9678812364a3fc8c9309948e4c220caed00ab94b153"


def test_bytes_do_not_depend_on_threads_or_order(tmp_path: Path) -> None:
    state = small_state()
    for index, threads in enumerate((1, 2, 5)):
        artifact.save(tmp_path / str(index), dict(sorted(state.items(), reverse=bool(index % 2))), {}, threads=threads)
    assert len({(tmp_path / str(index)).read_bytes() for index in range(3)}) == 1


def test_sizes_add_up(tmp_path: Path) -> None:
    data = written(tmp_path / "m")
    sizes = artifact.sizes(tmp_path / "m")
    assert sum(sizes.values()) == len(data)
    assert {"tok_emb", "mlp.fc", "float16", "int16", "source", "table", "container"} <= set(sizes)
    matrices = artifact.matrix_sizes(tmp_path / "m", threads=1)
    assert set(matrices) == {name for name in small_state() if name.endswith(".q")}
    layers = [size for name, size in matrices.items() if name.endswith("mlp.fc.weight.q")]
    assert len(layers) == 2 and sum(layers) == sizes["mlp.fc"] and min(layers) > 0
    assert matrices["tok_emb.weight.q"] == sizes["tok_emb"]


def refused(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    for read in (artifact.load, artifact.sizes, artifact.matrix_sizes):
        with pytest.raises(ArtifactError, match=match) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_each_kind_of_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m"
    data = written(path)
    refused(path, b"", "not a pgolf model")
    refused(path, b"PK\3\4" + data[4:], "not a pgolf model")
    refused(path, sealed(data[:8] + struct.pack("<I", 1) + data[12:-32]), "version 1, this pgolf reads 4")
    refused(path, data[:5], "truncated")
    refused(path, data[:-1], "truncated")
    refused(path, data + b"x", "after its end")
    refused(path, data[:-1] + bytes([data[-1] ^ 1]), "checksum")
    refused(path, data[:100] + bytes([data[100] ^ 1]) + data[101:], "checksum")
    refused(path, sealed(data[:12] + struct.pack("<II", 2**31, 100) + data[20:-32]), "table out of bounds")
    refused(path, sealed(data[:16] + struct.pack("<I", 2**32 - 1) + data[20:-32]), "table out of bounds")
    with pytest.raises(ArtifactError, match="cannot read"):
        artifact.load(tmp_path / "absent")


TABLES = {
    "not an object": lambda table: [],
    "keys": lambda table: table | {"more": 1},
    "not JSON": lambda table: b"{",
    "is not JSON": lambda table: b"[" * 100_000,
    "metadata": lambda table: table | {"metadata": 3},
    "source is out": lambda table: table | {"source": -1},
    "the source": lambda table: table | {"source": True},
    "arrays is not": lambda table: table | {"arrays": {}},
    "sections has": lambda table: table | {"sections": [["a"]]},
    "unknown type": lambda table: table["arrays"][0].__setitem__(1, "object"),
    "an unknown": lambda table: table["arrays"][0].__setitem__(1, ["int8"]),
    "array 5": lambda table: table["arrays"][0].__setitem__(0, 5),
    "bad shape": lambda table: table["arrays"][0].__setitem__(2, [1] * 9),
    "size out of bounds": lambda table: table["arrays"][0].__setitem__(2, [-1, 3]),
    "a size out": lambda table: table["arrays"][0].__setitem__(2, [1.5]),
    "size out of": lambda table: table["arrays"][0].__setitem__(2, [2**31]),
    "too large": lambda table: table["arrays"][0].__setitem__(2, [2**30, 2**30]),
    "repeated": lambda table: table["arrays"].append(table["arrays"][-1]),
    "out of order": lambda table: table["arrays"].reverse(),
    "is out of bounds": lambda table: table["sections"][0].__setitem__(1, 2**29),
    "do not fill": lambda table: table["sections"][0].__setitem__(1, table["sections"][0][1] - 1),
    "not those of": lambda table: table["sections"][0].__setitem__(0, "other"),
}


@pytest.mark.parametrize("match", TABLES)
def test_a_table_that_lies_is_refused(tmp_path: Path, match: str) -> None:
    data = written(tmp_path / "m")
    refused(tmp_path / "m", with_table(data, TABLES[match]), match)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """Sizes within the limits, but beyond what the file's bytes can hold, are refused before they are allocated."""
    data = written(tmp_path / "m")

    def enlarge(name: str, shape: list[int]):
        def edit(table: dict) -> None:
            next(row for row in table["arrays"] if row[0] == name)[2] = shape

        return edit

    bombs = [
        with_table(data, enlarge("tok_emb.weight.q", [2**29, 1])),
        with_table(data, enlarge("tok_emb.weight.q", [2**15, 2**14])),
        with_table(data, enlarge("softcap_pos", [2**28])),
        with_table(data, lambda table: table | {"source": 2**29}),
        sealed(data[:16] + struct.pack("<I", 2**24) + data[20:-32]),
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            (tmp_path / "m").write_bytes(bomb)
            with pytest.raises(PgolfError, match="too short"):
                artifact.load(tmp_path / "m")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("resealed", [False, True])
def test_mutations_never_crash(tmp_path: Path, resealed: bool) -> None:
    """Bit flips, cuts, swaps and noise: with a checksum that fits they reach every decoder."""
    path = tmp_path / "m"
    data = written(path)
    wanted = artifact.load(path)
    generator = np.random.default_rng(int(resealed))
    decoded = 0
    tracemalloc.start()
    try:
        for trial in range(300):
            body = bytearray(data[:-32])
            kind, at = trial % 4, int(generator.integers(8, len(body)))
            if kind == 0:
                body[at] ^= 1 << generator.integers(0, 8)
            elif kind == 1:
                body = body[: max(at, HEADER.size)]
            elif kind == 2:
                body[at : at + 16] = generator.bytes(len(body[at : at + 16]))
            else:
                at = int(generator.integers(8, HEADER.size))
                body[at] = generator.integers(0, 256)
            path.write_bytes(sealed(bytes(body)) if resealed else bytes(body) + data[-32:])
            try:
                loaded = artifact.load(path, threads=1)
            except PgolfError as error:
                assert "\n" not in str(error)
            else:  # possible only where a checksum fits: the same arrays, with some other values
                decoded += 1
                assert resealed or bytes(body) == data[:-32]
                assert {name: array.shape for name, array in loaded.state.items()} == {
                    name: array.shape for name, array in wanted.state.items()
                }
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert decoded < 100


def test_content_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for state, metadata, match in [
        ({"a": np.zeros(2, complex)}, {}, "a is complex128"),
        ({"a": np.array([None])}, {}, "a is object"),
        ({}, {"a": object()}, "not JSON"),
        ({}, {"a": float("nan")}, "not JSON"),
        ({"float16.q": np.zeros((1, 1), np.int8), "b": np.zeros(1, np.float16)}, {}, "named like"),
    ]:
        with pytest.raises(ArtifactError, match=match):
            artifact.save(path, state, metadata)
    assert not path.exists()
    with pytest.raises(PgolfError, match="cannot write"):
        artifact.save(tmp_path / "absent" / "m", {}, {})


@pytest.mark.golden
def test_golden_model_survives_and_dequantizes(golden, tmp_path: Path) -> None:
    with np.load(golden("quant_model.npz"), allow_pickle=False) as arrays:
        state = {name[6:]: arrays[name] for name in arrays.files if name.startswith("quant.")}
        wanted = {name[8:]: arrays[name] for name in arrays.files if name.startswith("dequant.")}
    state = {name: array.astype(np.float16) if array.dtype.kind == "f" else array for name, array in state.items()}
    artifact.save(tmp_path / "m", state, {})
    weights = dequantize(artifact.load(tmp_path / "m").state)
    assert set(weights) == set(wanted)
    for name, array in wanted.items():
        assert weights[name].dtype == np.float32 and weights[name].shape == array.shape, name
        assert np.linalg.norm(weights[name] - array) <= 1e-3 * np.linalg.norm(array), name


def test_symmetric_correction_several_groups_and_gates() -> None:
    generator = np.random.default_rng(0)
    q, a, b = (generator.integers(-7, 8, shape).astype(np.int8) for shape in ((6, 8), (6, 2), (2, 8)))
    scale, s_hi, a_scale, b_scale = (
        generator.uniform(0.5, 2, shape).astype(np.float16) for shape in ((6,), (2, 6), (6,), (2,))
    )
    state = {
        "w.q": q,
        "w.scale": scale,
        "w.awqg_start": np.array([0, 6], np.int16),
        "w.awqg_size": np.array(2, np.int16),
        "w.awqg_s_hi": s_hi,
        "w.lqA": a,
        "w.lqAs": a_scale,
        "w.lqB": b,
        "w.lqBs": b_scale,
        "g.gq": q,
        "g.gs": scale,
        "passed.scale": scale,
    }
    wanted = np.zeros((6, 8))
    for i in range(6):
        for j in range(8):
            row_scale = s_hi[0, i] if j < 2 else s_hi[1, i] if j >= 6 else scale[i]
            low_rank = sum(float(a[i, k]) * float(a_scale[i]) * float(b[k, j]) * float(b_scale[k]) for k in range(2))
            wanted[i, j] = float(q[i, j]) * float(row_scale) + low_rank
    weights = dequantize(state)
    np.testing.assert_allclose(weights["w"], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weights["g"], q * scale[:, None].astype(np.float32))
    assert set(weights) == {"w", "g", "passed.scale"}


def test_parts_that_do_not_fit_are_named() -> None:
    q, scale = np.ones((4, 6), np.int8), np.ones(4, np.float16)
    one = np.array(1, np.int16)
    for extra, match in [
        ({"w.scale": scale[:3]}, "w.scale must have the shape"),
        ({"w.awqg_start": np.array([5], np.int16), "w.awqg_size": 2 * one, "w.awqg_s_hi": scale}, "do not fit"),
        ({"w.awqg_start": np.array([0], np.int16)}, "w.awqg_size is missing"),
        ({"w.lqA": np.ones((4, 2), np.int8)}, "w.lqB is missing"),
        (
            {"w.lqA": q[:, :2], "w.lqAs": scale, "w.lqB": q[:3], "w.lqBs": scale[:3]},
            "a correction of",
        ),
    ]:
        with pytest.raises(PgolfError, match=match):
            dequantize({"w.q": q, "w.scale": scale} | extra)
    with pytest.raises(PgolfError, match="w.scale is missing"):
        dequantize({"w.q": q})
