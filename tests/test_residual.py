"""What the residual stream and its lanes promise beyond the registry: values by hand, every combination of operands and
of gradients, arguments passed through, arguments checked.
"""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf.ops import _native, lanes, residual
from pgolf.ops.residual import Operands
from pgolf.testing import check_equal

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
BOTH = (False, True)
COMBINATIONS = list(itertools.product(BOTH, ("", "other", "self"), BOTH, BOTH))  # branch, skip, x0, gate
NUMBERS = (0.7, 0.6, 1e-6)  # gate_scale, norm_scale, eps


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; skips where there is none with kernels built for it."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return CUDA


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def operands(branch: bool, skip: str, x0: bool, gate: bool, rows: int, dim: int, dtype: torch.dtype) -> Operands:
    """skip: "", "other" for a tensor of its own, or "self" for the stream."""
    wide = torch.promote_types(dtype, torch.float32)
    heads, window = 3, min(5, dim)

    def activation(there: bool) -> Tensor | None:
        return draw(rows, dim, dtype=dtype) if there else None

    def parameter(there: bool, *shape: int) -> Tensor | None:
        return draw(*shape, dtype=wide) if there else None

    return Operands(
        draw(rows, dim, dtype=dtype),
        activation(branch),
        parameter(branch, dim),
        activation(skip == "other"),
        parameter(skip != "", dim),
        parameter(skip != "", dim),
        activation(x0),
        parameter(x0, 2, dim),
        parameter(gate, heads, window),
    )


def present(values: Any) -> list[Tensor]:
    return [value for value in values if value is not None]


# --- CPU --------------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    out = residual.residual(
        torch.tensor([[1.0, 2.0]]),
        branch=torch.tensor([[4.0, -2.0]]),
        branch_scale=torch.tensor([0.5, 1.0]),
        skip=torch.tensor([[2.0, 4.0]]),
        skip_weight=torch.tensor([2.0, 1.0]),
        skip_gate=torch.zeros(2),
        x0=torch.tensor([[1.0, 1.0]]),
        mix=torch.tensor([[2.0, 1.0], [-4.0, 6.0]]),
        gate_weight=torch.tensor([[1.0]]),
        gate_scale=0.0,
        norm_scale=0.5,
        keep_sum=True,
        keep_blend=True,
    )
    assert out.sum is not None and out.gate is not None
    check_equal("sum", out.sum, torch.tensor([[3.0, 0.0]]))
    check_equal("blend", out.blend, torch.tensor([[3.5, 2.0]]))
    check_equal("stream", out.stream, torch.tensor([[3.0, 8.0]]))
    torch.testing.assert_close(out.normed, 0.5 * out.stream / (73 / 2) ** 0.5)
    check_equal("gate", out.gate, torch.tensor([[0.5]]))


def test_lanes_by_hand() -> None:
    one = torch.ones(1, 1)
    post, resid = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0])
    out = lanes.lanes(one, 2 * one, 3 * one, 4 * one, torch.tensor([2.0]), torch.tensor([0.5]), post, resid)
    check_equal("lane 0", out[0], torch.tensor([[10.0 + 6 + 3 * 2]]))
    check_equal("lane 1", out[1], torch.tensor([[40.0 + 2 * 6 + 4 * 2]]))


def test_norm_mean_is_the_norm_of_the_mean_however_small() -> None:
    """Where epsilon counts, too."""
    for size in (1.0, 1e-4):
        lane0, lane1 = size * draw(3, 16), size * draw(3, 16)
        exact = residual.norm_mean_reference(lane0, lane1)
        torch.testing.assert_close(residual.fused_norm_mean(lane0, lane1), exact)


