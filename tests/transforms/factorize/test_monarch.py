"""Monarch matrices against the paper's products of sparse matrices, and what the verb saves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from effjax.cost import flops
from effjax.cost.memory import stored_bytes
from effjax.data.batch import Batch
from effjax.errors import ConfigError
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.ops.structured.monarch import near_root
from effjax.select.decoder_flops import weight_flops
from effjax.select.hardware_flops import hardware_forward_flops, hardware_training_flops
from effjax.training.objective import language_model_objective
from effjax.training.optimizer import OptimizerConfig, optimizer
from effjax.training.step import train_state, train_step
from effjax.transforms.factorize.monarch import monarch
from effjax.weights import Axes, Monarch, einsum, take

SQUARE = Axes(("embed",), ("embed",))
HEADS = Axes(("heads", "head"), ("embed",), ("layers",))


def project(w, axes=SQUARE, **options):
    """The verb on one weight."""
    return monarch({"w": jnp.asarray(w)}, {"w": axes}, **options)["w"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def paper(right, left):
    """M = P L P^T R of m x m blocks: block-diagonal factors and the transposing permutation."""
    m = len(right)
    P = np.eye(m * m)[np.arange(m * m).reshape(m, m).T.ravel()]
    return P @ scipy.linalg.block_diag(*left) @ P.T @ scipy.linalg.block_diag(*right)


def of_blocks(right, left):
    """The leaf whose blocks they are."""
    m = len(right)
    return Monarch(
        jnp.asarray(right.transpose(0, 2, 1).reshape(m * m, m, 1)),
        jnp.asarray(left.transpose(2, 1, 0).reshape(m, 1, m * m)),
    )


def check_paper(w, right, left):
    """The leaf is the paper's matrix, which multiplies columns from the left."""
    np.testing.assert_allclose(w.materialize().T, paper(right, left), rtol=1e-5, atol=1e-6)


def test_the_dense_form_is_the_papers():
    right, left = normal(2, 4, 4, 4)
    check_paper(of_blocks(right, left), right, left)


def test_the_law_of_the_dense_form_catches_a_lost_permutation():
    right, left = normal(2, 4, 4, 4)
    with pytest.raises(AssertionError):
        check_paper(of_blocks(right, left.transpose(1, 0, 2)), right, left)


def check_recovery(w, **options):
    made = project(w, **options)
    assert np.abs(made.materialize() - w).max() <= 1e-5 * np.abs(w).max()


@pytest.mark.parametrize(("blocks", "rank"), [((4, 4), 1), ((2, 8), 2), ((1, 4), 3)])
def test_a_true_monarch_matrix_is_recovered(blocks, rank):
    K, L = blocks
    true = Monarch(jnp.asarray(normal(16, L, rank)), jnp.asarray(normal(K, rank, 16)))
    check_recovery(np.asarray(true.materialize()), blocks=blocks, rank=rank)


def test_hadamards_matrix_is_a_monarch_matrix_and_noise_is_not():
    check_recovery(scipy.linalg.hadamard(16).astype(np.float32), blocks=4)
    with pytest.raises(AssertionError):
        check_recovery(normal(16, 16), blocks=4)


