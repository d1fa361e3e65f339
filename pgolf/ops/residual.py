"""The residual stream between two branches in one pass: add, skip, mix, RMS-norm and the attention's gate (recipe
section 2).

One operator because each part alone moves as many bytes as all together. The backward is one pass as well: it computes
the stream again from the operands, so that nothing is kept for it but them and the gate.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import _native
from pgolf.ops._rows import (
    address,
    aligned,
    expect,
    expect_activation,
    expect_like,
    expect_parameter,
    kernel_takes,
    present,
    room,
    wide,
)
from pgolf.ops.embed import machine_epsilon

MAX_GATE = 32  # the kernels take a gate of at most so many heads and columns


class Residual(NamedTuple):
    """What `residual` returns; names as there."""

    sum: Tensor | None
    stream: Tensor
    normed: Tensor
    gate: Tensor | None
    x0: Tensor | None


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
) -> Residual:
    """The operator in plain PyTorch, computed in x's dtype; arguments as in `residual`."""
    stream = x
    if branch is not None and branch_scale is not None:
        stream = stream + branch_scale.to(x.dtype) * branch
    total = stream if keep_sum else None
    if skip is not None and skip_weight is not None and skip_gate is not None:
        stream = torch.lerp(skip_weight.to(x.dtype) * skip, stream, torch.sigmoid(skip_gate.to(x.dtype)))
    if x0 is not None and mix is not None:
        stream = mix[0].to(x.dtype) * stream + mix[1].to(x.dtype) * x0
    normed = F.rms_norm(stream, (x.shape[-1],)) * norm_scale
    gate = None
    if gate_weight is not None:
        gate = torch.sigmoid(gate_scale * F.linear(normed[..., : gate_weight.shape[1]], gate_weight.to(x.dtype)))
    return Residual(total, stream, normed, gate, x0)


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
) -> Residual:
    """Add a branch to the stream, let a skip connection and the embedding in, and norm it for the next branch.

        s = x + branch_scale * branch                                 (s = x without a branch)
        t = lerp(skip_weight * skip, s, sigmoid(skip_gate))           (t = s without a skip)
        u = mix[0] * t + mix[1] * x0                                  (u = t without x0)
        n = norm_scale * u / sqrt(mean(u^2) + eps),  eps = machine_epsilon(x.dtype)
        g = sigmoid(gate_scale * n[..., :w] gate_weight^T)

    x, branch, skip, x0 [..., D]: bfloat16 or float32 (on the CPU float64 too), of one shape and dtype. branch_scale,
    skip_weight, skip_gate [D], mix [2, D] and gate_weight [heads, w], w <= D: float32 (float64 where x is).
    Returns sum = s (None unless keep_sum), stream = u, normed = n, gate = g [..., heads] (None without gate_weight) and
    x0, all in x's dtype. What is an argument unchanged (x0; sum and stream where nothing was added) is that argument
    passed through: the gradients of an x0 handed on from call to call then flow back as a chain, without additions of
    their own. Differentiable in all tensors. ValueError names the argument that does not fit.

    Runs the CUDA kernels where they were built for the device, D is a multiple of 8 and at most 1024, and heads and w
    are at most 32: in float32, each result rounded once, g from n as rounded. Elsewhere runs `reference`.
    """
    operands = Operands(x, branch, branch_scale, skip, skip_weight, skip_gate, x0, mix, gate_weight)
    _check(operands)
    kernel = _native.available(x.device) and _fits(x, gate_weight)
    return (fused if kernel else reference)(*operands, gate_scale, norm_scale, keep_sum)


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


