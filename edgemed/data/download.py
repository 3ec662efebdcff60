"""One file over HTTP, resumed where a connection was cut, by this run or by one before.

    outcome = download(url, part, limit_bytes, stop)        # "here", "gone" or "too large"; HubError where it could not be had

`part` grows as bytes come in and is complete when "here" is returned; PART.etag holds what names this version (ETag or date), so that the
rest of another version is never put behind it. Standard library only. Knows nothing about archives.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path
from threading import Event
from typing import Any, Literal

from edgemed.core.errors import HubError
from edgemed.core.files import CHUNK_BYTES, os_errors

Outcome = Literal["here", "gone", "too large"]
TIMEOUT_S = 60.0
# Attempts in a row that brought not one byte.
ATTEMPTS = 5
# Seconds before the second attempt; doubled for each further one.
RETRY_WAIT_S = 1.0
LONGEST_WAIT_S = 120.0
_GONE = (404, 410)
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


class Stopped(Exception):
    """`stop` was set: the person or another download's failure ended the run. Never leaves edgemed/data."""


class _Failed(Exception):
    """An attempt that may be made again, after `wait_s` where the server said so."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.why, self.wait_s = why, wait_s


def download(url: str, part: Path, limit_bytes: int, stop: Event) -> Outcome:
    """Fetch `url` into `part`. Raises HubError, ResourceError, Stopped."""
    if not url.startswith(("http://", "https://")):
        raise HubError(f"Expected an http or https address, found {url:.200}.", "Check the list of addresses.")
    idle = 0
    while True:
        before = _size(part)
        try:
            return _attempt(url, part, limit_bytes, stop)
        except _Failed as failed:
            idle = 0 if _size(part) > before else idle + 1
            if idle >= ATTEMPTS:
                raise HubError(f"Expected {url}, found {failed.why} {ATTEMPTS} times.", "Run the same command again later.") from failed
            wait = max(failed.wait_s, RETRY_WAIT_S * 2 ** max(0, idle - 1))
            if stop.wait(min(wait, LONGEST_WAIT_S)):
                raise Stopped from failed


def _attempt(url: str, part: Path, limit_bytes: int, stop: Event) -> Outcome:
    have, tag = _size(part), _read_tag(part)
    headers = {"Accept-Encoding": "identity", "User-Agent": "edgemed"}
    if have and tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as answer:
            return _receive(answer, part, have, limit_bytes, stop)
    except urllib.error.HTTPError as error:
        with error:
            return _refused(error, part)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _Failed(f"no connection ({getattr(error, 'reason', error)})") from error


def _refused(error: urllib.error.HTTPError, part: Path) -> Outcome:
    if error.code in _GONE:
        return "gone"
    if error.code == 416:  # nothing follows what is here: it is whole, or no beginning of what is there
        if error.headers.get("Content-Range", "") == f"bytes */{_size(part)}":
            return "here"
        part.unlink(missing_ok=True)
        raise _Failed("a file of another length") from error
    if error.code in _RETRIED:
        wait = error.headers.get("Retry-After", "")
        raise _Failed(f"HTTP {error.code}", float(wait) if wait.isdecimal() else 0.0) from error
    raise HubError(f"Expected {error.url}, found HTTP {error.code}.", "Check the address, or the rights to it.") from error


def _receive(answer: Any, part: Path, have: int, limit_bytes: int, stop: Event) -> Outcome:
    start = have if answer.status == 206 else 0
    if start and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        part.unlink(missing_ok=True)
        raise _Failed("another part of the file than was asked for")
    length = answer.headers.get("Content-Length", "")
    total = start + int(length) if length.isdecimal() else None
    if total is not None and total > limit_bytes:
        return "too large"
    with os_errors(part):
        if not start:
            part.unlink(missing_ok=True)
            _tag_path(part).write_text(_version(answer), encoding="latin-1")
        file = part.open("ab")
    with file:
        got = start
        while True:
            piece = _read_piece(answer)
            if not piece:
                break
            got += len(piece)
            if got > limit_bytes:
                return "too large"
            with os_errors(part):
                file.write(piece)
            if stop.is_set():
                raise Stopped
        with os_errors(part):
            file.flush()
    if total is not None and got < total:
        raise _Failed(f"{got} of {total} bytes")
    return "here"


def _read_piece(answer: Any) -> bytes:
    try:
        piece: bytes = answer.read1(CHUNK_BYTES)
    except (http.client.HTTPException, TimeoutError, OSError) as error:
        raise _Failed(f"a connection that was cut ({error})") from error
    return piece


def _version(answer: Any) -> str:
    """What names this version in If-Range: a strong ETag, else the date (RFC 9110, 13.1.5)."""
    tag: str = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _tag_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _read_tag(part: Path) -> str:
    path = _tag_path(part)
    return path.read_text(encoding="latin-1") if path.is_file() else ""


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def discard(part: Path) -> None:
    """Remove a download and its tag; the tag first, so that a kill between the two leaves the file that a next run finds and removes."""
    with os_errors(part):
        _tag_path(part).unlink(missing_ok=True)
        part.unlink(missing_ok=True)
