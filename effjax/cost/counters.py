"""Energy counters of the hardware: RAPL through Linux's powercap, NVIDIA's through NVML."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """A register that counts joules up. `read` gives them, or None when it can't be read.

    `wraps_at` joules after which it starts again; `update_seconds` between two updates; `error`,
    the relative error of its sensor.
    """

    source: str
    read: Callable[[], float | None]
    wraps_at: float
    update_seconds: float
    error: float


# RAPL updates about every millisecond (Haehnel et al. 2012, section 2,
# https://doi.org/10.1145/2425248.2425252).
_RAPL_UPDATE = 1e-3
# Modelled or sensed on the chip: a few per cent at load (Khan et al. 2018, "RAPL in Action",
# https://doi.org/10.1145/3177754).
_RAPL_ERROR = 0.05
# NVIDIA's sensor updates about every 100 ms and is within 5 % by the maker, but on A100 and H100 it
# samples a quarter of the time (Yang et al. 2024, https://arxiv.org/abs/2312.02741).
_NVML_UPDATE = 0.1
_NVML_ERROR = 0.05


def rapl_counters(root: Path = POWERCAP) -> list[Counter]:
    """Finds the packages and memories whose RAPL counter this user may read; often none.

    Kernels since 5.10 keep the files to root, and virtual machines and containers rarely have them.
    Cores and integrated graphics are parts of a package and are not counted again.
    """
    counters = []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            wraps_at = int((zone / "max_energy_range_uj").read_text()) / 1e6
            (zone / "energy_uj").read_text()
        except (OSError, ValueError):
            continue
        if name.startswith(("package", "dram")):
            read = _rapl_reader(zone / "energy_uj")
            counters.append(Counter(f"RAPL {name}", read, wraps_at, _RAPL_UPDATE, _RAPL_ERROR))
    return counters


def nvidia_counters(library: Any = None) -> list[Counter]:
    """Finds the energy counter of each NVIDIA GPU (Volta and newer); none without the driver."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1") if library is None else library
        if library.nvmlInit_v2() != 0:
            return []
    except (OSError, AttributeError):
        return []
    number = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(number)) != 0:
        return []
    counters = []
    for index in range(number.value):
        handle = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
            continue
        read = _nvml_reader(library, handle)
        if read() is not None:
            # 64 bits of millijoules never overflow.
            source = f"NVML gpu {index}"
            counters.append(Counter(source, read, 2.0**64 / 1e3, _NVML_UPDATE, _NVML_ERROR))
    return counters


def _rapl_reader(path: Path) -> Callable[[], float | None]:
    def read() -> float | None:
        try:
            return int(path.read_text()) / 1e6
        except (OSError, ValueError):
            return None

    return read


def _nvml_reader(library: Any, handle: Any) -> Callable[[], float | None]:
    def read() -> float | None:
        millijoules = ctypes.c_ulonglong()
        status = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3 if status == 0 else None

    return read
