"""Routing attention: online k-means clusters of queries and keys."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.config import require_finite, require_positive, require_types
from effjax.ops.accounting import Flops
from effjax.ops.attention.bias import Bias
from effjax.ops.attention.gathered import listed_attention, listed_flops, rows_of
from effjax.ops.attention.layout import wide


@dataclass(frozen=True)
class Routing:
    """Clusters of tokens: so many, the `width` tokens that each takes, the `decay` of its mean.

    commitment_weight: of the loss that draws tokens to their centroids, the paper's.

    Raises ConfigError for numbers that are not positive, a decay outside [0, 1) and a negative
    weight.

    Source: Roy et al. 2021, Routing Transformer, section 4.1, https://arxiv.org/abs/2003.05997
    """

    clusters: int = 8
    width: int = 32
    decay: float = 0.999
    commitment_weight: float = 1e-4

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "clusters", "width")
        require_finite(self, "decay", low=0.0, high=1.0, high_open=True)
        require_finite(self, "commitment_weight", low=0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Centroids:
    """Means of clusters, [N C H], and the running number of tokens behind each, [N C]."""

    means: Any
    count: Any


def normalize(x: Float[Array, "B T N H"], eps: float = 1e-6) -> Float[Array, "B T N H"]:
    """Takes each head's vector to mean 0 and variance 1, without learned scales: length H^0.5.

    Source: Roy et al. 2021, Routing Transformer, section 4.1, https://arxiv.org/abs/2003.05997
    """
    y = x.astype(wide(x))
    y = y - y.mean(axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt((y * y).mean(axis=-1, keepdims=True) + eps)).astype(x.dtype)


def similarities(
    x: Float[Array, "B T N H"], means: Float[Array, "N C H"]
) -> Float[Array, "B N C T"]:
    """Products of tokens with the means of clusters; they have no gradients.

    Source: Roy et al. 2021, Routing Transformer, algorithm 1, https://arxiv.org/abs/2003.05997
    """
    x = jax.lax.stop_gradient(x).astype(wide(x))
    return jnp.einsum("btnh,nch->bnct", x, jax.lax.stop_gradient(means).astype(x.dtype))


def routing_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    q_scores: Float[Array, "B N C T"],
    k_scores: Float[Array, "B N C T"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    aligned: bool = False,
    width: int,
    causal: bool = False,
    scale: float | None = None,
    bias: Bias | None = None,
) -> Float[Array, "B T N H"]:
    """Attends within clusters, each of the `width` queries and keys of a document nearest to it.

        Q_c, K_c = the `width` queries and keys with the highest scores of cluster c
        y_t      = the mean over the clusters that have query t of attention from t to K_c

    scores: `similarities` of normalised queries and keys. A query may be in several clusters or in
    none, which gives zero. One cluster of a document's width is full attention. Scale is H^-0.5
    unless given.

    `causal` masks later keys inside a cluster. It does not make the result independent of later
    tokens: they compete for places in Q_c and K_c.

    Source: Roy et al. 2021, Routing Transformer, section 4.1 and algorithm 1,
    https://arxiv.org/abs/2003.05997. Its public code masks by place in the cluster and not by
    position, which is the same only where queries are keys, and does not scale.
    """
    return listed_attention(
        q,
        k,
        v,
        rows_of(positions, segments, aligned),
        q_scores,
        k_scores,
        width=width,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        bias=bias,
    )


def update_centroids(
    centroids: Centroids,
    x: Float[Array, "B T N H"],
    decay: float | Float[Array, ""],
    live: Bool[Array, "B T"] | None = None,
) -> Centroids:
    """Moves every mean towards the tokens that are nearest to it, by exponential averages.

        n_c <- decay n_c + (1 - decay) |S_c|
        s_c <- decay s_c + (1 - decay) sum of x in S_c,    mean_c = s_c / n_c

    S_c: the vectors with their largest product at cluster c; give queries and keys one after the
    other along T. A cluster that none is nearest to keeps its mean. A pure function of a step's
    vectors, without gradients: the training loop puts the result in the place of the centroids.

    Source: Roy et al. 2021, Routing Transformer, section 4.1, https://arxiv.org/abs/2003.05997, as
    in its public code (`online_kmeans`), from whose count we leave out its smoothing by 1e-5.
    """
    means = jax.lax.stop_gradient(centroids.means)
    x = jax.lax.stop_gradient(x).astype(wide(means))
    hot = _nearest(x, means)
    if live is not None:
        hot = hot * live[:, None, None].astype(hot.dtype)
        x = jnp.where(live[:, :, None, None], x, 0)
    count = decay * centroids.count + (1 - decay) * hot.sum(axis=(0, 3)).astype(means.dtype)
    sums = jnp.einsum("bnct,btnh->nch", hot, x).astype(means.dtype)
    sums = decay * centroids.count[..., None] * means + (1 - decay) * sums
    some = count > 0
    moved = sums / jnp.where(some, count, 1)[..., None]
    return Centroids(jnp.where(some[..., None], moved, means), count)


def commitment(
    x: Float[Array, "B T N H"],
    means: Float[Array, "N C H"],
    live: Bool[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """The sum over live tokens of the mean square from x to its cluster's mean, a loss for x.

    Source: Roy et al. 2021, Routing Transformer's public code (`embedding_lookup`: `e_loss`),
    https://github.com/google-research/google-research/tree/master/routing_transformer
    """
    x = x.astype(wide(x))
    means = jax.lax.stop_gradient(means).astype(x.dtype)
    near = jnp.einsum("bnct,nch->btnh", _nearest(jax.lax.stop_gradient(x), means), means)
    square = ((x - near) ** 2).mean(axis=(2, 3))
    return (square if live is None else jnp.where(live, square, 0)).sum()


def _nearest(x: Float[Array, "B T N H"], means: Float[Array, "N C H"]) -> Float[Array, "B N C T"]:
    """1 at the cluster of each token, 0 elsewhere."""
    code = similarities(x, means).argmax(axis=2)
    return jax.nn.one_hot(code, means.shape[1], axis=2, dtype=x.dtype)


def routing_flops(
    B: int, T: int, N: int, H: int, clusters: int, *, width: int, aligned: bool = False
) -> Flops:
    """FLOPs of `similarities` of queries and keys and of `routing_attention`, as written.

    Source: our own count.
    """
    inside = listed_flops(B, T, N, H, clusters, width=width, aligned=aligned)
    return Flops(inside.forward + 4 * B * T * N * H * clusters, inside.backward)
