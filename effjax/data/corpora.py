"""Where text comes from: `load` turns what a user types after `--corpus` into a Corpus."""

from collections.abc import Callable

from effjax.data.documents import Corpus, Document
from effjax.data.files import text_files
from effjax.data.python_text import python_sources, python_topics
from effjax.data.tfds_text import tfds_text
from effjax.errors import ConfigError

__all__ = ["CORPORA", "Corpus", "Document", "load"]

CORPORA: dict[str, Callable[[int | None], Corpus]] = {
    "python": python_sources,
    "python-topics": python_topics,
}


def load(spec: str = "python", limit_bytes: int | None = None) -> Corpus:
    """Loads a corpus by name (`python`, `python-topics`), path, glob or `tfds:NAME/config:split`.

    `limit_bytes` keeps a prefix of that many bytes, cut at a character's edge; None means all, and
    4 MB of `python`. A name wins over a file of that name: write `./python` for the file.
    Raises DataError naming the file, or the nearest name; ConfigError for a limit below 1.
    """
    if limit_bytes is not None and limit_bytes < 1:
        raise ConfigError(f"limit_bytes must be at least 1, got {limit_bytes}")
    if spec in CORPORA:
        return CORPORA[spec](limit_bytes)
    if spec.startswith("tfds:"):
        return tfds_text(spec, limit_bytes)
    return text_files(spec, limit_bytes, [*CORPORA, "tfds:NAME"])
