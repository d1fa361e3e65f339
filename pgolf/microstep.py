"""A micro-step, forward and backward of one micro-batch, eager or as a replayed CUDA graph.

A step launches some thousand kernels; launched one by one from Python they would come slower than the GPU finishes
them. A graph holds them all, one graph for each mode that a batch can have: the context length, whether layers are
looped, and how many segment boundaries the batch is padded to. Graphs share one pool of memory: one runs at a time.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgolf.data.loader import Batch

Loss = Callable[
    [Tensor, Tensor, Tensor, int], Tensor
]  # (ids, targets, cu_seqlens, context) -> share of the step's loss

BOUNDARIES = 128  # a graph's segments are padded to a multiple: few graphs, and few empty segments for attention
FEW = 4096  # tokens


class Mode(NamedTuple):
    """What a captured graph has built in."""

    context: int  # tokens
    looping: bool
    boundaries: int  # entries of cu_seqlens


class EagerMicroStep:
    """Launches a micro-step's operators one after the other."""

    def __init__(self, loss: Loss, device: torch.device) -> None:
        self._loss, self._device = loss, device

    def __call__(self, batch: Batch, context: int, looping: bool) -> Tensor:
        """Add the gradients of `batch` to the parameters'; returns its share of the step's loss, 0-dim."""
        inputs, targets, bounds = (_to(x, self._device) for x in (batch.inputs, batch.targets, batch.cu_seqlens))
        if self._device.type == "cuda":
            torch._dynamo.maybe_mark_dynamic(bounds, 0)  # the number of segments changes with every batch
        loss = self._loss(inputs, targets, bounds, context)
        loss.backward()
        return loss.detach()


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    cu_seqlens: Tensor
    loss: Tensor


class GraphedMicroStep:
    """Replays a micro-step's CUDA graph, capturing it when a mode is met for the first time.

    The parameters' gradients are tensors that the graphs have built in: they are added to and set to zero in place,
    never replaced. What a first call costs beyond later ones is a launch of everything from Python, twice for a new
    pair of context and recurrence: operators choose and load their kernels in a launch outside of capture. The very
    first takes the whole micro-batch, on whose size the choice of matrix products depends; later ones a few of its
    tokens, since they need memory beside the graphs'.
    """

    def __init__(self, loss: Loss, device: torch.device, parameters: Iterable[nn.Parameter]) -> None:
        self._loss, self._device, self._parameters = loss, device, list(parameters)
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Mode, _Captured] = {}
        self._inputs: tuple[Tensor, Tensor] | None = None

    def __call__(self, batch: Batch, context: int, looping: bool) -> Tensor:
        """As `EagerMicroStep`. The loss is a copy: it outlives the next replay."""
        if self._inputs is None:
            self._inputs = (
                torch.empty_like(batch.inputs, device=self._device),
                torch.empty_like(batch.targets, device=self._device),
            )
        for static, given in zip(self._inputs, (batch.inputs, batch.targets), strict=True):
            static.copy_(given.pin_memory(), non_blocking=True)
        total = batch.inputs.shape[1]
        bounds = torch.full((-(-len(batch.cu_seqlens) // BOUNDARIES) * BOUNDARIES,), total, dtype=torch.int32)
        bounds[: len(batch.cu_seqlens)] = batch.cu_seqlens
        mode = Mode(context, looping, len(bounds))
        if mode not in self._graphs:
            self._graphs[mode] = self._capture(mode, _to(bounds, self._device))
        captured = self._graphs[mode]
        captured.cu_seqlens.copy_(bounds.pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.loss.clone()

    def _capture(self, mode: Mode, cu_seqlens: Tensor) -> _Captured:
        assert self._inputs is not None
        arguments = (*self._inputs, cu_seqlens, mode.context)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if not self._graphs:
                self._launch_once(*arguments)
            elif not any(mode[:2] == known[:2] for known in self._graphs):
                self._launch_once(*(x[:, :FEW] for x in self._inputs), cu_seqlens.clamp_max(FEW), mode.context)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            loss = self._loss(*arguments)
            loss.backward()
        return _Captured(graph, cu_seqlens, loss.detach())

    def _launch_once(self, *arguments: Tensor | int) -> None:
        """A micro-step whose gradients are dropped again; afterwards every parameter that has one has its tensor."""
        before = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        self._loss(*arguments).backward()  # type: ignore[arg-type]
        for parameter, kept in zip(self._parameters, before, strict=True):
            if parameter.grad is not None:
                parameter.grad.zero_() if kept is None else parameter.grad.copy_(kept)


def _to(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; on a GPU without waiting for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
