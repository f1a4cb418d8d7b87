"""Where images come from: classes, splits and files of folders, columns of tables, datasets."""

import json
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmicl_text.errors import InputError
from fmicl_text.vision import sources
from fmicl_text.vision.sources import ImageSource, first_rows
from tests.support import image_parquet, picture


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def find_images(*arguments, **named):
    return sources.find_images(ImageSource(*arguments, **named))


def stream_images(*arguments, **named):
    return sources.stream_images(ImageSource(*arguments, **named))


def make(folder, *names):
    """Write a different image to each name below a folder."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed=seed)["bytes"])
    return str(folder)


def named(rows):
    """(name of the file, class) of all images."""
    names = [os.path.basename(row["image"]["path"]) for row in rows.rows]
    return sorted(zip(names, [None if i < 0 else rows.classes[i] for i in rows.labels], strict=True))


def write_table(path, **columns):
    with open(path, "wb") as file:
        pq.write_table(pa.table(columns), file)
    return str(path)


def encoded(count=4):
    return [picture(seed=i)["bytes"] for i in range(count)]


# ---- folders


def test_classes_are_subfolders_whatever_their_names(tmp_path):
    names = ["train_interior", "test", "a::b", "photos [2024]", "val-x", "é ü"]
    found = find_images(make(tmp_path / "photos [1]" / "x::y", *(f"{name}/{i}.png" for name in names for i in (0, 1))))
    assert set(found) == {"train"} and found["train"].classes == tuple(sorted(names))
    assert np.bincount(found["train"].labels).tolist() == [2] * 6
    assert all(os.path.isfile(row["image"]["path"]) for row in found["train"].rows)


def test_every_image_below_a_class_counts_and_numbers_are_sorted_by_value(tmp_path):
    names = (
        "10/a.png",
        "10/deep/er/b.PNG",
        "9/c.JpEg",
        "9/x/d.webp",
        "9/.hidden.png",
        "__MACOSX/9/e.png",
        "9/note.txt",
    )
    rows = find_images(make(tmp_path / "data", *names))["train"]
    assert rows.classes == ("9", "10")
    assert named(rows) == [("a.png", "10"), ("b.PNG", "10"), ("c.JpEg", "9"), ("d.webp", "9")]


def test_a_flat_folder_has_no_classes(tmp_path, caplog):
    for name in ("flat", "nested/images/all"):
        folder = tmp_path / name.split("/")[0]
        make(tmp_path / name, "a.png", "b.png")
        rows = find_images(str(folder))["train"]
        assert rows.classes == () and rows.labels.tolist() == [-1, -1]
    assert "the images have no classes" in caplog.text


def test_images_beside_class_folders_have_no_class(tmp_path, caplog):
    rows = find_images(make(tmp_path / "data", "x.png", "cat/a.png", "dog/b.png"))["train"]
    assert named(rows) == [("a.png", "cat"), ("b.png", "dog"), ("x.png", None)]
    assert "1 images are not in the folder of a class" in caplog.text


def test_one_class_is_no_class(tmp_path, caplog):
    rows = find_images(make(tmp_path / "data", "x.png", "cat/a.png"))["train"]
    assert rows.classes == () and rows.labels.tolist() == [-1, -1] and "one class only, 'cat'" in caplog.text


def test_splits_are_folders_if_all_have_names_of_splits(tmp_path):
    parts = [f"{split}/{name}" for split in ("Training", "val", "eval") for name in ("cat/a.png", "dog/b.png")]
    found = find_images(make(tmp_path / "data" / "inner", *parts))
    assert set(found) == {"train", "test", "validation"}
    assert all(named(rows) == [("a.png", "cat"), ("b.png", "dog")] for rows in found.values())
    assert {os.path.basename(rows.source) for rows in found.values()} == {"Training", "val", "eval"}
    assert find_images(str(tmp_path / "data"), dataset_split="validation")["train"].source.endswith("val")


def test_a_validation_folder_alone_is_the_test_set(tmp_path):
    found = find_images(make(tmp_path / "data", *(f"{s}/{c}/0.png" for s in ("train", "valid") for c in "ab")))
    assert set(found) == {"train", "test"} and found["test"].source.endswith("valid")


def test_train_among_other_names_is_a_class(tmp_path, caplog):
    rows = find_images(make(tmp_path / "data", "bus/a.png", "car/b.png", "train/c.png"))["train"]
    assert rows.classes == ("bus", "car", "train")
    assert "train is read as a class, not as a split, because bus is not a split" in caplog.text


def test_splits_of_the_same_classes_beside_another_folder(tmp_path):
    """As classes, train and val would be trained on together."""
    names = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("cat", "dog") for i in range(2)]
    folder = make(tmp_path / "data", *names, "docs/logo.png")
    with pytest.raises(
        InputError, match=rf"docs is no split: pass train_file={folder}/train and test_file={folder}/val"
    ):
        find_images(folder)


@pytest.mark.parametrize(
    "test, reason",
    [
        (("images/0.png", "images/1.png"), "its images have no classes"),  # TinyImageNet
        (("cat/0.png", "cow/1.png"), r".*train has no class 'cow'"),
    ],
)
def test_a_test_folder_without_the_training_classes_is_not_used(tmp_path, caplog, test, reason):
    names = [f"train/{name}/images/0.png" for name in ("cat", "dog")]
    found = find_images(make(tmp_path / "data", *names, *(f"val/{name}" for name in test)))
    assert set(found) == {"train"} and found["train"].classes == ("cat", "dog")
    assert re.search(f"is not used as the validation set: {reason}", caplog.text)


def test_a_test_folder_of_one_class_keeps_it(tmp_path):
    found = find_images(make(tmp_path / "data", "train/cat/a.png", "train/dog/b.png", "test/cat/c.png"))
    assert named(found["test"]) == [("c.png", "cat")]


def test_official_test_sets_are_matched_by_name(tmp_path):
    train = make(tmp_path / "train", "cat/a.png", "dog/b.png", "eel/c.png")
    found = find_images(train, test_file=make(tmp_path / "other", "eel/x.png"))
    assert found["test"].classes == ("cat", "dog", "eel") and found["test"].labels.tolist() == [2]
    table = write_table(tmp_path / "t.parquet", image=encoded(2), label=["dog", "cat"])
    assert find_images(train, test_file=table)["test"].labels.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"cows cannot be the test set: .*train has no class 'cow'$"):
        find_images(train, test_file=make(tmp_path / "cows", "cow/x.png", "cat/y.png"))
    with pytest.raises(InputError, match="its images have no classes"):
        find_images(train, test_file=make(tmp_path / "flat", "x.png"))
    with pytest.raises(InputError, match=r"^test_file=.*train/ is also train_file"):
        find_images(train, test_file=f"{train}/")


def test_a_link_to_a_folder_or_file_is_followed_but_not_in_circles(tmp_path):
    pool = tmp_path / "pool"
    make(pool, "cats/a.png", "b.png")
    folder = tmp_path / "data"
    make(folder, "dog/c.png")
    (folder / "cat").symlink_to(pool / "cats")
    (folder / "dog" / "b.png").symlink_to(pool / "b.png")
    (folder / "dog" / "up").symlink_to(folder)
    (folder / "dog" / "root").symlink_to(tmp_path.parent)
    (folder / "dog" / "self").symlink_to(folder / "dog" / "self")
    (folder / "dog" / "gone.png").symlink_to(tmp_path / "absent")  # is counted with the unreadable images
    rows = find_images(str(folder))["train"]
    assert named(rows) == [("a.png", "cat"), ("b.png", "dog"), ("c.png", "dog"), ("gone.png", "dog")]


def test_a_pipe_is_not_an_image(tmp_path):
    make(tmp_path / "data", "a.png")
    os.mkfifo(tmp_path / "data" / "b.png")
    assert named(find_images(str(tmp_path / "data"))["train"]) == [("a.png", None)]


def test_a_name_that_is_not_utf8_is_one_line(tmp_path):
    make(tmp_path / "data", "cat/a.png", "dog/b.png")
    for name in (b"caf\xe9.png", b"d\xe9/x.png"):
        path = os.path.join(os.fsencode(tmp_path), b"data", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "wb").close()
        with pytest.raises(InputError, match=r"^train_file=.*\\xe9.* is not UTF-8: rename it$"):
            find_images(str(tmp_path / "data"))
        os.remove(path)
    assert len(find_images(str(tmp_path / "data"))["train"].labels) == 2  # the empty folder does not matter


def test_the_fingerprint_changes_with_files_labels_and_order(tmp_path):
    folder, other = tmp_path / "data", tmp_path / "data" / "cat" / "a.png"
    make(folder, "cat/a.png", "dog/b.png", "test/c.png")

    def fingerprint():
        return find_images(str(folder))["train"].fingerprint

    found = [fingerprint()]
    assert fingerprint() == found[0]
    os.utime(other, (1, 1))
    found.append(fingerprint())
    other.write_bytes(b"short")
    os.utime(other, (1, 1))
    found.append(fingerprint())
    (folder / "cat").rename(folder / "cow")
    found.append(fingerprint())
    (folder / "cow" / "a.png").rename(folder / "dog" / "a.png")
    found.append(fingerprint())
    assert len(set(found)) == 5


@pytest.mark.parametrize(
    "names, options, message",
    [
        (
            ("notes.txt", "a/b.heic"),
            {},
            r"contains no images, but 2 other files such as .*b\.heic; accepted are \.apng",
        ),
        ((), {}, "contains no images; accepted are"),
        (("train/a/0.png", "Training/b/0.png"), {}, "Training and train are both folders of the split train"),
        (("a/0.png", "b/0.png"), {"label_column": "y"}, "label_column=y does not apply to train_file=.*metadata"),
        (("a/0.png", "b/0.png"), {"image_column": "y"}, "image_column=y does not apply to train_file="),
        (("a/0.png", "b/0.png"), {"dataset_config": "y"}, "dataset_config=y: the README.md of train_file=.* has no"),
        (("a/0.png", "b/0.png"), {"dataset_split": "y"}, "dataset_split=y: no such split; there are train"),
        (("a/0.png", "b/0.png"), {"test_split": "test"}, "test_split=test: no such split; there are train"),
        (("a/0.png", "b/0.png"), {"test_split": "train"}, "test_split=train is also dataset_split"),
    ],
)
def test_invalid_folders(tmp_path, names, options, message):
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=message) as error:
        find_images(make(tmp_path / "data", *names), **options)
    assert "\n" not in str(error.value)


def test_an_unreadable_folder_is_one_line(tmp_path, monkeypatch):
    folder = make(tmp_path / "data", "a/0.png", "b/0.png")
    scandir = os.scandir

    def fail(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(InputError, match=r"^train_file=.*: .*/b cannot be read: Permission denied$"):
        find_images(folder)


# ---- tables of metadata


def metadata(folder, kind, rows):
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines))
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pandas.DataFrame(rows).to_parquet(folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_gives_the_classes(tmp_path, kind, caplog):
    folder = tmp_path / "photos [1]"
    make(folder, "images/a.png", "images/b.png", "c.png", "unlisted.png")
    files = {"images/a.png": "NA", "images/b.png": "train", "c.png": "NA"}
    metadata(folder, kind, [{"file_name": name, "label": label} for name, label in files.items()])
    rows = find_images(str(folder))["train"]
    assert named(rows) == [("a.png", "NA"), ("b.png", "train"), ("c.png", "NA")]
    assert "1 images are not listed in the tables of metadata" in caplog.text


def test_metadata_within_splits_and_with_other_columns(tmp_path):
    folder = tmp_path / "data"
    make(folder, *(f"{split}/{i}.png" for split in ("train", "test") for i in range(3)))
    for split in ("train", "test"):
        rows = [{"left_file_name": f"{i}.png", "kind": i % 2, "label": 0} for i in range(3)]
        metadata(folder / split, "csv", rows)
    found = find_images(str(folder), image_column="left", label_column="kind")
    assert [found[split].labels.tolist() for split in ("train", "test")] == [[0, 1, 0]] * 2


def test_classes_in_csv_stay_as_they_are_written(tmp_path):
    make(tmp_path / "data", *(f"{i}.png" for i in range(6)))
    labels = ["007", "7", "2020-01-01", "", "-1", "NA"]
    metadata(tmp_path / "data", "csv", [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)])
    rows = find_images(str(tmp_path / "data"))["train"]
    assert [name for _, name in named(rows)] == ["007", "7", "2020-01-01", None, None, "NA"]
    (tmp_path / "data" / "metadata.csv").write_bytes(b"file_name,label\n0.png,caf\xe9\n")
    with pytest.raises(InputError, match=r"metadata\.csv cannot be read: .*UTF8"):
        find_images(str(tmp_path / "data"))


def test_metadata_without_classes_leaves_them_to_the_folders(tmp_path):
    folder = tmp_path / "data"
    make(folder, "cat/a.png", "dog/b.png")
    metadata(folder, "csv", [{"file_name": "cat/a.png", "text": "a cat"}])
    assert find_images(str(folder))["train"].labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "file:///x.png", "..\\x.png", "."])
def test_metadata_cannot_name_other_files(tmp_path, name):
    folder = tmp_path / "data"
    make(folder, "a.png")
    metadata(folder, "jsonl", [{"file_name": "a.png", "label": 0}, {"file_name": name, "label": 1}])
    with pytest.raises(InputError, match=r"metadata\.jsonl: Invalid metadata file_name"):
        find_images(str(folder))


# ---- tables


@pytest.mark.parametrize(
    "labels, classes, numbers",
    [
        (["b", "a", None, "b"], ("a", "b"), [1, 0, -1, 1]),
        (pa.array(["b", "a", " ", "b"], pa.large_string()), ("a", "b"), [1, 0, -1, 1]),
        (pa.array(["b", "a", None, "b"]).dictionary_encode(), ("a", "b"), [1, 0, -1, 1]),
        ([10, 9, -1, 9], ("9", "10"), [1, 0, -1, 0]),
        (pa.array([10, 9, 9, 9], pa.uint8()), ("9", "10"), [1, 0, 0, 0]),
        ([True, False, None, True], ("False", "True"), [1, 0, -1, 1]),
        ([3.0, 1.0, float("nan"), None], ("1", "3"), [1, 0, -1, -1]),
        ([None] * 4, (), [-1] * 4),
        ([-1] * 4, (), [-1] * 4),
        (["a"] * 4, (), [-1] * 4),
    ],
)
def test_kinds_of_labels(tmp_path, labels, classes, numbers):
    rows = find_images(write_table(tmp_path / "t.parquet", image=encoded(), label=labels))["train"]
    assert rows.classes == classes and rows.labels.tolist() == numbers and rows.labels.dtype == np.int64


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_names_of_classes_are_used_in_any_order(tmp_path, suffix):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["b", "c", "a"])})
    rows = datasets.Dataset.from_dict(
        {"img": [picture(seed=i) for i in range(4)], "label": [0, 2, -1, 0]}, features=features
    )
    path = str(tmp_path / f"t{suffix}")
    if suffix == ".parquet":
        rows.to_parquet(path)
    else:
        rows.save_to_disk(str(tmp_path / "saved"))
        os.rename(tmp_path / "saved" / "data-00000-of-00001.arrow", path)
    found = find_images(path)["train"]
    assert found.classes == ("a", "b") and found.labels.tolist() == [1, 0, -1, 1]
    assert found.rows[2]["image"]["bytes"] == picture(seed=2)["bytes"] and found.folders == ()


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})]
)
def test_kinds_of_images(tmp_path, kind):
    cells = [{"bytes": one, "path": None} for one in encoded()] if pa.types.is_struct(kind) else encoded()
    path = write_table(tmp_path / "photos [1]::a.parquet", picture=pa.array(cells, kind), other=[1, 2, 3, 4])
    rows = find_images(path)["train"]
    assert [row["image"]["bytes"] for row in rows.rows] == encoded() and rows.classes == ()


@pytest.mark.parametrize(
    "columns, options, message",
    [
        ({"x": [1, 2]}, {}, r"no column of images: select one with image_column; its columns are \['x'\]"),
        (
            {"image": ["a.png", "b.png"]},
            {},
            r"must contain encoded images, got string; paths .* are not opened.*pass the f",
        ),
        ({"image": [1, 2]}, {}, r"column 'image' \(image_column\) must contain encoded images, got int64$"),
        ({"image": [b"", b""], "img": [b"", b""]}, {}, "columns 'image' and 'img' may be the images: select one"),
        ({"a": [b"", b""], "b": [b"", b""]}, {}, "columns 'a' and 'b' may be the images: select one"),
        (
            {"image": [b"", b""], "class": [0, 1], "target": [0, 1]},
            {},
            "columns 'class' and 'target' may be the classes",
        ),
        (
            {"image": [b"", b""], "label": [0.5, 1]},
            {},
            r"'label' \(label_column\) must contain integers or names, got double|float64",
        ),
        ({"image": [b"", b""], "label": [[0], [1]]}, {}, "must contain integers or names, got List"),
        (
            {"image": [b"", b""]},
            {"label_column": "y"},
            r"has no column 'y' \(label_column\); its columns are \['image'\]",
        ),
        ({"image": [b"", b""]}, {"image_column": "y"}, r"has no column 'y' \(image_column\)"),
        (
            {"image": [b"", b""], "label": [0, 1]},
            {"dataset_split": "test"},
            "dataset_split=test: no such split; there are train",
        ),
        ({"image": [b"", b""], "label": [0, 1]}, {"dataset_config": "x"}, "dataset_config=x applies only to a dataset"),
        ({"image": pa.array([], pa.binary())}, {}, "contains no images"),
        ({"image": [{"bytes": None, "path": "/etc/x.png"}] * 2}, {}, "has only paths of images, which are not opened"),
    ],
)
def test_invalid_tables(tmp_path, columns, options, message):
    with pytest.raises(InputError, match=message) as error:
        find_images(write_table(tmp_path / "t.parquet", **columns), **options)
    assert "\n" not in str(error.value)


def test_a_broken_file_is_named(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"version https://git-lfs")
        with pytest.raises(InputError, match=rf"{name} cannot be read: "):
            find_images(str(tmp_path / name))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + b"x" * 90)
    with pytest.raises(InputError, match=r"cut\.parquet cannot be read: "):
        find_images(str(tmp_path / "cut.parquet"))


@pytest.mark.parametrize(
    "given, message",
    [
        (["absent.parquet"], r"^train_file=absent\.parquet: no such folder, \.parquet or \.arrow file"),
        (["a.png"], r"^train_file=a\.png: no such folder, .* file: pass its folder"),
        (["no*.parquet"], r"^train_file=no\*\.parquet: no file matches this pattern"),
        (["t.parquet", "./t.parquet"], r"^train_file=t\.parquet is given twice"),
        (["t.parquet", "folder"], "^train_file: only one folder can be given"),
        (["pipe.parquet"], r"^train_file=pipe\.parquet is a pipe or a device"),
        ([], "^train_file must be one or more paths, got none"),
        (3, "^train_file must be one or more paths, got 3"),
    ],
)
def test_invalid_files(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "a.png", "folder/a.png")
    os.mkfifo("pipe.parquet")
    write_table("t.parquet", image=encoded())
    with pytest.raises(InputError, match=message):
        find_images(given)


def test_shards_of_other_classes_or_columns(tmp_path):
    def shard(name, **columns):
        return write_table(tmp_path / name, **columns)

    one = shard("1.parquet", image=encoded(2), label=[None, None])
    two = shard("2.parquet", image=encoded(2), label=["b", "a"])
    large = shard("3.parquet", image=encoded(2), label=pa.array(["b", "c"], pa.large_string()))
    assert find_images([one, two, large])["train"].labels.tolist() == [-1, -1, 1, 0, 1, 2]
    with pytest.raises(InputError, match=r"4\.parquet has no column"):
        find_images([one, shard("4.parquet", image=encoded(2))])
    with pytest.raises(
        InputError, match=r"the classes of column 'label' of .*5\.parquet are not those of .*2\.parquet"
    ):
        find_images([one, two, shard("5.parquet", image=encoded(2), label=[0, 1])])
    assert find_images(
        [shard("6.parquet", image=encoded(2), label=[0, 1]), shard("7.parquet", image=encoded(2), label=[1.0, 2.0])]
    )["train"].labels.tolist() == [0, 1, 1, 2]
    paths = []
    for names in (["a", "b"], ["b", "a"]):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict({"image": [picture()] * 2, "label": [0, 1]}, features=features)
        paths.append(str(tmp_path / f"{names[0]}.parquet"))
        rows.to_parquet(paths[-1])
    with pytest.raises(
        InputError, match=r"the classes of column 'label' of .*b\.parquet are not those of .*a\.parquet"
    ):
        find_images(paths)


def test_a_table_is_read_again_when_it_changes(tmp_path):
    found = []
    for labels in ([0, 0, 1, 1], [0, 1, 0, 1]):
        path = write_table(tmp_path / "t.parquet", image=encoded(), label=labels)
        os.utime(path, (0, 0))
        found.append(find_images(path)["train"])
    assert [rows.labels.tolist() for rows in found] == [[0, 0, 1, 1], [0, 1, 0, 1]]
    assert found[0].fingerprint != found[1].fingerprint


def test_large_files_are_not_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr("fmicl_text.vision.sets._HASHED_BYTES", 10)
    monkeypatch.setattr("fmicl_text.vision.sets.cache_of", None)
    path = write_table(tmp_path / "t.parquet", image=encoded(), label=[0, 0, 1, 1])
    first = find_images(path)["train"]
    write_table(tmp_path / "t.parquet", image=encoded(), label=[1, 0, 0, 0])
    os.utime(path, (0, 0))
    second = find_images(path)["train"]
    assert second.labels.tolist() == [1, 0, 0, 0] and first.fingerprint != second.fingerprint


# ---- folders of tables, datasets


LABELS = ["cat", "dog", "dog", "cat", "eel", "dog"]


def sources_of_the_same_images(tmp_path):
    """A folder, a parquet file, shards and a Hub-style folder with the same training and test images."""
    pictures = [picture(seed=i) for i in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["eel", "dog", "cat"])})
    rows = datasets.Dataset.from_dict(
        {"image": pictures, "label": [["eel", "dog", "cat"].index(one) for one in LABELS]}, features=features
    )
    for split in ("train", "test"):
        for number, (one, label) in enumerate(zip(pictures, LABELS, strict=True)):
            path = tmp_path / "folder" / split / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(one["bytes"])
        for place in ("shards", "hub/data"):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            for shard in range(2):
                name = f"{split}-0000{shard}-of-00002.parquet"
                rows.shard(2, shard, contiguous=True).to_parquet(str(tmp_path / place / name))
    rows.to_parquet(str(tmp_path / "file.parquet"))
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: test\n    path: data/test-*\n- config_name: less\n  data_files:\n  - split: train\n"
        "    path: data/train-00000-*\n---\n"
    )
    file = str(tmp_path / "file.parquet")
    return [
        {"train_file": str(tmp_path / "folder")},
        {"dataset_name": str(tmp_path / "folder")},
        {"train_file": file, "test_file": [write_copy(file, tmp_path / "test.parquet")]},
        {"train_file": str(tmp_path / "shards")},
        {"dataset_name": str(tmp_path / "shards"), "test_split": "test"},
        {"train_file": str(tmp_path / "shards" / "train-*"), "test_file": str(tmp_path / "shards" / "test-*")},
        {"train_file": str(tmp_path / "hub")},
        {"dataset_name": str(tmp_path / "hub")},
        {"dataset_name": tmp_path / "hub"},
    ]


def write_copy(file, path):
    path.write_bytes(Path(file).read_bytes())
    return str(path)


def images_and_classes(rows):
    found = []
    for row, label in zip(rows.rows, rows.labels, strict=True):
        image = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
        found.append((image, rows.classes[label]))
    return sorted(found)


def test_sources_of_the_same_images_give_the_same_images(tmp_path):
    expected = sorted((picture(seed=i)["bytes"], label) for i, label in enumerate(LABELS))
    for options in sources_of_the_same_images(tmp_path):
        found = find_images(**options)
        assert set(found) == {"train", "test"}, options
        for rows in found.values():
            assert images_and_classes(rows) == expected and rows.classes == ("cat", "dog", "eel")
            assert rows.rows.column_names == ["image"] and rows.rows.features["image"] == datasets.Image(decode=False)


def test_configurations_and_parts_of_splits(tmp_path):
    sources_of_the_same_images(tmp_path)
    less = find_images(dataset_name=str(tmp_path / "hub"), dataset_config="less")
    assert set(less) == {"train"} and len(less["train"].labels) == 3
    with pytest.raises(InputError, match=r"(?s)^dataset_name=.*hub: .*nothing"):
        find_images(dataset_name=str(tmp_path / "hub"), dataset_config="nothing")
    for name in ("folder", "shards", "hub"):
        found = find_images(
            dataset_name=str(tmp_path / name), dataset_split="train[:5]+test[5:]", test_split="test[:1]"
        )
        assert [len(found[split].labels) for split in ("train", "test")] == [6, 1]


def test_tables_in_a_folder_without_words_for_splits_are_all_training_data(tmp_path):
    for name in ("a", "b"):
        write_table(tmp_path / f"{name}.parquet", image=encoded(), label=[0, 1, 0, 1])
    assert len(find_images(str(tmp_path))["train"].labels) == 8
    os.rename(tmp_path / "a.parquet", tmp_path / "test.parquet")
    with pytest.raises(InputError, match=r"by its name, b\.parquet is not in any split"):
        find_images(str(tmp_path))
    os.remove(tmp_path / "b.parquet")
    with pytest.raises(InputError, match="dataset_split=train: no such split; there are test"):
        find_images(str(tmp_path))


def test_a_saved_dataset_is_a_folder_of_tables(tmp_path):
    rows = datasets.load_dataset("parquet", data_files=image_parquet(tmp_path, [picture(seed=i) for i in range(4)]))
    datasets.DatasetDict({"train": rows["train"], "test": rows["train"]}).save_to_disk(str(tmp_path / "saved"))
    found = find_images(str(tmp_path / "saved"))
    assert [found[split].labels.tolist() for split in ("train", "test")] == [[0, 1, 0, 1]] * 2


def test_images_and_tables_of_images_in_one_folder(tmp_path):
    make(tmp_path, "a/0.png", "b/0.png")
    write_table(tmp_path / "boxes.parquet", name=["a/0.png"], x=[1])
    assert len(find_images(str(tmp_path))["train"].labels) == 2
    write_table(tmp_path / "boxes.parquet", image=encoded())
    with pytest.raises(
        InputError, match=r"has images, such as .*0\.png, and tables of images, such as .*boxes\.parquet"
    ):
        find_images(str(tmp_path))


def test_a_readme_cannot_reference_other_files(tmp_path):
    make(tmp_path / "others", "a/0.png", "b/0.png")
    folder = tmp_path / "data"
    make(folder, "a/0.png", "b/0.png")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert len(find_images(str(folder))["train"].labels) == 2
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: ['../others/**']\n---\n")
    for argument in ("train_file", "dataset_name"):
        with pytest.raises(InputError, match=rf"^{argument}=.* references .*0.png, which is outside the folder"):
            find_images(**{argument: str(folder)})
    (folder / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(InputError, match=r"README\.md: its metadata is not valid YAML"):
        find_images(str(folder))


def test_a_readme_may_configure_a_folder_of_images(tmp_path):
    folder = tmp_path / "data"
    make(folder, "a/0.png", "b/0.png")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: ['**']\n---\n")
    rows = find_images(str(folder))["train"]
    assert named(rows) == [("0.png", "a"), ("0.png", "b")] and str(folder) in rows.folders


def test_a_test_split_without_labels(tmp_path):
    for split, labels in (("train", [0, 1, 0, 1]), ("test", [-1] * 4), ("validation", [1, 1, 0, 0])):
        write_table(tmp_path / f"{split}.parquet", image=encoded(), label=labels)
    found = find_images(str(tmp_path))
    assert set(found) == {"train", "test"} and found["test"].labels.tolist() == [1, 1, 0, 0]
    with pytest.raises(InputError, match="cannot be the test set: its images have no classes"):
        find_images(str(tmp_path), test_split="test")


def test_a_test_set_without_the_columns_is_not_used(tmp_path, caplog):
    write_table(tmp_path / "train.parquet", image=encoded(), kind=[0, 1, 0, 1])
    write_table(tmp_path / "test.parquet", image=encoded(), other=[0, 1, 0, 1])
    assert set(find_images(str(tmp_path), label_column="kind")) == {"train"}
    assert re.search("the test set is not used: .*has no column 'kind'", caplog.text)
    with pytest.raises(InputError, match="has no column 'kind'"):
        find_images(str(tmp_path), label_column="kind", test_split="test")


def test_a_selected_test_set_leaves_the_validation_set(tmp_path):
    make(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "val", "test") for name in "ab"))
    found = find_images(str(tmp_path), test_split="test")
    assert {split: os.path.basename(rows.source) for split, rows in found.items()} == {
        "train": "train", "test": "test", "validation": "val",
    }  # fmt: skip
    found = find_images(str(tmp_path), test_split="val")
    assert {split: os.path.basename(rows.source) for split, rows in found.items()} == {"train": "train", "test": "val"}


def test_columns_are_found_by_name_and_type(tmp_path, caplog):
    def found(**columns):
        rows = find_images(write_table(tmp_path / "t.parquet", **columns))["train"]
        assert len(rows.rows[0]["image"]["bytes"]) > 9
        return rows.classes

    assert found(Image=encoded(), Label=list("abab")) == ("a", "b")
    assert found(image=list("wxyz"), jpg=encoded(), label=[[0]] * 4, target=[1, 2, 1, 2]) == ("1", "2")
    image = pa.array([{"bytes": one, "path": None, "width": 8} for one in encoded()])
    assert found(image=image, mask=image, kind=list("abab")) == ()
    assert "none of the columns ['mask', 'kind'] is known to be the classes (label_column)" in caplog.text


def test_datasets_on_the_hub(monkeypatch):
    """By a stand-in for `datasets.load_dataset`."""
    names, asked, commit = ["b", "a"], [], "0123456789" * 4
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names)})

    def load_dataset(name, config, split, streaming=False, **options):
        asked.append((name, config, split, streaming))
        columns = {
            "img": [picture(seed=i) for i in range(4)],
            "fine_label": [0, 1, 1, 0] if split == "train" else [-1] * 4,
        }
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.info.download_checksums = {f"hf://datasets/{name}@{commit}/x.parquet": {}}
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("fmicl_text.vision.hub_sets.stream_fingerprint", lambda name, config: f"{name} {config}")
    found = find_images(dataset_name="who/pictures", dataset_config="tiny")
    assert set(found) == {"train"} and found["train"].labels.tolist() == [1, 0, 0, 1]
    assert found["train"].classes == ("a", "b") and found["train"].source == f"who/pictures/tiny [train] @{commit}"
    with pytest.raises(InputError, match=r"\[test\] @\w+ cannot be the test set: its images have no classes"):
        find_images(dataset_name="who/pictures", test_split="test")
    stream = stream_images(dataset_name="who/pictures", dataset_config="tiny")["train"]
    assert sorted(first_rows(9, stream)["train"].labels.tolist()) == [0, 0, 1, 1]
    assert len({stream_images(dataset_name="who/pictures", dataset_config=c)["train"].fingerprint for c in "ab"}) == 2
    assert asked == [
        ("who/pictures", "tiny", "train", False),
        ("who/pictures", None, "train", False),
        ("who/pictures", None, "test", False),
        ("who/pictures", "tiny", "train", True),
        *(("who/pictures", config, "train", True) for config in "ab"),
    ]


def test_two_sources_or_none():
    for options in ({}, {"train_file": "a", "dataset_name": "b"}):
        with pytest.raises(InputError, match="exactly one of train_file and dataset_name is needed"):
            find_images(**options)
    with pytest.raises(InputError, match="test_file=a and test_split=b are both given"):
        find_images("x", test_file="a", test_split="b")
    for name, message in (
        ("absent/data", r"absent/data \[train\]: .*without a network, pass a train_file"),
        ("./absent", r"^dataset_name=\./absent: no such folder$"),
        (__file__, r"^dataset_name=.* is a file: pass it as train_file$"),
    ):
        for find in (find_images, stream_images):
            with pytest.raises(InputError, match=message):
                find(dataset_name=name)


def find_rows(*arguments, **named):
    """`find_images`, by streams."""
    official = {"test"} if {"test_file", "test_split"} & named.keys() else set()
    return first_rows(99, **stream_images(*arguments, **named), official=official)


@pytest.mark.parametrize("find", [find_images, find_rows])
def test_a_folder_of_test_images_is_read_as_one_set(tmp_path, find):
    train = make(tmp_path / "train", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)))
    parts = make(
        tmp_path / "x",
        *(f"{s}/{c}/{i}.png" for s, n in (("train", 5), ("test", 2)) for c in ("cat", "dog") for i in range(n)),
    )
    assert len(find(train, test_file=parts)["test"].labels) == 4
    held_out = make(
        tmp_path / "y",
        *(f"{s}/{c}/{i}.png" for s, n in (("train", 5), ("dev", 2)) for c in ("cat", "dog") for i in range(n)),
    )
    assert len(find(train, test_file=held_out)["test"].labels) == 4
    assert named(find(train, test_file=make(tmp_path / "one", "cat/z.png"))["test"]) == [("z.png", "cat")]
    (tmp_path / "tables").mkdir()
    write_table(tmp_path / "tables" / "validation-0.parquet", image=encoded(3), label=["cat", "dog", "dog"])
    assert len(find(train, test_file=str(tmp_path / "tables"))["test"].labels) == 3
    (tmp_path / "tables" / "test-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"test-0\.parquet cannot be read"):
        find(train, test_file=str(tmp_path / "tables"))


@pytest.mark.parametrize("find", [find_images, find_rows])
def test_splits_have_several_names(tmp_path, find):
    folder = make(tmp_path / "data", *(f"{s}/{c}/0.png" for s in ("train", "val") for c in ("cat", "dog")))
    assert set(find(folder, dataset_split="training")) == {"train", "test"}
    for name in ("Training", "TRAIN"):
        with pytest.raises(InputError, match=rf"^test_split={name} is also dataset_split=train$"):
            find(folder, test_split=name)
    with pytest.raises(InputError, match=r"^test_split=nope: no such split; there are train validation$"):
        find(folder, test_split="nope")


def test_a_part_of_the_training_split_keeps_the_test_split(tmp_path):
    names = [f"{s}/{c}/{i}.png" for s in ("train", "val") for c in ("cat", "dog") for i in range(4)]
    folder = make(tmp_path / "data", *names)
    found = find_images(folder, dataset_split="train[:3]+train[5:]")
    assert {split: len(rows.labels) for split, rows in found.items()} == {"train": 6, "test": 8}
    assert set(find_images(folder, dataset_split="train+validation")) == {"train"}


def test_a_stream_without_classes_is_logged_as_other_images(tmp_path, caplog):
    find_rows(make(tmp_path / "flat", "a.png", "b.png"))
    assert "the images have no classes" in caplog.text


def test_class_names_of_many_digits(tmp_path):
    names = ["1" + "0" * 5000, "9" * 5000, "007", "٣"]
    assert find_images(write_table(tmp_path / "t.parquet", image=encoded(), label=names))["train"].classes == (
        "007",
        names[1],
        names[0],
        "٣",
    )


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    "image, label",
    [
        (pa.binary_view(), pa.string_view()),
        (
            pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]),
            pa.dictionary(pa.int8(), pa.large_string()),
        ),
        (pa.dictionary(pa.int32(), pa.binary()), pa.dictionary(pa.int8(), pa.int64())),
    ],
)
def test_encoded_columns_are_read_as_their_values(tmp_path, suffix, image, label):
    images = [{"bytes": one, "path": None} for one in encoded()] if pa.types.is_struct(image) else encoded()
    classes = [5, 4, 5, 4] if "int64" in str(label) else ["b", "a", "b", "a"]
    columns = [pa.array(images, image), pa.array(classes, label)]
    table = pa.table(columns, names=["image", "label"])
    path = str(tmp_path / f"t{suffix}")
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    for find in (find_images, find_rows):
        rows = find(path)["train"]
        found = {row["image"]["bytes"]: rows.classes[i] for row, i in zip(rows.rows, rows.labels, strict=True)}
        assert found == dict(zip(encoded(), map(str, classes), strict=True))


@pytest.mark.parametrize("damage", ["tables-train.arrow", "dataset_info.json", "stream"])
def test_a_damaged_cache_is_written_again(tmp_path, damage, caplog):
    path = write_table(tmp_path / "t.parquet", image=encoded(), label=["a", "b"] * 2)
    find = find_rows if damage == "stream" else find_images
    expected = images_and_classes(find(path)["train"])
    (file,) = Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow" if damage == "stream" else damage)
    for content in (b"", file.read_bytes()[:50]):
        file.write_bytes(content)
        assert images_and_classes(find(path)["train"]) == expected
    assert caplog.text.count("cannot be read and is written again") == 2


@pytest.mark.parametrize("find", [find_images, find_rows])
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, find):
    path = write_table(tmp_path / "t.parquet", image=encoded(), label=["a", "b"] * 2)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(InputError, match=r"t\.parquet: \[Errno [0-9]+\] .*file"):
        find(path)


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_checked_again(tmp_path):
    folder = make(tmp_path / "data", "cat/a.png", "dog/b.png")
    path, before = tmp_path / "data" / "cat" / "a.png", [find(folder)["train"] for find in (find_images, find_rows)]
    times, content = os.stat(path), path.read_bytes()
    path.write_bytes(content[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = [find(folder)["train"] for find in (find_images, find_rows)]
    assert all(one.fingerprint != other.fingerprint for one, other in zip(before, after, strict=True))
    first, path = stream_images(folder)["train"].fingerprint, tmp_path / "data" / "dog" / "b.png"
    path.chmod(0o600)
    assert stream_images(folder)["train"].fingerprint == first  # a run can be resumed


@pytest.mark.parametrize("find", [find_images, find_rows])
def test_a_test_folder_of_other_classes_is_not_used(tmp_path, caplog, find):
    names = [f"{s}/{c}/0.png" for s, classes in (("train", "ab"), ("test", "az"), ("val", "ab")) for c in classes]
    found = find(make(tmp_path / "data", *names))
    assert set(found) == {"train", "test"} and found["test"].source.endswith("val")
    assert "has no class 'z'" in caplog.text
    with pytest.raises(InputError, match="has no class 'z'"):
        find(str(tmp_path / "data"), test_split="test")
