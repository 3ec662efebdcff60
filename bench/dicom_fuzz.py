"""Does hostile DICOM ever do more than be refused? Files with seeded damage, opened, shown and de-identified.

    python -m bench.dicom_fuzz                       # 5000 mutations of pydicom's small test files; the last line is JSON
    python -m bench.dicom_fuzz --count 20000 --seed 7 --folder FILES

Every mutation must end in an image or an EdgemedError; anything else is a traceback, after the file, seed and number that repeat it. Told
apart are files on which the decoding process died or was ended: the program lived, but that process had to be started again.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.dicom_parity import shipped_files
from edgemed.clinic.imaging import client, open_picture
from edgemed.clinic.imaging.picture import strip_identifiers
from edgemed.clinic.records import View
from edgemed.core.errors import EdgemedError

MAX_SEED_BYTES = 80_000
# Numbers that lengths, sizes and counts break on.
_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 0x10000000)
_TYPES = (b"SQ", b"UN", b"OW", b"OB", b"US", b"PN", b"DS", b"IS", b"UI", b"AT", b"UT", b"FD", b"??", b"\0\0")
# Items and ends of sequences, and the first bytes of JPEG and JPEG 2000.
_PIECES = tuple(map(bytes.fromhex, ("feff00e0ffffffff", "feff0de000000000", "feffdde000000000", "ffd8ffe0", "ff4fff51")))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four damages of a file; most near its head, where lengths and sizes are."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if len(out) > 16:
            rng.choice(_DAMAGES)(out, rng)
    return bytes(out)


def _place(out: bytearray, rng: random.Random) -> int:
    return rng.randrange(128, min(len(out), 2048)) if rng.random() < 0.8 and len(out) > 256 else rng.randrange(len(out))


def _flip(out: bytearray, rng: random.Random) -> None:
    out[_place(out, rng)] ^= 1 << rng.randrange(8)


def _number(out: bytearray, rng: random.Random) -> None:
    at, size = _place(out, rng), rng.choice((2, 4))
    out[at : at + size] = struct.pack("<I", rng.choice(_NUMBERS))[:size]


def _type(out: bytearray, rng: random.Random) -> None:
    at = _place(out, rng)
    out[at : at + 2] = rng.choice(_TYPES)


def _cut(out: bytearray, rng: random.Random) -> None:
    del out[_place(out, rng) :]


def _drop(out: bytearray, rng: random.Random) -> None:
    at = _place(out, rng)
    del out[at : at + rng.randint(1, 64)]


def _repeat(out: bytearray, rng: random.Random) -> None:
    at = _place(out, rng)
    out[at:at] = out[at : at + rng.randint(1, 256)] * rng.randint(1, 8)


def _piece(out: bytearray, rng: random.Random) -> None:
    at = _place(out, rng)
    out[at:at] = rng.choice(_PIECES) * rng.choice((1, 2, 2000))


_DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (_flip, _flip, _number, _number, _type, _cut, _drop, _repeat, _piece)


def attempt(data: bytes) -> str:
    """What becomes of a file: "shown", or the class of its refusal. Whatever else is raised is a fault."""
    try:
        picture = open_picture(data)
        picture.render()
        picture.render(View(frame=picture.facts.frames - 1, invert=True))
        if picture.facts.kind == "dicom":
            strip_identifiers(data)
        return "shown"
    except EdgemedError as error:
        ended = "breaks down" in error.message or "takes longer" in error.message
        return "decoder ended" if ended else f"refused ({type(error).__name__})"


def run(seeds: list[tuple[str, bytes]], count: int, seed: int) -> Counter[str]:
    """What became of how many. A fault ends it, after a line that says how to repeat it."""
    outcomes: Counter[str] = Counter()
    for number in range(count):
        name, data = seeds[number % len(seeds)]
        outcome = ""
        try:
            outcome = attempt(mutate(data, random.Random(f"{seed}:{number}")))
        finally:
            if not outcome:
                print(f"Fault: {name}, seed {seed}, number {number}", file=sys.stderr)
        outcomes[outcome] += 1
    return outcomes


def main(arguments: list[str]) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.dicom_fuzz")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    paths = sorted(options.folder.rglob("*")) if options.folder else shipped_files()
    seeds = [(path.name, path.read_bytes()) for path in paths if path.is_file() and path.stat().st_size <= MAX_SEED_BYTES]
    start = time.monotonic()
    outcomes = run(seeds, options.count, options.seed)
    client.close()
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    told = {"files": len(seeds), "mutations": options.count, **dict(sorted(outcomes.items())), "faults": 0}
    print(json.dumps(told | {"decoder_peak_rss_mib": peak_mib, "took_s": round(time.monotonic() - start, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
