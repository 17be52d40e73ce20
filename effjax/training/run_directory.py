"""The directory of a run: the config it belongs to, and metrics, a JSON line each."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effjax.config import differences, read_json, to_json
from effjax.errors import ConfigError


class RunDirectory:
    """A directory that belongs to one config: `config.json`, `metrics.jsonl` and what is put in.

    Opening it again with the same config goes on; another config is refused with the differences,
    unless nothing has been made there yet. Fields named in `free` may change from time to time.
    Raises ConfigError where it cannot be made or written.
    """

    def __init__(self, path: str | Path, config: Any, *, free: Sequence[str] = ()):
        self.path = Path(path)
        where = self.path / "config.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.resumed = where.exists() and self._holds_results()
            wanted = to_json(config)
            changed = differences(read_json(str(where)), wanted) if self.resumed else []
            if refused := [line for line in changed if line.split(":")[0] not in free]:
                raise ConfigError(
                    f"{str(self.path)!r} belongs to another config: {'; '.join(refused)}; "
                    "give another --out, or the same options"
                )
            if not self.resumed or changed:
                _write_whole(where, json.dumps(wanted, indent=1) + "\n")
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(
                f"run directory {str(self.path)!r} cannot be written: {error.strerror}"
            ) from None

    def _holds_results(self) -> bool:
        """Whether anything was made here, or only a start that was refused."""
        made = [p for p in self.path.iterdir() if p.name not in ("config.json", "metrics.jsonl")]
        metrics = self.path / "metrics.jsonl"
        return bool(made) or (metrics.exists() and metrics.stat().st_size > 0)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def log(self, **values: Any) -> None:
        """Appends one line to `metrics.jsonl`; a number that is not finite is null in JSON."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._metrics.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        """Closes the metrics file."""
        self._metrics.close()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, so that an interrupted start is no start."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
