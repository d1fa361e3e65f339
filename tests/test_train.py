"""Training: the same seed gives the same bits, also through stops, signals, warm-up and resumption."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from pgolf import checkpoint, config, pipeline, recipes
from pgolf import train as training
from pgolf.data import shards
from pgolf.errors import PgolfError
from pgolf.interrupt import Stopped
from pgolf.model import GPT
from pgolf.optim import Optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, STEPS = 300, 20
TINY = {
    "model.num_layers": 4, "model.model_dim": 32, "model.num_heads": 2, "model.num_kv_heads": 1,
    "model.vocab_size": VOCAB, "model.mlp_mult": 2, "model.rope_dims": 8, "model.loop_start": 1, "model.loop_end": 2,
    "model.parallel_start_layer": 3, "model.xsa_last_n": 4,
    "train.steps": STEPS, "train.step_tokens": 256, "train.micro_batch": 128,
    "train.contexts": "16@0.25,32@0.6,64@1.0", "train.rewarm_steps": 4, "train.log_every": 3,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two training shards of random documents."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for index in range(2):
        tokens = random.integers(8, VOCAB, 6000)
        tokens[random.random(6000) < 0.03] = 1
        tokens[0] = 1
        shards.write_shard(folder / shards.shard_name(shards.TRAIN, index), tokens)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run from start to end, without interruption."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    go(data, run)
    torch.set_num_threads(threads)
    return run


def assignments(**changes):
    return [f"{key}={value}" for key, value in (TINY | {f"train.{k}": v for k, v in changes.items()}).items()]


def tiny(**changes):
    return config.override(recipes.get("demo"), assignments(**changes))


def go(data, run, resume=False, stop_after=None, **changes):
    pipeline.train(tiny(**changes), data, run, CPU, resume, stop_after)


def command(data, run, *more, **changes):
    sets = [word for text in assignments(**changes) for word in ("--set", text)]
    fixed = ["--recipe", "demo", "--data", str(data), "--out", str(run), "--device", "cpu"]
    return [sys.executable, "-m", "pgolf", "train", *fixed, *sets, *more]


def state_of(run):
    """(all tensors, plain state without the clock) of the newest checkpoint."""
    tensors, state = checkpoint.load(checkpoint.newest(run))
    return tensors, {key: value for key, value in state.items() if key not in ("elapsed", "config")}


def losses_of(run):
    """[(step, loss), ...] of metrics.jsonl."""
    return [(line["step"], line["loss"]) for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_run(one, other):
    """Weights, averages, momentum, Adam state, positions and every step's loss are the same to the bit."""
    (mine, my_state), (theirs, their_state) = state_of(one), state_of(other)
    assert mine.keys() == theirs.keys()
    assert {name.split(".")[0] for name in mine} == {"model", "average", "momentum", "adam"}
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different
    assert my_state == their_state
    assert losses_of(one) == losses_of(other)


def test_same_seed_same_bits(data, whole, tmp_path):
    go(data, tmp_path / "again")
    assert_same_run(whole, tmp_path / "again")
    assert [step for step, _ in losses_of(whole)] == list(range(STEPS))


def test_another_seed_another_run(data, whole, tmp_path):
    settings = config.override(tiny(), ["seed=43"])
    pipeline.train(settings, data, tmp_path / "other", CPU)
    assert not torch.equal(state_of(whole)[0]["model.qo_bank"], state_of(tmp_path / "other")[0]["model.qo_bank"])
    assert losses_of(whole) != losses_of(tmp_path / "other")


@pytest.mark.parametrize("stops", [(1,), (6,), (7, 13)])  # before, at and after a change of context (steps 6 and 13)
def test_stopped_and_resumed_is_the_same_run(data, whole, tmp_path, stops):
    run = tmp_path / "run"
    for count, stop in enumerate(stops):
        go(data, run, resume=count > 0, stop_after=stop)
        assert state_of(run)[1]["step"] == stop
        assert len(losses_of(run)) == stop
    go(data, run, resume=True)
    assert_same_run(whole, run)


def test_resuming_a_finished_run_changes_nothing(data, whole, tmp_path):
    run = tmp_path / "run"
    go(data, run)
    go(data, run, resume=True)
    assert_same_run(whole, run)