@pytest.mark.parametrize("function", [residual.reference, residual.fused])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_what_is_returned(function: Any, combination: tuple[Any, ...]) -> None:
    """In shape and type, and what nothing was added to is the argument itself."""
    o = operands(*combination, rows=4, dim=16, dtype=torch.bfloat16)
    for keep_sum, keep_blend, keep_stream in itertools.product(BOTH, BOTH, BOTH):
        out = function(*o, 1.0, 1.0, keep_sum, keep_blend, keep_stream)
        assert [tensor is not None for tensor in out[:3]] == [keep_sum, keep_blend, keep_stream]
        assert (out.gate is not None) == (o.gate_weight is not None)
        assert all(tensor.dtype == torch.bfloat16 for tensor in present(out))
        if keep_sum:
            assert (out.sum.data_ptr() == o.x.data_ptr()) == (o.branch is None)
        if keep_blend:
            assert (out.blend.data_ptr() == o.x.data_ptr()) == (not o.blended)
        if keep_stream:
            assert (out.stream.data_ptr() == o.x.data_ptr()) == (not o.changed)
        assert (out.x0 is None) if o.x0 is None else (out.x0.data_ptr() == o.x0.data_ptr())


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_gradients_of_any_outputs(combination: tuple[Any, ...]) -> None:
    """The backward written out, beside autograd's of the reference, in float64; outputs without a gradient are none."""
    o = operands(*combination, rows=3, dim=8, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in present(o)]
    ours, theirs = (present(f(*o, 0.7, 0.6, True, True)) for f in (residual.fused, residual.reference))
    for chosen in itertools.product([False, True], repeat=len(ours)):
        if not any(chosen):
            continue
        directions = [torch.randn_like(out) for out, take in zip(ours, chosen, strict=True) if take]
        found, wanted = (
            torch.autograd.grad(
                [out for out, take in zip(side, chosen, strict=True) if take],
                leaves,
                directions,
                retain_graph=True,
                materialize_grads=True,
            )
            for side in (ours, theirs)
        )
        for got, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, exact)


