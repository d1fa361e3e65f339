"""Micro-steps: a replayed CUDA graph adds the gradients that the operators launched one by one add."""

import pytest
import torch

from pgolf import config, recipes
from pgolf import train as training
from pgolf.data.loader import Batch, boundaries
from pgolf.errors import PgolfError
from pgolf.microstep import EagerMicroStep, GraphedMicroStep
from pgolf.model import GPT
from pgolf.ops import _native

CPU = torch.device("cpu")
TOKENS = 512


@pytest.fixture(scope="module")
def gpu():
    if not torch.cuda.is_available() or _native.why_not(torch.device("cuda", 0)):
        pytest.skip("needs a CUDA GPU with pgolf kernels")
    return torch.device("cuda", 0)


def batch(seed: int, context: int = 64, documents: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, 300, (1, TOKENS + 1), generator=generator)
    starts = torch.randperm(TOKENS - 1, generator=generator)[: documents - 1].sort().values + 1
    tokens[0, 0] = 1
    tokens[0, starts] = 1
    bounds, longest = boundaries(torch.cat((torch.zeros(1, dtype=torch.long), starts)).numpy(), TOKENS, context)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.from_numpy(bounds), longest)


def model_on(device: torch.device) -> GPT:
    shape = {"num_layers": 6, "model_dim": 128, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 320}
    shape |= {"loop_start": 1, "loop_end": 2, "parallel_start_layer": 4, "xsa_last_n": 5}
    model = GPT(config.ModelConfig(**shape)).initialize(1).to(device)
    with torch.no_grad():  # at their initial zeros half of the weights get no gradient
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(device)
    model.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model


def step_of(kind, model: GPT, device: torch.device):
    def loss(ids, targets, bounds, context):
        return model.train_loss(ids, targets, bounds, context) / 2

    return EagerMicroStep(loss, device) if kind is EagerMicroStep else kind(loss, device, model.parameters())


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_eager_adds_up() -> None:
    model = model_on(CPU)
    step = step_of(EagerMicroStep, model, CPU)
    first = step(batch(0), 64, False)
    once = gradients(model)
    second = step(batch(0), 64, False)
    assert torch.equal(first, second) and not first.requires_grad
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, 2 * once[name]), name


@pytest.mark.slow
def test_compiled_is_the_same_model() -> None:
    """The reference that the kernels are held against, layer by layer through torch.compile."""
    compiled, eager = model_on(CPU).compile_regions(), model_on(CPU)
    given = batch(0)
    for looping in (False, True):
        losses = []
        for model in (compiled, eager):
            model.looping = looping
            losses.append(model.train_loss(given.inputs, given.targets))  # packed segments need a GPU's attention
            losses[-1].backward()
        assert torch.allclose(*losses, rtol=1e-5)
    expected, found = gradients(eager), gradients(compiled)
    assert expected.keys() == found.keys()
    for name, grad in found.items():
        assert torch.allclose(grad, expected[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.gpu
def test_graphs_do_what_eager_does(gpu: torch.device) -> None:
    graphed, eager = model_on(gpu), model_on(gpu)
    steps = step_of(GraphedMicroStep, graphed, gpu), step_of(EagerMicroStep, eager, gpu)
    # Modes change back and forth; 200 documents need another number of boundaries.
    for seed, (context, looping, documents) in enumerate(
        [(64, False, 3), (64, False, 3), (128, True, 3), (64, False, 3), (128, True, 200), (128, True, 3)]
    ):
        losses = []
        for model, step in zip((graphed, eager), steps, strict=True):
            model.looping = looping
            losses.append(step(batch(seed, context, documents), context, looping))
        assert torch.allclose(*losses, rtol=1e-4), seed
        expected, found = gradients(eager), gradients(graphed)
        assert expected.keys() == found.keys()
        for name, grad in found.items():
            error = (grad - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
            assert error < 0.02, (seed, name, float(error))  # attention's backward adds up in no fixed order


@pytest.mark.gpu
def test_losses_outlive_the_next_replay(gpu: torch.device) -> None:
    model = model_on(gpu)
    step = step_of(GraphedMicroStep, model, gpu)
    losses = [step(batch(seed), 64, False) for seed in range(3)]
    assert len({float(loss) for loss in losses}) == 3


def test_the_way_a_step_is_made() -> None:
    def way(assignment: str) -> str:
        return training.step_way(config.override(recipes.get("duel"), [assignment]), CPU)

    assert way("train.step=auto") == way("train.step=eager") == "eager"
    for choice in ("graphs", "compiled"):
        with pytest.raises(PgolfError, match=rf"train\.step={choice} needs a CUDA GPU"):
            way(f"train.step={choice}")


def test_auto_micro_batch_needs_a_gpu(tmp_path) -> None:
    from pgolf.fit import largest_micro_batch

    settings = config.override(recipes.get("demo"), ["train.micro_batch=auto"])
    with pytest.raises(PgolfError, match="needs a CUDA GPU; give a number"):
        largest_micro_batch(settings, CPU, torch.float32)


@pytest.mark.gpu
def test_auto_micro_batch_divides_the_step(gpu: torch.device) -> None:
    from pgolf.fit import largest_micro_batch

    settings = config.override(recipes.get("duel"), ["train.step_tokens=131072", "train.micro_batch=auto"])
    tokens = largest_micro_batch(settings, gpu, torch.bfloat16)
    assert 131072 % tokens == 0 and tokens >= 16384
