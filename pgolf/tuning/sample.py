"""Training documents to try settings on, and how much work a longer stream of such documents is."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pgolf.config import TTTConfig
from pgolf.data import shards
from pgolf.data.tokenizer import BOS, Tokenizer
from pgolf.errors import PgolfError
from pgolf.ttt import planning

PLANNED = 4096  # documents at most of which a longer stream's work is planned


class Sample(NamedTuple):
    """Documents to score: tokens and bytes [n] as `ttt.evaluate` takes them, and what they were drawn from."""

    tokens: NDArray  # BOS and text of each document; a BOS behind the last
    bytes: NDArray  # a document's are all at its first token; zeros: not known
    documents: int
    population: NDArray  # lengths of all documents these were drawn from, ascending, as in `planning.Document`

    @property
    def targets(self) -> int:
        return len(self.tokens) - 1


def draw(paths: Sequence[Path], count: int, vocab_size: int, seed: int, tokenizer: Tokenizer | None) -> Sample:
    """Draw `count` documents, or all if there are fewer, from the last of the shards `paths`.

    Training reads those last, so that it has learnt least of them by heart. Sorted by length, documents are cut into
    `count` parts alike, and one is drawn of each: a sample has the lengths of its population. Bytes are those of the
    decoded text. PgolfError when there is no whole document, or a token is outside the vocabulary.
    """
    parts: list[NDArray] = []
    found = [np.zeros((0, 3), np.int64)]  # (part, start, end)
    for path in reversed(paths):
        tokens = shards.read_tokens(path)
        starts = np.flatnonzero(tokens == BOS)
        # A download may cut the document at a shard's end: whole ones have a BOS behind them.
        edges = zip(starts[:-1], starts[1:], strict=True)
        rows = [(len(parts), start, end) for start, end in edges if end - start > 1]
        parts.append(tokens)
        found.append(np.array(rows, np.int64).reshape(-1, 3))
        if sum(map(len, found)) >= count:
            break
    places = np.concatenate(found)
    if not len(places):
        raise PgolfError(f"{paths[0].parent}: the training shards hold no whole document; give more training data")
    lengths = places[:, 2] - places[:, 1] + 1  # with the BOS that follows
    order = np.argsort(lengths, kind="stable")
    random = np.random.default_rng(seed % 2**64)
    chosen = sorted(random.choice(part) for part in np.array_split(order, min(count, len(order))))
    texts = [parts[part][start:end] for part, start, end in places[chosen]]
    tokens = np.concatenate([*texts, [BOS]]).astype(np.uint16)
    shards.check_vocabulary(tokens, vocab_size, paths[0].parent)
    counts = np.zeros(len(tokens), np.int64)
    if tokenizer is not None:
        firsts = np.cumsum([1, *map(len, texts)])[:-1]
        counts[firsts] = [len(tokenizer.decode(text[1:], strict=False).encode()) for text in texts]
    return Sample(tokens, counts, len(texts), lengths[order])


def work_ratio(sample: Sample, settings: TTTConfig, targets: int) -> float:
    """The work of a stream of `targets` predictions over the sample's, by `planning.cost` of all batches.

    The stream is planned for documents of the population's lengths. A ratio of targets would be too large: among more
    documents those of a batch are more alike, and fewer wait for the longest.
    """
    lengths = sample.population
    if targets == sample.targets:
        return 1.0
    count = max(1, min(PLANNED, round(targets / (lengths.mean() - 1))))
    stream = lengths[((np.arange(count) + 0.5) / count * len(lengths)).astype(np.int64)]
    ours = [document.length for document in planning.find_documents(sample.tokens)]
    return _work(stream, settings) * targets / int((stream - 1).sum()) / _work(ours, settings)


def _work(lengths: Sequence[int] | NDArray, settings: TTTConfig) -> float:
    documents = [planning.Document(0, int(length)) for length in lengths]
    batches = [batch for stage in planning.plan(documents, settings) for batch in stage.batches]
    return sum(planning.cost([documents[index] for index in batch], settings) for batch in batches)
