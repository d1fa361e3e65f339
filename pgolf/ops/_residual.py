"""The custom operators of `residual`, forward and backward; on the CPU in the kernels' arithmetic."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import _native
from pgolf.ops._rows import address, aligned, present, room, wide


class Operands(NamedTuple):
    """The tensors of `residual`, in its order. skip_weight without skip: the skip is the stream itself."""

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
        return self.blended or self.x0 is not None

    @property
    def blended(self) -> bool:
        """Whether something comes to x before x0 does."""
        return self.branch is not None or self.skip_weight is not None

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order of their gradients."""
        return self.branch_scale, self.skip_weight, self.skip_gate, self.mix, self.gate_weight

    @property
    def sections(self) -> list[int]:
        """The parameters' sizes; 0 for what is not there."""
        return [0 if tensor is None else tensor.numel() for tensor in self.parameters]


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
    if o.skip_weight is not None and o.skip_gate is not None:
        skipped = o.skip_weight * (s if o.skip is None else wide(o.skip))
        t = torch.lerp(skipped, s, torch.sigmoid(o.skip_gate))
    u = t if o.x0 is None or o.mix is None else o.mix[0] * t + o.mix[1] * wide(o.x0)
    return _Values(s, skipped, t, u)


class _Outputs(NamedTuple):
    normed: Tensor
    sum: Tensor | None
    blend: Tensor | None
    stream: Tensor | None
    gate: Tensor | None


def _outputs(o: Operands, keep_sum: bool, keep_blend: bool, keep_stream: bool) -> _Outputs:
    return _Outputs(
        room(o.x),
        room(o.x) if keep_sum and o.branch is not None else None,
        room(o.x) if keep_blend and o.blended else None,
        room(o.x) if keep_stream and o.changed else None,
        None if o.gate_weight is None else o.x.new_empty(*o.x.shape[:-1], o.gate_weight.shape[0]),
    )


@torch.library.custom_op("pgolf::residual", mutates_args=(), device_types="cpu")
def residual_op(
    operands: Sequence[Tensor | None],
    gate_scale: float,
    norm_scale: float,
    eps: float,
    keep_sum: bool,
    keep_blend: bool,
    keep_stream: bool,
) -> list[Tensor]:
    """normed, then those of sum, blend, stream and gate that are there: the first three where they are to be kept and
    are not x, gate where gate_weight is given.

    operands: the nine of `Operands`. A branch alone may come without branch_scale, for ones. Not differentiable.
    """
    o = Operands(*operands)  # type: ignore[arg-type]
    v = _values(o)
    outs = _outputs(o, keep_sum, keep_blend, keep_stream)
    outs.normed.copy_(norm_scale * v.u * (v.u.square().mean(-1, keepdim=True) + eps).rsqrt())
    for out, value in ((outs.sum, v.s), (outs.blend, v.t), (outs.stream, v.u)):
        if out is not None:
            out.copy_(value)
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
    keep_blend: bool,
    keep_stream: bool,
) -> list[Tensor]:
    o = Operands(*aligned(operands))
    outs = _outputs(o, keep_sum, keep_blend, keep_stream)
    with torch.cuda.device(o.x.device):
        _native.require().residual_forward(
            **_native.target(o.x),
            inputs=_native_inputs(o, gate_scale, norm_scale, eps),
            sum=address(outs.sum),
            blend=address(outs.blend),
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
    keep_blend: bool,
    keep_stream: bool,
) -> list[Tensor]:
    return present(*_outputs(Operands(*operands), keep_sum, keep_blend, keep_stream))  # type: ignore[arg-type]


# --- Backward ---------------------------------------------------------------------------------------------------------


class _OutputGradients(NamedTuple):
    """What the backward is given, and the forward's gate."""

    sum: Tensor | None
    blend: Tensor | None  # None without x0: there it is the stream
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


def _gradients(o: Operands, wanted: Sequence[bool] | None) -> _Gradients:
    """Room for the gradients of x and skip, and for those that are wanted; a branch without branch_scale has x's."""
    branch, x0, parameters = wanted or (True,) * 3
    count = sum(o.sections)
    fill = o.x.new_empty if o.x.numel() else o.x.new_zeros  # the kernels do nothing without rows
    return _Gradients(
        room(o.x),
        room(o.x) if branch and o.branch_scale is not None else None,
        None if o.skip is None else room(o.x),
        room(o.x) if x0 and o.x0 is not None else None,
        fill(count, dtype=torch.promote_types(o.x.dtype, torch.float32)) if parameters and count else None,
    )


@torch.library.custom_op("pgolf::residual_backward", mutates_args=(), device_types="cpu")
def residual_backward_op(
    given: Sequence[Tensor | None],
    operands: Sequence[Tensor | None],
    gate_scale: float,
    norm_scale: float,
    eps: float,
    wanted: Sequence[bool] | None = None,
) -> list[Tensor]:
    """The gradients of x and, where they are there, of branch, skip, x0, and of all parameters in one vector.

    given: the seven of `_OutputGradients`, None counts as zeros; wanted: whether to make those of branch, of x0 and of
    the parameters, None for all; the rest as in `residual_op`.
    Written out and computed in the parameters' type, as the kernel does.
    """
    g, o = _OutputGradients(*given), Operands(*operands)  # type: ignore[arg-type]
    v, outs = _values(o), _gradients(o, wanted)
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
    if o.x0 is not None and o.mix is not None:
        if outs.x0 is not None:
            outs.x0.copy_(o.mix[1] * grad if g.x0 is None else o.mix[1] * grad + wide(g.x0))
        sums = [(grad * v.t).sum(rows), (grad * wide(o.x0)).sum(rows), *sums]
        grad = o.mix[0] * grad
    if g.blend is not None:
        grad = grad + wide(g.blend)
    if o.skip_weight is not None and o.skip_gate is not None:
        assert v.skipped is not None
        keep = torch.sigmoid(o.skip_gate)
        of_skipped = (1 - keep) * grad
        of_gate = (grad * (v.s - v.skipped)).sum(rows) * keep * (1 - keep)
        skip = v.s if o.skip is None else wide(o.skip)
        sums = [(of_skipped * skip).sum(rows), of_gate, *sums]
        grad = keep * grad
        if outs.skip is None:
            grad = grad + of_skipped * o.skip_weight
        else:
            outs.skip.copy_(of_skipped * o.skip_weight)
    if g.sum is not None:
        grad = grad + wide(g.sum)
    if o.branch is not None and o.branch_scale is not None:
        if outs.branch is not None:
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
    wanted: Sequence[bool] | None = None,
) -> list[Tensor]:
    module = _native.require()
    g, o = _OutputGradients(*aligned(given)), Operands(*aligned(operands))
    outs, dim = _gradients(o, wanted), o.x.shape[-1]
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
            grad_blend=address(g.blend),
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
    wanted: Sequence[bool] | None = None,
) -> list[Tensor]:
    return present(*_gradients(Operands(*operands), wanted))  # type: ignore[arg-type]
