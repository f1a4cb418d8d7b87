"""Images from every source that is read, and what is wrong with those that are not."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fmicl_text.errors import InputError
from fmicl_text.vision.data import ImageRows, LabelledImages, collate_images, load_digits, load_images


def picture(mode="RGB", size=(8, 8), seed=0, kind="PNG"):
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": f"{seed}.png"}


def parquet(folder, pictures, labels=None, column="img"):
    labels = [i % 2 for i in range(len(pictures))] if labels is None else labels
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({column: pictures, "label": labels}, features=features)
    path = folder / "images.parquet"
    rows.to_parquet(str(path))
    return str(path)


def test_digits_are_all_there_in_a_fixed_order():
    digits = load_digits()
    assert digits.pixels.shape == (1797, 1, 8, 8) and digits.pixels.dtype == torch.uint8
    assert digits.pixels.max() == 255 and digits.labels.bincount().min() > 170
    assert torch.equal(digits.pixels, load_digits().pixels)
    assert digits.labels[:20].unique().numel() > 5  # not sorted by class


def test_a_parquet_file(tmp_path):
    pictures = [picture(seed=i) for i in range(6)]
    found = load_images(parquet(tmp_path, pictures))
    assert found.pixels.shape == (6, 3, 8, 8) and found.labels.tolist() == [0, 1, 0, 1, 0, 1] and found.skipped == ()
    expected = np.array(Image.open(io.BytesIO(pictures[2]["bytes"])))
    assert torch.equal(found.pixels[2], torch.from_numpy(expected).permute(2, 0, 1))


def test_modes_become_one(tmp_path):
    path = parquet(tmp_path, [picture(mode, seed=3) for mode in ("RGB", "L", "P", "RGBA", "LA", "1")])
    assert load_images(path).pixels.shape == (6, 3, 8, 8)
    grey = load_images(path, channels=1).pixels
    assert grey.shape == (6, 1, 8, 8) and (grey[0].int() - grey[1].int()).abs().max() <= 1


def test_a_folder_of_classes(tmp_path):
    for name in ("ant", "bee"):
        for i in range(3):
            path = tmp_path / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(seed=i)["bytes"])
    found = load_images(str(tmp_path / "images"))
    assert found.labels.bincount().tolist() == [3, 3] and found.pixels.shape == (6, 3, 8, 8)


def test_a_broken_image_is_skipped_counted_and_named(tmp_path):
    pictures = [picture(seed=i) for i in range(5)]
    pictures[1] = {"bytes": b"no image", "path": "broken.png"}
    pictures[3] = {"bytes": pictures[3]["bytes"][:60], "path": "cut.png"}
    found = load_images(parquet(tmp_path, pictures, labels=[0, 1, 2, 3, 4]))
    assert found.skipped == ("broken.png", "cut.png")
    assert found.labels.tolist() == [0, 2, 4] and len(found.pixels) == 3


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lambda d: str(d / "absent.parquet"), {}, r"absent\.parquet: no such folder or \.parquet file"),
        (
            lambda d: parquet(d, [picture()] * 2, column="image"),
            {},
            r"no column 'img' \(--image_column\), its columns",
        ),
        (lambda d: parquet(d, [picture()] * 2), {"label_column": "y"}, r"has no column 'y' \(--label_column\)"),
        (
            lambda d: parquet(d, [picture(), picture(size=(9, 8))]),
            {},
            "of at most 96 pixels, got 8 x 8, 8 x 9",
        ),
        (lambda d: parquet(d, [picture(size=(97, 97))] * 2), {}, "one size of at most 96 pixels, got 97 x 97"),
        (lambda d: parquet(d, [{"bytes": b"x", "path": None}] * 2), {}, "none of 2 images can be read"),
        (lambda d: None, {}, "exactly one of --train_file and --dataset_name is needed, got None and None"),
        (lambda d: None, {"dataset_name": "absent/data"}, r"absent/data \[train\]: "),
    ],
)
def test_what_is_wrong_is_named(tmp_path, make, options, message):
    with pytest.raises(InputError, match=message) as error:
        load_images(make(tmp_path), **options)
    assert "\n" not in str(error.value)


def test_held_out_rows_are_the_last():
    images = LabelledImages(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10) % 2, "ten")
    train, test = images.split(3)
    assert train.pixels.flatten().tolist() == list(range(7)) and test.pixels.flatten().tolist() == [7, 8, 9]
    train, test = images.split(3, most=4)
    assert train.pixels.flatten().tolist() == list(range(4)) and test.pixels.flatten().tolist() == [7, 8, 9]
    assert len(images.split(3, most=99)[0].pixels) == 7
    with pytest.raises(InputError, match="--max_train_samples must be at least 1, got 0"):
        images.split(3, most=0)
    for held_out in (0, 10):
        with pytest.raises(InputError, match=f"--held_out must be from 1 to 9, got {held_out}"):
            images.split(held_out)
    with pytest.raises(InputError, match="one class only in 1 images, nothing to tell apart"):
        images.split(1)


def test_statistics_are_those_of_the_pixels():
    pixels = torch.tensor([[[[0, 255]], [[51, 51]]]], dtype=torch.uint8)
    mean, std = LabelledImages(pixels, torch.zeros(1), "two").mean_and_std()
    assert mean == pytest.approx((0.5, 0.2)) and std == pytest.approx((0.5**0.5, 1e-3))


def test_a_batch_is_stacked_as_it_is():
    images = LabelledImages(torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2), torch.arange(6), "six")
    rows = ImageRows(images)
    assert len(rows) == 6 and torch.equal(collate_images([rows[4], rows[1]])["images"], images.pixels[[4, 1]])
