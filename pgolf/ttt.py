"""Phased test-time training: score a chunk of each document, then adapt that document's LoRA to it, and go on.

Order of work (recipe section 5): documents sorted by length are cut into batches, which run longest first. In a
batch every document has adapters of its own; chunk by chunk the loss is recorded, and only then do the adapters
take a step on it. When enough documents are scored, the network itself takes a few steps on them
(`ttt_global`) and scoring goes on. A prediction so depends on nothing but earlier tokens of its document and
documents already scored, and every target is scored once: both are tested, the latter checked in every run.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.config import TTTConfig
from pgolf.errors import PgolfError
from pgolf.lora import Adapters, InitialA, uniform_a
from pgolf.model import BOS, GPT
from pgolf.score import (
    Coverage,
    Progress,
    Score,
    bits_per_byte,
    check_stream,
    reduce_sum,
    to_device,
    token_losses,
    world,
)
from pgolf.ttt_global import global_phase, gradients

STEP_TOKENS = 4096  # a step's fixed cost, in tokens of forward and backward; only for dealing batches to ranks

OnBatch = Callable[[int, NDArray], None]  # (place in the queue, documents just scored)


class Document(NamedTuple):
    """Tokens [start, start + length) of the stream: BOS, the text, and the BOS that follows (the last has none)."""

    start: int
    length: int


class Window(NamedTuple):
    """One chunk of a document and the inputs it is scored with, counted in predictions from the document's start."""

    start: int  # first input of the window
    length: int  # inputs; the window ends where the chunk ends
    offset: int  # place of the chunk's first prediction in the window
    chunk: int  # predictions scored


class Stage(NamedTuple):
    """Batches (arrays of document indices) that run in this order, and the documents the network then trains on."""

    batches: list[NDArray]
    prefix: NDArray


@dataclass(frozen=True)
class TTTResult:
    """Outcome over all ranks; arrays have one entry a document, in stream order."""

    score: Score
    seconds: float
    nats: NDArray
    bytes: NDArray
    targets: NDArray


def find_documents(tokens: NDArray) -> list[Document]:
    """The documents of a stream that starts with BOS; a last BOS without text has no target and is left out."""
    starts = np.flatnonzero(tokens == BOS)
    if len(starts) == 0 or starts[0] != 0:
        raise PgolfError(f"test-time training needs a stream that starts with BOS ({BOS}), got {tokens[0]}")
    ends = np.append(starts[1:] + 1, len(tokens))
    return [Document(int(start), int(end - start)) for start, end in zip(starts, ends, strict=True) if end - start > 1]


def windows(predictions: int, chunk_size: int, context: int) -> list[Window]:
    """The windows of a document with `predictions` targets, chunk after chunk, of at most `context` inputs each."""
    table = []
    for begin in range(0, predictions, chunk_size):
        end = min(begin + chunk_size, predictions)
        start = max(0, end - context)
        table.append(Window(start, end - start, begin - start, end - begin))
    return table


def chunk_size(longest: int, config: TTTConfig) -> int:
    """Tokens per chunk in a batch whose longest document has `longest` tokens."""
    return next((size for limit, size in config.chunk_table if longest <= limit), config.chunk_size)


