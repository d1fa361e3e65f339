"""SmearGate's own promises: values by hand, documents apart, arguments checked, the public function's choice."""

import re

import pytest
import torch

from pgolf.ops import _native
from pgolf.ops.smear_gate import reference, smear_gate, smear_gate_backward_op, smear_gate_op
from pgolf.testing import OPERATORS, check_equal, mismatch

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
OPERATOR = next(operator for operator in OPERATORS if operator.name == "smear_gate")


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; skips where there is none with kernels built for it."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return CUDA


def test_public_function_compiles_in_one_graph() -> None:
    arguments = OPERATOR.make((2, 9, 16, 12), torch.float32, CPU, 0)
    compiled = torch.compile(smear_gate, backend="aot_eager", fullgraph=True)
    check_equal("smear_gate", compiled(*arguments), reference(*arguments))


def test_by_hand() -> None:
    e = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]])
    ids = torch.tensor([[1, 5, 1, 6]])
    out = smear_gate(e, ids, torch.zeros(1, 2), torch.tensor([0.5]))  # every gate is 0.5 * sigmoid(0) = 1/4
    expected = [[[1.0, 2.0], [3.25, 4.5], [5.0, 6.0], [8.25, 9.5]]]
    check_equal("smear_gate", out, torch.tensor(expected))


def check_frozen_parameters(device: torch.device) -> None:
    """Parameters that need no gradient: none is made, and e's stays the same."""
    arguments = OPERATOR.make((2, 65, 64, 12), torch.float32, device, 0)
    given = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    grad = smear_gate_op(*given)
    whole, alone = (smear_gate_backward_op(grad, *given, parameters) for parameters in (True, False))
    check_equal("gradient of e", alone[0], whole[0])
    assert not alone[1].numel() and not alone[2].numel()
    torch.library.opcheck(smear_gate_backward_op, (grad, *given, False))


def test_frozen_parameters() -> None:
    check_frozen_parameters(CPU)


@pytest.mark.gpu
def test_kernel_leaves_frozen_parameters_out(gpu: torch.device) -> None:
    check_frozen_parameters(gpu)


def smeared_with(value: float, device: torch.device) -> torch.Tensor:
    """SmearGate of rows of ones, of which row 1 holds `value` in its last column; row 3 begins a document."""
    e = torch.ones(1, 5, 16, device=device)
    e[0, 1, -1] = value
    e[0, 2] = value
    ids = torch.tensor([[1, 5, 6, 1, 7]], device=device)
    weight, lam = torch.zeros(1, 12, device=device), torch.ones(1, device=device)
    return smear_gate_op(e, ids, weight, lam, 1)[0]


def assert_stays_in_document(value: float, device: torch.device) -> None:
    out = smeared_with(value, device)
    assert not out[1:3, -1].isfinite().any()
    assert out[0].isfinite().all() and out[1, :-1].isfinite().all()
    assert out[3:].isfinite().all(), mismatch(out[3:], torch.ones_like(out[3:]))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nonfinite_stays_in_its_document(value: float) -> None:
    assert_stays_in_document(value, CPU)


E, IDS, WEIGHT, LAM = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 4), torch.zeros(1)


@pytest.mark.parametrize("function", [smear_gate, smear_gate_op])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((E[0], IDS, WEIGHT, LAM), "smear_gate: e: expected shape [B, T, D], got [3, 8]"),
        ((E.half(), IDS, WEIGHT, LAM), "smear_gate: e: expected one of bfloat16, float32, float64, got torch.float16"),
        ((E, IDS[:1], WEIGHT, LAM), "smear_gate: ids: expected shape [2, 3] as e, got [1, 3]"),
        ((E, IDS.int(), WEIGHT, LAM), "smear_gate: ids: expected int64, got torch.int32"),
        ((E, IDS, WEIGHT[0], LAM), "smear_gate: weight: expected shape [1, W] with 1 <= W <= 8, got [4]"),
        ((E, IDS, WEIGHT[:, :0], LAM), "smear_gate: weight: expected shape [1, W] with 1 <= W <= 8, got [1, 0]"),
        ((E, IDS, WEIGHT, LAM[0]), "smear_gate: lam: expected shape [1], got []"),
        ((E, IDS, WEIGHT.double(), LAM), "smear_gate: weight: expected torch.float32, got torch.float64"),
        ((E, IDS, WEIGHT, LAM.to("meta")), "smear_gate: lam: expected a tensor on cpu as e, got meta"),
    ],
)
def test_arguments_are_checked(function, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(*arguments, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_kernel_keeps_nonfinite_in_its_document(gpu: torch.device, value: float) -> None:
    check_equal("smear_gate", smeared_with(value, gpu).cpu(), smeared_with(value, CPU))
    assert_stays_in_document(value, gpu)


@pytest.mark.gpu
def test_public_function_runs_the_kernel(gpu: torch.device) -> None:
    arguments = OPERATOR.make((2, 65, 64, 12), torch.bfloat16, gpu, 0)
    check_equal("smear_gate", smear_gate(*arguments), smear_gate_op(*arguments))
    assert "smear_gate" in str(smear_gate(*arguments).grad_fn)
