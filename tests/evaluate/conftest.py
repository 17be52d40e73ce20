"""A comparison of twelve rows, with figures such as a small machine would measure."""

import pytest

from effjax.evaluate.record import (
    Bytes,
    Carbon,
    Corpus,
    Device,
    Energy,
    Flops,
    Memory,
    Parameters,
    Quality,
    Record,
    StateBytes,
    Status,
    Time,
)

SOURCES = Corpus("python sources", "5f2c9a71d0e84b36" * 4, 3_355_443)
TOPICS = Corpus("python topics", "0b77d41ce9a2f853" * 4, 412_307)
SHARED = {
    "run": "compare",
    "config_digest": "9d1f" * 16,
    "device": Device("cpu", 1, 2),
    "versions": {"effjax": "0.1.0", "jax": "0.10.2", "python": "3.11.9"},
}
NOT_TRAINED = dict.fromkeys(
    ("time.compile", "time.step_median", "time.step_spread", "time.tokens_per_s_train"),
    "nothing is trained",
)

# method, seed, recipe, bits per byte, MB stored, saving, kFLOPs and tokens/s generating, state.
ROWS = [
    ("softmax", 0, (), 2.214, 3.290, "none", 1690, 2110, (0, 2048)),
    ("int8", 0, ({"quantize": {"bits": 8}},), 2.2146, 0.846, "realised", 1690, 2890, (0, 2048)),
    (
        "int4 groups",
        0,
        ({"quantize": {"bits": 4}},),
        2.263,
        0.476,
        "realised",
        1690,
        1730,
        (0, 2048),
    ),
    ("magnitude 50%", 0, ({"prune": {}},), 2.241, 3.702, "simulated", 1690, 2080, (0, 2048)),
    ("2:4", 0, ({"semi_structured": {}},), 2.297, 1.951, "realised", 1690, 1340, (0, 2048)),
    ("svd", 0, ({"svd": {"rank": 64}},), 2.371, 2.012, "realised", 1130, 2480, (0, 2048)),
    ("lora", 0, ({"lora": {"rank": 8}},), 1.874, 3.421, "none", 1756, 2020, (0, 2048)),
    ("window", 0, (), 2.229, 3.290, "none", 1656, 2230, (131072, 0)),
    ("retention", 0, (), 2.251, 3.421, "none", 1640, 2610, (65536, 0)),
    ("state space", 0, (), 2.402, 2.761, "none", 1390, 3150, (32768, 0)),
    ("switch", 0, (), 2.158, 9.583, "none", 1723, 1490, (0, 2048)),
    ("softmax", 1, (), 2.229, 3.290, "none", 1690, 2090, (0, 2048)),
]


def build(method, seed, recipe, bits, megabytes, saving, kflops, speed, state) -> Record:
    """One finished row."""
    adapted, trained = method == "lora", not recipe or method == "lora"
    joules = 940.0 + 1e5 / speed
    return Record(
        **SHARED,
        method=method,
        recipe=recipe,
        seed=seed,
        corpus=TOPICS if adapted else SOURCES,
        params=Parameters(822_528, 65_536 if adapted else 822_528 * trained),
        bytes=Bytes(round(megabytes * 1e6), saving),
        flops=Flops(2_000_000_000_000, 2_310_000_000_000, kflops * 1e3),
        state_bytes=StateBytes(*state),
        memory=Memory(61_300_000, 13_200_000, "XLA buffer assignment"),
        time=Time(4.1, 0.052, 0.006, 78_300.0, float(speed), 5)
        if trained
        else Time(tokens_per_s_generate=float(speed), rounds=5),
        energy=Energy(joules, joules * 0.6, joules * 1.9, "estimated from CPU seconds"),
        carbon=Carbon(0.12, 0.02, 0.4),
        quality=Quality("bits_per_byte", bits, bits - 0.011, bits + 0.012, (seed,)),
        reasons={} if trained else NOT_TRAINED,
    )


def skipped(method: str, why: str) -> Record:
    """A row that did not run."""
    return Record(
        **SHARED,
        method=method,
        seed=0,
        corpus=SOURCES,
        quality=Quality("bits_per_byte"),
        status=Status(False, why),
        reasons={"*": why},
    )


@pytest.fixture(scope="session")
def records() -> list[Record]:
    """The twelve rows of the main comparison."""
    return [build(*row) for row in ROWS]


@pytest.fixture(scope="session")
def unfinished() -> Record:
    """A thirteenth, which was skipped."""
    return skipped("long window", "needs about 95 s and 40 s are left")
