"""The network (recipe section 2): 11 layers, three of them looped, U-shaped skips, parallel lanes at the end.

Compute type: every parameter is a float32 master, cast to `GPT.dtype` (float32 or bfloat16) where it is used, so the
activations have that type throughout. There is no autocast.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.config import ModelConfig
from pgolf.ops.attention import attention
from pgolf.ops.cross_entropy import cross_entropy
from pgolf.ops.embed import embed
from pgolf.ops.lanes import lanes as mix_lanes
from pgolf.ops.mlp import mlp as fused_mlp
from pgolf.ops.qk_rope import qk_rope
from pgolf.ops.residual import Residual, norm_mean, residual
from pgolf.ops.xsa_gate import xsa_gate

BOS = 1

# (names of matrices, what they read, what each gives); the embedding is told as input, with the ids that it reads, and
# as head, whose outputs nobody has computed yet: ().
Observer = Callable[[tuple[str, ...], Tensor, tuple[Tensor, ...]], None]


class AdapterSet(Protocol):
    """What test-time training plugs in: an addition to a projection's output, per document."""

    def delta(self, target: str, slot: int, x: Tensor) -> Tensor | None:
        """x [B, T, in] -> [B, T, out] for target q, k, v, o, mlp or head; None where there is no adapter."""


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


class Hooks(NamedTuple):
    """What one executed layer lets others see and change; both None in training."""

    delta: Callable[[str, Tensor], Tensor | None] | None = None  # an adapter's addition to a projection's output
    observe: Observer | None = None  # sees what the matrices read and give

    def add(self, target: str, x: Tensor, out: Tensor) -> Tensor:
        """`out`, the projection `target` of x, with its adapter's addition."""
        delta = None if self.delta is None else self.delta(target, x)
        return out if delta is None else out + delta

    def see(self, roles: tuple[str, ...], x: Tensor, *outputs: Tensor) -> None:
        if self.observe is not None:
            self.observe(roles, x, outputs)


NO_HOOKS = Hooks()


def attend(
    n: Tensor, gate: Tensor | None, layer: Layer, context: Context, xsa: bool, hooks: Hooks = NO_HOOKS
) -> Tensor:
    """The attention branch: n [B, T, D] (normed, scaled), gate [B, T, H] -> [B, T, D]."""
    qkv = F.linear(n, layer.qkv)
    if hooks != NO_HOOKS:
        kv_dim = (qkv.shape[-1] - n.shape[-1]) // 2
        parts = qkv.split((n.shape[-1], kv_dim, kv_dim), dim=-1)
        hooks.see(("attn.c_q", "attn.c_k", "attn.c_v"), n, *parts)
        qkv = torch.cat([hooks.add(target, n, part) for target, part in zip("qkv", parts, strict=True)], dim=-1)
    q, k, v, v_self = qk_rope(qkv, layer.q_gain, context.cos, context.sin, context.kv_heads)
    y = xsa_gate(attention(q, k, v, context.cu_seqlens, context.max_seqlen), v_self, gate, xsa)
    out = F.linear(y, layer.o)
    hooks.see(("attn.proj",), y, out)
    return hooks.add("o", n, out)


def mlp(n: Tensor, layer: Layer, hooks: Hooks = NO_HOOKS) -> Tensor:
    """The MLP branch: down(leaky_relu(up(n), 0.5) squared), n [B, T, D] -> [B, T, D]."""
    if hooks.observe is None:
        out = fused_mlp(n, layer.up, layer.down)
    else:
        up = F.linear(n, layer.up)
        hooks.see(("mlp.fc",), n, up)
        hidden = F.leaky_relu(up, 0.5).square()
        out = F.linear(hidden, layer.down)
        hooks.see(("mlp.proj",), hidden, out)
    return hooks.add("mlp", n, out)


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
    middle = residual(entered.stream, branch=a, branch_scale=layer.attn_scale, norm_scale=layer.norm_scale)
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
    other = residual(entered.sum if lane1 is None else lane1, norm_scale=layer.norm_scale)
    a = attend(entered.normed, entered.gate, layer, context, xsa, hooks)
    m = mlp(other.normed, layer, hooks)
    out0, out1 = mix_lanes(entered.blend, other.stream, a, m, layer.attn_scale, layer.mlp_scale, post, resid)
    return Stream(out0, entered.x0), out1


def softcapped_cross_entropy(h: Tensor, embedding: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Mean cross-entropy in nats of cap * tanh(z / cap), z = h embedding^T, in float32. h [.., D], targets [..]."""
    return cross_entropy(h, embedding.to(h.dtype), targets, cap)


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.attn_gate_w = nn.Parameter(torch.zeros(config.num_heads, config.gate_window))


class _Block(nn.Module):
    """The small parameters of one layer; its matrices live in the banks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = _Attention(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, config.model_dim))


