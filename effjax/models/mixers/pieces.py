"""Long rows through a recurrent mixer piece by piece, each computed anew in the backward pass.

What a piece makes then stays in the processor's cache, and only its input and the memory before it
are kept for the backward pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effjax.models.context import Context
from effjax.weights import Tree

Piece = Callable[[jax.Array, Context, Tree], tuple[jax.Array, Tree]]


def in_pieces(
    run: Piece, x: jax.Array, context: Context, state: Tree, length: int
) -> tuple[jax.Array, Tree]:
    """Runs `run(x, context, state) -> (y, state)` on pieces of `length` tokens, and on the rest.

    `state` is that of rows which have not seen a token; `run` may read what it closes over.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
    https://arxiv.org/abs/1604.06174, along time
    """
    B, T = context.positions.shape
    whole = T // length * length
    tokens = (x, context.positions, context.segments)

    def step(state: Tree, part: tuple[jax.Array, ...]) -> tuple[Tree, jax.Array]:
        x, positions, segments = part
        at = Context(positions, segments, aligned=context.aligned)
        y, state = run(x, at, state)
        return state, y

    def pieces(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x[:, :whole].reshape(B, -1, length, *x.shape[2:]), 1, 0)

    # Inside a scan nothing can be merged with the forward pass, so nothing need be kept apart.
    once = jax.checkpoint(step, prevent_cse=False)
    state, y = jax.lax.scan(once, state, jax.tree.map(pieces, tokens))
    y = jnp.moveaxis(y, 0, 1).reshape(B, whole, *y.shape[3:])
    if whole < T:
        state, rest = jax.checkpoint(step)(state, jax.tree.map(lambda x: x[:, whole:], tokens))
        y = jnp.concatenate([y, rest], axis=1)
    return y, state
