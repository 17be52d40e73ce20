"""Generation: ragged prompts, pieces and keys on a model whose text depends on every token's place,
and what decoding keeps in memory on a real one."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost.memory import stored_bytes
from effjax.errors import ConfigError
from effjax.inference.generate import continue_prompts, decoding_form, generate, pad_prompts
from effjax.inference.sampling import SamplingConfig
from effjax.models import AttentionConfig, DecoderConfig, decoder

V = 64
PROMPTS = [[5, 9, 60, 3, 3, 8, 1], [17], [4, 40, 4]]
TABLE = np.random.default_rng(0).standard_normal((V, V)).astype(np.float32)
PARAMS = {
    "embed": {"weight": jnp.asarray(TABLE)},
    "stack": {"runs": {"000": jnp.zeros((1, 1))}},
}


def hashing(params, *args, method="__call__", positions=None, segments=None, state=None):
    """A language model whose logits depend on a hash of every live token and its position."""
    if method == "init_state":
        return jnp.zeros(args[0], jnp.int32)

    def token(state, scanned):
        token, position = scanned
        mixed = (31 * state + 7 * token + 3 * position + 1) % V
        live = position >= 0
        # What stands at padding is nobody's business, so it is not the row's last logits either.
        return jnp.where(live, mixed, state), jnp.where(live, mixed, 0)

    state, states = jax.lax.scan(token, state, (args[0].T, positions.T))
    return jnp.take(params["embed"]["weight"], states.T, axis=0), state, {}


def by_hand(prompt, new_tokens):
    """The greedy continuation, a token at a time."""
    state, made, text = 0, [], list(prompt)
    for position in range(len(prompt) + new_tokens - 1):
        state = (31 * state + 7 * text[position] + 3 * position + 1) % V
        if position >= len(prompt) - 1:
            made.append(int(TABLE[state].argmax()))
            text.append(made[-1])
    return made


def test_prompts_of_unequal_length_each_give_what_they_give_alone():
    made = generate(hashing, PARAMS, PROMPTS, 5)
    assert made.shape == (3, 5)
    assert made.dtype == np.int32
    assert made.tolist() == [by_hand(prompt, 5) for prompt in PROMPTS]
    for prompt, row in zip(PROMPTS, made, strict=True):
        assert generate(hashing, PARAMS, [prompt], 5)[0].tolist() == row.tolist()
    assert len({tuple(row) for row in made.tolist()}) == 3


def test_the_law_catches_padding_that_counts():
    def forgetful(params, *args, positions=None, **options):
        if positions is not None:
            positions = jnp.maximum(positions, 0)
        return hashing(params, *args, positions=positions, **options)

    made = generate(forgetful, PARAMS, PROMPTS, 5).tolist()
    assert made[0] == by_hand(PROMPTS[0], 5)
    assert made[1] != by_hand(PROMPTS[1], 5)


@pytest.mark.parametrize("piece", [1, 3, 7, 8, None])
@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(1.0, 20, 0.9)])
def test_prompts_read_in_pieces_give_the_same_text(piece, sampling):
    options = {"sampling": sampling, "key": jax.random.key(4)}
    whole = generate(hashing, PARAMS, PROMPTS, 5, **options)
    assert (generate(hashing, PARAMS, PROMPTS, 5, piece=piece, **options) == whole).all()


def test_one_token_is_enough_and_one_can_be_asked_for():
    assert generate(hashing, PARAMS, [[17]], 1).tolist() == [by_hand([17], 1)]
    assert generate(hashing, PARAMS, np.array([[17]]), 5).tolist() == [by_hand([17], 5)]


def test_the_same_key_gives_the_same_text_and_another_another():
    draw = partial(generate, hashing, PARAMS, PROMPTS, 5, sampling=SamplingConfig(1.0))
    first, again, other = (draw(key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_each_new_token_has_a_key_of_its_own():
    flat = SamplingConfig(1e9)
    made = generate(hashing, PARAMS, PROMPTS, 5, sampling=flat, key=jax.random.key(1))
    assert all(len(set(row)) >= 4 for row in made.tolist())
    assert len({tuple(row) for row in made.tolist()}) == 3


def test_greedy_text_needs_no_key():
    key = jax.random.key(8)
    assert (
        generate(hashing, PARAMS, PROMPTS, 5) == generate(hashing, PARAMS, PROMPTS, 5, key=key)
    ).all()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least 1 prompt, got none"),
        ([[1], []], {}, "at least 1 token, prompt 1 is empty"),
        ([[1, V]], {}, "prompt 0, index 1: token id 64 is outside the vocabulary, wanted 0 to 63"),
        ([[2], [-1]], {}, "prompt 1, index 0: token id -1 is outside"),
        ([[1]], {"new_tokens": 0}, "new_tokens must be at least 1, got 0"),
        ([[1]], {"new_tokens": -3}, "new_tokens must be at least 1, got -3"),
        ([[1]], {"piece": 0}, "piece must be at least 1 token, got 0"),
        ([[1]], {"piece": -1}, "piece must be at least 1 token, got -1"),
        ([[1]], {"sampling": SamplingConfig(0.5)}, "temperature=0.5 draws tokens and needs a key"),
    ],
)
def test_what_cannot_be_continued_is_refused(prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(hashing, PARAMS, prompts, **{"new_tokens": 2, **options})


def test_prompts_are_padded_behind():
    tokens, positions = pad_prompts([[3, 4], [5]], vocab=6)
    assert tokens.tolist() == [[3, 4], [5, 0]]
    assert positions.tolist() == [[0, 1], [0, -1]]
    assert tokens.dtype == positions.dtype == np.int32


# Real models


MODEL = DecoderConfig(
    vocab=V,
    width=8,
    hidden=8,
    layers=8,
    attention=AttentionConfig(heads=2, head_dim=16),
)


def drawn(config):
    shapes = jax.eval_shape(decoder(config).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: jnp.asarray(0.3 * rng.standard_normal(v.shape), v.dtype), shapes)


def test_the_form_for_decoding_is_the_same_model_and_keeps_its_text():
    config = replace(MODEL, layers=2)
    params, apply = drawn(config), decoder(config).apply
    split = decoding_form(params)
    assert sorted(split["stack"]["runs"]) == ["000", "001"]
    options = {"new_tokens": 4, "sampling": SamplingConfig(), "piece": 7}
    tokens, positions = pad_prompts(PROMPTS, vocab=V)
    texts = [
        np.asarray(continue_prompts(apply, form, tokens, positions, jax.random.key(0), **options))
        for form in (params, split)
    ]
    assert (texts[0] == texts[1]).all()
    deep = jax.eval_shape(decoder(replace(MODEL, layers=33)).init, jax.random.key(0))
    assert decoding_form(deep) is deep


B, LENGTH = 8, 1024


def temporaries(program, *args, **options):
    """Bytes of temporaries of a compiled program that holds one state of its own."""
    analysis = program.lower(*args, **options).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def test_decoding_copies_no_cache():
    """All of a generation's temporaries: the cache, and less than half of it beside."""
    init, apply, _ = decoder(MODEL)
    params = jax.eval_shape(init, jax.random.key(0))
    state = jax.eval_shape(lambda p: apply(p, B, LENGTH, 8, method="init_state"), params)
    cache = stored_bytes(state)
    assert cache > 8 * B * LENGTH * 2 * 2 * 16 * 4
    prompt = jax.ShapeDtypeStruct((B, 8), jnp.int32)
    options = {"new_tokens": LENGTH - 8, "sampling": SamplingConfig(), "piece": 8}
    used = temporaries(
        continue_prompts, apply, params, prompt, prompt, jax.random.key(0), **options
    )
    assert cache <= used < 1.5 * cache


def test_the_memory_law_catches_a_cache_that_is_scanned_over():
    """The same loop with layer states as inputs and outputs of the scan over layers."""
    size = (8, B, LENGTH, 64)

    def decode(cache, i):
        def layer(x, slots):
            slots = jax.lax.dynamic_update_index_in_dim(slots, x, i, 1)
            return x + slots.sum(1), slots

        return jax.lax.scan(layer, jnp.ones((B, 64)), cache)[::-1]

    @jax.jit
    def program():
        return jax.lax.scan(decode, jnp.zeros(size), jnp.arange(LENGTH))[1]

    assert temporaries(program) > 1.5 * 4 * np.prod(size)
