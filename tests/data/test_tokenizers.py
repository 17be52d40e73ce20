"""Laws of a tokeniser: exact round trips, ids inside the vocabulary, refusals with the place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effjax.data.tokenizers import ByteTokenizer
from effjax.errors import DataError

tokenizer = ByteTokenizer()


@given(st.text())
def test_round_trip_is_exact(text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.shape == (len(text.encode()),)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text.encode()).tolist() == ids.tolist()


@given(st.text())
def test_a_document_is_the_mark_and_its_bytes(text):
    ids = tokenizer.document(text)
    assert ids[0] == tokenizer.begin
    assert tokenizer.begin not in ids[1:]
    assert ids.max() < tokenizer.vocab
    assert ids[1:].tobytes() == text.encode()
    assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 255)))
def test_whatever_is_sampled_decodes(ids):
    assert isinstance(tokenizer.decode(ids), str)


def test_decode_of_cut_characters_and_other_shapes():
    assert tokenizer.decode([0xC3]) == "�"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(np.array([[104, 105]], np.int64)) == "hi"


@pytest.mark.parametrize(("ids", "at"), [([1, 256], 1), ([-1], 0), (np.array([0, 0, 1 << 40]), 2)])
def test_ids_out_of_range_are_refused(ids, at):
    with pytest.raises(DataError, match=rf"token id -?\d+ at index {at} is outside .* 0 to 255"):
        tokenizer.decode(ids)


def test_ids_that_are_not_integers_are_refused():
    with pytest.raises(DataError, match="must be integers, got float64"):
        tokenizer.decode([0.5])


def test_text_that_is_not_utf8_is_refused():
    with pytest.raises(DataError, match="text is not UTF-8 text: byte 1 is 0xff"):
        tokenizer.encode(b"a\xff")
    with pytest.raises(DataError, match="character 1 is a lone surrogate"):
        tokenizer.document("a\ud800")


def test_digest_names_the_mapping(monkeypatch):
    digest = tokenizer.digest
    assert digest == ByteTokenizer().digest
    monkeypatch.setattr(ByteTokenizer, "begin", 0)
    assert tokenizer.digest != digest
