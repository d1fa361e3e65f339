"""Ranks that die, ranks whose weights part ways, and mistakes that all ranks find: gloo processes on the CPU.

As a program it is one rank: what it does, and its folder.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pgolf.train
from pgolf import config, parallel, recipes, ttt
from pgolf.data import shards
from pgolf.errors import PgolfError
from pgolf.model import GPT

SMALL = [
    "model.model_dim=48", "model.num_heads=3", "model.num_kv_heads=3", "model.vocab_size=300",
    "train.step_tokens=1536", "train.micro_batch=512", "train.log_every=1",
]  # fmt: skip
SECONDS = 20  # in which ranks must have ended; Python's start on a busy machine is not among them


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    documents = [[1, *random.integers(8, 300, length)] for length in random.integers(20, 400, 40)]
    shards.write_shard(folder / shards.shard_name(shards.TRAIN, 0), np.concatenate(documents))
    return folder


def launch(ranks, words):
    """The processes of a group that no launcher watches over."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]


def ends(processes, timeout):
    """[(exit code, stderr)] of processes; none outlives this."""
    try:
        return [(process.communicate(timeout=timeout)[1], process.returncode)[::-1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_for(done):
    limit = time.monotonic() + 120
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.05)


def pgolf_lines(text):
    return [line for line in text.splitlines() if line.startswith("pgolf: ")]


@pytest.mark.parametrize("victim", [0, 2])
def test_training_ends_when_a_rank_is_killed(data, tmp_path, victim):
    words = ["-m", "pgolf", "train", "--recipe", "demo", "--device", "cpu", "--data", str(data)]
    words += ["--out", str(tmp_path / "run"), *(word for setting in SMALL for word in ("--set", setting))]
    ranks = launch(3, words)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
        ranks[victim].kill()
        found = ends(ranks, SECONDS)
    finally:
        for rank in ranks:
            rank.kill()
    assert found.pop(victim)[0] == -signal.SIGKILL
    assert [code for code, _ in found] == [2, 2], found
    assert [pgolf_lines(text) for _, text in found] == [[f"pgolf: {parallel.ENDED}"]] * 2
    assert all("Traceback" not in text for _, text in found)


def test_scoring_ends_when_a_rank_is_killed(tmp_path):
    """The others are in the middle of their shares, where they meet nobody."""
    ranks = launch(3, [__file__, "score", str(tmp_path)])
    try:
        wait_for(lambda: len(list(tmp_path.glob("scored-*"))) == 3)
        ranks[1].kill()
        found = ends(ranks, SECONDS)
    finally:
        for rank in ranks:
            rank.kill()
    assert [code for code, _ in found] == [2, -signal.SIGKILL, 2], found
    assert [pgolf_lines(found[rank][1]) for rank in (0, 2)] == [[f"pgolf: {parallel.ENDED}"]] * 2


@pytest.mark.parametrize("what", ["agree", "smallest", "barrier", "sum"])
def test_words_on_the_cpu_fail_when_a_rank_is_gone(tmp_path, what):
    """What the main thread sees where it comes before the watching one: here nobody watches."""
    alive, _ = ends(launch(2, [__file__, what, str(tmp_path)]), 60)
    assert alive[0] == 2 and parallel.ENDED in alive[1], alive


@pytest.mark.parametrize("what", ["same", "differ"])
def test_training_compares_the_ranks_weights(data, tmp_path, what):
    (tmp_path / "data").symlink_to(data)
    found = ends(launch(2, [__file__, what, str(tmp_path)]), 120)
    if what == "same":
        assert [code for code, _ in found] == [0, 0], found
    else:
        assert [code for code, _ in found] == [2, 2], found
        assert all("weights differ between ranks: not rank 0's bytes on rank 1 of 2" in text for _, text in found)


def test_a_global_phase_compares_the_ranks_weights(tmp_path):
    found = ends(launch(2, [__file__, "phase", str(tmp_path)]), 60)
    assert [code for code, _ in found] == [2, 2], found
    assert all("adapted weights differ between ranks" in text for _, text in found)


@pytest.mark.parametrize(
    "setting, message", [("train.nonsense=1", "train.nonsense"), ("train.step_tokens=8192", "the 3 ranks")]
)
def test_a_mistake_that_all_ranks_find_is_told_once(data, tmp_path, setting, message):
    """Before the ranks have met, and after."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "-m", "pgolf", "train"]
    words += ["--recipe", "demo", "--device", "cpu", "--data", str(data), "--out", str(tmp_path), "--set", setting]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    told = pgolf_lines(done.stderr)
    assert len(told) == 1 and message in told[0], done.stderr


def score(folder, seed, seconds):
    """Score, a batch in so many seconds, with the weights of `seed`."""

    def scored(place, documents):
        (folder / f"scored-{parallel.rank()}").touch()
        time.sleep(seconds)

    random = np.random.default_rng(0)
    tokens = np.concatenate([[1, *random.integers(8, 300, 40)] for _ in range(6)])
    settings = config.override(recipes.demo(), [*SMALL, "ttt.batch_size=1", "ttt.prefix_docs=3"])
    model = GPT(settings.model).initialize(seed)
    ttt.evaluate(model, tokens, np.ones(len(tokens)), settings.ttt, 0, on_batch=scored)


def train(folder, different):
    """Train three steps; the last rank's embedding may be one that its AdamW alone has moved."""
    honest = pgolf.train.Trainer.train_step

    def step(trainer, fraction):
        loss = honest(trainer, fraction)
        if different and trainer.step == 2 and parallel.rank() == 1:
            weight = trainer.model.tok_emb.weight.data
            weight[0, 0] = torch.nextafter(weight[0, 0], weight[0, 0] + 1)
        return loss

    pgolf.train.Trainer.train_step = step
    settings = config.override(recipes.demo(), [*SMALL, "train.steps=3", "train.step_tokens=1024"])
    pgolf.train.train(settings, sorted((folder / "data").glob("*.bin")), folder / "run", parallel.start("cpu"))


def words(what):
    """Rank 1 ends after the first word, without a word."""
    dist.init_process_group("gloo")
    send = {
        "agree": lambda: parallel.agree(1.0, False),
        "smallest": lambda: parallel.smallest(1.0),
        "barrier": parallel.barrier,
        "sum": lambda: parallel.sum_(torch.ones(100)),
    }[what]
    send()
    if parallel.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    send()


def main(what, folder):
    try:
        if what in ("score", "phase"):
            parallel.start("cpu")
            score(folder, *((0, 600) if what == "score" else (parallel.rank(), 0)))
        elif what in ("same", "differ"):
            train(folder, what == "differ")
        else:
            words(what)
    except PgolfError as error:
        parallel.complain(str(error))
        return parallel.leave(2)
    return parallel.leave(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
