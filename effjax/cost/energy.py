"""Energy and carbon of a run, each as a figure, an interval and where they come from.

A counter of the hardware gives "measured", CPU seconds give "estimated", and what neither can tell
is None with a reason: never zero.

    with EnergyMeter() as meter:
        train()
    print(meter.energy, carbon(meter.energy, region="france"))
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax

from effjax.cost.counters import Counter, nvidia_counters, rapl_counters
from effjax.errors import ConfigError, near

# Watts of one busy core. Low: a hardware thread of AMD's EPYC 2nd generation at full load, least
# of any server in Cloud Carbon Footprint's table from SPECpower_ssj2008
# (https://github.com/cloud-carbon-footprint/ccf-coefficients, output/coefficients-aws-use.csv).
# Middle and high: the default ("Any") and the largest thermal design power per core in Green
# Algorithms' table (Lannelongue et al. 2021, https://doi.org/10.1002/advs.202100707,
# https://github.com/GreenAlgorithms/green-algorithms-tool, data/latest/TDP_cpu.csv).
WATTS_PER_CORE = (1.69, 12.0, 23.8)

# Grams of CO2 equivalent per kWh generated in 2023, lifecycle. Ember's yearly electricity data, by
# https://ourworldindata.org/grapher/carbon-intensity-electricity and, for the world, Norway, Poland
# and Sweden, https://statista.com/statistics/943137 (both citing Ember 2024). Yearly means: the
# marginal intensity of an hour can lie far outside.
INTENSITY = {
    "world": 481.0,
    "norway": 30.0,
    "sweden": 40.7,
    "france": 56.0,
    "finland": 79.0,
    "brazil": 98.0,
    "belgium": 138.0,
    "denmark": 152.0,
    "canada": 170.0,
    "ireland": 291.0,
    "germany": 381.0,
    "australia": 549.0,
    "china": 582.0,
    "poland": 662.0,
    "india": 713.0,
}

# Power usage effectiveness: building energy per computer energy. 1 is a computer in a room; 1.58 is
# the mean of 2023's data centres (Uptime Institute, Global Data Center Survey,
# https://journal.uptimeinstitute.com/large-data-centers-are-mostly-more-efficient-analysis-confirms).
PUE = (1.0, 1.0, 1.58)

JOULES_PER_KWH = 3.6e6

# A run shorter than this many updates of its counter is flagged: the counter may have missed it.
_UPDATES = 10


@dataclass(frozen=True)
class Energy:
    """Joules of a run, with an interval that the truth should lie in.

    `kind` is "measured" only where every part was; `source` names the counters or the reason that
    there is no figure; `flagged` says that the run was too short for them.
    """

    joules: float | None
    low: float | None
    high: float | None
    kind: str | None
    source: str
    flagged: bool = False


@dataclass(frozen=True)
class Carbon:
    """Grams of CO2 equivalent, with their interval; None with a reason where energy is unknown."""

    grams: float | None
    low: float | None
    high: float | None
    source: str


def estimate(cpu_seconds: float, watts: tuple[float, float, float] = WATTS_PER_CORE) -> Energy:
    """Estimates the joules of CPU work: process CPU seconds times watts per busy core.

    `watts` is (low, middle, high); name your own processor's where you know them. Memory, idle
    power and losses of the supply are not in it. Raises ConfigError for a number out of range.
    """
    low, middle, high = watts
    if not cpu_seconds >= 0:
        raise ConfigError(f"cpu_seconds must not be negative, got {cpu_seconds}")
    if not 0 < low <= middle <= high:
        raise ConfigError(f"watts must be (low, middle, high), positive and rising, got {watts}")
    source = f"CPU seconds x {middle:g} W per core ({low:g} to {high:g})"
    return Energy(cpu_seconds * middle, cpu_seconds * low, cpu_seconds * high, "estimated", source)


def unknown(reason: str) -> Energy:
    """Gives the energy of a run about which nothing is known."""
    return Energy(None, None, None, None, reason)


def total(parts: Iterable[Energy]) -> Energy:
    """Adds the energies of devices: unknown where one part is, else estimated where one part is."""
    parts = list(parts)
    if not parts:
        return unknown("no device was metered")
    missing = [part.source for part in parts if part.joules is None]
    if missing:
        return unknown("; ".join(missing))
    kind = "measured" if all(part.kind == "measured" for part in parts) else "estimated"
    return Energy(
        sum(part.joules or 0.0 for part in parts),
        sum(part.low or 0.0 for part in parts),
        sum(part.high or 0.0 for part in parts),
        kind,
        " + ".join(dict.fromkeys(part.source for part in parts)),
        any(part.flagged for part in parts),
    )


def carbon(
    energy: Energy,
    region: str | None = None,
    pue: tuple[float, float, float] = PUE,
) -> Carbon:
    """Converts energy to grams of CO2 equivalent: kWh times grid intensity times PUE.

    Without a region the figure is the world's mean and the interval spans the table's cleanest and
    dirtiest grids. The intervals of energy, intensity and PUE are multiplied. Raises ConfigError
    for a region that is not in `INTENSITY`.
    """
    if region is not None and region not in INTENSITY:
        hint = near(region, INTENSITY)
        raise ConfigError(f"region must be one of {', '.join(INTENSITY)}, got {region!r}{hint}")
    if not 1 <= pue[0] <= pue[1] <= pue[2]:
        raise ConfigError(f"pue must be (low, middle, high), rising from 1, got {pue}")
    if energy.joules is None or energy.low is None or energy.high is None:
        return Carbon(None, None, None, energy.source)
    middle = INTENSITY[region or "world"]
    low, high = (middle, middle) if region else (min(INTENSITY.values()), max(INTENSITY.values()))
    unit = 1 / JOULES_PER_KWH
    return Carbon(
        energy.joules * unit * middle * pue[1],
        energy.low * unit * low * pue[0],
        energy.high * unit * high * pue[2],
        f"{middle:g} gCO2e/kWh ({region or 'world'}, Ember 2023), PUE {pue[1]:g}",
    )


class EnergyMeter:
    """Meters the energy of a `with` block: hardware counters where readable, else CPU seconds.

    RAPL and NVML count the whole machine, other programs included. `energy` is set when the block
    ends. An accelerator without a counter leaves the total unknown: CPU seconds say nothing of it.
    """

    def __init__(
        self,
        platform: str | None = None,
        watts: tuple[float, float, float] = WATTS_PER_CORE,
        cpu: list[Counter] | None = None,
        gpu: list[Counter] | None = None,
    ) -> None:
        self.platform = jax.default_backend() if platform is None else platform
        self.watts = watts
        self._cpu = rapl_counters() if cpu is None else cpu
        wanted = self.platform in ("gpu", "cuda")
        self._gpu = (nvidia_counters() if gpu is None else gpu) if wanted else []
        self.energy = unknown("the meter has not finished")

    def __enter__(self) -> "EnergyMeter":
        self._begin = time.perf_counter(), time.process_time()
        self._counts = [counter.read() for counter in (*self._cpu, *self._gpu)]
        return self

    def __exit__(self, *_: Any) -> None:
        after = [counter.read() for counter in (*self._cpu, *self._gpu)]
        wall = time.perf_counter() - self._begin[0]
        cpu_seconds = time.process_time() - self._begin[1]
        parts = [
            _difference(counter, before, now, wall)
            for counter, before, now in zip(
                (*self._cpu, *self._gpu), self._counts, after, strict=True
            )
        ]
        processor, accelerator = parts[: len(self._cpu)], parts[len(self._cpu) :]
        # A counter that stopped answering is no measurement: fall back on the estimate.
        if not processor or any(part.joules is None for part in processor):
            processor = [estimate(cpu_seconds, self.watts)]
        if self.platform != "cpu" and not accelerator:
            accelerator = [unknown(f"no energy counter for {self.platform}")]
        self.energy = total([*processor, *accelerator])


def _difference(counter: Counter, before: float | None, now: float | None, wall: float) -> Energy:
    """What a counter gained. Its last update may be missing at either end: that is the interval."""
    if before is None or now is None:
        return unknown(f"{counter.source} stopped answering")
    joules = now - before
    if joules < 0:  # the register overflowed, once: it takes minutes to fill
        joules += counter.wraps_at
    lag = min(counter.update_seconds / wall, 1.0) if wall > 0 else 1.0
    error = joules * (lag + counter.error)
    flagged = wall < _UPDATES * counter.update_seconds
    return Energy(
        joules, max(joules - error, 0.0), joules + error, "measured", counter.source, flagged
    )
