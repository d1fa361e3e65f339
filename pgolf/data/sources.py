"""Documents out of text files, streamed: .txt, .jsonl (plain, .gz, .xz, .zst) and .parquet."""

import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from pgolf.errors import PgolfError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")


def describe(path: Path) -> dict[str, Any]:
    """Name, size in bytes and SHA-256 of a source: what makes it the same source again, wherever it lies."""
    try:
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise PgolfError(f"cannot read {path}: {error.strerror}; check the path") from error
    return {"name": path.name, "bytes": _size(path), "sha256": digest}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise PgolfError(f"cannot read {path}: {error.strerror}; check the path") from error


class Reader:
    """Iterate over (place, text) of every document of `paths`, in order.

    A .txt file is one document; a .jsonl line is an object and a .parquet row a record with the text under `field`.
    `place` names file and line or row for messages. PgolfError, with that place, for a file that cannot be read, is
    damaged, or holds anything else.
    """

    def __init__(self, paths: Sequence[Path], field: str = "text") -> None:
        for path in paths:
            if not path.name.endswith(SUFFIXES):
                raise PgolfError(f"cannot read documents from {path}; known are {', '.join(SUFFIXES)}")
        self._paths, self._field = paths, field
        self._sizes = [_size(path) for path in paths]
        self._before = self._within = 0

    @property
    def share(self) -> float:
        """Share of the input's bytes read so far, 0 to 1."""
        return min(1.0, (self._before + self._within) / (sum(self._sizes) or 1))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for path, size in zip(self._paths, self._sizes, strict=True):
            read = self._parquet if path.suffix == ".parquet" else self._text if path.suffix == ".txt" else self._lines
            try:
                yield from read(path)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise PgolfError(f"cannot read {path}: {error}; the file may be damaged") from error
            self._before, self._within = self._before + size, 0

    def _text(self, path: Path) -> Iterator[tuple[str, str]]:
        try:
            yield str(path), path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise PgolfError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error

    def _lines(self, path: Path) -> Iterator[tuple[str, str]]:
        with open(path, "rb") as raw:
            for number, line in enumerate(_decompressed(raw, path), 1):
                self._within = raw.tell()
                if line.isspace():
                    continue
                place = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except ValueError as error:  # bad UTF-8 too
                    raise PgolfError(f"{place}: not valid JSON ({error})") from error
                yield place, self._value(record, place)

    def _parquet(self, path: Path) -> Iterator[tuple[str, str]]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as table:
                names = table.schema_arrow.names
                if self._field not in names:
                    raise PgolfError(f"{path} has no column {self._field!r}, only {', '.join(names)}")
                number, rows = 0, table.metadata.num_rows
                for batch in table.iter_batches(batch_size=256, columns=[self._field]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        place = f"{path}, row {number}"
                        yield place, self._value({self._field: text}, place)
                    self._within = path.stat().st_size * number // rows
        except pyarrow.ArrowException as error:
            raise PgolfError(f"cannot read {path}: {error}; the file may be damaged") from error

    def _value(self, record: Any, place: str) -> str:
        text = record.get(self._field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise PgolfError(f"{place}: expected an object with a text under {self._field!r}; choose another field?")
        return text


def _decompressed(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """Lines of a plain or compressed file."""
    if path.suffix == ".gz":
        return iter(gzip.open(raw))
    if path.suffix == ".xz":
        return iter(lzma.open(raw))
    if path.suffix == ".zst":
        return _zstandard_lines(raw, path)
    return iter(raw)


def _zstandard_lines(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    import zstandard

    try:
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        yield from io.BufferedReader(cast(io.RawIOBase, reader))
    except zstandard.ZstdError as error:
        raise PgolfError(f"cannot read {path}: {error}; the file may be damaged") from error
