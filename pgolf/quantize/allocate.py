"""How fine a step each row of each matrix gets, and how coarse all of them must be to fill a budget of bytes.

Entropy-coded quantization with step s costs a distortion in proportion to s², and -log2(s) bits. So at the cheapest
distribution of bits every weight's share of the loss is the same: with F_r the sensitivity of a row
(`pgolf.quantize.sensitivity`) and d_c = 1 / U_cc² what an error in a column costs after GPTQ's feedback, steps go with
(F_r d_c)^-1/2. The rows' part is set here, the columns' in the solver; one factor on all of them is left, which the
budget decides (reverse water-filling: Cover and Thomas, Elements of Information Theory, 10.3.3).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.config import QuantizeConfig
from pgolf.errors import PgolfError
from pgolf.quantize import trellis
from pgolf.quantize.gptq import Factor, largest
from pgolf.quantize.sensitivity import Sensitivity

COARSEST = 16.0  # a step of so many times a row's largest weight stores the row as zeros, whatever its columns' factors


def clip_and_bits(name: str, config: QuantizeConfig) -> tuple[float, int]:
    """The record's range (in standard deviations of a row) and integer width of the matrix `name`."""
    if name == "tok_emb.weight":
        return config.embed_clip, config.embed_bits
    if ".mlp." in name:
        return config.mlp_clip, config.matrix_bits
    if ".attn." in name:
        return config.attn_clip, config.matrix_bits
    return config.matrix_clip, config.matrix_bits


def gaussian_bits(variance: Tensor) -> Tensor:
    """About how many bits a rounded Gaussian of this variance takes: the rule at high rate, bent so as to end at 0."""
    return 0.5 * torch.log2(1 + 2 * math.pi * math.e * variance)


class Plan(NamedTuple):
    """One matrix where it lies, and its row steps, up to the common factor, on the CPU."""

    weight: Tensor  # float32 [rows, cols]
    factor: Factor  # of `hessian`
    hessian: Tensor  # float32 [cols, cols]: the mean of x xᵀ over the inputs
    mean_square: Tensor  # float64 [rows]: of the weights
    sensitivity: Tensor  # float64 [rows]: a change E costs 1/2 Σ_r sensitivity_r (E H Eᵀ)_rr nats a token
    step: Tensor  # float64 [rows]
    finest: Tensor  # float64 [rows]: a smaller step could not hold the row's largest weight
    coarsest: Tensor  # float64 [rows]: a larger step changes nothing

    def steps(self, octaves: float) -> Tensor:
        """float64 [rows]: the row steps with the common factor 2^octaves."""
        return (self.step * 2.0**octaves).clamp_max(self.coarsest).clamp_min(self.finest)

    def bits(self, octaves: float) -> float:
        """About how many bits the levels will take."""
        steps = 2 * self.steps(octaves).clamp_min(1e-30)  # a scalar quantizer's for as many bits
        rate = gaussian_bits(self.mean_square / steps.square())
        return float(rate.sum()) * self.weight.shape[1]

    def cost(self, error: Tensor) -> float:
        """Nats a token that a change `error` [rows, cols] of the matrix costs, as far as the statistics can tell."""
        by_row = ((error @ self.hessian) * error).sum(dim=1)
        return float(0.5 * (self.sensitivity * by_row.double().cpu()).sum())


def plan(
    matrices: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    act_rms: Mapping[str, Tensor],
    sensitivity: Sensitivity | None,
    config: QuantizeConfig,
) -> dict[str, Plan]:
    """Row steps for every matrix [rows, cols], from the statistics of `hessian.collect` and `sensitivity.collect`.

    Without sensitivity a row's step is half the record's, c std / (2^b - 2), and every row counts alike. The
    embedding's row is also an input, where its error meets no Hessian but the identity: H gains the identity times the
    uses' mean ratio, and a row's sensitivity is the one that gets its trace right.

    Raises PgolfError naming a matrix whose damped Hessian is not positive definite.
    """
    factors: dict[int, Factor] = {}  # query, key and value of a layer share theirs
    result: dict[str, Plan] = {}
    for name, matrix in matrices.items():
        weight = matrix.detach().float()
        # H sums over the tokens of a batch; its diagonal's mean is known a token from the inputs' mean squares.
        trace = float(hessians[name].diagonal().double().sum())
        inputs_square = float(act_rms[name].double().square().sum())
        scale = inputs_square / trace if trace > 0 else 1.0
        hessian = hessians[name]
        rows = torch.ones(len(weight), dtype=torch.float64)
        if sensitivity is not None:
            rows = sensitivity.outputs[name].double().cpu()
        if sensitivity is not None and name == "tok_emb.weight":
            inputs, mean = sensitivity.inputs.double().cpu(), inputs_square / weight.shape[1]
            share = float(inputs.sum() / rows.sum().clamp_min(1e-30))
            hessian = hessian * scale + share * torch.eye(len(hessian), device=hessian.device)
            scale, rows = 1.0, (rows * mean + inputs) / max(mean + share, 1e-30)
        if id(hessian) not in factors:
            factors[id(hessian)] = trellis.factorize(hessian, config.damping)
        factor = factors[id(hessian)]
        if not factor.valid:
            raise PgolfError(
                f"the Hessian of {name} cannot be inverted; raise quantize.damping or quantize.calibration_batches"
            )
        if sensitivity is None:
            clip, bits = clip_and_bits(name, config)
            step = clip * weight.double().std(dim=1).cpu() / (2 * largest(bits))
        else:
            rows = rows.clamp_min(config.row_floor * float(rows.mean())).clamp_min(1e-30)
            column = _column_cost(factor, config.column_steps) * scale
            step = rows ** (-0.5 * config.row_power)
            step /= math.sqrt(max(column * float((rows * step.square()).mean()), 1e-30))
        peak = weight.abs().amax(dim=1).double().cpu()
        finest, coarsest = peak / trellis.LARGEST, COARSEST * peak
        mean_square = weight.double().square().mean(dim=1).cpu()
        result[name] = Plan(weight, factor, hessian * scale, mean_square, rows, step, finest, coarsest)
    return result


def _column_cost(factor: Factor, geometric: bool) -> float:
    """The mean over live columns of d_c: geometric where the columns' steps even it out, else arithmetic."""
    pivots = factor.upper.diagonal().double()[~factor.dead[factor.order]]
    if len(pivots) == 0:
        return 1.0
    costs = pivots.log() * -2
    return float(costs.mean().exp() if geometric else costs.exp().mean())


def bounds(plans: Mapping[str, Plan]) -> tuple[float, float]:
    """log2 of the common factors beyond which no row's step changes any more: (finest, coarsest)."""
    ratios = []
    for one in plans.values():
        held = (one.step > 0) & (one.coarsest > 0)
        step = one.step[held]
        ratios += [torch.log2(one.finest[held] / step), torch.log2(one.coarsest[held] / step)]
    flat = torch.cat(ratios) if ratios else torch.zeros(0)
    return (float(flat.min()), float(flat.max())) if len(flat) else (0.0, 0.0)
