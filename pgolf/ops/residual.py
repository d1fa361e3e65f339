"""The residual stream between two branches in one pass: add, skip, mix, RMS-norm and the attention's gate (recipe
section 2).

One operator because each part alone moves as many bytes as all together. The backward is one pass as well: it computes
the stream again from the operands, so that nothing is kept for it but them and the gate.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import _native
from pgolf.ops._residual import Operands, residual_backward_op, residual_op
from pgolf.ops._rows import expect, expect_activation, expect_like, expect_parameter, kernel_takes, present
from pgolf.ops.embed import machine_epsilon

MAX_GATE = 32  # the kernels take a gate of at most so many heads and columns,
MAX_GATE_WEIGHTS = 512  # and at most this many weights


class Residual(NamedTuple):
    """What `residual` returns; names as there.

    None is what was not asked for: who asked knows, and `Any` spares them the assertion.
    """

    sum: Any
    blend: Any
    stream: Any
    normed: Tensor
    gate: Any
    x0: Any


def reference(
    x: Tensor,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_gate: Tensor | None = None,
    x0: Tensor | None = None,
    mix: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_scale: float = 1.0,
    norm_scale: float = 1.0,
    keep_sum: bool = False,
    keep_blend: bool = False,
    keep_stream: bool = True,
) -> Residual:
    """The operator in plain PyTorch, computed in x's dtype; arguments as in `residual`."""
    stream = x
    if branch is not None and branch_scale is not None:
        stream = stream + branch_scale.to(x.dtype) * branch
    total = stream if keep_sum else None
    if skip_weight is not None and skip_gate is not None:
        skipped = skip_weight.to(x.dtype) * (stream if skip is None else skip)
        stream = torch.lerp(skipped, stream, torch.sigmoid(skip_gate.to(x.dtype)))
    blend = stream if keep_blend else None
    if x0 is not None and mix is not None:
        stream = mix[0].to(x.dtype) * stream + mix[1].to(x.dtype) * x0
    normed = F.rms_norm(stream, (x.shape[-1],)) * norm_scale
    gate = None
    if gate_weight is not None:
        gate = torch.sigmoid(gate_scale * F.linear(normed[..., : gate_weight.shape[1]], gate_weight.to(x.dtype)))
    return Residual(total, blend, stream if keep_stream else None, normed, gate, x0)


def residual(
    x: Tensor,
    *,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_gate: Tensor | None = None,
    x0: Tensor | None = None,
    mix: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_scale: float = 1.0,
    norm_scale: float = 1.0,
    keep_sum: bool = False,
    keep_blend: bool = False,
    keep_stream: bool = True,
) -> Residual:
    """Add a branch to the stream, let a skip connection and the embedding in, and norm it for the next branch.

        s = x + branch_scale * branch                                 (s = x without a branch)
        t = lerp(skip_weight * skip, s, sigmoid(skip_gate))           (t = s without a skip; skip = s where only
                                                                       skip_weight and skip_gate are given)
        u = mix[0] * t + mix[1] * x0                                  (u = t without x0)
        n = norm_scale * u / sqrt(mean(u^2) + eps),  eps = machine_epsilon(x.dtype)
        g = sigmoid(gate_scale * n[..., :w] gate_weight^T)

    x, branch, skip, x0 [..., D]: bfloat16 or float32 (on the CPU float64 too), of one shape and dtype. branch_scale,
    skip_weight, skip_gate [D], mix [2, D] and gate_weight [heads, w], w <= D: float32 (float64 where x is).
    Returns sum = s (None unless keep_sum), blend = t (None unless keep_blend), stream = u (None unless keep_stream),
    normed = n, gate = g [..., heads] (None without gate_weight) and x0, all in x's dtype. What is an argument unchanged
    (x0; sum, blend and stream where nothing was added) is that argument passed through: the gradients of an x0 handed
    on from call to call then flow back as a chain, without additions of their own. Differentiable in all tensors.
    ValueError names the argument that does not fit.

    Runs the CUDA kernels where they were built for the device, D is a multiple of 8 and at most 1024, heads and w are
    at most 32 and heads * w at most 512: in float32, each result rounded once, g from n as rounded. Elsewhere runs
    `reference`.
    """
    operands = Operands(x, branch, branch_scale, skip, skip_weight, skip_gate, x0, mix, gate_weight)
    _check(operands)
    kernel = _native.available(x.device) and _fits(x, gate_weight)
    return (fused if kernel else reference)(*operands, gate_scale, norm_scale, keep_sum, keep_blend, keep_stream)


