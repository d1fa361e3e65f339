"""The stages on a tiny run: train, quantize, pack, reload, score, sample; and the files they leave."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf import _codec, artifact, cli, config, generate, loading, pipeline, recipes, score, source
from pgolf.data import build, shards
from pgolf.data.tokenizer import Tokenizer, train_tokenizer
from pgolf.errors import PgolfError
from pgolf.files import read_json, write_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
VOCAB, STEPS = 300, 12
TINY = {
    "model.num_layers": 4, "model.model_dim": 32, "model.num_heads": 2, "model.num_kv_heads": 1,
    "model.vocab_size": VOCAB, "model.mlp_mult": 2, "model.rope_dims": 8, "model.loop_start": 1, "model.loop_end": 2,
    "model.parallel_start_layer": 3, "model.xsa_last_n": 4,
    "train.steps": STEPS, "train.step_tokens": 512, "train.micro_batch": 256,
    "train.contexts": "16@0.25,32@0.6,64@1.0", "train.rewarm_steps": 2, "train.log_every": 4, "train.ema_decay": 0.7,
    "quantize.calibration_batches": 2, "quantize.awq_group_size": 16, "quantize.lqer_group": 16,
    "eval.context": 64, "eval.stride": 32,
    "ttt.batch_size": 4, "ttt.rank": 2, "ttt.context": 64, "ttt.eval_seq_len": 64, "ttt.prefix_docs": 4,
    "ttt.global_chunk": 256, "ttt.chunk_size": 16, "ttt.short_chunks": "24:8",
}  # fmt: skip


def tiny():
    return config.override(recipes.get("demo"), [f"{key}={value}" for key, value in TINY.items()])


def sentences(count, seed):
    """Documents of made-up sentences from few words."""
    random = np.random.default_rng(seed)
    words = "the cat dog bird Tree house sees Finds keeps a small red old and or under".split()
    return [" ".join(random.choice(words, random.integers(4, 40))) + "." for _ in range(count)]


def build_data(folder, vocab, seed=0):
    """A data folder as `pgolf data build` leaves it."""
    folder.mkdir()
    texts = {"train": sentences(400, seed), "val": sentences(14, seed + 1)}
    tokenizer = folder / pipeline.TOKENIZER
    train_tokenizer(texts["train"], tokenizer, vocab)
    for split, documents in texts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        write_bytes(folder / f"{split}.jsonl", lines.encode())
        build.build([folder / f"{split}.jsonl"], folder, tokenizer, split=split, workers=1)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("text") / "data", VOCAB)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """The same vocabulary size, another tokenizer."""
    folder = build_data(tmp_path_factory.mktemp("text") / "other", VOCAB, seed=50)
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run folder after all stages."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    pipeline.train(tiny(), data, folder, CPU)
    pipeline.score_run(tiny(), data, folder, CPU)
    return folder


def scores(run):
    return read_json(run / "score.json")


def pgolf(*words):
    return subprocess.run(
        [sys.executable, "-m", "pgolf", *map(str, words)], capture_output=True, text=True, check=True, timeout=120
    )


def test_run_json_has_its_fields(run, data):
    found = read_json(run / "run.json")
    assert config.from_dict(found["config"]) == tiny()
    assert found["seed"] == tiny().seed and found["ranks"] == 1
    assert found["steps"] == STEPS and found["tokens"] == STEPS * 512
    assert found["tokenizer_sha256"] == Tokenizer.load(data / pipeline.TOKENIZER).sha256
    assert found["torch"] == torch.__version__ and found["python"] == sys.version.split()[0]
    assert {"pgolf", "commit", "device", "train_seconds", "looping"} <= found.keys()
    assert found["artifact_bytes"] == (run / pipeline.ARTIFACT).stat().st_size
    assert {"train", "calibrate", "solve", "pack"} <= found["seconds"].keys()
    assert all(value >= 0 for value in found["seconds"].values())
    assert (run / pipeline.TOKENIZER).read_bytes() == (data / pipeline.TOKENIZER).read_bytes()


def test_score_json_has_its_fields(run, data):
    found = scores(run)
    assert list(found) == ["weights", "artifact", "artifact with test-time training"]
    validation = shards.load_validation(data, VOCAB)
    for result in found.values():
        assert result["targets"] == validation.targets and result["bytes"] == validation.total_bytes
        expected = result["loss"] / np.log(2) * validation.targets / validation.total_bytes
        assert result["bpb"] == pytest.approx(expected, rel=1e-9)
        assert result["seconds"] > 0 and 0 < result["bpb"] < 20
    # Twelve steps teach little, but better than guessing; six bits lose little of it.
    assert found["weights"]["loss"] < np.log(VOCAB)
    assert found["artifact"]["bpb"] == pytest.approx(found["weights"]["bpb"], rel=0.02)


def test_nothing_temporary_is_left(run):
    names = sorted(path.name for path in run.iterdir())
    expected = ["checkpoint-000012.safetensors", "metrics.jsonl", "model.pgolf", "run.json", "score.json"]
    assert names == [*expected, "tokenizer.model"]


def test_reloaded_in_a_new_process_scores_the_same(run, data, tmp_path):
    """Also when only the file is at hand, away from its run folder."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (pipeline.ARTIFACT, "run.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    pgolf("eval", copy, "--data", data, "--device", "cpu", "--no-ttt")
    pgolf("eval", copy, "--data", data, "--device", "cpu")
    found = scores(copy)
    assert list(found) == ["artifact", "artifact with test-time training"]
    for stage, result in found.items():
        assert abs(result["bpb"] - scores(run)[stage]["bpb"]) < 1e-6
        assert result["targets"] == scores(run)[stage]["targets"]
    alone = pgolf("eval", copy / pipeline.ARTIFACT, "--data", data, "--device", "cpu", "--no-ttt").stdout
    assert f"artifact: {scores(run)['artifact']['bpb']:.5f} bpb" in alone
    assert scores(copy) == found  # a bare file has no folder to write in


