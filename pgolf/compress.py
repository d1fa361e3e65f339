"""A trained model to an artifact: calibrate, solve, tune, pack (recipe section 4)."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf import artifact, banks, console, loading, parallel
from pgolf.config import Config, QuantizeConfig, to_dict
from pgolf.data import shards
from pgolf.data.loader import Batch, Loader
from pgolf.model import GPT
from pgolf.quantize import sensitivity, tune
from pgolf.quantize.hessian import Statistics, collect
from pgolf.quantize.solve import GATE_SUFFIX, Fitted, quantize_scaled, quantize_state, quantize_trellis
from pgolf.schedule import parse_contexts
from pgolf.source import scoring_source

LARGEST_SLICE = 49_152  # tokens whose gradients are taken together: memory goes with them
TUNING_ROOM = 2000  # bytes of a budget left free before tuning, whose numbers may take a few more than those before
TUNING_TRIES = 3  # solves with more and more room, until what was tuned fits; then the artifact stays as solved


def calibration_batches(settings: QuantizeConfig) -> int:
    """Micro-batches that each rank calibrates on: as set, or the record's 16; mode trellis sees at least 32 in all."""
    if settings.calibration_batches:
        return settings.calibration_batches
    ranks = parallel.world_size() if settings.calibration == "all" else 1
    return max(16, 32 // ranks) if settings.mode == "trellis" else 16


class _Calibration(NamedTuple):
    """What training data say about the averaged weights."""

    statistics: Statistics  # Hessians and input RMS
    costs: sensitivity.Sensitivity | None  # mode trellis: how much the loss minds errors
    batches: list[Batch]  # the batches after those, to tune on


def _slices(batches: list[Batch], tokens: int) -> Iterator[sensitivity.Slice]:
    """About `tokens` tokens of the batches (all, if there are fewer), spread evenly, in few and therefore large slices:
    a backward pass launches thousands of kernels whatever its size."""
    whole = batches[0].inputs.shape[1]
    count = min(len(batches), -(-tokens // min(whole, LARGEST_SLICE)))
    for place in range(count):
        batch = batches[place * len(batches) // count]
        size = min(whole, LARGEST_SLICE, -(-tokens // count))
        yield sensitivity.take(batch.inputs, batch.targets, batch.cu_seqlens, batch.max_seqlen, size)


def _calibrate(model: GPT, data: Path, config: Config, device: torch.device) -> _Calibration:
    """Run the model over the first training batches."""
    settings = config.quantize
    trellis = settings.mode == "trellis"
    context = parse_contexts(config.train.contexts)[-1][0]
    with Loader(
        shards.train_files(data),
        rank=parallel.rank(),
        world_size=parallel.world_size(),
        step_tokens=config.train.micro_batch * parallel.world_size(),
        micro_batch=config.train.micro_batch,
        vocab_size=config.model.vocab_size,
    ) as loader:
        fresh = [loader.next_batch(context) for _ in range(calibration_batches(settings))]
        later = [loader.next_batch(context) for _ in range(settings.tune_steps if trellis else 0)]
    everyone = settings.calibration == "all"
    batches = ((batch.inputs, batch.cu_seqlens, batch.max_seqlen) for batch in fresh)
    statistics = collect(model, batches, device, model.dtype, all_reduce=everyone)
    costs = None
    if trellis and settings.sensitivity_tokens:
        slices = _slices(fresh, settings.sensitivity_tokens)
        costs = sensitivity.collect(model, slices, device, model.dtype, all_reduce=everyone)
    return _Calibration(statistics, costs, later)


class _Packer:
    """Packs states of one model, and counts the seconds that it takes."""

    def __init__(self, model: GPT, config: Config, tokenizer_sha256: str) -> None:
        self.seconds = 0.0
        self._source = scoring_source()
        self._metadata = {
            "model": to_dict(config.model),
            "looping": model.looping,
            "eval": to_dict(config.eval),
            "ttt": to_dict(config.ttt),
            "seed": config.seed,
            "tokenizer_sha256": tokenizer_sha256,
        }

    def __call__(self, state: dict[str, np.ndarray], levels: bytes | None = None) -> bytes:
        begun = time.perf_counter()
        packed = artifact.pack(state, self._metadata, self._source, levels=levels)
        self.seconds += time.perf_counter() - begun
        return packed


def _solve(
    matrices: dict[str, Tensor], config: Config, calibration: _Calibration, budget: int, room: int, pack: _Packer
) -> Fitted:
    """Quantize weights within `budget` bytes (0: of any size), `room` of them left free; shows progress."""
    settings = config.quantize
    hessians, act_rms = calibration.statistics
    with console.Bar("quantize", every=30.0) as bar:

        def show(done: int, total: int, name: str) -> None:
            bar.update(done / total, name)

        if settings.mode == "trellis":
            return quantize_trellis(matrices, hessians, act_rms, calibration.costs, settings, budget, pack, show, room)
        if budget:
            return quantize_scaled(matrices, hessians, act_rms, settings, budget, pack, show)
        state, _ = quantize_state(matrices, hessians, act_rms, settings, show)
        return Fitted(state, pack(state), {})


def _tune(model: GPT, config: Config, fitted: Fitted | None, batches: list[Batch], pack: _Packer) -> Fitted | None:
    """Train what the artifact keeps in floating point; rank 0 brings the fitted state and gets the tuned one."""
    if fitted is not None:
        model.load_state_dict(loading.model_from_state(fitted.state, config.model).state_dict())
    parallel.broadcast_([parameter.detach() for parameter in model.parameters()])
    small = [name for name, _ in model.named_parameters() if name not in banks.BANKS and name != tune.EMBEDDING]
    small = [name for name in small if not name.endswith(GATE_SUFFIX)]  # integers too
    tuned = tune.tune(model, batches, small, config.quantize.tune_steps, config.quantize.tune_lr)
    if fitted is None:
        return None
    state = tune.apply(fitted.state, tuned)
    return Fitted(state, pack(state, levels=fitted.packed), fitted.report | {"tuning_losses": tuned.losses})


class Compressed(NamedTuple):
    """What `compress` made."""

    fitted: Fitted | None  # of rank 0
    budget: int  # bytes; 0: none
    seconds: dict[str, float]  # by stage: calibrate, solve, tune, pack


class _Clock:
    """Seconds by stage; time spent packing counts as that, wherever it falls."""

    def __init__(self, pack: _Packer) -> None:
        self.seconds = {"calibrate": 0.0, "solve": 0.0, "tune": 0.0}
        self._pack = pack
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What passed since the last lap belongs to `stage`."""
        now = time.perf_counter() - self._pack.seconds
        self.seconds[stage] += now - self._last
        self._last = now


def compress(model: GPT, config: Config, data: Path, device: torch.device, tokenizer_sha256: str) -> Compressed:
    """An artifact of `model`, calibrated and tuned on the training shards in `data`. **Moves the weights of `model`.**

    Every rank calls it. With a budget the artifact never exceeds it, whatever the weights; PgolfError when it cannot.
    """
    settings = config.quantize
    budget = settings.budget or (artifact.CAP if settings.mode == "trellis" else 0)
    pack = _Packer(model, config, tokenizer_sha256)
    clock = _Clock(pack)
    calibration = _calibrate(model, data, config, device)
    weights = {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}
    matrices = banks.unbank(weights, config.model.num_layers)
    clock.lap("calibrate")
    tuning = settings.mode == "trellis" and settings.tune_steps > 0
    room = min(TUNING_ROOM, budget // 8000) if tuning else 0
    fitted: Fitted | None = None
    for _ in range(TUNING_TRIES if tuning else 1):
        if parallel.rank() == 0:
            fitted = _solve(matrices, config, calibration, budget, room, pack)
        clock.lap("solve")
        if tuning:
            tuned = _tune(model, config, fitted, calibration.batches, pack)
            clock.lap("tune")
            left = parallel.smallest(math.inf if tuned is None else budget - len(tuned.packed))
            if left >= 0:
                fitted = tuned
                break
            room += TUNING_ROOM // 8 - int(left)
    return Compressed(fitted, budget, clock.seconds | {"pack": pack.seconds})
