"""Linear attention: a kernel of features in the place of soft-max, so that keys and values add up.

    y_t = sum_s (phi(q_t) . phi(k_s)) v_s / sum_s phi(q_t) . phi(k_s)

over s <= t in a decoder, over the whole document in an encoder. The sums over s do not depend on
the query: S = sum_s phi(k_s) v_s^T is a memory of one size, whatever the length. The denominator is
the same recurrence with v = 1, a further column of S (`kernel_sums`).

Here phi(x) = elu(x) + 1. `performer` and `random_features` have phi that approximate soft-max.

Source: Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear
Attention", 2020, section 3, https://arxiv.org/abs/2006.16236, and the authors' code,
https://github.com/idiap/fast-transformers. Departure: documents in packed rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import ConfigError
from effjax.ops.accounting import Flops
from effjax.ops.recurrence.bookkeeping import Timeline, place_after, rows_after, timeline
from effjax.ops.recurrence.gated import gated_recurrence, gated_state

State = dict[str, Array]

EPSILON = 1e-6  # of the authors' code; the denominator of live tokens is positive without it


def elu_features(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """Computes phi(x) = elu(x) + 1: x + 1 for positive x, else exp(x), in at least float32.

    As it is written, elu(x) + 1 loses exp(x) below x = -17, by rounding.

    Source: Katharopoulos et al. 2020, equation 7, https://arxiv.org/abs/2006.16236
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def linear_attention_state(batch: int, heads: int, key_dim: int, value_dim: int) -> State:
    """Gives the memory of rows that have not seen a token: S = 0 [B N H Hv+1], position, segment.

    Source: Katharopoulos et al. 2020, section 3.4, https://arxiv.org/abs/2006.16236
    """
    return gated_state(batch, heads, key_dim, value_dim + 1)


def linear_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N Hv"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T N Hv"], State | None]:
    """Computes causal linear attention with phi = elu + 1; y has v's dtype, 0 at padding.

    Queries and keys are not scaled, as in the paper. Arguments as in `gated_recurrence`;
    `linear_attention_state` starts from nothing.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Katharopoulos et al. 2020, section 3.3, https://arxiv.org/abs/2006.16236
    """
    live = (positions >= 0)[..., None, None]
    above, below, state = kernel_sums(
        elu_features(jnp.where(live, q, 0)),
        elu_features(jnp.where(live, k, 0)),
        v,
        positions=positions,
        segments=segments,
        state=state,
        chunk=chunk,
    )
    return (above / (below + EPSILON)).astype(v.dtype), state


def two_sided_linear_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N Hv"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    aligned: bool = False,
    chunk: int = 64,
) -> Float[Array, "B T N Hv"]:
    """Computes linear attention of every token to its whole document; y is 0 at padding.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Katharopoulos et al. 2020, equation 5, https://arxiv.org/abs/2006.16236
    """
    live = (positions >= 0)[..., None, None]
    above, below = two_sided_sums(
        elu_features(jnp.where(live, q, 0)),
        elu_features(jnp.where(live, k, 0)),
        v,
        positions=positions,
        segments=segments,
        aligned=aligned,
        chunk=chunk,
    )
    return (above / (below + EPSILON)).astype(v.dtype)


