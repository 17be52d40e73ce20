"""H3: a shift that lines keys up with the values after them, and a diagonal memory of both.

    y_t = sum_s q_t . SSM_diag(SSM_shift(k) v^T)       head by head

SSM_shift is a state space whose matrix moves its state down by one, so with B = e_1 a learned
filter over the latest tokens; SSM_diag is S4D, one system a head for all H x H products of a key's
and a value's channels. With a filter that looks one token back, q finds what followed k.

Source: Fu et al., "Hungry Hungry Hippos: Towards Language Modeling with State Space Models", 2023,
section 3 and algorithm 1, https://arxiv.org/abs/2212.14052, and its code,
https://github.com/HazyResearch/H3. Departures: B of the shift is e_1, as the paper allows ("for
simplicity"), where the code learns it too, and the shift's skip is in its first tap; the diagonal
system is held between samples, as S4D is, where the code is bilinear.

Time: the shift counts live tokens, as its state is the latest inputs; the diagonal memory fades by
position differences, as S4D's does. So the next token is next through padding and gaps alike, and
decoding is prefill exactly.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.ops.convolution.short import short_convolution, short_state
from effjax.ops.recurrence.modes import Modes
from effjax.ops.recurrence.state_space import State, run_state_space, state_space_state


def h3_state(batch: int, heads: int, head_dim: int, taps: int, modes: int) -> State:
    """Gives the memory of rows that have not seen a token.

    The taps - 1 latest keys [B taps-1 N*H], h = 0 [B N*H*H P] twice, position, segment.

    Source: Fu et al. 2023, section 3.1, https://arxiv.org/abs/2212.14052
    """
    memory = state_space_state(batch, heads * head_dim**2, modes)
    return memory | short_state(batch, heads * head_dim, taps)


def h3(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    taps: Float[Array, "N H W"],
    modes: Modes,
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
    chunk: int = 32,
    aligned: bool = False,
) -> tuple[Float[Array, "B T N H"], State | None]:
    """Runs H3 over rows of documents: shift, outer product, diagonal memory, then q reads.

    Only the memory does products: `state_space_flops` of N H^2 channels.

    Args:
        taps: the filters of the shift; the last tap weighs a key itself.
        modes: one diagonal system for each head.
        positions, segments, state, chunk, aligned: as in `run_state_space`. `h3_state` starts
            from nothing.

    Raises:
        ConfigError: chunk is less than 1.
        ValueError: the state is of a filter of another width.

    Source: Fu et al. 2023, algorithm 1, https://arxiv.org/abs/2212.14052
    """
    B, T, N, H = q.shape
    if not aligned:
        live = (positions >= 0)[..., None, None]
        q, v = jnp.where(live, q, 0), jnp.where(live, v, 0)
    shifted, recent = short_convolution(
        k.reshape(B, T, N * H),
        taps.reshape(N * H, -1),
        positions=positions,
        segments=segments,
        state=state,
        aligned=aligned,
    )
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    shifted = shifted.reshape(B, T, N, H).astype(dtype)
    pairs = shifted[..., :, None] * v.astype(dtype)[..., None, :]
    memory, held = run_state_space(
        pairs.reshape(B, T, N * H * H),
        modes,
        positions=positions,
        segments=segments,
        state=state,
        chunk=chunk,
        aligned=aligned,
    )
    y = jnp.sum(q.astype(dtype)[..., None] * memory.reshape(pairs.shape), axis=-2)
    return y.astype(q.dtype), None if recent is None or held is None else recent | held
