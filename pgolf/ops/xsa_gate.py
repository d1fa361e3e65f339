"""What follows attention: XSA, then the heads' gates (recipe section 2, "Attention"), in one pass each way."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import _native
from pgolf.ops._heads import MAX_DIM, MAX_HEADS, aligned, rows_of

MIN_NORM = 1e-12  # a shorter v is divided by this


def reference(y: Tensor, v: Tensor, gate: Tensor | None = None, xsa: bool = True) -> Tensor:
    """`xsa_gate` in plain PyTorch, computed in y's dtype."""
    if xsa:
        unit = F.normalize(v, dim=-1, eps=MIN_NORM)[..., None, :]
        grouped = y.unflatten(2, (v.shape[2], -1))
        y = (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(2, 3)
    if gate is not None:
        y = y * gate[..., None]
    return y.flatten(2)


def xsa_gate(y: Tensor, v: Tensor, gate: Tensor | None = None, xsa: bool = True) -> Tensor:
    """gate * (y - (y . u) u), u = v / max(|v|, MIN_NORM): each head loses its part along the same token's value.

    y [B, T, H, d]: attention's output, bfloat16, float32 or float64; v [B, T, Hk, d], Hk a divisor of H: head h of y
    has head h // (H / Hk) of v; gate [B, T, H], or None for ones; all of one dtype. xsa False: gate * y, and v gets no
    gradient. Returns [B, T, H d]. Differentiable in y, v and gate. ValueError names the argument that does not fit.

    Runs the CUDA kernels where they were built for the device, y is bfloat16 or float32, and d a multiple of 8 and at
    most MAX_DIM (float32 inside, rounded once), else `reference`. They take v as it is where a token's heads lie side
    by side.
    """
    _check(y, v, gate)
    if not xsa and gate is None:
        return y.flatten(2)
    if not _has_kernel(y):
        return reference(y, v, gate, xsa)
    out: Tensor = _XsaGate.apply(y, v if xsa else None, gate)
    return out


def _has_kernel(y: Tensor) -> bool:
    if not _native.available(y.device) or y.dtype not in (torch.bfloat16, torch.float32):
        return False
    batch, length, heads, dim = y.shape
    return dim % 8 == 0 and dim <= MAX_DIM and batch * length * heads <= MAX_HEADS


def _expect(fits: bool, argument: str, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"xsa_gate: {argument}: expected {expected}, got {got}")


def _check(y: Tensor, v: Tensor, gate: Tensor | None) -> None:
    """ValueError with one line naming the first argument that does not fit."""
    types = (torch.bfloat16, torch.float32, torch.float64)
    names = ", ".join(str(t).removeprefix("torch.") for t in types)
    _expect(y.dim() == 4 and y.shape[2] * y.shape[3] > 0, "y", "shape [B, T, H, d]", list(y.shape))
    _expect(y.dtype in types, "y", f"one of {names}", y.dtype)
    batch, length, heads, dim = y.shape
    fits = v.dim() == 4 and v.shape[:2] == y.shape[:2] and v.shape[3] == dim
    fits = fits and v.shape[2] > 0 and heads % v.shape[2] == 0
    _expect(fits, "v", f"shape [{batch}, {length}, a divisor of {heads}, {dim}]", list(v.shape))
    others = [("v", v)]
    if gate is not None:
        _expect(gate.shape == y.shape[:3], "gate", f"shape {list(y.shape[:3])}", list(gate.shape))
        others.append(("gate", gate))
    for name, tensor in others:
        _expect(tensor.dtype == y.dtype, name, f"{y.dtype} as y", tensor.dtype)
        _expect(tensor.device == y.device, name, f"a tensor on {y.device} as y", tensor.device)


# --- Forward ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pgolf::xsa_gate", mutates_args=(), device_types="cpu")
def xsa_gate_op(y: Tensor, v: Tensor | None, gate: Tensor | None) -> Tensor:
    """`xsa_gate`, without XSA where v is None; computed in float32 at least, as the kernel does."""
    wide = torch.promote_types(y.dtype, torch.float32)
    wide_v, wide_gate = (x if x is None else x.to(wide) for x in (v, gate))
    out = reference(y.to(wide), y if wide_v is None else wide_v, wide_gate, xsa=v is not None)
    return out.to(y.dtype)


def _shared(y: Tensor, v: Tensor | None, stride: int, gate: Tensor | None) -> dict[str, Any]:
    """What both launches take, of tensors that the caller keeps. stride: v's values from token to token."""
    batch, length, heads, dim = y.shape
    kv_heads = heads if v is None else v.shape[2]
    return {
        **_native.target(y),
        "dtype": _native.dtype_code(y),
        "y": y.data_ptr(),
        "v": 0 if v is None else v.data_ptr(),
        "v_stride": stride,
        "gate": 0 if gate is None else gate.data_ptr(),
        "rows": batch * length,
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "head_dim": dim,
    }


@xsa_gate_op.register_kernel("cuda")
def _forward_cuda(y: Tensor, v: Tensor | None, gate: Tensor | None) -> Tensor:
    out = _forward_fake(y, v, gate)
    y = aligned(y)
    rows, stride = (None, 0) if v is None else rows_of(v)
    gates = None if gate is None else gate.contiguous()
    with torch.cuda.device(y.device):
        _native.require().xsa_gate_forward(**_shared(y, rows, stride, gates), out=out.data_ptr())
    return out


@xsa_gate_op.register_fake
def _forward_fake(y: Tensor, v: Tensor | None, gate: Tensor | None) -> Tensor:
    return y.new_empty(*y.shape[:2], y.shape[2] * y.shape[3])


# --- Backward ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pgolf::xsa_gate_backward", mutates_args=(), device_types="cpu")
def xsa_gate_backward_op(
    grad: Tensor, y: Tensor, v: Tensor | None, gate: Tensor | None, needs_v: bool = True, needs_gate: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, v and gate, of the latter two no values where there is no such argument or it needs none; written
    out and computed in float32 at least, as the kernel does. grad [B, T, H d]: that of the result."""
    wide = torch.promote_types(y.dtype, torch.float32)
    kv_heads = y.shape[2] if v is None else v.shape[2]
    x, g = (tensor.reshape(y.shape).to(wide).unflatten(2, (kv_heads, -1)) for tensor in (y, grad))
    gates = x.new_ones(()) if gate is None else gate.to(wide).unflatten(2, (kv_heads, -1))[..., None]
    grad_y, grad_v, grad_gate = g, x.new_empty(0), (g * x).sum(-1)
    if v is not None:
        norm = v.to(wide).norm(dim=-1)[..., None, None]
        least = norm.clamp_min(MIN_NORM)
        u = v.to(wide)[..., None, :] / least
        a, b = (x * u).sum(-1, keepdim=True), (g * u).sum(-1, keepdim=True)
        grad_y = g - b * u
        grad_gate = grad_gate - (a * b).squeeze(-1)
        along = torch.where(norm < MIN_NORM, 0, 2 * a * b)
        grad_v = -((gates * (a * g + b * x - along * u)).sum(3, keepdim=True) / least).squeeze(3)
    grad_y = (gates * grad_y).flatten(2, 3)
    grad_v = grad_v if needs_v else x.new_empty(0)
    grad_gate = grad_gate.flatten(2) if needs_gate and gate is not None else x.new_empty(0)
    return grad_y.to(y.dtype), grad_v.to(y.dtype), grad_gate.to(y.dtype)


@xsa_gate_backward_op.register_kernel("cuda")
def _backward_cuda(
    grad: Tensor, y: Tensor, v: Tensor | None, gate: Tensor | None, needs_v: bool = True, needs_gate: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    results = _backward_fake(grad, y, v, gate, needs_v, needs_gate)
    grad, y = aligned(grad), aligned(y)
    rows, stride = (None, 0) if v is None else rows_of(v)
    gates = None if gate is None else gate.contiguous()
    grad_y, grad_v, grad_gate = results
    with torch.cuda.device(y.device):
        _native.require().xsa_gate_backward(
            **_shared(y, rows, stride, gates),
            grad=grad.data_ptr(),
            grad_y=grad_y.data_ptr(),
            grad_v=grad_v.data_ptr(),
            grad_gate=grad_gate.data_ptr(),
        )
    return results


@xsa_gate_backward_op.register_fake
def _backward_fake(
    grad: Tensor, y: Tensor, v: Tensor | None, gate: Tensor | None, needs_v: bool = True, needs_gate: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    empty = y.new_empty
    grad_v = empty(v.shape if v is not None and needs_v else 0)
    return empty(y.shape), grad_v, empty(gate.shape if gate is not None and needs_gate else 0)


class _XsaGate(torch.autograd.Function):
    """Not the operator's own autograd: an argument may be missing, and then has no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, v: Tensor | None, gate: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(y, v, gate)
        out: Tensor = xsa_gate_op(y, v, gate)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, v, gate = ctx.saved_tensors
        _, needs_v, needs_gate = ctx.needs_input_grad
        grad_y, grad_v, grad_gate = xsa_gate_backward_op(grads[0], y, v, gate, needs_v, needs_gate)
        return grad_y, grad_v if needs_v else None, grad_gate if needs_gate else None
