"""Sampling draws from the distribution that it says, and its limits are what they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from effjax.errors import ConfigError
from effjax.inference.sampling import SamplingConfig, restrict, sample

V, DRAWS, SEEDS = 8, 4000, 20
LOGITS = np.log(np.array([0.21, 0.02, 0.3, 0.05, 0.12, 0.15, 0.05, 0.1]))


def enumerated(logits, temperature=1.0, top_k=None, top_p=1.0):
    """The distribution by its definition, a token at a time, in float64."""
    weights = np.exp(np.asarray(logits, np.float64) / temperature)
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:top_k]
    total, reached, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if not kept or reached < top_p:
            kept.append(i)
        reached += weights[i] / total
    chosen = np.zeros(len(weights))
    chosen[kept] = weights[kept]
    return chosen / chosen.sum()


def drawn(config, seed):
    """How often each token is drawn."""
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (DRAWS, V))
    tokens = sample(logits, jax.random.key(seed), config)
    return np.bincount(np.asarray(tokens), minlength=V)


def p_value(counts, probabilities):
    """Of a chi-square test; 0 where a token was drawn that has no probability."""
    live = probabilities > 0
    if counts[~live].any():
        return 0.0
    return stats.chisquare(counts[live], DRAWS * probabilities[live]).pvalue


def p_values(config, probabilities):
    return np.array([p_value(drawn(config, seed), probabilities) for seed in range(SEEDS)])


def fits(values):
    return values.min() >= 1e-4 and (values < 0.05).sum() <= 3


CONFIGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "all": {"temperature": 1.7, "top_k": 5, "top_p": 0.8},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_come_as_often_as_they_should(name):
    options = {"temperature": 1.0, **CONFIGS[name]}
    assert fits(p_values(SamplingConfig(**options), enumerated(LOGITS, **options)))


@pytest.mark.parametrize(
    "wrong", [{"top_p": 0.8}, {"top_k": 4}, {"temperature": 1.1}, {"top_k": 3, "top_p": 0.5}]
)
def test_the_sampling_law_catches_a_neighbouring_distribution(wrong):
    options = {"temperature": 1.0, "top_k": 3}
    other = enumerated(LOGITS, **{**options, "top_k": None, **wrong})
    assert fits(p_values(SamplingConfig(**options), enumerated(LOGITS, **options)))
    assert not fits(p_values(SamplingConfig(**options), other))


def kept(logits, **options):
    """Which tokens stay possible."""
    config = SamplingConfig(**{"temperature": 1.0, **options})
    scores = np.asarray(restrict(jnp.asarray(logits, jnp.float32)[None], config)[0])
    assert not np.isnan(scores).any()
    return np.flatnonzero(scores > -np.inf).tolist()


def test_top_k_keeps_exactly_k_the_lower_ids_among_equals():
    logits = [1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0, 2.0]
    assert kept(logits, top_k=1) == [1]
    assert kept(logits, top_k=2) == [1, 3]
    assert kept(logits, top_k=4) == [1, 2, 3, 4]
    for k in (V, V + 1, 10_000):
        assert kept(logits, top_k=k) == list(range(V))
    assert kept(np.zeros(V), top_k=3) == [0, 1, 2]


def test_top_p_keeps_the_fewest_that_reach_it():
    assert kept(LOGITS, top_p=0.0) == [2]
    assert kept(LOGITS, top_p=1e-9) == [2]
    assert kept(LOGITS, top_p=0.29) == [2]
    assert kept(LOGITS, top_p=0.31) == [0, 2]
    assert kept(LOGITS, top_p=0.9) == [0, 2, 3, 4, 5, 7]
    assert kept(LOGITS, top_p=1.0) == list(range(V))
    assert kept(np.zeros(V), top_p=0.3) == [0, 1, 2]
    assert kept(np.zeros(V), top_p=0.25) == [0, 1]  # exactly reached


def test_top_p_acts_on_what_top_k_left():
    # Of 0.3 and 0.21 alone the first has 0.59.
    assert kept(LOGITS, top_k=2, top_p=0.55) == [2]
    assert kept(LOGITS, top_k=2, top_p=0.6) == [0, 2]


def test_top_p_of_one_keeps_a_tail_that_rounding_would_cut():
    logits = np.concatenate([np.zeros(60_000), np.full(5, -25.0)])
    assert len(kept(logits)) == len(kept(logits, top_k=logits.size)) == logits.size


def test_a_temperature_of_zero_is_the_first_of_the_best():
    config = SamplingConfig(top_k=5, top_p=0.9)
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -3.0, -2.0, -0.5]])
    for seed in range(3):
        assert sample(logits, jax.random.key(seed), config).tolist() == [1, 0, 3]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300])
@pytest.mark.parametrize("size", [1.0, 1e30])
def test_a_tiny_temperature_is_greedy(temperature, size):
    logits = size * jnp.asarray(LOGITS, jnp.float32)
    config = SamplingConfig(temperature=temperature)
    scores = np.asarray(restrict(logits[None], config))
    assert scores.argmax() == 2
    assert scores[0, 2] == 0
    assert np.exp(scores).sum() == 1
    tokens = sample(jnp.tile(logits, (100, 1)), jax.random.key(0), config)
    assert set(tokens.tolist()) == {2}


def test_a_huge_temperature_is_uniform():
    assert fits(p_values(SamplingConfig(temperature=1e30), np.full(V, 1 / V)))


def test_a_top_k_of_one_is_greedy_at_any_temperature():
    config = SamplingConfig(temperature=50.0, top_k=1)
    assert drawn(config, 0)[2] == DRAWS


def test_excluded_logits_stay_excluded():
    logits = np.where(np.arange(V) < 3, -np.inf, LOGITS)
    assert kept(logits) == kept(logits, top_k=7, top_p=0.999999) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_logits_are_restricted_in_float32(dtype):
    logits = jnp.asarray(LOGITS, dtype)[None]
    scores = restrict(logits, SamplingConfig(temperature=0.5, top_p=0.9))
    assert scores.dtype == jnp.float32


def test_the_same_key_draws_the_same_tokens():
    config = SamplingConfig(temperature=1.0, top_p=0.9)
    first, again, other = (drawn_tokens(config, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def drawn_tokens(config, seed):
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (DRAWS, V))
    return np.asarray(sample(logits, jax.random.key(seed), config))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -1e-6}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.0001}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(options, field):
    with pytest.raises(ConfigError, match=rf"SamplingConfig\.{field} must be"):
        SamplingConfig(**options)
