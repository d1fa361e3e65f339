"""Files that are either whole or absent: written beside their place, synced, renamed."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pgolf.errors import PgolfError


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on success sync and rename it there, on failure remove it.

    Raises PgolfError naming `path` when the folder is missing, not writable, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise PgolfError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be unusable
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_writer(path) as stream:
        stream.write(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file; PgolfError names the file when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise PgolfError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise PgolfError(f"{path} is not valid JSON ({error}); write it again with the command that made it") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds an object; PgolfError names the file when it is anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise PgolfError(f"{path} holds no JSON object; write it again with the command that made it")
    return value


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents; PgolfError when that is not allowed."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PgolfError(f"cannot create folder {path}: {error.strerror}; choose another folder") from error
    return path
