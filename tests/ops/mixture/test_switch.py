"""What is Switch's own: capacity, the order of slots, jitter, z-loss, blocks of the dropless form.

The laws that it shares with other mixtures are in tests/laws/test_mixtures.py.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.errors import ConfigError
from effjax.ops.mixture.switch import (
    balance_loss,
    block_rows,
    capacity,
    combine,
    dispatch,
    dropless,
    dropless_blocks,
    route,
    router_logits,
    router_statistics,
    z_loss,
)

routed = jax.jit(route, static_argnums=2)
summed = jax.jit(router_statistics)


def scores(experts, choices):
    """Logits that send each token to the expert named."""
    return 3.0 * jax.nn.one_hot(jnp.array(choices), experts)


@pytest.mark.parametrize(
    ("length", "experts", "factor", "slots"),
    [
        (8, 4, 1.0, 2),
        (7, 4, 1.0, 2),
        (100, 10, 1.1, 11),  # exactly, though 1.1 is a little more in binary
        (1, 8, 1.0, 1),
        (8, 4, 1e-9, 1),
        (8, 4, 100.0, 8),
    ],
)
def test_capacity_rounds_up_and_stays_between_one_and_the_row(length, experts, factor, slots):
    assert capacity(length, experts, factor) == slots


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_capacity_refuses_a_factor_out_of_range(factor):
    with pytest.raises(ConfigError, match=f"factor must be finite and above 0, got {factor}"):
        capacity(8, 4, factor)
    with pytest.raises(ConfigError, match="experts must be at least 1, got 0"):
        capacity(8, 0, 1.0)


def test_slots_go_in_order_along_the_row_and_padding_takes_none():
    live = jnp.array([[True, False, True, True, True]])
    routing = routed(scores(2, [[1, 1, 1, 0, 1]]), live, 2)
    assert np.asarray(routing.slot)[np.asarray(live)].tolist() == [0, 1, 0, 2]
    assert routing.kept.tolist() == [[True, False, True, True, False]]
    gate = np.exp(3) / (np.exp(3) + 1)
    np.testing.assert_allclose(np.asarray(routing.gate)[np.asarray(live)], gate, rtol=1e-6)
    np.testing.assert_allclose(routing.log_partition[0, 0], np.log(np.exp(3) + 1), rtol=1e-6)


def test_positions_decide_the_order_of_a_permuted_row():
    """Two packed documents, tokens shuffled: the same tokens are kept as before the shuffle."""
    rng = np.random.default_rng(0)
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, -1]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    logits = jnp.asarray(rng.normal(size=(1, 8, 2)), jnp.float32)
    order = rng.permutation(8)
    plain = routed(logits, positions >= 0, 2)
    shuffled = routed(
        logits[:, order],
        positions[:, order] >= 0,
        2,
        positions=positions[:, order],
        segments=segments[:, order],
    )
    assert (shuffled.kept == plain.kept[:, order]).all()
    assert 0 < plain.kept.sum() < 7
    live = np.asarray(positions >= 0)[0]
    assert (plain.slot[:, live] == shuffled.slot[:, np.argsort(order)][:, live]).all()


def test_in_a_packed_row_later_documents_get_what_is_left():
    """Three tokens of one document fill the expert; with as many slots as tokens all are served."""
    logits, live = scores(2, [[0, 0, 0, 0, 0]]), jnp.ones((1, 5), bool)
    assert routed(logits, live, 3).kept.tolist() == [[True, True, True, False, False]]
    assert routed(logits, live, 5).kept.all()


def test_equal_scores_go_to_the_first_expert():
    routing = routed(jnp.zeros((1, 5, 2)), jnp.ones((1, 5), bool), 2)
    assert (routing.expert == 0).all()
    np.testing.assert_allclose(routing.gate, 0.5)


def test_the_router_works_in_float32_on_bfloat16_activations():
    x = jnp.full((1, 1, 4096), 1 + 2**-7, jnp.bfloat16)
    live = jnp.ones((1, 1), bool)
    logits = router_logits(x, jnp.full((4096, 2), 1.0), live)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, 4096 * (1 + 2**-7), rtol=1e-6)

    def layer(x, logits):
        routing = route(logits, live, 1)
        return routing.gate, combine(dispatch(x, routing, 2, 1), routing)

    gate, y = jax.eval_shape(layer, x, logits.astype(jnp.bfloat16))
    assert (gate.dtype, y.dtype) == (jnp.float32, jnp.bfloat16)


def test_jitter_multiplies_the_input_within_its_range():
    x, live = jnp.full((1, 64, 1), 2.0), jnp.ones((1, 64), bool)
    logits = functools.partial(router_logits, x, jnp.ones((1, 1)), live, noise=0.1)
    noisy = logits(key=jax.random.key(0))
    assert noisy.std() > 0.05
    assert (abs(noisy - 2) <= 0.2).all()
    assert (noisy == logits(key=jax.random.key(0))).all()
    assert (logits() == 2).all()


def test_statistics_count_drops_and_padding_apart():
    live = jnp.array([[True, True, True, False], [True, True, False, False]])
    routing = routed(scores(2, [[0, 0, 0, 0], [1, 0, 0, 0]]), live, 2)
    statistics = summed(routing, live)
    assert statistics.tokens.tolist() == [3, 2]
    assert statistics.dropped.tolist() == [1, 0]
    assert statistics.assigned.tolist() == [[3, 0], [1, 1]]
    np.testing.assert_allclose(statistics.probability.sum(-1), statistics.tokens, rtol=1e-6)


@pytest.mark.parametrize("slots", [1, 4])
def test_more_capacity_drops_fewer(slots):
    kept = routed(scores(2, [[0, 0, 0, 0, 0, 0, 1, 1]]), jnp.ones((1, 8), bool), slots).kept.sum()
    assert kept == min(6, slots) + min(2, slots)


@jax.jit
def losses_with_gradient(logits, live):
    """Balance and z losses of a batch, and the gradient of the z-loss."""

    def both(h):
        rows = router_statistics(route(h, live, 3), live)
        batch = jax.tree.map(lambda s: s.sum(0), rows)
        return balance_loss(batch), z_loss(batch)

    return both(logits), jax.grad(lambda h: both(h)[1])(logits)


def test_z_loss_gradient_is_its_formula():
    """d/dh of mean(lse^2) = 2 lse softmax / N."""
    logits = np.random.default_rng(0).normal(size=(2, 3, 4))
    (_, z), gradient = losses_with_gradient(jnp.asarray(logits), jnp.ones((2, 3), bool))
    exponentials = np.exp(logits)
    total = exponentials.sum(-1, keepdims=True)
    want = 2 * np.log(total) * exponentials / total / 6
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(z, (np.log(total) ** 2).mean(), rtol=1e-6)


def test_losses_without_a_live_token_are_zero_with_zero_gradients():
    dead = jnp.zeros((2, 3), bool)
    (balance, z), gradient = losses_with_gradient(jnp.full((2, 3, 4), jnp.nan), dead)
    assert balance == z == 0
    assert (gradient == 0).all()


def test_every_row_or_layer_has_its_own_loss():
    live = jnp.ones((2, 4), bool)
    losses = balance_loss(summed(routed(scores(2, [[0] * 4, [0, 1] * 2]), live, 2), live))
    assert losses[0] > 1.5
    np.testing.assert_allclose(losses[1], 1, rtol=1e-6)


def test_moving_rows_is_its_own_inverse_to_second_order():
    """Gradients of gradients go through the same two gathers."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 5, 3)), jnp.float32)
    routing = routed(scores(2, [[0, 0, 0, 1, 0]]), jnp.ones((1, 5), bool), 2)

    def energy(x):
        return (combine(dispatch(x, routing, 2, 2), routing) ** 3).sum()

    hessian = jax.jit(jax.jacrev(jax.jacrev(energy)))(x)
    gates = np.where(routing.kept, routing.gate, 0)[0]
    want = np.einsum("t,td->td", 6 * gates**3, np.asarray(x[0]))
    np.testing.assert_allclose(np.einsum("tdtd->td", hessian[0, :, :, 0]), want, rtol=1e-5)


