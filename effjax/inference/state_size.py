"""What a model keeps per row while it decodes: bytes that are fixed, and bytes per token."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from effjax.cost.memory import stored_bytes
from effjax.weights import Tree


class StateBytes(NamedTuple):
    """Bytes of one row's state: `fixed + per_token * tokens`, once every window is full."""

    fixed: int
    per_token: int


def state_bytes(apply: Callable, params: Tree, *, longest: int = 1 << 20) -> StateBytes:
    """Reads the state's size off its abstract shapes at two lengths; nothing is allocated.

    longest: a length that every window and chunk of the model fits into.
    """

    def size(length: int) -> int:
        state = jax.eval_shape(lambda p: apply(p, 1, length, 1, method="init_state"), params)
        return stored_bytes(state)

    per_token = (size(2 * longest) - size(longest)) // longest
    return StateBytes(size(longest) - per_token * longest, per_token)
