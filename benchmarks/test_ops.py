"""Every operator of the registry beside PyTorch, eager and compiled, and its rivals: forward, then with backward.

A GPU times the replay of a CUDA graph of each, at the recipe's size, with a cold L2 cache; all builds that the GPU can
run are timed, its own first. On a CPU the forward is the reference itself, so its ratio is about one; only a backward
that is written out differs.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pgolf.ops import _native
from pgolf.testing import (
    OPERATORS,
    Arguments,
    Function,
    Operator,
    Shape,
    capturable,
    differentiable,
    graphed,
    measure,
    outputs,
    peak_memory,
    random_like,
    repeats_within,
    results,
)
from pgolf.testing.timings import COLUMNS, Run, Timing, rows

CUDA = torch.cuda.is_available()
CASES = [
    pytest.param(operator, shape, dtype, id=f"{operator.name}-{'x'.join(map(str, shape))}-{str(dtype)[6:]}")
    for operator in OPERATORS
    for shape in ((operator.large, *operator.more_large) if CUDA else (operator.small,))
    for dtype in (operator.kernel_dtypes if CUDA else operator.dtypes)
]


@dataclass(frozen=True)
class Contender:
    """One way to compute an operator."""

    name: str
    load: Callable[[], Function]
    build: str = ""  # of our kernels, to be forced
    rival: bool = False  # may be absent, and must agree with ours to be timed

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """Its kernels run inside the block."""
        with _native.forced(self.build) if self.build else contextlib.nullcontext():
            yield


def contenders(operator: Operator, device: torch.device, compiled: bool) -> list[Contender]:
    """Ours first: the build that the device's own choice leads to, then other builds it can run."""
    found = [Contender("pgolf", lambda: operator.op)]
    if device.type == "cuda":
        runnable = [build for build in ("sm90", "generic") if build in {_native.build_of(device), "generic"}]
        ours = [build for build in runnable if build in operator.builds]
        found = [Contender(f"pgolf {build}", lambda: operator.op, build) for build in ours]
    found.append(Contender("eager", lambda: operator.reference))
    if compiled:
        found.append(Contender("compile", lambda: compiled_reference(operator), rival=True))
    if device.type == "cuda":
        found += [Contender(name, load, rival=True) for name, load in operator.baselines.items()]
    return found


def compiled_reference(operator: Operator) -> Function:
    """The reference under torch.compile; RuntimeError for one that is not to be compiled."""
    if not operator.compiles:
        raise RuntimeError("the reference loops over thousands of steps, all of which torch.compile would unroll")
    return torch.compile(operator.reference)


def passes(function: Function, arguments: Arguments) -> dict[str, Callable[[], Any]]:
    """The forward without gradients and, where there are any, the forward followed by the backward."""
    leaves = differentiable(arguments)

    def forward() -> Any:
        with torch.no_grad():
            return function(*arguments)

    if not leaves:
        return {"forward": forward}
    # As many as the outputs that take a gradient, drawn once: their drawing is not to be timed.
    directions = [random_like(out.detach(), 0) for out in outputs(function(*arguments)) if out.requires_grad]

    def both() -> Any:
        found = [out for out in outputs(function(*arguments)) if out.requires_grad]
        return torch.autograd.grad(found, leaves, directions, materialize_grads=True)

    return {"forward": forward, "both": both}


def timed(step: Callable[[], Any], device: torch.device, full: bool) -> dict[str, Any]:
    """Fields of a Timing."""
    cuda = device.type == "cuda"
    for _ in range(3 if cuda or full else 1):
        step()
    memory = peak_memory(step, device)
    captured = cuda and capturable(step)  # what cannot be is timed as calls, and the table says so
    if captured:
        step = graphed(step)
    budget, most = (2.0, 100) if full else (0.3, 30 if cuda else 5)
    repeats = repeats_within(budget, step, device, least=2, most=most)
    return {"seconds": measure(step, device, repeats), "memory": memory, "graphed": captured}


def disagreement(operator: Operator, function: Function, arguments: Arguments) -> str:
    """In words, when a rival computes something else than the reference does; a rounding apart is no difference."""
    for index, (got, wanted) in enumerate(
        zip(results(function, arguments), results(operator.reference, arguments), strict=True)
    ):
        if got.shape != wanted.shape:
            return f"result {index} has shape {list(got.shape)}, not {list(wanted.shape)}"
        error = (got.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30)
        if not error < 0.05:
            return f"result {index} is {error:.1%} away from the reference's"
    return ""


def time_contender(
    contender: Contender, operator: Operator, arguments: Arguments, device: torch.device, full: bool
) -> dict[str, dict[str, Any]]:
    """Fields of a Timing for each pass."""
    function = contender.load()
    if contender.rival and (wrong := disagreement(operator, function, arguments)):
        raise RuntimeError(wrong)
    return {name: timed(step, device, full) for name, step in passes(function, arguments).items()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("operator", "shape", "dtype"), CASES)
def test_operator(
    operator: Operator,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    run: Run,
    full: bool,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cuda = device.type == "cuda"
    if cuda and (reason := _native.why_not(device)):
        pytest.skip(f"no kernels to time: {reason}")
    if not cuda and not full and dtype != operator.dtypes[0]:
        pytest.skip("on a CPU only --full times every type")
    arguments = operator.make(shape, dtype, device, 0)
    forward, backward = operator.forward_bytes(arguments), operator.backward_bytes(arguments)
    forward_flops, backward_flops = operator.forward_flops(arguments), operator.backward_flops(arguments)
    work = {
        "forward": {"bytes": forward, "flops": forward_flops},
        "both": {"bytes": forward + backward, "flops": forward_flops + backward_flops},
    }
    compiled = (cuda or full) and not request.config.getoption("--no-compile")

    measured: dict[str, list[Timing]] = {"forward": [], "both": []}
    for contender in contenders(operator, device, compiled):
        about = {"operator": operator.name, "shape": shape, "dtype": str(dtype)[6:], "contender": contender.name}
        try:
            with contender.chosen():
                found = time_contender(contender, operator, arguments, device, full)
        except Exception as error:
            # Whatever a rival fails with, the others are timed and the table says why it is not among them.
            if not contender.rival and not isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            measured["forward"].append(Timing(**about, direction="forward", absent=reason))
            continue
        finally:
            if compiled:
                torch.compiler.reset()
            if cuda:
                gc.collect()
                torch.cuda.empty_cache()
        for direction, fields in found.items():
            measured[direction].append(Timing(**about, direction=direction, **work[direction], **fields))
    own = Run(run.device, run.bandwidth, run.matmul, {}, run.date, measured["forward"] + measured["both"])
    run.timings += own.timings
    with capsys.disabled():
        print("\n" + aligned([list(COLUMNS), *rows(own, operator.name)]))
    assert measured["forward"][0].seconds is not None, measured["forward"][0].absent


def aligned(table: list[list[str]]) -> str:
    """The operator's rows under each other, the device left out."""
    timed_rows = [row[1:] for row in table if not row[4].startswith("absent")]
    widths = [max(map(len, column)) for column in zip(*timed_rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row[1:], widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in lines)