def test_resuming_a_finished_part_keeps_its_mode(data, tmp_path):
    """Before the recurrence starts: no step is made, so what the checkpoint says about it must stay."""
    run = tmp_path / "run"
    go(data, run, stop_after=3)
    before = state_of(run)[1]
    assert before["looping"] is False
    go(data, run, resume=True, stop_after=3)
    assert state_of(run)[1] == before


def test_metrics_written_after_the_checkpoint_are_replaced(data, whole, tmp_path):
    """A kill leaves loss lines of steps that no checkpoint holds; resuming makes those steps again, once."""
    run = tmp_path / "run"
    go(data, run, stop_after=7)
    with open(run / "metrics.jsonl", "a") as stream:
        for step in (7, 8):
            stream.write(json.dumps({"step": step, "elapsed": 0.5, "loss": 9.0}) + "\n")
        stream.write('{"step": 9, "el')  # cut in the middle of a line
    go(data, run, resume=True)
    assert_same_run(whole, run)


def test_death_between_log_lines_leaves_no_gap(data, whole, tmp_path, monkeypatch):
    """Checkpoints come between log lines too; the losses up to one must be on disk when it is."""
    run = tmp_path / "run"
    options = {"checkpoint_seconds": 1e-9, "log_every": 50}
    honest = training.Trainer.train_step

    def dies(trainer, fraction):
        if trainer.step == 7:
            raise MemoryError
        return honest(trainer, fraction)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(training.Trainer, "train_step", dies)
        go(data, run, **options)
    assert state_of(run)[1]["step"] == 7
    go(data, run, resume=True, **options)
    assert_same_run(whole, run)


