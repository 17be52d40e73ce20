"""Model FLOPs of a decoder's config: the parts of `model_flops`, put together as the model is."""

import jax

from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.select import model_flops as part
from effjax.weights import LowRank, Tree, is_weight


def training_flops(config: DecoderConfig, length: int) -> float:
    """Model FLOPs of training all of a decoder on one token, in rows of `length` tokens."""
    return part.training(forward_flops(config, length))


def adapter_training_flops(config: DecoderConfig, length: int, params: Tree) -> float:
    """Model FLOPs of training the `LowRank` updates in `params` on one token, their bases frozen.

    A frozen weight's gradient is never formed, so it costs 2 passes instead of 3; what mixes tokens
    has no weights and costs 3; each update costs 3 passes of 2 R (inputs + outputs).
    """
    leaves = jax.tree.leaves(params, is_leaf=is_weight)
    updates = sum(2.0 * (w.a.size + w.b.size) for w in leaves if isinstance(w, LowRank))
    frozen = weight_flops(config)
    return part.training(forward_flops(config, length) - frozen + updates, frozen)


def weight_flops(config: DecoderConfig) -> float:
    """Model FLOPs of one token forward through the weights alone: 2 for each that it meets."""
    init, _, axes_of = decoder(config)
    params = jax.eval_shape(init, jax.random.key(0))
    met = 0.0
    for w, ax in zip(jax.tree.leaves(params), jax.tree.leaves(axes_of(params)), strict=True):
        if ax.is_matrix:
            one_of = config.switch.experts if "experts" in ax.batch else 1
            met += 2.0 * w.size / one_of
    return met


def forward_flops(config: DecoderConfig, length: int) -> float:
    """Model FLOPs of one token forward, averaged over a row's positions (see `model_flops`)."""
    mixers = {
        "attention": _attention,
        "window": _window,
        "retention": _retention,
        "state_space": _state_space,
    }
    repeats = config.layers // len(config.pattern)
    unit = [mixers[kind](config, length) + _feedforward(config) for kind in config.pattern]
    return part.decoder(unit * repeats, config.width, config.vocab)


def _attention(config: DecoderConfig, length: int, window: int | None = None) -> float:
    own = config.attention if window is None else config.window
    head_dim = own.head_dim or config.width // own.heads
    columns = 2 * own.heads + 2 * (own.kv_heads or own.heads)
    projections = part.dense(config.width, columns * head_dim)
    return projections + part.attention(part.mean_keys(length, window), own.heads, head_dim)


def _window(config: DecoderConfig, length: int) -> float:
    return _attention(config, length, config.window.width)


def _retention(config: DecoderConfig, length: int) -> float:
    own = config.retention
    head_dim = own.head_dim or config.width // own.heads
    value_dim = own.value_dim or head_dim
    # q and k; then v, gate and output.
    projections = part.dense(config.width, own.heads * (2 * head_dim + 3 * value_dim))
    chunk = min(own.chunk, length)
    return projections + part.retention(chunk, own.heads, head_dim, value_dim)


def _state_space(config: DecoderConfig, length: int) -> float:
    # The projection after the states is a gated linear unit: two columns per channel.
    mixing = part.dense(config.width, 2 * config.width)
    return mixing + part.diagonal_state_space(config.width, config.state_space.states)


def _feedforward(config: DecoderConfig) -> float:
    if config.feedforward == "switch":
        return part.switch(config.width, config.hidden, config.switch.experts)
    return part.feedforward(config.width, config.hidden)
