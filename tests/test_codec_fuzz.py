"""Damaged input, tried out: `csrc/fuzz` (`make fuzz`) on the coder's streams, and the same here on whole artifacts."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgolf import artifact, codec
from pgolf.codec import CodecError
from pgolf.errors import PgolfError

ROOT = Path(__file__).resolve().parents[1]
OCTAL = {0: (0, 0), 4: (0o5, 0o2), 8: (0o13, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24), 256: (0o515, 0o362)}


def matrix(rows: int, columns: int, states: int, scale: float = 5.0) -> np.ndarray:
    """Entries that obey the trellis of so many states down each column; of 0 states: any."""
    h0, h1 = OCTAL[states]
    wanted = np.clip(np.rint(np.random.default_rng(states).normal(0, scale, (rows, columns))), -126, 126)
    state, result = np.zeros(columns, np.int64), np.empty((rows, columns), np.int8)
    for i, row in enumerate(wanted.astype(np.int64)):
        if states:
            k = (row - (state & 1)) >> 1
            row = 2 * k + (state & 1)
            state = (state >> 1) ^ np.where(state & 1, h0 >> 1, 0) ^ np.where(k & 1, h1 >> 1, 0)
        result[i] = row
    return result


def damaged(coded: bytes) -> Iterator[bytes]:
    """Every bit flipped, every end cut off, and one byte too many."""
    for at in range(8 * len(coded)):
        flipped = bytearray(coded)
        flipped[at // 8] ^= 1 << at % 8
        yield bytes(flipped)
    for size in range(len(coded)):
        yield coded[:size]
    yield coded + b"\0"


@pytest.mark.parametrize("states", OCTAL)
@pytest.mark.parametrize("shape", [(24, 5), (5, 24)])
def test_every_flipped_bit_and_every_cut(states: int, shape: tuple[int, int]) -> None:
    matrices = [matrix(*shape, states), matrix(*shape, states, 60.0), matrix(3, 3, states)]
    shapes = [one.shape for one in matrices]
    coded = codec.encode_matrices(matrices)
    refused = trials = 0
    for data in damaged(coded):
        trials += 1
        try:
            decoded = codec.decode_matrices(data, shapes, threads=1)
        except CodecError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert [one.shape for one in decoded] == shapes
    assert refused > 0.8 * trials


@pytest.mark.parametrize("data", [b"", b"a", b"static int a; static int b; " * 4, bytes(range(64))])
def test_every_flipped_bit_and_every_cut_of_bytes(data: bytes) -> None:
    coded = codec.encode_bytes(data)
    for wrong in damaged(coded):
        try:
            assert codec.decode_bytes(wrong, len(data)) != data
        except CodecError as error:
            assert "\n" not in str(error)


# Whole artifacts

HEADER = struct.Struct("<8sIIIQ")
STATE = {
    "tok_emb.weight.q": matrix(30, 8, 0),
    "blocks.0.mlp.fc.weight.q": matrix(20, 6, 64),
    "blocks.1.mlp.fc.weight.q": matrix(20, 6, 64, 20.0),
    "blocks.0.mlp.fc.weight.scale": np.linspace(0, 1, 20, dtype=np.float16),
    "blocks.0.mlp.fc.weight.step": np.arange(6, dtype=np.int8),
    "empty.q": np.zeros((0, 4), np.int8),
    "step": np.array(7, np.int64),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    artifact.save(path / "sound", STATE, {"a": [1, None]}, b"print(1)\n" * 4, threads=1)
    return path


def sealed(table: bytes, size: int, sections: bytes) -> bytes:
    """A file around a coded table: with sizes and a checksum that fit, so that a reader looks further."""
    whole = HEADER.size + len(table) + len(sections) + 32
    body = HEADER.pack(artifact.MAGIC, artifact.VERSION, len(table), size, whole) + table + sections
    return body + hashlib.sha256(body).digest()


def opened(data: bytes) -> tuple[Any, bytes]:
    """The table of a sound file, and its sections."""
    _, _, coded, size, _ = HEADER.unpack_from(data)
    start = HEADER.size + coded
    return json.loads(codec.decode_bytes(data[HEADER.size : start], size)), data[start:-32]


def check(path: Path, data: bytes) -> None:
    """A file loads, to what its own table says, or is refused in one line."""
    path.write_bytes(data)
    try:
        loaded, sizes, matrices = artifact.measure(path, threads=1)
    except PgolfError as error:
        assert "\n" not in str(error)
        return
    table, _ = opened(data)
    shapes = [[name, array.dtype.name, list(array.shape)] for name, array in loaded.state.items()]
    assert shapes == table["arrays"] and loaded.metadata == table["metadata"]
    assert len(loaded.source) == table["source"] and sum(sizes.values()) == len(data)
    assert set(matrices) == {name for name, dtype, shape in shapes if dtype == "int8" and len(shape) == 2}


EDITS = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 2**16), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, 2**16), st.integers(1, 40)),
    st.tuples(st.just("put"), st.integers(0, 2**16), st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("move"), st.integers(0, 2**16), st.integers(0, 2**16)),
)
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def edited(data: bytes, edits: list[tuple[str, int, Any]]) -> bytes:
    result = bytearray(data)
    for kind, where, what in edits:
        at = where % max(len(result), 1)
        if kind == "flip" and result:
            result[at] ^= what
        elif kind == "cut":
            del result[at : at + what]
        elif kind == "put":
            result[at:at] = what
        elif kind == "move" and result:
            other = what % len(result)
            block = result[other : other + 8]
            result[at : at + len(block)] = block
    return bytes(result)


@settings(FUZZ, max_examples=400)
@given(st.lists(EDITS, min_size=1, max_size=4), st.booleans())
def test_edited_files(folder: Path, edits: list[tuple[str, int, Any]], seal: bool) -> None:
    """Anywhere in the file; with a checksum that fits, most edits reach the decoders."""
    data = (folder / "sound").read_bytes()
    if not seal:
        check(folder / "edited", edited(data, edits))
        return
    body = edited(data[:-32], edits)
    if len(body) >= HEADER.size:  # what is left of the file is all that there is
        body = body[: HEADER.size - 8] + struct.pack("<Q", len(body) + 32) + body[HEADER.size :]
    check(folder / "edited", body + hashlib.sha256(body).digest())


@settings(FUZZ, max_examples=300)
@given(st.lists(EDITS, min_size=1, max_size=3), st.booleans())
def test_edited_tables_and_sections(folder: Path, edits: list[tuple[str, int, Any]], inside: bool) -> None:
    """The table's text edited and coded again, or the sections behind a table that is sound."""
    table, sections = opened((folder / "sound").read_bytes())
    text = json.dumps(table).encode()
    text, sections = (edited(text, edits), sections) if inside else (text, edited(sections, edits))
    check(folder / "edited", sealed(codec.encode_bytes(text), len(text), sections))


