"""A trained model's weights -> the small integers and fp16 numbers that the artifact stores (recipe section 4)."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from pgolf.config import QuantizeConfig
from pgolf.errors import PgolfError
from pgolf.quantize import awq, gates, gptq, lqer

GATE_SUFFIX = ".attn_gate_w"

Progress = Callable[[int, int, str], None]  # (matrices done, matrices in all, name of the one just done)


def clip_and_bits(name: str, config: QuantizeConfig) -> tuple[float, int]:
    """The range (in standard deviations of a row) and integer width of the matrix `name`."""
    if name == "tok_emb.weight":
        return config.embed_clip, config.embed_bits
    if ".mlp." in name:
        return config.mlp_clip, config.matrix_bits
    if ".attn." in name:
        return config.attn_clip, config.matrix_bits
    return config.matrix_clip, config.matrix_bits


def quantize_state(
    matrices: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    act_rms: Mapping[str, Tensor],
    config: QuantizeConfig,
    progress: Progress | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Quantize a whole model.

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
    for name, weight in matrices.items():
        if not torch.isfinite(weight).all():
            raise PgolfError(f"{name} holds infinite or undefined weights; training diverged, quantize an earlier one")
    chosen = {name: w for name, w in matrices.items() if w.ndim == 2 and w.numel() > config.passthrough}
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
        elif name.endswith(GATE_SUFFIX):
            q, scale = gates.quantize(weight)
            arrays, meta[name] = {".gq": q, ".gs": scale}, "gate_int8_row"
        else:
            arrays, meta[name] = {"": weight.half()}, "passthrough (float16)"
        for suffix, value in arrays.items():
            _check_fits(name, value)
            state[name + suffix] = value.cpu().numpy()
    return state, meta


def _check_statistics(chosen: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str, ndim: int) -> None:
    for name, weight in chosen.items():
        if name not in found:
            raise PgolfError(f"no {what} for {name}: calibration did not reach it; quantize needs one for every matrix")
        expected, got = [weight.shape[1]] * ndim, list(found[name].shape)
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
