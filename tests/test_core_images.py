"""Images: every mode against an independent computation, odd formats read right, bad ones refused in one sentence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgemed.core.images as images
from edgemed.core.errors import ImageError
from edgemed.core.images import ImagePreparation, hash_pixels, load_image, load_pixels, normalise, prepare

BICUBIC = Image.Resampling.BICUBIC


def preparation(mode: str = "pad", size_px: int = 32, colour: tuple[int, int, int] = (9, 8, 7)) -> ImagePreparation:
    return ImagePreparation(size_px=size_px, mode=mode, pad_colour=colour, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(("width", "height"), [(50, 30), (30, 50), (40, 40), (41, 20)])
def test_pad_centres_on_a_square_first(width: int, height: int) -> None:
    image, side = noise(width, height), max(width, height)
    square = np.full((side, side, 3), (9, 8, 7), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = np.asarray(image)
    expected = np.asarray(Image.fromarray(square).resize((32, 32), BICUBIC))
    assert np.array_equal(prepare(image, preparation()), expected)


def test_stretch_loses_the_aspect_ratio() -> None:
    image = noise(50, 30)
    assert np.array_equal(prepare(image, preparation("stretch")), np.asarray(image.resize((32, 32), BICUBIC)))


@pytest.mark.parametrize(("width", "height"), [(50, 30), (30, 51)])
def test_crop_takes_the_centre_after_the_shortest_edge(width: int, height: int) -> None:
    image = noise(width, height)
    long_px = int(32 * max(width, height) / min(width, height))
    resized = image.resize((long_px, 32) if width > height else (32, long_px), BICUBIC)
    start = (long_px - 32) // 2
    box = (start, 0, start + 32, 32) if width > height else (0, start, 32, start + 32)
    assert np.array_equal(prepare(image, preparation("crop")), np.asarray(resized.crop(box)))


@pytest.mark.parametrize(("width", "height"), [(300, 40), (40, 300), (300, 299), (257, 1), (1, 300)])
@pytest.mark.parametrize("rows", [7, 64])
def test_banded_padding_gives_the_same_bytes(width: int, height: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(width, height)
    direct = prepare(image, preparation())
    monkeypatch.setattr(images, "BAND_SIDE_PX", 64)
    monkeypatch.setattr(images, "BAND_ROWS", rows)
    assert np.array_equal(prepare(image, preparation()), direct)


@pytest.mark.parametrize("mode", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [(20_000, 10), (10, 20_000), (1, 1)])
def test_very_wide_and_tall_images_are_handled(mode: str, size: tuple[int, int]) -> None:
    assert prepare(Image.new("RGB", size, (1, 2, 3)), preparation(mode)).shape == (32, 32, 3)


def test_crop_of_a_huge_aspect_keeps_the_centre() -> None:
    image = Image.new("RGB", (20_000, 10))
    image.paste((200, 0, 0), (9_995, 0, 10_005, 10))
    assert prepare(image, preparation("crop"))[16, 16].tolist() == [200, 0, 0]


def test_normalise_is_what_torch_is_fed() -> None:
    pixels = np.asarray(noise(4, 4))
    expected = (pixels.astype(np.float64) / 255 - [0.5, 0.4, 0.3]) / [0.5, 0.25, 0.2]
    result = normalise(pixels, preparation())
    assert result.shape == (3, 4, 4) and result.dtype == np.float32 and result.flags["C_CONTIGUOUS"]
    assert np.allclose(result, expected.transpose(2, 0, 1), atol=1e-6)


def test_hash_names_the_pixels() -> None:
    pixels = prepare(noise(8, 8), preparation())
    assert hash_pixels(pixels) == hash_pixels(pixels.copy()) != hash_pixels(pixels[::-1])


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[1000, 3000], [5000, 1000]], np.uint16)
    path = tmp_path / "x.png"
    Image.fromarray(values).save(path)
    assert np.asarray(load_image(path))[:, :, 0].tolist() == [[0, 128], [255, 0]]


def test_float_grey_with_nan_is_scaled(tmp_path: Path) -> None:
    path = tmp_path / "x.tiff"
    Image.fromarray(np.array([[0.0, np.nan], [0.5, 1.0]], np.float32)).save(path)
    assert np.asarray(load_image(path))[:, :, 1].tolist() == [[0, 0], [128, 255]]


def test_a_flat_sixteen_bit_image_is_black(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.full((2, 2), 700, np.uint16)).save(path)
    assert np.asarray(load_image(path)).max() == 0


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, quality=100)
    red, green, blue = np.asarray(load_image(path))[4, 4]
    assert red > 200 and green < 40 and blue < 40


def test_palette_with_transparency_lies_over_black() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    out = io.BytesIO()
    image.save(out, "PNG", transparency=1)
    assert np.asarray(load_image(out.getvalue())).tolist() == [[[255, 0, 0], [0, 0, 0]]]


def test_half_transparent_is_mixed_with_black() -> None:
    assert np.asarray(load_image(png(Image.new("RGBA", (1, 1), (200, 100, 50, 128))))).tolist() == [[[100, 50, 25]]]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    path = tmp_path / "x.jpg"
    image.save(path, exif=exif)
    assert load_image(path).size == (2, 4)


def test_animated_gives_the_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    frames = [Image.new("RGB", (3, 3), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(path))[1, 1].tolist() == [255, 0, 0]


def header_only_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (9_000, 9_000)])
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(ImageError, match="at most 64 megapixels"):
        load_image(header_only_png(width, height), "bomb.png")


@pytest.mark.parametrize(("width", "height"), [(65_536, 1), (1, 65_536)])
def test_a_side_too_long_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(ImageError, match="at most 65535 pixels a side in long.png"):
        load_image(header_only_png(width, height), "long.png")


def test_bad_images_are_refused(tmp_path: Path) -> None:
    cases = {
        "empty.png": (b"", "empty file"),
        "text.png": (b"This is not an image.", "no image format"),
        "cut.png": (png(noise(64, 64))[:500], "damaged"),
    }
    for name, (data, says) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ImageError, match=says) as caught:
            load_image(path)
        assert name in caught.value.message and caught.value.hint
    for missing, says in ((tmp_path / "none.png", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(ImageError, match=says):
            load_image(missing)


@pytest.mark.parametrize("error", [struct.error, IndexError, KeyError, TypeError, OverflowError, SyntaxError])
def test_whatever_a_decoder_raises_is_a_damaged_image(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def decode(*_: object) -> None:
        raise error("inside a decoder")

    data = png(noise(4, 4))
    monkeypatch.setattr(images.Image, "open", decode)
    with pytest.raises(ImageError, match="damaged"):
        load_image(data)


@pytest.mark.parametrize(("kind", "dtype"), [("L", np.uint8), ("I;16", np.uint16), ("I", np.int32), ("F", np.float32)])
def test_the_values_of_grey_files_are_their_own(kind: str, dtype: type) -> None:
    values = np.arange(48).reshape(6, 8).astype(dtype) * 5
    out = io.BytesIO()
    Image.fromarray(values).save(out, "TIFF")
    image, found = load_pixels(out.getvalue())
    assert Image.open(io.BytesIO(out.getvalue())).mode == kind
    assert found is not None and found.dtype == dtype and np.array_equal(found, values)
    assert image.mode == "RGB" and image.tobytes() == load_image(out.getvalue()).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "P", "LA", "1", "CMYK"])
def test_other_files_have_no_grey_values(mode: str) -> None:
    out = io.BytesIO()
    noise(8, 6).convert(mode).save(out, "TIFF")
    assert load_pixels(out.getvalue())[1] is None
