"""AdamW's step beside torch's optimizer, value by value, and inside a CUDA graph that counts for itself."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf.ops import _native
from pgolf.ops.adamw import adamw, adamw_op, reference
from pgolf.testing import check_equal, graphed

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
NUMBERS: dict[str, float] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-10, "weight_decay": 0.5}
TYPES = pytest.mark.parametrize("grad_type", [torch.float32, torch.bfloat16])
BETAS = pytest.mark.parametrize("beta1", [0.0, 0.9])


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; skips where there is none with kernels built for it."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return CUDA


class State:
    """Weights at their start and what a step takes beside them."""

    def __init__(self, size: int, device: torch.device, beta1: float, copy_type: torch.dtype | None) -> None:
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.randn(size, generator=draw).to(device)
        self.weight[size // 2 :] = 0  # as an adapter's B is
        self.mean = torch.zeros_like(self.weight) if beta1 else None
        self.square = torch.zeros_like(self.weight)
        self.copy = None if copy_type is None else torch.full_like(self.weight, torch.nan, dtype=copy_type)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.numbers = NUMBERS | {"beta1": beta1}

    def step(self, grad: Tensor, function: Callable[..., None] = adamw) -> None:
        self.count.add_(1)
        function(self.weight, self.mean, self.square, grad, self.copy, self.count, **self.numbers)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.weight, self.mean, self.square, self.copy) if t is not None]


def gradients(size: int, device: torch.device, grad_type: torch.dtype, steps: int = 5) -> list[Tensor]:
    """Of several steps; every eighth value has none at all, as a document that is finished."""
    draw = torch.Generator().manual_seed(1)
    grads = 1e-3 * torch.randn(steps, size, generator=draw)
    grads[:, ::8] = 0
    return list(grads.to(device, grad_type))


def check_against_torch(device: torch.device, beta1: float, grad_type: torch.dtype, size: int) -> None:
    """As far from torch.optim.AdamW in float64 as a few roundings to float32 a step may lead."""
    state = State(size, device, beta1, torch.bfloat16)
    theirs = state.weight.double().requires_grad_()
    optimizer = torch.optim.AdamW(
        [theirs], lr=NUMBERS["lr"], betas=(beta1, NUMBERS["beta2"]), eps=NUMBERS["eps"], weight_decay=0.5
    )
    for grad in gradients(size, device, grad_type):
        theirs.grad = grad.double()
        optimizer.step()
        before = grad.clone()
        state.step(grad)
        check_equal("gradient", grad, before)
    expected = optimizer.state[theirs]
    assert state.count.item() == expected["step"].item() == 5
    # A rounding of a weight is 2^-24 of it and one of a step 2^-24 of lr; there are a few of either in each step.
    limit = 5 * 2**-22 * (theirs.detach().abs() + NUMBERS["lr"])
    assert ((state.weight.double() - theirs).abs() <= limit).all()
    torch.testing.assert_close(state.square.double(), expected["exp_avg_sq"], rtol=5 * 2**-22, atol=0)
    if state.mean is not None:  # a sum of either sign: as exact as its terms, of about 1e-3, are
        torch.testing.assert_close(state.mean.double(), expected["exp_avg"], rtol=0, atol=5 * 2**-22 * 4e-3)
    assert state.copy is not None
    check_equal("copy", state.copy, state.weight.bfloat16())
    places = torch.arange(size, device=device)
    assert not state.weight[(places >= size // 2) & (places % 8 == 0)].any()  # zeros without a gradient


@BETAS
@TYPES
def test_as_torch(beta1: float, grad_type: torch.dtype) -> None:
    check_against_torch(CPU, beta1, grad_type, 1000)


def check_by_hand(device: torch.device) -> None:
    """A first step goes lr against the gradient's sign, whatever its size; without a gradient the weight decays."""
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0], device=device)
    grad = torch.tensor([4.0, -0.25, 0.0, 1e-3, float("nan")], device=device)
    square, copy = torch.zeros_like(weight), torch.empty_like(weight, dtype=torch.bfloat16)
    count = torch.ones((), dtype=torch.int64, device=device)
    adamw(weight, None, square, grad, copy, count, lr=0.125, beta1=0.0, beta2=0.75, eps=1e-30, weight_decay=0.5)
    expected = torch.tensor([0.9375 - 0.125, 0.9375 + 0.125, 0.9375, -0.125, torch.nan])
    torch.testing.assert_close(weight.cpu(), expected, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(
        square.cpu(), torch.tensor([4.0, 2**-6, 0, 2.5e-7, torch.nan]), rtol=1e-6, atol=0, equal_nan=True
    )
    check_equal("copy", copy, weight.bfloat16())
    # The second step's corrections: of square by 1 - 0.75^2, of mean by 1 - 0.5^2.
    mean, square, weight, grad = (torch.tensor([x], device=device) for x in (0.5, 0.25, 1.0, 2.0))
    adamw(weight, mean, square, grad, None, count + 1, lr=0.1, beta1=0.5, beta2=0.75, eps=0.0, weight_decay=0.0)
    step = 0.1 * (1.25 / 0.75) / (1.1875 / 0.4375) ** 0.5
    for tensor, value in ((mean, 1.25), (square, 1.1875), (weight, 1 - step)):
        torch.testing.assert_close(tensor.cpu(), torch.tensor([value]))


def test_by_hand() -> None:
    check_by_hand(CPU)


def check_nonfinite_stays(device: torch.device, value: float, beta1: float) -> None:
    """In a weight, a moment or a gradient, in its own element."""
    clean = State(1000, device, beta1, torch.bfloat16)
    (grad,) = gradients(1000, device, torch.bfloat16, steps=1)
    clean.step(grad)
    for place in ("weight", "mean", "square", "grad"):
        if place == "mean" and not beta1:
            continue
        dirty, given = State(1000, device, beta1, torch.bfloat16), grad.clone()
        (given if place == "grad" else getattr(dirty, place))[7] = value
        dirty.step(given)
        assert place == "square" or not dirty.weight[7].isfinite()
        for ours, wanted in zip(dirty.tensors(), clean.tensors(), strict=True):
            ours[7] = wanted[7]
            check_equal(f"{value} in {place}", ours, wanted)


@BETAS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_stays_in_its_element(value: float, beta1: float) -> None:
    check_nonfinite_stays(CPU, value, beta1)


F, N = torch.zeros(4), torch.ones((), dtype=torch.int64)
GOOD: dict[str, Any] = {"weight": F, "mean": F, "square": F, "grad": F, "copy": F, "count": N} | NUMBERS


@pytest.mark.parametrize("function", [adamw, adamw_op])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": F.view(2, 2)}, "weight: expected shape [n], got [2, 2]"),
        ({"weight": F.double()}, "weight: expected float32, got torch.float64"),
        ({"weight": torch.zeros(8)[::2]}, "weight: expected a contiguous tensor, got stride [2]"),
        ({"mean": F.bfloat16()}, "mean: expected float32, got torch.bfloat16"),
        ({"mean": None}, "mean: expected None where beta1 is 0, else a tensor, got None"),
        ({"beta1": 0.0}, "mean: expected None where beta1 is 0, else a tensor, got a tensor"),
        ({"square": F[:3]}, "square: expected shape [4] as weight, got [3]"),
        ({"grad": F.half()}, "grad: expected float32 or bfloat16, got torch.float16"),
        ({"grad": F.to("meta")}, "grad: expected a tensor on cpu as weight, got meta"),
        ({"copy": F.double()}, "copy: expected float32 or bfloat16, got torch.float64"),
        ({"count": N.view(1)}, "count: expected shape [], got [1]"),
        ({"count": N.int()}, "count: expected torch.int64, got torch.int32"),
        ({"count": N.to("meta")}, "count: expected a tensor on cpu as weight, got meta"),
        ({"beta1": 1.0}, "beta1: expected a number in [0, 1), got 1.0"),
        ({"beta2": -0.5}, "beta2: expected a number in [0, 1), got -0.5"),
    ],
)
def test_arguments_are_checked(function: Callable[..., None], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'adamw: {message}')}$"):
        function(**GOOD | changed)


