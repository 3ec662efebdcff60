"""Messages between this program and its decoding process: a JSON object and raw bytes. No pickle: the other side is not trusted.

    write_message(stream, {"op": "frame", "index": 0}, b"")
    header, payload = read_message(stream)          # EOFError where the other side has gone
"""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

_SIZES = struct.Struct("<IQ")
# A header carries at most a VOI LUT's 65,536 entries and some text.
_MAX_HEADER_BYTES = 16 << 20
_MAX_PAYLOAD_BYTES = 3 << 30


def write_message(stream: BinaryIO, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one message and flush it. OSError where nobody reads any more."""
    text = json.dumps(header).encode()
    stream.write(_SIZES.pack(len(text), len(payload)))
    stream.write(text)
    stream.write(payload)
    stream.flush()


def read_message(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """Read one message. Raises EOFError at the end of the stream, ValueError where it is no message of ours."""
    header_bytes, payload_bytes = _SIZES.unpack(_read(stream, _SIZES.size))
    if header_bytes > _MAX_HEADER_BYTES or payload_bytes > _MAX_PAYLOAD_BYTES:
        raise ValueError("a message larger than any of ours")
    header = json.loads(_read(stream, header_bytes))
    if not isinstance(header, dict):
        raise ValueError("a message without a header")
    return header, _read(stream, payload_bytes)


def _read(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data