# --- Operands and their checks ----------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """The tensors of `residual`, in its order."""

    x: Tensor
    branch: Tensor | None = None
    branch_scale: Tensor | None = None
    skip: Tensor | None = None
    skip_weight: Tensor | None = None
    skip_gate: Tensor | None = None
    x0: Tensor | None = None
    mix: Tensor | None = None
    gate_weight: Tensor | None = None

    @property
    def changed(self) -> bool:
        """Whether the stream is not x."""
        return self.branch is not None or self.skip is not None or self.x0 is not None

    @property
    def sections(self) -> list[int]:
        """The sizes of branch_scale, skip_weight, skip_gate, mix and gate_weight; 0 for what is not there."""
        parameters = (self.branch_scale, self.skip_weight, self.skip_gate, self.mix, self.gate_weight)
        return [0 if tensor is None else tensor.numel() for tensor in parameters]


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
        tensor = getattr(operands, activation)
        if tensor is not None:
            expect_like(name, activation, tensor, "x", x)
        for parameter in parameters:
            value = getattr(operands, parameter)
            if tensor is None:
                expect(value is None, name, parameter, f"None without {activation}", "a tensor")
            else:
                expect(value is not None, name, parameter, f"a tensor beside {activation}", None)
                expect_parameter(name, parameter, value, shape, "x", x)
    weight = operands.gate_weight
    if weight is not None:
        fits = weight.dim() == 2 and weight.shape[0] > 0 and 1 <= weight.shape[1] <= dim
        expect(fits, name, "gate_weight", f"shape [heads, w], 1 <= w <= {dim}", list(weight.shape))
        expect_parameter(name, "gate_weight", weight, list(weight.shape), "x", x)


def _fits(x: Tensor, gate_weight: Tensor | None = None) -> bool:
    """Whether the kernels take these widths and types."""
    gate = gate_weight is None or max(gate_weight.shape) <= MAX_GATE
    return gate and kernel_takes(x)


def _native_inputs(operands: Operands, gate_scale: float, norm_scale: float, eps: float) -> Any:
    """The kernels' description of aligned operands."""
    x, weight = operands.x, operands.gate_weight
    heads, window = (0, 0) if weight is None else weight.shape
    return _native.require().ResidualInputs(
        dtype=_native.dtype_code(x),
        **{name: address(tensor) for name, tensor in operands._asdict().items()},
        rows=x.numel() // x.shape[-1],
        dim=x.shape[-1],
        heads=heads,
        window=window,
        gate_scale=gate_scale,
        norm_scale=norm_scale,
        eps=eps,
    )


# --- Forward ----------------------------------------------------------------------------------------------------------


class _Values(NamedTuple):
    """What lies between the operands and the norm."""

    s: Tensor
    skipped: Tensor | None  # skip_weight * skip
    t: Tensor
    u: Tensor


def _values(o: Operands) -> _Values:
    s, skipped = wide(o.x), None
    if o.branch is not None:
        s = s + (wide(o.branch) if o.branch_scale is None else o.branch_scale * wide(o.branch))
    t = s
    if o.skip is not None and o.skip_weight is not None and o.skip_gate is not None:
        skipped = o.skip_weight * wide(o.skip)
        t = torch.lerp(skipped, s, torch.sigmoid(o.skip_gate))
    u = t if o.x0 is None or o.mix is None else o.mix[0] * t + o.mix[1] * wide(o.x0)
    return _Values(s, skipped, t, u)


class _Outputs(NamedTuple):
    normed: Tensor
    stream: Tensor | None
    sum: Tensor | None
    gate: Tensor | None


def _outputs(o: Operands, keep_sum: bool, keep_stream: bool) -> _Outputs:
    return _Outputs(
        room(o.x),
        room(o.x) if keep_stream and o.changed else None,
        room(o.x) if keep_sum and o.branch is not None else None,
        None if o.gate_weight is None else o.x.new_empty(*o.x.shape[:-1], o.gate_weight.shape[0]),
    )


