"""Post-training quantization: calibrate (hessian), round (gptq, awq, gates), correct (lqer); all of it (solve)."""

from pgolf.quantize.hessian import HessianCollector, collect
from pgolf.quantize.solve import quantize_state

__all__ = ["HessianCollector", "collect", "quantize_state"]
