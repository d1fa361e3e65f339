"""`pgolf inspect`: every byte has its place, forms are recognized, and what cannot be told is refused in one line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pgolf import artifact, cli, inspection
from pgolf.errors import PgolfError

OCTAL = {4: ("5", "2"), 8: ("13", "4"), 32: ("45", "10"), 64: ("103", "24"), 256: ("515", "362")}


def levels(rows: int, columns: int, scale: float, seed: int = 0) -> np.ndarray:
    return np.clip(np.rint(np.random.default_rng(seed).normal(0, scale, (rows, columns))), -126, 126).astype(np.int8)


def on_trellis(rows: int, columns: int, states: int, scale: float = 5.0) -> np.ndarray:
    """Entry by entry, by the definition: t = 2k + (s & 1), and the state moves on by the low bits of s and k."""
    h0, h1 = (int(digits, 8) for digits in OCTAL[states])
    wanted = levels(rows, columns, scale)
    result = np.empty_like(wanted)
    for column in range(columns):
        state = 0
        for row in range(rows):
            k = int(wanted[row, column] - (state & 1)) >> 1
            result[row, column] = 2 * k + (state & 1)
            state = (state >> 1) ^ ((h0 >> 1) * (state & 1)) ^ ((h1 >> 1) * (k & 1))
    return result


def state() -> dict[str, np.ndarray]:
    half = np.linspace(0, 1, 64, dtype=np.float16)
    result = {"tok_emb.weight.q": levels(64, 48, 9.0), "tok_emb.weight.scale": half}
    for layer in (0, 1, 11):
        name = f"blocks.{layer}.mlp.fc.weight"
        result |= {f"{name}.q": on_trellis(64, 32, 64), f"{name}.scale": half, f"{name}.step": levels(1, 32, 3.0)[0]}
    return result | {
        "blocks.0.attn.c_q.weight.q": levels(64, 32, 1.0),
        "blocks.0.attn.c_q.weight.scale": half,
        "blocks.0.attn.c_q.weight.awqg_start": np.array([16], np.int16),
        "blocks.0.attn.c_q.weight.lqA_a": levels(64, 2, 1.0),
        "blocks.0.attn.attn_gate_w.gq": levels(2, 12, 40.0),
        "blocks.0.attn.attn_gate_w.gs": half[:2],
        "blocks.0.attn.q_gain": half[:5],
        "lone": np.float32(3).reshape(()),
        "nothing": np.zeros((0, 4), np.int32),
        "zeros.q": np.zeros((9, 9), np.int8),
        "zeros.scale": half[:9],
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    artifact.save(tmp_path / "model.pgolf", state(), {"seed": 1}, b"print('hello')\n" * 30)
    return tmp_path / "model.pgolf"


def account(path: Path, **values: object) -> None:
    matrices = {"blocks.0.mlp.fc.weight": {"bits": 3.0, "nats": 0.003}, "tok_emb.weight": {"bits": 4.0, "nats": 0.001}}
    told = {"bytes": path.stat().st_size, "matrices": matrices} | values
    (path.parent / "quantize.json").write_text(json.dumps(told))


def main(*words: object) -> int:
    return cli.main(["inspect", *map(str, words)])


def test_every_byte_has_its_place(path: Path) -> None:
    report = inspection.inspect(path)
    assert report.bytes == path.stat().st_size
    rest = report.table + report.source + report.container
    assert sum(weight.bytes for weight in report.weights) + rest == report.bytes
    assert sum(role.bytes for role in report.roles()) + rest == report.bytes
    weights = {weight.name: weight for weight in report.weights}
    for name, size in artifact.matrix_sizes(path).items():
        assert weights[name.removesuffix(".q")].level_bytes == size
    for weight in report.weights:
        assert weight.bytes >= (weight.level_bytes or 0), weight
    # fp16 is shared out by size: 64 numbers a matrix get 32 times the gate's 2, up to rounding.
    scales = [weights[f"blocks.{layer}.mlp.fc.weight"] for layer in (0, 1, 11)]
    assert len({scale.shape for scale in scales}) == 1
    extra = [scale.bytes - (scale.level_bytes or 0) for scale in scales]
    assert max(extra) - min(extra) <= 2 and min(extra) > 32


def test_forms_shapes_and_roles(path: Path) -> None:
    report = inspection.inspect(path)
    forms = {weight.name: (weight.form, weight.shape) for weight in report.weights}
    plain = state()
    embedding, query = plain["tok_emb.weight.q"], plain["blocks.0.attn.c_q.weight.q"]
    assert forms == {
        "tok_emb.weight": (f"gptq {embedding.min()}..{embedding.max()}", (64, 48)),
        **{f"blocks.{layer}.mlp.fc.weight": ("trellis 64 + column steps", (64, 32)) for layer in (0, 1, 11)},
        "blocks.0.attn.c_q.weight": (f"gptq {query.min()}..{query.max()} + protected + low rank", (64, 32)),
        "blocks.0.attn.attn_gate_w": ("int8 by row", (2, 12)),
        "blocks.0.attn.q_gain": ("fp16", (5,)),
        "lone": ("fp32", ()),
        "nothing": ("int32", (0, 4)),
        "zeros": ("gptq 0..0", (9, 9)),
    }
    roles = {role.name: role for role in report.roles()}
    assert (roles["mlp.fc"].weights, roles["mlp.fc"].count) == (3, 3 * 64 * 32)
    sizes = [role.bytes for role in report.roles()]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("states", OCTAL)
@pytest.mark.parametrize("scale", [0.4, 5.0, 90.0])
def test_a_trellis_is_recognized_until_one_parity_is_wrong(states: int, scale: float) -> None:
    matrix = on_trellis(60, 7, states, scale)
    assert inspection.trellis_states(matrix) == states
    assert inspection.trellis_states(matrix[:, ::-1]) == states  # columns are independent
    for place in [(0, 0), (59, 6), (30, 3)]:
        broken = matrix.copy()
        broken[place] ^= 1
        assert inspection.trellis_states(broken) is None
    assert inspection.trellis_states(levels(60, 7, 5.0)) is None


def test_json_adds_up(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    account(path)
    assert main(path.parent, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == path.stat().st_size and told["left"] == 16_000_000 - told["bytes"]
    rest = told["table"] + told["source"] + told["container"]
    assert sum(weight["bytes"] for weight in told["weights"]) + rest == told["bytes"]
    for kind in ("weights", "roles"):
        assert math.isclose(sum(row["share"] for row in told[kind]), 1 - rest / told["bytes"])
    weights = {weight["name"]: weight for weight in told["weights"]}
    assert weights["nothing"]["bits_per_weight"] is None
    assert weights["tok_emb.weight"]["bits_per_weight"] == 8 * weights["tok_emb.weight"]["bytes"] / (64 * 48)
    assert weights["blocks.0.mlp.fc.weight"]["loss_share"] == pytest.approx(0.75)
    assert weights["blocks.1.mlp.fc.weight"]["loss_share"] is None
    roles = {role["name"]: role for role in told["roles"]}
    assert roles["mlp.fc"]["loss_share"] == pytest.approx(0.75) and roles["attn.c_q"]["loss_share"] is None
    assert told["what_if"] is None


def test_tables_name_every_weight(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(path) == 0
    text = capsys.readouterr().out
    for weight in inspection.inspect(path).weights:
        assert weight.name in text and weight.form in text
    for word in ("mlp.fc", "(source)", "(table)", "(container)", f"{path.stat().st_size:,} bytes", "to spare"):
        assert word in text
    assert "loss" not in text
    account(path)
    assert main(path) == 0
    text = capsys.readouterr().out
    assert "share of loss" in text and "75.00%" in text


def test_losses_of_another_artifact_are_left_out(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    account(path, bytes=5)
    assert main(path) == 0
    text = capsys.readouterr().out
    assert "quantize.json tells of another artifact (5 bytes)" in text and "share of loss" not in text


@pytest.mark.parametrize(
    "matrices",
    [
        [],
        {"a": {"nats": -1.0}},
        {"a": {"nats": "1"}},
        {"a": {"nats": True}},
        {"a": {"nats": float("nan")}},
        {"a": {}},
        {"a": 3},
    ],
)
def test_a_garbled_account_is_named(path: Path, matrices: object, capsys: pytest.CaptureFixture[str]) -> None:
    account(path, matrices=matrices)
    refused(capsys, [path], "quantize.json", "quantize again")
    (path.parent / "quantize.json").write_text("{")
    refused(capsys, [path], "quantize.json", "not valid JSON")


def test_an_account_may_name_other_weights(path: Path) -> None:
    account(path, matrices={"tok_emb.weight": {"nats": 2}, "absent": {"nats": 1.0}})
    losses = {weight.name: weight.loss for weight in inspection.inspect(path).weights if weight.loss is not None}
    assert losses == {"tok_emb.weight": 2.0}


def test_what_if_is_the_rule_at_high_rate(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspection.inspect(path)
    count = sum(weight.count for weight in report.weights if weight.level_bytes is not None)
    same = report.what_if(report.bytes)
    assert (same.bits_per_weight_change, same.distortion_factor) == (0, 1)
    more = report.what_if(report.bytes + count // 8)
    assert more.bits_per_weight_change == pytest.approx(1, abs=0.01)
    assert more.distortion_factor == pytest.approx(1 / 4, rel=0.01)
    assert main(path, "--what-if", report.bytes - count // 16) == 0
    text = capsys.readouterr().out
    assert "bits then" in text and "-0.500 bits a weight" in text and "distortion x 2 (" in text and "estimate" in text
    assert main(path, "--what-if", report.bytes, "--json") == 0
    told = json.loads(capsys.readouterr().out)["what_if"]
    assert told == {"bytes": report.bytes, "bits_per_weight_change": 0, "distortion_factor": 1}


def refused(capsys: pytest.CaptureFixture[str], words: list[object], *wanted: str) -> None:
    """Exit code 2, nothing printed, and one line of error with these words."""
    capsys.readouterr()
    code = main(*words)
    out, errors = capsys.readouterr()
    assert code == 2 and not out and errors.startswith("pgolf: ") and errors.count("\n") == 1, errors
    for word in wanted:
        assert word in errors, errors


def test_each_mistake_is_one_line(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = path.read_bytes()
    refused(capsys, [tmp_path / "absent"], "absent does not exist")
    (tmp_path / "empty").mkdir()
    refused(capsys, [tmp_path / "empty"], "model.pgolf does not exist")
    for content, word in ((b"text", "not a pgolf model"), (data[:-9], "truncated"), (data[:-9] + b"x" * 9, "damaged")):
        (tmp_path / "bad.pgolf").write_bytes(content)
        refused(capsys, [tmp_path / "bad.pgolf"], "bad.pgolf", word)
    refused(capsys, [path, "--what-if", 0], "--what-if must be positive")
    refused(capsys, [path, "--what-if", 500], "all but the coded matrices takes")
    artifact.save(tmp_path / "small.pgolf", {"a": np.zeros(3, np.float16)}, {})
    refused(capsys, [tmp_path / "small.pgolf", "--what-if", 500], "no coded matrix")


def test_an_artifact_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact.save(tmp_path / "m", {}, {})
    assert main(tmp_path / "m") == 0
    assert "(container)" in capsys.readouterr().out
    assert main(tmp_path / "m", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weights"] == []


def test_hostile_names_stay_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["[red]x[/red]", "\x1b[2J", "\ud800", "$\\frac{$", "a\nb", "[/]"]
    state = {f"{name}.q": levels(4, 4, 2.0) for name in names}
    artifact.save(tmp_path / "m", state, {})
    assert main(tmp_path / "m") == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "[red]x[/red]" in text and "\\x1b[2J" in text and "'a\\nb'" in text
    assert main(tmp_path / "m", "--json") == 0
    assert {weight["name"] for weight in json.loads(capsys.readouterr().out)["weights"]} == set(names)
    pytest.importorskip("matplotlib")
    assert main(tmp_path / "m", "--plot", tmp_path / "m.png") == 0


@pytest.mark.parametrize("lossy", [False, True])
def test_the_picture(path: Path, lossy: bool, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    if lossy:
        account(path)
    assert main(path, "--plot", path.parent / "bytes.png") == 0
    picture = (path.parent / "bytes.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000
    refused(capsys, [path, "--plot", path.parent / "absent" / "bytes.png"], "cannot write")


def test_without_matplotlib_one_line_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(capsys, [path, "--plot", path.parent / "bytes.png"], "pip install pgolf[plot]")
    assert not (path.parent / "bytes.png").exists()


def test_it_starts_without_torch(path: Path) -> None:
    code = "import sys; from pgolf import cli; code = cli.main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    words = [sys.executable, "-c", code, "inspect", str(path)]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "blocks.11.mlp.fc.weight" in ran.stdout


def test_what_a_section_is_called_does_not_matter(tmp_path: Path) -> None:
    """A matrix may be named like a part of the report."""
    artifact.save(tmp_path / "m", {"table.q": levels(30, 30, 9.0), "container.q": levels(9, 9, 2.0)}, {})
    report = inspection.inspect(tmp_path / "m")
    assert sum(w.bytes for w in report.weights) + report.table + report.source + report.container == report.bytes


def test_measure_agrees_with_its_parts(path: Path) -> None:
    packed, sizes, matrices = artifact.measure(path, threads=1)
    loaded = artifact.load(path)
    assert (packed.metadata, packed.source) == (loaded.metadata, loaded.source)
    assert all((packed.state[name] == array).all() for name, array in loaded.state.items())
    assert sizes == artifact.sizes(path) and matrices == artifact.matrix_sizes(path)
    with pytest.raises(PgolfError, match="cannot read"):
        artifact.measure(path.with_name("absent"))
