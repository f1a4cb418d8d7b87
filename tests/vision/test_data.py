"""Images from every source, their split, statistics and crops."""

import io
import os
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from fmicl_text.errors import InputError
from fmicl_text.vision import data as module
from fmicl_text.vision.augmentations import Draw, random_resized_crop
from fmicl_text.vision.data import (
    Images,
    ImageSets,
    TrainingRows,
    collate_images,
    draw_boxes,
    hold_out,
    in_order,
    load_digits,
    load_images,
    mean_and_std,
    split_images,
    stratified,
    two_crops,
)
from tests.support import image_parquet, one_fast, picture


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def in_pixels(labels, classes=("a", "b"), hashes=None, source="ten"):
    """Images of 1 x 1 pixel in memory; pixel i is i."""
    labels = torch.as_tensor(labels)
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    hashes = np.arange(len(labels), dtype=np.uint64) if hashes is None else np.asarray(hashes, np.uint64)
    return Images(labels, classes, 1, source, hashes, pixels=pixels)


def numbers(images):
    return images and images.pixels.flatten().tolist()


# ---- the same images from every source

SIZE = {"in memory": (8, 8), "in files": (120, 100)}


def write_folder(folder, pictures, names, one_file_each=True):
    for i, (image, name) in enumerate(zip(pictures, names, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{i:03}.png").write_bytes(image["bytes"])
    return str(folder)


def write_tables(folder, pictures, labels, shards=1, column="img", names=None):
    folder.mkdir(parents=True)
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    label = datasets.Value("string") if isinstance(labels[0], str) else label
    features = datasets.Features({column: datasets.Image(), "label": label})
    rows = datasets.Dataset.from_dict({column: pictures, "label": labels}, features=features)
    for i in range(shards):
        name = f"train-{i:05}-of-{shards:05}.parquet" if shards > 1 or names else "train.parquet"
        rows.shard(shards, i, contiguous=True).to_parquet(str(folder / name))
    return str(folder)


@pytest.mark.parametrize("where", SIZE)
def test_every_source_of_the_same_images_gives_the_same_rows(tmp_path, where):
    pictures = [picture(size=SIZE[where], seed=i) for i in range(40)]
    labels = [i % 3 for i in range(40)]
    names = ["ant", "bee", "cat"]
    words = [names[label] for label in labels]
    order = sorted(range(40), key=lambda i: (labels[i], -i))  # sorted by class
    sort = lambda values: [values[i] for i in order]  # noqa: E731
    unnamed = [image | {"path": None} for image in pictures]
    by_class = {"pictures": sort(unnamed), "labels": sort(labels), "column": "image"}
    hub = write_tables(tmp_path / "hub" / "data", pictures, labels, 2, names=names)
    sources = [
        {"train_file": write_folder(tmp_path / "folder", pictures, words)},
        {"train_file": write_tables(tmp_path / "table", pictures, labels) + "/train.parquet"},
        {"train_file": write_tables(tmp_path / "sorted", **by_class) + "/train.parquet"},
        {"train_file": write_tables(tmp_path / "words", sort(pictures), sort(words)) + "/train.parquet"},
        {"train_file": write_tables(tmp_path / "shards", pictures[::-1], labels[::-1], 3)},
        {"dataset_name": os.path.dirname(hub)},
    ]
    found = [load_images(**source, held_out=9, validation=4, max_train_samples=20) for source in sources]
    expected = found[0]
    assert [len(part) for part in (expected.train, expected.test, expected.validation)] == [20, 9, 4]
    assert expected.test.labels.bincount().tolist() == [3, 3, 3]
    assert (expected.train.pixels is None) == (where == "in files")
    for sets in found:
        for name in ("train", "test", "validation"):
            part, reference = getattr(sets, name), getattr(expected, name)
            assert torch.equal(part.labels, reference.labels) and np.array_equal(part.hashes, reference.hashes)
            assert part.fingerprint() == reference.fingerprint()
            shown = [[one.tobytes() for one in images.pictures(range(4))] for images in (part, reference)]
            assert shown[0] == shown[1]
            crops = [images.for_views([2, 0], 8, (0.2, 1.0), (1,)) for images in (part, reference)]
            assert torch.equal(*crops)
        assert sets.train.mean_and_std() == expected.train.mean_and_std()


# ---- sources


def test_a_parquet_file(tmp_path):
    pictures = [picture(seed=i) for i in range(6)]
    found = load_images(image_parquet(tmp_path, pictures, labels=[5, 7, 5, 7, 5, 7]), held_out=0)
    assert found.test is None and found.validation is None
    train = found.train
    assert train.pixels.shape == (6, 3, 8, 8) and train.pixels.dtype == torch.uint8 and train.skipped == ()
    assert train.classes == ("5", "7") and sorted(train.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    originals = [np.array(Image.open(io.BytesIO(one["bytes"]))) for one in pictures]
    for pixels, label, image in zip(train.pixels, train.labels, train.pictures(range(6)), strict=True):
        (i,) = [i for i in range(6) if np.array_equal(originals[i], pixels.permute(1, 2, 0))]
        assert label == i % 2 and np.array_equal(np.asarray(image), originals[i])


def test_modes_become_one(tmp_path):
    path = image_parquet(tmp_path, [picture(mode, seed=3) for mode in ("RGB", "L", "P", "RGBA", "LA", "1")])
    assert load_images(path, held_out=0).train.pixels.shape == (6, 3, 8, 8)
    gray = load_images(path, channels=1, held_out=0).train
    assert gray.pixels.shape == (6, 1, 8, 8) and gray.pictures([0])[0].mode == "L"
    assert len({tuple(pixels.flatten().tolist()) for pixels in gray.pixels}) < 6


@pytest.mark.parametrize("channels", [0, 2, 4, 5])
def test_other_channel_counts_are_refused_at_once(channels):
    message = f"the model takes images of {channels} channels; supported are 1 .grayscale. and 3 .RGB."
    for load in (lambda: load_images("absent", channels=channels), lambda: load_digits(channels)):
        with pytest.raises(InputError, match=message):
            load()


def test_broken_images_are_skipped_with_reasons(tmp_path):
    pictures = [picture(seed=i) for i in range(5)]
    pictures[1] = {"bytes": b"no image", "path": "broken.png"}
    pictures[3] = {"bytes": pictures[3]["bytes"][:60], "path": None}
    found = load_images(image_parquet(tmp_path, pictures, labels=[0, 1, 0, 1, 1]), held_out=0).train
    assert len(found) == 3 and sorted(found.labels.tolist()) == [0, 0, 1]
    broken, cut = found.skipped
    assert broken.startswith("broken.png: not an image, or in a format") and cut.startswith("row 4: ")
    for content, reason in ((b"", "empty"), (b"\0\0\0\x18ftypheic" + bytes(9), "HEIC is not supported")):
        (tmp_path / "only").mkdir(exist_ok=True)
        path = image_parquet(tmp_path / "only", [{"bytes": content, "path": "holiday.heic"}] * 2)
        with pytest.raises(InputError, match=f"none of 2 images can be read; holiday.heic: {reason}") as error:
            load_images(path)
        assert "\n" not in str(error.value)


def test_a_large_image_alone_makes_files(tmp_path, monkeypatch):
    def load(size):
        return load_images(image_parquet(tmp_path, [picture(size=size, seed=i) for i in range(4)]), held_out=0).train

    assert load((97, 9)).pixels is None and load((96, 96)).pixels.shape == (4, 3, 96, 96)
    monkeypatch.setattr(module, "MOST_BYTES", 4 * 3 * 8 * 8 - 1)
    assert load((8, 8)).pixels is None and load((8, 7)).pixels.shape == (4, 3, 7, 8)


@pytest.mark.parametrize("size", [(8, 8), (99, 99)], ids=["in memory", "in files"])
def test_paths_in_tables_are_not_opened(tmp_path, size):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture()["bytes"])
    (tmp_path / "data").mkdir()
    rows = [picture(size=size), picture(size=size), {"bytes": None, "path": str(secret)}, picture(size=size)]
    for source in ({"train_file": image_parquet(tmp_path / "data", rows)}, {"dataset_name": str(tmp_path / "data")}):
        found = load_images(**source, held_out=0).train
        assert found.skipped == (f"{secret}: a file outside the image folder, which is not read",) and len(found) == 3


# ---- the split


def test_digits():
    digits = load_digits()
    assert digits.train.pixels.shape == (1437, 3, 8, 8) and len(digits.test) == 360 and digits.validation is None
    assert digits.test.labels.bincount().min() >= 35 and digits.train.classes == tuple("0123456789")
    assert digits.train.pixels.max() == 255 and (digits.train.pixels == digits.train.pixels[:, :1]).all()
    gray = load_digits(channels=1, validation=100, max_train_samples=50)
    assert gray.train.pixels.shape == (50, 1, 8, 8) and len(gray.validation) == 100
    assert torch.equal(gray.test.pixels, digits.test.pixels[:, :1])
    assert np.array_equal(gray.test.hashes, digits.test.hashes)
    assert gray.train.labels[:20].unique().numel() > 5
    assert len(set(gray.train.hashes) & set(gray.validation.hashes)) == 0


@pytest.mark.parametrize(
    "sizes, count, expected",
    [
        ([10, 10], 4, [2, 2]),
        ([10, 10], 5, [3, 2]),
        ([90, 9, 1], 10, [9, 1, 0]),
        ([2, 2, 2], 3, [1, 1, 1]),
        ([1, 1, 8], 4, [0, 0, 4]),  # a class with one image is trained on
        ([5, 1], 4, [4, 0]),
        ([97, 3], 50, [49, 1]),  # 48.5 and 1.5
        ([60, 30, 10], 97, [59, 29, 9]),
    ],
)
def test_shares_of_classes(sizes, count, expected):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    chosen = stratified(labels, count)
    assert np.bincount(labels[chosen], minlength=len(sizes)).tolist() == expected
    shuffled = np.random.default_rng(0).permutation(labels)
    positions = stratified(shuffled, count)
    for i, number in enumerate(expected):  # the first of each class
        assert np.flatnonzero(shuffled == i)[:number].tolist() == [p for p in positions if shuffled[p] == i]


def parts_of(images, *options, **named):
    """Training, test and validation images as numbers; every image is in exactly one part."""
    parts = split_images(ImageSets(images), *options, **named)
    return [numbers(part) for part in (parts.train, parts.test, parts.validation)]


def test_parts_of_the_split():
    images = in_pixels([i % 2 for i in range(20)])
    train, test, validation = parts_of(images, 4, 2)
    assert sorted(train + test + validation) == list(range(20)) and train == sorted(train) and test == sorted(test)
    assert [sum(i % 2 for i in part) for part in (train, test, validation)] == [7, 2, 1]
    assert parts_of(images, 4, 2, 3) == [train[:3], test, validation]
    assert parts_of(images, 4)[1] == test and parts_of(images, 4, max_train_samples=1)[1] == test
    by_default = parts_of(images)  # a fifth
    assert len(by_default[1]) == 4 and by_default[2] is None
    assert parts_of(images, 0) == [list(range(20)), None, None]
    official = split_images(ImageSets(images, test=images.take([1])), None, 2)
    assert numbers(official.test) == [1] and len(official.train) == 18 and len(official.validation) == 2


def test_the_first_training_images_are_a_random_sample():
    """The held-out images are not the first ones, which would leave a sample without the most frequent classes."""
    hashes = np.random.default_rng(0).integers(0, 2**63, 4000).astype(np.uint64)
    labels = [i % 10 for i in range(4000)]
    images = in_order(Images(torch.tensor(labels), tuple("abcdefghij"), 1, "many", hashes))
    sample = split_images(ImageSets(images), 2000, max_train_samples=200).train
    assert sample.labels.bincount().min() >= 10 and (sample.hashes < np.uint64(2**63 // 5)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ((9,), "^held_out must be at most 8 for ten, so that one distinct image of each class is trained on; got 9$"),
        ((7, 2), r"^validation must be at most 1 for ten, "),
    ],
)
def test_too_many_held_out(options, message):
    images = in_pixels([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    with pytest.raises(InputError, match=message) as error:
        split_images(ImageSets(images), *options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"held_out": -1}, "held_out must be at least 0, got -1"),
        ({"validation": -1}, "validation must be at least 0, got -1"),
        ({"max_train_samples": 0}, "max_train_samples must be at least 1, got 0"),
    ],
)
def test_counts_out_of_range_are_found_before_the_data(options, message):
    for load in (lambda: load_images("absent", **options), lambda: load_digits(**options)):
        with pytest.raises(InputError, match=message):
            load()


def test_official_test_images_replace_held_out_ones():
    images = in_pixels([0, 1] * 5)
    official = images.take([0, 1, 2])
    for options, message in (
        ({"held_out": 2}, "held_out=2 does not apply to ten, which has 3 test images of its own"),
        ({"validation": 2}, "validation=2 does not apply to ten, which has 3 validation images of its own"),
    ):
        with pytest.raises(InputError, match=message):
            split_images(ImageSets(images, official, official.take([0, 1, 2])), **options)
    parts = split_images(ImageSets(images, official), 0)
    assert parts.test is official and len(parts.train) == 10


def test_training_images_in_the_test_set_are_counted(caplog):
    images = in_pixels([0, 1] * 5)
    split_images(ImageSets(images, images.take([2, 3, 4])))
    assert "ten: 3 training images are also in the test set" in caplog.text


def test_images_without_a_class_are_trained_on():
    images = in_pixels([0, -1, -1, 1, 0, 1, -1, -1])
    train, test, _ = parts_of(images, 2)
    assert set(test) < {0, 3, 4, 5} and sorted(train + test) == list(range(8)) and {1, 2, 6, 7} < set(train)
    unlabeled = in_pixels([-1] * 10, classes=())
    train, test, _ = parts_of(unlabeled)
    assert len(test) == 2 and sorted(train + test) == list(range(10))
    with pytest.raises(InputError, match="at most 9 for ten, so that one distinct image is trained on; got 10"):
        split_images(ImageSets(unlabeled), 10)


@pytest.mark.parametrize(
    "labels, reason", [([1] * 6, "all images are of one class"), ([0, 1, 2, -1], "every class has only one image")]
)
def test_classes_that_no_score_can_use(labels, reason, caplog):
    parts = split_images(ImageSets(in_pixels(labels, classes=("a", "b", "c"))), 1)
    assert f"ten: {reason}; the classes are not used" in caplog.text
    for part in (parts.train, parts.test):
        assert part.classes == () and (part.labels == -1).all()


def test_copies_of_an_image_are_on_one_side(caplog):
    hashes = [5, 5, 1, 2, 3, 4, 5, 9, 9, 8]
    images = in_pixels([0, 0, 0, 0, 0, 1, 0, 1, 1, 1], hashes=hashes)
    parts = split_images(ImageSets(images), 3)
    held, trained = (set(part.hashes.tolist()) for part in (parts.test, parts.train))
    assert len(parts.test) == 3 and not held & trained and held | trained == set(hashes)
    for order in (range(9, -1, -1), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]):
        again = split_images(ImageSets(images.take(order)), 3)
        assert sorted(again.test.hashes) == sorted(parts.test.hashes)
    held_all = split_images(ImageSets(images), 4)  # one of each class is left
    assert len(held_all.train.labels.unique()) == 2
    with pytest.raises(InputError, match="at most 5 for ten"):
        split_images(ImageSets(images), 6)


