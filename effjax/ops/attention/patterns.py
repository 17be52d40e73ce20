"""Which keys a query may read, as static objects that an engine can plan by.

A new pattern is one frozen dataclass: `allowed` makes it right, `blocks` makes it cheap, `whole`
spares it masks.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from effjax.errors import ConfigError

# Anything with array comparison: numpy when pairs are counted, tracers in an engine.
Elementwise = Any


def block_edges(
    T: int, S: int, size: int, offset: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First and last position of each query block [n 1] and each key block [1 m].

    Query i stands at position `offset + i`, key j at position j; the last blocks may be shorter.
    """
    q_first = np.arange(0, T, size)[:, None]
    k_first = np.arange(0, S, size)[None, :]
    q_last = np.minimum(q_first + size, T) - 1
    k_last = np.minimum(k_first + size, S) - 1
    return q_first + offset, q_last + offset, k_first, k_last


@dataclass(frozen=True)
class Pattern:
    """A set of (query, key, head) triples that may attend; static and hashable.

    `relative`: `allowed` depends on `q_pos - k_pos` (and the head) only.
    `causal`: no query reads a key of a later position.
    Segments and padding are not a pattern's business: the engine adds them.
    """

    relative: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def allowed(self, q_pos: Elementwise, k_pos: Elementwise, head: Elementwise) -> Elementwise:
        """Whether a query may read a key: elementwise over three arrays that broadcast together.

        Positions are at least 0 where the answer is used.
        """
        raise NotImplementedError(f"{type(self).__name__} must define allowed")

    def blocks(self, T: int, S: int, size: int, offset: int = 0) -> np.ndarray:
        """The blocks that hold at least one allowed pair, or more: bool [head_groups n m].

        Query i stands at position `offset + i`, key j at j. Heads are dealt to groups in equal,
        contiguous shares. The default is every block, or those that a causal pattern can reach.
        """
        _, q_last, k_first, _ = block_edges(T, S, size, offset)
        reach = k_first <= q_last if self.causal else np.ones((len(q_last), k_first.size), bool)
        return reach[None]

    def whole(self, T: int, S: int, size: int, offset: int = 0) -> np.ndarray:
        """The blocks of which every pair is allowed, or fewer: they need no mask; as `blocks`."""
        return np.zeros_like(self.blocks(T, S, size, offset))


@dataclass(frozen=True)
class Full(Pattern):
    """Every query reads every key."""

    relative: ClassVar[bool] = True

    def allowed(self, q_pos: Elementwise, k_pos: Elementwise, head: Elementwise) -> Elementwise:
        return q_pos == q_pos

    def whole(self, T: int, S: int, size: int, offset: int = 0) -> np.ndarray:
        return self.blocks(T, S, size, offset)


@dataclass(frozen=True)
class Causal(Pattern):
    """A query reads its own position and every earlier one: `k <= q`."""

    relative: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    def allowed(self, q_pos: Elementwise, k_pos: Elementwise, head: Elementwise) -> Elementwise:
        return k_pos <= q_pos

    def whole(self, T: int, S: int, size: int, offset: int = 0) -> np.ndarray:
        q_first, _, _, k_last = block_edges(T, S, size, offset)
        return (k_last <= q_first)[None]


@dataclass(frozen=True)
class Window(Pattern):
    """A query reads the last `width` positions, its own included: `q - width < k <= q`.

    Source: Beltagy et al. 2020, Longformer, section 3.1 (sliding window, here its causal half),
    https://arxiv.org/abs/2004.05150
    """

    width: int
    relative: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole_number = isinstance(self.width, int) and not isinstance(self.width, bool)
        if not whole_number or self.width <= 0:
            raise ConfigError(f"Window: width must be a positive integer, got {self.width!r}")

    def allowed(self, q_pos: Elementwise, k_pos: Elementwise, head: Elementwise) -> Elementwise:
        return (k_pos <= q_pos) & (k_pos > q_pos - self.width)

    def blocks(self, T: int, S: int, size: int, offset: int = 0) -> np.ndarray:
        q_first, q_last, k_first, k_last = block_edges(T, S, size, offset)
        return ((k_first <= q_last) & (k_last > q_first - self.width))[None]

    def whole(self, T: int, S: int, size: int, offset: int = 0) -> np.ndarray:
        q_first, q_last, k_first, k_last = block_edges(T, S, size, offset)
        return ((k_last <= q_first) & (k_first > q_last - self.width))[None]
