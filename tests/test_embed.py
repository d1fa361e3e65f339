"""The fused embedding's own promises: values by hand, documents and rows of the batch apart, all of the gradient
written, ids that are none, a float32 embedding under bfloat16 results, arguments checked.
"""

import re

import pytest
import torch
from torch import Tensor

from pgolf.ops import _native
from pgolf.ops.embed import embed, embed_op, machine_epsilon, reference
from pgolf.testing import OPERATORS, Arguments, check_accuracy, check_equal, in_float64, poison, results
from pgolf.testing.cases.embed import OPERATORS as ROWS
from pgolf.testing.cases.embed import draw_ids

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
OPERATOR = ROWS[0]


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; skips where there is none with kernels built for it."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return CUDA


DEVICES = pytest.mark.parametrize("on", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


@pytest.fixture
def device(on: str, request: pytest.FixtureRequest) -> torch.device:
    """The CPU, or the GPU where there is one: the same promises hold on both."""
    return request.getfixturevalue("gpu") if on == "gpu" else CPU


def tensors(device: torch.device, *values: list) -> list[Tensor]:
    return [torch.tensor(value, device=device) for value in values]


def gradients(ids: Tensor, weight: Tensor, gate_weight: Tensor, lam: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Of embed_op's result in weight, gate_weight and lam."""
    leaves = [tensor.detach().requires_grad_() for tensor in (weight, gate_weight, lam)]
    return torch.autograd.grad(embed_op(ids, *leaves, 1)[0], leaves, grad)


def test_is_in_the_registry() -> None:
    assert OPERATOR in OPERATORS


@DEVICES
def test_by_hand(device: torch.device) -> None:
    # Gates are 0.5 * sigmoid(0) = 1/4. Token 2 at position 1: (3, 4) + (7, 1) / 4 = (4.75, 4.25).
    ids, weight, gate_weight, lam = tensors(
        device, [[3, 2, 1, 3]], [[0.0, 0.0], [3.0, 1.0], [3.0, 4.0], [7.0, 1.0]], [[0.0, 0.0]], [0.5]
    )
    sums = torch.tensor([[[7.0, 1.0], [4.75, 4.25], [3.0, 1.0], [7.75, 1.25]]], dtype=torch.float64)
    expected = sums / sums.square().mean(-1, keepdim=True).sqrt()
    for function in (embed, lambda *a: embed_op(*a)[0]):
        out = function(ids, weight, gate_weight, lam, 1)
        torch.testing.assert_close(out.cpu(), expected.float(), rtol=1e-6, atol=0)


@DEVICES
def test_gradient_by_hand(device: torch.device) -> None:
    """Without a gate x = (a, b) / r, r = sqrt((a^2 + b^2) / 2); its first value's gradient is (b^2, -a b) / (2 r^3)."""
    ids, weight, gate_weight, lam = tensors(device, [[2, 0, 2]], [[1.0, 1.0], [9.0, 9.0], [1.0, 7.0]], [[0.0]], [0.0])
    grad = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]]], device=device)
    grad_weight, grad_gate_weight, grad_lam = gradients(ids, weight, gate_weight, lam, grad)
    # r = 5 for (1, 7): 3 * (49, -7) / 250
    torch.testing.assert_close(grad_weight.cpu(), torch.tensor([[0, 0], [0, 0], [0.588, -0.084]]), rtol=1e-5, atol=1e-6)
    check_equal("grad_gate_weight", grad_gate_weight.cpu(), torch.zeros(1, 1))
    # The last token's is 2 * (49, -7) / 250, and its share would be sigmoid(0) = 1/2 of the (1, 1) before it.
    torch.testing.assert_close(grad_lam.cpu(), torch.tensor([0.5 * 2 * 42 / 250]), rtol=1e-5, atol=0)


def test_epsilon_is_that_of_rms_norm() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.full((1, 8), 1e-4, dtype=dtype)
        expected = torch.nn.functional.rms_norm(x, (8,))
        check_equal(str(dtype), torch.nn.functional.rms_norm(x, (8,), eps=machine_epsilon(dtype)), expected)


