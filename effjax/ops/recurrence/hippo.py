"""HiPPO-LegS, the matrix whose state holds a history's Legendre coefficients, and its normal part.

    x' = A x + B u      A_nk = -((2n+1)(2k+1))^(1/2) below the diagonal, -(n+1) on it, 0 above
                        B_n  =   (2n+1)^(1/2)

A + p p^T = -1/2 I + S with p_n = (n + 1/2)^(1/2) and S skew-symmetric, so that in the eigenvectors
of S, A is a diagonal minus a matrix of rank one. Everything here is numpy in float64, at build.

Source: Gu et al., "HiPPO: Recurrent Memory with Optimal Polynomial Projections", 2020, section
2.3, https://arxiv.org/abs/2008.07669; the normal part: Gu et al., "Efficiently Modeling Long
Sequences with Structured State Spaces", 2022, section 3.3 and appendix C.1,
https://arxiv.org/abs/2111.00396
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class NormalPlusLowRank(NamedTuple):
    """A = V (diag(a) - p p*) V*, B = V b: one of each conjugate pair, largest frequency first.

    Real and imaginary parts apart; the real part of a as the log of what it is below 0.
    """

    log_a_real: Float[Array, "D P"]
    a_imag: Float[Array, "D P"]
    p_real: Float[Array, "D P"]
    p_imag: Float[Array, "D P"]
    b_real: Float[Array, "D P"]
    b_imag: Float[Array, "D P"]


def hippo_legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives A [size size] and B [size] as they are.

    Source: Gu et al. 2020, theorem 2, https://arxiv.org/abs/2008.07669, with the signs of Gu et
    al. 2022, equation 2, https://arxiv.org/abs/2111.00396
    """
    root = np.sqrt(2.0 * np.arange(size) + 1)
    below = np.tril(np.outer(root, root), -1)
    return -below - np.diag(np.arange(size) + 1.0), root


def legs_frequencies(modes: int) -> np.ndarray:
    """Gives the `modes` positive frequencies of the normal part of size 2 `modes`, largest first.

    Source: Gu et al. 2022, appendix C.1, https://arxiv.org/abs/2111.00396
    """
    return np.linalg.eigvalsh(_turned_skew(2 * modes))[::-1][:modes]


def legs_normal_plus_low_rank(channels: int, modes: int) -> NormalPlusLowRank:
    """Gives the diagonal, the rank-one vector and B of HiPPO-LegS, the same for every channel.

    Each eigenvector has a phase of its own, which C undoes.

    Source: Gu et al. 2022, section 3.3 and appendix C.1, https://arxiv.org/abs/2111.00396
    """
    size = 2 * modes
    frequencies, vectors = np.linalg.eigh(_turned_skew(size))
    V = vectors[:, ::-1][:, :modes]
    p, b = (V.conj().T @ x for x in (np.sqrt(np.arange(size) + 0.5), hippo_legs(size)[1]))
    parts = (np.full(modes, np.log(0.5)), frequencies[::-1][:modes], p.real, p.imag, b.real, b.imag)
    shape = (channels, modes)
    return NormalPlusLowRank(*(jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for x in parts))


def _turned_skew(size: int) -> np.ndarray:
    """-i S, which is Hermitian: its eigenvalues are the frequencies."""
    A, root = hippo_legs(size)
    skew = A + np.outer(root, root) / 2 + np.eye(size) / 2
    return -1j * skew
