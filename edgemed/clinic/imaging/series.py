"""The DICOM images of a folder, by series: what a CD or a stick from another hospital holds. Reads headers, never pixels.

    for series in list_series(folder):
        series.modality, series.description, series.files

Files that are no DICOM image (a DICOMDIR, reports, other formats) and those that are damaged are left out; open_picture says why.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edgemed.clinic.imaging import client
from edgemed.clinic.imaging.limits import MAX_LISTED_FILES
from edgemed.clinic.imaging.sniff import SNIFF_BYTES, is_dicom
from edgemed.core.errors import DicomError, InputError


@dataclass(frozen=True)
class Series:
    """Images that belong together, in their order. The description is the file's free text: for the screen, it may hold a name."""

    modality: str
    description: str
    files: tuple[Path, ...]


def list_series(folder: Path) -> list[Series]:
    """Every series in a folder and below, of 20,000 files at most, by study and number. Raises InputError, MissingExtraError."""
    if not folder.is_dir():
        raise InputError(f"Expected a folder at {folder}, found none.", "Check the path.")
    found: defaultdict[tuple[str, str], list[tuple[dict[str, Any], Path]]] = defaultdict(list)
    for path in islice(_files(folder), MAX_LISTED_FILES):
        told = _scan(path)
        if told is not None:
            found[told["study"], told["series"]].append((told, path))
    groups = sorted(found.values(), key=lambda group: (group[0][0]["study"], group[0][0]["number"]))
    return [Series(group[0][0]["modality"], group[0][0]["description"], _ordered(group)) for group in groups]


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):  # does not follow links
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file():
                yield path


def _scan(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as f:
            head = f.read(SNIFF_BYTES)
        return client.scan(path) if is_dicom(head) else None
    except (OSError, DicomError):
        return None


def _ordered(group: list[tuple[dict[str, Any], Path]]) -> tuple[Path, ...]:
    """By instance number where each image has its own, else by the position along the stack, else by name."""
    for key in ("instance", "position"):
        values = [told[key] for told, _ in group]
        if None not in values and len(set(values)) == len(values):
            return tuple(path for _, path in sorted(group, key=lambda pair: pair[0][key]))
    return tuple(path for _, path in group)
