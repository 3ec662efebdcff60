"""Images of every kind shown right: windows by the standard's formulas, pixels against plain numpy and, where it is there, dcmtk."""

from __future__ import annotations

import io
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_fixture import SYNTAXES, ct_series, make_dicom, radiograph
from PIL import Image

from edgemed.clinic.imaging import CT_WINDOWS, is_dicom, list_series, open_picture, parse_window
from edgemed.clinic.imaging.window import VoiLut, apply_voi_lut, apply_window
from edgemed.clinic.records import Box, View, Window
from edgemed.core.errors import DicomError, ImageError, InputError, MissingExtraError
from edgemed.core.images import load_image

ROOT = Path(__file__).resolve().parents[1]
VALUES = radiograph(12)
COLOUR = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)


def linear(x: float, centre: float, width: float) -> float:
    """PS3.3 C.11.2.1.2.1 as it is written, one value at a time."""
    if x <= centre - 0.5 - (width - 1) / 2:
        return 0.0
    if x > centre - 0.5 + (width - 1) / 2:
        return 255.0
    return ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255.0


def linear_exact(x: float, centre: float, width: float) -> float:
    """PS3.3 C.11.2.1.3.2."""
    return 0.0 if x <= centre - width / 2 else 255.0 if x > centre + width / 2 else ((x - centre) / width + 0.5) * 255.0


def sigmoid(x: float, centre: float, width: float) -> float:
    """PS3.3 C.11.2.1.3.1; 1 / (1 + exp(-2t)) is (1 + tanh t) / 2, which has no overflow."""
    return 255.0 * (1 + math.tanh(2 * (x - centre) / width)) / 2


def grey(image: Image.Image) -> np.ndarray[Any, Any]:
    pixels = np.asarray(image)
    assert pixels.ndim == 3 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0].astype(int)


@pytest.mark.parametrize("formula", [linear, linear_exact, sigmoid])
@pytest.mark.parametrize(("centre", "width"), [(40, 400), (0, 1), (2048, 4096), (-600, 1500.5), (0.5, 2)])
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_windows_follow_the_standard(formula: Any, centre: float, width: float, kind: Any) -> None:
    values = np.arange(-300, 300, 1).astype(kind).reshape(20, 30)
    expected = [round(formula(float(x), centre, width)) for x in values.ravel()]
    found = apply_window(values, Window(centre, width, formula.__name__)).ravel().astype(int)
    assert np.abs(found - expected).max() <= (1 if formula is sigmoid else 0) and found.dtype == int


def test_a_linear_window_narrower_than_one_is_taken_exactly() -> None:
    values = np.array([[0.0, 0.25, 0.5]], np.float32)
    assert apply_window(values, Window(0.25, 0.5)).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("window", [Window(0, 0), Window(0, -5), Window(math.nan, 1), Window(0, math.inf)])
def test_windows_that_show_nothing_are_refused(window: Window) -> None:
    with pytest.raises(InputError, match="width above 0"):
        apply_window(VALUES, window)


def test_a_window_as_text() -> None:
    assert parse_window(" -600,1500") == Window(-600, 1500)
    for text in ("", "40", "40,0", "a,b", "1,2,3", "nan,5"):
        with pytest.raises(InputError, match="CENTRE,WIDTH"):
            parse_window(text)


def test_a_frame_of_one_value_is_black() -> None:
    assert grey(open_picture(make_dicom(np.full((20, 20), 700, np.uint16))).render()).max() == 0


def test_voi_luts_clamp_at_their_ends() -> None:
    lut = VoiLut(first=10, bits=8, entries=(0, 100, 255))
    assert apply_voi_lut(np.array([[-5, 10, 11, 12, 900]]), lut).tolist() == [[0, 0, 100, 255, 255]]


@pytest.mark.parametrize("syntax", [name for name in SYNTAXES if name != "jpeg"])
def test_every_lossless_syntax_shows_the_same(syntax: str) -> None:
    picture = open_picture(make_dicom(syntax=syntax))
    window = Window(1800, 2500)
    expected = [[round(linear(float(x), 1800, 2500)) for x in row] for row in VALUES]
    assert np.array_equal(grey(picture.render(View(window=window))), expected)
    assert picture.value_range() == (float(VALUES.min()), float(VALUES.max()))


