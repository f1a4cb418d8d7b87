"""An image of any bytes is either skipped, or read in the first pass and in training."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmicl_text.vision.data import load_images
from tests.properties.files import damaged, load_or_input_error, parquet, write

# warnings of Pillow for corrupted images that can be read
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
    """After a valid image: it is skipped, or can be read again."""
    valid = {"bytes": picture("PNG", size=size), "path": None}
    file = write(folder, ".parquet", parquet(img=[valid, {"bytes": content, "path": "b"}], label=[0, 1]))
    images = load_images(file, channels=channels)
    assert images.skipped in ((), ("b",)) and len(images.labels) == 2 - len(images.skipped)
    images.plain(range(len(images.labels)), 8)


IMAGE_FILE = parquet(img=[{"bytes": picture("PNG"), "path": None}] * 2, label=[0, 1])


@given(damaged([IMAGE_FILE]))
def test_any_bytes_as_a_file_of_images(folder, content):
    load_or_input_error(lambda: load_images(write(folder, ".parquet", content)))
