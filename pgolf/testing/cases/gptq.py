"""Inputs of GPTQ's column loop."""

import torch

from pgolf.ops import gptq
from pgolf.testing.operator import Arguments, Operator, Shape, nbytes


def _make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    """shape = (K, rows, cols): the last matrix's columns lie in two groups, the finer one an eighth of them.

    Weights reach beyond the largest integers; the factor's rows have about the norm that real ones have.
    """
    count, rows, cols = shape
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, rows, cols, generator=draw, dtype=dtype)
    factor = torch.randn(count, cols, cols, generator=draw).double().triu_(1) / cols**0.5
    pivots = 0.5 + torch.rand(count, cols, generator=draw).double()
    factor.diagonal(dim1=1, dim2=2).copy_(pivots)
    scale = 0.05 + 0.15 * torch.rand(2, count, rows, generator=draw)
    scale[1] /= 4
    group = torch.zeros(count, cols, dtype=torch.uint8)
    group[-1] = torch.rand(cols, generator=draw) < 0.125
    limit = torch.tensor([[31], [127]], dtype=torch.int32).expand(2, count).contiguous()
    return *(tensor.to(device) for tensor in (weight, factor, scale, group, limit)), 48


def _flops(arguments: Arguments) -> int:
    count, rows, cols = arguments[0].shape
    return int(count * rows * cols * (cols - 1))


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="gptq",
        op=gptq.gptq_op,
        reference=gptq.reference,
        make=_make,
        shapes=(
            (1, 1, 1),
            (2, 1, 8),
            (1, 7, 64),  # one whole tile of columns
            (3, 33, 100),
            (1, 16, 130),
            (2, 40, 257),  # one column beyond whole tiles, rows beyond whole blocks
        ),
        large=(11, 512, 2048),  # the record's 67 matrices have these five shapes
        more_large=((22, 512, 512), (22, 256, 512), (11, 2048, 512), (1, 8192, 512)),
        small=(2, 256, 256),
        forward_bytes=lambda a: nbytes(*a[:5]) + a[0].numel(),
        forward_flops=_flops,
        dtypes=(torch.float32,),
        exact=True,
        compiles=False,
    ),
)
