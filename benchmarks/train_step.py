"""Tokens a second of a training step in each of a recipe's modes, on made-up documents: nothing to download.

    python benchmarks/train_step.py [--recipe record] [--micro-steps 8] [--set KEY=VALUE ...]

A step is some micro-steps (forward and backward of a micro-batch) and the optimizer with the average of the weights. On
a GPU times are those of CUDA events; the best of three steps counts. Documents have random tokens and lengths around
660 tokens (log-normal): speed depends on nothing else.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pgolf import config, doctor, recipes, schedule, train
from pgolf.data import shards
from pgolf.data.tokenizer import BOS
from pgolf.model import flops_per_token

STEPS = 3


def made_up_shard(folder: Path, tokens: int, vocabulary: int) -> None:
    """One training shard."""
    random = np.random.default_rng(0)
    ids = random.integers(8, vocabulary, tokens)
    lengths = np.maximum(20, random.lognormal(6.0, 1.0, tokens // 20)).astype(np.int64)
    starts = lengths.cumsum()
    ids[starts[starts < tokens]] = BOS
    ids[0] = BOS
    shards.write_shard(folder / shards.shard_name(shards.TRAIN, 0), ids)


def clock(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Two calls around the work: the first begins, what it returns ends it and gives seconds."""

    def begin() -> Callable[[], float]:
        if device.type != "cuda":
            started = time.perf_counter()
            return lambda: time.perf_counter() - started
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()

        def end() -> float:
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / 1e3

        return end

    return begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="record")
    parser.add_argument("--micro-steps", type=int, default=8, help="in one step")
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="KEY=VALUE")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    settings = config.override(recipes.get(options.recipe), options.assignments)
    tokens = settings.train.micro_batch
    peak = doctor.peak_flops(device)
    on_gpu = device.type == "cuda"
    print(torch.cuda.get_device_name(device) if on_gpu else device, f"torch {torch.__version__}")
    heads = (
        ("first, s", 10),
        ("micro, ms", 11),
        ("optimizer, ms", 15),
        ("Mtok/s", 9),
        ("of peak", 9),
        ("reserved MiB", 14),
    )
    print(f"{'mode':14}" + "".join(f"{head:>{width}}" for head, width in heads))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_up_shard(folder, max(8_000_000, 2 * tokens) if on_gpu else 40 * tokens, settings.model.vocab_size)
        trainer = train.Trainer(settings, shards.train_files(folder), folder, device)
        begin = clock(device)
        for context, looping in schedule.modes(settings.train):
            trainer.context, trainer.model.looping = context, looping and settings.model.num_loops > 0
            end = begin()
            trainer.micro_step()
            first = end()
            times = []
            for _ in range(STEPS + 1):  # the first makes the optimizer's state
                whole, part = begin(), begin()
                for _ in range(options.micro_steps):
                    trainer.micro_step()
                micro = part() / options.micro_steps
                trainer.optimizer.step(1e-3, settings.train.muon_momentum_start)
                trainer.optimizer.update_average()
                times.append((whole(), micro))
            total, micro = min(times[1:])
            rate = options.micro_steps * tokens / total
            share = (
                f"{rate * flops_per_token(settings.model, trainer.model.looping, context) / peak:.1%}" if peak else ""
            )
            memory = f"{torch.cuda.max_memory_reserved() / 2**20:,.0f}" if on_gpu else ""
            mode = f"{context}{' looped' if trainer.model.looping else ''}"
            rest = total - options.micro_steps * micro
            print(f"{mode:14}{first:10.2f}{micro * 1e3:11.2f}{rest * 1e3:15.2f}{rate / 1e6:9.4f}{share:>9}{memory:>14}")
        trainer.loader.close()


if __name__ == "__main__":
    main()