SIZES = st.one_of(st.integers(-2, 70), st.sampled_from([2**16, 2**30, 2**31, 2**63, 10**40]), st.booleans())
JSON = st.recursive(st.none() | SIZES | st.floats() | st.text(max_size=9), lambda one: st.lists(one, max_size=3))
ROWS = st.tuples(
    st.sampled_from([*STATE, "int8", "source", "a.q", "blocks.00.mlp.fc.weight.q", "blocks.1.\n", ""]),
    st.sampled_from(["int8", "float16", "float32", "int64", "object", "O", ""]),
    st.lists(SIZES, max_size=4),
)


@settings(FUZZ, max_examples=300)
@given(st.data())
def test_tables_that_lie(folder: Path, data: st.DataObject) -> None:
    """One claim of the table replaced by another of its kind, or by anything that JSON can say."""
    table, sections = opened((folder / "sound").read_bytes())
    key = data.draw(st.sampled_from(sorted(table)))
    rows = table[key]
    if isinstance(rows, list) and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(rows) - 1))
        rows[at] = list(data.draw(ROWS)) if key == "arrays" and data.draw(st.booleans()) else rows[at]
        if data.draw(st.booleans()):
            rows[at][data.draw(st.integers(0, len(rows[at]) - 1))] = data.draw(SIZES | JSON)
    else:
        table[key] = data.draw(SIZES | JSON)
    text = json.dumps(table).encode()
    check(folder / "edited", sealed(codec.encode_bytes(text), len(text), sections))