def test_the_class_of_copies_with_different_classes_does_not_depend_on_the_order():
    images = in_pixels([1, 0, 0, 1, 0, 1], hashes=[3, 3, 1, 2, 4, 5])
    for order in (range(6), range(5, -1, -1)):
        assert in_order(images.take(list(order))).labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_removed_copies_are_counted(caplog):
    images = in_pixels([0, 0, 0, 1, 1, 1, 1], hashes=[1, 1, 7, 2, 2, 2, 8])
    train, test = hold_out(images, 2, "held_out")
    held, rest = set(test.hashes), set(train.hashes)
    assert len(test) == 2 and len(held) == 2 and held | rest == {1, 7, 2, 8} and not held & rest
    removed = 7 - len(test) - len(train)
    assert removed == sum(images.hashes.tolist().count(one) - 1 for one in held) > 0
    assert f"ten: {removed} copies of held-out images are not trained on" in caplog.text


def test_classes_of_copies_alone(caplog):
    """Folders of plain colors."""
    images = in_pixels([0] * 5 + [1] * 5, hashes=[1] * 5 + [2] * 5)
    parts = split_images(ImageSets(images))
    assert parts.test.labels.tolist() == [0, 1] and len(parts.train) == 8
    assert "copies of held-out images are trained on" in caplog.text


