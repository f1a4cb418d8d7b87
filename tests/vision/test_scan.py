"""The pass over all images: results, cache, several processes."""

import logging
import os
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch.distributed as dist
import xxhash

from fmicl_text.errors import InputError
from fmicl_text.vision import scan as module
from fmicl_text.vision.scan import read_scan, scan_images
from fmicl_text.vision.sources import ImageSource, find_images
from tests.support import picture, run_ranks

BROKEN = {7: b"no image", 150: b""}
SIZES = [(9, 5), (30, 20), (8, 8)]


@pytest.fixture
def found(tmp_path, monkeypatch):
    """200 images of three sizes, two of them broken, in an empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "images").mkdir()
    for i in range(200):
        content = picture(size=SIZES[i % 3], seed=i, kind="JPEG" if i % 2 else "PNG")["bytes"]
        (tmp_path / "images" / f"{i:03}.jpg").write_bytes(BROKEN.get(i, content))
    return find_images(ImageSource(str(tmp_path / "images")))["train"]


def check(scan):
    good = [i for i in range(200) if i not in BROKEN]
    assert scan.sizes[good].tolist() == [list(SIZES[i % 3]) for i in good] and not scan.sizes[list(BROKEN)].any()
    assert scan.hashes[0] == xxhash.xxh3_64_intdigest(picture(size=SIZES[0])["bytes"])
    assert len(np.unique(scan.hashes[good])) == 198
    assert list(scan.reasons) == [7, 150] and scan.reasons[150] == "empty" and "not an image" in scan.reasons[7]


def cache_file():
    (path,) = (datasets.config.HF_DATASETS_CACHE / "fmicl_text").iterdir()
    return path


def forbid_decoding(monkeypatch):
    def fail(*arguments):
        raise AssertionError("decoded again")

    monkeypatch.setattr(module, "scan_block", fail)


def test_a_scan_is_cached(found, monkeypatch):
    check(scan_images(found))
    forbid_decoding(monkeypatch)
    check(scan_images(found))
    with pytest.raises(InputError, match="decoded again"):
        scan_images(replace(found, fingerprint="another"))


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "fewer"])
def test_a_corrupted_cache_is_written_again(found, monkeypatch, damage):
    check(scan_images(found))
    path = cache_file()
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:-100],
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "text": b"no archive",
            "fewer": content,
        }[damage]
    )
    if damage == "fewer":
        assert read_scan(path, 199) is None
        return
    assert read_scan(path, 200) is None
    check(scan_images(found))
    forbid_decoding(monkeypatch)
    check(scan_images(found))
    assert cache_file() == path


def test_a_file_that_cannot_be_read_is_tried_again(found):
    path = os.path.join(found.folders[0], "003.jpg")
    os.rename(path, path + ".moved")
    assert scan_images(found).reasons[3] == "No such file or directory"
    os.rename(path + ".moved", path)
    check(scan_images(found))


def test_too_little_memory_is_tried_again(found, monkeypatch):
    decode = module.to_picture

    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(module, "to_picture", fail)
    assert scan_images(found).reasons[3] == "too little memory"
    monkeypatch.setattr(module, "to_picture", decode)
    check(scan_images(found))


def test_a_cache_that_cannot_be_written_is_no_error(found, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        check(scan_images(found))
    assert "the check of the images could not be cached" in caplog.text


def count_and_scan(rank, found, cached_ranks=()):
    """The result, and how many images this process decoded; or the error."""
    calls = []
    original = module.to_picture

    def counted(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    module.to_picture = counted
    if rank not in cached_ranks:  # another node
        datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE / str(rank)
    os.environ["LOCAL_RANK"] = "0"
    try:
        scan = scan_images(found, progress=False)
    except InputError as error:
        return str(error)
    return scan, len(calls)


def test_processes_share_the_work(found):
    (first, count), (second, other) = run_ranks(2, count_and_scan, found)
    check(first)
    check(second)
    assert (count, other) == (64 + 64 - 1 - 1, 64 + 8 - 0)
    assert [calls for _, calls in run_ranks(2, count_and_scan, found)] == [0, 0]  # each node has a cache
    mixed = run_ranks(2, count_and_scan, found, (0,))
    check(mixed[1][0])
    assert sum(calls for _, calls in mixed) == 198


def test_a_failure_in_one_process_ends_all(found, monkeypatch):
    monkeypatch.setattr(module, "scan_block", fail_in_rank_1)
    for message in run_ranks(2, count_and_scan, found):
        assert message == f"{found.source}: a broken disk"


def fail_in_rank_1(found, start):
    if dist.get_rank() == 1:
        raise RuntimeError("a broken disk")
    return module.empty_scan(len(found.rows[start : start + module.BLOCK]["image"])), True


def different_numbers(rank, found):
    rows = found.rows.select(range(10 + rank))
    try:
        scan_images(replace(found, rows=rows), progress=False)
    except InputError as error:
        return str(error)


def test_processes_with_different_images(found):
    for message in run_ranks(2, different_numbers, found):
        assert message == f"{found.source}: the processes have different numbers of images: [10, 11]"
