"""The network against golden vectors, and the properties that the rules rest on."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from pgolf.config import ModelConfig
from pgolf.layers import at
from pgolf.model import GPT, layer_order
from pgolf.ops import attention

SMALL = ModelConfig(
    num_layers=5, model_dim=32, num_heads=4, num_kv_heads=2, vocab_size=64, rope_dims=4, loop_start=1, loop_end=2,
    parallel_start_layer=3, xsa_last_n=4, gate_window=8,
)  # fmt: skip


def golden_config(text: str) -> ModelConfig:
    """The model fields of a golden file's `config`."""
    values = json.loads(text)
    return ModelConfig(**{key: values[key] for key in values if key in ModelConfig.__dataclass_fields__})


def load(model: GPT, arrays: dict[str, np.ndarray]) -> GPT:
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})
    return model


def small_model(seed: int = 0) -> GPT:
    """A model whose every parameter matters."""
    model = GPT(SMALL).initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@pytest.mark.golden
@pytest.mark.parametrize("looping", [False, True])
def test_golden_model(golden, looping):
    z = np.load(golden("model.npz"), allow_pickle=False)
    model = GPT(golden_config(str(z["config"])))
    load(model, {key[6:]: z[key] for key in z if key.startswith("param.")})
    model.looping = looping
    prefix = f"loop{int(looping)}"
    ids, targets = (torch.from_numpy(z[key]).long() for key in ("input_ids", "target_ids"))
    cu_seqlens = torch.from_numpy(z["cu_seqlens"])
    if looping:
        assert model.order() == (z["encoder_indices"].tolist(), z["decoder_indices"].tolist())
    with torch.no_grad():
        segmented = model.eval_logits(model.hidden(ids, cu_seqlens))
        whole = model.eval_logits(model.hidden(ids))
    expected = torch.from_numpy(z[f"{prefix}.eval_logits"]).view_as(segmented)
    assert relative(segmented, expected) <= 1e-4
    assert relative(whole, torch.from_numpy(z[f"{prefix}.eval_logits_no_cu"]).view_as(whole)) <= 1e-4
    loss = model.train_loss(ids, targets, cu_seqlens)
    assert loss.item() == pytest.approx(float(z[f"{prefix}.train_loss"]), rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = torch.from_numpy(np.array(z[f"{prefix}.grad.{name}"]))
        if expected.numel() == 0:
            assert parameter.grad is None, name
        else:
            assert relative(parameter.grad, expected) <= 1e-4, name


def test_record_shape():
    """The recipe states 35,945,673 parameters and 17 executed layers."""
    model = GPT(ModelConfig())
    assert sum(p.numel() for p in model.parameters()) == 35_945_673
    assert model.order() == ([0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])
    assert layer_order(ModelConfig(), False) == (list(range(5)), list(range(5, 11)))
    assert model.slots == 17


@pytest.mark.parametrize("looping", [False, True])
def test_no_look_ahead(looping):
    """A later token never changes an earlier output, in one row or in packed segments."""
    model = small_model()
    model.looping = looping
    ids = torch.randint(2, SMALL.vocab_size, (1, 24))
    cu_seqlens = torch.tensor([0, 10, 24, 24], dtype=torch.int32)
    for bounds in (None, cu_seqlens):
        before = model.hidden(ids, bounds)
        for t in (5, 12, 23):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % SMALL.vocab_size
            assert torch.equal(model.hidden(changed, bounds)[:, :t], before[:, :t])
            assert not torch.equal(model.hidden(changed, bounds)[:, t], before[:, t])


def test_documents_do_not_mix():
    """With boundaries and a BOS at each document's start, a document's outputs ignore its neighbours.

    Rotary positions count from the start of the buffer, so only relative ones may matter.
    """
    model = small_model()
    ids = torch.randint(2, SMALL.vocab_size, (1, 20))
    ids[0, 8] = 1
    cu_seqlens = torch.tensor([0, 8, 20], dtype=torch.int32)
    alone = model.hidden(ids[:, 8:])
    packed = model.hidden(ids, cu_seqlens)[:, 8:]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_distribution_is_normalized():
    model = small_model()
    logits = model.eval_logits(model.hidden(torch.randint(0, SMALL.vocab_size, (2, 9))))
    torch.testing.assert_close(logits.softmax(-1).sum(-1), torch.ones(2, 9))


def test_initial_weights_follow_the_seed():
    first, again, other = (GPT(SMALL).initialize(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["qo_bank"], other["qo_bank"])
    assert first["mlp_down_bank"].abs().sum() == 0
    assert first["smear_gate.weight"].abs().sum() == 0


class Poison(torch.autograd.Function):
    """Keys or values whose gradients from used[b] on are what a kernel finds in memory."""

    @staticmethod
    def forward(ctx, x, used):
        ctx.save_for_backward(used)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (used,) = ctx.saved_tensors
        behind = torch.arange(grad.shape[1]) >= used[:, None]
        return grad.masked_fill(behind[..., None, None], torch.nan), None


@pytest.mark.parametrize("changes", [{}, {"parallel_start_layer": 5}, {"num_layers": 1, "num_loops": 0}])
@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("length", [11, 2])
def test_wanted_places_are_those_of_all(length, looping, changes, monkeypatch):
    """Values and gradients; rows want different places, some fewer than there is room for, one none."""
    queries = []

    def poisoned(q, k, v, used):
        queries.append(q.shape[1])
        return attention.cached_reference(q, Poison.apply(k, used), Poison.apply(v, used), used)

    monkeypatch.setattr("pgolf.layers.cached_attention", poisoned)
    model = GPT(dataclasses.replace(SMALL, **changes)).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.looping = looping and SMALL.num_loops > 0
    generator = torch.Generator().manual_seed(4)
    table = {11: [[0, 1, 2], [4, 5, 0], [8, 9, 10], [9, 10, 0], [10, 0, 0], [0, 0, 0]], 2: [[0, 1, 0], [1, 0, 0]]}
    counts = {11: [3, 2, 3, 2, 1, 0], 2: [2, 1]}
    places, count = torch.tensor(table[length]), torch.tensor(counts[length])
    ids = torch.randint(0, 64, (len(places), length), generator=generator)
    wanted = (torch.arange(3) < count[:, None])[..., None]
    weight = torch.randn(len(places), 3, 32, generator=generator) * wanted
    gradients = []
    for few in (False, True):
        model.zero_grad()
        found = model.hidden(ids, places=places) if few else at(model.hidden(ids), places)
        assert found.isfinite().all()
        (found * weight).sum().backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
        gradients[-1].append(found.detach() * wanted)
    assert queries == [min(3, length)]
    for some, every in zip(*gradients, strict=True):
        torch.testing.assert_close(some, every, rtol=1e-4, atol=1e-5)
