"""Mamba-2's mixing of tokens: a short convolution, the gated recurrence, and a gated norm.

    x, b, c = silu(convolution(x, b, c))        dt = softplus(dt + dt_bias)
    S_t = exp(-exp(log_a) dt_t) S_{t-1} + dt_t b_t x_t^T
    y_t = c_t S_t + skip x_t                    out = norm(y * silu(z)) * scale

in every head; b and c are shared by the heads of a group, the norm is over all channels of a group.
`mamba2` is what stands between the two projections of the layer.

Source: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
Structured State Space Duality", 2024, section 7, https://arxiv.org/abs/2405.21060, and its code,
https://github.com/state-spaces/mamba (`modules/mamba2.py`). Departure: documents, padding, states.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.ops.convolution.short import short_convolution, short_state
from effjax.ops.recurrence.bookkeeping import rates
from effjax.ops.recurrence.gated import gated_recurrence, gated_state
from effjax.ops.recurrence.sums import spread

State = dict[str, Array]


class Mamba2Weights(NamedTuple):
    """The weights between the projections: filters and biases of x, b and c; of each head; norm.

    The last column of a filter weighs the token itself. a = -exp(log_a) is the rate of forgetting
    per unit of dt.
    """

    filter_x: Float[Array, "N H W"]
    filter_b: Float[Array, "G P W"]
    filter_c: Float[Array, "G P W"]
    bias_x: Float[Array, "N H"]
    bias_b: Float[Array, "G P"]
    bias_c: Float[Array, "G P"]
    dt_bias: Float[Array, " N"]
    log_a: Float[Array, " N"]
    skip: Float[Array, " N"]
    scale: Float[Array, "N H"]


class Mamba2Inputs(NamedTuple):
    """What the first projection makes of each token, and where tokens stand."""

    z: Float[Array, "B T N H"]
    x: Float[Array, "B T N H"]
    b: Float[Array, "B T G P"]
    c: Float[Array, "B T G P"]
    dt: Float[Array, "B T N"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]


def mamba2_state(weights: Mamba2Weights, batch: int) -> State:
    """Gives the memory of rows that have not seen a token: S [B N P H], the convolution's inputs.

    Source: Dao and Gu 2024, section 7, https://arxiv.org/abs/2405.21060
    """
    (N, H, W), (G, P) = weights.filter_x.shape, weights.bias_b.shape
    return gated_state(batch, N, P, H) | short_state(batch, N * H + 2 * G * P, W)


def mamba2(
    inputs: Mamba2Inputs,
    weights: Mamba2Weights,
    *,
    state: State | None = None,
    chunk: int = 64,
    aligned: bool = False,
) -> tuple[Float[Array, "B T N H"], State | None]:
    """Computes norm(y * silu(z)) * scale with y the gated recurrence of convolved x, b and c.

    Each live token is one step, of length dt; gaps in positions are no time. Decays, memories and
    the norm are float32 (float64 for float64 inputs), the result has x's dtype.

    Args:
        inputs: position -1 is padding: nothing of it is read (it may be NaN) and its result is 0.
        state: where the rows stand; None starts from nothing and returns no state, which is what
            training wants. `mamba2_state` starts from nothing and returns one.
        chunk: tokens per chunk of the recurrence; any size gives the same values.
        aligned: promises that each row is one document without padding.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Dao and Gu 2024, section 7, https://arxiv.org/abs/2405.21060
    """
    z, x, dt = inputs.z, inputs.x, inputs.dt
    at = {"positions": inputs.positions, "segments": inputs.segments}
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if not aligned:
        live = inputs.positions >= 0
        z = jnp.where(live[..., None, None], z, 0)
        dt = jnp.where(live[..., None], dt, 0)
    x_, b_, c_, inputs_after = _convolved(weights, inputs, state, aligned)
    dt = jax.nn.softplus(dt.astype(dtype) + weights.dt_bias[None, None].astype(dtype))
    gate = -rates(weights.log_a.astype(dtype))[None, None] * dt
    y, after = gated_recurrence(
        c_,
        b_,
        x_.astype(dtype) * spread(dt, -1, x.shape[-1]),
        gate,
        **at,
        state=_of(state, "S"),
        chunk=chunk,
    )
    y = y + _everywhere(jnp.repeat(weights.skip[:, None], y.shape[-1], axis=1), y) * x_
    y = _normed(y * jax.nn.silu(z.astype(dtype)), b_.shape[2])
    y = (y * _everywhere(weights.scale, y)).astype(x.dtype)
    if after is None or inputs_after is None:
        return y, None
    return y, after | {"inputs": inputs_after}


def _convolved(
    weights: Mamba2Weights, inputs: Mamba2Inputs, state: State | None, aligned: bool
) -> tuple[Array, Array, Array, Array | None]:
    """x, b and c convolved as one row of channels, and the inputs that the convolution keeps."""
    tokens = (inputs.x, inputs.b, inputs.c)
    (B, T), sizes = inputs.positions.shape, [x.shape[2] * x.shape[3] for x in tokens]
    filters = (weights.filter_x, weights.filter_b, weights.filter_c)
    biases = (weights.bias_x, weights.bias_b, weights.bias_c)
    y, after = short_convolution(
        jnp.concatenate([x.reshape(B, T, -1) for x in tokens], axis=-1),
        jnp.concatenate([w.reshape(-1, w.shape[-1]) for w in filters]),
        positions=inputs.positions,
        segments=inputs.segments,
        state=_of(state, "inputs"),
        aligned=aligned,
    )
    # Padding gets the bias too: nothing of it is read.
    y = y + _everywhere(jnp.concatenate([w.reshape(-1) for w in biases]), y)
    ends = (sizes[0], sizes[0] + sizes[1])
    parts = jnp.split(jax.nn.silu(y), ends, axis=-1)
    x, b, c = (y.reshape(like.shape) for y, like in zip(parts, tokens, strict=True))
    return x, b, c, None if after is None else after["inputs"]


def _of(state: State | None, memory: str) -> State | None:
    """The part of the state that holds one of its memories."""
    return None if state is None else {k: state[k] for k in (memory, "position", "segment")}


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normed(y: Float[Array, "B T N H"], groups: int) -> Float[Array, "B T N H"]:
    """Divides the channels of each group by their root mean square.

    By products of rows with themselves, forward and backward: as sums, XLA on CPU would form them
    one number after another, or anew for each number that is divided by them.
    """
    return _normed_forward(y, groups)[0]


def _mean(x: Array, y: Array) -> Array:
    """The mean of x y over the last axis, which stays."""
    return jnp.einsum("btgd,btgd->btg", x, y, precision="highest")[..., None] / x.shape[-1]


def _normed_forward(y: Array, groups: int) -> tuple[Array, tuple[Array, Array]]:
    rows = y.reshape(*y.shape[:2], groups, -1)
    inverse = jax.lax.rsqrt(_mean(rows, rows) + 1e-5)
    normed = rows * inverse
    return normed.reshape(y.shape), (normed, inverse)


def _normed_backward(groups: int, kept: tuple[Array, Array], g: Array) -> tuple[Array]:
    normed, inverse = kept
    rows = g.reshape(normed.shape)
    return (((rows - normed * _mean(rows, normed)) * inverse).reshape(g.shape),)


_normed.defvjp(_normed_forward, _normed_backward)


def _everywhere(weight: Float[Array, "..."], like: Float[Array, "B T ..."]) -> Array:
    """The weight at each token."""
    B, T = like.shape[:2]
    return spread(spread(weight.astype(like.dtype), 0, T), 0, B)
