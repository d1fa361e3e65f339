"""Checkpoints written while training goes on: what they hold, in which order, and what a kill or a full disk leaves."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import safetensors.torch
import torch

from pgolf import checkpoint
from pgolf.data import shards
from pgolf.errors import PgolfError

CPU = torch.device("cpu")


@pytest.fixture
def gate(monkeypatch):
    """Writes wait for this event."""
    event = threading.Event()
    honest = safetensors.torch.save_file

    def waits(*arguments, **options):
        assert event.wait(60)
        honest(*arguments, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", waits)
    yield event
    event.set()


@pytest.fixture
def full_disk(monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def state(device=CPU):
    """Tensors of every type and rank that training keeps."""
    torch.manual_seed(0)
    tensors = {
        "bank": torch.randn(3, 5, 7),
        "momentum": torch.randn(5, 3).bfloat16().T,
        "scalar": torch.tensor(3.5),
        "odd": torch.randn(9).bfloat16(),
        "count": torch.tensor([1 << 40]),
    }
    return {name: value.to(device) for name, value in tensors.items()}


def assert_holds(path, tensors, step):
    loaded, plain = checkpoint.load(path)
    assert plain == {"step": step}
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value.cpu()), name


def advance_until_it_fails(writer):
    """As a training loop does; give up after a minute."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        writer.advance()
        time.sleep(0.001)


def test_a_checkpoint_is_of_the_moment_it_was_begun(tmp_path, gate):
    """Later steps change the tensors in place, and what the state's values refer to, before anything is written."""
    writer, tensors, plain = checkpoint.Writer(tmp_path, CPU), state(), {"step": 1}
    writer.save(1, tensors, plain)
    plain["step"] = 2
    for value in tensors.values():
        value.mul_(2)
    assert not checkpoint.checkpoints(tmp_path)
    gate.set()
    writer.wait()
    assert_holds(checkpoint.path_of(tmp_path, 1), state(), 1)
    writer.close()


def test_saves_in_quick_succession_are_each_whole(tmp_path):
    """Three share the memory of their copies; each waits for the one before, and the newest two stay."""
    writer, tensors = checkpoint.Writer(tmp_path, CPU), state()
    for step in (1, 2, 3):
        tensors["bank"].fill_(step)
        writer.save(step, tensors, {"step": step})
    writer.close()
    assert checkpoint.checkpoints(tmp_path) == [checkpoint.path_of(tmp_path, step) for step in (2, 3)]
    for step in (2, 3):
        expected = state()
        expected["bank"].fill_(step)
        assert_holds(checkpoint.path_of(tmp_path, step), expected, step)


def test_tensors_may_change_from_one_checkpoint_to_the_next(tmp_path):
    writer, tensors = checkpoint.Writer(tmp_path, CPU), state()
    writer.save(1, tensors, {"step": 1})
    tensors = {"bank": torch.ones(2, 2), "momentum": tensors["momentum"].float(), "new": torch.zeros(1)}
    writer.save(2, tensors, {"step": 2})
    writer.close()
    assert_holds(checkpoint.path_of(tmp_path, 2), tensors, 2)


@pytest.mark.parametrize("call", ["wait", "save", "advance"])
def test_a_full_disk_is_told_by_the_next_call(tmp_path, full_disk, call):
    writer = checkpoint.Writer(tmp_path, CPU)
    writer.save(1, state(), {"step": 1})
    path = checkpoint.path_of(tmp_path, 1)
    with pytest.raises(PgolfError, match=f"cannot write {path}: No space left on device; free space"):
        if call == "save":
            writer.save(2, state(), {"step": 2})
        else:
            advance_until_it_fails(writer) if call == "advance" else writer.wait()
    writer.close()
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_behind_is_removed(tmp_path):
    """An interrupted write leaves a file under a temporary name, of a process that is gone."""
    left = tmp_path / ".checkpoint-000001.safetensors.1.tmp"
    left.write_bytes(b"half of it")
    assert not checkpoint.checkpoints(tmp_path)
    writer = checkpoint.Writer(tmp_path, CPU)
    writer.save(2, state(), {"step": 2})
    writer.close()
    assert list(tmp_path.iterdir()) == [checkpoint.path_of(tmp_path, 2)]


def test_kill_9_loses_only_what_came_after_the_last_checkpoint(tmp_path):
    """Checkpoints after every step; a resumed run ends in the weights and losses of one that was never killed."""
    random = np.random.default_rng(0)
    tokens = random.integers(8, 300, 30000)
    tokens[::50] = 1
    (tmp_path / "data").mkdir()
    shards.write_shard(tmp_path / "data" / shards.shard_name(shards.TRAIN, 0), tokens)
    sets = {
        "model.model_dim": 32, "model.num_heads": 2, "model.num_kv_heads": 1, "model.vocab_size": 300,
        "train.steps": 60, "train.step_tokens": 256, "train.micro_batch": 256, "train.contexts": "32@0.5,64@1.0",
        "train.checkpoint_seconds": 1e-9,
    }  # fmt: skip

    def begin(name, *more):
        words = ["--recipe", "demo", "--device", "cpu", "--data", tmp_path / "data", "--out", tmp_path / name, *more]
        words += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "pgolf", "train", *map(str, words)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(process):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors

    def result(name):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        tensors, _ = checkpoint.load(checkpoint.newest(tmp_path / name))
        return tensors, [(line["step"], line["loss"]) for line in lines]

    process = begin("killed")
    try:
        limit = time.monotonic() + 100
        while len(checkpoint.checkpoints(tmp_path / "killed")) < 2:
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    _, kept = checkpoint.load(checkpoint.newest(tmp_path / "killed"))
    assert 1 <= kept["step"] < 60
    made = result("killed")[1]  # all losses up to the checkpoint were on the disk before it
    assert [step for step, _ in made[: kept["step"]]] == list(range(kept["step"]))
    finish(begin("killed", "--resume"))
    finish(begin("whole"))
    (mine, my_losses), (theirs, their_losses) = result("killed"), result("whole")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert my_losses == their_losses and len(my_losses) == 60
    assert not list((tmp_path / "killed").glob(".*"))


@pytest.mark.gpu
def test_a_gpu_goes_on_while_its_copies_are_written(tmp_path):
    """Tensors change behind copies that are still queued, and a graph is captured while they are written."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    device = torch.device("cuda", 0)
    writer, tensors = checkpoint.Writer(tmp_path, device), state(device)
    tensors["large"] = torch.ones(64 << 20, device=device)  # 256 MiB
    before = {name: value.cpu() for name, value in tensors.items()}
    for step in (1, 2):
        torch.cuda._sleep(500_000_000)  # cycles: the copies wait for it
        writer.save(step, tensors, {"step": step})
        assert step == 1 or not writer._copied.query()  # the second reuses the pinned memory: it waits for nothing
        for value in tensors.values():
            value.mul_(2)
        torch.cuda.synchronize()
        assert not checkpoint.path_of(tmp_path, step).exists()
        writer.advance()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):  # while the thread writes
            tensors["bank"].add_(1)
        writer.wait()
        assert_holds(checkpoint.path_of(tmp_path, step), before, step)
        for name, value in tensors.items():
            value.copy_(before[name])
    assert writer._host["large"].is_pinned()
    writer.close()
