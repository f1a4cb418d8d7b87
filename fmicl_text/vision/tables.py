"""Tables of encoded images: .parquet and .arrow files, their columns, and the classes in a label column."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmicl_text.errors import InputError

logger = logging.getLogger(__name__)

# Names of columns, in any case, that are found without an argument.
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "class", "target", "fine_label", "category", "cls")
_ROWS_FORMAT = "1"  # increment when the rows change, so that cached rows of older versions are not reused
_BATCH_ROWS = 100


def image_column(features: Mapping[str, Any], name: str | None, source: str) -> str:
    """The column of encoded images: `name`, else `image` or `img`, else the only column of images.

    Args:
        features: The columns and their types.
        name: `image_column`, or None.
        source: File or dataset, which begins the messages.

    Raises:
        InputError: There is no such column, there are several, or it has another type.
    """
    if name is not None:
        _check_exists(features, name, "image_column", source)
        column = name
    else:
        images = [one for one, feature in features.items() if _is_image(feature)]
        named = [one for one in features if one.lower() in IMAGE_NAMES]
        found = [one for one in named if one in images] or images or named
        if len(found) != 1:
            which = f"columns {' and '.join(map(repr, found))} may be the images" if found else "no column of images"
            raise InputError(f"{source}: {which}: select one with image_column; its columns are {list(features)}")
        column = found[0]
    if not _is_image(feature := features[column]):
        reason = (
            "; paths and addresses in tables are not opened, because a table could reference any local file: pass the "
            "folder of the images"
        )
        kind = kind_of(feature)
        raise InputError(
            f"{source}: column {column!r} (image_column) must contain encoded images, got {kind}"
            + (reason if "string" in kind else "")
        )
    return column


def label_column(features: Mapping[str, Any], name: str | None, image: str, source: str) -> str | None:
    """The column of classes: `name`, else the only one of `LABEL_NAMES`, else the only ClassLabel; None without one.

    Raises:
        InputError: There is no column `name`, there are several candidates, or it has another type.
    """
    if name is not None:
        _check_exists(features, name, "label_column", source)
        found = [name]
    else:
        named = [one for one in features if one.lower() in LABEL_NAMES and one != image]
        found = [one for one in named if _is_label(features[one])] or named
        found = found or [one for one, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) > 1:
        raise InputError(
            f"{source}: columns {' and '.join(map(repr, found))} may be the classes: select one with label_column"
        )
    if found and not _is_label(features[found[0]]):
        raise not_classes(source, found[0], kind_of(features[found[0]]))
    if not found and (others := [one for one in features if one != image]):
        logger.warning("%s: none of the columns %s is known to be the classes (label_column)", source, others)
    return found[0] if found else None


def not_classes(source: str, column: str, got: str) -> InputError:
    """The error for a column whose values are not classes."""
    return InputError(f"{source}: column {column!r} (label_column) must contain integers or names, got {got}")


def _check_exists(features: Mapping[str, Any], name: str, argument: str, source: str) -> None:
    if name not in features:
        raise InputError(f"{source} has no column {name!r} ({argument}); its columns are {list(features)}")


def _is_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        types = {name: getattr(one, "dtype", "") for name, one in feature.items()}
        return types.get("bytes") in ("binary", "large_binary", "null")
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _is_label(feature: Any) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    kind = str(feature.dtype) if isinstance(feature, datasets.Value) else ""
    return re.fullmatch("u?int.*|float.*|bool|(large_)?string|null", kind) is not None


def are_comparable(one: Any, other: Any) -> bool:
    """Whether classes of two types are the same classes: the same ClassLabel, or both names, numbers or booleans."""
    if datasets.ClassLabel in (type(one), type(other)):
        return bool(one == other)
    groups = [re.sub("(large_)?string", "names", re.sub("(u?int|float).*", "number", kind_of(f))) for f in (one, other)]
    return groups[0] == groups[1]


def kind_of(feature: Any) -> str:
    """The type of a column, for messages: int64, string, List, ..."""
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def class_codes(column: pa.ChunkedArray, feature: Any, name: str, source: str) -> tuple[np.ndarray, list[str]]:
    """The class of every row, int64 [N], as an index into the returned names; -1 for rows without a class, whose cells
    are missing, blank or -1.

    Raises:
        InputError: A value is not a class.
    """
    encoded = column.dictionary_encode().unify_dictionaries()
    parts = [chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    values = encoded.chunk(0).dictionary.to_pylist() if parts else []
    names: dict[str, int] = {}
    lookup = np.full(len(values) + 1, -1, np.int64)  # the last one is that of missing cells
    for i, value in enumerate(values):
        if (one := _class_name(value, feature, name, source)) is not None:
            lookup[i] = names.setdefault(one, len(names))
    return lookup[np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64)], list(names)


def _class_name(value: Any, feature: Any, column: str, source: str) -> str | None:
    if isinstance(value, float):
        if value != value:
            return None
        if not value.is_integer():
            raise not_classes(source, column, f"{kind_of(feature)} such as {value}")
        value = int(value)
    if value in (None, -1) or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(feature, datasets.ClassLabel):
        if not 0 <= value < len(feature.names):
            raise not_classes(source, column, f"{value}, but it has {len(feature.names)} names")
        return str(feature.names[value])
    return str(value)


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Names in order, with the numbers in them by value: a2 before a10."""

    def key(name: str) -> tuple[list[tuple[bool, int, str, str]], str]:
        parts = [part for part in re.split("([0-9]+)", name) if part]
        return [
            (False, *by_value(part), part) if part[0] in "0123456789" else (True, 0, "", part) for part in parts
        ], name

    def by_value(number: str) -> tuple[int, str]:
        digits = number.lstrip("0")
        return len(digits), digits

    return tuple(sorted(names, key=key))


