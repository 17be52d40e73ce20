"""Laws of the loader (D7, D16-D18, L25, L26, L29): an order without state, that resumes exactly."""

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data.documents import Corpus, Document
from effjax.data.loader import ArrayLoader, in_order
from effjax.data.packing import pack, pack_corpus
from effjax.data.tokenizers import ByteTokenizer
from effjax.errors import CheckpointError, ConfigError, DataError

ARRAYS = ("tokens", "targets", "positions", "segments")


def packed(rows, length=3, **kwargs):
    return pack([np.arange(rows * length)], length, **kwargs)


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


def epoch_law(rows_at, rows, batch, epochs):
    """Every row exactly once in each epoch, for whatever batch, and no two epochs alike."""
    stream = np.concatenate([rows_at(step) for step in range(-(-rows * epochs // batch))])
    orders = stream[: rows * epochs].reshape(epochs, rows)
    assert (np.sort(orders, axis=1) == np.arange(rows)).all()
    assert rows < 8 or len({tuple(order) for order in orders.tolist()}) == epochs


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.data(), st.integers(0, 2**64 - 1))
def test_every_row_once_an_epoch(rows, data, seed):
    batch = data.draw(st.integers(1, rows))
    epoch_law(ArrayLoader(packed(rows), batch, seed).rows_at, rows, batch, 4)


def test_epoch_law_catches():
    rows, batch = 10, 4
    loader = ArrayLoader(packed(rows), batch, 0)
    generator = np.random.default_rng(0)
    faults = {
        "drops the remainder": lambda s: loader.order(s // 2)[s % 2 * 4 :][:4],
        "draws with replacement": lambda s: generator.integers(0, rows, batch),
        "never shuffles again": lambda s: np.tile(loader.order(0), 3)[s * 4 % 10 :][:4],
    }
    for fault in faults.values():
        with pytest.raises(AssertionError):
            epoch_law(fault, rows, batch, 4)


def test_order_is_pinned():
    """The order of a seed must never change: a resumed run would see other data."""
    loader = ArrayLoader(packed(10), 4, 7)
    assert loader.order(0).tolist() == ORDER_0
    assert loader.order(1).tolist() == ORDER_1
    assert loader.rows_at(2).tolist() == ORDER_0[8:] + ORDER_1[:2]


ORDER_0 = [8, 4, 1, 6, 3, 2, 7, 5, 9, 0]
ORDER_1 = [3, 9, 1, 6, 2, 5, 4, 8, 0, 7]


def test_seeds_and_epochs_give_different_orders():
    loaders = [ArrayLoader(packed(30), 4, seed) for seed in (0, 1, 2**63, 2**64 - 1)]
    orders = {tuple(loader.order(epoch).tolist()) for loader in loaders for epoch in range(3)}
    assert len(orders) == 12


def test_batches_are_rows_of_the_packed_data():
    data = packed(10)
    loader = ArrayLoader(data, 4, 0)
    for step, batch in enumerate(loader.take(6)):
        assert same(batch, data.rows(loader.rows_at(step)))
    assert loader.step == 6


def test_batch_at_is_random_access():
    data = packed(10)
    straight = list(ArrayLoader(data, 4, 0).take(30))
    loader = ArrayLoader(data, 4, 0)
    for step in (29, 0, 13, 12, 2, 28):
        assert same(loader.batch_at(step), straight[step])
    assert loader.step == 0


def resume_law(restore):
    """Stopped after every step in turn, and going on through JSON, the ids are the same."""
    data = packed(7)
    straight = [loader_batch.tokens.tolist() for loader_batch in ArrayLoader(data, 4, 5).take(20)]
    for stop in range(20):
        first = ArrayLoader(data, 4, 5)
        ids = [batch.tokens.tolist() for batch in first.take(stop)]
        second = ArrayLoader(packed(7), 4, 5)
        restore(second, json.loads(json.dumps(first.position)))
        ids += [batch.tokens.tolist() for batch in islice(second, 20 - stop)]
        assert ids == straight


def test_resume_at_every_step_equals_not_having_stopped():
    resume_law(ArrayLoader.restore)


def test_resume_law_catches():
    def epoch_only(loader, position):
        loader.step = position["epoch"] * loader.packed.count // loader.batch

    def one_late(loader, position):
        loader.restore(position)
        loader.step += 1

    for fault in (epoch_only, one_late, lambda loader, position: None):
        with pytest.raises(AssertionError):
            resume_law(fault)


def test_a_position_says_what_it_refers_to():
    fields = {"epoch", "index", "seed", "batch", "length", "rows", "order", "digest"}
    assert set(ArrayLoader(packed(7), 4, 5).position) == fields
    assert set(corpus_loader().position) == fields | {"corpus", "tokenizer"}


def test_take_moves_the_position_batch_by_batch():
    loader = ArrayLoader(packed(10), 4, 0)
    batches = loader.take(5)
    assert loader.step == 0
    next(batches)
    assert (loader.position["epoch"], loader.position["index"]) == (0, 4)
    assert len(list(batches)) == 4
    assert (loader.position["epoch"], loader.position["index"]) == (2, 0)


def corpus_loader(text=b"abcdefgh" * 9, seed=0, batch=2, length=4, tokenizer=None):
    corpus = Corpus("c", (Document("a", text),))
    return ArrayLoader(pack_corpus(corpus, tokenizer or ByteTokenizer(), length), batch, seed)


class OtherTokenizer(ByteTokenizer):
    digest = "other"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"text": b"abcdefgx" * 9}, "corpus was .*, is .*"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch": 3}, "batch was 2, is 3"),
        ({"length": 8}, "length was 4, is 8"),
        ({"tokenizer": OtherTokenizer()}, "tokenizer was '.*', is 'other'"),
    ],
)
def test_a_position_of_another_run_is_refused(change, field):
    """D7: other data, seed, batch size, length or tokeniser."""
    loader = corpus_loader()
    list(loader.take(3))
    other = corpus_loader(**change)
    with pytest.raises(
        CheckpointError, match=f"^the data position belongs to another run: .*{field}"
    ):
        other.restore(loader.position)
    assert other.step == 0
    assert loader.position == {**corpus_loader().position, "index": 6}


@pytest.mark.parametrize(
    "damage",
    [
        {"epoch": None},
        {"epoch": -1, "index": 5},
        {"epoch": 1.0},
        {"epoch": True},
        {"index": "4"},
        {"index": 1},
        {"index": -2},
        {"index": 10**6},
        {"order": "philox-0"},
        {"digest": "0" * 64},
        {"rows": None},
        {"surprise": 1},
    ],
)
def test_a_damaged_position_is_refused(damage):
    loader = corpus_loader()
    with pytest.raises(CheckpointError, match="data position") as error:
        loader.restore({**loader.position, **damage})
    assert "\n" not in str(error.value)
    assert loader.step == 0
    for name in loader.position:
        missing = {key: value for key, value in loader.position.items() if key != name}
        with pytest.raises(CheckpointError, match=name):
            loader.restore(missing)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_processes_share_one_global_order(count):
    """D18: any number of processes, and a resume with another number."""
    data = packed(10)
    whole = list(ArrayLoader(data, 6, 1).take(5))
    parts = [
        ArrayLoader(data, 6, 1, process_index=index, process_count=count) for index in range(count)
    ]
    for step in range(5):
        tokens = np.concatenate([next(part).tokens for part in parts])
        np.testing.assert_array_equal(tokens, whole[step].tokens)
    alone = ArrayLoader(data, 6, 1)
    alone.restore(parts[-1].position)
    assert alone.step == 5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 25))