def norm_mean_reference(lane0: Tensor, lane1: Tensor) -> Tensor:
    """`norm_mean` in plain PyTorch, computed in the lanes' dtype."""
    return F.rms_norm((lane0 + lane1) / 2, (lane0.shape[-1],))


def norm_mean(lane0: Tensor, lane1: Tensor) -> Tensor:
    """RMS-norm of the lanes' mean, eps = machine_epsilon(lane0.dtype): what the head of a two-lane model reads.

    lane0, lane1 [..., D], types and kernels as in `residual`. Returns [..., D]. Both lanes get the same gradient.
    """
    expect_activation("norm_mean", "lane0", lane0)
    expect_like("norm_mean", "lane1", lane1, "lane0", lane0)
    kernel = _native.available(lane0.device) and _fits(lane0)
    return (fused_norm_mean if kernel else norm_mean_reference)(lane0, lane1)


def _check(operands: Operands) -> None:
    """ValueError with one line naming the first argument that does not fit."""
    name, x = "residual", operands.x
    expect_activation(name, "x", x)
    dim = x.shape[-1]
    for activation, parameters, shape in (
        ("branch", ["branch_scale"], [dim]),
        ("skip", ["skip_weight", "skip_gate"], [dim]),
        ("x0", ["mix"], [2, dim]),
    ):
        given = {key: getattr(operands, key) for key in (activation, *parameters)}
        there = [key for key, tensor in given.items() if tensor is not None]
        if activation in there:
            expect_like(name, activation, given[activation], "x", x)
        elif activation != "skip":  # which may be the stream
            for parameter in there:
                expect(False, name, parameter, f"None without {activation}", "a tensor")
        for parameter in parameters if there else []:
            expect(given[parameter] is not None, name, parameter, f"a tensor beside {there[0]}", None)
            expect_parameter(name, parameter, given[parameter], shape, "x", x)
    weight = operands.gate_weight
    if weight is not None:
        fits = weight.dim() == 2 and weight.shape[0] > 0 and 1 <= weight.shape[1] <= dim
        expect(fits, name, "gate_weight", f"shape [heads, w], 1 <= w <= {dim}", list(weight.shape))
        expect_parameter(name, "gate_weight", weight, list(weight.shape), "x", x)


def _fits(x: Tensor, gate_weight: Tensor | None = None) -> bool:
    """Whether the kernels take these widths and types."""
    if gate_weight is not None and (max(gate_weight.shape) > MAX_GATE or gate_weight.numel() > MAX_GATE_WEIGHTS):
        return False
    return kernel_takes(x)


# --- Together ---------------------------------------------------------------------------------------------------------


def _spread(found: Sequence[Tensor | None], there: Iterable[bool]) -> list[Any]:
    """Each of `found` at its place among all, None at those that are not there."""
    left = list(found)
    return [left.pop(0) if is_there else None for is_there in there]


def _needs(ctx: Any) -> Any:
    """Which operands need a gradient, by their names."""
    return Operands(*ctx.needs_input_grad[6:])


