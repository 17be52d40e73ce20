"""The flat block butterfly: which blocks are dense, and the fit of a matrix by them and a rank."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def flat_butterfly(blocks: int, stride: int) -> Bool[np.ndarray, "M M"]:
    """Which of M x M blocks are dense: the diagonal, and where one bit of at most `stride` differs.

    The union of the patterns of the factors of a butterfly. stride: a power of two below M; 0 keeps
    the diagonal alone.

    Source: Chen et al. 2021, "Pixelated Butterfly", section 3 (flat butterfly of a maximal
    stride), https://arxiv.org/abs/2112.00029
    """
    i, j = np.mgrid[:blocks, :blocks]
    bit = i ^ j
    return (bit & (bit - 1) == 0) & (bit <= stride)


def fit_pixelated(
    w: Float[Array, "D F"], blocks: int, stride: int, rank: int, rounds: int
) -> tuple[Float[Array, "D C S"], Float[Array, "D R"], Float[Array, "R F"]]:
    """Blocks and factors near W, in turns: what the blocks leave, and what the factors leave.

        a b = the best rank-R matrix for W - B      B = the dense blocks of W - a b

    Each half-step is the best for the other's result, so that ||W - B - a b||_F never grows; the
    first starts from B = 0, and outside its blocks B has no part in the error.

    Args:
        w: inputs by outputs, which `blocks` divides. blocks, stride: as in `flat_butterfly`.
        rounds: of both half-steps, at least 1.

    Returns:
        blocks, a and b, as in `effjax.weights.PixelatedButterfly`.

    Source: Zhou and Tao 2011, "GoDec", algorithm 1,
    http://www.icml-2011.org/papers/41_icmlpaper.pdf,
    with the fixed pattern of Chen et al. 2021, https://arxiv.org/abs/2112.00029, which trains its
    parts from the start and fits none
    """
    pattern = flat_butterfly(blocks, stride)
    D, F = w.shape
    mask = jnp.asarray(np.repeat(np.repeat(pattern, D // blocks, 0), F // blocks, 1))
    sparse = jnp.zeros_like(w)
    for _ in range(rounds):
        u, s, vt = jnp.linalg.svd(w - sparse, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        a, b = u[:, :rank] * root[None], root[:, None] * vt[:rank]
        sparse = jnp.where(mask, w - a @ b, 0)
    P, S = D // blocks, F // blocks
    grid = sparse.reshape(blocks, P, blocks, S)
    slots = [0, *(2**t for t in range(stride.bit_length()))]
    columns = np.arange(blocks)[:, None] ^ np.array(slots)[None]
    picked = jnp.take_along_axis(grid, jnp.asarray(columns)[:, None, :, None], axis=2)
    return picked.reshape(D, len(slots), S), a, b