# The driver

COMPILER = os.environ.get("CXX", "g++")
FLAGS = "-std=c++20 -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS -pthread".split()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/fuzz/decode.cpp, compiled."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER} to build the fuzz driver with")
    path = tmp_path_factory.mktemp("driver")
    (path / "empty.cpp").write_text("int main() {}\n")
    able = subprocess.run(
        [COMPILER, *FLAGS, path / "empty.cpp", "-o", path / "empty"], capture_output=True, check=False
    )
    if able.returncode:
        pytest.skip(f"{COMPILER} has no sanitizers here")
    sources = [file for file in sorted((ROOT / "csrc" / "codec").glob("*.cpp")) if file.name != "bind.cpp"]
    sources.append(ROOT / "csrc" / "fuzz" / "decode.cpp")
    include = [f"-I{ROOT / 'csrc' / folder}" for folder in ("fuzz", "codec")]
    words = [COMPILER, *FLAGS, "-Wall", "-Wextra", "-Werror", *include, *sources, "-o", path / "decode"]
    built = subprocess.run(words, capture_output=True, text=True, check=False, timeout=240)
    assert built.returncode == 0, built.stderr[-3000:]
    return path / "decode"


def run(driver: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(driver), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=driver.parent)


@pytest.mark.slow
def test_the_driver_finds_nothing_and_repeats_itself(driver: Path) -> None:
    first, again = (run(driver, "--runs", 1500, "--seed", 3) for _ in range(2))
    assert first.returncode == 0, first.stderr[-3000:]
    outcomes = first.stdout.splitlines()[1:]
    assert outcomes == again.stdout.splitlines()[1:]
    counts = {words[1].strip(): int(words[0]) for words in (line.strip().split(" ", 1) for line in outcomes)}
    assert sum(counts.values()) == 1500
    # Every reason to refuse a stream occurs: the mutations reach all checks.
    for reason in (
        "decoded",
        "a matrix is too large",
        "coded group ends before its last stream",
        "coded group is longer than its streams",
        "coded stream does not end where its encoder ended",
        "coded stream ends before its last symbol",
        "coded stream holds an entry that is no int8",
        "coded stream is longer than its symbols",
        "coded stream is too short for its bytes",
        "coded stream is too short for its matrices",
        "coded stream names a trellis that does not exist",
        "coded stream refers to a row that is still to come",
        "coded stream runs along the longer side of its matrices",
    ):
        assert counts.get(reason), reason


@pytest.mark.slow
def test_the_driver_runs_files(driver: Path, tmp_path: Path) -> None:
    coded = codec.encode_matrices([matrix(20, 6, 64), matrix(5, 7, 0)])
    group = struct.pack("<BB4H", 1, 2, 20, 6, 5, 7)
    text = codec.encode_bytes(b"some text")
    inputs = {
        "group": (group + coded, "decoded"),
        "cut": (group + coded[:-1], "coded group ends before its last stream"),
        "bomb": (struct.pack("<BB2H", 1, 1, 0xF000 + 30, 0xF000 + 30) + coded, "too short for its matrices"),
        "bytes": (struct.pack("<BBH", 0, 0, 9) + text, "decoded"),
        "large": (struct.pack("<BBH", 0, 40, 9) + text, "coded stream is too short for its bytes"),
        "nothing": (b"", "coded stream ends before its last symbol"),
    }
    for name, (data, _) in inputs.items():
        (tmp_path / name).write_bytes(data)
    ran = run(driver, *(tmp_path / name for name in inputs))
    assert ran.returncode == 0, ran.stderr[-3000:]
    for line, (name, (_, wanted)) in zip(ran.stdout.splitlines(), inputs.items(), strict=True):
        assert f"/{name}: " in line and wanted in line, line
    assert run(driver, tmp_path / "absent").returncode == 2
