"""Who the patient is stays where it belongs: apart from the facts, out of the copies, and found in the pixels where it is burnt in."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_fixture import PLANTED, PLANTED_WORDS, STUDY_UID, SYNTAXES, make_dicom, radiograph
from PIL import Image, ImageDraw, ImageFont

from edgemed.clinic.imaging import open_picture, strip_identifiers, suspect_burnt_in
from edgemed.clinic.imaging.burnt_in import OFTEN, SAYS_YES, SEEN
from edgemed.clinic.records import Box, PatientIdentity, View, Window
from edgemed.core.errors import DicomError

KEY = b"k" * 32
COLOUR = np.asarray(Image.fromarray(radiograph(8)).convert("RGB"))


def leaks(data: bytes) -> list[str]:
    """Planted words in bytes, in the encodings that a device may use, and in what zlib or a reader makes of them."""
    texts = [data, data.replace(b"\0", b""), str(pydicom.dcmread(io.BytesIO(data), force=True)).encode()]
    return [word for word in PLANTED_WORDS if any(word.encode().lower() in text.lower() for text in texts)]


def test_facts_hold_nothing_planted_and_identity_holds_it() -> None:
    picture = open_picture(make_dicom(), "a.dcm")
    told = str(asdict(picture.facts)) + str(picture.windows)
    assert not [word for word in PLANTED_WORDS if word in told]
    facts = picture.facts
    assert (facts.modality, facts.body_part, facts.view_position, facts.laterality, facts.description) == ("CR", "WRIST", "PA", "L", "")
    assert picture.identity == PatientIdentity("Qwyzzel^Marguerita", "PID-7788812345", "1951-04-17", "F", "ACC99120077", STUDY_UID)


@pytest.mark.parametrize("value", ["QWYZZEL", "Marguerita", "PID-7788812345", "MWANGAZAVILLE"])
def test_a_name_in_a_harmless_tag_is_no_fact(value: str) -> None:
    data = make_dicom(BodyPartExamined=value[:16], ViewPosition="LAT")
    assert open_picture(data).facts.body_part == "" and open_picture(data).facts.view_position == "LAT"
    assert not leaks(strip_identifiers(data))


def test_tags_that_a_terminal_would_obey_are_cleaned() -> None:
    tags = {"SpecificCharacterSet": "ISO_IR 192", "BodyPartExamined": "HA\x1b[2JND"}
    tags |= {"PatientName": "A\x1b]0;x\x07^\u202eB", "PatientID": "1\n2"}
    picture = open_picture(make_dicom(**tags))
    assert picture.facts.body_part == "HA2JND" and picture.identity.name == "A]0;x^B" and picture.identity.patient_id == "1 2"


@pytest.mark.parametrize("syntax", list(SYNTAXES))
def test_a_stripped_copy_says_nobodys_name_and_shows_the_same(syntax: str) -> None:
    pixels = radiograph(8 if syntax == "jpeg" else 12)
    data = make_dicom(pixels, syntax, bits=8 if syntax == "jpeg" else 12, WindowCenter=900, WindowWidth=1200)
    assert leaks(data) or syntax == "deflated"
    copy = strip_identifiers(b"Qwyzzel preamble".ljust(128, b"!") + data[128:])
    assert not leaks(copy)
    shown, original = open_picture(copy), open_picture(data)
    assert np.array_equal(np.asarray(shown.render()), np.asarray(original.render()))
    assert shown.facts == original.facts and shown.windows == original.windows == (Window(900, 1200),)
    assert shown.identity.name == "ANONYMOUS" and shown.identity.birth_date == shown.identity.accession == ""


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_colours_and_frames_survive_stripping(photometric: str) -> None:
    frames = [np.ascontiguousarray(np.roll(COLOUR, 9 * n, axis=0)) for n in range(3)]
    data = make_dicom(frames, "rle" if photometric == "RGB" else "explicit", bits=8, modality="US", photometric=photometric)
    copy, original = open_picture(strip_identifiers(data)), open_picture(data)
    assert copy.facts.frames == 3
    assert all(copy.render(View(frame=n)).tobytes() == original.render(View(frame=n)).tobytes() for n in range(3))


def test_palettes_survive_stripping() -> None:
    tables = {f"{c}PaletteColorLookupTable{k}": v for c in ("Red", "Green", "Blue") for k, v in (("Descriptor", [256, 0, 8]),)}
    tables |= {f"{c}PaletteColorLookupTableData": bytes(range(256))[:: 1 if c == "Red" else -1] for c in ("Red", "Green", "Blue")}
    data = make_dicom(radiograph(8), bits=8, photometric="PALETTE COLOR", **tables)
    assert open_picture(strip_identifiers(data)).render().tobytes() == open_picture(data).render().tobytes()


def test_text_hidden_in_unused_bits_and_behind_the_pixels_is_gone() -> None:
    values = radiograph(12)
    hidden = np.frombuffer("".join(f"{byte:08b}" for byte in b"Qwyzzel").encode(), np.uint8) - 48
    dirty = values.copy()
    dirty[0, : len(hidden)] |= hidden.astype(np.uint16) << 15
    copy = pydicom.dcmread(io.BytesIO(strip_identifiers(make_dicom(dirty))))
    assert np.array_equal(np.frombuffer(copy.PixelData, "<u2").reshape(values.shape), values)
    trailing = make_dicom(values, PixelData=values.tobytes() + b"Qwyzzel, Marguerita!")
    assert not leaks(strip_identifiers(trailing))


def test_text_in_a_number_is_gone() -> None:
    data = make_dicom(KVP="70", Exposure="5").replace(b"DS\x02\x0070", b"LO\x02\x00Qw")
    copy = pydicom.dcmread(io.BytesIO(strip_identifiers(data)))
    assert "KVP" not in copy and copy.Exposure == 5


def test_files_stripped_with_one_key_stay_together_and_others_do_not() -> None:
    one, two = make_dicom(SOPInstanceUID="1.2.3"), make_dicom(SOPInstanceUID="1.2.4")
    pairs = ((one, KEY), (two, KEY), (one, b"x" * 32))
    a, b, other = (pydicom.dcmread(io.BytesIO(strip_identifiers(data, key=key))) for data, key in pairs)
    assert a.StudyInstanceUID == b.StudyInstanceUID and a.PatientID == b.PatientID and a.SOPInstanceUID != b.SOPInstanceUID
    assert other.StudyInstanceUID != a.StudyInstanceUID and STUDY_UID not in a.StudyInstanceUID
    assert a.StudyInstanceUID.is_valid and a.file_meta.MediaStorageSOPInstanceUID == a.SOPInstanceUID


def test_what_a_copy_says_of_itself() -> None:
    copy = pydicom.dcmread(io.BytesIO(strip_identifiers(make_dicom())))
    assert copy.PatientIdentityRemoved == "YES" and copy.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    assert copy.SOPClassUID == "1.2.840.10008.5.1.4.1.1.1" and copy.Modality == "CR"
    assert not [element for element in copy.iterall() if element.tag.is_private or element.tag.group in range(0x6000, 0x6100)]
    assert not {"InstitutionName", "StudyDescription", "RequestAttributesSequence"} & set(copy.dir())
    assert all(getattr(copy, keyword) != value for keyword, value in PLANTED.items() if keyword in copy)


def test_masks_are_burnt_into_the_copy() -> None:
    frames = [radiograph(12), radiograph(12) // 2]
    data = make_dicom(frames, "rle", PixelAspectRatio=[2, 1])
    box = Box(10, 40, 60, 80)  # rows are shown twice as high
    copy = pydicom.dcmread(io.BytesIO(strip_identifiers(data, masks=(box,))))
    for found, made in zip(copy.pixel_array, frames, strict=True):
        expected = made.copy()
        expected[20:40, 10:60] = 0
        assert np.array_equal(found, expected)


def test_only_dicom_is_stripped() -> None:
    out = io.BytesIO()
    Image.fromarray(COLOUR).save(out, "PNG")
    with pytest.raises(DicomError, match="found a plain image"):
        strip_identifiers(out.getvalue())


def test_nothing_is_written_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    strip_identifiers(make_dicom(syntax="jpeg2000"))
    assert list(tmp_path.iterdir()) == []


def with_text(pixels: np.ndarray, text: str, at: tuple[int, int], fill: int) -> np.ndarray:
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).text(at, text, fill=fill, font=ImageFont.load_default(14))
    return np.array(image)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"modality": "CR"}, ()),
        ({"modality": "CR", "BurnedInAnnotation": "YES"}, (SAYS_YES,)),
        ({"modality": "US"}, (OFTEN,)),
        ({"modality": "US", "BurnedInAnnotation": "NO"}, ()),
        ({"modality": "OT"}, (OFTEN,)),
        ({"modality": "CR", "ImageType": ["DERIVED", "SECONDARY"]}, (OFTEN,)),
    ],
)
def test_burnt_in_text_by_what_the_file_says(tags: dict[str, object], expected: tuple[str, ...]) -> None:
    calm = np.tile(np.arange(160, dtype=np.uint8), (160, 1))
    assert suspect_burnt_in(open_picture(make_dicom(calm, bits=8, **tags))) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("at", "fill"), [((4, 4), 255), ((180, 280), 255), ((4, 285), 250)])
def test_burnt_in_text_is_seen(at: tuple[int, int], fill: int) -> None:
    dark = radiograph(8, 320) // 3
    assert suspect_burnt_in(open_picture(make_dicom(dark, bits=8))) == ()
    written = with_text(dark, "QWYZZEL MARGUERITA", at, fill)
    assert SEEN in suspect_burnt_in(open_picture(make_dicom(written, bits=8)))
    assert suspect_burnt_in(open_picture(make_dicom(with_text(dark, "L", at, fill), bits=8))) == ()
