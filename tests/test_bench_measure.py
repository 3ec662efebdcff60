"""The card and the trace: a GPU's number only where a GPU was measured, and which GPU NVML is asked about."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from bench.measure import Trace, _Peaks, on_gpu, rows_of
from runtimes.devices import find_device
from runtimes.memory import _device_memory


def trace(peak: int | None, basis: Any, devices: tuple[str, ...]) -> Trace:
    return Trace(1, 1, 1, 3, 9_000, None, peak, basis, 0.1, 0.1, 0.1, 0.1, 10.0, 3, devices, "0")


@pytest.mark.parametrize("name", ["gpu", "rtx3050"])
def test_what_ran_on_the_cpu_is_no_gpus_number(name: str) -> None:
    rows = dict(rows_of(trace(None, None, ("CPU",)), find_device(name)))
    assert rows["measured: peak on the GPU"] == "not measured" and rows["measured on"] == "CPU"
    assert not any("RSS" in key for key in rows) and not any("fit" in value for value in rows.values())


def test_a_gpus_number_says_how_it_is_known() -> None:
    gpu = find_device("rtx3050")
    assert "measured: peak on the GPU" in dict(rows_of(trace(5, "process", ("H100",)), gpu))
    rows = dict(rows_of(trace(5, "growth", ("H100",)), gpu))
    assert "measured: peak growth of the whole GPU's use" in rows and any(v.startswith("fits") for v in rows.values())
    assert on_gpu(("H100",)) and not on_gpu(("CPU",))


def test_the_devices_growth_stands_in_for_the_processs_number() -> None:
    assert _Peaks(used=7, before=3).device_bytes() == (4, "growth")
    assert _Peaks(process=2, used=7, before=3).device_bytes() == (2, "process")
    assert _Peaks(used=7).device_bytes() == (None, None)


class Nvml:
    """NVML of a machine with three GPUs; GPU n uses n · 100 bytes, and process 1 half of that."""

    NVMLError = RuntimeError

    def __init__(self, process_bytes: int | None = 50) -> None:
        self.process_bytes = process_bytes

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        return {"GPU-b": 1}[name]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=100 * handle)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> Any:
        return [SimpleNamespace(pid=1, usedGpuMemory=self.process_bytes)]


@pytest.mark.parametrize(
    ("visible", "device", "used"), [(None, 2, 200), ("2,1", 0, 200), ("2,1", 1, 100), ("GPU-b", 0, 100), ("1", 1, None), ("", 0, None)]
)
def test_cuda_visible_devices_are_mapped(monkeypatch: pytest.MonkeyPatch, visible: str | None, device: int, used: int | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _device_memory({1}, device) == (used, None if used is None else 50)


def test_a_process_without_a_number_is_none_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(None))
    assert _device_memory({1}, 1) == (100, None)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(50))
    assert _device_memory({2}, 1) == (100, None)
