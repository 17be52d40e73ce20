"""The refusals: their exit codes, and the nearest name."""

import pytest

from effjax import errors


def test_exit_codes_are_the_promised_ones():
    codes = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.EffjaxError)
    }
    assert codes == {
        "EffjaxError": 1,
        "ConfigError": 2,
        "DataError": 3,
        "CheckpointError": 3,
        "Preempted": 75,
    }


def test_one_except_clause_catches_every_refusal_and_config_errors_are_value_errors():
    for kind in (errors.ConfigError, errors.DataError, errors.CheckpointError, errors.Preempted):
        with pytest.raises(errors.EffjaxError, match=r"^what, where$"):
            raise kind("what, where")
    assert issubclass(errors.ConfigError, ValueError)
    assert not issubclass(errors.DataError, ValueError)


@pytest.mark.parametrize(
    ("name", "candidates", "ending"),
    [
        ("learning_rte", ["steps", "learning_rate"], "; did you mean 'learning_rate'?"),
        ("learning_rate", iter(["learning_rate"]), "; did you mean 'learning_rate'?"),
        ("zzz", ["steps", "learning_rate"], ""),
        ("", ["steps"], ""),
        ("steps", [], ""),
    ],
)
def test_near_names_the_nearest_or_nothing(name, candidates, ending):
    assert errors.near(name, candidates) == ending
