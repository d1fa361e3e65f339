"""Two residual lanes that both branches of a parallel layer write to (recipe section 2)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf.ops import _native
from pgolf.ops._rows import (
    address,
    aligned,
    expect_activation,
    expect_like,
    expect_parameter,
    kernel_takes,
    room,
    wide,
)


def reference(
    lane0: Tensor,
    lane1: Tensor,
    a: Tensor,
    m: Tensor,
    attn_scale: Tensor,
    mlp_scale: Tensor,
    post: Tensor,
    resid: Tensor,
) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch, computed in the lanes' dtype; arguments as in `lanes`."""
    attn_scale, mlp_scale, post, resid = (t.to(lane0.dtype) for t in (attn_scale, mlp_scale, post, resid))
    a, m = attn_scale * a, mlp_scale * m
    return (
        resid[0] * lane0 + post[0, 0] * a + post[1, 0] * m,
        resid[1] * lane1 + post[0, 1] * a + post[1, 1] * m,
    )


def lanes(
    lane0: Tensor,
    lane1: Tensor,
    a: Tensor,
    m: Tensor,
    attn_scale: Tensor,
    mlp_scale: Tensor,
    post: Tensor,
    resid: Tensor,
) -> tuple[Tensor, Tensor]:
    """The lanes after a parallel layer: lane j becomes resid[j] * lane_j + post[0, j] * A + post[1, j] * M with
    A = attn_scale * a and M = mlp_scale * m.

    lane0, lane1 and the branches' outputs a, m [..., D]: bfloat16 or float32 (on the CPU float64 too), of one shape and
    dtype; attn_scale, mlp_scale [D], post [2, 2], resid [2]: float32 (float64 where the lanes are). Returns both lanes,
    [..., D]. Differentiable in all. ValueError names the argument that does not fit.

    Runs the CUDA kernels where they were built for the device and D is a multiple of 8 and at most 1024: in float32,
    each result rounded once. Elsewhere runs `reference`.
    """
    operands = Operands(lane0, lane1, a, m, attn_scale, mlp_scale, post, resid)
    _check(operands)
    if _native.available(lane0.device) and kernel_takes(lane0):
        return lanes_op(*operands)
    return reference(*operands)


class Operands(NamedTuple):
    """The tensors of `lanes`, in its order."""

    lane0: Tensor
    lane1: Tensor
    a: Tensor
    m: Tensor
    attn_scale: Tensor
    mlp_scale: Tensor
    post: Tensor
    resid: Tensor


def _check(operands: Operands) -> None:
    """ValueError with one line naming the first argument that does not fit."""
    like = operands.lane0
    expect_activation("lanes", "lane0", like)
    for name in ("lane1", "a", "m"):
        expect_like("lanes", name, getattr(operands, name), "lane0", like)
    dim = like.shape[-1]
    for name, shape in (("attn_scale", [dim]), ("mlp_scale", [dim]), ("post", [2, 2]), ("resid", [2])):
        expect_parameter("lanes", name, getattr(operands, name), shape, "lane0", like)


def _native_inputs(operands: Operands) -> Any:
    """The kernels' description of aligned operands."""
    lane0 = operands.lane0
    return _native.require().LanesInputs(
        dtype=_native.dtype_code(lane0),
        **{name: address(tensor) for name, tensor in operands._asdict().items()},
        rows=lane0.numel() // lane0.shape[-1],
        dim=lane0.shape[-1],
    )


@torch.library.custom_op("pgolf::lanes", mutates_args=(), device_types="cpu")
def lanes_op(
    lane0: Tensor,
    lane1: Tensor,
    a: Tensor,
    m: Tensor,
    attn_scale: Tensor,
    mlp_scale: Tensor,
    post: Tensor,
    resid: Tensor,
) -> tuple[Tensor, Tensor]:
    """`lanes` on arguments that fit, of a width that the kernels take."""
    operands = Operands(*map(wide, (lane0, lane1, a, m, attn_scale, mlp_scale, post, resid)))
    out0, out1 = reference(*operands)
    return out0.to(lane0.dtype), out1.to(lane0.dtype)


@lanes_op.register_kernel("cuda")
def _forward_cuda(
    lane0: Tensor,
    lane1: Tensor,
    a: Tensor,
    m: Tensor,
    attn_scale: Tensor,
    mlp_scale: Tensor,
    post: Tensor,
    resid: Tensor,
) -> tuple[Tensor, Tensor]:
    operands = Operands(*aligned((lane0, lane1, a, m, attn_scale, mlp_scale, post, resid)))
    out0, out1 = room(lane0), room(lane0)
    with torch.cuda.device(lane0.device):
        _native.require().lanes_forward(
            **_native.target(lane0),
            inputs=_native_inputs(operands),
            out0=out0.data_ptr(),
            out1=out1.data_ptr(),
        )
    return out0, out1


