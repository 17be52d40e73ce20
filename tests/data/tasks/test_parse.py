"""What a user types after `--corpus` names a task and its sizes, or is refused with the nearest."""

import pytest

from effjax.data.sources import rows_of, task_of
from effjax.data.tasks import (
    HELD_OUT,
    HELD_OUT_SEED,
    STORED,
    TASKS,
    ArenaText,
    AssociativeRecall,
    ListOps,
    examples,
    parse,
)
from effjax.errors import ConfigError


def test_names_and_sizes():
    assert parse("task:list_ops") == ListOps()
    wanted = AssociativeRecall(pairs=8, length=128, power=0.5)
    assert parse("task:associative_recall,pairs=8,length=128,power=0.5") == wanted
    assert parse("task:text,length=1000") == ArenaText(length=1000)
    for name in (*TASKS, *STORED):
        made = parse(f"task:{name}")
        assert 0 < made.vocab <= 256
        assert made.length > 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("task:listops", "there is no task 'listops'; did you mean 'list_ops'"),
        ("task:", "there is no task ''"),
        ("task:retrieval", "Anthology Network, which TensorFlow Datasets does not have"),
        ("task:list_ops,lenght=3", "unknown key 'lenght'; did you mean 'length'"),
        ("task:list_ops,length", "wanted size=number, each once, got 'length'"),
        ("task:list_ops,", "wanted size=number, each once, got ''"),
        ("task:list_ops,length=long", "got 'length=long'"),
        ("task:copying,vocab=4,vocab=5", "got 'vocab=5'"),
        ("task:copying,vocab=1", "Copying.vocab must be at least 2, got 1"),
        ("task:copying,vocab=2.5", "vocab must be an integer, got 2.5"),
        ("task:associative_recall,power=nan", "power must be a finite number"),
        ("task:image,length=9", "unknown key 'length'"),
    ],
)
def test_refusals_are_one_line_with_the_corpus(spec, message):
    with pytest.raises(ConfigError, match=f"^corpus '{spec}': .*{message}") as refusal:
        parse(spec)
    assert "\n" not in str(refusal.value)


def test_rows_of_a_task_and_of_a_text(tmp_path):
    task = task_of("task:copying,longest=4")
    about, learned, held_out = rows_of("task:copying,longest=4", length=99, count=10, seed=2)
    assert (learned.count, learned.length, held_out.count) == (10, 8, HELD_OUT)
    assert held_out.digest == examples(task, HELD_OUT, HELD_OUT_SEED).digest
    assert "longest=4" in about
    assert "10 examples of 8 tokens" in about
    assert task_of("python") is None
    path = tmp_path / "a.txt"
    path.write_text("word " * 400)
    about, learned, held_out = rows_of(str(path), length=32, count=10, seed=2)
    assert "2,000 bytes" in about
    assert learned.length == held_out.length == 32
