"""One pass over all images: which can be decoded, their sizes and hashes. Its result is cached."""

from __future__ import annotations

import json
import logging
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
import torch.distributed as dist
import xxhash
from tqdm.auto import tqdm

from fmicl_text.errors import InputError
from fmicl_text.vision.decoding import UnreadableImageError, opened, read_encoded, to_picture, upright_size
from fmicl_text.vision.sources import ImageRows

logger = logging.getLogger(__name__)

VERSION = 1  # of the cached files; a change of the decoder that affects which images can be decoded needs a new one
BLOCK = 64  # images that a thread reads at once


@dataclass(frozen=True)
class Scan:
    """What is known of N encoded images.

    Args:
        sizes: Upright width and height, int32 [N, 2]; 0 for an image that cannot be decoded.
        hashes: A hash of the encoded bytes, uint64 [N].
        reasons: Why images cannot be decoded, by row.
    """

    sizes: np.ndarray
    hashes: np.ndarray
    reasons: dict[int, str]


def scan_images(found: ImageRows, progress: bool = True) -> Scan:
    """Decode every image once, in threads, JPEG images at an eighth of their size.

    With several processes, each decodes its share, and all receive the same result. It is cached in the folder of
    `datasets` by the fingerprint of the images and the version of Pillow, unless a file could not be read.

    Args:
        found: The images, the same in every process.
        progress: Show a progress bar.

    Raises:
        InputError: The rows cannot be read, or processes have different numbers of images.
    """
    name = f"images-{found.fingerprint}-{VERSION}-pillow-{PIL.__version__}.npz"
    path = Path(datasets.config.HF_DATASETS_CACHE) / "fmicl_text" / name
    cached = read_scan(path, len(found.rows))
    answers = exchange((len(found.rows), cached is not None))
    if len({count for count, _ in answers}) > 1:
        counts = [count for count, _ in answers]
        raise InputError(f"{found.source}: the processes have different numbers of images: {counts}")
    if cached is not None and all(is_cached for _, is_cached in answers):
        return cached
    rank = dist.get_rank() if len(answers) > 1 else 0
    part: tuple[Scan, bool] | str
    try:
        part = scan_share(found, rank, len(answers), progress and rank == 0)
    except Exception as error:  # the other processes are waiting
        part = " ".join(str(error).split())[:300] or type(error).__name__
    parts = exchange(part)
    if failures := [part for part in parts if isinstance(part, str)]:
        raise InputError(f"{found.source}: {failures[0]}")
    scan = merge([scan for scan, _ in parts])
    if all(is_complete for _, is_complete in parts) and os.environ.get("LOCAL_RANK", str(rank)) == "0":
        write_scan(path, scan)
    return scan


def exchange(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def scan_share(found: ImageRows, rank: int, world_size: int, progress: bool) -> tuple[Scan, bool]:
    """Scan every `world_size`-th block of images, from block `rank` on.

    Returns:
        The result, which is 0 for the images of other processes, and whether all files could be read.
    """
    total = len(found.rows)
    scan, is_complete = empty_scan(total), True
    starts = range(rank * BLOCK, total, world_size * BLOCK)
    pool = ThreadPoolExecutor(num_threads())
    try:
        results = pool.map(partial(scan_block, found), starts)
        with tqdm(total=total, desc="check images", unit=" images", leave=False, disable=not progress) as bar:
            for start, (part, could_read) in zip(starts, results, strict=True):
                rows = slice(start, start + len(part.hashes))
                scan.sizes[rows], scan.hashes[rows] = part.sizes, part.hashes
                scan.reasons.update({start + i: reason for i, reason in part.reasons.items()})
                is_complete &= could_read
                bar.update(len(part.hashes) * world_size)
    finally:
        pool.shutdown(cancel_futures=True)
    return scan, is_complete


def scan_block(found: ImageRows, start: int) -> tuple[Scan, bool]:
    """Scan the images from a row on; see `scan_share`."""
    encoded = found.rows[start : start + BLOCK]["image"]
    scan, is_complete = empty_scan(len(encoded)), True
    for i, image in enumerate(encoded):
        try:
            content = read_encoded(image, found.folders)
            with opened(content) as header:
                scan.sizes[i] = upright_size(header)
                to_picture(header, 3, draft=1)
            scan.hashes[i] = xxhash.xxh3_64_intdigest(content)
        except UnreadableImageError as error:
            scan.sizes[i], scan.reasons[i] = 0, error.reason
            is_complete &= not error.is_temporary
    return scan, is_complete


def num_threads() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def empty_scan(total: int) -> Scan:
    """The result for images that have not been scanned."""
    return Scan(np.zeros((total, 2), np.int32), np.zeros(total, np.uint64), {})


def merge(parts: list[Scan]) -> Scan:
    """The results of all processes in one."""
    reasons = {i: reason for part in parts for i, reason in part.reasons.items()}
    sizes, hashes = (sum(getattr(part, name) for part in parts) for name in ("sizes", "hashes"))
    return Scan(sizes, hashes, dict(sorted(reasons.items())))


def read_scan(path: Path, total: int) -> Scan | None:
    """The cached result for `total` images; None if there is none, or the file is corrupted."""
    try:
        with open(path, "rb") as opened_file, np.load(opened_file, allow_pickle=False) as file:
            reasons = {int(i): str(reason) for i, reason in json.loads(file["reasons"].tobytes()).items()}
            scan = Scan(file["sizes"], file["hashes"], reasons)
    except (OSError, ValueError, LookupError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error):
        return None
    expected = empty_scan(total)
    is_valid = all(
        getattr(scan, name).shape == getattr(expected, name).shape
        and getattr(scan, name).dtype == getattr(expected, name).dtype
        for name in ("sizes", "hashes")
    )
    return scan if is_valid else None


def write_scan(path: Path, scan: Scan) -> None:
    """Cache a result. A failure, such as a full disk, is logged: the next run scans the images again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            reasons = np.frombuffer(json.dumps(scan.reasons).encode(), np.uint8)
            np.savez(file, sizes=scan.sizes, hashes=scan.hashes, reasons=reasons)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        logger.warning("the check of the images could not be cached in %s: %s", path.parent, error)
