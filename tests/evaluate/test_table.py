"""The table: every row and cell, aligned, plain off a terminal and never torn by a name."""

import dataclasses
import io

import pytest

from effjax.evaluate.columns import COLUMNS, DASH, columns, count
from effjax.evaluate.record import Energy, Flops, StateBytes
from effjax.evaluate.table import print_table, table


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, None),
        (0, "0"),
        (7, "7"),
        (0.5, "0.50"),
        (12.34, "12.3"),
        (999, "999"),
        (999.6, "1.00 k"),
        (1000, "1.00 k"),
        (3_290_112, "3.29 M"),
        (12_345_678, "12.3 M"),
        (99_960_000, "100 M"),
        (2e12, "2.00 T"),
        (-1500, "-1.50 k"),
        (3e21, "3000 E"),
    ],
)
def test_count(number, text):
    assert count(number) == text


def test_count_carries_its_unit():
    assert count(3_290_000, "B") == "3.29 MB"
    assert count(12, "J") == "12 J"


def test_plain_text_is_aligned_and_whole(records, unfinished):
    text = table([*records, unfinished])
    head, rule, *rows = text.splitlines()
    assert set(rule) == {"-", " "}
    assert head.startswith("front  method")
    starts = [i for i in range(1, len(rule)) if rule[i - 1] == " " and rule[i] == "-"]
    for line in rows[: len(records)]:
        assert all(line[i - 2 : i] == "  " for i in starts if i < len(line))
    assert rows[0].split()[:4] == ["FBS", "softmax,", "seed", "0"]
    assert rows[-1] == "not run: long window: needs about 95 s and 40 s are left"
    assert "3.70 MB" in text
    assert DASH in text


def test_ties_are_passed_on(records):
    repeats = [records[0], records[-1]]
    second = [table(repeats, ties).splitlines()[3] for ties in (0.0, 1.0, None)]
    assert [line.split()[0] for line in second] == ["softmax,", "FBS", "FBS"]


def test_a_stream_gets_plain_text_and_a_terminal_gets_rich(records):
    plain, drawn = io.StringIO(), Terminal()
    print_table(records, file=plain)
    assert plain.getvalue() == table(records) + "\n"
    print_table(records, file=drawn)
    assert drawn.getvalue() != plain.getvalue()
    assert "switch" in drawn.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 110, 200])
def test_a_narrow_terminal_cuts_columns_and_never_figures(records, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    drawn = Terminal()
    print_table(records, file=drawn)
    text = drawn.getvalue()
    assert "…" not in text
    assert "2.158" in text
    assert ("9.58 MB" in text) == (width > 40)
    assert text.count("trained/s") == 1 + (width >= 110)


def test_a_name_cannot_tear_the_table_or_steer_the_terminal(records):
    hostile = dataclasses.replace(records[0], method="[red]a\n\x1b[31mb[/red]")
    assert "\x1b" not in table([hostile])
    assert len(table([hostile]).splitlines()) == 5
    drawn = Terminal()
    print_table([hostile], file=drawn)
    assert "[red]" in drawn.getvalue()


def test_no_rows_is_no_crash(unfinished):
    for rows in ([], [unfinished]):
        assert table(rows).startswith("front  method")
        print_table(rows, file=Terminal())


def test_columns_that_say_nothing_are_left_out(records):
    titles = [(c.group, c.title) for c in columns(records)]
    assert ("energy", "measured") not in titles
    assert ("energy", "estimated (range)") in titles
    counted = dataclasses.replace(records[0], energy=Energy(1.0, 0.9, 1.1, "measured: RAPL"))
    titles = [(c.group, c.title) for c in columns([counted])]
    assert ("energy", "measured") in titles
    assert ("energy", "estimated (range)") not in titles
    assert ("size", "stored, saving simulated") not in titles


def cells(record):
    return {(c.group, c.title): c.cell(record) for c in COLUMNS}


def test_cells_keep_what_is_realised_and_what_is_measured_apart(records):
    mask, energy = (
        cells(records[3]),
        dataclasses.replace(records[0].energy, source="measured: RAPL"),
    )
    assert mask["size", "stored"] == ""
    assert mask["size", "stored, saving simulated"] == "3.70 MB"
    read = cells(dataclasses.replace(records[0], energy=energy))
    assert read["energy", "estimated (range)"] == ""
    assert read["energy", "measured"].startswith("987 J (592 to ")


def test_cells_say_what_is_unknown(records, unfinished):
    assert set(cells(unfinished).values()) == {None, ""}
    partly = dataclasses.replace(records[0], flops=Flops(1, 5_000_000, 1.0, ("while",)))
    assert cells(partly)["training", "done FLOPs"] == "at least 5.00 M"
    both = dataclasses.replace(records[0], state_bytes=StateBytes(100, 2.0))
    assert cells(both)["generation", "state"] == "100 B + 2 B/token"
    none = dataclasses.replace(records[0], state_bytes=StateBytes(0, 0.0))
    assert cells(none)["generation", "state"] == "0 B"
