"""benchmarks/agreement.py on the CPU, where the fast path is PyTorch's: what it reads, measures and prints."""

import importlib
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pgolf import checkpoint, config, recipes
from pgolf.model import GPT
from pgolf.ops import attention

SETS = ["model.model_dim=32", "model.num_heads=2", "model.num_kv_heads=1", "model.vocab_size=300", "model.num_layers=6"]
LINE = re.compile(r"median of (\d+) +(\S+) +(\S+) +(\S+) +(\S+) +1\.00")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_active", "_resolved"):  # the script's choice of a backend ends with the test
        monkeypatch.setattr(attention, name, getattr(attention, name))
    return importlib.import_module("agreement")


@pytest.fixture
def call(script, monkeypatch, capsys):
    """Run the script on words: (exit code, what it prints, what it complains)."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["agreement", *map(str, words)])
        code = script.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_bfloat16_is_near_float32_and_without_kernels_the_same(call):
    words = [word for text in SETS for word in ("--set", text)]
    code, out, _ = call("--recipe", "demo", *words, "--tokens", 256, "--worst", 3)
    assert code == 0
    assert out.splitlines()[-1] == "kernels/PyTorch error ratio 1.000"
    count, error, cosine, *_ = LINE.search(out).groups()
    # 4 banks, of 12, 12, 6 and 6 matrices; all others but the two softcaps of the evaluation have a gradient
    with torch.device("meta"):
        parameters = len(list(GPT(config.override(recipes.get("demo"), SETS).model).parameters()))
    assert int(count) == 36 + parameters - 4 - 2
    assert 1e-3 < float(error) < 0.1 and 0.99 < float(cosine) < 1
    assert len(out.splitlines()) == 9 and "context 384 looped" in out


def test_error_and_cosine_are_of_the_difference(script):
    exact = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0]), "none": torch.zeros(2)}
    found = {"a": torch.tensor([3.0, 3.0]), "b": torch.tensor([0.0, 2.0]), "none": torch.ones(2)}
    table = script.errors(found, exact)
    assert table.keys() == {"a", "b"}
    assert table["a"] == pytest.approx((0.2, 21 / (5 * 18**0.5)))
    assert table["b"] == pytest.approx((5**0.5, 0.0))


def test_a_runs_weights_and_mode_are_used(script, tmp_path):
    settings = config.override(recipes.get("demo"), SETS)
    model = GPT(settings.model).initialize(7)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    state = {"config": config.to_dict(settings), "looping": False, "context": 64}
    safetensors.torch.save_file(tensors, checkpoint.path_of(tmp_path, 5), metadata={"state": json.dumps(state)})
    start = script.from_run(tmp_path)
    assert start.context == 64 and start.config == settings and not start.model.looping
    assert all(torch.equal(p, tensors[f"model.{name}"]) for name, p in start.model.named_parameters())


def test_losses_of_the_last_common_steps(call, tmp_path):
    for name, steps, base in (("one", 60, 2.0), ("other", 58, 2.5)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": s, "elapsed": 0.1, "loss": base + (100 if s < 8 else 0)}) for s in range(steps)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    code, out, _ = call("--losses", tmp_path / "one", tmp_path / "other" / "metrics.jsonl")
    assert code == 0 and "steps 8 to 57, 50 of both" in out
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["2.00000", "2.50000", "+0.50000"]


def test_what_cannot_be_compared_is_one_line(call, tmp_path):
    (tmp_path / "empty").write_text("")
    for words, message in (
        (("--losses", tmp_path, tmp_path), "holds no losses"),
        (("--losses", tmp_path / "empty", tmp_path / "empty"), "no step in common"),
        (("--run", tmp_path), "holds no checkpoint"),
        (("--run", tmp_path, "--set", "seed=1"), "--set changes a recipe"),
        (("--recipe", "nonsense"), "unknown recipe"),
    ):
        code, _, complaint = call(*words)
        assert code == 2 and message in complaint and complaint.count("\n") == 1
