"""The MLP with its activation fused into the products: leaky_relu(x up^T, 0.5)^2 down^T (recipe section 2).

The kernels form the activation from the float32 sums and round once. For the backward they keep the activation and one
bit a feature, the sign before it, instead of the pre-activation: the slope is 2 sqrt(hidden), or -sqrt(hidden) where
the sign is negative. The remaining products are torch's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops import _native

FEATURES = 128  # their number is a multiple of this: whole tiles and whole bytes of signs
DIM = 8  # and that of inputs and outputs of this: rows of whole 16-byte vectors

Context = torch.autograd.function.FunctionCtx


def reference(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The MLP in plain PyTorch, any floating-point dtype and any widths; arguments as in `mlp`."""
    return F.linear(F.leaky_relu(F.linear(x, up), 0.5).square(), down)


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """leaky_relu(x up^T, 0.5)^2 down^T, the square element by element.

    x [..., D]; up [F, D]; down [D_out, F]; of one dtype, on one device. Returns [..., D_out]. Differentiable in all.
    ValueError names the argument that does not fit.

    Runs the CUDA kernels where they were built for the device and the dtype is bfloat16, F a multiple of 128, D and
    D_out of 8; contiguous tensors must then start at a multiple of 16 bytes. Runs `reference` elsewhere.
    """
    _check_mlp(x, up, down)
    if x.dtype == torch.bfloat16 and _fits(up, down) and _native.available(x.device):
        out: Tensor = mlp_op(x, up, down)[0]
        return out
    return reference(x, up, down)


def _fits(up: Tensor, down: Tensor) -> bool:
    return up.shape[0] % FEATURES == 0 and up.shape[1] % DIM == 0 and down.shape[0] % DIM == 0


# --- Checks -----------------------------------------------------------------------------------------------------------


def _expect(fits: bool, operator: str, argument: str, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"{operator}: {argument}: expected {expected}, got {got}")


def _check_alike(operator: str, **tensors: Tensor) -> None:
    (first, like), *others = tensors.items()
    for name, tensor in others:
        _expect(tensor.dtype == like.dtype, operator, name, f"{like.dtype} as {first}", tensor.dtype)
        _expect(tensor.device == like.device, operator, name, f"a tensor on {like.device} as {first}", tensor.device)


def _check_mlp(x: Tensor, up: Tensor, down: Tensor) -> None:
    _expect(x.dim() >= 1, "mlp", "x", "shape [..., D]", list(x.shape))
    dim = x.shape[-1]
    _expect(up.dim() == 2 and up.shape[1] == dim, "mlp", "up", f"shape [F, {dim}]", list(up.shape))
    features = up.shape[0]
    _expect(
        down.dim() == 2 and down.shape[1] == features, "mlp", "down", f"shape [D_out, {features}]", list(down.shape)
    )
    _check_alike("mlp", x=x, up=up, down=down)


def _check_kernel_dtype(operator: str, argument: str, tensor: Tensor) -> None:
    types = (torch.bfloat16, torch.float32, torch.float64)
    _expect(tensor.dtype in types, operator, argument, "one of bfloat16, float32, float64", tensor.dtype)


def _check_up(x: Tensor, up: Tensor) -> None:
    _expect(x.dim() == 2 and x.shape[1] % DIM == 0, "mlp_up", "x", f"shape [rows, {DIM} n]", list(x.shape))
    fits = up.dim() == 2 and up.shape[0] % FEATURES == 0 and up.shape[1] == x.shape[1]
    _expect(fits, "mlp_up", "up", f"shape [{FEATURES} n, {x.shape[1]}]", list(up.shape))
    _check_kernel_dtype("mlp_up", "x", x)
    _check_alike("mlp_up", x=x, up=up)


