"""Cross-entropy of softcapped logits, fused with the head that makes them: no float32 logits in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import _native

MAX_CAP = 64.0  # of the kernels, whose softmax subtracts no maximum: exp(64) and its sums fit float32
CHUNK_BYTES = 1 << 29  # of the only large buffer, one bfloat16 a logit: rows are taken in chunks of at most this


def reference(h: Tensor, weight: Tensor, targets: Tensor, cap: float = 30.0, reduction: str = "mean") -> Tensor:
    """`cross_entropy` in plain PyTorch: logits in h's dtype, the rest in float32 (float64 where h is)."""
    logits = F.linear(h.flatten(0, -2), weight)
    logits = logits.to(torch.promote_types(h.dtype, torch.float32))
    return F.cross_entropy(cap * torch.tanh(logits / cap), targets.flatten(), reduction=reduction)


def token_losses_reference(
    h: Tensor, weight: Tensor, targets: Tensor, cap_pos: Tensor | float, cap_neg: Tensor | float
) -> Tensor:
    """`token_losses` in plain PyTorch: logits in h's dtype, the rest in float32 (float64 where h is)."""
    logits = F.linear(h.flatten(0, -2), weight)
    logits = logits.to(torch.promote_types(h.dtype, torch.float32))
    cap = torch.where(logits > 0, cap_pos, cap_neg)
    losses = F.cross_entropy(cap * torch.tanh(logits / cap), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, cap: float = 30.0, reduction: str = "mean") -> Tensor:
    """Mean (or sum) over tokens of the cross-entropy in nats of cap * tanh(u / cap), u = h weightᵀ (recipe section 2).

    h [..., D]; weight [V, D] in h's dtype (bfloat16, float32, float64); targets [...] int64 in [0, V); cap > 0;
    reduction "mean" or "sum". Returns a 0-dim tensor, float32 (float64 where h is); differentiable in h and weight.
    A target out of range is an IndexError on the CPU; in the kernels its loss is NaN. ValueError names an argument that
    does not fit.

    Runs the CUDA kernels where they were built for the device and h is bfloat16, D and V are multiples of 8 and
    cap <= MAX_CAP, else `reference`. The kernels compute both gradients in the forward, so that a logit is never
    computed twice; beside what they return they take little more than `CHUNK_BYTES`, however many tokens there are.
    """
    _check("cross_entropy", h, weight, targets)
    _check_loss(cap, reduction)
    if not (cap <= MAX_CAP and _has_kernel(h, weight, targets)):
        return reference(h, weight, targets, cap, reduction)
    if torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad):
        loss: Tensor = cross_entropy_op(h, weight, targets, cap, reduction, weight.requires_grad)[0]
        return loss
    losses = token_losses(h, weight, targets, cap, cap)
    return losses.mean() if reduction == "mean" else losses.sum()


def token_losses(
    h: Tensor, weight: Tensor, targets: Tensor, cap_pos: Tensor | float, cap_neg: Tensor | float
) -> Tensor:
    """Cross-entropy in nats of each token, its logits u softcapped by cap_pos where u > 0 and by cap_neg elsewhere.

    Arguments, errors and kernels as `cross_entropy`; the caps are numbers or tensors of one element on h's device,
    float32 (float64 where h is). Returns targets' shape, float32 (float64 where h is), without gradient.

    The kernels do not look at a cap tensor before they run: one outside (0, MAX_CAP] makes every loss NaN.
    """
    _check("token_losses", h, weight, targets)
    h, weight = h.detach(), weight.detach()
    caps, fit = [], True
    for name, cap in (("cap_pos", cap_pos), ("cap_neg", cap_neg)):
        if isinstance(cap, Tensor):
            _expect("token_losses", cap.numel() == 1, name, "one element", list(cap.shape))
            _expect("token_losses", cap.device == h.device, name, f"a tensor on {h.device} as h", cap.device)
            caps.append(cap.detach())
        else:
            _expect("token_losses", cap > 0, name, "a positive number", cap)
            caps.append(h.new_full((), cap, dtype=torch.promote_types(h.dtype, torch.float32)))
            fit &= cap <= MAX_CAP
    if fit and _has_kernel(h, weight, targets):
        losses: Tensor = token_losses_op(h, weight, targets, *caps)
        return losses
    return token_losses_reference(h, weight, targets, *caps)


