"""Every operator of the registry: the CPU implementation here, the kernels where there is a GPU for them."""

import re

import pytest
import torch

from pgolf.ops import _native
from pgolf.ops.smear_gate import reference, smear_gate, smear_gate_op
from pgolf.testing import (
    OPERATORS,
    Operator,
    accuracy_on,
    check_accuracy,
    check_equal,
    graphed,
    mismatch,
    poison,
    results,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)

CASES = [
    pytest.param(operator, shape, id=f"{operator.name}-{'x'.join(map(str, shape))}")
    for operator in OPERATORS
    for shape in operator.shapes
]
LARGE = [pytest.param(operator, operator.large, id=f"{operator.name}-large") for operator in OPERATORS]
EACH = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; skips where there is none with kernels built for it."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return CUDA


# --- CPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operator", "shape"), CASES)
@DTYPES
def test_cpu_matches_reference(operator: Operator, shape: tuple, dtype: torch.dtype) -> None:
    accuracy_on(operator, [operator.make(shape, dtype, CPU, seed) for seed in range(16)])


@EACH
def test_opcheck(operator: Operator) -> None:
    torch.library.opcheck(operator.op, operator.make(operator.shapes[3], torch.float32, CPU, 0))


@EACH
def test_gradcheck(operator: Operator) -> None:
    for shape in operator.shapes[:3]:
        assert torch.autograd.gradcheck(operator.op, operator.make(shape, torch.float64, CPU, 0))


@EACH
def test_composes_with_compile(operator: Operator) -> None:
    arguments = operator.make(operator.shapes[3], torch.float32, CPU, 0)
    compiled = torch.compile(lambda *a: operator.op(*a) * 2, backend="aot_eager", fullgraph=True)
    expected = results(lambda *a: operator.op(*a) * 2, arguments)
    for actual, value in zip(results(compiled, arguments), expected, strict=True):
        # Not the same bits: on the CPU torch.matmul takes another route for tensors that require no gradient.
        torch.testing.assert_close(actual, value)


def test_public_function_compiles_in_one_graph() -> None:
    arguments = OPERATORS[0].make((2, 9, 16, 12), torch.float32, CPU, 0)
    compiled = torch.compile(smear_gate, backend="aot_eager", fullgraph=True)
    check_equal("smear_gate", compiled(*arguments), reference(*arguments))


def test_smear_gate_by_hand() -> None:
    e = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]])
    ids = torch.tensor([[1, 5, 1, 6]])
    out = smear_gate(e, ids, torch.zeros(1, 2), torch.tensor([0.5]))  # every gate is 0.5 * sigmoid(0) = 1/4
    expected = [[[1.0, 2.0], [3.25, 4.5], [5.0, 6.0], [8.25, 9.5]]]
    check_equal("smear_gate", out, torch.tensor(expected))


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


def test_comparison_catches_errors() -> None:
    exact = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    working = exact.float()
    check_accuracy("same", working, working, exact)
    wrong = working.clone()
    wrong[2, 3] += 1e-3
    with pytest.raises(AssertionError, match=r"1 of 20 values differ .* first at \(2, 3\)"):
        check_accuracy("one value", wrong, working, exact)
    wrong[2, 3] = float("nan")
    with pytest.raises(AssertionError, match=r"first at \(2, 3\): got nan"):
        check_accuracy("a NaN", wrong, working, exact)


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("operator", "shape"), CASES + LARGE)
@DTYPES
def test_kernel_is_as_accurate_as_pytorch(
    gpu: torch.device, operator: Operator, shape: tuple, dtype: torch.dtype
) -> None:
    fresh = int(torch.Generator().seed() % 2**31)  # new inputs on every run; the seed is among a failure's locals
    count = 4 if shape == operator.large else 16
    draws = [operator.make(shape, dtype, gpu, seed) for seed in (*range(count - 1), fresh)]
    poison(gpu)
    accuracy_on(operator, draws)


