"""Muon's direction: by hand, what stays apart, and the kernels against PyTorch."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf.ops import _native
from pgolf.ops.polar_express import POLAR_EXPRESS, polar_express, polar_express_op, reference
from pgolf.optim import muon_update
from pgolf.testing import check_equal, errors

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
SHAPES = [(1, 8, 8), (3, 136, 72), (2, 264, 520), (2, 512, 512), (2, 256, 512), (1, 2048, 512), (1, 512, 2048)]
BUILDS = pytest.mark.parametrize("build", ["generic", "sm90"])


@pytest.fixture
def build() -> str:
    """The build whose kernels run, unless the test is parametrized over both."""
    return "generic"


@pytest.fixture
def gpu(build: str) -> Iterator[torch.device]:
    """The first GPU, running the kernels of `build`; skips where there is none that can."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    if build == "sm90" and _native.build_of(CUDA) != "sm90":
        pytest.skip("needs an sm_90 GPU and kernels built for it")
    with _native.forced(build):
        yield CUDA


def draw(shape: tuple[int, int, int], device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float32 gradient and a bfloat16 momentum."""
    generator = torch.Generator().manual_seed(seed)
    grad, momentum = (torch.randn(shape, generator=generator) for _ in range(2))
    return grad.to(device), momentum.bfloat16().to(device)


def in_pairs(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Matrices with two values a row, pairs of rows sharing their columns, anywhere: products stay sums of two terms.

    All that the iteration computes from them is nearly independent of the order of summation, so that another
    implementation gives the same bits, but for a sum now and then of terms too far apart for float32.
    """
    batch, rows, cols = shape
    side = min(rows, cols) // 2 * 2
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.zeros(shape)
    for matrix in matrices:
        row = torch.randperm(rows, generator=generator)[:side].view(-1, 2)
        column = torch.randperm(cols, generator=generator)[:side].view(-1, 2)
        values = torch.randn(len(row), 2, 2, generator=generator)
        matrix[row[:, :, None], column[:, None, :]] = values
    return matrices


def rounded_step_by_step(grad: Tensor) -> Tensor:
    """The direction for no momentum and mu = 0.5, every product exact in float32, every operation rounded after it."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.float() @ b.float()).bfloat16()

    u = grad.bfloat16() * 1.5
    norm = u.double().norm(dim=-1, keepdim=True).bfloat16().clamp_min(1e-7)
    x = u / norm
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.double().norm(dim=(-2, -1), keepdim=True).bfloat16() + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = product(x, x.mT)
        polynomial = b * gram + c * product(gram, gram)
        x = a * x + product(polynomial, x)
    return x.mT if tall else x


def check_pairs(shape: tuple[int, int, int], device: torch.device) -> None:
    grad = in_pairs(shape)
    momentum = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    actual = polar_express_op(grad.to(device), momentum, 0.5).cpu()
    expected = rounded_step_by_step(grad)
    assert not actual[grad == 0].any(), "a zero that is none"
    differ = int((actual != expected).sum())
    assert differ <= 0.02 * int((grad != 0).sum()), f"{differ} of {int((grad != 0).sum())} values differ"


def check_kept_apart(value: float, device: torch.device) -> None:
    """Of three matrices the second holds `value`."""
    grad, momentum = draw((3, 136, 72), device)
    clean = polar_express_op(grad, momentum.clone(), 0.9)
    grad[1, 100, 3] = value
    dirty = polar_express_op(grad, momentum, 0.9)
    assert not dirty[1].isfinite().any()
    check_equal("the others", dirty[::2], clean[::2])


# --- CPU --------------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """A diagonal matrix: the rows' norms make all its singular values alike, and so they stay."""
    grad = torch.diag(torch.tensor([3.0, -5.0, 7.0, 1.0]))[None]
    momentum = torch.eye(4, dtype=torch.bfloat16)[None].contiguous()
    direction = polar_express(grad, momentum, 0.5)
    check_equal("momentum", momentum, torch.diag(torch.tensor([3.5, -4.5, 7.5, 1.5])).bfloat16()[None])
    values = direction[0].diagonal().float()
    assert torch.equal(values, values[0] * torch.tensor([1.0, -1.0, 1.0, 1.0])) and 0.6 < values[0] < 1.4
    assert direction.count_nonzero() == 4


@pytest.mark.parametrize("shape", [(2, 32, 32), (2, 24, 56), (1, 130, 10)])
def test_reference_rounds_every_operation(shape: tuple[int, int, int]) -> None:
    check_pairs(shape, CPU)


def test_zero_gives_zero() -> None:
    zero = torch.zeros(2, 8, 16)
    assert not polar_express(zero, zero.bfloat16(), 0.9).any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nonfinite_stays_in_its_matrix(value: float) -> None:
    check_kept_apart(value, CPU)


GRAD, MOMENTUM = torch.zeros(2, 8, 16), torch.zeros(2, 8, 16, dtype=torch.bfloat16)


@pytest.mark.parametrize("function", [polar_express, polar_express_op])
@pytest.mark.parametrize(
    ("grad", "momentum", "message"),
    [
        (GRAD[0], MOMENTUM, "grad: expected shape [n, rows, cols], got [8, 16]"),
        (GRAD.half(), MOMENTUM, "grad: expected one of bfloat16, float32, got torch.float16"),
        (GRAD, MOMENTUM[:1], "momentum: expected shape [2, 8, 16] as grad, got [1, 8, 16]"),
        (GRAD, MOMENTUM.float(), "momentum: expected torch.bfloat16, got torch.float32"),
        (GRAD, MOMENTUM.to("meta"), "momentum: expected a tensor on cpu as grad, got meta"),
        (GRAD.mT, MOMENTUM.mT, "momentum: expected a contiguous tensor, got strides [128, 1, 16]"),
    ],
)
def test_arguments_are_checked(function, grad: Tensor, momentum: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'polar_express: {message}')}$"):
        function(grad, momentum, 0.9)


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@BUILDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 8, 4096)])
def test_momentum_has_the_bits_of_pytorch(gpu: torch.device, build: str, shape: tuple, dtype: torch.dtype) -> None:
    grad, momentum = draw(shape, gpu)
    expected = momentum.clone()
    for mu in (0.92, 0.97):
        polar_express_op(grad.to(dtype), momentum, mu)
        reference(grad.to(dtype), expected, mu)
        check_equal("momentum", momentum, expected)


