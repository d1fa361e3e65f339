"""Building shards: content, splits, the manifest, every source format, refusals that leave the folder as it was."""

import gzip
import json
import lzma

import numpy as np
import pytest

from pgolf.data.build import build, verify_manifest
from pgolf.data.shards import load_validation, read_tokens, train_files, val_files, write_shard
from pgolf.data.tokenizer import Tokenizer, train_tokenizer
from pgolf.errors import PgolfError

WORDS = ["Alpha", "beta", "GAMMA", "deLta", "the", "quick", "Brown", "fox", "42", "naïve", "jumps", "over", "lazy"]
DOCUMENTS = [" ".join(WORDS[i % 13 :] + WORDS[: i % 7]) + f" {i}\n" for i in range(40)]
DOCUMENTS[5] = "  \n "  # has no token under the record's setting


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "record.model"
    train_tokenizer(DOCUMENTS, path, 320)
    return path


def jsonl(path, documents, opener=open):
    with opener(path, "wb") as stream:
        stream.writelines(json.dumps({"text": text}).encode() + b"\n" for text in documents)
    return path


@pytest.fixture
def source(tmp_path):
    return jsonl(tmp_path / "source.jsonl", DOCUMENTS)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def expected_stream(tokenizer, documents):
    model = Tokenizer.load(tokenizer)
    ids = [model.encode_ids(text).tolist() for text in documents]
    return [token for document in ids if document for token in [1, *document]]


def test_first_documents_become_validation(tmp_path, tokenizer, source):
    out = tmp_path / "out"
    manifest = build([source], out, tokenizer, val_docs=8, workers=1)
    validation = load_validation(out, 320)
    assert validation.tokens.tolist() == expected_stream(tokenizer, DOCUMENTS[:8])
    assert read_tokens(train_files(out)[0]).tolist() == expected_stream(tokenizer, DOCUMENTS[8:])
    assert validation.total_bytes == sum(len(text.strip().encode()) for text in DOCUMENTS[:8])

    assert manifest == json.loads((out / "manifest.json").read_text())
    val, train = manifest["splits"]["val"], manifest["splits"]["train"]
    assert manifest["split"] == {"by": "first documents", "val_docs": 8}
    assert (val["documents"], val["empty_documents"], train["documents"]) == (7, 1, 32)
    assert val["tokens"] == len(validation.tokens)
    assert val["text_bytes"] == validation.total_bytes
    assert train["changed_share"] == 1.0, "the record's setting drops the newline at the end"
    assert manifest["tokenizer_sha256"] == Tokenizer.load(tokenizer).sha256
    assert sorted(contents(out)) == sorted([*val["shards"], *train["shards"], "manifest.json"])


