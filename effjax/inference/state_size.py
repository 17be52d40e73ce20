"""What a model keeps per row while it decodes: bytes that are fixed, and bytes per token."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import jax

from effjax.cost.memory import stored_bytes
from effjax.models.decoder import decoder
from effjax.models.kinds import DECODER_KINDS
from effjax.models.mixers import MIXERS
from effjax.models.presets import tiny
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


def state_table() -> Iterator[tuple[str, StateBytes]]:
    """Every kind of mixer that decodes, with the state of a row in one layer of `presets.tiny`."""
    for kind in DECODER_KINDS:
        if MIXERS[kind].decodes:
            init, apply, _ = decoder(replace(tiny(kind), layers=1))
            params = jax.eval_shape(init, jax.random.key(0))
            yield kind, state_bytes(apply, params)
