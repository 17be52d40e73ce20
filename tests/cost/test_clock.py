"""Times of functions whose cost is known: sleeping costs wall time, spinning costs CPU time."""

import time

import jax
import jax.numpy as jnp
import pytest

from effjax.cost import clock
from effjax.cost.clock import Spread, Timing, compile_timed, interleave, measure, ratio


def sleep():
    time.sleep(0.02)


def spin():
    end = time.process_time() + 0.02
    while time.process_time() < end:
        pass


def test_sleeping_takes_wall_time_and_spinning_cpu_time():
    timings = interleave({"sleep": sleep, "spin": spin}, rounds=3)
    assert timings["sleep"].wall.low >= 0.02
    assert timings["sleep"].cpu.median < 0.01
    assert timings["spin"].cpu.low >= 0.02
    assert timings["sleep"].rounds == 3
    assert ratio(timings["spin"], timings["sleep"]).low > 1


def test_compilation_is_apart_from_calls():
    def f(x):
        time.sleep(0.3)  # while tracing
        return x * 2

    timing = measure(jax.jit(f), jnp.ones(3), rounds=2)
    assert timing.compile >= 0.3
    assert timing.first < 0.3
    assert timing.wall.median < 0.3
    assert measure(sleep, rounds=1).compile is None


def test_a_first_call_that_compiles_stays_out_of_the_rounds():
    calls = []

    def compiles_once():
        time.sleep(0.0 if calls else 0.2)
        calls.append(None)

    timing = measure(compiles_once, rounds=3, calls=2, warmup=2)
    assert len(calls) == 2 + 3 * 2
    assert timing.first >= 0.2
    assert timing.wall.median < 0.1


def test_every_round_starts_with_another_function():
    order = []
    interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert "".join(order) == "ab" + "ab" + "ba"


def test_results_are_awaited(monkeypatch):
    awaited = []
    monkeypatch.setattr(clock.jax, "block_until_ready", awaited.append)
    measure(lambda: "result", rounds=2)
    assert awaited == ["result"] * 3


def test_compile_timed_gives_an_executable():
    executable, seconds = compile_timed(jax.jit(lambda x, *, by: x * by), jnp.ones(3), by=2.0)
    assert seconds > 0
    assert executable(jnp.ones(3), by=2.0).tolist() == [2.0, 2.0, 2.0]


def test_spread_and_ratio_go_round_by_round():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    slow = Timing((2.0, 30.0), (1.0, 1.0), 0.0)
    fast = Timing((1.0, 10.0), (1.0, 4.0), 0.0)
    assert ratio(slow, fast, "wall") == Spread(2.5, 2.0, 3.0)
    with pytest.raises(ValueError, match="equal rounds"):
        ratio(slow, Timing((1.0,), (1.0,), 0.0))


@pytest.mark.parametrize("wrong", ["rounds", "calls", "warmup"])
def test_counts_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{wrong} must be at least 1, got 0"):
        measure(sleep, **{wrong: 0})
