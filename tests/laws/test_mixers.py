"""The laws of every mixer and feed-forward network, in a decoder: one table, one set of shapes.

A member is entered by entering `MIXERS` or `FEEDFORWARDS`. All texts are [2, T] tokens, so that each
member compiles once for whole rows and once for each of two piece lengths.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.inference.generate import generate
from effjax.inference.state_size import state_bytes
from effjax.models.configs import (
    AttentionConfig,
    DecoderConfig,
    RetentionConfig,
    StateSpaceConfig,
    SwitchConfig,
    WindowConfig,
)
from effjax.models.decoder import decoder
from effjax.models.feedforwards import FEEDFORWARDS
from effjax.models.mixers import MIXERS

T, PIECE, WINDOW = 22, 7, 5
BASE = DecoderConfig(
    vocab=31,
    width=16,
    hidden=24,
    layers=2,
    attention=AttentionConfig(heads=4, kv_heads=2),
    window=WindowConfig(heads=2, width=WINDOW),
    retention=RetentionConfig(heads=2, value_dim=6, chunk=8),
    state_space=StateSpaceConfig(states=4, chunk=8),
    switch=SwitchConfig(experts=3, capacity_factor=1.0),
)
MEMBERS = {kind: replace(BASE, pattern=(kind,)) for kind in MIXERS} | {
    name: replace(BASE, feedforward=name) for name in FEEDFORWARDS if name != "dense"
}
members = pytest.mark.parametrize("name", MEMBERS)


class Member:
    """A decoder with random parameters, and its programs, compiled once per shape."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        init, self.apply, self.axes_of = decoder(config)
        self.params = jax.jit(init)(jax.random.key(7))
        self.run = jax.jit(self.logits)
        self.step = jax.jit(self.continued)

    def logits(self, params, tokens, positions, segments, key=None):
        return self.apply(params, tokens, positions=positions, segments=segments, key=key)[0]

    def continued(self, params, state, tokens, positions, segments):
        return self.apply(params, tokens, positions=positions, segments=segments, state=state)[:2]

    def row(self, tokens, positions=None, segments=None, key=None):
        positions = np.tile(np.arange(T, dtype=np.int32), (2, 1)) if positions is None else positions
        segments = np.zeros_like(positions) if segments is None else segments
        return np.asarray(self.run(self.params, tokens, positions, segments, key))

    def pieces(self, cuts, tokens, positions, segments):
        state = self.apply(self.params, 2, T, PIECE, method="init_state")
        made = []
        for begin, end in zip(cuts, cuts[1:], strict=False):
            part = slice(begin, end)
            logits, state = self.step(
                self.params, state, tokens[:, part], positions[:, part], segments[:, part]
            )
            made.append(np.asarray(logits))
        return np.concatenate(made, axis=1)


@cache
def member(name: str) -> Member:
    return Member(MEMBERS[name])


def texts(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE.vocab, (2, T), dtype=np.int32)


def plain() -> tuple[np.ndarray, np.ndarray]:
    positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    return positions, np.zeros_like(positions)


