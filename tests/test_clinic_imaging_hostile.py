"""Damaged and hostile files: refused in a sentence or shown, never a crash, a hang, or any amount of memory; nothing of them is logged."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import struct
import threading
import zlib
from typing import Any

import numpy as np
import pytest
from dicom_fixture import PLANTED_WORDS, SYNTAXES, make_dicom
from PIL import Image

from bench.dicom_fuzz import mutate, run
from edgemed.clinic.imaging import client, dataset, open_picture, strip_identifiers
from edgemed.clinic.imaging.client import _frame
from edgemed.clinic.imaging.header import Header, describe
from edgemed.clinic.records import View
from edgemed.core.errors import DicomError, EdgemedError, ImageError

SENTENCE = re.compile(r"^Expected .+, found .+\.$")
SMALL = np.arange(1024, dtype=np.uint16).reshape(32, 32)


def refusal(data: bytes) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(ImageError) as caught:
        open_picture(data, "a.dcm").render()
    assert SENTENCE.match(caught.value.message) and caught.value.hint
    assert not [word for word in PLANTED_WORDS if word in caught.value.message]
    return caught.value.message


def element(group: int, number: int, kind: bytes, data: bytes, length: int | None = None) -> bytes:
    """One element in explicit little endian, with a length of one's own choosing."""
    size = len(data) if length is None else length
    long = kind in (b"OB", b"OW", b"SQ", b"UN", b"UT")
    head = struct.pack("<HH2s", group, number, kind) + (struct.pack("<HI", 0, size) if long else struct.pack("<H", size))
    return head + data


def with_elements(*elements: bytes) -> bytes:
    """A file of these elements before those of a small image."""
    whole = make_dicom(SMALL, planted=False)
    at = whole.index(b"\x08\x00\x08\x00CS")  # ImageType, the first element behind the meta header
    return whole[:at] + b"".join(elements) + whole[at:]


@pytest.mark.parametrize("syntax", list(SYNTAXES))
def test_cut_files_are_refused_or_shown(syntax: str) -> None:
    data = make_dicom(SMALL.astype(np.uint8) if syntax == "jpeg" else SMALL, syntax, bits=8 if syntax == "jpeg" else 12)
    outcomes = set()
    for end in range(0, len(data), max(1, len(data) // 60)):
        try:
            open_picture(data[:end], "a.dcm").render()
            outcomes.add("shown")
        except ImageError as error:
            assert SENTENCE.match(error.message)
            outcomes.add("refused")
    assert "refused" in outcomes


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"Rows": 65_535, "Columns": 65_535, "NumberOfFrames": 4}, "at most 64 megapixels"),
        ({"Rows": 8_000, "Columns": 8_000}, "fewer bytes than one frame"),
        ({"Rows": 0}, "rows and columns"),
        ({"Rows": None}, "rows and columns"),
        ({"BitsAllocated": None}, "bits"),
        ({"BitsAllocated": 0}, "bits"),
        ({"BitsStored": 99}, "can be decoded"),
        ({"SamplesPerPixel": 9}, "samples"),
        ({"PhotometricInterpretation": None}, "photometric"),
        ({"PhotometricInterpretation": "CMYK"}, "colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "look-up tables"),
        ({"PixelData": None}, "without pixels"),
        ({"PixelData": b""}, "pixels"),
    ],
)
def test_sizes_and_missing_attributes(tags: dict[str, Any], said: str) -> None:
    assert said in refusal(make_dicom(SMALL, **tags))


def test_more_frames_than_there_are() -> None:
    picture = open_picture(make_dicom(SMALL, NumberOfFrames=2_000_000_000))
    assert picture.facts.frames == 1 and "declares 2000000000 frames and holds 1" in picture.facts.warnings[0]


@pytest.mark.parametrize("frames", ["-3", "0", "1A"])
def test_a_number_of_frames_that_is_none(frames: str) -> None:
    data = make_dicom(SMALL, NumberOfFrames=777).replace(b"IS\x04\x00777 ", b"IS\x04\x00" + frames.ljust(4).encode())
    assert open_picture(data).facts.frames == 1


@pytest.mark.parametrize("kind", [b"UN", b"OB", b"US", b"PN", b"SQ", b"??"])
def test_pixel_data_of_another_type(kind: bytes) -> None:
    data = make_dicom(SMALL)
    at = data.rindex(b"\xe0\x7f\x10\x00OW") + 4
    try:
        assert open_picture(data[:at] + kind + data[at + 2 :]).render().size == (32, 32)
    except DicomError as error:
        assert SENTENCE.match(error.message)


@pytest.mark.parametrize("depth", [50, 20_000])
def test_sequences_nested_deep(depth: int) -> None:
    opening = element(0x0008, 0x1140, b"SQ", b"", 0xFFFFFFFF) + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    closing = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    data = with_elements(opening * depth + closing * depth)
    if depth > 1000:
        assert "nested" in refusal(data)
    else:
        assert open_picture(data).render().size == (32, 32)


def test_lengths_beyond_the_file() -> None:
    assert SENTENCE.match(refusal(with_elements(element(0x0009, 0x1001, b"UN", b"abc", 0xFFFFFFF0))))
    assert SENTENCE.match(refusal(with_elements(element(0x0009, 0x1001, b"SQ", b"abc", 0x7FFFFFFF))))


def test_a_deflated_bomb_is_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_INFLATED_BYTES", 1 << 20)
    whole = make_dicom(SMALL, "deflated")
    packer = zlib.compressobj(wbits=-15)
    bomb = packer.compress(bytes(64 << 20)) + packer.flush()
    with pytest.raises(dataset.Refused) as caught:
        dataset.read_dataset(whole[: dataset._deflated_at(whole)] + bomb)
    assert "1 MiB" in caught.value.expected


