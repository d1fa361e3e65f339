"""What judges the operators, judged: an operator that is wrong in one place fails, in words that lead there."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf.testing import (
    Operator,
    accuracy_on,
    check_accuracy,
    check_equal,
    check_nonfinite,
    errors,
    names_of,
    nbytes,
    results,
)

CPU = torch.device("cpu")


def scale(x: Tensor, weight: Tensor, unused: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two differentiable outputs and an integer one."""
    return x * weight, x.sum(0), (x > 0).sum(-1)


def make(shape: tuple, dtype: torch.dtype, device: torch.device, seed: int) -> tuple:
    draw = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(shape, generator=draw), torch.randn(shape[-1], generator=draw)
    return x.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), 3


SCALE = Operator(
    name="scale", op=scale, reference=scale, make=make, shapes=((2, 3),), large=(4, 5), small=(4, 5),
    forward_bytes=lambda a: nbytes(a[0], a[0]),
)  # fmt: skip


def broken(change: Any) -> Operator:
    """SCALE with the outputs changed by `change`."""
    return dataclasses.replace(SCALE, op=lambda *arguments: change(*scale(*arguments)))


def draws(dtype: torch.dtype = torch.float32) -> list[tuple]:
    return [SCALE.make((6, 7), dtype, CPU, seed) for seed in range(3)]


def test_defaults() -> None:
    assert SCALE.kernel_dtypes == SCALE.dtypes and SCALE.large_check == SCALE.large and SCALE.typical == (2, 3)
    assert SCALE.backward_bytes(()) == SCALE.forward_flops(()) == 0
    assert dataclasses.replace(SCALE, large_check=(1, 1)).large_check == (1, 1)


def test_results_are_outputs_then_gradients() -> None:
    arguments = make((2, 3), torch.float32, CPU, 0)
    found = results(scale, arguments)
    assert names_of(arguments, len(found)) == ["output 0", "output 1", "output 2", "gradient 0", "gradient 1"]
    assert [list(tensor.shape) for tensor in found] == [[2, 3], [3], [2], [2, 3], [3]]
    assert results(lambda x, weight, _: x * 2, arguments)[2].eq(0).all()  # weight plays no part
    with torch.no_grad():
        frozen = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    assert names_of(frozen, 3) == ["output 0", "output 1", "output 2"] and len(results(scale, frozen)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_operator_passes(dtype: torch.dtype) -> None:
    accuracy_on(SCALE, draws(dtype))
    accuracy_on(dataclasses.replace(SCALE, exact=True), draws(dtype))
    for value in (float("nan"), float("inf")):
        check_nonfinite(SCALE, draws(dtype)[0], value, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y, s, n: (y, s * 1.001, n), r"scale, output 1: largest error .* of draw \d \d+ of 7 values differ"),
        (lambda y, s, n: (y, s, n + 1), "scale, output 2, draw 0: 6 of 6 values differ"),
        (lambda y, s, n: (y, s, n.int()), "scale, output 2, draw 0: dtype torch.int32, expected torch.int64"),
        (lambda y, s, n: (y[:1], s, n), r"scale, output 0: shape \[1, 7\], expected \[6, 7\]"),
        (lambda y, s, n: (y.double(), s, n), "scale, output 0: dtype torch.float64, expected torch.float32"),
        (lambda y, s, n: (y, s), "scale: 4 results, expected 5"),
        (lambda y, s, n: (y + s.detach() - s, s, n), "scale, gradient 0: largest error"),
        (lambda y, s, n: (y + 0 * y.detach().sqrt(), s, n), "scale, output 0: largest error nan"),
    ],
)
def test_a_wrong_operator_fails(change: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        accuracy_on(broken(change), draws())


def test_an_error_on_one_draw_fails() -> None:
    wrong = draws()[1][0]

    def op(x: Tensor, weight: Tensor, unused: int) -> tuple[Tensor, ...]:
        y, *rest = scale(x, weight, unused)
        return y + 1e-3 * torch.equal(x, wrong), *rest

    with pytest.raises(AssertionError, match=r"scale, output 0: .* of draw 1 42 of 42 values differ"):
        accuracy_on(dataclasses.replace(SCALE, op=op), draws())


def test_an_exact_operator_must_be_exact() -> None:
    almost = dataclasses.replace(broken(lambda y, s, n: (y * (1 + 2e-7), s, n)), exact=True)
    with pytest.raises(AssertionError, match="scale, output 0, draw 0: .* values differ"):
        accuracy_on(almost, draws())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda y, s, n: (y.nan_to_num(), s, n),
            "nan in argument 0: output 0 at .*: got 0.0, the reference has",
        ),
        (lambda y, s, n: (y + 0 * s, s, n), "nan in argument 0: output 0 at .*: got nan, the reference has"),
        (
            lambda y, s, n: (Swallow.apply(y), s, n),
            "scale, nan in the gradient of output 0: gradient 0 at .*: got 0.0, the reference has nan; 1 of 42",
        ),
    ],
)
def test_a_swallowed_nan_fails(change: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_nonfinite(broken(change), draws()[0], float("nan"), 0)


class Swallow(torch.autograd.Function):
    """The identity; its backward makes zeros of NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.nan_to_num()


def test_rejecting_what_the_reference_takes_fails() -> None:
    def op(x: Tensor, weight: Tensor, unused: int) -> tuple[Tensor, ...]:
        if x.isnan().any():
            raise ValueError("scale: x: expected no NaN")
        return scale(x, weight, unused)

    with pytest.raises(AssertionError, match="nan in argument 0: <class 'ValueError'> instead of"):
        check_nonfinite(dataclasses.replace(SCALE, op=op), draws()[0], float("nan"), 0)


def test_comparison_names_the_first_wrong_value() -> None:
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


def test_equality() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf"), -0.0])
    check_equal("same", x, x.clone())
    for index, value in ((0, 1.5), (1, 1.5), (2, 2.5), (2, float("-inf"))):  # 1.5 and 2.5 stand for them inside
        other = x.clone()
        other[index] = value
        with pytest.raises(AssertionError, match=rf"1 of 4 values differ .* first at \({index},\)"):
            check_equal("one value", other, x)


def test_errors() -> None:
    assert errors(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])) == (3.0, 3.0)
    assert errors(torch.zeros(0), torch.zeros(0)) == (0.0, 0.0)
