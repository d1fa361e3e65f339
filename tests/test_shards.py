"""Token shards: the frozen layout, damaged files, and the validation stream with its bytes."""

import numpy as np
import pytest

from pgolf.data.audit import overlap
from pgolf.data.bytes import ByteTable
from pgolf.data.shards import load_validation, read_tokens, train_files, val_files, write_shard
from pgolf.errors import PgolfError


def test_the_layout_is_frozen(tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.array([1, 500, 65535]))
    data = path.read_bytes()
    assert data[:12] == (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (3).to_bytes(4, "little")
    assert data[12:1024] == bytes(1012)
    assert data[1024:] == b"\x01\x00\xf4\x01\xff\xff"
    assert read_tokens(path).tolist() == [1, 500, 65535]
    assert read_tokens(path).dtype == np.uint16


def test_an_empty_shard(tmp_path):
    write_shard(tmp_path / "empty.bin", np.zeros(0, np.uint16))
    assert read_tokens(tmp_path / "empty.bin").tolist() == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a token shard"),
        (lambda data: data[:500], "not a token shard"),
        (lambda data: b"\0\0\0\0" + data[4:], "not a token shard"),
        (lambda data: data[:4] + b"\2" + data[5:], "not a token shard"),
        (lambda data: data[:-1], "should hold 3 tokens"),
        (lambda data: data + b"\0\0", "should hold 3 tokens"),
        (lambda data: data[:8] + b"\xff\xff\xff\xff" + data[12:], "should hold -1 tokens"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, damage, message):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.array([1, 2, 3]))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PgolfError, match=message) as caught:
        read_tokens(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("tokens", [[-1], [65536], [[1, 2]]])
def test_what_a_shard_cannot_hold_is_refused(tmp_path, tokens):
    with pytest.raises(PgolfError, match="cannot write"):
        write_shard(tmp_path / "shard.bin", np.array(tokens))
    assert list(tmp_path.iterdir()) == []


def test_missing_shards(tmp_path):
    with pytest.raises(PgolfError, match="cannot read shard"):
        read_tokens(tmp_path / "absent.bin")
    for listing in (train_files, val_files):
        with pytest.raises(PgolfError, match="no fineweb_"):
            listing(tmp_path)


def test_shards_are_listed_by_name_and_kind(tmp_path):
    for name in ("fineweb_val_000001", "fineweb_val_000000", "fineweb_val_bytes_000000", "fineweb_train_000000"):
        write_shard(tmp_path / f"{name}.bin", np.array([1]))
    assert [path.name for path in val_files(tmp_path)] == ["fineweb_val_000000.bin", "fineweb_val_000001.bin"]
    assert [path.name for path in train_files(tmp_path)] == ["fineweb_train_000000.bin"]


@pytest.fixture
def validation(tmp_path):
    """A folder with two validation shards and their sidecars."""
    for index, (tokens, counts) in enumerate([([1, 9, 8], [0, 3, 2]), ([1, 7], [0, 5])]):
        write_shard(tmp_path / f"fineweb_val_{index:06d}.bin", np.array(tokens))
        write_shard(tmp_path / f"fineweb_val_bytes_{index:06d}.bin", np.array(counts))
    return tmp_path


def test_the_validation_stream(validation):
    loaded = load_validation(validation, 10)
    assert loaded.tokens.tolist() == [1, 9, 8, 1, 7]
    assert loaded.bytes.tolist() == [0, 3, 2, 0, 5]
    assert (loaded.targets, loaded.total_bytes) == (4, 10)


def test_validation_that_does_not_fit_together(validation):
    with pytest.raises(PgolfError, match="holds token 9 but the vocabulary has 9"):
        load_validation(validation, 9)
    write_shard(validation / "fineweb_val_bytes_000001.bin", np.array([0, 5, 1]))
    with pytest.raises(PgolfError, match="different builds"):
        load_validation(validation, 10)
    (validation / "fineweb_val_bytes_000001.bin").unlink()
    with pytest.raises(PgolfError, match="2 validation shards but 1 sidecars"):
        load_validation(validation, 10)
    (validation / "fineweb_val_bytes_000000.bin").unlink()
    with pytest.raises(PgolfError, match="without its sidecar"):
        load_validation(validation, 10)


def test_bytes_without_a_sidecar(validation):
    for path in validation.glob("fineweb_val_bytes_*"):
        path.unlink()
    boundary = np.arange(10) < 2
    table = ByteTable(np.arange(10, dtype=np.uint16) * ~boundary, np.arange(10) == 8, boundary)
    assert load_validation(validation, 10, table).bytes.tolist() == [0, 9, 9, 0, 7]


def test_too_little_validation(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([1]))
    with pytest.raises(PgolfError, match="no target"):
        load_validation(tmp_path, 10)


def test_overlap_finds_a_shared_document_across_shards(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([1, 5, 6, 1, 7, 8, 9]))
    write_shard(tmp_path / "fineweb_train_000000.bin", np.array([1, 5, 1, 7, 8]))
    write_shard(tmp_path / "fineweb_train_000001.bin", np.array([8, 1, 2]))
    assert overlap(tmp_path).shared == 0
    write_shard(tmp_path / "fineweb_train_000001.bin", np.array([9, 1, 2]))
    found = overlap(tmp_path)
    assert (found.train_documents, found.val_documents, found.shared, found.example) == (3, 2, 1, 1)
