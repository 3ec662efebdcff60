"""Warnings of a name that may be burnt into the pixels, where no tag removal reaches: by what the file says, and by what is seen.

    for sentence in suspect_burnt_in(picture): ...

The file's own word is believed where it says YES. Ultrasounds, screen captures and digitised film are suspected unless it says NO. What
is seen: along the borders, rows of strokes as bright (or dark) as nothing else there, many to a line, as letters are. It finds lines of
some letters on a calm background; a single side marker or a scale is not meant to be found, handwriting and faint text are not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgemed.clinic.imaging.picture import Picture
from edgemed.clinic.records import View

SAYS_YES = "The file says that there is text in the image: check it for a name and mask it before it is shared."
OFTEN = "Images of this kind often have the patient's name in their pixels: check the image and mask it before it is shared."
SEEN = "There seems to be text near the border of the image: check it for a name and mask it before it is shared."

# Ultrasound, endoscopy, photographs, screen captures, digitised film and documents.
_OFTEN = frozenset({"US", "ES", "XC", "OT", "SC", "HC", "DOC", "GM", "SM", "OP", "RF", "XA", "IVUS", "DG"})
_MAX_SIDE_PX = 1024
_BORDER = 0.22
# A stroke stands out by so many grey levels from both its sides, at most so many pixels away.
_CONTRAST, _STROKE_PX = 90, 5
# A line of text: so many strokes in each of so many rows on end, within a width of so many times the number of strokes.
_STROKES, _ROWS, _PITCH_PX = 8, 5, 12


def suspect_burnt_in(picture: Picture, frame: int = 0) -> tuple[str, ...]:
    """Sentences for the person; () where nothing is suspected. Raises DicomError where the frame cannot be decoded."""
    says = picture.burnt_in
    out = []
    if says == "YES":
        out.append(SAYS_YES)
    elif says != "NO" and picture.facts.kind == "dicom" and (picture.secondary or picture.facts.modality in _OFTEN):
        out.append(OFTEN)
    if says != "YES" and looks_like_text(picture.render(View(frame=frame))):
        out.append(SEEN)
    return tuple(out)


def looks_like_text(image: Image.Image) -> bool:
    """Whether some part near the border looks like a line of letters."""
    grey = image.convert("L")
    grey.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX))
    pixels = np.asarray(grey, np.int16)
    rows, columns = max(1, round(pixels.shape[0] * _BORDER)), max(1, round(pixels.shape[1] * _BORDER))
    parts = (pixels[:rows], pixels[-rows:], pixels[:, :columns], pixels[:, -columns:])
    return any(_has_line(part) or _has_line(255 - part) for part in parts)


def _has_line(pixels: NDArray[np.int16]) -> bool:
    strokes = _strokes(pixels)
    # How many strokes lie in each window of a line's width, per row; then whether enough rows on end have enough.
    width = min(strokes.shape[1], _STROKES * _PITCH_PX)
    sums = np.cumsum(np.pad(strokes, ((0, 0), (1, 0))), axis=1)
    enough = (sums[:, width:] - sums[:, :-width]) >= _STROKES if width else sums[:, :0] > 0
    if enough.shape[0] < _ROWS:
        return False
    runs = np.cumsum(np.pad(enough, ((1, 0), (0, 0))), axis=0)
    return bool(((runs[_ROWS:] - runs[:-_ROWS]) == _ROWS).any())


def _strokes(pixels: NDArray[np.int16]) -> NDArray[np.int64]:
    """1 where a bright stroke begins: far brighter than a few pixels to its left and to its right."""
    left = _least_beside(pixels)
    right = _least_beside(pixels[:, ::-1])[:, ::-1]
    bright = (pixels - left >= _CONTRAST) & (pixels - right >= _CONTRAST)
    starts = bright & ~np.pad(bright, ((0, 0), (1, 0)))[:, :-1]
    return starts.astype(np.int64)


def _least_beside(pixels: NDArray[np.int16]) -> NDArray[np.int16]:
    padded = np.pad(pixels, ((0, 0), (_STROKE_PX, 0)), mode="edge")
    views = [padded[:, shift : shift + pixels.shape[1]] for shift in range(_STROKE_PX)]
    return np.asarray(np.minimum.reduce(views))
