"""Tasks whose examples are drawn: each tells one thing about a model apart from the rest.

    examples(task, count, seed) -> Examples

A task is a frozen dataclass of its sizes, with `vocab` (ids 0 to vocab - 1), `length` (tokens of a
row) and `draw(random, count) -> (tokens, targets)`. Examples are a function of (task, count, seed)
and go where packed text goes: into a loader, a training run, a score. Different seeds share no
stream, so that what is held out is another seed.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from effjax.data.examples import Examples
from effjax.data.tasks.associative_recall import AssociativeRecall
from effjax.data.tasks.copying import Copying, Reversing
from effjax.data.tasks.induction_heads import InductionHeads
from effjax.data.tasks.list_ops import ListOps
from effjax.data.tasks.pathfinder import Pathfinder
from effjax.data.tasks.selective_copying import SelectiveCopying
from effjax.errors import ConfigError


class Task(Protocol):
    """What `examples` draws from."""

    @property
    def vocab(self) -> int:
        """How many ids there are."""

    @property
    def length(self) -> int:
        """Tokens of a row."""

    def draw(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), both int32 [count, length], -1 at padding and where none is asked."""


TASKS: dict[str, Callable[..., Task]] = {
    "associative_recall": AssociativeRecall,
    "copying": Copying,
    "induction_heads": InductionHeads,
    "list_ops": ListOps,
    "pathfinder": Pathfinder,
    "reversing": Reversing,
    "selective_copying": SelectiveCopying,
}


def examples(task: Task, count: int, seed: int) -> Examples:
    """Draws `count` examples of a task.

    Raises ConfigError for a count below 1 or a seed below 0.
    """
    if count < 1 or seed < 0:
        raise ConfigError(f"examples: wanted count >= 1 and seed >= 0, got {count} and {seed}")
    random = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))
    tokens, targets = task.draw(random, count)
    return Examples(tokens.astype(np.int32), targets.astype(np.int32), repr(task))


__all__ = [
    "TASKS",
    "AssociativeRecall",
    "Copying",
    "InductionHeads",
    "ListOps",
    "Pathfinder",
    "Reversing",
    "SelectiveCopying",
    "Task",
    "examples",
]
