"""Results of an operator beside its reference's: errors against float64, equality, and what a failure says."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf.errors import PgolfError
from pgolf.testing.operator import Arguments, Function, Operator, differentiable, outputs


def results(
    function: Function, arguments: Arguments, seed: int = 0, rounded_to: Sequence[torch.dtype] | None = None
) -> list[Tensor]:
    """The outputs of `function` and the gradients of a random projection of them, in the order of the arguments.

    rounded_to: for each output the type its projection is rounded to (default: the output's), so that types share one.
    """
    leaves = differentiable(arguments)
    found = outputs(function(*arguments))
    if not leaves:
        return [out.detach() for out in found]
    types = rounded_to or [out.dtype for out in found]
    projected = [(out, random_like(out, seed + i, types[i])) for i, out in enumerate(found) if out.requires_grad]
    return [out.detach() for out in found] + gradients(projected, leaves)


def random_like(tensor: Tensor, seed: int, rounded_to: torch.dtype | None = None) -> Tensor:
    """Normal random values in the tensor's shape and type; the same for all types once rounded to `rounded_to`."""
    # Drawn where they are used: at the recipe's size a CPU takes seconds.
    draw = torch.Generator(tensor.device).manual_seed(seed)
    values = torch.randn(tensor.shape, generator=draw, device=tensor.device)
    return values.to(rounded_to or tensor.dtype).to(tensor.dtype)


def gradients(projected: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the outputs times their directions in all leaves; zeros where a leaf plays no part."""
    found, directions = zip(*projected, strict=True)
    return list(torch.autograd.grad(found, leaves, directions, materialize_grads=True))


def names_of(arguments: Arguments, count: int) -> list[str]:
    """What to call each of the `count` tensors that `results` gave."""
    gradients = len(differentiable(arguments))
    return [f"output {i}" for i in range(count - gradients)] + [f"gradient {i}" for i in range(gradients)]


def in_float64(arguments: Arguments) -> Arguments:
    """The same arguments with floating-point tensors in float64."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return tuple(convert(value) for value in arguments)


def poison(device: torch.device, size: int = 1 << 26) -> None:
    """Fill `size` bytes that torch will hand out next with NaN patterns, so that an output left unwritten shows."""
    blocks = [torch.full((size // 4,), float("nan"), device=device)]
    blocks += [torch.full((1 << k,), float("nan"), device=device) for k in range(18) for _ in range(4)]
    del blocks


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """(largest absolute error, L2 norm of the error)."""
    if not actual.numel():
        return 0.0, 0.0
    difference = actual.double() - exact.double()
    return difference.abs().max().item(), difference.norm().item()


class Accuracy:
    """The errors of one result over several draws: ours and PyTorch's, against float64."""

    def __init__(self, what: str, factor: float = 2.0) -> None:
        self.what, self.factor = what, factor
        self.ours: list[tuple[float, float]] = []
        self.working: list[tuple[float, float]] = []
        self.magnitude: list[tuple[float, float]] = []
        self.unit = 0.0

    def add(self, actual: Tensor, working: Tensor, exact: Tensor) -> None:
        """One draw more; AssertionError where shape or type differ."""
        assert actual.shape == exact.shape, f"{self.what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
        assert actual.dtype == working.dtype, f"{self.what}: dtype {actual.dtype}, expected {working.dtype}"
        self.unit = torch.finfo(actual.dtype).eps / 2
        self.ours.append(errors(actual, exact))
        self.working.append(errors(working, exact))
        self.magnitude.append(errors(exact, torch.zeros_like(exact)))

    def worst(self) -> int:
        """The draw with the largest error of ours, a NaN before all."""
        return int(torch.tensor(self.ours, dtype=torch.float64)[:, 0].argmax())

    def failure(self) -> tuple[str, float] | None:
        """(what is wrong, the largest error allowed), or None."""
        largest, norm = _over_draws(self.ours)
        torch_largest, torch_norm = _over_draws(self.working)
        top, length = _over_draws(self.magnitude)
        limit = self.factor * torch_largest + self.unit * top
        norm_limit = self.factor * torch_norm + self.unit * length
        if largest <= limit and norm <= norm_limit:  # a NaN fails
            return None
        text = f"largest error {largest:.3e} (limit {limit:.3e}), L2 error {norm:.3e} (limit {norm_limit:.3e})"
        return f"{self.what}: {text}", limit


def _over_draws(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    table = torch.tensor(pairs, dtype=torch.float64)  # its max and norm keep a NaN, Python's max may not
    return table[:, 0].max().item(), table[:, 1].norm().item()


def check_accuracy(what: str, actual: Tensor, working: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """AssertionError when `actual` is further from `exact` (float64) than `factor` times what PyTorch in the same
    precision (`working`) is, in the largest error or in the L2 norm.

    Half a unit in the last place is always granted: a correctly rounded result has that error, and PyTorch may by luck
    have none. Take several draws (`accuracy_on`): PyTorch's error on a scalar is by luck small on any one.
    """
    accuracy = Accuracy(what, factor)
    accuracy.add(actual, working, exact)
    if failed := accuracy.failure():
        raise AssertionError(f"{failed[0]}; {mismatch(actual, exact, failed[1])}")


def accuracy_on(operator: Operator, draws: list[Arguments]) -> None:
    """AssertionError unless outputs and gradients of `operator` on `draws` (same shapes and types) are accurate;
    integers, and all results of an `exact` operator, equal to the reference's.
    """

    def sides(seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        arguments = draws[seed]
        ours = results(operator.op, arguments, seed)
        working = results(operator.reference, arguments, seed)
        if operator.exact:
            return ours, working, working
        return ours, working, results(operator.reference, in_float64(arguments), seed, [x.dtype for x in ours])

    seen: dict[str, Accuracy] = {}
    for seed, arguments in enumerate(draws):
        ours, working, exact = sides(seed)
        assert len(ours) == len(working), f"{operator.name}: {len(ours)} results, expected {len(working)}"
        for index, name in enumerate(names_of(arguments, len(ours))):
            what = f"{operator.name}, {name}"
            if operator.exact or not ours[index].is_floating_point():
                check_equal(f"{what}, draw {seed}", ours[index], working[index])
            elif ours[index].numel():
                seen.setdefault(what, Accuracy(what)).add(ours[index], working[index], exact[index])
        del ours, working, exact  # at the recipe's size a GPU does not hold two draws
    for accuracy in seen.values():
        if failed := accuracy.failure():
            seed = accuracy.worst()
            ours, _, exact = sides(seed)
            index = [f"{operator.name}, {name}" for name in names_of(draws[seed], len(ours))].index(accuracy.what)
            raise AssertionError(f"{failed[0]}; of draw {seed} {mismatch(ours[index], exact[index], failed[1])}")


def mismatch(actual: Tensor, expected: Tensor, tolerance: float = 0.0) -> str:
    """How many values differ by more than `tolerance` (NaN agrees with NaN), the first coordinate, both values."""
    left, right = actual.double(), expected.double()
    close = (left - right).abs() <= tolerance
    wrong = ~(close | (left == right) | (left.isnan() & right.isnan()))
    count = int(wrong.sum())
    if not count:
        return "no value differs"
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{count} of {wrong.numel()} values differ by more than {tolerance:.3e}, "
        f"the first at {first}: got {left[first].item()!r}, expected {right[first].item()!r}"
    )


def check_equal(what: str, actual: Tensor, expected: Tensor) -> None:
    """AssertionError unless both hold the same values in the same type, NaN where NaN."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    if actual.is_floating_point():
        same = torch.equal(actual.nan_to_num(1.5, 2.5, -2.5), expected.nan_to_num(1.5, 2.5, -2.5)) and torch.equal(
            actual.isfinite(), expected.isfinite()
        )
    else:
        same = torch.equal(actual, expected)
    assert same, f"{what}: {mismatch(actual, expected)}"


def replaced(arguments: Arguments, index: int, value: Tensor) -> Arguments:
    """The arguments with another tensor at `index`, which takes a gradient if the one before did."""
    value = value.detach().requires_grad_(arguments[index].requires_grad)
    return (*arguments[:index], value, *arguments[index + 1 :])


def check_nonfinite(operator: Operator, arguments: Arguments, value: float, seed: int) -> None:
    """AssertionError unless `value` (a NaN or an infinity) at a random place of each floating-point argument, and then
    of each output's gradient, makes the same elements of the floating-point results finite as in the reference.

    Where an argument is not finite, a gradient may be finite where the reference's is not: autograd multiplies by the
    zeros of a mask, and zero times infinity is NaN. Where the reference rejects the input, so must the operator.
    """

    def place(tensor: Tensor) -> Tensor:
        poked = tensor.detach().clone(memory_format=torch.contiguous_format)
        at = int(torch.randint(tensor.numel(), (1,), generator=torch.Generator().manual_seed(seed)))
        poked.view(-1)[at] = value
        return poked

    def outcome(function: Function, given: Arguments) -> list[Tensor] | type[Exception]:
        try:
            return results(function, given, seed)
        except (PgolfError, ValueError, torch.linalg.LinAlgError) as error:
            return type(error)

    def compare(what: str, ours: list[Tensor], reference: list[Tensor], may_be_finite: Sequence[bool]) -> None:
        for name, got, wanted, lenient in zip(names, ours, reference, may_be_finite, strict=True):
            if not got.is_floating_point():
                continue
            differs = (got.isfinite() != wanted.isfinite()) if not lenient else (wanted.isfinite() & ~got.isfinite())
            if differs.any():
                at = tuple(differs.nonzero()[0].tolist())
                raise AssertionError(
                    f"{operator.name}, {value} in {what}: {name} at {at}: got {got[at].item()!r}, the reference has "
                    f"{wanted[at].item()!r}; {int(differs.sum())} of {differs.numel()} differ so"
                )

    leaves = differentiable(arguments)
    names = names_of(arguments, len(results(operator.op, arguments)))
    is_gradient = [name.startswith("gradient") for name in names]
    for index, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and argument.is_floating_point() and argument.numel():
            poked = replaced(arguments, index, place(argument))
            ours, reference = outcome(operator.op, poked), outcome(operator.reference, poked)
            if isinstance(ours, type) or isinstance(reference, type):
                assert ours == reference, f"{operator.name}, {value} in argument {index}: {ours} instead of {reference}"
            else:
                compare(f"argument {index}", ours, reference, is_gradient)
    if not leaves:
        return
    names = [f"gradient {i}" for i in range(len(leaves))]
    sides = [outputs(function(*arguments)) for function in (operator.op, operator.reference)]
    for index, out in enumerate(sides[0]):
        if out.requires_grad and out.numel():
            direction = place(random_like(out, seed))
            ours, reference = (
                list(torch.autograd.grad(side[index], leaves, direction, retain_graph=True, materialize_grads=True))
                for side in sides
            )
            compare(f"the gradient of output {index}", ours, reference, [False] * len(leaves))
