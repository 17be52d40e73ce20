"""The record: exact round trips, and nulls, zeros, intervals and reasons that are refused."""

import dataclasses
import json
import os

import pytest

from effjax.config import from_json, to_json
from effjax.errors import ConfigError, DataError, EffjaxError
from effjax.evaluate import files
from effjax.evaluate.record import (
    SCHEMA,
    Bytes,
    Carbon,
    Energy,
    Flops,
    Parameters,
    Quality,
    Record,
    Status,
    Time,
    nulls,
    read_records,
    reason,
    write_records,
)

CANNOT_BE_ZERO = [
    "params.total",
    "bytes.stored",
    "flops.train_model",
    "flops.train_hardware",
    "flops.per_token",
    "memory.arguments",
    "time.compile",
    "time.step_median",
    "time.tokens_per_s_train",
    "time.tokens_per_s_generate",
    "time.rounds",
    "energy.joules",
    "energy.low",
    "energy.high",
    "carbon.grams",
    "carbon.low",
    "carbon.high",
    "quality.value",
    "corpus.bytes",
    "device.count",
    "device.cores",
]
CAN_BE_ZERO = ["params.trainable", "state_bytes.fixed", "state_bytes.per_token", "memory.temp"]


def planted(record: Record, dotted: str, value: object) -> dict:
    data = to_json(record)
    group, name = dotted.split(".")
    data[group][name] = value
    return data


def test_the_schema_is_the_one_that_the_design_names(records):
    want = {
        "schema": None,
        "run": None,
        "method": None,
        "recipe": None,
        "config_digest": None,
        "corpus": {"name", "digest", "bytes"},
        "seed": None,
        "device": {"kind", "count", "cores"},
        "versions": None,
        "params": {"total", "trainable"},
        "bytes": {"stored", "saving"},
        "flops": {"train_model", "train_hardware", "per_token", "unknown"},
        "state_bytes": {"fixed", "per_token"},
        "memory": {"temp", "arguments", "source"},
        "time": {f.name for f in dataclasses.fields(Time)},
        "energy": {"joules", "low", "high", "source"},
        "carbon": {"grams", "low", "high"},
        "quality": {"name", "value", "low", "high", "seeds"},
        "status": {"finished", "reason"},
        "reasons": None,
    }
    data = to_json(records[0])
    assert set(data) == set(want)
    for group, names in want.items():
        if names is not None:
            assert set(data[group]) == names


def test_round_trip_is_exact(records, unfinished, tmp_path):
    odd = dataclasses.replace(
        records[0],
        method="ünïcode </script> \n \udc80",
        flops=Flops(2**80 + 1, 3, 0.1 + 0.2, ("while_loop",)),
        recipe=({"verb": "svd", "ranks": {"a": [1, None, True, 1e-300]}},),
    )
    rows = [*records, unfinished, odd]
    path = tmp_path / "runs" / "compare" / "record.json"
    write_records(path, rows)
    assert read_records(path) == rows
    before = path.read_bytes()
    write_records(path, read_records(path))
    assert path.read_bytes() == before
    assert isinstance(json.loads(before), list)


def test_an_empty_list_is_a_list(tmp_path):
    write_records(tmp_path / "record.json", [])
    assert read_records(tmp_path / "record.json") == []


@pytest.mark.parametrize("dotted", CANNOT_BE_ZERO)
@pytest.mark.parametrize("value", [0, -1])
def test_zero_is_refused_where_nothing_measures_zero(records, dotted, value):
    with pytest.raises(ConfigError, match=dotted.split(".")[1]):
        from_json(Record, planted(records[0], dotted, value))


@pytest.mark.parametrize("dotted", CAN_BE_ZERO)
def test_zero_is_kept_where_it_is_a_figure(records, dotted):
    from_json(Record, planted(records[0], dotted, 0))
    with pytest.raises(ConfigError, match=dotted.split(".")[1]):
        from_json(Record, planted(records[0], dotted, -1))