def test_in_order_gives_every_row_once_and_pads_the_last_batch(rows, batch):
    data = packed(rows)
    batches = list(in_order(data, batch))
    assert {b.tokens.shape for b in batches} == {(batch, 3)}
    for name in ARRAYS:
        together = np.concatenate([getattr(b, name) for b in batches])
        np.testing.assert_array_equal(together[:rows], getattr(data.batch(), name))
        assert (together[rows:] == (0 if name == "tokens" else -1)).all()


def test_refusals():
    with pytest.raises(
        DataError,
        match="corpus c is shorter than one batch: its 30 ids make 10 rows of 3, wanted 11",
    ):
        ArrayLoader(packed(10, name="c"), 11, 0)
    with pytest.raises(
        ConfigError, match="batch 6 does not divide by 4 processes; nearest: 4 or 8"
    ):
        ArrayLoader(packed(10), 6, 0, process_count=4)
    with pytest.raises(ConfigError, match=r"batch 2 .* by 4 processes; nearest: 4 or 4"):
        ArrayLoader(packed(10), 2, 0, process_count=4)
    with pytest.raises(ConfigError, match="process_index 2 must lie in 0 to 1"):
        ArrayLoader(packed(10), 6, 0, process_index=2, process_count=2)
    for batch in (0, -1):
        with pytest.raises(ConfigError, match=f"batch must be at least 1 row, got {batch}"):
            ArrayLoader(packed(10), batch, 0)
        with pytest.raises(ConfigError, match=f"batch must be at least 1 row, got {batch}"):
            list(in_order(packed(10), batch))
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match=f"seed must lie between .* got {seed}"):
            ArrayLoader(packed(10), 2, seed)


def test_one_batch_of_all_rows_does_not_loop_for_ever():
    loader = ArrayLoader(packed(3), 3, 0)
    assert sorted(next(loader).tokens[:, 0].tolist()) == [0, 3, 6]
    assert loader.position["epoch"] == 1