@torch.library.custom_op("pgolf::residual", mutates_args=(), device_types="cpu")
def residual_op(
    operands: Sequence[Tensor | None],
    gate_scale: float,
    norm_scale: float,
    eps: float,
    keep_sum: bool,
    keep_stream: bool,
) -> list[Tensor]:
    """normed, then those of stream, sum and gate that are there: stream where it is not x and keep_stream is set, sum
    where it is not x and keep_sum is set, gate where gate_weight is given.

    operands: the nine of `Operands`. A branch alone may come without branch_scale, for ones. Not differentiable.
    """
    o = Operands(*operands)  # type: ignore[arg-type]
    v = _values(o)
    outs = _outputs(o, keep_sum, keep_stream)
    outs.normed.copy_(norm_scale * v.u * (v.u.square().mean(-1, keepdim=True) + eps).rsqrt())
    if outs.stream is not None:
        outs.stream.copy_(v.u)
    if outs.sum is not None:
        outs.sum.copy_(v.s)
    if outs.gate is not None and o.gate_weight is not None:
        logits = F.linear(wide(outs.normed[..., : o.gate_weight.shape[1]]), o.gate_weight)
        outs.gate.copy_(torch.sigmoid(gate_scale * logits))
    return present(*outs)


@residual_op.register_kernel("cuda")
def _forward_cuda(
    operands: Sequence[Tensor | None],
    gate_scale: float,
    norm_scale: float,
    eps: float,
    keep_sum: bool,
    keep_stream: bool,
) -> list[Tensor]:
    o = Operands(*aligned(operands))
    outs = _outputs(o, keep_sum, keep_stream)
    with torch.cuda.device(o.x.device):
        _native.require().residual_forward(
            **_native.target(o.x),
            inputs=_native_inputs(o, gate_scale, norm_scale, eps),
            sum=address(outs.sum),
            stream_out=address(outs.stream),
            normed=address(outs.normed),
            gate=address(outs.gate),
        )
    return present(*outs)


@residual_op.register_fake
def _forward_fake(
    operands: Sequence[Tensor | None],
    gate_scale: float,
    norm_scale: float,
    eps: float,
    keep_sum: bool,
    keep_stream: bool,
) -> list[Tensor]:
    return present(*_outputs(Operands(*operands), keep_sum, keep_stream))  # type: ignore[arg-type]


# --- Backward ---------------------------------------------------------------------------------------------------------


class _OutputGradients(NamedTuple):
    """What the backward is given, and the forward's gate."""

    sum: Tensor | None
    stream: Tensor | None
    normed: Tensor | None
    gate: Tensor | None
    x0: Tensor | None
    opened: Tensor | None  # the gate itself


class _Gradients(NamedTuple):
    x: Tensor
    branch: Tensor | None
    skip: Tensor | None
    x0: Tensor | None
    parameters: Tensor | None  # all in one vector, which `Operands.sections` cuts


def _gradients(o: Operands) -> _Gradients:
    """Room for the gradients; a branch without branch_scale has x's."""
    count = sum(o.sections)
    fill = o.x.new_empty if o.x.numel() else o.x.new_zeros  # the kernels do nothing without rows
    return _Gradients(
        room(o.x),
        None if o.branch_scale is None else room(o.x),
        None if o.skip is None else room(o.x),
        None if o.x0 is None else room(o.x),
        fill(count, dtype=torch.promote_types(o.x.dtype, torch.float32)) if count else None,
    )


