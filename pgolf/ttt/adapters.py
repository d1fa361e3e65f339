"""Low-rank adapters: one small set of weights per document, adapted together while the documents are scored.

All adapters of a batch live in one flat float32 tensor (every A first, then every B), and so do the optimizer's state,
the gradients and, where the network computes in bfloat16, the copy that it reads. A step, zeroing B and returning A to
its start are then one call each, whatever the number of layers. Gradients go straight to their places in the flat
tensor (`_Tap`, `_Up`): autograd has nothing to gather, and nothing to add up, since that of an x is summed by the
product that adds to it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf.config import ModelConfig, TTTConfig
from pgolf.errors import PgolfError
from pgolf.layers import Add, at
from pgolf.ops.adamw import adamw

# Adapted projection -> its name in a state dict, in the order in which A is drawn.
NAMES = {
    "q": "q_loras",
    "k": "k_loras",
    "v": "v_loras",
    "o": "o_loras",
    "mlp": "mlp_loras",
    "head": "lm_head_lora",
}
# Adapted projection -> what it reads. Adapters that read the same have their A side by side: one product for all.
READS = {"q": "attention", "k": "attention", "v": "attention", "o": "attention", "mlp": "mlp", "head": "head"}

Place = tuple[str, int]  # (target, or what targets read; executed layer slot)
InitialA = Callable[[tuple[int, int, int]], Tensor]


def uniform_a(seed: int) -> InitialA:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), drawn on the CPU so that every device starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, int, int]) -> Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * shape[-1] ** -0.5

    return draw


def output_width(config: ModelConfig, target: str) -> int:
    """Width of what an adapter adds to; its input is always model_dim wide."""
    return {"k": config.kv_dim, "v": config.kv_dim, "head": config.vocab_size}.get(target, config.model_dim)


class _Tap(torch.autograd.Function):
    """x, for the network to go on with, and x A^T of adapters that read it, one part each.

    The gradient of A goes to `grad_a`, and the adapters' part of that of x is added in the memory of the network's:
    the product that alone read x made it for us (`layers.AdapterSet`), so nobody else sees it change.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, a: Tensor, tape: Tensor, grad_a: Tensor, parts: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, a)
        ctx.grad_a = grad_a
        same = x.detach()
        if not ctx.needs_input_grad[0]:  # nor does the network's product then compute one, whatever the tape asks
            ctx.mark_non_differentiable(same)
        return same, *torch.bmm(x, a.mT).chunk(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, a = ctx.saved_tensors
        grad = torch.cat(grads, dim=-1) if len(grads) > 1 else grads[0]
        torch.bmm(grad.mT, x, out=ctx.grad_a)
        return grad_x.baddbmm_(grad, a) if ctx.needs_input_grad[0] else None, None, None, None, None


class _Up(torch.autograd.Function):
    """Add scale * xa B^T to the columns of `out` from `first` on, in its memory; the gradient of B goes to `grad_b`.

    Not marked as changed, since autograd lets nobody change what another operator returns as a view. Whoever kept
    `out` for a backward pass still gets an error: the result counts changes together with it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, out: Tensor, xa: Tensor, b: Tensor, grad_b: Tensor, scale: float, first: int
    ) -> Tensor:
        ctx.save_for_backward(xa, b)
        ctx.grad_b, ctx.scale, ctx.first = grad_b, scale, first
        result = out.detach()
        result.narrow(-1, first, b.shape[1]).baddbmm_(xa, b.mT, alpha=scale)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        xa, b = ctx.saved_tensors
        part = grad.narrow(-1, ctx.first, b.shape[1])
        torch.baddbmm(ctx.grad_b, part.mT, xa, beta=0, alpha=ctx.scale, out=ctx.grad_b)
        return grad, torch.baddbmm(xa, part, b, beta=0, alpha=ctx.scale), None, None, None, None


class _Views(NamedTuple):
    """A flat tensor cut up: A by (what is read, slot) [documents, adapters * rank, in], B by (target, slot)."""

    a: dict[Place, Tensor]
    b: dict[Place, Tensor]


class Rows:
    """The adapters of documents `first` on as one forward pass takes them (an `AdapterSet`)."""

    def __init__(self, adapters: "Adapters", first: int) -> None:
        self._adapters, self._first = adapters, first
        self._weights, self._grads = adapters.views(adapters.seen), adapters.views(adapters.grad)

    def read(self, group: str, slot: int, x: Tensor) -> tuple[Tensor, Add]:
        """As `layers.AdapterSet`: x [documents - first, T, in], and what is added to is written to.

        Every group and slot is called for once a pass, and so is every target's addition.
        """
        projected: dict[str, Tensor] = {}  # x A^T [.., T, rank] of every target of the group
        if readers := self._adapters.readers[group]:
            a, grad_a = (views.a[group, slot][self._first :] for views in (self._weights, self._grads))
            x, *parts = _Tap.apply(x, a, self._adapters.tape, grad_a, len(readers))
            projected = dict(zip(readers, parts, strict=True))

        def add(targets: tuple[str, ...], out: Tensor, places: Tensor | None = None) -> Tensor:
            column = 0
            for target in targets:
                if target in projected:
                    xa = projected[target] if places is None else at(projected[target], places)
                    b, grad_b = (views.b[target, slot][self._first :] for views in (self._weights, self._grads))
                    out = _Up.apply(out, xa, b, grad_b, self._adapters.scale, column)
                column += self._adapters.widths[target]
            return out

        return x, add


class Adapters:
    """Adapters of `documents` documents: y_b += alpha/rank * B_b A_b x_b, per target and executed layer slot.

    A is [documents, rank, in], B is [documents, out, rank]; B starts at zero, so a fresh adapter changes nothing.

    Args:
        model: shape of the network.
        slots: executed layers (17 with the record's recurrence); the head has a single slot, 0.
        config: targets, rank, alpha and the AdamW settings.
        documents: rows of the batch.
        initial_a: called once per target and slot with (documents, rank, in); returns A's first values.
        dtype: the network's compute type, and that of the gradients; the weights themselves are float32.

    Raises PgolfError when `config.targets` is empty.
    """

    def __init__(
        self,
        model: ModelConfig,
        slots: int,
        config: TTTConfig,
        documents: int,
        initial_a: InitialA,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        targets = [target for target in NAMES if target in config.target_set]
        if not targets:
            raise PgolfError("ttt.targets is empty: name at least one of q,k,v,o,mlp,head, or set ttt.enabled=false")
        self.documents, self.scale = documents, config.alpha / config.rank
        self.widths = {target: output_width(model, target) for target in NAMES}
        self.readers = {group: [t for t in targets if READS[t] == group] for group in READS.values()}
        self._config = config
        self._places = [(target, slot) for target in targets for slot in range(1 if target == "head" else slots)]
        reads = dict.fromkeys((READS[target], slot) for target, slot in self._places)
        self._a_shapes = {
            place: (documents, len(self.readers[place[0]]) * config.rank, model.model_dim) for place in reads
        }
        self._b_shapes = {place: (documents, self.widths[place[0]], config.rank) for place in self._places}
        self._a_size = sum(map(math.prod, self._a_shapes.values()))
        size = self._a_size + sum(map(math.prod, self._b_shapes.values()))

        self._weight = torch.zeros(size, device=device)
        for place in self._places:
            self._a_of(self._weight, *place).copy_(initial_a((documents, config.rank, model.model_dim)))
        self._initial = self._weight[: self._a_size].clone()
        self._copy = None if dtype == torch.float32 else self._weight.to(dtype)
        self.seen = self._weight if self._copy is None else self._copy  # what the network reads
        self.grad = torch.zeros_like(self.seen)
        self._mean = torch.zeros_like(self._weight) if config.beta1 else None
        self._square = torch.zeros_like(self._weight)
        self._count = torch.zeros((), dtype=torch.int64, device=device)  # steps since `start_batch`
        # Needs a gradient, so that everything the adapters add to is recorded for the backward; never gets one.
        self.tape = torch.zeros((), device=device, requires_grad=True)

    def views(self, flat: Tensor) -> _Views:
        """A flat tensor by its places."""
        shapes = (*self._a_shapes.values(), *self._b_shapes.values())
        parts = flat.split([math.prod(shape) for shape in shapes])
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        count = len(self._a_shapes)
        return _Views(
            dict(zip(self._a_shapes, views[:count], strict=True)), dict(zip(self._b_shapes, views[count:], strict=True))
        )

    def _a_of(self, flat: Tensor, target: str, slot: int) -> Tensor:
        """A [documents, rank, in] of one target, a view."""
        group, rank = READS[target], self._config.rank
        return self.views(flat).a[group, slot].narrow(1, self.readers[group].index(target) * rank, rank)

    def rows(self, first: int = 0) -> Rows:
        """What a forward pass over documents `first` on takes; a new one for each pass.

        The backward pass overwrites the gradients of these documents and leaves those of the others alone.
        """
        return Rows(self, first)

    def step(self, factor: float = 1.0) -> None:
        """One AdamW step on all documents at once, with `factor` times the learning rate.

        A document whose gradient is zero, since it is finished or its loss was not counted, still decays, as in the
        record.
        """
        self._count.add_(1)
        adamw(
            self._weight,
            self._mean,
            self._square,
            self.grad,
            self._copy,
            self._count,
            lr=self._config.lr * self._config.lr_mult * factor,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            eps=self._config.eps,
            weight_decay=self._config.weight_decay,
        )

    def zero_grad(self) -> None:
        """Forget all gradients: for documents that later forward passes leave out."""
        self.grad.zero_()

    def start_batch(self) -> None:
        """Zero B, gradients and the optimizer's state for new documents; A keeps what it has learnt."""
        self._weight[self._a_size :].zero_()
        for state in (self.grad, self._mean, self._square, self._count):
            if state is not None:
                state.zero_()
        self._refresh()

    def reset_a(self) -> None:
        """Return A to its first values (after the network itself has moved)."""
        self._weight[: self._a_size].copy_(self._initial)
        self._refresh()

    @contextlib.contextmanager
    def fresh_a(self, initial_a: InitialA, documents: int) -> Iterator[None]:
        """Inside the block the last `documents` documents have an A of their own; afterwards all have what they had."""
        learnt = self._weight[: self._a_size].clone()
        for place in self._places:
            a = self._a_of(self._weight, *place)[-documents:]
            a.copy_(initial_a((documents, self._config.rank, a.shape[-1])))
        self._refresh()
        try:
            yield
        finally:
            self._weight[: self._a_size].copy_(learnt)
            self._refresh()

    def _refresh(self) -> None:
        if self._copy is not None:
            self._copy.copy_(self._weight)

    def named(self, flat: Tensor | None = None) -> dict[str, Tensor]:
        """`k_loras.0.A`, `k_loras.0.B`, ..., `lm_head_lora.B`: views of the weights (or of `flat`, laid out alike)."""
        flat = self._weight if flat is None else flat
        b = self.views(flat).b
        names: dict[str, Tensor] = {}
        for target, slot in self._places:
            stem = NAMES[target] if target == "head" else f"{NAMES[target]}.{slot}"
            names |= {f"{stem}.A": self._a_of(flat, target, slot), f"{stem}.B": b[target, slot]}
        return names

    def named_grads(self) -> dict[str, Tensor]:
        """Gradients by the same names: of the last backward pass, zero before one."""
        return self.named(self.grad)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Copy tensors in by name; PgolfError when a name is missing, unknown, or of another shape."""
        mine = self.named()
        if odd := sorted(mine.keys() ^ values.keys()):
            raise PgolfError(f"adapter {odd[0]} is in only one of the file and the configuration; check ttt.targets")
        for name, tensor in mine.items():
            if values[name].shape != tensor.shape:
                raise PgolfError(
                    f"adapter {name} must have shape {tuple(tensor.shape)}, got {tuple(values[name].shape)}"
                )
            tensor.copy_(values[name])
        self._refresh()
