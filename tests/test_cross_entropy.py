"""Softcapped cross-entropy: what the registry's rows (tests/test_ops.py) do not say."""

import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pgolf.ops import _native
from pgolf.ops import cross_entropy as module
from pgolf.ops.cross_entropy import chunk_rows, cross_entropy, cross_entropy_op, reference, token_losses
from pgolf.testing import check_equal, results

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture(params=["generic", "sm90"])
def gpu(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The first GPU, running each build of the kernels that it can; skips where there is none."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    if request.param == "sm90" and _native.build_of(CUDA) != "sm90":
        pytest.skip("needs an sm_90 GPU and kernels built for it")
    with _native.forced(request.param):
        yield CUDA
    torch.cuda.empty_cache()


def inputs(device: torch.device, rows: int = 300, dim: int = 64, vocab: int = 264, scale: float = 6.0) -> list[Tensor]:
    """h, weight (bfloat16) and targets; logits have a standard deviation of about `scale`."""
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(rows, dim, generator=draw).to(device, torch.bfloat16)
    weight = (torch.randn(vocab, dim, generator=draw) * scale / dim**0.5).to(device, torch.bfloat16)
    return [h, weight, torch.randint(vocab, (rows,), generator=draw).to(device)]


def with_gradients(h: Tensor, weight: Tensor, targets: Tensor, cap: float = 30.0) -> list[Tensor]:
    """The loss and the gradients of h and weight."""
    return results(cross_entropy, (h.requires_grad_(), weight.requires_grad_(), targets, cap))


# --- CPU --------------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    h, weight = torch.tensor([[[3.0, -2.0]]]), torch.eye(2)  # the logits are 3 and -2
    above, below = 2 * math.tanh(1.5), 5 * math.tanh(-0.4)
    loss = math.log(math.exp(above) + math.exp(below)) - below
    found = token_losses(h, weight, torch.tensor([[1]]), 2.0, torch.tensor(5.0))
    torch.testing.assert_close(found, torch.tensor([[loss]]))
    below = 2 * math.tanh(-1.0)
    losses = [math.log(math.exp(above) + math.exp(below)) - z for z in (above, below)]
    both = h.expand(2, 1, 2), weight, torch.tensor([[0], [1]])
    torch.testing.assert_close(cross_entropy(*both, cap=2.0), torch.tensor(sum(losses) / 2))
    torch.testing.assert_close(cross_entropy(*both, cap=2.0, reduction="sum"), torch.tensor(sum(losses)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_operator_is_the_reference(reduction: str) -> None:
    h, weight, targets = inputs(CPU, rows=6)
    arguments = (h.double().view(2, 3, -1).requires_grad_(), weight.double().requires_grad_(), targets.view(2, 3), 9.0)
    found = results(lambda *a: cross_entropy_op(*a, reduction)[0], arguments)
    for actual, expected in zip(found, results(lambda *a: reference(*a, reduction), arguments), strict=True):
        torch.testing.assert_close(actual, expected)


def test_only_the_loss_is_differentiable() -> None:
    h, weight, targets = inputs(CPU)
    loss, *rest = cross_entropy_op(h.requires_grad_(), weight, targets, 30.0)
    assert loss.requires_grad and not any(tensor.requires_grad for tensor in rest)
    assert not token_losses(h, weight, targets, 30.0, 30.0).requires_grad


def check_frozen_weight(device: torch.device, function: Callable[..., Tensor]) -> None:
    """A weight that needs no gradient: none is made, and h's stays the same."""
    h, weight, targets = inputs(device)
    grad_h, _ = torch.autograd.grad(function(h.requires_grad_(), weight.requires_grad_(), targets), (h, weight))
    loss = function(h, weight.detach(), targets)
    check_equal("gradient of h", torch.autograd.grad(loss, h)[0], grad_h)
    assert cross_entropy_op(h, weight.detach(), targets, 30.0, "mean", False)[3].shape == (0, h.shape[1])


def test_frozen_weight() -> None:
    def by_operator(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy_op(h, weight, targets, 30.0, "mean", weight.requires_grad)[0]

    check_frozen_weight(CPU, by_operator)
    torch.library.opcheck(cross_entropy_op, (*inputs(CPU, rows=5), 30.0, "mean", False))


def test_target_out_of_range_is_an_error() -> None:
    h, weight, targets = inputs(CPU)
    targets[7] = len(weight)
    for function in (cross_entropy, cross_entropy_op):
        with pytest.raises(IndexError, match="out of bounds"):
            function(h, weight, targets, 30.0)


def check_compiles_in_one_graph(device: torch.device) -> None:
    def both(h: Tensor, master: Tensor, targets: Tensor) -> Tensor:
        weight = master.to(h.dtype)
        return cross_entropy(h * 2, weight, targets) + token_losses(h, weight, targets, 30.0, 20.0).sum()

    h, weight, targets = inputs(device)
    arguments = (h.requires_grad_(), weight.float().requires_grad_(), targets)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(results(compiled, arguments), results(both, arguments), strict=True):
        torch.testing.assert_close(actual, expected)


def test_public_functions_compile_in_one_graph() -> None:
    check_compiles_in_one_graph(CPU)


def test_chunks_are_few_equal_and_within_the_limit() -> None:
    assert chunk_rows(98304, 8192) == 32768
    assert chunk_rows(1000, 8192) == 1000 and chunk_rows(1, 8) == 1
    for rows in (32769, 50000, 98305):
        chunk = chunk_rows(rows, 8192)
        assert chunk % 128 == 0 and 2 * 8192 * chunk <= module.CHUNK_BYTES
        assert -(-rows // chunk) == -(-rows // 32768)


H, WEIGHT, TARGETS = torch.zeros(2, 3, 8), torch.zeros(16, 8), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((H[0, 0], WEIGHT, TARGETS), "h: expected shape [..., D], got [8]"),
        ((H.half(), WEIGHT, TARGETS), "h: expected one of bfloat16, float32, float64, got torch.float16"),
        ((H, WEIGHT.mT, TARGETS), "weight: expected shape [V, 8], got [8, 16]"),
        ((H, WEIGHT[:0], TARGETS), "weight: expected shape [V, 8], got [0, 8]"),
        ((H, WEIGHT.bfloat16(), TARGETS), "weight: expected torch.float32 as h, got torch.bfloat16"),
        ((H, WEIGHT, TARGETS[0]), "targets: expected shape [2, 3], got [3]"),
        ((H, WEIGHT, TARGETS.int()), "targets: expected int64, got torch.int32"),
        ((H, WEIGHT.to("meta"), TARGETS), "weight: expected a tensor on cpu as h, got meta"),
    ],
)
def test_arguments_are_checked(arguments: tuple, message: str) -> None:
    for function in (cross_entropy, cross_entropy_op):
        with pytest.raises(ValueError, match=f"^cross_entropy: {re.escape(message)}$"):
            function(*arguments, 30.0)
    with pytest.raises(ValueError, match=f"^token_losses: {re.escape(message)}$"):
        token_losses(*arguments, 30.0, 30.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy(H, WEIGHT, TARGETS, 0.0), "cross_entropy: cap: expected a positive number, got 0.0"),
        (
            lambda: cross_entropy(H, WEIGHT, TARGETS, reduction="none"),
            "cross_entropy: reduction: expected mean or sum, got none",
        ),
        (
            lambda: token_losses(H, WEIGHT, TARGETS, 1.0, -1.0),
            "token_losses: cap_neg: expected a positive number, got -1.0",
        ),
        (
            lambda: token_losses(H, WEIGHT, TARGETS, torch.ones(2), 1.0),
            "token_losses: cap_pos: expected one element, got [2]",
        ),
    ],
)
def test_options_are_checked(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def assert_nan_stays_in_its_row(device: torch.device) -> None:
    h, weight, targets = inputs(device)
    h[130, 5] = float("nan")
    lost = torch.arange(300, device=device) == 130
    check_equal("rows", token_losses(h, weight, targets, 30.0, 20.0).isnan(), lost)
    loss, grad_h, grad_weight = with_gradients(h, weight, targets)
    assert loss.isnan() and grad_weight.isnan().all()
    check_equal("gradients", grad_h.isnan(), lost[:, None].expand_as(grad_h))


def test_nan_stays_in_its_row() -> None:
    assert_nan_stays_in_its_row(CPU)


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_kernel_keeps_nan_in_its_row(gpu: torch.device) -> None:
    assert_nan_stays_in_its_row(gpu)


@pytest.mark.gpu
def test_kernels_compile_in_one_graph(gpu: torch.device) -> None:
    check_compiles_in_one_graph(gpu)


@pytest.mark.gpu
def test_public_function_runs_the_kernel(gpu: torch.device) -> None:
    h, weight, targets = inputs(gpu)
    assert "cross_entropy" in str(cross_entropy(h.requires_grad_(), weight, targets).grad_fn)
    # A larger cap, or a vocabulary that is no multiple of 8, is PyTorch's.
    assert "NllLoss" in str(cross_entropy(h, weight, targets, module.MAX_CAP + 1).grad_fn)
    assert "NllLoss" in str(cross_entropy(h, weight[:-1], targets.clamp(max=262)).grad_fn)


@pytest.mark.gpu
def test_kernel_says_what_it_does_not_take(gpu: torch.device) -> None:
    h, weight, targets = inputs(gpu)
    for arguments, message in (
        ((h.float(), weight.float(), targets, 30.0), "h: expected bfloat16 on CUDA, got torch.float32"),
        ((h, weight[:-1], targets, 30.0), "weight: expected V a multiple of 8, got [263, 64]"),
        ((h, weight, targets, 65.0), "cap: expected at most 64.0, got 65.0"),
        ((h[:0], weight, targets[:0], 30.0), "targets: expected at least one token, got [0]"),
    ):
        with pytest.raises(ValueError, match=f"^cross_entropy: {re.escape(message)}$"):
            cross_entropy_op(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [-1, -(2**40), 264, 271, 383, 384, 2**32 + 1])
def test_kernel_survives_a_bad_target(gpu: torch.device, bad: int) -> None:
    h, weight, targets = inputs(gpu)
    whole = token_losses(h, weight, targets, 30.0, 20.0)
    targets[77] = bad
    losses = token_losses(h, weight, targets, 30.0, 20.0)
    assert losses[77].isnan()
    losses[77] = whole[77]
    check_equal("the other rows", losses, whole)
    loss, grad_h, grad_weight = with_gradients(h, weight, targets)
    assert loss.isnan() and grad_weight.isnan().all() and grad_h[77].isnan().all()
    assert grad_h[:77].isfinite().all() and grad_h[78:].isfinite().all()


@pytest.mark.gpu
def test_kernel_is_accurate_for_certain_targets(gpu: torch.device) -> None:
    """Losses from 1e-18 to 50 nats, each to many digits: nothing is lost in 1 - p, nor in log(p)."""
    gap = torch.linspace(-25, 25, 128)
    h, weight = torch.zeros(128, 16), torch.zeros(256, 16)
    h[:, 0], weight[:, 0], weight[3, 0] = gap, -1, 1  # the target's logit is the gap, all others its negative
    h, weight = h.to(gpu, torch.bfloat16), weight.to(gpu, torch.bfloat16)
    targets = torch.full((128,), 3, device=gpu)
    losses = token_losses(h, weight, targets, 60.0, 60.0)
    z = 60 * torch.tanh(h[:, 0].double() / 60)
    expected = torch.nn.functional.softplus(math.log(255) - 2 * z, threshold=1000)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=0.0)
    # The gradient of h[:, 0] is -2 (1 - p) slope, with p the target's probability.
    found = with_gradients(h, weight, targets, 60.0)[1][:, 0].double()
    exact = -torch.expm1(-expected) * (1 - (z / 60) ** 2)
    torch.testing.assert_close(found / found[0], exact / exact[0], rtol=0.03, atol=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [0.5, 30.0, 64.0])
def test_kernel_on_saturated_logits(gpu: torch.device, cap: float) -> None:
    h, weight, targets = inputs(gpu, scale=1e4)
    h, weight = h * 1e4, weight * 1e4
    expected = reference(h, weight, targets, cap, "none")
    torch.testing.assert_close(token_losses(h, weight, targets, cap, cap), expected, rtol=1e-5, atol=1e-5)
    loss, grad_h, grad_weight = with_gradients(h, weight, targets, cap)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=1e-5)
    assert grad_h.isfinite().all() and grad_weight.isfinite().all()


