"""The laws of losses (closed forms, shifts, masks, huge logits) on next-token prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from effjax.errors import ConfigError
from effjax.objectives import bits, causal_lm, mean_loss

B, T, V = 2, 7, 5
jitted = jax.jit(causal_lm, static_argnames=("z", "smoothing"))


@jax.jit
def with_gradient(logits, targets):
    return jax.value_and_grad(causal_lm, has_aux=True)(logits, targets)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, (B, T))
    targets[0, 2:4] = -1
    targets[1, 0] = -7
    return jnp.asarray(rng.normal(size=(B, T, V)), jnp.float32), jnp.asarray(targets, jnp.int32)


def reference(logits, targets, z=0.0, smoothing=0.0):
    """One token at a time, in float64."""
    total, count = 0.0, 0
    for h, target in zip(
        np.asarray(logits, np.float64).reshape(-1, V), targets.ravel(), strict=True
    ):
        if target >= 0:
            log_partition = np.log(np.exp(h).sum())
            goal = (1 - smoothing) * np.eye(V)[target] + smoothing / V
            total += log_partition - goal @ h + z * log_partition**2
            count += 1
    return total, count


@pytest.mark.parametrize("options", [{}, {"z": 0.1, "smoothing": 0.2}])
def test_equals_one_token_at_a_time_in_float64(batch, options):
    total, count = jitted(*batch, **options)
    want, tokens = reference(*batch, **options)
    np.testing.assert_allclose(total, want, rtol=1e-6)
    assert count == tokens == 11
    assert total > 1


def test_zero_logits_cost_ln_of_the_vocabulary(batch):
    total, count = jitted(jnp.zeros((B, T, V)), batch[1])
    np.testing.assert_allclose(mean_loss(total, count), np.log(V), rtol=1e-6)


def test_a_constant_added_to_the_logits_changes_nothing(batch):
    logits, targets = batch
    shifted, _ = jitted(logits + 100.0, targets)
    np.testing.assert_allclose(shifted, jitted(logits, targets)[0], rtol=1e-5)


def test_huge_logits_are_finite_and_a_certain_token_is_free():
    targets = jnp.array([[0, 1]])
    logits = jnp.full((1, 2, V), -1e30).at[0, [0, 1], [0, 1]].set(1e30)
    (total, _), gradient = with_gradient(logits, targets)
    assert total == 0
    assert (gradient == 0).all()
    (total, _), gradient = with_gradient(1e4 * logits / 1e30, targets + 1)
    np.testing.assert_allclose(total, 4e4)
    assert jnp.isfinite(gradient).all()


def test_gradient_is_softmax_minus_one_hot(batch):
    logits, targets = batch
    (_, _), gradient = with_gradient(logits, targets)
    want = (jax.nn.softmax(logits) - jax.nn.one_hot(targets, V)) * (targets >= 0)[..., None]
    np.testing.assert_allclose(gradient, want, atol=1e-6)
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(logits), jnp.float64)
        loss = jax.jit(lambda h: causal_lm(h, targets, z=0.1, smoothing=0.2)[0])
        check_grads(loss, (wide,), order=1, modes=["rev"], rtol=1e-6)


def test_masked_is_removed_whatever_its_logits_hold(batch):
    """Masked tokens may as well not be there: NaN in their logits reaches nothing."""
    logits, targets = batch
    (total, count), gradient = with_gradient(logits, targets)
    poisoned = jnp.where((targets >= 0)[..., None], logits, jnp.nan)
    (other, same), other_gradient = with_gradient(poisoned, targets)
    assert (total, count) == (other, same)
    assert (gradient == other_gradient).all()
    live = np.asarray(targets) >= 0
    kept = jitted(logits[live][None], targets[live][None])
    np.testing.assert_allclose(kept[0], total, rtol=1e-6)


def test_everything_masked_is_zero_with_zero_gradients(batch):
    logits = batch[0].at[0].set(jnp.nan)
    (total, count), gradient = with_gradient(logits, jnp.full((B, T), -1))
    assert (total, count, mean_loss(total, count)) == (0, 0, 0)
    assert (gradient == 0).all()
    assert jax.grad(lambda s: mean_loss(s, jnp.array(0)))(0.0) == 1  # and no NaN from 0 / 0


def test_parts_add_to_the_whole(batch):
    logits, targets = batch
    parts = [jitted(logits[i : i + 1], targets[i : i + 1]) for i in range(B)]
    total, count = (sum(p) for p in zip(*parts, strict=True))
    whole = jitted(logits, targets)
    np.testing.assert_allclose(total, whole[0], rtol=1e-6)
    assert count == whole[1]
    unequal = np.mean([mean_loss(*p) for p in parts])
    assert abs(unequal - mean_loss(*whole)) > 1e-3, "a mean of means would be another number"


def test_a_target_past_the_vocabulary_is_not_a_number(batch):
    assert jnp.isnan(jitted(batch[0], batch[1].at[0, 0].set(V))[0])


def test_bfloat16_logits_are_summed_in_float32():
    """4096 equal logits: in bfloat16 the sum of their exponentials stops at 256."""
    logits = jnp.zeros((1, 1, 4096), jnp.bfloat16)
    total, _ = jitted(logits, jnp.zeros((1, 1), jnp.int32))
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, np.log(4096), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z": -1.0}, "z must be finite and at least 0, got -1.0"),
        ({"z": float("nan")}, "z must be finite and at least 0, got nan"),
        ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1, got 1.0"),
        ({"smoothing": float("nan")}, "smoothing must be .* got nan"),
    ],
)
def test_options_out_of_range_are_refused(batch, options, message):
    with pytest.raises(ConfigError, match=message):
        causal_lm(*batch, **options)


def test_bits_are_nats_over_ln_2():
    np.testing.assert_allclose(bits(jnp.log(jnp.array(256.0))), 8, rtol=1e-6)
    assert bits(np.log(2.0)) == 1


def test_catches_a_mask_applied_after_the_loss(batch):
    """The mutant hides masked losses, but their gradients are 0 times NaN."""

    @jax.value_and_grad
    def mutant(logits, targets):
        picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=-1) - picked, 0).sum()

    logits, targets = batch
    poisoned = jnp.where((targets >= 0)[..., None], logits, jnp.nan)
    total, gradient = mutant(poisoned, targets)
    np.testing.assert_allclose(total, jitted(logits, targets)[0], rtol=1e-6)
    assert jnp.isnan(gradient).any()
