"""Test-time training against golden vectors and against the rules: causal, scored before the step, once each."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pgolf import parallel, score, ttt
from pgolf.config import ModelConfig, TTTConfig
from pgolf.errors import PgolfError
from pgolf.model import BOS, GPT
from pgolf.ttt import planning
from pgolf.ttt.adapters import Adapters, uniform_a
from pgolf.ttt.engine import Engine
from pgolf.ttt.phase import cosine_lr, global_phase

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelConfig(
    num_layers=4, model_dim=16, num_heads=2, num_kv_heads=1, vocab_size=32, mlp_mult=2.0, rope_dims=4,
    loop_start=1, loop_end=1, parallel_start_layer=3, xsa_last_n=4, gate_window=8,
)  # fmt: skip
CONFIG = TTTConfig(
    batch_size=8, chunk_size=4, short_chunks="", context=10, rank=2, lr=0.05, prefix_docs=0,
    global_chunk=16, global_lr=0.1, eval_seq_len=8,
)  # fmt: skip
LENGTHS = (7, 30, 1, 2, 19, 23)


def with_config(**changes) -> TTTConfig:
    return TTTConfig(**(CONFIG.__dict__ | changes))


def small_model() -> GPT:
    """A model in which every parameter matters."""
    model = GPT(MODEL).initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def stream(lengths=LENGTHS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Documents of these lengths (BOS included) as uint16 tokens, and their bytes."""
    random = np.random.default_rng(seed)
    tokens = np.concatenate([[BOS, *random.integers(2, 32, length - 1)] for length in lengths]).astype(np.uint16)
    return tokens, np.where(tokens == BOS, 0, random.integers(1, 9, len(tokens))).astype(np.uint16)


def losses_of(tokens: np.ndarray, config: TTTConfig = CONFIG, **options) -> np.ndarray:
    """The loss of every target, from a fresh model."""
    losses = np.full(len(tokens) - 1, np.nan)
    ttt.evaluate(small_model(), tokens, np.ones(len(tokens)), config, seed=0, losses=losses, **options)
    return losses


# ---- golden


def golden_cases(archive) -> list[str]:
    return sorted({key.split(".")[0] for key in archive.files})


