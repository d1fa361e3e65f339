"""One step of AdamW (Loshchilov and Hutter, arXiv:1711.05101) on a flat tensor, in place and in one pass.

For weights that a network reads in another type, such as the adapters of test-time training: the same pass writes them
out in that type.
"""

import torch
from torch import Tensor

from pgolf.ops import _native


def reference(
    weight: Tensor,
    mean: Tensor | None,
    square: Tensor,
    grad: Tensor,
    copy: Tensor | None,
    count: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw` in plain PyTorch, computed in weight's dtype."""
    grad = grad.to(weight.dtype)
    weight.mul_(1 - lr * weight_decay)
    direction = grad if mean is None else mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    steps = count.double()
    rate, root = lr / (1 - beta1**steps), (1 - beta2**steps).sqrt()
    weight.sub_((rate * direction).div_(square.sqrt().div_(root).add_(eps)))
    if copy is not None:
        copy.copy_(weight)


def adamw(
    weight: Tensor,
    mean: Tensor | None,
    square: Tensor,
    grad: Tensor,
    copy: Tensor | None,
    count: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The step t = count, as torch.optim.AdamW takes it, with g = grad:

        weight -= lr * weight_decay * weight
        mean = beta1 * mean + (1 - beta1) * g;  square = beta2 * square + (1 - beta2) * g^2
        weight -= lr / (1 - beta1^t) * mean / (sqrt(square / (1 - beta2^t)) + eps)
        copy = weight

    All [n], contiguous, on one device and of memory of their own: weight, mean and square float32; mean None where
    beta1 is 0, since it would be g; grad float32 or bfloat16, left as it is; copy float32 or bfloat16, or None. count
    int64 []: 1 at the first step, read on the device, so that a captured CUDA graph may add to it. beta1 and beta2 in
    [0, 1). ValueError names the argument that does not fit.

    Runs the CUDA kernel where it was built for the device (float32, each result rounded once), else `reference`.
    """
    arguments = (weight, mean, square, grad, copy, count, lr, beta1, beta2, eps, weight_decay)
    if _native.available(weight.device):
        adamw_op(*arguments)
    else:
        _check(*arguments)
        reference(*arguments)


def _expect(fits: bool, argument: str, expected: object, got: object) -> None:
    if not fits:
        raise ValueError(f"adamw: {argument}: expected {expected}, got {got}")


def _check(
    weight: Tensor,
    mean: Tensor | None,
    square: Tensor,
    grad: Tensor,
    copy: Tensor | None,
    count: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """ValueError with one line naming the first argument that does not fit."""
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        _expect(0 <= beta < 1, name, "a number in [0, 1)", beta)
    _expect(
        (mean is None) == (beta1 == 0),
        "mean",
        "None where beta1 is 0, else a tensor",
        "None" if mean is None else "a tensor",
    )
    _expect(weight.dim() == 1, "weight", "shape [n]", list(weight.shape))
    wide, either = (torch.float32,), (torch.float32, torch.bfloat16)
    for name, tensor, types in (
        ("weight", weight, wide),
        ("mean", mean, wide),
        ("square", square, wide),
        ("grad", grad, either),
        ("copy", copy, either),
    ):
        if tensor is None:
            continue
        names = " or ".join(str(t).removeprefix("torch.") for t in types)
        _expect(tensor.shape == weight.shape, name, f"shape {list(weight.shape)} as weight", list(tensor.shape))
        _expect(tensor.dtype in types, name, names, tensor.dtype)
        _expect(tensor.device == weight.device, name, f"a tensor on {weight.device} as weight", tensor.device)
        _expect(tensor.is_contiguous(), name, "a contiguous tensor", f"stride {list(tensor.stride())}")
    _expect(count.shape == (), "count", "shape []", list(count.shape))
    _expect(count.dtype == torch.int64, "count", torch.int64, count.dtype)
    _expect(count.device == weight.device, "count", f"a tensor on {weight.device} as weight", count.device)


@torch.library.custom_op("pgolf::adamw", mutates_args=("weight", "mean", "square", "copy"), device_types="cpu")
def adamw_op(
    weight: Tensor,
    mean: Tensor | None,
    square: Tensor,
    grad: Tensor,
    copy: Tensor | None,
    count: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw`, its numbers by position."""
    _check(weight, mean, square, grad, copy, count, lr, beta1, beta2, eps, weight_decay)
    reference(weight, mean, square, grad, copy, count, lr, beta1, beta2, eps, weight_decay)


@adamw_op.register_kernel("cuda")
def _cuda(
    weight: Tensor,
    mean: Tensor | None,
    square: Tensor,
    grad: Tensor,
    copy: Tensor | None,
    count: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    _check(weight, mean, square, grad, copy, count, lr, beta1, beta2, eps, weight_decay)
    with torch.cuda.device(weight.device):
        _native.require().adamw(
            **_native.target(weight),
            grad_type=_native.dtype_code(grad),
            copy_type=_native.dtype_code(weight if copy is None else copy),
            weight=weight.data_ptr(),
            mean=0 if mean is None else mean.data_ptr(),
            square=square.data_ptr(),
            grad=grad.data_ptr(),
            copy=0 if copy is None else copy.data_ptr(),
            count=count.data_ptr(),
            size=weight.numel(),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
        )


@adamw_op.register_fake
def _fake(
    weight: Tensor,
    mean: Tensor | None,
    square: Tensor,
    grad: Tensor,
    copy: Tensor | None,
    count: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    _check(weight, mean, square, grad, copy, count, lr, beta1, beta2, eps, weight_decay)
