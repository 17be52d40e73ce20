"""Induction heads: what followed a special token before follows it again."""

from dataclasses import dataclass

import numpy as np

from effjax.config import require_finite, require_types


@dataclass(frozen=True)
class InductionHeads:
    """Random tokens, one of them after a special token that also ends the row; it is asked there.

    Ids: vocab - 1 is the special token, the rest are drawn evenly. `length` counts both special
    tokens.

    Source: Gu and Dao 2023, Mamba, sections 3.1 and E.2, https://arxiv.org/abs/2312.00752 (vocab
    16, trained at length 256); Olsson et al. 2022, "In-context Learning and Induction Heads".
    """

    vocab: int = 16
    length: int = 256

    def __post_init__(self) -> None:
        require_types(self)
        require_finite(self, "vocab", low=3)
        require_finite(self, "length", low=3)

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), int32 [count, length]; the only target stands at the last token."""
        special = self.vocab - 1
        tokens = random.integers(0, special, (count, self.length), dtype=np.int32)
        place = random.integers(0, self.length - 2, count)
        row = np.arange(count)
        tokens[row, place], tokens[:, -1] = special, special
        targets = np.full_like(tokens, -1)
        targets[:, -1] = tokens[row, place + 1]
        return tokens, targets
