"""The peaks are measured with small work, and once."""

from effjax.cost import peaks as module
from effjax.cost.peaks import peaks


def test_peaks_are_measured_once(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.02)
    monkeypatch.setattr(module, "_LARGEST", 512)
    monkeypatch.setattr(module, "_TRAFFIC_BYTES", 1 << 22)
    module._measured.cache_clear()
    first = peaks()
    rates = (first.matmul_float32, first.matmul_bfloat16, first.copy, first.read)
    assert all(1e7 < rate < 1e17 for rate in rates)
    assert peaks() is first
    module._measured.cache_clear()
