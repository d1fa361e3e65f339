"""Streaming test-time training: window mode where everything is refreshed, and the rules where it is not."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pgolf import parallel, ttt
from pgolf.config import ModelConfig, TTTConfig
from pgolf.errors import PgolfError
from pgolf.model import BOS, GPT
from pgolf.ops import attention
from pgolf.ttt import memory, padding, planning
from pgolf.ttt.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelConfig(
    num_layers=4, model_dim=16, num_heads=2, num_kv_heads=1, vocab_size=32, mlp_mult=2.0, rope_dims=4,
    loop_start=1, loop_end=1, parallel_start_layer=3, xsa_last_n=4, gate_window=8,
)  # fmt: skip
LENGTHS = (7, 30, 1, 2, 19, 23, 90)


def config(**changes) -> TTTConfig:
    """Settings whose steps are smooth in the gradient: rounding does not grow from step to step."""
    settings = {
        "mode": "streaming", "refresh": 6, "batch_size": 8, "chunk_size": 4, "short_chunks": "", "context": 24,
        "rank": 2, "alpha": 4.0, "lr": 0.02, "eps": 0.1, "prefix_docs": 0, "global_chunk": 16, "global_lr": 0.02,
        "eval_seq_len": 8,
    }  # fmt: skip
    return TTTConfig(**(settings | changes))


def small_model(device: str = "cpu") -> GPT:
    """A model in which every parameter matters."""
    model = GPT(MODEL).initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(device)


def stream(lengths=LENGTHS, seed: int = 0) -> np.ndarray:
    """Documents of these lengths (BOS included) as uint16 tokens."""
    random = np.random.default_rng(seed)
    return np.concatenate([[BOS, *random.integers(2, 32, length - 1)] for length in lengths]).astype(np.uint16)


def losses_of(tokens: np.ndarray, settings: TTTConfig, **options) -> np.ndarray:
    """The loss of every target, from a fresh model."""
    losses = np.full(len(tokens) - 1, np.nan)
    ttt.evaluate(small_model(), tokens, np.ones(len(tokens)), settings, seed=0, losses=losses, **options)
    return losses


# ---- against window mode


@pytest.mark.parametrize("changes", [{}, {"grad_steps": 2}, {"batch_size": 2, "prefix_docs": 4}, {"beta1": 0.5}])
def test_refreshing_everything_is_window_mode(changes):
    tokens = stream()
    everything = config(refresh=100, context=128, **changes)
    window = config(mode="window", context=128, **changes)
    np.testing.assert_allclose(losses_of(tokens, everything), losses_of(tokens, window), rtol=0, atol=1e-4)


def test_what_is_kept_is_what_was_computed():
    """Adapters that stand still: it does not matter what runs anew."""
    tokens = stream()
    window = losses_of(tokens, config(mode="window", context=128, lr=0.0))
    for refresh in (0, 1, 6, 50):
        streaming = losses_of(tokens, config(refresh=refresh, context=128, lr=0.0))
        np.testing.assert_allclose(streaming, window, rtol=0, atol=2e-5)


def test_refreshing_more_comes_closer_to_window_mode():
    tokens = stream()
    window = losses_of(tokens, config(mode="window", context=128))
    found = [losses_of(tokens, config(refresh=refresh, context=128)) for refresh in (0, 6, 24, 90)]
    errors = [np.abs(losses - window).mean() for losses in found]
    assert errors == sorted(errors, reverse=True) and errors[0] > 100 * errors[-1]


@pytest.mark.parametrize("chunk", [4, 100])  # 100: chunks longer than what runs
@pytest.mark.parametrize("mode", ["window", "streaming"])
def test_padding_of_windows_and_chunks_changes_nothing(mode, chunk, monkeypatch):
    """As graphs pad them; some last chunks are short and end where their window must."""
    tokens, settings = (
        stream((7, 30, 1, 2, 19, 23, 41)),
        config(mode=mode, chunk_size=chunk, context=24 if chunk == 4 else 128),
    )
    exact, honest, shapes = losses_of(tokens, settings), Engine._step, []
    monkeypatch.setattr("pgolf.ttt.evaluation.step_way", lambda *arguments: "graphs")
    monkeypatch.setattr(Engine, "_step", lambda self, shape: (shapes.append(shape), honest(self, shape)))
    np.testing.assert_allclose(losses_of(tokens, settings), exact, rtol=0, atol=1e-5)
    assert any(shape.inputs < shape.chunk for shape in shapes) == (chunk == 100)


# ---- the memory


def visible(starts_and_ends, context) -> list[int]:
    """For each step, the first place that its tokens see."""
    return [origin for _, origin in planning.layouts(starts_and_ends, context)]


def test_layouts_hold_all_until_the_context_is_full():
    for chunk, refresh, context in ((4, 6, 24), (48, 128, 3072), (48, 0, 3072), (8, 16, 24), (4, 20, 24)):
        spans = [(max(0, begin - refresh), begin + chunk) for begin in range(0, 4 * context, chunk)]
        found = planning.layouts(spans, context)
        assert [origin for (_, end), (_, origin) in zip(spans, found, strict=True) if end <= context] == [0] * (
            context // chunk
        )
        capacities = [capacity for capacity, _ in found]
        assert capacities == sorted(capacities) and capacities[-1] <= context
        keep = max(0, context - refresh - chunk - context // 8)
        for (start, end), (capacity, origin) in zip(spans, found, strict=True):
            assert 0 <= origin <= start and end - origin <= capacity
            assert origin == 0 or start - origin >= keep
        assert visible(spans, context) == sorted(visible(spans, context))


def test_a_full_memory_forgets_the_oldest(monkeypatch):
    """Dropping and moving entries gives what attention gives when the same places are hidden in a memory of all."""
    tokens, settings = stream((90, 70, 20, 3)), config(lr=0.02)
    found = losses_of(tokens, settings)
    origins: list[int] = []
    honest, plain = planning.layouts, attention.cached_reference

    def layouts(spans, context):
        spans = list(spans)
        origins.extend(origin for _, origin in honest(spans, context))
        return [(128, 0)] * len(spans)

    step = Engine._step
    place = -1

    def next_step(self, shape):
        nonlocal place
        place += 1
        step(self, shape)

    def hidden(q, k, v, used):
        first = origins[place]
        return plain(q, k[:, first:], v[:, first:], used - first)

    monkeypatch.setattr(planning, "layouts", layouts)
    monkeypatch.setattr(Engine, "_step", next_step)
    monkeypatch.setattr(attention, "cached_reference", hidden)
    room = "pgolf.ttt.engine.room"
    monkeypatch.setattr(room, lambda *arguments: 128)
    np.testing.assert_allclose(found, losses_of(tokens, settings), rtol=0, atol=2e-5)
    assert max(origins) > 24


def test_attention_over_a_memory_is_attention_over_its_used_part():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 4, 8, generator=generator)
    k, v = (torch.randn(2, 32, 2, 8, generator=generator) for _ in range(2))
    out = attention.cached_attention(q, k, v, torch.tensor([9, 32], dtype=torch.int32))
    for row, used in enumerate((9, 32)):
        padded = torch.cat((torch.zeros(1, used - 5, 4, 8), q[row : row + 1]), dim=1)
        whole = attention.reference(padded, k[row : row + 1, :used], v[row : row + 1, :used], None)
        torch.testing.assert_close(out[row], whole[0, -5:])


# ---- the rules


@pytest.mark.parametrize("refresh", [0, 6])
def test_no_later_token_matters(refresh):
    """Each later token is changed in turn: losses of earlier targets, of this document and of others, stay."""
    tokens, settings = stream((26, 40, 33)), config(refresh=refresh)
    honest = losses_of(tokens, settings)
    ends = [26, 66, 99]
    for cut in range(1, len(tokens), 5):
        if tokens[cut] == BOS:
            continue
        other = tokens.copy()
        other[cut] = 2 + (other[cut] + 5) % 30
        changed = losses_of(other, settings)
        end = next(end for end in ends if cut < end)
        untouched = np.ones(len(honest), bool)
        untouched[cut - 1 : end] = False
        np.testing.assert_allclose(honest[untouched], changed[untouched], rtol=0, atol=1e-5)
        assert honest[cut - 1] != changed[cut - 1]


def test_documents_not_yet_scored_do_not_matter_even_through_the_global_phase():
    settings = config(batch_size=2, prefix_docs=2)
    tokens = stream()
    order: list[int] = []
    honest = losses_of(tokens, settings, on_batch=lambda place, batch: order.extend(batch))
    starts = [*np.flatnonzero(tokens == BOS), len(tokens)]
    for scored in (3, 5):
        other = tokens.copy()
        for document in order[scored:]:
            part = slice(starts[document] + 1, starts[document + 1])
            other[part] = 2 + (other[part] + 5) % 30
        changed = losses_of(other, settings)
        for document in order[:scored]:
            part = slice(starts[document], starts[document + 1] - 1)
            np.testing.assert_allclose(honest[part], changed[part], rtol=0, atol=1e-5)


def first_chunks_are_unadapted() -> bool:
    """Whether the first chunk of every document has the network's own losses, however large the step on it."""
    tokens = stream((7, 1, 2, 13))
    adapted, plain = losses_of(tokens, config(lr=1.0)), losses_of(tokens, config(lr=0.0))
    assert not np.allclose(adapted, plain)  # later chunks do change
    starts = np.flatnonzero(tokens == BOS)
    ends = np.append(starts[1:], len(tokens) - 1)
    first = np.concatenate([np.arange(start, min(start + 4, end)) for start, end in zip(starts, ends, strict=True)])
    return np.allclose(adapted[first], plain[first], rtol=0, atol=1e-5)


