"""A run's directory belongs to one config, and holds its metrics."""

import json
from dataclasses import dataclass, field, replace

import pytest

from effjax.errors import ConfigError
from effjax.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Inner:
    width: int = 4


@dataclass(frozen=True)
class Outer:
    steps: int = 3
    name: str = "a"
    inner: Inner = field(default_factory=Inner)


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_same_config_goes_on(tmp_path):
    with RunDirectory(tmp_path / "deep" / "run", Outer()) as first:
        assert not first.resumed
        first.log(step=1, loss=0.5)
        written = (first / "config.json").read_bytes()
    with RunDirectory(tmp_path / "deep" / "run", Outer()) as second:
        assert second.resumed
        second.log(step=2, loss=0.25)
    assert rows(second.path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert (second / "config.json").read_bytes() == written
    assert json.loads(written) == {"steps": 3, "name": "a", "inner": {"width": 4}}
    assert sorted(p.name for p in second.path.iterdir()) == ["config.json", "metrics.jsonl"]


def test_another_config_is_refused_with_every_difference_and_changes_nothing(tmp_path):
    with RunDirectory(tmp_path, Outer()) as first:
        first.log(step=1)
    other = replace(Outer(), steps=5, inner=Inner(8))
    with pytest.raises(ConfigError) as refusal:
        RunDirectory(tmp_path, other)
    message = str(refusal.value)
    assert "inner.width: 4 != 8" in message
    assert "steps: 3 != 5" in message
    assert "name" not in message
    with RunDirectory(tmp_path, Outer()) as same:
        assert same.resumed


def test_a_start_without_results_claims_nothing(tmp_path):
    RunDirectory(tmp_path, Outer()).close()
    with RunDirectory(tmp_path, replace(Outer(), steps=5)) as other:
        assert not other.resumed
        other.log(step=1)
    with pytest.raises(ConfigError, match="steps: 5 != 3"):
        RunDirectory(tmp_path, Outer())


def test_a_free_field_may_change(tmp_path):
    with RunDirectory(tmp_path, Outer()) as first:
        first.log(step=1)
    with RunDirectory(tmp_path, replace(Outer(), steps=5), free=("steps",)) as again:
        assert again.resumed
    with pytest.raises(ConfigError, match="steps: 5 != 3"):
        RunDirectory(tmp_path, Outer())


def test_a_row_is_on_disk_when_it_is_logged(tmp_path):
    with RunDirectory(tmp_path, Outer()) as directory:
        directory.log(step=1)
        assert rows(tmp_path) == [{"step": 1}]


def test_a_number_that_is_not_finite_is_null(tmp_path):
    with RunDirectory(tmp_path, Outer()) as directory:
        directory.log(step=1, loss=float("nan"), norm=float("inf"), row="a")
    assert rows(tmp_path) == [{"step": 1, "loss": None, "norm": None, "row": "a"}]


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, where):
    (tmp_path / "file").write_text("taken")
    with pytest.raises(ConfigError, match=r"run directory '.*file.*' cannot be written: \w+"):
        RunDirectory(tmp_path / where, Outer())
    assert (tmp_path / "file").read_text() == "taken"


def test_a_damaged_config_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "record.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        RunDirectory(tmp_path, Outer())


def test_a_start_that_was_cut_short_leaves_no_config(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            RunDirectory(tmp_path, Outer())
    with RunDirectory(tmp_path, Outer()) as directory:
        assert not directory.resumed
