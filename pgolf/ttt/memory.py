"""Keys and values of earlier tokens of a batch's documents: what streaming keeps instead of computing it again."""

from typing import Any

import torch
from torch import Tensor

from pgolf.config import ModelConfig
from pgolf.ops.attention import cached_attention


class _Append(torch.autograd.Function):
    """Entries [B, capacity, Hk, d] with `new` [B, T, Hk, d] written to the places `index` [T], in place.

    Not marked as changed: the entries are no part of what autograd follows, else each step would hang on the last.
    """

    @staticmethod
    def forward(ctx: Any, new: Tensor, entries: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        entries.index_copy_(1, index, new)
        # An alias with a version of its own: the slots share one tensor, and what the next slot writes to it would make
        # autograd believe that this slot's entries, which attention saves, were overwritten.
        return entries.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.index_select(1, index), None, None


class Recent:
    """A memory as one forward pass of `length` tokens a document from place `start` on takes it."""

    def __init__(self, entries: Tensor, start: Tensor, origin: Tensor, length: int) -> None:
        """entries [2, slots, B, capacity, Hk, d]; start, origin: int64 [], read on the device."""
        steps = torch.arange(length, device=start.device)
        self._entries = entries
        self._positions = (start + steps).float()
        self._index = start - origin + steps
        self._earlier = (start - origin).int()
        self._used = (self._earlier + length).repeat(entries.shape[2])

    def positions(self, length: int) -> Tensor:
        """As `layers.Memory`; `length` is the one given at first."""
        return self._positions

    def attend(self, slot: int, q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None = None) -> Tensor:
        """As `layers.Memory`. Only k and v of this pass have gradients."""
        keys, values = (
            _Append.apply(new, entries[slot], self._index) for new, entries in zip((k, v), self._entries, strict=True)
        )
        return cached_attention(q, keys, values, self._used if ends is None else self._earlier + ends)


class Memory:
    """Room for `capacity` tokens of `documents` documents, cut up anew when documents finish or outgrow their share."""

    def __init__(
        self, config: ModelConfig, slots: int, documents: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2, slots, documents * capacity, config.num_kv_heads, config.head_dim)
        self._room = torch.zeros(shape, dtype=dtype, device=device)  # what attention may read must be finite
        self._layout: tuple[int, int, int] | None = None  # rows, capacity, origin

    def forget(self) -> None:
        """Start with other documents."""
        self._layout = None

    def arrange(self, rows: int, capacity: int, origin: int, start: int) -> None:
        """Give the last `rows` documents room for `capacity` tokens from place `origin` on, keeping those to `start`.

        Copies only when the layout changes. All places are counted in tokens from a document's start. Rows may come
        back, of finished documents: nobody asks what they hold.
        """
        if self._layout is not None and self._layout != (rows, capacity, origin):
            old_rows, old_capacity, old_origin = self._layout
            shared = min(rows, old_rows)
            kept = self._entries(old_rows, old_capacity)[:, :, -shared:, origin - old_origin : start - old_origin]
            self._entries(rows, capacity)[:, :, -shared:, : start - origin] = kept.clone()  # they may overlap
        self._layout = (rows, capacity, origin)

    def recent(self, rows: int, capacity: int, start: Tensor, origin: Tensor, length: int) -> Recent:
        """What a forward pass over the last `rows` documents takes; arguments as in `arrange` and `Recent`."""
        return Recent(self._entries(rows, capacity), start, origin, length)

    def _entries(self, rows: int, capacity: int) -> Tensor:
        """[2, slots, rows, capacity, Hk, d], a view."""
        return self._room[:, :, : rows * capacity].unflatten(2, (rows, capacity))
