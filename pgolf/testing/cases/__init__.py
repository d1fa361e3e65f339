"""The registry: one file an operator. `tests/test_ops.py` and `benchmarks/test_ops.py` walk its rows."""

from pgolf.testing.cases import cross_entropy, embed, gptq, mlp, polar_express, row_order, smear_gate, trellis
from pgolf.testing.operator import Operator

OPERATORS: tuple[Operator, ...] = (
    *cross_entropy.OPERATORS,
    *embed.OPERATORS,
    *gptq.OPERATORS,
    *mlp.OPERATORS,
    *polar_express.OPERATORS,
    *row_order.OPERATORS,
    *smear_gate.OPERATORS,
    *trellis.OPERATORS,
)
