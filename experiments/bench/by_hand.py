"""A training step on plain dicts, written by hand: what the abstraction is measured against.

The same ops, loss and optimiser as effjax's own step, with `jnp.einsum` for every product: no Flax,
no weight leaves, no doors, no partition. `tests/models/test_free.py` compares the programs.
"""

import jax
import jax.numpy as jnp
import optax

from effjax.data.batch import Batch
from effjax.objectives.causal_lm import causal_lm
from effjax.ops.attention.engine import attention
from effjax.ops.attention.patterns import Causal
from effjax.ops.normalization import rms_norm
from effjax.ops.position.rope import rope


def product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """One product, accumulated in float32."""
    return jnp.einsum(spec, x, w, preferred_element_type=jnp.float32)


def by_hand(params: dict, batch: Batch) -> jax.Array:
    """Mean nats per predicted token of a causal decoder."""
    x = jnp.take(params["embed"]["weight"], batch.tokens, axis=0, mode="fill")
    positions, segments = batch.positions, batch.segments

    def layer(x, w):
        w = w["attention_00"]
        mixer = {name: part["kernel"] for name, part in w["mixer"].items()}
        h = rms_norm(x, w["norm_mixer"]["scale"])
        y = attention(
            rope(product("btd,dnh->btnh", h, mixer["q"]), positions),
            rope(product("btd,dkh->btkh", h, mixer["k"]), positions),
            product("btd,dkh->btkh", h, mixer["v"]),
            pattern=Causal(),
            q_positions=positions,
            k_positions=positions,
            q_segments=segments,
            k_segments=segments,
            ordered=True,
        )
        x = x + product("btnh,nhd->btd", y, mixer["o"])
        h = rms_norm(x, w["norm_feedforward"]["scale"])
        up, down = (w["feedforward"][name]["kernel"] for name in ("up", "down"))
        return x + product("btf,fd->btd", jax.nn.gelu(product("btd,df->btf", h, up)), down), None

    x, _ = jax.lax.scan(layer, x, params["stack"]["runs"]["000"])
    logits = product("btd,vd->btv", rms_norm(x, params["norm"]["scale"]), params["embed"]["weight"])
    nats, _ = causal_lm(logits, batch.targets)
    return nats / jnp.maximum((batch.targets >= 0).sum(), 1).astype(jnp.float32)


def hand_step(rule: optax.GradientTransformation):
    """`((params, optimiser state, step), batch) -> (the same, (loss, gradient norm))`."""

    def step(state, batch):
        params, opt_state, number = state
        loss, gradients = jax.value_and_grad(by_hand)(params, batch)
        updates, opt_state = rule.update(gradients, opt_state, params)
        norm = optax.tree.norm(gradients)
        return (optax.apply_updates(params, updates), opt_state, number + 1), (loss, norm)

    return step
