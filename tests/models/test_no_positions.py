"""Without positions, looking back alone tells a token where it stands."""

import jax
import numpy as np
import pytest

from effjax.models.configs import DecoderConfig, EncoderConfig
from effjax.models.decoder import decoder
from effjax.models.encoder import encoder
from effjax.models.sections import AttentionConfig, PositionConfig

T, ROWS, VOCAB = 32, 96, 16


def hidden(model, build):
    """[L B T D] of random texts behind one first token, in a model that has learned nothing."""
    init, apply, _ = build(model)
    params = jax.jit(init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, VOCAB, (ROWS, T), dtype=np.int32)
    tokens[:, 0] = 0
    aux = jax.jit(lambda p, t: apply(p, t)[2])(params, tokens)
    return np.asarray(aux["stack"]["000"]["attention_00"]["hidden"], np.float64)


def explained(h):
    """Share of the positions' variance that a ridge regression on half of the rows explains."""
    half, width = ROWS // 2, h.shape[-1] + 1
    ones = np.ones((*h.shape[:2], 1))
    seen, unseen = (
        np.concatenate([x, o], axis=-1).reshape(-1, width)
        for x, o in ((h[:half], ones[:half]), (h[half:], ones[half:]))
    )
    at = np.tile(np.arange(T), half).astype(float)
    weight = np.linalg.solve(seen.T @ seen + 1e-2 * half * np.eye(width), seen.T @ at)
    return 1 - np.var(at - unseen @ weight) / np.var(at)


@pytest.mark.parametrize(
    ("build", "config", "low", "high"),
    [(decoder, DecoderConfig, 0.4, 1.0), (encoder, EncoderConfig, -1.0, 0.1)],
    ids=["a decoder does", "an encoder does not"],
)
def test_a_linear_probe_reads_the_position(build, config, low, high):
    """POS-16. Kazemnejad et al. 2023, section 5.1, for the decoder; an encoder cannot tell."""
    model = config(
        vocab=VOCAB,
        width=32,
        hidden=64,
        layers=2,
        attention=AttentionConfig(heads=4),
        position=PositionConfig(scheme="none"),
    )
    for layer in hidden(model, build):
        assert low < explained(layer) < high
