"""Laws of packing (D10, D11, D21, L29): nothing lost, repeated, or predicted across documents."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data.documents import Corpus, Document
from effjax.data.packing import Packed, pack, pack_corpus
from effjax.data.tokenizers import ByteTokenizer
from effjax.errors import ConfigError, DataError

LENGTHS = (1, 2, 3, 5, 8)


def numbered(sizes):
    """Documents whose ids are all different, so that a swap shows."""
    ids = np.arange(sum(sizes), dtype=np.int32)
    return np.split(ids, np.cumsum(sizes)[:-1]) if sizes else []


def naive(documents, length):
    """The rows as lists of (token, target, position, segment), one id at a time."""
    rows = []
    for document in documents:
        for i, token in enumerate(document):
            if not rows or len(rows[-1]) == length:
                rows.append([])
            row = rows[-1]
            fresh = i == 0 or not row
            position = 0 if fresh else row[-1][2] + 1
            segment = (row[-1][3] + fresh) if row else 0
            target = document[i + 1] if i + 1 < len(document) else -1
            row.append((token, target, position, segment))
    rows[-1] += [(0, -1, -1, -1)] * (length - len(rows[-1]))
    return np.array(rows, np.int32)


def packing_law(documents, length, batch):
    """Conservation, told without the oracle: from the batch alone back to the documents."""
    for array in (batch.tokens, batch.targets, batch.positions, batch.segments):
        assert array.dtype == np.int32
        assert array.shape == (batch.tokens.shape[0], length)
    live = batch.positions >= 0
    # Every id once, in order, and every id but a document's first told once, by the one before it.
    assert batch.tokens[live].tolist() == [i for d in documents for i in d]
    pairs = [(a, b) for d in documents for a, b in pairwise(d)]
    told = batch.targets >= 0
    assert list(zip(batch.tokens[told], batch.targets[told], strict=True)) == pairs
    # A segment is one document's part of one row, and counts positions from 0.
    owners = np.full(live.shape, -1)
    owners[live] = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    for n, owner, segment, position in zip(
        live.sum(1), owners, batch.segments, batch.positions, strict=True
    ):
        change = owner[1:n] != owner[: n - 1]
        assert segment[0] == position[0] == 0
        assert (np.diff(segment[:n]) == change).all()
        assert (position[1:n] == np.where(change, 0, position[: n - 1] + 1)).all()
    # Padding stands only at the end, and is marked everywhere.
    assert live.ravel()[: live.sum()].all()
    assert live[:, 0].all()
    for array, mark in ((batch.tokens, 0), (batch.targets, -1), (batch.segments, -1)):
        assert (array[~live] == mark).all()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any), st.sampled_from(LENGTHS))
def test_packing_law_and_oracle(sizes, length):
    documents = numbered(sizes)
    packed = pack(documents, length)
    batch = packed.batch()
    packing_law(documents, length, batch)
    rows = np.stack([batch.tokens, batch.targets, batch.positions, batch.segments], axis=-1)
    np.testing.assert_array_equal(rows.reshape(-1, 4), naive(documents, length).reshape(-1, 4))
    assert packed.count == len(rows)
    assert packed.size == sum(sizes)
    assert packed.empty == sizes.count(0)
    assert packed.predictions == (batch.targets >= 0).sum()


FAULTS = {
    "predicts across documents": lambda b: replace(
        b, targets=np.roll(b.tokens.ravel(), -1).reshape(b.tokens.shape)
    ),
    "forgets the target at a row's edge": lambda b: replace(
        b, targets=np.concatenate([b.targets[:, :-1], np.full_like(b.targets[:, :1], -1)], axis=1)
    ),
    "loses the last row": lambda b: type(b)(
        *(getattr(b, name)[:-1] for name in ("tokens", "targets", "positions", "segments"))
    ),
    "repeats a row": lambda b: type(b)(
        *(np.concatenate([a[:1], a]) for a in (b.tokens, b.targets, b.positions, b.segments))
    ),
    "positions run on over documents": lambda b: replace(
        b, positions=np.where(b.positions < 0, -1, np.arange(b.tokens.shape[1])).astype(np.int32)
    ),
    "one segment": lambda b: replace(b, segments=np.where(b.segments < 0, -1, 0).astype(np.int32)),
    "padding looks alive": lambda b: replace(b, segments=np.abs(b.segments)),
    "wide ids": lambda b: replace(b, tokens=b.tokens.astype(np.int64)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_packing_law_catches(fault):
    documents = numbered([3, 9, 1, 5])
    batch = pack(documents, 4).batch()
    packing_law(documents, 4, batch)
    with pytest.raises(AssertionError):
        packing_law(documents, 4, FAULTS[fault](batch))


@pytest.mark.parametrize(
    "sizes", [[4, 4], [8], [9], [4, 5, 3], [1, 1, 1, 1, 1], [0, 4, 0, 0, 1, 0], [3, 1, 4], [100]]
)
def test_edges(sizes):
    """D11, D21: a boundary exactly at a row's edge, length + 1, one id, none, many rows."""
    documents = numbered(sizes)
    packing_law(documents, 4, pack(documents, 4).batch())


def test_rows_are_random_access_and_minus_one_is_padding():
    documents = numbered([3, 9, 1, 5])
    packed = pack(documents, 4)
    whole, some = packed.batch(), packed.rows(np.array([3, -1, 0, 3]))
    for name in ("tokens", "targets", "positions", "segments"):
        rows = getattr(some, name)
        padding = 0 if name == "tokens" else -1
        np.testing.assert_array_equal(rows[[0, 2, 3]], getattr(whole, name)[[3, 0, 3]])
        assert (rows[1] == padding).all()
    assert packed.rows(np.zeros(0, int)).tokens.shape == (0, 4)
    for row in (-2, packed.count):
        with pytest.raises(IndexError, match=f"rows {row} to {row}, of 5"):
            packed.rows(np.array([row]))