def _has_kernel(h: Tensor, weight: Tensor, targets: Tensor) -> bool:
    if not _native.available(h.device):
        return False
    return h.dtype == torch.bfloat16 and h.shape[-1] % 8 == 0 and weight.shape[0] % 8 == 0 and targets.numel() > 0


def _expect(operator: str, fits: bool, argument: str, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"{operator}: {argument}: expected {expected}, got {got}")


def _check(operator: str, h: Tensor, weight: Tensor, targets: Tensor) -> None:
    """ValueError with one line naming the first argument that does not fit."""
    types = (torch.bfloat16, torch.float32, torch.float64)
    names = ", ".join(str(t).removeprefix("torch.") for t in types)
    _expect(operator, h.dim() >= 2, "h", "shape [..., D]", list(h.shape))
    _expect(operator, h.dtype in types, "h", f"one of {names}", h.dtype)
    fits = weight.dim() == 2 and weight.shape[1] == h.shape[-1] and weight.shape[0] > 0
    _expect(operator, fits, "weight", f"shape [V, {h.shape[-1]}]", list(weight.shape))
    _expect(operator, weight.dtype == h.dtype, "weight", f"{h.dtype} as h", weight.dtype)
    _expect(operator, targets.shape == h.shape[:-1], "targets", f"shape {list(h.shape[:-1])}", list(targets.shape))
    _expect(operator, targets.dtype == torch.int64, "targets", "int64", targets.dtype)
    for name, tensor in (("weight", weight), ("targets", targets)):
        _expect(operator, tensor.device == h.device, name, f"a tensor on {h.device} as h", tensor.device)


def _check_loss(cap: float, reduction: str) -> None:
    _expect("cross_entropy", cap > 0, "cap", "a positive number", cap)
    _expect("cross_entropy", reduction in ("mean", "sum"), "reduction", "mean or sum", reduction)


def _check_kernel(operator: str, h: Tensor, weight: Tensor, targets: Tensor) -> None:
    """What the kernels ask beyond `_check`."""
    _expect(operator, targets.numel() > 0, "targets", "at least one token", list(targets.shape))
    _expect(operator, h.dtype == torch.bfloat16, "h", "bfloat16 on CUDA", h.dtype)
    _expect(operator, h.shape[-1] % 8 == 0, "h", "D a multiple of 8", list(h.shape))
    _expect(operator, weight.shape[0] % 8 == 0, "weight", "V a multiple of 8", list(weight.shape))


