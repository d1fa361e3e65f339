"""What tests and benchmarks of operators share: the registry, the comparison, the clock and the device's peaks.

A new operator is a file in `cases`.
"""

from pgolf.testing.cases import OPERATORS
from pgolf.testing.clock import (
    Quantiles,
    capturable,
    copy_bandwidth,
    graphed,
    matmul_rate,
    measure,
    peak_memory,
    repeats_within,
)
from pgolf.testing.compare import (
    accuracy_on,
    check_accuracy,
    check_equal,
    check_nonfinite,
    errors,
    in_float64,
    mismatch,
    names_of,
    poison,
    random_like,
    replaced,
    results,
)
from pgolf.testing.operator import Arguments, Function, Operator, Shape, differentiable, nbytes, outputs

__all__ = [
    "OPERATORS",
    "Arguments",
    "Function",
    "Operator",
    "Quantiles",
    "Shape",
    "accuracy_on",
    "capturable",
    "check_accuracy",
    "check_equal",
    "check_nonfinite",
    "copy_bandwidth",
    "differentiable",
    "errors",
    "graphed",
    "in_float64",
    "matmul_rate",
    "measure",
    "mismatch",
    "names_of",
    "nbytes",
    "outputs",
    "peak_memory",
    "poison",
    "random_like",
    "repeats_within",
    "replaced",
    "results",
]
