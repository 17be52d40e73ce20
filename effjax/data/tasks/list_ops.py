"""ListOps: nested operations on digits, written as a list; the result is asked at its end."""

from dataclasses import dataclass

import numpy as np

from effjax.config import require_finite, require_types
from effjax.errors import ConfigError

OPERATORS = ("MIN", "MAX", "MED", "SM")
"""Smallest, largest, median rounded down, sum modulo 10: ids 10 to 13 open a list; 14 closes it."""

CLOSE = 10 + len(OPERATORS)
PATIENCE = 100_000  # trees thrown away in turn before a size is given up
LIST = 0.25
"""The probability that a node above the largest depth is a list."""


@dataclass(frozen=True)
class ListOps:
    """[MAX 2 9 [MIN 4 7 ] 0 ] and the like, of `shortest` to `length` tokens; the answer is 9.

    A tree is drawn from its root: down to `depth` a node is a list with probability 1/4, of 2 to
    `arguments` arguments, else a digit; trees of another size than asked for are thrown away. Ids:
    digits 0 to 9, then operators, then the closing bracket. The target stands at the last token.

    Source: Nangia and Bowman 2018, ListOps, section 2, https://arxiv.org/abs/1804.06028; Tay et
    al. 2021, Long Range Arena, section 2.2, https://arxiv.org/abs/2011.04006 (depth 10, 10
    arguments, 500 to 2000 tokens; brackets that only group are left out, as in its loader).
    """

    length: int = 2000
    shortest: int = 500
    depth: int = 10
    arguments: int = 10

    def __post_init__(self) -> None:
        require_types(self)
        require_finite(self, "depth", low=2)
        require_finite(self, "arguments", low=2)
        require_finite(self, "shortest", low=4)
        if self.length < self.shortest:
            raise ConfigError(
                f"ListOps.length must be at least shortest={self.shortest}, got {self.length}"
            )
        largest, level = 1, 1
        while level < self.depth and largest < self.shortest:
            largest, level = 2 + self.arguments * largest, level + 1
        if largest < self.shortest:
            raise ConfigError(
                f"ListOps.shortest must be at most {largest}, the most tokens of depth="
                f"{self.depth} and arguments={self.arguments}, got {self.shortest}"
            )

    @property
    def vocab(self) -> int:
        """Digits, operators and the closing bracket."""
        return CLOSE + 1

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), int32 [count, length]."""
        tokens = np.full((count, self.length), -1, np.int32)
        targets = np.full((count, self.length), -1, np.int32)
        made = thrown = 0
        while made < count:
            written: list[int] = []
            result = self._node(random, written, 1)
            if result is not None and self.shortest <= len(written) <= self.length:
                tokens[made, : len(written)] = written
                targets[made, len(written) - 1] = result
                made, thrown = made + 1, 0
                continue
            thrown += 1
            if thrown == PATIENCE:
                raise ConfigError(
                    f"ListOps.shortest={self.shortest} to length={self.length} tokens: none of "
                    f"{thrown} trees of depth={self.depth} and arguments={self.arguments} is such"
                )
        return tokens, targets

    def _node(self, random: np.random.Generator, written: list[int], depth: int) -> int | None:
        """Writes a tree and gives its value; None once it has outgrown the row."""
        if depth >= self.depth or random.random() >= LIST:
            written.append(int(random.integers(10)))
            return written[-1]
        operator = int(random.integers(len(OPERATORS)))
        written.append(10 + operator)
        values = []
        for _ in range(int(random.integers(2, self.arguments + 1))):
            value = self._node(random, written, depth + 1)
            if value is None or len(written) > self.length:
                return None
            values.append(value)
        written.append(CLOSE)
        return apply(OPERATORS[operator], values)


def apply(operator: str, values: list[int]) -> int:
    """What a list with this operator stands for."""
    if operator == "MIN":
        return min(values)
    if operator == "MAX":
        return max(values)
    return int(np.median(values)) if operator == "MED" else sum(values) % 10
