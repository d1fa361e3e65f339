"""The loader: golden batches, segment rules against a plain reading of them, resuming, bad data."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf.data.loader import Loader, boundaries
from pgolf.data.shards import read_tokens, write_shard
from pgolf.errors import PgolfError


def plain_boundaries(starts, total, max_seq_len):
    """The rule, one token at a time."""
    cuts, last = [], 0
    for position in range(total):
        if position == 0 or position in starts or position - last == max_seq_len:
            cuts.append(position)
            last = position
    longest = max(end - start for start, end in zip(cuts, [*cuts[1:], total], strict=True))
    entries = len(cuts) + 1
    return cuts + [total] * (-entries % 64 + 1), longest


def golden_plan(note):
    """{batch: max_seq_len} and the settings in the note of a golden file."""
    settings = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", note)}
    phases = re.findall(r"(\d+) for (?:batches )?(\d+)-(\d+)", note)
    lengths = {batch: int(length) for length, first, last in phases for batch in range(int(first), int(last) + 1)}
    fresh = {int(first) for _, first, _ in phases}  # each phase begins with a fresh loader
    return settings, lengths, fresh


@pytest.mark.golden
def test_golden_batches(golden, tmp_path):
    data = np.load(golden("loader.npz"), allow_pickle=False)
    settings, lengths, fresh = golden_plan(str(data["note"]))
    world, step = settings["world_size"], settings["global_tokens"]
    shards = sorted((name for name in data.files if re.fullmatch(r"shard\d+", name)), key=lambda name: int(name[5:]))
    paths = [tmp_path / f"fineweb_train_{index:06d}.bin" for index in range(len(shards))]
    for path, name in zip(paths, shards, strict=True):
        write_shard(path, data[name])
    vocab_size = 1 + max(int(data[name].max()) for name in shards)
    batches = {int(match[1]) for name in data.files if (match := re.match(r"rank0\.batch(\d+)\.x", name))}
    assert batches == set(lengths)
    for rank in range(world):
        loader = None
        for batch in sorted(batches):
            if batch in fresh:
                if loader is not None:
                    loader.close()
                loader = Loader(paths, rank, world, step, step // world // settings["grad_accum"], vocab_size)
            got, prefix = loader.next_batch(lengths[batch]), f"rank{rank}.batch{batch}."
            np.testing.assert_array_equal(got.inputs.numpy(), data[prefix + "x"])
            np.testing.assert_array_equal(got.targets.numpy(), data[prefix + "y"])
            np.testing.assert_array_equal(got.cu_seqlens.numpy(), data[prefix + "cu_seqlens"])
            assert got.cu_seqlens.dtype.is_signed and got.cu_seqlens.element_size() == 4
            assert got.max_seqlen == np.diff(data[prefix + "cu_seqlens"]).max()
        loader.close()


@given(st.sets(st.integers(0, 299)), st.integers(1, 300), st.integers(1, 320))
def test_boundaries_follow_the_rule(starts, total, max_seq_len):
    starts = {start for start in starts if start < total}
    padded, longest = boundaries(np.array(sorted(starts), np.int64), total, max_seq_len)
    assert (padded.tolist(), longest) == plain_boundaries(starts, total, max_seq_len)
    assert len(padded) % 64 == 0 and padded.dtype == np.int32


@pytest.fixture
def shards(tmp_path):
    """Three shards; the middle one is too short for a batch."""
    random = np.random.default_rng(5)
    paths = []
    for index, size in enumerate((1000, 30, 777)):
        tokens = random.integers(2, 50, size)
        tokens[random.random(size) < 0.05] = 1
        tokens[:3] = 7, 7, 1  # the stream does not begin with a BOS
        paths.append(tmp_path / f"fineweb_train_{index:06d}.bin")
        write_shard(paths[-1], tokens)
    return paths


def take(loader, count, max_seq_len=20):
    return [loader.next_batch(max_seq_len) for _ in range(count)]


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert one.inputs.equal(other.inputs) and one.targets.equal(other.targets)
        assert one.cu_seqlens.equal(other.cu_seqlens) and one.max_seqlen == other.max_seqlen


def test_ranks_share_the_stream_and_the_short_shard_is_passed_over(shards):
    tokens = [read_tokens(path) for path in shards]
    span = 51
    expected = [(0, 2 + 102 * k) for k in range(9)] + [(2, 2 + 102 * k) for k in range(7)] + [(0, 2)]
    for rank in range(2):
        with Loader(shards, rank, 2, 200, 50, 50) as loader:
            assert loader.accumulation == 2
            for (index, cursor), batch in zip(expected, take(loader, len(expected)), strict=True):
                want = tokens[index][cursor + rank * span :][:span]
                assert batch.inputs.tolist() == [want[:-1].tolist()]
                assert batch.targets.tolist() == [want[1:].tolist()]


@pytest.mark.parametrize("done", range(0, 20, 3))
def test_resuming_is_exact_wherever_it_happens(shards, done):
    with Loader(shards, 1, 2, 200, 50, 50) as loader:
        take(loader, done)
        state = loader.state_dict()
        rest = take(loader, 20)
        loader.load_state_dict(state)  # back in place: what was read ahead is dropped
        assert loader.state_dict() == state
        assert_same(take(loader, 20), rest)
    with Loader(shards, 1, 2, 200, 50, 50) as loader:
        loader.load_state_dict(state)
        assert_same(take(loader, 20), rest)


def test_the_context_length_may_change_at_any_batch(shards):
    with Loader(shards, 0, 1, 100, 100, 50) as loader:
        short, long = loader.next_batch(4), loader.next_batch(1000)
    assert short.max_seqlen == 4
    assert long.max_seqlen > 4


@pytest.mark.parametrize("state", [{}, {"shard": "other.bin", "cursor": 0}])
def test_a_position_in_another_shard_is_refused(shards, state):
    with Loader(shards, 0, 1, 50, 50, 50) as loader, pytest.raises(PgolfError, match="not among the training shards"):
        loader.load_state_dict(state)


@pytest.mark.parametrize("cursor", [-1, 1001, "3", None])
def test_a_position_outside_the_shard_is_refused(shards, cursor):
    with Loader(shards, 0, 1, 50, 50, 50) as loader, pytest.raises(PgolfError, match="outside fineweb_train_000000"):
        loader.load_state_dict({"shard": "fineweb_train_000000.bin", "cursor": cursor})


def test_a_token_outside_the_vocabulary_names_its_shard(shards):
    with Loader(shards, 0, 1, 50, 50, 49) as loader, pytest.raises(PgolfError, match="train_00000[02].bin holds"):
        take(loader, 40)


@pytest.mark.parametrize("content", [[1] * 50, [5] * 500, []])
def test_data_without_one_batch_is_an_error_not_a_loop(tmp_path, content):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.array(content, np.uint16))
    with Loader([path], 0, 1, 50, 50, 50) as loader:
        for _ in range(2):
            with pytest.raises(PgolfError, match="no training shard holds a batch of 51 tokens"):
                loader.next_batch(10)


def test_settings_that_do_not_fit(shards):
    with pytest.raises(PgolfError, match="rank 2"):
        Loader(shards, 2, 2, 100, 50, 50)
    with pytest.raises(PgolfError, match="multiple"):
        Loader(shards, 0, 2, 150, 50, 50)
    with pytest.raises(PgolfError, match="no training shards"):
        Loader([], 0, 1, 50, 50, 50)
    with Loader(shards, 0, 1, 50, 50, 50) as loader, pytest.raises(PgolfError, match="context length"):
        loader.next_batch(0)
