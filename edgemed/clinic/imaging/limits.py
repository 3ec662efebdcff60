"""How much an image file may ask of this machine. A limit that is reached is a sentence, never a slow or dead program.

Sides and pixels of a frame are bounded by core.images (MAX_PIXELS, MAX_SIDE_PX), for DICOM as for any other image.
"""

from __future__ import annotations

# A tomosynthesis or a long cine loop has some hundred MB; the file is held in memory as long as its picture is open.
MAX_FILE_BYTES = 1 << 30
# What a deflated data set may become; zlib packs zeros a thousand times. Such files are rare, and small.
MAX_INFLATED_BYTES = 256 << 20
# Pixels of a de-identified copy, which is uncompressed and for a moment in memory several times.
MAX_COPY_BYTES = 512 << 20
# Frames of one file; a pathology slide's tiles are not what this program shows.
MAX_FRAMES = 65_536
# The decoding process's address space: a file, its pixel data as pydicom copies it, and one frame in a codec's 32-bit planes.
WORKER_MEMORY_BYTES = 4 << 30
# What one request to that process may take before it is ended: generous, for a big frame on a small board.
REQUEST_LIMIT_S = 60.0
# The same for a de-identified copy, which decodes every frame.
STRIP_LIMIT_S = 600.0
# The same for the headers of one file while a folder is listed.
SCAN_LIMIT_S = 10.0
# Decoded frames kept, over all pictures.
FRAME_CACHE_BYTES = 256 << 20
# Files of one folder and below that are looked at for series.
MAX_LISTED_FILES = 20_000
# Text taken from a tag; longer is cut. DICOM's own long strings end at 64.
MAX_TEXT = 64
