"""Scoring a whole stream with test-time training: batches through their engines, global phases, sums over ranks."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf import parallel
from pgolf.config import TTTConfig
from pgolf.model import GPT
from pgolf.score import Coverage, Progress, Score, bits_per_byte, check_stream, world
from pgolf.ttt.adapters import InitialA, uniform_a
from pgolf.ttt.engine import Engine, step_way, upload
from pgolf.ttt.padding import pad
from pgolf.ttt.phase import global_phase, gradients
from pgolf.ttt.planning import Document, Stage, Step, cost, deal, find_documents, plan, steps

OnBatch = Callable[[int, NDArray], None]  # (place in the queue, documents just scored)


@dataclass(frozen=True)
class TTTResult:
    """Outcome over all ranks; arrays have one entry a document, in stream order."""

    score: Score
    seconds: float
    preparing: float  # seconds of them in which this rank made its engine and captured graphs
    stalled: float  # seconds of those in which the GPU had nothing to do, at most; a longer stream has few more
    nats: NDArray
    bytes: NDArray
    targets: NDArray


class _Batch(NamedTuple):
    """A batch of this rank."""

    place: int  # in the queue of all ranks
    documents: NDArray  # indices
    steps: list[Step]


class _Reports:
    """Progress one batch late: reading a figure waits for the GPU, which then has the next batch to work on."""

    def __init__(self, progress: Progress, targets: NDArray, byte_counts: NDArray) -> None:
        self._progress, self._targets, self._byte_counts = progress, targets, byte_counts
        self._done = self._seen = 0
        self._late: tuple[Tensor, torch.cuda.Event | None] | None = None

    def add(self, batch: NDArray, nats: Tensor) -> None:
        """Report the batch before; `nats` is the sum after this one, on its device."""
        held = nats.to("cpu", non_blocking=True)  # to pinned memory
        copied = torch.cuda.current_stream(nats.device).record_event() if nats.is_cuda else None
        self.finish()
        self._late = held, copied
        self._done += int(self._targets[batch].sum())
        self._seen += int(self._byte_counts[batch].sum())

    def finish(self) -> None:
        """Report the last batch."""
        if self._late is not None:
            nats, copied = self._late
            self._late = None
            if copied is not None:
                copied.synchronize()
            bpb = bits_per_byte(float(nats), self._seen) if self._seen else math.inf
            self._progress(self._done, int(self._targets.sum()), bpb)


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
        self._engine: Engine | None = None
        self._making = 0.0  # seconds of the host that went into the engine

    def preparing(self) -> tuple[float, float]:
        """`TTTResult.preparing` and `TTTResult.stalled`."""
        capturing, stalled = (0.0, 0.0) if self._engine is None else self._engine.capturing()
        return self._making + capturing, self._making + stalled

    def share(self, stages: Sequence[Stage], rank: int, size: int) -> list[list[_Batch]]:
        """This rank's batches, by stage, and their steps; makes the engine for them."""
        shares: list[list[_Batch]] = []
        place = 0
        for stage in stages:
            documents = [[self.documents[index] for index in batch] for batch in stage.batches]
            mine = deal([cost(batch, self.config) for batch in documents], size)[rank]
            shares.append([_Batch(place + at, stage.batches[at], steps(documents[at], self.config)) for at in mine])
            place += len(stage.batches)
        batches = list(chain(*shares))
        if batches:
            rows = min(len(self.documents), self.config.batch_size)
            if step_way(self.config, self.device) == "graphs":
                padded = iter(pad([batch.steps for batch in batches], rows, self.config))
                shares = [[batch._replace(steps=next(padded)) for batch in share] for share in shares]
            started = time.perf_counter()
            longest = max(document.length for document in self.documents) - 1
            self._engine = Engine(self.model, self.weights, self.stream, self.config, rows, self._draw(), longest)
            self._making = time.perf_counter() - started
            self._engine.expect(step for batch in chain(*shares) for step in batch.steps)
        return shares

    def _draw(self) -> InitialA:
        """What fresh adapters draw their A from."""
        return self.initial_a or uniform_a(self.seed)

    def global_phase(self, prefix: NDArray) -> None:
        """Train the network on scored documents, then send A back to its start."""
        parts = [self.documents[index] for index in prefix]
        stream = np.concatenate([self.tokens[part.start : part.start + part.length] for part in parts])
        global_phase(self.model, stream, self.config)
        self.model.frozen_weights(self.weights)
        torch.cuda.empty_cache()  # graphs to come cannot take what the phase has cached
        if self._engine is not None:
            self._engine.adapters.reset_a()

    def score(self, batch: _Batch) -> None:
        """Score one batch of documents chunk by chunk, adapting as it goes.

        A full batch's A goes on from the last one, a partial batch's is drawn for it alone.
        """
        assert self._engine is not None  # made by `share`, which gave the batch
        documents = [self.documents[index] for index in batch.documents]
        adapters = self._engine.adapters
        partial = len(documents) < adapters.documents
        with adapters.fresh_a(self._draw(), len(documents)) if partial else contextlib.nullcontext():
            losses = self._engine.run(documents, batch.steps)
        self.nats[upload(batch.documents, self.device)] += losses.double().sum((0, 2))
        kept = None if self.losses is None else losses.cpu().numpy()
        for place, step in enumerate(batch.steps):
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
        progress: called with this rank's counts after each batch, while the next one is under way.
        max_docs: score only the first so many documents of the stream.
        on_batch: called after each batch this rank has launched.
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
    reports = None if progress is None else _Reports(progress, targets, byte_counts)
    was_looping, model.looping = model.looping, looping
    try:
        with gradients(model, False):
            stages = plan(documents, config)
            for stage, share in zip(stages, run.share(stages, rank, size), strict=True):
                for batch in share:
                    run.score(batch)
                    if on_batch is not None:
                        on_batch(batch.place, batch.documents)
                    if reports is not None:
                        reports.add(batch.documents, run.nats.sum())
                if reports is not None:
                    reports.finish()
                if len(stage.prefix):
                    run.global_phase(stage.prefix)
    finally:
        model.looping = was_looping
    run.coverage.check()
    nats = parallel.sum_(run.nats.cpu()).numpy()
    score = Score(float(nats.sum()), int(byte_counts.sum()), int(targets.sum()))
    return TTTResult(score, time.perf_counter() - started, *run.preparing(), nats, byte_counts, targets)
