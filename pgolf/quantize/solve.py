"""A trained model's weights -> the small integers and fp16 numbers that the artifact stores (recipe section 4)."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf.config import QuantizeConfig
from pgolf.errors import PgolfError
from pgolf.quantize import allocate, awq, gates, gptq, lqer, trellis
from pgolf.quantize.allocate import clip_and_bits
from pgolf.quantize.budget import Search, fill
from pgolf.quantize.gptq import largest
from pgolf.quantize.sensitivity import Sensitivity

GATE_SUFFIX = ".attn_gate_w"
USUAL_SOLVES = 3  # of a whole model until its size fits; progress is reckoned by it
CLIPS = ("mlp_clip", "attn_clip", "matrix_clip", "embed_clip")
# log2 of the factors on them that are tried. Below, a range cuts off so many weights that finer steps take fewer bytes
# again; above, nothing is left.
SCALES = (-1.0, 8.0)

Progress = Callable[[int, int, str], None]  # (matrices done, matrices in all, name of the one just done)


def quantize_state(
    matrices: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    act_rms: Mapping[str, Tensor],
    config: QuantizeConfig,
    progress: Progress | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Quantize a whole model as the record does (`quantize.mode=record`).

    Args:
        matrices: the weights, unbanked (`pgolf.banks.unbank`), on any device: the solves run where they are.
        hessians: [in, in] for every matrix of more than 65,536 entries.
        act_rms: [in], likewise; read only while `config.awq_groups` is positive.
        config: bits, clips, protected groups and the residual correction.
        progress: called after each solved matrix.

    Returns:
        (state, meta). `meta[NAME]` says in words how NAME is stored; `state` holds, as NumPy arrays,
        NAME.q int8 [rows, cols] and NAME.scale fp16 [rows] for a solved matrix; with protected groups also
        NAME.awqg_start int16 [groups], NAME.awqg_size int16 [] and NAME.awqg_s_hi fp16 [rows]; with a correction
        NAME.lqA_a, lqAs_a, lqB_a, lqBs_a (asymmetric) or NAME.lqA, lqAs, lqB, lqBs (symmetric: integers int8, scales
        fp16); NAME.gq int8 and NAME.gs fp16 for attention gates; NAME itself, fp16, for everything else.

    Raises:
        PgolfError: naming a weight that is not finite (or not in fp16), a matrix without a Hessian or one of the
            wrong shape, or a Hessian that cannot be inverted.
    """
    chosen = _chosen(matrices, config)
    _check_statistics(chosen, hessians, "Hessian", ndim=2)
    if config.awq_groups > 0:
        _check_statistics(chosen, act_rms, "input RMS", ndim=1)

    protected = awq.salient_groups(chosen, act_rms, config.awq_groups, config.awq_group_size)
    solved: dict[str, gptq.GptqResult] = {}
    norms: list[Tensor] = []
    for name, result in _solve(chosen, hessians, protected, config):
        solved[name] = result
        residual = chosen[name].float() - result.dequantize(protected.get(name, ()))
        norms.append(torch.linalg.matrix_norm(residual))
        if progress is not None:
            progress(len(solved), len(chosen), name)
    for name, result in solved.items():  # after the loop: reading a number waits for the device
        _check_fits(name, result.scale)
    residual_norm = dict(zip(solved, [norm.item() for norm in norms], strict=True))
    top = config.lqer_top if config.lqer_rank > 0 else 0
    corrected = set(sorted(chosen, key=lambda name: -residual_norm[name])[:top])

    state: dict[str, np.ndarray] = {}
    meta: dict[str, str] = {}
    for name, weight in matrices.items():
        arrays: dict[str, Tensor]
        if name in solved:
            groups = protected.get(name, ())
            arrays, meta[name] = _pack(solved[name], groups, clip_and_bits(name, config)[1], config)
            if name in corrected:
                residual = weight.float() - solved[name].dequantize(groups)
                correction, label = _correction(residual, config)
                arrays |= correction
                meta[name] += label
        else:
            arrays, meta[name] = _small(name, weight)
        state |= _arrays(name, arrays)
    return state, meta


class Fitted(NamedTuple):
    """A model that fills a budget, and how it came out."""

    state: dict[str, np.ndarray]
    packed: bytes  # the state as an artifact
    report: dict[str, Any]  # JSON: outcome, tries (octaves, bytes); of a trellis, bits an entry and nats lost by matrix


