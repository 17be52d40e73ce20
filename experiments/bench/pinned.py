"""How every benchmark here times: one core, one thread, CPU seconds, interleaved rounds.

Import this first: XLA and torch size their thread pools by the cores that a process may use.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping

CORE = max(os.sched_getaffinity(0))
os.sched_setaffinity(0, {CORE})
os.environ["OMP_NUM_THREADS"] = "1"


def rounds(thunks: Mapping[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """CPU seconds of each thunk, round by round; each is called once before, unmeasured.

    A thunk returns when its work is done (it blocks until its result is ready).
    """
    for thunk in thunks.values():
        thunk()
    seconds: dict[str, list[float]] = {name: [] for name in thunks}
    for _ in range(count):
        for name, thunk in thunks.items():
            begin = time.process_time()
            thunk()
            seconds[name].append(time.process_time() - begin)
    return seconds


def show(seconds: dict[str, list[float]], base: str) -> None:
    """Prints seconds (median) and, round by round, how many times as fast as `base` each is."""
    for name, taken in seconds.items():
        ratios = [b / s for b, s in zip(seconds[base], taken, strict=True)]
        print(
            f"  {name:34} {statistics.median(taken):8.4f} cpu s   "
            f"speed {min(ratios):.2f}/{statistics.median(ratios):.2f}/{max(ratios):.2f} of {base}"
        )
