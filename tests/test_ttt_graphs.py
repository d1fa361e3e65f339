"""Test-time training on a GPU: graphs do what eager steps of the same shapes do, and share their memory."""

import contextlib
import dataclasses
import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pgolf import ttt
from pgolf.config import ModelConfig, TTTConfig
from pgolf.errors import PgolfError
from pgolf.layers import at
from pgolf.model import BOS, GPT
from pgolf.ops import _native, attention
from pgolf.ttt import planning
from pgolf.ttt.engine import step_way
from pgolf.ttt.graphs import Graphs

MODEL = ModelConfig(
    num_layers=6, model_dim=128, num_heads=2, num_kv_heads=1, vocab_size=320, loop_start=1, loop_end=2,
    parallel_start_layer=4, xsa_last_n=5,
)  # fmt: skip
LENGTHS = (700, 3, 300, 290, 150, 90, 1, 20, 5, 1, 64)
CONFIG = TTTConfig(
    batch_size=4, chunk_size=16, short_chunks="20:4,100:8", context=256, refresh=32, rank=8, alpha=16.0, lr=0.01,
    eps=0.01, prefix_docs=7, global_chunk=128, global_lr=0.02, eval_seq_len=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def gpu():
    if not torch.cuda.is_available() or _native.why_not(torch.device("cuda", 0)):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return torch.device("cuda", 0)


def model_on(device: torch.device) -> GPT:
    model = GPT(MODEL).initialize(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # at their initial zeros half of the weights get no gradient
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.dtype = torch.bfloat16
    return model.to(device)


def stream() -> np.ndarray:
    random = np.random.default_rng(0)
    return np.concatenate([[BOS, *random.integers(8, 320, length - 1)] for length in LENGTHS]).astype(np.uint16)


def losses_of(device: torch.device, **changes) -> tuple[np.ndarray, torch.Tensor]:
    """The loss of every target, and the embedding as the global phase left it."""
    tokens, model = stream(), model_on(device)
    losses = np.full(len(tokens) - 1, np.nan)
    ttt.evaluate(model, tokens, np.ones(len(tokens)), dataclasses.replace(CONFIG, **changes), seed=0, losses=losses)
    return losses, model.tok_emb.weight.detach().clone()


def test_the_way_a_step_is_made() -> None:
    cpu = torch.device("cpu")
    assert step_way(CONFIG, cpu) == step_way(dataclasses.replace(CONFIG, step="eager"), cpu) == "eager"
    with pytest.raises(PgolfError, match=r"ttt\.step=graphs needs a CUDA GPU"):
        step_way(dataclasses.replace(CONFIG, step="graphs"), cpu)


class Device:
    """Stands in for torch.cuda: what is captured and launched, in order; nothing ends before `finish`."""

    def __init__(self, monkeypatch) -> None:
        self.events: list[tuple[str, int]] = []  # (what, inputs of the shape)
        self.launched = self.finished = 0
        device = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode) -> None:
                assert (pool, capture_error_mode) == ("pool", "thread_local") and not gc.isenabled()

            def capture_end(self) -> None:
                self.inputs = device.events[-1][1]

            def replay(self) -> None:
                device.events.append(("launch", self.inputs))
                device.launched += 1

        class Event:
            def __init__(self) -> None:
                self.place = device.launched

            def query(self) -> bool:
                return device.finished >= self.place

        for name, value in {
            "Stream": lambda device: "side", "graph_pool_handle": lambda: "pool", "CUDAGraph": Graph,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda device: SimpleNamespace(record_event=Event),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def run(self, shape: planning.Shape) -> None:
        self.events.append(("capture", shape.inputs))

    def finish(self) -> None:
        self.finished = self.launched

    def news(self) -> list[tuple[str, int]]:
        events, self.events = self.events, []
        return events


def test_captures_come_between_launches(monkeypatch) -> None:
    """The largest first, then each as its step comes, or the next one needed once the GPU has enough to do."""
    device = Device(monkeypatch)
    graphs = Graphs(device.run, torch.device("cpu"))
    a, b, c, d, e = (planning.Shape(2, inputs, 4, True) for inputs in (10, 20, 30, 40, 50))
    monkeypatch.setattr("pgolf.ttt.graphs.AHEAD", 2 * a.tokens)
    graphs.expect([a, a, a, b, c, e, d])
    assert device.news() == [("capture", 50)]
    graphs.replay(a)
    assert device.news() == [("capture", 10), ("launch", 10)]
    before = graphs.seconds, graphs.stalled
    graphs.replay(a)
    assert device.news() == [("launch", 10), ("capture", 20)]
    assert graphs.seconds > before[0] and graphs.stalled == before[1]  # the GPU had something to do
    device.finish()
    graphs.replay(a)
    assert device.news() == [("launch", 10)]
    device.finish()
    graphs.replay(c)  # earlier than expected
    assert device.news() == [("capture", 30), ("launch", 30)]
    assert graphs.stalled > before[1]
    graphs.replay(e)
    assert device.news() == [("launch", 50), ("capture", 40)]
    for _ in range(3):
        graphs.replay(d)
    assert device.news() == [("launch", 40)] * 3


def test_a_capture_that_fails_says_so_and_turns_collection_on_again(monkeypatch) -> None:
    device = Device(monkeypatch)

    def run(shape: planning.Shape) -> None:
        device.run(shape)
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"):
        Graphs(run, torch.device("cpu")).replay(planning.Shape(2, 10, 4, True))
    assert gc.isenabled()


@pytest.mark.parametrize("mode", ["window", "streaming"])
def test_the_graphs_of_all_stages_are_expected_in_the_order_of_use(mode, monkeypatch) -> None:
    expected: list[planning.Shape] = []
    ran: list[planning.Shape] = []

    class Eager:
        seconds, stalled = 5.0, 3.0

        def __init__(self, run, device) -> None:
            self.run = run

        def warm_up(self, shape) -> None:
            self.run(shape)

        def expect(self, shapes) -> None:
            expected.extend(shapes)

        def replay(self, shape) -> None:
            ran.append(shape)
            self.run(shape)

    cpu, tokens = torch.device("cpu"), stream()
    monkeypatch.setattr("pgolf.ttt.engine.Graphs", Eager)
    for module in ("engine", "evaluation"):
        monkeypatch.setattr(f"pgolf.ttt.{module}.step_way", lambda *arguments: "graphs")
    config = dataclasses.replace(CONFIG, mode=mode)
    result = ttt.evaluate(model_on(cpu), tokens, np.ones(len(tokens)), config, seed=0)
    assert ran == expected and len(set(ran)) > 2
    assert 5 < result.preparing < result.seconds + 5 and result.preparing - result.stalled == pytest.approx(2)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"grad_steps": 2}, {"beta1": 0.5}, {"prefix_docs": 0}])
