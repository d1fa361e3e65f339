"""Causal grouped-query attention over packed segments: flash-attention where there is one, SDPA elsewhere.

One signature over every backend, in order of speed: FA3, FA4, FA2, torch's varlen, SDPA (any device).
Softmax scale is 1/sqrt(head width). `doctor` prints `backends()`.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.errors import PgolfError
from pgolf.ops import _flash3

Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


class Backend(NamedTuple):
    """One implementation: its name, whether it can run here, and why (not)."""

    name: str
    available: bool
    reason: str


def _load_flash3() -> Varlen:
    attend, backward = _flash3.load()

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        bounds = _flash3.Bounds(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return _flash3.attention(q, k, v, bounds, attend, backward)

    return run


def _flash4() -> Varlen:
    flash = importlib.import_module("flash_attn.cute").flash_attn_varlen_func

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        out = flash(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return run


def _flash2() -> Varlen:
    flash = importlib.import_module("flash_attn").flash_attn_varlen_func

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return flash(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)

    return run


def _torch_varlen() -> Varlen:
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    names = inspect.signature(varlen).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    grouped = "enable_gqa" in names
    if grouped:
        options["enable_gqa"] = True

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        if not grouped:
            k, v = _repeat_heads(q, k, v)
        return varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)

    return run


_LOADERS: dict[str, Callable[[], Varlen]] = {
    "fa3": _load_flash3,
    "fa4": _flash4,
    "fa2": _flash2,
    "torch-varlen": _torch_varlen,
}


@functools.cache
def _load(name: str) -> Varlen | str:
    """The backend's function, or why it is missing."""
    try:
        return _LOADERS[name]()
    except (ImportError, AttributeError, OSError) as error:
        return f"not importable: {error}".splitlines()[0]


def _capable(name: str) -> str:
    """Why the CUDA device cannot run `name`; empty when it can."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    major, _ = torch.cuda.get_device_capability()
    if name == "fa3" and major != 9:
        return "needs an sm_90 GPU"
    if name == "fa4" and major < 9:
        return "needs sm_90 or newer"
    return "needs sm_80 or newer" if major < 8 else ""


def backends() -> list[Backend]:
    """Every backend in order of preference, with the reason it is or is not usable here."""
    rows = []
    for name in _LOADERS:
        reason = _capable(name)
        if not reason:
            loaded = _load(name)
            reason = loaded if isinstance(loaded, str) else ""
        rows.append(Backend(name, not reason, reason or "usable"))
    rows.append(Backend("sdpa", True, "always usable; dense, so slower on packed segments"))
    return rows


_active: Varlen | None = None  # set by `choose`; None while unresolved or where SDPA is the choice
_resolved = False


def choose(name: str | None = None) -> None:
    """Use backend `name` from now on (None: the fastest usable one). Call it before compiling."""
    global _active, _resolved
    usable = [row.name for row in backends() if row.available]
    if name is not None and name not in usable:
        raise PgolfError(f"attention: backend {name!r} is not usable here; choose one of {', '.join(usable)}")
    loaded = _load(name or usable[0]) if (name or usable[0]) != "sdpa" else None
    assert not isinstance(loaded, str)
    _active, _resolved = loaded, True


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> Tensor:
    """Causal attention inside segments.

    q [B, T, Hq, d]; k, v [B, T, Hk, d] with Hk dividing Hq. `cu_seqlens` int32 [S+1] holds the boundaries of the
    segments of one packed row (B = 1), padded at the end with T; None makes every row one segment. `max_seqlen` is at
    least the longest segment. Returns [B, T, Hq, d].
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        if not _resolved:
            choose()
        if _active is not None:
            batch, length = q.shape[:2]
            if cu_seqlens is None:
                cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
                max_seqlen = length
            return _active(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, max_seqlen).view_as(q)
    return reference(q, k, v, cu_seqlens)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Plain PyTorch: segments padded into a batch, one dense causal SDPA. Shapes as `attention`."""
    if cu_seqlens is None:
        return _dense(q, k, v)
    layout = _padded_layout(cu_seqlens, q.shape[1])
    out = _dense(*(_Rearrange.apply(x[0], *layout).unflatten(0, (-1, layout[2])) for x in (q, k, v)))
    return _Restore.apply(out.flatten(0, 1), *layout)[None]


def cached_attention(q: Tensor, k: Tensor, v: Tensor, used: Tensor) -> Tensor:
    """Attention of the last T of used[b] tokens of each row over all of them, causally.

    q [B, T, Hq, d]; k, v [B, capacity, Hk, d], of which row b holds used[b] >= T tokens (int32 [B], read on the
    device); what lies behind must be finite. Returns [B, T, Hq, d]. The gradients of k and v are defined only where a
    token is. FA3 where it is the backend in use and takes q's type, else `cached_reference`.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        if not _resolved:
            choose()
        if _active is not None and _active is _load("fa3"):
            (batch, length), capacity = q.shape[:2], k.shape[1]
            starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
            q_rows, k_rows, v_rows = (x.flatten(0, 1) for x in (q, k, v))
            bounds = _flash3.Bounds(starts * length, starts * capacity, length, capacity, used)
            return _flash3.attention(q_rows, k_rows, v_rows, bounds, *_flash3.load()).view_as(q)
    return cached_reference(q, k, v, used)


def cached_reference(q: Tensor, k: Tensor, v: Tensor, used: Tensor) -> Tensor:
    """`cached_attention` in plain PyTorch, one dense SDPA with a mask."""
    length = q.shape[1]
    last = used[:, None] - length + torch.arange(length, device=q.device)  # what each query may see at most
    seen = torch.arange(k.shape[1], device=q.device) <= last[..., None]
    k, v = _repeat_heads(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None]).transpose(1, 2)


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[-2] // k.shape[-2]
    return k.repeat_interleave(groups, dim=-2), v.repeat_interleave(groups, dim=-2)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = _repeat_heads(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _padded_layout(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor, int]:
    """(padded position -> token, token -> padded position, longest segment)."""
    bounds = torch.unique_consecutive(cu_seqlens.long())
    sizes = bounds.diff()
    longest = int(sizes.max())
    offsets = torch.arange(longest, device=bounds.device)
    # Padding reads the segment's last token: causal, so no real query sees it.
    to_token = (bounds[:-1, None] + torch.minimum(offsets, sizes[:, None] - 1)).flatten()
    segment = torch.repeat_interleave(torch.arange(len(sizes), device=bounds.device), sizes, output_size=length)
    to_padded = segment * longest + torch.arange(length, device=bounds.device) - bounds[segment]
    return to_token, to_padded, longest


class _Rearrange(torch.autograd.Function):
    """Tokens into padded segments. A gather both ways: deterministic, where autograd's scatter-add is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_token: Tensor, to_padded: Tensor, longest: int) -> Tensor:
        ctx.save_for_backward(to_padded)
        return x.index_select(0, to_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (to_padded,) = ctx.saved_tensors
        return grad.index_select(0, to_padded), None, None, None


class _Restore(torch.autograd.Function):
    """Padded segments back into tokens; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_token: Tensor, to_padded: Tensor, longest: int) -> Tensor:
        ctx.save_for_backward(to_padded)
        ctx.shape = x.shape
        return x.index_select(0, to_padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (to_padded,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, to_padded, grad), None, None, None
