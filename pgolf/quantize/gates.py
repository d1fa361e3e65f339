"""Attention gates: too small for GPTQ, too many for fp16; int8 with a scale per row (recipe section 4)."""

from torch import Tensor

from pgolf.quantize.gptq import half_scale, largest


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, cols] -> (int8 [rows, cols] within ±127, fp16 scale [rows]); the row's largest entry becomes ±127."""
    limit = largest(8)
    scale, divisor = half_scale(weight.float().abs().amax(dim=1) / limit)
    q = (weight.float() / divisor[:, None]).round().clamp(-limit, limit)
    return q.char(), scale