@torch.library.custom_op("pgolf::residual_backward", mutates_args=(), device_types="cpu")
def residual_backward_op(
    given: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    gate_scale: float,
    norm_scale: float,
    eps: float,
) -> list[Tensor]:
    """The gradients of x and, where they are there, of branch, skip, x0, and of all parameters in one vector.

    given: the six of `_OutputGradients`, None counts as zeros; the rest as in `residual_op`.
    Written out and computed in the parameters' type, as the kernel does.
    """
    g, o = _OutputGradients(*given), Operands(*operands)  # type: ignore[arg-type]
    v, outs = _values(o), _gradients(o)
    rows = tuple(range(o.x.dim() - 1))
    sums: list[Tensor] = []

    grad = torch.zeros_like(v.u)  # of u, then of t, then of s
    if g.stream is not None:
        grad = grad + wide(g.stream)
    if g.normed is not None or g.gate is not None:
        of_n = torch.zeros_like(v.u) if g.normed is None else wide(g.normed).clone()
        rstd = (v.u.square().mean(-1, keepdim=True) + eps).rsqrt()
        if g.gate is not None and g.opened is not None and o.gate_weight is not None:
            heads, window = o.gate_weight.shape
            opened = wide(g.opened)
            of_logits = gate_scale * wide(g.gate) * opened * (1 - opened)
            of_n[..., :window] += of_logits @ o.gate_weight
            normed = wide((norm_scale * rstd * v.u).to(o.x.dtype))[..., :window]
            sums = [of_logits.reshape(-1, heads).T @ normed.reshape(-1, window)]
        unit = v.u * rstd
        grad = grad + norm_scale * rstd * (of_n - unit * (of_n * unit).mean(-1, keepdim=True))
    if o.gate_weight is not None and not sums:
        sums = [torch.zeros_like(o.gate_weight)]
    if o.x0 is not None and o.mix is not None and outs.x0 is not None:
        outs.x0.copy_(o.mix[1] * grad if g.x0 is None else o.mix[1] * grad + wide(g.x0))
        sums = [(grad * v.t).sum(rows), (grad * wide(o.x0)).sum(rows), *sums]
        grad = o.mix[0] * grad
    if o.skip is not None and o.skip_weight is not None and o.skip_gate is not None:
        assert v.skipped is not None and outs.skip is not None
        keep = torch.sigmoid(o.skip_gate)
        of_skipped = (1 - keep) * grad
        outs.skip.copy_(of_skipped * o.skip_weight)
        of_gate = (grad * (v.s - v.skipped)).sum(rows) * keep * (1 - keep)
        sums = [(of_skipped * wide(o.skip)).sum(rows), of_gate, *sums]
        grad = keep * grad
    if g.sum is not None:
        grad = grad + wide(g.sum)
    if o.branch is not None and o.branch_scale is not None and outs.branch is not None:
        outs.branch.copy_(o.branch_scale * grad)
        sums = [(grad * wide(o.branch)).sum(rows), *sums]
    outs.x.copy_(grad)
    if outs.parameters is not None:
        outs.parameters.copy_(torch.cat([part.flatten() for part in sums]))
    return present(*outs)