def golden_config(values: dict) -> TTTConfig:
    """The `settings` of a golden case; a key not stated has its default."""
    names = {
        "ttt_batch_size": "batch_size", "ttt_chunk_size": "chunk_size", "ttt_eval_seq_len": "context",
        "ttt_lora_rank": "rank", "ttt_lora_alpha": "alpha", "ttt_lora_lr": "lr", "ttt_local_lr_mult": "lr_mult",
        "ttt_weight_decay": "weight_decay", "ttt_beta1": "beta1", "ttt_beta2": "beta2", "ttt_grad_steps": "grad_steps",
        "phased_ttt_prefix_docs": "prefix_docs", "phased_ttt_num_phases": "phases",
        "global_ttt_chunk_tokens": "global_chunk", "global_ttt_lr": "global_lr",
        "global_ttt_momentum": "global_momentum", "global_ttt_epochs": "global_epochs",
        "global_ttt_batch_seqs": "global_rows", "global_ttt_grad_clip": "global_clip", "eval_seq_len": "eval_seq_len",
    }  # fmt: skip
    arguments = {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
    defaults = {"q": False, "k": True, "v": False, "o": True, "mlp": True}
    targets = [name for name, default in defaults.items() if values.get(f"ttt_{name}_lora", default)]
    if not values.get("ttt_short_score_first_enabled", True):
        arguments["short_chunks"] = ""
    elif "ttt_short_score_first_steps" in values:
        arguments["short_chunks"] = values["ttt_short_score_first_steps"]
    return TTTConfig(targets=",".join([*targets, "head"]), **arguments)


def sine_a(shape: tuple[int, int, int]) -> torch.Tensor:
    flat = torch.arange(np.prod(shape), dtype=torch.float64)
    return (torch.sin(0.7 * flat + 0.3) / shape[-1] ** 0.5).view(shape)


@pytest.mark.golden
def test_golden_phased(golden):
    archive = np.load(golden("ttt_phased.npz"), allow_pickle=False)
    for case in golden_cases(archive):

        def group(prefix, case=case):
            start = f"{case}.{prefix}."
            names = [key for key in archive.files if key.startswith(start)]
            return {key.removeprefix(start): torch.from_numpy(archive[key]) for key in names}

        values = json.loads(str(archive[f"{case}.settings"]))
        fields = ModelConfig.__dataclass_fields__
        model = GPT(ModelConfig(**{key: value for key, value in values.items() if key in fields}))
        before = group("param")
        model.load_state_dict(before)
        tokens, token_bytes = archive[f"{case}.tokens"], archive[f"{case}.bytes"]
        result = ttt.evaluate(model, tokens, token_bytes, golden_config(values), seed=0, initial_a=sine_a)
        assert result.score.loss == pytest.approx(float(archive[f"{case}.val_loss"]), rel=1e-6)
        assert result.score.bpb == pytest.approx(float(archive[f"{case}.val_bpb"]), rel=1e-6)
        after = model.state_dict()
        for name, expected in group("after").items():
            change = (expected - before[name]).norm()
            assert (after[name] - expected).norm() <= 1e-3 * change, name


@pytest.mark.golden
def test_golden_windows(golden):
    archive = np.load(golden("schedule.npz"), allow_pickle=False)
    names, _, note = str(archive["ttt_windows_columns"]).partition(" ")
    context = int(note.strip("()").partition("=")[2])
    for row in archive["ttt_windows"].tolist():
        at = dict(zip(names.split(","), row, strict=True))
        table = planning.windows(at["pred_len"], at["chunk_size"], context)
        assert len(table) == at["num_chunks"]
        expected = (at["win_start"], at["win_len"], at["chunk_offset"], at["chunk_len"])
        assert table[at["chunk_index"]] == expected


# ---- the rules


def logits_of(tokens: np.ndarray, look_ahead: float = 0.0) -> torch.Tensor:
    """The logits behind every target of a single document, [targets, V]."""
    seen: list[torch.Tensor] = []
    model = small_model()
    logits, hidden = model.eval_logits, model.hidden
    model.eval_logits = lambda *arguments, **options: seen.append(logits(*arguments, **options)) or seen[-1]
    model.hidden = lambda *arguments, **options: torch.add(
        hidden(*arguments, **options), hidden(*arguments, **options).roll(-1, dims=1), alpha=look_ahead
    )
    ttt.evaluate(model, tokens, np.ones(len(tokens)), CONFIG, seed=0)
    return torch.cat([part[0].detach() for part in seen])[: len(tokens) - 1]  # all chunks are of one size


@pytest.mark.parametrize("look_ahead", [0.0, 0.1])
def test_distribution_depends_on_no_later_token(look_ahead):
    """Changing the tokens after place `cut` leaves the distributions up to there; a model that leaks is caught."""
    tokens, _ = stream((26,))
    honest = logits_of(tokens, look_ahead)
    assert len(honest) == 25
    leaks = False
    for cut in range(1, 24, 3):
        other = tokens.copy()
        other[cut + 1 :] = 2 + (other[cut + 1 :] + 5) % 30
        changed = logits_of(other, look_ahead)
        leaks |= not torch.allclose(honest[: cut + 1], changed[: cut + 1], rtol=0, atol=1e-4)
    assert leaks == (look_ahead > 0)


def test_documents_of_a_batch_do_not_matter_to_one_another():
    tokens, _ = stream()
    honest = losses_of(tokens)
    starts = [*np.flatnonzero(tokens == BOS), len(tokens)]
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        cut = (start + end) // 2  # change the second half of this document
        other = tokens.copy()
        other[cut:end] = np.where(tokens[cut:end] == BOS, BOS, 2 + (tokens[cut:end] + 5) % 30)
        untouched = np.ones(len(honest), bool)
        untouched[max(cut - 1, 0) : end] = False
        np.testing.assert_allclose(honest[untouched], losses_of(other)[untouched], rtol=0, atol=1e-5)


def test_documents_not_yet_scored_do_not_matter_even_through_the_global_phase():
    config = with_config(batch_size=2, prefix_docs=2)
    tokens, _ = stream()
    order: list[int] = []
    honest = losses_of(tokens, config, on_batch=lambda place, batch: order.extend(batch))
    starts = [*np.flatnonzero(tokens == BOS), len(tokens)]
    for scored in (2, 4):
        other = tokens.copy()
        for document in order[scored:]:
            part = slice(starts[document] + 1, starts[document + 1])
            other[part] = 2 + (other[part] + 5) % 30
        changed = losses_of(other, config)
        for document in order[:scored]:
            part = slice(starts[document], starts[document + 1] - 1)
            np.testing.assert_allclose(honest[part], changed[part], rtol=0, atol=1e-5)


def first_chunks_are_unadapted(lr: float) -> bool:
    """Whether the first chunk of every document has the network's own losses, however large the step on it."""
    tokens, _ = stream((7, 1, 2, 13))
    adapted, plain = losses_of(tokens, with_config(lr=lr)), losses_of(tokens, with_config(lr=0.0))
    assert not np.allclose(adapted, plain)  # later chunks do change
    starts = np.flatnonzero(tokens == BOS)
    ends = np.append(starts[1:], len(tokens) - 1)
    first = np.concatenate(
        [np.arange(start, min(start + CONFIG.chunk_size, end)) for start, end in zip(starts, ends, strict=True)]
    )
    return np.allclose(adapted[first], plain[first], rtol=0, atol=1e-5)


def test_loss_is_recorded_before_the_step():
    assert first_chunks_are_unadapted(lr=1.0)


def test_recording_after_the_step_is_caught(monkeypatch):
    honest = Engine._step

    def train_first(self, *arguments):
        honest(self, *arguments)
        honest(self, *arguments)

    monkeypatch.setattr(Engine, "_step", train_first)
    assert not first_chunks_are_unadapted(lr=1.0)


@pytest.mark.parametrize("grad_steps", [1, 3])
def test_steps_before_a_chunk(grad_steps, monkeypatch):
    """A batch steps `grad_steps` times after every chunk but the last of its longest document."""
    steps = []
    honest = Adapters.step
    monkeypatch.setattr(Adapters, "step", lambda self, factor: (steps.append(1), honest(self, factor)))
    tokens, _ = stream((9, 10))
    losses_of(tokens, with_config(grad_steps=grad_steps))
    assert len(steps) == 2 * grad_steps  # 9 targets each (with the following BOS; without): chunks of 4, 4, 1


def test_unadapted_scores_are_the_plain_networks():
    """Learning rate zero: each document scores as it does alone, short windows and padding notwithstanding."""
    tokens, _ = stream()
    losses = losses_of(tokens, with_config(lr=0.0, context=64))
    model = small_model()
    edges = [*np.flatnonzero(tokens == BOS), len(tokens) - 1]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        text = torch.from_numpy(tokens[start : end + 1].astype(np.int64))[None]
        with torch.no_grad():
            alone = score.token_losses(model, model.hidden(text[:, :-1]), text[:, 1:])[0]
        np.testing.assert_allclose(losses[start:end], alone.numpy(), rtol=0, atol=1e-5)


def test_result_adds_up():
    tokens, token_bytes = stream()
    losses = np.full(len(tokens) - 1, np.nan)
    calls: list[tuple[int, int, float]] = []
    result = ttt.evaluate(
        small_model(), tokens, token_bytes, CONFIG, 0, losses=losses, progress=lambda *values: calls.append(values)
    )
    assert result.score.nats == pytest.approx(losses.sum(), rel=1e-6)
    assert result.score.targets == result.targets.sum() == len(tokens) - 1
    assert result.score.bytes == result.bytes.sum() == token_bytes[1:].sum()
    assert result.nats[0] == pytest.approx(losses[:7].sum(), rel=1e-6)
    assert calls[-1] == (len(tokens) - 1, len(tokens) - 1, pytest.approx(result.score.bpb))


def test_bfloat16_is_close_to_float32():
    tokens, token_bytes = stream()
    config = with_config(batch_size=2, prefix_docs=3, lr=0.005, global_lr=0.01)
    exact = ttt.evaluate(small_model(), tokens, token_bytes, config, 0).score.loss
    model = small_model()
    model.dtype = torch.bfloat16
    assert ttt.evaluate(model, tokens, token_bytes, config, 0).score.loss == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("edit", [lambda table: table[:-1], lambda table: [*table, table[0]]])
def test_a_target_missed_or_counted_twice_is_caught(edit, monkeypatch):
    honest = planning.windows
    monkeypatch.setattr(planning, "windows", lambda *sizes: edit(honest(*sizes)))
    with pytest.raises(PgolfError, match="not scored exactly once"):
        losses_of(stream()[0])


# ---- the plan


def test_documents():
    assert planning.find_documents(np.array([1, 5, 6, 1, 1, 7])) == [(0, 4), (3, 2), (4, 2)]
    assert planning.find_documents(np.array([1, 5, 1])) == [(0, 3)]  # a last BOS predicts nothing
    with pytest.raises(PgolfError, match="starts with BOS"):
        planning.find_documents(np.array([5, 1, 5]))


def test_chunk_size_follows_the_first_matching_rule():
    config = TTTConfig()
    assert [planning.chunk_size(n, config) for n in (2, 256, 257, 2000, 2001)] == [8, 8, 24, 24, 48]


def test_plan_runs_longest_first_and_trains_on_the_shortest_scored():
    documents = [planning.Document(0, length) for length in (5, 9, 5, 7, 3, 8, 2)]
    stages = planning.plan(documents, with_config(batch_size=3, prefix_docs=6, phases=2))
    batches = [batch.tolist() for stage in stages for batch in stage.batches]
    assert batches == [[1], [2, 3, 5], [6, 4, 0]]  # ascending inside; the partial batch is the longest
    assert [stage.prefix.tolist() for stage in stages] == [[2, 3, 5], [6, 4, 0, 2, 3, 5]]


def test_plan_without_global_phases():
    documents = [planning.Document(0, 5)] * 4
    for changes in ({"prefix_docs": 0}, {"prefix_docs": 9}):
        stages = planning.plan(documents, with_config(batch_size=3, **changes))
        assert len(stages) == 1 and len(stages[0].prefix) == 0


def test_deal_balances():
    assert planning.deal([9, 4, 3, 3, 2], 2) == [[0, 4], [1, 2, 3]]
    assert planning.deal([1.0, 1.0, 1.0], 1) == [[0, 1, 2]]


def test_partial_batch_leaves_the_kept_adapters_alone():
    """Full batches give the same losses whether a partial batch ran before them or not."""
    tokens, _ = stream((20, 9, 8, 7, 6))
    shorter = tokens[20:]
    config = with_config(batch_size=2)
    np.testing.assert_allclose(losses_of(tokens, config)[20:], losses_of(shorter, config), rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["window", "streaming"])
def test_a_partial_batch_scores_as_in_an_engine_of_its_size(mode, padded, monkeypatch):
    """Also with the A that such an engine draws: what a document gets depends on the number of documents."""
    if padded:
        monkeypatch.setattr("pgolf.ttt.evaluation.step_way", lambda *arguments: "graphs")
    tokens, _ = stream((20, 23, 9, 8, 7, 6, 5))
    config = with_config(batch_size=5, mode=mode, refresh=3, lr=0.005, eps=0.1)
    found, alone = losses_of(tokens, config)[:43], losses_of(tokens[:44], config)
    np.testing.assert_allclose(found, alone, rtol=0, atol=2e-5 if padded else 1e-6)  # of other sizes, if padded
    drawn_for_five = losses_of(tokens[:44], config, initial_a=lambda shape: uniform_a(0)((5, *shape[1:]))[-2:])
    assert not np.allclose(drawn_for_five, alone, rtol=0, atol=1e-4)


def test_a_of_its_own_leaves_what_was_learnt():
    adapters = Adapters(MODEL, 5, CONFIG, 4, uniform_a(0), dtype=torch.bfloat16)
    learnt = {name: value.clone() for name, value in adapters.named().items()}
    with adapters.fresh_a(lambda shape: torch.full(shape, 2.0), 3):
        for name, value in adapters.named().items():
            if name.endswith("A"):
                assert torch.equal(value[:1], learnt[name][:1]) and (value[1:] == 2).all(), name
        inside = adapters.seen.clone()
    assert all(torch.equal(value, learnt[name]) for name, value in adapters.named().items())
    assert (inside == 2).any() and not (adapters.seen == 2).any()


def test_progress_comes_a_batch_late_and_completely():
    tokens, token_bytes = stream((20, 9, 8, 7, 6, 5))
    config = with_config(batch_size=2, prefix_docs=4)  # a global phase after the second batch of three
    events: list[str] = []
    calls: list[tuple[int, int, float]] = []
    losses = np.full(len(tokens) - 1, np.nan)
    after: list[tuple[int, float]] = []

    def launched(place: int, batch: np.ndarray) -> None:
        events.append("batch")
        known = ~np.isnan(losses)
        nats = losses[known].sum() / np.log(2)
        after.append((known.sum(), nats / token_bytes[1:][known].sum()))

    def progress(*values) -> None:
        events.append("report")
        calls.append(values)

    ttt.evaluate(small_model(), tokens, token_bytes, config, 0, losses=losses, on_batch=launched, progress=progress)
    assert events == ["batch", "batch", "report", "report", "batch", "report"]
    assert calls == [(done, len(tokens) - 1, pytest.approx(bpb)) for done, bpb in after]


# ---- the global phase


def test_global_phase_moves_the_network_and_restores_flags():
    model = small_model()
    model.looping = False
    model.tok_emb.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens, token_bytes = stream()
    ttt.evaluate(model, tokens, token_bytes, with_config(batch_size=2, prefix_docs=3), 0)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"tok_emb.weight", "qo_bank", "skip_gates"} <= moved
    assert not moved & {"softcap_pos", "softcap_neg"}  # the training loss has a softcap of its own
    assert not model.looping and not model.tok_emb.weight.requires_grad and model.qo_bank.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_global_phase_without_a_whole_row_or_a_second_chunk_does_nothing():
    for config, length in ((with_config(global_chunk=7), 40), (CONFIG, CONFIG.global_chunk + 1)):
        model = small_model()
        before = [parameter.clone() for parameter in model.parameters()]
        global_phase(model, stream((length,))[0], config)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_cosine():
    assert [cosine_lr(CONFIG, chunk, 3) for chunk in range(3)] == pytest.approx([0.1, 0.05, 0.0])
    assert cosine_lr(CONFIG, 0, 1) == pytest.approx(0.1)


