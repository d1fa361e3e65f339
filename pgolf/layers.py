"""One layer of the network as functions of its weights (recipe section 2): attention, MLP, skips, parallel lanes."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.attention import attention, cached_attention
from pgolf.ops.lanes import lanes as mix_lanes
from pgolf.ops.mlp import mlp as fused_mlp
from pgolf.ops.qk_rope import qk_rope
from pgolf.ops.residual import Residual, residual
from pgolf.ops.xsa_gate import xsa_gate

# (names of matrices, what they read, what each gives); the embedding is told as input, with the ids that it reads, and
# as head, whose outputs nobody has computed yet: ().
Observer = Callable[[tuple[str, ...], Tensor, tuple[Tensor, ...]], None]


class Add(Protocol):
    """Additions to what projections make of an x that `AdapterSet.read` has taken."""

    def __call__(self, targets: tuple[str, ...], out: Tensor, places: Tensor | None = None) -> Tensor:
        """`out` [B, T, widths of the targets side by side] with what their adapters add to it.

        One without an adapter stays as it is. `out` may be written to. With `places` [B, N], `out` is [B, N, ..], of
        these places of x.
        """


class AdapterSet(Protocol):
    """What test-time training plugs in: additions to projections' outputs, per document."""

    def read(self, group: str, slot: int, x: Tensor) -> tuple[Tensor, Add]:
        """x [B, T, in], and the additions to what is made of it; adapters read it before anything else does.

        Groups: "attention" has the targets q, k, v and o, "mlp" and "head" those of their names. Exactly one product
        must read the x that comes back, and nothing else: its gradient, the product's own new tensor, is where those
        of the adapters are added.
        """


class Memory(Protocol):
    """What streaming plugs in: keys and values of earlier tokens, kept from one call to the next, slot by slot.

    The network then gets one id more than it runs, in front: the token before the first, for the smear gate.
    """

    def positions(self, length: int) -> Tensor:
        """Places in their documents of the `length` tokens that are run, float32."""

    def attend(self, slot: int, q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None = None) -> Tensor:
        """Attention of q [B, T, H, d] over earlier tokens and over k, v [B, T, Hk, d], which are kept from now on.

        With `ends` int32 [B], q is [B, N, H, d], of the N tokens before place ends[b] of row b, and the gradients of
        k and v are defined only up to there.
        """


class Layer(NamedTuple):
    """One physical layer's weights: matrices in the compute type, the rest float32 masters."""

    qkv: Tensor  # [D + 2 kv_dim, D]: query, key and value in one product
    o: Tensor
    up: Tensor
    down: Tensor
    q_gain: Tensor
    gate: Tensor
    attn_scale: Tensor
    mlp_scale: Tensor
    resid_mix: Tensor
    norm_scale: float  # 1 / sqrt(i + 1)


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    cos: Tensor  # float32 [T, rope_dims / 2]
    sin: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    gate_scale: float
    kv_heads: int


def _nothing(targets: tuple[str, ...], out: Tensor, places: Tensor | None = None) -> Tensor:
    return out


class Hooks(NamedTuple):
    """What one executed layer lets others see and change; all None in training."""

    adapt: Callable[[str, Tensor], tuple[Tensor, Add]] | None = None  # `AdapterSet.read` of this slot
    observe: Observer | None = None  # sees what the matrices read and give
    remember: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None  # `Memory.attend` of this slot
    places: Tensor | None = None  # int64 [B, N]: all that is wanted of the last layer, as in `GPT.hidden`

    def read(self, group: str, x: Tensor) -> tuple[Tensor, Add]:
        """x for the projections of the group to read, and what their adapters add."""
        return (x, _nothing) if self.adapt is None else self.adapt(group, x)

    def wanted(self, x: Tensor) -> Tensor:
        """x [B, T, ..] at the wanted places, [B, N, ..]."""
        return x if self.places is None else at(x, self.places)

    def see(self, roles: tuple[str, ...], x: Tensor, *outputs: Tensor) -> None:
        if self.observe is not None:
            self.observe(roles, x, outputs)


NO_HOOKS = Hooks()


