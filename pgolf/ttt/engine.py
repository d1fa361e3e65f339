"""The steps of batches of one size: record a chunk's losses, then adapt; eager or as CUDA graphs."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf.config import TTTConfig
from pgolf.errors import PgolfError
from pgolf.model import GPT, Weights
from pgolf.ops import _native
from pgolf.score import token_losses
from pgolf.ttt.adapters import Adapters, InitialA
from pgolf.ttt.graphs import Graphs
from pgolf.ttt.memory import Memory
from pgolf.ttt.planning import Document, Shape, Step, room


def step_way(config: TTTConfig, device: torch.device) -> str:
    """How `ttt.step` makes a step on this device: graphs or eager."""
    if device.type != "cuda":
        if config.step == "graphs":
            raise PgolfError("ttt.step=graphs needs a CUDA GPU; leave it at auto")
        return "eager"
    if config.step == "auto":
        return "graphs" if _native.available(device) else "eager"
    return config.step


class Inputs(NamedTuple):
    """What a step reads of the stream."""

    ids: Tensor  # [rows, lead + inputs]
    targets: Tensor  # [rows, chunk]
    places: Tensor  # [rows, chunk]: of the chunk among the inputs
    counted: Tensor  # [rows, chunk], bool: not past a short chunk
    weight: Tensor  # [rows, 1]: of each loss in what the adapters learn from


class Row(NamedTuple):
    """A document in a step, or what all documents share: (start, origin); numbers that the step reads on the device."""

    begin: int = 0  # place of the window's first input in the stream
    length: int = 0
    offset: int = 0
    chunk: int = 0
    goes_on: int = 0


def upload(values: NDArray, device: torch.device) -> Tensor:
    """As `score.to_device`, without waiting for what the GPU is doing."""
    held = torch.from_numpy(np.ascontiguousarray(values, np.int64))
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held


def gather(stream: Tensor, table: Tensor, shape: Shape, lead: int) -> Inputs:
    """The inputs of a step; table: a `Row` a document, [rows, 5]; lead: tokens in front of the window.

    Windows end where their chunk ends; what pads a shorter one comes after it and is zero, never a later token.
    """
    begin, length, offset, chunk, goes_on = table.T[..., None]
    column = torch.arange(-lead, shape.inputs, device=stream.device)
    ids = stream[(begin + column).clamp(0, len(stream) - 1)].long() * (column < length)
    column = torch.arange(shape.chunk, device=stream.device)
    counted = column < chunk
    places = torch.where(counted, offset + column, 0)
    targets = stream[torch.where(counted, begin + places + 1, 0)].long()
    # Documents that go on have whole chunks, as wide as this step: their mean is over all columns.
    return Inputs(ids, targets, places, counted, goes_on / shape.chunk)


class Engine:
    """Adapters of `documents` documents, and the memory and graphs that go with them.

    A batch of fewer documents takes the last rows.

    Args:
        weights: of `GPT.frozen_weights`; when they change in place, so does what the engine computes with.
        stream: ids of all documents, int32 [n], on the device.
        initial_a: of the adapters.
        longest: predictions of the longest document.
    """

    def __init__(
        self,
        model: GPT,
        weights: Weights,
        stream: Tensor,
        config: TTTConfig,
        documents: int,
        initial_a: InitialA,
        longest: int,
    ) -> None:
        self._model, self._weights, self._stream, self._config = model, weights, stream, config
        self._documents, device = documents, stream.device
        self.adapters = Adapters(model.config, model.slots, config, documents, initial_a, device, model.dtype)
        self._memory: Memory | None = None
        if config.mode == "streaming":
            most = min(longest + config.refresh + config.largest_chunk, config.context)
            capacity = room(most, config.context)
            self._memory = Memory(model.config, model.slots, documents, capacity, model.dtype, device)
        self._table = torch.zeros(documents + 1, len(Row._fields), dtype=torch.int64, device=device)
        self._recorded = torch.zeros(documents, config.largest_chunk, device=device)
        self._graphs: Graphs | None = None
        if step_way(config, device) == "graphs":
            self._graphs = Graphs(self._step, device)
            inputs = room(1, config.context)
            self._graphs.warm_up(Shape(documents, inputs, 1, True, inputs if self._memory else 0))
            self.adapters.reset_a()

    def capturing(self) -> tuple[float, float]:
        """Seconds of the host that went into graphs, and those of them that the GPU may have waited for."""
        return (0.0, 0.0) if self._graphs is None else (self._graphs.seconds, self._graphs.stalled)

    def expect(self, steps: Iterable[Step]) -> None:
        """The steps to come, in their order: so that graphs are captured ahead of their use."""
        if self._graphs is not None:
            self._graphs.expect(step.shape for step in steps)

    def run(self, documents: Sequence[Document], steps: Sequence[Step]) -> Tensor:
        """The losses of a batch, nats, float32 [steps, documents, chunk]; zero where there is no prediction."""
        table = upload(self._rows(documents, steps), self._stream.device)
        losses = torch.zeros(len(steps), self._documents, max(step.shape.chunk for step in steps), device=table.device)
        self.adapters.start_batch()
        if self._memory is not None:
            self._memory.forget()
        rows = self._documents
        for place, step in enumerate(steps):
            shape = step.shape
            if shape.rows < rows:  # nobody writes the gradients of those that leave
                self.adapters.zero_grad()
            rows = shape.rows
            if self._memory is not None:
                self._memory.arrange(rows, shape.capacity, step.origin, step.windows[0].start)
            self._table.copy_(table[place])
            if self._graphs is None:
                self._step(shape)
            else:
                self._graphs.replay(shape)
            losses[place, -rows:, : shape.chunk] = self._recorded[-rows:, : shape.chunk]
        return losses[:, -len(documents) :]

    def _rows(self, documents: Sequence[Document], steps: Sequence[Step]) -> NDArray:
        """What `_table` holds in each step, [steps, documents + 1, 5]."""
        table = np.zeros((len(steps), self._documents + 1, len(Row._fields)), np.int64)
        unused = self._documents - len(documents)
        for rows, step in zip(table, steps, strict=True):
            active = zip(documents[step.first :], step.windows, step.goes_on, strict=True)
            for row, (document, window, goes_on) in enumerate(active, unused + step.first):
                begin = document.start + window.start
                rows[row] = Row(begin, window.length, window.offset, window.chunk, goes_on)
            rows[-1, :2] = step.windows[0].start, step.origin
        return table

    def _step(self, shape: Shape) -> None:
        """Record the losses of one chunk (nats; zero past a short chunk), then adapt the documents that go on."""
        first, (start, origin) = self._documents - shape.rows, self._table[-1, :2]
        lead, memory = 0, None
        if self._memory is not None:
            lead = 1
            memory = self._memory.recent(shape.rows, shape.capacity, start, origin, shape.inputs)
        given = gather(self._stream, self._table[first:-1], shape, lead)
        for repeat in range(self._config.grad_steps if shape.learn else 1):
            with torch.set_grad_enabled(shape.learn):
                rows = self.adapters.rows(first)
                # The loss reads the chunk alone, so nothing behind the last attention runs on more.
                hidden = self._model.hidden(
                    given.ids, adapters=rows, weights=self._weights, memory=memory, places=given.places
                )
                losses = token_losses(self._model, hidden, given.targets, rows, self._weights)
            if repeat == 0:  # the score: recorded before any step on this chunk
                self._recorded[first:, : shape.chunk] = torch.where(given.counted, losses.detach(), 0.0)
            if shape.learn:
                (losses * given.weight).sum().backward()
                self.adapters.step(shape.lr)