@pytest.mark.parametrize("mode", ["window", "streaming"])
def test_graphs_do_what_eager_does(mode, changes, gpu, monkeypatch) -> None:
    """Also after the global phase, which moves the weights that the graphs read."""
    graphed, moved = losses_of(gpu, mode=mode, step="graphs", **changes)
    exact, _ = losses_of(gpu, mode=mode, step="eager", **changes)
    monkeypatch.setattr("pgolf.ttt.evaluation.step_way", lambda *arguments: "graphs")  # their shapes
    eager, expected = losses_of(gpu, mode=mode, step="eager", **changes)
    plain, _ = losses_of(gpu, mode=mode, step="eager", **changes | {"lr": 0.0})
    adapted = np.abs(eager - plain).mean()
    assert np.abs(graphed - eager).mean() < 0.1 * adapted
    assert np.abs(exact - eager).mean() < 0.3 * adapted
    assert graphed.mean() == pytest.approx(eager.mean(), rel=1e-3) == pytest.approx(exact.mean(), rel=2e-3)
    change = (expected - model_on(gpu).tok_emb.weight).norm()
    assert (moved - expected).norm() <= 0.1 * change
    assert (change > 0) == (changes.get("prefix_docs") != 0)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["window", "streaming"])
def test_a_gpu_scores_as_the_cpu(mode, gpu) -> None:
    found, _ = losses_of(gpu, mode=mode)
    reference, _ = losses_of(torch.device("cpu"), mode=mode)
    assert found.mean() == pytest.approx(reference.mean(), rel=5e-3)


