"""Low-rank adapters: one small set of weights per document, adapted together while the documents are scored.

All adapters of a batch live in one flat float32 tensor (every A first, then every B); what the network sees are
views of it. The cast to the compute type, the AdamW step, zeroing B and returning A to its start are then one
call each, whatever the number of layers.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pgolf.config import ModelConfig, TTTConfig
from pgolf.errors import PgolfError

# Adapted projection -> its name in a state dict, in the order in which A is drawn.
NAMES = {
    "q": "q_loras",
    "k": "k_loras",
    "v": "v_loras",
    "o": "o_loras",
    "mlp": "mlp_loras",
    "head": "lm_head_lora",
}

Place = tuple[str, int]  # (target, executed layer slot)
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


class Rows:
    """The adapters of documents `first` on, cast to the compute type, for one forward pass (an `AdapterSet`)."""

    def __init__(self, a: dict[Place, Tensor], b: dict[Place, Tensor], scale: float, first: int) -> None:
        self._a, self._b, self._scale, self._first = a, b, scale, first

    def delta(self, target: str, slot: int, x: Tensor) -> Tensor | None:
        """What the adapter adds: x [documents - first, T, in] -> [documents - first, T, out]; None if not adapted."""
        a = self._a.get((target, slot))
        if a is None:
            return None
        b = self._b[target, slot]
        if self._first:
            a, b = a[self._first :], b[self._first :]
        return torch.bmm(torch.bmm(x, a.mT) * self._scale, b.mT)


class Adapters:
    """Adapters of `documents` documents: y_b += alpha/rank * B_b A_b x_b, per target and executed layer slot.

    A is [documents, rank, in], B is [documents, out, rank]; B starts at zero, so a fresh adapter changes nothing.

    Args:
        model: shape of the network.
        slots: executed layers (17 with the record's recurrence); the head has a single slot, 0.
        config: targets, rank, alpha and the AdamW settings.
        documents: rows of the batch.
        initial_a: called once per target and slot with (documents, rank, in); returns A's first values.

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
    ) -> None:
        self._places: list[Place] = [
            (target, slot)
            for target in NAMES
            if target in config.target_set
            for slot in range(1 if target == "head" else slots)
        ]
        if not self._places:
            raise PgolfError("ttt.targets is empty: name at least one of q,k,v,o,mlp,head, or set ttt.enabled=false")
        a_shape = (documents, config.rank, model.model_dim)
        self._shapes = [a_shape] * len(self._places)
        self._shapes += [(documents, output_width(model, target), config.rank) for target, _ in self._places]
        self.documents = documents
        self._scale = config.alpha / config.rank
        self._a_size = math.prod(a_shape) * len(self._places)
        self._flat = torch.zeros(sum(map(math.prod, self._shapes)), device=device)
        for a in self._views(self._flat)[0].values():
            a.copy_(initial_a(a_shape))
        self._initial = self._flat[: self._a_size].clone()
        self._flat.requires_grad_()
        self._optimizer = torch.optim.AdamW(
            [self._flat],
            lr=config.lr * config.lr_mult,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def _views(self, flat: Tensor) -> tuple[dict[Place, Tensor], dict[Place, Tensor]]:
        """A flat tensor as (A by place, B by place)."""
        parts = flat.split([math.prod(shape) for shape in self._shapes])
        views = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        count = len(self._places)
        return dict(zip(self._places, views[:count], strict=True)), dict(zip(self._places, views[count:], strict=True))

    def rows(self, first: int = 0, dtype: torch.dtype = torch.float32) -> Rows:
        """What a forward pass over documents `first` on takes; a new one after each step."""
        return Rows(*self._views(self._flat.to(dtype)), self._scale, first)

    def step(self) -> None:
        """One AdamW step on all documents at once, then forget the gradients.

        A document that the forward pass left out, or whose loss was not counted, has zero gradient; its weights
        still decay, as in the record.
        """
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def start_batch(self) -> None:
        """Zero B and the optimizer's state for new documents; A keeps what it has learnt."""
        with torch.no_grad():
            self._flat[self._a_size :].zero_()
        self._optimizer.state.clear()

    def reset_a(self) -> None:
        """Return A to its first values (after the network itself has moved)."""
        with torch.no_grad():
            self._flat[: self._a_size].copy_(self._initial)

    def named(self, flat: Tensor | None = None) -> dict[str, Tensor]:
        """`k_loras.0.A`, `k_loras.0.B`, ..., `lm_head_lora.B`: views of the weights (or of `flat`, laid out alike)."""
        a, b = self._views(self._flat.detach() if flat is None else flat)
        names: dict[str, Tensor] = {}
        for target, slot in self._places:
            stem = NAMES[target] if target == "head" else f"{NAMES[target]}.{slot}"
            names |= {f"{stem}.A": a[target, slot], f"{stem}.B": b[target, slot]}
        return names

    def named_grads(self) -> dict[str, Tensor]:
        """Gradients by the same names; zero before a backward pass."""
        grad = self._flat.grad
        return self.named(torch.zeros_like(self._flat) if grad is None else grad)

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
