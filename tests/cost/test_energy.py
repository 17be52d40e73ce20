"""Energy and carbon against arithmetic, on synthetic counters; unknown is None, never zero."""

import time

import pytest

from effjax.cost import energy
from effjax.cost.counters import Counter
from effjax.cost.energy import INTENSITY, Energy, EnergyMeter, carbon, estimate, total, unknown
from effjax.errors import ConfigError

MEASURED = Energy(10.0, 9.0, 11.0, "measured", "RAPL package-0")


def scripted(*readings, wraps_at=1000.0, update_seconds=1e-9, error=0.0):
    """A counter that answers with these joules, one after the other."""
    rest = iter(readings)
    return Counter("scripted", lambda: next(rest), wraps_at, update_seconds, error)


def metered(*, platform="cpu", seconds=0.0, **counters):
    with EnergyMeter(platform, **{"cpu": [], "gpu": [], **counters}) as meter:
        time.sleep(seconds)
    return meter.energy


def test_estimate_is_cpu_seconds_times_watts():
    low, middle, high = energy.WATTS_PER_CORE
    got = estimate(10.0)
    assert (got.low, got.joules, got.high) == (10 * low, 10 * middle, 10 * high)
    assert got.kind == "estimated"
    assert estimate(2.0, (1.0, 1.0, 1.0)).joules == 2.0


@pytest.mark.parametrize(
    "arguments",
    [(-1.0,), (float("nan"),), (1.0, (0.0, 1.0, 2.0)), (1.0, (3.0, 2.0, 4.0))],
)
def test_estimate_refuses_numbers_out_of_range(arguments):
    with pytest.raises(ConfigError):
        estimate(*arguments)


def test_total_is_as_good_as_its_worst_part():
    both = total([MEASURED, estimate(1.0, (1.0, 2.0, 3.0))])
    assert (both.joules, both.low, both.high, both.kind) == (12.0, 10.0, 14.0, "estimated")
    assert total([MEASURED, MEASURED]).kind == "measured"
    lost = total([MEASURED, unknown("no counter")])
    assert (lost.joules, lost.low, lost.kind, lost.source) == (None, None, None, "no counter")
    assert total([]).joules is None


def test_a_counter_measures_its_difference():
    got = metered(cpu=[scripted(5.0, 8.0)], seconds=0.01)
    assert got.joules == 3.0
    assert got.kind == "measured"
    assert not got.flagged
    assert got.low == pytest.approx(3.0)
    assert metered(cpu=[scripted(0.0, 4.0, error=0.25)], seconds=0.01).high == pytest.approx(5.0)


def test_a_counter_that_wraps_is_unwrapped():
    assert metered(cpu=[scripted(998.0, 3.0)]).joules == 5.0


def test_a_run_shorter_than_the_counter_is_flagged_and_wide():
    got = metered(cpu=[scripted(0.0, 2.0, update_seconds=10.0)])
    assert got.flagged
    assert (got.low, got.joules, got.high) == (0.0, 2.0, 4.0)
    assert total([got, MEASURED]).flagged


def test_without_a_counter_the_processor_is_estimated():
    with EnergyMeter("cpu", cpu=[], gpu=[]) as meter:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
    assert meter.energy.kind == "estimated"
    assert meter.energy.joules >= 0.05 * energy.WATTS_PER_CORE[1]


def test_a_counter_that_stops_answering_is_no_measurement():
    assert metered(cpu=[scripted(5.0, None)]).kind == "estimated"


def test_an_accelerator_without_a_counter_leaves_the_total_unknown():
    got = metered(platform="tpu")
    assert got.joules is None
    assert got.source == "no energy counter for tpu"
    assert metered(platform="gpu").joules is None


def test_a_gpu_adds_its_own():
    got = metered(platform="gpu", cpu=[scripted(0.0, 1.0)], gpu=[scripted(0.0, 7.0)])
    assert (got.joules, got.kind) == (8.0, "measured")


def test_the_meter_finds_its_own_counters():
    with EnergyMeter() as meter:
        assert meter.energy.joules is None
    assert meter.energy.joules is not None


def test_carbon_is_kwh_times_intensity_times_pue():
    kwh = Energy(3.6e6, 1.8e6, 7.2e6, "measured", "")
    got = carbon(kwh, "france", pue=(1.0, 1.2, 1.5))
    assert got.grams == pytest.approx(56 * 1.2)
    assert got.low == pytest.approx(0.5 * 56)
    assert got.high == pytest.approx(2 * 56 * 1.5)


def test_carbon_without_a_region_spans_the_table():
    kwh = Energy(3.6e6, 3.6e6, 3.6e6, "measured", "")
    got = carbon(kwh, pue=(1.0, 1.0, 1.0))
    assert got.grams == pytest.approx(INTENSITY["world"])
    assert got.low == pytest.approx(min(INTENSITY.values()))
    assert got.high == pytest.approx(max(INTENSITY.values()))
    assert "world" in got.source


def test_carbon_of_unknown_energy_is_unknown():
    got = carbon(unknown("no counter"))
    assert (got.grams, got.low, got.high, got.source) == (None, None, None, "no counter")


def test_carbon_refuses_unknown_regions_and_impossible_pue():
    with pytest.raises(ConfigError, match="did you mean 'france'"):
        carbon(MEASURED, "frances")
    with pytest.raises(ConfigError, match="pue"):
        carbon(MEASURED, pue=(0.5, 1.0, 1.0))


def test_a_meter_of_zero_for_unknown_would_be_caught(monkeypatch):
    """The fault that the null rule is there for: a device nobody metered, reported as free."""
    monkeypatch.setattr(energy, "unknown", lambda _: Energy(0.0, 0.0, 0.0, "measured", ""))
    assert metered(platform="tpu").joules is not None