@pytest.mark.gpu
def test_kernel_adds_the_same_epsilon(gpu: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        ids, weight = torch.zeros(1, 1, dtype=torch.int64, device=gpu), torch.full((1, 8), 1e-4, device=gpu)
        gate_weight, lam = torch.zeros(1, 1, device=gpu), torch.zeros(1, device=gpu)
        out = embed_op(ids, weight, gate_weight, lam, 1, dtype)[0]
        torch.testing.assert_close(out, reference(ids, weight, gate_weight, lam, 1, dtype))


@DEVICES
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nonfinite_stays_in_its_document(device: torch.device, value: float) -> None:
    weight = torch.ones(8, 16, device=device)
    weight[5, -1] = value
    ids = torch.tensor([[2, 5, 6, 1, 7], [5, 1, 6, 7, 2]], device=device)
    gate_weight, lam = torch.zeros(1, 12, device=device), torch.ones(1, device=device)
    out = embed_op(ids, weight, gate_weight, lam, 1)[0]
    finite = [[True, False, False, True, True], [False, True, True, True, True]]
    assert out.isfinite().all(-1).tolist() == finite
    grad_weight = gradients(ids, weight, gate_weight, lam, torch.ones_like(out))[0]
    # 2 comes before the infinite token, 6 after it: they share rows with it. 1 and 7 do not.
    assert grad_weight.isfinite().all(-1).tolist() == [True, True, False, True, True, False, False, True]


@DEVICES
def test_batch_rows_do_not_mix(device: torch.device) -> None:
    """Each row of the batch alone gives the same bits, and its gradients add up to those of the batch."""
    ids, weight, gate_weight, lam, bos, _, eps = OPERATOR.make((3, 40, 64, 9, 12), torch.float32, device, 0)
    whole = embed_op(ids, weight, gate_weight, lam, bos, None, eps)[0]
    grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(device)
    rows = [embed_op(ids[b : b + 1], weight, gate_weight, lam, bos, None, eps)[0] for b in range(3)]
    check_equal("rows", torch.cat(rows), whole.detach())
    apart = [gradients(ids[b : b + 1], weight, gate_weight, lam, grad[b : b + 1]) for b in range(3)]
    for got, *parts in zip(gradients(ids, weight, gate_weight, lam, grad), *apart, strict=True):
        torch.testing.assert_close(got, sum(parts), rtol=1e-4, atol=1e-4)


@DEVICES
def test_every_row_of_the_gradient_is_written(device: torch.device) -> None:
    ids = draw_ids(2, 50, 300, torch.Generator().manual_seed(0)).to(device)
    weight = torch.randn(300, 24, device=device)
    gate_weight, lam = torch.ones(1, 12, device=device), torch.ones(1, device=device)
    if device.type == "cuda":
        poison(device)
    grad_weight = gradients(ids, weight, gate_weight, lam, torch.randn(2, 50, 24, device=device))[0]
    occurs = torch.zeros(300, dtype=torch.bool, device=device).index_fill_(0, ids.flatten(), True)
    assert 10 < occurs.sum() < 290
    assert (grad_weight[occurs] != 0).all() and (grad_weight[~occurs] == 0).all()


@DEVICES
@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_no_tokens(device: torch.device, shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    weight, gate_weight, lam = (torch.ones(s, device=device) for s in ((5, 8), (1, 2), (1,)))
    assert embed_op(ids, weight, gate_weight, lam, 1)[0].shape == (*shape, 8)
    for got in gradients(ids, weight, gate_weight, lam, torch.ones(*shape, 8, device=device)):
        assert (got == 0).all()


def test_unknown_ids_are_errors_on_the_cpu() -> None:
    for bad in (-1, 6):
        ids = torch.tensor([[2, bad]])
        for function in (embed, embed_op):
            with pytest.raises(IndexError):
                function(ids, torch.ones(6, 8), torch.ones(1, 2), torch.ones(1), 1)


def mixed(device: torch.device, seed: int) -> tuple[Arguments, Arguments]:
    """Arguments of a float32 embedding under bfloat16 results; and the same function's, of the rounded embedding."""
    ids, weight, gate_weight, lam, bos, _, eps = OPERATOR.make((2, 300, 64, 50, 12), torch.float32, device, seed)
    rounded = weight.detach().bfloat16().float().requires_grad_()
    return (ids, weight, gate_weight, lam, bos, torch.bfloat16, eps), (ids, rounded, gate_weight, lam, bos, None, eps)


@DEVICES
def test_float32_embedding_under_bfloat16(device: torch.device) -> None:
    """The result is that of the rounded embedding, and its gradient is float32, not rounded to bfloat16."""
    arguments, exact = mixed(device, 0)
    out, grad_weight, *_ = results(OPERATOR.op, arguments)
    assert out.dtype == torch.bfloat16 and grad_weight.dtype == torch.float32
    ids, weight, *rest = arguments
    check_equal("result", out, embed_op(ids, weight.detach().bfloat16(), *rest)[0])
    wanted, wanted_grad, *_ = results(OPERATOR.reference, in_float64(exact), rounded_to=[torch.bfloat16])
    assert (out.double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()
    torch.testing.assert_close(grad_weight.double(), wanted_grad, rtol=1e-5, atol=1e-5)
    assert not torch.equal(grad_weight, grad_weight.bfloat16().float())


def test_public_function_is_the_reference_on_the_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = OPERATOR.make(OPERATOR.typical, dtype, CPU, 0)
        check_equal(str(dtype), embed(*arguments), reference(*arguments))


def test_public_function_compiles_in_one_graph() -> None:
    arguments = mixed(CPU, 0)[0]
    compiled = torch.compile(embed, backend="aot_eager", fullgraph=True)
    check_equal("embed", compiled(*arguments), reference(*arguments))


def test_opcheck_with_a_rounded_embedding() -> None:
    torch.library.opcheck(embed_op, mixed(CPU, 0)[0])


IDS, WEIGHT, GATE, LAM = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 8), torch.zeros(1, 4), torch.zeros(1)


@pytest.mark.parametrize("function", [embed, embed_op])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS[0], WEIGHT, GATE, LAM, 1), "ids: expected shape [B, T], got [3]"),
        ((IDS.int(), WEIGHT, GATE, LAM, 1), "ids: expected int64, got torch.int32"),
        ((IDS, WEIGHT[0], GATE, LAM, 1), "weight: expected shape [V, D], neither zero, got [8]"),
        ((IDS, WEIGHT[:0], GATE, LAM, 1), "weight: expected shape [V, D], neither zero, got [0, 8]"),
        ((IDS, WEIGHT.half(), GATE, LAM, 1), "weight: expected one of bfloat16, float32, float64, got torch.float16"),
        ((IDS, WEIGHT, GATE[0], LAM, 1), "gate_weight: expected shape [1, W] with 1 <= W <= 8, got [4]"),
        ((IDS, WEIGHT, torch.zeros(1, 9), LAM, 1), "gate_weight: expected shape [1, W] with 1 <= W <= 8, got [1, 9]"),
        ((IDS, WEIGHT, GATE, LAM[0], 1), "lam: expected shape [1], got []"),
        ((IDS, WEIGHT, GATE.double(), LAM, 1), "gate_weight: expected torch.float32, got torch.float64"),
        ((IDS, WEIGHT, GATE, LAM.to("meta"), 1), "lam: expected a tensor on cpu as ids, got meta"),
        (
            (IDS, WEIGHT, GATE, LAM, 1, torch.half),
            "dtype: expected one of bfloat16, float32, float64, got torch.float16",
        ),
        (
            (IDS, WEIGHT.bfloat16(), GATE, LAM, 1, torch.float32),
            "weight: expected float32 or torch.float32 as dtype, got torch.bfloat16",
        ),
    ],
)
def test_arguments_are_checked(function, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^embed: {re.escape(message)}$"):
        function(*arguments)


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 13, 520])
def test_kernel_makes_rows_of_unknown_ids_nan(gpu: torch.device, dtype: torch.dtype, width: int) -> None:
    ids = draw_ids(2, 200, 20, torch.Generator().manual_seed(0))
    ids[0, 4:8] = torch.tensor([3, -1, 4, 5])
    ids[1, 99:102] = torch.tensor([6, 20, 1])
    ids[1, 198:] = torch.tensor([7, 10**12])
    weight, gate_weight, lam = torch.randn(20, width), torch.randn(1, 12), torch.tensor([0.5])
    arguments = [tensor.to(gpu) for tensor in (ids, weight.to(dtype), gate_weight, lam)]
    out = embed_op(*arguments, 1)[0].cpu()
    undefined = torch.zeros(2, 200, dtype=torch.bool)
    for row, position in ((0, 5), (0, 6), (1, 100), (1, 199)):
        undefined[row, position] = True
    check_equal("all of a row", out.isnan().all(-1), undefined)
    check_equal("any of a row", out.isnan().any(-1), undefined)
    grad_weight = gradients(*arguments, torch.ones(out.shape, dtype=dtype, device=gpu))[0].cpu()
    touched = torch.zeros(20, dtype=torch.bool)
    touched[[3, 4, 6, 7]] = True  # before an unknown id, and the one after it
    check_equal("gradient", grad_weight.isnan().all(-1), touched)
    check_equal("gradient", grad_weight.isnan().any(-1), touched)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [512, 40, 13])
