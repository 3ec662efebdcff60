"""What a converted model costs: the static card first, then what was measured, then the distance between the two.

    trace = measure_artifact(artifact, find_device("cpu"))          # a profile of runtimes/devices.py

Static: both files and the key-value cache, as they are reported at loading. Measured: the memory of this program's whole process
tree on a CPU, or of the engine on the GPU by NVML (what all of the device holds more than before, where NVML names no process),
sampled while questions are answered; and the speed of that. Thin for now:
fixed questions about the fixed probe image, greedy. A device that is not here has its budget emulated, and every figure says so.
"""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from edgemed.core.manifest import Artifact
from edgemed.core.probe import probe_pixels
from edgemed.core.units import format_bytes, format_duration
from runtimes.devices import Profile
from runtimes.emulation import emulate
from runtimes.engine import Engine
from runtimes.memory import measure_memory
from runtimes.messages import EngineSettings, Finished, PreparedImage
from runtimes.opening import plan_artifact
from runtimes.planner import Wish

QUESTIONS = ("Describe this image in detail.", "What organs can be seen? Name all of them.", "Is anything abnormal? Explain.")
MAX_TOKENS = 64
CONTEXT_TOKENS = 1024
_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Trace:
    """One measurement. Seconds and bytes; medians over the questions where there are several."""

    model_bytes: int
    vision_bytes: int
    kv_bytes: int
    static_bytes: int
    peak_rss_bytes: int
    peak_anonymous_bytes: int | None
    # On the GPU; by the process's own number, or by what the whole device holds more than before the engine started.
    peak_device_bytes: int | None
    device_basis: Literal["process", "growth"] | None
    load_s: float
    image_encode_s: float
    first_token_s: float
    follow_up_first_token_s: float
    decode_tokens_per_s: float
    new_tokens: int
    devices: tuple[str, ...]
    runtime: str
    # What is emulated on what, where the figures are not the device's own.
    emulated: str = ""


@dataclass
class _Peaks:
    rss: int = 0
    anonymous: int | None = None
    # Of the GPU: this program's, everybody's, and everybody's at the start.
    process: int | None = None
    used: int | None = None
    before: int | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def sample(self, device: int) -> None:
        report = measure_memory(os.getpid(), device)
        self.rss = max(self.rss, report.rss_bytes)
        self.anonymous = _larger(self.anonymous, report.anonymous_bytes)
        self.process = _larger(self.process, report.device_process_bytes)
        self.used = _larger(self.used, report.device_used_bytes)

    def device_bytes(self) -> tuple[int | None, Literal["process", "growth"] | None]:
        """What the GPU held for the engine at most, and how that is known."""
        if self.process is not None:
            return self.process, "process"
        if self.used is not None and self.before is not None:
            return self.used - self.before, "growth"
        return None, None


def _larger(a: int | None, b: int | None) -> int | None:
    return max(v for v in (a, b) if v is not None) if (a, b) != (None, None) else None


@contextmanager
def _sampled(device: int) -> Iterator[_Peaks]:
    peaks = _Peaks(before=measure_memory(os.getpid(), device).device_used_bytes)

    def run() -> None:
        while not peaks.stop.wait(_SAMPLE_S):
            peaks.sample(device)

    thread = threading.Thread(target=run, name="memory", daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        peaks.stop.set()
        thread.join()
        peaks.sample(device)


def measure_artifact(artifact: Artifact, device: Profile) -> Trace:
    """Plan, load, ask three questions about one image, and measure. Raises what the engine raises, and ResourceError."""
    wish = Wish(context_tokens=min(CONTEXT_TOKENS, artifact.manifest.llm.context_length))
    with emulate(device) as stage:
        return replace(_measure(artifact, stage.limit(plan_artifact(artifact, stage.target, wish))), emulated=stage.label)


def _measure(artifact: Artifact, settings: EngineSettings) -> Trace:
    size_px = artifact.manifest.image.size_px
    image = PreparedImage(probe_pixels(size_px).tobytes(), size_px)
    with _sampled(settings.device) as peaks, Engine.open(artifact, settings) as engine:
        answers = [engine.ask(question, [image], max_tokens=MAX_TOKENS, ignore_end=True) for question in QUESTIONS]
        report = engine.report
        peaks.sample(settings.device)
    device_bytes, basis = peaks.device_bytes() if on_gpu(report.devices) else (None, None)
    return Trace(
        model_bytes=report.model_bytes,
        vision_bytes=report.vision_bytes,
        kv_bytes=report.kv_bytes,
        static_bytes=report.model_bytes + report.vision_bytes + report.kv_bytes,
        peak_rss_bytes=peaks.rss,
        peak_anonymous_bytes=peaks.anonymous,
        peak_device_bytes=device_bytes,
        device_basis=basis,
        load_s=report.load_s,
        image_encode_s=answers[0].timings.encode_s,
        first_token_s=answers[0].timings.first_token_s,
        follow_up_first_token_s=statistics.median(a.timings.first_token_s for a in answers[1:]),
        decode_tokens_per_s=_decode_speed(answers),
        new_tokens=sum(a.usage.new_tokens for a in answers),
        devices=report.devices,
        runtime=report.runtime,
    )


def on_gpu(devices: tuple[str, ...]) -> bool:
    """Whether an engine's devices (LoadReport.devices) are more than the CPU."""
    return any(name != "CPU" for name in devices)


def _decode_speed(answers: list[Finished]) -> float:
    seconds = sum(a.timings.decode_s for a in answers)
    return sum(a.usage.new_tokens - 1 for a in answers) / seconds if seconds > 0 else 0.0


def rows_of(trace: Trace, device: Profile) -> list[tuple[str, str]]:
    """A trace as a table's rows: static, measured, gap, speed, and whether the device has room; each marked where it is emulated."""
    rows = _rows_of(trace, device)
    return [(f"{name} (emulated)", value) for name, value in rows] + [("emulated", trace.emulated)] if trace.emulated else rows


def _rows_of(trace: Trace, device: Profile) -> list[tuple[str, str]]:
    # An emulated budget may have been a processor's, under a GPU's name.
    gpu = device.gpu and (on_gpu(trace.devices) or not trace.emulated)
    peak = trace.peak_device_bytes if gpu else trace.peak_rss_bytes
    what = {None: "on the GPU", "process": "on the GPU", "growth": "growth of the whole GPU's use"}[trace.device_basis]
    rows = [
        ("static: language model", format_bytes(trace.model_bytes)),
        ("static: tower and projector", format_bytes(trace.vision_bytes)),
        ("static: key-value cache", format_bytes(trace.kv_bytes)),
        ("static: sum", format_bytes(trace.static_bytes)),
        (f"measured: peak {what if gpu else 'of all processes (RSS)'}", "not measured" if peak is None else format_bytes(peak)),
        ("measured less static", "not measured" if peak is None else format_bytes(peak - trace.static_bytes)),
        ("load", format_duration(trace.load_s)),
        ("image encoding", format_duration(trace.image_encode_s)),
        ("first token, first question", format_duration(trace.first_token_s)),
        ("first token, same image again", format_duration(trace.follow_up_first_token_s)),
        ("decoding", f"{trace.decode_tokens_per_s:.1f} tokens/s over {trace.new_tokens} tokens"),
        ("measured on", ", ".join(trace.devices) or "CPU"),
    ]
    if device.usable_bytes is not None:
        room = device.usable_bytes.value
        fits = "not measured" if peak is None else f"{'fits' if peak <= room else 'does not fit'} (by memory, not run on it)"
        rows.append((f"{device.title}, {format_bytes(room)} to be had", fits))
    return rows