# ---- statistics


def test_statistics_are_those_of_the_pixels():
    pixels = torch.tensor([[[[0, 255]], [[51, 51]], [[0, 1]]]], dtype=torch.uint8)
    images = Images(torch.zeros(1), (), 3, "two", np.zeros(1, np.uint64), pixels=pixels)
    mean, std = images.mean_and_std()
    assert mean == pytest.approx((0.5, 0.2, 0.5 / 255))
    assert std == pytest.approx((0.5**0.5, 1.0, 1.0))  # a constant channel is not scaled


def test_statistics_of_many_pixels_are_exact():
    values = np.random.default_rng(0).integers(0, 256, (300, 3, 16, 16), dtype=np.uint8)
    images = Images(torch.zeros(300), (), 3, "many", np.zeros(300, np.uint64), pixels=torch.from_numpy(values))
    mean, std = images.mean_and_std()
    channels = values.swapaxes(0, 1).reshape(3, -1) / 255
    assert mean == pytest.approx(channels.mean(1), rel=1e-12) and std == pytest.approx(
        channels.std(1, ddof=1), rel=1e-12
    )
    counts = np.zeros((1, 256), np.int64)
    counts[0, [0, 255]] = 2**60  # sums beyond 64 bits
    assert mean_and_std(counts) == (pytest.approx((0.5,)), pytest.approx((0.5,)))