def padded(where: str, live: int) -> np.ndarray:
    """Positions of a row with `live` tokens and padding left, right or in the middle."""
    gap = T - live
    at = {"left": 0, "right": live, "middle": live // 2}[where]
    row = np.insert(np.arange(live), at, np.full(gap, -1)).astype(np.int32)
    return np.tile(row, (2, 1))


def packed() -> tuple[np.ndarray, np.ndarray, slice, slice]:
    """Two documents in a row, and where each stands."""
    first = 9
    positions = np.concatenate([np.arange(first), np.arange(T - first)]).astype(np.int32)
    segments = (np.arange(T) >= first).astype(np.int32)
    both = (np.tile(positions, (2, 1)), np.tile(segments, (2, 1)))
    return *both, slice(0, first), slice(first, T)


def close(got, wanted, tolerance=2e-5):
    wanted = np.asarray(wanted)
    assert wanted.std() > 1e-3  # not vacuous
    error = np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max()
    assert error < tolerance, f"relative error {error:.1e}"


@members
def test_a_later_token_changes_no_earlier_logit(name):
    model, tokens = member(name), texts(0)
    before = model.row(tokens)
    for seed, t in ((1, 0), (2, 10), (3, T - 2)):
        changed = np.where(np.arange(T) > t, texts(seed), tokens)
        after = model.row(changed)
        assert np.abs(after - before)[:, : t + 1].max() == 0.0
        assert np.abs(after - before)[:, t + 1 :].max() > 1e-4


@pytest.mark.parametrize("name", ["attention", "switch"])
def test_training_is_causal_too(name):
    model, tokens, key = member(name), texts(0), jax.random.key(3)
    changed = np.where(np.arange(T) > 10, texts(2), tokens)
    difference = np.abs(model.row(changed, key=key) - model.row(tokens, key=key))
    assert difference[:, :11].max() == 0.0
    assert difference[:, 11:].max() > 1e-4


@members
def test_an_earlier_token_changes_every_logit_that_claims_to_see_it(name):
    model, tokens = member(name), texts(0)
    changed = tokens.copy()
    changed[:, 3] = (changed[:, 3] + 1) % BASE.vocab
    moved = np.abs(model.row(changed) - model.row(tokens)).max(axis=(0, 2)) > 0
    # A token reaches one window further with every layer.
    reach = 3 + BASE.layers * (WINDOW - 1) if name == "window" else T - 1
    assert not moved[:3].any()
    assert moved[3 : reach + 1].all()
    assert not moved[reach + 1 :].any()


@members
@pytest.mark.parametrize("cuts", [[0, 7, 14, 21, 22], [*range(9), 15, 22], [0, 1, 8, 15, 22]])
def test_decoding_in_pieces_is_prefill(name, cuts):
    model, tokens = member(name), texts(4)
    whole = model.row(tokens)
    parts = model.pieces(cuts, tokens, *plain())
    close(parts, whole)
    assert (parts.argmax(-1) == whole.argmax(-1)).all()


@members
def test_decoding_packed_and_padded_rows_is_prefill(name):
    model, tokens = member(name), texts(5)
    positions, segments, _, _ = packed()
    positions[1] = padded("middle", 15)[1]  # the gap swallows pieces whole
    segments[1] = 0
    whole = model.row(tokens, positions, segments)
    parts = model.pieces([0, 7, 8, 15, 22], tokens, positions, segments)
    live = positions >= 0
    close(parts[live], whole[live])


@members
def test_a_row_does_not_depend_on_its_batch(name):
    model, tokens = member(name), texts(6)
    mates = tokens.copy()
    mates[1] = texts(7)[1]
    close(model.row(mates)[0], model.row(tokens)[0], 1e-6)
    close(model.row(tokens[::-1].copy())[::-1], model.row(tokens), 1e-6)


@members
def test_padding_changes_nothing(name):
    model, live = member(name), 15
    text = texts(8)
    wanted = model.row(text)[:, :live]
    for where in ("left", "right", "middle"):
        positions = padded(where, live)
        tokens = texts(9)
        tokens[positions >= 0] = text[:, :live].ravel()
        got = model.row(tokens, positions)[positions >= 0].reshape(2, live, -1)
        close(got, wanted, 1e-5)


@members
def test_a_packed_document_is_as_if_alone(name):
    model, tokens = member(name), texts(10)
    positions, segments, first, second = packed()
    together = model.row(tokens, positions, segments)
    close(together[:, first], model.row(tokens)[:, first], 1e-5)
    alone = np.concatenate([tokens[:, second], tokens[:, first]], axis=1)
    close(together[:, second], model.row(alone)[:, : T - first.stop], 1e-5)
    other = tokens.copy()
    other[:, first] = texts(11)[:, first]
    moved = np.abs(model.row(other, positions, segments) - together)
    assert moved[:, second].max() == 0.0
    assert moved[:, first].max() > 1e-4


def test_the_packing_law_catches_a_forgotten_segment():
    model, tokens = member("attention"), texts(10)
    positions, segments, _, second = packed()
    other = tokens.copy()
    other[:, :9] = texts(11)[:, :9]
    forgotten = np.zeros_like(segments)
    moved = model.row(other, positions, forgotten) - model.row(tokens, positions, forgotten)
    assert np.abs(moved[:, second]).max() > 1e-4


def test_the_causality_law_catches_a_leak():
    model, tokens = member("attention"), texts(0)
    leaking = np.zeros((2, T), np.int32)  # every token at position 0 sees every other
    changed = np.where(np.arange(T) > 10, texts(2), tokens)
    moved = model.row(changed, leaking) - model.row(tokens, leaking)
    assert np.abs(moved[:, :11]).max() > 1e-4


def test_the_decoding_law_catches_a_lost_state():
    model, tokens = member("retention"), texts(4)
    positions, segments = plain()
    empty = model.apply(model.params, 2, T, PIECE, method="init_state")
    late = model.step(model.params, empty, tokens[:, 7:14], positions[:, 7:14], segments[:, 7:14])
    assert np.abs(np.asarray(late[0]) - model.row(tokens)[:, 7:14]).max() > 1e-3


@members
def test_generation_continues_unequal_prompts_like_whole_passes(name):
    model = member(name)
    prompts = [texts(12)[0, :9].tolist(), texts(12)[1, :4].tolist()]
    made = generate(model.apply, model.params, prompts, 4)
    for prompt, row in zip(prompts, made, strict=True):
        tokens = np.zeros((2, T), np.int32)
        tokens[:, : len(prompt) + 4] = [*prompt, *row]
        greedy = model.row(tokens)[0, len(prompt) - 1 : len(prompt) + 3].argmax(-1)
        assert row.tolist() == greedy.tolist()


@members
def test_the_state_is_as_large_as_its_kind_says(name):
    model = member(name)
    fixed, per_token = state_bytes(model.apply, model.params, longest=64)
    own, layers = BASE, BASE.layers
    keys = 4 * (2 * 2 * 4)  # float32: k and v of 2 heads of 4
    slot = 2 * 4  # a position and a segment
    count = 4
    place = 2 * 4
    closed = {
        "attention": (layers * count, layers * (keys + slot)),
        "switch": (layers * count, layers * (keys + slot)),
        "window": (layers * (count + WINDOW * (4 * 2 * 2 * 8 + slot)), 0),
        "retention": (layers * (4 * 2 * 8 * own.retention.value_dim + place), 0),
        "state_space": (layers * (4 * 2 * own.width * own.state_space.states + place), 0),
    }
    assert (fixed, per_token) == closed[name]


def test_a_piece_longer_than_the_cache_was_made_for_is_refused():
    model, tokens = member("window"), texts(0)
    state = model.apply(model.params, 2, T, 3, method="init_state")
    positions, segments = plain()
    with pytest.raises(ValueError, match="at most 3 tokens, got 7"):
        model.continued(model.params, state, tokens[:, :7], positions[:, :7], segments[:, :7])


def test_a_window_as_wide_as_the_row_is_full_attention():
    full = member("attention")
    config = replace(
        BASE, pattern=("window",), window=WindowConfig(heads=4, kv_heads=2, width=T)
    )
    unit = full.params["stack"]["runs"]["000"]["attention_00"]
    params = {**full.params, "stack": {"runs": {"000": {"window_00": unit}}}}
    positions, segments = plain()
    got = decoder(config).apply(params, texts(0), positions=positions, segments=segments)[0]
    close(got, full.row(texts(0)), 1e-6)


def test_one_expert_is_the_dense_network():
    switch = replace(BASE, feedforward="switch", switch=SwitchConfig(experts=1))
    dense = member("attention")

    def with_expert(unit):
        up, down = unit["feedforward"]["up"]["kernel"], unit["feedforward"]["down"]["kernel"]
        experts = {"up": {"kernel": up[:, None]}, "down": {"kernel": down[:, None]}}
        router = {"kernel": jnp.ones((BASE.layers, BASE.width, 1))}
        return {**unit, "feedforward": {"experts": experts, "router": router}}

    unit = with_expert(dense.params["stack"]["runs"]["000"]["attention_00"])
    params = {**dense.params, "stack": {"runs": {"000": {"attention_00": unit}}}}
    got = decoder(switch).apply(params, texts(0))[0]
    close(got, dense.row(texts(0)), 1e-6)


def test_bfloat16_decodes_as_it_reads():
    config = replace(MEMBERS["attention"], dtype="bfloat16")
    model = Member(config)
    tokens = texts(4)
    whole = model.row(tokens).astype(np.float32)
    parts = model.pieces([0, 7, 14, 21, 22], tokens, *plain()).astype(np.float32)
    close(parts, whole, 2e-2)
    ranked = np.sort(whole, axis=-1)
    clear = ranked[..., -1] - ranked[..., -2] > 2e-2
    assert (parts.argmax(-1) == whole.argmax(-1))[clear].mean() >= 0.99