def _aligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous from a multiple of 16 bytes on."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def chunk_rows(rows: int, vocab: int) -> int:
    """Rows of a chunk: as few chunks as CHUNK_BYTES allows, of equal size, whole tiles of 128 rows."""
    chunks = -(-rows // max(1, CHUNK_BYTES // (2 * vocab)))
    return min(rows, -(-rows // (128 * chunks)) * 128)


# --- Training: the loss and its gradients, but for factors that the backward applies ----------------------------------


@torch.library.custom_op("pgolf::cross_entropy", mutates_args=(), device_types="cpu")
def cross_entropy_op(
    h: Tensor, weight: Tensor, targets: Tensor, cap: float, reduction: str = "mean", needs_weight: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, grad_h, row_scale, grad_weight): row r of h has the gradient grad_h[r] * row_scale[r].

    grad_h has h's dtype and shape; row_scale [tokens] and grad_weight [V, D] are float32 (float64 where h is).
    Only the loss is differentiable. needs_weight: whether grad_weight is wanted, which else is [0, D].
    """
    _check("cross_entropy", h, weight, targets)
    _check_loss(cap, reduction)
    rows, wanted = h.flatten(0, -2), targets.flatten()
    wide = torch.promote_types(h.dtype, torch.float32)
    tanh = torch.tanh(F.linear(rows, weight).to(wide) / cap)
    loss = F.cross_entropy(cap * tanh, wanted, reduction=reduction)
    excess = torch.softmax(cap * tanh, dim=-1)
    excess[torch.arange(len(wanted)), wanted] -= 1
    grad_logits = excess * (1 - tanh * tanh)
    if reduction == "mean":
        grad_logits /= len(wanted)
    grad_h = (grad_logits.to(h.dtype) @ weight).view(h.shape)
    grad_weight = grad_logits.T @ rows.to(wide) if needs_weight else loss.new_empty(0, rows.shape[1])
    return loss, grad_h, loss.new_ones(len(wanted)), grad_weight


@torch.library.custom_op("pgolf::cross_entropy_backward", mutates_args=(), device_types="cpu")
def cross_entropy_backward_op(
    grad: Tensor, grad_h: Tensor, row_scale: Tensor, grad_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of h and weight from that of the loss and what `cross_entropy_op` kept."""
    scale = (grad * row_scale).view(*grad_h.shape[:-1], 1)
    return (grad_h * scale).to(grad_h.dtype), (grad_weight * grad).to(grad_h.dtype)


@cross_entropy_op.register_kernel("cuda")
def _cuda(
    h: Tensor, weight: Tensor, targets: Tensor, cap: float, reduction: str = "mean", needs_weight: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("cross_entropy", h, weight, targets)
    _check_loss(cap, reduction)
    _check_kernel("cross_entropy", h, weight, targets)
    _expect("cross_entropy", cap <= MAX_CAP, "cap", f"at most {MAX_CAP}", cap)
    module = _native.require()
    rows, weight, wanted = _aligned(h.flatten(0, -2)), _aligned(weight), targets.flatten().contiguous()
    count, dim = rows.shape
    vocab = weight.shape[0]
    chunk = chunk_rows(count, vocab)
    grad_h = torch.empty_like(rows)
    losses, row_scale = (rows.new_empty(count, dtype=torch.float32) for _ in range(2))
    terms, scaled_h = rows.new_empty(chunk, vocab), rows.new_empty(chunk if needs_weight else 0, dim)
    grad_weight = rows.new_empty(0, dim, dtype=torch.float32)
    sums = rows.new_empty(module.cross_entropy_tiles(vocab) * chunk, dtype=torch.float32)
    with torch.cuda.device(h.device):
        for first in range(0, count, chunk):
            part = slice(first, min(first + chunk, count))
            shared: dict[str, Any] = {
                "h": rows[part].data_ptr(),
                "weight": weight.data_ptr(),
                "targets": wanted[part].data_ptr(),
                "cap": cap,
                "caps": 0,
                "terms": terms.data_ptr(),
                "sums": sums.data_ptr(),
                "rows": part.stop - first,
                "vocab": vocab,
                "dim": dim,
            }
            module.cross_entropy_logits(**_native.target(rows), **shared)
            module.cross_entropy_rows(
                **_native.stream_of(rows),
                **shared,
                loss_weight=1 / count if reduction == "mean" else 1.0,
                scaled_h=scaled_h.data_ptr(),
                row_scale=row_scale[part].data_ptr(),
                losses=losses[part].data_ptr(),
            )
            filled = terms[: part.stop - first]
            torch.mm(filled, weight, out=grad_h[part])
            if not needs_weight:
                continue
            product = torch.mm(filled.T, scaled_h[: part.stop - first], out_dtype=torch.float32)
            if first == 0:
                grad_weight = product
            else:
                grad_weight += product
    loss = losses.mean() if reduction == "mean" else losses.sum()
    return loss, grad_h.view(h.shape), row_scale, grad_weight


@cross_entropy_backward_op.register_kernel("cuda")
def _backward_cuda(grad: Tensor, grad_h: Tensor, row_scale: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor]:
    module = _native.require()
    grad = grad.to(torch.float32).contiguous()
    results = []
    with torch.cuda.device(grad_h.device):
        for x, scale in ((grad_h, row_scale), (grad_weight, None)):
            x = _aligned(x)
            out = torch.empty_like(x, dtype=grad_h.dtype)
            module.cross_entropy_scale(
                **_native.stream_of(x),
                dtype=_native.dtype_code(x),
                x=x.data_ptr(),
                row_scale=0 if scale is None else scale.data_ptr(),
                grad=grad.data_ptr(),
                out=out.data_ptr(),
                rows=x.numel() // x.shape[-1],
                dim=x.shape[-1],
            )
            results.append(out)
    return results[0], results[1]


@cross_entropy_op.register_fake
def _fake(
    h: Tensor, weight: Tensor, targets: Tensor, cap: float, reduction: str = "mean", needs_weight: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("cross_entropy", h, weight, targets)
    _check_loss(cap, reduction)
    wide = torch.promote_types(h.dtype, torch.float32)
    grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    row_scale = h.new_empty(targets.numel(), dtype=wide)
    grad_weight = weight.new_empty(weight.shape if needs_weight else (0, weight.shape[1]), dtype=wide)
    return h.new_empty((), dtype=wide), grad_h, row_scale, grad_weight


@cross_entropy_backward_op.register_fake
def _backward_fake(grad: Tensor, grad_h: Tensor, row_scale: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_h), torch.empty_like(grad_weight, dtype=grad_h.dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of h's size for the outputs that have no gradient
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    grad_h, grad_weight = cross_entropy_backward_op(grad, *ctx.saved_tensors)
    return grad_h, grad_weight if ctx.needs_input_grad[1] else None, None, None, None, None


cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)


# --- Scoring: the loss of each token ----------------------------------------------------------------------------------


@torch.library.custom_op("pgolf::token_losses", mutates_args=(), device_types="cpu")
def token_losses_op(h: Tensor, weight: Tensor, targets: Tensor, cap_pos: Tensor, cap_neg: Tensor) -> Tensor:
    _check("token_losses", h, weight, targets)
    return token_losses_reference(h, weight, targets, cap_pos, cap_neg)


@token_losses_op.register_kernel("cuda")
def _token_losses_cuda(h: Tensor, weight: Tensor, targets: Tensor, cap_pos: Tensor, cap_neg: Tensor) -> Tensor:
    _check("token_losses", h, weight, targets)
    _check_kernel("token_losses", h, weight, targets)
    module = _native.require()
    rows, weight, wanted = _aligned(h.flatten(0, -2)), _aligned(weight), targets.flatten().contiguous()
    caps = torch.cat([cap_pos.reshape(1), cap_neg.reshape(1)]).to(torch.float32)
    vocab, dim = weight.shape
    losses = rows.new_empty(targets.shape, dtype=torch.float32)
    sums = rows.new_empty(module.cross_entropy_tiles(vocab) * len(rows), dtype=torch.float32)
    shared: dict[str, Any] = {
        "h": rows.data_ptr(),
        "weight": weight.data_ptr(),
        "targets": wanted.data_ptr(),
        "cap": 0.0,
        "caps": caps.data_ptr(),
        "terms": 0,
        "sums": sums.data_ptr(),
        "rows": len(rows),
        "vocab": vocab,
        "dim": dim,
    }
    with torch.cuda.device(h.device):
        module.cross_entropy_logits(**_native.target(rows), **shared)
        module.cross_entropy_rows(
            **_native.stream_of(rows), **shared, loss_weight=0.0, scaled_h=0, row_scale=0, losses=losses.data_ptr()
        )
    return losses


@token_losses_op.register_fake
def _token_losses_fake(h: Tensor, weight: Tensor, targets: Tensor, cap_pos: Tensor, cap_neg: Tensor) -> Tensor:
    _check("token_losses", h, weight, targets)
    return h.new_empty(targets.shape, dtype=torch.promote_types(h.dtype, torch.float32))
