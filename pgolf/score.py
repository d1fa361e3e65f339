"""Bits per byte of a token stream, without adaptation.

Targets are numbered by their place in the stream: target t is token t+1, predicted from tokens up to t. A
*span* is a run of inputs [start, end) of which the targets from `scored` on are counted; spans are packed into
one row, with attention segments at their edges, at every BOS and at `context`. Every target must be counted
once; that is checked on the real counts of every run, not argued.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pgolf import parallel
from pgolf.errors import PgolfError
from pgolf.layers import AdapterSet
from pgolf.model import BOS, GPT, Weights
from pgolf.ops.cross_entropy import token_losses as fused_token_losses

HEAD_ROWS = 4096  # positions whose logits exist at once: 4096 x 8192 float32 are 134 MB
PAD_SEGMENTS = 64  # boundary arrays are padded to a multiple of this, as in training

Progress = Callable[[int, int, float], None]  # (targets done, targets in all, bits per byte so far)


def bits_per_byte(nats: float, byte_count: float) -> float:
    """Loss summed in nats over the bytes of original text -> bits per byte (recipe section 1)."""
    if byte_count <= 0:
        raise PgolfError("bits per byte need at least one byte of text; check the byte sidecar")
    return nats / math.log(2) / byte_count


@dataclass(frozen=True)
class Score:
    """Sums over scored targets: loss in nats, bytes of original text, number of targets (BOS included)."""

    nats: float
    bytes: int
    targets: int

    @property
    def bpb(self) -> float:
        return bits_per_byte(self.nats, self.bytes)

    @property
    def loss(self) -> float:
        """Mean loss in nats per target."""
        return self.nats / self.targets


class Span(NamedTuple):
    """Inputs [start, end) of the stream; targets [scored, end) are counted."""

    start: int
    end: int
    scored: int


class Coverage:
    """How often each target was counted; the run-time proof that each was counted once."""

    def __init__(self, targets: int) -> None:
        self.counts = np.zeros(targets, np.uint8)

    def add(self, start: int, end: int) -> None:
        self.counts[start:end] += 1

    def check(self) -> None:
        """Sum over ranks and raise PgolfError unless every count is 1."""
        counts = parallel.sum_(torch.from_numpy(self.counts)).numpy()
        wrong = np.flatnonzero(counts != 1)
        if len(wrong):
            raise PgolfError(
                f"{len(wrong)} of {len(counts)} targets were not scored exactly once; the first is target "
                f"{wrong[0]}, scored {counts[wrong[0]]} times; this score is void"
            )


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside torch.distributed."""
    return parallel.rank(), parallel.world_size()


