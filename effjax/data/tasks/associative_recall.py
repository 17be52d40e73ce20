"""Multi-query associative recall: pairs of keys and values, then some of the keys again."""

from dataclasses import dataclass

import numpy as np

from effjax.config import require_finite, require_positive, require_types
from effjax.errors import ConfigError


@dataclass(frozen=True)
class AssociativeRecall:
    """k_1 v_1 ... k_n v_n, then noise in which every key comes once more; its value is asked.

    Keys are ids from the lower half of the vocabulary without 0, values from the upper half, each
    drawn without repeats in an example. A key that comes again stands an even number of tokens
    after the pairs, its gap d drawn without repeats with probability ~ d^(power - 1): at the
    default small power recent places are the likelier by far, as in text. Everything between is
    drawn from the whole vocabulary.

    Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language
    Models", section 3 and appendix, https://arxiv.org/abs/2312.04927. Departure: none known; the
    noise may repeat a key, as in the authors' code.
    """

    vocab: int = 256
    length: int = 64
    pairs: int = 4
    power: float = 0.01

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "vocab", "length", "pairs")
        require_finite(self, "power", low=0.0, low_open=True)
        if self.vocab // 2 <= self.pairs:
            raise ConfigError(
                f"AssociativeRecall.vocab must be above {2 * self.pairs + 1} for "
                f"{self.pairs} keys and values, got {self.vocab}"
            )
        if self.length < 4 * self.pairs:
            raise ConfigError(
                f"AssociativeRecall.length must be at least 4 pairs={4 * self.pairs}, "
                f"got {self.length}"
            )

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), int32 [count, length]; a target stands at the key that comes again."""
        half, n, begin = self.vocab // 2, self.pairs, 2 * self.pairs
        keys = 1 + _choices(random, np.ones(half - 1), count, n)
        values = half + _choices(random, np.ones(self.vocab - half), count, n)
        tokens = random.integers(0, self.vocab, (count, self.length), dtype=np.int32)
        tokens[:, 0:begin:2], tokens[:, 1:begin:2] = keys, values
        gaps = np.arange(1, (self.length - begin) // 2 + 1)
        places = begin + 2 * _choices(random, gaps ** (self.power - 1.0), count, n)
        targets = np.full_like(tokens, -1)
        np.put_along_axis(tokens, places, keys.astype(np.int32), axis=1)
        np.put_along_axis(targets, places, values.astype(np.int32), axis=1)
        return tokens, targets


def _choices(random: np.random.Generator, weights: np.ndarray, count: int, n: int) -> np.ndarray:
    """[count, n] different indices a row, drawn one after the other with these weights.

    The n smallest of independent exponential times with these rates come in just that order.

    Source: Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003
    """
    times = random.exponential(size=(count, len(weights))) / weights[None]
    return np.argsort(times, axis=1)[:, :n]
