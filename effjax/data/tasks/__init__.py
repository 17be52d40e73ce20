"""Tasks: examples with few targets, each of which tells one thing about a model.

    examples(task, count, seed) -> Examples          # drawn
    arena_text("train", limit=1000) -> Examples      # stored
    parse("task:list_ops,length=256,shortest=32")    # what a user types after `--corpus`

A task that is drawn is a frozen dataclass of its sizes, with `vocab` (ids 0 to vocab - 1), `length`
(tokens of a row) and `draw(random, count) -> (tokens, targets)`. Examples are a function of
(task, count, seed) and go where packed text goes: into a loader, a training run, a score. Different
seeds share no stream, so that what is held out is another seed. Stored tasks have splits instead.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from effjax.config import from_json
from effjax.data.examples import Examples, RowSource
from effjax.data.tasks.associative_recall import AssociativeRecall
from effjax.data.tasks.copying import Copying, Reversing
from effjax.data.tasks.drawing import Drawn, Task, examples
from effjax.data.tasks.induction_heads import InductionHeads
from effjax.data.tasks.list_ops import ListOps
from effjax.data.tasks.long_range_arena import ArenaImage, ArenaText, arena_image, arena_text
from effjax.data.tasks.pathfinder import Pathfinder
from effjax.data.tasks.selective_copying import SelectiveCopying
from effjax.errors import ConfigError, near

PREFIX = "task:"
"""What a corpus begins with that is a task."""

HELD_OUT = 512
"""Examples that a task is scored on."""

HELD_OUT_SEED = 2**64 - 1
"""Their seed: one for every run, so that runs of several seeds compare."""


class Stored(Protocol):
    """A task whose examples somebody collected."""

    @property
    def vocab(self) -> int:
        """How many ids there are."""

    @property
    def length(self) -> int:
        """Tokens of a row."""

    def stored(self, split: str, limit: int | None = None) -> Examples:
        """The first `limit` examples of the split `train` or `test`."""


TASKS: dict[str, Callable[..., Task]] = {
    "associative_recall": AssociativeRecall,
    "copying": Copying,
    "induction_heads": InductionHeads,
    "list_ops": ListOps,
    "pathfinder": Pathfinder,
    "reversing": Reversing,
    "selective_copying": SelectiveCopying,
}
STORED: dict[str, Callable[..., Stored]] = {"text": ArenaText, "image": ArenaImage}
MISSING: dict[str, str] = {
    "retrieval": "the arena's retrieval task pairs papers of the ACL Anthology Network, which "
    "TensorFlow Datasets does not have",
}


def parse(spec: str) -> Task | Stored:
    """Reads `task:NAME` or `task:NAME,size=number,...`: a task of `TASKS` or `STORED`.

    Raises ConfigError: a name or a size that is not there (with the nearest), a size that is no
    number or comes twice, one that the task refuses, a task that nobody stores.
    """
    name, *sizes = spec.removeprefix(PREFIX).split(",")
    kinds: Mapping[str, Any] = {**TASKS, **STORED}
    if name in MISSING:
        raise ConfigError(f"corpus {spec!r}: {MISSING[name]}")
    if name not in kinds:
        raise ConfigError(f"corpus {spec!r}: there is no task {name!r}{near(name, kinds)}")
    values: dict[str, int | float] = {}
    for size in sizes:
        key, _, word = size.partition("=")
        number = _number(word)
        if number is None or key in values:
            raise ConfigError(f"corpus {spec!r}: wanted size=number, each once, got {size!r}")
        values[key] = number
    try:
        made: Task | Stored = from_json(kinds[name], values)
    except ConfigError as error:
        raise ConfigError(f"corpus {spec!r}: {error}") from None
    return made


def learned_and_held_out(task: Task | Stored, count: int, seed: int) -> tuple[RowSource, Examples]:
    """`count` examples to learn from, and at most `HELD_OUT` others to score.

    Drawn ones are of this seed, drawn as they are read, and of `HELD_OUT_SEED`. Stored ones are the
    first of the splits `train` and `test`, `count` or all that there are.
    """
    if hasattr(task, "stored"):
        return task.stored("train", count), task.stored("test", HELD_OUT)
    return Drawn(task, count, seed), examples(task, HELD_OUT, HELD_OUT_SEED)


def _number(word: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return None


__all__ = [
    "HELD_OUT",
    "HELD_OUT_SEED",
    "PREFIX",
    "STORED",
    "TASKS",
    "ArenaImage",
    "ArenaText",
    "AssociativeRecall",
    "Copying",
    "Drawn",
    "InductionHeads",
    "ListOps",
    "Pathfinder",
    "Reversing",
    "SelectiveCopying",
    "Stored",
    "Task",
    "arena_image",
    "arena_text",
    "examples",
    "learned_and_held_out",
    "parse",
]