def quantize_scaled(
    matrices: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    act_rms: Mapping[str, Tensor],
    config: QuantizeConfig,
    budget: int,
    pack: Callable[[dict[str, np.ndarray]], bytes],
    progress: Progress | None = None,
) -> Fitted:
    """`quantize_state` with one factor on all clips, as small as `budget` allows.

    Arguments as in `quantize_trellis`; errors as in `quantize_state`, and when the coarsest steps exceed the budget.
    """
    chosen = _chosen(matrices, config)

    def bits(octaves: float) -> float:
        total = 0.0
        for name, weight in chosen.items():
            clip, width = clip_and_bits(name, config)
            deviation = torch.tensor(largest(width) / (clip * 2.0**octaves), dtype=torch.float64)  # in steps
            total += weight.numel() * float(allocate.gaussian_bits(deviation.square()))
        return total / 8

    search = Search(bits, 0, SCALES, budget)

    def solve(octaves: float) -> dict[str, np.ndarray]:
        clips = {name: getattr(config, name) * 2.0**octaves for name in CLIPS}
        settings = dataclasses.replace(config, **clips)
        return quantize_state(matrices, hessians, act_rms, settings, _part_of(search, progress))[0]

    state, packed = fill(search, solve, pack)
    return Fitted(state, packed, search.report())


def quantize_trellis(
    matrices: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    act_rms: Mapping[str, Tensor],
    sensitivity: Sensitivity | None,
    config: QuantizeConfig,
    budget: int,
    pack: Callable[[dict[str, np.ndarray]], bytes],
    progress: Progress | None = None,
    room: int = 0,
) -> Fitted:
    """Quantize a whole model in trellis form, its steps as fine as `budget` allows (`quantize.mode=trellis`).

    Args:
        matrices, hessians, act_rms: as in `quantize_state`, the input RMS for every chosen matrix.
        sensitivity: what errors cost (`sensitivity.collect`); None: steps go with a row's deviation, as the record's.
        config: states, rate, steps by row and column.
        budget: bytes that the artifact may have, code included.
        pack: the bytes of a state's artifact. The state returned is the largest that was found to fit.
        progress: called after each solve of the whole model, as a part of those thought necessary.
        room: bytes of the budget to leave free.

    Returns:
        The state holds NAME.q int8 [rows, cols], NAME.scale fp16 [rows] and, with `config.column_steps`, NAME.step int8
        [cols] for a solved matrix; everything else as in `quantize_state`.

    Raises:
        PgolfError: as `quantize_state`, and when the coarsest steps still exceed the budget.
    """
    chosen = _chosen(matrices, config)
    _check_statistics(chosen, hessians, "Hessian", ndim=2)
    _check_statistics(chosen, act_rms, "input RMS", ndim=1)
    if sensitivity is not None:
        _check_statistics(chosen, sensitivity.outputs, "sensitivity", ndim=1, side=0)
    plans = allocate.plan(chosen, hessians, act_rms, sensitivity, config)
    small: dict[str, np.ndarray] = {}
    for name, weight in matrices.items():
        if name not in chosen:
            small |= _arrays(name, _small(name, weight)[0])
    fixed = sum(array.nbytes for array in small.values())
    search = Search(
        lambda octaves: sum(one.bits(octaves) for one in plans.values()) / 8,
        fixed,
        allocate.bounds(plans),
        budget,
        room,
    )

    def solve(octaves: float) -> dict[str, np.ndarray]:
        problems = {name: trellis.Problem(one.weight, one.factor, one.steps(octaves)) for name, one in plans.items()}
        solved = trellis.solve_all(
            problems, states=config.states, rate=config.rate, block=config.block, column_steps=config.column_steps
        )
        state = dict(small)
        for name, result in solved.items():
            parts = {".q": result.q, ".scale": result.scale, ".step": result.step}
            state |= _arrays(name, {suffix: part for suffix, part in parts.items() if part is not None})
        if (show := _part_of(search, progress)) is not None:
            show(len(plans), len(plans), "all matrices")
        return {name: state[name] for name in sorted(state)}

    state, packed = fill(search, solve, pack)
    matrix_reports = {name: _account(one, name, state) for name, one in plans.items()}
    return Fitted(state, packed, search.report() | {"matrices": matrix_reports})


def _part_of(search: Search, progress: Progress | None) -> Progress | None:
    """The progress of the solve that comes next, as a part of all those that a search usually takes."""
    if progress is None:
        return None
    solves = len(search.tries)

    def show(done: int, total: int, name: str) -> None:
        progress(solves * total + done, max(solves + 1, USUAL_SOLVES) * total, f"solve {solves + 1}: {name}")

    return show


