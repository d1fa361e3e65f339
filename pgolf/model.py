"""The network (recipe section 2): 11 layers, three of them looped, U-shaped skips, parallel lanes at the end.

Compute type: every parameter is a float32 master, cast to `GPT.dtype` (float32 or bfloat16) where it is used, so the
activations have that type throughout. There is no autocast.
"""

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.config import ModelConfig
from pgolf.layers import (
    AdapterSet,
    Context,
    Hooks,
    Layer,
    Memory,
    Observer,
    Skip,
    Stream,
    block,
    parallel_block,
)
from pgolf.ops.cross_entropy import cross_entropy
from pgolf.ops.embed import embed
from pgolf.ops.residual import norm_mean, residual

BOS = 1


def softcapped_cross_entropy(h: Tensor, embedding: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Mean cross-entropy in nats of cap * tanh(z / cap), z = h embedding^T, in float32. h [.., D], targets [..]."""
    return cross_entropy(h, embedding.to(h.dtype), targets, cap)


class Weights(NamedTuple):
    """The network's matrices as a forward pass takes them: layers' in the compute type, those of all layers stacked."""

    embedding: Tensor  # [V, D], float32 or the compute type
    qkv: Tensor  # [L, D + 2 kv_dim, D]
    o: Tensor
    up: Tensor
    down: Tensor


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

    def weights(self) -> Weights:
        """The matrices of one forward pass, differentiable."""
        count, dtype = self.config.num_layers, self.dtype
        qo, kv = self.qo_bank.to(dtype), self.kv_bank.to(dtype)
        qkv = torch.cat((qo[:count], kv[:count], kv[count:]), dim=1)
        up, down = self.mlp_up_bank.to(dtype), self.mlp_down_bank.to(dtype)
        return Weights(self.tok_emb.weight, qkv, qo[count:], up, down)

    @torch.no_grad()
    def frozen_weights(self, out: Weights | None = None) -> Weights:
        """The matrices in the compute type for many forward passes, made once and without gradients.

        After the parameters have moved they are made anew in the memory of `out`, which captured graphs read.
        """
        made = self.weights()
        made = Weights(made.embedding.to(self.dtype), *made[1:])
        if out is None:
            return Weights(*(tensor.detach() for tensor in made))
        for old, new in zip(out, made, strict=True):
            old.copy_(new)
        return out

    def _layers(self, weights: Weights) -> list[Layer]:
        # unbind, not indexing: its backward is one stack instead of a full-size zero bank per layer
        qkv, o, up, down = (bank.unbind() for bank in (weights.qkv, weights.o, weights.up, weights.down))
        layers = []
        for i, part in enumerate(cast(list[_Block], list(self.blocks))):
            attn, norm_scale = part.attn, 1 / math.sqrt(i + 1)
            small = (attn.q_gain, attn.attn_gate_w, part.attn_scale, part.mlp_scale, part.resid_mix)
            layers.append(Layer(qkv[i], o[i], up[i], down[i], *small, norm_scale))
        return layers

    def _context(self, positions: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Context:
        config, device = self.config, positions.device
        exponent = torch.arange(0, config.rope_dims, 2, device=device, dtype=torch.float32) / max(config.rope_dims, 1)
        angle = positions[:, None] * (config.rope_base**-exponent)
        longest = max_seqlen or len(positions)
        gate_scale = config.sparse_attn_gate_scale
        return Context(angle.cos(), angle.sin(), cu_seqlens, longest, gate_scale, config.num_kv_heads)

    def hidden(
        self,
        ids: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        adapters: AdapterSet | None = None,
        weights: Weights | None = None,
        memory: Memory | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Final-norm outputs [B, T, D] of token ids [B, T] int64.

        `cu_seqlens` int32 [S+1] cuts one packed row (B = 1) into segments that cannot see each other; None makes
        each row one segment. `max_seqlen` (tokens) bounds the longest segment. `weights` are used in place of the
        parameters' own. With `memory`, ids are [B, 1 + T] and each row goes on where earlier calls ended. With
        `places` int64 [B, N] (and no `cu_seqlens`) only these outputs are computed, [B, N, D]: those of a row follow
        one another, then 0 may stand where none is wanted and what comes out is finite, but of no meaning.
        """
        config = self.config
        weights = self.weights() if weights is None else weights
        x0 = embed(ids, weights.embedding, self.smear_gate.weight, self.smear_lambda, BOS, self.dtype)
        if memory is not None:
            x0 = x0[:, 1:].contiguous()
        if self.observer is not None:
            self.observer(("tok_emb.weight",), ids, (x0,))
        length = x0.shape[1]
        positions = torch.arange(length, device=ids.device, dtype=torch.float32)
        context = self._context(positions if memory is None else memory.positions(length), cu_seqlens, max_seqlen)
        layers = self._layers(weights)
        plain = adapters is None and self.observer is None and memory is None and places is None
        run_block, run_parallel = (self._block, self._parallel_block) if plain else (block, parallel_block)
        skip_weights, skip_gates = self.skip_weights.unbind(), self.skip_gates.unbind()
        posts, resids = self.parallel_post_lambdas.unbind(), self.parallel_resid_lambdas.unbind()
        encoder, decoder = self.order()
        stream = Stream(x0.view_as(x0), x0)  # another tensor object: identical arguments would compile apart
        stack: list[Tensor] = []
        lanes: tuple[Stream, Tensor] | None = None
        for slot, i in enumerate((*encoder, *decoder)):
            step = slot - len(encoder)
            last = slot == len(encoder) + len(decoder) - 1
            xsa = i >= config.num_layers - config.xsa_last_n
            hooks = self._hooks(adapters, memory, places if last else None, slot, i)
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

    def _hooks(
        self, adapters: AdapterSet | None, memory: Memory | None, places: Tensor | None, slot: int, i: int
    ) -> Hooks:
        """The hooks of one executed layer; none on the plain path, so that it compiles alone."""
        observer = self.observer
        return Hooks(
            None if adapters is None else lambda group, x: adapters.read(group, slot, x),
            None if observer is None else lambda roles, x, outputs: observer(_weights(i, roles), x, outputs),
            None if memory is None else lambda q, k, v, ends: memory.attend(slot, q, k, v, ends),
            places,
        )

    def raw_logits(self, h: Tensor, adapters: AdapterSet | None = None, weights: Weights | None = None) -> Tensor:
        """Logits before any softcap: h [B, T, D] -> [B, T, V] in h's type."""
        embedding = self.tok_emb.weight if weights is None else weights.embedding
        if adapters is None:
            return F.linear(h, embedding.to(h.dtype))
        h, add = adapters.read("head", 0, h)
        return add(("head",), F.linear(h, embedding.to(h.dtype)))

    def eval_logits(self, h: Tensor, adapters: AdapterSet | None = None, weights: Weights | None = None) -> Tensor:
        """Logits as scored, float32: softcap_pos above zero, softcap_neg elsewhere."""
        z = self.raw_logits(h, adapters, weights).float()
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
