"""What a run learns from and is scored on: rows, of a text or of a task."""

from typing import NamedTuple

from effjax.data.corpora import load
from effjax.data.examples import RowSource
from effjax.data.packing import pack_corpus
from effjax.data.tasks import PREFIX, Stored, Task, learned_and_held_out, parse
from effjax.data.tokenizers import ByteTokenizer


class Source(NamedTuple):
    """Rows to learn from, rows to be scored on, and a line that says what they are."""

    about: str
    learned: RowSource
    held_out: RowSource


def task_of(spec: str) -> Task | Stored | None:
    """The task that `task:NAME,size=number` names, None for a text. Raises ConfigError."""
    return parse(spec) if spec.startswith(PREFIX) else None


def rows_of(spec: str, *, length: int, count: int, seed: int) -> Source:
    """Rows of a text, packed to `length` bytes; or of a task, `count` of `seed` and of its length.

    Raises DataError and ConfigError as `effjax.data.load` and `effjax.data.tasks.parse` do.
    """
    task = task_of(spec)
    if task is not None:
        rows, held_out = learned_and_held_out(task, count, seed)
        about = f"{task}, {rows.count:,} examples of {rows.length:,} tokens"
        return Source(f"{about}, digest {rows.digest[:16]}", rows, held_out)
    corpus = load(spec)
    learned, scored = (pack_corpus(part, ByteTokenizer(), length) for part in corpus.split())
    about = f"{corpus.name}, {corpus.bytes:,} bytes, digest {corpus.digest[:16]}"
    return Source(about, learned, scored)
