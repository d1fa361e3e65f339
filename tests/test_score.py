"""Scoring without adaptation: coverage, causality, independence of packing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf import score
from pgolf.config import ModelConfig
from pgolf.errors import PgolfError
from pgolf.model import BOS, GPT

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelConfig(
    num_layers=4, model_dim=16, num_heads=2, num_kv_heads=1, vocab_size=32, mlp_mult=2.0, rope_dims=4,
    loop_start=1, loop_end=1, parallel_start_layer=3, xsa_last_n=4, gate_window=8,
)  # fmt: skip
CONTEXT, STRIDE = 12, 5


def small_model() -> GPT:
    """A model in which every parameter matters (the smear gate above all)."""
    model = GPT(MODEL).initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.smear_lambda.fill_(1.0)
    return model.requires_grad_(False)


def stream(lengths=(7, 30, 1, 2, 19), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Documents of these lengths (BOS included) as uint16 tokens, and their bytes."""
    random = np.random.default_rng(seed)
    tokens = np.concatenate([[BOS, *random.integers(2, 32, length - 1)] for length in lengths]).astype(np.uint16)
    return tokens, np.where(tokens == BOS, 0, random.integers(1, 9, len(tokens))).astype(np.uint16)


def run(mode: str, model: GPT, tokens: np.ndarray, token_bytes: np.ndarray, batch: int):
    """(score, loss of every target)."""
    losses = np.full(len(tokens) - 1, np.nan)
    if mode == "sliding":
        return score.sliding(model, tokens, token_bytes, CONTEXT, STRIDE, batch, losses=losses), losses
    return score.segments(model, tokens, token_bytes, CONTEXT, batch, losses=losses), losses


def logits_of(mode: str, model: GPT, tokens: np.ndarray, batch: int) -> torch.Tensor:
    """The logits behind every target's loss, [targets, V]; the packs hold targets in ascending order."""
    seen: list[torch.Tensor] = []
    honest = model.eval_logits
    model.eval_logits = lambda *arguments, **options: seen.append(honest(*arguments, **options)) or seen[-1]
    try:
        run(mode, model, tokens, np.ones(len(tokens)), batch)
    finally:
        model.eval_logits = honest
    return torch.cat([part.flatten(0, -2) for part in seen])


def future_matters(mode: str, model: GPT, batch: int) -> bool:
    """Whether replacing every token after some place (BOS included) changes a distribution up to there."""
    tokens, _ = stream()
    logits = logits_of(mode, model, tokens, batch)
    for cut in range(1, len(tokens) - 1, 7):
        other = tokens.copy()
        other[cut + 1 :] = np.random.default_rng(cut).integers(1, 32, len(tokens) - cut - 1)
        changed = logits_of(mode, model, other, batch)
        if not torch.allclose(logits[: cut + 1], changed[: cut + 1], rtol=0, atol=1e-4):
            return True
    return False


def test_bits_per_byte():
    assert score.bits_per_byte(math.log(2) * 12, 4) == pytest.approx(3)
    with pytest.raises(PgolfError, match="at least one byte"):
        score.bits_per_byte(1.0, 0)


@pytest.mark.parametrize("mode", ["sliding", "segments"])
@pytest.mark.parametrize("batch", [1, 4])
def test_prediction_depends_on_no_later_token(mode, batch):
    assert not future_matters(mode, small_model(), batch)


@pytest.mark.parametrize("mode", ["sliding", "segments"])
def test_the_causality_check_catches_a_model_that_looks_ahead(mode):
    model = small_model()
    honest = model.hidden
    model.hidden = lambda ids, *rest: honest(ids, *rest) + 0.1 * honest(ids, *rest).roll(-1, dims=1)
    assert future_matters(mode, model, 4)


@pytest.mark.parametrize("mode", ["sliding", "segments"])
def test_score_is_independent_of_packing_and_sums_its_losses(mode):
    model, (tokens, token_bytes) = small_model(), stream()
    result, losses = run(mode, model, tokens, token_bytes, 1)
    _, packed = run(mode, model, tokens, token_bytes, 5)
    np.testing.assert_allclose(losses, packed, rtol=0, atol=1e-5)
    assert result.nats == pytest.approx(losses.sum(), rel=1e-9)
    assert (result.bytes, result.targets) == (int(token_bytes[1:].sum()), len(tokens) - 1)
    assert result.loss == pytest.approx(losses.mean())
    assert result.bpb == pytest.approx(losses.sum() / math.log(2) / token_bytes[1:].sum())


