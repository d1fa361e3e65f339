"""Inputs of trellis-coded GPTQ's column loop."""

import torch

from pgolf.ops import trellis
from pgolf.testing.operator import Arguments, Operator, Shape, nbytes


def _make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    """shape = (rows, cols) of one matrix after the other; the seed also picks the number of states, 64 for the first.

    A few weights lie far beyond the largest level; in every matrix of some rows one is zeros and has step 0. The
    factor's rows have about the norm that real ones have.
    """
    draw = torch.Generator().manual_seed(seed)
    rows, cols = list(shape[::2]), list(shape[1::2])
    parts: list[list[torch.Tensor]] = []
    for height, width in zip(rows, cols, strict=True):
        weight = torch.randn(width, height, generator=draw)
        weight[torch.rand(width, height, generator=draw) < 1e-3] *= 50
        upper = torch.randn(width, width, generator=draw).triu_(1) / width**0.5
        upper += torch.diag(0.5 + torch.rand(width, generator=draw))
        step = 0.1 + 0.2 * torch.rand(height, generator=draw)
        variance = 0.5 / step.square()
        if height > 2:
            for tensor in (weight.T, step, variance):
                tensor[1] = 0
        factor = torch.exp2(torch.randint(-8, 9, (width,), generator=draw) / 8)
        parts.append([tensor.reshape(-1) for tensor in (weight, upper, step, variance, factor)])
    states = [64, 4, 256, 8, 32][seed % 5]
    return *(torch.cat(tensors).to(device) for tensors in zip(*parts, strict=True)), rows, cols, states, 0.364


def _flops(arguments: Arguments) -> int:
    """Errors are multiplied and subtracted; the search takes two sums and a minimum for each state."""
    rows, cols, states = arguments[5:8]
    return sum(r * c * (c - 1 + 3 * states) for r, c in zip(rows, cols, strict=True))


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="trellis",
        op=trellis.trellis_op,
        reference=trellis.reference,
        make=_make,
        shapes=(
            (1, 1),
            (5, 1, 1, 3),
            (2, 8),
            (7, 33, 1, 5, 64, 3, 30, 30),
            (385, 6, 24, 129),  # a row beyond what is priced at once, a column beyond a block
            (300, 130),
            (1100, 20, 200, 270),
        ),
        large=(512, 2048),  # the record's 67 matrices have these five shapes
        more_large=((2048, 512), (512, 512), (256, 512), (8192, 512)),
        small=(256, 256),
        forward_bytes=lambda a: nbytes(*a[:5]) + a[0].numel(),
        forward_flops=_flops,
        dtypes=(torch.float32,),
        exact=True,
        compiles=False,
    ),
)
