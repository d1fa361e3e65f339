"""The container `model.pgolf`: a quantized model and its source code in one checked file.

All integers are little-endian. Equal content gives equal bytes on every machine, with any number of threads.

    offset  size
    0       8     magic: 89 50 47 4F 4C 46 0D 0A
    8       4     version (4)
    12      4     T, bytes of the coded table
    16      4     bytes of the table once decoded
    20      8     bytes of the whole file
    28      T     table: JSON, coded by `codec.encode_bytes`
    28 + T        sections, one after another, in the order of the table
    end-32  32    SHA-256 of everything before it

The table: {"arrays": [[name, dtype, shape], ...], "metadata": {}, "sections": [[name, bytes], ...], "source": bytes}.
Arrays are ordered by role, then layer, and their names and types alone decide which section holds them:

    int8 [rows, columns] named NAME.q   one section a role ("blocks.3.mlp.fc.weight.q" is of role "mlp.fc"), all its
                                        layers together: `codec.encode_groups`, whose streams say whether
                                        columns obey a trellis
    anything else                       one section a dtype: the arrays end to end, then all first bytes of their
                                        elements, all second bytes, ...: `codec.encode_bytes`
    the source code                     section "source": `codec.encode_bytes`

A reader checks magic, size and checksum, then every number of the table, before it allocates or decodes; nothing in the
file is executed or unpickled.
"""

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgolf import codec, files
from pgolf.errors import PgolfError

Array = NDArray[Any]

MAGIC = b"\x89PGOLF\r\n"
VERSION = 4
DTYPES = ("float16", "float32", "int8", "int16", "int32", "int64", "uint8")
CAP = 16_000_000  # bytes that the rules allow a file, weights and code
LIMIT = 2**30  # bytes of a file, and of all its arrays

_HEADER = struct.Struct("<8sIIIQ")
_DIGEST = 32
_MAX_TABLE = 2**24


class ArtifactError(PgolfError):
    """A file that is no sound artifact, or content that cannot become one. The message says which."""


@dataclass(frozen=True)
class Artifact:
    """What a file holds: arrays by name (ordered by role, then layer), JSON metadata and source code."""

    state: dict[str, Array]
    metadata: dict[str, Any]
    source: bytes


