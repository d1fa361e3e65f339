"""Calibration: Hessians of a model's inputs, on one rank and on two; banks and the matrices in them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgolf import parallel
from pgolf.banks import BANKS, bank, unbank
from pgolf.config import ModelConfig
from pgolf.errors import PgolfError
from pgolf.model import GPT
from pgolf.quantize import HessianCollector, collect


def test_collector_sums_calls_and_shares_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 8, generator=generator), torch.randn(3, 8, generator=generator)
    collector = HessianCollector()
    collector.add(("q", "k"), first)
    collector.add(("q", "k"), second)  # a second pass through a looped layer
    hessians, act_rms = collector.finish(batches=4)
    rows = torch.cat([first.reshape(-1, 8), second]).double()
    assert hessians.keys() == act_rms.keys() == {"q", "k"}
    for name in ("q", "k"):
        torch.testing.assert_close(hessians[name].double(), rows.T @ rows / 4, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(act_rms[name].double(), rows.square().mean(0).sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_squares_bfloat16_exactly() -> None:
    """Products of bfloat16 numbers are exact in float32; sums of 5,000 of them stay within float32's error of them."""
    x = torch.randn(2, 2500, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    collector = HessianCollector()
    collector.add(("a",), x.cuda())
    (hessians, _) = collector.finish(1)
    exact = x.flatten(0, 1).double()
    assert hessians["a"].dtype == torch.float32
    most = 5000 * 2.0**-23 * (exact.abs().T @ exact.abs())
    assert bool(((hessians["a"].cpu().double() - exact.T @ exact).abs() <= most).all())


def test_collector_sums_in_float32_under_autocast() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    collector = HessianCollector()
    with torch.autocast("cpu", torch.bfloat16):
        collector.add(("m",), x)
    torch.testing.assert_close(collector.finish(1)[0]["m"], x.T @ x)


def small_model() -> GPT:
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, vocab_size=64, rope_dims=4, loop_start=1, loop_end=2,
        parallel_start_layer=3, gate_window=8,
    )  # fmt: skip
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def small_batches(count: int) -> list[tuple[Tensor, Tensor | None, int | None]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(64, (1, 24), generator=generator), None, None) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collect_reaches_every_matrix_of_the_model(dtype: torch.dtype) -> None:
    model = small_model()
    hessians, act_rms = collect(model, small_batches(2), "cpu", dtype)
    matrices = {name for name in unbank(model.state_dict(), 4) if name.endswith(("attn.proj.weight", "tok_emb.weight"))}
    matrices |= {name for b in BANKS for name in unbank({b: model.state_dict()[b]}, 4)}
    assert hessians.keys() == act_rms.keys() == matrices
    weights = unbank(model.state_dict(), 4)
    for name, hessian in hessians.items():
        assert hessian.shape == (weights[name].shape[1],) * 2 and hessian.dtype == torch.float32
        assert bool((act_rms[name] > 0).all())
    assert model.observer is None and model.dtype == torch.float32
    # final-norm outputs have mean square one: 24 rows a batch
    assert float(hessians["tok_emb.weight"].trace()) == pytest.approx(24 * 32, rel=1e-2)
    # a looped layer is observed once a pass: its input is normalized too, to 1 / (layer + 1)
    assert float(hessians["blocks.1.mlp.fc.weight"].trace()) == pytest.approx(3 * 24 * 32 / 2, rel=1e-2)


def test_collect_removes_its_observer_on_failure_and_refuses_no_data() -> None:
    model = small_model()
    with pytest.raises(PgolfError, match="no batch"):
        collect(model, [], "cpu", torch.float32)
    with pytest.raises(IndexError):
        collect(model, [(torch.full((1, 4), 999), None, None)], "cpu", torch.float32)
    assert model.observer is None


def as_rank(rank: int, folder: str) -> None:
    """What each process of `test_two_ranks_equal_one` runs."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    batches = small_batches(4)[2 * rank : 2 * rank + 2]
    for all_reduce in (True, False):
        hessians, act_rms = collect(small_model(), batches, "cpu", torch.float32, all_reduce=all_reduce)
        torch.save([hessians, act_rms], f"{folder}/{rank}-{all_reduce}")
    parallel.leave(0)


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    model = small_model()
    together = collect(model, small_batches(4), "cpu", torch.float32)
    alone = collect(model, small_batches(2), "cpu", torch.float32)
    for rank, all_reduce, expected in ((0, True, together), (1, True, together), (0, False, alone)):
        got = torch.load(tmp_path / f"{rank}-{all_reduce}", weights_only=True)
        for part, reference in zip(got, expected, strict=True):
            for name, value in reference.items():
                torch.testing.assert_close(part[name], value, rtol=1e-4, atol=1e-5)


# Banks


@settings(max_examples=20, deadline=None)
@given(layers=st.integers(1, 5), dim=st.integers(1, 6), kv=st.integers(1, 4), hidden=st.integers(1, 8))
def test_banks_round_trip(layers: int, dim: int, kv: int, hidden: int) -> None:
    state = {
        "tok_emb.weight": torch.randn(3, dim),
        "qo_bank": torch.randn(2 * layers, dim, dim),
        "kv_bank": torch.randn(2 * layers, kv, dim),
        "mlp_up_bank": torch.randn(layers, hidden, dim),
        "mlp_down_bank": torch.randn(layers, dim, hidden),
        "softcap_pos": torch.tensor(30.0),
    }
    flat = unbank(state, layers)
    assert len(flat) == 2 + 6 * layers
    last = layers - 1
    assert torch.equal(flat[f"blocks.{last}.attn.c_q.weight"], state["qo_bank"][last])
    assert torch.equal(flat[f"blocks.{last}.attn.proj.weight"], state["qo_bank"][layers + last])
    assert torch.equal(flat[f"blocks.{last}.attn.c_k.weight"], state["kv_bank"][last])
    assert torch.equal(flat[f"blocks.{last}.attn.c_v.weight"], state["kv_bank"][layers + last])
    assert torch.equal(flat[f"blocks.{last}.mlp.fc.weight"], state["mlp_up_bank"][last])
    assert torch.equal(flat[f"blocks.{last}.mlp.proj.weight"], state["mlp_down_bank"][last])
    back = bank(flat, layers)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) and back[name].shape == value.shape for name, value in state.items())


def test_bank_errors_name_what_is_wrong() -> None:
    flat = unbank(small_model().state_dict(), 4)
    with pytest.raises(PgolfError, match=r"qo_bank must hold 10 matrices for 5 layers, got \[8, 32, 32\]"):
        unbank(small_model().state_dict(), 5)
    with pytest.raises(PgolfError, match=r"blocks\.4\.attn\.c_q\.weight is missing"):
        bank(flat, 5)
    with pytest.raises(PgolfError, match=r"blocks\.3\.mlp\.fc\.weight must have the shape"):
        bank(flat | {"blocks.3.mlp.fc.weight": torch.zeros(1, 1)}, 4)


if __name__ == "__main__":
    as_rank(int(sys.argv[1]), sys.argv[2])
