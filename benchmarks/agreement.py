"""Whether the fast path computes the same model: gradients of one micro-batch by kernels and by PyTorch.

    python benchmarks/agreement.py [--recipe duel | --run RUN] [--data DIR] [--tokens 16384] [--set KEY=VALUE ...]
    python benchmarks/agreement.py --losses RUN_A RUN_B

The gradients of each parameter (each matrix of a bank) are computed by (a) pgolf's kernels in bfloat16, in a CUDA graph
as in training, (b) PyTorch's operators in bfloat16, its own attention included, and (c) the same in float32. The error
of (a) and (b) is the norm of the difference to (c) over the norm of (c). Both round to bfloat16; kernels that compute
the same model are no farther from (c) than PyTorch. Weights are those of a run's newest checkpoint, or the recipe's
initial ones with noise: at their zeros most parameters would get no gradient. Documents are those of `--data`, or made
up. On a CPU (a) is (b).

`--losses` compares the mean loss of the last common steps of two runs, of their folders or metrics.jsonl.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from train_step import made_up_shard

from pgolf import checkpoint, config, recipes, schedule
from pgolf.config import Config
from pgolf.data import shards
from pgolf.data.loader import Batch, Loader
from pgolf.errors import PgolfError
from pgolf.microstep import EagerMicroStep, GraphedMicroStep
from pgolf.model import GPT
from pgolf.ops import _native, attention

NOISE = 0.02  # standard deviation
LAST = 50  # steps whose losses are compared


class Start(NamedTuple):
    """Where in a run the gradients are taken."""

    config: Config
    model: GPT
    context: int  # tokens


def from_recipe(settings: Config) -> Start:
    """Initial weights with noise, in the mode that a run ends in."""
    model = GPT(settings.model).initialize(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=NOISE)
    context, looping = schedule.modes(settings.train)[-1]
    model.looping = looping and settings.model.num_loops > 0
    return Start(settings, model, context)


def from_run(run: Path) -> Start:
    """Weights and mode of a run's newest checkpoint."""
    tensors, state = checkpoint.load(checkpoint.newest(run))
    settings: Config = config.from_dict(state["config"])
    model = GPT(settings.model)
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    model.load_state_dict(weights)
    model.looping = bool(state["looping"])
    return Start(settings, model, state["context"])


def batch_of(start: Start, data: Path | None, tokens: int) -> Batch:
    """The first micro-batch of `tokens` tokens."""
    vocabulary = start.config.model.vocab_size
    with tempfile.TemporaryDirectory() as name:
        if data is None:
            made_up_shard(Path(name), 8 * tokens, vocabulary)
        with Loader(shards.train_files(data or Path(name)), 0, 1, tokens, tokens, vocabulary) as loader:
            return loader.next_batch(start.context)


def gradients(start: Start, batch: Batch, dtype: torch.dtype, graphs: bool) -> tuple[float, dict[str, Tensor]]:
    """(loss in nats, gradient of every parameter, those of a bank matrix by matrix)."""
    model = start.model
    device = model.qo_bank.device
    model.dtype = dtype
    micro_step = (
        GraphedMicroStep(model.train_loss, device, model.parameters())
        if graphs
        else EagerMicroStep(model.train_loss, device)
    )
    loss = float(micro_step(batch, start.context, model.looping))
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if parameter.dim() == 3 and name.endswith("_bank"):
            found |= {f"{name}[{i}]": part for i, part in enumerate(parameter.grad.clone())}
        else:
            found[name] = parameter.grad.clone()
    model.zero_grad(set_to_none=True)
    return loss, found


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """(relative error, cosine) of every parameter whose exact gradient is not zero."""
    table = {}
    for name, reference in exact.items():
        mine, reference = found[name].double(), reference.double()
        size = reference.norm()
        if size > 0:
            cosine = (mine * reference).sum() / (mine.norm() * size).clamp_min(1e-300)
            table[name] = float((mine - reference).norm() / size), float(cosine)
    return table


