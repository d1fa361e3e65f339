"""Queries and keys ready for attention: RMS-norm of each head, partial rotary embedding, query gain (recipe section 2).

The gradient of the values arrives here in two parts, from attention and from XSA: their sum is written with the
gradients of queries and keys into one tensor, in one pass.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import _native
from pgolf.ops._heads import MAX_DIM, MAX_HEADS, aligned, rows_of
from pgolf.ops.embed import machine_epsilon


class QKV(NamedTuple):
    """Queries [B, T, H, d]; keys and values [B, T, Hk, d]. v and v_self are the same values, each with its gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    v_self: Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn columns i and i + r of x [B, T, heads, d], i < r, by each position's angle i: cos, sin [T, r], 2r <= d."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def _split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=2)


def reference(qkv: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> QKV:
    """`qk_rope` in plain PyTorch, computed in qkv's dtype."""
    q, k, v = _split(qkv, len(q_gain), kv_heads)
    gain, cos, sin = (x.to(qkv.dtype) for x in (q_gain, cos, sin))
    width = (q.shape[-1],)
    q = rotate(F.rms_norm(q, width), cos, sin) * gain[:, None]
    return QKV(q, rotate(F.rms_norm(k, width), cos, sin), v, v.view_as(v))


def qk_rope(qkv: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> QKV:
    """q = gain * R rms_norm(q), k = R rms_norm(k), v = v: R turns columns i and i + r, i < r, of each head by the
    position's angle i; eps of the norm is `machine_epsilon`.

    qkv [B, T, (H + 2 Hk) d]: q, k, v side by side, bfloat16, float32 or float64; q_gain [H]; cos, sin [T, r], 2r <= d:
    of the angles of positions 0 to T - 1; these three float32 (float64 where qkv is); kv_heads: Hk. Differentiable in
    qkv and q_gain. In the result q and k are new, v and v_self views of qkv. ValueError names the argument that does
    not fit.

    Runs the CUDA kernels where they were built for the device, qkv is bfloat16 or float32, and d a multiple of 8 and at
    most MAX_DIM (float32 inside, rounded once), else `reference`. Their backward takes the gradients of q, k, v and
    v_self as they are where a token's heads lie side by side.
    """
    _check(qkv, q_gain, cos, sin, kv_heads)
    if not _has_kernel(qkv, q_gain, kv_heads):
        return reference(qkv, q_gain, cos, sin, kv_heads)
    return QKV(*_QkRope.apply(qkv, q_gain, cos, sin, kv_heads))


def _has_kernel(qkv: Tensor, q_gain: Tensor, kv_heads: int) -> bool:
    if not _native.available(qkv.device) or qkv.dtype not in (torch.bfloat16, torch.float32):
        return False
    row_heads = len(q_gain) + 2 * kv_heads
    dim = qkv.shape[2] // row_heads
    return dim % 8 == 0 and dim <= MAX_DIM and qkv.shape[0] * qkv.shape[1] * row_heads <= MAX_HEADS


def _expect(fits: bool, argument: str, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"qk_rope: {argument}: expected {expected}, got {got}")


def _check(qkv: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> None:
    """ValueError with one line naming the first argument that does not fit."""
    types = (torch.bfloat16, torch.float32, torch.float64)
    names = ", ".join(str(t).removeprefix("torch.") for t in types)
    _expect(qkv.dim() == 3, "qkv", "shape [B, T, (H + 2 Hk) d]", list(qkv.shape))
    _expect(qkv.dtype in types, "qkv", f"one of {names}", qkv.dtype)
    _expect(q_gain.dim() == 1 and len(q_gain) > 0, "q_gain", "shape [H]", list(q_gain.shape))
    _expect(kv_heads > 0, "kv_heads", "a positive number", kv_heads)
    row_heads = len(q_gain) + 2 * kv_heads
    _expect(qkv.shape[2] % row_heads == 0 < qkv.shape[2], "qkv", f"{row_heads} heads side by side", list(qkv.shape))
    most = qkv.shape[2] // row_heads // 2
    fits = cos.dim() == 2 and cos.shape[0] == qkv.shape[1] and cos.shape[1] <= most
    _expect(fits, "cos", f"shape [{qkv.shape[1]}, r] with r <= {most}", list(cos.shape))
    _expect(sin.shape == cos.shape, "sin", f"shape {list(cos.shape)} as cos", list(sin.shape))
    parameter_type = torch.promote_types(qkv.dtype, torch.float32)
    for name, tensor in (("q_gain", q_gain), ("cos", cos), ("sin", sin)):
        _expect(tensor.dtype == parameter_type, name, parameter_type, tensor.dtype)
        _expect(tensor.device == qkv.device, name, f"a tensor on {qkv.device} as qkv", tensor.device)


# --- Forward ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pgolf::qk_rope", mutates_args=(), device_types="cpu")
def qk_rope_op(qkv: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> Tensor:
    """q and k of `qk_rope` side by side, [B, T, H + Hk, d]; computed in q_gain's type, as the kernel does."""
    heads = len(q_gain)
    q, k, _ = _split(qkv.to(q_gain.dtype), heads, kv_heads)
    x = torch.cat((q, k), dim=2)
    scale = (x.square().mean(-1, keepdim=True) + machine_epsilon(qkv.dtype)).rsqrt()
    scale[:, :, :heads] *= q_gain[:, None]
    return (rotate(x, cos, sin) * scale).to(qkv.dtype)


def _shared(qkv: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> dict[str, Any]:
    """What both launches take, of tensors that stay referenced by the caller."""
    heads = len(q_gain)
    return {
        **_native.target(qkv),
        "dtype": _native.dtype_code(qkv),
        "qkv": qkv.data_ptr(),
        "gain": q_gain.data_ptr(),
        "cos": cos.data_ptr(),
        "sin": sin.data_ptr(),
        "rows": qkv.shape[0] * qkv.shape[1],
        "length": qkv.shape[1],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": qkv.shape[2] // (heads + 2 * kv_heads),
        "half": cos.shape[1],
        "eps": machine_epsilon(qkv.dtype),
    }


@qk_rope_op.register_kernel("cuda")
def _forward_cuda(qkv: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> Tensor:
    out = _forward_fake(qkv, q_gain, cos, sin, kv_heads)
    qkv, q_gain, cos, sin = aligned(qkv), q_gain.contiguous(), aligned(cos), aligned(sin)
    with torch.cuda.device(qkv.device):
        _native.require().qk_rope_forward(**_shared(qkv, q_gain, cos, sin, kv_heads), out=out.data_ptr())
    return out


@qk_rope_op.register_fake
def _forward_fake(qkv: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> Tensor:
    heads = len(q_gain)
    return qkv.new_empty(*qkv.shape[:2], heads + kv_heads, qkv.shape[2] // (heads + 2 * kv_heads))


# --- Backward ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pgolf::qk_rope_backward", mutates_args=(), device_types="cpu")
def qk_rope_backward_op(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    grad_v_self: Tensor | None,
    qkv: Tensor,
    q_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
    gain: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and q_gain from those of the results, None for zeros; written out and computed in q_gain's type,
    as the kernel does. gain: whether the second is wanted, which else has no values."""
    q, k, v = _split(qkv.to(q_gain.dtype), len(q_gain), kv_heads)
    dq, dk, dv, dv_self = (
        torch.zeros_like(like) if grad is None else grad.to(q_gain.dtype)
        for grad, like in ((grad_q, q), (grad_k, k), (grad_v, v), (grad_v_self, v))
    )

    def back(x: Tensor, grad: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
        rstd = (x.square().mean(-1, keepdim=True) + machine_epsilon(qkv.dtype)).rsqrt()
        turned = rotate(grad, cos, -sin)
        along = (turned * x).sum(-1, keepdim=True) * rstd
        return scale * rstd * (turned - x * along * rstd / x.shape[-1]), along

    grad_queries, along = back(q, dq, q_gain[:, None])
    grad_keys, _ = back(k, dk, 1.0)
    grad_qkv = torch.cat((grad_queries, grad_keys, dv + dv_self), dim=2).flatten(2)
    return grad_qkv.to(qkv.dtype), along.sum((0, 1, 3)) if gain else q_gain.new_empty(0)


@qk_rope_backward_op.register_kernel("cuda")
def _backward_cuda(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    grad_v_self: Tensor | None,
    qkv: Tensor,
    q_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
    gain: bool = True,
) -> tuple[Tensor, Tensor]:
    module = _native.require()
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_gain = q_gain.new_empty(len(q_gain) if gain else 0)
    qkv, q_gain, cos, sin = aligned(qkv), q_gain.contiguous(), aligned(cos), aligned(sin)
    named = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v, "grad_v_self": grad_v_self}
    given = {name: rows_of(grad) for name, grad in named.items() if grad is not None}
    grads = dict.fromkeys([*named, *(f"{name}_stride" for name in named)], 0)
    for name, (grad, stride) in given.items():
        grads[name], grads[f"{name}_stride"] = grad.data_ptr(), stride
    shared = _shared(qkv, q_gain, cos, sin, kv_heads)
    scratch = q_gain.new_empty(module.qk_rope_scratch(shared["rows"], shared["heads"]) if gain else 0)
    with torch.cuda.device(qkv.device):
        module.qk_rope_backward(
            **shared,
            **grads,
            grad_qkv=grad_qkv.data_ptr(),
            grad_gain=grad_gain.data_ptr(),
            scratch=scratch.data_ptr(),
        )
    return grad_qkv, grad_gain


@qk_rope_backward_op.register_fake
def _backward_fake(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    grad_v_self: Tensor | None,
    qkv: Tensor,
    q_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
    gain: bool = True,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), q_gain.new_empty(len(q_gain) if gain else 0)


class _QkRope(torch.autograd.Function):
    """Not the operator's own autograd: a custom operator may not return views of its input."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int
    ) -> tuple[Tensor, ...]:
        if not torch.compiler.is_compiling():  # the compiler knows nothing else than zeros
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, q_gain, cos, sin)
        ctx.kv_heads = kv_heads
        q, k = qk_rope_op(qkv, q_gain, cos, sin, kv_heads).split((len(q_gain), kv_heads), dim=2)
        v = _split(qkv, len(q_gain), kv_heads)[2]
        return q, k, v, v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if all(grad is None for grad in grads):
            return None, None, None, None, None
        needs_gain = ctx.needs_input_grad[1]
        grad_qkv, grad_gain = qk_rope_backward_op(*grads, *ctx.saved_tensors, ctx.kv_heads, needs_gain)
        return grad_qkv, grad_gain if needs_gain else None, None, None, None
