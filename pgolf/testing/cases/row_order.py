"""Inputs of the row order."""

import torch

from pgolf.ops import row_order
from pgolf.testing.operator import Arguments, Operator, Shape


def _make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    """shape = (rows, columns) or (rows, columns, different rows): with few different ones, most distances are ties."""
    rows, columns, *different = shape
    draw = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (*different, columns) if different else (rows, columns), generator=draw)
    if different:
        q = q[torch.randint(0, different[0], (rows,), generator=draw)]
    return (q.to(device, dtype),)


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="row_order",
        op=row_order.row_order_op,
        reference=row_order.reference,
        make=_make,
        shapes=(
            (1, 5),
            (2, 8),
            (64, 1),  # one column: many ties
            (100, 13),  # rows of no whole number of words
            (300, 24, 7),  # every row many times
            (129, 132, 1),  # all rows alike: the identity
            (257, 64),
            (1000, 512),
        ),
        large=(8192, 512),
        large_check=(2048, 512),
        small=(256, 64),
        forward_bytes=lambda a: a[0].nbytes + 8 * len(a[0]),
        dtypes=(torch.int8,),
        exact=True,
        compiles=False,
    ),
)