@dataclass(frozen=True)
class _Entry:
    """One array of the table."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        return self.dtype == "int8" and len(self.shape) == 2 and self.name.endswith(".q")

    @property
    def section(self) -> str:
        if not self.is_matrix:
            return self.dtype
        return _role_and_layer(self.name)[0].removesuffix(".q").removesuffix(".weight")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def save(
    path: str | Path,
    state: dict[str, Array],
    metadata: dict[str, Any],
    source: bytes = b"",
    threads: int | None = None,
) -> int:
    """Write an artifact atomically; returns how many bytes it has.

    Arguments and errors as in `pack`; PgolfError when the file cannot be written.
    """
    data = pack(state, metadata, source, threads)
    files.write_bytes(path, data)
    return len(data)


def pack(
    state: dict[str, Array],
    metadata: dict[str, Any],
    source: bytes = b"",
    threads: int | None = None,
    levels: bytes | None = None,
) -> bytes:
    """An artifact's bytes.

    `state` maps names to arrays of the types in `DTYPES`, any shapes; `metadata` must be JSON without NaN. `levels` is
    an artifact with the same NAME.q: their sections, nearly all of the work, are copied from it.
    Raises ArtifactError for content that does not fit.
    """
    for name, array in state.items():
        if array.dtype.name not in DTYPES:
            raise ArtifactError(f"{name} is {array.dtype}; an artifact holds {', '.join(DTYPES)}")
    names = sorted(state, key=_role_and_layer)
    entries = [_Entry(name, state[name].dtype.name, state[name].shape) for name in names]
    if sum(entry.nbytes for entry in entries) + len(source) > LIMIT:
        raise ArtifactError(f"the arrays and source exceed the {LIMIT:,} bytes that an artifact may hold")
    matrices, plains = _plan(entries)
    if levels is None:
        groups = [[state[entry.name] for entry in group] for group in matrices.values()]
        sections = list(zip(matrices, codec.encode_groups(groups, threads), strict=True))
    else:
        known, _, places = _parse(levels, "the artifact to take levels from")
        if _plan(known)[0] != matrices:
            raise ArtifactError("the artifact to take levels from holds other matrices")
        sections = [(name, levels[slice(*places[name])]) for name in matrices]
    for dtype, group in plains.items():
        sections.append((dtype, codec.encode_bytes(_to_planes([state[entry.name] for entry in group], dtype))))
    sections.append(("source", codec.encode_bytes(source)))
    table = {
        "arrays": [[entry.name, entry.dtype, list(entry.shape)] for entry in entries],
        "metadata": metadata,
        "sections": [[name, len(coded)] for name, coded in sections],
        "source": len(source),
    }
    try:
        text = json.dumps(table, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the metadata is not JSON: {error}") from error
    if len(text) > _MAX_TABLE:
        raise ArtifactError(f"the table of arrays and metadata exceeds {_MAX_TABLE:,} bytes")
    coded_table = codec.encode_bytes(text)
    payload = coded_table + b"".join(coded for _, coded in sections)
    size = _HEADER.size + len(payload) + _DIGEST
    body = _HEADER.pack(MAGIC, VERSION, len(coded_table), len(text), size) + payload
    return body + hashlib.sha256(body).digest()


def load(path: str | Path, threads: int | None = None) -> Artifact:
    """Read an artifact; ArtifactError or CodecError, naming the problem, on a file that `save` did not write."""
    return measure(path, threads)[0]


def measure(path: str | Path, threads: int | None = None) -> tuple[Artifact, dict[str, int], dict[str, int]]:
    """What `load`, `sizes` and `matrix_sizes` give, from one reading."""
    data, entries, table, sections = _read(path)
    matrices, plains = _plan(entries)
    coded_groups = [(data[slice(*sections[name])], _shapes(group)) for name, group in matrices.items()]
    arrays: dict[str, Array] = {}
    parts: dict[str, int] = {}
    for group, (decoded, coded) in zip(matrices.values(), codec.decode_and_measure(coded_groups, threads), strict=True):
        names = [entry.name for entry in group]
        arrays.update(zip(names, decoded, strict=True))
        parts.update(zip(names, coded, strict=True))
    for dtype, group in plains.items():
        size = sum(entry.nbytes for entry in group)
        arrays.update(_from_planes(codec.decode_bytes(data[slice(*sections[dtype])], size), group, dtype))
    source = codec.decode_bytes(data[slice(*sections["source"])], table["source"])
    result = Artifact({entry.name: arrays[entry.name] for entry in entries}, table["metadata"], source)
    return result, _sizes(data, sections), parts


def sizes(path: str | Path) -> dict[str, int]:
    """Coded bytes of each section, of the "table" and of the rest ("container"); they add up to the file's size."""
    data, _, _, sections = _read(path)
    return _sizes(data, sections)


def matrix_sizes(path: str | Path, threads: int | None = None) -> dict[str, int]:
    """Coded bytes of each matrix by name, parts of its section in `sizes` (`codec.sizes`); decodes the file."""
    return measure(path, threads)[2]


def _sizes(data: bytes, sections: dict[str, tuple[int, int]]) -> dict[str, int]:
    result = {name: end - start for name, (start, end) in sections.items()}
    result["table"] = _HEADER.unpack_from(data)[2]
    result["container"] = _HEADER.size + _DIGEST
    return result


def _shapes(matrices: list[_Entry]) -> list[tuple[int, int]]:
    return [(entry.shape[0], entry.shape[1]) for entry in matrices]


def _role_and_layer(name: str) -> tuple[str, int, str]:
    """Sorting key: blocks.3.mlp.fc.weight.q -> ("mlp.fc.weight.q", 3, name); other names are their own role."""
    match = re.fullmatch(r"blocks\.([0-9]{1,9})\.(.+)", name, re.DOTALL)
    return (match[2], int(match[1]), name) if match else (name, -1, name)


def _plan(entries: list[_Entry]) -> tuple[dict[str, list[_Entry]], dict[str, list[_Entry]]]:
    """Arrays by section, in the order of the file: coded matrices by role, the others by dtype."""
    matrices: dict[str, list[_Entry]] = {}
    plains: dict[str, list[_Entry]] = {}
    for entry in entries:
        (matrices if entry.is_matrix else plains).setdefault(entry.section, []).append(entry)
    clash = matrices.keys() & {*plains, "source"}
    if clash:
        raise ArtifactError(f"no matrix may be named like the section {clash.pop()!r}")
    return matrices, plains


def _to_planes(arrays: list[Array], dtype: str) -> bytes:
    little = np.dtype(dtype).newbyteorder("<")
    flat = np.concatenate([array.astype(little).reshape(-1) for array in arrays])
    return flat.view(np.uint8).reshape(-1, little.itemsize).T.tobytes()


