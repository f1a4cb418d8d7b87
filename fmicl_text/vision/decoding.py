"""One encoded image to an upright picture with 8 bits per channel."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from fmicl_text.errors import InputError

# Not EPS, for which Pillow would run Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Other content, by its first bytes from an offset.
OTHERS = {
    "HEIC": (4, b"ftyphe"),
    "HEIF": (4, b"ftypm"),
    "AVIF": (4, b"ftypav"),
    "EPS": (0, b"%!PS"),
    "PDF": (0, b"%PDF"),
    "PSD": (0, b"8BPS"),
    "SVG": (0, b"<svg"),
    "XML": (0, b"<?xml"),
    "HTML": (0, b"<!"),
    "NumPy": (0, b"\x93NUMPY"),
    "DICOM": (128, b"DICM"),
    "JPEG XL": (0, b"\xff\x0a"),
    "Git LFS pointer": (0, b"version https://git-lfs"),
}
BITS = (8, 10, 12, 14, 16)  # usual depths of grayscale pictures
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


class UnreadableImageError(InputError):
    """An image that cannot be decoded.

    Args:
        name: The name of its file.
        reason: Why, in one line.
        is_temporary: The image may be readable later: its file could not be read, or there was too little memory.
    """

    def __init__(self, name: str, reason: str = "", is_temporary: bool = False) -> None:
        super().__init__(f"{name}: {reason}" if reason else name)  # torch passes only a message
        self.reason, self.is_temporary = reason, is_temporary


def open_image(
    encoded: Mapping[str, Any], channels: int, folders: Sequence[str] = (), draft: int | None = None
) -> Image.Image:
    """Decode an image, as `datasets` and transformers' image processors do, to an upright picture of mode RGB or L.

    The EXIF orientation is applied, transparent pixels are blended with white, and of an animation the first frame is
    used. Grayscale pictures of more than 8 bits are scaled, each by its own largest value: integers in [0, 2^b), with
    the smallest b of 8, 10, 12, 14 and 16, are multiplied by 255/(2^b - 1); floats in [0, 1] by 255; floats in
    [0, 255] are rounded. Any other values are mapped linearly, the smallest to 0 and the largest to 255. NaN and
    infinity become 0.

    Args:
        encoded: Its `bytes`, or its `path` below one of the folders.
        channels: 1 for grayscale (mode L), 3 for RGB.
        folders: Folders from which files may be read.
        draft: A JPEG image may be decoded at 1/2, 1/4 or 1/8 of its size, in less time, if both sides of the picture
            then have at least this number of pixels.

    Raises:
        UnreadableImageError: It cannot be decoded.
    """
    with opened(read_encoded(encoded, folders), image_name(encoded, folders)) as image:
        return to_picture(image, channels, draft)


def image_name(encoded: Mapping[str, Any] | None, folders: Sequence[str] = (), default: str = "image") -> str:
    """The path of an image, relative to the folder that contains it; `default` for an image without a path."""
    path = str((encoded or {}).get("path") or default)
    folder = next((folder for folder in folders if is_below(path, folder)), None)
    return path if folder is None else os.path.relpath(path, folder)


def is_below(path: str, folder: str) -> bool:
    """Whether a path is in a folder."""
    return os.path.normpath(path).startswith(os.path.join(folder, ""))


def read_encoded(encoded: Mapping[str, Any] | None, folders: Sequence[str] = ()) -> bytes:
    """The bytes of an encoded image.

    Raises:
        UnreadableImageError: There are none, the file is in none of the folders, or reading it failed.
    """
    content, path = (encoded or {}).get("bytes"), (encoded or {}).get("path")
    name = image_name(encoded, folders)
    if content:
        return bytes(content)
    if not path or content is not None:
        raise UnreadableImageError(name, "empty")
    path = os.path.normpath(path)
    if not any(is_below(path, folder) for folder in folders):
        raise UnreadableImageError(name, "a file outside the image folder, which is not read")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableImageError(name, "not a file")
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise UnreadableImageError(name, getattr(error, "strerror", None) or str(error), True) from error


@contextmanager
def opened(content: bytes, name: str = "image") -> Iterator[Image.Image]:
    """Within this context, an image of which only the header has been decoded. Errors are raised as
    `UnreadableImageError`; for corrupted files, Pillow raises almost any type."""
    silence_pillow()
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            yield image
    except (InputError, Warning):
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImageError(name, why_unidentified(content)) from error
    except MemoryError as error:
        raise UnreadableImageError(name, "too little memory", True) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        is_clear = reason and isinstance(error, OSError | ValueError | SyntaxError | Image.DecompressionBombError)
        raise UnreadableImageError(name, reason if is_clear else f"corrupted ({type(error).__name__})") from error


def silence_pillow() -> None:
    """Ignore warnings of Pillow (corrupted metadata, large images), also in other threads: an image can be decoded, or
    is skipped with a reason."""
    action, _, _, module, _ = warnings.filters[0] if warnings.filters else ("", None, None, None, 0)
    if action != "ignore" or getattr(module, "pattern", None) != "PIL":
        warnings.filterwarnings("ignore", module="PIL")  # becomes the first filter


def why_unidentified(content: bytes) -> str:
    """The reason why Pillow cannot identify an image."""
    if not content:
        return "empty"
    supported = f"not supported; supported are {', '.join(FORMATS)}"
    if content[:4] in (b"II*\0", b"MM\0*"):
        channels, bits = tiff_layout(content)
        if bits in (8, 16, 32, 64) and (channels > 4 or (channels > 1 and bits > 16)):
            return f"TIFF with {channels} channels of {bits} bits is not supported"
        return "TIFF with a corrupted header, or in a variant that is not supported"
    for kind in FORMATS:
        accept = Image.OPEN[kind][1]
        if accept is not None and accept(content[:16]) is True:
            return f"{kind} with a corrupted or truncated header"
    for kind, (start, sign) in OTHERS.items():
        if content[start:].startswith(sign):
            return f"{kind} is {supported}"
    return f"not an image, or in a format that is {supported}"


def tiff_layout(content: bytes) -> tuple[int, int]:
    """Number of channels of a TIFF image, and bits per channel; 0 and 0 if its header is corrupted."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(content[:8])
        file = io.BytesIO(content)
        file.seek(tags.next)
        tags.load(file)
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        return int(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)), int(bits[0])
    except Exception:  # as in `opened`
        return 0, 0


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 if unknown. Pillow itself applies that of TIFF images."""
    if image.format == "TIFF":
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # corrupted metadata, of almost any type
        return 1
    return found if found in TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image after applying its EXIF orientation."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def to_picture(image: Image.Image, channels: int, draft: int | None = None) -> Image.Image:
    """Decode an opened image; see `open_image`."""
    if draft is not None:
        image.draft(None, (draft, draft))
    turn = TURNS.get(orientation(image))
    image.load()
    picture = to_8_bits(image)
    if channels == 3 or picture.mode not in ("L", "1"):
        picture = picture.convert("RGB")
    picture = picture.convert("RGB" if channels == 3 else "L")
    if turn is not None:
        picture = picture.transpose(turn)
    picture.info = {}  # with the orientation, it would be turned again
    return picture


def to_8_bits(image: Image.Image) -> Image.Image:
    """An image without transparency, with 8 bits per channel."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(scale_to_8_bits(np.asarray(image)))
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or image.info.get("transparency") is not None:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def scale_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grayscale values of any range to uint8; see `open_image`."""
    is_finite = np.isfinite(values)
    known = values[is_finite].astype(np.float64)
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    is_integer = np.issubdtype(values.dtype, np.integer)
    if is_integer and low >= 0 and high < 2 ** BITS[-1]:
        offset, span = 0.0, 2.0 ** next(bits for bits in BITS if high < 2**bits) - 1
    elif not is_integer and low >= 0 and high <= 255:
        offset, span = 0.0, 1.0 if high <= 1 else 255.0
    else:
        offset, span = low, high - low
    scaled = np.zeros(values.shape)
    scaled[is_finite] = (known - offset) * 255 / (span or 1.0)
    return scaled.round().astype(np.uint8)
