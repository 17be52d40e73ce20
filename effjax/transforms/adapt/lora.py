"""LoRA: a trained low-rank update beside a frozen weight."""

import math

import jax
import jax.numpy as jnp

from effjax.errors import ConfigError
from effjax.transforms._lift import core_shape, on_weights, path_key
from effjax.transforms._options import require_integer, require_number, require_rank
from effjax.weights import AnyWeight, Axes, LowRank, Tree, Where, dense, is_weight


def lora(
    params: Tree, axes: Tree, *, rank: int, alpha: float, where: Where = None, seed: int = 0
) -> Tree:
    """Puts a low-rank update beside every selected weight, whatever leaf that is.

        W' = W + (alpha / rank) a b,   a [*inputs R] ~ U(-1/sqrt(inputs), 1/sqrt(inputs)),   b = 0

    so the function is unchanged at first. For a lookup a = 0 and b ~ N(0, 1): a row's update then
    moves only when the row is read. Factors are float32; each layer and expert has its own, drawn
    from `seed` and the weight's path. Train with `partition(params, axes, adapters)`.

    Raises ConfigError: a rank above min(inputs, outputs), alpha that is not finite and positive.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1,
    https://arxiv.org/abs/2106.09685. The paper draws a from a Gaussian; the distributions here are
    those of its code (`nn.Linear`'s default, and `nn.Embedding`'s), `loralib/layers.py` of
    https://github.com/microsoft/LoRA.
    """
    require_integer("lora", "rank", rank, low=1)
    require_integer("lora", "seed", seed, low=0)
    alpha = require_number("lora", "alpha", alpha, 0, math.inf, "()")

    def one(path: str, w: AnyWeight, ax: Axes) -> LowRank:
        batch, inputs, outputs = core_shape(w, ax)
        require_rank("lora", path, rank, math.prod(inputs), math.prod(outputs))
        a, b = _factors(path_key(seed, path), ax, batch, inputs, outputs, rank)
        scale = jnp.full(batch, alpha / rank, jnp.float32)
        return LowRank(w, a, b, scale, len(ax.inputs))

    return on_weights("lora", one, params, axes, where)


def _factors(
    key: jax.Array,
    axes: Axes,
    batch: tuple[int, ...],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    rank: int,
) -> tuple[jax.Array, jax.Array]:
    shape_a, shape_b = (*batch, *inputs, rank), (*batch, rank, *outputs)
    if axes.lookup:
        return jnp.zeros(shape_a), jax.random.normal(key, shape_b)
    bound = 1 / math.sqrt(math.prod(inputs))
    return jax.random.uniform(key, shape_a, minval=-bound, maxval=bound), jnp.zeros(shape_b)


def adapters(path: str, w: AnyWeight, axes: Axes) -> bool:
    """The `where` of every LoRA update: `partition(params, axes, adapters)` trains them alone.

    Source: Hu et al. 2021, section 4.1 (the pre-trained weights are frozen).
    """
    return isinstance(w, LowRank)


def merge(params: Tree, axes: Tree, *, where: Where = adapters) -> Tree:
    """Adds every selected update to its base, which becomes a plain array of the base's dtype.

        W' = W + scale * a b, summed in at least float32 and cast once

    In a narrow dtype the cast can lose a small update: keep the unmerged tree to train further.

    Raises ConfigError: a weight without an update (merged already, or never adapted), a base whose
    zeros the sum would fill.

    Source: Hu et al. 2021, section 4.1 ("No Additional Inference Latency"),
    https://arxiv.org/abs/2106.09685.
    """
    if not any(isinstance(w, LowRank) for w in jax.tree.leaves(params, is_leaf=is_weight)):
        raise ConfigError("merge: no weight of the tree has an update; were they merged already?")

    def one(path: str, w: AnyWeight, ax: Axes) -> AnyWeight:
        if not isinstance(w, LowRank):
            raise ConfigError(f"merge at {path!r}: no update to merge, got {type(w).__name__}")
        with jax.default_matmul_precision("highest"):
            return _merged(w)

    return on_weights("merge", one, params, axes, where)


@jax.jit
def _merged(w: LowRank) -> jax.Array:
    return _sum(w).astype(w.dtype)


def _sum(w: AnyWeight) -> jax.Array:
    if isinstance(w, LowRank):
        return dense(w.replaced(base=_sum(w.base)))
    return dense(w).astype(jnp.promote_types(w.dtype, jnp.float32))
