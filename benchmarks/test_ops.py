"""Every operator of the registry beside PyTorch, eager and compiled: forward alone, then forward with backward.

A GPU times the replay of a CUDA graph of each, at the recipe's size, with a cold L2 cache. The share is of the measured
bandwidth of a copy: the least bytes the operator must move over the time it took. On a CPU the forward is the reference
itself, so its ratio is about one; only the written-out backward differs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pgolf.ops import _native
from pgolf.testing import OPERATORS, Operator, Quantiles, copy_bandwidth, differentiable, graphed, measure


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu", 0 if torch.cuda.is_available() else None)


@pytest.fixture(scope="module")
def bandwidth(device: torch.device) -> float:
    return copy_bandwidth(device)


def steps(function: Callable[..., Any], arguments: tuple) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The forward without gradients, and the forward followed by the backward."""
    leaves = differentiable(arguments)
    with torch.no_grad():
        grad = torch.randn_like(function(*arguments))

    def forward() -> Any:
        with torch.no_grad():
            return function(*arguments)

    def both() -> Any:
        return torch.autograd.grad(function(*arguments), leaves, grad)

    return forward, both


def time_step(step: Callable[[], Any], device: torch.device, repeats: int) -> Quantiles:
    for _ in range(3):
        step()
    return measure(graphed(step) if device.type == "cuda" else step, device, repeats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_operator(
    operator: Operator,
    dtype: torch.dtype,
    device: torch.device,
    bandwidth: float,
    full: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cuda = device.type == "cuda"
    if cuda and (reason := _native.why_not(device)):
        pytest.skip(f"no kernels to time: {reason}")
    shape = operator.large if cuda else operator.small
    arguments = operator.make(shape, dtype, device, 0)
    contenders = {"pgolf": operator.op, "eager": operator.reference}
    if cuda or full:
        contenders["compile"] = torch.compile(operator.reference)
    forward_bytes = operator.forward_bytes(arguments)
    traffic = (forward_bytes, forward_bytes + operator.backward_bytes(arguments))
    repeats = 100 if full else (30 if cuda else 5)

    times = {name: [time_step(s, device, repeats) for s in steps(f, arguments)] for name, f in contenders.items()}

    where = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"\n{operator.name} {shape} {str(dtype)[6:]} on {where}; copy {bandwidth / 1e9:.0f} GB/s"]
    for index, what in enumerate(("forward", "forward+backward")):
        for name, quantiles in times.items():
            t = quantiles[index]
            rate = traffic[index] / t.p50
            lines.append(
                f"  {what:<16} {name:<8} {t.p50 * 1e6:9.1f} us (p20 {t.p20 * 1e6:.1f}, p80 {t.p80 * 1e6:.1f})  "
                f"{rate / 1e9:7.1f} GB/s, {rate / bandwidth:6.1%} of copy  "
                f"{t.p50 / times['pgolf'][index].p50:5.2f}x pgolf's time"
            )
    with capsys.disabled():
        print("\n".join(lines))
    assert all(quantiles.p50 > 0 for pair in times.values() for quantiles in pair)
