"""Where a diagonal state space starts: the modes and time steps of the S4D paper.

Each function gives (log_a_real, a_imag), both [D P], of a = -exp(log_a_real) + i a_imag, the same
for every channel. P conjugate pairs stand for the paper's state of N = 2P. The paper's B is all
ones, or for LegS close to it; here C has absorbed it.

Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models",
2022, section 4, https://arxiv.org/abs/2206.11893
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from effjax.errors import ConfigError
from effjax.ops.recurrence.hippo import legs_frequencies


def s4d_lin(channels: int, modes: int) -> tuple[Float[Array, "D P"], Float[Array, "D P"]]:
    """Gives the modes a_n = -1/2 + i pi n: Fourier frequencies, n = 0 ... P - 1.

    Source: Gu et al. 2022, section 4 (S4D-Lin), https://arxiv.org/abs/2206.11893
    """
    return _modes(channels, np.pi * np.arange(modes))


def s4d_inv(channels: int, modes: int) -> tuple[Float[Array, "D P"], Float[Array, "D P"]]:
    """Gives the modes a_n = -1/2 + i (N / pi) (N / (2n + 1) - 1), N = 2P: S4D-LegS as N grows.

    Source: Gu et al. 2022, section 4 (S4D-Inv), https://arxiv.org/abs/2206.11893
    """
    N = 2 * modes
    return _modes(channels, N / np.pi * (N / (2 * np.arange(modes) + 1) - 1))


def s4d_legs(channels: int, modes: int) -> tuple[Float[Array, "D P"], Float[Array, "D P"]]:
    """Gives the modes of HiPPO-LegS's normal part, largest frequency first; N = 2P.

    They are the eigenvalues of A + q q^T = -1/2 I + S, where A_nk = -((2n+1)(2k+1))^(1/2) below
    the diagonal, -(n + 1) on it and 0 above, q_n = (n + 1/2)^(1/2), and S is skew-symmetric.

    Source: Gu et al. 2022, section 4 (S4D-LegS), https://arxiv.org/abs/2206.11893
    """
    return _modes(channels, legs_frequencies(modes))


def log_time_steps(
    key: Key[Array, ""], channels: int, low: float = 1e-3, high: float = 1e-1
) -> Float[Array, " D"]:
    """Draws log dt uniformly between log `low` and log `high`: each channel has its own scale.

    Raises:
        ConfigError: not 0 < low <= high.

    Source: Gu et al. 2022, section 5, https://arxiv.org/abs/2206.11893
    """
    if not 0 < low <= high:
        raise ConfigError(f"log_time_steps: wanted 0 < low <= high, got low={low}, high={high}")
    return jax.random.uniform(key, (channels,), minval=np.log(low), maxval=np.log(high))


def _modes(channels: int, imag: np.ndarray) -> tuple[Array, Array]:
    """The same frequencies in every channel, with the paper's real part, -1/2."""
    shape = (channels, imag.shape[0])
    real = jnp.full(shape, np.log(0.5), jnp.float32)
    return real, jnp.broadcast_to(jnp.asarray(imag, jnp.float32)[None], shape)