def test_kernel_adds_up_one_id_everywhere(gpu: torch.device, dtype: torch.dtype, width: int) -> None:
    """5,000 positions of one id, then of two by turns: many warps' parts of one row."""
    for other in (7, 6):
        ids = torch.full((1, 5000), 7)
        ids[0, ::3] = other
        draw = torch.Generator().manual_seed(0)
        weight, grad = torch.randn(9, width, generator=draw), torch.randn(1, 5000, width, generator=draw)
        rest = (torch.randn(1, 12, generator=draw), torch.tensor([0.5]))
        ours = gradients(*(t.to(gpu) for t in (ids, weight.to(dtype), *rest, grad.to(dtype))))[0].cpu()
        leaf = weight.to(dtype).double().requires_grad_()
        out = reference(ids, leaf, *(t.double() for t in rest), eps=machine_epsilon(dtype))
        (exact,) = torch.autograd.grad(out, leaf, grad.to(dtype).double())
        check_accuracy(f"{width}, {other}", ours, exact.to(dtype), exact, factor=50 if dtype == torch.float32 else 2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 23, 24, 25, 95, 96, 97, 511, 512, 513, 1025])
def test_kernel_at_the_ends_of_its_pieces(gpu: torch.device, tokens: int) -> None:
    ids = torch.randint(0, 3, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    arguments = (ids, torch.randn(4, 64), torch.randn(1, 12), torch.tensor([0.3]))
    grad = torch.randn(1, tokens, 64)
    poison(gpu)
    on_gpu = gradients(*(t.to(gpu) for t in (*arguments, grad)))
    for got, wanted in zip(on_gpu, gradients(*arguments, grad), strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_kernel_sorts_many_ids(gpu: torch.device) -> None:
    vocab = 100_000
    ids = draw_ids(1, 5000, vocab, torch.Generator().manual_seed(0))
    arguments = (ids, torch.randn(vocab, 16), torch.randn(1, 12), torch.tensor([0.3]))
    grad = torch.randn(1, 5000, 16)
    on_gpu = gradients(*(t.to(gpu) for t in (*arguments, grad)))
    for got, wanted in zip(on_gpu, gradients(*arguments, grad), strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_public_function_runs_the_kernel(gpu: torch.device) -> None:
    arguments = OPERATOR.make(OPERATOR.typical, torch.bfloat16, gpu, 0)
    check_equal("embed", embed(*arguments), embed_op(*arguments)[0])
    assert "embed" in str(embed(*arguments).grad_fn)
