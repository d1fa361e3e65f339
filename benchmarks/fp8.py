"""Whether FP8 would pay: the recipe's large products in bfloat16 and in e4m3, and what making the operands costs.

    python benchmarks/fp8.py [--micro-step-ms MS] [--tokens 98304] [--loss [--recipe duel] [--data DIR] [--steps 60]]

Products by torch.mm and torch._scaled_mm (one scale a tensor, one a row; fast accumulation; bfloat16 output), pgolf's
fused bfloat16 kernels beside them, which do more than the product; median milliseconds of replayed CUDA graphs, the
cache filled with other data before each. Errors are relative to float32, on Gaussian data. An operand is made by a pass
for the largest magnitudes, one that scales and one that rounds, or by the epilogue of the kernel that writes it anyway
and then costs one byte an entry more (the bfloat16 entries stay: the gradients of weights need them, since FP8 takes
both operands with tokens along their rows and would need transposed copies). No row's scale is known inside an
epilogue: that case means scales from earlier steps. Weights are rounded once a step, which is left out.

`--loss` trains the recipe's model in small batches twice from one seed: in bfloat16, and with the operands of both
forward products of every MLP rounded to e4m3 with a scale a row, their gradients passed straight through.
"""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from train_step import made_up_shard

from pgolf import config, layers, recipes, train
from pgolf.data import shards
from pgolf.errors import PgolfError
from pgolf.ops import _native
from pgolf.ops import mlp as mlp_ops
from pgolf.ops.cross_entropy import cross_entropy
from pgolf.testing.clock import copy_bandwidth, graphed, measure

DIM, FEATURES, VOCABULARY = 512, 2048, 8192
LAYERS = 17  # executed in a micro-step with recurrence
LARGEST = 448.0  # of e4m3
REPEATS = 20
ROWS = 4096  # of the products whose errors are measured
DEVICE = torch.device("cuda", 0)


class Product(NamedTuple):
    """left [tokens, inner] times right [inner, outer], so many times a micro-step."""

    name: str
    left: str
    inner: int
    outer: int
    times: int


