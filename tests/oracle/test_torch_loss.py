"""Next-token loss and its gradient equal torch's cross-entropy with ignore_index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.objectives import causal_lm

pytestmark = pytest.mark.oracle

B, T, V = 3, 17, 29
RANDOM = np.random.default_rng(0)
LOGITS = (4 * RANDOM.standard_normal((B, T, V))).astype(np.float32)
TARGETS = np.where(RANDOM.random((B, T)) < 0.3, -1, RANDOM.integers(0, V, (B, T))).astype(np.int32)


def theirs(torch, smoothing, ignore_index=-1):
    logits = torch.tensor(LOGITS, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, V),
        torch.tensor(TARGETS, dtype=torch.long).reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction="sum",
    )
    loss.backward()
    return float(loss.detach()), logits.grad.numpy()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_torchs(torch, smoothing):
    def ours(logits):
        return causal_lm(logits, jnp.asarray(TARGETS), smoothing=smoothing)

    (loss, count), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(LOGITS)
    wanted, wanted_gradient = theirs(torch, smoothing)
    assert count == (TARGETS >= 0).sum()
    assert 0 < count < B * T
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-6)


def test_the_comparison_catches_a_target_that_is_not_ignored():
    logits, targets = jnp.asarray(LOGITS), jnp.asarray(TARGETS)
    loss, _ = causal_lm(logits, targets)
    counted, _ = causal_lm(logits, jnp.maximum(targets, 0))
    assert abs(float(counted) - float(loss)) > 1
