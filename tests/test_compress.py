"""From a model to an artifact: how calibration, solving, tuning and the budget hang together."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pgolf import compress, recipes
from pgolf.config import Config, QuantizeConfig, override
from pgolf.data.loader import Batch
from pgolf.model import GPT
from pgolf.quantize.solve import Fitted


def test_calibration_batches(monkeypatch):
    expected = {("record", 1): 16, ("record", 8): 16, ("trellis", 1): 32, ("trellis", 2): 16, ("trellis", 8): 16}
    for (mode, ranks), count in expected.items():
        monkeypatch.setattr(compress.parallel, "world_size", lambda ranks=ranks: ranks)
        assert compress.calibration_batches(QuantizeConfig(mode=mode)) == count
        assert compress.calibration_batches(QuantizeConfig(mode=mode, calibration_batches=5)) == 5
    assert compress.calibration_batches(QuantizeConfig(mode="trellis", calibration="rank0")) == 32


@pytest.mark.parametrize(
    ("tokens", "taken"),
    [(1000, {0: 40, 1: 40, 2: 40, 3: 40}), (160, {0: 40, 1: 40, 2: 40, 3: 40}), (70, {0: 35, 2: 35}), (7, {0: 7})],
)
def test_sensitivities_come_from_few_large_slices(monkeypatch, tokens, taken):
    """The slices are as large as may be, and come from batches all over the calibration data."""
    monkeypatch.setattr(compress, "LARGEST_SLICE", 50)
    bounds = torch.tensor([0, 30, 40], dtype=torch.int32)
    batches = [Batch(torch.full((1, 40), i), torch.full((1, 40), i), bounds, 30) for i in range(4)]
    slices = list(compress._slices(batches, tokens))
    assert {int(inputs[0, 0]): inputs.shape[1] for inputs, *_ in slices} == taken
    assert all(int(edges[-1]) == inputs.shape[1] for inputs, _, edges, _ in slices)
    monkeypatch.setattr(compress, "LARGEST_SLICE", 16)
    assert [one[0].shape[1] for one in compress._slices(batches, 64)] == [16] * 4


class Stages:
    """Stand-ins for the stages: each solve fills what it may, tuning adds the bytes of `growth`, one entry a try."""

    def __init__(self, growth: list[int]) -> None:
        self.growth, self.rooms = growth, []

    def solve(self, matrices: Any, config: Config, calibration: Any, budget: int, room: int, pack: Any) -> Fitted:
        self.rooms.append(room)
        return Fitted({}, bytes(budget - room), {"outcome": "filled"})

    def tune(self, model: GPT, config: Config, fitted: Fitted, batches: Any, pack: Any) -> Fitted:
        more = self.growth[len(self.rooms) - 1]
        return Fitted({}, b"t" * (len(fitted.packed) + more), fitted.report | {"tuning_losses": [1.0]})


def run(growth: list[int], monkeypatch: pytest.MonkeyPatch, *settings: str) -> tuple[compress.Compressed, Stages]:
    stages = Stages(growth)
    monkeypatch.setattr(compress, "_calibrate", lambda *_: compress._Calibration(({}, {}), None, []))
    monkeypatch.setattr(compress, "_solve", stages.solve)
    monkeypatch.setattr(compress, "_tune", stages.tune)
    config = override(recipes.get("demo"), ["quantize.mode=trellis", *settings])
    model = GPT(config.model)
    return compress.compress(model, config, Path("nowhere"), torch.device("cpu"), ""), stages


def test_what_is_tuned_and_fits_is_kept(monkeypatch):
    (fitted, budget, seconds), stages = run([1500], monkeypatch)
    assert budget == 16_000_000
    assert stages.rooms == [2000]
    assert len(fitted.packed) == 16_000_000 - 500
    assert fitted.packed.startswith(b"t")
    assert set(seconds) == {"calibrate", "solve", "tune", "pack"}


def test_what_outgrows_the_budget_is_solved_again_with_more_room(monkeypatch):
    (fitted, _, _), stages = run([9000, 9200], monkeypatch)
    assert stages.rooms[1] >= 9000
    assert 16_000_000 - 1000 < len(fitted.packed) <= 16_000_000
    assert fitted.packed.startswith(b"t")


def test_never_over_the_budget_whatever_tuning_does(monkeypatch):
    (fitted, budget, _), stages = run([9000, 90_000, 900_000], monkeypatch)
    assert len(stages.rooms) == compress.TUNING_TRIES
    assert len(fitted.packed) <= budget
    assert not fitted.packed.startswith(b"t")


def test_without_tuning_the_whole_budget_is_the_solvers(monkeypatch):
    (fitted, budget, _), stages = run([], monkeypatch, "quantize.tune_steps=0")
    assert stages.rooms == [0]
    assert len(fitted.packed) == budget