def _from_planes(data: bytes, group: list[_Entry], dtype: str) -> dict[str, Array]:
    little = np.dtype(dtype).newbyteorder("<")
    planes = np.frombuffer(data, np.uint8).reshape(little.itemsize, -1)
    flat = np.ascontiguousarray(planes.T).reshape(-1).view(little).astype(dtype, copy=False)
    ends = np.cumsum([math.prod(entry.shape) for entry in group])
    parts = np.split(flat, ends[:-1])
    return {entry.name: part.reshape(entry.shape) for entry, part in zip(group, parts, strict=True)}


def _read(path: str | Path) -> tuple[bytes, list[_Entry], dict[str, Any], dict[str, tuple[int, int]]]:
    """The file's bytes, its checked table, and where each section starts and ends."""
    try:
        if Path(path).stat().st_size > LIMIT:
            raise ArtifactError(f"{path} is larger than the {LIMIT:,} bytes that an artifact may have")
        data = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    return data, *_parse(data, path)


def _parse(data: bytes, path: str | Path) -> tuple[list[_Entry], dict[str, Any], dict[str, tuple[int, int]]]:
    """What the bytes of an artifact claim, checked: arrays, table, and where each section starts and ends."""
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise ArtifactError(f"{path} is not a pgolf model; write one with `pgolf quantize`")
    if len(data) < _HEADER.size + _DIGEST:
        raise ArtifactError(f"{path} is truncated: {len(data)} bytes; copy it again")
    _, version, coded_size, table_size, size = _HEADER.unpack_from(data)
    if version != VERSION:
        raise ArtifactError(f"{path} has version {version}, this pgolf reads {VERSION}; use the pgolf that wrote it")
    if len(data) < size:
        raise ArtifactError(f"{path} is truncated: {len(data)} of {size} bytes; copy it again")
    if len(data) > size:
        raise ArtifactError(f"{path} has {len(data) - size} bytes after its end; copy it again")
    if hashlib.sha256(memoryview(data)[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise ArtifactError(f"{path} is damaged: its checksum does not match; copy it again")
    start, end = _HEADER.size + coded_size, len(data) - _DIGEST
    if start > end or table_size > _MAX_TABLE:
        raise ArtifactError(f"{path} has a table out of bounds ({coded_size} bytes coded, {table_size} decoded)")
    try:
        table = json.loads(codec.decode_bytes(data[_HEADER.size : start], table_size))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} has a table that is not JSON") from error
    try:
        entries, places = _check_table(table, start, end)
    except ArtifactError as error:
        raise ArtifactError(f"{path} has a bad table: {error}") from error
    return entries, table, places


def _check_table(table: Any, start: int, end: int) -> tuple[list[_Entry], dict[str, tuple[int, int]]]:
    """Every claim of the table against the limits and the sections' bytes; ArtifactError on the first that fails."""

    def check(condition: bool, message: str) -> None:
        if not condition:
            raise ArtifactError(message)

    def is_size(value: Any) -> bool:
        return type(value) is int and 0 <= value <= LIMIT

    check(isinstance(table, dict), "it is not an object")
    check(set(table) == {"arrays", "metadata", "sections", "source"}, "its keys are not those of this version")
    check(isinstance(table["metadata"], dict), "metadata is not an object")
    check(is_size(table["source"]), "the size of the source is out of bounds")
    for key, length in (("arrays", 3), ("sections", 2)):
        rows = table[key]
        check(isinstance(rows, list), f"{key} is not a list")
        check(all(isinstance(row, list) and len(row) == length for row in rows), f"{key} has a malformed row")
    entries = []
    total = table["source"]
    for name, dtype, shape in table["arrays"]:
        check(isinstance(name, str) and dtype in DTYPES, f"array {name!r} has an unknown type")
        check(isinstance(shape, list) and len(shape) <= 8, f"{name!r} has a bad shape")
        check(all(map(is_size, shape)), f"{name!r} has a size out of bounds")
        entries.append(_Entry(name, dtype, tuple(shape)))
        total += entries[-1].nbytes
        check(total <= LIMIT, f"{name!r} is too large: more than {LIMIT:,} bytes in all")
    names = [entry.name for entry in entries]
    check(names == sorted(set(names), key=_role_and_layer), "names are repeated or out of order")
    matrices, plains = _plan(entries)
    places = {}
    for name, size in table["sections"]:
        check(isinstance(name, str) and is_size(size) and size <= end - start, f"section {name!r} is out of bounds")
        places[name] = (start, start + size)
        start += size
    check(start == end, "the sections do not fill the file")
    wanted = [*matrices, *plains, "source"]
    check([name for name, _ in table["sections"]] == wanted, "the sections are not those of the arrays")
    return entries, places
