"""Bytes and predicted times of training steps on several GPUs: prints the tables of docs/scaling.md.

    python benchmarks/scaling.py

Needs no GPU and measures nothing: bytes come from the model's shapes, times from the constants below. Times are
milliseconds, sizes bytes.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from pgolf import recipes
from pgolf.config import ModelConfig
from pgolf.model import GPT
from pgolf.optim import Optimizer

NODE = 8  # GPUs

# One H100, 98,304 tokens, 2026-11-24 (docs/scaling.md says how).
MICRO_STEP = {"1024": 71.9, "2048, looped": 112.5}
OPTIMIZER = 2.6
MUON = {"qo_bank": 0.271, "kv_bank": 0.121, "mlp_up_bank": 0.397, "mlp_down_bank": 0.402}  # the README's operator table

# Assumptions.
NVLINK = 370e6  # bytes a millisecond, bus bandwidth inside a node
RAIL = 45e6  # a GPU's 400 Gb/s between nodes; rings enter a node through all eight
START, HOP = 0.020, 0.0025  # of a collective
COPY = 3.0e9  # bytes a millisecond, device memory
MUON_LEAST = 0.1  # of a bank, however few its slices
ADAM = 0.1  # of OPTIMIZER
FIXED = {"1024": 3.0, "2048, looped": 4.6}  # of MICRO_STEP, the same for any number of tokens


class Call(NamedTuple):
    """A collective; `size` is the whole tensor's, padding included."""

    what: str
    kind: str
    size: int
    host: bool = False  # of a CPU tensor, over gloo: no GPU waits for it

    def sent(self, ranks: int) -> int:
        """Bytes that a rank sends, and receives, in a ring."""
        return self.size * (2 if self.kind == "all_reduce" else 1) * (ranks - 1) // ranks

    def time(self, ranks: int) -> float:
        hops = (2 if self.kind == "all_reduce" else 1) * (ranks - 1)
        return START + HOP * hops + self.sent(ranks) / (NVLINK if ranks <= NODE else NODE * RAIL)


