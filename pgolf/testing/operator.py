"""What a row of the operator registry says: the operator, its reference, and the inputs it is tested and timed on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]
Shape = tuple[int, ...]
Function = Callable[..., Any]


def nothing(_: Arguments) -> int:
    """No bytes, no operations."""
    return 0


def nbytes(*tensors: Tensor) -> int:
    """The bytes of all tensors together; name one twice if it is read and written."""
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator and the inputs it is tested and timed on.

    `op` and `reference` return a tensor or a tuple of tensors, the same of both. Floating-point results are judged by
    their error against the reference in float64, integers by equality.
    """

    name: str
    op: Function  # the reference on the CPU, the kernel on CUDA
    reference: Function  # plain PyTorch, any dtype, differentiable by autograd where `op` is
    # (shape, dtype, device, seed) -> arguments. Random values are drawn on the CPU, so that devices share them.
    make: Callable[[Shape, torch.dtype, torch.device, int], Arguments]
    shapes: tuple[Shape, ...]  # for tests: three tiny ones, then unaligned ones, no multiple of a tile; all quick
    large: Shape  # for tests and benchmarks on a GPU: the recipe's size
    small: Shape  # for benchmarks on a CPU: less than a second eager
    forward_bytes: Callable[[Arguments], int]  # the least the forward must read and write
    backward_bytes: Callable[[Arguments], int] = nothing
    forward_flops: Callable[[Arguments], int] = nothing  # a multiply-add is two
    backward_flops: Callable[[Arguments], int] = nothing
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    kernel_dtypes: tuple[torch.dtype, ...] = ()  # those the kernel takes, others run PyTorch on CUDA; () means `dtypes`
    exact: bool = False  # every result must equal the reference's, floating-point ones too
    builds: tuple[str, ...] = ("generic",)  # folders of csrc/kernels with a kernel of it
    aligned: bool = False  # tensors must start at a multiple of 16 bytes, else ValueError
    baselines: Mapping[str, Callable[[], Function]] = field(default_factory=dict)  # name -> loader of a rival, on CUDA
    compiles: bool = True  # False: torch.compile would take hours over the reference, a loop of thousands of steps
    more_large: tuple[Shape, ...] = ()  # further sizes to time
    large_check: Shape = ()  # accuracy is judged on it where float64 results of `large` would not fit; () means `large`
    custom_op: Function | None = None  # what torch.library.opcheck runs on where `op` is a plain function around it

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel_dtypes", self.kernel_dtypes or self.dtypes)
        object.__setattr__(self, "large_check", self.large_check or self.large)

    @property
    def typical(self) -> Shape:
        """The first shape beyond the tiny ones: for tests that take one."""
        return self.shapes[min(3, len(self.shapes) - 1)]


def differentiable(arguments: Arguments) -> list[Tensor]:
    """The arguments that take a gradient, in order."""
    return [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What an operator returned, as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
