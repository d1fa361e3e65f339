"""The model's input in one operator: embedding, SmearGate and RMS-norm (recipe section 2, "Embedding + SmearGate").

The gradient of the embedding needs no [tokens, D] tensor of its own: the backward sorts the positions by token and adds
each token's rows up in registers, in an order that depends on the ids alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import _native, smear_gate

MAX_VOCAB = 1 << 18  # of the kernels' sort
MAX_TOKENS = (1 << 31) - 1

Context = torch.autograd.function.FunctionCtx


def machine_epsilon(dtype: torch.dtype) -> float:
    """What torch.rms_norm adds to the mean square: the epsilon of the type it computes in, float32 for bfloat16."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def reference(
    ids: Tensor,
    weight: Tensor,
    gate_weight: Tensor,
    lam: Tensor,
    bos: int = 1,
    dtype: torch.dtype | None = None,
    eps: float | None = None,
) -> Tensor:
    """The operator in plain PyTorch, computed in `dtype`; arguments as in `embed`."""
    dtype = dtype or weight.dtype
    e = F.embedding(ids, weight.to(dtype))
    return F.rms_norm(smear_gate.reference(e, ids, gate_weight, lam, bos), (weight.shape[1],), eps=eps)


def embed(
    ids: Tensor,
    weight: Tensor,
    gate_weight: Tensor,
    lam: Tensor,
    bos: int = 1,
    dtype: torch.dtype | None = None,
    eps: float | None = None,
) -> Tensor:
    """rms_norm(s), s[b, t] = e[b, t] + lam * sigmoid(gate_weight . e[b, t, :W]) * e[b, t-1], e = weight[ids]; nothing
    is added to the first token of a row and to BOS.

    ids [B, T] int64; weight [V, D]: the embedding; gate_weight [1, W], W <= D, and lam [1]: float32 (float64 where
    `dtype` is). dtype: bfloat16 or float32 (on the CPU float64 too), what the embedding is rounded to first and the
    result's type; by default weight's, otherwise weight is float32. eps: added to the mean square, by default
    `machine_epsilon(dtype)`. Returns [B, T, D]. Differentiable in weight (its gradient has weight's type, without
    rounding in between), gate_weight and lam. ValueError names the argument that does not fit.

    An id outside [0, V) is an IndexError on the CPU; the kernel makes each row that needs it NaN, and gives it no
    gradient. Runs the CUDA kernels where they were built for the device (float32 inside, rounded once), else
    `reference`.
    """
    if _native.available(ids.device):
        x0: Tensor = embed_op(ids, weight, gate_weight, lam, bos, dtype, eps)[0]
        return x0
    _check(ids, weight, gate_weight, lam, dtype)
    return reference(ids, weight, gate_weight, lam, bos, dtype, eps)


# --- Checks -----------------------------------------------------------------------------------------------------------


def _expect(fits: bool, argument: str, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"embed: {argument}: expected {expected}, got {got}")


def _check(ids: Tensor, weight: Tensor, gate_weight: Tensor, lam: Tensor, dtype: torch.dtype | None) -> None:
    """ValueError with one line naming the first argument that does not fit."""
    types = (torch.bfloat16, torch.float32) if ids.is_cuda else (torch.bfloat16, torch.float32, torch.float64)
    names = ", ".join(str(t).removeprefix("torch.") for t in types)
    _expect(ids.dim() == 2, "ids", "shape [B, T]", list(ids.shape))
    _expect(ids.dtype == torch.int64, "ids", "int64", ids.dtype)
    _expect(weight.dim() == 2 and weight.numel() > 0, "weight", "shape [V, D], neither zero", list(weight.shape))
    _expect(weight.dtype in types, "weight", f"one of {names}", weight.dtype)
    dtype = dtype or weight.dtype
    _expect(dtype in types, "dtype", f"one of {names}", dtype)
    _expect(weight.dtype in (dtype, torch.float32), "weight", f"float32 or {dtype} as dtype", weight.dtype)
    width = weight.shape[1]
    fits = gate_weight.dim() == 2 and gate_weight.shape[0] == 1 and 1 <= gate_weight.shape[1] <= width
    _expect(fits, "gate_weight", f"shape [1, W] with 1 <= W <= {width}", list(gate_weight.shape))
    _expect(lam.shape == (1,), "lam", "shape [1]", list(lam.shape))
    parameter_type = torch.promote_types(dtype, torch.float32)
    for name, tensor in (("gate_weight", gate_weight), ("lam", lam)):
        _expect(tensor.dtype == parameter_type, name, parameter_type, tensor.dtype)
    for name, tensor in (("weight", weight), ("gate_weight", gate_weight), ("lam", lam)):
        _expect(tensor.device == ids.device, name, f"a tensor on {ids.device} as ids", tensor.device)
    if ids.is_cuda:
        _expect(ids.numel() <= MAX_TOKENS, "ids", f"at most {MAX_TOKENS} tokens", ids.numel())
        _expect(len(weight) <= MAX_VOCAB, "weight", f"at most {MAX_VOCAB} rows", len(weight))


