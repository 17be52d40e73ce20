"""How far a training run is: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from typing import Any

EVERY = 5.0
"""Seconds between lines where no terminal redraws them."""


class Progress:
    """Prints step, loss, tokens/s, FLOP/s with its share of the measured peak, and the time left.

    flops_per_step: what the program computes; peak: measured FLOP/s, or None where unknown.
    """

    def __init__(
        self,
        label: str,
        steps: int,
        tokens_per_step: int,
        *,
        flops_per_step: float | None = None,
        peak: float | None = None,
        begin: int = 0,
    ):
        self.label, self.steps, self.tokens = label, steps, tokens_per_step
        self.flops, self.peak = flops_per_step, peak
        self.begin, self.started, self.printed = begin, time.perf_counter(), 0.0
        self.bar, self.task = _bar(label, steps, begin)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: int, loss: float) -> None:
        """Tells that a step is done; prints when it is time to."""
        now = time.perf_counter()
        text = self.line(step, loss, now - self.started)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        elif now - self.printed > EVERY or step == self.steps:
            self.printed = now
            print(text, flush=True)

    def line(self, step: int, loss: float, seconds: float) -> str:
        """The line of one step; `seconds` since the run began or went on."""
        done = max(step - self.begin, 1)
        pace = seconds / done
        parts = [
            f"{self.label}: step {step}/{self.steps}",
            f"loss {loss:.3f}",
            f"{self.tokens / max(pace, 1e-9):,.0f} tokens/s",
        ]
        if self.flops is not None:
            rate = self.flops / max(pace, 1e-9)
            share = "" if self.peak is None else f" ({rate / self.peak:.0%} of peak)"
            parts.append(f"{rate / 1e9:.1f} GFLOP/s{share}")
        left = pace * (self.steps - step)
        parts.append(f"{left / 60:.1f} min left" if left > 90 else f"{left:.0f} s left")
        return "  ".join(parts)


def trainable_line(trainable: int, total: int) -> str:
    """How many parameters a run trains: `trainable: N || all: M || %`."""
    return f"trainable: {trainable:,} || all: {total:,} || {100 * trainable / total:.3f}%"


def _bar(label: str, steps: int, begin: int) -> tuple[Any, Any]:
    if not sys.stdout.isatty():
        return None, None
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(BarColumn(bar_width=20), TextColumn("{task.description}"), transient=True)
    bar.start()
    return bar, bar.add_task(label, total=steps, completed=begin)
