"""Scoring a whole stream with test-time training: batches through their engines, global phases, sums over ranks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pgolf import parallel
from pgolf.config import TTTConfig
from pgolf.model import GPT
from pgolf.score import Coverage, Progress, Score, bits_per_byte, check_stream, to_device, world
from pgolf.ttt.adapters import InitialA, uniform_a
from pgolf.ttt.engine import Engine, step_way
from pgolf.ttt.phase import global_phase, gradients
from pgolf.ttt.planning import Document, cost, deal, find_documents, plan, steps

OnBatch = Callable[[int, NDArray], None]  # (place in the queue, documents just scored)


@dataclass(frozen=True)
class TTTResult:
    """Outcome over all ranks; arrays have one entry a document, in stream order."""

    score: Score
    seconds: float
    preparing: float  # seconds of them in which this rank made engines and graphs: a longer stream needs few more
    nats: NDArray
    bytes: NDArray
    targets: NDArray


class _Run:
    """One evaluation on this rank: the scores so far and what is kept between batches."""

    def __init__(
        self,
        model: GPT,
        tokens: NDArray,
        documents: list[Document],
        config: TTTConfig,
        seed: int,
        initial_a: InitialA | None,
        losses: NDArray | None,
    ) -> None:
        self.model, self.tokens, self.documents, self.config = model, tokens, documents, config
        self.seed, self.initial_a, self.losses = seed, initial_a, losses
        self.device = model.tok_emb.weight.device
        self.coverage = Coverage(sum(document.length - 1 for document in documents))
        self.nats = torch.zeros(len(documents), dtype=torch.float64, device=self.device)
        end = max((document.start + document.length for document in documents), default=0)
        self.stream = torch.from_numpy(tokens[:end].astype(np.int32)).to(self.device)
        self.weights = model.frozen_weights()
        self._few_shapes = step_way(config, self.device) == "graphs"
        self._kept: Engine | None = None
        self.preparing = 0.0

    def _engine(self, documents: int) -> Engine:
        """A full batch's A goes on from the last one, a partial batch's starts anew."""
        if documents == self.config.batch_size and self._kept is not None:
            return self._kept
        draw = self.initial_a or uniform_a(self.seed)
        longest = max(document.length for document in self.documents) - 1
        engine = Engine(self.model, self.weights, self.stream, self.config, documents, draw, longest)
        if documents == self.config.batch_size:
            self._kept = engine
        return engine

    def global_phase(self, prefix: NDArray) -> None:
        """Train the network on scored documents, then send A back to its start."""
        parts = [self.documents[index] for index in prefix]
        stream = np.concatenate([self.tokens[part.start : part.start + part.length] for part in parts])
        global_phase(self.model, stream, self.config)
        self.model.frozen_weights(self.weights)
        if self._kept is not None:
            self._kept.adapters.reset_a()

    def cost(self, batch: NDArray) -> float:
        """Work of a batch, for sharing batches out."""
        return cost([self.documents[index] for index in batch], self.config)

    def score(self, batch: NDArray) -> None:
        """Score one batch of documents chunk by chunk, adapting as it goes."""
        documents = [self.documents[index] for index in batch]
        todo = steps(documents, self.config, self._few_shapes)
        started = time.perf_counter()
        engine = self._engine(len(batch))
        engine.prepare(todo)
        self.preparing += time.perf_counter() - started
        losses = engine.run(documents, todo)
        self.nats[to_device(batch, self.device)] += losses.double().sum((0, 2))
        kept = None if self.losses is None else losses.cpu().numpy()
        for place, step in enumerate(todo):
            for row, window in enumerate(step.windows, step.first):
                begin = documents[row].start + window.start + window.offset
                self.coverage.add(begin, begin + window.chunk)
                if self.losses is not None and kept is not None:
                    self.losses[begin : begin + window.chunk] = kept[place, row, : window.chunk]


def evaluate(
    model: GPT,
    tokens: NDArray,
    token_bytes: NDArray,
    config: TTTConfig,
    seed: int,
    looping: bool = True,
    initial_a: InitialA | None = None,
    progress: Progress | None = None,
    max_docs: int | None = None,
    on_batch: OnBatch | None = None,
    losses: NDArray | None = None,
) -> TTTResult:
    """Score a stream with test-time training. **Moves the weights of `model`** (the global phases).

    Computes on the model's device in its `dtype`; adapters and losses are float32, sums float64.

    Args:
        tokens: ids [n], starting with BOS; targets are tokens[1:].
        token_bytes: bytes of original text of each token [n] (BOS: 0).
        seed: of the adapters' A, used unless `initial_a` gives their values.
        looping: whether the network runs with recurrence; the record's does.
        progress: called after each batch with this rank's counts.
        max_docs: score only the first so many documents of the stream.
        on_batch: called after each batch this rank has scored.
        losses: float array [n - 1] that receives the loss of every target this rank scores, nats.

    Raises PgolfError for a stream that does not fit the model, or if any target was not scored once. Under
    torch.distributed every rank calls it with the same arguments. A rank then keeps its own A from batch to batch
    and the global gradient is shared, so totals depend, slightly, on the number of ranks; a global phase starts
    after the same documents whatever that number is.
    """
    check_stream(model, tokens, token_bytes)
    started = time.perf_counter()
    rank, size = world()
    documents = find_documents(tokens)[:max_docs]
    targets = np.array([document.length - 1 for document in documents])
    sums = np.cumsum(token_bytes, dtype=np.int64)
    byte_counts = np.array([sums[item.start + item.length - 1] - sums[item.start] for item in documents])
    run = _Run(model, tokens, documents, config, seed, initial_a, losses)
    done: list[int] = []
    place = 0
    was_looping, model.looping = model.looping, looping
    try:
        with gradients(model, False):
            for stage in plan(documents, config):
                for index in deal([run.cost(batch) for batch in stage.batches], size)[rank]:
                    batch = stage.batches[index]
                    run.score(batch)
                    done.extend(batch)
                    if on_batch is not None:
                        on_batch(place + index, batch)
                    if progress is not None:
                        seen = int(byte_counts[done].sum())
                        bpb = bits_per_byte(float(run.nats.sum()), seen) if seen else math.inf
                        progress(int(targets[done].sum()), int(targets.sum()), bpb)
                place += len(stage.batches)
                if len(stage.prefix):
                    run.global_phase(stage.prefix)
    finally:
        model.looping = was_looping
    run.coverage.check()
    nats = parallel.sum_(run.nats.cpu()).numpy()
    score = Score(float(nats.sum()), int(byte_counts.sum()), int(targets.sum()))
    return TTTResult(score, time.perf_counter() - started, run.preparing, nats, byte_counts, targets)