class _Fused(torch.autograd.Function):
    """The two operators joined. Not by `register_autograd`, whose outputs cannot be inputs passed through."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_scale: float,
        norm_scale: float,
        eps: float,
        keep_sum: bool,
        keep_blend: bool,
        keep_stream: bool,
        *operands: Any,
    ) -> Any:
        """Those of normed, sum, blend, stream, gate and x0 that are there."""
        o = Operands(*operands)
        found = residual_op(operands, gate_scale, norm_scale, eps, keep_sum, keep_blend, keep_stream)
        kept = (keep_sum, keep_blend, keep_stream)
        made = [keep and new for keep, new in zip(kept, (o.branch is not None, o.blended, o.changed), strict=True)]
        normed, *middle, gate = _spread(found, (True, *made, o.gate_weight is not None))
        middle = [o.x if keep and out is None else out for keep, out in zip(kept, middle, strict=True)]
        outputs = (normed, *middle, gate, o.x0)
        if not torch.compiler.is_compiling():  # which knows only zeros
            ctx.set_materialize_grads(False)  # no zeros of x's size for outputs that have no gradient
            if o.x0 is not None and not _needs(ctx).x0:
                ctx.mark_non_differentiable(o.x0)  # or a whole chain of gradients would lead to nobody
        ctx.save_for_backward(*present(*operands, gate))
        ctx.saved = [tensor is not None for tensor in (*operands, gate)]
        ctx.returned = [tensor is not None for tensor in outputs]
        ctx.numbers = (gate_scale, norm_scale, eps)
        return tuple(present(*outputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *operands, gate = _spread(ctx.saved_tensors, ctx.saved)
        o = Operands(*operands)
        of_normed, of_sum, of_blend, of_stream, of_gate, of_x0 = _spread(grads, ctx.returned)
        given = [of_sum, of_blend, of_stream, of_normed, of_gate, of_x0, gate]
        needs, sizes = _needs(ctx), o.sections
        wanted = [needs.branch, needs.x0, any(needs.parameters)]
        found = residual_backward_op(given, operands, *ctx.numbers, wanted)
        there = (True, wanted[0], o.skip is not None, *wanted[1:])
        of_x, of_branch, of_skip, of_x0, parameters = _spread(found, there)
        cut = [None] * len(sizes) if parameters is None else parameters.split(sizes)
        scale, skip_weight, skip_gate, mix, gate_weight = (
            None if tensor is None or part is None else part.view(tensor.shape)
            for tensor, part in zip(o.parameters, cut, strict=True)
        )
        tensors = (of_x, of_branch, scale, of_skip, skip_weight, skip_gate, of_x0, mix, gate_weight)
        return None, None, None, None, None, None, *tensors


def fused(
    x: Tensor,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_gate: Tensor | None = None,
    x0: Tensor | None = None,
    mix: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_scale: float = 1.0,
    norm_scale: float = 1.0,
    keep_sum: bool = False,
    keep_blend: bool = False,
    keep_stream: bool = True,
) -> Residual:
    """`residual` by its custom operators, which the CPU has too."""
    operands = (x, branch, branch_scale, skip, skip_weight, skip_gate, x0, mix, gate_weight)
    own_blend = keep_blend and x0 is not None  # without x0 it is the stream
    made_stream = keep_stream or keep_blend and not own_blend
    kept = (keep_sum, own_blend, made_stream)
    found = _Fused.apply(gate_scale, norm_scale, machine_epsilon(x.dtype), *kept, *operands)
    normed, total, blend, stream, gate, x0 = _spread(found, (True, *kept, gate_weight is not None, x0 is not None))
    if keep_blend and not own_blend:
        blend = stream
    return Residual(total, blend, stream if keep_stream else None, normed, gate, x0)


class _FusedNormMean(torch.autograd.Function):
    """The norm of a sum is that of the mean, but for an epsilon four times as large: the mean's square is a fourth."""

    @staticmethod
    def forward(ctx: Any, lane0: Tensor, lane1: Tensor) -> Tensor:
        ctx.save_for_backward(lane0, lane1)
        numbers = (1.0, 1.0, 4 * machine_epsilon(lane0.dtype))
        (normed,) = residual_op(Operands(lane0, lane1), *numbers, False, False, False)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        lane0, lane1 = ctx.saved_tensors
        given = [None, None, None, grad, None, None, None]
        (found,) = residual_backward_op(given, Operands(lane0, lane1), 1.0, 1.0, 4 * machine_epsilon(lane0.dtype))
        return found, found


def fused_norm_mean(lane0: Tensor, lane1: Tensor) -> Tensor:
    """`norm_mean` by the custom operators, which the CPU has too."""
    normed: Tensor = _FusedNormMean.apply(lane0, lane1)
    return normed
