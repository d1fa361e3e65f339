"""Inputs of the residual stream, in the combinations that the model uses, and of its two lanes."""

from typing import Any

import torch
from torch import Tensor

from pgolf.ops import lanes, residual
from pgolf.testing.operator import Arguments, Function, Operator, Shape, nbytes

GATE_SCALE, NORM_SCALE = 0.7, 0.5

SHAPES: tuple[Shape, ...] = (
    (1, 8, 1, 1),
    (3, 16, 2, 5),
    (2, 24, 3, 24),
    (7, 512, 8, 12),
    (65, 504, 8, 12),
    (37, 256, 32, 16),
    (130, 264, 16, 32),
    (9, 1000, 5, 9),
    (6, 1024, 8, 12),
    (5, 20, 2, 3),  # widths without a kernel
    (3, 1040, 2, 3),
    (2, 64, 33, 4),
    (2, 64, 32, 17),
    (3000, 512, 8, 12),  # several rows a group of warps on any GPU
)
LARGE: Shape = (98304, 512, 8, 12)
SMALL: Shape = (4096, 512, 8, 12)

# What else than x a variant has, in the order of the arguments.
PARTS = {
    "add": ("branch",),
    "mix": ("branch", "x0", "gate"),
    "keep": ("branch", "x0", "gate"),
    "skip": ("branch", "skip", "x0", "gate"),
    "self_skip": ("branch", "self_skip", "x0", "gate"),
    "first_lanes": ("branch", "skip", "x0", "gate"),
    "lanes": ("skip", "x0", "gate"),
    "norm": (),
}
# What a variant returns beside the normed, the gate and x0; others keep the stream.
KEPT: dict[str, dict[str, bool]] = {
    "keep": {"keep_sum": True},
    "first_lanes": {"keep_sum": True, "keep_blend": True, "keep_stream": False},
    "lanes": {"keep_blend": True, "keep_stream": False},
    "norm": {"keep_stream": False},
}


class _Draw:
    """Random tensors that take a gradient, drawn on the CPU."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def activation(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator)
        return values.to(self.device, self.dtype).requires_grad_()

    def parameter(self, *shape: int, mean: float = 0.0) -> Tensor:
        values = mean + torch.randn(shape, generator=self.generator)
        return values.to(self.device, torch.promote_types(self.dtype, torch.float32)).requires_grad_()


def _make(parts: tuple[str, ...]) -> Any:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
        """shape = (rows, D, heads, w)."""
        rows, dim, heads, window = shape
        draw = _Draw(dtype, device, seed)
        arguments = [draw.activation(rows, dim)]
        if "branch" in parts:
            arguments += [draw.activation(rows, dim), draw.parameter(dim, mean=1.0)]
        if "skip" in parts:
            arguments += [draw.activation(rows, dim)]
        if "skip" in parts or "self_skip" in parts:
            arguments += [draw.parameter(dim, mean=1.0), draw.parameter(dim)]
        if "x0" in parts:
            arguments += [draw.activation(rows, dim), draw.parameter(2, dim)]
        if "gate" in parts:
            arguments += [draw.parameter(heads, window)]
        return tuple(arguments)

    return make


def _named(parts: tuple[str, ...], arguments: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The arguments of a variant by the operator's names."""
    of_part = {
        "branch": ("branch", "branch_scale"),
        "skip": ("skip", "skip_weight", "skip_gate"),
        "self_skip": ("skip_weight", "skip_gate"),
        "x0": ("x0", "mix"),
        "gate": ("gate_weight",),
    }
    names = ["x", *(name for part in parts for name in of_part[part])]
    return dict(zip(names, arguments, strict=True))


def _function(variant: str, function: Function) -> Function:
    """The operator on a variant's arguments alone, as the tuple of what it makes."""

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        named = _named(PARTS[variant], arguments)
        found = function(**named, gate_scale=GATE_SCALE, norm_scale=NORM_SCALE, **KEPT.get(variant, {}))
        return tuple(result for result in found if result is not None)

    return call


def _residual(x: Tensor, **given: Any) -> residual.Residual:
    """By its custom operators on the CPU too, where the public function leaves it to autograd."""
    return residual.residual(x, **given) if x.is_cuda else residual.fused(x, **given)


def _norm_mean(lane0: Tensor, lane1: Tensor) -> Tensor:
    return residual.norm_mean(lane0, lane1) if lane0.is_cuda else residual.fused_norm_mean(lane0, lane1)


def _kept(variant: str) -> int:
    """How many of sum, blend and stream are results."""
    kept = {"keep_stream": True, **KEPT.get(variant, {})}
    return sum(kept.values())


def _forward_bytes(variant: str) -> Any:
    """Every operand read once, the normed, what is kept and the gate written."""
    parts = PARTS[variant]
    written = 1 + _kept(variant)

    def count(arguments: Arguments) -> int:
        x = arguments[0]
        gate = len(x) * arguments[-1].shape[0] * x.element_size() if "gate" in parts else 0
        return nbytes(*arguments) + written * x.nbytes + gate

    return count


def _backward_bytes(variant: str) -> Any:
    """Operands and gradients of results read, gradients of operands written; the gate and its gradient are read."""
    parts = PARTS[variant]
    results = 1 + _kept(variant) + ("x0" in parts)  # the normed, what is kept, and x0 passed through

    def count(arguments: Arguments) -> int:
        x = arguments[0]
        gate = 2 * len(x) * arguments[-1].shape[0] * x.element_size() if "gate" in parts else 0
        return 2 * nbytes(*arguments) + results * x.nbytes + gate

    return count


def _row(variant: str) -> Operator:
    return Operator(
        name=f"residual_{variant}",
        op=_function(variant, _residual),
        reference=_function(variant, residual.reference),
        make=_make(PARTS[variant]),
        shapes=SHAPES,
        large=LARGE,
        small=SMALL,
        forward_bytes=_forward_bytes(variant),
        backward_bytes=_backward_bytes(variant),
    )


def _make_lanes(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    """shape = (rows, D)."""
    rows, dim = shape
    draw = _Draw(dtype, device, seed)
    activations = [draw.activation(rows, dim) for _ in range(4)]
    return *activations, *(draw.parameter(*size, mean=1.0) for size in ((dim,), (dim,), (2, 2), (2,)))


def _make_norm_mean(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    """shape = (rows, D)."""
    draw = _Draw(dtype, device, seed)
    return draw.activation(*shape), draw.activation(*shape)


OPERATORS: tuple[Operator, ...] = (
    *map(_row, PARTS),
    Operator(
        name="norm_mean",
        op=_norm_mean,
        reference=residual.norm_mean_reference,
        make=_make_norm_mean,
        shapes=tuple(dict.fromkeys(shape[:2] for shape in SHAPES)),
        large=LARGE[:2],
        small=SMALL[:2],
        forward_bytes=lambda a: nbytes(*a, a[0]),
        backward_bytes=lambda a: nbytes(*a, a[0], a[0]),  # one gradient serves both lanes
    ),
    Operator(
        name="lanes",
        op=lanes.lanes,
        custom_op=lanes.lanes_op,
        reference=lanes.reference,
        make=_make_lanes,
        shapes=tuple(dict.fromkeys(shape[:2] for shape in SHAPES)),
        large=LARGE[:2],
        small=SMALL[:2],
        forward_bytes=lambda a: nbytes(*a, a[0], a[0]),
        backward_bytes=lambda a: 2 * nbytes(*a) + nbytes(a[0], a[0]),
    ),
)
