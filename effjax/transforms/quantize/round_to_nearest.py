"""Round-to-nearest quantisation of weights, per output channel or per group of inputs."""

import jax
import jax.numpy as jnp

from effjax.errors import ConfigError
from effjax.transforms._lift import group_axis, on_bases, together
from effjax.transforms._options import require_integer
from effjax.weights import AnyWeight, Axes, Quantized, Tree, Where

CODES = {8: jnp.int8, 4: jnp.int4}


def round_to_nearest(
    params: Tree,
    axes: Tree,
    *,
    bits: int = 8,
    group: int | None = None,
    symmetric: bool = True,
    where: Where = None,
) -> Tree:
    """Quantises every selected weight to the nearest of 2^bits evenly spaced values.

        symmetric: scale = max|w| / (2^(bits-1) - 1),               codes = round(w / scale)
        affine:    scale = (max(w, 0) - min(w, 0)) / (2^bits - 1),  codes = round(w / scale) + zero

    The maxima run over the inputs of one output channel, or over `group` consecutive entries of the
    last input axis (at each index of the other inputs), because a scale has the codes' rank; for a
    lookup, over one row, or over `group` consecutive entries of its last output axis.
    |w - W| <= scale / 2 for every entry, no code saturates, 0 stays 0, and quantising the result
    again gives the same codes. scale is at least the smallest normal float32, so an all-zero
    channel gives exact zeros.

    Raises ConfigError: bits other than 8 and 4, a group that does not divide its axis.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 2.1, https://arxiv.org/abs/1712.05877. We depart in
    the symmetric range, which leaves out -2^(bits-1) so that negation is exact.
    """
    if isinstance(bits, bool) or bits not in CODES:
        raise ConfigError(f"round_to_nearest: bits must be 8 or 4, got {bits!r}")
    if not isinstance(symmetric, bool):
        raise ConfigError(f"round_to_nearest: symmetric must be true or false, got {symmetric!r}")
    if group is not None:
        require_integer("round_to_nearest", "group", group, low=1)
    quantize = _symmetric if symmetric else _affine

    def one(path: str, w: AnyWeight, ax: Axes) -> Quantized:
        if group is not None:
            _require_divides(path, w, ax, group)
        return together(quantize, ax, w, bits=bits, group=group)

    return on_bases("round_to_nearest", one, params, axes, where)


def _require_divides(path: str, w: AnyWeight, axes: Axes, group: int) -> None:
    name, size = axes.names[group_axis(axes)], w.shape[group_axis(axes)]
    if size % group:
        raise ConfigError(
            f"round_to_nearest at {path!r}: group must divide {name}={size}, got {group}"
        )


def _symmetric(w: jax.Array, *, axes: Axes, bits: int, group: int | None) -> Quantized:
    top = 2 ** (bits - 1) - 1
    blocks, block_axes = _blocks(w.astype(jnp.float32), axes, group)
    largest = jnp.max(jnp.abs(blocks), axis=block_axes, keepdims=True)
    scale = _above_zero(largest * jnp.float32(1 / top))
    codes = jnp.round(blocks / scale).astype(CODES[bits]).reshape(w.shape)
    return Quantized(codes, _unblocked(scale, block_axes, group))


def _affine(w: jax.Array, *, axes: Axes, bits: int, group: int | None) -> Quantized:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    blocks, block_axes = _blocks(w.astype(jnp.float32), axes, group)
    smallest = jnp.minimum(jnp.min(blocks, axis=block_axes, keepdims=True), 0)
    largest = jnp.maximum(jnp.max(blocks, axis=block_axes, keepdims=True), 0)
    # The step is a millionth short, so that rounding always sends both ends to the extreme codes:
    # a grid whose last code is unused would be a coarser one the second time.
    scale = _above_zero((largest - smallest) * jnp.float32((1 - 2**-20) / (high - low)))
    zero = jnp.clip(low - jnp.round(smallest / scale), low, high)
    codes = jnp.clip(jnp.round(blocks / scale) + zero, low, high)
    return Quantized(
        codes.astype(CODES[bits]).reshape(w.shape),
        _unblocked(scale, block_axes, group),
        _unblocked(zero, block_axes, group).astype(CODES[bits]),
    )


def _above_zero(scale: jax.Array) -> jax.Array:
    return jnp.maximum(scale, jnp.finfo(scale.dtype).tiny)


def _blocks(w: jax.Array, axes: Axes, group: int | None) -> tuple[jax.Array, tuple[int, ...]]:
    """w with its group axis split into (groups, group), and the axes over which one scale holds."""
    if group is None:
        first = len(axes.inputs) if axes.lookup else 0
        return w, tuple(range(first, first + len(axes.outputs if axes.lookup else axes.inputs)))
    axis = group_axis(axes) % w.ndim
    return w.reshape(*w.shape[:axis], -1, group, *w.shape[axis + 1 :]), (axis + 1,)


def _unblocked(scale: jax.Array, block_axes: tuple[int, ...], group: int | None) -> jax.Array:
    """One scale per block, with the rank of the weight."""
    return scale if group is None else jnp.squeeze(scale, block_axes)
