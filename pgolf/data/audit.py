"""Does validation text occur in the training shards? A check of the data as it lies, whoever built it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf.data.shards import read_tokens, train_files, val_files
from pgolf.data.tokenizer import BOS


@dataclass(frozen=True)
class Overlap:
    """Documents of either split, and how many validation documents are also training documents, token by token.

    `example` is the number of the first such validation document, in stream order, or None.
    """

    train_documents: int
    val_documents: int
    shared: int
    example: int | None


def document_digests(paths: list[Path]) -> Iterator[bytes]:
    """A 16-byte hash of each document's tokens (without its BOS) in the stream made of these shards.

    A document that runs over into the next shard counts as one; tokens before the first BOS are no document.
    """
    digest = None
    for path in paths:
        tokens = read_tokens(path)
        starts = np.flatnonzero(tokens == BOS)
        if digest is not None:
            digest.update(tokens[: starts[0] if len(starts) else len(tokens)].tobytes())
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if digest is not None:
                yield digest.digest()
            digest = hashlib.blake2b(tokens[start + 1 : end].tobytes(), digest_size=16)
    if digest is not None:
        yield digest.digest()


def overlap(folder: str | Path) -> Overlap:
    """Compare every validation document with every training document of a data folder."""
    validation = list(document_digests(val_files(folder)))
    wanted, seen, count = set(validation), set(), 0
    for digest in document_digests(train_files(folder)):
        count += 1
        if digest in wanted:
            seen.add(digest)
    shared = [number for number, digest in enumerate(validation) if digest in seen]
    return Overlap(count, len(validation), len(shared), shared[0] if shared else None)