def check_nearest(w, made, rank):
    """The squared error is what the singular values of each block leave out."""
    (K, L), (D, F) = (made.left.shape[0], made.right.shape[-2]), w.shape
    blocks = w.reshape(K, D // K, F // L, L).transpose(0, 3, 1, 2)
    left_out = np.linalg.svd(blocks.astype(np.float64), compute_uv=False)[..., rank:]
    error = np.linalg.norm(np.asarray(made.materialize()) - w)
    np.testing.assert_allclose(error, np.sqrt((left_out**2).sum()), rtol=1e-5)


def test_the_projection_is_the_nearest():
    w = normal(12, 20)
    for blocks, rank in (([3, 4], 1), ([2, 5], 3)):
        made = project(w, blocks=blocks, rank=rank)
        check_nearest(w, made, rank)
        with pytest.raises(AssertionError):
            check_nearest(w, made.replaced(left=0.9 * made.left), rank)


def test_blocks_of_full_rank_are_the_matrix():
    check_recovery(normal(12, 12), blocks=3, rank=4)


def test_the_default_blocks_are_near_the_root():
    sizes = {1: 1, 2: 2, 7: 7, 12: 4, 16: 4, 128: 16, 512: 32, 768: 32, 3072: 64}
    assert {n: near_root(n) for n in sizes} == sizes
    for n in (64, 256, 1024):
        made = jax.eval_shape(project, jax.ShapeDtypeStruct((n, n), jnp.float32))
        assert made.multiply_adds == 2 * n * int(n**0.5)
        x = jax.ShapeDtypeStruct((1, n), jnp.float32)
        counted = flops.count(partial(einsum, "bd,df->bf"), x, made)
        assert counted.total == 2 * made.multiply_adds


def test_heads_and_rows_keep_their_axes():
    made = project(normal(2, 2, 4, 12), HEADS, blocks=[4, 3], rank=2)
    assert made.shape == (2, 2, 4, 12)
    assert made.right.shape == (2, 2, 4, 3, 2)
    assert made.left.shape == (2, 4, 2, 12)
    ids = jnp.array([[0, 9], [15, 16]])
    table = project(normal(16, 8), blocks=4)
    rows = take(table, ids)
    np.testing.assert_allclose(rows[0], table.materialize()[jnp.array([0, 9])], rtol=1e-5)
    assert np.isnan(rows[1, 1]).all()


@pytest.mark.parametrize("blocks", [None, 4])
def test_a_fresh_models_spread_is_kept(blocks):
    w = normal(64, 256) / 8
    made = project(w, blocks=blocks, keep_norm=True)
    np.testing.assert_allclose(np.linalg.norm(made.materialize()), np.linalg.norm(w), rtol=1e-5)
    y = einsum("bd,df->bf", jnp.asarray(normal(64, 64, seed=1)), made)
    assert 0.9 < np.std(y) < 1.1
    zero = project(np.zeros((4, 4), np.float32), keep_norm=True)
    assert not zero.materialize().any()


SMALL = DecoderConfig(vocab=32, width=16, hidden=64, layers=2)
WHERE = "stack/**/kernel"


def small(evaluate):
    """The parameters of a small decoder, as shapes or as arrays, the same as Monarch, and axes."""
    init, _, axes_of = decoder(SMALL)
    params = evaluate(init, jax.random.key(0))
    axes = axes_of(params)
    return params, evaluate(partial(monarch, axes=axes, where=WHERE, keep_norm=True), params), axes


def test_a_model_gets_smaller_and_says_so():
    """Bytes and FLOPs of the programs are those of the factors, forward and in a training step."""
    params, made, axes = small(jax.eval_shape)
    assert stored_bytes(made) < 0.6 * stored_bytes(params)
    assert weight_flops(SMALL, made) < 0.6 * weight_flops(SMALL)
    apply = decoder(SMALL).apply
    tokens = jax.ShapeDtypeStruct((3, 8), jnp.int32)
    counted = flops.count(lambda p, ids: apply(p, ids)[0], made, tokens)
    assert counted.total == hardware_forward_flops(SMALL, 3, 8, aligned=True, params=made)
    rule = optimizer(OptimizerConfig(), 10, made, axes)
    state = jax.eval_shape(lambda p: train_state(p, axes, rule, jax.random.key(0)), made)
    for remat in ("none", "dots"):
        objective = language_model_objective(SMALL, remat=None if remat == "none" else remat)
        counted = flops.count(train_step(objective, rule), state, Batch(*[tokens] * 4))
        closed = hardware_training_flops(SMALL, 3, 8, params=made, remat=remat)
        assert counted.total == closed


@pytest.mark.deep
def test_a_model_of_monarch_weights_learns():
    _, made, axes = small(lambda f, x: jax.jit(f)(x))
    objective = language_model_objective(SMALL)
    rule = optimizer(OptimizerConfig(learning_rate=1e-2, warmup=0), 20, made, axes)
    state = train_state(made, axes, rule, jax.random.key(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(8)[None], (2, 8))
    batch = Batch(ids[:, :-1], ids[:, 1:], positions, jnp.zeros_like(positions))
    step, losses = jax.jit(train_step(objective, rule)), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((12, 12), {"blocks": 5}, "blocks must divide the 12 inputs, got 5; near: 4, 6"),
        ((12, 10), {"blocks": [4, 4]}, "blocks must divide the 10 outputs, got 4; near: 2, 5"),
        ((12, 12), {"blocks": [3]}, "blocks must be a number or two"),
        ((12, 12), {"blocks": 24}, r"blocks must be an integer from 1 to 12 \(inputs\), got 24"),
        ((12, 12), {"blocks": True}, "blocks must be a number or two, got True"),
        ((12, 12), {"blocks": [2.0, 2]}, "blocks must be an integer"),
        ((7, 12), {}, "7 inputs have no divisor but 1 and 7, give blocks"),
        ((12, 12), {"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ((12, 12), {"rank": 4}, r"rank .* at most 3 \(blocks of 3 inputs and 3 outputs\), got 4"),
    ],
)
def test_what_does_not_divide_is_refused(shape, arguments, message):
    with pytest.raises(ConfigError, match=f"monarch.*{message}"):
        project(np.ones(shape, np.float32), **arguments)
