"""What a row of a comparison is measured by: quality, bytes, operations and speed of a decoder."""

import os
import platform
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cost import clock, flops
from effjax.cost.memory import stored_bytes
from effjax.data.batch import Batch
from effjax.data.examples import RowSource
from effjax.evaluate.bits_per_byte import BitsPerByte, bits_per_byte
from effjax.evaluate.record import Bytes, Device
from effjax.inference.generate import continue_prompts, decoding_form
from effjax.inference.sampling import SamplingConfig
from effjax.objectives.causal_lm import causal_lm
from effjax.weights import Tree, Weight, is_weight


def score(
    apply: Callable, params: Tree, packed: RowSource, *, rows: int, batch: int
) -> BitsPerByte:
    """Bits per byte over `rows` rows, evenly spread over a packed text of byte tokens."""
    spread = np.unique(np.linspace(0, packed.count - 1, rows).round().astype(np.int64))
    padded = np.concatenate([spread, np.full(-len(spread) % batch, -1)])
    batches = (packed.rows(padded[i : i + batch]) for i in range(0, len(padded), batch))
    return bits_per_byte(lambda part: row_losses(apply, params, part), batches)


@partial(jax.jit, static_argnames="apply")
def row_losses(apply: Callable, params: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Nats and predicted tokens of each row [B]; nothing is dropped and no key is used."""
    logits, _, _ = apply(params, batch.tokens, positions=batch.positions, segments=batch.segments)
    return jax.vmap(lambda h, y: causal_lm(h[None], y[None]))(logits, batch.targets)


def storage(params: Tree) -> Bytes:
    """Bytes of the weights as they are stored, and whether a saving among them is real."""
    leaves = [w for w in jax.tree.leaves(params, is_leaf=is_weight) if isinstance(w, Weight)]
    savings = {w.saving for w in leaves}
    kind = (
        "simulated" if "simulated" in savings else "realised" if "realised" in savings else "none"
    )
    return Bytes(stored=stored_bytes(params), saving=kind)  # type: ignore[arg-type]


def decode_flops(apply: Callable, params: Tree, context: int) -> flops.Flops:
    """What the program computes to make one token behind `context` others, counted."""
    abstract = jax.eval_shape(lambda p: p, params)
    state = jax.eval_shape(lambda p: apply(p, 1, context, 1, method="init_state"), abstract)
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def step(params: Tree, state: Tree, token: jax.Array, position: jax.Array) -> Any:
        zero = jnp.zeros_like(token)
        return apply(params, token, positions=position, segments=zero, state=state)[:2]

    return flops.count(step, abstract, state, one, one)


def generation(
    apply: Callable, params: Tree, *, batch: int, prompt: int, new_tokens: int
) -> Callable[[], jax.Array]:
    """A thunk that makes `batch * new_tokens` tokens greedily: what generation is timed by."""
    tokens = jnp.ones((batch, prompt), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(prompt)[None], tokens.shape)
    options = {"new_tokens": new_tokens, "sampling": SamplingConfig(), "piece": prompt}
    key, params = jax.random.key(0), decoding_form(params)
    return lambda: continue_prompts(apply, params, tokens, positions, key, **options)


def relative_speed(
    thunk: Callable, reference: Callable, *, rounds: int
) -> tuple[clock.Spread, clock.Timing]:
    """How many times as fast as the reference a thunk is, side by side; and the thunk's timing."""
    timings = clock.interleave({"row": thunk, "reference": reference}, rounds=rounds)
    return clock.ratio(timings["reference"], timings["row"], "wall"), timings["row"]


@cache
def this_device() -> Device:
    """The kind and number of local devices, and the host's cores."""
    device = jax.local_devices()[0]
    return Device(kind=device.device_kind, count=jax.device_count(), cores=os.cpu_count() or 1)


@cache
def versions() -> dict[str, str]:
    """Versions that a figure may depend on."""
    names = ("effjax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
