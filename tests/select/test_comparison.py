"""The comparison: its rows, their texts and seeds, what is refused before it costs anything, and
going on where it stopped."""

import json
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.models.configs import DecoderConfig
from effjax.models.kinds import DECODER_KINDS
from effjax.models.sections import AttentionConfig
from effjax.select import rows
from effjax.select.comparison import (
    BASELINE,
    ROWS,
    SECOND_SEED,
    CompareConfig,
    Comparison,
    row_of,
)
from effjax.select.decoder_flops import training_flops
from effjax.training.loop import TrainConfig
from effjax.training.run_directory import RunDirectory

MODEL = DecoderConfig(width=32, hidden=32, layers=2, attention=AttentionConfig(heads=2))
TRAIN = TrainConfig(batch=8, length=16)
STEPS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"the {number}th text says {number} things. " * 40)
        (folder / f"{number}.other").write_text(f"AND {number} OTHER ONES SHOUT! " * 40)
    flops = STEPS * training_flops(MODEL, TRAIN.length) * TRAIN.tokens_per_step
    return CompareConfig(
        corpus=str(folder / "*.txt"),
        adapt_corpus=str(folder / "*.other"),
        methods=f"attention,int8,lora,{SECOND_SEED}",
        minutes=5.0,
        out=str(folder / "out"),
        flops_per_minute=1.001 * flops / 5.0,
        model=MODEL,
        train=TRAIN,
    )


@pytest.fixture(scope="module")
def small_measurements():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CONTEXT", 4), ("NEW_TOKENS", 2), ("PROMPTS", 1), ("ROUNDS", 1)):
            patch.setattr(rows, name, value)
        patch.setattr("effjax.select.comparison.LORA_SHARE", 1.0)
        yield


@pytest.fixture(scope="module")
def finished(config, small_measurements):
    with RunDirectory(config.out, config) as directory:
        comparison = Comparison(config, directory)
        for row in comparison.missing():
            comparison.make(row)
        return comparison


def test_all_rows_that_were_asked_for_are_made_and_what_they_need(finished, config):
    wanted = ("attention", "int8", "topics", "lora", SECOND_SEED)
    assert config.rows == wanted == tuple(finished.records)
    assert finished.missing() == []
    assert all(made.status.finished for made in finished.records.values())


def test_trained_rows_cost_the_same_model_flops_and_others_none_of_their_own(finished):
    made = finished.records
    assert made[BASELINE].flops.train_model == made[SECOND_SEED].flops.train_model
    assert made["int8"].flops.train_model == made[BASELINE].flops.train_model
    assert made["int8"].time.step_median is None
    assert made["int8"].bytes.stored < made[BASELINE].bytes.stored / 3
    assert made["int8"].bytes.saving == "realised"


def test_the_second_seed_is_another_and_a_repeat_of_the_same_method(finished):
    first, second = finished.records[BASELINE], finished.records[SECOND_SEED]
    assert first.method == second.method
    assert (first.seed, second.seed) == (0, 1)
    assert first.quality.value != second.quality.value
    assert not np.array_equal(weights(finished, BASELINE), weights(finished, SECOND_SEED))


def weights(comparison, row):
    folder = comparison.directory / "checkpoints" / row
    params = rows_params(folder)
    return np.concatenate([np.ravel(v) for v in jax.tree.leaves(params)])


def rows_params(folder):
    from effjax.training.saved_model import load_model

    return load_model(folder).params


def test_lora_learns_the_second_text_and_leaves_its_base_alone(finished):
    made = finished.records
    assert made["lora"].corpus == made["topics"].corpus != made[BASELINE].corpus
    base = rows_params(finished.directory / "checkpoints" / BASELINE)
    adapted = rows_params(finished.directory / "checkpoints" / "lora")
    unit, other = (p["stack"]["runs"]["000"]["attention_00"]["mixer"]["q"] for p in (base, adapted))
    assert np.array_equal(unit["kernel"], other["kernel"].base)
    assert np.abs(other["kernel"].b).max() > 0
    assert 0 < made["lora"].params.trainable < made["lora"].params.total


def test_lora_trains_on_the_rows_of_the_second_text(finished, config, monkeypatch):
    seen = []

    def fit(name, model, setting, text, *rest, **options):
        seen.append((name, text.corpus.digest, setting.seed))
        raise KeyboardInterrupt

    monkeypatch.setattr("effjax.select.comparison.fit", fit)
    for row in ("lora", SECOND_SEED, "window"):
        with pytest.raises(KeyboardInterrupt):
            finished._trained(row)
    main = finished.text.corpus.digest
    assert [digest == main for _, digest, _ in seen] == [False, True, True]
    assert [seed for _, _, seed in seen] == [0, 1, 0]


def test_the_same_command_goes_on_with_what_is_finished(finished, config, small_measurements):
    before = json.loads((finished.directory / "record.json").read_text())
    again = replace(config, methods=config.methods + ",svd")
    with RunDirectory(config.out, again, free=("methods",)) as directory:
        comparison = Comparison(again, directory)
        assert comparison.missing() == ["svd"]
        assert list(map(row_of, comparison.records.values())) == list(config.rows)
        with pytest.raises(ConfigError, match="seed: 0 != 3"):
            RunDirectory(config.out, replace(config, seed=3), free=("methods",))
        # No time is left, and the estimate comes from a row that this run has made.
        comparison.costs = finished.costs
        comparison.began = time.perf_counter() - 60 * again.minutes
        skipped = comparison.make("svd")
    assert not skipped.status.finished
    assert "left" in skipped.status.reason
    after = json.loads((finished.directory / "record.json").read_text())
    assert {made["run"]: made for made in after if made["status"]["finished"]} == {
        made["run"]: made for made in before
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ""}, "must name at least one row"),
        ({"methods": "int9"}, "did you mean 'int8'"),
        ({"minutes": 0.0}, "CompareConfig.minutes"),
        ({"seed": 2**31}, "CompareConfig.seed"),
        ({"model": replace(MODEL, vocab=100)}, "at least 256"),
        ({"model": replace(MODEL, pattern=("retention",))}, "model.pattern"),
        ({"model": replace(MODEL, feedforward="switch")}, "model.feedforward"),
        ({"train": replace(TRAIN, seed=4)}, "train.seed"),
    ],
)
def test_a_config_that_the_rows_would_ignore_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        CompareConfig(**changes)


def test_a_recipe_that_cannot_be_applied_is_refused_before_anything_is_trained(config, tmp_path):
    odd = replace(config, out=str(tmp_path), model=replace(MODEL, width=24), methods="int4")
    with RunDirectory(tmp_path, odd) as directory, pytest.raises(ConfigError, match="got 32"):
        Comparison(odd, directory)
    RunDirectory(tmp_path, config).close()  # a refused start does not claim the directory


def test_every_row_has_a_place_in_the_order():
    assert set(CompareConfig().rows) == set(ROWS)
    assert ROWS[0] == BASELINE


def test_every_mixer_that_decodes_is_a_row_that_may_be_asked_for():
    for kind in DECODER_KINDS:
        asked = CompareConfig(methods=kind)
        assert asked.rows == (kind,)
        assert asked.model_of(kind).pattern == (kind,)
        assert asked.budget_of(kind) == CompareConfig().budget_of(BASELINE)
    with pytest.raises(ConfigError, match="did you mean 'mamba'"):
        CompareConfig(methods="attention,mamba3")
