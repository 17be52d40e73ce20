"""Examples of a task: rows that are whole, with the few targets that are asked for."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from effjax.data.batch import Batch


class RowSource(Protocol):
    """Rows of one length that a loader draws from: a packed text, or examples."""

    @property
    def name(self) -> str:
        """What messages call them."""

    @property
    def length(self) -> int:
        """Tokens of a row."""

    @property
    def count(self) -> int:
        """How many rows there are."""

    @property
    def size(self) -> int:
        """How many live tokens they hold."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of their content."""

    @property
    def source(self) -> Mapping[str, str]:
        """What they were made of: digests by name."""

    def rows(self, index: np.ndarray) -> Batch:
        """The rows of these numbers [B]; -1 gives a row of padding."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows that hold one example each, from its first token on; the rest of a row is padding.

    tokens: int32 [R, T], -1 at padding. targets: int32 [R, T], the id to predict at that token, -1
    where none is asked for. A model that predicts it may read all up to and including that token.
    """

    tokens: np.ndarray = field(repr=False)
    targets: np.ndarray = field(repr=False)
    name: str = "examples"
    source: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many examples there are."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens of a row, padding included."""
        return self.tokens.shape[1]

    @property
    def size(self) -> int:
        """How many live tokens they hold."""
        return int((self.tokens >= 0).sum())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of tokens and targets."""
        digest = hashlib.sha256(f"effjax examples {self.tokens.shape} ".encode())
        for ids in (self.tokens, self.targets):
            digest.update(np.ascontiguousarray(ids, "<i4").tobytes())
        return digest.hexdigest()

    def rows(self, index: np.ndarray) -> Batch:
        """The examples of these numbers [B] as a Batch; -1 gives a row of padding."""
        index = np.asarray(index, np.int64)
        if index.size and not -1 <= index.min() <= index.max() < self.count:
            raise IndexError(f"rows {index.min()} to {index.max()}, of {self.count}")
        there = (index >= 0)[:, None]
        tokens = np.where(there, self.tokens[index], np.int32(-1))
        live = tokens >= 0
        place = np.broadcast_to(np.arange(self.length, dtype=np.int32)[None], live.shape)
        return Batch(
            tokens=np.where(live, tokens, np.int32(0)),
            targets=np.where(live, self.targets[index], np.int32(-1)),
            positions=np.where(live, place, np.int32(-1)),
            segments=np.where(live, np.int32(0), np.int32(-1)),
        )

    def batch(self) -> Batch:
        """All examples at once, in order."""
        return self.rows(np.arange(self.count))