def test_a_codestream_larger_than_its_header_says() -> None:
    data = bytearray(make_dicom(SMALL, "jpeg2000"))
    size = data.index(b"\xff\x4f\xff\x51") + 8
    data[size : size + 8] = struct.pack(">II", 60_000, 60_000)
    refusal(bytes(data))
    large = io.BytesIO()
    Image.new("L", (2000, 2000), 7).save(large, "JPEG")
    from pydicom.encaps import encapsulate

    refusal(make_dicom(SMALL.astype(np.uint8), "jpeg", bits=8, PixelData=encapsulate([large.getvalue()])))


def test_one_file_after_a_refused_one() -> None:
    refusal(make_dicom(SMALL, Rows=0))
    assert open_picture(make_dicom(SMALL)).render().size == (32, 32)


def stopped() -> int:
    """The decoding process, halted: whatever it is asked next, it does not answer."""
    open_picture(make_dicom(SMALL))
    assert client._process is not None
    pid = client._process._process.pid
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_a_decoder_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped()
    with pytest.raises(DicomError, match="takes longer than 0.2 s"):
        client._ask({"op": "load"}, b"", "a.dcm", 0.2)
    assert open_picture(make_dicom(SMALL)).render().size == (32, 32)


def test_a_decoder_that_dies_is_a_sentence_and_starts_again() -> None:
    picture = open_picture(make_dicom([SMALL, SMALL + 1]))
    pid = stopped()
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(DicomError, match="breaks down"):
        open_picture(make_dicom(SMALL))
    assert picture.render(View(frame=1)).size == (32, 32)


def test_closing_ends_the_decoder() -> None:
    open_picture(make_dicom(SMALL))
    assert client._process is not None
    process = client._process
    client.close()
    assert not process.alive and client._process is None


def test_a_locked_program_keeps_no_frames() -> None:
    from edgemed.clinic.imaging import forget_frames, picture

    shown = open_picture(make_dicom(SMALL))
    before = shown.render()
    assert picture._cache._bytes > 0 and client._process is not None
    forget_frames()
    assert picture._cache._bytes == 0 and client._process is None
    assert shown.render().tobytes() == before.tobytes()


@pytest.mark.parametrize(
    "change", [{"rows": 0}, {"rows": 70_000, "columns": 70_000}, {"facts": {}}, {"identity": {"x": "y"}}, {"windows": 3}]
)
def test_descriptions_are_not_trusted(change: dict[str, Any]) -> None:
    told = describe(dataset.read_dataset(make_dicom(SMALL)))
    assert Header.of(told).rows == 32
    with pytest.raises((KeyError, TypeError, ValueError)):
        Header.of(told | change)


def test_the_decoder_ends_with_its_program() -> None:
    process = client.DecodingProcess()
    assert process._process.stdin is not None
    process._process.stdin.close()
    assert process._process.wait(30) == 0
    process.close()


@pytest.mark.parametrize(
    "change", [{"dtype": "object"}, {"shape": [8]}, {"shape": [9, 9]}, {"shape": ["x", 8]}, {"frame": None}, {"dtype": "float64"}]
)
def test_replies_are_not_trusted(change: dict[str, Any]) -> None:
    told = {"windows": [], "voi_lut": None, "low": 0, "high": 1, "padding": None, "inverse": False, "monochrome": True}
    reply = {"frame": told, "shape": [32, 32], "dtype": "uint16"}
    assert _frame(reply, SMALL.tobytes()).values.shape == (32, 32)
    with pytest.raises((KeyError, TypeError, ValueError)):
        _frame(reply | change, SMALL.tobytes())


def test_nothing_of_a_file_reaches_logs_or_streams(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    data = make_dicom(PatientBirthDate="19510417")
    for damaged in (data.replace(b"DA\x08\x0019510417", b"DA\x08\x00Qwyzzel!"), data.replace(b"ISO_IR", b"Qwyzze"), data[:-99]):
        try:
            open_picture(damaged).render()
        except EdgemedError as error:
            assert "Qwyzzel" not in error.message
    said = capfd.readouterr()
    assert said.out == said.err == caplog.text == ""


def seeds() -> list[tuple[str, bytes]]:
    plain = [(name, make_dicom(SMALL, name)) for name in SYNTAXES if name != "jpeg"]
    colour = np.random.default_rng(0).integers(0, 256, (33, 31, 3), np.uint8)
    return [*plain, ("jpeg", make_dicom(colour, "jpeg", bits=8)), ("loop", make_dicom([SMALL, SMALL, SMALL], "rle"))]


def test_seeded_damage_is_refused_or_shown() -> None:
    outcomes = run(seeds(), 400, seed=1)
    assert sum(outcomes.values()) == 400 and outcomes["shown"] > 20
    assert sum(count for what, count in outcomes.items() if what.startswith("refused")) > 100


def test_damage_is_repeatable() -> None:
    data = make_dicom(SMALL)
    assert mutate(data, random.Random(5)) == mutate(data, random.Random(5)) != data


def test_damaged_copies_are_refused_too() -> None:
    with pytest.raises(DicomError):
        strip_identifiers(make_dicom(SMALL)[:-40])


def test_pictures_that_are_gone_leave_the_cache() -> None:
    from edgemed.clinic.imaging.picture import FrameCache

    cache = FrameCache(1000)
    frame = client.Frame(np.zeros((20, 20), np.uint8), True)
    for index in range(5):
        cache.put((1, index), frame)
    assert cache.get((1, 4)) is frame and cache.get((1, 3)) is frame and cache.get((1, 1)) is None
    cache.drop(1)
    assert cache.get((1, 4)) is None and cache._bytes == 0