def test_the_workers_leave_no_trace_in_the_result(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("pgolf.data.build._BATCH_CHARACTERS", 100)
    source = jsonl(tmp_path / "source.jsonl", DOCUMENTS * 3)
    results = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        build([source], out, tokenizer, val_docs=30, workers=workers, shard_tokens=300)
        results.append(contents(out))
    assert results[0] == results[1]


def test_shards_hold_whole_documents(tmp_path, tokenizer, source):
    out = tmp_path / "out"
    build([source], out, tokenizer, split="train", workers=1, shard_tokens=60)
    shards = [read_tokens(path).tolist() for path in train_files(out)]
    assert len(shards) > 3
    assert all(shard[0] == 1 for shard in shards)
    assert all(len(shard) <= 60 or shard.count(1) == 1 for shard in shards)
    assert sum(shards, []) == expected_stream(tokenizer, DOCUMENTS)


def test_a_rerun_replaces_its_own_result(tmp_path, tokenizer, source):
    out = tmp_path / "out"
    build([source], out, tokenizer, split="train", workers=1, shard_tokens=60)
    build([source], out, tokenizer, split="train", workers=1)
    assert len(train_files(out)) == 1
    verify_manifest(out, Tokenizer.load(tokenizer).sha256)


def test_files_that_are_split_already(tmp_path, tokenizer):
    out = tmp_path / "out"
    train = jsonl(tmp_path / "train.jsonl", DOCUMENTS[:30])
    val = jsonl(tmp_path / "val.jsonl", DOCUMENTS[30:])
    build([val], out, tokenizer, split="val", workers=1)
    manifest = build([train], out, tokenizer, split="train", workers=1)
    assert set(manifest["splits"]) == {"train", "val"}
    assert read_tokens(val_files(out)[0]).tolist() == expected_stream(tokenizer, DOCUMENTS[30:])
    assert read_tokens(train_files(out)[0]).tolist() == expected_stream(tokenizer, DOCUMENTS[:30])


def test_every_source_format(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    texts = [f"{word} quick" for word in WORDS[:6]]
    (tmp_path / "a.txt").write_text(texts[0])
    jsonl(tmp_path / "b.jsonl", texts[1:2])
    jsonl(tmp_path / "c.jsonl.gz", texts[2:3], gzip.open)
    jsonl(tmp_path / "d.jsonl.xz", texts[3:4], lzma.open)
    plain = jsonl(tmp_path / "plain", texts[4:5]).read_bytes()
    frames = [zstandard.ZstdCompressor().compress(plain[i : i + 10]) for i in range(0, len(plain), 10)]
    (tmp_path / "e.jsonl.zst").write_bytes(b"".join(frames))  # several frames, as parallel compressors write
    parquet.write_table(pyarrow.table({"id": [1], "text": texts[5:6]}), tmp_path / "f.parquet")
    seen = []
    inputs = sorted(path for path in tmp_path.iterdir() if path.suffix)
    build(inputs, tmp_path / "out", tokenizer, split="train", workers=1, progress=lambda *now: seen.append(now))
    stream = expected_stream(tokenizer, texts)
    assert read_tokens(train_files(tmp_path / "out")[0]).tolist() == stream
    assert seen[-1][:2] == (6, len(stream))
    assert 0 < seen[-1][2] <= 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["x"]\n', "a.jsonl, line 3: expected an object"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl, line 1: expected an object with a text under 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl, line 1"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: the text holds a lone surrogate"),
        ("a.jsonl", b"", "nothing to write for train"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9)[:-12], "a.jsonl.gz"),
        ("a.jsonl.xz", b"not xz", "a.jsonl.xz"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 9)[:-12], "a.jsonl.xz"),
        ("a.jsonl.zst", b"not zstandard", "a.jsonl.zst"),
        ("a.parquet", b"not parquet", "a.parquet"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8"),
        ("a.csv", b"text\nx\n", "cannot read documents from"),
    ],
)
def test_bad_input_is_named_and_nothing_is_left(tmp_path, tokenizer, name, content, message):
    out, path = tmp_path / "out", tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PgolfError) as caught:
        build([path], out, tokenizer, split="train", workers=1)
    assert message in str(caught.value)
    assert contents(out) == {}


