"""Numbers as a person reads them. Bytes are bytes inside the program and become MB/GB (1e6/1e9) only here."""

from __future__ import annotations

import re

from edgemed.core.errors import InputError


def format_bytes(n: float) -> str:
    """Decimal units, as sizes of models are published: 905_000_000 → '905.0 MB'."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= scale:
            return f"{n / scale:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{n:.0f} B"


def parse_bytes(text: str) -> int:
    """'0.8GB', '600 MB' or '905000000' → bytes. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?(GB|MB|kB|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise InputError(f"Expected a size as 0.8GB or 600MB, found '{text}'.", "Write a number and GB or MB.")
    return int(float(match[1]) * {"g": 1e9, "m": 1e6, "k": 1e3, "b": 1}[(match[2] or "b")[0].lower()])


def format_duration(seconds: float) -> str:
    """'850 ms', '12.3 s', '4 min 05 s'."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
