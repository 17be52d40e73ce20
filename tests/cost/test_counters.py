"""Counters read from a made-up sysfs and a made-up driver library."""

import ctypes

from effjax.cost.counters import nvidia_counters, rapl_counters


def zone(root, folder, name, microjoules):
    path = root / folder
    path.mkdir()
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text("262143328850\n")
    if microjoules is not None:
        (path / "energy_uj").write_text(f"{microjoules}\n")


def test_rapl_counts_packages_and_memory_once(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 3_000_000)  # a part of the package
    zone(tmp_path, "intel-rapl:0:1", "dram", 1_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", None)  # this user may not read it
    (tmp_path / "intel-rapl:2").mkdir()
    counters = rapl_counters(tmp_path)
    assert [c.source for c in counters] == ["RAPL package-0", "RAPL dram"]
    assert [c.read() for c in counters] == [5.0, 1.0]
    assert counters[0].wraps_at == 262143.32885
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("broken")
    assert counters[0].read() is None


def test_no_rapl_no_counter(tmp_path):
    assert rapl_counters(tmp_path / "missing") == []


class Driver:
    """Two GPUs, the second too old for the counter."""

    def __init__(self, status=0):
        self.status = status

    def nvmlInit_v2(self):
        return self.status

    def nvmlDeviceGetCount_v2(self, number):
        ctypes.cast(number, ctypes.POINTER(ctypes.c_uint))[0] = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = index + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, millijoules):
        ctypes.cast(millijoules, ctypes.POINTER(ctypes.c_ulonglong))[0] = 2500
        return 0 if handle.value == 1 else 3


def test_nvidia_gpus_that_have_the_counter():
    counters = nvidia_counters(Driver())
    assert [c.source for c in counters] == ["NVML gpu 0"]
    assert counters[0].read() == 2.5


def test_no_driver_no_counter():
    assert nvidia_counters(Driver(status=9)) == []
    assert nvidia_counters(object()) == []