def test_rows_stay_on_their_device():
    """Routing, dispatch and combine of a batch that is split over devices exchange nothing."""
    mesh = NamedSharding(Mesh(np.array(jax.devices()[:8]), ("data",)), PartitionSpec("data"))

    @functools.partial(jax.jit, in_shardings=(mesh, mesh, mesh), out_shardings=mesh)
    def loop(x, logits, live):
        routing = route(logits, live, 2)
        return combine(dispatch(x, routing, 2, 2), routing)

    real = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 5, 3), (8, 5, 2))]
    text = loop.lower(*real, jax.ShapeDtypeStruct((8, 5), bool)).compile().as_text()
    for exchange in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert exchange not in text


@pytest.mark.parametrize(("tokens", "experts", "block"), [(1, 4, 8), (3, 4, 2), (7, 2, 3)])
def test_no_load_needs_more_blocks_than_the_bound_and_one_needs_them_all(tokens, experts, block):
    loads = (c for c in itertools.product(range(tokens + 1), repeat=experts) if sum(c) == tokens)
    most = max(sum(-(-n // block) for n in load) for load in loads)
    assert most == dropless_blocks(tokens, experts, block)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 4096])
def test_default_blocks_waste_at_most_half(tokens):
    block = block_rows(tokens, 8)
    assert 1 <= block <= 128
    assert tokens < 16 or dropless_blocks(tokens, 8, block) * block <= 1.5 * tokens


@pytest.mark.parametrize(("tokens", "block"), [(1, None), (7, 1), (7, 3), (7, 64)])
def test_dropless_equals_a_loop_over_tokens_at_any_block(tokens, block):
    rng = np.random.default_rng(tokens)
    x, w = rng.normal(size=(tokens, 3)), rng.normal(size=(4, 3, 3))
    expert, gate = rng.integers(0, 4, tokens), rng.uniform(size=tokens)
    expert[-1] = 3

    @jax.jit
    def apply(x, expert, gate, w):
        return dropless(x, expert, gate, lambda e, rows: rows @ w[e], 4, block)

    got = apply(*(jnp.asarray(a) for a in (x, expert, gate, w)))
    want = np.stack([g * row @ w[e] for row, e, g in zip(x, expert, gate, strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_dropless_keeps_leading_axes_dtype_and_silence_on_padding():
    x = jnp.asarray(np.full((2, 3, 4), np.nan), jnp.bfloat16).at[1].set(1)
    live = jnp.asarray([[False] * 3, [True] * 3])

    @jax.jit
    def apply(x):
        zeros, ones = jnp.zeros((2, 3), int), jnp.ones((2, 3))
        return dropless(x, zeros, ones, lambda e, rows: 2 * rows, 1, live=live)

    y = apply(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (np.asarray(y, np.float32) == 2 * np.asarray(live)[..., None]).all()
