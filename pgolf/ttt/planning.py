"""What is scored when: documents, their chunks and windows, batches, stages, and which rank takes which batch."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pgolf.config import TTTConfig
from pgolf.errors import PgolfError
from pgolf.model import BOS

STEP_TOKENS = 4096  # a step's fixed cost, in tokens of forward and backward
MEMORY_SHARE = 16  # places of the memory that cost a token: gradients of keys fill all of it


class Document(NamedTuple):
    """Tokens [start, start + length) of the stream: BOS, the text, and the BOS that follows (the last has none)."""

    start: int
    length: int


class Window(NamedTuple):
    """One chunk of a document and the inputs that run for it, counted in predictions from the document's start."""

    start: int  # first input of the window
    length: int  # inputs; the window ends where the chunk ends
    offset: int  # place of the chunk's first prediction in the window
    chunk: int  # predictions scored


class Stage(NamedTuple):
    """Batches (arrays of document indices) that run in this order, and the documents the network then trains on."""

    batches: list[NDArray]
    prefix: NDArray


class Shape(NamedTuple):
    """What the tensors of a step are made for; a captured graph has it built in."""

    rows: int  # documents, the last ones of the batch
    inputs: int  # tokens that run, of each
    chunk: int  # predictions of each
    learn: bool  # whether the adapters take a step
    capacity: int = 0  # tokens of each that the memory has room for; 0 without memory
    lr: float = 1.0  # factor on the adapters' learning rate

    @property
    def tokens(self) -> float:
        """Its work, near enough, in tokens of forward and backward; forward alone is a third."""
        work = STEP_TOKENS + self.rows * (self.inputs + self.capacity / MEMORY_SHARE)
        return work if self.learn else work / 3


class Step(NamedTuple):
    """One step of a batch: the windows of the documents from `first` on, the others being finished."""

    first: int
    windows: list[Window]
    goes_on: list[bool]  # whether the document has a further chunk
    shape: Shape
    origin: int = 0  # place in their documents of what is first in memory


def find_documents(tokens: NDArray) -> list[Document]:
    """The documents of a stream that starts with BOS; a last BOS without text has no target and is left out."""
    starts = np.flatnonzero(tokens == BOS)
    if len(starts) == 0 or starts[0] != 0:
        raise PgolfError(f"test-time training needs a stream that starts with BOS ({BOS}), got {tokens[0]}")
    ends = np.append(starts[1:] + 1, len(tokens))
    return [Document(int(start), int(end - start)) for start, end in zip(starts, ends, strict=True) if end - start > 1]


def windows(predictions: int, chunk_size: int, context: int) -> list[Window]:
    """Chunk after chunk of a document with `predictions` targets, its window of at most `context` inputs run anew."""
    table = []
    for begin in range(0, predictions, chunk_size):
        end = min(begin + chunk_size, predictions)
        start = max(0, end - context)
        table.append(Window(start, end - start, begin - start, end - begin))
    return table


def streaming_windows(predictions: int, chunk_size: int, refresh: int) -> list[Window]:
    """As `windows` where only `refresh` inputs before the chunk run anew; all documents of a step start alike."""
    table = []
    for begin in range(0, predictions, chunk_size):
        end, start = min(begin + chunk_size, predictions), max(0, begin - refresh)
        table.append(Window(start, end - start, begin - start, end - begin))
    return table


def chunk_size(longest: int, config: TTTConfig) -> int:
    """Tokens per chunk in a batch whose longest document has `longest` tokens."""
    return next((size for limit, size in config.chunk_table if longest <= limit), config.chunk_size)


def lr_factor(longest: int, config: TTTConfig) -> float:
    """Factor on the learning rate in a batch whose longest document has `longest` tokens."""
    return next((factor for length, factor in reversed(config.long_lr_table) if longest >= length), 1.0)


def most_inputs(chunk: int, config: TTTConfig) -> int:
    """Inputs of the longest window of a chunk of `chunk` tokens."""
    return config.refresh + chunk if config.mode == "streaming" else config.context


def tables(documents: Sequence[Document], config: TTTConfig) -> list[list[Window]]:
    """The windows of a batch's documents, ascending by length."""
    size = chunk_size(documents[-1].length, config)
    if config.mode == "streaming":
        return [streaming_windows(document.length - 1, size, config.refresh) for document in documents]
    return [windows(document.length - 1, size, config.context) for document in documents]


def cost(documents: Sequence[Document], config: TTTConfig) -> float:
    """Work of a batch in tokens of forward and backward, near enough to share batches out."""
    batch = tables(documents, config)
    return len(batch[-1]) * STEP_TOKENS + sum(window.length for table in batch for window in table)


def room(tokens: int, context: int) -> int:
    """Size of a memory for `tokens` tokens: a power of two from 64 on, as each is a graph to capture; or `context`."""
    return min(max(64, 1 << (tokens - 1).bit_length()), context)


def layouts(spans: Iterable[tuple[int, int]], context: int) -> list[tuple[int, int]]:
    """(capacity, origin) of the memory in each step, which runs the places [start, end) of every document.

    The memory holds the places from origin to end, never more than `context`. It grows with the documents; once it is
    full, a step in which it would overflow drops the oldest eighth.
    """
    capacity = origin = 0
    found = []
    for start, end in spans:
        if end - origin > context:
            origin = start - max(0, context - (end - start) - context // 8)
        capacity = max(capacity, room(end - origin, context))
        found.append((capacity, origin))
    return found


def steps(documents: Sequence[Document], config: TTTConfig) -> list[Step]:
    """The steps of a batch of documents, ascending by length.

    Finished documents are the first rows: the network runs without them.
    """
    batch, size = tables(documents, config), chunk_size(documents[-1].length, config)
    lr = lr_factor(documents[-1].length, config)
    found: list[Step] = []
    for step in range(len(batch[-1])):
        first = sum(len(table) <= step for table in batch)
        active = [table[step] for table in batch[first:]]
        goes_on = [len(table) > step + 1 for table in batch[first:]]
        inputs = max(window.length for window in active)
        learn = any(goes_on)
        shape = Shape(len(active), inputs, size, learn, lr=lr if learn else 1.0)
        found.append(Step(first, active, goes_on, shape))
    if config.mode != "streaming":
        return found
    # Room for the most inputs in every step: what is forgotten when must not depend on how far a step is padded.
    starts = [step.windows[0].start for step in found]
    spans = [(start, start + most_inputs(size, config)) for start in starts]
    return [
        step._replace(shape=step.shape._replace(capacity=capacity), origin=origin)
        for step, (capacity, origin) in zip(found, layouts(spans, config.context), strict=True)
    ]


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