def _account(one: allocate.Plan, name: str, state: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What a solved matrix takes and what it loses."""
    q, scale = (torch.from_numpy(state[f"{name}.{part}"]) for part in ("q", "scale"))
    step = state.get(f"{name}.step")
    result = trellis.TrellisResult(q, scale, None if step is None else torch.from_numpy(step))
    entries = result.q.numel()
    nats = one.cost(one.weight - trellis.dequantize(result).to(one.weight.device))
    return {"entries": entries, "bits": trellis.estimate_bits(result.q) / entries, "nats": nats}


def _chosen(matrices: Mapping[str, Tensor], config: QuantizeConfig) -> dict[str, Tensor]:
    """The matrices to solve, after checking that all weights are finite."""
    for name, weight in matrices.items():
        if not torch.isfinite(weight).all():
            raise PgolfError(f"{name} holds infinite or undefined weights; training diverged, quantize an earlier one")
    return {name: w for name, w in matrices.items() if w.ndim == 2 and w.numel() > config.passthrough}


def _small(name: str, weight: Tensor) -> tuple[dict[str, Tensor], str]:
    """A weight that is not solved as {suffix: tensor}, and its description."""
    if name.endswith(GATE_SUFFIX):
        q, scale = gates.quantize(weight)
        return {".gq": q, ".gs": scale}, "gate_int8_row"
    return {"": weight.half()}, "passthrough (float16)"


def _arrays(name: str, parts: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    for value in parts.values():
        _check_fits(name, value)
    return {name + suffix: value.cpu().numpy() for suffix, value in parts.items()}


def _check_statistics(
    chosen: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str, ndim: int, side: int = 1
) -> None:
    for name, weight in chosen.items():
        if name not in found:
            raise PgolfError(f"no {what} for {name}: calibration did not reach it; quantize needs one for every matrix")
        expected, got = [weight.shape[side]] * ndim, list(found[name].shape)
        if got != expected:
            raise PgolfError(f"the {what} of {name} must have shape {expected}, got {got}; calibrate the same model")


def _solve(
    chosen: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    protected: Mapping[str, gptq.Ranges],
    config: QuantizeConfig,
) -> Iterator[tuple[str, gptq.GptqResult]]:
    problems = {
        name: gptq.Problem(weight, hessians[name], *clip_and_bits(name, config), protected.get(name, ()))
        for name, weight in chosen.items()
    }
    try:
        yield from gptq.solve_all(problems, config.block, config.damping, config.awq_bits)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined, unused-ignore]
        raise PgolfError(f"{error}; raise quantize.damping or quantize.calibration_batches") from error


def _check_fits(name: str, value: Tensor) -> None:
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise PgolfError(f"{name} does not fit in fp16 (largest 65504): its weights are too large; training diverged")


def _pack(
    result: gptq.GptqResult, groups: gptq.Ranges, bits: int, config: QuantizeConfig
) -> tuple[dict[str, Tensor], str]:
    """A solved matrix as {suffix: tensor}, and its description."""
    arrays = {".q": result.q, ".scale": result.scale}
    label = f"gptq (int{bits})"
    if result.scale_hi is not None:
        arrays[".awqg_start"] = torch.tensor([start for start, _ in groups], dtype=torch.int16)
        arrays[".awqg_size"] = torch.tensor(config.awq_group_size, dtype=torch.int16)
        arrays[".awqg_s_hi"] = result.scale_hi
        label += f"+awqgrpint{config.awq_bits}"
    return arrays, label


def _correction(residual: Tensor, config: QuantizeConfig) -> tuple[dict[str, Tensor], str]:
    """The low-rank correction as {suffix: tensor}, and its description."""
    entries_of_b = min(config.lqer_rank, *residual.shape) * residual.shape[1]
    # Groups that do not tile B have no asymmetric form; the symmetric one needs no groups.
    if config.lqer_asymmetric and entries_of_b % config.lqer_group == 0:
        packed, tag, label = lqer.asymmetric(residual, config.lqer_rank, config.lqer_group), "_a", "+lqer_asym"
    else:
        packed, tag, label = lqer.symmetric(residual, config.lqer_rank), "", "+lqer"
    parts = zip((".lqA", ".lqAs", ".lqB", ".lqBs"), packed, strict=True)
    return {suffix + tag: tensor for suffix, tensor in parts}, label
