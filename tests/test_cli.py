"""The command line: help, and every mistake as one line that names the file or key, exit code 2, nothing harmed."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from pgolf import cli, config, recipes
from pgolf.data import shards

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 300
TINY = {
    "model.num_layers": 4, "model.model_dim": 32, "model.num_heads": 2, "model.num_kv_heads": 1,
    "model.vocab_size": VOCAB, "model.mlp_mult": 2, "model.rope_dims": 8, "model.loop_start": 1, "model.loop_end": 2,
    "model.parallel_start_layer": 3, "model.xsa_last_n": 4,
    "train.steps": 8, "train.step_tokens": 256, "train.micro_batch": 256, "train.contexts": "32@0.5,64@1.0",
    "train.log_every": 2,
    "quantize.calibration_batches": 2, "quantize.awq_group_size": 16, "quantize.lqer_group": 16,
    "eval.context": 64, "eval.stride": 32,
    "ttt.batch_size": 4, "ttt.rank": 2, "ttt.context": 64, "ttt.eval_seq_len": 64, "ttt.prefix_docs": 2,
    "ttt.global_chunk": 256, "ttt.chunk_size": 16, "ttt.short_chunks": "24:8",
}  # fmt: skip
SETTINGS = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
COMMANDS = ("demo", "data", "train", "quantize", "eval", "tune-ttt", "run", "generate", "inspect", "doctor")
TRAIN_SHARD, VAL_SHARD, SIDECAR = (shards.shard_name(k, 0) for k in (shards.TRAIN, shards.VAL, shards.VAL_BYTES))


def text_file(path, count, seed):
    """Documents of made-up sentences from few words, one a line of JSON."""
    random = np.random.default_rng(seed)
    words = "the cat dog bird Tree house sees Finds keeps a small red old and or under".split()
    texts = [" ".join(random.choice(words, random.integers(4, 40))) + "." for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Text, tokenizers, shards and a finished run, all made by commands."""
    root = tmp_path_factory.mktemp("made")
    text = text_file(root / "text.jsonl", 300, 0)
    for name, seed in (("tokenizer.model", 0), ("other.model", 60)):
        source = text_file(root / f"{name}.jsonl", 300, seed)
        assert main("data", "tokenizer", source, "--out", root / name, "--vocab-size", VOCAB) == 0
    build = ("data", "build", text, "--val-docs", 12, "--workers", 1)
    assert main(*build, "--tokenizer", root / "tokenizer.model", "--out", root / "data") == 0
    assert main(*build, "--tokenizer", root / "other.model", "--out", root / "other") == 0
    assert main("run", "--data", root / "data", "--out", root / "run", *tiny(), "--docs", 4) == 0
    return root


def main(*words):
    return cli.main([str(word) for word in words])


def tiny():
    return ["--recipe", "demo", "--device", "cpu", *SETTINGS]