def test_statistics_do_not_depend_on_the_first_class(tmp_path):
    """A folder of black images before one of white ones."""
    pictures = []
    for i in range(40):
        image = Image.new("RGB", (100, 100), (250 if i >= 20 else 5,) * 3)
        image.putpixel((0, 0), (i, 0, 0))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    folder = write_folder(tmp_path / "images", pictures, ["black"] * 20 + ["white"] * 20)
    sets = load_images(folder)
    assert sets.test.labels.bincount().tolist() == [4, 4]
    mean, std = sets.train.mean_and_std()
    assert mean == pytest.approx([0.5] * 3, abs=0.01) and std == pytest.approx([0.48] * 3, abs=0.01)


def test_statistics_of_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 5)
    path = image_parquet(tmp_path, [picture(size=(100, 100), seed=i) for i in range(12)])
    images = load_images(path, held_out=0).train
    assert images.mean_and_std() == images.take(range(5)).mean_and_std() != images.take(range(1, 6)).mean_and_std()


# ---- rows and crops

SIZES = [(40, 30), (97, 97), (30, 60), (200, 150), (8, 8), (120, 40)]


@pytest.fixture
def files(tmp_path):
    """Images of many sizes and modes, one of them truncated."""
    modes = ["RGB", "L", "P", "RGBA", "RGB", "RGB"]
    pictures = [picture(mode, size, seed=i) for i, (mode, size) in enumerate(zip(modes, SIZES, strict=True))]
    cut = picture(size=(300, 300), seed=9, kind="JPEG")
    pictures.insert(3, {"bytes": cut["bytes"][: len(cut["bytes"]) // 2], "path": "cut.jpg"})
    return load_images(image_parquet(tmp_path, pictures, labels=[5, 5, 7, 7, 7, 5, 7]), held_out=0).train


def test_images_of_many_sizes_stay_files(files):
    assert files.pixels is None and len(files) == 6 and files.skipped[0].startswith("cut.jpg: image file is truncated")
    assert sorted(image.size for image in files.pictures(range(6))) == sorted(SIZES)
    assert files.pictures([]) == []
    assert [image.size for image in files.pictures([4, 2])] == [files.pictures([i])[0].size for i in (4, 2)]
    some = files.take([3, 1])
    assert np.array_equal(some.hashes, files.hashes[[3, 1]]) and torch.equal(some.labels, files.labels[[3, 1]])
    assert some.pictures([1])[0].tobytes() == files.pictures([1])[0].tobytes()
    assert len(files.take(files.labels.numpy() == 1)) == 3 and len(files.take([])) == 0
    mean, std = files.mean_and_std()
    assert len(mean) == 3 and all(0.3 < m < 0.9 for m in mean) and all(s > 0 for s in std)


def test_a_batch_is_stacked_as_it_is():
    images = in_pixels(range(6))
    rows = TrainingRows(images, 2, (0.2, 1.0), seed=0)
    assert len(rows) == 6 and torch.equal(collate_images([rows[4], rows[1]])["images"], images.pixels[[4, 1]])


def test_crops_of_files_are_a_function_of_seed_epoch_and_image(files):
    rows = TrainingRows(files, 16, (0.2, 1.0), seed=3)
    first = rows[2]
    assert first.shape == (2, 3, 16, 16) and not torch.equal(first[0], first[1])
    assert torch.equal(first, rows[2]) and torch.equal(files.for_views([2, 1], 16, (0.2, 1.0), (3, 0))[0], first)
    assert torch.equal(TrainingRows(files.take([5, 2]), 16, (0.2, 1.0), seed=3)[1], first)
    rows.set_epoch(1)
    assert not torch.equal(first, rows[2])
    assert not torch.equal(first, TrainingRows(files, 16, (0.2, 1.0), seed=4)[2])
    whole = files.for_views([2], 16, None, (3, 0))[0]
    assert torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("context", one_fast(["fork", "spawn"]))
def test_the_epoch_reaches_persistent_workers(files, context):
    rows = TrainingRows(files, 16, (0.2, 1.0), seed=3)
    loader = DataLoader(rows, 6, num_workers=1, persistent_workers=True, multiprocessing_context=context)
    epochs = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        epochs.append(next(iter(loader)))
        assert torch.equal(epochs[-1], torch.stack([rows[i] for i in range(6)]))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
    loader._iterator._shutdown_workers()


def test_a_crop_of_a_file_is_that_of_the_batched_views():
    """The same boxes, cropped and resized by PIL and by `random_resized_crop`, in an image of slowly changing colors,
    because PIL rounds between its two passes."""
    rows, columns = torch.meshgrid(torch.linspace(0, 255, 60), torch.linspace(0, 255, 80), indexing="ij")
    pixels = torch.stack([rows, columns, (rows + columns) / 2]).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    ours = two_crops({"bytes": buffer.getvalue(), "path": None}, 3, (), 24, (0.2, 1.0), (1, 2))
    seed = int(np.random.SeedSequence((1, 2)).generate_state(1, np.uint64)[0])
    draw = Draw(torch.empty(2), torch.Generator().manual_seed(seed))
    batched = random_resized_crop((pixels / 255).expand(2, -1, -1, -1), draw, 24, (0.2, 1.0), flip=0.0)
    assert (ours / 255 - batched).abs().max() < 1.5 / 255


def waves(width, height):
    """A smooth image with structure at every place."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [127 + 120 * np.sin(x / 31 + k) * np.cos(y / (23 + 4 * k)) for k in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("number", [1, 3, 6, 7])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 32, 64, 200])
def test_crops_of_a_draft_equal_those_of_the_image(monkeypatch, number, channels, size):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    buffer = io.BytesIO()
    waves(503, 377).save(buffer, "JPEG", quality=95, exif=exif)  # no multiples of 8
    encoded = {"bytes": buffer.getvalue(), "path": None}
    decoded = []
    original = module.to_picture
    monkeypatch.setattr(module, "to_picture", lambda *a: decoded.append(original(*a)) or decoded[-1])
    for seed in range(8):
        drafted = two_crops(encoded, channels, (), size, (0.08, 1.0), (seed,))
        box = np.array(draw_boxes(*((377, 503) if number >= 5 else (503, 377)), (0.08, 1.0), (seed,)))
        side = (box[:, 2:] - box[:, :2]).min()
        scale = next(scale for scale in (8, 4, 2, 1) if side >= scale * size or scale == 1)
        assert max(decoded[-1].size) == -(-503 // scale)
        full = original_crops(encoded, channels, size, (seed,), monkeypatch)
        assert (drafted.int() - full.int()).abs().float().mean() < 1.5
        assert (drafted.int() - full.int()).abs().max() < 16
    assert Counter(max(picture.size) for picture in decoded)[503] < len(decoded) or size == 200


def original_crops(encoded, channels, size, seed, monkeypatch):
    image = module.open_image(encoded, channels)
    boxes = draw_boxes(*image.size, (0.08, 1.0), seed)
    return torch.stack([module.resized_crop(image, size, box) for box in boxes])


def test_a_file_that_disappears_during_training(tmp_path):
    pictures = [picture(size=(100, 100), seed=i) for i in range(4)]
    folder = write_folder(tmp_path / "images", pictures, ["a", "a", "b", "b"])
    images = load_images(folder, held_out=0).train
    for path in (tmp_path / "images").rglob("*.png"):
        path.unlink()
    rows = TrainingRows(images, 8, None, 0)
    with pytest.raises(InputError, match=r"^[ab]/00.\.png: No such file or directory$"):
        rows[0]
    with pytest.raises(InputError, match=r"^[ab]/00.\.png: No such file or directory$"):
        next(iter(DataLoader(rows, 2, num_workers=1)))
