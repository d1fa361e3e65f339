"""The MLP in Triton, as record submissions have it: fused into the products, the pre-activation kept for the backward.

Persistent kernels over TMA descriptors: for Hopper and later.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from pgolf.ops.mlp import unpack_signs

# BLOCK_M, BLOCK_N, BLOCK_K, stages, warps
TILES = (
    (128, 256, 64, 3, 8),
    (128, 256, 64, 4, 8),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 4, 8),
    (256, 128, 64, 3, 8),
    (64, 256, 64, 4, 4),
)


def _set_blocks(arguments: dict[str, Any]) -> None:
    m, n, k = (arguments[f"BLOCK_{letter}"] for letter in "MNK")
    arguments["a"].block_shape = [m, k]
    arguments["b"].block_shape = [n, k]
    arguments["pre"].block_shape = arguments["out"].block_shape = [m, n // 2]


CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_stages=stages, num_warps=warps, pre_hook=_set_blocks)
    for m, n, k, stages, warps in TILES
]


@triton.jit
def _tile(i, rows, columns, GROUP: tl.constexpr):
    """Row and column of tile i: column by column within groups of GROUP rows."""
    first = i // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    within = i - first * columns
    return first + within % height, within // height


@triton.jit
def _finish(x, pre, out, m, n, FORWARD: tl.constexpr):
    if FORWARD:
        pre.store([m, n], x.to(tl.bfloat16))
        leaky = tl.where(x < 0, 0.5 * x, x)
        out.store([m, n], (leaky * leaky).to(tl.bfloat16))
    else:
        before = pre.load([m, n]).to(tl.float32)
        slope = tl.where(before < 0, 0.5 * before, 2.0 * before)
        out.store([m, n], (x * slope).to(tl.bfloat16))


@triton.autotune(configs=CONFIGS, key=["M", "N", "K", "FORWARD"])
@triton.jit
def _product(
    a,
    b,
    pre,
    out,
    M,
    N,
    K,
    PROGRAMS: tl.constexpr,
    FORWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a [M, K] times b [N, K] transposed; forward: `pre` and its activation, backward: times the slope at `pre`."""
    rows = tl.cdiv(M, BLOCK_M)
    columns = tl.cdiv(N, BLOCK_N)
    # A counter of its own for the epilogue: the pipelined loop is a few tiles ahead.
    finished = tl.program_id(0) - PROGRAMS
    for i in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        m, n = _tile(i, rows, columns, 8)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            left = a.load([m * BLOCK_M, k * BLOCK_K])
            right = b.load([n * BLOCK_N, k * BLOCK_K])
            total = tl.dot(left, right.T, total)
        finished += PROGRAMS
        m, n = _tile(finished, rows, columns, 8)
        # In two halves: the outputs take half the shared memory.
        halves = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        _finish(first, pre, out, m * BLOCK_M, n * BLOCK_N, FORWARD)
        _finish(second, pre, out, m * BLOCK_M, n * BLOCK_N + BLOCK_N // 2, FORWARD)


def _launch(a: Tensor, b: Tensor, pre: Tensor, out: Tensor, forward: bool) -> None:
    rows, dim = a.shape
    features = b.shape[0]
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (min(programs, triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(features, meta["BLOCK_N"])),)

    descriptors = [TensorDescriptor.from_tensor(tensor, [1, 1]) for tensor in (a, b, pre, out)]
    _product[grid](*descriptors, rows, features, dim, PROGRAMS=programs, FORWARD=forward)


def up_forward(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, D], up [F, D] -> x up^T and leaky_relu(x up^T, 0.5)^2, both [rows, F] bfloat16."""
    pre = x.new_empty(x.shape[0], up.shape[0])
    hidden = torch.empty_like(pre)
    _launch(x, up, pre, hidden, forward=True)
    return pre, hidden


def grad_of_pre(grad: Tensor, down_t: Tensor, pre: Tensor) -> Tensor:
    """The gradient of `pre`: grad [rows, D], down_t [F, D] -> [rows, F] bfloat16."""
    out = torch.empty_like(pre)
    _launch(grad, down_t, pre, out, forward=False)
    return out


def mlp_up(x: Tensor, up: Tensor) -> Tensor:
    """Rival of the row mlp_up."""
    return up_forward(x, up)[1]


_pre_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def mlp_grad(grad: Tensor, down_t: Tensor, hidden: Tensor, signs: Tensor) -> Tensor:
    """Rival of the row mlp_grad. Reads the pre-activation, rebuilt once from hidden and signs: not part of its time."""
    if (pre := _pre_of.get(hidden)) is None:
        root = hidden.float().sqrt()
        pre = _pre_of[hidden] = torch.where(unpack_signs(signs), -2 * root, root).to(hidden.dtype)
    return grad_of_pre(grad, down_t, pre)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        pre, hidden = up_forward(x, up)
        ctx.save_for_backward(x, up, down, pre, hidden)
        return hidden @ down.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, up, down, pre, hidden = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_pre = grad_of_pre(grad, down.t().contiguous(), pre)
        return grad_pre @ up, grad_pre.t() @ x, grad.t() @ hidden


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Rival of the row mlp: x [rows, D], up [F, D], down [D, F] -> [rows, D]."""
    out: Tensor = _Mlp.apply(x, up, down)
    return out