def copy(folder, target):
    """A copy of the files of a flat folder, to damage."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(capsys):
    """Run a command that must fail with exit code 2 and one line that holds all the given words; returns the line."""

    def check(words, *wanted):
        capsys.readouterr()
        code = main(*words)
        errors = capsys.readouterr().err
        assert code == 2, errors
        assert errors.startswith("pgolf: ") and errors.endswith("\n") and errors.count("\n") == 1, errors
        for word in wanted:
            assert str(word) in errors, errors
        return errors

    return check


def train(data, run, *more):
    return ["train", "--data", data, "--out", run, *tiny(), *more]


def evaluate(path, data, *more):
    return ["eval", path, "--data", data, "--device", "cpu", *more]


def quantize(run, data, *more):
    return ["quantize", run, "--data", data, "--device", "cpu", *more]


# Help


@pytest.mark.parametrize(
    "words", [[], *([command] for command in COMMANDS)], ids=lambda words: "-".join(words) or "pgolf"
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(words, flag, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([*words, flag])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: pgolf")
    if not words:
        assert all(re.search(rf"^  +{command} +\w", text, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", ["train", "run", "quantize", "eval"])
def test_help_shows_units_and_defaults(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    for key, (_, default, help) in config.keys().items():
        assert re.search(rf"^  {re.escape(key)} +{re.escape(str(default))} +{re.escape(help)}$", text, re.MULTILINE), (
            key
        )
    assert all(name in text for name in recipes.RECIPES)


def test_help_of_options_names_units(capsys):
    for words, wanted in (
        (["train"], ["seconds (steps with train.schedule_by=step)", "default: record"]),
        (["data", "build"], ["tokens a shard", "default: all cores"]),
        (["data", "tokenizer"], ["default 8192"]),
        (["generate"], ["tokens", "default: tokenizer.model beside the artifact"]),
        (["demo"], ["default runs/demo"]),
    ):
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in wanted), (words, text)


def test_version_and_usage_errors(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0 and re.fullmatch(r"pgolf \d+\.\d+.*\n", capsys.readouterr().out)
    for words in ([], ["fly"], ["train"], ["eval", "run", "--data", "x", "--docs", "many"]):
        with pytest.raises(SystemExit) as done:
            cli.main(words)
        errors = capsys.readouterr().err
        assert done.value.code == 2 and "error: " in errors and "Traceback" not in errors


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("pgolf", "CPU", "torch", "entropy coder", "CUDA kernels", "attention: sdpa", "CHOSEN"):
        assert word in text


def test_module_runs_and_needs_no_torch_for_version():
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pgolf", "--version"], capture_output=True, text=True
    )
    assert ran.returncode == 0 and ran.stdout.startswith("pgolf ")
    assert " torch\n" not in ran.stderr


# What the commands of the fixture have left


def test_run_leaves_every_file(made, capsys):
    found = {path.name for path in (made / "run").iterdir()}
    assert {"run.json", "metrics.jsonl", "score.json", "model.pgolf", "tokenizer.model"} <= found
    stages = json.loads((made / "run" / "score.json").read_text())
    assert list(stages) == ["weights", "artifact", "artifact with test-time training"]
    capsys.readouterr()
    words = ["--no-ttt", "--docs", 4]
    assert main(*evaluate(made / "run" / "model.pgolf", made / "data", *words)) == 0
    assert f"artifact: {stages['artifact']['bpb']:.5f} bpb" in capsys.readouterr().out


def test_weights_and_overrides_in_eval(made, tmp_path):
    run = copy(made / "run", tmp_path / "run")
    (run / "score.json").unlink()
    assert main(*evaluate(run, made / "data", "--weights", "--no-ttt", "--docs", 4)) == 0
    weights = json.loads((run / "score.json").read_text())["weights"]
    before = json.loads((made / "run" / "score.json").read_text())["weights"]
    assert weights["bpb"] == before["bpb"]
    assert main(*evaluate(run, made / "data", "--weights", "--no-ttt", "--docs", 4, "--set", "eval.stride=16")) == 0
    assert json.loads((run / "score.json").read_text())["weights"]["bpb"] != before["bpb"]


def test_generate(made, capsys):
    capsys.readouterr()
    texts = []
    for seed in (0, 0, 1):
        words = ["generate", made / "run", "--prompt", "the", "--tokens", 12, "--temperature", 2, "--top-k", 0]
        assert main(*words, "--seed", seed, "--device", "cpu") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


# Mistakes in the settings


@pytest.mark.parametrize("command", ["train", "run", "eval", "quantize", "demo"])
@pytest.mark.parametrize(
    ("assignment", "wanted"),
    [
        ("train.matrix_lrr=1", ["train.matrix_lrr", "did you mean 'train.matrix_lr'?"]),
        ("train.steps=soon", ["train.steps", "int", "'soon'"]),
        ("train.steps", ["key=value", "'train.steps'"]),
        ("model.num_heads=-2", ["model.num_heads", "positive"]),
    ],
)
def test_bad_setting(made, tmp_path, refused, command, assignment, wanted):
    words = {
        "train": train(made / "data", tmp_path / "run"),
        "run": ["run", *train(made / "data", tmp_path / "run")[1:]],
        "eval": evaluate(made / "run", made / "data"),
        "quantize": quantize(made / "run", made / "data"),
        "demo": ["demo", "--out", tmp_path / "run"],
    }[command]
    before = contents(made)
    refused([*words, "--set", assignment], *wanted)
    assert contents(made) == before and not (tmp_path / "run").exists()


def test_unknown_recipe(made, tmp_path, refused):
    words = ["train", "--data", made / "data", "--out", tmp_path / "run", "--recipe", "dual"]
    refused(words, "unknown recipe 'dual'", "did you mean 'duel'?")


def test_settings_that_do_not_fit_the_data(made, tmp_path, refused):
    long = train(
        made / "data", tmp_path / "run", "--set", "train.step_tokens=1000000", "--set", "train.micro_batch=1000000"
    )
    refused(long, "train.micro_batch")
    refused(train(made / "data", tmp_path / "run2", "--set", "train.attention=fa9"), "fa9")
    for text in ("1024", "1024@0.5", "0@1.0", "a@b"):
        refused(
            train(made / "data", tmp_path / "run3", "--set", f"train.contexts={text}"), "train.contexts", repr(text)
        )


def test_cuda_without_a_gpu(made, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["eval", made / "run", "--data", made / "data", "--device", "cuda"]
    refused(words, "no CUDA GPU", "--device cpu")


@pytest.mark.parametrize("docs", ["0", "-1"])
def test_docs_must_be_positive(made, refused, docs):
    before = contents(made / "run")
    try:
        refused(evaluate(made / "run", made / "data", "--no-ttt", "--docs", docs), "--docs")
        refused(evaluate(made / "run", made / "data", "--docs", docs), "--docs")
    finally:
        (made / "run" / "score.json").write_bytes(before["score.json"])


def test_stop_after_must_be_positive(made, tmp_path, refused):
    for value in ("0", "-3", "nan"):
        refused(train(made / "data", tmp_path / f"run{value}", f"--stop-after={value}"), "--stop-after")


@pytest.mark.parametrize("option", ["--tokens", "--temperature", "--top-k"])
def test_generate_refuses_negative_numbers(made, refused, option):
    refused(["generate", made / "run", option, "-1", "--device", "cpu"], option)


# Mistakes in the data


def test_missing_data(made, tmp_path, refused):
    absent = tmp_path / "absent"
    refused(train(absent, tmp_path / "run"), absent, "fineweb_train_")
    refused(evaluate(made / "run", absent), absent, "fineweb_val_")
    refused(quantize(made / "run", absent), absent, "fineweb_train_")
    refused(["data", "audit", absent], absent)
    refused(train(made / "text.jsonl", tmp_path / "run"), "text.jsonl")
    assert not (tmp_path / "run").exists()


def damage(data, kind, name):
    """Damage one shard; (its path, a word that the message must hold)."""
    path = data / name
    good = path.read_bytes()
    if kind == "magic":
        path.write_bytes(b"\x00\x00\x00\x01" + good[4:])
        return path, "not a token shard"
    if kind == "version":
        path.write_bytes(good[:4] + b"\x09\x00\x00\x00" + good[8:])
        return path, "not a token shard"
    if kind == "cut":
        path.write_bytes(good[:-2])
        return path, "cut short"
    if kind == "tiny":
        path.write_bytes(good[:100])
        return path, "not a token shard"
    if kind == "empty":
        path.write_bytes(b"")
        return path, "not a token shard"
    tokens = np.array(shards.read_tokens(path))
    tokens[20] = VOCAB  # where even a short run gets to
    shards.write_shard(path, tokens)
    return path, f"token {VOCAB} but the vocabulary has {VOCAB}"


@pytest.mark.parametrize("kind", ["magic", "version", "cut", "tiny", "empty", "vocabulary"])
def test_damaged_shard_is_named(made, tmp_path, refused, kind):
    data = copy(made / "data", tmp_path / "data")
    path, word = damage(data, kind, TRAIN_SHARD)
    refused(train(data, tmp_path / "run"), path, word)
    refused(quantize(made / "run", data), path, word)
    data = copy(made / "data", tmp_path / "data2")
    path, word = damage(data, kind, VAL_SHARD)
    before = contents(made / "run")
    refused(evaluate(made / "run", data), path, word)
    refused(evaluate(made / "run", data, "--weights", "--no-ttt"), path, word)
    assert contents(made / "run") == before


def test_sidecar_of_another_length(made, tmp_path, refused):
    data = copy(made / "data", tmp_path / "data")
    counts = np.array(shards.read_tokens(data / SIDECAR))
    shards.write_shard(data / SIDECAR, counts[:-1])
    refused(evaluate(made / "run", data), data, SIDECAR, len(counts) - 1)


def test_sidecar_missing(made, tmp_path, refused):
    data = copy(made / "data", tmp_path / "data")
    (data / SIDECAR).unlink()
    refused(evaluate(made / "run", data), data, "fineweb_val_bytes")


def test_shard_missing_from_the_manifest(made, tmp_path, refused):
    data = copy(made / "data", tmp_path / "data")
    (data / TRAIN_SHARD).rename(data / shards.shard_name(shards.TRAIN, 1))
    refused(train(data, tmp_path / "run"), data)


# Mistakes with tokenizers


def test_tokenizer_mismatch(made, tmp_path, refused):
    before = contents(made / "run")
    refused(evaluate(made / "run", made / "other"), made / "other", made / "run" / "model.pgolf", "another tokenizer")
    refused(
        ["generate", made / "run", "--tokenizer", made / "other.model", "--device", "cpu"], "model.pgolf", "--tokenizer"
    )
    data = copy(made / "data", tmp_path / "data")
    (data / "tokenizer.model").write_bytes((made / "other.model").read_bytes())
    refused(train(data, tmp_path / "run"), data, "another tokenizer")
    assert contents(made / "run") == before


def test_tokenizer_mismatch_in_later_stages(made, refused):
    """Same vocabulary size, other tokens: quantizing, scoring weights and resuming with such data are mistakes."""
    before = contents(made / "run")
    try:
        refused(evaluate(made / "run", made / "other", "--weights", "--no-ttt"), made / "other", "another tokenizer")
        refused(quantize(made / "run", made / "other"), made / "other", "another tokenizer")
        assert contents(made / "run") == before
    finally:
        for name, good in before.items():
            (made / "run" / name).write_bytes(good)


def test_vocabulary_of_another_size(made, tmp_path, refused):
    words = train(made / "data", tmp_path / "run", "--set", "model.vocab_size=512")
    refused(words, made / "data" / "tokenizer.model", f"has {VOCAB} tokens", f"--set model.vocab_size={VOCAB}")


def test_bad_tokenizer_file(made, tmp_path, refused):
    data = copy(made / "data", tmp_path / "data")
    (data / "tokenizer.model").write_bytes(b"no model")
    refused(train(data, tmp_path / "run"), data / "tokenizer.model")
    words = ["data", "build", made / "text.jsonl", "--val-docs", 3, "--out", tmp_path / "out", "--tokenizer"]
    refused([*words, tmp_path / "absent.model"], "absent.model")
    refused([*words, data / "tokenizer.model"], data / "tokenizer.model")
    refused(["generate", made / "run", "--tokenizer", tmp_path / "absent.model", "--device", "cpu"], "absent.model")


def test_bad_text(made, tmp_path, refused):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    tokenizer = ["--tokenizer", made / "tokenizer.model"]
    refused(["data", "build", path, "--val-docs", 1, "--out", tmp_path / "out", *tokenizer], path, "2")
    refused(["data", "tokenizer", path, "--out", tmp_path / "t.model"], path, "2")
    refused(["data", "tokenizer", tmp_path / "absent.txt", "--out", tmp_path / "t.model"], "absent.txt")
    refused(["data", "build", made / "text.jsonl", "--out", tmp_path / "out", *tokenizer], "--val-docs", "--split")
    assert not (tmp_path / "t.model").exists() and not (tmp_path / "out" / TRAIN_SHARD).exists()


# Mistakes with runs and artifacts


def test_existing_run_is_refused(made, tmp_path, refused):
    before = contents(made / "run")
    refused(train(made / "data", made / "run"), made / "run", "--resume", "--out")
    refused(["run", *train(made / "data", made / "run")[1:]], made / "run", "--resume")
    refused(train(made / "data", made / "run", "--resume", "--set", "seed=7"), made / "run", "another configuration")
    assert contents(made / "run") == before


def test_missing_run(made, tmp_path, refused):
    absent = tmp_path / "absent"
    refused(quantize(absent, made / "data"), absent, "train first")
    refused(evaluate(absent, made / "data"), absent)
    refused(evaluate(tmp_path, made / "data"), tmp_path / "model.pgolf", "quantize first")
    refused(evaluate(tmp_path, made / "data", "--weights"), tmp_path, "holds no checkpoint")
    refused(evaluate(made / "run" / "model.pgolf", made / "data", "--weights"), "--weights", "model.pgolf")
    refused(["generate", absent, "--device", "cpu"], absent)
    assert not absent.exists()


@pytest.mark.parametrize("kind", ["empty", "foreign", "cut", "flipped", "appended"])
def test_damaged_artifact(made, tmp_path, refused, kind):
    run = copy(made / "run", tmp_path / "run")
    path = run / "model.pgolf"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 16
    path.write_bytes(
        {
            "empty": b"",
            "foreign": b"PK\x03\x04" * 99,
            "cut": good[:-9],
            "flipped": bytes(flipped),
            "appended": good + b"x",
        }[kind]
    )
    before = contents(run)
    for target in (run, path):
        refused(evaluate(target, made / "data"), path)
        refused(["generate", target, "--device", "cpu"], path)
    assert contents(run) == before


@pytest.mark.parametrize("damaged", [b"", b"{", b"{}", b"[]", b'{"config": 3}', b"\xff"])
def test_damaged_run_json(made, tmp_path, refused, damaged):
    run = copy(made / "run", tmp_path / "run")
    (run / "run.json").write_bytes(damaged)
    before = contents(run)
    refused(train(made / "data", run, "--resume"), "run.json")
    assert contents(run) == before


@pytest.mark.parametrize("damaged", [b"{", b"[]"])
def test_damaged_score_json(made, tmp_path, refused, damaged):
    run = copy(made / "run", tmp_path / "run")
    (run / "score.json").write_bytes(damaged)
    refused(evaluate(run, made / "data", "--no-ttt", "--docs", 2), "score.json")


def test_damaged_checkpoint(made, tmp_path, refused):
    run = copy(made / "run", tmp_path / "run")
    (path,) = run.glob("checkpoint-*.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    refused(quantize(run, made / "data"), path)
    refused(evaluate(run, made / "data", "--weights"), path)
    refused(train(made / "data", run, "--resume"), path)
    assert (run / "model.pgolf").read_bytes() == (made / "run" / "model.pgolf").read_bytes()


# Places that cannot be written


def test_folder_that_cannot_be_made(made, tmp_path, refused):
    """Below a regular file nothing can be made, not even by root."""
    (tmp_path / "file").write_text("kept")
    below = tmp_path / "file" / "below"
    refused(train(made / "data", below), below)
    refused(["demo", "--out", below], below)
    words = ["data", "build", made / "text.jsonl", "--val-docs", 3, "--tokenizer", made / "tokenizer.model"]
    refused([*words, "--out", below], below)
    refused(["data", "tokenizer", made / "text.jsonl", "--vocab-size", VOCAB, "--out", below], below)
    refused(train(made / "data", tmp_path / "file"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def limited(size, *words):
    """Run a command in its own process that may not write files larger than `size` bytes: as on a full disk."""
    code = (
        "import resource, sys\nfrom pgolf.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\nsys.exit(main(sys.argv[1:]))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def assert_full(ran, path):
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith("pgolf: cannot write") and ran.stderr.count("\n") == 1, ran.stderr
    assert str(path) in ran.stderr and "free space" in ran.stderr


def test_full_disk_while_training_keeps_the_checkpoint(made, tmp_path):
    run = tmp_path / "run"
    assert main(*train(made / "data", run, "--stop-after", "3")) == 0
    before = contents(run)
    # Well below a checkpoint: its header holds seconds, whose digits vary in number from one to the next.
    limit = len(before["checkpoint-000003.safetensors"]) - 1000
    assert limit > len(before["tokenizer.model"])
    assert_full(limited(limit, *train(made / "data", run, "--resume")), run / "checkpoint-000008.safetensors")
    after = contents(run)
    assert sorted(after) == sorted(before)
    for name in before:
        assert name in ("metrics.jsonl", "run.json") or after[name] == before[name]
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
    assert main(*train(made / "data", run, "--resume")) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(8))


def test_full_disk_while_packing_and_scoring_keeps_the_results(made, tmp_path):
    run = copy(made / "run", tmp_path / "run")
    before = contents(run)
    assert_full(limited(5_000, *quantize(run, made / "data")), run / "model.pgolf")
    assert_full(limited(300, *evaluate(run, made / "data", "--no-ttt", "--docs", 2)), run / "score.json")
    assert contents(run) == before


def test_full_disk_while_building_data(made, tmp_path):
    out = tmp_path / "out"
    words = ["data", "build", made / "text.jsonl", "--val-docs", 3, "--workers", 1, "--out", out]
    ran = limited(2_000, *words, "--tokenizer", made / "tokenizer.model")
    assert_full(ran, out)
    assert not [name for name in contents(tmp_path) if name.endswith(".bin")]
    ran = limited(2_000, "data", "tokenizer", made / "text.jsonl", "--vocab-size", VOCAB, "--out", tmp_path / "t.model")
    assert_full(ran, tmp_path / "t.model")
    assert not (tmp_path / "t.model").exists()