def check_stream(model: GPT, tokens: NDArray, token_bytes: NDArray) -> None:
    """PgolfError unless the stream can be scored: equal lengths, at least one target, ids in the vocabulary."""
    if tokens.ndim != 1 or tokens.shape != token_bytes.shape:
        raise PgolfError(f"tokens {tokens.shape} and bytes {token_bytes.shape} must be vectors of the same length")
    if len(tokens) < 2:
        raise PgolfError(f"scoring needs at least 2 tokens, got {len(tokens)}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.config.vocab_size:
        raise PgolfError(f"token ids {low}..{high} do not fit a vocabulary of {model.config.vocab_size}")


def boundaries(ids: NDArray, limit: int) -> NDArray:
    """Attention segments of `ids`: their starts (0, every BOS, and every `limit` tokens from there), then the end."""
    starts = np.union1d([0], np.flatnonzero(ids == BOS))
    ends = np.append(starts[1:], len(ids))
    cuts = [np.arange(start, end, limit) for start, end in zip(starts, ends, strict=True)]
    return np.append(np.concatenate(cuts), len(ids))


def pad_boundaries(edges: NDArray, device: torch.device) -> Tensor:
    """Boundaries as the int32 tensor that attention takes, padded with the total length."""
    padded = np.full(-(-len(edges) // PAD_SEGMENTS) * PAD_SEGMENTS, edges[-1], np.int32)
    padded[: len(edges)] = edges
    return torch.from_numpy(padded).to(device)


def token_losses(
    model: GPT, hidden: Tensor, targets: Tensor, adapters: AdapterSet | None = None, weights: Weights | None = None
) -> Tensor:
    """Evaluation loss in nats, float32: hidden [B, T, D], targets [B, T] -> [B, T]; logits as softcapped in eval."""
    if adapters is None and hidden.is_cuda and not torch.is_grad_enabled():
        embedding = model.tok_emb.weight if weights is None else weights.embedding
        return fused_token_losses(hidden, embedding.to(hidden.dtype), targets, model.softcap_pos, model.softcap_neg)
    logits = model.eval_logits(hidden, adapters=adapters, weights=weights)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def sliding_spans(targets: int, context: int, stride: int) -> list[Span]:
    """Windows of `context` inputs every `stride`; each counts what the one before it did not reach."""
    spans = [Span(0, min(context, targets), 0)]
    while spans[-1].end < targets:
        start = spans[-1].start + stride
        spans.append(Span(start, min(start + context, targets), spans[-1].end))
    return spans


def segment_spans(inputs: NDArray, context: int, limit: int) -> list[Span]:
    """Whole segments (cut at BOS and `context`) in runs of at most `limit` >= context tokens, each counted whole."""
    edges = boundaries(inputs, context)
    spans: list[Span] = []
    start = 0
    for segment_end, following in zip(edges[1:], np.append(edges[2:], np.iinfo(np.int64).max), strict=True):
        if following - start > limit:
            spans.append(Span(start, int(segment_end), start))
            start = int(segment_end)
    return spans


def sliding(
    model: GPT,
    tokens: NDArray,
    token_bytes: NDArray,
    context: int,
    stride: int,
    batch: int,
    progress: Progress | None = None,
    losses: NDArray | None = None,
) -> Score:
    """Score a stream by overlapping windows, each of which counts the targets that no earlier one reached.

    A target sees its document back to its window's start: more than context - stride tokens, at most context.
    Computes on the model's device in its `dtype`, with its `looping` as it stands; sums are float64.

    Args:
        tokens: ids [n]; targets are tokens[1:].
        token_bytes: bytes of original text of each token [n] (BOS: 0).
        context, stride: tokens; documents never see one another.
        batch: windows per forward pass.
        progress: called after every forward pass with this rank's counts.
        losses: float array [n - 1] that receives the loss of every target this rank scores, nats.

    Raises PgolfError for a stream that does not fit the model, or if any target was not counted once. Under
    torch.distributed every rank calls it; batches are dealt out and every rank gets the whole score.
    """
    check_stream(model, tokens, token_bytes)
    spans = sliding_spans(len(tokens) - 1, context, stride)
    packs = [spans[first : first + batch] for first in range(0, len(spans), batch)]
    return score_packs(model, tokens, token_bytes, packs, context, progress, losses)


def segments(
    model: GPT,
    tokens: NDArray,
    token_bytes: NDArray,
    context: int,
    batch: int,
    progress: Progress | None = None,
    losses: NDArray | None = None,
) -> Score:
    """Score a stream cut at every BOS and every `context` tokens; a target's context starts at its segment.

    Arguments and errors as `sliding`; a forward pass takes at most `batch * context` tokens.
    """
    check_stream(model, tokens, token_bytes)
    packs = [[span] for span in segment_spans(tokens[:-1], context, batch * context)]
    return score_packs(model, tokens, token_bytes, packs, context, progress, losses)


@torch.no_grad()
def score_packs(
    model: GPT,
    tokens: NDArray,
    token_bytes: NDArray,
    packs: list[list[Span]],
    context: int,
    progress: Progress | None = None,
    losses: NDArray | None = None,
) -> Score:
    """Score lists of spans, one forward pass a list, dealt out to the ranks; checks that all targets were counted."""
    rank, size = world()
    device = model.tok_emb.weight.device
    total = len(tokens) - 1
    coverage = Coverage(total)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, bytes, targets
    for pack in packs[rank::size]:
        ids, targets, scored, edges = pack_spans(tokens, pack, context)
        for span in pack:
            coverage.add(span.scored, span.end)
            sums[1] += int(token_bytes[span.scored + 1 : span.end + 1].sum(dtype=np.int64))
            sums[2] += span.end - span.scored
        hidden = model.hidden(to_device(ids, device)[None], pad_boundaries(edges, device), int(np.diff(edges).max()))
        rows, wanted = hidden[0, to_device(scored, device)], to_device(targets, device)
        parts = zip(rows.split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True)
        nats_of = torch.cat([token_losses(model, h[None], goal[None])[0] for h, goal in parts])
        sums[0] += nats_of.double().sum()
        if losses is not None:
            losses[np.concatenate([np.arange(span.scored, span.end) for span in pack])] = nats_of.cpu().numpy()
        if progress is not None:
            nats, seen, done = sums.tolist()
            progress(int(done), total, bits_per_byte(nats, seen) if seen else math.inf)
    coverage.check()
    nats, seen, done = parallel.sum_(sums.cpu()).tolist()
    return Score(nats, int(seen), int(done))


def to_device(values: NDArray, device: torch.device) -> Tensor:
    """Integers as an int64 tensor on `device`."""
    return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(device)


def pack_spans(tokens: NDArray, pack: Iterable[Span], context: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Lay spans end to end: (ids [T], targets [K], places of the counted targets in the row [K], boundaries).

    The smear gate reads the token before, across attention segments. In a pack that would be the last token of
    an unrelated span; so a span that does not open a document is led by the token that truly precedes it, alone in
    its segment. What a target sees is then fixed by the stream, however spans are packed.
    """
    ids, targets, scored, edges = [], [], [], [np.zeros(1, np.int64)]
    length = 0
    for span in pack:
        if span.start > 0 and tokens[span.start] != BOS:
            ids.append(tokens[span.start - 1 : span.start])
            length += 1
            edges.append(np.array([length]))
        inputs = tokens[span.start : span.end]
        ids.append(inputs)
        targets.append(tokens[span.scored + 1 : span.end + 1])
        scored.append(np.arange(span.scored, span.end) - span.start + length)
        edges.append(boundaries(inputs, context)[1:] + length)
        length += len(inputs)
    return np.concatenate(ids), np.concatenate(targets), np.concatenate(scored), np.concatenate(edges)