def check_operator(device: torch.device) -> None:
    """With and without what may be absent, and without values."""
    for size in (0, 7):
        for beta1, copy_type in ((0.9, None), (0.0, torch.float32), (0.0, torch.bfloat16)):
            state = State(size, device, beta1, copy_type)
            state.step(state.weight.bfloat16())
            tensors = (state.weight, state.mean, state.square, state.square.bfloat16(), state.copy, state.count)
            torch.library.opcheck(adamw_op, tensors, dict(state.numbers))


def test_operator_is_registered_right() -> None:
    check_operator(CPU)


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@BETAS
@TYPES
@pytest.mark.parametrize("size", [1, 1000, 1_000_003])
def test_kernel_as_torch(gpu: torch.device, beta1: float, grad_type: torch.dtype, size: int) -> None:
    check_against_torch(gpu, beta1, grad_type, size)


@pytest.mark.gpu
def test_kernel_by_hand(gpu: torch.device) -> None:
    check_by_hand(gpu)


@pytest.mark.gpu
@BETAS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_kernel_keeps_nonfinite_in_its_element(gpu: torch.device, value: float, beta1: float) -> None:
    check_nonfinite_stays(gpu, value, beta1)


@pytest.mark.gpu
def test_kernel_passes_opcheck(gpu: torch.device) -> None:
    check_operator(gpu)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "beta1, moved",
    [*itertools.product((0.0, 0.9), ("weight", "square", "copy", "all")), (0.9, "mean")],  # beta1 0: no mean
)
def test_kernel_takes_any_address_and_writes_nothing_beyond(gpu: torch.device, beta1: float, moved: str) -> None:
    """Tensors that do not start at a multiple of 16 bytes, with values before and after them: the same bits."""
    size = 4099
    (grad,) = gradients(size, gpu, torch.bfloat16, steps=1)
    plain, other = (State(size, gpu, beta1, torch.bfloat16) for _ in range(2))
    rooms = {}
    for name in ("weight", "mean", "square", "copy"):
        tensor = getattr(other, name)
        if tensor is not None and moved in (name, "all"):
            rooms[name] = torch.full((size + 9,), 3.0, dtype=tensor.dtype, device=gpu)
            setattr(other, name, rooms[name][1 : size + 1].copy_(tensor))
    plain.step(grad)
    other.step(grad)
    for ours, wanted in zip(other.tensors(), plain.tensors(), strict=True):
        check_equal(moved, ours, wanted)
    for name, room in rooms.items():
        assert room[0] == 3 and (room[size + 1 :] == 3).all(), name


