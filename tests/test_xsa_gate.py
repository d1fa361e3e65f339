"""xsa_gate's own promises: values by hand, what each argument's absence means, short values, arguments checked."""

import itertools
import re

import pytest
import torch
from torch import Tensor

from pgolf.ops import _native, xsa_gate
from pgolf.testing import OPERATORS, accuracy_on, check_equal, mismatch, replaced

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
OPERATOR = next(operator for operator in OPERATORS if operator.name == "xsa_gate")


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; skips where there is none with kernels built for it."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return CUDA


def test_by_hand() -> None:
    y = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    v = torch.tensor([[[[0.0, -5.0]]]])  # of both heads: the second column goes
    gate = torch.tensor([[[1.0, 0.5]]])
    check_equal("xsa_gate", xsa_gate.xsa_gate(y, v, gate), torch.tensor([[[1.0, 0.0, 1.5, 0.0]]]))
    check_equal("xsa_gate", xsa_gate.xsa_gate(y, v), torch.tensor([[[1.0, 0.0, 3.0, 0.0]]]))
    check_equal("xsa_gate", xsa_gate.xsa_gate(y, v, gate, xsa=False), torch.tensor([[[1.0, 2.0, 1.5, 2.0]]]))
    check_equal("xsa_gate", xsa_gate.xsa_gate(y, v, xsa=False), torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))


def test_what_is_left_is_perpendicular_to_the_value() -> None:
    y, v, _ = OPERATOR.make((2, 5, 4, 2, 16), torch.float64, CPU, 0)
    left = xsa_gate.xsa_gate(y, v).unflatten(2, (2, 2, 16))
    assert (left * v[..., None, :]).sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("absent", ["", "v", "gate"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 8), (2, 3, 4, 2, 8), (1, 2, 6, 2, 5)])
def test_gradients_written_out(shape: tuple[int, ...], absent: str) -> None:
    """The backward that the kernel computes, beside autograd's of the reference and in itself."""
    named = dict(zip(("y", "v", "gate"), OPERATOR.make(shape, torch.float64, CPU, 0), strict=True))
    leaves = [tensor for name, tensor in named.items() if name != absent]

    def function(*given: Tensor) -> Tensor:
        chosen = dict(zip((name for name in named if name != absent), given, strict=True))
        return xsa_gate._XsaGate.apply(chosen["y"], chosen.get("v"), chosen.get("gate"))

    assert torch.autograd.gradcheck(function, leaves)
    gate = None if absent == "gate" else named["gate"]
    expected = xsa_gate.reference(named["y"], named["v"], gate, xsa=absent != "v")
    torch.testing.assert_close(function(*leaves), expected)
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: function(*given) * 2, backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves),
        torch.autograd.grad((expected * 2).square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted)


def check_operators(device: torch.device) -> None:
    y, v, gate = (x.detach() for x in OPERATOR.make((2, 33, 8, 4, 64), torch.float32, device, 0))
    for given in ((y, v, gate), (y, v, None), (y, None, gate)):
        torch.library.opcheck(xsa_gate.xsa_gate_op, given)
        grad = xsa_gate.xsa_gate_op(*given)
        whole = xsa_gate.xsa_gate_backward_op(grad, *given)
        for needs in itertools.product([False, True], repeat=2):
            torch.library.opcheck(xsa_gate.xsa_gate_backward_op, (grad, *given, *needs))
            found = xsa_gate.xsa_gate_backward_op(grad, *given, *needs)
            for gradient, wanted, need in zip(found, whole, (True, *needs), strict=True):
                check_equal("gradient", gradient, wanted if need else wanted.new_empty(0))


def test_operators_are_registered_right() -> None:
    check_operators(CPU)


def with_short_values(device: torch.device, dtype: torch.dtype, function=xsa_gate.xsa_gate) -> list[Tensor]:
    """Result and gradients where v is zero, shorter than MIN_NORM, or just longer."""
    y, v, gate = OPERATOR.make((1, 4, 4, 2, 16), dtype, device, 0)
    scale = torch.tensor([0.0, 1e-14, 1e-11, 1.0], device=device)[:, None, None]
    v = (v.detach() * scale).to(dtype).requires_grad_()
    out = function(y, v, gate)
    return [out, *torch.autograd.grad(out.square().sum(), (y, v, gate))]


def check_by_row(ours: Tensor, expected: Tensor) -> None:
    """Equal up to rounding errors of each row's largest value: gradients of short values are huge differences."""
    assert ours.isfinite().all()
    limit = 1e-5 * expected.abs().amax(-1, keepdim=True)
    assert ((ours - expected).abs() <= limit).all(), mismatch(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_short_values(dtype: torch.dtype) -> None:
    def written_out(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return xsa_gate._XsaGate.apply(y, v, gate)

    for ours, expected in zip(with_short_values(CPU, dtype, written_out), with_short_values(CPU, dtype), strict=True):
        check_by_row(ours, expected)


def test_public_function_compiles_in_one_graph() -> None:
    arguments = OPERATOR.make((2, 9, 4, 2, 16), torch.float32, CPU, 0)
    compiled = torch.compile(xsa_gate.xsa_gate, backend="aot_eager", fullgraph=True)
    check_equal("xsa_gate", compiled(*arguments), xsa_gate.reference(*arguments))


Y, V, GATE = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Y[0], V, GATE), "y: expected shape [B, T, H, d], got [3, 4, 8]"),
        ((Y.half(), V, GATE), "y: expected one of bfloat16, float32, float64, got torch.float16"),
        ((Y, V[:1], GATE), "v: expected shape [2, 3, a divisor of 4, 8], got [1, 3, 2, 8]"),
        ((Y, torch.zeros(2, 3, 3, 8), GATE), "v: expected shape [2, 3, a divisor of 4, 8], got [2, 3, 3, 8]"),
        ((Y, V, GATE[..., None]), "gate: expected shape [2, 3, 4], got [2, 3, 4, 1]"),
        ((Y, V.double(), GATE), "v: expected torch.float32 as y, got torch.float64"),
        ((Y, V, GATE.to("meta")), "gate: expected a tensor on cpu as y, got meta"),
    ],
)
def test_arguments_are_checked(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'xsa_gate: {message}')}$"):
        xsa_gate.xsa_gate(*arguments)


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_operators_are_registered_right_on_cuda(gpu: torch.device) -> None:
    check_operators(gpu)


@pytest.mark.gpu
def test_kernel_divides_short_values_alike(gpu: torch.device) -> None:
    for ours, expected in zip(
        with_short_values(gpu, torch.float32), with_short_values(gpu, torch.float32, xsa_gate.reference), strict=True
    ):
        check_by_row(ours, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_reads_v_wherever_it_lies(gpu: torch.device, dtype: torch.dtype) -> None:
    draws = [OPERATOR.make((2, 33, 8, 4, 64), dtype, gpu, seed) for seed in range(8)]
    assert not draws[0][1].is_contiguous()
    accuracy_on(OPERATOR, draws)
    accuracy_on(OPERATOR, [replaced(draw, 1, draw[1].contiguous()) for draw in draws])
    assert "_XsaGate" in str(xsa_gate.xsa_gate(*draws[0]).grad_fn)


@pytest.mark.gpu
def test_no_tokens(gpu: torch.device) -> None:
    arguments = OPERATOR.make((2, 0, 8, 4, 64), torch.bfloat16, gpu, 0)
    out = xsa_gate.xsa_gate(*arguments)
    assert out.shape == (2, 0, 512)
    for grad, leaf in zip(torch.autograd.grad(out.sum(), arguments), arguments, strict=True):
        assert grad.shape == leaf.shape
