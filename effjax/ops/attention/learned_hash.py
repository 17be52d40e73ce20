"""Learning-to-hash attention: queries and keys meet in buckets that are learned for each."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.config import require_finite, require_positive, require_types
from effjax.ops.accounting import Flops
from effjax.ops.attention.bias import Bias
from effjax.ops.attention.gathered import listed_attention, listed_flops, rows_of
from effjax.ops.attention.layout import clear, dot, wide


@dataclass(frozen=True)
class LearnedHash:
    """Learned buckets: so many, the `width` tokens that each holds, `hidden` units of a network.

    loss_weight: of `hash_loss`, which trains the networks and nothing else.

    Raises ConfigError for numbers that are not positive, and a negative weight.

    Source: Sun et al. 2022, https://openreview.net/forum?id=VGnOJhd5Q1q; the sizes are ours.
    """

    buckets: int = 8
    width: int = 64
    hidden: int = 32
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "buckets", "width", "hidden")
        require_finite(self, "loss_weight", low=0.0)


def bucket_scores(logits: Float[Array, "B T N C"]) -> Float[Array, "B N C T"]:
    """The logit of every token's own bucket; -inf in all others.

        code_t = argmax_c logits_tc

    Source: Sun et al. 2022, Sparse Attention with Learning-to-Hash,
    https://openreview.net/forum?id=VGnOJhd5Q1q
    """
    logits = jax.lax.stop_gradient(logits).astype(wide(logits))
    own = jnp.arange(logits.shape[-1])[None, None, None] == logits.argmax(axis=-1)[..., None]
    return jnp.where(own, logits, -jnp.inf).transpose(0, 2, 3, 1)


def hash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    q_logits: Float[Array, "B T N C"],
    k_logits: Float[Array, "B T N C"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    aligned: bool = False,
    width: int,
    causal: bool = False,
    scale: float | None = None,
    bias: Bias | None = None,
) -> Float[Array, "B T N H"]:
    """Attends from every query to the keys that its hash network's bucket shares with theirs.

        bucket of q_t = argmax_c q_logits_tc,   bucket of k_s = argmax_c k_logits_sc

    A bucket holds the `width` queries and the `width` keys of a document with the highest logits; a
    query that finds no place, or no key, gives zero. One bucket of a document's width is full
    attention. Buckets are choices without gradients: the networks learn from `hash_loss`. Scale is
    H^-0.5 unless given.

    The result for a token depends on later ones even if `causal`: they compete for its place.

    Source: Sun et al. 2022, Sparse Attention with Learning-to-Hash,
    https://openreview.net/forum?id=VGnOJhd5Q1q: separate learned hash functions of queries and keys
    whose buckets attend. The bound on a bucket is ours, that shapes be static.
    """
    return listed_attention(
        q,
        k,
        v,
        rows_of(positions, segments, aligned),
        bucket_scores(q_logits),
        bucket_scores(k_logits),
        width=width,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        bias=bias,
    )


def hash_loss(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    q_logits: Float[Array, "B T N C"],
    k_logits: Float[Array, "B T N C"],
    reads: Bool[Array, "B T T"],
    *,
    scale: float | None = None,
) -> Float[Array, ""]:
    """How far the hash networks are from sending queries where their attention lies, in nats.

        a_ts = soft-max of scale q_t . k_s over the s that t may read, without gradients
        p_ts = sum_c softmax(q_logits_t)_c softmax(k_logits_s)_c,  over the sum of that over s
        loss = the sum over t of the mean over heads of KL(a_t || p_t)

    p is the chance that a query and a key draw the same bucket, as a distribution over keys. One
    bucket for all gives a uniform p, so that the loss does not fall by filling it. It takes T^2
    products: it is for training on short rows, or on a part of a long one's queries.

    As p is a distribution over keys, what it does not ask for is that the likeliest buckets of
    queries and keys are the same ones: on small decoders they often are not, and the buckets then
    hold few pairs (experiments/learned_recall.py).

    Source: ours. Sun et al. 2022, https://openreview.net/forum?id=VGnOJhd5Q1q, also learn their
    hash functions from attention; of how, no more than the abstract was at hand.
    """
    pairs, live = reads[:, None], reads.any(axis=1) | reads.any(axis=2)
    q, k, q_logits, k_logits = (clear(x, live) for x in (q, k, q_logits, k_logits))
    q, k = jax.lax.stop_gradient((q, k))
    s = dot("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    log_a = jax.nn.log_softmax(jnp.where(pairs, s, jnp.finfo(s.dtype).min), axis=-1)
    chance = [jax.nn.softmax(x.astype(wide(x)), axis=-1) for x in (q_logits, k_logits)]
    p = jnp.einsum("btnc,bsnc->bnts", *chance)
    tiny = jnp.finfo(p.dtype).tiny
    log_p = jnp.log(jnp.where(pairs, p, 1) + tiny)
    log_p -= jnp.log(jnp.where(pairs, p, 0).sum(axis=-1, keepdims=True) + tiny)
    terms = jnp.where(pairs, jnp.exp(log_a) * (log_a - log_p), 0)
    return terms.sum(axis=(2, 3)).mean(axis=1).sum()


def hash_flops(
    B: int, T: int, N: int, H: int, buckets: int, *, width: int, aligned: bool = False
) -> Flops:
    """FLOPs of `hash_attention` as written; the networks' are those of their weights.

    Source: our own count.
    """
    return listed_flops(B, T, N, H, buckets, width=width, aligned=aligned)
