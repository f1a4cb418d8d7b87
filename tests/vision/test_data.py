"""Images from every source, and the errors for invalid ones."""

import gc
import io
import json
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from fmicl_text.errors import InputError
from fmicl_text.vision.augmentations import Draw, random_resized_crop
from fmicl_text.vision.data import (
    ImageFiles,
    LabeledImages,
    TrainingRows,
    collate_images,
    load_digits,
    load_images,
    split,
    two_crops,
)
from tests.support import image_parquet, picture


def test_digits_are_complete_and_in_a_fixed_order():
    digits = load_digits()
    assert digits.pixels.shape == (1797, 1, 8, 8) and digits.pixels.dtype == torch.uint8
    assert digits.pixels.max() == 255 and digits.labels.bincount().min() > 170
    assert torch.equal(digits.pixels, load_digits().pixels)
    assert digits.labels[:20].unique().numel() > 5  # not sorted by class


def test_a_parquet_file(tmp_path):
    pictures = [picture(seed=i) for i in range(6)]
    found = load_images(image_parquet(tmp_path, pictures))
    assert found.pixels.shape == (6, 3, 8, 8) and found.labels.tolist() == [0, 1, 0, 1, 0, 1] and found.skipped == ()
    expected = np.array(Image.open(io.BytesIO(pictures[2]["bytes"])))
    assert torch.equal(found.pixels[2], torch.from_numpy(expected).permute(2, 0, 1))


def test_modes_become_one(tmp_path):
    path = image_parquet(tmp_path, [picture(mode, seed=3) for mode in ("RGB", "L", "P", "RGBA", "LA", "1")])
    assert load_images(path).pixels.shape == (6, 3, 8, 8)
    gray = load_images(path, channels=1).pixels
    assert gray.shape == (6, 1, 8, 8) and (gray[0].int() - gray[1].int()).abs().max() <= 1


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
    found = load_images(image_parquet(tmp_path, pictures, labels=[0, 1, 2, 3, 4]))
    assert found.skipped == ("broken.png", "cut.png")
    assert found.labels.tolist() == [0, 2, 4] and len(found.pixels) == 3


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lambda d: str(d / "absent.parquet"), {}, r"absent\.parquet: no such folder or \.parquet file"),
        (
            lambda d: image_parquet(d, [picture()] * 2, column="image"),
            {},
            r"no column 'img' \(image_column\); its columns",
        ),
        (lambda d: image_parquet(d, [picture()] * 2), {"label_column": "y"}, r"has no column 'y' \(label_column\)"),
        (lambda d: image_parquet(d, [{"bytes": b"x", "path": None}] * 2), {}, "none of 2 images can be read"),
        (lambda d: None, {}, "got train_file=None and dataset_name=None"),
        (lambda d: None, {"dataset_name": "absent/data"}, r"absent/data \[train\]: "),
    ],
)
def test_invalid_images(tmp_path, make, options, message):
    with pytest.raises(InputError, match=message) as error:
        load_images(make(tmp_path), **options)
    assert "\n" not in str(error.value)


def test_test_rows_are_the_last_and_validation_rows_come_before():
    images = LabeledImages(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10) % 2, "ten")

    def numbers(*arguments):
        return [part and part.pixels.flatten().tolist() for part in split(images, *arguments)]

    assert numbers(3) == [list(range(7)), [7, 8, 9], None]
    assert numbers(3, 4) == [list(range(4)), [7, 8, 9], None]
    assert numbers(3, 99, 2) == [list(range(5)), [7, 8, 9], [5, 6]]
    with pytest.raises(InputError, match="max_train_samples must be at least 1, got 0"):
        split(images, 3, max_train_samples=0)
    for held_out in (0, 10):
        with pytest.raises(InputError, match=f"^held_out must be from 1 to 9 for ten, got {held_out}"):
            split(images, held_out)
    for validation in (-1, 7):
        with pytest.raises(InputError, match=f"^validation must be below 7 for ten, got {validation}"):
            split(images, 3, validation=validation)
    for arguments in ((1,), (3, None, 1)):
        with pytest.raises(InputError, match="only one class among 1 images; at least 2 are needed"):
            split(images, *arguments)


def test_statistics_are_those_of_the_pixels():
    pixels = torch.tensor([[[[0, 255]], [[51, 51]]]], dtype=torch.uint8)
    mean, std = LabeledImages(pixels, torch.zeros(1), "two").mean_and_std()
    assert mean == pytest.approx((0.5, 0.2)) and std == pytest.approx((0.5**0.5, 1e-3))


def test_a_batch_is_stacked_as_it_is():
    images = LabeledImages(torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2), torch.arange(6), "six")
    rows = TrainingRows(images, 2, (0.2, 1.0), seed=0)
    assert len(rows) == 6 and torch.equal(collate_images([rows[4], rows[1]])["images"], images.pixels[[4, 1]])


SIZES = [(40, 30), (97, 97), (30, 60), (200, 150), (8, 8), (120, 40)]


