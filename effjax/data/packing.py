"""Documents into rows of one length, without losing, repeating or mixing anything."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from effjax.data.batch import Batch
from effjax.data.documents import Corpus
from effjax.errors import ConfigError, DataError


class Tokenizer(Protocol):
    """What packing asks of a tokeniser."""

    @property
    def vocab(self) -> int: ...
    @property
    def digest(self) -> str: ...
    def document(self, text: bytes) -> np.ndarray: ...


# Documents are gathered this many ids at a time, so that the buffer stays in the cache.
_CHUNK_IDS = 1 << 19


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of ids: the documents laid end to end and cut every `length` ids.

    Kept as one stream of the smallest type that holds the vocabulary, from which `rows` makes what
    a batch needs: a corpus of bytes takes one byte an id instead of sixteen.

    stream: ids [R * T + 1], padded at the end; starts: where each document begins in it, and the
    end of the last [documents + 1]; empty: how many documents had no ids and were skipped;
    name: the corpus, for messages; source: digests of what the ids were made from, which a resumed
    run compares one by one.
    """

    stream: np.ndarray
    starts: np.ndarray
    length: int
    empty: int = 0
    name: str = "the data"
    source: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many ids there are, without padding."""
        return int(self.starts[-1])

    @property
    def count(self) -> int:
        """How many rows there are."""
        return (len(self.stream) - 1) // self.length

    @property
    def predictions(self) -> int:
        """How many targets there are: every id but the first of each document, once."""
        return self.size - (len(self.starts) - 1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the ids, the documents' beginnings and the length."""
        digest = hashlib.sha256(f"effjax packed {self.length} {len(self.starts)} ".encode())
        digest.update(self.starts.astype("<i8").tobytes())
        for at in range(0, self.size, _CHUNK_IDS):
            ids = self.stream[at : min(at + _CHUNK_IDS, self.size)]
            digest.update(ids.astype("<i4").tobytes())
        return digest.hexdigest()

    def rows(self, index: np.ndarray) -> Batch:
        """The rows of these numbers [B] as a Batch of [B, length]; -1 gives a row of padding.

        A piece of a document that continues in another row counts positions from 0 and has its own
        segment there; its last id's target is the first id of the next piece.
        """
        index = np.asarray(index, np.int64)
        if index.size and not -1 <= index.min() <= index.max() < self.count:
            raise IndexError(f"rows {index.min()} to {index.max()}, of {self.count}")
        length, column = self.length, np.arange(self.length, dtype=np.int32)[None]
        windows = np.lib.stride_tricks.sliding_window_view(self.stream, length + 1)[::length]
        ids = windows[index].astype(np.int32)
        begins = self._begins(index)
        live = (index[:, None] >= 0) & (index[:, None] * length + column < self.size)
        targets = np.where(live & ~begins[:, 1:], ids[:, 1:], np.int32(-1))
        begins[:, 0] = True
        starts = np.maximum.accumulate(np.where(begins[:, :-1], column, np.int32(0)), axis=1)
        segments = np.cumsum(begins[:, :-1], axis=1, dtype=np.int32) - 1
        return Batch(
            tokens=np.where(live, ids[:, :-1], np.int32(0)),
            targets=targets,
            positions=np.where(live, column - starts, np.int32(-1)),
            segments=np.where(live, segments, np.int32(-1)),
        )

    def batch(self) -> Batch:
        """All rows at once, in order."""
        return self.rows(np.arange(self.count))

    def whole_rows(self, count: int | None = None) -> np.ndarray:
        """Rows of one document's ids, each with the id that follows it, int32 [B, length + 1].

        count: the first so many of them; None: all.
        """
        batch = self.batch()
        whole = (batch.segments == batch.segments[:, :1]).all(1) & (batch.targets >= 0).all(1)
        ids = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
        return ids[whole][:count]

    def _begins(self, index: np.ndarray) -> np.ndarray:
        """Bool [B, length + 1]: where a document begins, or the last has ended, in these rows."""
        first = index * self.length
        low = np.searchsorted(self.starts, first)
        many = np.searchsorted(self.starts, first + self.length, side="right") - low
        row = np.repeat(np.arange(len(index)), many)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(many) - many, many)
        begins = np.zeros((len(index), self.length + 1), bool)
        begins[row, self.starts[low[row] + nth] - first[row]] = True
        return begins


