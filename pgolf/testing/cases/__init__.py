"""The registry: one file an operator. `tests/test_ops.py` and `benchmarks/test_ops.py` walk its rows."""

from pgolf.testing.cases import (
    adamw,
    cross_entropy,
    embed,
    gptq,
    mlp,
    polar_express,
    qk_rope,
    residual,
    row_order,
    smear_gate,
    trellis,
    xsa_gate,
)
from pgolf.testing.operator import Operator

OPERATORS: tuple[Operator, ...] = (
    *adamw.OPERATORS,
    *cross_entropy.OPERATORS,
    *embed.OPERATORS,
    *gptq.OPERATORS,
    *mlp.OPERATORS,
    *polar_express.OPERATORS,
    *qk_rope.OPERATORS,
    *residual.OPERATORS,
    *row_order.OPERATORS,
    *smear_gate.OPERATORS,
    *trellis.OPERATORS,
    *xsa_gate.OPERATORS,
)
