"""The GPTQ solve of a whole model: the operator's batches beside the reference's loop, matrix by matrix.

A GPU takes the record's 67 matrices, factorizations included; a CPU, where the operator is that loop, a small model.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from pgolf.ops import _native
from pgolf.ops.gptq import reference
from pgolf.quantize import gptq


def model(layers: int, dim: int, hidden: int, vocabulary: int, device: torch.device) -> dict[str, gptq.Problem]:
    """Random weights and the Hessians of correlated inputs; query, key and value of a layer share theirs."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    def hessian(cols: int) -> torch.Tensor:
        x = normal(2 * cols, cols // 8) @ normal(cols // 8, cols) + normal(2 * cols, cols)
        return x.T @ x

    problems = {"embedding": gptq.Problem(normal(vocabulary, dim), hessian(dim), 14.0, 7)}
    for layer in range(layers):
        heads, mixed, normed, squared = hessian(dim), hessian(dim), hessian(dim), hessian(hidden)
        for name, rows, inputs, clip in (
            ("q", dim, heads, 13.0),
            ("k", dim // 2, heads, 13.0),
            ("v", dim // 2, heads, 13.0),
            ("o", dim, mixed, 13.0),
            ("up", hidden, normed, 11.5),
            ("down", dim, squared, 11.5),
        ):
            protected = [(dim // 2, 64)] if (layer, name) == (0, "down") else ()
            problems[f"{layer}.{name}"] = gptq.Problem(normal(rows, inputs.shape[0]), inputs, clip, 6, protected)
    return problems


def seconds(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of `step`, everything it enqueued included."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def test_whole_model(
    device: torch.device, full: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = device.type == "cuda"
    if cuda and (reason := _native.why_not(device)):
        pytest.skip(f"no kernels to time: {reason}")
    problems = model(11, 512, 2048, 8192, device) if cuda else model(2, 128, 512, 1024, device)
    hessians = {id(problem.hessian): problem.hessian for problem in problems.values()}
    dtype = torch.float64 if cuda else torch.float32
    repeats = 10 if full else 3

    def solve() -> dict[str, gptq.GptqResult]:
        return dict(gptq.solve_all(problems))

    def factor() -> list[gptq.Factor]:
        return [gptq.inverse_factor(hessian, 0.01, dtype) for hessian in hessians.values()]

    results = solve()  # warms up the libraries too
    times = {"whole solve": seconds(solve, device, repeats), "of it factorizations": seconds(factor, device, repeats)}
    monkeypatch.setattr(gptq, "gptq", reference)
    expected: dict[str, gptq.GptqResult] = {}
    times["whole solve, reference"] = seconds(lambda: expected.update(solve()), device, 1)

    where = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    weights = sum(problem.weight.numel() for problem in problems.values())
    lines = [f"\ngptq: {len(problems)} matrices, {weights:,} weights on {where}"]
    lines += [f"  {name:<24} {value * 1e3:10.1f} ms" for name, value in times.items()]
    wrong = {name: int((results[name].q != expected[name].q).sum()) for name in results}
    lines.append(f"  integers that differ: {sum(wrong.values())}")
    with capsys.disabled():
        print("\n".join(lines))
    # A weight within float64's precision of a tie is possible, though not expected; its row alone may then differ.
    assert sum(count > 0 for count in wrong.values()) <= 1 and sum(wrong.values()) <= 2048
