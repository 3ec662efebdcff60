"""The card and the trace: a GPU's number only where a GPU was measured, and which GPU NVML is asked about."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.card import Card
from bench.measure import Phase, Trace, _basis, _phases, _reader, on_gpu
from bench.render import check_ending, rows_of, save
from bench.sampler import Sample, Samples, sampled
from edgemed.core.errors import InputError, MissingExtraError
from runtimes.devices import find_device
from runtimes.estimate import Item
from runtimes.memory import _device_memory, _rail_power, measure_memory
from runtimes.messages import Buffer, EngineSettings


def trace(seen: int | None, basis: Any, devices: tuple[str, ...], emulated: str = "") -> Trace:
    card = Card((Item("weights", "GPU", 7),), {"GPU": 7, "CPU": 0}, {"GPU": 9, "CPU": 0}, 2, 10, 64, 100.0, 10.0)
    phases = (Phase("load", 1, 2.0, 2.0, 2.0, 5), Phase("decode", 3, 1.0, 0.5, 2.0, 6))
    marks, points = (("load", 0.0, 2.0), ("decode", 2.0, 5.0)), ((0.0, 1), (3.0, 6))
    account = (Buffer("weights", "CUDA0", 7),)
    numbers = (7, 9, seen, basis, None, 0.5, 0.1, 5.0, None)
    return Trace(card, EngineSettings(), phases, 3, 192, account, *numbers, devices, "0", points, marks, emulated)


@pytest.mark.parametrize("name", ["gpu", "rtx3050"])
def test_what_ran_on_the_cpu_is_no_gpus_number(name: str) -> None:
    rows = dict(rows_of(trace(5, "pss", ("CPU",)), find_device(name)))
    assert rows["seen: peak of all processes (PSS)"] == "5 B" and rows["measured on"] == "CPU"
    assert not any("GPU's use" in key or "fits" in value for key, value in rows.items())


def test_a_gpus_number_says_how_it_is_known() -> None:
    gpu = find_device("rtx3050")
    assert "seen: peak on the GPU" in dict(rows_of(trace(5, "process", ("H100",)), gpu))
    rows = dict(rows_of(trace(5, "growth", ("H100",)), gpu))
    assert "seen: peak growth of the whole GPU's use" in rows and any(v.startswith("fits") for v in rows.values())
    assert on_gpu(("H100",)) and not on_gpu(("CPU",))


def test_the_card_the_measured_and_the_distance_are_told() -> None:
    rows = dict(rows_of(trace(6, "process", ("H100",)), find_device("gpu")))
    assert rows["card: weights on the GPU"] == "7 B" and rows["account: weights, CUDA0"] == "7 B"
    assert rows["card: decoding at best"].startswith("10.0 tokens/s") and rows["decoding against the best"] == "0.50"
    assert rows["planned against seen"] == "1.500"
    brief = dict(rows_of(trace(6, "process", ("H100",)), find_device("gpu"), brief=True))
    assert not any(key.startswith("account:") or key == "card: weights on the GPU" for key in brief)


def test_what_the_build_leaves_unused_is_told() -> None:
    told = replace(trace(5, "pss", ("CPU",)), unused=("avx512", "avx512_vnni"))
    assert dict(rows_of(told, find_device("cpu")))["left unused of the processor"].startswith("avx512, avx512_vnni; ")
    assert "left unused of the processor" not in dict(rows_of(trace(5, "pss", ("CPU",)), find_device("cpu")))


def test_an_emulated_figure_is_never_the_devices_speed() -> None:
    rows = rows_of(trace(6, "process", ("H100",), "emulated: 5 B on H100"), find_device("jetson"))
    assert all("emulated" in name for name, _ in rows)
    assert not any("decoding against the best" in name for name, _ in rows)


def reading(at: float, used: int, process: int | None = None, pss: int | None = 3) -> Sample:
    return Sample(at, 9, pss, 1, 2, process, used, 50 + used, 10.0)


def test_growth_is_over_what_was_there_before() -> None:
    samples = [reading(0.0, 4, 1), reading(1.0, 9, 7)]
    assert [_basis(samples, True, False), _basis(samples, True, True), _basis(samples, False, False)] == ["process", "system", "pss"]
    assert _basis([reading(0.0, 4)], True, False) == "growth" and _basis([reading(0.0, 4, pss=None)], False, False) == "rss"
    assert _reader(samples, "growth")(samples[1]) == 5
    assert _reader(samples, "process")(samples[1]) == 6  # less an emulated budget's ballast
    assert _reader(samples, "system")(samples[1]) == 5


def test_a_phase_has_its_own_peak_and_spread() -> None:
    samples = Samples([reading(0.5, 1), reading(1.5, 8), reading(2.5, 2)])
    spans = [("load", 0.0, 1.0), ("decode", 1.0, 2.0), ("decode", 2.0, 2.2), ("decode", 2.3, 3.0)]
    load, decode = _phases(spans, samples, lambda s: s.gpu_used)
    assert (load.name, load.count, load.median_s, load.peak_bytes) == ("load", 1, 1.0, 1)
    assert (decode.count, decode.peak_bytes) == (3, 8) and decode.median_s == pytest.approx(0.7)
    assert decode.low_s < decode.median_s < decode.high_s


def test_the_sampler_runs_beside_and_leaves_itself_out() -> None:
    with sampled(os.getpid(), interval_s=0.01) as samples:
        block = bytearray(b"x" * 80_000_000)
        time.sleep(0.6)
        kept = len(block)
    assert len(samples.all) >= 3 and kept == 80_000_000
    assert all(a.at_s < b.at_s for a, b in zip(samples.all, samples.all[1:], strict=False))
    assert samples.all[-1].rss - samples.all[0].rss > 60_000_000
    # the sampler, a child of this process, would add its own tens of megabytes
    assert samples.all[-1].rss < measure_memory(os.getpid()).rss_bytes + 15_000_000


def test_measurements_are_saved_by_their_ending(tmp_path: Path) -> None:
    told = trace(6, "process", ("H100",))
    rows = rows_of(told, find_device("gpu"))
    for name in ("a.md", "a.json"):
        save(tmp_path / name, "title", told, rows)
    assert "| card: weights on the GPU | 7 B |" in (tmp_path / "a.md").read_text()
    assert json.loads((tmp_path / "a.json").read_text())["seen_bytes"] == 6
    with pytest.raises(InputError, match="ends in"):
        check_ending(tmp_path / "a.pdf")


def test_a_picture_needs_its_extra(tmp_path: Path) -> None:
    told = trace(6, "process", ("H100",))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match="plots"):
            save(tmp_path / "a.png", "title", told, [])
        assert not list(tmp_path.iterdir())
        return
    save(tmp_path / "a.png", "title", told, [])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_boards_power_is_that_of_its_input_rail(tmp_path: Path) -> None:
    chip = tmp_path / "hwmon3"
    chip.mkdir()
    files = {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "2000", "in2_label": "VDD_CPU"}
    for name, text in {**files, "in2_input": "5000", "curr2_input": "700", "in3_label": "NC"}.items():
        (chip / name).write_text(f"{text}\n")
    assert _rail_power(tmp_path) == pytest.approx(10.0)  # the third rail cannot be read
    assert _rail_power(tmp_path / "none") is None


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