class GPT(nn.Module):
    """The network. State-dict names and shapes are those of recipe section 2; `looping` switches recurrence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.looping = config.num_loops > 0
        self.dtype = torch.float32
        self.observer: Observer | None = None
        layers, dim = config.num_layers, config.model_dim
        self.tok_emb = nn.Embedding(config.vocab_size, dim)
        self.qo_bank = nn.Parameter(torch.zeros(2 * layers, dim, dim))
        self.kv_bank = nn.Parameter(torch.zeros(2 * layers, config.kv_dim, dim))
        self.mlp_up_bank = nn.Parameter(torch.zeros(layers, config.mlp_dim, dim))
        self.mlp_down_bank = nn.Parameter(torch.zeros(layers, dim, config.mlp_dim))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(layers))
        encoder, decoder = layer_order(config, config.num_loops > 0)
        skips = min(len(encoder), len(decoder))  # sized for looping also while it is off
        self.skip_weights = nn.Parameter(torch.ones(skips, dim))
        self.skip_gates = nn.Parameter(torch.zeros(skips, dim))
        self.parallel_post_lambdas = nn.Parameter(torch.ones(layers, 2, 2))
        self.parallel_resid_lambdas = nn.Parameter(torch.full((layers, 2), 1.1))
        self.smear_gate = nn.Linear(config.gate_window, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.softcap_pos = nn.Parameter(torch.tensor(config.logit_softcap))
        self.softcap_neg = nn.Parameter(torch.tensor(config.logit_softcap))
        self._block: Any = block
        self._parallel_block: Any = parallel_block
        self._loss: Any = softcapped_cross_entropy

    def initialize(self, seed: int) -> "GPT":
        """Draw the initial weights (recipe section 2, "Init") from one CPU generator. Returns self."""
        generator = torch.Generator().manual_seed(seed)
        layers = self.config.num_layers
        with torch.no_grad():
            nn.init.normal_(self.tok_emb.weight, std=0.005, generator=generator)
            nn.init.zeros_(self.smear_gate.weight)
            for matrix in (*self.qo_bank[:layers], *self.kv_bank, *self.mlp_up_bank):
                nn.init.orthogonal_(matrix, generator=generator)
        return self

    def compile_regions(self) -> "GPT":
        """Compile layer by layer: the layers share one graph, so a mode costs seconds, not a whole-model compile."""
        # Integers (context length, flags) stay constants of a graph; only the number of segments is dynamic, which
        # the training loop marks on `cu_seqlens`.
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 32
        self._block = torch.compile(block, fullgraph=True)
        self._parallel_block = torch.compile(parallel_block, fullgraph=True)
        self._loss = torch.compile(softcapped_cross_entropy, fullgraph=True)
        return self

    def order(self) -> tuple[list[int], list[int]]:
        """Physical layers of the encoder and the decoder half, in execution order."""
        return layer_order(self.config, self.looping)

    @property
    def slots(self) -> int:
        """Executed layers: one adapter set each."""
        return sum(map(len, self.order()))

    def _layers(self, dtype: torch.dtype) -> list[Layer]:
        count = self.config.num_layers
        qo, kv = self.qo_bank.to(dtype), self.kv_bank.to(dtype)
        # unbind, not indexing: its backward is one stack instead of a full-size zero bank per layer
        qkv = torch.cat((qo[:count], kv[:count], kv[count:]), dim=1).unbind()
        o, up, down = (bank.unbind() for bank in (qo[count:], self.mlp_up_bank.to(dtype), self.mlp_down_bank.to(dtype)))
        layers = []
        for i, part in enumerate(cast(list[_Block], list(self.blocks))):
            attn, norm_scale = part.attn, 1 / math.sqrt(i + 1)
            small = (attn.q_gain, attn.attn_gate_w, part.attn_scale, part.mlp_scale, part.resid_mix)
            layers.append(Layer(qkv[i], o[i], up[i], down[i], *small, norm_scale))
        return layers

    def _context(self, length: int, cu_seqlens: Tensor | None, max_seqlen: int | None, device: torch.device) -> Context:
        config = self.config
        exponent = torch.arange(0, config.rope_dims, 2, device=device, dtype=torch.float32) / max(config.rope_dims, 1)
        angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * (config.rope_base**-exponent)
        gate_scale = config.sparse_attn_gate_scale
        return Context(angle.cos(), angle.sin(), cu_seqlens, max_seqlen or length, gate_scale, config.num_kv_heads)

    def hidden(
        self,
        ids: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        adapters: AdapterSet | None = None,
    ) -> Tensor:
        """Final-norm outputs [B, T, D] of token ids [B, T] int64.

        `cu_seqlens` int32 [S+1] cuts one packed row (B = 1) into segments that cannot see each other; None makes
        each row one segment. `max_seqlen` (tokens) bounds the longest segment.
        """
        config = self.config
        x0 = embed(ids, self.tok_emb.weight, self.smear_gate.weight, self.smear_lambda, BOS, self.dtype)
        if self.observer is not None:
            self.observer(("tok_emb.weight",), ids, (x0,))
        context = self._context(ids.shape[1], cu_seqlens, max_seqlen, ids.device)
        layers = self._layers(self.dtype)
        plain = adapters is None and self.observer is None
        run_block, run_parallel = (self._block, self._parallel_block) if plain else (block, parallel_block)
        skip_weights, skip_gates = self.skip_weights.unbind(), self.skip_gates.unbind()
        posts, resids = self.parallel_post_lambdas.unbind(), self.parallel_resid_lambdas.unbind()
        encoder, decoder = self.order()
        stream = Stream(x0.view_as(x0), x0)  # another tensor object: identical arguments would compile apart
        stack: list[Tensor] = []
        lanes: tuple[Stream, Tensor] | None = None
        for slot, i in enumerate((*encoder, *decoder)):
            step = slot - len(encoder)
            xsa, hooks = i >= config.num_layers - config.xsa_last_n, self._hooks(adapters, slot, i)
            skip = None
            if 0 <= step < min(len(encoder), len(skip_weights)):
                skip = Skip(stack.pop() if step else None, skip_weights[step], skip_gates[step])
            if step >= 0 and i >= config.parallel_start_layer:
                lane0, lane1 = lanes or (stream, None)
                lanes = run_parallel(lane0, lane1, skip, layers[i], posts[i], resids[i], context, xsa, hooks)
            else:
                # The last block's output is whole only inside this one.
                stream, before = run_block(stream, skip, layers[i], context, xsa, 0 < slot < len(encoder), hooks)
                if before is not None:
                    stack.append(before)
        if lanes is None:
            h = residual(stream.x, branch=stream.branch, branch_scale=stream.branch_scale, keep_stream=False).normed
        else:
            h = norm_mean(lanes[0].x, lanes[1])
        if self.observer is not None:
            self.observer(("tok_emb.weight",), h, ())
        return h

    def _hooks(self, adapters: AdapterSet | None, slot: int, i: int) -> Hooks:
        """The hooks of one executed layer; none on the plain path, so that it compiles alone."""
        observer = self.observer
        return Hooks(
            None if adapters is None else lambda target, x: adapters.delta(target, slot, x),
            None if observer is None else lambda roles, x, outputs: observer(_weights(i, roles), x, outputs),
        )

    def raw_logits(self, h: Tensor, adapters: AdapterSet | None = None) -> Tensor:
        """Logits before any softcap: h [B, T, D] -> [B, T, V] in h's type."""
        logits = F.linear(h, self.tok_emb.weight.to(h.dtype))
        delta = None if adapters is None else adapters.delta("head", 0, h)
        return logits if delta is None else logits + delta

    def eval_logits(self, h: Tensor, adapters: AdapterSet | None = None) -> Tensor:
        """Logits as scored, float32: softcap_pos above zero, softcap_neg elsewhere."""
        z = self.raw_logits(h, adapters).float()
        cap = torch.where(z > 0, self.softcap_pos, self.softcap_neg)
        return cap * torch.tanh(z / cap)

    def train_loss(
        self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """Mean training loss in nats (fixed softcap) of ids, targets [B, T] int64; 0-dim float32."""
        h = self.hidden(ids, cu_seqlens, max_seqlen)
        return self._loss(h, self.tok_emb.weight, targets, self.config.logit_softcap)


def _weights(i: int, roles: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"blocks.{i}.{role}.weight" for role in roles)


def layer_order(config: ModelConfig, looping: bool) -> tuple[list[int], list[int]]:
    """Executed physical layers, split at half (the encoder gets the smaller half)."""
    order = list(range(config.num_layers))
    if looping and config.num_loops:
        loop = order[config.loop_start : config.loop_end + 1]
        order = order[: config.loop_start] + loop * (config.num_loops + 1) + order[config.loop_end + 1 :]
    half = len(order) // 2
    return order[:half], order[half:]


def flops_per_token(config: ModelConfig, looping: bool, context: int) -> float:
    """Floating-point operations of forward and backward per token, attention at half the context on average."""
    matrices = 2 * config.model_dim**2 + 2 * config.kv_dim * config.model_dim + 2 * config.mlp_dim * config.model_dim
    executed = sum(len(part) for part in layer_order(config, looping))
    attention_flops = 2 * context / 2 * config.model_dim * 2
    forward = executed * (2 * matrices + attention_flops) + 2 * config.vocab_size * config.model_dim
    return 3 * forward


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(p.shape) for p in GPT(config).parameters())
