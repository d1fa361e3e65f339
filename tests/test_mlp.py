"""The fused MLP: values by hand, what it keeps, what it rejects, and its kernels' tiles."""

import re

import pytest
import torch
import torch.nn.functional as F

from pgolf.ops import _native
from pgolf.ops.mlp import mlp, mlp_grad_op, mlp_op, mlp_up_op, pack_signs, reference, unpack_signs
from pgolf.testing import check_equal, poison

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
BUILDS = pytest.mark.parametrize("build", ["generic", "sm90"])


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; skips where there is none with kernels built for it."""
    if not torch.cuda.is_available() or _native.why_not(CUDA):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return CUDA


def need_build(build: str) -> None:
    if build == "sm90" and _native.build_of(CUDA) != "sm90":
        pytest.skip("needs an sm_90 GPU and kernels built for it")


def weights(dim: int, features: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> list:
    """up [F, D] and down [D, F]."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((features, dim), (dim, features))
    return [(torch.randn(shape, generator=draw) / shape[1] ** 0.5).to(device, dtype) for shape in shapes]


def by_hand(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x [1, 8] and up [128, 8] in bfloat16 with x up^T = 3, -2, 0, NaN, 1 + 2^-8, -1 and then zeros."""
    x = torch.zeros(1, 8)
    x[0, 0], x[0, 1] = 1, 2**-4
    up = torch.zeros(128, 8)
    up[:6, 0] = torch.tensor([3, -2, 0, float("nan"), 1, -1])
    up[4, 1] = 2**-4
    up[7, 0] = -0.0
    return x.to(device, torch.bfloat16), up.to(device, torch.bfloat16)


def check_by_hand(device: torch.device) -> None:
    hidden, signs = mlp_up_op(*by_hand(device))
    expected = torch.zeros(1, 128)
    # (1 + 2^-8)^2 is nearest to 1 + 2^-7; had x up^T been rounded first, to 1, it would be 1.
    expected[0, :6] = torch.tensor([9, 1, 0, float("nan"), 1 + 2**-7, 0.25])
    check_equal("hidden", hidden.cpu(), expected.bfloat16())
    assert signs.cpu().tolist() == [[[0b10] + 7 * [0] + [0b10] + 7 * [0]]]  # features 1 and 5: words 0 and 2
    down_t = torch.zeros(128, 8, device=device, dtype=torch.bfloat16)
    down_t[:, 0] = 1
    grad = torch.zeros(1, 8, device=device, dtype=torch.bfloat16)
    grad[0, 0] = 2
    grad_pre = mlp_grad_op(grad, down_t, hidden, signs)
    slopes = torch.zeros(1, 128)
    slopes[0, :6] = 2 * torch.tensor([6, -1, 0, float("nan"), 2 * (1 + 2**-7) ** 0.5, -0.5])
    check_equal("grad_pre", grad_pre.cpu(), slopes.bfloat16())


def check_rows_apart(device: torch.device) -> None:
    """A NaN in one row of the input reaches that row alone; rows and features lie in several tiles."""
    up, down = weights(64, 256, torch.bfloat16, device)
    x = torch.ones(300, 64, device=device, dtype=torch.bfloat16)
    x[129, 3] = float("nan")
    out, hidden, _ = mlp_op(x, up, down)
    for result in (out, hidden):
        assert result[129].isnan().all()
        assert result[:129].isfinite().all() and result[130:].isfinite().all()


# --- CPU --------------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    check_by_hand(CPU)


def test_rows_stay_apart() -> None:
    check_rows_apart(CPU)


def test_sign_bits() -> None:
    negative = torch.zeros(2, 256, dtype=torch.bool)
    negative[0, 0] = negative[0, 9] = negative[1, 128 + 8 * 5 + 2 * 3] = True
    signs = pack_signs(negative)
    expected = torch.zeros(2, 2, 16, dtype=torch.uint8)
    expected[0, 0, 0] = 0b1001  # j = 0 and j = 1 of word 0
    expected[1, 1, 4 * 3 + 1] = 1 << 2  # j = 5 of word 3 of the second tile: bit 10
    check_equal("signs", signs, expected)
    drawn = torch.rand(3, 384) < 0.5
    assert torch.equal(unpack_signs(pack_signs(drawn)), drawn)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 8), (2, 0, 8), (2, 3, 8)])
def test_leading_dimensions(shape: tuple) -> None:
    arguments = [t.double().requires_grad_() for t in (torch.randn(shape), *weights(8, 128))]
    out = mlp_op(*arguments)[0]
    expected = reference(*arguments)
    assert out.shape == shape
    torch.testing.assert_close(out, expected)
    direction = torch.randn(shape, dtype=torch.float64)
    gradients, expected_gradients = (torch.autograd.grad(y, arguments, direction) for y in (out, expected))
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_gradients_of_some_arguments(needed: tuple) -> None:
    arguments = [
        t.double().requires_grad_(need) for t, need in zip((torch.randn(5, 8), *weights(8, 128)), needed, strict=True)
    ]
    mlp_op(*arguments)[0].sum().backward()
    gradients = [t.grad for t in arguments]
    for t in arguments:
        t.grad = None
    reference(*arguments).sum().backward()
    torch.testing.assert_close(gradients, [t.grad for t in arguments])


@pytest.mark.parametrize(
    ("needed", "kept"),
    [
        ("x", ["down", "hidden", "signs", "up"]),
        ("up", ["down", "hidden", "signs", "x"]),
        ("down", ["hidden"]),
        ("x up down", ["down", "hidden", "signs", "up", "x"]),
    ],
)
def test_keeps_only_what_the_needed_gradients_are_made_of(needed: str, kept: list) -> None:
    named = dict(zip(("x", "up", "down"), (torch.randn(4, 8), *weights(8, 128)), strict=True))
    for name, tensor in named.items():
        tensor.requires_grad_(name in needed.split())
    shapes = {(4, 8): "x", (128, 8): "up", (8, 128): "down", (4, 128): "hidden", (1, 4, 16): "signs"}
    found: list[str] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(shapes[tuple(t.shape)]) or t, lambda t: t):
        mlp_op(*named.values())
    assert sorted(found) == kept


def test_keeps_no_pre_activation() -> None:
    x, (up, down) = torch.randn(4, 8), weights(8, 128)
    kept: list[tuple] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((*t.shape, t.dtype)) or t, lambda t: t):
        out, hidden, signs = mlp_op(x.requires_grad_(), up.requires_grad_(), down.requires_grad_())
    values = [(4, 8), (128, 8), (8, 128), (4, 128)]
    assert sorted(kept, key=str) == sorted([*((*v, torch.float32) for v in values), (1, 4, 16, torch.uint8)], key=str)
    assert out.requires_grad and not hidden.requires_grad and not signs.requires_grad


@pytest.mark.parametrize(
    ("dim", "features", "dtype"),
    [(8, 128, torch.float32), (5, 128, torch.bfloat16), (8, 100, torch.bfloat16), (8, 128, torch.float16)],
)
def test_the_rest_runs_the_reference(dim: int, features: int, dtype: torch.dtype) -> None:
    arguments = (torch.randn(2, 3, dim).to(dtype), *weights(dim, features, dtype))
    check_equal("mlp", mlp(*arguments), reference(*arguments))
    check_equal("mlp", mlp(*arguments), F.linear(F.leaky_relu(F.linear(*arguments[:2]), 0.5).square(), arguments[2]))


@pytest.mark.parametrize("function", [mlp, lambda *arguments: mlp_op(*arguments)[0]], ids=["mlp", "mlp_op"])
def test_compiles_in_one_graph(function) -> None:
    arguments = [t.requires_grad_() for t in (torch.randn(2, 3, 8), *weights(8, 128))]
    results = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        out = run(*arguments)
        results.append([out, *torch.autograd.grad(out.square().sum(), arguments)])
    torch.testing.assert_close(results[1], results[0])


X, UP, DOWN = torch.zeros(3, 8), torch.zeros(128, 8), torch.zeros(16, 128)
GRAD, DOWN_T, HIDDEN, SIGNS = torch.zeros(3, 8), torch.zeros(128, 8), torch.zeros(3, 128), torch.zeros(1, 3, 16).byte()
ALWAYS = [
    ((X[0, 0], UP, DOWN), "x: expected shape [..., D], got []"),
    ((X, UP[0], DOWN), "up: expected shape [F, 8], got [8]"),
    ((X, UP[:, :4], DOWN), "up: expected shape [F, 8], got [128, 4]"),
    ((X, UP, DOWN[:, :64]), "down: expected shape [D_out, 128], got [16, 64]"),
    ((X, UP.double(), DOWN), "up: expected torch.float32 as x, got torch.float64"),
    ((X, UP, DOWN.to("meta")), "down: expected a tensor on cpu as x, got meta"),
]
FOR_KERNELS = [
    ((X[:, :4], UP[:, :4], DOWN), "x: expected shape [..., 8 n], got [3, 4]"),
    ((X, UP[:64], DOWN[:, :64]), "up: expected shape [128 n, 8], got [64, 8]"),
    ((X, UP, DOWN[:4]), "down: expected shape [8 n, 128], got [4, 128]"),
    ((X.half(), UP.half(), DOWN.half()), "x: expected one of bfloat16, float32, float64, got torch.float16"),
]
UP_MESSAGES = [
    ((X[0], UP), "x: expected shape [rows, 8 n], got [8]"),
    ((X[:, :4], UP[:, :4]), "x: expected shape [rows, 8 n], got [3, 4]"),
    ((X, UP[:64]), "up: expected shape [128 n, 8], got [64, 8]"),
    ((X.half(), UP.half()), "x: expected one of bfloat16, float32, float64, got torch.float16"),
    ((X, UP.double()), "up: expected torch.float32 as x, got torch.float64"),
]
GRAD_MESSAGES = [
    ((GRAD[0], DOWN_T, HIDDEN, SIGNS), "grad: expected shape [rows, 8 n], got [8]"),
    ((GRAD, DOWN_T.t(), HIDDEN, SIGNS), "down_t: expected shape [128 n, 8], got [8, 128]"),
    ((GRAD, DOWN_T, HIDDEN[:2], SIGNS), "hidden: expected shape [3, 128], got [2, 128]"),
    ((GRAD, DOWN_T, HIDDEN, SIGNS[:, :2]), "signs: expected shape [1, 3, 16], got [1, 2, 16]"),
    ((GRAD, DOWN_T, HIDDEN.double(), SIGNS), "hidden: expected torch.float32 as grad, got torch.float64"),
    ((GRAD, DOWN_T, HIDDEN, SIGNS.int()), "signs: expected torch.uint8, got torch.int32"),
    ((GRAD, DOWN_T, HIDDEN, SIGNS.to("meta")), "signs: expected a tensor on cpu as grad, got meta"),
]


@pytest.mark.parametrize(
    ("function", "name", "arguments", "message"),
    [(function, "mlp", *row) for function in (mlp, mlp_op) for row in ALWAYS]
    + [(mlp_op, "mlp", *row) for row in FOR_KERNELS]
    + [(mlp_up_op, "mlp_up", *row) for row in UP_MESSAGES]
    + [(mlp_grad_op, "mlp_grad", *row) for row in GRAD_MESSAGES],
)
def test_arguments_are_checked(function, name: str, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: {message}')}$"):
        function(*arguments)


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@BUILDS
def test_kernels_by_hand(gpu: torch.device, build: str) -> None:
    need_build(build)
    with _native.forced(build):
        poison(gpu)
        check_by_hand(gpu)
        check_rows_apart(gpu)


@pytest.mark.gpu
@BUILDS
@pytest.mark.parametrize("shape", [(1, 8, 128), (129, 72, 256), (1000, 512, 2048)])
def test_kernel_signs(gpu: torch.device, build: str, shape: tuple) -> None:
    """Every sign but of sums so small that rounding decides."""
    need_build(build)
    rows, dim, features = shape
    up = weights(dim, features, torch.bfloat16, gpu)[0]
    x = torch.randn(rows, dim, device=gpu).bfloat16()
    with _native.forced(build):
        poison(gpu)
        signs = mlp_up_op(x, up)[1]
    pre = x.double() @ up.double().t()
    assert torch.equal(unpack_signs(signs)[pre.abs() > 1e-4], (pre < 0)[pre.abs() > 1e-4])


@pytest.mark.gpu
def test_small_tiles_give_the_same_bits(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile for 99 KiB of shared memory adds in the same order as the large one."""
    up, down = weights(520, 384, torch.bfloat16, gpu)
    x, grad = torch.randn(2, 300, 520, device=gpu).bfloat16().unbind()
    results = []
    with _native.forced("generic"):
        for size in (_native._shared_memory(gpu), 99 * 1024):
            monkeypatch.setattr(_native, "_shared_memory", lambda device, size=size: size)
            poison(gpu)
            hidden, signs = mlp_up_op(x, up)
            results.append([hidden, signs, mlp_grad_op(grad, down.t().contiguous(), hidden, signs)])
    for name, large, small in zip(("hidden", "signs", "grad_pre"), *results, strict=True):
        check_equal(name, small, large)


@pytest.mark.gpu
def test_no_rows_on_a_gpu(gpu: torch.device) -> None:
    arguments = [
        t.requires_grad_() for t in (torch.zeros(0, 8, device=gpu).bfloat16(), *weights(8, 128, torch.bfloat16, gpu))
    ]
    out = mlp(*arguments)
    assert out.shape == (0, 8)
    for gradient in torch.autograd.grad(out.sum(), arguments):
        assert not gradient.any()


@pytest.mark.gpu
def test_public_function_runs_the_kernels(gpu: torch.device) -> None:
    arguments = [
        t.requires_grad_()
        for t in (torch.randn(2, 65, 64, device=gpu).bfloat16(), *weights(64, 128, torch.bfloat16, gpu))
    ]
    out = mlp(*arguments)
    check_equal("mlp", out, mlp_op(*arguments)[0])
    assert "pgolf_mlp" in str(out.grad_fn)
    assert "pgolf_mlp" not in str(mlp(*(t.float() for t in arguments)).grad_fn)