PRODUCTS = (
    Product("up", "x", DIM, FEATURES, LAYERS),
    Product("down", "hidden", FEATURES, DIM, LAYERS),
    Product("gradient of hidden", "dY", DIM, FEATURES, LAYERS),
    Product("gradient of x", "dU", FEATURES, DIM, LAYERS),
    Product("head", "h", DIM, VOCABULARY, 1),
    Product("gradient of h", "dZ", VOCABULARY, DIM, 1),
)
WAYS = ("bfloat16", "FP8 tensor", "FP8 row")


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def rounded(x: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """x [M, K] in e4m3 and its scale, float32: [M, 1], or 0-dim where rows is false."""
    largest = torch.linalg.vector_norm(x, ord=math.inf, dim=1 if rows else (0, 1), keepdim=True)
    inverse = LARGEST / largest.clamp_min(1e-30)
    scale = inverse.float().reciprocal()
    return (x * inverse).to(torch.float8_e4m3fn), scale if rows else scale.reshape(())


def product(way: str, left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """A call that gives left [M, K] times right [N, K] transposed, in bfloat16; operands are made here, not in it."""
    if way == "bfloat16":
        return lambda: torch.mm(left, right.t())
    (a, a_scale), (b, b_scale) = (rounded(x, way == "FP8 row") for x in (left, right))
    scales = {"scale_a": a_scale, "scale_b": b_scale.t() if b_scale.dim() else b_scale}
    return lambda: torch._scaled_mm(a, b.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def error(way: str, left: Tensor, right: Tensor) -> float:
    """Norm of the difference between a product and float32's, over the norm of the latter."""
    exact = left.float() @ right.float().t()
    return float((product(way, left, right)().float() - exact).norm() / exact.norm())


class Clock:
    """Milliseconds of cases, and why those that cannot run here are absent."""

    def __init__(self) -> None:
        self.absent: list[str] = []

    def tried(self, case: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, None where PyTorch refuses."""
        try:
            return make()
        except (RuntimeError, ValueError) as error:
            self.absent.append(f"{case}: {str(error).splitlines()[0]}")
            return None

    def time(self, case: str, make: Callable[[], Callable[[], Any]]) -> float | None:
        """Median of the call that `make` gives."""

        def run() -> float:
            call = make()
            call()  # a call that cannot run must fail before its capture
            torch.cuda.synchronize()
            return 1e3 * measure(graphed(call), DEVICE, REPEATS).p50

        return self.tried(case, run)


def cell(value: float | None, form: str) -> str:
    width = int(form.split(".")[0])
    return f"{'absent':>{width}}" if value is None else f"{value:{form}}"


def time_products(clock: Clock, tokens: int) -> dict[tuple[str, str], float | None]:
    """Print times and errors of all products; returns the times."""
    print(f"{'product, ms':22}{'K':>6}{'N':>6}" + "".join(f"{way:>12}" for way in WAYS) + "   error of each")
    times: dict[tuple[str, str], float | None] = {}
    for name, _, inner, outer, _ in PRODUCTS:
        left, right = gaussian(tokens, inner), gaussian(outer, inner)
        few = left[:ROWS].contiguous()
        errors = []
        for way in WAYS:
            times[name, way] = clock.time(f"{name}, {way}", partial(product, way, left, right))
            errors.append(clock.tried(f"error of {name}, {way}", partial(error, way, few, right)))
        cells = "".join(cell(times[name, way], "12.3f") for way in WAYS)
        print(f"{name:22}{inner:6}{outer:6}{cells}   " + "".join(cell(e, "10.1e") for e in errors), flush=True)
    return times


def time_kernels(clock: Clock, tokens: int) -> None:
    """Print the times of pgolf's fused kernels."""
    x, grad = gaussian(tokens, DIM), gaussian(tokens, DIM)
    up, down = gaussian(FEATURES, DIM) / DIM**0.5, gaussian(DIM, FEATURES) / FEATURES**0.5
    embedding, targets = gaussian(VOCABULARY, DIM), torch.randint(VOCABULARY, (tokens,), device=DEVICE)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, up, down)]
    h, table = (tensor.detach().requires_grad_() for tensor in (x, embedding))

    def gradient_of_hidden() -> Callable[[], Any]:
        hidden, signs = mlp_ops.mlp_up_op(x, up)
        down_t = down.t().contiguous()
        return lambda: mlp_ops.mlp_grad_op(grad, down_t, hidden, signs)

    cases: dict[str, Callable[[], Callable[[], Any]]] = {
        "up and activation": lambda: lambda: mlp_ops.mlp_up_op(x, up),
        "gradient of hidden, through the activation": gradient_of_hidden,
        "MLP, forward": lambda: lambda: mlp_ops.mlp(x, up, down),
        "MLP, forward and all gradients": lambda: lambda: torch.autograd.grad(mlp_ops.mlp(*leaves), leaves, grad),
        "head, loss and both gradients": lambda: (
            lambda: torch.autograd.grad(cross_entropy(h, table, targets), (h, table))
        ),
    }
    print("pgolf's kernels, ms")
    for name, make in cases.items():
        print(f"{name:46}{cell(clock.time(name, make), '12.3f')}", flush=True)


def time_operands(clock: Clock, tokens: int) -> dict[str, tuple[float | None, float]]:
    """Print what operands cost: {name: (ms of separate passes, ms of the epilogue's additional bytes)}."""
    rate = copy_bandwidth(DEVICE)
    print(f"{'operand, ms':22}{'width':>6}{'per tensor':>12}{'per row':>12}{'epilogue':>12}   ({rate / 1e12:.2f} TB/s)")
    costs: dict[str, tuple[float | None, float]] = {}
    for _, name, width, _, _ in PRODUCTS:
        x = gaussian(tokens, width)
        calls = (partial(partial, rounded, x, rows) for rows in (False, True))
        per_tensor, per_row = (clock.time(f"{name} in FP8", make) for make in calls)
        passes = [ms for ms in (per_tensor, per_row) if ms is not None]
        costs[name] = min(passes, default=None), 1e3 * tokens * width / rate
        cells = cell(per_tensor, "12.3f") + cell(per_row, "12.3f") + cell(costs[name][1], "12.3f")
        print(f"{name:22}{width:6}{cells}", flush=True)
    return costs


def savings(
    times: dict[tuple[str, str], float | None], costs: dict[str, tuple[float | None, float]]
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds saved a micro-step by product: operands free, in an epilogue's bytes, in separate passes.

    A product that FP8 does not make faster stays in bfloat16 and saves nothing.
    """
    table = {}
    for name, left, _, _, count in PRODUCTS:
        plain, *ways = (times[name, way] for way in WAYS)
        usable = [ms for ms in ways if ms is not None]
        if plain is None or not usable:
            continue
        passes, epilogue = costs[left]
        gain = plain - min(usable)
        separate = 0.0 if passes is None else gain - passes
        table[name] = count * max(0.0, gain), count * max(0.0, gain - epilogue), count * max(0.0, separate)
    return table


def print_savings(table: dict[str, tuple[float, float, float]], micro_step: float | None) -> None:
    heads = ("operands free", "epilogue", "separate")
    print(f"{f'saved, ms a micro-step of {LAYERS} layers':40}" + "".join(f"{head:>15}" for head in heads))
    for name, row in table.items():
        print(f"{name:40}" + "".join(f"{ms:15.2f}" for ms in row))
    total = [sum(row[way] for row in table.values()) for way in range(len(heads))]
    print(f"{'all':40}" + "".join(f"{ms:15.2f}" for ms in total))
    if micro_step is not None:
        print(f"{f'of {micro_step:.1f} ms':40}" + "".join(f"{ms / micro_step:15.1%}" for ms in total))


class RoundStraightThrough(torch.autograd.Function):
    """x rounded to e4m3 with a scale for each row of the last dimension; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        values, scale = rounded(x.reshape(-1, x.shape[-1]), rows=True)
        return (values.float() * scale).to(x.dtype).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def plain_mlp(x: Tensor, up: Tensor, down: Tensor, operand: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """The MLP in PyTorch's operators, each operand of its products as `operand` makes it."""
    hidden = F.leaky_relu(F.linear(operand(x), operand(up)), 0.5).square()
    return F.linear(operand(hidden), operand(down))


def rounded_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return plain_mlp(x, up, down, RoundStraightThrough.apply)


def curve(settings: config.Config, data: Path, device: torch.device, mlp: Callable[..., Tensor]) -> list[float]:
    """Losses of a training whose MLPs are `mlp`, one a step."""
    trained = layers.fused_mlp
    layers.fused_mlp = mlp
    try:
        with tempfile.TemporaryDirectory() as run:
            trainer = train.Trainer(settings, shards.train_files(data), Path(run), device)
            losses = [trainer.train_step(trainer.fraction(0.0)) for _ in range(settings.train.steps)]
            trainer.close()
        return torch.stack(losses).tolist()
    finally:
        layers.fused_mlp = trained


def print_curves(settings: config.Config, data: Path | None, device: torch.device) -> None:
    """Train twice, print both losses at twelve steps and the means of the last ten."""
    with tempfile.TemporaryDirectory() as name:
        if data is None:
            made_up_shard(Path(name), 16 * settings.train.step_tokens, settings.model.vocab_size)
        plain, other = (curve(settings, data or Path(name), device, mlp) for mlp in (plain_mlp, rounded_mlp))
    print(f"{'loss at step':>12}{'as it is':>12}{'e4m3 MLP':>12}{'difference':>12}")
    for step in range(0, len(plain), max(1, len(plain) // 12)):
        print(f"{step:12}{plain[step]:12.4f}{other[step]:12.4f}{other[step] - plain[step]:+12.4f}")
    means = [statistics.fmean(losses[-10:]) for losses in (plain, other)]
    print(f"{'last ten':>12}{means[0]:12.4f}{means[1]:12.4f}{means[1] - means[0]:+12.4f}")


def small(recipe: str, steps: int) -> config.Config:
    """A recipe's model in one small batch a step, its curves over `steps` steps."""
    batch = "train.step_tokens=16384", "train.micro_batch=16384", "train.contexts=1024@1.0", "train.step=eager"
    curves = f"train.steps={steps}", "train.schedule_by=step", "train.rewarm_steps=0", "train.warmup_steps=0"
    return config.override(recipes.get(recipe), [*batch, *curves])


def why_not() -> str:
    """Why this script cannot run here; empty when it can."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability(DEVICE) < (8, 9):
        return f"{torch.cuda.get_device_name(DEVICE)} has no FP8; needs compute capability 8.9 or newer"
    return _native.why_not(DEVICE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--micro-step-ms", type=float, help="measured, to give savings as its share")
    parser.add_argument("--loss", action="store_true", help="train twice instead")
    parser.add_argument("--recipe", default="duel", help="whose model --loss trains")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--data", type=Path, metavar="DIR", help="shards to train on; made up by default")
    options = parser.parse_args()
    if reason := why_not():
        print(f"fp8: {reason}", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}, {options.tokens:,} tokens")
    try:
        if options.loss:
            print_curves(small(options.recipe, options.steps), options.data, DEVICE)
            return 0
    except PgolfError as error:
        print(f"fp8: {error}", file=sys.stderr)
        return 2
    clock = Clock()
    times = time_products(clock, options.tokens)
    time_kernels(clock, options.tokens)
    costs = time_operands(clock, options.tokens)
    print_savings(savings(times, costs), options.micro_step_ms)
    for line in clock.absent:
        print(f"absent: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
