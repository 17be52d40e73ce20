"""The index of methods: every row leads somewhere, and a row that leads nowhere is caught."""

from pathlib import Path

import pytest

from effjax import methods
from effjax.errors import ConfigError
from effjax.methods import Row

ROOT = Path(__file__).parent.parent
HEAD = "| ID | method | paper | home | test | experiment | state |\n| - | - | - | - | - | - | - |\n"
GOOD = "| EVAL-06 | FLOPs, counted | none | `effjax.cost.flops.count` | tests/a.py | - | works |\n"


def broken(row):
    """Why a row leads nowhere; None when it does not."""
    try:
        home = methods.resolve(row)
    except (ImportError, AttributeError) as error:
        return f"{row.id}: home {row.home} does not import: {error}"
    if not callable(home) and not hasattr(home, "__path__") and not hasattr(home, "__file__"):
        return f"{row.id}: home {row.home} is no function, class or module"
    for path in (row.test, row.experiment):
        if path not in methods.NONE and not (ROOT / path.split("::")[0]).is_file():
            return f"{row.id}: there is no {path}"
    if not row.test.startswith("tests/"):
        return f"{row.id}: test {row.test} is not under tests/"
    return None


def test_every_row_resolves():
    problems = [problem for row in methods.read() if (problem := broken(row))]
    assert problems == []


def test_a_good_row_resolves():
    row = Row("EVAL-06", "m", "p", "effjax.cost.flops.count", "tests/test_methods.py", "-", "works")
    assert broken(row) is None
    module = Row("EVAL-06", "m", "p", "effjax.cost.flops", "tests/test_methods.py", "", "works")
    assert broken(module) is None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"home": "effjax.cost.flops.counts"}, "does not import"),
        ({"home": "effjax.nowhere.count"}, "does not import"),
        ({"home": "effjax.cost.flops._CALLED"}, "no function"),
        ({"test": "tests/test_nothing.py"}, "there is no tests/test_nothing.py"),
        ({"test": "pyproject.toml"}, "not under tests/"),
        ({"experiment": "experiments/nothing.py"}, "there is no experiments/nothing.py"),
    ],
)
def test_resolution_catches_a_row_that_leads_nowhere(fault, words):
    good = {"home": "effjax.cost.flops.count", "test": "tests/test_methods.py", "experiment": "-"}
    cells = {"id": "EVAL-06", "method": "m", "paper": "p", "state": "works", **good, **fault}
    assert words in broken(Row(**cells))


def test_cells_lose_their_code_marks():
    (row,) = methods.read(HEAD + GOOD)
    assert row.home == "effjax.cost.flops.count"
    assert row.method == "FLOPs, counted"
    (barred,) = methods.read(HEAD + GOOD.replace("FLOPs, counted", r"KL(p \| q)"))
    assert barred.method == "KL(p | q)"


@pytest.mark.parametrize(
    "state", ["works", "part: no GPU", "holds", "does not hold here", "undecided"]
)
def test_states(state):
    assert methods.read(HEAD + GOOD.replace("works", state))[0].state == state


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no table", "must have a table"),
        (HEAD.replace("home", "house"), "must have a table"),
        (HEAD + GOOD.replace("| - |", "|"), "line 3: 6 cells, wanted 7"),
        (HEAD + GOOD.replace("EVAL-06", "eval6"), "ID 'eval6'"),
        (HEAD + GOOD.replace("works", "done"), "state 'done'"),
        (HEAD + GOOD.replace("works", "part:"), "state 'part:'"),
        (HEAD + GOOD.replace("tests/a.py", "-"), "EVAL-06 has no test"),
        (HEAD + GOOD + GOOD, "comes twice"),
        (HEAD + GOOD + GOOD.replace("-06", "-05"), "line 4: EVAL-05 must stand before EVAL-06"),
        (HEAD + GOOD.replace("-06", "-10") + GOOD.replace("-06", "-9"), "EVAL-9 must stand before"),
    ],
)
def test_a_malformed_table_is_refused_by_line(text, words):
    with pytest.raises(ValueError, match=words):
        methods.read(text)


def test_rows_are_sorted_by_number_and_not_by_text():
    rows = methods.read(HEAD + "".join(GOOD.replace("-06", f"-{n}") for n in (2, 10, 100)))
    assert [row.id for row in rows] == ["EVAL-2", "EVAL-10", "EVAL-100"]


def test_search_wants_every_word_in_any_case():
    other = GOOD.replace("-06", "-07").replace("FLOPs", "Watts").replace("flops", "energy")
    rows = methods.read(HEAD + GOOD + other)
    assert [row.id for row in methods.search(["eval", "flops"], rows)] == ["EVAL-06"]
    assert len(methods.search(["counted"], rows)) == 2
    assert methods.search([], rows) == rows
    with pytest.raises(ConfigError, match="did you mean 'watts'"):
        methods.search(["wats"], rows)
    assert methods.search([], ()) == ()
    with pytest.raises(ConfigError, match="no method matches 'x'"):
        methods.search(["x"], ())
