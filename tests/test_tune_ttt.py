"""Tuning of test-time training: the search, what it costs in seconds, and that it sees training documents alone."""

import builtins
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch

from pgolf import artifact, banks, cli, config, source
from pgolf.config import EvalConfig, ModelConfig, TTTConfig
from pgolf.data import build, shards
from pgolf.data.tokenizer import BOS, Tokenizer, train_tokenizer
from pgolf.errors import PgolfError
from pgolf.files import read_json, write_bytes
from pgolf.model import GPT
from pgolf.tuning import command, report, sample, search
from pgolf.tuning.search import Trial

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 300
MODEL = ModelConfig(
    num_layers=3, model_dim=16, num_heads=2, num_kv_heads=1, vocab_size=VOCAB, mlp_mult=2.0, rope_dims=4,
    loop_start=1, loop_end=1, parallel_start_layer=2, xsa_last_n=3,
)  # fmt: skip
OWN = TTTConfig(
    batch_size=4, chunk_size=32, short_chunks="", context=128, rank=2, lr=0.01, prefix_docs=4, global_chunk=64,
    global_lr=0.1, eval_seq_len=32,
)  # fmt: skip
DOCUMENTS = 8


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(0)
    words = "the cat dog bird Tree house sees Finds keeps a small red old and or under".split()
    return [" ".join(random.choice(words, random.integers(4, 40))) + "." for _ in range(60)]