def test_every_null_needs_a_reason(records):
    full = records[0]
    assert not list(nulls(full))
    for dotted in (*CANNOT_BE_ZERO[:-3], *CAN_BE_ZERO, "memory.source", "energy.source"):
        data = planted(full, dotted, None)
        with pytest.raises(ConfigError, match="null without a reason"):
            from_json(Record, data)
        for key in (dotted, dotted.split(".")[0], "*"):
            data["reasons"] = {key: "no counter is readable"}
            assert reason(from_json(Record, data), dotted) == "no counter is readable"
        data["reasons"] = {dotted: "  "}
        with pytest.raises(ConfigError, match="null without a reason"):
            from_json(Record, data)


def test_the_nearest_reason_is_given(records):
    reasons = {"energy": "group", "energy.low": "own"}
    row = dataclasses.replace(
        records[0], energy=Energy(), carbon=Carbon(), reasons=reasons | {"*": "all"}
    )
    assert [reason(row, n) for n in ("energy.low", "energy.high", "carbon.low")] == [
        "own",
        "group",
        "all",
    ]
    assert reason(records[0], "energy.low") is None


def test_a_reason_must_explain_a_null_that_exists(records):
    for reasons, message in [
        ({"energy.joules": "unread"}, "explains no null"),
        ({"*": "unread"}, "explains no null"),
        ({"energy.joule": "unread"}, "did you mean 'energy.joules'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(records[0], reasons=reasons)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Energy(1.0, 2.0, 3.0, "measured"), "low <= joules <= high"),
        (lambda: Energy(1.0, 0.5, 0.9, "measured"), "low <= joules <= high"),
        (lambda: Energy(low=2.0, high=1.0), "low <= high"),
        (lambda: Energy(1.0, source="a guess"), "'measured' or 'estimated'"),
        (lambda: Carbon(1.0, 1.5, 2.0), "low <= grams"),
        (lambda: Quality("accuracy", 0.5, 0.6), "low <= value"),
        (lambda: Quality("bits_per_byte", float("nan")), "finite"),
        (lambda: Parameters(10, 11), "at most the total, got 11 of 10"),
        (lambda: Bytes(1, "imagined"), "one of 'none', 'realised', 'simulated'"),
        (lambda: Status(False), "why the row is not finished"),
        (lambda: Status(False, " "), "why the row is not finished"),
        (lambda: Time(compile=float("inf")), "finite"),
        (lambda: Flops(train_model=1.5), "an integer"),
    ],
)
def test_impossible_figures_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_quality_of_zero_is_possible_for_an_accuracy():
    assert Quality("accuracy", 0.0).value == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(mehtod="x"), "unknown key 'mehtod'; did you mean 'method'"),
        (lambda row: row["energy"].update(joule=1), "unknown key 'energy.joule'; did you mean"),
        (lambda row: row.pop("method"), "missing key 'method' of Record"),
        (lambda row: row.update(seed="0"), "seed must be an integer, got '0'"),
        (lambda row: row.update(schema=SCHEMA + 1), f"has schema {SCHEMA + 1}; this version"),
        (lambda row: row.pop("schema"), "has schema None"),
        (
            lambda row: row["time"].update(compile=0),
            "compile must be above 0, got 0.0; what is",
        ),
    ],
)
def test_a_damaged_record_is_named(records, tmp_path, change, message):
    path = tmp_path / "record.json"
    rows = [to_json(record) for record in records[:3]]
    change(rows[1])
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError) as refusal:
        read_records(path)
    assert str(refusal.value).startswith(f"{path}[1]")
    assert message in str(refusal.value)


@pytest.mark.parametrize("content", ["", "[{", "{}", '"text"', "[3]", "[null]"])
def test_a_damaged_file_is_named(content, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"record\.json"):
        read_records(path)
    with pytest.raises(DataError, match="cannot read"):
        read_records(tmp_path / "missing.json")


def test_a_failed_write_keeps_the_old_file(records, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_records(path, records[:1])

    def fail(*_):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(files.os, step, fail)
            with pytest.raises(EffjaxError, match=r"cannot write .*record\.json: No space left"):
                write_records(path, records)
        assert read_records(path) == records[:1]
        assert os.listdir(tmp_path) == ["record.json"]


def test_an_interrupted_write_leaves_no_litter(records, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path / "record.json", records)
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_hold_a_file_is_named(records, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EffjaxError, match=r"cannot write .*file"):
        write_records(tmp_path / "file" / "record.json", records)
