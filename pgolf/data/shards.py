"""Token shards on disk: a header of 256 little-endian int32 (20240520, 1, token count, zeros), then uint16 tokens.

    fineweb_train_NNNNNN.bin      training tokens
    fineweb_val_NNNNNN.bin        validation tokens
    fineweb_val_bytes_NNNNNN.bin  bytes of original text per validation token (the sidecar), same layout

A document is BOS and its tokens; documents follow one another without padding.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf import files
from pgolf.data.bytes import ByteTable
from pgolf.errors import PgolfError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
TRAIN, VAL, VAL_BYTES = "fineweb_train", "fineweb_val", "fineweb_val_bytes"


def shard_name(kind: str, index: int) -> str:
    """File name of shard `index` of a kind (TRAIN, VAL or VAL_BYTES)."""
    return f"{kind}_{index:06d}.bin"


def header(count: int) -> bytes:
    """The 1,024 header bytes of a shard of `count` tokens."""
    fields = np.zeros(HEADER_BYTES // 4, "<i4")
    fields[:3] = MAGIC, VERSION, count
    return fields.tobytes()


def read_tokens(path: str | Path) -> np.ndarray:
    """Map a shard's tokens, uint16 [n], read-only.

    PgolfError when the file is missing, is no shard, or holds another number of tokens than its header says.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            fields = np.frombuffer(stream.read(12), "<i4")
    except OSError as error:
        raise PgolfError(f"cannot read shard {path}: {error.strerror}; build or download the data again") from error
    if size < HEADER_BYTES or tuple(fields[:2]) != (MAGIC, VERSION):
        raise PgolfError(f"{path} is not a token shard (magic {MAGIC}, version {VERSION}); build or download it again")
    count = int(fields[2])
    if count < 0 or size != HEADER_BYTES + 2 * count:
        raise PgolfError(
            f"{path} should hold {count} tokens but is {size} bytes long, not {HEADER_BYTES + 2 * count}: "
            "it was cut short or changed; build or download it again"
        )
    if count == 0:
        return np.zeros(0, np.uint16)
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (count,))


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write tokens (integers [n] below 65,536) as a shard, whole or not at all."""
    values = np.asarray(tokens)
    if values.ndim != 1 or (values.size and not 0 <= values.min() <= values.max() < 1 << 16):
        raise PgolfError(f"cannot write {path}: a shard holds one row of ids from 0 to 65535")
    with files.atomic_writer(path) as stream:
        stream.write(header(len(values)))
        stream.write(np.ascontiguousarray(values, "<u2").data)


def _numbered(folder: str | Path, kind: str) -> list[Path]:
    return sorted(Path(folder).glob(f"{kind}_[0-9]*.bin"))


def _required(folder: str | Path, kind: str) -> list[Path]:
    found = _numbered(folder, kind)
    if not found:
        raise PgolfError(f"no {kind}_*.bin in {folder}; give the folder that `pgolf data build` or a download filled")
    return found


def train_files(folder: str | Path) -> list[Path]:
    """Training shards in name order; PgolfError when there are none."""
    return _required(folder, TRAIN)


def val_files(folder: str | Path) -> list[Path]:
    """Validation shards in name order; PgolfError when there are none."""
    return _required(folder, VAL)


@dataclass(frozen=True)
class Validation:
    """The validation stream: `tokens` and `bytes`, each uint16 [n]. Targets are the n - 1 tokens after the first."""

    tokens: np.ndarray
    bytes: np.ndarray

    @property
    def targets(self) -> int:
        return len(self.tokens) - 1

    @property
    def total_bytes(self) -> int:
        """Bytes of original text behind the targets: the denominator of bits per byte."""
        return int(self.bytes[1:].sum(dtype=np.int64))


def load_validation(folder: str | Path, vocab_size: int, table: ByteTable | None = None) -> Validation:
    """All validation shards with their bytes.

    Bytes come from the sidecar; for data without one (no CaseOps) pass the tokenizer's `byte_lengths()` as `table`.
    PgolfError when a shard is damaged, the sidecar is missing, belongs to other tokens or is partial, a token is
    outside the vocabulary, or nothing is left to score.
    """
    paths = val_files(folder)
    parts = [read_tokens(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        check_vocabulary(part, vocab_size, path)
    tokens = np.concatenate(parts)
    if len(tokens) < 2:
        raise PgolfError(f"the validation shards of {folder} hold no target; build them again")
    sidecars = _numbered(folder, VAL_BYTES)
    if not sidecars:
        if table is None:
            raise PgolfError(
                f"no {VAL_BYTES}_*.bin in {folder}: CaseOps data cannot be scored in bytes without its sidecar; "
                "build or download it, or give the tokenizer of data without CaseOps"
            )
        return Validation(tokens, table.counts(tokens))
    counts = [read_tokens(path) for path in sidecars]
    expected = [(path.name.replace(VAL, VAL_BYTES, 1), len(part)) for path, part in zip(paths, parts, strict=True)]
    found = [(path.name, len(count)) for path, count in zip(sidecars, counts, strict=True)]
    for (name, want), (other, got) in zip(expected, found, strict=False):
        if (name, want) != (other, got):
            raise PgolfError(
                f"{folder}: expected sidecar {name} of {want} entries, found {other} of {got}; "
                "tokens and bytes come from different builds, make both again"
            )
    if len(found) != len(expected):
        raise PgolfError(f"{folder} has {len(expected)} validation shards but {len(found)} sidecars; make both again")
    return Validation(tokens, np.concatenate(counts))


def check_vocabulary(tokens: np.ndarray, vocab_size: int, path: str | Path) -> None:
    """PgolfError naming the shard when a token is outside the vocabulary."""
    if tokens.size and int(tokens.max()) >= vocab_size:
        where = int(np.argmax(tokens >= vocab_size))
        raise PgolfError(
            f"{path} holds token {int(tokens[where])} but the vocabulary has {vocab_size}; "
            "use the tokenizer and recipe the data was built for"
        )