def at(x: Tensor, places: Tensor) -> Tensor:
    """x [B, T, ..] at the places [B, N] of each row: [B, N, ..]."""
    return x.gather(1, places.view(*places.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def attend(
    n: Tensor, gate: Tensor | None, layer: Layer, context: Context, xsa: bool, hooks: Hooks = NO_HOOKS
) -> Tensor:
    """The attention branch: n [B, T, D] (normed, scaled), gate [B, T, H] -> [B, T, D]."""
    n, add = hooks.read("attention", n)
    qkv = F.linear(n, layer.qkv)
    if hooks.observe is not None:
        kv_dim = (qkv.shape[-1] - n.shape[-1]) // 2
        parts = qkv.split((n.shape[-1], kv_dim, kv_dim), dim=-1)
        hooks.see(("attn.c_q", "attn.c_k", "attn.c_v"), n, *parts)
        qkv = torch.cat(parts, dim=-1)  # of the parts: the observer may wait for their gradients
    qkv = add(("q", "k", "v"), qkv)
    q, k, v, v_self = qk_rope(qkv, layer.q_gain, context.cos, context.sin, context.kv_heads)
    if hooks.places is not None:
        y = _attention_at(hooks.places, q, k, v, hooks)
    elif hooks.remember is not None:
        y = hooks.remember(q, k, v, None)
    else:
        y = attention(q, k, v, context.cu_seqlens, context.max_seqlen)
    y = xsa_gate(y, hooks.wanted(v_self), None if gate is None else hooks.wanted(gate), xsa)
    out = F.linear(y, layer.o)
    hooks.see(("attn.proj",), y, out)
    return add(("o",), out, hooks.places)


def _attention_at(places: Tensor, q: Tensor, k: Tensor, v: Tensor, hooks: Hooks) -> Tensor:
    """Attention of the tokens at `places` alone, [B, N, H, d].

    Computed of the N tokens from a row's first place on, or of its last N where fewer follow, as a short chunk's.
    """
    length = q.shape[1]
    count = min(places.shape[1], length)
    first = places[:, :1].clamp(max=length - count)
    q = at(q, first + torch.arange(count, device=q.device))
    ends = first + count
    seen = (torch.arange(length, device=q.device) < ends)[..., None, None]
    # Attention leaves the gradients of what it does not see undefined; `where` makes them zero, even those not finite.
    k, v = (torch.where(seen, x, 0) for x in (k, v))
    remember = hooks.remember or cached_attention
    y = remember(q, k, v, ends[:, 0].int())
    return at(y, (places - first).clamp(min=0))  # what is past a short chunk gets the values of some token


def mlp(n: Tensor, layer: Layer, hooks: Hooks = NO_HOOKS) -> Tensor:
    """The MLP branch: down(leaky_relu(up(n), 0.5) squared), n [B, T, D] -> [B, T, D]."""
    n, add = hooks.read("mlp", n)
    if hooks.observe is None:
        out = fused_mlp(n, layer.up, layer.down)
    else:
        up = F.linear(n, layer.up)
        hooks.see(("mlp.fc",), n, up)
        hidden = F.leaky_relu(up, 0.5).square()
        out = F.linear(hidden, layer.down)
        hooks.see(("mlp.proj",), hidden, out)
    return add(("mlp",), out)


class Stream(NamedTuple):
    """The residual stream between two layers: x [B, T, D], to which `branch`, scaled, is still to be added.

    The layer that comes next adds it in the pass over the tokens that it makes anyway.
    """

    x: Tensor
    x0: Tensor  # the embeddings, which every layer mixes in
    branch: Tensor | None = None
    branch_scale: Tensor | None = None


class Skip(NamedTuple):
    """The output of an encoder layer on its way to a decoder layer: lerp(weight * x, stream, sigmoid(gate))."""

    x: Tensor | None  # None: the stream itself, the last encoder layer's output
    weight: Tensor  # [D]
    gate: Tensor  # [D]


def enter(stream: Stream, skip: Skip | None, layer: Layer, context: Context, **keep: bool) -> Residual:
    """All that a layer adds to the stream before its attention, with what attention reads; `keep` as in `residual`."""
    skip_x, skip_weight, skip_gate = skip or (None, None, None)
    return residual(
        stream.x,
        branch=stream.branch,
        branch_scale=stream.branch_scale,
        skip=skip_x,
        skip_weight=skip_weight,
        skip_gate=skip_gate,
        x0=stream.x0,
        mix=layer.resid_mix,
        gate_weight=layer.gate,
        gate_scale=context.gate_scale,
        norm_scale=layer.norm_scale,
        **keep,
    )


def block(
    stream: Stream,
    skip: Skip | None,
    layer: Layer,
    context: Context,
    xsa: bool,
    keep: bool = False,
    hooks: Hooks = NO_HOOKS,
) -> tuple[Stream, Tensor | None]:
    """A sequential layer: attention, then MLP. With `keep` also returns the stream as it came in, all added."""
    entered = enter(stream, skip, layer, context, keep_sum=keep)
    a = attend(entered.normed, entered.gate, layer, context, xsa, hooks)
    middle = residual(
        hooks.wanted(entered.stream), branch=a, branch_scale=layer.attn_scale, norm_scale=layer.norm_scale
    )
    m = mlp(middle.normed, layer, hooks)
    return Stream(middle.stream, entered.x0, m, layer.mlp_scale), entered.sum


def parallel_block(
    lane0: Stream,
    lane1: Tensor | None,
    skip: Skip | None,
    layer: Layer,
    post: Tensor,
    resid: Tensor,
    context: Context,
    xsa: bool,
    hooks: Hooks = NO_HOOKS,
) -> tuple[Stream, Tensor]:
    """A parallel layer: attention reads lane 0, the MLP lane 1; both write to both. post [2, 2], resid [2].

    In the first one lane1 is None: both lanes begin as the stream, and the skip goes into lane 0 only.
    """
    entered = enter(lane0, skip, layer, context, keep_sum=lane1 is None, keep_blend=True, keep_stream=False)
    other = residual(hooks.wanted(entered.sum if lane1 is None else lane1), norm_scale=layer.norm_scale)
    a = attend(entered.normed, entered.gate, layer, context, xsa, hooks)
    m = mlp(other.normed, layer, hooks)
    out0, out1 = mix_lanes(
        hooks.wanted(entered.blend), other.stream, a, m, layer.attn_scale, layer.mlp_scale, post, resid
    )
    return Stream(out0, entered.x0), out1
