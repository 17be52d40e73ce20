"""Laws of a corpus: its digest sees everything, its split loses nothing and mixes nothing."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data.documents import Corpus, Document, check_utf8, clip, prefix
from effjax.errors import ConfigError, DataError


def corpus(*texts, names=None):
    names = names or [f"{i}.txt" for i in range(len(texts))]
    return Corpus("c", tuple(Document(n, t) for n, t in zip(names, texts, strict=True)))


def test_digest_sees_names_texts_order_and_edges_but_not_the_corpus_name():
    base = corpus(b"ab", b"c")
    others = [
        corpus(b"a", b"bc"),
        corpus(b"c", b"ab"),
        corpus(b"ab", b"c", b""),
        corpus(b"ab", b"c", names=["0.txt", "2.txt"]),
        corpus(b"abc"),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 6
    assert Corpus("elsewhere", base.documents).digest == base.digest
    # Pinned, so that a digest written today names the same text in every later version.
    assert base.digest == hashlib.sha256(b"5 2 0.txtab5 1 1.txtc").hexdigest()


def test_counts_bytes_and_empty_documents():
    c = corpus("é".encode(), b"", b"abc")
    assert (c.bytes, c.empty) == (5, 1)
    assert "abc" not in repr(c)


def split_law(whole, train, held, share):
    """Nothing lost or doubled, no text on both sides, a share near the one that was asked."""
    before = sorted(d.name for d in whole.documents if d.text)
    assert sorted(d.name for d in train.documents + held.documents) == before
    assert not {d.text for d in train.documents} & {d.text for d in held.documents}
    assert share / 2 * whole.bytes <= held.bytes <= share * whole.bytes
    assert train.bytes


TEXTS = [bytes([65 + i % 26]) * (3 + i * i % 17) for i in range(60)]


def test_split_by_document():
    whole = corpus(*TEXTS, b"")
    train, held = whole.split()
    split_law(whole, train, held, 0.1)
    assert (train.name, held.name) == ("c[train]", "c[held-out]")


def test_split_law_catches_a_leak_and_a_loss():
    whole = corpus(*TEXTS)
    train, held = whole.split()
    leak = Corpus("t", (*train.documents, held.documents[0]))
    loss = Corpus("t", train.documents[1:])
    for fault in (leak, loss):
        with pytest.raises(AssertionError):
            split_law(whole, fault, held, 0.1)


def test_split_ignores_names_and_order():
    renamed = corpus(*TEXTS, names=[*map(str, range(60))])
    sides = [
        {document.text for document in c.split()[1].documents}
        for c in (corpus(*TEXTS), corpus(*TEXTS[::-1]), renamed)
    ]
    assert sides[0] == sides[1] == sides[2]


def test_equal_texts_stay_on_one_side():
    copies = [b"licence %d" % (i % 20) for i in range(100)]
    train, held = corpus(*copies).split()
    assert not {d.text for d in train.documents} & {d.text for d in held.documents}
    assert len(held.documents) == 10  # two texts, five copies each


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=12), st.floats(0.01, 0.99))
def test_split_keeps_every_character_once(texts, share):
    whole = corpus(*(text.encode() for text in texts))
    try:
        train, held = whole.split(share)
    except DataError:
        return
    assert train.bytes
    assert held.bytes
    sides = {}
    for document in train.documents + held.documents:
        sides[document.name] = sides.get(document.name, b"") + document.text
        document.text.decode()
    assert sides == {d.name: d.text for d in whole.documents}


@pytest.mark.parametrize("texts", [(b"x" * 1000,), (b"x" * 600, b"y" * 500), (b"x" * 1000, b"y")])
def test_few_long_texts_are_cut_by_position(texts):
    whole = corpus(*texts)
    train, held = whole.split(0.1)
    assert held.bytes == pytest.approx(0.1 * whole.bytes, abs=2)
    assert train.documents[0].text == texts[0][: int(len(texts[0]) * 0.9)]


def test_the_smallest_share_still_holds_a_character_out():
    train, held = corpus(b"abc").split(1e-300)
    assert (train.documents[0].text, held.documents[0].text) == (b"ab", b"c")


def test_split_refuses_what_it_cannot_do():
    for share in (0, 1, -0.1, 2, float("nan")):
        with pytest.raises(ConfigError, match="held_out must lie between 0 and 1, got"):
            corpus(b"abc").split(share)
    for texts in ((), (b"",), (b"x",), ("é".encode(),)):
        with pytest.raises(DataError, match=r"corpus c has .* bytes of text: too few"):
            corpus(*texts).split()


@given(st.text(max_size=8), st.integers(0, 40))
def test_clip_is_the_longest_prefix_of_whole_characters(text, size):
    encoded = text.encode()
    clipped = clip(encoded, size)
    naive = max(
        (text[:n].encode() for n in range(len(text) + 1) if len(text[:n].encode()) <= size), key=len
    )
    assert clipped == naive


def test_prefix_reads_nothing_after_the_limit():
    def documents():
        yield Document("a", b"xx")
        yield Document("b", "yéé".encode())
        raise AssertionError("read on")

    assert [d.text for d in prefix(documents(), 6)] == [b"xx", "yé".encode()]
    assert [d.text for d in prefix(documents(), 7)] == [b"xx", "yéé".encode()]


def test_check_utf8_names_place_and_offset():
    check_utf8("é".encode(), "f")
    with pytest.raises(DataError, match=r"^f is not UTF-8 text: byte 2 is 0xff \(invalid start"):
        check_utf8(b"ab\xff", "f")