@pytest.mark.gpu
@pytest.mark.parametrize(("operator", "shape"), CASES)
def test_kernel_takes_unaligned_memory(gpu: torch.device, operator: Operator, shape: tuple) -> None:
    draws = [operator.make(shape, torch.bfloat16, gpu, seed) for seed in range(16)]
    accuracy_on(operator, [tuple(shift(a) if isinstance(a, torch.Tensor) else a for a in draw) for draw in draws])


def shift(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, one element beyond an address that is a multiple of 16 bytes."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    moved = room[1:].view(tensor.shape)
    moved.copy_(tensor.detach())
    return moved.requires_grad_(tensor.requires_grad)


@pytest.mark.gpu
@EACH
@DTYPES
def test_kernel_gives_the_same_bits_again(gpu: torch.device, operator: Operator, dtype: torch.dtype) -> None:
    arguments = operator.make(operator.large, dtype, gpu, 0)
    first = results(operator.op, arguments)
    for _ in range(3):
        poison(gpu)
        for index, (again, value) in enumerate(zip(results(operator.op, arguments), first, strict=True)):
            check_equal(f"{operator.name}, result {index}", again, value)


@pytest.mark.gpu
@EACH
def test_kernel_in_a_cuda_graph(gpu: torch.device, operator: Operator) -> None:
    arguments = operator.make(operator.shapes[-1], torch.bfloat16, gpu, 0)
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    captured: list[torch.Tensor] = []

    def step() -> None:
        out = operator.op(*arguments)
        captured[:] = [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    replay = graphed(step)
    fresh = operator.make(operator.shapes[-1], torch.bfloat16, gpu, 1)
    with torch.no_grad():
        for old, new in zip(arguments, fresh, strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)
    replay()
    got = [tensor.detach().clone() for tensor in captured]
    step()
    for index, (actual, value) in enumerate(zip(got, captured, strict=True)):
        check_equal(f"{operator.name}, result {index}", actual, value.detach())


@pytest.mark.gpu
@EACH
def test_kernel_runs_on_the_current_stream(gpu: torch.device, operator: Operator) -> None:
    arguments = operator.make(operator.shapes[-1], torch.float32, gpu, 0)
    expected = results(operator.op, arguments)
    source = arguments[0].detach().clone()
    late = arguments[0].detach().zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would read the zeros
        late.copy_(source)
        actual = results(operator.op, arguments)
    stream.synchronize()
    for index, (got, value) in enumerate(zip(actual, expected, strict=True)):
        check_equal(f"{operator.name}, result {index}", got, value)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_kernel_keeps_nonfinite_in_its_document(gpu: torch.device, value: float) -> None:
    check_equal("smear_gate", smeared_with(value, gpu).cpu(), smeared_with(value, CPU))
    assert_stays_in_document(value, gpu)


@pytest.mark.gpu
@EACH
def test_kernel_passes_opcheck(gpu: torch.device, operator: Operator) -> None:
    torch.library.opcheck(operator.op, operator.make(operator.shapes[3], torch.float32, gpu, 0))


@pytest.mark.gpu
@pytest.mark.slow
@EACH
def test_kernel_under_torch_compile(gpu: torch.device, operator: Operator) -> None:
    arguments = operator.make(operator.shapes[-1], torch.float32, gpu, 0)
    compiled = torch.compile(lambda *a: operator.op(*a) * 2, fullgraph=True)
    expected = results(lambda *a: operator.op(*a) * 2, arguments)
    for index, (actual, value) in enumerate(zip(results(compiled, arguments), expected, strict=True)):
        check_equal(f"{operator.name}, result {index}", actual, value)


@pytest.mark.gpu
def test_public_function_runs_the_kernel(gpu: torch.device) -> None:
    arguments = OPERATORS[0].make((2, 65, 64, 12), torch.bfloat16, gpu, 0)
    check_equal("smear_gate", smear_gate(*arguments), smear_gate_op(*arguments))
    assert "smear_gate" in str(smear_gate(*arguments).grad_fn)
