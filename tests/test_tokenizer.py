"""The tokenizer: golden tokens and bytes, training in both settings, byte counting, bad files."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.data.bytes import surface_bytes
from pgolf.data.caseops import ALLCAPS, CAPNEXT, ESC, MARKERS, TITLE
from pgolf.data.tokenizer import Tokenizer, train_tokenizer
from pgolf.errors import PgolfError

WORDS = ["Alpha", "beta", "GAMMA", "deLta", "the", "quick", "Brown", "fox-trot", "42", "naïve", "jumps", "over", "lazy"]
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) + ".\n    Indented: " + " ".join(WORDS[i::2]) for i in range(len(WORDS))]
# SentencePiece spells a space as U+2581, so that one character cannot come back.
LOSSLESS_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)
WORDY_TEXT = st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", "\t", "é", "日本", "\x00", *MARKERS])).map("".join)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small tokenizer of each setting, by name."""
    folder = tmp_path_factory.mktemp("tokenizers")
    loaded = {}
    for setting in ("record", "lossless"):
        train_tokenizer(CORPUS, folder / f"{setting}.model", 320, setting)
        loaded[setting] = Tokenizer.load(folder / f"{setting}.model")
    return loaded


@pytest.mark.golden
def test_golden_tokens_and_bytes(golden, record_tokenizer):
    tokenizer = Tokenizer.load(record_tokenizer)
    for line in golden("caseops.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids, counts = tokenizer.encode(row["text"])
        assert ids.tolist() == row["token_ids"], row["text"]
        assert counts.tolist() == row["token_bytes"], row["text"]
        assert tokenizer.encode_ids(row["text"]).tolist() == row["token_ids"]


def test_the_vocabulary_has_the_recipe_s_layout(models):
    for setting, tokenizer in models.items():
        assert (tokenizer.setting, tokenizer.vocab_size, tokenizer.caseops) == (setting, 320, True)
        assert [tokenizer.piece(i) for i in range(4, 8)] == list(MARKERS)
        assert [tokenizer.piece(i) for i in (8, 263)] == ["<0x00>", "<0xFF>"]


@settings(deadline=None)
@given(LOSSLESS_TEXT | WORDY_TEXT)
def test_lossless_texts_come_back(models, text):
    tokenizer = models["lossless"]
    ids, counts = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert np.array_equal(ids, tokenizer.encode_ids(text))
    assert counts.sum() == len(text.encode())


@settings(deadline=None)
@given(WORDY_TEXT)
def test_record_bytes_are_those_of_the_stripped_text(models, text):
    ids, counts = models["record"].encode(text)
    assert len(ids) == len(counts)
    assert counts.sum() == len(text.strip().encode())


def test_record_collapses_whitespace(models):
    assert models["record"].decode(models["record"].encode_ids("  The\n\n  QUICK  ")) == "The QUICK"


def test_an_escape_reaches_over_a_token_boundary():
    surfaces = ["a", ESC, TITLE + "b", "", "", "日", ALLCAPS, CAPNEXT, ESC + ESC, ESC, ESC, "\U0001f642"]
    assert surface_bytes(surfaces).tolist() == [1, 0, 4, 0, 0, 3, 0, 0, 3, 0, 3, 4]
    assert surface_bytes([]).tolist() == []


def test_bytes_from_the_vocabulary(models):
    tokenizer = models["record"]
    table = tokenizer.byte_lengths()
    word = next(i for i in range(264, 320) if len(tokenizer.piece(i)) > 1 and tokenizer.piece(i)[0] == "\u2581")
    size = len(tokenizer.piece(word)) - 1
    expected = [size, size + 1, 0, size, 1, size + 1]  # the space counts unless a control token stands before
    assert table.counts(np.array([word, word, 1, word, 8, word])).tolist() == expected


def test_training_is_deterministic(tmp_path):
    for name, threads in (("a", 1), ("b", 4)):
        train_tokenizer(iter(CORPUS), tmp_path / name, 300, "lossless", threads)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("texts", "size", "setting", "message"),
    [
        (["hello world"], 4000, "record", "at most"),
        ([], 300, "record", "cannot train"),
        (CORPUS, 100, "record", "272 to 65536"),
        (CORPUS, 300, "exact", "record or lossless"),
        (CORPUS + ["".join(map(chr, range(0x4E00, 0x4F00)))] * 9, 300, "record", "at least"),
        (["a \ud800"], 300, "record", "surrogate at character 2"),
    ],
)
def test_training_that_cannot_work_says_why(tmp_path, texts, size, setting, message):
    with pytest.raises(PgolfError, match=message):
        train_tokenizer(texts, tmp_path / "model", size, setting)
    assert list(tmp_path.iterdir()) == []


def test_the_size_named_for_a_small_text_is_right(tmp_path):
    with pytest.raises(PgolfError) as caught:
        train_tokenizer(CORPUS, tmp_path / "model", 5000)
    limit = int(str(caught.value).split("at most ")[1].split()[0])
    train_tokenizer(CORPUS, tmp_path / "model", limit)
    assert Tokenizer.load(tmp_path / "model").vocab_size == limit


def test_bad_files_and_ids(tmp_path, models):
    with pytest.raises(PgolfError, match="cannot read tokenizer"):
        Tokenizer.load(tmp_path / "absent.model")
    for content in (b"", b"not a model", bytes(range(256)) * 10):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(PgolfError, match="bad.model"):
            Tokenizer.load(tmp_path / "bad.model")
    tokenizer = models["lossless"]
    with pytest.raises(PgolfError, match="outside"):
        tokenizer.decode([320])
    with pytest.raises(PgolfError, match="malformed CaseOps"):
        tokenizer.decode([4])
    assert tokenizer.decode([4], strict=False) == ""
    with pytest.raises(PgolfError, match="surrogate"):
        tokenizer.encode("\ud800")