def test_max_docs():
    tokens, token_bytes = stream()
    result = ttt.evaluate(small_model(), tokens, token_bytes, CONFIG, 0, max_docs=2)
    assert result.score.targets == LENGTHS[0] + LENGTHS[1]


# ---- several ranks


# Adapters that stand still and global steps of one row: here the number of ranks must not matter.
UNADAPTED = with_config(batch_size=2, prefix_docs=4, lr=0.0, global_chunk=8)


def one_rank(rank: int, size: int, folder: str) -> None:
    """Score on `size` gloo ranks; rank 0 saves what the test compares."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    tokens, token_bytes = stream()
    plain = score.sliding(small_model(), tokens, token_bytes, 12, 5, 2)
    frozen = ttt.evaluate(small_model(), tokens, token_bytes, UNADAPTED, 0)
    model = small_model()
    ttt.evaluate(model, tokens, token_bytes, with_config(batch_size=2, prefix_docs=4), 0)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    every = [torch.empty_like(flat) for _ in range(size)]
    dist.all_gather(every, flat)
    assert all(torch.equal(flat, other) for other in every)  # the ranks' networks stay the same network
    if rank == 0:
        np.savez(os.path.join(folder, "scores.npz"), plain=plain.nats, frozen=frozen.nats)
    parallel.leave(0)


def test_two_ranks_score_what_one_scores(tmp_path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    found = np.load(tmp_path / "scores.npz")
    tokens, token_bytes = stream()
    plain = score.sliding(small_model(), tokens, token_bytes, 12, 5, 2)
    frozen = ttt.evaluate(small_model(), tokens, token_bytes, UNADAPTED, 0)
    assert float(found["plain"]) == pytest.approx(plain.nats, rel=1e-6)
    np.testing.assert_allclose(found["frozen"], frozen.nats, rtol=1e-5)


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])


def test_long_documents_learn_at_their_own_rate():
    """The last rule whose length the longest document reaches counts; what does not learn shares its shape."""
    config = TTTConfig(long_lr="4000:4,1000:1.5")
    factors = [planning.lr_factor(length, config) for length in (2, 999, 1000, 3999, 4000, 90_000)]
    assert factors == [1, 1, 1.5, 1.5, 4, 4]
    documents = [planning.Document(0, 900), planning.Document(900, 1200)]
    found = planning.steps(documents, config)
    assert {step.shape.lr for step in found[:-1]} == {1.5} and found[-1].shape.lr == 1.0


def test_a_factor_on_the_rate_scales_the_step():
    config = TTTConfig(weight_decay=0.0, rank=4)
    weights = []
    for factor in (1.0, 3.0):
        adapters = Adapters(MODEL, 1, config, 2, uniform_a(0))
        before = adapters.seen.clone()
        adapters.grad.fill_(0.5)
        adapters.step(factor)
        weights.append(adapters.seen - before)
    torch.testing.assert_close(weights[1], 3 * weights[0], rtol=1e-3, atol=1e-7)