@pytest.mark.gpu
@BUILDS
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_round_every_operation(gpu: torch.device, build: str, shape: tuple[int, int, int]) -> None:
    check_pairs(shape, gpu)


@pytest.mark.gpu
@BUILDS
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_near_one(gpu: torch.device, build: str, shape: tuple[int, int, int]) -> None:
    grad, momentum = draw(shape, gpu)
    if shape[1] == shape[2]:
        grad += 8 * shape[1] ** 0.5 * torch.eye(shape[1], device=gpu)  # a random square matrix is nearly singular
    singular = torch.linalg.svdvals(polar_express_op(grad, momentum * 0, 0.9).float())
    assert singular.min() > 0.6 and singular.max() < 1.4, (singular.min(), singular.max())


@pytest.mark.gpu
@pytest.mark.parametrize("build", ["sm90"])
@pytest.mark.parametrize("shape", SHAPES)
def test_builds_agree(gpu: torch.device, build: str, shape: tuple[int, int, int]) -> None:
    """As near to each other as PyTorch is to float64: the iteration amplifies every rounding."""
    grad, momentum = draw(shape, gpu)
    direction = polar_express_op(grad, momentum.clone(), 0.9)
    with _native.forced("generic"):
        other = polar_express_op(grad, momentum.clone(), 0.9)
    exact = reference(grad.double(), momentum.double(), 0.9)
    error = errors(reference(grad, momentum.clone(), 0.9), exact)[1]
    assert errors(direction, other.double())[1] <= 2 * error


@pytest.mark.gpu
@BUILDS
def test_kernels_give_zero_for_zero(gpu: torch.device, build: str) -> None:
    for shape in SHAPES:
        zero = torch.zeros(shape, device=gpu)
        assert not polar_express_op(zero, zero.bfloat16(), 0.9).any()  # a NaN is not zero either


@pytest.mark.gpu
@BUILDS
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_kernels_keep_matrices_apart(gpu: torch.device, build: str, value: float) -> None:
    check_kept_apart(value, gpu)


@pytest.mark.gpu
def test_other_shapes_run_pytorch(gpu: torch.device) -> None:
    for shape in ((2, 12, 20), (1, 8, 4104), (0, 8, 8)):
        grad, momentum = draw(shape, gpu)
        expected = momentum.clone()
        check_equal("direction", polar_express_op(grad, momentum, 0.9), reference(grad, expected, 0.9).contiguous())
        check_equal("momentum", momentum, expected)


@pytest.mark.gpu
@pytest.mark.golden
@BUILDS
def test_golden_muon_on_a_gpu(gpu: torch.device, build: str, golden) -> None:
    z = np.load(golden("muon.npz"), allow_pickle=False)
    lr, mu, decay = (float(z[key]) for key in ("lr", "momentum", "weight_decay"))
    names = sorted(key.removesuffix(".init") for key in z if key.endswith(".init"))
    assert names
    for name in names:
        weight = torch.from_numpy(z[f"{name}.init"].copy()).to(gpu)
        momentum = torch.zeros_like(weight, dtype=torch.bfloat16)
        steps = sum(key.startswith(f"{name}.grad") for key in z)
        for step in range(steps):
            before = weight.clone()
            previous = z[f"{name}.init"] if step == 0 else z[f"{name}.step{step - 1}"]
            muon_update(weight, torch.from_numpy(z[f"{name}.grad{step}"]).to(gpu), momentum, lr, mu, decay)
            expected = torch.from_numpy(z[f"{name}.step{step}"] - previous)
            change = (weight - before).cpu()
            assert (change - expected).norm() <= 2e-2 * expected.norm(), (name, step)
