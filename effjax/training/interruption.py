"""An interruption that waits for the step: Ctrl-C asks, and the loop stops where it can save."""

import signal
import threading
from types import FrameType
from typing import Any


class Interruption:
    """Inside `with Interruption() as asked`, the first Ctrl-C only sets `asked.to_stop`.

    A step donates its state, so in its midst there is nothing to save. A second Ctrl-C raises
    KeyboardInterrupt at once. Outside the main thread nothing is changed.
    """

    def __init__(self) -> None:
        self.to_stop = False
        self._before: Any = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._asked)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.to_stop:
            raise KeyboardInterrupt
        self.to_stop = True
