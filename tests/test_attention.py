"""FA3 with shared key heads: the backward made of one call a query head, against the whole one."""

import pytest
import torch
from torch import Tensor

from pgolf.ops import _flash3, attention

CUDA = torch.device("cuda", 0)
BOUNDS_Q = torch.tensor([0, 5, 12, 12], dtype=torch.int32)


@pytest.fixture
def fa3() -> torch.device:
    """The first GPU; skips where FlashAttention-3 cannot run."""
    row = next(row for row in attention.backends() if row.name == "fa3")
    if not row.available:
        pytest.skip(f"FlashAttention-3: {row.reason}")
    return CUDA


def scores(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, used: Tensor | None) -> Tensor:
    """q k^T / sqrt(d), -inf where a query does not see a key: [H, N, M], in any number of key heads."""
    product = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * q.shape[-1] ** -0.5
    seen = torch.zeros(len(q), len(k), dtype=torch.bool)
    for b in range(len(cu_q) - 1):
        first, last = int(cu_q[b]), int(cu_q[b + 1])
        keys = int(cu_k[b + 1] - cu_k[b]) if used is None else int(used[b])
        for n in range(first, last):
            seen[n, int(cu_k[b]) : int(cu_k[b]) + keys - (last - 1 - n)] = True
    return product.masked_fill(~seen, -torch.inf)


def attend(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, seqused_k, causal, return_attn_probs=False
):
    """What FA3's function computes, with autograd."""
    assert causal
    logits = scores(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k)
    out = torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v.repeat_interleave(q.shape[1] // k.shape[1], 1))
    return (out, logits.logsumexp(-1)) if return_attn_probs else out


def backward(
    grad, q, k, v, out, lse, *, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k,
    softmax_scale, is_causal,
):  # fmt: skip
    """What FA3's operator computes, from the saved logsumexp, for as many key heads as query heads."""
    assert is_causal
    assert q.shape[1] == k.shape[1]
    assert lse.is_contiguous()
    weights = (scores(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k) - lse[..., None]).exp()
    dv.copy_(torch.einsum("hnm,nhd->mhd", weights, grad))
    along = torch.einsum("nhd,nhd->hn", grad, out)
    inner = weights * (torch.einsum("nhd,mhd->hnm", grad, v) - along[..., None]) * softmax_scale
    dq.copy_(torch.einsum("hnm,mhd->nhd", inner, k))
    dk.copy_(torch.einsum("hnm,nhd->mhd", inner, q))


@pytest.mark.parametrize("used", [None, torch.tensor([6, 9, 0])], ids=["whole", "part used"])
@pytest.mark.parametrize("groups", [2, 3])
def test_gradients_of_shared_heads_add_up_over_the_group(groups: int, used: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(groups)
    cu_k = BOUNDS_Q if used is None else torch.tensor([0, 8, 17, 20], dtype=torch.int32)
    q, k, v = (
        torch.randn(int(n), heads, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for n, heads in ((BOUNDS_Q[-1], 2 * groups), (cu_k[-1], 2), (cu_k[-1], 2))
    )
    arguments = (q, k, v, _flash3.Bounds(BOUNDS_Q, cu_k, 7, 9, used), attend)
    whole, parts = _flash3.attention(*arguments, None), _flash3.attention(*arguments, backward)
    assert parts.grad_fn is not None
    assert "GroupedAttention" in type(parts.grad_fn).__name__
    torch.testing.assert_close(parts, whole)
    grad = torch.randn(whole.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(parts, (q, k, v), grad), torch.autograd.grad(whole, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_as_many_key_heads_as_query_heads_need_one_call() -> None:
    q = torch.randn(12, 2, 4, requires_grad=True)
    out = _flash3.attention(q, q, q, _flash3.Bounds(BOUNDS_Q, BOUNDS_Q, 7, 7), attend, backward)
    assert "GroupedAttention" not in type(out.grad_fn).__name__


@pytest.mark.gpu
@pytest.mark.parametrize("used", [False, True], ids=["whole", "part used"])
def test_fa3_gives_the_gradients_of_its_own_backward(fa3, used: bool) -> None:
    function, operator = _flash3.load()
    assert operator is not None
    generator = torch.Generator(fa3).manual_seed(0)
    cu_q = torch.tensor([0, 100, 163, 1000, 1000], dtype=torch.int32, device=fa3)
    cu_k = torch.tensor([0, 300, 700, 1700, 1800], dtype=torch.int32, device=fa3) if used else cu_q
    used_k = torch.tensor([256, 100, 900, 0], dtype=torch.int32, device=fa3) if used else None
    q, k, v, grad = (
        torch.randn(int(n), heads, 64, dtype=torch.bfloat16, device=fa3, generator=generator).requires_grad_()
        for n, heads in ((1000, 8), (cu_k[-1], 4), (cu_k[-1], 4), (1000, 8))
    )
    arguments = (q, k, v, _flash3.Bounds(cu_q, cu_k, 837, 1000, used_k), function)
    whole, parts = _flash3.attention(*arguments, None), _flash3.attention(*arguments, operator)
    assert torch.equal(whole, parts)
    rows = torch.ones(int(cu_k[-1]), dtype=torch.bool, device=fa3)
    if used_k is not None:
        rows.zero_()
        for b, count in enumerate(used_k.tolist()):
            rows[int(cu_k[b]) : int(cu_k[b]) + count] = True
    ours, theirs = (torch.autograd.grad(out, (q, k, v), grad.detach()) for out in (parts, whole))
    for mine, other, chosen in zip(ours, theirs, (slice(None), rows, rows), strict=True):
        error = (mine[chosen].float() - other[chosen].float()).norm() / other[chosen].float().norm()
        assert error < 0.01
