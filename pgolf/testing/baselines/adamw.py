"""AdamW's step by the fused optimizer of torch."""

import torch
from torch import Tensor


def fused(
    weight: Tensor,
    mean: Tensor | None,
    square: Tensor,
    grad: Tensor,
    copy: Tensor,
    count: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """torch's kernel, which takes float32 gradients and always has a first moment; then the copy."""
    torch._fused_adamw_(
        [weight],
        [grad.float()],
        [torch.zeros_like(weight) if mean is None else mean],
        [square],
        [],
        [count.float()],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    copy.copy_(weight)
