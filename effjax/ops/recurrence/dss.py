"""DSS: a diagonal state space whose modes all channels share, under one of two scales.

    K_j = Re(sum_p w_p s_p exp(a_p dt j))       a = -exp(log_a_real) + i a_imag

    exp:      s_p = (exp(a_p dt) - 1) / a_p
    softmax:  s_p = 1 / (a_p sum_{r<L} exp(a_p dt r))
                  = (exp(a_p dt) - 1) / (a_p (exp(a_p dt L) - 1))

The first is the zero-order hold of h' = a h + u with C = w; the second weighs the L steps of each
mode as soft-max does. Both are modes for the engine of state spaces: `run_state_space(u, modes)`.
Channels have steps dt and weights w of their own.

Source: Gupta et al., "Diagonal State Spaces are as Effective as Structured State Spaces", 2022,
proposition 1, https://arxiv.org/abs/2203.14343. Departure: of soft-max's modes too no real part is
positive, where the paper lets them grow towards the end of a row of L tokens: a text has no end.
Past L tokens the kernel goes on as it fades, where the paper has no such tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.ops.recurrence.modes import Modes
from effjax.ops.recurrence.state_space import discretise

# What keeps 1 / x bounded at x = 0: it is conj(x) / (|x|^2 + this).
SMALL = 1e-7


def dss_exp(
    *,
    log_dt: Float[Array, " D"],
    log_a_real: Float[Array, " P"],
    a_imag: Float[Array, " P"],
    w_real: Float[Array, "D P"],
    w_imag: Float[Array, "D P"],
    skip: Float[Array, " D"],
) -> Modes:
    """Gives the modes of DSS_exp, weights w (exp(a dt) - 1) / a.

    Source: Gupta et al. 2022, proposition 1(a), https://arxiv.org/abs/2203.14343
    """
    shape = w_real.shape
    a_real, a_imag = (jnp.broadcast_to(x[None], shape) for x in (log_a_real, a_imag))
    return discretise(log_dt, a_real, a_imag, w_real / 2, w_imag / 2, skip)


def dss_softmax(
    length: int,
    *,
    log_dt: Float[Array, " D"],
    log_a_real: Float[Array, " P"],
    a_imag: Float[Array, " P"],
    w_real: Float[Array, "D P"],
    w_imag: Float[Array, "D P"],
    skip: Float[Array, " D"],
) -> Modes:
    """Gives the modes of DSS_softmax over `length` = L steps: DSS_exp's over exp(a dt L) - 1.

    The quotient is bounded where a mode returns to where it was in just L steps.

    Source: Gupta et al. 2022, proposition 1(b) and appendix A.2, https://arxiv.org/abs/2203.14343
    """
    modes = dss_exp(
        log_dt=log_dt,
        log_a_real=log_a_real,
        a_imag=a_imag,
        w_real=w_real,
        w_imag=w_imag,
        skip=skip,
    )
    whole = jnp.expm1(jax.lax.complex(*(x * length for x in modes.log_decay)))
    size = whole.real**2 + whole.imag**2
    weight = jax.lax.complex(*modes.weight) * whole.conj() / (size + SMALL)
    return modes._replace(weight=(weight.real, weight.imag))
