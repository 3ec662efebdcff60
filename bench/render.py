"""A trace as table rows, Markdown and a picture.

rows = rows_of(trace, device)
save(Path("tiny.md"), title, trace, rows)            # by its ending: .md, .json, or .png, which needs the `plots` extra
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.measure import Trace, on_gpu
from edgemed.core.errors import InputError
from edgemed.core.files import found_at, save_text
from edgemed.core.units import format_bytes, format_duration
from edgemed.report.plots import require_plots, save_timeline
from runtimes.devices import Profile

_SEEN = {
    "process": "seen: peak on the GPU",
    "growth": "seen: peak growth of the whole GPU's use",
    "system": "seen: peak growth of the whole system's memory",
    "pss": "seen: peak of all processes (PSS)",
    "rss": "seen: peak of all processes (RSS)",
}
_WHERE = {"GPU": "on the GPU", "CPU": "in main memory"}


def rows_of(trace: Trace, device: Profile, brief: bool = False) -> list[tuple[str, str]]:
    """Static card, measured phases and memory, the distance, and whether the device has room; each marked where it is emulated.

    brief: without the parts of card and account, and for a process that has done more than measure: what was seen is then more too.
    """
    rows = [*_card(trace, brief), *_measured(trace, brief), *_distance(trace, device, brief)]
    if trace.emulated:
        rows = [(f"{name} (emulated)", value) for name, value in rows]
        rows.append(("emulated", trace.emulated))
    return rows


def _card(trace: Trace, brief: bool) -> list[tuple[str, str]]:
    card = trace.card
    rows = [
        (f"card: {item.what} {_WHERE[item.place]}{', mapped from the file' if item.mapped else ''}", format_bytes(item.size_bytes))
        for item in ((), card.items)[not brief]
    ]
    for place in ("GPU", "CPU"):
        if card.dynamic_bytes[place]:
            rows.append((f"card: static {_WHERE[place]}", format_bytes(card.static_bytes[place])))
            rows.append((f"card: dynamic {_WHERE[place]}", format_bytes(card.dynamic_bytes[place])))
    rows.append(("card: cache, each token", format_bytes(card.kv_bytes_per_token)))
    rows.append((f"card: read for a token at depth {card.depth}", format_bytes(card.read_bytes)))
    ceiling = "not known, for want of the device's bandwidth"
    if card.ceiling_tokens_per_s is not None and card.bandwidth_bytes_per_s is not None:
        ceiling = f"{card.ceiling_tokens_per_s:.1f} tokens/s at {format_bytes(int(card.bandwidth_bytes_per_s))}/s"
    return [*rows, ("card: decoding at best", ceiling)]


def _measured(trace: Trace, brief: bool) -> list[tuple[str, str]]:
    rows = []
    for phase in trace.phases:
        spread = f" ({format_duration(phase.low_s)} to {format_duration(phase.high_s)}, {phase.count} times)" if phase.count > 1 else ""
        memory = "" if phase.peak_bytes is None else f", {format_bytes(phase.peak_bytes)}"
        rows.append((f"phase: {phase.name}", f"{format_duration(phase.median_s)}{spread}{memory}"))
    later = trace.follow_up_first_token_s
    rows += [
        ("first token, new image", format_duration(trace.first_token_s)),
        ("first token, same image again", "not measured" if later is None else format_duration(later)),
        ("decoding", f"{trace.decode_tokens_per_s:.1f} tokens/s over {trace.new_tokens} tokens of {trace.questions} questions"),
        ("seed-compat: static", format_bytes(trace.seed_static_bytes)),
        ("seed-compat: dynamic", format_bytes(trace.seed_dynamic_bytes)),
        *((f"account: {b.what}, {b.place}", format_bytes(b.size_bytes)) for b in ((), trace.account)[not brief]),
        (_SEEN[trace.basis], "not measured" if trace.seen_bytes is None else format_bytes(trace.seen_bytes)),
    ]
    if trace.mapped_bytes is not None:
        rows.append(("of it pages of mapped files", format_bytes(trace.mapped_bytes)))
    if trace.power_w is not None:
        rows.append(("power, median", f"{trace.power_w:.1f} W"))
    return rows


def _distance(trace: Trace, device: Profile, brief: bool) -> list[tuple[str, str]]:
    rows = []
    planned = trace.card.dynamic_bytes["GPU" if on_gpu(trace.devices) else "CPU"]
    if trace.basis == "system":
        planned = sum(trace.card.dynamic_bytes.values())
    if trace.seen_bytes and not brief:
        rows.append(("planned against seen", f"{planned / trace.seen_bytes:.3f}"))
    if trace.card.ceiling_tokens_per_s is not None and not trace.emulated:
        rows.append(("decoding against the best", f"{trace.decode_tokens_per_s / trace.card.ceiling_tokens_per_s:.2f}"))
    rows.append(("measured on", ", ".join(trace.devices) or "CPU"))
    if trace.unused:
        rows.append(("left unused of the processor", f"{', '.join(trace.unused)}; a build with CPU=native takes it (CONTRIBUTING.md)"))
    # An emulated GPU's budget may have been tried on a processor: then nothing was seen on a GPU.
    if device.usable_bytes is not None and (on_gpu(trace.devices) or not device.gpu):
        room = int(device.usable_bytes.value)
        fits = "not measured" if trace.seen_bytes is None else f"{'fits' if trace.seen_bytes <= room else 'does not fit'} (by memory)"
        rows.append((f"{device.title}, {format_bytes(room)} to be had", fits))
    return rows


def markdown(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A heading and a table."""
    lines = [f"## {title}", "", "| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    return "\n".join(lines)


ENDINGS = (".json", ".md", ".png")


def check_ending(path: Path) -> Path:
    """The path. Raises InputError, MissingExtraError where `save` could not write it: better before a measurement than after."""
    if path.suffix not in ENDINGS:
        raise InputError(f"Expected a file that ends in {', '.join(ENDINGS)}, found '{path.name}'.", "Change --save.")
    if not path.parent.is_dir():
        raise InputError(f"Expected the folder {path.parent} for {path.name}, found {found_at(path.parent)}.", "Make it, or change --save.")
    if path.is_dir():
        raise InputError(f"Expected a file to write at {path}, found a folder.", "Change --save.")
    if path.suffix == ".png":
        require_plots()
    return path


def save(path: Path, title: str, trace: Trace, rows: Sequence[tuple[str, str]], artifact: str = "", device: str = "") -> None:
    """Write a trace, as its ending says; JSON tells which artifact was measured for which device, so that `edgemed pareto` can read it.

    Raises InputError, MissingExtraError, and what a full disk raises.
    """
    kind = check_ending(path).suffix
    if kind == ".json":
        save_text(path, json.dumps({"artifact": artifact, "device": device} | asdict(trace), indent=1))
    elif kind == ".md":
        save_text(path, markdown(title, rows))
    else:
        heading = f"{title}\n{trace.emulated}" if trace.emulated else title
        save_timeline(path, heading, f"GB ({_SEEN[trace.basis]})", [(t, b / 1e9) for t, b in trace.timeline], trace.marks)
