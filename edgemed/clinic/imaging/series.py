"""The DICOM images of a folder, by series: what a CD or a stick from another hospital holds. Reads headers, never pixels.

    for series in list_series(folder):
        series.modality, series.description, series.files
    list_series(folder, wanted=lambda looked_at: not stopped)     # told how far it is; False ends it with what was found so far

Files that are no DICOM image (a DICOMDIR, reports, other formats) and those that are damaged are left out; open_picture says why. A file
that lies in the folder twice, byte for byte, is taken once.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edgemed.clinic.imaging import client
from edgemed.clinic.imaging.limits import MAX_LISTED_FILES
from edgemed.clinic.imaging.sniff import SNIFF_BYTES, is_dicom
from edgemed.core.errors import DicomError, InputError
from edgemed.core.files import found_at, os_errors, sha256_file

Told = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """Images that belong together, in their order. Descriptions are the files' free text: for the screen, they may hold a name.

    `number` is the series' in its study (0: not said), `study_date` ISO 8601 or empty, `copies` how many files were there twice.
    """

    modality: str
    description: str
    files: tuple[Path, ...]
    number: int = 0
    study_description: str = ""
    study_date: str = ""
    size_bytes: int = 0
    copies: int = 0


def list_series(folder: Path, wanted: Callable[[int], bool] = lambda looked_at: True) -> list[Series]:
    """Every series in a folder and below, of 20,000 files at most, by study and number. Raises InputError, MissingExtraError."""
    if not folder.is_dir():
        raise InputError(f"Expected a folder at {folder}, found {found_at(folder)}.", "Check the path.")
    found: defaultdict[tuple[str, str], list[tuple[Told, Path]]] = defaultdict(list)
    for looked_at, path in enumerate(islice(_files(folder), MAX_LISTED_FILES)):
        if not wanted(looked_at):
            break
        told = _scan(path)
        if told is not None:
            found[told["study"], told["series"]].append((told, path))
    groups = sorted(found.values(), key=lambda group: (group[0][0]["study"], group[0][0]["number"]))
    return [_series(group) for group in groups]


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):  # does not follow links
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file():
                yield path


def _scan(path: Path) -> Told | None:
    try:
        with path.open("rb") as f:
            head = f.read(SNIFF_BYTES)
            size = os.fstat(f.fileno()).st_size
        return client.scan(path) | {"size": size} if is_dicom(head) else None
    except (OSError, DicomError):
        return None


def _series(group: list[tuple[Told, Path]]) -> Series:
    once = _without_copies(group)
    first = group[0][0]
    return Series(
        modality=first["modality"],
        description=first["description"],
        files=_ordered(once),
        number=first["number"],
        study_description=first["study_description"],
        study_date=first["study_date"],
        size_bytes=sum(told["size"] for told, _ in once),
        copies=len(group) - len(once),
    )


def _without_copies(group: list[tuple[Told, Path]]) -> list[tuple[Told, Path]]:
    """Each file once. Bytes are compared where number and size agree: careless software gives one number to different images."""
    alike: defaultdict[tuple[str, int], list[Path]] = defaultdict(list)
    for told, path in group:
        alike[told["uid"], told["size"]].append(path)
    copies = {path for paths in alike.values() if len(paths) > 1 for path in _copies(paths)}
    return [(told, path) for told, path in group if path not in copies]


def _copies(paths: list[Path]) -> list[Path]:
    seen: set[str] = set()
    out = []
    for path in paths:
        with os_errors(path):
            digest = sha256_file(path)
        if digest in seen:
            out.append(path)
        seen.add(digest)
    return out


def _ordered(group: list[tuple[Told, Path]]) -> tuple[Path, ...]:
    """By instance number where each image has its own, else by the position along the stack, else by name."""
    for key in ("instance", "position"):
        values = [told[key] for told, _ in group]
        if None not in values and len(set(values)) == len(values):
            return tuple(path for _, path in sorted(group, key=lambda pair: pair[0][key]))
    return tuple(path for _, path in group)
