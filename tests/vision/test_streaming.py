"""Streamed images: the same images as without streaming, split over processes and workers, skipped and counted."""

import gc
import io
import itertools
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import IterableDatasetShard
from PIL import Image
from torch.utils.data import DataLoader

from fmicl_text.cli.vision import VisionTrainingArguments
from fmicl_text.errors import InputError
from fmicl_text.training.trainer import FMICLTrainer
from fmicl_text.vision import streaming
from fmicl_text.vision.data import ImageSets, collate_images, load_images
from fmicl_text.vision.encoder import new_image_encoder
from fmicl_text.vision.model import ImageContrastiveModel
from fmicl_text.vision.sources import ImageSource, first_rows, stream_images
from fmicl_text.vision.streaming import StreamedRows, load_image_stream
from fmicl_text.vision.views import ImageViews
from tests.support import IMAGE_FAMILIES, picture, run_ranks, same, weights

CROP = (0.3, 1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    yield
    gc.collect()  # closes unfinished streams, whose threads do not exist in the processes of the next test


def shards(folder, count=24, num_shards=3, broken=(), names=("cat", "dog")):
    """Parquet shards of gray images: image i has the value i everywhere, and the class i % 2."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [b"broken" if i in broken else gray(i) for i in range(count)]
    for number, rows in enumerate(np.array_split(np.arange(count), num_shards)):
        with open(folder / f"train-{number:05d}-of-{num_shards:05d}.parquet", "wb") as file:
            columns = {"image": [images[i] for i in rows], "label": [names[i % 2] for i in rows]}
            pq.write_table(pa.table(columns), file)
    return str(folder)


def gray(value):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(path, excluded=None, seed=3, batch_size=4, **options):
    stream = stream_images(ImageSource(path))["train"]
    return StreamedRows(stream, excluded, 3, 4, CROP, seed, batch_size, **options)


def values(batches):
    return [int(crops[0, 0, 0, 0]) for crops in batches]


def test_every_pass_has_every_image_once_in_another_order(tmp_path):
    rows = rows_of(shards(tmp_path / "data"))
    found = values(itertools.islice(rows, 48))
    first, second = found[:24], found[24:]
    assert sorted(first) == sorted(second) == list(range(24)) and first != second and first != sorted(first)
    assert values(itertools.islice(rows_of(shards(tmp_path / "data")), 24)) == first
    assert values(itertools.islice(rows_of(shards(tmp_path / "data"), seed=4), 24)) != first


def test_rows_are_the_crops_of_the_images(tmp_path):
    with open(tmp_path / "t.parquet", "wb") as file:
        pq.write_table(pa.table({"image": [picture(size=(120, 100), seed=i)["bytes"] for i in range(5)]}), file)
    path = str(tmp_path / "t.parquet")
    images = load_images(path, held_out=0, progress=False).train
    streamed = list(itertools.islice(rows_of(path), 10))
    assert streamed[0].shape == (2, 3, 4, 4) and streamed[0].dtype == torch.uint8
    for epoch in (0, 1):
        expected = images.for_views(range(5), 4, CROP, (3, epoch))
        found = torch.stack(streamed[5 * epoch : 5 * epoch + 5])
        assert sorted(map(str, found.tolist())) == sorted(map(str, expected.tolist()))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_share_the_images(tmp_path, persistent):
    rows = rows_of(shards(tmp_path / "data"))
    loader = DataLoader(rows, 4, num_workers=2, collate_fn=collate_images, persistent_workers=persistent)
    for _ in range(2):
        batches = [values(batch["images"]) for batch in itertools.islice(loader, 8)]
        assert all(len(batch) == 4 for batch in batches)
        assert set(itertools.chain.from_iterable(batches)) >= set(range(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_continues_at_the_same_image(tmp_path, workers):
    loader = DataLoader(rows_of(shards(tmp_path / "data")), 5, num_workers=workers, collate_fn=collate_images)
    batches = [batch["images"] for batch in itertools.islice(loader, 9)]
    resumed = [batch["images"] for batch in itertools.islice(skip_first_batches(loader, 7), 2)]
    assert torch.equal(torch.stack(batches[7:]), torch.stack(resumed))


def test_more_workers_than_shards(tmp_path):
    loader = DataLoader(rows_of(shards(tmp_path / "data", 8, 1)), 4, num_workers=2, collate_fn=collate_images)
    found = [values(batch["images"]) for batch in itertools.islice(loader, 4)]
    assert sorted(found[0] + found[1]) == sorted(found[2] + found[3]) == list(range(8))


def share(rank, path, batch_size):
    rows = rows_of(path, batch_size=batch_size)
    shard = IterableDatasetShard(rows, batch_size, num_processes=2, process_index=rank)
    return values(itertools.islice(shard, 12)), rows.fingerprint()


@pytest.mark.parametrize("num_shards", [1, 4])
def test_processes_share_the_images(tmp_path, num_shards):
    (first, one), (second, other) = run_ranks(2, share, shards(tmp_path / "data", 24, num_shards), 3)
    assert sorted(first + second) == list(range(24)) and one == other


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_counted(tmp_path, workers, caplog):
    rows = rows_of(shards(tmp_path / "data", broken=(3, 20)))
    loader = DataLoader(rows, 11, num_workers=workers, collate_fn=collate_images)
    iterator = iter(loader)
    found = {value for _ in range(8) for value in values(next(iterator)["images"])}
    assert found == set(range(24)) - {3, 20} and rows.num_skipped >= 2
    if not workers:
        assert caplog.text.count("images that cannot be read are skipped, such as") == 1
        assert rows.num_skipped in (6, 7, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_readable_image_is_an_error(tmp_path, workers):
    rows = rows_of(shards(tmp_path / "data", 6, 3, broken=range(6)))
    batches = iter(DataLoader(rows, 2, num_workers=workers, collate_fn=collate_images))
    with pytest.raises(InputError, match=r"data: no image can be trained on: "):
        list(itertools.islice(batches, 3))
    if workers:
        batches._shutdown_workers()  # the garbage collector would need 5 s


def test_a_worker_without_readable_images_does_not_end_the_others(tmp_path):
    rows = rows_of(shards(tmp_path / "data", 6, 2, broken=(0, 1, 2)))
    loader = DataLoader(rows, 3, num_workers=2, collate_fn=collate_images)
    found = [values(batch["images"]) for batch in itertools.islice(loader, 3)]
    assert [sorted(batch) for batch in found] == [[3, 4, 5]] * 3


def test_held_out_images_are_not_trained_on(tmp_path):
    path = shards(tmp_path / "data", 60)
    stream, sets = load_image_stream(path, held_out=12, validation=6, progress=False)
    assert [len(part) for part in (sets.train, sets.test, sets.validation)] == [42, 12, 6]
    assert sets.test.labels.bincount().tolist() == [6, 6] and sets.test.classes == ("cat", "dog")
    rows = StreamedRows(stream, sets, 3, 4, CROP, 0, 4)
    trained = values(itertools.islice(rows, 42))
    held = [
        int(np.asarray(p)[0, 0, 0]) for part in (sets.test, sets.validation) for p in part.pictures(range(len(part)))
    ]
    assert sorted(trained + held) == list(range(60))


def test_only_the_start_of_a_stream_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "START", 20)
    path = shards(tmp_path / "data", 60)
    stream, sets = load_image_stream(path, progress=False)
    assert len(sets.train) + len(sets.test) == 20 and len(sets.test) == 4
    assert len(set(values(itertools.islice(StreamedRows(stream, sets, 3, 4, CROP, 0, 4), 56)))) == 56
    large = load_image_stream(path, held_out=15, validation=10, progress=False)[1]
    assert [len(part) for part in (large.train, large.test, large.validation)] == [25, 15, 10]
    again = load_image_stream(path, progress=False)[1]
    assert again.test.fingerprint() == sets.test.fingerprint()


def test_official_test_sets(tmp_path):
    path = shards(tmp_path / "data", 12)
    os.rename(tmp_path / "data" / "train-00002-of-00003.parquet", tmp_path / "data" / "validation.parquet")
    sets = load_image_stream(path, progress=False)[1]
    assert [len(sets.train), len(sets.test), sets.validation] == [8, 4, None]
    same = load_image_stream(dataset_name=path, test_split="validation", progress=False)[1]
    assert same.test.fingerprint() == sets.test.fingerprint() and same.validation is None
    other = shards(tmp_path / "other", 4, 1, names=("cat", "eel"))
    found = load_image_stream(path, test_file=other, progress=False)[1]
    assert found.test.classes == found.train.classes == ("cat", "dog", "eel")


def test_a_test_set_without_classes(tmp_path, caplog):
    path = shards(tmp_path / "data", 12)
    with open(tmp_path / "data" / "test.parquet", "wb") as file:
        pq.write_table(pa.table({"image": [gray(i) for i in range(4)], "label": [None] * 4}), file)
    assert len(load_image_stream(path, progress=False)[1].test) == 2
    assert "cannot be the test set: its images have no classes" in caplog.text
    with pytest.raises(InputError, match="cannot be the test set: its images have no classes"):
        load_image_stream(path, test_split="test", progress=False)


def test_a_folder_of_images_is_streamed_in_a_random_order(tmp_path):
    for i in range(40):
        file = tmp_path / "data" / f"class{i // 20}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gray(i))
    stream, sets = load_image_stream(str(tmp_path / "data"), held_out=10, progress=False)
    assert sets.test.labels.bincount().tolist() == [5, 5] and sets.train.classes == ("class0", "class1")
    assert stream.rows.num_shards > 2
    trained = values(itertools.islice(StreamedRows(stream, sets, 3, 4, CROP, 0, 4), 30))
    assert len(set(trained)) == 30 and len({value // 20 for value in trained[:10]}) == 2


def image_trainer(path, output_dir, workers, **settings):
    torch.manual_seed(0)
    config = IMAGE_FAMILIES["resnet, small stem"][0]
    model = ImageContrastiveModel(new_image_encoder(type(config).from_dict(config.to_dict())), 16, head_dim=8)
    args = VisionTrainingArguments(
        str(output_dir), per_device_train_batch_size=4, max_steps=6, eval_strategy="no", save_strategy="steps",
        save_steps=4, dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0, **settings,
    )  # fmt: skip
    rows = StreamedRows(stream_images(ImageSource(path))["train"], None, 3, 8, CROP, args.seed, 4)
    views = ImageViews("cifar", 8, (0.5,) * 3, (0.25,) * 3)
    return FMICLTrainer(model, args, train_dataset=rows, data_collator=collate_images, views=views)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_is_resumed_exactly(tmp_path, workers):
    """From step 4 of 6, in the second pass."""
    path = shards(tmp_path / "data", 14, broken=(5,))
    whole = image_trainer(path, tmp_path / "run", workers)
    whole.train()
    resumed = image_trainer(path, tmp_path / "run", workers, overwrite_output_dir=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert same(weights(whole), weights(resumed))
    other = image_trainer(shards(tmp_path / "other", 13), tmp_path / "run", workers)
    with pytest.raises(InputError, match=r"was written by a different run: data"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_max_train_samples(tmp_path):
    path = shards(tmp_path / "data")
    found = values(itertools.islice(rows_of(path, max_train_samples=6), 12))
    assert len(set(found)) == 6 and sorted(found[:6]) == sorted(found[6:])


@pytest.mark.parametrize("workers", [0, 2])
def test_max_train_samples_counts_only_images_that_are_trained_on(tmp_path, workers):
    path = shards(tmp_path / "data", 60, broken=(7,))
    stream, sets = load_image_stream(path, held_out=20, validation=6, progress=False)
    rows = StreamedRows(stream, sets, 3, 4, None, 0, 4, max_train_samples=12)
    loader = DataLoader(rows, 1, num_workers=workers, collate_fn=collate_images)
    found = {values(batch["images"])[0] for batch in itertools.islice(loader, 120)}
    held_out = [picture for part in (sets.test, sets.validation) for picture in part.pictures(range(len(part)))]
    held = {picture.getpixel((0, 0))[0] for picture in held_out}
    assert len(found) in (11, 12) and not found & held, (found, held)


def test_the_fingerprint(tmp_path):
    path = shards(tmp_path / "data")
    _, sets = load_image_stream(path, held_out=6, progress=False)
    found = [
        rows_of(path),
        rows_of(path, seed=4),
        rows_of(path, max_train_samples=3),
        rows_of(path, excluded=sets),
        rows_of(shards(tmp_path / "other", 23)),
    ]
    assert len({rows.fingerprint() for rows in found}) == 5
    assert rows_of(path).fingerprint() == rows_of(path).fingerprint() is not None
    assert rows_of(path, batch_size=9).fingerprint() == rows_of(path).fingerprint()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset_split": "train[:5]"}, "no such split; there are train; a stream has no parts of splits"),
        ({"test_split": "train"}, "^test_split=train is also dataset_split$"),
        ({"test_split": "a", "test_file": "b"}, "^test_file=b and test_split=a are both given"),
        ({"dataset_name": "a"}, "^exactly one of train_file and dataset_name is needed"),
        ({"image_column": "x"}, "has no column 'x'"),
        ({"label_column": "image"}, "must contain integers or names, got binary"),
        ({"test_file": "absent.parquet"}, r"^test_file=absent\.parquet: no such folder, \.parquet or \.arrow file$"),
    ],
)
def test_invalid_streams(tmp_path, options, message):
    with pytest.raises(InputError, match=message) as error:
        load_image_stream(shards(tmp_path / "data"), **options)
    assert "\n" not in str(error.value)


def test_a_hub_style_folder_and_a_stream_without_classes(tmp_path):
    path = shards(tmp_path / "data")
    (tmp_path / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: part\n  data_files:\n  - split: train\n    path: train-00000-*\n---\n"
    )
    stream = stream_images(ImageSource(dataset_name=path, dataset_config="part"))["train"]
    rows = first_rows(99, stream)["train"]
    assert len(rows.labels) == 8 and rows.classes == ("cat", "dog") and stream.fingerprint
    assert sorted(values(itertools.islice(StreamedRows(stream, None, 3, 4, CROP, 0, 4), 8))) == list(range(8))


def test_excluding_everything_is_an_error(tmp_path):
    path = shards(tmp_path / "data", 6)
    images = load_images(path, held_out=0, progress=False).train
    rows = StreamedRows(stream_images(ImageSource(path))["train"], ImageSets(images, images), 3, 4, CROP, 0, 4)
    with pytest.raises(InputError, match="no image can be trained on: its images are held out"):
        next(iter(rows))