def kernel_sums(
    q: Float[Array, "B T N R"],
    k: Float[Array, "B T N R"],
    v: Float[Array, "B T N Hv"],
    log_gate: Float[Array, "B T N"] | None = None,
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N 1"], State | None]:
    """Computes sums over the document so far of (q_t . k_s) v_s and q_t . k_s, both 0 at padding.

    q and k are features; gates fade both sums alike. In at least float32. Arguments as in
    `gated_recurrence`, which does it where there are gates; the state's S has a column more than v,
    for the second sum.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Katharopoulos et al. 2020, equation 9, https://arxiv.org/abs/2006.16236
    """
    v = _with_ones(v)
    if log_gate is None and v.shape[1] > 1:
        sums, state = _ungated(q, k, v, positions, segments, state, chunk)
    else:
        gate = jnp.zeros(v.shape[:3]) if log_gate is None else log_gate
        where: Any = {"positions": positions, "segments": segments, "state": state, "chunk": chunk}
        sums, state = gated_recurrence(q, k, v, gate, **where)
    return sums[..., :-1], sums[..., -1:], state


def _ungated(
    q: Array,
    k: Array,
    v: Float[Array, "B T N Hv"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None,
    chunk: int,
) -> tuple[Float[Array, "B T N Hv"], State | None]:
    """`gated_recurrence` with gates of 1: masks in the place of decays."""
    _require_chunk("kernel_sums", chunk)
    (B, T, N, Hv), R = v.shape, k.shape[-1]
    rows = rows_after(state, positions, segments)
    time = timeline(rows)
    q, k, v, run, same = _split(q, k, v, time, min(chunk, T))
    scores = jnp.einsum("bnctr,bncsr->bncts", q, k) * jnp.tril(same)[:, None]
    S = jnp.zeros((B, N, R, Hv), v.dtype) if state is None else state["S"].astype(v.dtype)
    earlier, S = _beyond(q, k, v, run, S, after=False)
    y = _join(jnp.einsum("bncts,bncsv->bnctv", scores, v) + earlier, T)
    if state is None:
        return y, None
    position, segment = place_after(rows)
    return y, {"S": S.astype(state["S"].dtype), "position": position, "segment": segment}


def two_sided_sums(
    q: Float[Array, "B T N R"],
    k: Float[Array, "B T N R"],
    v: Float[Array, "B T N Hv"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    aligned: bool = False,
    chunk: int = 64,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N 1"]]:
    """Computes sums over the whole document of (q_t . k_s) v_s and q_t . k_s, both 0 at padding.

    Inside a chunk by products of queries, keys and values; between chunks by two memories, of what
    the token's document has before the chunk and after it.

    Args:
        aligned: promises that each row is one document without padding: one sum is all there is.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Katharopoulos et al. 2020, equation 6, https://arxiv.org/abs/2006.16236; packed rows
    are ours.
    """
    _require_chunk("two_sided_sums", chunk)
    v = _with_ones(v)
    if aligned:
        sums = jnp.einsum("btnr,bnrv->btnv", q, jnp.einsum("bsnr,bsnv->bnrv", k, v))
        return sums[..., :-1], sums[..., -1:]
    (B, T, N, Hv), R = v.shape, k.shape[-1]
    time = timeline(rows_after(None, positions, segments))
    q, k, v, run, same = _split(q, k, v, time, min(chunk, T))
    scores = jnp.einsum("bnctr,bncsr->bncts", q, k) * same[:, None]
    y = jnp.einsum("bncts,bncsv->bnctv", scores, v)
    for after in (False, True):
        y = y + _beyond(q, k, v, run, jnp.zeros((B, N, R, Hv), v.dtype), after)[0]
    y = _join(y, T)
    return y[..., :-1], y[..., -1:]


def _beyond(
    q: Float[Array, "B N c C R"],
    k: Float[Array, "B N c C R"],
    v: Float[Array, "B N c C Hv"],
    run: Int[Array, "B c C"],
    S: Float[Array, "B N R Hv"],
    after: bool,
) -> tuple[Float[Array, "B N c C Hv"], Float[Array, "B N R Hv"]]:
    """What tokens read of their document in earlier chunks, or in those after theirs.

    S is the memory before the first chunk (after the last one), and what it has become behind the
    last (before the first).

    A chunk meets the document that goes on at its near edge and hands on the one at its far edge.
    """
    first = jnp.zeros_like(run[:, :1, 0])
    start, end = jnp.concatenate([first, run[:, :-1, -1]], axis=1), run[..., -1]
    near, far = (end, start) if after else (start, end)
    keep = (start == end).T[:, :, None, None, None]
    handed = k * (run == far[..., None])[:, None, ..., None]
    written = jnp.einsum("bncsr,bncsv->cbnrv", handed, v)

    def carry(S: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        keep, written = step
        return jnp.where(keep, S, 0) + written, S

    S, entering = jax.lax.scan(carry, S, (keep, written), reverse=after)
    met = q * (run == near[..., None])[:, None, ..., None]
    return jnp.einsum("bnctr,cbnrv->bnctv", met, entering), S


def _with_ones(v: Float[Array, "B T N Hv"]) -> Array:
    """v in at least float32 with a column of ones, whose sum is the denominator."""
    v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def _split(
    q: Array, k: Array, v: Array, time: Timeline, chunk: int
) -> tuple[Array, Array, Array, Int[Array, "B c C"], Bool[Array, "B c C C"]]:
    """Whole chunks [B N c C ...], documents of their tokens, and which pairs have one document.

    The last chunk is filled with zeros, which is padding; so is what stands at padding.
    """
    (B, _, N, _), fill = v.shape, -v.shape[1] % chunk

    def chunks(x: Array) -> Array:
        x = jnp.where(time.live[..., None, None], x, 0)
        x = jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0)))
        return x.reshape(B, -1, chunk, N, x.shape[-1]).transpose(0, 3, 1, 2, 4)

    run = jnp.pad(time.run, ((0, 0), (0, fill)), mode="edge").reshape(B, -1, chunk)
    same = run[..., :, None] == run[..., None, :]
    return chunks(q), chunks(k), chunks(v), run, same


def _join(y: Float[Array, "B N c C Hv"], length: int) -> Float[Array, "B T N Hv"]:
    """Rows of chunks, without what filled the last one."""
    B, N, _, _, Hv = y.shape
    return y.transpose(0, 2, 3, 1, 4).reshape(B, -1, N, Hv)[:, :length]


def _require_chunk(name: str, chunk: int) -> None:
    if chunk < 1:
        raise ConfigError(f"{name}: chunk must be at least 1, got {chunk}")


def kernel_sums_flops(B: int, T: int, N: int, R: int, Hv: int, chunk: int) -> Flops:
    """FLOPs of `kernel_sums` without gates as written, R features a head: masks not spared.

    Per token and head: chunk (R + Hv + 1) multiply-adds inside the chunk, and R (Hv + 1) to write
    the memory and to read it. Every product has two cotangents. One token reads the memory.

    Source: our own count of `linear_attention.py`.
    """
    if T == 1:
        forward = 2 * B * N * R * (Hv + 1)
    else:
        chunk = min(chunk, T)
        tokens = B * -(-T // chunk) * chunk
        forward = 2 * tokens * N * (chunk * (R + Hv + 1) + 2 * R * (Hv + 1))
    return Flops(forward, 2 * forward)


def two_sided_flops(
    B: int, T: int, N: int, R: int, Hv: int, chunk: int, *, aligned: bool = False
) -> Flops:
    """FLOPs of `two_sided_sums` as written, R features a head.

    Per token and head: chunk (R + Hv + 1) multiply-adds inside the chunk, and R (Hv + 1) to write
    and to read each of two memories; if `aligned`, of one alone. Every product has two cotangents.

    Source: our own count of `linear_attention.py`.
    """
    if aligned:
        forward = 4 * B * T * N * R * (Hv + 1)
    else:
        chunk = min(chunk, T)
        tokens = B * -(-T // chunk) * chunk
        forward = 2 * tokens * N * (chunk * (R + Hv + 1) + 4 * R * (Hv + 1))
    return Flops(forward, 2 * forward)


def exact_two_sided_flops(B: int, T: int, N: int, R: int, Hv: int) -> Flops:
    """FLOPs of two-sided linear attention itself: one memory, which each token writes and reads.

    Source: Katharopoulos et al. 2020, equation 6, https://arxiv.org/abs/2006.16236
    """
    return two_sided_flops(B, T, N, R, Hv, 1, aligned=True)