def test_jpeg_is_as_pillow_decodes_it() -> None:
    values = radiograph(8)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "JPEG", quality=95)
    expected = np.asarray(Image.open(out)).astype(int)
    shown = grey(open_picture(make_dicom(values, "jpeg", bits=8)).render(View(window=Window(128, 256))))
    assert np.array_equal(shown, expected)


@pytest.mark.parametrize("syntax", ["explicit", "big", "rle", "jpegls", "jpeg2000"])
def test_colours_are_kept(syntax: str) -> None:
    picture = open_picture(make_dicom(COLOUR, syntax, bits=8, modality="US"))
    assert np.array_equal(np.asarray(picture.render()), COLOUR)
    assert not picture.monochrome and picture.windows == () and picture.default_window() is None


def test_planes_one_after_the_other() -> None:
    planes = np.ascontiguousarray(COLOUR.transpose(2, 0, 1)).tobytes()
    assert np.array_equal(np.asarray(open_picture(make_dicom(COLOUR, bits=8, PlanarConfiguration=1, PixelData=planes)).render()), COLOUR)


def test_ybr_is_shown_in_rgb() -> None:
    y, blue, red = (COLOUR[..., i].astype(float) for i in range(3))
    rgb = [y + 1.402 * (red - 128), y - 0.344136 * (blue - 128) - 0.714136 * (red - 128), y + 1.772 * (blue - 128)]
    shown = np.asarray(open_picture(make_dicom(COLOUR, bits=8, photometric="YBR_FULL")).render()).astype(int)
    assert np.abs(shown - np.clip(np.rint(np.stack(rgb, -1)), 0, 255)).max() <= 1


@pytest.mark.parametrize("syntax", ["explicit", "big"])
@pytest.mark.parametrize("bits", [8, 16])
def test_palettes(syntax: str, bits: int) -> None:
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tables = np.random.default_rng(2).integers(0, 256, (3, 256))
    extra: dict[str, Any] = {}
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        words = (table * 257).astype(">u2" if syntax == "big" else "<u2") if bits == 16 else table.astype(np.uint8)
        data = words.tobytes() if bits == 16 or syntax != "big" else words.view("<u2").astype(">u2").tobytes()
        extra |= {f"{name}PaletteColorLookupTableDescriptor": [256, 0, bits], f"{name}PaletteColorLookupTableData": data}
    picture = open_picture(make_dicom(indices, syntax, bits=8, photometric="PALETTE COLOR", **extra))
    assert np.array_equal(np.asarray(picture.render()), tables.T[indices])


def test_monochrome1_and_invert_turn_the_greys() -> None:
    plain, turned = (open_picture(make_dicom(photometric=name)) for name in ("MONOCHROME2", "MONOCHROME1"))
    assert np.array_equal(grey(turned.render()), 255 - grey(plain.render()))
    assert np.array_equal(grey(turned.render(View(invert=True))), grey(plain.render()))


def test_a_ct_is_shown_in_hounsfield_units(tmp_path: Path) -> None:
    path = ct_series(tmp_path, 1)[0]
    picture = open_picture(path)
    assert picture.windows == CT_WINDOWS and picture.value_range()[0] >= -1024
    expected = [[round(linear(float(x), -600, 1500)) for x in row] for row in radiograph(8, 64).astype(int) * 4 - 1024]
    assert np.array_equal(grey(picture.render(View(window=CT_WINDOWS[1]))), expected)
    assert picture.resolve(View()).window == picture.default_window() == CT_WINDOWS[0]


def test_the_files_own_windows_come_first() -> None:
    picture = open_picture(make_dicom(WindowCenter=[500, 900], WindowWidth=[1000, 1], VOILUTFunction="SIGMOID"))
    assert picture.windows == (Window(500, 1000, "sigmoid"), Window(900, 1, "sigmoid"))
    assert np.array_equal(grey(picture.render()), grey(picture.render(View(window=picture.windows[0]))))


@pytest.mark.parametrize(("centre", "width"), [(500, 0), (500, -20), ([], [])])
def test_windows_of_a_file_that_show_nothing_are_passed_over(centre: Any, width: Any) -> None:
    picture = open_picture(make_dicom(WindowCenter=centre, WindowWidth=width))
    assert picture.windows == ()
    assert (grey(picture.render()).min(), grey(picture.render()).max()) == (0, 255)