def pack(
    documents: Sequence[np.ndarray],
    length: int,
    vocab: int | None = None,
    *,
    name: str = "the data",
    source: Mapping[str, str] | None = None,
) -> Packed:
    """Lays documents (arrays of ids [n]) end to end and cuts them into rows of `length`.

    Every id lands in exactly one row, and every id but the first of its document is the target of
    exactly one position, that of the id before it, across row edges too; nothing is predicted
    across documents. Documents without ids are skipped and counted. The last row is padded.
    Raises ConfigError for a length below 1; DataError when there are no ids, or an id is negative
    or not below `vocab`, naming the document by its index.
    """
    if length < 1:
        raise ConfigError(f"length of a row must be at least 1, got {length}")
    sizes = np.fromiter(map(len, documents), np.int64, len(documents))
    ends = np.cumsum(sizes)
    size = int(ends[-1]) if len(ends) else 0
    if not size:
        raise DataError(f"{name}: nothing to pack, {len(documents)} documents without ids")
    top = np.iinfo(np.int32).max if vocab is None else vocab - 1
    dtype = np.uint8 if top < 1 << 8 else np.uint16 if top < 1 << 16 else np.int32
    stream = np.zeros(-(-size // length) * length + 1, dtype)
    low = 0
    while low < len(documents):
        start = int(ends[low] - sizes[low])
        high = max(low + 1, int(np.searchsorted(ends, start + _CHUNK_IDS, side="right")))
        stream[start : int(ends[high - 1])] = _ids(documents[low:high], low, top)
        low = high
    starts = np.append((ends - sizes)[sizes > 0], size)
    return Packed(stream, starts, length, int((sizes == 0).sum()), name, dict(source or {}))


def pack_corpus(corpus: Corpus, tokenizer: Tokenizer, length: int) -> Packed:
    """Tokenises a corpus and packs it, remembering both digests; empty texts are skipped."""
    ids = [
        tokenizer.document(document.text) if document.text else np.zeros(0, np.uint8)
        for document in corpus.documents
    ]
    source = {"corpus": corpus.digest, "tokenizer": tokenizer.digest}
    return pack(ids, length, tokenizer.vocab, name=corpus.name, source=source)


def _all_within(ids: np.ndarray, top: int) -> bool:
    if ids.dtype.kind not in "iu" or not ids.size:
        return ids.dtype.kind in "iu"
    if np.iinfo(ids.dtype).min < 0 and ids.min() < 0:
        return False
    return np.iinfo(ids.dtype).max <= top or bool(ids.max() <= top)


def _ids(documents: Sequence[np.ndarray], first: int, top: int) -> np.ndarray:
    """The documents' ids end to end, each seen to lie in 0 to `top`; `first` is their number."""
    with contextlib.suppress(ValueError):
        ids = np.concatenate(documents)
        if ids.ndim == 1 and _all_within(ids, top):
            return ids
    for number, document in enumerate(documents, first):
        if document.ndim != 1:
            raise DataError(f"document {number} has {document.ndim} axes, wanted ids [n]")
        if len(document) and document.dtype.kind not in "iu":
            raise DataError(f"document {number} has ids of type {document.dtype}, wanted integers")
        wrong = np.flatnonzero((document < 0) | (document > top))
        if wrong.size:
            raise DataError(
                f"document {number}, index {wrong[0]}: token id {document[wrong[0]]} is outside "
                f"the vocabulary, wanted 0 to {top}"
            )
    # Only the mixture of types was at fault (an empty float array, int64 beside uint64).
    return np.concatenate([document.astype(np.int64) for document in documents])
