"""Where images come from: folders, tables, datasets on the Hub. No image is decoded here."""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import datasets
import numpy as np
from datasets.arrow_reader import ReadInstruction

from fmicl_text.errors import InputError
from fmicl_text.loading import translate_dataset_errors
from fmicl_text.vision.folders import SPLITS
from fmicl_text.vision.hub_sets import read_hub, stream_hub
from fmicl_text.vision.readers import paths_of, read_files
from fmicl_text.vision.sets import (
    IMAGE_FEATURES,
    ImageSet,
    ImageStream,
    cache_folder,
    dataset_set,
    explain,
    hash_of,
    read_cached,
)
from fmicl_text.vision.tables import sorted_classes

logger = logging.getLogger(__name__)

STREAM_BUFFER = 10_000  # images from which the next one of a stream is drawn


@dataclass(frozen=True)
class ImageRows:
    """Encoded images and their classes.

    Args:
        rows: Dataset with the column `image`, of {bytes, path}.
        labels: int64 [N], index into `classes`; -1 for an image without a class.
        classes: Names of the classes, the same for all sets.
        source: File, folder or dataset.
        folders: Folders from which image files may be opened. For tables there are none, because a table could
            otherwise reference arbitrary local files.
        fingerprint: A hash of the order and the labels, and of the content of tables, or the path, size and
            modification time of every file of a folder, and when the last of them changed.
    """

    rows: Any
    labels: np.ndarray
    classes: tuple[str, ...]
    source: str
    folders: tuple[str, ...]
    fingerprint: str


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class ImageSource:
    """Where to find training images and, if there are any, the official test and validation images.

    Args:
        train_file: A folder of images, or one or more .parquet or .arrow files, patterns or folders of such files. In
            a folder of images, the class of an image is the name of the subfolder of the first level, however deep it
            lies; a folder without subfolders has no classes, nor have images beside the subfolders. Subfolders named
            train, val and test are splits if all are. Tables named `metadata` give the classes as in `datasets`.
        dataset_name: Hub name or local folder of a dataset. Exactly one of `dataset_name` and `train_file` is
            required.
        dataset_config: Configuration of the dataset.
        dataset_split: Training split, of a dataset or a folder.
        image_column: Column of encoded images; by default `image` or `img`, else the only column of images.
        label_column: Column of classes: ClassLabel, integers, booleans or names; missing, blank and -1 are no class.
            By default the only one of `tables.LABEL_NAMES`, else the only ClassLabel.
        test_file: Test images, as `train_file`. By default, those of a split test or validation of a local folder.
        test_split: Test split of the dataset or folder.

    Raises:
        InputError: Not exactly one source of training images is given, or several of test images.
    """

    train_file: Paths | None = None
    dataset_name: str | os.PathLike[str] | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    test_file: Paths | None = None
    test_split: str | None = None

    def __post_init__(self) -> None:
        test_file, test_split = self.test_file, self.test_split
        if (self.train_file is None) == (self.dataset_name is None):
            got = f"train_file={self.train_file} and dataset_name={self.dataset_name}"
            raise InputError(f"exactly one of train_file and dataset_name is needed, got {got}")
        if test_file is not None and test_split is not None:
            raise InputError(f"test_file={test_file} and test_split={test_split} are both given: pass one of them")
        if test_split == self.dataset_split:
            raise InputError(f"test_split={test_split} is also dataset_split")
        if test_file is not None:
            name, given = self.training
            known = set(map(os.path.realpath, paths_of(given, name)))
            if same := [path for path in paths_of(test_file, "test_file") if os.path.realpath(path) in known]:
                raise InputError(f"test_file={same[0]} is also {name}")

    @property
    def training(self) -> tuple[str, Any]:
        """The argument of the training images, train_file or dataset_name, and its value."""
        if self.dataset_name is None:
            return "train_file", self.train_file
        return "dataset_name", self.dataset_name

    @property
    def hub_name(self) -> str | None:
        """The name of a dataset that is not a local folder."""
        name = None if self.dataset_name is None else os.fspath(self.dataset_name)
        return None if name is None or os.path.isdir(name) else name

    @property
    def columns(self) -> tuple[str | None, str | None]:
        """The columns of images and of classes."""
        return self.image_column, self.label_column

    def read_training(self, streaming: bool = False) -> dict[str, Any]:
        """The sets of the training files or of the local folder; see `read_files`."""
        name, given = self.training
        return read_files(paths_of(given, name), name, self.dataset_config, *self.columns, streaming=streaming)

    def read_test(self, train_classes: Sequence[str], streaming: bool = False) -> Any:
        """The set of the test files."""
        paths = paths_of(self.test_file, "test_file")
        return _test_of(read_files(paths, "test_file", None, *self.columns, train_classes, streaming))


