"""Text files to token shards: `build` streams documents through worker processes and publishes a folder.

A split is made in one of two ways, never mixed in a folder: the first `val_docs` documents of one stream are the
validation set and the rest is for training; or whole files are given to one split or the other. `manifest.json` keeps
what was done, and a build that would put shards beside those of another split or tokenizer is refused: that is how
validation text has leaked into training in real submissions.

Shards are written in a hidden folder beside their place and moved when all of them are there, so that a failed build
leaves an earlier one as it was. Their bytes depend on the input and the tokenizer alone, not on the workers.
"""

import contextlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pgolf import files
from pgolf.data.shards import HEADER_BYTES, TRAIN, VAL, VAL_BYTES, header, shard_name
from pgolf.data.sources import Reader, describe
from pgolf.data.tokenizer import BOS, Tokenizer
from pgolf.errors import PgolfError

MANIFEST = "manifest.json"
KINDS = {"train": (TRAIN,), "val": (VAL, VAL_BYTES)}
_BATCH_CHARACTERS = 1 << 19

Document = tuple[str, str]
"""(place, text): the place names file and line in messages."""
Progress = Callable[[int, int, float], None]
"""Called with (documents done, tokens written, share of the input read, 0 to 1)."""


def build(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path,
    *,
    split: str | None = None,
    val_docs: int | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    field: str = "text",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenize `inputs`, in their order, into shards in the folder `out`; returns the manifest written there.

    Give either `val_docs`, the number of first documents that become validation, or `split`, "train" or "val", for
    files that are split already (one call a split, same folder). A shard holds at most `shard_tokens` tokens unless a
    single document is longer. Documents without a token are left out and counted. The same call again replaces its
    own result. PgolfError for unreadable or malformed input (file and line), an unfit tokenizer, and a folder that
    holds shards of another split, other sources or another tokenizer.
    """
    paths = [Path(path) for path in inputs]
    if not paths:
        raise PgolfError("no input files; give at least one")
    if (split is None) == (val_docs is None):
        raise PgolfError("give either --val-docs N (split one stream) or --split train|val (files split already)")
    if split is not None and split not in KINDS:
        raise PgolfError(f"--split takes train or val, got {split!r}")
    if val_docs is not None and val_docs < 1:
        raise PgolfError(f"--val-docs must be at least 1, got {val_docs}")
    if shard_tokens < 1:
        raise PgolfError(f"a shard must hold at least one token, got {shard_tokens}")
    model = Tokenizer.load(tokenizer)
    if not model.caseops:
        raise PgolfError(f"tokenizer {tokenizer} lacks the CaseOps markers at ids 4-7; train one with pgolf")
    plan = {
        "format": 1,
        "tokenizer_sha256": model.sha256,
        "vocab_size": model.vocab_size,
        "setting": model.setting,
        "split": {"by": "files"} if split else {"by": "first documents", "val_docs": val_docs},
    }
    sources = [describe(path) for path in paths]
    names = ["val", "train"] if split is None else [split]
    folder = files.make_folder(out)
    _earlier_splits(folder, plan, sources, names)

    staging = Path(tempfile.mkdtemp(prefix=".build-", dir=folder))
    try:
        first = val_docs if val_docs is not None else 0 if split == "train" else None
        writers = {name: _ShardWriter(staging, KINDS[name], shard_tokens) for name in names}
        reader = Reader(paths, field)
        with _encoder(str(tokenizer), workers or os.cpu_count() or 1) as encode:
            for encoded in encode(_batches(reader, first)):
                writers["train" if encoded.bytes is None else "val"].add(encoded)
                if progress is not None:
                    done = writers.values()
                    progress(sum(w.documents for w in done), sum(w.tokens for w in done), reader.share)
        for name, writer in writers.items():
            writer.close()
            if writer.tokens == 0:
                raise PgolfError(f"nothing to write for {name}: the input has too few documents; give more input")
        # Another build may have finished here meanwhile: look again before anything is replaced.
        splits = _earlier_splits(folder, plan, sources, names)
        splits |= {name: {"sources": sources, **writer.summary()} for name, writer in writers.items()}
        manifest = {**plan, "splits": splits}
        _publish(staging, folder, manifest, names)
    except OSError as error:
        raise PgolfError(f"cannot write shards in {folder}: {error.strerror}; free space or choose another") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def verify_manifest(folder: str | Path, tokenizer_sha256: str) -> dict[str, Any] | None:
    """The manifest of a data folder, checked against the tokenizer and the shards present; None without a manifest.

    Downloaded shards have no manifest, which is no error: then nothing is known about their tokenizer.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return None
    manifest = _read_manifest(folder)
    if manifest["tokenizer_sha256"] != tokenizer_sha256:
        raise PgolfError(
            f"{folder} was built with another tokenizer ({manifest['tokenizer_sha256'][:12]}, "
            f"not {tokenizer_sha256[:12]}); use that one or build the data again"
        )
    listed = sorted(name for part in manifest["splits"].values() for name in part["shards"])
    present = sorted(path.name for path in _shards(folder, "val") + _shards(folder, "train"))
    if listed != present:
        odd = sorted(set(listed) ^ set(present))[0]
        raise PgolfError(f"{folder}: {odd} is {'missing' if odd in listed else 'not of this build'}; build it again")
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = files.read_json(path)
    try:
        if manifest["format"] != 1:
            raise PgolfError(f"{path} is of format {manifest['format']}, this pgolf reads 1; build the data again")
        for part in manifest["splits"].values():
            [source["sha256"] for source in part["sources"]], [str(name) for name in part["shards"]]
        manifest["tokenizer_sha256"], manifest["split"]["by"]
    except (KeyError, TypeError, AttributeError) as error:
        raise PgolfError(f"{path} is not a manifest of pgolf; remove it and its shards, then build again") from error
    return manifest


def _shards(folder: Path, split: str) -> list[Path]:
    return [path for kind in KINDS[split] for path in sorted(folder.glob(f"{kind}_[0-9]*.bin"))]


def _earlier_splits(
    folder: Path, plan: dict[str, Any], sources: list[dict[str, Any]], names: list[str]
) -> dict[str, Any]:
    """Splits already in the folder, or PgolfError when this build may not stand beside them."""
    elsewhere = "choose another folder, or remove this one first"
    if not (folder / MANIFEST).exists():
        if _shards(folder, "val") or _shards(folder, "train"):
            raise PgolfError(f"{folder} holds shards without a manifest, so of an unknown split; {elsewhere}")
        return {}
    manifest = _read_manifest(folder)
    for key, meaning in (("tokenizer_sha256", "with another tokenizer"), ("split", "with another split")):
        if manifest[key] != plan[key]:
            raise PgolfError(f"{folder} was built {meaning} ({manifest[key]}); {elsewhere}")
    ours = [source["sha256"] for source in sources]
    for name, part in manifest["splits"].items():
        theirs = [source["sha256"] for source in part["sources"]]
        if name in names and theirs != ours:
            raise PgolfError(f"{folder} holds {name} shards of other sources; {elsewhere}")
        if name not in names and set(theirs) & set(ours):
            shared = next(source["name"] for source in sources if source["sha256"] in theirs)
            raise PgolfError(f"{shared} is already in the {name} split of {folder}: a file belongs to one split only")
    return dict(manifest["splits"])


def _publish(staging: Path, folder: Path, manifest: dict[str, Any], names: list[str]) -> None:
    """Move finished shards into place. Without its manifest a folder is refused, so a kill in between is noticed."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in names:
        for stale in _shards(folder, name):
            stale.unlink()
        for fresh in _shards(staging, name):
            os.replace(fresh, folder / fresh.name)
    files.write_json(folder / MANIFEST, manifest)


@dataclass
class _Encoded:
    """A batch after tokenization: documents end to end, each with its BOS. `bytes` is there for validation only."""

    tokens: np.ndarray
    bytes: np.ndarray | None
    lengths: list[int]
    documents: int
    changed: int


def _batches(documents: Iterable[Document], first: int | None) -> Iterator[tuple[list[Document], bool]]:
    """Group documents; the flag is set for the `first` ones (None: all), which get byte counts."""
    batch: list[Document] = []
    size = 0
    for number, document in enumerate(documents):
        if batch and (size >= _BATCH_CHARACTERS or number == first):
            yield batch, first is None or number <= first
            batch, size = [], 0
        batch.append(document)
        size += len(document[1])
    if batch:
        yield batch, first is None or number < first


_tokenizer: Tokenizer | None = None  # of a worker process


def _load_worker(path: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.load(path)


def _encode_batch(documents: list[Document], with_bytes: bool) -> _Encoded:
    assert _tokenizer is not None
    mark, zero, none = np.array([BOS], np.uint16), np.zeros(1, np.uint16), np.zeros(0, np.uint16)
    tokens, counts, lengths, changed = [none], [none], [], 0
    for place, text in documents:
        try:
            ids, count = _tokenizer.encode(text) if with_bytes else (_tokenizer.encode_ids(text), none)
        except PgolfError as error:
            raise PgolfError(f"{place}: {error}") from error
        changed += not _survives(_tokenizer, ids, text)
        if len(ids):
            tokens += [mark, ids]
            counts += [zero, count]
            lengths.append(len(ids) + 1)
    column = np.concatenate(counts) if with_bytes else None
    return _Encoded(np.concatenate(tokens), column, lengths, len(documents), changed)


def _survives(tokenizer: Tokenizer, ids: np.ndarray, text: str) -> bool:
    try:
        return tokenizer.decode(ids) == text
    except PgolfError:  # normalization can leave CaseOps text that nothing encodes to
        return False


Encode = Callable[[Iterable[tuple[list[Document], bool]]], Iterator[_Encoded]]


@contextlib.contextmanager
def _encoder(tokenizer: str, workers: int) -> Iterator[Encode]:
    """A function from batches to encoded batches in the same order; one worker means this process."""
    if workers == 1:
        _load_worker(tokenizer)
        yield lambda batches: (_encode_batch(*batch) for batch in batches)
        return

    def encode(batches: Iterable[tuple[list[Document], bool]]) -> Iterator[_Encoded]:
        pending: deque[Future[_Encoded]] = deque()
        for batch in batches:
            pending.append(pool.submit(_encode_batch, *batch))
            if len(pending) >= 3 * workers:  # bounds memory: the reader must not run ahead of the workers
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    # Spawned: a process that has imported torch cannot be forked safely.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_load_worker, initargs=(tokenizer,))
    try:
        yield encode
    except BrokenProcessPool as error:
        raise PgolfError("a worker process died, most likely for want of memory; use fewer workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


class _ShardWriter:
    """Appends whole documents to the numbered shards of a split, one file a kind, and counts."""

    def __init__(self, folder: Path, kinds: Sequence[str], shard_tokens: int) -> None:
        self._folder, self._kinds, self._limit = folder, kinds, shard_tokens
        self._streams: list[BinaryIO] = []
        self._filled = 0
        self._names: list[str] = []
        self.documents = self.tokens = self._empty = self._changed = self._bytes = 0

    def add(self, encoded: _Encoded) -> None:
        """Write a batch; a document is never cut between shards."""
        columns = [encoded.tokens] if encoded.bytes is None else [encoded.tokens, encoded.bytes]
        start = 0
        for length in encoded.lengths:
            if self._filled and self._filled + length > self._limit:
                self.close()
            if not self._streams:
                self._open()
            for stream, column in zip(self._streams, columns, strict=True):
                stream.write(column[start : start + length].astype("<u2").tobytes())
            start += length
            self._filled += length
        self.tokens += start
        self.documents += encoded.documents
        self._empty += encoded.documents - len(encoded.lengths)
        self._changed += encoded.changed
        if encoded.bytes is not None:
            self._bytes += int(encoded.bytes.sum(dtype=np.int64))

    def _open(self) -> None:
        index = len(self._names) // len(self._kinds)
        for kind in self._kinds:
            self._names.append(shard_name(kind, index))
            stream = open(self._folder / self._names[-1], "wb")  # noqa: SIM115 (closed in close)
            self._streams.append(stream)
            stream.write(bytes(HEADER_BYTES))

    def close(self) -> None:
        """Finish the open shard: its header is written last, when the count is known."""
        for stream in self._streams:
            stream.seek(0)
            stream.write(header(self._filled))
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        self._streams, self._filled = [], 0

    def summary(self) -> dict[str, Any]:
        """This split's part of the manifest. Changed documents do not survive text -> tokens -> text."""
        counts: dict[str, Any] = {
            "documents": self.documents - self._empty,
            "empty_documents": self._empty,
            "changed_documents": self._changed,
            "changed_share": round(self._changed / self.documents, 6),
            "tokens": self.tokens,
            "shards": self._names,
        }
        if len(self._kinds) > 1:
            counts["text_bytes"] = self._bytes
        return counts
