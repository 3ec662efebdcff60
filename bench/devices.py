"""The devices that a model is measured for: how much memory they have, and whether a GPU computes.

A name says what to compare with; what is measured is always the machine at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgemed.core.errors import InputError


@dataclass(frozen=True)
class Device:
    """`memory_bytes` is the GPU's (on a Jetson: what CPU and GPU share); None: not compared."""

    name: str
    title: str
    gpu: bool
    memory_bytes: int | None


# Vendors' data sheets: RTX 3050 desktop 8 GB, RTX 3080 10 GB, Jetson AGX Xavier 32 GB; sizes there are powers of two.
DEVICES = {
    d.name: d
    for d in (
        Device("cpu", "this machine's CPU", False, None),
        Device("gpu", "this machine's GPU", True, None),
        Device("rtx3050", "NVIDIA RTX 3050", True, 8 * 2**30),
        Device("rtx3080", "NVIDIA RTX 3080", True, 10 * 2**30),
        Device("jetson", "NVIDIA Jetson AGX Xavier", True, 32 * 2**30),
    )
}


def find_device(name: str) -> Device:
    """The device called `name`. Raises InputError."""
    if name not in DEVICES:
        raise InputError(f"Expected a device out of {', '.join(DEVICES)}, found '{name}'.", "Pass one of them with --device.")
    return DEVICES[name]
