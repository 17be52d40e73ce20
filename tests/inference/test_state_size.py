"""What decoding keeps: read off abstract shapes, and constant where a state is."""

from dataclasses import replace

import jax
import pytest

from effjax.__main__ import main
from effjax.cost.memory import stored_bytes
from effjax.inference import state_size
from effjax.inference.state_size import StateBytes, state_bytes
from effjax.models import AttentionConfig, DecoderConfig, RetentionConfig, decoder
from effjax.ops.attention.patterns import Window

MODEL = DecoderConfig(
    width=16,
    layers=4,
    attention=AttentionConfig(heads=2),
    window=Window(5),
    retention=RetentionConfig(heads=2),
)


def abstract(config):
    return jax.eval_shape(decoder(config).init, jax.random.key(0))


def size(config, batch, length, piece=1):
    shapes, apply = abstract(config), decoder(config).apply
    state = jax.eval_shape(lambda p: apply(p, batch, length, piece, method="init_state"), shapes)
    return stored_bytes(state)


@pytest.mark.parametrize("pattern", [("retention",), ("state_space",), ("window",)])
def test_a_recurrence_and_a_window_keep_the_same_at_any_length(pattern):
    config = replace(MODEL, pattern=pattern)
    assert size(config, 1, 10) == size(config, 1, 1 << 30)
    fixed, per_token = state_bytes(decoder(config).apply, abstract(config))
    assert per_token == 0
    assert fixed == size(config, 1, 10)
    assert size(config, 3, 10) == 3 * fixed


def test_attention_keeps_keys_values_and_places_of_every_token():
    fixed, per_token = state_bytes(decoder(MODEL).apply, abstract(MODEL))
    assert per_token == 4 * (2 * 16 * 4 + 2 * 4)
    assert fixed + 7 * per_token == size(MODEL, 1, 7)


def test_a_mixed_stack_keeps_the_sum_of_its_kinds():
    pattern = ("attention", "retention", "window", "state_space")
    apply = decoder(replace(MODEL, pattern=pattern)).apply
    mixed = state_bytes(apply, abstract(replace(MODEL, pattern=pattern)))
    alone = [replace(MODEL, pattern=(kind,)) for kind in pattern]
    parts = [state_bytes(decoder(config).apply, abstract(config)) for config in alone]
    assert 4 * mixed.fixed == sum(part.fixed for part in parts)
    assert 4 * mixed.per_token == sum(part.per_token for part in parts)


def test_a_narrower_cache_is_smaller():
    narrow = replace(MODEL, dtype="bfloat16")
    half = state_bytes(decoder(narrow).apply, abstract(narrow))
    assert isinstance(half, StateBytes)
    assert half.per_token == 4 * (16 * 2 * 2 + 2 * 4)


def test_the_table_has_every_kind_that_decodes(monkeypatch, capsys):
    """On two kinds: the rest differ in their config alone."""
    monkeypatch.setattr(state_size, "DECODER_KINDS", ("retention", "attention"))
    assert main(["methods", "--state"]) == 0
    retention = 4 * 4 * 32 * 32 + 8  # float32 sums of 4 heads, a position, a segment
    key_and_value = 2 * 4 * 128 + 8
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"retention  {retention:,} B  0 B/token",
        f"attention  4 B  {key_and_value:,} B/token",
    ]
    assert main(["methods", "--state", "mamba"]) == 2
    assert "takes no words, got 'mamba'" in capsys.readouterr().err
