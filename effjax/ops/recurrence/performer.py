"""Performer's FAVOR+: linear attention whose positive random features estimate soft-max.

    phi(x)_r = exp(w_r . x - |x|^2 / 2) / sqrt(R),  w_r ~ N(0, I):  E[phi(q) . phi(k)] = exp(q . k)

The error falls as 1 / sqrt(R), and it is smaller where the w_r are orthogonal in blocks of H
(`orthogonal_projection`). Features are kept as logarithms until they are stabilised.

A stabiliser takes a maximum off the exponents. For queries it is each token's own and cancels. The
authors' code takes one maximum over all keys of the row: with the constant that it adds to each
feature it does not cancel, so that later keys change earlier outputs (by rounding, and where a
later key is large, altogether), and a decoder that has not read them gives other results than
training did. Here it is the largest exponent of the document so far, each head's own, and what was
summed before it rose fades with it: the gate of `gated_recurrence`. The same code redraws its
projection from a sum over the batch's queries; here a projection is an argument.

Source: Choromanski et al., "Rethinking Attention with Performers", 2021, sections 2.3 and 2.4,
https://arxiv.org/abs/2009.14794; the authors' code,
https://github.com/google-research/google-research (`performer/fast_attention`)
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effjax.ops.recurrence.bookkeeping import NEVER, Timeline, rows_after, timeline
from effjax.ops.recurrence.gated import gated_state
from effjax.ops.recurrence.linear_attention import kernel_sums, two_sided_sums

State = dict[str, Array]

EPSILON = 1e-6  # of the authors' code: what a feature weighs at least, beside the largest


def orthogonal_projection(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "... R H"]:
    """Draws R vectors [..., R, H], each standard normal, orthogonal in blocks of H.

    Directions are uniform (the signs that a QR decomposition prefers are taken out, which the
    authors' code leaves in), lengths are drawn anew. Drawing another of the same shape and putting
    it in a model's params in the place of the first is how features are redrawn.

    Source: Choromanski et al. 2021, section 2.4, https://arxiv.org/abs/2009.14794
    """
    *batch, R, H = shape
    directions, lengths = jax.random.split(key)
    blocks = jax.random.normal(directions, (*batch, -(-R // H), H, H))
    turned, triangle = jnp.linalg.qr(blocks)
    signs = jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))
    rows = (turned * signs[..., None, :]).swapaxes(-1, -2).reshape(*batch, -1, H)[..., :R, :]
    drawn = jax.random.normal(lengths, (*batch, R, H))
    return rows * jnp.linalg.norm(drawn, axis=-1, keepdims=True)


def log_features(
    x: Float[Array, "B T N H"], projection: Float[Array, "R H"]
) -> Float[Array, "B T N R"]:
    """Computes log phi(x)_r = w_r . x - |x|^2 / 2 - log(R) / 2 in at least float32.

    Source: Choromanski et al. 2021, lemma 1, https://arxiv.org/abs/2009.14794
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # One product for each head: rematerialisation keeps products with weights, and not these.
    each = jnp.broadcast_to(projection.astype(x.dtype)[None], (x.shape[2], *projection.shape))
    reach = jnp.einsum("btnh,nrh->btnr", x, each)
    return reach - (jnp.sum(x * x, axis=-1, keepdims=True) + math.log(projection.shape[0])) / 2


def performer_state(batch: int, heads: int, features: int, value_dim: int) -> State:
    """Gives the memory of rows that have not seen a token: S = 0 [B N R Hv+1], peak [B N], place.

    Source: Choromanski et al. 2021, section 2.2, https://arxiv.org/abs/2009.14794
    """
    peak = jnp.zeros((batch, heads), jnp.float32)
    return gated_state(batch, heads, features, value_dim + 1) | {"peak": peak}


def performer_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N Hv"],
    projection: Float[Array, "R H"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T N Hv"], State | None]:
    """Estimates causal soft-max attention with scores q . k / sqrt(H) by R positive features.

    y has v's dtype, 0 at padding. Arguments as in `gated_recurrence`; `performer_state` starts from
    nothing.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Choromanski et al. 2021, algorithm 1, https://arxiv.org/abs/2009.14794
    """
    time = timeline(rows_after(state, positions, segments))
    q_, k_ = _features(q, k, projection, time)
    peaks = _peaks(k_, time)
    first = jnp.zeros_like(peaks[:, 0]) if state is None else state["peak"].astype(peaks.dtype)
    peaks = peaks.at[:, 0].max(jnp.where(time.begins[:, :1], NEVER, first))
    peaks = _running_maximum(peaks, time.begins)
    before = jnp.concatenate([first[:, None], peaks[:, :-1]], axis=1)
    above, below, after = kernel_sums(
        q_,
        _stable(k_, peaks, time.live),
        v,
        jnp.where((time.live & ~time.begins)[..., None], before - peaks, 0),
        positions=positions,
        segments=segments,
        state=None if state is None else {k: x for k, x in state.items() if k != "peak"},
        chunk=chunk,
    )
    y = _ratio(above, below).astype(v.dtype)
    if state is None or after is None:
        return y, None
    return y, after | {"peak": peaks[:, -1].astype(state["peak"].dtype)}


def two_sided_performer_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N Hv"],
    projection: Float[Array, "R H"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    aligned: bool = False,
    chunk: int = 64,
) -> Float[Array, "B T N Hv"]:
    """Estimates soft-max attention to the whole document; the keys' maximum is the document's.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Choromanski et al. 2021, algorithm 1, https://arxiv.org/abs/2009.14794
    """
    time = timeline(rows_after(None, positions, segments))
    q_, k_ = _features(q, k, projection, time)
    so_far = _running_maximum(_peaks(k_, time), time.begins)
    last = jnp.ones_like(time.begins[:, :1])
    ends = jnp.concatenate([time.begins[:, 1:], last], axis=1)
    peaks = _running_maximum(so_far[:, ::-1], ends[:, ::-1])[:, ::-1]
    above, below = two_sided_sums(
        q_,
        _stable(k_, peaks, time.live),
        v,
        positions=positions,
        segments=segments,
        aligned=aligned,
        chunk=chunk,
    )
    return _ratio(above, below).astype(v.dtype)


def _features(
    q: Array, k: Array, projection: Array, time: Timeline
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N R"]]:
    """Stabilised features of queries, logarithms of those of keys; finite at padding."""
    scale, live = q.shape[-1] ** -0.25, time.live[..., None, None]
    q_, k_ = (log_features(jnp.where(live, x * scale, 0), projection) for x in (q, k))
    return _stable(q_, jnp.max(q_, axis=-1), time.live), k_


def _peaks(log_keys: Float[Array, "B T N R"], time: Timeline) -> Float[Array, "B T N"]:
    """The largest exponent of each token's keys; none at padding."""
    peaks = jax.lax.stop_gradient(jnp.max(log_keys, axis=-1))
    return jnp.where(time.live[..., None], peaks, NEVER)


def _stable(
    log_features: Float[Array, "B T N R"], peak: Float[Array, "B T N"], live: Bool[Array, "B T"]
) -> Float[Array, "B T N R"]:
    """exp(log_features - peak) + EPSILON; the peak is a constant to derivatives: it cancels."""
    peak = jax.lax.stop_gradient(peak)[..., None]
    return jnp.exp(jnp.where(live[..., None, None], log_features - peak, 0)) + EPSILON


def _running_maximum(x: Float[Array, "B T N"], begins: Bool[Array, "B T"]) -> Float[Array, "B T N"]:
    """The maximum of the stretch so far; a stretch begins anew where `begins` says."""

    def joined(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        (begun, x), (begins, y) = first, second
        return begun | begins, jnp.where(begins, y, jnp.maximum(x, y))

    x = jax.lax.stop_gradient(x)
    flags = jnp.broadcast_to(begins[..., None], x.shape)
    return jax.lax.associative_scan(joined, (flags, x), axis=1)[1]


def _ratio(above: Float[Array, "B T N Hv"], below: Float[Array, "B T N 1"]) -> Array:
    """above / below, and 0 at padding; a live token's own key weighs EPSILON at least."""
    return above / jnp.where(below > 0, below, 1)
