"""A corpus: named texts in a fixed order, their digest, and a split that no text crosses."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from effjax.errors import ConfigError, DataError


@dataclass(frozen=True)
class Document:
    """One text: UTF-8 bytes under a name relative to its corpus (with `/`, on every machine)."""

    name: str
    text: bytes = field(repr=False)


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order; empty ones are kept here and skipped, counted, by packing."""

    name: str
    documents: tuple[Document, ...] = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of every name and text in order: equal wherever the content is equal."""
        digest = hashlib.sha256()
        for document in self.documents:
            name = document.name.encode("utf-8", "surrogateescape")
            # The lengths keep ("ab", "c") apart from ("a", "bc").
            digest.update(f"{len(name)} {len(document.text)} ".encode())
            digest.update(name)
            digest.update(document.text)
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """How many bytes of text there are: what bits per byte divide by."""
        return sum(len(document.text) for document in self.documents)

    @property
    def empty(self) -> int:
        """How many documents have no text."""
        return sum(not document.text for document in self.documents)

    def split(self, held_out: float = 0.1) -> tuple["Corpus", "Corpus"]:
        """Divides the corpus into (train, held-out) by document.

        Documents are taken in the order of their text's SHA-256 while they fit into the share
        `held_out` of the bytes. So the split depends on the texts alone, never on names or order,
        and equal texts (licences, copies) stay on one side. Where that holds out less than half of
        the share (one text, or few long ones), every text is cut instead, at a character's edge,
        and its last part held out. Empty documents belong to neither side.
        Raises ConfigError for a share outside (0, 1), DataError for too little text to cut.
        """
        if not 0 < held_out < 1:
            raise ConfigError(f"held_out must lie between 0 and 1, got {held_out!r}")
        texts = [document for document in self.documents if document.text]
        keys = [hashlib.sha256(document.text).digest() for document in texts]
        sizes: dict[bytes, int] = {}
        for key, document in zip(keys, texts, strict=True):
            sizes[key] = sizes.get(key, 0) + len(document.text)
        chosen, room = set(), held_out * self.bytes
        for key in sorted(sizes):
            if sizes[key] <= room:
                chosen.add(key)
                room -= sizes[key]
        if room > held_out * self.bytes / 2 or not chosen:
            return self._cut(texts, held_out)
        pairs = list(zip(keys, texts, strict=True))
        return (
            self._part("train", [document for key, document in pairs if key not in chosen]),
            self._part("held-out", [document for key, document in pairs if key in chosen]),
        )

    def _cut(self, texts: list[Document], held_out: float) -> tuple["Corpus", "Corpus"]:
        sizes = (min(int(len(d.text) * (1 - held_out)), len(d.text) - 1) for d in texts)
        heads = [clip(d.text, size) for d, size in zip(texts, sizes, strict=True)]
        pairs = list(zip(texts, heads, strict=True))
        train = [Document(document.name, head) for document, head in pairs if head]
        rest = [Document(document.name, document.text[len(head) :]) for document, head in pairs]
        if not train:
            raise DataError(
                f"corpus {self.name} has {self.bytes} bytes of text: too few to hold out "
                f"{held_out:.0%} of them"
            )
        return self._part("train", train), self._part("held-out", rest)

    def _part(self, side: str, documents: list[Document]) -> "Corpus":
        return Corpus(f"{self.name}[{side}]", tuple(documents))


def clip(text: bytes, size: int) -> bytes:
    """The longest prefix of at most `size` bytes that cuts no UTF-8 character in two."""
    if len(text) <= size:
        return text
    end = size
    while end > max(0, size - 3) and text[end] & 0xC0 == 0x80:
        end -= 1
    return text[:end]


def prefix(documents: Iterable[Document], limit_bytes: int | None) -> tuple[Document, ...]:
    """The first `limit_bytes` of the documents (None: all), reading no document after them."""
    if limit_bytes is None:
        return tuple(documents)
    kept = []
    for document in documents:
        kept.append(Document(document.name, clip(document.text, limit_bytes)))
        limit_bytes -= len(document.text)
        if limit_bytes <= 0:
            break
    return tuple(kept)


def check_utf8(text: bytes, where: str) -> None:
    """Refuses bytes that are not UTF-8, naming the place and the offset (DataError)."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: byte {error.start} is 0x{text[error.start]:02x} "
            f"({error.reason})"
        ) from None
