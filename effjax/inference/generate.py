"""Generation: one compiled program that reads prompts and decodes, for every mixer alike."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from effjax.errors import ConfigError
from effjax.inference.sampling import SamplingConfig, sample
from effjax.weights import Tree


def generate(
    apply: Callable,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    sampling: SamplingConfig | None = None,
    key: jax.Array | None = None,
    piece: int | None = None,
) -> np.ndarray:
    """Continues each prompt by `new_tokens` tokens: int32 [prompts new_tokens].

    apply: a decoder's, from `decoder(config)`: equal configs share one compiled program.
    prompts: token ids, of any lengths of at least 1; each row gives what it gives alone.
    key: needed unless sampling is greedy.
    piece: prompts are read in pieces of so many tokens (None: in one), which bounds memory.
    Raises ConfigError on an empty prompt, no tokens to make, or sampling without a key.
    """
    sampling = sampling or SamplingConfig()
    if new_tokens < 1:
        raise ConfigError(f"new_tokens must be at least 1, got {new_tokens}")
    if sampling.temperature and key is None:
        raise ConfigError(f"temperature={sampling.temperature} draws tokens and needs a key")
    tokens, positions = pad_prompts(prompts)
    return np.asarray(
        continue_prompts(
            apply,
            params,
            tokens,
            positions,
            jax.random.key(0) if key is None else key,
            new_tokens=new_tokens,
            sampling=sampling,
            piece=piece or tokens.shape[1],
        )
    )


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as tokens and positions, int32 [prompts longest]; padding follows, at position -1."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ConfigError("every prompt needs at least 1 token, got an empty one")
    lengths = np.array([len(prompt) for prompt in prompts])
    index = np.arange(lengths.max())[None]
    live = index < lengths[:, None]
    tokens = np.zeros(live.shape, np.int32)
    tokens[live] = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
    return tokens, np.where(live, index, -1).astype(np.int32)


@partial(jax.jit, static_argnames=("apply", "new_tokens", "sampling", "piece"))
def continue_prompts(
    apply: Callable,
    params: Tree,
    tokens: jax.Array,
    positions: jax.Array,
    key: jax.Array,
    *,
    new_tokens: int,
    sampling: SamplingConfig,
    piece: int,
) -> jax.Array:
    """The program behind `generate`: prompts as arrays in, int32 [B new_tokens] out.

    The layers' states ride in the loop's carry and are updated in place.
    """
    B, P = tokens.shape
    state = apply(params, B, P + new_tokens, piece, method="init_state")
    logits = jnp.zeros((), jnp.float32)
    for start in range(0, P, piece):
        part = slice(start, start + piece)
        read, state, _ = apply(
            params,
            tokens[:, part],
            positions=positions[:, part],
            segments=jnp.zeros_like(tokens[:, part]),
            state=state,
        )
        logits = _last_live(logits, read, positions[:, part])
    length = (positions >= 0).sum(axis=1)
    first = sample(logits, jax.random.fold_in(key, 0), sampling).astype(jnp.int32)

    def decode(carry: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        state, token = carry
        logits, state, _ = apply(
            params,
            token[:, None],
            positions=(length + i)[:, None],
            segments=jnp.zeros((B, 1), jnp.int32),
            state=state,
        )
        chosen = sample(logits[:, 0], jax.random.fold_in(key, i + 1), sampling)
        return (state, chosen.astype(jnp.int32)), token

    (_, last), made = jax.lax.scan(decode, (state, first), jnp.arange(new_tokens - 1))
    return jnp.concatenate([made.T, last[:, None]], axis=1)


def _last_live(before: jax.Array, logits: jax.Array, positions: jax.Array) -> jax.Array:
    """Each row's logits at its last live token of a piece, or `before` where it has none."""
    index = jnp.arange(positions.shape[1])[None]
    last = jnp.where(positions >= 0, index, -1).max(axis=1)
    picked = jnp.take_along_axis(logits, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
    before = jnp.broadcast_to(before.astype(picked.dtype), picked.shape)
    return jnp.where((last >= 0)[:, None], picked, before)
