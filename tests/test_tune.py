"""Tuning of what the artifact keeps in floating point, through frozen levels."""

import numpy as np
import pytest
import torch

from pgolf import banks, loading
from pgolf.config import ModelConfig, QuantizeConfig
from pgolf.data.loader import Batch
from pgolf.errors import PgolfError
from pgolf.model import BOS, GPT
from pgolf.quantize import tune
from pgolf.quantize.solve import GATE_SUFFIX, quantize_state

MODEL = ModelConfig(
    num_layers=4, model_dim=32, num_heads=2, num_kv_heads=1, vocab_size=64, mlp_mult=2.0, rope_dims=4,
    loop_start=1, loop_end=1, parallel_start_layer=3, xsa_last_n=4, gate_window=8,
)  # fmt: skip


def batches(count: int) -> list[Batch]:
    """Text that repeats itself: something to learn."""
    ids = torch.tensor([BOS, *([7, 11, 13, 17, 19] * 20)])[None]
    ends = torch.tensor([0, 100], dtype=torch.int32)
    return [Batch(ids[:, :-1], ids[:, 1:], ends, 100)] * count


@pytest.fixture
def rounded() -> tuple[dict[str, np.ndarray], GPT]:
    """A quantized state (matrices of over 1,000 entries as integers) and the model that it makes."""
    model = GPT(MODEL).initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    matrices = banks.unbank({name: p.detach() for name, p in model.state_dict().items()}, MODEL.num_layers)
    hessians = {name: torch.eye(w.shape[1]) for name, w in matrices.items() if w.ndim == 2}
    config = QuantizeConfig(mode="record", passthrough=1000, awq_groups=0, lqer_rank=0)
    state, _ = quantize_state(matrices, hessians, {}, config)
    return state, loading.model_from_state(state, MODEL)


def small_names(model: GPT) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    return [n for n in names if n not in banks.BANKS and n != tune.EMBEDDING and not n.endswith(GATE_SUFFIX)]


def test_tuning_lowers_the_loss_and_the_state_becomes_the_tuned_model(rounded):
    state, model = rounded
    (batch,) = batches(1)
    tuned = tune.tune(model, batches(30), small_names(model), steps=30, lr=0.01)
    assert tuned.losses[-1] < tuned.losses[0] - 0.05
    after = tune.apply(state, tuned)
    again = loading.model_from_state(after, MODEL)
    with torch.no_grad():
        losses = [m.train_loss(batch.inputs, batch.targets, batch.cu_seqlens, 100).item() for m in (model, again)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)  # fp16 is all that lies between
    assert losses[1] < tuned.losses[0] - 0.05


def test_levels_and_gates_stay(rounded):
    state, model = rounded
    after = tune.apply(state, tune.tune(model, batches(3), small_names(model), steps=3, lr=0.01))
    assert after.keys() == state.keys()
    assert any(name.endswith(".q") for name in state)
    for name, array in state.items():
        assert after[name].dtype == array.dtype
        if name.endswith((".q", ".gq", ".gs")):
            assert np.array_equal(after[name], array), name
    assert not np.array_equal(after["tok_emb.weight.scale"], state["tok_emb.weight.scale"])
    assert not np.array_equal(after["blocks.0.attn_scale"], state["blocks.0.attn_scale"])
    # of a matrix that is no integer, the rows' factors go into its values
    assert not np.array_equal(after["blocks.0.attn.c_k.weight"], state["blocks.0.attn.c_k.weight"])


def test_nothing_moves_without_a_step(rounded):
    state, model = rounded
    tuned = tune.tune(model, [], small_names(model), steps=0, lr=0.01)
    assert tuned.losses == []
    for name, array in tune.apply(state, tuned).items():
        assert np.array_equal(array, state[name]), name


def test_first_step_goes_against_the_slope_of_each_row(rounded):
    """Adam's first step is the learning rate against the sign of the gradient; the sign from finite differences."""
    _, model = rounded
    (batch,) = batches(1)
    before = model.mlp_up_bank.detach().clone()
    rows = [(0, 3), (1, 9), (2, 5), (3, 17)]
    slopes = []
    for row in rows:
        losses = []
        for factor in (0.9, 1.1):
            with torch.no_grad():
                model.mlp_up_bank[row] = factor * before[row]
                losses.append(model.train_loss(batch.inputs, batch.targets, batch.cu_seqlens, 100).item())
        with torch.no_grad():
            model.mlp_up_bank.copy_(before)
        slopes.append(losses[1] - losses[0])
    assert min(map(abs, slopes)) > 1e-5  # beyond the rounding of a loss
    tuned = tune.tune(model, batches(1), [], steps=1, lr=0.01)
    moved = [tuned.factors[f"blocks.{layer}.mlp.fc.weight"][row].item() - 1 for layer, row in rows]
    assert moved == pytest.approx([-0.01 / tune.WARM_UP * np.sign(slope) for slope in slopes], rel=1e-2)


def test_a_loss_that_is_not_finite_is_refused(rounded):
    _, model = rounded
    with torch.no_grad():
        model.mlp_down_bank.fill_(float("inf"))
    with pytest.raises(PgolfError, match="tune_lr"):
        tune.tune(model, batches(1), [], steps=1, lr=0.01)


def test_numbers_beyond_fp16_are_refused(rounded):
    state, model = rounded
    tuned = tune.tune(model, [], ["blocks.0.attn_scale"], steps=0, lr=0.01)
    tuned.small["blocks.0.attn_scale"][0] = 1e6
    with pytest.raises(PgolfError, match=r"blocks\.0\.attn_scale does not fit"):
        tune.apply(state, tuned)