@pytest.mark.gpu
def test_chunks_change_nothing(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight, targets = inputs(gpu)
    whole = with_gradients(h, weight, targets)
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 264 * 128)
    assert chunk_rows(300, 264) == 128
    loss, grad_h, grad_weight = with_gradients(h, weight, targets)
    check_equal("loss", loss, whole[0])
    torch.testing.assert_close(grad_h, whole[1], rtol=2**-7, atol=2**-7 * whole[1].abs().max().item())
    torch.testing.assert_close(grad_weight, whole[2], rtol=2**-7, atol=2**-7 * whole[2].abs().max().item())


@pytest.mark.gpu
def test_memory_stays_below_half_of_the_logits(gpu: torch.device) -> None:
    rows, vocab = 98304, 8192
    h, weight, targets = inputs(gpu, rows, 512, vocab)
    h.requires_grad_(), weight.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cross_entropy(h, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < rows * vocab * 4 / 2


@pytest.mark.gpu
def test_kernels_leave_a_frozen_weight_out(gpu: torch.device) -> None:
    check_frozen_weight(gpu, cross_entropy)


@pytest.mark.gpu
def test_no_gradient_costs_no_gradient(gpu: torch.device) -> None:
    h, weight, targets = inputs(gpu)
    expected = with_gradients(h, weight, targets)[0]
    with torch.no_grad():
        loss = cross_entropy(h, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
