"""CUDA graphs of a batch's steps, one for each shape: a step launches some thousand kernels, too many for Python."""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterable

import torch

from pgolf.ttt.planning import Shape

Run = Callable[[Shape], None]

# Work in the GPU's queue beside which a capture begins, in tokens of `Shape.tokens`: about 0.06 s on an H100, where a
# capture takes 0.15 s or more. With 250,000 nearly all came too late: the host is seldom that far ahead.
AHEAD = 60_000


class Graphs:
    """Replays `run`, a function of a `Shape`, from graphs that it captures while the GPU works on earlier ones.

    The function reads and writes tensors that stay where they are and leaves nothing else behind, so that all graphs
    share one pool of memory: one runs at a time.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run, self._device = run, device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._awaited: deque[Shape] = deque()
        self._queue: deque[tuple[torch.cuda.Event, float]] = deque()  # ends of replays not yet seen to have ended
        self.seconds = 0.0  # of the host, in captures
        self.stalled = 0.0  # of these, in captures at whose end the GPU had nothing to do

    def warm_up(self, shape: Shape) -> None:
        """Launch `run` once: operators choose and load their kernels outside of a capture."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._run(shape)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def expect(self, shapes: Iterable[Shape]) -> None:
        """The shapes to come, in the order of their use.

        Captures the largest at once: what the others take then fits into its memory, which a larger one that comes
        later could not reuse.
        """
        torch.cuda.empty_cache()  # once, not at each capture: a capture cannot take what is cached for others
        self._awaited = deque(dict.fromkeys(shapes))
        if self._awaited:
            self._need(max(self._awaited, key=lambda shape: shape.tokens))

    def replay(self, shape: Shape) -> None:
        """Launch a step; then, if the GPU has enough to do, capture the graph that is missing next."""
        self._need(shape)
        self._graphs[shape].replay()
        while self._awaited and self._awaited[0] in self._graphs:
            self._awaited.popleft()
        if self._awaited:
            self._queue.append((torch.cuda.current_stream(self._device).record_event(), shape.tokens))
            if self._queued() >= AHEAD:
                self._need(self._awaited.popleft())

    def _queued(self) -> float:
        """Tokens of the replays that the GPU has not finished."""
        while self._queue and self._queue[0][0].query():
            self._queue.popleft()
        return sum(tokens for _, tokens in self._queue)

    def _need(self, shape: Shape) -> None:
        """Capture a shape met for the first time.

        Unlike `torch.cuda.graph` this neither waits for the GPU nor gives memory back, which would stop it. No stream
        waits for another: a capture runs nothing. Garbage collection is off, since what it ends (events, graphs,
        memory) may call what a capture forbids; thread-local errors, since other threads (NCCL's) query events.
        """
        if shape in self._graphs:
            return
        started = time.perf_counter()
        graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    self._run(shape)
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        gc.collect(0)  # a cycle made meanwhile would keep its part of the pool from the next graph
        self._graphs[shape] = graph
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.stalled += 0.0 if self._queued() else seconds