class Shapes(NamedTuple):
    """What the sizes follow from."""

    banks: dict[str, torch.Size]
    rest: int  # entries of all other parameters with a gradient

    def padded(self, name: str, ranks: int) -> int:
        """Entries of a bank whose slices are a multiple of the ranks."""
        slices, *matrix = self.banks[name]
        return -(-slices // ranks) * ranks * math.prod(matrix)


def shapes(config: ModelConfig) -> Shapes:
    """Of a model's parameters; the softcaps of evaluation have no gradient."""
    with torch.device("meta"):
        named = {name: p.shape for name, p in GPT(config).named_parameters()}
    banks = {name: named.pop(name) for name in Optimizer.BANKS}
    return Shapes(banks, sum(math.prod(shape) for name, shape in named.items() if not name.startswith("softcap")))


def step_calls(model: Shapes, ranks: int) -> list[Call]:
    """The collectives of one step with train.clip_scope=rank, in their order."""
    padded = {name: 4 * model.padded(name, ranks) for name in model.banks}
    return [
        Call("time and stopping", "all_reduce", 16, host=True),
        Call("other gradients", "all_reduce", 4 * model.rest),
        *(Call(f"gradients of {name}", "reduce_scatter", size) for name, size in padded.items()),
        *(Call(f"weights of {name}", "all_gather", size) for name, size in padded.items()),
    ]


def log_calls(steps: int) -> list[Call]:
    """A log line's, `steps` after the one before."""
    return [Call("losses", "all_reduce", 4 * steps)]


def checkpoint_calls(model: Shapes, ranks: int) -> list[Call]:
    """A checkpoint's: bfloat16 momentum."""
    return [Call(f"momentum of {name}", "all_gather", 2 * model.padded(name, ranks)) for name in model.banks]


def end_calls(ranks: int) -> list[Call]:
    """What the end of training compares."""
    return [Call("SHA-256 of all weights", "all_gather", 32 * ranks, host=True)]


class Plan(NamedTuple):
    """Ways to do better; the default is what the code does."""

    half: bool = False  # gradients travel as bfloat16, and the update's direction in place of the weights
    early: bool = False  # three quarters of the reduce-scatters under the last backward
    by_node: bool = False  # every node shares the banks among its own GPUs


class Times(NamedTuple):
    """Of the optimizer's part of a step."""

    compute: float
    network: float  # all collectives, overlapped or not
    total: float


def optimizer(model: Shapes, ranks: int, plan: Plan) -> Times:
    """One network queue and one compute queue, as the collectives are issued by `pgolf.optim.Optimizer.step`."""
    sharing = min(ranks, NODE) if plan.by_node else ranks
    calls = {call.what: call for call in step_calls(model, sharing)}
    width = 2 if plan.half else 4
    net = network = 0.0
    now = copies = OPTIMIZER - ADAM - sum(MUON.values())  # clipping and average

    def send(time: float, ready: float) -> float:
        """When a collective that may begin at `ready` has ended."""
        nonlocal net, network
        network += time
        net = max(net, ready) + time
        return net

    now, copies = now + 8 * model.rest / COPY, copies + 8 * model.rest / COPY
    mean = send(calls["other gradients"].time(ranks), now)
    arrived = {}
    for name, shape in model.banks.items():
        size = 4 * model.padded(name, sharing)
        copy = (size + 8 * math.prod(shape)) / COPY
        now, copies = now + copy, copies + copy
        size = size * width // 4
        time = calls[f"gradients of {name}"]._replace(size=size).time(sharing)
        if sharing < ranks:  # then each share is summed over the nodes
            others = ranks // sharing - 1
            time += START + 2 * others * (HOP + size / sharing / (others + 1) / RAIL)
        arrived[name] = send(time / 4 if plan.early else time, now)
    gathered = {}
    for name, shape in model.banks.items():
        size = 4 * model.padded(name, sharing)
        work = max(MUON_LEAST, MUON[name] * -(-shape[0] // sharing) / shape[0]) + (size + 8 * math.prod(shape)) / COPY
        now, copies = max(now, arrived[name]) + work, copies + work
        gathered[name] = send(calls[f"weights of {name}"]._replace(size=size * width // 4).time(sharing), now)
    work = 16 * model.rest / COPY + ADAM
    now, copies = max(now, mean) + work, copies + work
    for name, shape in model.banks.items():
        copy = 8 * math.prod(shape) / COPY
        now, copies = max(now, gathered[name]) + copy, copies + copy
    return Times(copies, network, now)


def micro_step(mode: str, tokens: int) -> float:
    return FIXED[mode] + (MICRO_STEP[mode] - FIXED[mode]) * tokens / recipes.record().train.micro_batch


def step(model: Shapes, mode: str, ranks: int, tokens: int, plan: Plan) -> tuple[float, float]:
    """(time of a step of `tokens`, one GPU's time for it over the ranks' time together: 1 is linear)."""
    settings = recipes.record().train
    total = micro_step(mode, tokens // ranks) + optimizer(model, ranks, plan).total
    alone = tokens // settings.micro_batch * MICRO_STEP[mode] + OPTIMIZER
    return total, alone / ranks / total


def table(*rows: tuple[object, ...]) -> Iterator[str]:
    for index, row in enumerate(rows):
        yield "| " + " | ".join(str(cell) for cell in row) + " |"
        if index == 0:
            yield "|" + "---|" * len(row)


def tables() -> Iterator[str]:
    """The lines of all tables of docs/scaling.md."""
    settings = recipes.record().train
    model = shapes(recipes.record().model)
    kinds = {"all_reduce": "all-reduce", "reduce_scatter": "reduce-scatter", "all_gather": "all-gather"}

    def cells(call: Call, when: str) -> tuple[object, ...]:
        return (
            call.what,
            kinds[call.kind] + (", CPU" if call.host else ""),
            f"{call.size:,}",
            f"{call.sent(NODE):,}",
            when,
        )

    step_s, checkpoint_s = step_calls(model, NODE), checkpoint_calls(model, NODE)
    yield from table(
        ("what", "collective", "bytes", "a rank sends", "when"),
        *(cells(call, "every step") for call in step_s),
        ("all of a step", "", f"{sum(c.size for c in step_s):,}", f"{sum(c.sent(NODE) for c in step_s):,}", ""),
        *(cells(call, f"every {settings.log_every} steps") for call in log_calls(settings.log_every)),
        (
            "momentum of the banks",
            "four all-gathers",
            f"{sum(c.size for c in checkpoint_s):,}",
            f"{sum(c.sent(NODE) for c in checkpoint_s):,}",
            f"every {settings.checkpoint_seconds:.0f} s",
        ),
        *(cells(call, "at the end") for call in end_calls(NODE)),
    )
    yield ""
    counts = (1, 2, 4, 8, 16)
    whole = 4 * sum(math.prod(shape) for shape in model.banks.values())
    lines = []
    for nodes in counts:
        ranks = nodes * NODE
        sizes = [4 * model.padded(name, ranks) for name in model.banks]
        slices = [-(-shape[0] // ranks) for shape in model.banks.values()]
        lines.append(
            (
                ranks,
                *(f"{n} of {shape[0]}" for n, shape in zip(slices[1:3], list(model.banks.values())[1:3], strict=True)),
                f"{sum(sizes):,}",
                f"{sum(sizes) / whole:.2f}",
            )
        )
    yield from table(
        ("ranks", "slices of qo, kv a rank", "of up, down", "padded banks, bytes", "over unpadded"), *lines
    )
    yield ""
    lines = []
    for nodes in counts:
        times = optimizer(model, nodes * NODE, Plan())
        exposed = times.total - times.compute
        lines.append((nodes * NODE, *(f"{x:.2f}" for x in (times.compute, times.network, exposed, times.total))))
    yield from table(("ranks", "compute", "network", "of it not overlapped", "optimizer, total"), *lines)
    yield ""
    for same in (True, False):
        lines = []
        for nodes in counts if same else counts[1:]:
            ranks = nodes * NODE
            tokens = settings.step_tokens * (1 if same else nodes)
            row: list[object] = [nodes, f"{tokens:,}", f"{tokens // ranks:,}"]
            for mode in MICRO_STEP:
                time, share = step(model, mode, ranks, tokens, Plan())
                row += [f"{time:.1f}", f"{tokens / time / 1e3:.1f}", f"{share:.2f}"]
            lines.append(tuple(row))
        heads = [head for mode in MICRO_STEP for head in (f"{mode}: ms", "M tokens/s", "of linear")]
        yield from table(("nodes", "tokens a step", "micro-batch", *heads), *lines)
        yield ""
    lines = []
    plans = [
        ("as it is", Plan()),
        ("1. bfloat16 gradients; directions gathered, not weights", Plan(half=True)),
        ("2. reduce-scatter under the last backward", Plan(early=True)),
        ("3. banks shared inside each node only", Plan(by_node=True)),
        ("all three", Plan(True, True, True)),
    ]
    for what, plan in plans:
        row = [what]
        for nodes in (1, 16):
            time, share = step(model, "1024", nodes * NODE, nodes * settings.step_tokens, plan)
            row += [f"{time:.1f}", f"{share:.3f}"]
        lines.append(tuple(row))
    yield from table(("what", "1 node, ms", "of linear", "16 nodes, ms", "of linear"), *lines)


if __name__ == "__main__":
    print("\n".join(tables()))
