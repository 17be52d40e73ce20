"""Progress: one line where there is no terminal, a bar where there is one."""

import sys

import pytest

from effjax.training import progress
from effjax.training.progress import Progress, trainable_line


def test_the_line_of_a_step_has_every_number():
    run = Progress("window", 100, 4096, flops_per_step=2e9, peak=8e9)
    assert run.line(20, 5.5449, 10.0) == (
        "window: step 20/100  loss 5.545  8,192 tokens/s  4.0 GFLOP/s (50% of peak)  40 s left"
    )


def test_what_is_unknown_is_left_out():
    assert Progress("lora", 100, 10).line(50, 1.0, 10.0) == (
        "lora: step 50/100  loss 1.000  50 tokens/s  10 s left"
    )
    line = Progress("lora", 100, 10, flops_per_step=1e9).line(50, 1.0, 10.0)
    assert "5.0 GFLOP/s  10 s left" in line
    assert "peak" not in line


def test_a_run_that_goes_on_counts_from_where_it_began():
    run = Progress("a", 100, 10, begin=50)
    assert "20 tokens/s" in run.line(60, 1.0, 5.0)
    assert "20 s left" in run.line(60, 1.0, 5.0)
    assert "10 tokens/s" not in run.line(50, 1.0, 0.0)  # no division by no steps or no time


def test_a_long_time_is_in_minutes():
    assert "1.5 min left" in Progress("a", 100, 10).line(1, 1.0, 92.0 / 99)[-16:]
    assert "90 s left" in Progress("a", 10, 10).line(1, 1.0, 10.0)


def test_a_loss_that_is_not_finite_is_shown():
    assert "loss nan" in Progress("a", 10, 10).line(1, float("nan"), 1.0)


def test_without_a_terminal_lines_come_every_few_seconds_and_at_the_end(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Progress("a", 20, 10) as run:
        for step in range(1, 21):
            now[0] += 1.0
            run.update(step, 1.0)
    steps = [line.split()[2] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["1/20", "7/20", "13/20", "19/20", "20/20"]


def test_on_a_terminal_there_is_a_bar_that_leaves_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("a", 3, 10, begin=1) as run:
        run.update(2, 1.0)
        assert run.bar.tasks[0].completed == 2
        assert run.bar.tasks[0].description.startswith("a: step 2/3  loss 1.000")
    assert "\na: step" not in capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("trainable", "total", "line"),
    [
        (12_288, 800_256, "trainable: 12,288 || all: 800,256 || 1.536%"),
        (5, 5, "trainable: 5 || all: 5 || 100.000%"),
    ],
)
def test_the_line_of_what_is_trained(trainable, total, line):
    assert trainable_line(trainable, total) == line
