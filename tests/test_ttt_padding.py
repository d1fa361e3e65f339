"""The shapes of an evaluation's steps: they cover every step, and cost the least."""

import itertools
from collections import Counter

import numpy as np
import pytest

from pgolf.config import TTTConfig
from pgolf.ttt import padding, planning
from pgolf.ttt.planning import Shape


def exact_steps(lengths, config: TTTConfig) -> list[list[planning.Step]]:
    documents = [planning.Document(0, int(length)) for length in lengths]
    batches = [batch for stage in planning.plan(documents, config) for batch in stage.batches]
    return [planning.steps([documents[index] for index in batch], config) for batch in batches]


def web_lengths(count: int) -> np.ndarray:
    """Lengths like those of a crawl: log-normal, few very long."""
    return np.clip(np.exp(np.random.default_rng(0).normal(6.2, 1.2, count)), 2, 25_000).astype(int)


@pytest.mark.parametrize(("documents", "batch_size"), [(700, 24), (700, 7), (5, 24), (1, 24)])
@pytest.mark.parametrize("mode", ["window", "streaming"])
def test_shapes_hold_every_step(mode, documents, batch_size):
    config = TTTConfig(mode=mode, batch_size=batch_size)
    exact = exact_steps(web_lengths(documents), config)
    rows = min(documents, batch_size)
    padded = padding.pad(exact, rows, config)
    assert padded == padding.pad(exact, rows, config)
    for before, after in zip(itertools.chain(*exact), itertools.chain(*padded), strict=True):
        assert before._replace(shape=after.shape) == after  # the windows, and what each target sees, stay
        assert before.shape._replace(rows=after.shape.rows, inputs=after.shape.inputs) == after.shape
        assert len(before.windows) == before.shape.rows <= after.shape.rows <= rows
        assert max(window.length for window in before.windows) == before.shape.inputs <= after.shape.inputs
        assert after.shape.inputs <= planning.most_inputs(after.shape.chunk, config)
        if mode == "streaming":
            start = after.windows[0].start
            assert after.origin <= start and start - after.origin + after.shape.inputs <= after.shape.capacity


@pytest.mark.parametrize(("mode", "most_graphs"), [("window", 80), ("streaming", 35)])
def test_little_is_padded_in_few_shapes(mode, most_graphs):
    config = TTTConfig(mode=mode)
    exact = exact_steps(web_lengths(3000), config)
    shapes = Counter(step.shape for step in itertools.chain(*padding.pad(exact, 24, config)))
    needed = sum(window.length for step in itertools.chain(*exact) for window in step.windows)
    ran = sum(shape.rows * shape.inputs * count for shape, count in shapes.items())
    assert len(shapes) <= most_graphs
    assert needed <= ran <= 1.07 * needed


def cuts(items: list) -> list[list[list]]:
    """All ways to cut a list into consecutive parts."""
    if not items:
        return [[]]
    return [[items[:size], *rest] for size in range(1, len(items) + 1) for rest in cuts(items[size:])]


def test_partition_is_the_best_of_all():
    random = np.random.default_rng(0)
    for count in range(8):
        costs = random.integers(1, 20, (count + 1, count + 1))
        total, parts = padding.partition(count, lambda first, end, costs=costs: float(costs[first, end]))
        assert [index for part in parts for index in range(*part)] == list(range(count))
        assert total == sum(costs[part] for part in parts)
        assert total == min(sum(costs[part[0], part[-1] + 1] for part in cut) for cut in cuts(list(range(count))))


def brute_force(shapes: dict[Shape, int]) -> float:
    """The least cost over every cut of the rows and, in each part, every cut of the inputs."""

    def part(rows: list[int]) -> float:
        among = {shape: count for shape, count in shapes.items() if shape.rows in rows}
        return min(
            sum(
                padding.GRAPH_TOKENS
                + sum(
                    count * shape._replace(rows=rows[-1], inputs=inputs[-1]).tokens
                    for shape, count in among.items()
                    if shape.inputs in inputs
                )
                for inputs in cut
            )
            for cut in cuts(sorted({shape.inputs for shape in among}))
        )

    return min(sum(part(rows) for rows in cut) for cut in cuts(sorted({shape.rows for shape in shapes})))


@pytest.mark.parametrize("learn", [False, True])
def test_chosen_shapes_are_the_cheapest(learn, monkeypatch):
    monkeypatch.setattr(padding, "GRAPH_TOKENS", graph := 2000 if learn else 700)
    random = np.random.default_rng(1)
    several = 0
    for _ in range(20):
        found = {
            Shape(int(rows), 8 * int(inputs), 4, learn, 256): int(random.integers(1, 9))
            for rows, inputs in random.integers(1, 7, (9, 2))
        }
        total, chosen = padding.choose(found)
        graphs = set(chosen.values())
        assert chosen.keys() == found.keys()
        assert all(to.rows >= shape.rows and to.inputs >= shape.inputs for shape, to in chosen.items())
        assert total == pytest.approx(graph * len(graphs) + sum(n * chosen[shape].tokens for shape, n in found.items()))
        assert total == pytest.approx(brute_force(found))
        several += 1 < len(graphs) < len(found)
    assert several > 10


def test_row_sizes():
    assert padding.row_sizes(24) == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert padding.row_sizes(1) == [1]
    for documents in range(1, 100):
        sizes = padding.row_sizes(documents)
        assert sizes[0] == 1 and sizes[-1] == documents