def test_stages_repeat_bit_for_bit(run, data, tmp_path):
    again = tmp_path / "again"
    pipeline.train(tiny(), data, again, CPU)
    path = pipeline.quantize(again, data, CPU)
    assert path.read_bytes() == (run / pipeline.ARTIFACT).read_bytes()


def test_averaged_weights_are_what_is_scored(run, data):
    model, settings = pipeline.averaged_model(run, CPU)
    assert settings == tiny() and model.looping
    result = pipeline.evaluate(model, data, settings.eval, None, settings.seed)
    assert result["bpb"] == scores(run)["weights"]["bpb"]


@pytest.mark.parametrize("adapt", [False, True])
def test_docs_limits_the_score_to_the_first_documents(run, data, adapt):
    validation = shards.load_validation(data, VOCAB)
    starts = np.flatnonzero(validation.tokens == 1)
    loaded = loading.load(run / pipeline.ARTIFACT, CPU)
    result = pipeline.evaluate(loaded.model, data, loaded.eval, loaded.ttt if adapt else None, 0, documents=3)
    # The BOS behind the third document is a target of it.
    assert result["targets"] == starts[3]
    assert result["bytes"] == validation.bytes[1 : starts[3] + 1].sum()
    everything = pipeline.evaluate(loaded.model, data, loaded.eval, None, 0, documents=10**6)
    assert everything["targets"] == validation.targets


def test_first_documents():
    tokens = np.array([1, 5, 6, 1, 7, 1, 8, 9], np.uint16)
    counts = np.arange(8, dtype=np.uint16)
    for documents, length in ((1, 4), (2, 6), (3, 8), (None, 8), (99, 8)):
        kept, bytes_kept = pipeline.first_documents(tokens, counts, documents)
        assert kept.tolist() == tokens[:length].tolist() and bytes_kept.tolist() == counts[:length].tolist()