# --- Forward ----------------------------------------------------------------------------------------------------------


def _empty_results(
    ids: Tensor, weight: Tensor, dtype: torch.dtype, statistics_type: torch.dtype
) -> tuple[Tensor, Tensor]:
    x0 = weight.new_empty(*ids.shape, weight.shape[1], dtype=dtype)
    return x0, weight.new_empty(2, *ids.shape, dtype=statistics_type)


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The embedding in `dtype` for the backward; no values where it is weight itself, which is kept anyway."""
    return weight.new_empty(0, dtype=dtype) if weight.dtype == dtype else weight.to(dtype)


@torch.library.custom_op("pgolf::embed", mutates_args=(), device_types="cpu")
def embed_op(
    ids: Tensor,
    weight: Tensor,
    gate_weight: Tensor,
    lam: Tensor,
    bos: int,
    dtype: torch.dtype | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`embed`'s result, differentiable, and what its backward needs.

    The latter are statistics [2, B, T] in lam's type: each token's 1 / sqrt(mean(s^2) + eps), and its gate's sigmoid,
    -1 where nothing is added; and the rounded embedding, empty where weight has `dtype` already.
    """
    _check(ids, weight, gate_weight, lam, dtype)
    dtype = dtype or weight.dtype
    table = weight.to(dtype)
    x0 = reference(ids, table, gate_weight, lam, bos, eps=eps)
    # As the kernel has them, and the backward needs them: of unrounded sums.
    e = F.embedding(ids, table).to(lam.dtype)
    statistics = _empty_results(ids, weight, dtype, lam.dtype)[1]
    mean_square = smear_gate.reference(e, ids, gate_weight, lam, bos).square().mean(-1)
    statistics[0] = (mean_square + (machine_epsilon(dtype) if eps is None else eps)).rsqrt()
    sigmoid = torch.sigmoid(F.linear(e[..., : gate_weight.shape[1]], gate_weight)).squeeze(-1)
    statistics[1] = torch.where(_smeared(ids, bos), sigmoid, -1)
    return x0, statistics, _rounded(weight, dtype)


def _smeared(ids: Tensor, bos: int) -> Tensor:
    """Where a token takes a share of the one before it."""
    smeared = ids != bos
    smeared[:, :1] = False
    return smeared


