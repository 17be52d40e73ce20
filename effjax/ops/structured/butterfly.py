"""Butterfly factorisations: products of log2 n stages that each mix two numbers at a time.

    B = S_J ... S_2 S_1      n = 2^J      (S_j x)_i = c_ji0 x_i + c_ji1 x_k, k = i +- 2^(j-1)

Stage j pairs the indices that differ in the bit of value 2^(j-1). The factors are held as
coefficients [J, n, 2], 2 n log2 n numbers, and a product takes as many multiply-adds.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from effjax.errors import ConfigError
from effjax.weights.butterfly import butterfly_stage


def butterfly_multiply(
    x: Inexact[Array, "*rows n"], factors: Inexact[Array, "J n 2"]
) -> Inexact[Array, "*rows n"]:
    """B x for each row: the stages in turn, all of it element-wise work.

    Source: Dao et al. 2019, section 3.1, https://arxiv.org/abs/1903.05895
    """
    rows = [1] * (x.ndim - 1)
    for j, stage in enumerate(jnp.unstack(factors)):
        x = butterfly_stage(x, stage.reshape(*rows, *stage.shape), 2**j)
    return x


def naive_butterfly(factors: Inexact[Array, "J n 2"]) -> Inexact[Array, "n n"]:
    """B as the product of its sparse matrices, each written out.

    Source: Dao et al. 2019, definitions 1 and 2, https://arxiv.org/abs/1903.05895
    """
    n = factors.shape[1]
    whole, index = jnp.eye(n, dtype=factors.dtype), np.arange(n)
    for j in range(factors.shape[0]):
        stage = jnp.zeros((n, n), factors.dtype)
        stage = stage.at[index, index].set(factors[j, :, 0])
        whole = stage.at[index, index ^ 2**j].set(factors[j, :, 1]) @ whole
    return whole


def hadamard_factors(n: int) -> Inexact[Array, "J n 2"]:
    """The stages of the Walsh-Hadamard transform, H_ik = (-1)^(bits that i and k share).

    Raises ConfigError for a size that is no power of two.

    Source: Dao et al. 2019, section 3.1 and appendix A, https://arxiv.org/abs/1903.05895
    """
    stages = []
    for j in range(_stages(n)):
        upper = np.arange(n) & 2**j > 0
        stages.append(np.stack([np.where(upper, -1.0, 1.0), np.ones(n)], axis=-1))
    return jnp.asarray(np.stack(stages), jnp.float32)


def dft_factors(n: int) -> Inexact[Array, "J n 2"]:
    """The stages of the fast Fourier transform of a row in the order of `bit_reversal`.

        B x[bit_reversal] = F x      F_ik = exp(-2 pi i k sqrt(-1) / n)

    Complex64 (complex128 where jax_enable_x64 is on).
    Raises ConfigError for a size that is no power of two.

    Source: Cooley and Tukey 1965, https://doi.org/10.2307/2003354, as in Dao et al. 2019,
    section 3.1, https://arxiv.org/abs/1903.05895
    """
    stages = []
    for j in range(_stages(n)):
        index = np.arange(n)
        upper = index & 2**j > 0
        twiddle = np.exp(-1j * np.pi * (index % 2**j) / 2**j)
        ones = np.ones(n)
        stages.append(
            np.stack([np.where(upper, -twiddle, ones), np.where(upper, ones, twiddle)], axis=-1)
        )
    return jnp.asarray(np.stack(stages), jnp.result_type(complex))


def bit_reversal(n: int) -> np.ndarray:
    """The permutation that a radix-2 Fourier transform begins with: the bits of i backwards.

    Raises ConfigError for a size that is no power of two.

    Source: Dao et al. 2019, section 3.2, https://arxiv.org/abs/1903.05895
    """
    index, reverse = np.arange(n), np.zeros(n, int)
    for j in range(_stages(n)):
        reverse = 2 * reverse + (index >> j & 1)
    return reverse


def project_butterfly(w: Inexact[Array, "n n"]) -> Inexact[Array, "J n 2"]:
    """Stages whose product is near W, peeled off one by one; of a true butterfly, exactly.

    W = X S_1 where column i of X is 0 at the indices of other parity than i: each pair of columns
    at the indices of one parity is a matrix of rank 1, whose best fit gives two coefficients of S_1
    and one column of X. What is left at each parity is a butterfly of half the size. The rows of
    all stages but the last have norm 1. The fit of each stage is the best, that of the product need
    not be.

    Source: Le, Zheng, Riccietti and Gribonval 2022, "Fast learning of fast transforms, with
    guarantees", section 3, https://arxiv.org/abs/2110.01230, with the tree that peels off one
    stage at a time; the structure is Dao et al.'s 2019, https://arxiv.org/abs/1903.05895
    """
    n = w.shape[0]
    stages, rest = [], w[None]  # [class, outputs, inputs] of each value of the bits done so far
    for _ in range(_stages(n)):
        c, m, _ = rest.shape
        # [class, bit of the output, pair of inputs, output, input of the pair]
        pairs = rest.reshape(c, m // 2, 2, m // 2, 2).transpose(0, 2, 3, 1, 4)
        if m == 2:
            rows = pairs[..., 0, :]
        else:
            u, s, vt = jnp.linalg.svd(pairs, full_matrices=False)
            rows = vt[..., 0, :]
            left = u[..., 0] * s[..., :1]
            rest = left.transpose(1, 0, 3, 2).reshape(2 * c, m // 2, m // 2)
        own = jnp.stack([rows[:, 0, :, 0], rows[:, 1, :, 1]], axis=1)
        other = jnp.stack([rows[:, 0, :, 1], rows[:, 1, :, 0]], axis=1)
        stages.append(jnp.stack([own, other], axis=-1).transpose(2, 1, 0, 3).reshape(n, 2))
    return jnp.stack(stages)


def _stages(n: int) -> int:
    """log2 n."""
    if n < 2 or n & (n - 1):
        raise ConfigError(f"butterfly: the size must be a power of two of at least 2, got {n}")
    return n.bit_length() - 1