@pytest.fixture
def files(tmp_path):
    """Images of many sizes and modes, one of them truncated."""
    modes = ["RGB", "L", "P", "RGBA", "RGB", "RGB"]
    pictures = [picture(mode, size, seed=i) for i, (mode, size) in enumerate(zip(modes, SIZES, strict=True))]
    cut = picture(size=(300, 300), seed=9, kind="JPEG")
    pictures.insert(3, {"bytes": cut["bytes"][: len(cut["bytes"]) // 2], "path": "cut.jpg"})
    return load_images(image_parquet(tmp_path, pictures, labels=[5, 5, 7, 7, 7, 5, 7]))


def test_images_of_many_sizes_stay_files(files):
    assert isinstance(files, ImageFiles) and files.skipped == ("cut.jpg",)
    assert files.labels.tolist() == [0, 0, 1, 1, 0, 1]
    plain = files.plain([3, 0], 20)
    assert plain.shape == (2, 3, 20, 20) and plain.dtype == torch.uint8
    image = Image.open(io.BytesIO(picture(size=(40, 30))["bytes"]))
    expected = np.array(image.crop((5, 0, 35, 30)).resize((20, 20), Image.Resampling.BILINEAR))
    assert torch.equal(plain[1], torch.from_numpy(expected).permute(2, 0, 1))
    mean, std = files.mean_and_std()
    assert len(mean) == 3 and all(0.3 < m < 0.9 for m in mean) and all(s > 0 for s in std)
    train, test, _ = split(files, 2)
    assert torch.equal(test.plain([1], 8), files.plain([5], 8)) and len(train.labels) == 4


def test_crops_of_files_are_a_function_of_seed_epoch_and_row(files):
    rows = TrainingRows(files, 16, (0.2, 1.0), seed=3)
    first = rows[2]
    assert first.shape == (2, 3, 16, 16) and not torch.equal(first[0], first[1])
    assert torch.equal(first, rows[2]) and torch.equal(files.for_views([2, 1], 16, (0.2, 1.0), (3, 0))[0], first)
    rows.set_epoch(1)
    assert not torch.equal(first, rows[2])
    assert not torch.equal(first, TrainingRows(files, 16, (0.2, 1.0), seed=4)[2])
    whole = files.for_views([2], 16, None, (3, 0))[0]
    assert torch.equal(whole[0], whole[1])


def test_a_crop_of_a_file_is_that_of_the_batched_views():
    """The same boxes, cropped and resized by PIL and by `random_resized_crop`, in an image of slowly changing colors,
    because PIL rounds between its two passes."""
    rows, columns = torch.meshgrid(torch.linspace(0, 255, 60), torch.linspace(0, 255, 80), indexing="ij")
    pixels = torch.stack([rows, columns, (rows + columns) / 2]).round().to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    ours = two_crops(image, 24, (0.2, 1.0), (1, 2))
    seed = int(np.random.SeedSequence((1, 2)).generate_state(1, np.uint64)[0])
    draw = Draw(torch.empty(2), torch.Generator().manual_seed(seed))
    batched = random_resized_crop((pixels / 255).expand(2, -1, -1, -1), draw, 24, (0.2, 1.0), flip=0.0)
    assert (ours / 255 - batched).abs().max() < 1.5 / 255


def test_a_large_image_alone_makes_files(tmp_path):
    found = load_images(image_parquet(tmp_path, [picture(size=(97, 97), seed=i) for i in range(2)]))
    assert isinstance(found, ImageFiles)
    assert isinstance(load_images(image_parquet(tmp_path, [picture(size=(96, 96))] * 2)), LabeledImages)


def folder_of_classes(folder):
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(picture()["bytes"])
    return folder


@pytest.mark.parametrize("size", [(8, 8), (99, 99)], ids=["in memory", "in files"])
def test_paths_in_tables_are_not_opened(tmp_path, size):
    secret = str(folder_of_classes(tmp_path / "others") / "a" / "0.png")
    (tmp_path / "data").mkdir()
    rows = [picture(size=size), picture(size=size), {"bytes": None, "path": secret}, picture(size=size)]
    for source in ({"train_file": image_parquet(tmp_path / "data", rows)}, {"dataset_name": str(tmp_path / "data")}):
        found = load_images(**source)
        assert found.skipped == (secret,) and len(found.labels) == 3


def test_an_image_folder_cannot_reference_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache")
    )  # it does not distinguish folders named `data`
    others, folder = folder_of_classes(tmp_path / "others"), folder_of_classes(tmp_path / "data")
    assert len(load_images(str(folder)).labels) == 2
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: ['../others/**']\n---\n")
    with pytest.raises(InputError, match=r"references .*0.png, which is outside the folder and is not read"):
        load_images(dataset_name=str(folder), image_column="image")
    for name in ("../others/a/0.png", f"{others}/a/0.png", "a/../../others/a/0.png", f"file://{others}/a/0.png"):
        rows = [{"file_name": "a/0.png", "label": 0}, {"file_name": name, "label": 1}]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(InputError, match="Invalid metadata file_name"):
            load_images(str(folder))


def test_an_image_does_not_start_ghostscript(tmp_path, monkeypatch):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(program))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    found = load_images(image_parquet(tmp_path, [picture(), picture(), {"bytes": postscript, "path": "x.png"}]))
    assert found.skipped == ("x.png",) and not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by datasets
def test_labels_in_metadata_are_read_again_when_they_change(tmp_path):
    """With the same modification time, as after `cp -p`."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(seed=i)["bytes"])
    found = []
    for labels in ("0011", "0101"):
        rows = [f"{i}.png,{label}" for i, label in enumerate(labels)]
        path = tmp_path / "metadata.csv"
        path.write_text("\n".join(["file_name,label", *rows]))
        os.utime(path, (0, 0))
        found.append(load_images(str(tmp_path)).labels.tolist())
    assert found == [[0, 0, 1, 1], [0, 1, 0, 1]]
    gc.collect()  # closes the file here, where the warning is ignored
