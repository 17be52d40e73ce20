"""The real-gated linear recurrent unit (RG-LRU): a number per channel that tokens choose to keep.

    r_t = sigmoid(recurrence gate)      i_t = sigmoid(input gate)      log a_t = -c softplus(L) r_t
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t

with L [D] learned and c = 8, so that a channel fades by at most exp(-softplus(L))^8 a token and
by nothing where r_t = 0. The root keeps h as large as x, whatever a; a document's first token is
written whole. Each live token is one step: positions only say what is padding.

Source: De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient
Language Models", 2024, section 2.4 and appendix A, https://arxiv.org/abs/2402.19427. The paper's
softplus(L) belongs to a = sigmoid(-L); the first token and the bound of the root's slope are those
of the public code, https://github.com/google-deepmind/recurrentgemma (`jax/layers.py`), here by
document instead of by position 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import ConfigError
from effjax.ops.recurrence.bookkeeping import rows_after, timeline
from effjax.ops.recurrence.diagonal import CHUNK, diagonal_recurrence, diagonal_state

State = dict[str, Array]

RATE = 8.0
"""c. Source: De et al. 2024, section 2.4, https://arxiv.org/abs/2402.19427"""

STEEPEST = 1000.0
"""The largest slope of sqrt(1 - a^2) that a gradient uses. Source: `recurrentgemma/jax/layers.py`,
https://github.com/google-deepmind/recurrentgemma
"""

rg_lru_state = diagonal_state


def rg_lru(
    x: Float[Array, "B T D"],
    recurrence_gate: Float[Array, "B T D"],
    input_gate: Float[Array, "B T D"],
    decay: Float[Array, " D"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
    form: str = "auto",
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T D"], State | None]:
    """Runs the RG-LRU over rows of documents; returns every h_t.

    The memory, a and the root are float32 (float64 for float64 inputs), h has x's dtype.
    1 - a^2 is computed without cancellation, and the root's slope is held to 1000 at a = 1.

    Args:
        recurrence_gate, input_gate: before their sigmoids.
        decay: L of each channel: a large one forgets.
        positions: -1 is padding: nothing is read of it (it may be NaN), and its h is 0.
        segments: the document of each token; one stretch of a row per document.
        state, form, chunk: as in `diagonal_recurrence`; `rg_lru_state` starts from nothing.

    Source: De et al. 2024, equations 1-4, https://arxiv.org/abs/2402.19427
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    time = timeline(rows_after(state, positions, segments))
    live = time.live[..., None]
    u, r, i = (jnp.where(live, v.astype(dtype), 0) for v in (x, recurrence_gate, input_gate))
    log_a = -RATE * jax.nn.softplus(decay.astype(dtype))[None, None] * jax.nn.sigmoid(r)
    scale = jnp.where(time.begins[..., None], 1, _bounded_root(-jnp.expm1(2 * log_a)))
    h, state = diagonal_recurrence(
        log_a,
        scale * jax.nn.sigmoid(i) * u,
        positions=positions,
        segments=segments,
        state=state,
        form=form,
        chunk=chunk,
    )
    return h.astype(x.dtype), state


def ring_decay(
    key: Array, channels: int, low: float = 0.9, high: float = 0.999
) -> Float[Array, " D"]:
    """Draws L so that exp(-softplus(L)) is uniform on a ring: its square is, in [low^2, high^2].

    A token whose gate is half open then fades by the fourth power of that. (The paper's text has
    its eighth power in [0.9, 0.999]; this is its code.)

    Raises:
        ConfigError: not 0 < low < high < 1.

    Source: `rnn_param_init` of `recurrentgemma/jax/layers.py`,
    https://github.com/google-deepmind/recurrentgemma
    """
    if not 0 < low < high < 1:
        raise ConfigError(f"ring_decay: 0 < low < high < 1 must hold, got low={low}, high={high}")
    square = jax.random.uniform(key, (channels,), minval=low**2, maxval=high**2)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))


@jax.custom_jvp
def _bounded_root(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """sqrt(x), with a slope of at most `STEEPEST`: at 0 it would be infinite, and 0 times that."""
    return jnp.sqrt(x)


@_bounded_root.defjvp
def _bounded_slope(at: tuple[Array], way: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = at, way
    return jnp.sqrt(x), 0.5 * dx / jnp.sqrt(jnp.maximum(x, 0.25 / STEEPEST**2))