def test_the_artifact_carries_the_source_that_counts(run):
    packed = artifact.load(run / pipeline.ARTIFACT)
    assert packed.source == source.scoring_source()
    texts = json.loads(packed.source)
    package = source.PACKAGE
    for module in source.reachable(source.ROOTS):
        base = package.joinpath(*module.split("."))
        path = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        assert texts[str(path.relative_to(package.parent))] == source.bare(path.read_text())
    coder = [name for name in texts if name.endswith(".cpp")]
    assert coder and all("codec" in name for name in coder)
    sizes = artifact.sizes(run / pipeline.ARTIFACT)
    assert sizes["source"] > 0 and sum(sizes.values()) == (run / pipeline.ARTIFACT).stat().st_size


def test_the_source_in_an_artifact_scores_it(run, tmp_path):
    """Written to an empty folder, with nothing but the compiled decoder beside it, it gives this package's losses."""
    for name, text in json.loads(artifact.load(run / pipeline.ARTIFACT).source).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    compiled = Path(_codec.__file__)
    shutil.copy(compiled, tmp_path / "pgolf" / compiled.name)
    code = (
        "import sys, numpy, torch\n"
        "sys.meta_path[:] = [one for one in sys.meta_path if isinstance(one, type)]  # no editable install\n"
        "from pgolf import loading, score\n"
        "model = loading.load(sys.argv[1], torch.device('cpu')).model\n"
        "tokens = numpy.array([1, 20, 21, 22, 1, 23, 24])\n"
        "result = score.sliding(model, tokens, numpy.ones(7, int), 384, 192, 2)\n"
        "print(loading.__file__, repr(result.nats))\n"
    )
    command = [sys.executable, "-c", code, str(run / pipeline.ARTIFACT)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path
    )
    where, nats = ran.stdout.split()
    assert where.startswith(str(tmp_path))
    model = loading.load(run / pipeline.ARTIFACT, CPU).model
    tokens = np.array([1, 20, 21, 22, 1, 23, 24])
    here = score.sliding(model, tokens, np.ones(7, int), 384, 192, 2).nats
    assert float(nats) == pytest.approx(here, rel=1e-6)  # the numbers of threads may differ


