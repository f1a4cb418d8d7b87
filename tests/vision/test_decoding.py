"""Every mode of Pillow, every depth, every orientation; the reasons for unreadable images."""

import io
import os
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps
from transformers import ViTImageProcessorPil

from fmicl_text.vision.decoding import (
    UnreadableImageError,
    image_name,
    open_image,
    opened,
    scale_to_8_bits,
    to_picture,
    upright_size,
)
from tests.support import picture


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(encoded, channels=1, **options):
    return np.asarray(open_image(encoded, channels, **options))


def gradient(width=32, height=24):
    """A smooth RGB image in which every corner differs."""
    rows, columns = np.mgrid[0:height, 0:width]
    colors = np.stack([rows * 255 / (height - 1), columns * 255 / (width - 1), (rows + columns) % 256], axis=-1)
    return Image.fromarray(colors.round().astype(np.uint8))


# ---- modes

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


@pytest.mark.parametrize("mode", MODES + DEEP)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_pillow(mode, channels):
    found = to_picture(Image.new(mode, (5, 3)), channels)
    assert found.mode == ("L" if channels == 1 else "RGB") and found.size == (5, 3)


@pytest.mark.parametrize(
    "mode, kind",
    [
        *((mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *((mode, "TIFF") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")),
        *((mode, "JPEG") for mode in ("L", "RGB", "CMYK", "YCbCr")),
        *((mode, "JPEG2000") for mode in ("L", "LA", "RGB", "RGBA")),
        *((mode, kind) for mode in ("L", "RGB") for kind in ("BMP", "GIF", "PPM", "WEBP")),
    ],
)
def test_files_of_every_mode_have_the_colors_of_the_image(mode, kind):
    image = Image.new("RGB", (16, 16), (200, 60, 100))
    stored = image.convert("RGB").convert("L").convert(mode) if mode in ("1", "L", "LA") else as_mode(image, mode)
    found = pixels(encode(stored, kind), 3).astype(int)
    if mode == "1":
        assert set(np.unique(found)) <= {0, 255}
    else:
        gray = np.asarray(image.convert("L"))[..., None]
        expected = (gray if mode in ("L", "LA") else np.asarray(image)).astype(int)
        assert np.abs(found - expected).max() <= (30 if kind == "JPEG" and mode == "CMYK" else 6)


def as_mode(image, mode):
    if mode == "LAB":
        from PIL import ImageCms

        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    return image.convert(mode, palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize("mode", ["LA", "P", "RGBA", "RGB", "L"])
def test_transparency_is_that_of_the_image_processor(mode):
    """Transparent pixels become white, as in transformers since 5.23, however the file stores transparency."""
    if mode in ("P", "RGB", "L"):
        options = {"transparency": {"P": 0, "RGB": (0, 0, 0), "L": 0}[mode]}
        image = Image.new(mode, (4, 4), 0)
    else:
        options, image = {}, Image.new(mode, (4, 4), {"LA": (9, 51), "RGBA": (9, 9, 9, 51)}[mode])
    encoded = encode(image, **options)
    processor = ViTImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=True)
    expected = processor(Image.open(io.BytesIO(encoded["bytes"])), return_tensors="np")["pixel_values"][0]
    found = pixels(encoded, 3)
    assert np.array_equal(found, expected.transpose(1, 2, 0).round()) and found.min() > 200
    assert np.array_equal(processor(open_image(encoded, 3), return_tensors="np")["pixel_values"][0], expected.round())


def test_transparent_palettes_of_bytes_and_animations(recwarn):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert np.array_equal(pixels(encode(image, transparency=bytes([255, 0])), 3)[0, 0], [255, 255, 255])
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(encoded, 3)[0, 0].astype(int) - [255, 0, 0]).max() < 5
    assert not recwarn.list


# ---- more than 8 bits


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.array([0, 255], np.uint16), [0, 255]),  # 8 bits
        (np.array([0, 1023, 512], np.uint16), [0, 255, 128]),  # 10
        (np.array([0, 4095, 1024], np.uint16), [0, 255, 64]),  # 12: X-ray, MRI
        (np.array([0, 16383], np.uint16), [0, 255]),
        (np.array([0, 65535, 32768, 257], np.uint16), [0, 255, 128, 1]),
        (np.array([0, 3000], np.uint16), [0, 187]),  # the range is 12 bits, not the largest value
        (np.array([0, 65535, 257], np.int32), [0, 255, 1]),
        (np.array([0, 65536, 131072], np.int32), [0, 128, 255]),  # linear
        (np.array([-1000, 0, 3000], np.int32), [0, 64, 255]),  # Hounsfield units
        (np.array([-(2**31), 2**31 - 1], np.int32), [0, 255]),
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([0, 0.25], np.float32), [0, 64]),
        (np.array([0, 1.6, 255], np.float32), [0, 2, 255]),
        (np.array([-1, 0, 1], np.float32), [0, 128, 255]),
        (np.array([500, 3000, 1750], np.float32), [0, 255, 128]),  # depth in mm
        (np.array([np.nan, 0, 1, np.inf, -np.inf], np.float32), [0, 0, 255, 0, 0]),
        (np.array([np.nan, 500, 3000], np.float32), [0, 0, 255]),
        (np.array([np.nan, np.nan], np.float32), [0, 0]),
        (np.array([7000.0, 7000.0], np.float32), [0, 0]),
        (np.array([-3e38, 3e38], np.float32), [0, 255]),
        (np.array([0, 0], np.uint16), [0, 0]),
    ],
)
def test_the_rule_for_more_than_8_bits(values, expected):
    assert scale_to_8_bits(values).tolist() == expected


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_files(kind):
    """Pillow's own conversion maps every value above 255 to white."""
    values = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    found = pixels(encode(Image.fromarray(values), kind, **options))
    assert np.abs(found.astype(int) - values / 257).max() <= 1
    three = pixels(encode(Image.fromarray(values), kind, **options), 3)
    assert np.array_equal(three, np.repeat(found[..., None], 3, axis=2))


