"""Figures out of a .tar.gz of strangers: only regular files, only the names asked for, written under names of our own, bounded sizes.

    found = extract_figures(archive, {"PMC1/fig1.jpg": [images / "1_F1.jpg"]})      # {"PMC1/fig1.jpg": None or why not}

No member's own path is ever written to, no link is followed, and no archive unpacks to more than `Limits` says: a small file that would
become terabytes ends early. A figure is kept only where it decodes as an image. Raises ArchiveDamaged where it cannot be read.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from edgemed.core.errors import ImageError
from edgemed.core.files import os_errors, save_bytes
from edgemed.core.images import load_image

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What an archive may cost. PMC's largest packages hold films of a few gigabytes; a figure of 20 megapixels has some 10 MB."""

    archive_bytes: int = 4_000_000_000
    unpacked_bytes: int = 16_000_000_000
    figure_bytes: int = 64_000_000
    members: int = 100_000


class ArchiveDamaged(Exception):
    """Not a tar.gz, cut short, or larger than the limits. Never leaves edgemed/data."""


class _Bounded:
    """A stream that ends with an error after so many bytes, and never hands out more than a figure at once.

    tarfile reads a header of any size that the archive claims in one piece; here such a claim is refused before memory is taken.
    """

    def __init__(self, stream: Any, limits: Limits) -> None:
        self.stream, self.limits = stream, limits

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self.limits.figure_bytes + tarfile.BLOCKSIZE:
            raise ArchiveDamaged(f"it asks for {size} bytes at once")
        data: bytes = self.stream.read(size)
        self._check(self.stream.tell())
        return data

    def tell(self) -> int:
        return int(self.stream.tell())

    def seek(self, position: int) -> int:
        self._check(position)
        return int(self.stream.seek(position))

    def _check(self, position: int) -> None:
        if position > self.limits.unpacked_bytes:
            raise ArchiveDamaged(f"it unpacks to more than {self.limits.unpacked_bytes} bytes")


def extract_figures(archive: Path, wanted: Mapping[str, Sequence[Path]], limits: Limits = Limits()) -> dict[str, str | None]:  # noqa: B008
    """Write the figures `wanted` (name in the archive → files to write); None for each that is written, else why it is not.

    Names that the archive does not hold are missing from the result. Stops once all are found.
    """
    found: dict[str, str | None] = {}
    with os_errors(archive):
        try:
            with gzip.open(archive) as stream, tarfile.open(fileobj=cast(IO[bytes], _Bounded(stream, limits)), mode="r:") as tar:
                _search(tar, wanted, limits, found)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
            raise ArchiveDamaged(" ".join(str(error).split()) or "it is damaged") from error
    return found


def _search(tar: tarfile.TarFile, wanted: Mapping[str, Sequence[Path]], limits: Limits, found: dict[str, str | None]) -> None:
    for number, member in enumerate(tar):
        if number >= limits.members:
            raise ArchiveDamaged(f"it has more than {limits.members} members")
        name = member.name.removeprefix("./")
        if name in wanted and found.get(name, "") is not None:
            found[name] = _keep(tar, member, wanted[name], limits)
        if len(found) == len(wanted) and all(why is None for why in found.values()):
            break


def _keep(tar: tarfile.TarFile, member: tarfile.TarInfo, targets: Sequence[Path], limits: Limits) -> str | None:
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return "it is a link or a device in the archive, not a file"
    if member.size > limits.figure_bytes:
        return f"it has {member.size} bytes, more than {limits.figure_bytes}"
    stream = tar.extractfile(member)
    data = stream.read() if stream else b""
    if len(data) != member.size:
        raise ArchiveDamaged("it ends in the middle of a figure")
    try:
        load_image(data, member.name)
    except ImageError as error:
        return error.message
    for target in targets:
        save_bytes(target, data)
    return None
