"""docs/scaling.md against the code: its tables are the script's, and the script's collectives are those of real runs.

As a program, under torchrun, it is one rank of such a run.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pgolf.train
from pgolf import checkpoint, config, parallel, recipes
from pgolf.data import shards
from pgolf.data.loader import Loader

ROOT = Path(__file__).resolve().parents[1]

# Without clipping the gradients are those of one process; everything else about the collectives is recipe record's.
SETTINGS = config.override(
    recipes.demo(),
    ["model.model_dim=48", "model.num_heads=3", "model.num_kv_heads=3", "model.vocab_size=300", "train.steps=3",
     "train.step_tokens=1024", "train.micro_batch=256", "train.log_every=2", "train.clip_scope=rank",
     "train.grad_clip=0"],
)  # fmt: skip


def load_script():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Reversed(Loader):
    """Each step's batches, the last one first."""

    def next_batch(self, context):
        if not self.batches:
            self.batches = [super(Reversed, self).next_batch(context) for _ in range(self.accumulation)]
        return self.batches.pop()

    batches = ()


def main(data, run):
    """Train, and write each collective's kind, bytes of the whole tensor, and whether what follows need not wait."""
    calls = []

    def record(kind, where, name, whole):
        call = getattr(where, name)

        def recorded(*tensors, **options):
            if tensors[whole].nbytes > 1:  # one byte: a barrier
                calls.append((kind, tensors[whole].nbytes, options.get("async_op", False)))
            return call(*tensors, **options)

        setattr(where, name, recorded)

    record("all_reduce", dist, "all_reduce", 0)
    record("reduce_scatter", parallel, "_reduce_scatter", 1)
    record("all_gather", parallel, "_all_gather", 0)
    if run.name == "reversed":
        pgolf.train.Loader = Reversed
    trainer = pgolf.train.train(SETTINGS, sorted(data.glob("*.bin")), run, parallel.start("cpu"))
    same = trainer.model.qo_bank.detach().clone()
    if dist.is_initialized():
        dist.broadcast(same, 0)
    assert torch.equal(same, trainer.model.qo_bank)  # all ranks hold the same weights, to the bit
    if parallel.rank() == 0:
        (run / "calls.json").write_text(json.dumps(calls))
    return parallel.leave(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function: number of processes, name of the run -> (calls of a rank, tensors of the last checkpoint)."""
    data = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    documents = [[1, *random.integers(8, 300, length)] for length in random.integers(20, 400, 40)]
    shards.write_shard(data / shards.shard_name(shards.TRAIN, 0), np.concatenate(documents))

    def result(ranks, name=""):
        run = data / (name or f"run{ranks}")
        if not run.exists():
            launch = [sys.executable]
            if ranks > 1:
                launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            words = [*launch, __file__, str(data), str(run)]
            done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stderr
        return json.loads((run / "calls.json").read_text()), checkpoint.load(checkpoint.newest(run))[0]

    return result


def test_the_document_has_the_scripts_tables():
    document = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    missing = [line for line in load_script().tables() if line not in document]
    assert not missing, "run benchmarks/scaling.py and put its tables into docs/scaling.md:\n" + "\n".join(missing)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_makes_the_collectives_of_the_plan(trained, ranks):
    script = load_script()
    model = script.shapes(SETTINGS.model)
    step = script.step_calls(model, ranks)
    plan = [*step, *script.log_calls(1), *step, *script.log_calls(1), *step]  # log lines: steps 1 and 2
    plan += [step[0], *script.log_calls(1), *script.checkpoint_calls(model, ranks), *script.end_calls(ranks)]
    calls, _ = trained(ranks)
    assert [(kind, size) for kind, size, _ in calls] == [(call.kind, call.size) for call in plan]
    # What docs/scaling.md says of overlap: the host waits for words on the CPU alone.
    assert [later for *_, later in calls] == [not call.host for call in plan]


def farthest(one, other):
    """(largest relative L2 distance of any tensor, its name)."""
    assert one.keys() == other.keys()
    norms = {name: max(float(value.double().norm()), 1e-30) for name, value in one.items()}
    return max(
        (float((value.double() - other[name].double()).norm()) / norms[name], name) for name, value in one.items()
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_the_weights_of_one(trained, ranks):
    """Weights, momentum and averages are one process's, up to what the order of a sum over four batches does.

    Ranks add the batches' gradients in another order. So does one process that is given a step's batches in reverse;
    Muon makes of one gradient's rounding to bfloat16 some thousandths of a weight.
    """
    alone, backwards, several = (tensors for _, tensors in (trained(1), trained(1, "reversed"), trained(ranks)))
    noise, _ = farthest(alone, backwards)
    distance, name = farthest(alone, several)
    assert 0 < noise < 0.01
    assert distance < 4 * noise, f"{name} differs by {distance:.2e}, by {noise:.2e} in another order"


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