def _check_grad(grad: Tensor, down_t: Tensor, hidden: Tensor, signs: Tensor) -> None:
    name = "mlp_grad"
    _expect(grad.dim() == 2 and grad.shape[1] % DIM == 0, name, "grad", f"shape [rows, {DIM} n]", list(grad.shape))
    rows, dim = grad.shape
    fits = down_t.dim() == 2 and down_t.shape[0] % FEATURES == 0 and down_t.shape[1] == dim
    _expect(fits, name, "down_t", f"shape [{FEATURES} n, {dim}]", list(down_t.shape))
    features = down_t.shape[0]
    for argument, tensor, shape in (
        ("hidden", hidden, [rows, features]),
        ("signs", signs, [features // FEATURES, rows, 16]),
    ):
        _expect(list(tensor.shape) == shape, name, argument, f"shape {shape}", list(tensor.shape))
    _check_kernel_dtype(name, "grad", grad)
    _check_alike(name, grad=grad, down_t=down_t, hidden=hidden)
    _expect(signs.dtype == torch.uint8, name, "signs", torch.uint8, signs.dtype)
    _expect(signs.device == grad.device, name, "signs", f"a tensor on {grad.device} as grad", signs.device)


def _check_widths(x: Tensor, up: Tensor, down: Tensor) -> None:
    """What the kernels ask beyond `_check_mlp`."""
    _expect(x.shape[-1] % DIM == 0, "mlp", "x", f"shape [..., {DIM} n]", list(x.shape))
    _expect(up.shape[0] % FEATURES == 0, "mlp", "up", f"shape [{FEATURES} n, {x.shape[-1]}]", list(up.shape))
    _expect(down.shape[0] % DIM == 0, "mlp", "down", f"shape [{DIM} n, {up.shape[0]}]", list(down.shape))
    _check_kernel_dtype("mlp", "x", x)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def _aligned(operator: str, **tensors: Tensor) -> list[Tensor]:
    """The tensors, contiguous; ValueError where one does not start at a multiple of 16 bytes."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for name, tensor in contiguous.items():
        address = tensor.data_ptr()
        _expect(address % 16 == 0, operator, name, "memory that starts at a multiple of 16 bytes", hex(address))
    return list(contiguous.values())


# --- hidden = leaky_relu(x up^T, 0.5)^2 and the signs of x up^T -------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pack_signs(negative: Tensor) -> Tensor:
    """Bits of negative [rows, F] (bool) -> uint8 [F / 128, rows, 16].

    The 16 bytes of 128 features are four little-endian words of 32 bits: feature 8 j + 2 q + e (q < 4, e < 2) is bit
    2 j + e of word q (csrc/kernels/ops/mlp.h says why).
    """
    rows, features = negative.shape
    bits = (
        negative.view(rows, features // FEATURES, 16, 4, 2)
        .permute(1, 0, 3, 2, 4)
        .reshape(features // FEATURES, rows, 16, 8)
    )
    weights = 2 ** torch.arange(8, device=negative.device, dtype=torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_signs(signs: Tensor) -> Tensor:
    """The inverse of `pack_signs`."""
    tiles, rows, _ = signs.shape
    places = torch.arange(8, device=signs.device, dtype=torch.uint8)
    bits = (signs[..., None] >> places & 1).bool().reshape(tiles, rows, 4, 16, 2)
    return bits.permute(1, 0, 3, 2, 4).reshape(rows, tiles * FEATURES)


def _up(operator: str, x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if not _has_kernel(x):
        pre = F.linear(_wide(x), _wide(up))
        return F.leaky_relu(pre, 0.5).square().to(x.dtype), pack_signs(pre < 0)
    x, up = _aligned(operator, x=x, up=up)
    hidden, signs = _up_outputs(x, up)
    with torch.cuda.device(x.device):
        _native.require().mlp_up(
            **_native.target(x),
            x=x.data_ptr(),
            weight=up.data_ptr(),
            hidden=hidden.data_ptr(),
            signs=signs.data_ptr(),
            rows=x.shape[0],
            features=up.shape[0],
            dim=x.shape[1],
        )
    return hidden, signs


def _up_outputs(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    rows, features = math.prod(x.shape[:-1]), up.shape[0]
    return x.new_empty(rows, features), x.new_empty(features // FEATURES, rows, 16, dtype=torch.uint8)


@torch.library.custom_op("pgolf::mlp_up", mutates_args=(), device_types=("cpu", "cuda"))
def mlp_up_op(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, D], up [F, D] -> hidden [rows, F] in x's dtype, and where x up^T is negative, as `pack_signs` has it.

    The kernel runs on CUDA for bfloat16; elsewhere, and for float32 and float64, PyTorch computes the same.
    """
    _check_up(x, up)
    return _up("mlp_up", x, up)


@mlp_up_op.register_fake
def _up_fake(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    _check_up(x, up)
    return _up_outputs(x, up)


# --- grad_pre = (grad down) * slope -----------------------------------------------------------------------------------


def grad_reference(grad: Tensor, down_t: Tensor, hidden: Tensor, signs: Tensor) -> Tensor:
    """`mlp_grad_op` in plain PyTorch, any floating-point dtype."""
    return F.linear(grad, down_t) * hidden.sqrt() * torch.where(unpack_signs(signs), -1, 2)


@torch.library.custom_op("pgolf::mlp_grad", mutates_args=(), device_types=("cpu", "cuda"))
def mlp_grad_op(grad: Tensor, down_t: Tensor, hidden: Tensor, signs: Tensor) -> Tensor:
    """The gradient of x up^T [rows, F], given that of the MLP's output, grad [rows, D_out].

    down_t [F, D_out]: the down-projection transposed; hidden [rows, F] and signs [F / 128, rows, 16] of
    `mlp_up_op`. The kernel runs where `mlp_up_op`'s does.
    """
    _check_grad(grad, down_t, hidden, signs)
    if not _has_kernel(grad):
        return grad_reference(_wide(grad), _wide(down_t), _wide(hidden), signs).to(grad.dtype)
    grad, down_t, hidden, signs = _aligned("mlp_grad", grad=grad, down_t=down_t, hidden=hidden, signs=signs)
    grad_pre = torch.empty_like(hidden)
    with torch.cuda.device(grad.device):
        _native.require().mlp_grad(
            **_native.target(grad),
            grad=grad.data_ptr(),
            weight=down_t.data_ptr(),
            hidden=hidden.data_ptr(),
            signs=signs.data_ptr(),
            grad_pre=grad_pre.data_ptr(),
            rows=grad.shape[0],
            features=down_t.shape[0],
            dim=grad.shape[1],
        )
    return grad_pre


@mlp_grad_op.register_fake
def _grad_fake(grad: Tensor, down_t: Tensor, hidden: Tensor, signs: Tensor) -> Tensor:
    _check_grad(grad, down_t, hidden, signs)
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


# --- The whole --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pgolf::mlp", mutates_args=(), device_types=("cpu", "cuda"))
def mlp_op(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The MLP's output, differentiable, and hidden and signs of `mlp_up_op`, which its backward needs.

    ValueError also where widths or memory are not what the kernels take (`mlp`).
    """
    _check_mlp(x, up, down)
    _check_widths(x, up, down)
    hidden, signs = _up("mlp", x.reshape(-1, x.shape[-1]), up)
    return F.linear(hidden, down).view(*x.shape[:-1], down.shape[0]), hidden, signs


@mlp_op.register_fake
def _mlp_fake(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_mlp(x, up, down)
    _check_widths(x, up, down)
    return (x.new_empty(*x.shape[:-1], down.shape[0]), *_up_outputs(x, up))


def _setup_context(ctx: Context, inputs: tuple, output: tuple) -> None:
    x, up, down = inputs
    _, hidden, signs = output
    ctx.mark_non_differentiable(hidden, signs)
    ctx.set_materialize_grads(False)  # zeros for hidden would cost as much as hidden
    needs_x, needs_up, needs_down = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
    needs_pre = needs_x or needs_up
    # Only what the gradients that are needed are made of: with frozen weights x need not stay.
    needed = (needs_up, needs_x, needs_pre, needs_pre or needs_down, needs_pre)
    kept = zip((x, up, down, hidden, signs), needed, strict=True)
    ctx.save_for_backward(*(tensor if need else None for tensor, need in kept))  # type: ignore[arg-type]


def _backward(ctx: Context, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if grad is None:
        return None, None, None
    x, up, down, hidden, signs = ctx.saved_tensors  # type: ignore[attr-defined]
    needs_x, needs_up, needs_down = ctx.needs_input_grad  # type: ignore[attr-defined]
    leading = grad.shape[:-1]
    grad = grad.reshape(-1, grad.shape[-1]).contiguous()
    grad_x = grad_up = grad_down = None
    if needs_x or needs_up:
        grad_pre = mlp_grad_op(grad, down.t().contiguous(), hidden, signs)
        grad_x = (grad_pre @ up).view(*leading, up.shape[1]) if needs_x else None
        grad_up = grad_pre.t() @ x.reshape(-1, x.shape[-1]) if needs_up else None
    if needs_down:
        grad_down = grad.t() @ hidden
    return grad_x, grad_up, grad_down


mlp_op.register_autograd(_backward, setup_context=_setup_context)
