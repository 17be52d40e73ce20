"""Text files as a corpus: one path, every file of a directory, or a glob."""

import glob
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from effjax.data.documents import Corpus, Document, check_utf8, prefix
from effjax.errors import DataError, near


def text_files(spec: str, limit_bytes: int | None = None, names: Iterable[str] = ()) -> Corpus:
    """Reads the UTF-8 files that a path or a glob (`**` too) names, sorted by relative name.

    A directory means every file below it that is not hidden. Names are relative to the directory or
    to the glob's fixed part, so the digest does not depend on where the files lie. Empty files are
    kept as empty documents, unless all are empty. `limit_bytes` keeps a prefix. `names` are what
    `spec` may have been meant to be, for the message.
    Raises DataError naming the file that is missing, empty, unreadable or not UTF-8.
    """
    files = _listed(spec, names)
    documents = prefix((Document(name, read_text(path)) for name, path in files), limit_bytes)
    if not any(document.text for document in documents):
        if len(files) > 1:
            raise DataError(f"corpus {spec}: all {len(files)} files are empty, wanted text")
        raise DataError(f"corpus file {files[0][1]} is empty, wanted text")
    return Corpus(spec, documents)


def read_text(path: str | os.PathLike[str]) -> bytes:
    """Reads one UTF-8 file as bytes; DataError names the file and the offending byte."""
    where = f"corpus file {os.fspath(path)}"
    try:
        # Reading a pipe or a device would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{where} is not a regular file")
        text = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{where} is unreadable: {error.strerror}") from None
    check_utf8(text, where)
    return text


def _listed(spec: str, names: Iterable[str]) -> list[tuple[str, str]]:
    """The (relative name, path) pairs that a path or glob names, sorted by name, at least one."""
    path = os.path.expanduser(spec)
    kind = _kind(path)
    if kind is not None and stat.S_ISDIR(kind):
        found = _relative(_walk(path), path)
        if not found:
            raise DataError(f"corpus directory {spec} holds no files (hidden ones do not count)")
        return found
    if kind is not None and stat.S_ISREG(kind):
        return [(os.path.basename(path), path)]
    if kind is not None:
        raise DataError(f"corpus {spec} is neither a file nor a directory")
    if glob.has_magic(path):
        matches = {match for match in glob.glob(path, recursive=True) if not os.path.isdir(match)}
        if not matches:
            raise DataError(f"corpus glob {spec!r} matches no file")
        return _relative(matches, _fixed_part(path))
    wanted = ", ".join(["a file", "a directory", "a glob", *names])
    raise DataError(
        f"corpus {spec!r}: no such file or directory; wanted {wanted}{_nearest(path, names)}"
    )


def _kind(path: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise DataError(f"corpus {path} is unreadable: {error.strerror}") from None


def _walk(directory: str) -> Iterable[str]:
    def refuse(error: OSError) -> None:
        # os.walk would pass over it, and part of a corpus would be missing without a word.
        raise DataError(f"corpus directory {error.filename} is unreadable: {error.strerror}")

    for parent, directories, names in os.walk(directory, onerror=refuse):
        directories[:] = [name for name in directories if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _relative(paths: Iterable[str], root: str) -> list[tuple[str, str]]:
    named = ((Path(os.path.relpath(path, root or ".")).as_posix(), path) for path in paths)
    return sorted(named)


def _fixed_part(pattern: str) -> str:
    head = os.path.dirname(pattern)
    while glob.has_magic(head):
        head = os.path.dirname(head)
    return head


def _nearest(path: str, names: Iterable[str]) -> str:
    try:
        siblings = os.listdir(os.path.dirname(path) or ".")
    except (OSError, ValueError):
        siblings = []
    return near(path, names) or near(os.path.basename(path), sorted(siblings))
