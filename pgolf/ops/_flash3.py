"""FlashAttention-3 with the gradients of shared key heads taken one query group at a time.

Where several query heads share a key head, FA3's own backward sums the gradients of keys and values in float32 memory:
zeroed before, added to with atomics, converted after. Called once for each query head of a group, on strided views, it
sees as many key heads as query heads, writes those gradients at once in the compute type, and one addition is left.
`benchmarks/attention.py` times both.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What is used of the backward's operator, which FA3's Python interface hides. Other releases may name it otherwise.
_NEEDED = {
    "dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "cu_seqlens_q", "cu_seqlens_k", "seqused_k",
    "max_seqlen_q", "max_seqlen_k", "softmax_scale", "is_causal",
}  # fmt: skip


def load() -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """FA3's attention, and its backward operator: None where this release's is another. ImportError without FA3."""
    attend = importlib.import_module("flash_attn_interface").flash_attn_varlen_func
    try:
        backward = torch.ops.flash_attn_3.bwd.default
        known = {argument.name for argument in backward._schema.arguments}
    except AttributeError:
        return attend, None
    return attend, backward if known >= _NEEDED else None


class Bounds(NamedTuple):
    """Where segments of packed queries and keys begin and end, by FA3's names for it."""

    cu_seqlens_q: Tensor  # int32 [S + 1]
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_k: Tensor | None = None  # int32 [S]: keys of each segment that count, all if None


class GroupedAttention(torch.autograd.Function):
    """Causal attention of packed segments; `attend` and `backward` as `load` gives them.

    q [N, H, d]; k, v [M, Hk, d] with H > Hk. The last keys that count in a segment line up with its last queries.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: Bounds,
        attend: Callable[..., Any],
        backward: Callable[..., Any],
    ) -> Tensor:
        out, lse = attend(q, k, v, **bounds._asdict(), causal=True, return_attn_probs=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.bounds, ctx.backward_op = bounds, backward
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        groups = q.shape[1] // k.shape[1]
        grad_q = torch.empty_like(q)
        parts = k.new_empty(groups, 2, *k.shape)  # gradients of k and v from each query head of a group
        for group, (part_k, part_v) in enumerate(parts):
            one = slice(group, None, groups)
            ctx.backward_op(
                grad[:, one],
                q[:, one],
                k,
                v,
                out[:, one],
                lse[one].contiguous(),
                dq=grad_q[:, one],
                dk=part_k,
                dv=part_v,
                **ctx.bounds._asdict(),
                softmax_scale=q.shape[-1] ** -0.5,
                is_causal=True,
            )
        grad_k, grad_v = parts[0].add_(parts[1]) if groups == 2 else parts.sum(0)
        return grad_q, grad_k, grad_v, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Bounds,
    attend: Callable[..., Any],
    backward: Callable[..., Any] | None,
) -> Tensor:
    """As `GroupedAttention`, which it is where heads are shared and `backward` is there; else FA3's own autograd."""
    # A compiler follows FA3's own operators, whose shapes are registered.
    if backward is None or q.shape[1] == k.shape[1] or torch.compiler.is_compiling():
        return attend(q, k, v, **bounds._asdict(), causal=True)  # type: ignore[no-any-return]
    return GroupedAttention.apply(q, k, v, bounds, attend, backward)  # type: ignore[no-any-return]