def file_features(path: str) -> dict[str, Any]:
    """The columns of a file and their types.

    Raises:
        InputError: It cannot be read.
    """
    with reading(path):
        schema = _open_parquet(path).schema_arrow if path.lower().endswith(".parquet") else _open_arrow(path).schema
    return {field.name: feature_of(field, schema.metadata) for field in schema}


def feature_of(field: pa.Field, metadata: Any) -> Any:
    kind = plain_type(field.type)
    try:
        return datasets.Features.from_arrow_schema(pa.schema([pa.field(field.name, kind)], metadata))[field.name]
    except (TypeError, ValueError, NotImplementedError):  # a type that `datasets` does not have
        return kind


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a column that is dictionary-encoded, or of views, as polars writes them."""
    if isinstance(kind, pa.DictionaryType):
        return plain_type(kind.value_type)
    if isinstance(kind, pa.StructType):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    return {pa.binary_view(): pa.large_binary(), pa.string_view(): pa.large_string()}.get(kind, kind)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Within this context, errors of reading a file are raised as `InputError` with its name."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{path} cannot be read: {' '.join(reason.split())[:300]}") from error


def _open_parquet(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(pa.OSFile(path))  # a path with :: would be taken for an address


def _open_arrow(path: str) -> Any:
    file = pa.OSFile(path)
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_stream(file)


def _batches(path: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if path.lower().endswith(".parquet"):
        yield from _open_parquet(path).iter_batches(_BATCH_ROWS, columns=list(columns))
        return
    reader = _open_arrow(path)
    if isinstance(reader, pa.RecordBatchFileReader):
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader


@dataclass
class ImageTablesConfig(datasets.BuilderConfig):
    """Identifies the rows in the cache.

    Args:
        content: A hash of the files and of the columns.
    """

    content: str = ""


class ImageTables(datasets.ArrowBasedBuilder):
    """Builds a dataset of the columns `image` and, if there is one, `label` of .parquet and .arrow files: in the cache,
    or streamed. It reads files whatever their names are; `datasets` takes [ and :: in a path for a pattern or address.

    Args:
        splits: The files of each split.
        image, label: Their columns.
        label_feature: Type of the label column.
        content: A hash of the files and of the columns.
        cache_dir: Folder of the cache.
    """

    BUILDER_CONFIG_CLASS = ImageTablesConfig

    def __init__(
        self,
        splits: Mapping[str, Sequence[str]],
        image: str,
        label: str | None,
        label_feature: Any,
        content: str,
        cache_dir: str | None,
    ) -> None:
        self.splits = {split: list(files) for split, files in splits.items()}
        self.names = {"image": image} | ({} if label is None else {"label": label})
        self.types = {"image": datasets.Image(decode=False)} | ({} if label is None else {"label": label_feature})
        super().__init__(cache_dir=cache_dir, hash=_ROWS_FORMAT, content=content)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=datasets.Features(self.types))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"files": files}) for split, files in self.splits.items()
        ]

    def _generate_tables(self, files: Sequence[str]) -> Iterator[tuple[Any, pa.Table]]:
        for number, file in enumerate(files):
            with reading(file):
                for batch, rows in enumerate(_batches(file, list(self.names.values()))):
                    yield datasets.builder.Key(number, batch), self._table(rows)

    def _table(self, rows: pa.RecordBatch) -> pa.Table:
        columns = {name: rows[column].cast(plain_type(rows[column].type)) for name, column in self.names.items()}
        columns["image"] = self.types["image"].cast_storage(columns["image"])
        if "label" in columns:
            columns["label"] = columns["label"].cast(self.info.features.arrow_schema.field("label").type)
        return pa.table(columns, self.info.features.arrow_schema)


def table_folder_files(names: Sequence[str], splits: Mapping[str, str], source: str) -> dict[str, list[str]]:
    """The files of each split of a folder of tables, by words in their names or in those of their subfolders
    (`train-00000-of-00002.parquet`); without such words, all are the training split.

    Args:
        names: Paths below the folder.
        splits: Words, and the split that each denotes.
        source: The folder, which begins the messages.

    Raises:
        InputError: Only some files belong to a split, or files have several formats.
    """
    if len(formats := sorted({os.path.splitext(name)[1].lower() for name in names})) > 1:
        raise InputError(f"{source} has files of several formats, {' and '.join(formats)}: pass those of one format")
    found: dict[str, list[str]] = {}
    for name in names:
        words = [splits[word] for word in re.split("[^a-z]+", os.path.splitext(name)[0].lower()) if word in splits]
        found.setdefault(words[0] if words else "", []).append(name)
    if len(found) > 1 and "" in found:
        raise InputError(f"{source}: by its name, {found[''][0]} is not in any split: pass the files")
    return {split or "train": files for split, files in found.items()}