def test_x0_handed_on_collects_its_gradient() -> None:
    """Two calls in a row, the embedding both stream and x0 of the first: as with x0 used twice."""
    x, branch = draw(3, 8, dtype=torch.float64), draw(3, 8, dtype=torch.float64)
    mixes, scale = [draw(2, 8, dtype=torch.float64) for _ in range(2)], draw(8, dtype=torch.float64)
    leaves = [x.requires_grad_(), *(tensor.requires_grad_() for tensor in (*mixes, branch, scale))]

    def both(function: Any, chain: bool) -> tuple[Tensor, ...]:
        first = function(x, x0=x, mix=mixes[0])
        x0 = first.x0 if chain else x
        second = function(first.stream, branch=branch * first.normed, branch_scale=scale, x0=x0, mix=mixes[1])
        loss = (second.stream * second.normed).sum()
        return torch.autograd.grad(loss, leaves)

    for got, exact in zip(both(residual.fused, True), both(residual.reference, False), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_opcheck(combination: tuple[Any, ...]) -> None:
    o = operands(*combination, rows=3, dim=16, dtype=torch.float32)
    torch.library.opcheck(residual.residual_op, (list(o), *NUMBERS, True, True, True))
    opened = torch.rand(3, 3) if o.gate_weight is not None else None
    of_gate = None if opened is None else draw(3, 3)
    of_blend, of_x0 = (None if o.x0 is None else draw(3, 16) for _ in range(2))
    given = [None, of_blend, draw(3, 16), draw(3, 16), of_gate, of_x0, opened]
    for wanted in (None, [False, False, False]):
        torch.library.opcheck(residual.residual_backward_op, (given, list(o), *NUMBERS, wanted))


def test_lanes_backward_passes_opcheck() -> None:
    tensors = [draw(3, 8) for _ in range(4)] + [draw(8), draw(8), draw(2, 2), draw(2)]
    for grads in ((draw(3, 8), draw(3, 8)), (None, draw(3, 8))):
        for parameters in BOTH:
            torch.library.opcheck(lanes.lanes_backward_op, (*grads, tensors, parameters))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_only_wanted_gradients_are_made(combination: tuple[Any, ...]) -> None:
    check_wanted(combination, CPU, torch.float32, rows=5, dim=16)


def check_wanted(combination: tuple[Any, ...], device: torch.device, dtype: torch.dtype, rows: int, dim: int) -> None:
    """AssertionError unless the backward gives the same bits of what is wanted, and nothing else."""
    o = operands(*combination, rows=rows, dim=dim, dtype=dtype)
    opened = torch.rand(rows, 3).to(dtype) if o.gate_weight is not None else None
    given = [None, None, *(draw(rows, dim, dtype=dtype) for _ in range(2)), opened, None, opened]
    given, tensors = on(device, given), on(device, o)
    names = ["x", "branch", "skip", "x0", "parameters"]
    there = [True, o.branch is not None, o.skip is not None, o.x0 is not None, sum(o.sections) > 0]

    def made(*wanted: bool) -> dict[str, Tensor]:
        chosen = [True, wanted[0], True, *wanted[1:]]
        found = residual.residual_backward_op(given, tensors, *NUMBERS, list(wanted))
        return dict(zip(itertools.compress(names, map(all, zip(there, chosen, strict=True))), found, strict=True))

    whole = made(True, True, True)
    for wanted in itertools.product(BOTH, BOTH, BOTH):
        for name, gradient in made(*wanted).items():
            check_equal(f"{name}, {wanted}", gradient, whole[name])


def test_a_frozen_x0_handed_on_has_no_gradient() -> None:
    """Else each call would make one for the call before, and the first for nobody."""
    x, mix = draw(3, 8).requires_grad_(), draw(2, 8)
    for needs in BOTH:
        x0 = draw(3, 8).requires_grad_(needs)
        out = residual.fused(x, x0=x0, mix=mix)
        assert out.x0.requires_grad == needs and out.stream.requires_grad
        assert out.x0.data_ptr() == x0.data_ptr()


@pytest.mark.parametrize("function", [residual.reference, residual.fused, residual.residual])
@pytest.mark.parametrize(
    "combination",
    [(True, "", True, True), (True, "self", True, False), (False, "other", False, True), (False, "", False, False)],
)
def test_compiles_in_one_graph(function: Any, combination: tuple[Any, ...]) -> None:
    """Arguments passed through included."""
    torch.compiler.reset()
    given = operands(*combination, rows=3, dim=16, dtype=torch.float32)._asdict()
    leaves = [tensor.requires_grad_() for tensor in present(given.values())]

    def step(given: dict[str, Tensor | None]) -> list[Tensor]:
        kept = {"keep_sum": True, "keep_blend": True, "keep_stream": given["x0"] is None}
        return present(function(**given, gate_scale=0.7, norm_scale=0.6, **kept))

    results = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        found = call(given)
        results.append([*found, *torch.autograd.grad(sum(out.square().sum() for out in found), leaves)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


X, W = torch.zeros(3, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": torch.zeros(())}, "x: expected shape [..., D], D > 0, got []"),
        ({"x": X.half()}, "x: expected one of bfloat16, float32, float64, got torch.float16"),
        ({"branch": X}, "branch_scale: expected a tensor beside branch, got None"),
        ({"branch_scale": W}, "branch_scale: expected None without branch, got a tensor"),
        ({"branch": X[:2], "branch_scale": W}, "branch: expected shape [3, 8] as x, got [2, 8]"),
        ({"branch": X.double(), "branch_scale": W}, "branch: expected torch.float32 as x, got torch.float64"),
        ({"branch": X, "branch_scale": W[:4]}, "branch_scale: expected shape [8], got [4]"),
        ({"branch": X, "branch_scale": W.bfloat16()}, "branch_scale: expected torch.float32, got torch.bfloat16"),
        ({"skip": X, "skip_weight": W}, "skip_gate: expected a tensor beside skip, got None"),
        ({"skip_gate": W}, "skip_weight: expected a tensor beside skip_gate, got None"),
        ({"x0": X.to("meta"), "mix": torch.zeros(2, 8)}, "x0: expected a tensor on cpu as x, got meta"),
        ({"x0": X, "mix": W}, "mix: expected shape [2, 8], got [8]"),
        ({"gate_weight": torch.zeros(2, 9)}, "gate_weight: expected shape [heads, w], 1 <= w <= 8, got [2, 9]"),
    ],
)
def test_arguments_are_checked(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^residual: {re.escape(message)}$"):
        residual.residual(**{"x": X, **given})


def test_arguments_of_lanes_are_checked() -> None:
    post, resid = torch.zeros(2, 2), torch.zeros(2)
    for arguments, message in (
        ((X, X[:1], X, X, W, W, post, resid), "lanes: lane1: expected shape [3, 8] as lane0, got [1, 8]"),
        ((X, X, X, X, W, W[:2], post, resid), "lanes: mlp_scale: expected shape [8], got [2]"),
        ((X, X, X, X, W, W, post.double(), resid), "lanes: post: expected torch.float32, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            lanes.lanes(*arguments)
    with pytest.raises(ValueError, match=r"^norm_mean: lane1: expected shape \[3, 8\] as lane0, got \[2, 8\]$"):
        residual.norm_mean(X, X[:2])


# --- GPU --------------------------------------------------------------------------------------------------------------


def on(device: torch.device, tensors: Any) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def compare(what: str, ours: list[Tensor], wanted: list[Tensor]) -> None:
    for index, (got, exact) in enumerate(zip(ours, wanted, strict=True)):
        tolerance = 2**-7 if got.dtype == torch.bfloat16 else 1e-4
        size = max(1.0, exact.float().abs().max().item()) if exact.numel() else 1.0
        difference = (got.cpu().float() - exact.float()).abs().max().item() if exact.numel() else 0.0
        assert difference <= tolerance * size, f"{what}, result {index}: off by {difference}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_kernels_of_any_operands_and_gradients(
    gpu: torch.device, combination: tuple[Any, ...], dtype: torch.dtype
) -> None:
    for rows, dim in ((0, 64), (1, 8), (70, 512), (33, 768), (5000, 64)):
        o = operands(*combination, rows=rows, dim=dim, dtype=dtype)
        for kept in ((True, True, True), (False, True, False), (False, False, False)):
            arguments = (*NUMBERS, *kept)
            wanted = residual.residual_op(list(o), *arguments)
            compare(f"{rows} x {dim}", residual.residual_op(on(gpu, o), *arguments), wanted)
        opened = torch.rand(rows, 3).to(dtype) if o.gate_weight is not None else None
        of_sum, of_blend, of_stream, of_normed, of_x0 = (draw(rows, dim, dtype=dtype) for _ in range(5))
        of_gate = draw(rows, 3, dtype=dtype) if opened is not None else None
        mixed = (of_blend, of_x0) if o.x0 is not None else (None, None)
        full = [of_sum, mixed[0], of_stream, of_normed, of_gate, mixed[1]]
        for left_out in range(7):
            given = [None if index == left_out else grad for index, grad in enumerate(full)] + [opened]
            wanted = residual.residual_backward_op(given, list(o), *NUMBERS)
            ours = residual.residual_backward_op(on(gpu, given), on(gpu, o), *NUMBERS)
            compare(f"{rows} x {dim}, without {left_out}", ours, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_kernels_make_only_wanted_gradients(
    gpu: torch.device, combination: tuple[Any, ...], dtype: torch.dtype
) -> None:
    for rows, dim in ((1, 8), (70, 512), (33, 768)):
        check_wanted(combination, gpu, dtype, rows, dim)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lanes_kernel_with_one_gradient(gpu: torch.device, dtype: torch.dtype) -> None:
    for rows, dim in ((0, 64), (1, 8), (70, 512), (33, 768), (5000, 64)):
        activations = [draw(rows, dim, dtype=dtype) for _ in range(4)]
        tensors = [*activations, draw(dim), draw(dim), draw(2, 2), draw(2)]
        for grads in ((draw(rows, dim, dtype=dtype), None), (None, draw(rows, dim, dtype=dtype))):
            wanted = lanes.lanes_backward_op(*grads, tensors)
            ours = lanes.lanes_backward_op(*on(gpu, grads), on(gpu, tensors))
            compare(f"{rows} x {dim}", list(ours), list(wanted))
            *alone, none = lanes.lanes_backward_op(*on(gpu, grads), on(gpu, tensors), False)
            assert not none.numel()
            for index, gradient in enumerate(alone):
                check_equal(f"{rows} x {dim}, gradient {index}", gradient, ours[index])


@pytest.mark.gpu
def test_public_functions_run_the_kernels(gpu: torch.device) -> None:
    x, other = draw(4, 64).to(gpu).requires_grad_(), draw(4, 64).to(gpu)
    assert "_Fused" in str(residual.residual(x, branch=other, branch_scale=draw(64).to(gpu)).normed.grad_fn)
    assert "_FusedNormMean" in str(residual.norm_mean(x, other).grad_fn)
    scalars = [tensor.to(gpu) for tensor in (draw(64), draw(64), draw(2, 2), draw(2))]
    assert "lanes" in str(lanes.lanes(x, other, other, other, *scalars)[0].grad_fn)