def test_a_fault_found_by_a_worker_process_reaches_the_caller(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": "\\ud800"}\n')
    with pytest.raises(PgolfError, match="a.jsonl, line 2: the text holds a lone surrogate"):
        build([path], tmp_path / "out", tokenizer, split="val", workers=2)
    assert contents(tmp_path / "out") == {}


def test_a_missing_parquet_column(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(PgolfError, match="no column 'text', only body"):
        build([tmp_path / "a.parquet"], tmp_path / "out", tokenizer, split="train", workers=1)
    build([tmp_path / "a.parquet"], tmp_path / "out", tokenizer, split="train", workers=1, field="body")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either"),
        ({"split": "train", "val_docs": 3}, "give either"),
        ({"split": "test"}, "takes train or val"),
        ({"val_docs": 0}, "at least 1"),
        ({"val_docs": 40}, "nothing to write for train"),
        ({"split": "train", "shard_tokens": 0}, "at least one token"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, tokenizer, source, settings, message):
    with pytest.raises(PgolfError, match=message):
        build([source], tmp_path / "out", tokenizer, workers=1, **settings)
    assert contents(tmp_path / "out") == {}


def test_missing_files(tmp_path, tokenizer, source):
    with pytest.raises(PgolfError, match="absent.jsonl"):
        build([tmp_path / "absent.jsonl"], tmp_path / "out", tokenizer, split="train")
    with pytest.raises(PgolfError, match="no input files"):
        build([], tmp_path / "out", tokenizer, split="train")
    with pytest.raises(PgolfError, match="cannot read tokenizer"):
        build([source], tmp_path / "out", tmp_path / "absent.model", split="train")


def test_builds_that_would_mix_splits_are_refused(tmp_path, tokenizer, source):
    """Each refusal leaves every byte of the folder as it was."""
    other_tokenizer = tmp_path / "other.model"
    train_tokenizer(DOCUMENTS, other_tokenizer, 310)
    other_source = jsonl(tmp_path / "other.jsonl", DOCUMENTS[::-1])
    bad_source = tmp_path / "bad.jsonl"
    bad_source.write_text("{}\n")
    first, by_files, unknown = tmp_path / "first", tmp_path / "by_files", tmp_path / "unknown"
    build([source], first, tokenizer, val_docs=8, workers=1)
    build([source], by_files, tokenizer, split="val", workers=1)
    unknown.mkdir()
    write_shard(unknown / "fineweb_val_000000.bin", np.array([1, 2]))
    refused = [
        (first, source, tokenizer, {"val_docs": 9}, "another split"),
        (first, other_source, tokenizer, {"split": "train"}, "another split"),
        (first, other_source, tokenizer, {"val_docs": 8}, "other sources"),
        (first, source, other_tokenizer, {"val_docs": 8}, "another tokenizer"),
        (by_files, source, tokenizer, {"split": "train"}, "already in the val split"),
        (by_files, other_source, tokenizer, {"split": "val"}, "other sources"),
        (by_files, other_source, other_tokenizer, {"split": "train"}, "another tokenizer"),
        (by_files, bad_source, tokenizer, {"split": "train"}, "bad.jsonl, line 1"),
        (unknown, source, tokenizer, {"split": "train"}, "without a manifest"),
    ]
    for folder, path, model, settings, message in refused:
        before = contents(folder)
        with pytest.raises(PgolfError, match=message):
            build([path], folder, model, workers=1, **settings)
        assert contents(folder) == before


def test_a_tokenizer_without_markers_is_refused(tmp_path, source):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS),
        model_prefix=str(tmp_path / "plain"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    with pytest.raises(PgolfError, match="lacks the CaseOps markers"):
        build([source], tmp_path / "out", tmp_path / "plain.model", split="train")


def test_data_is_verified_before_use(tmp_path, tokenizer, source):
    out, sha256 = tmp_path / "out", Tokenizer.load(tokenizer).sha256
    out.mkdir()
    assert verify_manifest(out, sha256) is None
    manifest = build([source], out, tokenizer, val_docs=8, workers=1)
    assert verify_manifest(out, sha256) == manifest
    with pytest.raises(PgolfError, match="another tokenizer"):
        verify_manifest(out, "0" * 64)
    write_shard(out / "fineweb_train_000001.bin", np.array([1, 2]))
    with pytest.raises(PgolfError, match="fineweb_train_000001.bin is not of this build"):
        verify_manifest(out, sha256)
    (out / "fineweb_train_000001.bin").unlink()
    (out / "fineweb_val_bytes_000000.bin").unlink()
    with pytest.raises(PgolfError, match="fineweb_val_bytes_000000.bin is missing"):
        verify_manifest(out, sha256)
    for content in ("{}", "[]", "not json", '{"format": 2}', '{"format": 1, "splits": {"val": 3}}'):
        (out / "manifest.json").write_text(content)
        with pytest.raises(PgolfError, match="manifest.json"):
            verify_manifest(out, sha256)
