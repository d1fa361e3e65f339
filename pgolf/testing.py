"""What tests and benchmarks of operators share: the cases, the comparison, the clock and the device's peaks.

A new operator is a row in `OPERATORS`; `tests/test_ops.py` and `benchmarks/test_ops.py` walk the rows.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf.ops import smear_gate

Arguments = tuple[Any, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """One operator and the inputs it is tested and timed on."""

    name: str
    op: Callable[..., Any]  # the custom operator: `reference` on the CPU, the kernel on CUDA
    reference: Callable[..., Any]  # plain PyTorch, any dtype
    make: Callable[[Shape, torch.dtype, torch.device, int], Arguments]  # (shape, dtype, device, seed) -> arguments
    shapes: tuple[Shape, ...]  # for tests: the smallest, unaligned ones, no multiple of a tile
    large: Shape  # for tests and benchmarks on a GPU: the recipe's size
    small: Shape  # for benchmarks on a CPU
    forward_bytes: Callable[[Arguments], int]  # the least the forward must read and write, in bytes
    backward_bytes: Callable[[Arguments], int]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


def _smear_gate_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    """shape = (B, T, D, W); about one token in ten begins a document, the very first and the last among them."""
    batch, length, dim, window = shape
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 10, (batch, length), generator=draw)
    ids[:, 0] = ids[:, -1] = 1
    parameter_type = torch.promote_types(dtype, torch.float32)
    e = torch.randn(batch, length, dim, generator=draw).to(device, dtype).requires_grad_()
    weight = (torch.randn(1, window, generator=draw) / window**0.5).to(device, parameter_type).requires_grad_()
    lam = torch.randn(1, generator=draw).to(device, parameter_type).requires_grad_()
    return e, ids.to(device), weight, lam, 1


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


OPERATORS = (
    Operator(
        name="smear_gate",
        op=smear_gate.smear_gate_op,
        reference=smear_gate.reference,
        make=_smear_gate_inputs,
        shapes=(
            (1, 1, 8, 1),  # no previous token at all
            (3, 1, 16, 12),
            (1, 2, 24, 24),  # the window is the whole row
            (2, 63, 64, 12),
            (2, 65, 100, 33),  # rows of no whole number of 16-byte vectors, window beyond a warp
            (1, 200, 13, 5),  # odd rows
            (3, 129, 520, 12),
        ),
        large=(1, 98304, 512, 12),
        small=(1, 8192, 512, 12),
        forward_bytes=lambda a: _bytes(a[0], a[0], a[1]),
        backward_bytes=lambda a: _bytes(a[0], a[0], a[0], a[1]),
    ),
)


# --- Comparison -------------------------------------------------------------------------------------------------------


def differentiable(arguments: Arguments) -> list[Tensor]:
    """The arguments that take a gradient, in order."""
    return [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]


def results(
    function: Callable[..., Any], arguments: Arguments, seed: int = 0, rounded_to: torch.dtype | None = None
) -> list[Tensor]:
    """The output of `function` and the gradients of a random projection of it, in the order of the arguments.

    rounded_to: the type the projection is rounded to (default: the output's), so that types share a projection.
    """
    leaves = differentiable(arguments)
    out = function(*arguments)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(rounded_to or out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction.to(out.device, out.dtype))]


def in_float64(arguments: Arguments) -> Arguments:
    """The same arguments with floating-point tensors in float64."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return tuple(convert(value) for value in arguments)


def poison(device: torch.device, size: int = 1 << 26) -> None:
    """Fill `size` bytes that torch will hand out next with NaN patterns, so that an output left unwritten shows."""
    blocks = [torch.full((size // 4,), float("nan"), device=device)]
    blocks += [torch.full((1 << k,), float("nan"), device=device) for k in range(18) for _ in range(4)]
    del blocks


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """(largest absolute error, L2 norm of the error)."""
    if not actual.numel():
        return 0.0, 0.0
    difference = actual.double() - exact.double()
    return difference.abs().max().item(), difference.norm().item()


def check_accuracy(what: str, actual: Tensor, working: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """AssertionError when `actual` is further from `exact` (float64) than `factor` times what PyTorch in the same
    precision (`working`) is, in the largest error or in the L2 norm.

    Half a unit in the last place is always granted: a correctly rounded result has that error, and PyTorch may by luck
    have none. Give several draws stacked (`accuracy_on`): PyTorch's error on a scalar is by luck small on any one.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == working.dtype, f"{what}: dtype {actual.dtype}, expected {working.dtype}"
    if not exact.numel():
        return
    unit = torch.finfo(actual.dtype).eps / 2
    (largest, norm), (torch_largest, torch_norm) = errors(actual, exact), errors(working, exact)
    limit = factor * torch_largest + unit * exact.abs().max().item()
    norm_limit = factor * torch_norm + unit * exact.norm().item()
    # Written so that a NaN fails.
    if not (largest <= limit and norm <= norm_limit):
        raise AssertionError(
            f"{what}: largest error {largest:.3e} (limit {limit:.3e}), L2 error {norm:.3e} (limit {norm_limit:.3e}); "
            + mismatch(actual, exact, limit)
        )


def accuracy_on(operator: Operator, draws: list[Arguments]) -> None:
    """AssertionError unless output and gradients of `operator` on `draws` (same shapes and types) are accurate."""
    ours, working, exact = [], [], []
    for seed, arguments in enumerate(draws):
        ours.append(results(operator.op, arguments, seed))
        working.append(results(operator.reference, arguments, seed))
        exact.append(results(operator.reference, in_float64(arguments), seed, ours[-1][0].dtype))
    for index in range(len(ours[0])):
        name = f"gradient {index}" if index else "output"
        what = f"{operator.name}, {name} (first coordinate: the draw)"
        stacked = [torch.stack([result[index] for result in side]) for side in (ours, working, exact)]
        check_accuracy(what, stacked[0], stacked[1], stacked[2])


def mismatch(actual: Tensor, expected: Tensor, tolerance: float = 0.0) -> str:
    """How many values differ by more than `tolerance` (NaN agrees with NaN), the first coordinate, both values."""
    left, right = actual.double(), expected.double()
    close = (left - right).abs() <= tolerance
    wrong = ~(close | (left == right) | (left.isnan() & right.isnan()))
    count = int(wrong.sum())
    if not count:
        return "no value differs"
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{count} of {wrong.numel()} values differ by more than {tolerance:.3e}, "
        f"the first at {first}: got {left[first].item()!r}, expected {right[first].item()!r}"
    )


def check_equal(what: str, actual: Tensor, expected: Tensor) -> None:
    """AssertionError unless both hold the same values, NaN where NaN."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert torch.equal(actual.nan_to_num(1.5, 2.5, -2.5), expected.nan_to_num(1.5, 2.5, -2.5)) and torch.equal(
        actual.isfinite(), expected.isfinite()
    ), f"{what}: {mismatch(actual, expected)}"


# --- Clock and peaks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantiles:
    """Seconds per call: the 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Quantiles":
        ranks = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(ranks[1], ranks[4], ranks[7])


def graphed(function: Callable[[], Any]) -> Callable[[], None]:
    """`function`, on CUDA, captured in a CUDA graph after three warm-up calls: what remains is the GPU's work."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure(function: Callable[[], Any], device: torch.device, repeats: int = 50) -> Quantiles:
    """Time `function`, warmed up by the caller, `repeats` times (at least 2).

    On CUDA the L2 cache is overwritten before each call, which also gives the CPU time to enqueue the call.
    """
    seconds: list[float] = []
    if device.type != "cuda":
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return Quantiles.of(seconds)
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return Quantiles.of(seconds)


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes read and written per second by a plain copy on `device`: the measured ceiling of a memory-bound operator.

    size: bytes of the tensor copied; by default 256 MiB on CUDA and 64 MiB on the CPU.
    """
    if size is None:
        size = (256 if device.type == "cuda" else 64) << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / measure(lambda: target.copy_(source), device, repeats=10).p50
