"""SmearGate: each token's embedding takes a gated share of the one before it, within a document."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import _native


def reference(e: Tensor, ids: Tensor, weight: Tensor, lam: Tensor, bos: int = 1) -> Tensor:
    """SmearGate in plain PyTorch, computed in e's dtype; arguments as in `smear_gate`."""
    window = weight.shape[1]
    gate = lam.to(e.dtype) * torch.sigmoid(F.linear(e[:, 1:, :window], weight.to(e.dtype)))
    starts = (ids[:, 1:] == bos).unsqueeze(-1)
    # Selected, not multiplied by zero: an infinite or NaN embedding must not reach the next document either.
    smeared = torch.where(starts, e[:, 1:], e[:, 1:] + gate * e[:, :-1])
    return torch.cat([e[:, :1], smeared], dim=1)


def smear_gate(e: Tensor, ids: Tensor, weight: Tensor, lam: Tensor, bos: int = 1) -> Tensor:
    """out[b, t] = e[b, t] + lam * sigmoid(weight . e[b, t, :W]) * e[b, t-1]; the first token and BOS stay as they are.

    e [B, T, D]: embeddings (bfloat16, float32; on the CPU float64 too); ids [B, T] int64: their tokens;
    weight [1, W], W <= D, and lam [1]: float32 (float64 where e is). Differentiable in e, weight and lam.
    Returns [B, T, D] in e's dtype. ValueError names the argument that does not fit.

    Runs the CUDA kernel where it was built for the device (float32 inside, rounded once), else `reference`.
    """
    if _native.available(e.device):
        return smear_gate_op(e, ids, weight, lam, bos)
    _check(e, ids, weight, lam)
    return reference(e, ids, weight, lam, bos)


def _expect(fits: bool, argument: str, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"smear_gate: {argument}: expected {expected}, got {got}")


def _check(e: Tensor, ids: Tensor, weight: Tensor, lam: Tensor) -> None:
    """ValueError with one line naming the first argument that does not fit."""
    types = (torch.bfloat16, torch.float32) if e.is_cuda else (torch.bfloat16, torch.float32, torch.float64)
    names = ", ".join(str(t).removeprefix("torch.") for t in types)
    _expect(e.dim() == 3, "e", "shape [B, T, D]", list(e.shape))
    _expect(e.dtype in types, "e", f"one of {names}", e.dtype)
    _expect(ids.shape == e.shape[:2], "ids", f"shape {list(e.shape[:2])} as e", list(ids.shape))
    _expect(ids.dtype == torch.int64, "ids", "int64", ids.dtype)
    fits = weight.dim() == 2 and weight.shape[0] == 1 and 1 <= weight.shape[1] <= e.shape[2]
    _expect(fits, "weight", f"shape [1, W] with 1 <= W <= {e.shape[2]}", list(weight.shape))
    _expect(lam.shape == (1,), "lam", "shape [1]", list(lam.shape))
    parameter_type = torch.promote_types(e.dtype, torch.float32)
    for name, tensor in (("weight", weight), ("lam", lam)):
        _expect(tensor.dtype == parameter_type, name, parameter_type, tensor.dtype)
    for name, tensor in (("ids", ids), ("weight", weight), ("lam", lam)):
        _expect(tensor.device == e.device, name, f"a tensor on {e.device} as e", tensor.device)


@torch.library.custom_op("pgolf::smear_gate", mutates_args=(), device_types="cpu")
def smear_gate_op(e: Tensor, ids: Tensor, weight: Tensor, lam: Tensor, bos: int) -> Tensor:
    _check(e, ids, weight, lam)
    return reference(e, ids, weight, lam, bos)


