"""Clocks, and the device's peaks measured by them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


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


def capturable(function: Callable[[], Any]) -> bool:
    """Whether one call of `function`, warmed up by the caller, runs on CUDA without waiting for the GPU in between.

    Asked before capturing a graph: torch's allocator does not recover well from a capture that failed.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return True


def measure(function: Callable[[], Any], device: torch.device, repeats: int = 50) -> Quantiles:
    """Time `function`, warmed up by the caller, `repeats` times (at least 2).

    On CUDA the L2 cache is filled with other data before each call, which also gives the CPU time to enqueue the call.
    By reading, not writing: written data would go to memory during the call and at its cost.
    """
    seconds: list[float] = []
    if device.type != "cuda":
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return Quantiles.of(seconds)
    other = torch.zeros(1 << 26, device=device)  # 256 MiB
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        other.sum()
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


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product by torch: the measured ceiling of a compute-bound operator.

    8192^3 in bfloat16 on CUDA, 1024^3 in float32 on the CPU; a multiply-add is two operations.
    """
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = left @ right
    return 2 * size**3 / measure(lambda: torch.mm(left, right, out=out), device, repeats=10).p50


def repeats_within(seconds: float, function: Callable[[], Any], device: torch.device, least: int, most: int) -> int:
    """How often `function`, warmed up by the caller, runs in about `seconds`, within [least, most]."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(least, min(most, int(seconds / (time.perf_counter() - start))))


def peak_memory(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes of GPU memory that one call adds at its peak, what it returns included; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
