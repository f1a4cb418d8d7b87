"""Images of any bytes, any grayscale values, any classes."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from fmicl_text.errors import InputError
from fmicl_text.vision.data import Images, ImageSets, in_order, load_images, split_images, stratified
from fmicl_text.vision.decoding import scale_to_8_bits
from tests.properties.files import damaged, load_or_input_error, parquet, write


def picture(kind, mode="RGB", size=(9, 7)):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, kind)
    return buffer.getvalue()


KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS")
PICTURES = [picture(kind) for kind in KINDS] + [picture("PNG", mode) for mode in ("P", "LA", "RGBA", "1", "I;16")]
PICTURES += [picture("TIFF", mode) for mode in ("F", "I", "I;16", "CMYK", "LA")]


@pytest.mark.slow
@settings(max_examples=100)
@given(damaged(PICTURES), st.sampled_from([(8, 8), (128, 128)]), st.sampled_from([1, 3]))
def test_any_bytes_as_an_image(folder, content, size, channels):
    """Next to a valid image: it is skipped with a reason, or can be decoded again."""
    valid = {"bytes": picture("PNG", size=size), "path": None}
    file = write(folder, ".parquet", parquet(img=[valid, {"bytes": content, "path": "b"}], label=[0, 1]))
    images = load_images(file, channels=channels, held_out=0, progress=False).train
    assert len(images) == 2 - len(images.skipped)
    assert all(name.startswith("b: ") and len(name) > 4 and "\n" not in name for name in images.skipped)
    for draft in (None, 4):
        for image in images.pictures(range(len(images)), draft):
            assert image.mode == ("L" if channels == 1 else "RGB")
    assert torch.stack([images.for_views([i], 8, (0.2, 1.0), (0,))[0] for i in range(len(images))]).dtype == torch.uint8
    assert np.isfinite(images.mean_and_std()).all()


IMAGE_FILE = parquet(img=[{"bytes": picture("PNG"), "path": None}] * 2, label=[0, 1])


@given(damaged([IMAGE_FILE]))
def test_any_bytes_as_a_file_of_images(folder, content):
    load_or_input_error(lambda: load_images(write(folder, ".parquet", content), progress=False))


@given(arrays.arrays(st.sampled_from([np.uint16, np.int32, np.float32]), arrays.array_shapes(max_dims=2, max_side=5)))
def test_any_grayscale_values(values):
    """The order of values is kept, and a picture that is not black has white or is not scaled up to it."""
    scaled = scale_to_8_bits(values)
    assert scaled.shape == values.shape and scaled.dtype == np.uint8
    finite = np.isfinite(values)
    assert not scaled[~finite].any()
    order = np.argsort(values[finite], kind="stable")
    assert (np.diff(scaled[finite][order].astype(int)) >= 0).all()


LABELS = st.lists(st.integers(-1, 4), min_size=1, max_size=40)


@given(LABELS, st.data())
def test_any_classes_are_split(labels, data):
    """The parts have no image in common, each class is trained on, and the order of the source does not matter."""
    hashes = data.draw(st.lists(st.integers(0, 50), min_size=len(labels), max_size=len(labels)))
    content = [one % 5 - 1 for one in hashes] if data.draw(st.booleans()) else labels  # copies with one class
    images = Images(torch.tensor(content), tuple("abcde"), 1, "any", np.array(hashes, np.uint64))
    counts = data.draw(st.tuples(st.none() | st.integers(0, 10), st.integers(0, 5)))
    try:
        parts = split_images(ImageSets(in_order(images)), *counts)
    except InputError as error:
        assert "must be at most" in str(error)
        return
    found = [part for part in (parts.train, parts.test, parts.validation) if part is not None]
    assert len(parts.train) >= 1 and sum(map(len, found)) <= len(images)
    assert counts[0] is None or len(parts.test or ()) == counts[0]
    assert len(parts.validation or ()) == counts[1]
    for part in found[1:]:
        assert set(part.labels.tolist()) <= set(parts.train.labels.tolist())
    order = data.draw(st.permutations(range(len(labels))))
    again = split_images(ImageSets(in_order(images.take(order))), *counts)
    for name in ("train", "test", "validation"):
        part, other = getattr(parts, name), getattr(again, name)
        assert (part is None) == (other is None)
        assert part is None or (part.fingerprint() == other.fingerprint() and torch.equal(part.labels, other.labels))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_any_shares_of_classes(sizes, data):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    count = data.draw(st.integers(0, len(labels) - len(sizes)))
    taken = np.bincount(labels[stratified(labels, count)], minlength=len(sizes))
    assert taken.sum() == count and (taken < sizes).all()
    if min(sizes) > 1 and count <= len(labels) // 2:
        assert (np.abs(taken - count * np.array(sizes) / len(labels)) <= 1).all()