def test_integer_and_float_tiff_files():
    ramp = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    expected = (ramp * 255).round()
    for values in (ramp, ramp * 255, ramp * 2000 - 1000, (ramp * 4095).round().astype(np.int32)):
        assert np.abs(pixels(encode(Image.fromarray(values), "TIFF")) - expected).max() <= 1
    big_endian = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 0, 65535))
    assert pixels(encode(big_endian, "TIFF")).tolist() == [[0, 255]]


# ---- orientation


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_exif_orientation_is_applied_once(number, kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    encoded = encode(gradient(), kind, exif=exif, **options)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded["bytes"]))).convert("RGB")
    found = open_image(encoded, 3)
    assert found.size == ((24, 32) if number >= 5 else (32, 24))
    assert np.array_equal(np.asarray(found), np.asarray(reference))
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(found)), np.asarray(found))
    with opened(encoded["bytes"]) as image:
        assert upright_size(image) == found.size
    if kind == "JPEG":
        draft = open_image(encoded, 3, draft=12)
        assert draft.size == ((12, 16) if number >= 5 else (16, 12))
        assert np.abs(np.asarray(found.resize(draft.size)).astype(int) - np.asarray(draft)).mean() < 6


def test_a_corrupted_orientation_is_ignored():
    encoded = encode(gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk")
    assert open_image(encoded, 3).size == (32, 24)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 77
    assert open_image(encode(gradient(), "JPEG", exif=exif), 3).size == (32, 24)


# ---- draft


@pytest.mark.parametrize("draft, size", [(375, (500, 375)), (188, (500, 375)), (187, (250, 188)), (46, (63, 47))])
def test_a_draft_has_at_least_the_requested_size(draft, size):
    encoded = encode(gradient(500, 375), "JPEG", quality=95)
    found = open_image(encoded, 3, draft=draft)
    assert found.size == size
    full = open_image(encoded, 3).resize(size, Image.Resampling.BOX)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(full)).mean() < 3
    assert open_image(encode(gradient(500, 375)), 3, draft=draft).size == (500, 375)  # PNG


# ---- unreadable images


