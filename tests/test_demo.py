"""The demo from text to table, with a few training steps only: that it runs, not how well it learns."""

import json

import pytest

from pgolf import artifact, cli, demo


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo's run folder."""
    run = tmp_path_factory.mktemp("demo") / "run"
    assert cli.main(["demo", "--out", str(run), "--set", "train.steps=3", "--set", "model.vocab_size=512"]) == 0
    return run


def test_every_stage_is_scored_and_timed(finished):
    scores = json.loads((finished / "score.json").read_text())
    assert set(scores) == {
        "weights", "artifact, in this process", "artifact", "artifact with test-time training"
    }  # fmt: skip
    assert scores["artifact"]["bpb"] == pytest.approx(scores["artifact, in this process"]["bpb"], abs=1e-6)
    # Whatever the network has learned: adapting to a document while reading it must help.
    assert scores["artifact with test-time training"]["bpb"] < scores["artifact"]["bpb"]
    seconds = json.loads((finished / "run.json").read_text())["seconds"]
    assert {"train", "solve", "pack", "everything"} <= seconds.keys()


def test_the_coder_beats_general_compressors_on_its_tensors(finished):
    rows = demo.coder_rows(finished / "model.pgolf")
    assert [row[0] for row in rows][-1] == "sum" and len(rows) == 8
    ours, xz, brotli = (int(text.replace(",", "")) for text in rows[-1][1:])
    assert ours < min(xz, brotli)
    coded = artifact.sizes(finished / "model.pgolf")
    assert ours == sum(coded[row[0]] for row in rows[:-1])


def test_a_finished_demo_is_not_overwritten(finished, capsys):
    before = (finished / "model.pgolf").read_bytes()
    assert cli.main(["demo", "--out", str(finished)]) == 2
    assert "already holds a demo" in capsys.readouterr().err
    assert (finished / "model.pgolf").read_bytes() == before