@torch.library.custom_op("pgolf::smear_gate_backward", mutates_args=(), device_types="cpu")
def smear_gate_backward_op(
    grad: Tensor, e: Tensor, ids: Tensor, weight: Tensor, lam: Tensor, bos: int, parameters: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of e, weight and lam, written out and computed in the parameters' type, as the kernel does.

    parameters: whether the latter two are wanted, which else have no values.
    """
    window = weight.shape[1]
    wide_e, wide_grad = e.to(weight.dtype), grad.to(weight.dtype)
    previous, inputs, grad_out = wide_e[:, :-1], wide_e[:, 1:, :window], wide_grad[:, 1:]
    sigmoid = torch.sigmoid(F.linear(inputs, weight))
    starts = (ids[:, 1:] == bos).unsqueeze(-1)
    gate = (lam * sigmoid).masked_fill(starts, 0)
    dot = (grad_out * previous).sum(-1, keepdim=True).masked_fill(starts, 0)
    grad_logit = gate * (1 - sigmoid) * dot
    grad_e = wide_grad.clone(memory_format=torch.contiguous_format)
    grad_e[:, :-1] += gate * grad_out
    grad_e[:, 1:, :window] += grad_logit * weight
    if not parameters:
        return grad_e.to(e.dtype), weight.new_empty(0), lam.new_empty(0)
    grad_weight = (grad_logit * inputs).sum((0, 1)).reshape(1, window)
    return grad_e.to(e.dtype), grad_weight, (sigmoid * dot).sum().reshape(1)


@smear_gate_op.register_kernel("cuda")
def _forward_cuda(e: Tensor, ids: Tensor, weight: Tensor, lam: Tensor, bos: int) -> Tensor:
    _check(e, ids, weight, lam)
    e, ids, weight = e.contiguous(), ids.contiguous(), weight.contiguous()
    out = torch.empty_like(e)
    with torch.cuda.device(e.device):
        _native.require().smear_gate_forward(
            **_native.stream_of(e),
            dtype=_native.dtype_code(e),
            e=e.data_ptr(),
            ids=ids.data_ptr(),
            weight=weight.data_ptr(),
            lam=lam.data_ptr(),
            out=out.data_ptr(),
            rows=ids.numel(),
            length=e.shape[1],
            dim=e.shape[2],
            window=weight.shape[1],
            bos=bos,
        )
    return out


@smear_gate_backward_op.register_kernel("cuda")
def _backward_cuda(
    grad: Tensor, e: Tensor, ids: Tensor, weight: Tensor, lam: Tensor, bos: int, parameters: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    module = _native.require()
    grad, e, ids, weight = grad.contiguous(), e.contiguous(), ids.contiguous(), weight.contiguous()
    grad_e, grad_weight, grad_lam = _backward_fake(grad, e, ids, weight, lam, bos, parameters)
    window = weight.shape[1]
    scratch = weight.new_empty(module.smear_gate_scratch(ids.numel(), window) if parameters else 0)
    with torch.cuda.device(e.device):
        module.smear_gate_backward(
            **_native.stream_of(e),
            dtype=_native.dtype_code(e),
            grad=grad.data_ptr(),
            e=e.data_ptr(),
            ids=ids.data_ptr(),
            weight=weight.data_ptr(),
            lam=lam.data_ptr(),
            grad_e=grad_e.data_ptr(),
            grad_weight=grad_weight.data_ptr(),
            grad_lam=grad_lam.data_ptr(),
            scratch=scratch.data_ptr(),
            rows=ids.numel(),
            length=e.shape[1],
            dim=e.shape[2],
            window=window,
            bos=bos,
        )
    return grad_e, grad_weight, grad_lam


@smear_gate_op.register_fake
def _forward_fake(e: Tensor, ids: Tensor, weight: Tensor, lam: Tensor, bos: int) -> Tensor:
    _check(e, ids, weight, lam)
    return torch.empty_like(e, memory_format=torch.contiguous_format)


@smear_gate_backward_op.register_fake
def _backward_fake(
    grad: Tensor, e: Tensor, ids: Tensor, weight: Tensor, lam: Tensor, bos: int, parameters: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    grad_e = torch.empty_like(e, memory_format=torch.contiguous_format)
    grad_weight, grad_lam = (tensor.new_empty(tensor.shape if parameters else 0) for tensor in (weight, lam))
    return grad_e, grad_weight, grad_lam


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, bos = inputs
    ctx.save_for_backward(*tensors)
    ctx.bos = bos  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    e, ids, weight, lam = ctx.saved_tensors  # type: ignore[attr-defined]
    needs = any(ctx.needs_input_grad[2:4])  # type: ignore[attr-defined]
    grad_e, *parameters = smear_gate_backward_op(grad, e, ids, weight, lam, ctx.bos, needs)  # type: ignore[attr-defined]
    grad_weight, grad_lam = parameters if needs else (None, None)
    return grad_e, None, grad_weight, grad_lam, None


smear_gate_op.register_autograd(_backward, setup_context=_setup_context)
