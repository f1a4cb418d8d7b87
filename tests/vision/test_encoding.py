"""Features of images: blocks, shapes, threads ahead of the encoder."""

import threading
import time

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fmicl_text.vision.encoding import PART, encode_blocks, encode_images, encode_views, read_ahead
from fmicl_text.vision.preprocessing import new_preprocessing
from fmicl_text.vision.views import ImageViews
from tests.support import LabeledPictures

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


class Means(torch.nn.Module):
    """Features that differ between training and evaluation mode: the mean of each channel."""

    def forward(self, pixel_values):
        return pixel_values.mean((2, 3)) + 100 * self.training


def preprocessing():
    return new_preprocessing(8, MEAN, STD)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7, 16, 50, 512])
def test_features_are_those_of_each_picture_in_batches_of_any_size(batch_size):
    images, encoder = LabeledPictures(50), Means().train()
    features = encode_images(encoder, images, preprocessing(), batch_size, progress=False)
    assert_close(
        features, torch.cat([preprocessing()([picture]).mean((2, 3)) for picture in images.pictures(range(50))])
    )
    assert encoder.training and features.dtype == torch.float32


def test_some_rows_in_their_order_with_a_reduced_decode():
    images = LabeledPictures(50)
    rows = torch.tensor([40, 3, 17, 3])
    blocks = list(encode_blocks(Means(), images, rows, preprocessing(), 3, progress=False, draft=8))
    assert [batch.tolist() for batch, _ in blocks] == [[40, 3, 17], [3]] and images.drafts == {8}
    everything = encode_images(Means(), images, preprocessing(), progress=False)
    assert_close(torch.cat([features for _, features in blocks]), everything[rows])
    assert list(encode_blocks(Means(), images, rows[:0], preprocessing(), progress=False)) == []


def test_pictures_of_different_shapes():
    """As from a processor that keeps the shape of pictures."""
    images = LabeledPictures(40, sizes=[(8, 8), (8, 12), (16, 8)])

    def as_they_are(pictures):
        pixels = [torch.from_numpy(np.array(picture)).movedim(-1, 0).float() for picture in pictures]
        return torch.stack(pixels) if len({image.shape for image in pixels}) == 1 else pixels

    expected = torch.stack([as_they_are([picture])[0].mean((1, 2)) for picture in images.pictures(range(40))])
    assert_close(encode_images(Means(), images, as_they_are, batch_size=30, progress=False), expected)


def test_the_mode_is_restored_after_an_error():
    class Broken(torch.nn.Module):
        def forward(self, pixel_values):
            raise RuntimeError("out of memory")

    encoder, before = Broken().train(), threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_images(encoder, LabeledPictures(50), preprocessing(), 20, progress=False)
    assert encoder.training and threading.active_count() == before


def test_the_next_batch_is_prepared_while_the_encoder_runs_and_no_other():
    started = []

    def prepare(part):
        started.append(int(part[0]))
        return part

    batches = read_ahead(prepare, list(torch.arange(10 * PART).split(2 * PART)), progress=False)
    first = next(batches)
    assert [part.tolist() for part in first] == [list(range(PART)), list(range(PART, 2 * PART))]
    deadline = time.monotonic() + 5
    while len(started) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(started) == [0, PART, 2 * PART, 3 * PART]
    assert len(list(batches)) == 4 and len(started) == 10


def test_views_do_not_depend_on_what_else_is_encoded():
    """Blocks of 64 rows have their own seed, so that processes can share them."""
    images, views = LabeledPictures(150), ImageViews("cifar", 8, MEAN, STD)
    rows = torch.arange(150)
    batches = list(encode_views(Means(), images, rows, views, progress=False))
    everything = torch.cat([pairs for _, pairs in batches])
    assert [len(batch) for batch, _ in batches] == [64, 64, 22] and everything.shape == (150, 2, 3)
    assert not torch.allclose(everything[:, 0], everything[:, 1])
    second, last = encode_views(Means(), images, rows[64:], views, progress=False)
    assert_close(torch.cat([second[1], last[1]]), everything[64:])
