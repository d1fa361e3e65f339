"""Curves against golden values and at their edges."""

import numpy as np
import pytest

from pgolf import schedule
from pgolf.config import TrainConfig
from pgolf.errors import PgolfError


@pytest.mark.golden
def test_golden_schedule(golden):
    z = np.load(golden("schedule.npz"), allow_pickle=False)
    config = TrainConfig()
    assert [schedule.context_length(config, f) for f in z["frac"]] == z["seq_len"].tolist()
    np.testing.assert_allclose([schedule.lr_scale(config, f) for f in z["frac"]], z["lr_scale"], rtol=0, atol=1e-12)


def test_rewarm_and_momentum():
    config = TrainConfig()
    assert schedule.rewarm(config, None) == 1.0
    assert schedule.rewarm(config, 0) == 1 / 32
    assert schedule.rewarm(config, 31) == schedule.rewarm(config, 500) == 1.0
    assert schedule.muon_momentum(config, 0) == 0.92
    assert schedule.muon_momentum(config, 1500) == schedule.muon_momentum(config, 9999) == pytest.approx(0.97)


def test_modes_are_what_the_run_meets():
    config = TrainConfig()
    assert schedule.modes(config) == [(1024, False), (2048, False), (2048, True), (3072, True)]
    assert schedule.modes(config, until=0.25) == [(1024, False), (2048, False)]


@pytest.mark.parametrize("text", ["1024", "1024@x", "1024@0.5", "1024@0.9,2048@0.5", "0@1.0", ""])
def test_bad_contexts_are_refused(text):
    with pytest.raises(PgolfError, match="train.contexts"):
        schedule.parse_contexts(text)
