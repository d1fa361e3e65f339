"""The embedded text: deterministic, real prose, split by content."""

import sys

import pytest

from pgolf.data import stdlib


@pytest.fixture(scope="module")
def documents():
    return stdlib.documents()


def test_there_is_enough_text_and_no_duplicate(documents):
    assert len(documents) == len(set(documents)) > 200
    assert sum(map(len, documents)) > 1_000_000
    assert any(text.startswith("argparse") or "Command-line parsing library" in text for text in documents)
    assert any("integer literals" in text.lower() for text in documents), "topics of the language reference"


def test_the_text_is_the_same_each_time(documents):
    assert stdlib.documents() == documents


def test_no_module_is_imported(documents):
    assert "pydoc_data.topics" not in sys.modules
    assert "antigravity" not in sys.modules


def test_split_depends_on_the_document_alone(documents):
    train, val = stdlib.split(documents, 0.1)
    assert 0.04 < len(val) / len(documents) < 0.2
    assert sorted(train + val) == sorted(documents)
    fewer_train, fewer_val = stdlib.split(documents[::2], 0.1)
    assert set(fewer_val) <= set(val)
    assert set(fewer_train) <= set(train)
    assert stdlib.split(documents, 0.0)[1] == []
