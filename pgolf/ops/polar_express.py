"""Muon's direction: momentum, rows of length one, then Polar Express towards the nearest orthogonal matrix.

Every operation is rounded to bfloat16 on purpose: keeping intermediates wider changes the update by several per cent.
The kernels round where PyTorch does, in the epilogues of the products; of the symmetric products they compute one half.
"""

import torch
from torch import Tensor

from pgolf.ops import _native

# Polar Express coefficients (Amsel et al., arXiv:2505.16932), one triple per step.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
FLOOR = 1e-7

MAX_BATCH = 65535  # one dimension of the kernels' grid


def orthogonalize(update: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: [n, rows, cols] -> same shape and dtype, bfloat16 in Muon.

    Every row is normalized first; then five Polar Express steps on the wide orientation, each operation rounded to the
    dtype.
    """
    x = update / update.norm(dim=-1, keepdim=True).clamp_min(FLOOR)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + FLOOR)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def reference(grad: Tensor, momentum: Tensor, mu: float) -> Tensor:
    """Muon's direction in plain PyTorch, computed in momentum's dtype; arguments as in `polar_express`."""
    grad = grad.to(momentum.dtype)
    momentum.mul_(mu).add_(grad)
    return orthogonalize(grad.add(momentum, alpha=_lookahead(mu, grad.dtype)))  # one rounding, not two


def _lookahead(mu: float, dtype: torch.dtype) -> float:
    """mu rounded to the tensors' type, as the CPU's addition takes a factor.

    CUDA's takes it wide, and the directions of the two devices would differ by 4 %.
    """
    return torch.tensor(mu, dtype=dtype).item()


# What torch.compiler.assume_constant_result sets, without importing the compiler.
_lookahead._dynamo_marked_constant = True  # type: ignore[attr-defined]


def polar_express(grad: Tensor, momentum: Tensor, mu: float) -> Tensor:
    """The direction of a Muon step (recipe section 3): orthogonalize(grad + mu * m), with m = mu * momentum + grad.

    grad [n, rows, cols]: float32 or bfloat16, rounded to bfloat16 first; momentum: bfloat16 of that shape, contiguous,
    becomes m. Returns bfloat16 [n, rows, cols]. ValueError names the argument that does not fit.

    Runs the CUDA kernels where they were built for the device, rows and cols are multiples of 8 and cols at most 4,096;
    there tensors must start at a multiple of 16 bytes. Elsewhere `reference`.
    """
    if _native.available(grad.device):
        direction: Tensor = polar_express_op(grad, momentum, mu)
        return direction
    _check(grad, momentum)
    return reference(grad, momentum, mu)


def _expect(fits: bool, argument: str, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"polar_express: {argument}: expected {expected}, got {got}")


def _check(grad: Tensor, momentum: Tensor) -> None:
    """ValueError with one line naming the first argument that does not fit."""
    _expect(grad.dim() == 3, "grad", "shape [n, rows, cols]", list(grad.shape))
    _expect(grad.dtype in (torch.bfloat16, torch.float32), "grad", "one of bfloat16, float32", grad.dtype)
    _expect(momentum.shape == grad.shape, "momentum", f"shape {list(grad.shape)} as grad", list(momentum.shape))
    _expect(momentum.dtype == torch.bfloat16, "momentum", torch.bfloat16, momentum.dtype)
    same = momentum.device == grad.device
    _expect(same, "momentum", f"a tensor on {grad.device} as grad", momentum.device)
    _expect(momentum.is_contiguous(), "momentum", "a contiguous tensor", f"strides {list(momentum.stride())}")


def _fits_kernel(grad: Tensor) -> bool:
    batch, rows, cols = grad.shape
    return batch <= MAX_BATCH and rows % 8 == 0 and cols % 8 == 0 and cols <= _native.require().POLAR_EXPRESS_COLS


@torch.library.custom_op("pgolf::polar_express", mutates_args=("momentum",), device_types="cpu")
def polar_express_op(grad: Tensor, momentum: Tensor, mu: float) -> Tensor:
    _check(grad, momentum)
    return reference(grad, momentum, mu).contiguous()


@polar_express_op.register_kernel("cuda")
def _cuda(grad: Tensor, momentum: Tensor, mu: float) -> Tensor:
    _check(grad, momentum)
    if not _fits_kernel(grad):
        return reference(grad, momentum, mu).contiguous()
    grad = grad.contiguous()
    for name, tensor in (("grad", grad), ("momentum", momentum)):
        address = tensor.data_ptr()
        _expect(address % 16 == 0, name, "memory that starts at a multiple of 16 bytes", hex(address))
    module = _native.require()
    batch, rows, cols = grad.shape
    out = torch.empty_like(momentum)
    scratch = out.new_empty(module.polar_express_scratch(batch, rows, cols), dtype=torch.uint8)
    with torch.cuda.device(grad.device):
        module.polar_express(
            **_native.target(grad),
            dtype=_native.dtype_code(grad),
            grad=grad.data_ptr(),
            momentum=momentum.data_ptr(),
            out=out.data_ptr(),
            scratch=scratch.data_ptr(),
            batch=batch,
            rows=rows,
            cols=cols,
            mu=mu,
            lookahead=_lookahead(mu, momentum.dtype),
            floor=FLOOR,
            coefficients=POLAR_EXPRESS,
        )
    return out


@polar_express_op.register_fake
def _fake(grad: Tensor, momentum: Tensor, mu: float) -> Tensor:
    _check(grad, momentum)
    return torch.empty_like(momentum, memory_format=torch.contiguous_format)