def find_images(source: ImageSource) -> dict[str, ImageRows]:
    """Find the images of a source.

    Returns:
        {"train": ...} and possibly "test" and "validation". Only the classes of the training images exist.

    Raises:
        InputError: An argument or the data is invalid, or a test class is not a training class.
    """
    dataset_split, test_split = source.dataset_split, source.test_split
    if source.hub_name is None:
        found = source.read_training()
    else:
        wanted = dict.fromkeys(filter(None, (dataset_split, test_split)))
        found = {split: read_hub(source.hub_name, source.dataset_config, split, *source.columns) for split in wanted}
    _check_distinct(found, dataset_split, test_split)
    sets = {"train": _select(found, dataset_split, "dataset_split")}
    if source.test_file is not None:
        sets["test"] = source.read_test(_names(sets["train"]))
    elif test_split is not None:
        sets["test"] = _select(found, test_split, "test_split")
    official = set(sets) - {"train"}
    return _with_common_classes(sets | _further(found, sets, dataset_split, test_split), official)


def _name_of(split: str, found: Collection[str]) -> str:
    """The name of a split among those of a folder, where training is train, and val is validation."""
    return split if split in found else SPLITS.get(split.lower(), split)


def _check_distinct(found: Collection[str], dataset_split: str, test_split: str | None) -> None:
    if test_split is not None and _name_of(test_split, found) == _name_of(dataset_split, found):
        raise InputError(f"test_split={test_split} is also dataset_split={dataset_split}")


def _test_of(found: Mapping[str, Any]) -> Any:
    """The set of test images among those of `test_file`: the split test, else validation, else the only one.

    Raises:
        InputError: It cannot be read.
    """
    one = found[next(split for split in ("test", "validation", *found) if split in found)]
    if isinstance(one, InputError):
        raise one
    return one


def _further(
    found: Mapping[str, Any], used: Collection[str], dataset_split: str, test_split: str | None
) -> dict[str, Any]:
    """The test and validation sets of a folder that are not used otherwise and can be read, if the training images are
    those, or parts, of the split train."""
    parts = {_name_of(part, found) for part in re.sub(r"\[[^]]*\]", "", dataset_split).split("+")}
    if parts != {"train"}:
        return {}
    used = {*used, *((_name_of(test_split, found),) if test_split else ())}
    rest = {split: found[split] for split in ("test", "validation") if split in found and split not in used}
    for split, one in rest.items():
        if isinstance(one, InputError):
            logger.warning("the %s set is not used: %s", split, one)
    return {split: one for split, one in rest.items() if not isinstance(one, InputError)}


def stream_images(source: ImageSource) -> dict[str, ImageStream]:
    """Streams of the images of a source. Only the start of the data is read.

    Returns:
        {"train": ...} and possibly "test" and "validation".

    Raises:
        InputError: An argument or the data is invalid.
    """
    dataset_split, test_split = source.dataset_split, source.test_split
    splits = {"train": ("dataset_split", dataset_split)}
    if test_split is not None:
        splits["test"] = ("test_split", test_split)
    found: dict[str, Any] = {}
    if source.hub_name is not None:
        streams = {
            kind: stream_hub(source.hub_name, source.dataset_config, split, *source.columns)
            for kind, (_, split) in splits.items()
        }
    else:
        found = source.read_training(streaming=True)
        _check_distinct(found, dataset_split, test_split)
        streams = {kind: _stream_of(found, split, argument) for kind, (argument, split) in splits.items()}
    if source.test_file is not None:
        streams["test"] = source.read_test(getattr(streams["train"].label, "names", ()), streaming=True)
    return streams | _further(found, streams, dataset_split, test_split)


def _stream_of(found: Mapping[str, Any], split: str, argument: str) -> ImageStream:
    """The stream of a split.

    Raises:
        InputError: There is no such split, or it cannot be read.
    """
    one = found.get(_name_of(split, found))
    if one is None:
        hint = "; a stream has no parts of splits" if "[" in split or "+" in split else ""
        raise InputError(f"{argument}={split}: no such split; there are {' '.join(found)}{hint}")
    if isinstance(one, InputError):
        raise one
    return one


def first_rows(
    count: int,
    train: ImageStream,
    test: ImageStream | None = None,
    validation: ImageStream | None = None,
    official: Collection[str] = (),
) -> dict[str, ImageRows]:
    """The first images of streams, in a shuffled order, as rows that are kept in the cache of `datasets`.

    Args:
        count: At most this number of images of each.
        train, test, validation: The streams.
        official: Those that arguments select; others without classes are not used.

    Returns:
        {"train": ...} and possibly "test" and "validation". Classes are those that occur in any of them.

    Raises:
        InputError: A stream cannot be read or contains no images.
    """
    streams = {"train": train, "test": test, "validation": validation}
    sets = {split: _first_set(one, count) for split, one in streams.items() if one is not None}
    for split in set(sets) - {"train"}:
        names = _names(sets[split])
        reason = "its images have no classes" if _names(sets["train"]) and not names else None
        known = getattr(train.label, "names", names)  # of other columns, only the classes at the start are known
        if unknown := [name for name in names if name not in known]:
            reason = f"{train.source} has no class {unknown[0]!r}"
        if reason is not None:
            message = f"{sets[split].source} cannot be the {split} set: {reason}"
            if split in official:
                raise InputError(message)
            logger.warning(message)
            del sets[split]
    if "test" not in sets and "validation" in sets:
        sets["test"] = sets.pop("validation")
    classes = _several(sorted_classes({name for one in sets.values() for name in _names(one)}), train.source)
    return {split: _as_rows(one, classes) for split, one in sets.items()}


