"""Are DICOM images shown right? pydicom's own test files, compared with dcmtk's dcmj2pnm at the same window.

    python -m bench.dicom_parity                 # a table; the last line is JSON
    python -m bench.dicom_parity FOLDER          # other files

A frame is equal where no pixel differs by more than one grey level. Files without pixels do not count; those that one side alone shows
are listed with that side's sentence. Overlays are left out, as here they are not shown. dcmtk cannot decode JPEG 2000; such a file is
compared with its decompressed twin, where pydicom-data has one, and is not among those that both decode. Where dcmtk shows a big-endian
file otherwise than its own little-endian twin, and that one as it is shown here, it contradicts itself. Needs the clinic extra and dcmtk
(Debian: apt-get install dcmtk); takes the files of the PyPI package pydicom-data, too, where it is installed.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
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
KINDS = ("equal", "equal to twin", "ours alone", "dcmtk alone", "dcmtk contradicts itself", "different")
FRAMES = 3
LIMIT_S = 60


@dataclass(frozen=True)
class Row:
    """One file; `result` is one of KINDS."""

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
    rows = [_compare_frame(path, frame, ours, options) for frame, (ours, options) in enumerate(pictures)]
    worst = max(rows, key=lambda row: (KINDS.index(row.result), row.levels))
    return replace(worst, frames=len(pictures))


def _compare_frame(path: Path, frame: int, ours: NDArray[np.uint8], options: list[str]) -> Row:
    theirs, twin = dcmtk_pixels(path, frame, options), find_twin(path)
    by_twin = None if twin is None else dcmtk_pixels(twin, frame, options)
    if theirs is None and by_twin is None:
        return Row(path.name, "ours alone")
    levels, share = distance(ours, by_twin if theirs is None else theirs)
    if levels <= ALLOWED_LEVELS:
        return Row(path.name, "equal" if theirs is not None else "equal to twin", 1, levels, share)
    if theirs is not None and distance(ours, by_twin)[0] <= ALLOWED_LEVELS:
        return Row(path.name, "dcmtk contradicts itself", 1, levels, share, "dcmtk shows the little-endian twin as it is shown here")
    return Row(path.name, "different", 1, levels, share)


def distance(ours: NDArray[np.uint8], theirs: NDArray[np.int16] | None) -> tuple[int, float]:
    """(the largest difference in grey levels, the share of values beyond what is allowed)."""
    if theirs is None or theirs.shape != ours.shape:
        return 255, 1.0
    difference = np.abs(ours.astype(np.int16) - theirs)
    return int(difference.max()), float((difference > ALLOWED_LEVELS).mean())


def find_twin(path: Path) -> Path | None:
    """The same pixels in another file: a JPEG 2000 one's decompressed by another program, or a big-endian one's in little endian."""
    name = path.name.replace("_J2KR", "_UNCR").replace("_J2KI", "_UNCI").replace("_expb", "")
    return next((other for other in shipped_files() if other.name == name != path.name), None)


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
    """Compare, print, and 0 where 95 % of the files that both show are equal, those left out on which dcmtk contradicts itself."""
    if shutil.which(TOOLS[0]) is None:
        print("dcmj2pnm was not found: apt-get install dcmtk", file=sys.stderr)
        return 2
    paths = sorted(path for path in Path(arguments[0]).rglob("*") if path.is_file()) if arguments else shipped_files()
    rows = [row for row in map(compare, paths) if row is not None]
    cells = [(r.file, r.result, str(r.frames), str(r.levels), f"{r.share:.2%}", r.why) for r in rows if r.result != "equal"]
    print_table("Not equal", ("file", "result", "frames", "levels", "pixels beyond 1", "why"), cells)
    counts = {kind: sum(row.result == kind for row in rows) for kind in KINDS}
    both = counts["equal"] + counts["different"] + counts["dcmtk contradicts itself"]
    strict = counts["equal"] / max(1, both)
    fair = counts["equal"] / max(1, counts["equal"] + counts["different"])
    shares = {"equal_share": round(strict, 4), "share_without_contradictions": round(fair, 4)}
    told = {"files": len(paths), **counts, "both_decode": both, **shares}
    print(json.dumps(told | {"rows": [asdict(row) for row in rows]}))
    return 0 if fair >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
