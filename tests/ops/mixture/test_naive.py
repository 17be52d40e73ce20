"""The oracle itself, once, against a loop over tokens in numpy that shares nothing with it."""

import jax
import jax.numpy as jnp
import numpy as np

from effjax.ops.mixture.naive import naive_switch

B, T, D, E, SLOTS = 2, 6, 3, 2, 2


def loop(x, logits, positions, segments, w):
    """Tokens in the order of documents and positions; each takes a slot while there is one."""
    out = np.zeros_like(x)
    for b in range(B):
        used = np.zeros(E, int)
        for t in np.lexsort((positions[b], segments[b])):
            if positions[b, t] < 0:
                continue
            p = np.exp(logits[b, t]) / np.exp(logits[b, t]).sum()
            e = p.argmax()
            if used[e] < SLOTS:
                out[b, t] = p[e] * x[b, t] @ w[e]
            used[e] += 1
    return out


def test_naive_equals_a_loop_over_tokens():
    rng = np.random.default_rng(0)
    x, logits = rng.normal(size=(B, T, D)), rng.normal(size=(B, T, E))
    w = rng.normal(size=(E, D, D))
    positions = np.array([[0, 1, 2, -1, 0, 1], [3, 1, 0, 2, -1, 4]])
    segments = np.array([[1, 1, 1, 0, 2, 2], [1, 1, 1, 1, 0, 1]])
    want = loop(x, logits, positions, segments, w)
    arguments = (jnp.asarray(a, jnp.float32) for a in (x, logits))

    @jax.jit
    def naive(x, logits):
        return naive_switch(
            x,
            logits,
            jnp.asarray(positions >= 0),
            lambda e, rows: rows @ jnp.asarray(w[e], jnp.float32),
            SLOTS,
            positions=jnp.asarray(positions),
            segments=jnp.asarray(segments),
        )

    got = naive(*arguments)
    assert (want == 0).all(-1).sum() > 2, "nothing dropped: vacuous"
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