@pytest.mark.gpu
@BETAS
def test_a_graph_counts_for_itself(gpu: torch.device, beta1: float) -> None:
    """A captured step that adds to the count, replayed: as that many steps."""
    grads = gradients(4099, gpu, torch.bfloat16)
    eager, captured = (State(4099, gpu, beta1, torch.bfloat16) for _ in range(2))
    grad = grads[0].clone()
    replay = graphed(lambda: captured.step(grad))
    fresh = State(4099, gpu, beta1, torch.bfloat16)
    for mine, start in zip((*captured.tensors(), captured.count), (*fresh.tensors(), fresh.count), strict=True):
        mine.copy_(start)
    for new in grads:
        eager.step(new)
        grad.copy_(new)
        replay()
    assert captured.count.item() == 5
    for ours, wanted in zip(captured.tensors(), eager.tensors(), strict=True):
        check_equal("after 5 steps", ours, wanted)


@pytest.mark.gpu
def test_public_function_runs_the_kernel(gpu: torch.device) -> None:
    """Not the reference, whose temporaries would show."""
    state = State(1 << 20, gpu, 0.0, torch.bfloat16)
    (grad,) = gradients(1 << 20, gpu, torch.bfloat16, steps=1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    state.step(grad)
    assert torch.cuda.max_memory_allocated() == before
    state.step(grad, reference)
    assert torch.cuda.max_memory_allocated() > before
