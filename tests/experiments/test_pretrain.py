"""Training on a task: it learns, resumes bit for bit, and says how many answers are right."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from effjax.config import from_json, to_json
from effjax.errors import ConfigError
from effjax.models.configs import DecoderConfig
from effjax.models.sections import AttentionConfig
from effjax.training.loop import TrainConfig
from effjax.training.saved_model import load_model
from experiments.pretrain import PretrainConfig, pretrain

MODEL = DecoderConfig(vocab=8, width=16, hidden=16, layers=1, attention=AttentionConfig(heads=2))
CONFIG = PretrainConfig(
    corpus="task:copying,vocab=8,longest=4",
    steps=4,
    save_every=2,
    model=MODEL,
    train=TrainConfig(batch=8),
)


def test_a_task_trains_resumes_and_is_scored(tmp_path, capsys):
    config, out = replace(CONFIG, out=str(tmp_path)), []
    for begin in (0, 2):
        assert pretrain(config) == 0
        printed = capsys.readouterr().out
        assert f"from step {begin} to 4" in printed
        out.append((load_model(tmp_path / "model").params, printed.splitlines()[-1]))
        shutil.rmtree(tmp_path / "checkpoints" / "4")
        shutil.rmtree(tmp_path / "model")
    (params, last), (again, last_again) = out
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert last == last_again
    assert last.startswith("held-out examples: 0.")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 3, 4]
    assert all("bits_per_byte" not in line and line["nats"] > 0 for line in lines)


def test_a_task_sets_the_length_and_checks_the_vocabulary():
    assert CONFIG.train.length == 8
    assert from_json(PretrainConfig, to_json(CONFIG)) == CONFIG
    with pytest.raises(ConfigError, match=r"model.vocab must be at least 9 for Copying.*got 8"):
        replace(CONFIG, corpus="task:copying,vocab=9")
    with pytest.raises(ConfigError, match="at least 256 for bytes"):
        replace(CONFIG, corpus="python")
    with pytest.raises(ConfigError, match="did you mean 'copying'"):
        replace(CONFIG, corpus="task:copyng")