def test_ids_keep_their_value_in_every_type():
    for dtype in (np.uint8, np.int8, np.int16, np.uint16, np.int64, np.uint64):
        for vocab in (128, 256, 257, 70_000, None):
            documents = [np.array([0, 100, 127], dtype), np.zeros(0), np.array([5], np.int32)]
            batch = pack(documents, 3, vocab).batch()
            assert batch.tokens.ravel()[:4].tolist() == [0, 100, 127, 5]
    for vocab in (256, 257, 65_536, 65_537):
        assert pack([np.array([vocab - 1])], 1, vocab).batch().tokens[0, 0] == vocab - 1
    top = 2**31 - 1
    assert pack([np.array([top])], 1).batch().tokens[0, 0] == top


@pytest.mark.parametrize("type_", [np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("bad", [-1, 256, 2**31, 2**32 + 7])
def test_ids_outside_the_vocabulary_are_refused(bad, type_):
    """D10: with the document's number, before anything is gathered by the id."""
    if not np.iinfo(type_).min <= bad <= np.iinfo(type_).max:
        return
    documents = [np.array([1, 2]), np.array([], int), np.array([0, 255, bad], type_)]
    message = f"document 2, index 2: token id {bad} is outside the vocabulary, wanted 0 to 255"
    with pytest.raises(DataError, match=message):
        pack(documents, 2, 256)
    if bad < 0 or bad > 2**31 - 1:
        with pytest.raises(DataError, match=f"token id {bad} .* wanted 0 to 2147483647"):
            pack(documents, 2)


def test_what_is_not_a_list_of_ids_is_refused():
    with pytest.raises(DataError, match="document 1 has ids of type float64, wanted integers"):
        pack([np.array([1]), np.array([1.5])], 2)
    for other in (np.zeros((2, 2), int), np.array(3)):
        with pytest.raises((DataError, TypeError), match=r"axes, wanted ids|unsized"):
            pack([other], 2)
    for nothing in ([], [np.zeros(0, int)]):
        with pytest.raises(DataError, match=rf"nothing to pack, {len(nothing)} documents"):
            pack(nothing, 2)
    for length in (0, -1):
        with pytest.raises(ConfigError, match=f"length of a row must be at least 1, got {length}"):
            pack([np.array([1])], length)


def test_documents_larger_than_a_chunk(monkeypatch):
    monkeypatch.setattr("effjax.data.packing._CHUNK_IDS", 5)
    documents = numbered([3, 0, 2, 11, 1, 1, 1, 1, 1, 6, 5, 0])
    packing_law(documents, 4, pack(documents, 4).batch())


def test_digest_sees_ids_boundaries_and_length_not_the_type_they_came_in():
    base = pack([np.array([1, 2]), np.array([3])], 2)
    assert pack([np.array([1, 2], np.uint8), np.array([3], np.int64)], 2, 256).digest == base.digest
    others = [
        pack([np.array([1]), np.array([2, 3])], 2),
        pack([np.array([1, 2]), np.array([4])], 2),
        pack([np.array([1, 2]), np.array([3])], 3),
        pack([np.array([1, 2]), np.array([3, 0])], 2),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5


def test_pack_corpus_marks_documents_and_skips_empty_ones():
    corpus = Corpus("c", (Document("a", b"xy"), Document("b", b""), Document("c", b"z")))
    packed = pack_corpus(corpus, ByteTokenizer(), 4)
    assert isinstance(packed, Packed)
    assert packed.stream.dtype == np.uint8
    assert packed.batch().tokens.tolist() == [[255, 120, 121, 255], [122, 0, 0, 0]]
    assert packed.batch().targets.tolist() == [[120, 121, -1, 122], [-1, -1, -1, -1]]
    assert (packed.empty, packed.name) == (1, "c")
    assert packed.source == {"corpus": corpus.digest, "tokenizer": ByteTokenizer().digest}


@pytest.mark.deep
def test_packing_is_many_times_faster_than_a_list_chain():
    """PERFORMANCE row 17, 41 M ids: floor 20x; here a round with other load must still show 8x."""
    import time
    from itertools import chain

    random = np.random.default_rng(0)
    documents = [random.integers(0, 256, n, np.uint8) for n in random.integers(20, 801, 100_000)]
    lists = [document.tolist() for document in documents]

    def peer():
        ids = list(chain.from_iterable(lists))
        return [ids[i : i + 1024] for i in range(0, len(ids), 1024)]

    ratios = []
    for _ in range(5):
        times = []
        for function in (peer, lambda: pack(documents, 1024, 256)):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        ratios.append(times[0] / times[1])
    assert np.median(ratios) > 8, ratios


@pytest.mark.parametrize("length", [2, 3])
def test_whole_rows_are_pieces_of_one_document_with_the_id_after_each(length):
    documents = numbered([7, 1, 4, 6])
    stream, edges = np.concatenate(documents), np.cumsum([len(d) for d in documents])
    wanted = [
        stream[at : at + length + 1]
        for at in range(0, len(stream) - length, length)
        if not any(at < edge < at + length + 1 for edge in edges)
    ]
    assert 1 < len(wanted) < len(stream) // length
    packed = pack(documents, length)
    np.testing.assert_array_equal(packed.whole_rows(), wanted)
    np.testing.assert_array_equal(packed.whole_rows(1), wanted[:1])
