"""Text to ids and back; a tokeniser is its `vocab`, `begin`, `digest`, and two pure functions."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from effjax.data.documents import check_utf8
from effjax.errors import ConfigError, DataError


@dataclass(frozen=True)
class ByteTokenizer:
    """An id is a byte, and a document begins with id 255: 256 ids, and every text has one encoding.

    0xFF occurs in no UTF-8 text, so the mark needs no 257th id (which no mesh divides). It is never
    a target: a document of n bytes has n predictions, and nats over `count * ln 2` are bits per
    byte of the text itself.
    """

    vocab: ClassVar[int] = 256
    begin: ClassVar[int] = 0xFF

    @property
    def digest(self) -> str:
        """Identifies the mapping, so that a resumed run can tell another tokeniser from it."""
        mapping = f"effjax bytes vocab={self.vocab} begin={self.begin}"
        return hashlib.sha256(mapping.encode()).hexdigest()

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids [T] int32 of a text, without the mark. Raises DataError unless it is UTF-8."""
        return self._bytes(text).astype(np.int32)

    def document(self, text: str | bytes) -> np.ndarray:
        """The ids [1 + T] uint8 of a whole document: the mark, then its bytes."""
        return np.concatenate([np.array([self.begin], np.uint8), self._bytes(text)])

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids: marks are dropped, and bytes that are not UTF-8 become U+FFFD.

        So what a model samples always decodes, and decode(encode(text)) == text.
        Raises DataError for an id outside the vocabulary.
        """
        array = np.asarray(ids).reshape(-1)
        if array.size and array.dtype.kind not in "iu":
            raise DataError(f"token ids must be integers, got {array.dtype}")
        wrong = np.flatnonzero((array < 0) | (array >= self.vocab))
        if wrong.size:
            at = int(wrong[0])
            raise DataError(
                f"token id {array[at]} at index {at} is outside the vocabulary: wanted 0 to "
                f"{self.vocab - 1}"
            )
        return array[array != self.begin].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def _bytes(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, str):
            try:
                text = text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"text has no UTF-8 form: character {error.start} is a lone surrogate"
                ) from None
        else:
            check_utf8(text, "text")
        return np.frombuffer(text, np.uint8)


def require_vocab(vocab: int, wanted: int = ByteTokenizer.vocab, of: str = "bytes") -> None:
    """Requires a model to know every id that bytes, or other tokens, can have.

    Raises ConfigError.
    """
    if vocab < wanted:
        raise ConfigError(f"model.vocab must be at least {wanted} for {of}, got {vocab}")