@lanes_op.register_fake
def _forward_fake(
    lane0: Tensor,
    lane1: Tensor,
    a: Tensor,
    m: Tensor,
    attn_scale: Tensor,
    mlp_scale: Tensor,
    post: Tensor,
    resid: Tensor,
) -> tuple[Tensor, Tensor]:
    return room(lane0), room(lane0)


class _Gradients(NamedTuple):
    lane0: Tensor
    lane1: Tensor
    a: Tensor
    m: Tensor
    parameters: Tensor  # of attn_scale, mlp_scale, post and resid, or no values


def _gradients(lane0: Tensor, attn_scale: Tensor, parameters: bool) -> _Gradients:
    values = attn_scale.new_empty(2 * lane0.shape[-1] + 6 if parameters else 0)
    return _Gradients(room(lane0), room(lane0), room(lane0), room(lane0), values)


@torch.library.custom_op("pgolf::lanes_backward", mutates_args=(), device_types="cpu")
def lanes_backward_op(
    grad0: Tensor | None, grad1: Tensor | None, operands: Sequence[Tensor], parameters: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of lane0, lane1, a, m, and of attn_scale, mlp_scale, post and resid in one vector.

    grad0, grad1: of both results, None counts as zeros; operands: the eight of `Operands`; parameters: whether the
    vector is wanted, which else has no values.
    Written out and computed in the parameters' type, as the kernel does.
    """
    lane0, lane1, a, m, attn_scale, mlp_scale, post, resid = map(wide, operands)
    outs = _gradients(operands[0], attn_scale, parameters)
    g0, g1 = (torch.zeros_like(lane0) if grad is None else wide(grad) for grad in (grad0, grad1))
    of_a = post[0, 0] * g0 + post[0, 1] * g1
    of_m = post[1, 0] * g0 + post[1, 1] * g1
    for out, value in zip(outs, (resid[0] * g0, resid[1] * g1, attn_scale * of_a, mlp_scale * of_m), strict=False):
        out.copy_(value)
    if not parameters:
        return outs
    rows = tuple(range(lane0.dim() - 1))
    scalars = [(g * scaled).sum() for scaled in (attn_scale * a, mlp_scale * m) for g in (g0, g1)]
    scalars += [(g0 * lane0).sum(), (g1 * lane1).sum()]
    outs.parameters.copy_(torch.cat([(of_a * a).sum(rows), (of_m * m).sum(rows), torch.stack(scalars)]))
    return outs


@lanes_backward_op.register_kernel("cuda")
def _backward_cuda(
    grad0: Tensor | None, grad1: Tensor | None, operands: Sequence[Tensor], parameters: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = _native.require()
    o, (grad0, grad1) = Operands(*aligned(operands)), aligned((grad0, grad1))
    outs, dim = _gradients(o.lane0, o.attn_scale, parameters), o.lane0.shape[-1]
    with torch.cuda.device(o.lane0.device):
        scratch = None
        if parameters:
            scratch = o.attn_scale.new_empty(module.lanes_scratch(o.lane0.numel() // dim, dim))
        module.lanes_backward(
            **_native.target(o.lane0),
            inputs=_native_inputs(o),
            grad_out0=address(grad0),
            grad_out1=address(grad1),
            grad_lane0=outs.lane0.data_ptr(),
            grad_lane1=outs.lane1.data_ptr(),
            grad_a=outs.a.data_ptr(),
            grad_m=outs.m.data_ptr(),
            grad_parameters=outs.parameters.data_ptr(),
            scratch=address(scratch),
        )
    return outs


@lanes_backward_op.register_fake
def _backward_fake(
    grad0: Tensor | None, grad1: Tensor | None, operands: Sequence[Tensor], parameters: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(operands[0], operands[4], parameters)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros of a lane's size for one that is not used
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad0: Tensor | None, grad1: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_parameters = any(ctx.needs_input_grad[4:])
    *activations, parameters = lanes_backward_op(grad0, grad1, list(ctx.saved_tensors), needs_parameters)
    if not needs_parameters:
        return *activations, None, None, None, None
    dim = activations[0].shape[-1]
    attn_scale, mlp_scale, post, resid = parameters.split([dim, dim, 4, 2])
    return *activations, attn_scale, mlp_scale, post.view(2, 2), resid


lanes_op.register_autograd(_backward, setup_context=_setup_context)
