"""Selective copying: a few symbols among noise, wanted again at the end, in their order."""

from dataclasses import dataclass

import numpy as np

from effjax.config import require_positive, require_types
from effjax.errors import ConfigError


@dataclass(frozen=True)
class SelectiveCopying:
    """`context` tokens of noise with `symbols` symbols at random places, then as many markers.

    At the m-th marker the m-th symbol is asked. Ids: 0 is noise, 1 the marker, the rest symbols.
    Places are random, so that a filter that is the same for every text cannot solve it.

    Source: Gu and Dao 2023, Mamba, sections 3.1 and E.1, https://arxiv.org/abs/2312.00752; Jing
    et al. 2019, "Gated Orthogonal Recurrent Units", the denoise task. The paper's sizes: context
    4096, 16 symbols, vocab 16.
    """

    vocab: int = 16
    context: int = 256
    symbols: int = 16

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "vocab", "context", "symbols")
        if self.vocab < 4:
            raise ConfigError(f"SelectiveCopying.vocab must be at least 4, got {self.vocab}")
        if self.symbols > self.context:
            raise ConfigError(
                f"SelectiveCopying.symbols must fit into context={self.context}, got {self.symbols}"
            )

    @property
    def length(self) -> int:
        """Tokens of a row: context and markers."""
        return self.context + self.symbols

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), int32 [count, length]."""
        symbols = random.integers(2, self.vocab, (count, self.symbols), dtype=np.int32)
        order = random.random((count, self.context)).argsort(axis=1)
        places = np.sort(order[:, : self.symbols], axis=1)
        tokens = np.zeros((count, self.length), np.int32)
        np.put_along_axis(tokens, places, symbols, axis=1)
        tokens[:, self.context :] = 1
        targets = np.full_like(tokens, -1)
        targets[:, self.context :] = symbols
        return tokens, targets
