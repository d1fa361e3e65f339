"""benchmarks/fp8.py without its GPU: what it rounds, adds up and trains, and how it refuses."""

import importlib
from pathlib import Path

import pytest
import torch

from pgolf import config, layers
from pgolf.ops import mlp as mlp_ops

CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("fp8")


def test_without_an_fp8_gpu_it_is_one_line(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["fp8"])
    assert script.main() == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An A100")
    assert script.main() == 2
    assert capsys.readouterr().err == (
        "fp8: needs a CUDA GPU\nfp8: An A100 has no FP8; needs compute capability 8.9 or newer\n"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [True, False])
def test_rounding_keeps_three_bits(script, dtype, rows):
    """Within 2^-4 of normal numbers; a scale for each row keeps rows of any size."""
    x = torch.randn(64, 96).to(dtype) * (torch.logspace(-8, 8, 64)[:, None].to(dtype) if rows else 1)
    values, scale = script.rounded(x, rows)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert scale.shape == ((64, 1) if rows else ())
    back = values.float() * scale
    largest = x.float().abs().amax(1, keepdim=True) if rows else x.float().abs().amax()
    normal = x.float().abs() > largest * 2**-6 / 448 * 1.1
    worst = ((back - x.float()).abs() / x.float().abs())[normal].max()
    assert 0.03 < worst < 2**-4 + 2**-7
    assert normal.float().mean() > 0.99


def test_straight_through(script):
    x = torch.randn(2, 3, 16, requires_grad=True)
    out = script.RoundStraightThrough.apply(x)
    assert out.shape == x.shape and not torch.equal(out, x) and torch.allclose(out, x, rtol=0.07, atol=0.02)
    grad = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], grad)


def test_mlp_is_the_models_but_for_the_rounding(script):
    x, up, down = torch.randn(5, 16), torch.randn(32, 16), torch.randn(16, 32)
    exact = mlp_ops.reference(x, up, down)
    assert torch.equal(script.plain_mlp(x, up, down), exact)
    error = (script.rounded_mlp(x, up, down) - exact).norm() / exact.norm()
    assert 0.005 < error < 0.15


def test_savings_are_sums_of_what_is_faster(script):
    """up gains 2 of which operands cost 0.5 or 3; down is slower in FP8; the head is absent; the rest gains nothing."""
    times = {(product.name, way): 1.0 for product in script.PRODUCTS for way in script.WAYS}
    times |= {("up", "bfloat16"): 5.0, ("up", "FP8 tensor"): 4.0, ("up", "FP8 row"): 3.0}
    times |= {("down", "FP8 tensor"): 1.5, ("down", "FP8 row"): None}
    times |= {("head", "FP8 tensor"): None, ("head", "FP8 row"): None}
    costs = {product.left: (3.0, 0.5) for product in script.PRODUCTS}
    table = script.savings(times, costs)
    assert table["up"] == (17 * 2.0, 17 * 1.5, 0.0)
    assert table["down"] == (0.0, 0.0, 0.0) and "head" not in table and len(table) == 5
    costs["x"] = (None, 0.5)
    assert script.savings(times, costs)["up"] == (34.0, 25.5, 0.0)


def test_both_curves_start_alike_and_part(script, tmp_path, capsys):
    changes = ["model.model_dim=32", "model.num_heads=2", "model.num_kv_heads=1", "model.vocab_size=300"]
    changes += ["train.step_tokens=512", "train.micro_batch=512", "train.contexts=64@1.0"]
    settings = config.override(script.small("demo", 12), changes)
    script.made_up_shard(tmp_path, 16 * 512, 300)
    before = layers.fused_mlp
    plain, other = (script.curve(settings, tmp_path, CPU, mlp) for mlp in (script.plain_mlp, script.rounded_mlp))
    assert layers.fused_mlp is before
    assert plain[0] == other[0]  # down is zero at the start: so is the MLP
    assert plain != other and other == pytest.approx(plain, abs=0.1)
    script.print_curves(settings, None, CPU)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == [*map(str, range(12)), "last"]
    assert [row[1] for row in rows[:-1]] == [f"{loss:.4f}" for loss in plain]
    assert float(rows[-1][2]) == pytest.approx(sum(plain[-10:]) / 10, abs=1e-4)