def test_loss_is_recorded_before_the_step(monkeypatch):
    assert first_chunks_are_unadapted()
    honest = Engine._step

    def train_first(self, shape):
        honest(self, shape)
        honest(self, shape)

    monkeypatch.setattr(Engine, "_step", train_first)
    assert not first_chunks_are_unadapted()


@pytest.mark.parametrize("edit", [lambda table: table[:-1], lambda table: [*table, table[-1]]])
def test_a_target_missed_or_counted_twice_is_caught(edit, monkeypatch):
    honest = planning.streaming_windows
    monkeypatch.setattr(planning, "streaming_windows", lambda *sizes: edit(honest(*sizes)))
    with pytest.raises(PgolfError, match="not scored exactly once"):
        losses_of(stream(), config())


# ---- shapes of streams


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_streams_of_every_kind(batch_size):
    """Single tokens, an empty last document, hundreds of tiny ones, one longer than two contexts: all are scored."""
    for lengths in ((1, 1, 1), (2, 1), (1,) * 300 + (3,), (60, 5, 1), (1, 61)):
        losses = losses_of(stream(lengths), config(batch_size=batch_size))
        assert np.isfinite(losses).all(), lengths


@pytest.mark.parametrize("graph_tokens", [20, 2_000, 40_000])
@pytest.mark.parametrize("mode", ["window", "streaming"])
def test_few_shapes_give_the_same_losses(mode, graph_tokens, monkeypatch):
    """Padding, and finished documents that stay in the batch, change nothing: what graphs run is what eager runs."""
    tokens = stream((*LENGTHS, 150, 170, 260, 40, 44))
    sizes = {"context": 200, "refresh": 70, "short_chunks": "10:2,20:3", "batch_size": 3, "prefix_docs": 3}
    settings = config(mode=mode, lr=0.002, **sizes)  # larger steps on 260 tokens make rounding grow
    exact = losses_of(tokens, settings)
    assert np.abs(exact - losses_of(tokens, config(mode=mode, lr=0.0, **sizes))).max() > 0.1
    monkeypatch.setattr(padding, "GRAPH_TOKENS", graph_tokens)
    monkeypatch.setattr("pgolf.ttt.evaluation.step_way", lambda *arguments: "graphs")
    honest, ran = Engine._step, []
    monkeypatch.setattr(Engine, "_step", lambda self, shape: (ran.append(shape), honest(self, shape)))
    np.testing.assert_allclose(losses_of(tokens, settings), exact, rtol=0, atol=2e-5)
    assert len(set(ran)) < len(ran) / 2


