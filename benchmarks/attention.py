"""FlashAttention-3's gradients where query heads share key heads: its own backward beside one call a query head.

    python benchmarks/attention.py

On made-up packed documents of the recipe's micro-batch, 8 query and 4 key heads of 64, bfloat16; CUDA events around 20
calls, gradients alone. The last column is FA3's own time over ours. Needs an sm_90 GPU and FlashAttention-3.
"""

import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pgolf.ops import _flash3, attention

TOKENS, CALLS = 98_304, 20


def boundaries(context: int) -> Tensor:
    """Segments of at most `context` tokens of documents of about 660 (log-normal), int32 [S + 1]."""
    random, edges = np.random.default_rng(0), [0]
    while edges[-1] < TOKENS:
        left = max(20, int(random.lognormal(6.0, 1.0)))
        while left > 0 and edges[-1] < TOKENS:
            edges.append(min(TOKENS, edges[-1] + min(left, context)))
            left -= context
    return torch.tensor(edges, dtype=torch.int32, device="cuda")


def milliseconds(run: Callable[[], object]) -> float:
    """Mean of `CALLS` calls."""
    for _ in range(3):
        run()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(CALLS):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / CALLS


def times(context: int, attend: Callable[..., Tensor], operator: Callable[..., object]) -> tuple[float, float, float]:
    """Milliseconds of the forward, of FA3's backward and of ours."""
    edges = boundaries(context)
    bounds = _flash3.Bounds(edges, edges, context, context)
    q, k, v, grad = (torch.randn(TOKENS, n, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 4, 4, 8))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward(backward: Callable[..., object] | None) -> Tensor:
        return _flash3.attention(*leaves, bounds, attend, backward)

    def gradients(out: Tensor) -> float:
        return milliseconds(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))

    return milliseconds(lambda: forward(operator)), gradients(forward(None)), gradients(forward(operator))


def main() -> int:
    row = next(row for row in attention.backends() if row.name == "fa3")
    if not row.available:
        print(f"attention: FlashAttention-3 is not usable here: {row.reason}", file=sys.stderr)
        return 2
    attend, operator = _flash3.load()
    if operator is None:
        print("attention: this FlashAttention-3 has another backward operator than pgolf calls", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'context':>8}{'forward, ms':>13}{'FA3 backward, ms':>18}{'by query head, ms':>19}{'ratio':>7}")
    for context in (1024, 2048, 3072):
        forward, whole, parts = times(context, attend, operator)
        print(f"{context:8}{forward:13.3f}{whole:18.3f}{parts:19.3f}{whole / parts:7.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
