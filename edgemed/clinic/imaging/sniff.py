"""Whether bytes are a DICOM file, told by their first few hundred."""

from __future__ import annotations

import re

PREAMBLE_BYTES = 128
SNIFF_BYTES = 512
# Files without a preamble start with the meta header's group or the identifying group, in either byte order; then come a small element
# number and a type of two letters, or (implicit) a length below 64 KiB.
_LITTLE = re.compile(rb"(?s)[\x02\x08]\x00[\x00-\x90]\x00(?:[A-Z]{2}|..\x00\x00)")
_BIG = re.compile(rb"(?s)\x00[\x02\x08]\x00[\x00-\x90](?:[A-Z]{2})")


def is_dicom(data: bytes) -> bool:
    """Whether bytes are a DICOM file, with or without its preamble."""
    if data[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == b"DICM":
        return True
    return bool(_LITTLE.match(data) or _BIG.match(data))