def test_scoring_code_holds_what_it_imports_and_nothing_of_training():
    """What a fresh process really imports is among the source that counts."""
    code = (
        "import sys; from pgolf import loading, score, ttt; from pgolf.data import bytes, shards; print(*sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    imported = {name.removeprefix("pgolf.") for name in ran.stdout.split() if name.startswith("pgolf.")}
    python = {name for name in imported if not name.startswith("_")}
    found = source.reachable(source.ROOTS)
    packages = {"data", "ops"}  # bare packages
    assert python - packages <= found
    assert {"loading", "artifact", "codec", "model", "score", "ttt", "ttt.adapters", "dequantize"} <= found
    heads = {name.split(".")[0] for name in found}
    assert heads.isdisjoint(
        {"train", "optim", "quantize", "checkpoint", "pipeline", "cli", "recipes", "demo", "testing"}
    )
    texts = json.loads(source.scoring_source())
    assert not [name for name in texts if Path(name).stem in ("train", "optim", "pipeline") or "quantize/" in name]


def test_packages_are_part_of_the_source_that_counts():
    """Importing pgolf.data.shards runs pgolf/__init__.py and pgolf/data/__init__.py first: they count too."""
    texts = json.loads(source.scoring_source())
    for module in source.reachable(source.ROOTS):
        for depth in range(module.count(".") + 1):
            name = "/".join(["pgolf", *module.split(".")[:depth], "__init__.py"])
            assert name in texts, f"{module} needs {name}"


def test_sampling_is_deterministic(run):
    loaded = loading.load(run / pipeline.ARTIFACT, CPU)
    tokenizer = Tokenizer.load(run / pipeline.TOKENIZER)

    def sample(seed, temperature=1.0, tokens=30, prompt="the old"):
        return generate.sample(loaded.model, tokenizer, prompt, tokens, temperature, 0, loaded.eval.context, seed)

    assert sample(3) == sample(3)
    assert len({sample(seed) for seed in range(4)}) > 1
    assert sample(1, temperature=0.0) == sample(2, temperature=0.0)
    assert sample(0).startswith("the old")
    assert sample(0, tokens=0) == "the old"
    # A prompt longer than the context is cut, not refused.
    assert sample(0, tokens=2, prompt="cat dog " * 60).startswith("cat dog")
    words = ["generate", run, "--prompt", "the old", "--tokens", 20, "--seed", 5, "--device", "cpu"]
    assert pgolf(*words).stdout == pgolf(*words).stdout


def repack(run, target, change):
    """The artifact with its metadata changed."""
    packed = artifact.load(run / pipeline.ARTIFACT)
    metadata = json.loads(json.dumps(packed.metadata))
    change(metadata)
    artifact.save(target, packed.state, metadata, packed.source)
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["model"].update(model_dim=48),
        lambda m: m["model"].update(num_layers=5),
        lambda m: m["model"].update(vocab_size=301),
        lambda m: m["model"].update(mlp_mult=3.0),
        lambda m: m["model"].update(num_heads=5),
        lambda m: m["model"].update(width=32),
        lambda m: m["model"].update(num_layers="4"),
        lambda m: m.update(model=None),
        lambda m: m.update(model=[]),
        lambda m: m.pop("model"),
        lambda m: m.pop("looping"),
        lambda m: m.pop("ttt"),
        lambda m: m["eval"].update(stride=0),
        lambda m: m["ttt"].update(targets="z"),
        lambda m: m.update(seed="x"),
        lambda m: m.update(seed=None),
        lambda m: m.clear(),
    ],
)
def test_metadata_that_does_not_fit_is_refused(run, tmp_path, change):
    path = repack(run, tmp_path / "changed.pgolf", change)
    with pytest.raises(PgolfError) as caught:
        loading.load(path, CPU)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "size", [{"num_layers": 10**6}, {"model_dim": 2**20}, {"vocab_size": 2**40}, {"num_loops": 10**9}]
)
def test_metadata_cannot_ask_for_a_huge_model(run, tmp_path, size):
    """The sizes in the metadata are checked against the arrays before anything of that size is made."""
    path = repack(run, tmp_path / "huge.pgolf", lambda m: m["model"].update(size))
    code = (
        "import resource, sys, torch\n"
        "from pgolf import loading\nfrom pgolf.errors import PgolfError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "try:\n    loading.load(sys.argv[1], torch.device('cpu'))\n"
        "except PgolfError as error:\n    print('refused', error)\n"
    )
    try:
        ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        pytest.fail("loading hangs")
    assert ran.stdout.startswith("refused"), ran.stderr[-300:]


def test_another_tokenizer_is_refused(run, data, other_data, tmp_path):
    """Data of the same vocabulary size but from another tokenizer would score or calibrate nonsense."""
    with pytest.raises(PgolfError, match="another tokenizer"):
        pipeline.load_artifact(run / pipeline.ARTIFACT, other_data, CPU, torch.float32)
    with pytest.raises(PgolfError, match="another tokenizer"):
        pipeline.load_artifact(
            repack(run, tmp_path / "other.pgolf", lambda m: m.update(tokenizer_sha256="0" * 64)),
            data,
            CPU,
            torch.float32,
        )


def test_quantizing_with_data_of_another_tokenizer_is_refused(run, other_data):
    before = (run / pipeline.ARTIFACT).read_bytes(), (run / "run.json").read_bytes()
    try:
        with pytest.raises(PgolfError, match="another tokenizer"):
            pipeline.quantize(run, other_data, CPU)
    finally:
        after = (run / pipeline.ARTIFACT).read_bytes(), (run / "run.json").read_bytes()
        (run / pipeline.ARTIFACT).write_bytes(before[0])
        (run / "run.json").write_bytes(before[1])
    assert after == before