@embed_op.register_kernel("cuda")
def _forward_cuda(
    ids: Tensor,
    weight: Tensor,
    gate_weight: Tensor,
    lam: Tensor,
    bos: int,
    dtype: torch.dtype | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(ids, weight, gate_weight, lam, dtype)
    dtype = dtype or weight.dtype
    rounded = _rounded(weight, dtype)
    table = (rounded if rounded.numel() else weight).contiguous()
    ids, gate_weight = ids.contiguous(), gate_weight.contiguous()
    x0, statistics = _empty_results(ids, weight, dtype, lam.dtype)
    with torch.cuda.device(ids.device):
        _native.require().embed_forward(
            **_native.target(ids),
            dtype=_native.dtype_code(table),
            ids=ids.data_ptr(),
            weight=table.data_ptr(),
            gate_weight=gate_weight.data_ptr(),
            lam=lam.data_ptr(),
            out=x0.data_ptr(),
            statistics=statistics.data_ptr(),
            rows=ids.numel(),
            length=ids.shape[1],
            dim=weight.shape[1],
            window=gate_weight.shape[1],
            vocab=len(weight),
            bos=bos,
            eps=machine_epsilon(dtype) if eps is None else eps,
        )
    return x0, statistics, rounded


@embed_op.register_fake
def _forward_fake(
    ids: Tensor,
    weight: Tensor,
    gate_weight: Tensor,
    lam: Tensor,
    bos: int,
    dtype: torch.dtype | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(ids, weight, gate_weight, lam, dtype)
    dtype = dtype or weight.dtype
    rounded = weight.new_empty((0,) if weight.dtype == dtype else weight.shape, dtype=dtype)
    return *_empty_results(ids, weight, dtype, lam.dtype), rounded


# --- Backward ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pgolf::embed_backward", mutates_args=(), device_types="cpu")
def embed_backward_op(
    grad: Tensor,
    ids: Tensor,
    table: Tensor,
    gate_weight: Tensor,
    lam: Tensor,
    statistics: Tensor,
    weight_type: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight (in `weight_type`), gate_weight and lam, written out and computed in lam's type.

    grad [B, T, D]: that of the result, in the type of `table`, the embedding as the forward used it.
    """
    window = gate_weight.shape[1]
    rstd, sigmoid = statistics.unsqueeze(-1)
    smeared = sigmoid >= 0  # a NaN sigmoid makes the row NaN by rstd
    smeared |= sigmoid.isnan()
    e, g = F.embedding(ids, table).to(lam.dtype), grad.to(lam.dtype)
    before = torch.where(smeared, e.roll(1, 1), 0)
    gate = torch.where(smeared, lam * sigmoid, 0)
    s = torch.where(smeared, e + gate * before, e)
    x0 = s * rstd
    grad_s = (g - x0 * (g * x0).mean(-1, keepdim=True)) * rstd
    dot = torch.where(smeared, (grad_s * before).sum(-1, keepdim=True), 0)
    grad_logit = torch.where(smeared, gate * (1 - sigmoid) * dot, 0)
    grad_e = grad_s + torch.where(smeared, gate * grad_s, 0).roll(-1, 1)
    grad_e[..., :window] += torch.where(smeared, grad_logit * gate_weight, 0)
    grad_weight = grad_e.new_zeros(table.shape).index_add_(0, ids.flatten(), grad_e.flatten(0, 1))
    grad_gate_weight = torch.where(smeared, grad_logit * e[..., :window], 0).sum((0, 1)).reshape(1, window)
    grad_lam = torch.where(smeared, sigmoid * dot, 0).sum().reshape(1)
    return grad_weight.to(weight_type), grad_gate_weight, grad_lam


@embed_backward_op.register_kernel("cuda")
def _backward_cuda(
    grad: Tensor,
    ids: Tensor,
    table: Tensor,
    gate_weight: Tensor,
    lam: Tensor,
    statistics: Tensor,
    weight_type: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    module = _native.require()
    grad, ids, table, gate_weight = grad.contiguous(), ids.contiguous(), table.contiguous(), gate_weight.contiguous()
    results = _backward_fake(grad, ids, table, gate_weight, lam, statistics, weight_type)
    if not ids.numel():
        return results[0].zero_(), results[1].zero_(), results[2].zero_()
    grad_weight, grad_gate_weight, grad_lam = results
    sizes = {"rows": ids.numel(), "dim": table.shape[1], "vocab": len(table)}
    scratch = ids.new_empty(module.embed_scratch(**sizes), dtype=torch.int32)
    with torch.cuda.device(ids.device):
        module.embed_backward(
            **_native.target(ids),
            dtype=_native.dtype_code(table),
            grad_dtype=_native.dtype_code(grad_weight),
            grad=grad.data_ptr(),
            ids=ids.data_ptr(),
            weight=table.data_ptr(),
            gate_weight=gate_weight.data_ptr(),
            lam=lam.data_ptr(),
            statistics=statistics.data_ptr(),
            grad_weight=grad_weight.data_ptr(),
            grad_gate_weight=grad_gate_weight.data_ptr(),
            grad_lam=grad_lam.data_ptr(),
            scratch=scratch.data_ptr(),
            window=gate_weight.shape[1],
            **sizes,
        )
    return results


@embed_backward_op.register_fake
def _backward_fake(
    grad: Tensor,
    ids: Tensor,
    table: Tensor,
    gate_weight: Tensor,
    lam: Tensor,
    statistics: Tensor,
    weight_type: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = table.new_empty(table.shape, dtype=weight_type)
    return grad_weight, gate_weight.new_empty(gate_weight.shape), lam.new_empty(lam.shape)


def _setup_context(ctx: Context, inputs: tuple, output: tuple) -> None:
    ids, weight, gate_weight, lam, *_ = inputs
    _, statistics, rounded = output
    ctx.mark_non_differentiable(statistics, rounded)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(ids, weight, gate_weight, lam, statistics, rounded)


def _backward(ctx: Context, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    ids, weight, gate_weight, lam, statistics, rounded = ctx.saved_tensors  # type: ignore[attr-defined]
    table = rounded if rounded.numel() else weight
    grads = embed_backward_op(grad, ids, table, gate_weight, lam, statistics, weight.dtype)
    return None, *grads, None, None, None


embed_op.register_autograd(_backward, setup_context=_setup_context)
