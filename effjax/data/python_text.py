"""Text that ships with Python itself, so that the default corpus needs no download."""

import os
from collections.abc import Iterator
from pathlib import Path

from effjax.data.documents import Corpus, Document, prefix
from effjax.data.files import read_text
from effjax.errors import DataError

SOURCES_BYTES = 4_000_000

_TESTS = {"test", "tests", "idle_test"}
_NOT_PYTHONS_OWN = {"site-packages", "dist-packages", "__pycache__"}
# `encodings` is 0.9 to 1.4 MB of generated character tables, which would be a fifth to a third of
# the prefix; `pydoc_data` is the other text; the rest is what distributions ship apart or not at
# all, so that leaving it out lets equal versions of Python give equal texts on more machines.
_TABLES = {"encodings", "pydoc_data"}
_OPTIONAL = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo", "venv"}
_SKIPPED = _TESTS | _NOT_PYTHONS_OWN | _TABLES | _OPTIONAL
_SITE_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize", "_distutils_system_mod")


def python_sources(limit_bytes: int | None = None) -> Corpus:
    """The standard library's sources: sorted paths without tests, the first 4 MB of them.

    On CPython 3.11 and 3.13 that is `__future__.py` to `mailbox.py` or `logging`, some 220 files
    about many things, no package over 13% of the text. It depends on Python's version, as the
    digest does: compare results only at equal digests.
    Raises DataError where the sources are not installed.
    """
    root = Path(os.__file__).parent
    # Installers for Windows write CRLF; the text should be the same there.
    sources = (
        Document(name, read_text(root / name).replace(b"\r\n", b"\n"))
        for name in sorted(_source_names(root))
    )
    documents = prefix(sources, SOURCES_BYTES if limit_bytes is None else limit_bytes)
    if not any(document.text for document in documents):
        raise DataError(
            f"corpus 'python': the standard library's sources are not in {root}; "
            "give text files instead"
        )
    return Corpus("python", documents)


def python_topics(limit_bytes: int | None = None) -> Corpus:
    """The documentation topics behind Python's `help()`: 79 texts, about 0.5 MB, sorted by name.

    They are prose and grammar where the sources are code: the second text, for fine-tuning.
    Raises DataError where they are not installed.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "corpus 'python-topics': this Python has no pydoc_data; give text files instead"
        ) from None
    documents = (Document(name, topics[name].encode()) for name in sorted(topics))
    return Corpus("python-topics", prefix(documents, limit_bytes))


def _source_names(root: Path) -> Iterator[str]:
    for parent, directories, names in os.walk(root):
        directories[:] = [
            name
            for name in directories
            if name not in _SKIPPED and not name.startswith(("config-", "."))
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith(_SITE_FILES):
                yield Path(parent, name).relative_to(root).as_posix()
