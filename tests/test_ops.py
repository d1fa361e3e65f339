"""Every operator of the registry: the CPU implementation here, the kernels of each build where there is a GPU for them.

What only one operator promises is in that operator's own file.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor

from pgolf.ops import _native
from pgolf.testing import (
    OPERATORS,
    Arguments,
    Operator,
    Shape,
    accuracy_on,
    check_equal,
    check_nonfinite,
    differentiable,
    graphed,
    names_of,
    outputs,
    poison,
    replaced,
    results,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def cases(
    argnames: str,
    shapes: Callable[[Operator], Iterable[Shape | str]] = lambda operator: (operator.typical,),
    dtypes: Callable[[Operator], Iterable[torch.dtype]] = lambda operator: operator.dtypes,
    operators: Iterable[Operator] = OPERATORS,
) -> pytest.MarkDecorator:
    """Parametrize over what is named of operator, build, dtype and shape; a shape may be the name of a field."""
    names = [name.strip() for name in argnames.split(",")]
    rows = {}
    for operator in operators:
        for build in operator.builds if "build" in names else [""]:
            for dtype in dtypes(operator) if "dtype" in names else [None]:
                for shape in shapes(operator) if "shape" in names else [""]:
                    named = shape if isinstance(shape, str) else "x".join(map(str, shape))
                    size = getattr(operator, shape) if isinstance(shape, str) and shape else shape
                    found = {"operator": operator, "build": build, "dtype": dtype, "shape": size}
                    words = [operator.name, build, str(dtype).removeprefix("torch.") if dtype else "", named]
                    rows["-".join(filter(None, words))] = [found[name] for name in names]
    return pytest.mark.parametrize(names, rows.values(), ids=rows.keys())


ALL_SHAPES = {"shapes": lambda operator: operator.shapes}
KERNEL_TYPES = {"dtypes": lambda operator: operator.kernel_dtypes}


@pytest.fixture
def build() -> str:
    """The build whose kernels run; tests of kernels are parametrized over those the operator has."""
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
    torch.cuda.empty_cache()  # what a test at the recipe's size leaves behind


def check_same(operator: Operator, arguments: Arguments, actual: list[Tensor], expected: list[Tensor]) -> None:
    """AssertionError unless two lists of `results` hold the same bits."""
    names = names_of(arguments, len(expected))
    for name, value, wanted in zip(names, actual, expected, strict=True):
        check_equal(f"{operator.name}, {name}", value, wanted)


def shifted(tensor: Tensor) -> Tensor:
    """The same values, one element beyond an address that is a multiple of 16 bytes; an empty tensor is nowhere."""
    if not tensor.numel():
        return tensor.detach()
    room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype, device=tensor.device)
    moved = room[1 : tensor.numel() + 1].view(tensor.shape)
    assert tensor.itemsize >= 16 or moved.data_ptr() % 16
    return moved.copy_(tensor.detach())


def strided(tensor: Tensor) -> Tensor:
    """The same values, the last dimension not the fastest."""
    return tensor.detach().mT.contiguous().mT


# --- CPU --------------------------------------------------------------------------------------------------------------


@cases("operator, dtype, shape", **ALL_SHAPES)
def test_cpu_matches_reference(operator: Operator, shape: Shape, dtype: torch.dtype) -> None:
    count = 16 if math.prod(shape) < 10_000_000 else 3
    accuracy_on(operator, [operator.make(shape, dtype, CPU, seed) for seed in range(count)])


@cases("operator")
def test_opcheck(operator: Operator) -> None:
    opcheck(operator, CPU)


def opcheck(operator: Operator, device: torch.device) -> None:
    registered = operator.custom_op or operator.op
    if not isinstance(registered, torch.library.CustomOpDef):
        pytest.skip(f"{operator.name} is a plain function around custom operators of other arguments")
    dtype = operator.kernel_dtypes[0]
    torch.library.opcheck(registered, operator.make(operator.typical, dtype, device, 0))


@cases("operator, shape", shapes=lambda operator: operator.shapes[:3])
def test_gradcheck(operator: Operator, shape: Shape) -> None:
    arguments = operator.make(shape, torch.float64, CPU, 0)
    if not differentiable(arguments):
        pytest.skip(f"{operator.name} has no gradient")
    assert torch.autograd.gradcheck(operator.op, arguments)


@cases("operator")
def test_composes_with_compile(operator: Operator) -> None:
    arguments = operator.make(operator.typical, operator.dtypes[0], CPU, 0)
    doubled = doubling(operator)
    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    for actual, value in zip(results(compiled, arguments), results(doubled, arguments), strict=True):
        # Not the same bits: on the CPU torch.matmul takes another route for tensors that require no gradient.
        torch.testing.assert_close(actual, value)


def doubling(operator: Operator) -> Callable[..., tuple[Tensor, ...]]:
    """The operator with something for a compiler to add to it; what was compiled of others is forgotten."""
    torch.compiler.reset()
    return lambda *arguments: tuple(out * 2 for out in outputs(operator.op(*arguments)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@cases("operator, dtype")
def test_cpu_passes_nonfinite_values_on(operator: Operator, dtype: torch.dtype, value: float) -> None:
    for seed in range(4):
        check_nonfinite(operator, operator.make(operator.typical, dtype, CPU, seed), value, seed)


@cases("operator, dtype")
def test_frozen_arguments_change_no_gradient(operator: Operator, dtype: torch.dtype) -> None:
    check_frozen(operator, operator.make(operator.typical, dtype, CPU, 0))


def check_frozen(operator: Operator, arguments: Arguments) -> None:
    """AssertionError unless the gradient of each argument is the same where others need none: one of them, or all.

    On a GPU bit for bit; on the CPU torch.matmul takes another route for tensors that require no gradient.
    """
    places = [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor) and argument.requires_grad]
    if not places:
        pytest.skip(f"{operator.name} has no gradient")
    whole = dict(zip(places, results(operator.op, arguments)[-len(places) :], strict=True))
    for kept in [[place] for place in places] + [[i for i in places if i != place] for place in places]:
        given = tuple(a.detach().requires_grad_(i in kept) if i in places else a for i, a in enumerate(arguments))
        found = results(operator.op, given)[-len(kept) :] if kept else []
        for place, gradient in zip(kept, found, strict=True):
            if gradient.is_cuda:
                check_equal(f"{operator.name}, gradient of argument {place}, of {kept}", gradient, whole[place])
            else:
                torch.testing.assert_close(gradient, whole[place])


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@cases("operator, build, dtype, shape", shapes=lambda operator: (*operator.shapes, "large_check"), **KERNEL_TYPES)
def test_kernel_is_as_accurate_as_pytorch(
    gpu: torch.device, operator: Operator, shape: Shape, dtype: torch.dtype
) -> None:
    fresh = int(torch.Generator().seed() % 2**31)  # new inputs on every run; the seed is among a failure's locals
    count = 4 if shape == operator.large_check else 16
    draws = [operator.make(shape, dtype, gpu, seed) for seed in (*range(count - 1), fresh)]
    poison(gpu)
    accuracy_on(operator, draws)


@pytest.mark.gpu
@cases("operator, dtype", dtypes=lambda operator: [t for t in operator.dtypes if t not in operator.kernel_dtypes])
def test_types_without_a_kernel_run_pytorch(gpu: torch.device, operator: Operator, dtype: torch.dtype) -> None:
    accuracy_on(operator, [operator.make(operator.typical, dtype, gpu, seed) for seed in range(4)])


@pytest.mark.gpu
@cases(
    "operator, build, dtype, shape",
    operators=[operator for operator in OPERATORS if not operator.aligned],
    **ALL_SHAPES,
    **KERNEL_TYPES,
)
def test_kernel_takes_unaligned_memory(gpu: torch.device, operator: Operator, shape: Shape, dtype: torch.dtype) -> None:
    draws = [operator.make(shape, dtype, gpu, seed) for seed in range(16)]
    for index, argument in enumerate(draws[0]):
        if isinstance(argument, Tensor):
            draws = [replaced(draw, index, shifted(draw[index])) for draw in draws]
    accuracy_on(operator, draws)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [shifted, strided])
@cases("operator, build, dtype", **KERNEL_TYPES)
def test_kernel_takes_or_rejects_a_layout(
    gpu: torch.device, operator: Operator, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """One argument at a time: right results, or a ValueError that names the argument."""
    draws = [operator.make(operator.typical, dtype, gpu, seed) for seed in range(16)]
    parameters = list(inspect.signature(operator.reference).parameters)
    for index, argument in enumerate(draws[0]):
        if not isinstance(argument, Tensor) or (layout is strided and argument.dim() < 2):
            continue
        moved = [replaced(draw, index, layout(draw[index])) for draw in draws]
        try:
            accuracy_on(operator, moved)
        except ValueError as error:
            assert operator.aligned or layout is strided, f"{operator.name} takes unaligned memory, but: {error}"
            assert re.match(rf"{operator.name}: {parameters[index]}: expected .*, got ", str(error)), str(error)


@pytest.mark.gpu
@cases("operator, build", operators=[operator for operator in OPERATORS if operator.aligned])
def test_kernel_rejects_unaligned_memory(gpu: torch.device, operator: Operator) -> None:
    arguments = operator.make(operator.typical, operator.kernel_dtypes[0], gpu, 0)
    first = next(i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.is_floating_point())
    with pytest.raises(ValueError, match=rf"^{operator.name}: \w+: expected .*, got "):
        operator.op(*replaced(arguments, first, shifted(arguments[first])))


@pytest.mark.gpu
@cases("operator, build, dtype", **KERNEL_TYPES)
def test_kernel_takes_an_expanded_gradient(gpu: torch.device, operator: Operator, dtype: torch.dtype) -> None:
    arguments = operator.make(operator.typical, dtype, gpu, 0)
    leaves = differentiable(arguments)
    if not leaves:
        pytest.skip(f"{operator.name} has no gradient")
    found = [out for out in outputs(operator.op(*arguments)) if out.requires_grad]
    dense = torch.autograd.grad(found, leaves, [torch.ones_like(out) for out in found], retain_graph=True)
    expanded = torch.autograd.grad(found, leaves, [out.new_ones(()).expand(out.shape) for out in found])
    check_same(operator, arguments, list(expanded), list(dense))


@pytest.mark.gpu
@cases("operator, build, dtype, shape", **ALL_SHAPES, **KERNEL_TYPES)
def test_kernel_leaves_frozen_arguments_out(
    gpu: torch.device, operator: Operator, shape: Shape, dtype: torch.dtype
) -> None:
    check_frozen(operator, operator.make(shape, dtype, gpu, 0))


@pytest.mark.gpu
@cases("operator, build, dtype", **KERNEL_TYPES)
def test_kernel_gives_the_same_bits_again(gpu: torch.device, operator: Operator, dtype: torch.dtype) -> None:
    arguments = operator.make(operator.large, dtype, gpu, 0)
    first = results(operator.op, arguments)
    for _ in range(3):
        poison(gpu)
        check_same(operator, arguments, results(operator.op, arguments), first)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@cases("operator, build, dtype", **KERNEL_TYPES)
def test_kernel_passes_nonfinite_values_on(
    gpu: torch.device, operator: Operator, dtype: torch.dtype, value: float
) -> None:
    for seed in range(4):
        check_nonfinite(operator, operator.make(operator.typical, dtype, gpu, seed), value, seed)


@pytest.mark.gpu
@cases("operator, build, dtype", **KERNEL_TYPES)
def test_kernel_in_a_cuda_graph(gpu: torch.device, operator: Operator, dtype: torch.dtype) -> None:
    arguments = operator.make(operator.shapes[-1], dtype, gpu, 0)
    captured: list[Tensor] = []

    def step() -> None:
        found = outputs(operator.op(*arguments))
        loss = [out.float().square().sum() for out in found if out.requires_grad]
        gradients = torch.autograd.grad(loss, differentiable(arguments), materialize_grads=True) if loss else ()
        captured[:] = [out.detach() for out in (*found, *gradients)]

    replay = graphed(step)
    with torch.no_grad():
        for old, new in zip(arguments, operator.make(operator.shapes[-1], dtype, gpu, 1), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)
    replay()
    replayed = [tensor.clone() for tensor in captured]
    step()
    check_same(operator, arguments, replayed, captured)


@pytest.mark.gpu
@cases("operator, build, dtype", **KERNEL_TYPES)
def test_kernel_runs_on_the_current_stream(gpu: torch.device, operator: Operator, dtype: torch.dtype) -> None:
    arguments = operator.make(operator.shapes[-1], dtype, gpu, 0)
    expected = results(operator.op, arguments)
    tensors = [argument.detach() for argument in arguments if isinstance(argument, Tensor)]
    sources = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would read the zeros
        for tensor, source in zip(tensors, sources, strict=True):
            tensor.copy_(source)
        actual = results(operator.op, arguments)
    stream.synchronize()
    check_same(operator, arguments, actual, expected)


@pytest.mark.gpu
@cases("operator, build")
def test_kernel_passes_opcheck(gpu: torch.device, operator: Operator) -> None:
    opcheck(operator, gpu)


@pytest.mark.gpu
@pytest.mark.slow
@cases("operator, build")
def test_kernel_under_torch_compile(gpu: torch.device, operator: Operator) -> None:
    arguments = operator.make(operator.shapes[-1], operator.kernel_dtypes[0], gpu, 0)
    doubled = doubling(operator)
    compiled = torch.compile(doubled, fullgraph=True)
    check_same(operator, arguments, results(compiled, arguments), results(doubled, arguments))


@pytest.mark.gpu
@cases(
    "operator, build, dtype, shape",
    shapes=lambda operator: dict.fromkeys((operator.shapes[0], operator.typical)),
    **KERNEL_TYPES,
)
def test_kernel_once(gpu: torch.device, operator: Operator, shape: Shape, dtype: torch.dtype) -> None:
    """Forward and backward and little else: what setup_tools/sanitize.py watches."""
    for tensor in results(operator.op, operator.make(shape, dtype, gpu, 0)):
        assert tensor.cpu().isfinite().all()
