"""Whatever bytes an image holds, it is skipped or read, now and again in training."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmicl_text.vision.data import load_images
from tests.properties.files import damaged, loads_or_says_why, parquet, write

# Pillow's, of images that are damaged and can be read
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def picture(kind, mode="RGB", size=(9, 7)):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, kind)
    return buffer.getvalue()


KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS")
PICTURES = [picture(kind) for kind in KINDS] + [picture("PNG", mode) for mode in ("P", "LA", "RGBA", "1", "I;16")]


@settings(max_examples=100)
@given(damaged(PICTURES), st.sampled_from([(8, 8), (128, 128)]), st.sampled_from([1, 3]))
def test_any_bytes_as_an_image(folder, content, size, channels):
    """Beside a whole one: it is skipped, or can be read again."""
    whole = {"bytes": picture("PNG", size=size), "path": None}
    file = write(folder, ".parquet", parquet(img=[whole, {"bytes": content, "path": "b"}], label=[0, 1]))
    images = load_images(file, channels=channels)
    assert images.skipped in ((), ("b",)) and len(images.labels) == 2 - len(images.skipped)
    images.plain(range(len(images.labels)), 8)


IMAGE_FILE = parquet(img=[{"bytes": picture("PNG"), "path": None}] * 2, label=[0, 1])


@given(damaged([IMAGE_FILE]))
def test_any_bytes_as_a_file_of_images(folder, content):
    loads_or_says_why(lambda: load_images(write(folder, ".parquet", content)))
