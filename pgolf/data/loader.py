"""Packed training batches from token shards.

Shards are read in the order given and wrap around. A cursor starts at a shard's first BOS; each batch takes
`world_size` neighbouring spans of micro_batch + 1 tokens, one a rank, and moves the cursor behind them, so batches
share no token. A shard without a whole batch left is done; so is one without a BOS. Inside a span a segment (what
attention may see) starts at position 0, at every BOS, and wherever it would grow longer than the context length.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from pgolf.data.shards import check_vocabulary, read_tokens
from pgolf.data.tokenizer import BOS
from pgolf.errors import PgolfError

_BOUNDARY_MULTIPLE = 64  # padded lengths, so that few shapes of the boundaries array exist
_AHEAD = 4


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on the CPU.

    `inputs`, `targets`: int64 [1, T]. `cu_seqlens`: int32, segment starts and then T, repeated up to a multiple of 64
    entries. `max_seqlen`: the longest segment, tokens.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int


@dataclass(frozen=True)
class _Span:
    """Tokens of one rank, where its BOS are, and where the stream goes on behind the batch."""

    tokens: torch.Tensor
    starts: np.ndarray
    after: tuple[int, int]


def boundaries(starts: np.ndarray, total: int, max_seq_len: int) -> tuple[np.ndarray, int]:
    """(padded segment boundaries int32, longest segment) of `total` tokens with BOS at sorted positions `starts`."""
    if len(starts) == 0 or starts[0] != 0:
        starts = np.concatenate(([0], starts))
    lengths = np.diff(starts, append=total)
    pieces = -(-lengths // max_seq_len)
    # The k-th piece of a segment begins k * max_seq_len behind its start.
    first = np.cumsum(pieces) - pieces
    within = np.arange(pieces.sum()) - np.repeat(first, pieces)
    cuts = np.repeat(starts, pieces) + within * max_seq_len
    padded = np.full(-(-(len(cuts) + 1) // _BOUNDARY_MULTIPLE) * _BOUNDARY_MULTIPLE, total, np.int32)
    padded[: len(cuts)] = cuts
    return padded, min(int(lengths.max()), max_seq_len)


class Loader:
    """Endless batches for one rank; a background thread reads ahead. Close it, or use it in a `with` statement.

    `step_tokens` and `micro_batch` count target tokens: a step of the optimizer takes
    step_tokens / (world_size * micro_batch) batches (`accumulation`).
    Raises PgolfError for damaged shards, tokens outside the vocabulary, and data in which no shard holds one batch.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        rank: int,
        world_size: int,
        step_tokens: int,
        micro_batch: int,
        vocab_size: int,
    ) -> None:
        if not 0 <= rank < world_size:
            raise PgolfError(f"rank {rank} is not among {world_size} ranks")
        if micro_batch < 1 or step_tokens < 1 or step_tokens % (world_size * micro_batch):
            raise PgolfError(
                f"train.step_tokens ({step_tokens}) must be a positive multiple of "
                f"train.micro_batch ({micro_batch}) times the number of ranks ({world_size})"
            )
        if not files:
            raise PgolfError("no training shards; give the folder that `pgolf data build` or a download filled")
        self.accumulation = step_tokens // (world_size * micro_batch)
        self._files = [Path(path) for path in files]
        self._shards = [read_tokens(path) for path in self._files]
        self._rank, self._micro_batch, self._vocab_size = rank, micro_batch, vocab_size
        self._batch_tokens = world_size * (micro_batch + 1)
        self._first_bos: dict[int, int | None] = {}
        self._pool = ThreadPoolExecutor(1, "loader")
        self._ahead: deque[Future[_Span]] = deque()
        first = self._bos_of(0)
        self._start_at((0, len(self._shards[0]) if first is None else first))

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(cancel_futures=True)

    def next_batch(self, max_seq_len: int) -> Batch:
        """The next batch, its segments cut to `max_seq_len` tokens."""
        if max_seq_len < 1:
            raise PgolfError(f"the context length must be positive, got {max_seq_len}")
        span = self._ahead[0].result()  # an error stays at the head: every further call raises it again
        self._ahead.popleft()
        self._position = span.after
        self._ahead.append(self._pool.submit(self._read))
        cu_seqlens, longest = boundaries(span.starts, self._micro_batch, max_seq_len)
        return Batch(span.tokens[None, :-1], span.tokens[None, 1:], torch.from_numpy(cu_seqlens), longest)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins: the shard's file name and the cursor in it, tokens. Plain JSON values."""
        index, cursor = self._position
        return {"shard": self._files[index].name, "cursor": cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a position from `state_dict`; the batches are those the saved loader would have given."""
        names = [path.name for path in self._files]
        shard, cursor = state.get("shard"), state.get("cursor")
        if shard not in names:
            raise PgolfError(f"the saved position is in shard {shard!r}, which is not among the training shards")
        index = names.index(shard)
        size = len(self._shards[index])
        if not isinstance(cursor, int) or not 0 <= cursor <= size:
            raise PgolfError(f"the saved position {cursor!r} is outside {shard} ({size} tokens); was it built again?")
        self._start_at((index, cursor))

    def _start_at(self, position: tuple[int, int]) -> None:
        while self._ahead:
            future = self._ahead.popleft()
            if not future.cancel():
                future.exception()  # wait: the reader's cursor is about to move
        self._position = self._reading = position
        self._ahead.extend(self._pool.submit(self._read) for _ in range(_AHEAD))

    def _bos_of(self, index: int) -> int | None:
        """Position of a shard's first BOS. Searched in pieces: it is nearly always at the beginning."""
        if index not in self._first_bos:
            tokens, piece = self._shards[index], 1 << 16
            self._first_bos[index] = None
            for start in range(0, len(tokens), piece):
                found = np.flatnonzero(tokens[start : start + piece] == BOS)
                if len(found):
                    self._first_bos[index] = start + int(found[0])
                    break
        return self._first_bos[index]

    def _seek(self, position: tuple[int, int]) -> tuple[int, int]:
        """The first position at or after this one with a whole batch behind it."""
        index, cursor = position
        if cursor + self._batch_tokens <= len(self._shards[index]):
            return position
        for step in range(1, len(self._shards) + 1):
            following = (index + step) % len(self._shards)
            first = self._bos_of(following)
            if first is not None and first + self._batch_tokens <= len(self._shards[following]):
                return following, first
        raise PgolfError(
            f"no training shard holds a batch of {self._batch_tokens} tokens after its first BOS; "
            "give more data or a smaller train.micro_batch"
        )

    def _read(self) -> _Span:
        """Read this rank's span of the batch at the reading position and move on (background thread)."""
        index, cursor = self._seek(self._reading)
        start = cursor + self._rank * (self._micro_batch + 1)
        tokens = np.array(self._shards[index][start : start + self._micro_batch + 1])
        check_vocabulary(tokens, self._vocab_size, self._files[index])
        self._reading = after = (index, cursor + self._batch_tokens)
        return _Span(torch.from_numpy(tokens.astype(np.int64)), np.flatnonzero(tokens[:-1] == BOS), after)
