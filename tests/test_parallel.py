"""Several ranks give the weights of one: torchrun with gloo on the CPU."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pgolf import checkpoint, cli
from pgolf.data import shards

# Width and batch are cut for time, and log lines moved; every other constant is the demo recipe's.
SMALL = {
    "model.model_dim": 48, "model.num_heads": 3, "model.num_kv_heads": 3, "model.vocab_size": 300,
    "train.step_tokens": 2048, "train.micro_batch": 1024, "train.log_every": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A shard long enough for 20 steps; its documents repeat a pattern, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    documents = [
        [1, *(8 + (np.arange(length) * 7 + random.integers(290)) % 290)] for length in random.integers(20, 400, 300)
    ]
    shards.write_shard(folder / shards.shard_name(shards.TRAIN, 0), np.concatenate(documents))
    return folder


def pgolf(command, data, run, ranks, settings, *more):
    """What a command of its own processes prints."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words = ["-m", "pgolf", command, "--recipe", "demo", "--device", "cpu", "--data", str(data), "--out", str(run)]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words, *more], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained ") == 1  # one rank speaks
    return done.stdout


def train(data, run, ranks, settings, *more):
    """The newest checkpoint's (tensors, state) of a run."""
    pgolf("train", data, run, ranks, settings, *more)
    return checkpoint.load(checkpoint.newest(run))


def losses_of(run):
    """The loss of each step, from metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20))
    return [line["loss"] for line in lines]


def farthest(one, other):
    """(largest relative L2 distance of any tensor, its name)."""
    assert one.keys() == other.keys()
    distances = {}
    for name, value in one.items():
        scale = max(float(value.double().norm()), 1e-12)
        distances[name] = float((value.double() - other[name].double()).norm()) / scale
    return max((distance, name) for name, distance in distances.items())


@pytest.mark.parametrize("curves", ["start", "whole"])
def test_two_ranks_train_the_weights_of_one(data, tmp_path, curves):
    """20 steps: the first of the recipe's, or a schedule of 20 with recurrence and both changes of context."""
    more = ["--stop-after", "20"] if curves == "start" else []
    settings = SMALL | ({} if curves == "start" else {"train.steps": 20})
    alone, alone_state = train(data, tmp_path / "one", 1, settings, *more)
    pair, pair_state = train(data, tmp_path / "two", 2, settings, *more)
    assert alone_state["step"] == pair_state["step"] == 20
    assert alone_state["loader"] == pair_state["loader"]
    assert alone_state["looping"] == pair_state["looping"] == (curves == "whole")
    weights = {name: value for name, value in alone.items() if name.startswith("model.")}
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    distance, name = farthest(alone, pair)
    assert distance < 1e-5, f"{name} differs by {distance:.2e}"
    # The loss of a step is that of all ranks, also of steps behind the last log line.
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-6)


@pytest.mark.parametrize("mode", ["record", "trellis"])
def test_two_ranks_do_the_whole_job(data, tmp_path, mode):
    """Train, quantize, pack and score under torchrun; without adaptation the score is one rank's."""
    random = np.random.default_rng(1)
    tokens = np.concatenate([[1, *random.integers(8, 290, length)] for length in (30, 12, 50, 9)])
    shards.write_shard(data / shards.shard_name(shards.VAL, 0), tokens)
    shards.write_shard(data / shards.shard_name(shards.VAL_BYTES, 0), (tokens != 1) * 2)
    settings = SMALL | {"train.steps": 2, "quantize.calibration_batches": 1, "ttt.prefix_docs": 2, "ttt.batch_size": 2}
    settings |= {"quantize.mode": mode, "quantize.passthrough": 1024, "quantize.tune_steps": 2}
    printed = pgolf("run", data, tmp_path / "run", 2, settings)
    assert printed.count("weights and code") == 1
    if mode == "trellis":
        assert len(json.loads((tmp_path / "run" / "quantize.json").read_text())["tuning_losses"]) == 2
    scores = json.loads((tmp_path / "run" / "score.json").read_text())
    assert set(scores) == {"weights", "artifact", "artifact with test-time training"}
    assert {score["targets"] for score in scores.values()} == {len(tokens) - 1}
    for options, stage in ((["--weights"], "weights"), ([], "artifact")):
        words = ["eval", str(tmp_path / "run"), "--data", str(data), "--device", "cpu", "--no-ttt", *options]
        assert cli.main(words) == 0
        alone = json.loads((tmp_path / "run" / "score.json").read_text())[stage]
        assert alone["bpb"] == pytest.approx(scores[stage]["bpb"], rel=1e-6)
