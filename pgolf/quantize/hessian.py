"""Calibration: the Hessian XᵀX and the input RMS of every matrix, from a few batches of training data.

Source: recipe section 4; a layer's squared output error is a quadratic form in XᵀX (GPTQ, arXiv:2210.17323).
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from pgolf import parallel
from pgolf.errors import PgolfError

Statistics = tuple[dict[str, Tensor], dict[str, Tensor]]  # (Hessians [in, in], input RMS [in]), by matrix name


class Observed(Protocol):
    """What `collect` needs of a model: its compute type, a hook on its matrices, a forward that fires it."""

    dtype: torch.dtype
    observer: Callable[[tuple[str, ...], Tensor, tuple[Tensor, ...]], None] | None

    def hidden(self, ids: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, /) -> Tensor: ...


class HessianCollector:
    """Sums XᵀX over calls. Matrices that read the same input (query, key, value) share one sum."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._rows: dict[tuple[str, ...], int] = {}

    def add(self, names: tuple[str, ...], x: Tensor, outputs: tuple[Tensor, ...] = ()) -> None:
        """Add the inputs `x` [..., in] of the matrices `names`; float32 sums on the device of `x`.

        A recurrent layer calls this once a pass, and every pass counts. Token ids, which an embedding reads, and the
        outputs do not.
        """
        if not x.is_floating_point():
            return
        x = x.detach().reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # autocast would square in bfloat16
            if x.is_cuda and x.dtype == torch.bfloat16:  # exact products, float32 sums, on tensor cores
                square = torch.mm(x.T, x, out_dtype=torch.float32)
            else:
                square = x.float().T @ x.float()
        if names in self._sums:
            self._sums[names] += square
            self._rows[names] += x.shape[0]
        else:
            self._sums[names] = square
            self._rows[names] = x.shape[0]

    def finish(self, batches: int, all_reduce: bool = False) -> Statistics:
        """(H = XᵀX / batches, sqrt(Σ x² / rows)), float32, each by matrix name; sharing names share tensors.

        With `all_reduce`, H and the mean squares are averaged over the ranks, which must all have observed the same
        matrices in the same order. Call once: the sums are scaled where they lie. Raises PgolfError without batches.
        """
        if batches <= 0:
            raise PgolfError("calibration saw no batch; give quantize more training data")
        hessians: dict[str, Tensor] = {}
        act_rms: dict[str, Tensor] = {}
        for names, total in self._sums.items():
            mean_square = total.diagonal() / self._rows[names]  # the diagonal of XᵀX is Σ x² by column
            total /= batches
            if all_reduce:
                parallel.mean_([total, mean_square])
            rms = mean_square.sqrt()
            for name in names:
                hessians[name], act_rms[name] = total, rms
        return hessians, act_rms


def collect(
    model: Observed,
    batches: Iterable[tuple[Tensor, Tensor | None, int | None]],
    device: torch.device | str,
    dtype: torch.dtype,
    all_reduce: bool = False,
) -> Statistics:
    """Run `model.hidden` over (inputs, cu_seqlens, max_seqlen) batches and gather every matrix's statistics.

    The model computes in `dtype`; its own type and its lack of an observer are restored whatever happens.
    `all_reduce` as in `HessianCollector.finish`. Raises PgolfError when `batches` is empty.
    """
    collector = HessianCollector()
    count = 0
    own_dtype = model.dtype
    model.observer, model.dtype = collector.add, dtype
    try:
        # no_grad, not inference_mode: the sums outlive this block and are scaled in place after it
        with torch.no_grad():
            for inputs, cu_seqlens, max_seqlen in batches:
                segments = None if cu_seqlens is None else cu_seqlens.to(device)
                model.hidden(inputs.to(device), segments, max_seqlen)
                count += 1
    finally:
        model.observer, model.dtype = None, own_dtype
    return collector.finish(count, all_reduce)
