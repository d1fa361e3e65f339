# mypy: allow-untyped-defs, allow-incomplete-defs
"""The softcapped cross-entropy in Triton, the way it is usually done: bfloat16 logits by cuBLAS, a kernel that reduces
their rows, one that turns them into their gradient in place, and two products by cuBLAS.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 8


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _softcapped(logits, above, elsewhere):
    cap = tl.where(logits > 0, above, elsewhere)
    return cap * _tanh(logits / cap)


@triton.jit
def _forward(logits, targets, caps, losses, log_sums, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * vocab
    above, elsewhere = tl.load(caps), tl.load(caps + 1)
    most = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        z = _softcapped(tl.load(base + columns, mask=inside, other=0.0).to(tl.float32), above, elsewhere)
        z = tl.where(inside, z, float("-inf"))
        highest = tl.maximum(most, tl.max(z, axis=0))
        total = total * tl.exp(most - highest) + tl.sum(tl.exp(z - highest), axis=0)
        most = highest
    log_sum = most + tl.log(total)
    of_target = _softcapped(tl.load(base + tl.load(targets + row)).to(tl.float32), above, elsewhere)
    tl.store(log_sums + row, log_sum)
    tl.store(losses + row, log_sum - of_target)


@triton.jit
def _backward(logits, targets, log_sums, grad, loss_weight, vocab, cap, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * vocab
    target = tl.load(targets + row)
    log_sum = tl.load(log_sums + row)
    scale = tl.load(grad) * loss_weight
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        tanh = _tanh(tl.load(base + columns, mask=inside, other=0.0).to(tl.float32) / cap)
        excess = tl.exp(cap * tanh - log_sum) - tl.where(columns == target, 1.0, 0.0)
        tl.store(base + columns, (excess * (1 - tanh * tanh) * scale).to(tl.bfloat16), mask=inside)


def _reduced(logits: Tensor, targets: Tensor, caps: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, logarithms of the softmax's sums) of logits [tokens, V]; caps [2] float32."""
    rows, vocab = logits.shape
    losses, log_sums = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    _forward[(rows,)](logits, targets, caps, losses, log_sums, vocab, BLOCK=BLOCK, num_warps=WARPS)
    return losses, log_sums


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        logits = h @ weight.T
        losses, log_sums = _reduced(logits, targets, h.new_full((2,), cap, dtype=torch.float32))
        ctx.save_for_backward(h, weight, targets, logits, log_sums)
        ctx.cap = cap
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, targets, logits, log_sums = ctx.saved_tensors
        rows, vocab = logits.shape
        grad = grad.contiguous()
        # In place, which saves the memory of a second matrix of logits: backward runs once a forward.
        _backward[(rows,)](logits, targets, log_sums, grad, 1 / rows, vocab, ctx.cap, BLOCK=BLOCK, num_warps=WARPS)
        return logits @ weight, logits.T @ h, None, None


def cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """pgolf.ops.cross_entropy.cross_entropy of h [tokens, D] and weight [V, D] in bfloat16."""
    loss: Tensor = _CrossEntropy.apply(h, weight, targets, cap)
    return loss


def token_losses(h: Tensor, weight: Tensor, targets: Tensor, cap_pos: Tensor, cap_neg: Tensor) -> Tensor:
    """pgolf.ops.cross_entropy.token_losses of h [tokens, D] and weight [V, D] in bfloat16."""
    caps = torch.cat([cap_pos.reshape(1), cap_neg.reshape(1)])
    return _reduced(h.detach() @ weight.detach().T, targets, caps)[0]
