"""Muon against golden steps; the average; clipping."""

import numpy as np
import pytest
import torch

from pgolf.config import ModelConfig, TrainConfig
from pgolf.model import GPT
from pgolf.optim import Optimizer, muon_update, orthogonalize


@pytest.mark.golden
def test_golden_muon(golden):
    z = np.load(golden("muon.npz"), allow_pickle=False)
    lr, mu, decay = (float(z[key]) for key in ("lr", "momentum", "weight_decay"))
    names = sorted(key.removesuffix(".init") for key in z if key.endswith(".init"))
    assert names
    for name in names:
        weight = torch.from_numpy(z[f"{name}.init"].copy())
        momentum = torch.zeros_like(weight, dtype=torch.bfloat16)
        step = 0
        while f"{name}.grad{step}" in z:
            before = weight.clone()
            previous = z[f"{name}.init"] if step == 0 else z[f"{name}.step{step - 1}"]
            muon_update(weight, torch.from_numpy(z[f"{name}.grad{step}"]), momentum, lr, mu, decay)
            change = weight - before
            expected = torch.from_numpy(z[f"{name}.step{step}"] - previous)
            assert (change - expected).norm() <= 2e-2 * expected.norm(), (name, step)
            assert torch.cosine_similarity(change.flatten(), expected.flatten(), dim=0) >= 0.999, (name, step)
            step += 1
        assert step > 0


def test_orthogonalize_flattens_the_spectrum():
    update = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    singular = torch.linalg.svdvals(orthogonalize(update).float())
    assert singular.min() > 0.6 and singular.max() < 1.4


def tiny() -> GPT:
    config = ModelConfig(
        num_layers=3, model_dim=16, num_heads=2, num_kv_heads=1, vocab_size=32, rope_dims=4, num_loops=0,
        parallel_start_layer=2, xsa_last_n=3, gate_window=4,
    )  # fmt: skip
    return GPT(config).initialize(0)


def backward(model: GPT) -> None:
    ids = torch.arange(24)[None] % 32
    model.train_loss(ids, ids.roll(1)).backward()


@pytest.mark.parametrize("scope", ["rank", "global"])
def test_clipping_scales_adam_input(scope):
    """With a tiny limit the clipped gradient norm is the limit, whatever the scope, on one rank."""
    model = tiny()
    optimizer = Optimizer(model, TrainConfig(grad_clip=1e-3, clip_scope=scope))
    backward(model)
    grads = [p.grad.clone() for p in optimizer.rest.values() if p.grad is not None]
    total = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    optimizer.step(1.0, 0.9)
    first = next(p for p in optimizer.rest.values() if p in optimizer.adam.state)
    seen = optimizer.adam.state[first]["exp_avg"] / (1 - 0.9)
    expected = grads[0] * (1e-3 / total)
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-9)


def test_average_follows_its_decay():
    model = tiny()
    optimizer = Optimizer(model, TrainConfig(ema_decay=0.75))
    start = model.qo_bank.detach().clone()
    with torch.no_grad():
        model.qo_bank.add_(1.0)
    optimizer.update_average()
    torch.testing.assert_close(optimizer.average["qo_bank"], start + 0.25)


def test_state_round_trip_is_exact():
    """Saved and restored in another optimizer, the next step is bit-identical."""
    model = tiny()
    optimizer = Optimizer(model, TrainConfig())
    backward(model)
    optimizer.step(1.0, 0.9)
    optimizer.update_average()
    saved = {name: value.clone() for name, value in optimizer.tensors()}
    other = tiny()
    restored = Optimizer(other, TrainConfig())
    restored.load(saved)
    for which in ((model, optimizer), (other, restored)):
        backward(which[0])
        which[1].step(0.5, 0.95)
        which[1].update_average()
    for (name, a), (_, b) in zip(optimizer.tensors(), restored.tensors(), strict=True):
        assert torch.equal(a, b), name