def _first_set(stream: ImageStream, count: int) -> ImageSet:
    key = hash_of(stream.fingerprint or uuid.uuid4().hex, stream.changed, count, STREAM_BUFFER)
    rows = stream.rows.shuffle(seed=0, buffer_size=STREAM_BUFFER).take(count)
    features = IMAGE_FEATURES | ({} if stream.label is None else {"label": stream.label})
    read = partial(
        datasets.Dataset.from_generator,
        partial(iter, rows),
        features=datasets.Features(features),
        cache_dir=cache_folder(key),
        fingerprint=key,
    )
    with translate_dataset_errors(partial(explain, stream.source)):
        found = read_cached(read, cache_folder(key))
    label = None if stream.label is None else "label"
    return dataset_set(found, "image", label, stream.source, stream.folders, key)


# ---- sets


def _select(sets: Mapping[str, Any], split: str, argument: str) -> ImageSet:
    """A split, or parts of splits as `datasets` writes them: train[:80%], train+validation.

    Raises:
        InputError: There is no such split.
    """
    name = _name_of(split, sets)
    if isinstance(error := sets.get(name), InputError):
        raise error
    if name in sets:
        return sets[name]
    sets = {name: one for name, one in sets.items() if not isinstance(one, InputError)}
    try:
        found = ReadInstruction.from_spec(split).to_absolute({name: len(one.codes) for name, one in sets.items()})
    except (ValueError, AssertionError) as error:
        raise InputError(f"{argument}={split}: no such split; there are {' '.join(sets)}") from error
    names = list(dict.fromkeys(chain.from_iterable(sets[part.splitname].names for part in found)))
    rows, codes = [], []
    for part in found:
        one, chosen = sets[part.splitname], slice(part.from_, part.to)
        rows.append(one.rows.select(range(len(one.codes))[chosen]))
        codes.append(_recoded(one, names)[chosen])
    first = sets[found[0].splitname]
    folders = tuple(dict.fromkeys(chain.from_iterable(sets[part.splitname].folders for part in found)))
    key = hash_of(split, *(one.key for one in sets.values()))
    joined = rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)
    changed = max(one.changed for one in sets.values())
    return ImageSet(joined, np.concatenate(codes), names, f"{first.source} [{split}]", folders, key, changed=changed)


def _names(one: ImageSet) -> list[str]:
    """The names of the classes that occur."""
    return [one.names[i] for i in np.unique(one.codes) if i >= 0]


def _several(classes: tuple[str, ...], source: str) -> tuple[str, ...]:
    """The classes; () and a line in the log if there are fewer than two."""
    if len(classes) > 1:
        return classes
    only = f"one class only, {classes[0]!r}" if classes else "no classes"
    logger.warning("%s: the images have %s: scores that need classes are not computed", source, only)
    return ()


def _recoded(one: ImageSet, names: Sequence[str]) -> np.ndarray:
    """The classes as indices into other names; -1 for those that are not among them."""
    numbers = {name: i for i, name in enumerate(names)}
    lookup = np.array([*(numbers.get(name, -1) for name in one.names), -1], np.int64)
    return lookup[one.codes]


def _with_common_classes(sets: Mapping[str, ImageSet], official: set[str]) -> dict[str, ImageRows]:
    """The sets with the classes of the training images.

    Args:
        sets: train, and possibly test and validation.
        official: Those that arguments select; others without fitting classes are not used.

    Raises:
        InputError: A set that is selected has a class that the training images lack, or no classes.
    """
    train = sets["train"]
    classes = _several(sorted_classes(_names(train)), train.source)
    used = {"train": train}
    for split, one in sets.items():
        names = _names(one)
        unknown = [name for name in names if name not in classes] if classes else []
        reason = f"{train.source} has no class {unknown[0]!r}" if unknown else None
        if classes and not names:
            reason = "its images have no classes"
        if reason is None:
            used[split] = one
        elif split in official:
            raise InputError(f"{one.source} cannot be the {split} set: {reason}")
        else:
            logger.warning("%s is not used as the %s set: %s", one.source, split, reason)
    if "test" not in used and "validation" in used:
        used["test"] = used.pop("validation")
    return {split: _as_rows(one, classes) for split, one in used.items()}


def _as_rows(one: ImageSet, classes: tuple[str, ...]) -> ImageRows:
    labels = _recoded(one, classes)
    fingerprint = hash_of(one.key, one.changed, *classes, labels.tobytes())
    return ImageRows(one.rows, labels, classes, one.source, one.folders, fingerprint)
