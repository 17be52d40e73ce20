"""The first Ctrl-C asks, the second insists."""

import signal
import threading

import pytest

from effjax.training.interruption import Interruption


def test_the_first_interruption_sets_the_flag_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as asked:
        assert not asked.to_stop
        signal.raise_signal(signal.SIGINT)
        assert asked.to_stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_before_is_restored_after_an_error():
    before = signal.getsignal(signal.SIGINT)

    def fail():
        with Interruption():
            raise RuntimeError("in a step")

    with pytest.raises(RuntimeError, match="in a step"):
        fail()
    assert signal.getsignal(signal.SIGINT) is before


def test_each_run_begins_unasked():
    with Interruption() as first:
        signal.raise_signal(signal.SIGINT)
    with Interruption() as second:
        assert first.to_stop
        assert not second.to_stop


def test_outside_the_main_thread_nothing_changes():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run():
        with Interruption() as asked:
            seen.append((signal.getsignal(signal.SIGINT) is before, asked.to_stop))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(True, False)]
