"""Copying and reversing: a string, then the same again, forwards or backwards."""

from dataclasses import dataclass

import numpy as np

from effjax.config import require_finite, require_positive, require_types
from effjax.errors import ConfigError


@dataclass(frozen=True)
class Copying:
    """A string of `shortest` to `longest` symbols, a separator, then the string.

    The row is written out whole, as in training by teacher forcing: each symbol of the second
    string is asked at the token before it. Ids: 0 is the separator, the rest are drawn evenly.
    Strings of one length fill a row exactly; shorter ones end in padding.

    Source: Ruoss et al. 2023, "Randomized Positional Encodings Boost Length Generalization of
    Transformers", section 4 ("duplicate string"), https://arxiv.org/abs/2305.16843. Departure: the
    paper's encoder reads empty places for the answer, a decoder here its earlier symbols.
    """

    vocab: int = 16
    shortest: int = 1
    longest: int = 40

    def __post_init__(self) -> None:
        require_types(self)
        require_finite(self, "vocab", low=2)
        require_positive(self, "shortest", "longest")
        if self.longest < self.shortest:
            raise ConfigError(
                f"{type(self).__name__}.longest must be at least shortest={self.shortest}, "
                f"got {self.longest}"
            )

    @property
    def length(self) -> int:
        """Tokens of a row; the last symbol of an answer is never read."""
        return 2 * self.longest

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), int32 [count, length]."""
        sizes = random.integers(self.shortest, self.longest + 1, count)
        whole = np.full((count, self.length + 1), -1, np.int32)
        asked = np.full((count, self.length), -1, np.int32)
        for row, size in enumerate(sizes):
            string = random.integers(1, self.vocab, size)
            whole[row, : 2 * size + 1] = np.concatenate([string, [0], self.answer(string)])
            asked[row, size : 2 * size] = whole[row, size + 1 : 2 * size + 1]
        tokens = whole[:, :-1].copy()
        tokens[np.arange(count), np.minimum(2 * sizes, self.length - 1)] = np.where(
            2 * sizes < self.length, -1, tokens[:, -1]
        )
        return tokens, asked

    def answer(self, string: np.ndarray) -> np.ndarray:
        """What follows the separator."""
        return string


@dataclass(frozen=True)
class Reversing(Copying):
    """The same with the second string backwards.

    Source: Ruoss et al. 2023, section 4 ("reverse string"), https://arxiv.org/abs/2305.16843
    """

    def answer(self, string: np.ndarray) -> np.ndarray:
        """What follows the separator."""
        return string[::-1]