def plan(documents: Sequence[Document], config: TTTConfig) -> list[Stage]:
    """Batches longest first, cut into stages by the global phases.

    A phase starts after the batch that brings the number of scored documents to its boundary, at most one phase
    a batch. It trains on the first `boundary` scored documents by ascending (length, index).
    """
    lengths = np.array([document.length for document in documents])
    order = np.argsort(lengths, kind="stable")
    batches = [order[first : first + config.batch_size] for first in range(0, len(order), config.batch_size)]
    limits = [config.prefix_docs * (phase + 1) // config.phases for phase in range(config.phases)]
    limits = [limit for limit in limits if limit > 0]
    stages: list[Stage] = []
    waiting: list[NDArray] = []
    scored = 0
    for batch in reversed(batches):
        waiting.append(batch)
        scored += len(batch)
        if limits and scored >= limits[0]:
            stages.append(Stage(waiting, order[len(order) - scored :][: limits.pop(0)]))
            waiting = []
    return [*stages, Stage(waiting, order[:0])] if waiting else stages


def deal(costs: Sequence[float], size: int) -> list[list[int]]:
    """Shares of batches for `size` ranks: each batch, in queue order, to the rank with the least to do.

    A rule that every rank works out alone replaces a shared queue: it balances as well when the longest come
    first, and a run can be repeated, since a rank's adapters keep their A from one of its batches to the next.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    load = [0.0] * size
    for batch, cost in enumerate(costs):
        rank = load.index(min(load))
        shares[rank].append(batch)
        load[rank] += cost
    return shares


class _Run:
    """One evaluation on this rank: the scores so far and the adapters kept between batches."""

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
        self._kept: Adapters | None = None

    def _fresh(self, documents: int) -> Adapters:
        draw = self.initial_a or uniform_a(self.seed)
        return Adapters(self.model.config, self.model.slots, self.config, documents, draw, self.device)

    def adapters(self, documents: int) -> Adapters:
        """Zeroed for a batch; a full batch's A goes on from the last one, a partial batch's starts anew."""
        if documents < self.config.batch_size:
            return self._fresh(documents)
        if self._kept is None:
            self._kept = self._fresh(documents)
        self._kept.start_batch()
        return self._kept

    def global_phase(self, prefix: NDArray) -> None:
        """Train the network on scored documents, then send A back to its start."""
        parts = [self.documents[index] for index in prefix]
        stream = np.concatenate([self.tokens[part.start : part.start + part.length] for part in parts])
        global_phase(self.model, stream, self.config)
        if self._kept is not None:
            self._kept.reset_a()

    def tables(self, batch: NDArray) -> list[list[Window]]:
        """The windows of a batch's documents (ascending by length)."""
        longest = self.documents[batch[-1]].length
        size = chunk_size(longest, self.config)
        return [windows(self.documents[index].length - 1, size, self.config.context) for index in batch]

    def cost(self, batch: NDArray) -> float:
        """Work of a batch in tokens of forward and backward, near enough to share batches out."""
        tables = self.tables(batch)
        return len(tables[-1]) * STEP_TOKENS + sum(window.length for table in tables for window in table)

    def score(self, batch: NDArray) -> None:
        """Score one batch of documents chunk by chunk, adapting as it goes."""
        adapters = self.adapters(len(batch))
        tables = self.tables(batch)
        documents = [self.documents[index] for index in batch]
        padded = np.zeros((len(batch), documents[-1].length), np.int64)
        for row, document in zip(padded, documents, strict=True):
            row[: document.length] = self.tokens[document.start : document.start + document.length]
        text = to_device(padded, self.device)
        nats = torch.zeros(len(batch), dtype=torch.float64, device=self.device)
        for step in range(len(tables[-1])):
            # Documents ascend by length, so the finished ones are the first rows: the network runs without them.
            first = sum(len(table) <= step for table in tables)
            active = [table[step] for table in tables[first:]]
            going_on = [len(table) > step + 1 for table in tables[first:]]
            losses = self._chunk(adapters, text[first:], first, active, going_on)
            nats[first:] += losses.double().sum(1)
            for row, window in enumerate(active):
                begin = documents[first + row].start + window.start + window.offset
                self.coverage.add(begin, begin + window.chunk)
                if self.losses is not None:
                    self.losses[begin : begin + window.chunk] = losses[row, : window.chunk].cpu().numpy()
        self.nats[to_device(batch, self.device)] += nats

    def _chunk(
        self, adapters: Adapters, text: Tensor, first: int, active: list[Window], going_on: list[bool]
    ) -> Tensor:
        """Record the losses of one chunk (nats, [R, C], zero past a short chunk), then adapt documents that go on."""
        ids, targets, places, counted = self._gather(text, active)
        learn = any(going_on)
        # Documents that go on have whole chunks, as wide as this step: their mean is over all columns.
        weight = torch.tensor(going_on, device=self.device)[:, None] / counted.shape[1]
        for repeat in range(self.config.grad_steps if learn else 1):
            with torch.set_grad_enabled(learn):
                rows = adapters.rows(first, self.model.dtype)
                hidden = self.model.hidden(ids, adapters=rows)
                # The loss reads the chunk alone, so the head runs on the chunk alone.
                hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
                losses = token_losses(self.model, hidden, targets, rows)
            if repeat == 0:  # the score: recorded before any step on this chunk
                recorded = torch.where(counted, losses.detach(), 0.0)
            if learn:
                (losses * weight).sum().backward()
                adapters.step()
        return recorded

    def _gather(self, text: Tensor, active: list[Window]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs [R, W], targets [R, C], the chunk's places in the window [R, C] and which of them count [R, C].

        Windows end where their chunk ends; what pads a shorter one comes after it and is zero, never a later token.
        """
        start, length, offset, chunk = to_device(np.array(active).T, self.device)[..., None]
        column = torch.arange(max(window.length for window in active), device=self.device)
        ids = text.gather(1, (start + column).clamp(max=text.shape[1] - 1)) * (column < length)
        column = torch.arange(max(window.chunk for window in active), device=self.device)
        counted = column < chunk
        places = torch.where(counted, offset + column, 0)
        targets = text.gather(1, torch.where(counted, start + places + 1, 0))
        return ids, targets, places, counted


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
    run.coverage.check(run.device)
    nats = reduce_sum(run.nats).cpu().numpy()
    score = Score(float(nats.sum()), int(byte_counts.sum()), int(targets.sum()))
    return TTTResult(score, time.perf_counter() - started, nats, byte_counts, targets)