def test_a_voi_lut_is_used_where_there_is_no_window() -> None:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 12])
    item.add_new("LUTData", "US", [4095 - n for n in range(4096)])
    picture = open_picture(make_dicom(VOILUTSequence=Sequence([item])))
    assert np.array_equal(grey(picture.render()), np.rint((4095 - VALUES.astype(float)) / 4095 * 255))
    assert picture.default_window() == Window(2047.5, 4095, "linear_exact", "lut") and picture.resolve(View()).window is None


def test_signed_values_and_rescaling() -> None:
    values = (VALUES.astype(np.int16) - 2048).astype(np.int16)
    picture = open_picture(make_dicom(values, bits=16, RescaleSlope=0.5, RescaleIntercept=10))
    assert picture.value_range() == (values.min() * 0.5 + 10, values.max() * 0.5 + 10)


def test_padding_is_black_and_no_part_of_the_range() -> None:
    values = VALUES.copy()
    values[:10] = 4095
    values[10:] = np.minimum(values[10:], 3000)
    picture = open_picture(make_dicom(values, PixelPaddingValue=4095))
    assert picture.value_range()[1] <= 3000 and (grey(picture.render())[:10] == 0).all()


def test_bits_beyond_those_stored_are_not_shown() -> None:
    dirty = VALUES | (np.random.default_rng(3).integers(0, 16, VALUES.shape) << 12).astype(np.uint16)
    assert np.array_equal(grey(open_picture(make_dicom(dirty)).render()), grey(open_picture(make_dicom()).render()))
    shifted = (VALUES << 4).astype(np.uint16)
    assert np.array_equal(grey(open_picture(make_dicom(shifted, HighBit=15)).render()), grey(open_picture(make_dicom()).render()))


def test_one_bit_a_pixel() -> None:
    mask = np.random.default_rng(4).integers(0, 2, (16, 24)).astype(np.uint8)
    packed = np.packbits(mask, bitorder="little").tobytes()
    picture = open_picture(make_dicom(mask, bits=8, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed))
    assert np.array_equal(grey(picture.render()), mask * 255)


@pytest.mark.parametrize("syntax", ["explicit", "rle", "jpeg2000"])
def test_frames_are_shown_one_by_one(syntax: str) -> None:
    frames = [np.roll(VALUES, 7 * n, axis=1) for n in range(4)]
    picture = open_picture(make_dicom(frames, syntax))
    first = grey(picture.render())
    assert picture.facts.frames == 4
    assert all(np.array_equal(grey(picture.render(View(frame=n))), np.roll(first, 7 * n, axis=1)) for n in (3, 1, 2))
    with pytest.raises(ImageError, match="frame from 0 to 3 .* found 4"):
        picture.render(View(frame=4))


def test_two_pictures_take_turns_in_one_decoder() -> None:
    frames = [VALUES, np.flipud(VALUES)]
    one, two = open_picture(make_dicom(frames)), open_picture(make_dicom([frame.T.copy() for frame in frames]))
    shown = [picture.render(View(frame=frame)) for frame in (0, 1) for picture in (one, two)]
    assert np.array_equal(grey(shown[0]), grey(shown[1]).T) and np.array_equal(grey(shown[2]), grey(shown[3]).T)


def test_pixels_that_are_not_square_are_stretched() -> None:
    picture = open_picture(make_dicom(PixelAspectRatio=[2, 1]))
    rows, columns = VALUES.shape
    assert (picture.facts.width_px, picture.facts.height_px) == picture.render().size == (columns, 2 * rows)
    assert any("not square" in warning for warning in picture.facts.warnings)