def test_resuming_with_data_of_another_tokenizer_is_refused(data, other_data, tmp_path):
    run = tmp_path / "run"
    pipeline.train(tiny(), data, run, CPU, stop_after=2)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(PgolfError, match="another tokenizer"):
        pipeline.train(tiny(), other_data, run, CPU, resume=True)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_machine_without_git_trains(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pipeline.environment(CPU)["commit"] is None


@pytest.fixture
def trained(run, tmp_path):
    """A run that is trained and nothing more."""
    folder = tmp_path / "trained"
    folder.mkdir()
    for name in ("checkpoint-000012.safetensors", "run.json", "tokenizer.model"):
        (folder / name).write_bytes((run / name).read_bytes())
    return folder


def quantize(folder, data, *more):
    words = ["quantize", folder, "--data", data, "--device", "cpu", "--set", "quantize.passthrough=500", *more]
    return cli.main([str(word) for word in words])


def test_a_budget_is_filled_and_accounted_for(run, trained, data, capsys):
    assert quantize(trained, data) == 0  # mode record
    budget = (trained / pipeline.ARTIFACT).stat().st_size - 2000
    assert not (trained / pipeline.ACCOUNT).exists()
    fill = ["--budget", budget, "--set", "quantize.mode=trellis"]
    assert quantize(trained, data, *fill) == 0
    size = (trained / pipeline.ARTIFACT).stat().st_size
    assert budget - max(budget // 1600, 512) <= size <= budget
    account = read_json(trained / pipeline.ACCOUNT)
    assert account["bytes"] == size == read_json(trained / "run.json")["artifact_bytes"]
    assert account["budget"] == budget and account["outcome"] == "filled"
    names = {
        name.removesuffix(".q") for name in artifact.load(trained / pipeline.ARTIFACT).state if name.endswith(".q")
    }
    assert account["matrices"].keys() == names and len(names) == 4 * 6 + 1
    assert "expected loss by quantization" in capsys.readouterr().out
    loaded = loading.load(trained / pipeline.ARTIFACT, CPU)
    result = pipeline.evaluate(loaded.model, data, loaded.eval, None, 0)
    assert result["bpb"] == pytest.approx(scores(run)["weights"]["bpb"], rel=0.02)
    # The same bytes again; and nothing of an account when the record's way follows.
    first = (trained / pipeline.ARTIFACT).read_bytes()
    assert quantize(trained, data, *fill) == 0
    assert (trained / pipeline.ARTIFACT).read_bytes() == first
    assert quantize(trained, data) == 0 and not (trained / pipeline.ACCOUNT).exists()
    assert not [path.name for path in trained.iterdir() if path.name.startswith(".")]


def test_the_record_s_clips_are_scaled_to_a_budget(trained, data, capsys):
    assert quantize(trained, data) == 0
    budget = (trained / pipeline.ARTIFACT).stat().st_size - 2000
    assert quantize(trained, data, "--budget", budget) == 0
    size = (trained / pipeline.ARTIFACT).stat().st_size
    assert budget - max(budget // 1600, 512) <= size <= budget
    account = read_json(trained / pipeline.ACCOUNT)
    assert account["bytes"] == size and account["outcome"] == "filled" and "matrices" not in account
    assert not [name for name in artifact.load(trained / pipeline.ARTIFACT).state if name.endswith(".step")]
    assert f"{len(account['tries'])} solves\n" in capsys.readouterr().out


def test_budgets_that_cannot_be_met(trained, data, capsys):
    assert quantize(trained, data, "--set", "quantize.mode=trellis") == 0  # a budget of the cap
    assert "bytes of the budget stay free: finer steps could not hold" in capsys.readouterr().out
    assert read_json(trained / pipeline.ACCOUNT)["budget"] == 16_000_000
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    for more, text in (
        (["--budget", 30_000, "--set", "quantize.mode=trellis"], "the budget is 30,000"),
        (["--budget", 30_000], "the budget is 30,000"),
        (["--budget", -1], "--budget must be positive"),
    ):
        assert quantize(trained, data, *more) == 2
        assert text in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_note_merges(tmp_path):
    pipeline.note(tmp_path, a=1, seconds={"train": 2.0})
    pipeline.note(tmp_path, b=2, seconds={"pack": 3.0})
    assert read_json(tmp_path / "run.json") == {"a": 1, "b": 2, "seconds": {"train": 2.0, "pack": 3.0}}
