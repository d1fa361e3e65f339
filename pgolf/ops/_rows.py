"""What operators share whose kernels walk rows (csrc/kernels/generic/rows.cuh): which activations the kernels take,
argument checks, and pointers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

COLUMNS = 8  # the kernels take a width that is a multiple of this, rows of whole 16-byte vectors,
MAX_DIM = 1024  # and at most this


def expect(fits: bool, operator: str, argument: str, expected: object, got: object) -> None:
    """ValueError in one line unless `fits`."""
    if not fits:
        raise ValueError(f"{operator}: {argument}: expected {expected}, got {got}")


def expect_activation(operator: str, name: str, tensor: Tensor) -> None:
    """ValueError unless the tensor has a last dimension and a type that operators on activations take."""
    types = (torch.bfloat16, torch.float32, torch.float64)
    expect(tensor.dim() >= 1 and tensor.shape[-1] > 0, operator, name, "shape [..., D], D > 0", list(tensor.shape))
    expect(tensor.dtype in types, operator, name, "one of bfloat16, float32, float64", tensor.dtype)


def expect_like(operator: str, name: str, tensor: Tensor, first: str, like: Tensor) -> None:
    """ValueError unless the tensor has the shape, dtype and device of `like`."""
    expect(tensor.shape == like.shape, operator, name, f"shape {list(like.shape)} as {first}", list(tensor.shape))
    expect(tensor.dtype == like.dtype, operator, name, f"{like.dtype} as {first}", tensor.dtype)
    expect(tensor.device == like.device, operator, name, f"a tensor on {like.device} as {first}", tensor.device)


def expect_parameter(operator: str, name: str, tensor: Tensor, shape: list[int], first: str, like: Tensor) -> None:
    """ValueError unless the tensor has the shape, and is a parameter for activations like `like`."""
    wide = torch.promote_types(like.dtype, torch.float32)
    expect(list(tensor.shape) == shape, operator, name, f"shape {shape}", list(tensor.shape))
    expect(tensor.dtype == wide, operator, name, wide, tensor.dtype)
    expect(tensor.device == like.device, operator, name, f"a tensor on {like.device} as {first}", tensor.device)


def kernel_takes(x: Tensor) -> bool:
    """Whether the kernels that walk rows take activations of this width and type."""
    dim = x.shape[-1]
    return dim % COLUMNS == 0 and dim <= MAX_DIM and x.dtype in (torch.bfloat16, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """In the type that kernels compute in: float32, or float64 where the tensor is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def room(like: Tensor) -> Tensor:
    """Contiguous memory for a result in the tensor's shape and type."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def present(*tensors: Tensor | None) -> list[Tensor]:
    """Those that are not None."""
    return [tensor for tensor in tensors if tensor is not None]


def address(tensor: Tensor | None) -> int:
    """For a kernel, which takes what is None as a null pointer."""
    return 0 if tensor is None else tensor.data_ptr()


def aligned(tensors: Sequence[Tensor | None]) -> list[Any]:
    """The same values, contiguous from a multiple of 16 bytes on; None for None."""
    contiguous = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    return [tensor if address(tensor) % 16 == 0 else tensor.clone() for tensor in contiguous]  # type: ignore[union-attr]
