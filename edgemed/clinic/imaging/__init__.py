"""From an image file, DICOM or plain, to the exact pixels on screen and for the model.

    picture = open_picture(path)                    # or bytes, with a name; ImageError, DicomError, MissingExtraError
    picture.facts, picture.windows                  # what it says that identifies nobody; windows to choose from
    image = picture.render(View(window=Window(40, 400)))   # Pillow, 8-bit RGB: what the person sees, and what core.images.prepare gets
    for series in list_series(folder): ...
    copy = strip_identifiers(data)                  # a DICOM file that says nobody's name
    forget_frames()                                 # when the program is locked

DICOM is parsed and decoded in a process of its own (client.py), with limits of memory and time: what kills or stops that process is a
DicomError here. Nothing is written to disk, and what a file says reaches no log.
"""

from edgemed.clinic.imaging.burnt_in import suspect_burnt_in
from edgemed.clinic.imaging.picture import Picture, forget_frames, open_picture, strip_identifiers
from edgemed.clinic.imaging.series import Series, list_series
from edgemed.clinic.imaging.sniff import is_dicom
from edgemed.clinic.imaging.window import CT_WINDOWS, parse_window

__all__ = [
    "CT_WINDOWS",
    "Picture",
    "Series",
    "forget_frames",
    "is_dicom",
    "list_series",
    "open_picture",
    "parse_window",
    "strip_identifiers",
    "suspect_burnt_in",
]
