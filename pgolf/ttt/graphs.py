"""CUDA graphs of a batch's steps, one for each shape: a step launches some thousand kernels, too many for Python."""

from collections.abc import Callable, Iterable

import torch

from pgolf.ttt.planning import Shape

Run = Callable[[Shape], None]


class Graphs:
    """Captures a function of a `Shape` and replays it.

    The function reads and writes tensors that stay where they are and leaves nothing else behind, so that all graphs
    share one pool of memory: one runs at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}

    def warm_up(self, run: Run, shape: Shape) -> None:
        """Launch `run` once: operators choose and load their kernels outside of a capture."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run(shape)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def capture(self, run: Run, shapes: Iterable[Shape]) -> None:
        """Capture the shapes met for the first time.

        The largest first: what the smaller ones take then fits into its memory, which a larger one could not reuse.
        """
        for shape in sorted(set(shapes) - self._graphs.keys(), key=_size, reverse=True):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                run(shape)
            self._graphs[shape] = graph

    def replay(self, shape: Shape) -> None:
        """Run a captured shape."""
        self._graphs[shape].replay()


def _size(shape: Shape) -> tuple[int, bool]:
    """What the memory of a step goes by."""
    return shape.rows * shape.inputs, shape.learn