@pytest.mark.parametrize("mode", ["sliding", "segments"])
def test_documents_do_not_see_one_another(mode):
    """Each document scores as if it were alone (the BOS after it is its last target)."""
    model, (tokens, token_bytes) = small_model(), stream((5, 4, 1, 6, 5))
    losses = np.full(len(tokens) - 1, np.nan)
    if mode == "sliding":  # one window holds the whole stream
        score.sliding(model, tokens, token_bytes, 21, 21, 2, losses=losses)
    else:
        score.segments(model, tokens, token_bytes, 6, 2, losses=losses)
    edges = [*np.flatnonzero(tokens == BOS), len(tokens) - 1]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        text = torch.from_numpy(tokens[start : end + 1].astype(np.int64))[None]
        alone = score.token_losses(model, model.hidden(text[:, :-1]), text[:, 1:])[0]
        np.testing.assert_allclose(losses[start:end], alone.numpy(), rtol=0, atol=1e-5)


def test_probabilities_sum_to_one():
    model = small_model()
    hidden = model.hidden(torch.tensor([[BOS, 5, 9]])).expand(32, -1, -1)
    every = torch.arange(32)[:, None].expand(-1, 3)
    torch.testing.assert_close(score.token_losses(model, hidden, every).neg().exp().sum(0), torch.ones(3))


@given(targets=st.integers(1, 200), context=st.integers(1, 40), stride=st.integers(1, 40))
def test_sliding_spans_cover_once_with_enough_context(targets, context, stride):
    stride = min(stride, context)
    spans = score.sliding_spans(targets, context, stride)
    assert [i for span in spans for i in range(span.scored, span.end)] == list(range(targets))
    for span in spans:
        assert span.end - span.start <= context
        assert span.start == 0 or span.scored - span.start >= context - stride


@settings(deadline=None)
@given(
    ids=st.lists(st.sampled_from([BOS, 2, 3, 4]), min_size=1, max_size=80),
    context=st.integers(1, 20),
    batch=st.integers(1, 4),
)
def test_segments_are_cut_at_bos_and_context(ids, context, batch):
    inputs = np.array(ids)
    edges = score.boundaries(inputs, context)
    assert edges[0] == 0 and edges[-1] == len(ids) and (np.diff(edges) <= context).all() and (np.diff(edges) > 0).all()
    assert set(np.flatnonzero(inputs == BOS)) <= set(edges)
    for edge in edges[1:-1]:  # no cut but at a BOS or after a full segment
        assert ids[edge] == BOS or edge - edges[list(edges).index(edge) - 1] == context
    spans = score.segment_spans(inputs, context, context * batch)
    assert [i for span in spans for i in range(span.scored, span.end)] == list(range(len(ids)))
    assert all(span.end - span.start <= context * batch and span.start in edges for span in spans)


@pytest.mark.parametrize("edit", [lambda spans: spans[:-1], lambda spans: [*spans, spans[0]]])
def test_a_target_missed_or_counted_twice_is_caught(edit, monkeypatch):
    honest = score.sliding_spans
    monkeypatch.setattr(score, "sliding_spans", lambda *sizes: edit(honest(*sizes)))
    with pytest.raises(PgolfError, match="not scored exactly once"):
        run("sliding", small_model(), *stream(), 2)


def test_refusals():
    model, (tokens, token_bytes) = small_model(), stream()
    with pytest.raises(PgolfError, match="same length"):
        score.sliding(model, tokens, token_bytes[1:], CONTEXT, STRIDE, 2)
    with pytest.raises(PgolfError, match="at least 2 tokens"):
        score.sliding(model, tokens[:1], token_bytes[:1], CONTEXT, STRIDE, 2)
    with pytest.raises(PgolfError, match="vocabulary of 32"):
        score.segments(model, tokens + np.uint16(20), token_bytes, CONTEXT, 2)


def test_progress_reaches_the_end():
    calls: list[tuple[int, int, float]] = []
    model, (tokens, token_bytes) = small_model(), stream()
    result = score.sliding(
        model, tokens, token_bytes, CONTEXT, STRIDE, 2, progress=lambda *values: calls.append(values)
    )
    assert calls[-1] == (len(tokens) - 1, len(tokens) - 1, pytest.approx(result.bpb))