def png_of_size(width, height):
    def chunk(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def tiff_of_channels(channels, bits=8):
    tags = [(256, 4, 2), (257, 4, 2), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, channels)]
    tags += [(278, 4, 2), (279, 4, 4 * channels)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return header.ljust(200, b"\0") + bytes(4 * channels)


JPEG = picture(size=(300, 300), kind="JPEG")["bytes"]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "^empty$"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "^HEIC is not supported; supported are BMP, GIF, JPEG, "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "^EPS is not supported"),
        (b"<svg></svg>", "^SVG is not supported"),
        (b"<!DOCTYPE html>", "^HTML is not supported"),
        (bytes(128) + b"DICM", "^DICOM is not supported"),
        (b"version https://git-lfs.github.com/spec/v1", "^Git LFS pointer is not supported"),
        (b"some text", "^not an image, or in a format that is not supported"),
        (tiff_of_channels(5), "^TIFF with 5 channels of 8 bits is not supported$"),
        (tiff_of_channels(3, bits=32), "^TIFF with 3 channels of 32 bits is not supported$"),
        (tiff_of_channels(3)[:40], "^TIFF with a corrupted header, or in a variant that is not supported$"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (picture(size=(64, 64))["bytes"][:500], "truncated"),
        (b"\xff\xd8\xff" + bytes(9), "^JPEG with a corrupted or truncated header$"),
        (png_of_size(20_000, 20_000), r"^Image size \(400000000 pixels\) exceeds limit"),
    ],
)
@pytest.mark.parametrize("draft", [None, 1])
def test_the_reason_why_an_image_is_unreadable(content, reason, draft):
    with pytest.raises(UnreadableImageError) as error:
        open_image({"bytes": content, "path": "holiday.x"}, 3, draft=draft)
    assert re.search(reason, error.value.reason) and str(error.value) == f"holiday.x: {error.value.reason}"
    assert not error.value.is_temporary


def test_pillows_warnings_are_silent(recwarn, monkeypatch):
    assert open_image({"bytes": png_of_size(9, 9), "path": None}, 1).size == (9, 9)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    assert open_image(picture(size=(30, 30)), 3).size == (30, 30)
    assert not recwarn.list
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(picture(size=(30, 30)), 3).size == (30, 30)


def test_an_image_does_not_start_ghostscript(tmp_path, monkeypatch):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(program))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    with pytest.raises(UnreadableImageError, match="EPS"):
        open_image({"bytes": postscript, "path": "x.png"}, 3)
    assert not (tmp_path / "ran").exists()


# ---- files


def test_files_are_read_only_below_the_folders(tmp_path):
    inside, outside = tmp_path / "images" / "a" / "0.png", tmp_path / "images2" / "0.png"
    for path in (inside, outside):
        path.parent.mkdir(parents=True)
        path.write_bytes(picture()["bytes"])
    folders = (str(tmp_path / "images"),)
    assert open_image({"bytes": None, "path": str(inside)}, 3, folders).size == (8, 8)
    assert image_name({"bytes": None, "path": str(inside)}, folders) == os.path.join("a", "0.png")
    for path in (outside, tmp_path / "images" / ".." / "images2" / "0.png", "/etc/hostname"):
        with pytest.raises(UnreadableImageError, match="outside the image folder, which is not read"):
            open_image({"bytes": None, "path": str(path)}, 3, folders)
    with pytest.raises(UnreadableImageError, match="outside the image folder"):
        open_image({"bytes": None, "path": str(inside)}, 3)
    os.mkfifo(tmp_path / "images" / "pipe.png")
    with pytest.raises(UnreadableImageError, match=r"pipe\.png: not a file"):
        open_image({"bytes": None, "path": str(tmp_path / "images" / "pipe.png")}, 3, folders)
    with pytest.raises(UnreadableImageError, match=r"absent\.png: No such file") as error:
        open_image({"bytes": None, "path": str(tmp_path / "images" / "absent.png")}, 3, folders)
    assert error.value.is_temporary
    for encoded in (None, {"bytes": None, "path": None}, {"bytes": b"", "path": str(inside)}):
        with pytest.raises(UnreadableImageError, match="empty"):
            open_image(encoded, 3, folders)