@pytest.mark.gpu
def test_attention_over_a_memory(gpu) -> None:
    """Values and gradients against float32, over part of the memory; the kernel reads nothing that is not used."""
    generator = torch.Generator(gpu).manual_seed(0)
    shapes = ((3, 40, 4, 64), (3, 192, 2, 64), (3, 192, 2, 64))
    inputs = [torch.randn(shape, generator=generator, device=gpu).bfloat16() for shape in shapes]
    used = torch.tensor([40, 101, 192], dtype=torch.int32, device=gpu)
    weight = torch.randn(shapes[0], generator=generator, device=gpu)
    results = []
    for dtype, function in ((torch.bfloat16, attention.cached_attention), (torch.float32, attention.cached_reference)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, used)
        (out.float() * weight).sum().backward()
        grads = [leaf.grad.float() for leaf in leaves]
        for grad in grads[1:]:
            for row, count in enumerate(used.tolist()):
                grad[row, count:] = 0  # not defined
        results.append((out.detach().float(), *grads))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.gpu
def test_wanted_places_are_those_of_all(gpu) -> None:
    """Values and gradients against float32 of all places; what attention leaves unwritten, NaN here, reaches nobody."""
    model, length = model_on(gpu), 320
    ids = torch.randint(8, 320, (4, length), generator=torch.Generator(gpu).manual_seed(0), device=gpu)
    places = torch.tensor([0, 100, 304, 310], device=gpu)[:, None] + torch.arange(16, device=gpu)
    wanted = places < length
    places = torch.where(wanted, places, 0)
    weight = torch.randn(4, 16, 128, generator=torch.Generator(gpu).manual_seed(1), device=gpu) * wanted[..., None]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model.dtype = dtype
        model.zero_grad(set_to_none=True)
        if dtype == torch.float32:
            found = at(model.hidden(ids), places)
        else:
            unwritten = [torch.full((1 << size,), torch.nan, device=gpu) for size in range(8, 24) for _ in range(8)]
            del unwritten  # the allocator hands this memory out again
            found = model.hidden(ids, places=places)
            assert found.isfinite().all()
        (found.float() * weight).sum().backward()
        results.append([found.detach().float() * wanted[..., None], model.qo_bank.grad, model.kv_bank.grad])
    for expected, some in zip(*results, strict=True):
        assert (some - expected).norm() < 0.1 * expected.norm()


@pytest.mark.gpu
def test_graphs_share_their_memory(gpu) -> None:
    """All sizes together take little more than the largest alone."""

    def run(shape: planning.Shape) -> None:
        values = torch.zeros(shape.rows * shape.inputs * 1024, device=gpu)
        for _ in range(5):
            values = torch.cat((values, values))[::2].contiguous()

    sizes = range(64, 3073, 192)
    shapes = [planning.Shape(rows, size, 8, learn) for rows in (2, 4) for size in sizes for learn in (False, True)]
    graphs = Graphs(run, gpu)
    graphs.warm_up(shapes[0])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(gpu)
    graphs.expect(shapes)
    largest = torch.cuda.memory_reserved(gpu) - before
    for shape in shapes:
        graphs.replay(shape)
    assert torch.cuda.memory_reserved(gpu) - before < 1.3 * largest
    assert graphs.seconds > 0 and set(shapes) == graphs._graphs.keys()
    torch.cuda.synchronize(gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["window", "streaming"])
def test_when_a_graph_is_captured_does_not_matter(mode, gpu, monkeypatch) -> None:
    """Each when its step comes, or all ahead while earlier steps run."""
    found = []
    for ahead in (float("inf"), 0.0):
        monkeypatch.setattr("pgolf.ttt.graphs.AHEAD", ahead)
        found.append(losses_of(gpu, mode=mode, step="graphs")[0])
    plain, _ = losses_of(gpu, mode=mode, step="eager", lr=0.0, prefix_docs=0)
    assert np.abs(found[0] - found[1]).mean() < 0.1 * np.abs(found[0] - plain).mean()


@pytest.mark.gpu
def test_a_capture_does_not_wait_for_the_gpu(gpu) -> None:
    x = torch.randn(8192, 8192, device=gpu)
    graphs = Graphs(lambda shape: torch.mm(x, x), gpu)
    graphs.warm_up(planning.Shape(1, 1, 1, True))
    graphs.expect([planning.Shape(1, inputs, 1, True) for inputs in (1, 2, 3)])
    for _ in range(50):
        torch.mm(x, x)
    queued = torch.cuda.current_stream(gpu).record_event()
    graphs.replay(planning.Shape(1, 1, 1, True))
    assert not queued.query()