@pytest.fixture(scope="module")
def data(texts, tmp_path_factory):
    """A data folder as `pgolf data build` leaves it, without its validation shards."""
    folder = tmp_path_factory.mktemp("text")
    train_tokenizer(texts, folder / "tokenizer.model", VOCAB)
    write_bytes(folder / "t.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    build.build([folder / "t.jsonl"], folder, folder / "tokenizer.model", val_docs=20, workers=1, shard_tokens=900)
    assert len(shards.train_files(folder)) > 1
    for path in folder.glob(f"{shards.VAL}*"):
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """The file of an untrained model."""
    network = GPT(MODEL).initialize(0)
    flat = {name: value.detach().numpy() for name, value in banks.unbank(network.state_dict(), 3).items()}
    sha = Tokenizer.load(data / "tokenizer.model").sha256
    metadata = {"looping": True, "seed": 7, "tokenizer_sha256": sha}
    metadata |= {"model": config.to_dict(MODEL), "eval": config.to_dict(EvalConfig()), "ttt": config.to_dict(OWN)}
    path = tmp_path_factory.mktemp("run") / "model.pgolf"
    artifact.save(path, flat, metadata)
    return path


@pytest.fixture
def undrawn(monkeypatch):
    """matplotlib may be absent, and the picture has a test of its own."""
    monkeypatch.setattr(report, "plot", lambda *arguments: None)


def tune(model, data, out, *more, docs=DOCUMENTS, trials=4):
    words = [model, "--data", data, "--device", "cpu", "--out", out, "--docs", docs, "--trials", trials, *more]
    return cli.main(["tune-ttt", *map(str, words)])


def lines(folder):
    return [json.loads(line) for line in (folder / command.TRIALS).read_text().splitlines()]


# The search, on made-up outcomes


def made_up(settings):
    """More refresh is better and slower, as is window mode; rank 32 is best; larger chunks are faster and worse."""
    refresh = 1000 if settings.mode == "window" else settings.refresh
    loss = 1 - refresh * 1e-4 + abs(settings.rank - 32) * 1e-4 + settings.chunk_size * 1e-4
    return Trial(settings, loss, (50 + refresh) * 48 / settings.chunk_size * settings.grad_steps)


def searched(budget=math.inf, most=99, base=None, fixed=(), measure=made_up):
    return search.search(measure, base or TTTConfig(), fixed, 400, budget, most)


def test_the_search_begins_with_baseline_and_start():
    trials = searched(most=2)
    assert [trial.settings for trial in trials] == [TTTConfig(), TTTConfig(mode="streaming", refresh=128)]
    assert searched(most=1) == trials[:1]


@pytest.mark.parametrize("budget", [math.inf, 2000.0, 500.0, 100.0, 20.0])
def test_the_choice_keeps_the_budget_and_is_the_best_of_the_trials(budget):
    trials = searched(budget)
    chosen = search.choose(trials, budget)
    assert chosen is not None and chosen.seconds <= budget
    assert chosen.loss == min(trial.loss for trial in trials if trial.seconds <= budget)
    assert chosen.settings.rank == 32


def test_the_search_ends_where_no_knob_helps():
    trials = searched()
    settings = [trial.settings for trial in trials]
    assert len(settings) == len(set(settings)) < 60
    best = search.choose(trials, math.inf).settings
    assert (best.mode, best.rank, best.chunk_size, best.short_chunks) == ("window", 32, 24, "256:4,2000:12")
    assert searched() == trials
    for most in (3, 10, 20):
        assert searched(most=most) == trials[:most]


def test_what_is_set_is_not_searched():
    base = dataclasses.replace(TTTConfig(), rank=7, mode="window")
    trials = searched(base=base, fixed=("rank", "mode"))
    assert {(trial.settings.rank, trial.settings.mode) for trial in trials} == {(7, "window")}
    assert {trial.settings.refresh for trial in trials} == {base.refresh}  # windows have no use for it
    assert len({trial.settings.chunk_size for trial in trials}) > 1


def test_what_does_not_fit_the_context_is_left_out():
    """Also the start, when a chunk is as long as the context."""
    for chunk in (8, 64):
        base = TTTConfig(context=64, chunk_size=chunk, short_chunks="")
        trials = searched(base=base)
        assert all(trial.settings.largest_chunk <= 64 for trial in trials)
        assert {trial.settings.mode for trial in trials} == ({"window", "streaming"} if chunk == 8 else {"window"})


def test_settings_beyond_the_memory_are_never_chosen():
    trials = searched(measure=lambda s: made_up(s) if s.batch_size > 24 else Trial(s, math.inf, math.inf))
    assert trials[0].loss == math.inf
    assert search.choose(trials, math.inf).settings.batch_size > 24
    assert all(trial.settings.batch_size > 24 for trial in search.front(trials))


def test_front():
    points = [(3, 5), (1, 9), (2, 9), (4, 5), (5, 2), (1, 8), (6, 3), (9, math.inf)]
    trials = [Trial(OWN, loss, seconds) for seconds, loss in points]
    assert [(trial.seconds, trial.loss) for trial in search.front(trials)] == [(1, 8), (3, 5), (5, 2)]
    assert search.choose(trials, 4.5).loss == 5 and search.choose(trials, 0.5) is None


def test_words_give_the_settings_back():
    for settings in [trial.settings for trial in searched()]:
        assignments = report.words(settings, TTTConfig()).replace("--set ", "").split()
        assert config.override(config.Config(), assignments).ttt == settings


# Documents and their work


def write_stream(folder, *parts):
    for index, part in enumerate(parts):
        shards.write_shard(folder / shards.shard_name(shards.TRAIN, index), np.array(part, np.uint16))
    return shards.train_files(folder)


def test_whole_documents_of_the_last_shards(tmp_path):
    paths = write_stream(tmp_path, [BOS, 5, BOS, 6, BOS], [9, BOS, 7, 7, BOS, BOS, 8, 8, 8, BOS, 9])
    found = sample.draw(paths, 2, 20, 0, None)
    assert found.tokens.tolist() == [BOS, 7, 7, BOS, 8, 8, 8, BOS] and found.documents == 2
    assert found.population.tolist() == [4, 5] and not found.bytes.any() and found.targets == 7
    assert sample.draw(paths, 3, 20, 0, None).documents == 3
    everything = sample.draw(paths, 99, 20, 0, None)
    assert everything.documents == 4 and everything.population.tolist() == [3, 3, 4, 5]
    with pytest.raises(PgolfError, match="holds token 8"):
        sample.draw(paths, 2, 8, 0, None)


def test_a_sample_has_the_lengths_of_its_population(tmp_path):
    random = np.random.default_rng(1)
    sizes = (np.exp(random.normal(4, 1, 3000)) + 2).astype(int)
    paths = write_stream(tmp_path, np.concatenate([*([BOS] + [5] * size for size in sizes), [BOS]]))
    found = sample.draw(paths, 100, 20, 3, None)
    drawn = np.sort(np.diff(np.flatnonzero(found.tokens == BOS))) + 1
    assert len(drawn) == 100
    for rank, length in enumerate(drawn):  # one of each hundredth
        assert found.population[30 * rank] <= length <= found.population[30 * rank + 29]
    again, other = sample.draw(paths, 100, 20, 3, None), sample.draw(paths, 100, 20, 4, None)
    assert (again.tokens == found.tokens).all()
    assert len(other.tokens) != len(found.tokens) or (other.tokens != found.tokens).any()


def test_bytes_are_those_of_the_text(data, texts):
    tokenizer = Tokenizer.load(data / "tokenizer.model")
    found = sample.draw(shards.train_files(data), 99, VOCAB, 0, tokenizer)
    assert found.documents > 30
    starts = np.flatnonzero(found.tokens == BOS)
    sizes = {len(text.encode()) for text in texts}
    assert set(found.bytes[starts[:-1] + 1]) <= sizes and np.count_nonzero(found.bytes) == found.documents
    whole = {tokenizer.decode(found.tokens[a + 1 : b]) for a, b in zip(starts[:-1], starts[1:], strict=True)}
    assert whole <= set(texts)


def test_work_of_a_longer_stream(tmp_path):
    random = np.random.default_rng(1)
    sizes = (np.exp(random.normal(5, 1, 2000)) + 2).astype(int)
    paths = write_stream(tmp_path, np.concatenate([*([BOS] + [5] * size for size in sizes), [BOS]]))
    everything, few = (sample.draw(paths, count, 20, 0, None) for count in (2000, 100))
    settings = TTTConfig(mode="streaming", batch_size=24)
    assert sample.work_ratio(few, settings, few.targets) == 1
    truth = sample._work(sizes + 2, settings) / sample._work(np.diff(np.flatnonzero(few.tokens == BOS)) + 1, settings)
    assert sample.work_ratio(few, settings, everything.targets) == pytest.approx(truth, rel=0.03)
    # Batches of a small sample wait longer for their longest documents.
    assert truth < 0.9 * everything.targets / few.targets
    far = [sample.work_ratio(few, settings, targets) for targets in (10**8, 10**9)]
    assert far[1] == pytest.approx(10 * far[0], rel=1e-9)


# The command


def test_trials_are_kept_and_not_run_again(model, data, tmp_path, undrawn, capsys, monkeypatch):
    assert tune(model, data, tmp_path) == 0
    first = lines(tmp_path)
    assert len(first) == 4
    assert first[0]["ttt"] == config.to_dict(OWN) and first[0]["changes"] == {}
    assert first[1]["changes"] == {"mode": "streaming", "refresh": 32}
    assert len({json.dumps(told["ttt"], sort_keys=True) for told in first}) == 4
    for told in first:
        assert 0 <= told["preparing"] < told["seconds"] and told["nats"] > 0
        assert told["targets"] > 100 and told["bytes"] > 100 and told["context"]["unit"] == "bpb"
    capsys.readouterr()
    runs = []
    honest = command.ttt.evaluate
    monkeypatch.setattr(command.ttt, "evaluate", lambda *a, **k: runs.append(a) or honest(*a, **k))
    assert tune(model, data, tmp_path) == 0 and not runs
    assert lines(tmp_path) == first and capsys.readouterr().out.count("known:") == 4
    assert tune(model, data, tmp_path, trials=5) == 0 and len(runs) == 1
    assert lines(tmp_path)[:4] == first
    runs.clear()
    assert tune(model, data, tmp_path, docs=DOCUMENTS - 1, trials=1) == 0 and len(runs) == 1  # other documents
    assert tune(model, data, tmp_path, "--set", "ttt.alpha=3", trials=1) == 0 and len(runs) == 2
    assert lines(tmp_path)[-1]["changes"] == {"alpha": 3.0}
    assert len(lines(tmp_path)) == 7


def test_two_searches_are_the_same(model, data, tmp_path, undrawn):
    """Also that each trial begins with the artifact's weights, which a global phase moves."""
    outcomes = []
    for name in ("a", "b"):
        assert tune(model, data, tmp_path / name, trials=3) == 0
        outcomes.append([(told["ttt"], told["nats"]) for told in lines(tmp_path / name)])
    assert outcomes[0] == outcomes[1]
    assert tune(model, data, tmp_path / "c", "--set", "ttt.mode=streaming", "--set", "ttt.refresh=32", trials=1) == 0
    assert lines(tmp_path / "c")[0]["nats"] == outcomes[0][1][1]


def test_the_outcome_is_ready_to_paste(model, data, tmp_path, undrawn, capsys):
    assert tune(model, data, tmp_path, "--budget", "1e6", "--targets", "5000") == 0
    text = capsys.readouterr().out
    told = min(lines(tmp_path), key=lambda told: told["nats"])
    words = " ".join(f"--set ttt.{name}={value}" for name, value in told["changes"].items())
    assert words in text.splitlines()[-1] or not words
    assert f"{told['nats'] / told['bytes'] / math.log(2):.5f} bpb in" in text
    assert "baseline" in text and "chosen" in text and "seconds are for 5,000" in text


def test_seconds_are_scaled_but_for_what_is_made_once(model, data, tmp_path, undrawn):
    loaded = command.loading.load(model, torch.device("cpu"))
    drawn = sample.draw(shards.train_files(data), DOCUMENTS, VOCAB, 7, None)
    bench = command.Bench(loaded, drawn, {"unit": "nats a token"}, tmp_path / "t", 10 * drawn.targets)
    trial = bench.measure(OWN, lambda *progress: None)
    (told,) = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    assert trial.loss == told["nats"] / drawn.targets
    ratio = sample.work_ratio(drawn, OWN, 10 * drawn.targets)
    assert trial.seconds == pytest.approx(told["preparing"] + ratio * (told["seconds"] - told["preparing"]))


def test_no_validation_shard_is_opened(model, data, tmp_path, undrawn, monkeypatch):
    """Beside the other tests, whose data folder has none."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for kind in (shards.VAL, shards.VAL_BYTES):
        (folder / shards.shard_name(kind, 0)).write_bytes(b"never to be read")
    opened = []
    honest = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: opened.append(str(file)) or honest(file, *a, **k))
    assert tune(model, folder, tmp_path / "out", "--budget", "1e6", trials=2) == 0
    assert any(shards.TRAIN in name for name in opened) and not any(shards.VAL in name for name in opened)
    assert lines(tmp_path / "out")[0]["targets"] > 100


def test_the_length_of_the_stream_is_the_manifests(data):
    assert command._counted(data) == read_json(data / build.MANIFEST)["splits"]["val"]["tokens"] - 1
    assert command._counted(data / "absent") is None


def test_without_a_tokenizer_losses_are_by_token(model, data, tmp_path, undrawn, capsys):
    for path in shards.train_files(data):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert tune(model, tmp_path, tmp_path / "out", trials=1) == 0
    (told,) = lines(tmp_path / "out")
    assert told["bytes"] == 0 and told["context"]["unit"] == "nats a token"
    assert f"{told['nats'] / told['targets']:.5f} nats a token" in capsys.readouterr().out


def test_settings_beyond_the_memory_are_a_trial_too(model, data, tmp_path, undrawn, monkeypatch, capsys):
    honest = command.ttt.evaluate

    def full(network, tokens, counts, settings, *rest, **options):
        if settings.mode == "streaming":
            raise torch.OutOfMemoryError("made up")
        return honest(network, tokens, counts, settings, *rest, **options)

    monkeypatch.setattr(command.ttt, "evaluate", full)
    assert tune(model, data, tmp_path, trials=2) == 0
    assert lines(tmp_path)[1]["nats"] is None and "nothing to set" in capsys.readouterr().out


def refused(capsys, code, *wanted):
    errors = capsys.readouterr().err
    assert code == 2 and errors.startswith("pgolf: ") and errors.count("\n") == 1, errors
    for word in wanted:
        assert word in errors, errors


def test_each_mistake_is_one_line(model, data, tmp_path, undrawn, capsys):
    (tmp_path / "empty").mkdir()
    refused(capsys, tune(model, tmp_path / "empty", tmp_path), "no fineweb_train_*.bin")
    refused(capsys, tune(tmp_path / "absent", data, tmp_path), "absent does not exist")
    refused(capsys, tune(model, data, tmp_path, "--set", "ttt.refrsh=3"), "ttt.refrsh", "ttt.refresh")
    refused(capsys, tune(model, data, tmp_path, "--set", "train.seconds=30"), "settings of ttt alone", "train.seconds")
    refused(capsys, tune(model, data, tmp_path, "--set", "ttt.rank=0"), "ttt.rank must be positive")
    for option in ("--budget", "--targets", "--docs", "--trials"):
        refused(capsys, tune(model, data, tmp_path, option, "0"), f"{option} must be positive")
    for number, path in enumerate(shards.train_files(data)):
        (tmp_path / "empty" / path.name).write_bytes(path.read_bytes())
        assert number < 9
    refused(capsys, tune(model, tmp_path / "empty", tmp_path, "--budget", "9"), "--targets")
    assert not (tmp_path / command.TRIALS).exists()
    (tmp_path / command.TRIALS).write_text('{"nats": 3}\n')
    refused(capsys, tune(model, data, tmp_path), "trials.jsonl, line 1, is no trial")
    write_stream(tmp_path, [BOS, 5, 6])
    refused(capsys, tune(model, tmp_path, tmp_path), "no whole document")


def test_a_budget_that_nothing_meets(model, data, tmp_path, undrawn, capsys):
    code = tune(model, data, tmp_path, "--budget", "1e-6", trials=2)
    refused(capsys, code, "no trial takes less than", "the fastest", "--budget")
    assert len(lines(tmp_path)) == 2


def test_other_tokenizers_are_refused(model, data, texts, tmp_path, capsys):
    for path in shards.train_files(data):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    train_tokenizer([text.upper() + "?" for text in texts], tmp_path / "tokenizer.model", VOCAB)
    refused(capsys, tune(model, tmp_path, tmp_path / "out"), "another tokenizer")


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    trials = [*searched(500.0, 20), Trial(TTTConfig(rank=1), math.inf, math.inf)]
    for chosen, budget in ((search.choose(trials, 500.0), 500.0), (None, math.inf)):
        report.plot(trials, chosen, budget, "bpb", tmp_path / report.CURVE)
        picture = (tmp_path / report.CURVE).read_bytes()
        assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000


def test_without_matplotlib_one_line_says_so_after_the_outcome(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code = tune(model, data, tmp_path, trials=2)
    text = capsys.readouterr()
    assert code == 2 and "pip install pgolf[plot]" in text.err and text.err.count("\n") == 1
    assert "baseline" in text.out and len(lines(tmp_path)) == 2


def test_the_tuner_is_no_part_of_what_counts():
    assert not [name for name in source.reachable(source.ROOTS) if name.startswith("tuning")]
