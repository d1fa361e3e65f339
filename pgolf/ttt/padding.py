"""Few shapes for many steps: each shape is a graph to capture, each token of padding is work."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain

from pgolf.config import TTTConfig
from pgolf.ttt.planning import Shape, Step, most_inputs

# What a graph costs, in tokens of a step (about 1 us each on an H100): two thirds of a capture, part of which happens
# while the GPU works.
GRAPH_TOKENS = 100_000


def row_sizes(documents: int) -> list[int]:
    """Rows that a shape may have, ascending: two thirds of the batch, a half, a third, and so on; one and all."""
    sizes, part = {1}, 1
    while part < documents:
        sizes |= {-(-documents // part), -(-2 * documents // (3 * part))}
        part *= 2
    return sorted(sizes)


def rounded(inputs: int, most: int) -> int:
    """At least `inputs`, at most `most`: a multiple of 8, as matrix products like them."""
    return min(-(-inputs // 8) * 8, most)


def partition(count: int, cost: Callable[[int, int], float]) -> tuple[float, list[tuple[int, int]]]:
    """range(count) cut into parts [first, end) of the least total cost(first, end); returns that and the parts."""
    best, begins = [0.0], [0]
    for end in range(1, count + 1):
        total, first = min((best[first] + cost(first, end), first) for first in range(end))
        best.append(total)
        begins.append(first)
    parts, end = [], count
    while end > 0:
        parts.append((begins[end], end))
        end = begins[end]
    return best[count], parts[::-1]


def choose_inputs(counts: Mapping[int, int], shape: Shape) -> tuple[float, dict[int, int]]:
    """The cheapest sizes of inputs for steps that are else of one shape: (tokens, size of each number of inputs).

    counts: steps by inputs.
    """
    inputs = sorted(counts)
    before = [0, *accumulate(counts[size] for size in inputs)]
    tokens = [shape._replace(inputs=size).tokens for size in inputs]

    def cost(first: int, end: int) -> float:
        return GRAPH_TOKENS + (before[end] - before[first]) * tokens[end - 1]

    total, parts = partition(len(inputs), cost)
    return total, {size: inputs[end - 1] for first, end in parts for size in inputs[first:end]}


def choose(shapes: Mapping[Shape, int]) -> tuple[float, dict[Shape, Shape]]:
    """The cheapest shapes for steps that differ in rows and inputs alone: (tokens, what each shape becomes).

    Numbers of rows next to each other may share the largest; each such part has sizes of inputs of its own.

    shapes: steps by shape.
    """
    rows = sorted({shape.rows for shape in shapes})

    def part(first: int, end: int) -> tuple[float, dict[Shape, Shape]]:
        among = [shape for shape in shapes if rows[first] <= shape.rows <= rows[end - 1]]
        counts: Counter[int] = Counter()
        for shape in among:
            counts[shape.inputs] += shapes[shape]
        total, sizes = choose_inputs(counts, among[0]._replace(rows=rows[end - 1]))
        return total, {shape: shape._replace(rows=rows[end - 1], inputs=sizes[shape.inputs]) for shape in among}

    total, parts = partition(len(rows), lambda first, end: part(first, end)[0])
    chosen: dict[Shape, Shape] = {}
    for first, end in parts:
        chosen |= part(first, end)[1]
    return total, chosen


def pad(batches: Sequence[Sequence[Step]], documents: int, config: TTTConfig) -> list[list[Step]]:
    """The steps of all batches of at most `documents` documents in few shapes, the cheapest for all of them together.

    Rows in front are of finished documents, padding comes after a window; neither weighs anything.
    """
    sizes = row_sizes(documents)

    def least(shape: Shape) -> Shape:
        rows = next(size for size in sizes if size >= shape.rows)
        return shape._replace(rows=rows, inputs=rounded(shape.inputs, most_inputs(shape.chunk, config)))

    kinds: dict[Shape, Counter[Shape]] = defaultdict(Counter)  # by what a step's shape must keep
    for shape in (least(step.shape) for step in chain(*batches)):
        kinds[shape._replace(rows=0, inputs=0)][shape] += 1
    chosen: dict[Shape, Shape] = {}
    for shapes in kinds.values():
        chosen |= choose(shapes)[1]
    return [[step._replace(shape=chosen[least(step.shape)]) for step in batch] for batch in batches]