@pytest.mark.parametrize("mode", ["window", "streaming"])
def test_rows_of_finished_documents_may_come_back(mode, monkeypatch):
    """Each size of the memory has row sizes of its own: a step may have more rows than the one before."""
    tokens, settings = stream(), config(mode=mode, batch_size=3, prefix_docs=3)
    exact = losses_of(tokens, settings)
    monkeypatch.setattr("pgolf.ttt.evaluation.step_way", lambda *arguments: "graphs")
    seen = []

    def pad(batches, documents, config):
        seen.extend(len(step.windows) for batch in batches for step in batch)
        rows = itertools.cycle((0, documents))
        return [
            [step._replace(shape=step.shape._replace(rows=max(next(rows), len(step.windows)))) for step in batch]
            for batch in batches
        ]

    monkeypatch.setattr("pgolf.ttt.evaluation.pad", pad)
    np.testing.assert_allclose(losses_of(tokens, settings), exact, rtol=0, atol=2e-5)
    assert seen.count(1) > 10


def test_sizes_of_the_memory():
    assert [planning.room(tokens, 3072) for tokens in (1, 64, 65, 128, 1025, 2049, 3072)] == [
        64, 64, 128, 128, 2048, 3072, 3072
    ]  # fmt: skip
    assert planning.room(3, 10) == 10


# ---- several ranks


def one_rank(rank: int, size: int, folder: str) -> None:
    """Score on `size` gloo ranks with adapters that stand still; rank 0 saves what the test compares."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    tokens = stream()
    settings = config(batch_size=2, prefix_docs=4, lr=0.0, global_chunk=8)
    result = ttt.evaluate(small_model(), tokens, np.ones(len(tokens)), settings, 0)
    if rank == 0:
        np.save(os.path.join(folder, "nats.npy"), result.nats)
    parallel.leave(0)


def test_two_ranks_score_what_one_scores(tmp_path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    tokens = stream()
    settings = config(batch_size=2, prefix_docs=4, lr=0.0, global_chunk=8)
    alone = ttt.evaluate(small_model(), tokens, np.ones(len(tokens)), settings, 0)
    np.testing.assert_allclose(np.load(tmp_path / "nats.npy"), alone.nats, rtol=1e-5)


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])


def test_what_a_later_slot_writes_leaves_an_earlier_slots_graph_alone():
    """The slots share one tensor; an attention that saves its keys must still find them unchanged."""
    room, index = torch.zeros(2, 1, 4, 1, 2), torch.tensor([1, 2])
    new = torch.ones(1, 2, 1, 2, requires_grad=True)
    keys = memory._Append.apply(new, room[0], index)
    score = (keys * keys).sum()  # saves the keys for its backward
    memory._Append.apply(new.detach(), room[1], index)
    score.backward()
    assert torch.equal(new.grad, torch.full_like(new, 2.0))
