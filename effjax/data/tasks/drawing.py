"""Drawing: examples as a function of (task, count, seed), all at once or when they are read."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from effjax.data.batch import Batch
from effjax.data.examples import Examples
from effjax.errors import ConfigError


class Task(Protocol):
    """What examples are drawn from."""

    @property
    def vocab(self) -> int:
        """How many ids there are."""

    @property
    def length(self) -> int:
        """Tokens of a row."""

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), both int32 [count, length], -1 at padding and where none is asked."""


def examples(task: Task, count: int, seed: int) -> Examples:
    """Draws `count` examples of a task.

    Raises ConfigError for a count below 1 or a seed below 0.
    """
    _check("examples", count, seed)
    tokens, targets = task.draw(_stream(seed, 0), count)
    return Examples(tokens.astype(np.int32), targets.astype(np.int32), repr(task))


@dataclass(frozen=True)
class Drawn:
    """`count` examples that are drawn when they are read, and again when they are read again.

    Each has a stream of its own, which those of `examples` never meet, whatever the seeds: for a
    run that reads more examples than it should wait for or hold. Goes where `Examples` go.
    Raises ConfigError for a count below 1 or a seed below 0.
    """

    task: Task
    count: int
    seed: int

    def __post_init__(self) -> None:
        _check("Drawn", self.count, self.seed)

    @property
    def name(self) -> str:
        """What messages call them."""
        return repr(self.task)

    @property
    def length(self) -> int:
        """Tokens of a row, padding included."""
        return self.task.length

    @property
    def size(self) -> int:
        """How many live tokens they hold; draws every example."""
        numbers = range(self.count)
        return sum(int((self.rows(np.array([n])).positions >= 0).sum()) for n in numbers)

    @property
    def source(self) -> Mapping[str, str]:
        """Nothing but the task itself, which the digest holds."""
        return {}

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of task, count and seed, and of the first examples, to tell other code."""
        recipe = f"effjax drawn {self.task!r} {self.count} {self.seed}"
        digest = hashlib.sha256(recipe.encode())
        digest.update(self._examples(np.arange(min(self.count, 4))).digest.encode())
        return digest.hexdigest()

    def rows(self, index: np.ndarray) -> Batch:
        """The examples of these numbers [B] as a Batch; -1 gives a row of padding."""
        index = np.asarray(index, np.int64)
        if index.size and not -1 <= index.min() <= index.max() < self.count:
            raise IndexError(f"rows {index.min()} to {index.max()}, of {self.count}")
        return self._examples(index).batch()

    def _examples(self, index: np.ndarray) -> Examples:
        tokens = np.full((len(index), self.length), -1, np.int32)
        targets = tokens.copy()
        for row, number in enumerate(index):
            if number >= 0:
                drawn = self.task.draw(_stream(self.seed, 1 + int(number)), 1)
                tokens[row], targets[row] = drawn[0][0], drawn[1][0]
        return Examples(tokens, targets, self.name)


def _stream(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


def _check(what: str, count: int, seed: int) -> None:
    if count < 1 or not 0 <= seed < 2**64:
        raise ConfigError(
            f"{what}: wanted count >= 1 and seed >= 0 below 2**64, got {count} and {seed}"
        )
