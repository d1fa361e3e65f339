"""Inputs of the softcapped cross-entropy."""

import torch
from torch import Tensor

from pgolf.ops import cross_entropy
from pgolf.testing.operator import Arguments, Function, Operator, Shape, nbytes

SHAPES: tuple[Shape, ...] = (
    (1, 8, 8),
    (3, 16, 8),
    (2, 8, 24),
    (129, 72, 136),  # one row and eight columns beyond whole tiles, D no multiple of 16
    (1, 64, 1000),
    (200, 512, 520),
    (300, 640, 264),  # D beyond what a weight tile stays for
    (700, 512, 1032),
)


def _tensors(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """shape = (tokens, D, V): h, weight and targets.

    Logits have a standard deviation of 6, and every other target's is about 24: a softcap of 10 bends many of them, and
    targets are likely as well as unlikely.
    """
    tokens, dim, vocab = shape
    draw = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, dim, generator=draw)
    weight = 6 * torch.randn(vocab, dim, generator=draw) / dim**0.5
    targets = torch.randint(vocab, (tokens,), generator=draw)
    h[::2] += 24 / 36 * weight[targets[::2]]
    return h.to(device, dtype), weight.to(device, dtype), targets.to(device)


def _make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    h, weight, targets = _tensors(shape, dtype, device, seed)
    return h.requires_grad_(), weight.requires_grad_(), targets, 10.0 if seed % 2 else 30.0


def _make_losses(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    caps = torch.tensor([30.0, 12.0], device=device, dtype=torch.promote_types(dtype, torch.float32))
    return *_tensors(shape, dtype, device, seed), *caps.unbind()


def _mean(h: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """`cross_entropy` by its custom operator on the CPU too, where the public function leaves it to autograd."""
    if h.is_cuda:
        return cross_entropy.cross_entropy(h, weight, targets, cap)
    loss: Tensor = cross_entropy.cross_entropy_op(h, weight, targets, cap)[0]
    return loss


def _flops(products: int) -> Function:
    """Operations of so many products of the size of the logits'."""
    return lambda a: 2 * products * a[0].numel() * a[1].shape[0]


def _triton_mean() -> Function:
    from pgolf.testing.baselines.cross_entropy import cross_entropy

    return cross_entropy


def _triton_losses() -> Function:
    from pgolf.testing.baselines.cross_entropy import token_losses

    return token_losses


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="cross_entropy",
        op=_mean,
        custom_op=cross_entropy.cross_entropy_op,
        reference=cross_entropy.reference,
        make=_make,
        shapes=SHAPES,
        large=(98304, 512, 8192),
        large_check=(4096, 512, 8192),
        small=(64, 128, 1024),
        forward_bytes=lambda a: nbytes(*a[:3]),
        backward_bytes=lambda a: nbytes(a[0], a[1]),
        forward_flops=_flops(1),
        backward_flops=_flops(2),
        kernel_dtypes=(torch.bfloat16,),
        builds=("generic", "sm90"),
        baselines={"triton": _triton_mean},
    ),
    Operator(
        name="token_losses",
        op=cross_entropy.token_losses,
        custom_op=cross_entropy.token_losses_op,
        reference=cross_entropy.token_losses_reference,
        make=_make_losses,
        shapes=SHAPES,
        large=(98304, 512, 8192),
        large_check=(4096, 512, 8192),
        small=(64, 128, 1024),
        forward_bytes=lambda a: nbytes(*a[:3]) + 4 * a[2].numel(),
        forward_flops=_flops(1),
        kernel_dtypes=(torch.bfloat16,),
        builds=("generic", "sm90"),
        baselines={"triton": _triton_losses},
    ),
)
