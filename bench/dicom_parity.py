"""Are DICOM images shown right? pydicom's own test files, compared with dcmtk's dcmj2pnm at the same window.

    python -m bench.dicom_parity                 # a table; the last line is JSON
    python -m bench.dicom_parity FOLDER          # other files

A frame is equal where no pixel differs by more than one grey level. Files without pixels do not count; those that one side alone shows
are listed with that side's sentence. Overlays are left out, as here they are not shown. dcmtk cannot decode JPEG 2000; a lossless file of
it is compared with its uncompressed twin, where pydicom-data has one. Needs the clinic extra and dcmtk (Debian: apt-get install dcmtk);
takes the files of the PyPI package pydicom-data, too, where it is installed.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgemed.clinic.imaging import open_picture
from edgemed.clinic.imaging.picture import Picture
from edgemed.clinic.records import View, Window
from edgemed.core.errors import EdgemedError, MissingExtraError
from edgemed.report.tables import print_table

TOOLS = ("dcmj2pnm", "dcml2pnm")
ALLOWED_LEVELS = 1
FRAMES = 3
LIMIT_S = 60


@dataclass(frozen=True)
class Row:
    """One file: "equal", "different", or who alone shows it."""

    file: str
    result: str
    frames: int = 0
    levels: int = 0
    share: float = 0.0
    why: str = ""


def shipped_files() -> list[Path]:
    """The DICOM files that pydicom ships, and those of pydicom-data."""
    spec = find_spec("pydicom")
    if spec is None or spec.origin is None:
        raise MissingExtraError.of("Comparing DICOM", "clinic")
    folders = [Path(spec.origin).parent / "data" / "test_files"]
    more = find_spec("data_store")
    if more is not None and more.origin is not None:
        folders.append(Path(more.origin).parent / "data")
    return sorted(path for folder in folders for path in folder.rglob("*.dcm"))


def compare(path: Path) -> Row | None:
    """A file's row; None where neither side has an image of it."""
    try:
        picture = open_picture(path)
        pictures = [shown(picture, frame) for frame in range(min(FRAMES, picture.facts.frames))]
    except EdgemedError as error:
        return Row(path.name, "dcmtk alone", why=error.message) if dcmtk_pixels(path, 0, []) is not None else None
    differences = []
    for frame, (ours, options) in enumerate(pictures):
        theirs = dcmtk_pixels(path, frame, options)
        if theirs is None and "_J2KR" in path.name:  # lossless, and the same image is there uncompressed
            theirs = dcmtk_pixels(path.with_name(path.name.replace("_J2KR", "_UNCR")), frame, options)
        if theirs is None:
            return Row(path.name, "ours alone", len(pictures))
        if theirs.shape != ours.shape:
            return Row(path.name, "different", len(pictures), 255, 1.0, f"{ours.shape} and {theirs.shape}")
        differences.append(np.abs(ours.astype(np.int16) - theirs))
    levels = max(int(difference.max()) for difference in differences)
    share = max(float((difference > ALLOWED_LEVELS).mean()) for difference in differences)
    return Row(path.name, "equal" if levels <= ALLOWED_LEVELS else "different", len(pictures), levels, share)


def shown(picture: Picture, frame: int) -> tuple[NDArray[np.uint8], list[str]]:
    """(our pixels, dcmtk's options for the same window)."""
    if not picture.monochrome:
        return picture.render_stored(View(frame=frame)), []
    if picture.resolve(View(frame=frame)).window is None:
        return picture.render_stored(View(frame=frame)), ["+Wl", "1"]
    low, high = picture.value_range(frame)
    window = picture.default_window(frame) or Window(0, 1)
    if window.function == "linear_exact":
        window = Window((low + high + 1) / 2, max(1.0, high - low + 1))
    function = ["+Wfs"] if window.function == "sigmoid" else ["+Wfl"]
    return picture.render_stored(View(frame=frame, window=window)), [*function, "+Ww", repr(window.centre), repr(window.width)]


def dcmtk_pixels(path: Path, frame: int, options: list[str]) -> NDArray[np.int16] | None:
    """A frame by dcmtk, None where it refuses the file."""
    for tool in TOOLS:
        command = [tool, "-O", "+op", "+F", str(frame + 1), *options, str(path)]
        done = subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=False)
        if done.returncode == 0 and done.stdout[:2] in (b"P5", b"P6"):
            return np.asarray(Image.open(io.BytesIO(done.stdout)), np.int16)
    return None


def main(arguments: list[str]) -> int:
    """Compare, print, and 0 where at least 95 % of the files that both show are equal."""
    if shutil.which(TOOLS[0]) is None:
        print("dcmj2pnm was not found: apt-get install dcmtk", file=sys.stderr)
        return 2
    paths = sorted(path for path in Path(arguments[0]).rglob("*") if path.is_file()) if arguments else shipped_files()
    rows = [row for row in map(compare, paths) if row is not None]
    cells = [(r.file, r.result, str(r.frames), str(r.levels), f"{r.share:.2%}", r.why) for r in rows if r.result != "equal"]
    print_table("Not equal", ("file", "result", "frames", "levels", "pixels beyond 1", "why"), cells)
    counts = {kind: sum(row.result == kind for row in rows) for kind in ("equal", "different", "ours alone", "dcmtk alone")}
    both = counts["equal"] + counts["different"]
    share = counts["equal"] / both if both else 0.0
    print(json.dumps({"files": len(paths), **counts, "equal_share": round(share, 4), "rows": [asdict(row) for row in rows]}))
    return 0 if share >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