def compare(start: Start, batch: Batch, worst: int) -> None:
    """Print the table."""
    device = start.model.qo_bank.device
    on_gpu = device.type == "cuda"
    print(torch.cuda.get_device_name(device) if on_gpu else "CPU", f"torch {torch.__version__}")
    torch.set_float32_matmul_precision("highest")
    kernels = on_gpu and _native.available(device)
    fast_loss, fast = gradients(start, batch, torch.bfloat16, graphs=kernels)
    attention.choose("sdpa")
    with _native.forced("none"):
        plain_loss, plain = gradients(start, batch, torch.bfloat16, graphs=False)
        exact_loss, exact = gradients(start, batch, torch.float32, graphs=False)
    print(
        f"{batch.inputs.shape[1]:,} tokens, context {start.context}{' looped' if start.model.looping else ''}, "
        f"{'kernels in a CUDA graph' if kernels else 'no kernels here'}\n"
        f"loss: kernels {fast_loss:.6f}, PyTorch bfloat16 {plain_loss:.6f}, float32 {exact_loss:.6f}"
    )
    mine, theirs = errors(fast, exact), errors(plain, exact)
    if not mine:
        raise PgolfError("no parameter has a gradient; choose a run with --run or another recipe")
    print(f"{'gradient of':34}{'kernels':>11}{'cosine':>11}{'PyTorch':>11}{'cosine':>11}{'ratio':>8}")

    def line(name: str, one: tuple[float, float], other: tuple[float, float]) -> str:
        ratio = f"{one[0] / other[0]:8.2f}" if other[0] else f"{'-':>8}"
        return f"{name:34}{one[0]:11.2e}{one[1]:11.6f}{other[0]:11.2e}{other[1]:11.6f}{ratio}"

    for name in sorted(mine, key=lambda name: -mine[name][0])[:worst]:
        print(line(name, mine[name], theirs[name]))
    medians = [tuple(map(statistics.median, zip(*table.values(), strict=True))) for table in (mine, theirs)]
    print(line(f"median of {len(mine)}", *medians))
    print(f"kernels/PyTorch error ratio {medians[0][0] / medians[1][0]:.3f}")


def losses_of(run: Path) -> dict[int, float]:
    """Loss of every step in metrics.jsonl."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PgolfError(f"{path} holds no losses ({error}); give the folder of a run") from error


def compare_losses(runs: list[Path]) -> None:
    """Print the mean losses of two runs' last common steps, and their difference."""
    one, other = map(losses_of, runs)
    steps = sorted(one.keys() & other.keys())[-LAST:]
    if not steps:
        raise PgolfError(f"{runs[0]} and {runs[1]} have no step in common; train them longer")
    means = [statistics.fmean(losses[step] for step in steps) for losses in (one, other)]
    print(f"mean loss of steps {steps[0]} to {steps[-1]}, {len(steps)} of both")
    for run, mean in zip(runs, means, strict=True):
        print(f"{mean:10.5f}  {run}")
    print(f"{means[1] - means[0]:+10.5f}  difference")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", default="duel")
    source.add_argument("--run", type=Path, metavar="DIR", help="weights and mode of its newest checkpoint")
    source.add_argument("--losses", type=Path, nargs=2, metavar="RUN", help="compare two runs' losses")
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="KEY=VALUE")
    parser.add_argument("--data", type=Path, metavar="DIR", help="shards to take the documents from")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the micro-batch")
    parser.add_argument("--worst", type=int, default=12, help="parameters to list")
    options = parser.parse_args()
    try:
        if options.losses:
            compare_losses(options.losses)
            return 0
        if options.run and options.assignments:
            raise PgolfError("--set changes a recipe; a run has its own configuration")
        settings = config.override(recipes.get(options.recipe), options.assignments)
        start = from_run(options.run) if options.run else from_recipe(settings)
        if torch.cuda.is_available():
            start.model.to(torch.device("cuda", 0))
        compare(start, batch_of(start, options.data, options.tokens), options.worst)
        return 0
    except torch.OutOfMemoryError:
        print(f"agreement: {options.tokens:,} tokens do not fit the GPU in float32; use --tokens", file=sys.stderr)
    except PgolfError as error:
        print(f"agreement: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
