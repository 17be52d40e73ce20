"""Files that are either whole or not there."""

import contextlib
import os
from pathlib import Path

from effjax.errors import EffjaxError


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file atomically: a reader sees the old file or the whole new one.

    The text goes to a temporary file beside `path`, is flushed to the disk, and takes its name.

    Raises EffjaxError naming the path where it cannot be written; the old file is then intact.
    """
    place = Path(path)
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except OSError as error:
        raise EffjaxError(f"cannot write {place}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
