"""Inputs of the fused MLP: the whole, and its two kernels alone."""

import torch
from torch import Tensor

from pgolf.ops import mlp
from pgolf.testing.operator import Arguments, Function, Operator, Shape, nbytes

# (rows, D, F): the recipe's step is 98,304 tokens of one GPU, D = 512, F = 2048.
SHAPES: tuple[Shape, ...] = (
    (1, 8, 128),
    (2, 16, 128),
    (3, 8, 256),
    (127, 64, 128),
    (1, 64, 128),
    (129, 72, 256),  # no whole number of tiles in rows or D
    (300, 520, 384),
    (1000, 512, 2048),
)
LARGE: Shape = (98304, 512, 2048)
SMALL: Shape = (2048, 512, 2048)


def _draw(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, up, down such that all values are about 1."""
    rows, dim, features = shape
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=draw)
    up = torch.randn(features, dim, generator=draw) / dim**0.5
    down = torch.randn(dim, features, generator=draw) / features**0.5
    return x.to(device, dtype), up.to(device, dtype), down.to(device, dtype)


def _make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    return tuple(tensor.requires_grad_() for tensor in _draw(shape, dtype, device, seed))


def _make_up(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    return _draw(shape, dtype, device, seed)[:2]


def _make_grad(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Arguments:
    """grad, down_t, and hidden and signs of a normal pre-activation of about 1."""
    rows, _, features = shape
    grad, _, down = _draw(shape, dtype, device, seed)
    pre = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed + 1)).to(device)
    hidden = torch.nn.functional.leaky_relu(pre, 0.5).square().to(dtype)
    return grad, down.t().contiguous(), hidden, mlp.pack_signs(pre < 0)


def _product(x: Tensor, weight: Tensor) -> int:
    """Operations of x weight^T."""
    return 2 * x.shape[0] * weight.shape[0] * weight.shape[1]


def _hidden_bytes(arguments: Arguments) -> int:
    """Of the activation and its signs, for x and up among the arguments."""
    values = arguments[0].shape[0] * arguments[1].shape[0]
    return values * arguments[0].element_size() + values // 8


def whole(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The custom operator without what it keeps for its backward."""
    out: Tensor = mlp.mlp_op(x, up, down)[0]
    return out


def hidden_of(x: Tensor, up: Tensor) -> Tensor:
    """The activation alone."""
    hidden: Tensor = mlp.mlp_up_op(x, up)[0]
    return hidden


def reference_hidden(x: Tensor, up: Tensor) -> Tensor:
    """leaky_relu(x up^T, 0.5)^2 in plain PyTorch."""
    return torch.nn.functional.leaky_relu(torch.nn.functional.linear(x, up), 0.5).square()


def _triton(name: str) -> Function:
    from pgolf.testing.baselines import mlp as baselines

    function: Function = getattr(baselines, name)
    return function


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="mlp",
        op=whole,
        custom_op=mlp.mlp_op,
        reference=mlp.reference,
        make=_make,
        shapes=SHAPES,
        large=LARGE,
        small=SMALL,
        # hidden is written and read again: no kernel keeps it on the chip.
        forward_bytes=lambda a: nbytes(a[0], a[0], a[1], a[2]) + 2 * _hidden_bytes(a),
        backward_bytes=lambda a: nbytes(a[0], a[0], a[0], a[1], a[1], a[2], a[2]) + 3 * _hidden_bytes(a),
        forward_flops=lambda a: 2 * _product(a[0], a[1]),
        backward_flops=lambda a: 4 * _product(a[0], a[1]),
        kernel_dtypes=(torch.bfloat16,),
        builds=("generic", "sm90"),
        aligned=True,
        baselines={"triton": lambda: _triton("mlp")},
    ),
    Operator(
        name="mlp_up",
        op=hidden_of,
        custom_op=mlp.mlp_up_op,
        reference=reference_hidden,
        make=_make_up,
        shapes=SHAPES,
        large=LARGE,
        small=SMALL,
        forward_bytes=lambda a: nbytes(*a) + _hidden_bytes(a),
        forward_flops=lambda a: _product(*a),
        kernel_dtypes=(torch.bfloat16,),
        builds=("generic", "sm90"),
        aligned=True,
        baselines={"triton": lambda: _triton("mlp_up")},
    ),
    Operator(
        name="mlp_grad",
        op=mlp.mlp_grad_op,
        reference=mlp.grad_reference,
        make=_make_grad,
        shapes=SHAPES,
        large=LARGE,
        small=SMALL,
        forward_bytes=lambda a: nbytes(*a, a[2]),
        forward_flops=lambda a: _product(a[0], a[1]),
        kernel_dtypes=(torch.bfloat16,),
        builds=("generic", "sm90"),
        aligned=True,
        baselines={"triton": lambda: _triton("mlp_grad")},
    ),
)
