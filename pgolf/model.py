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
from pgolf.ops.mlp import mlp as fused_mlp

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

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    up: Tensor
    down: Tensor
    q_gain: Tensor
    gate: Tensor
    attn_scale: Tensor
    mlp_scale: Tensor
    resid_mix: Tensor
    norm_scale: Tensor  # 1 / sqrt(i + 1)


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    cos: Tensor  # [T, 1, rope_dims / 2]
    sin: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    gate_scale: float


def norm(x: Tensor) -> Tensor:
    """Weightless RMS-norm over the last dimension, eps the machine epsilon of x's type."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial rotary embedding of x [B, T, H, d]: the first 2 * cos.shape[-1] dimensions turn, as two halves."""
    half = cos.shape[-1]
    if half == 0:
        return x
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA: remove from each head's output y [B, T, Hq, d] its part along the same position's value v [B, T, Hk, d]."""
    unit = F.normalize(v, dim=-1, eps=1e-12)[..., None, :]
    grouped = y.unflatten(2, (v.shape[2], -1))
    return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(2, 3)


def attend(n: Tensor, layer: Layer, context: Context, xsa: bool, delta: Any = None, observe: Any = None) -> Tensor:
    """The attention branch: n [B, T, D] (normed, scaled) -> [B, T, D]."""
    heads = layer.q_gain.shape[0]
    q, k, v = F.linear(n, layer.q), F.linear(n, layer.k), F.linear(n, layer.v)
    if observe is not None:
        observe(("attn.c_q", "attn.c_k", "attn.c_v"), n, (q, k, v))
    if delta is not None:
        q, k, v = _add(q, delta("q", n)), _add(k, delta("k", n)), _add(v, delta("v", n))
    head_dim = q.shape[-1] // heads
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
    q = rotate(norm(q), context.cos, context.sin) * layer.q_gain.to(q.dtype)[:, None]
    k = rotate(norm(k), context.cos, context.sin)
    y = attention(q, k, v, context.cu_seqlens, context.max_seqlen)
    if xsa:
        y = exclude_self(y, v)
    gate = torch.sigmoid(context.gate_scale * F.linear(n[..., : layer.gate.shape[-1]], layer.gate.to(n.dtype)))
    y = (y * gate[..., None]).flatten(-2)
    out = F.linear(y, layer.o)
    if observe is not None:
        observe(("attn.proj",), y, (out,))
    return out if delta is None else _add(out, delta("o", n))


def mlp(n: Tensor, layer: Layer, delta: Any = None, observe: Any = None) -> Tensor:
    """The MLP branch: down(leaky_relu(up(n), 0.5) squared), n [B, T, D] -> [B, T, D]."""
    if observe is None:
        out = fused_mlp(n, layer.up, layer.down)
    else:
        up = F.linear(n, layer.up)
        observe(("mlp.fc",), n, (up,))
        hidden = F.leaky_relu(up, 0.5).square()
        out = F.linear(hidden, layer.down)
        observe(("mlp.proj",), hidden, (out,))
    return out if delta is None else _add(out, delta("mlp", n))


def _add(x: Tensor, delta: Tensor | None) -> Tensor:
    return x if delta is None else x + delta


def block(
    x: Tensor, x0: Tensor, layer: Layer, context: Context, xsa: bool, delta: Any = None, observe: Any = None
) -> Tensor:
    """A sequential layer: attention, then MLP, on the stream x [B, T, D]."""
    mix = layer.resid_mix.to(x.dtype)
    x = mix[0] * x + mix[1] * x0
    x = x + layer.attn_scale.to(x.dtype) * attend(norm(x) * layer.norm_scale, layer, context, xsa, delta, observe)
    return x + layer.mlp_scale.to(x.dtype) * mlp(norm(x) * layer.norm_scale, layer, delta, observe)


def parallel_block(
    lanes: tuple[Tensor, Tensor],
    x0: Tensor,
    layer: Layer,
    post: Tensor,
    resid: Tensor,
    context: Context,
    xsa: bool,
    delta: Any = None,
    observe: Any = None,
) -> tuple[Tensor, Tensor]:
    """A parallel layer: attention reads lane 0, the MLP lane 1; both write to both. post [2, 2], resid [2]."""
    lane0, lane1 = lanes
    mix, post, resid = layer.resid_mix.to(x0.dtype), post.to(x0.dtype), resid.to(x0.dtype)
    x = mix[0] * lane0 + mix[1] * x0
    a = layer.attn_scale.to(x.dtype) * attend(norm(x) * layer.norm_scale, layer, context, xsa, delta, observe)
    m = layer.mlp_scale.to(x.dtype) * mlp(norm(lane1) * layer.norm_scale, layer, delta, observe)
    return (
        resid[0] * lane0 + post[0, 0] * a + post[1, 0] * m,
        resid[1] * lane1 + post[0, 1] * a + post[1, 1] * m,
    )


def mix_skip(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """lerp(weight * skip, x, sigmoid(gate)) per channel."""
    return torch.lerp(weight.to(x.dtype) * skip, x, torch.sigmoid(gate.to(x.dtype)))


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

    norm_scales: Tensor

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
        self.register_buffer("norm_scales", torch.arange(1, layers + 1).float().rsqrt(), persistent=False)
        self._block: Any = block
        self._parallel_block: Any = parallel_block
        self._mix_skip: Any = mix_skip
        self._loss: Any = softcapped_cross_entropy
        self._embed: Any = self._embed_eager

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
        self._mix_skip = torch.compile(mix_skip, fullgraph=True)
        self._loss = torch.compile(softcapped_cross_entropy, fullgraph=True)
        self._embed = torch.compile(self._embed_eager, fullgraph=True)
        return self

    def order(self) -> tuple[list[int], list[int]]:
        """Physical layers of the encoder and the decoder half, in execution order."""
        return layer_order(self.config, self.looping)

    @property
    def slots(self) -> int:
        """Executed layers: one adapter set each."""
        encoder, decoder = self.order()
        return len(encoder) + len(decoder)

    def _layers(self, dtype: torch.dtype) -> list[Layer]:
        count = self.config.num_layers
        # unbind, not indexing: its backward is one stack instead of a full-size zero bank per layer
        qo, kv = self.qo_bank.to(dtype).unbind(), self.kv_bank.to(dtype).unbind()
        up, down = self.mlp_up_bank.to(dtype).unbind(), self.mlp_down_bank.to(dtype).unbind()
        scales = self.norm_scales.unbind()
        return [
            Layer(
                qo[i],
                kv[i],
                kv[count + i],
                qo[count + i],
                up[i],
                down[i],
                part.attn.q_gain,
                part.attn.attn_gate_w,
                part.attn_scale,
                part.mlp_scale,
                part.resid_mix,
                scales[i],
            )
            for i, part in enumerate(cast(list[_Block], list(self.blocks)))
        ]

    def _embed_eager(self, ids: Tensor) -> Tensor:
        return embed(ids, self.tok_emb.weight, self.smear_gate.weight, self.smear_lambda, BOS, self.dtype)

    def _context(self, length: int, cu_seqlens: Tensor | None, max_seqlen: int | None, like: Tensor) -> Context:
        dims, base = self.config.rope_dims, self.config.rope_base
        exponent = torch.arange(0, dims, 2, device=like.device, dtype=torch.float32) / max(dims, 1)
        angle = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * (base**-exponent)
        cos, sin = angle.cos().to(like.dtype)[:, None], angle.sin().to(like.dtype)[:, None]
        return Context(cos, sin, cu_seqlens, max_seqlen or length, self.config.sparse_attn_gate_scale)

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
        x0 = self._embed(ids)
        if self.observer is not None:
            self.observer(("tok_emb.weight",), ids, (x0,))
        x = x0.view_as(x0)  # another tensor object: identical arguments would compile the first layer twice
        context = self._context(ids.shape[1], cu_seqlens, max_seqlen, x)
        layers = self._layers(x.dtype)
        first_xsa = config.num_layers - config.xsa_last_n
        plain = adapters is None and self.observer is None
        run_block, run_parallel, run_skip = (
            (self._block, self._parallel_block, self._mix_skip) if plain else (block, parallel_block, mix_skip)
        )
        skip_weights, skip_gates = self.skip_weights.unbind(), self.skip_gates.unbind()
        posts, resids = self.parallel_post_lambdas.unbind(), self.parallel_resid_lambdas.unbind()
        encoder, decoder = self.order()
        stack: list[Tensor] = []
        for slot, i in enumerate(encoder):
            x = run_block(x, x0, layers[i], context, i >= first_xsa, *self._hooks(adapters, slot, i))
            stack.append(x)
        lanes: tuple[Tensor, Tensor] | None = None
        for step, i in enumerate(decoder):
            parallel = i >= config.parallel_start_layer
            if parallel and lanes is None:
                lanes = (x, x.view_as(x))
            if step < len(skip_weights) and stack:  # the skip goes into lane 0 only
                mixed = run_skip(x if lanes is None else lanes[0], stack.pop(), skip_weights[step], skip_gates[step])
                x, lanes = (mixed, None) if lanes is None else (x, (mixed, lanes[1]))
            hooks = self._hooks(adapters, len(encoder) + step, i)
            if parallel and lanes is not None:
                lanes = run_parallel(lanes, x0, layers[i], posts[i], resids[i], context, i >= first_xsa, *hooks)
            else:
                x = run_block(x, x0, layers[i], context, i >= first_xsa, *hooks)
        h = norm(x if lanes is None else (lanes[0] + lanes[1]) / 2)
        if self.observer is not None:
            self.observer(("tok_emb.weight",), h, ())
        return h

    def _hooks(self, adapters: AdapterSet | None, slot: int, i: int) -> tuple[Any, ...]:
        """(delta, observe) of one executed layer; nothing at all on the plain path, so it compiles alone."""
        observer = self.observer
        if adapters is None and observer is None:
            return ()
        delta = None if adapters is None else (lambda target, x: adapters.delta(target, slot, x))
        if observer is None:
            return (delta,)
        return delta, lambda roles, x, y: observer(tuple(f"blocks.{i}.{role}.weight" for role in roles), x, y)

    def raw_logits(self, h: Tensor, adapters: AdapterSet | None = None) -> Tensor:
        """Logits before any softcap: h [B, T, D] -> [B, T, V] in h's type."""
        logits = F.linear(h, self.tok_emb.weight.to(h.dtype))
        return logits if adapters is None else _add(logits, adapters.delta("head", 0, h))

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