def test_masks_are_black_and_clipped() -> None:
    picture = open_picture(make_dicom())
    shown = grey(picture.render(View(masks=(Box(10, 20, 30, 25), Box(150, 150, 9999, 9999), Box(-5, -5, 2, 2)), invert=True)))
    assert (shown[20:25, 10:30] == 0).all() and (shown[150:, 150:] == 0).all() and (shown[:2, :2] == 0).all()
    shown[20:25, 10:30] = shown[150:, 150:] = shown[:2, :2] = 1
    whole = grey(picture.render(View(invert=True)))
    assert (shown != whole).sum() <= 20 * 5 + 100 + 4


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_plain_images_are_what_training_saw(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "scan.dcm"  # the name says nothing
    Image.fromarray(COLOUR).save(path, suffix, **({"lossless": True} if suffix == "webp" else {}))
    picture = open_picture(path)
    assert picture.facts.kind == "plain" and picture.render().tobytes() == load_image(path).tobytes() == COLOUR.tobytes()


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_plain_16_bit_images_can_be_windowed(suffix: str) -> None:
    values = (VALUES.astype(np.uint16) * 15).astype(np.uint16)
    out = io.BytesIO()
    Image.fromarray(values).save(out, suffix)
    picture = open_picture(out.getvalue(), "a.png")
    assert picture.monochrome and picture.value_range() == (values.min(), values.max())
    assert picture.render().tobytes() == load_image(out.getvalue()).tobytes()
    assert np.abs(grey(picture.render(View(window=picture.default_window()))) - grey(picture.render())).max() <= 1
    expected = [[round(linear(float(x), 20000, 9000)) for x in row] for row in values]
    assert np.array_equal(grey(picture.render(View(window=Window(20000, 9000)))), expected)


def test_what_a_file_is_is_told_by_its_content(tmp_path: Path) -> None:
    data = make_dicom(syntax="implicit")
    no_preamble = data[132:]
    assert is_dicom(data) and is_dicom(no_preamble) and not is_dicom(b"\x89PNG\r\n" + bytes(200)) and not is_dicom(b"")
    path = tmp_path / "wrist.png"
    path.write_bytes(no_preamble)
    assert open_picture(path).facts.modality == "CR"


def test_a_series_is_found_and_in_order(tmp_path: Path) -> None:
    made = ct_series(tmp_path, 4)
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM" + b"junk")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x").write_bytes(make_dicom(syntax="deflated", planted=False))
    found = {series.modality: series for series in list_series(tmp_path)}
    assert found["CT"].files == tuple(made) and [path.name for path in found["CR"].files] == ["x"]
    with pytest.raises(InputError, match="folder"):
        list_series(tmp_path / "none")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgemed.clinic.imaging import client

    monkeypatch.setattr(client.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="Reading DICOM") as caught:
        open_picture(make_dicom())
    assert "edgemed[clinic]" in caught.value.hint


def test_the_program_itself_never_imports_pydicom() -> None:
    path = str(shipped("CT_small.dcm"))
    code = (
        "import sys, pathlib; from edgemed.clinic.imaging import open_picture; "
        f"open_picture(pathlib.Path({path!r})).render(); print([m for m in ('pydicom', 'highdicom') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def shipped(name: str) -> Path:
    """A test file of pydicom's."""
    import pydicom

    return Path(pydicom.__file__).parent / "data" / "test_files" / name


@pytest.mark.skipif(shutil.which("dcmj2pnm") is None, reason="needs dcmtk's dcmj2pnm (apt-get install dcmtk)")
@pytest.mark.parametrize(
    "name",
    ["CT_small.dcm", "MR_small_RLE.dcm", "JPEGLSNearLossless_16.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm", "examples_palette.dcm", "MR_small.dcm"],
)
def test_pixels_are_dcmtks(name: str) -> None:
    from bench.dicom_parity import compare

    row = compare(shipped(name))
    assert row is not None and row.result == "equal" and row.levels <= 1


@pytest.mark.parametrize("name", ["reportsi.dcm", "rtplan.dcm", "MR_truncated.dcm", "waveform_ecg.dcm", "JPEG-lossy.dcm"])
def test_what_cannot_be_shown_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(DicomError, match=r"^Expected .* found .*\.$"):
        open_picture(shipped(name)).render()


def test_what_else_a_file_holds_is_told_and_what_is_no_picture_refused() -> None:
    from io import BytesIO

    pages = BytesIO()
    first, second = Image.new("L", (30, 20), 10), Image.new("L", (30, 20), 200)
    first.save(pages, "TIFF", save_all=True, append_images=[second])
    picture = open_picture(pages.getvalue(), "two.tif")
    assert picture.facts.warnings == ("The file has 2 pages or frames; only the first is shown.",)
    with pytest.raises(ImageError, match="Expected frame 0"):
        picture.frame(1)
    with pytest.raises(DicomError, match="found a radiotherapy dose"):
        open_picture(make_dicom(SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2"))