def test_sigterm_saves_and_resuming_gives_the_same_bits(data, tmp_path):
    steps = 150
    run, reference = tmp_path / "run", tmp_path / "reference"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = command(data, run, steps=steps, log_every=1)
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        begun = time.monotonic()
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() - begun < 100, "no step was made"
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    stopped_at = state_of(run)[1]["step"]
    assert 0 < stopped_at < steps
    assert errors.splitlines()[-1].startswith(f"pgolf: stopped at step {stopped_at}")
    assert str(checkpoint.newest(run)) in errors and "--resume" in errors
    assert [step for step, _ in losses_of(run)] == list(range(stopped_at))

    resumed = subprocess.run([*words, "--resume"], env=environment, capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    go(data, reference, steps=steps, log_every=1)
    assert_same_run(reference, run)


def test_interrupt_saves_in_this_process_too(data, tmp_path, monkeypatch):
    """Ctrl-C between steps: Stopped says how to go on, and the old signal handlers are back."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    honest = training.Trainer.train_step

    def interrupted(trainer, fraction):
        if trainer.step == 4:
            signal.raise_signal(signal.SIGINT)
        return honest(trainer, fraction)

    monkeypatch.setattr(training.Trainer, "train_step", interrupted)
    with pytest.raises(Stopped, match="stopped at step 5"):
        go(data, tmp_path / "run")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert state_of(tmp_path / "run")[1]["step"] == 5


def test_warm_up_is_undone(data, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    made = []
    honest = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda *arguments: made.append(arguments) or honest(*arguments))
    go(data, run, warmup_steps=2)
    assert len(made) == STEPS + 2 * 4  # modes: (16, no), (32, no), (32, looped), (64, looped)
    assert_same_run(whole, run)


def test_context_recurrence_and_rewarming_happen_on_time(data, tmp_path, monkeypatch):
    """20 steps; at step s the fraction is s / 20. Context 16 up to 0.25, 32 up to 0.6, then 64; loops from 0.35."""
    rates, shown = [], []
    honest = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, scale, mu: rates.append((scale, mu)) or honest(self, scale, mu))
    settings = tiny(log_every=1, muon_momentum_steps=10)
    training.train(settings, shards.train_files(data), tmp_path / "run", CPU, progress=shown.append)
    assert [line.step for line in shown] == list(range(1, STEPS + 1))
    assert [line.context for line in shown] == [16] * 6 + [32] * 7 + [64] * 7
    assert [line.looping for line in shown] == [False] * 7 + [True] * 13
    rewarm = [1.0] * 6 + [0.25, 0.5, 0.75, 1, 1, 1, 1] + [0.25, 0.5, 0.75, 1, 1, 1, 1]
    curve = [min(1.0, max(0.1, (1 - step / 20) / 0.85)) for step in range(STEPS)]
    expected = [factor * scale for factor, scale in zip(rewarm, curve, strict=True)]
    assert [scale for scale, _ in rates] == pytest.approx(expected)
    assert [line.lr_scale for line in shown] == pytest.approx(expected)
    assert [mu for _, mu in rates] == pytest.approx([0.92 + 0.05 * min(1.0, step / 10) for step in range(STEPS)])


@pytest.mark.parametrize("log_every", [3, 50])
def test_undefined_loss_is_an_error(data, tmp_path, monkeypatch, log_every):
    """Also when no log line falls on the bad steps: such weights must not be saved as a result."""
    honest = GPT.train_loss
    calls = []

    def poisoned(self, *arguments):
        calls.append(None)
        loss = honest(self, *arguments)
        return loss * float("nan") if len(calls) > 2 * 4 else loss

    monkeypatch.setattr(GPT, "train_loss", poisoned)
    with pytest.raises(PgolfError, match=r"loss became nan .*train\.matrix_lr"):
        go(data, tmp_path / "run", log_every=log_every)
    assert not checkpoint.checkpoints(tmp_path / "run")


def test_existing_run_is_refused_and_kept(data, tmp_path):
    run = tmp_path / "run"
    go(data, run, stop_after=3)
    before = contents(run)
    with pytest.raises(PgolfError, match="already holds checkpoints; use --resume"):
        go(data, run)
    with pytest.raises(PgolfError, match="another configuration"):
        go(data, run, resume=True, matrix_lr=0.5)
    (run / "run.json").rename(tmp_path / "run.json")  # the checkpoint alone knows its configuration too
    with pytest.raises(PgolfError, match="another configuration"):
        training.train(tiny(matrix_lr=0.5), shards.train_files(data), run, CPU, resume=True)
    (tmp_path / "run.json").rename(run / "run.json")
    assert contents(run) == before


def test_resume_without_a_checkpoint(data, tmp_path):
    with pytest.raises(PgolfError, match="holds no checkpoint; train first, without --resume"):
        go(data, tmp_path / "run", resume=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "no state", "foreign state"])
def test_damaged_checkpoint_is_named(data, tmp_path, damage):
    run = tmp_path / "run"
    go(data, run, stop_after=2)
    path = checkpoint.newest(run)
    good = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "header":
        path.write_bytes(b"\xff" * 8 + good[8:])
    else:
        metadata = {"state": "{}"} if damage == "foreign state" else None
        safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata=metadata)
    before = contents(run)
    with pytest.raises(PgolfError) as caught:
        go(data, run, resume=True)
    assert str(path) in str(caught.value)
    after = contents(run)
    assert after.pop((run / "run.json").relative_to(run)) and before.pop((run / "run.json").relative_to(run))
    assert after == before


def test_older_checkpoint_serves_when_the_newest_is_deleted(data, whole, tmp_path):
    run = tmp_path / "run"
    go(data, run, stop_after=4)
    go(data, run, resume=True, stop_after=9)
    found = checkpoint.checkpoints(run)
    assert [path.name for path in found] == ["checkpoint-000004.safetensors", "checkpoint-000009.safetensors"]
    found[-1].unlink()
    go(data, run, resume=True)
    assert_same_run(whole, run)
    assert len(checkpoint.checkpoints(run)) == checkpoint.KEEP


def test_wallclock_schedule_ends_in_time(data, tmp_path):
    """Curves over seconds: the run stops at `seconds` less `reserve_seconds`, or earlier with stop_after."""
    run = tmp_path / "run"
    options = {"schedule_by": "wallclock", "seconds": 3.0, "reserve_seconds": 1.0, "steps": 100000, "log_every": 10}
    settings = tiny(**options)
    trainer = training.train(settings, shards.train_files(data), run, CPU, stop_after=0.5)
    assert 0.5 <= trainer.elapsed < 1.5 and trainer.context == 16  # a quarter of the schedule's two seconds
    trainer = training.train(settings, shards.train_files(data), run, CPU, resume=True)
    assert 2.0 <= trainer.elapsed < 3.0 and trainer.context == 64
    assert trainer.optimizer.adam.param_groups[0]["lr"] < 0.2 * settings.train.embed_lr