@residual_backward_op.register_kernel("cuda")
def _backward_cuda(
    given: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    gate_scale: float,
    norm_scale: float,
    eps: float,
) -> list[Tensor]:
    module = _native.require()
    g, o = _OutputGradients(*aligned(given)), Operands(*aligned(operands))
    outs, dim = _gradients(o), o.x.shape[-1]
    with torch.cuda.device(o.x.device):
        scratch = None
        if outs.parameters is not None:
            count = module.residual_scratch(o.x.numel() // dim, dim, len(outs.parameters))
            scratch = o.x.new_empty(count, dtype=torch.float32)
        module.residual_backward(
            **_native.target(o.x),
            inputs=_native_inputs(o, gate_scale, norm_scale, eps),
            gate=address(g.opened),
            grad_sum=address(g.sum),
            grad_stream=address(g.stream),
            grad_normed=address(g.normed),
            grad_gate=address(g.gate),
            grad_x0_out=address(g.x0),
            grad_x=address(outs.x),
            grad_branch=address(outs.branch),
            grad_skip=address(outs.skip),
            grad_x0=address(outs.x0),
            grad_parameters=address(outs.parameters),
            scratch=address(scratch),
        )
    return present(*outs)


@residual_backward_op.register_fake
def _backward_fake(
    given: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    gate_scale: float,
    norm_scale: float,
    eps: float,
) -> list[Tensor]:
    return present(*_gradients(Operands(*operands)))  # type: ignore[arg-type]


# --- Together ---------------------------------------------------------------------------------------------------------


class _Fused(torch.autograd.Function):
    """The two operators joined. Not by `register_autograd`, whose outputs cannot be inputs passed through."""

    @staticmethod
    def forward(ctx: Any, gate_scale: float, norm_scale: float, eps: float, keep_sum: bool, *operands: Any) -> Any:
        """normed and stream, then those of sum, gate and x0 that are there."""
        o = Operands(*operands)
        normed, *rest = residual_op(operands, gate_scale, norm_scale, eps, keep_sum, True)
        stream = rest.pop(0) if o.changed else o.x
        total = None
        if keep_sum:
            total = rest.pop(0) if o.branch is not None else o.x
        gate = rest.pop(0) if o.gate_weight is not None else None
        if not torch.compiler.is_compiling():  # which knows only zeros
            ctx.set_materialize_grads(False)  # no zeros of x's size for outputs that have no gradient
        ctx.save_for_backward(*present(*operands, gate))
        ctx.there = [tensor is not None for tensor in (*operands, gate)]
        ctx.numbers = (gate_scale, norm_scale, eps)
        ctx.keep_sum = keep_sum
        return tuple(present(normed, stream, total, gate, o.x0))

    @staticmethod
    def backward(ctx: Any, of_normed: Tensor | None, of_stream: Tensor | None, *rest: Tensor | None) -> Any:
        saved, others = list(ctx.saved_tensors), list(rest)
        operands: list[Any] = [saved.pop(0) if there else None for there in ctx.there]
        gate = operands.pop()
        o = Operands(*operands)
        of_sum = others.pop(0) if ctx.keep_sum else None
        of_gate = others.pop(0) if gate is not None else None
        of_x0 = others.pop(0) if o.x0 is not None else None
        of_x, *found = residual_backward_op(
            [of_sum, of_stream, of_normed, of_gate, of_x0, gate], operands, *ctx.numbers
        )
        of_branch, of_skip, of_x0 = (found.pop(0) if t is not None else None for t in (o.branch, o.skip, o.x0))
        sizes = o.sections
        cut = found.pop(0).split(sizes) if found else [None] * len(sizes)
        shapes = [None if size == 0 else part for size, part in zip(sizes, cut, strict=True)]
        scale, skip_weight, skip_gate, mix, gate_weight = shapes
        if mix is not None:
            mix = mix.view(2, -1)
        if gate_weight is not None:
            gate_weight = gate_weight.view(o.gate_weight.shape)  # type: ignore[union-attr]
        tensors = (of_x, of_branch, scale, of_skip, skip_weight, skip_gate, of_x0, mix, gate_weight)
        return None, None, None, None, *tensors


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
) -> Residual:
    """`residual` by its custom operators, which the CPU has too."""
    operands = (x, branch, branch_scale, skip, skip_weight, skip_gate, x0, mix, gate_weight)
    normed, stream, *others = _Fused.apply(gate_scale, norm_scale, machine_epsilon(x.dtype), keep_sum, *operands)
    total = others.pop(0) if keep_sum else None
    gate = others.pop(0) if gate_weight is not None else None
    return Residual(total, stream, normed, gate, others.pop(0) if x0 is not None else None)


class _FusedNormMean(torch.autograd.Function):
    """The norm of a sum is that of the mean, but for an epsilon four times as large: the mean's square is a fourth."""

    @staticmethod
    def forward(ctx: Any, lane0: Tensor, lane1: Tensor) -> Tensor:
        ctx.save_for_backward(lane0, lane1)
        normed: Tensor = residual_op(Operands(lane0, lane1), 1.0, 1.0, 4 * machine_epsilon(lane0.dtype), False, False)[
            0
        ]
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        lane0, lane1 = ctx.saved_tensors
        given = [None, None, grad, None, None, None]
        (found,) = residual_backward_op(given, Operands(lane0, lane1), 1.0, 1.0, 4 * machine_epsilon(lane0.dtype))
        return found, found


def fused_norm_mean(lane0: Tensor, lane1: Tensor) -> Tensor:
    """`norm_mean` by the custom operators, which the CPU has too."""
    normed: Tensor = _FusedNormMean.apply(lane0, lane1)
    return normed
