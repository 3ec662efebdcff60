"""How much memory a process and its children use, now. Bytes.

    report = measure_memory(pid)

RSS counts a mapped model file's pages wherever they are in memory, PSS shares them out among the processes that map them, and
anonymous memory leaves them out: that is what cannot be given back. GPU memory comes from NVML; without it, None. Knows no engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from runtimes.messages import MemoryReport

T = TypeVar("T")


def measure_memory(pid: int, device: int = 0, leave_out: int | None = None) -> MemoryReport:
    """The process tree's memory, but for a process `leave_out`. One that ends meanwhile counts nothing."""
    rss = 0
    pss: int | None = 0
    anonymous: int | None = 0
    pids = [one for one in _tree(pid) if one != leave_out]
    for one in pids:
        sizes = _read_rollup(one)
        with _gone():
            rss += psutil.Process(one).memory_info().rss
        pss = None if sizes is None or pss is None else pss + sizes["Pss"]
        anonymous = None if sizes is None or anonymous is None else anonymous + sizes["Anonymous"]
    used, of_processes = _device_memory(set(pids), device)
    return MemoryReport(pid, rss, pss, anonymous, of_processes, used)


@contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except psutil.NoSuchProcess:
        return


def _tree(pid: int) -> list[int]:
    pids = [pid]
    with _gone():
        pids += [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return pids


def _read_rollup(pid: int) -> dict[str, int] | None:
    """Fields of /proc/PID/smaps_rollup in bytes; None where there is none (not Linux, not ours, ended)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    fields = (line.split() for line in lines)
    sizes = {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if len(field) == 3}
    return sizes if {"Pss", "Anonymous"} <= sizes.keys() else None


@dataclass(frozen=True)
class GpuMemory:
    """A card by NVML."""

    name: str
    total_bytes: int
    free_bytes: int


def read_gpu(device: int = 0) -> GpuMemory | None:
    """The GPU that CUDA calls `device`; None where there is no NVML or no such GPU."""

    def read(nvml: Any, handle: Any) -> GpuMemory:
        found = nvml.nvmlDeviceGetName(handle)
        name = found.decode() if isinstance(found, bytes) else str(found)
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError:  # a GPU without memory of its own: it has the machine's
            shared = psutil.virtual_memory()
            return GpuMemory(name, int(shared.total), int(shared.available))
        return GpuMemory(name, int(memory.total), int(memory.free))

    return _ask_nvml(device, read)


def read_capability(device: int = 0) -> tuple[int, int] | None:
    """Compute capability of the GPU that CUDA calls `device`, as (9, 0); None where there is no NVML or no such GPU."""

    def read(nvml: Any, handle: Any) -> tuple[int, int]:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        return int(major), int(minor)

    return _ask_nvml(device, read)


def _device_memory(pids: set[int], device: int) -> tuple[int | None, int | None]:
    """(bytes used on the GPU by all, by these processes); None where NVML or the number is not to be had."""

    def read(nvml: Any, handle: Any) -> tuple[int, int | None]:
        used = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        ours = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid in pids]
        # In a container the driver knows other process ids than ours, or keeps the numbers to itself.
        return used, sum(int(n) for n in ours) if ours and None not in ours else None

    return _ask_nvml(device, read) or (None, None)


def _ask_nvml(device: int, read: Callable[[Any, Any], T]) -> T | None:
    try:
        import pynvml
    except ImportError:
        return None
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        return read(nvml, _device_handle(nvml, device))
    except (nvml.NVMLError, IndexError):
        return None
    finally:
        nvml.nvmlShutdown()


def _device_handle(nvml: Any, device: int) -> Any:
    """The GPU that CUDA calls `device`: NVML counts all of them, CUDA those that CUDA_VISIBLE_DEVICES names."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(device)
    name = [part.strip() for part in visible.split(",") if part.strip()][device]
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)


def read_system_used() -> int:
    """Main memory that nobody could have, of the whole machine: on a board whose GPU shares it, all that counts."""
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)


_HWMON = Path("/sys/class/hwmon")


def read_board_power(device: int = 0, hwmon: Path = _HWMON) -> float | None:
    """Watts of the GPU by NVML, or of a Jetson board's input rail by its INA3221 (what tegrastats shows); None: neither is here."""
    watts = _ask_nvml(device, lambda nvml, handle: float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1000)
    return watts if watts is not None else _rail_power(hwmon)


def _rail_power(hwmon: Path) -> float | None:
    """Σ mV · mA over rails called VDD_IN or VIN_SYS_*, the board's inputs; over all rails where none is called so."""
    rails: dict[str, float] = {}
    for chip in sorted(hwmon.glob("hwmon*")):
        try:
            if (chip / "name").read_text().strip() != "ina3221":
                continue
            for label in sorted(chip.glob("in[0-9]*_label")):
                number = label.name[2:].removesuffix("_label")
                millivolts, milliamperes = (float((chip / f"{kind}{number}_input").read_text()) for kind in ("in", "curr"))
                rails[label.read_text().strip()] = millivolts * milliamperes / 1e6
        except (OSError, ValueError):
            continue  # a rail that is switched off cannot be read
    inputs = [watts for name, watts in rails.items() if name == "VDD_IN" or name.startswith("VIN_SYS")]
    return sum(inputs or rails.values()) if rails else None
