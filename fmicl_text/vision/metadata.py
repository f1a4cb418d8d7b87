"""Tables of metadata in folders of images, which give the classes, as `datasets` defines them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from fmicl_text.errors import InputError
from fmicl_text.vision import tables
from fmicl_text.vision.folders import ImageFolder


def read_metadata(
    folder: ImageFolder, image_column: str | None, label_column: str | None, source: str
) -> dict[str, str | None] | None:
    """The class of each image that the tables of metadata list, by path, as `datasets` defines them; None without
    tables with a label column.

    Raises:
        InputError: A table cannot be read, or names a file outside its folder.
    """
    found: dict[str, str | None] = {}
    has_classes = False
    for one in folder.walk():
        if len(one.metadata) > 1:
            raise InputError(f"{source}: {one.path} contains {' and '.join(one.metadata)}: leave one of them")
        for name in one.metadata:
            path = os.path.join(one.path, name)
            with tables.reading(path):
                rows = _metadata_table(path)
            features = {field.name: tables.feature_of(field, rows.schema.metadata) for field in rows.schema}
            files = _file_names(features, image_column, path)
            label = tables.label_column(features, label_column, files, path)
            if label is None:
                continue
            has_classes = True
            codes, names = tables.class_codes(rows[label], features[label], label, path)
            for row, file in enumerate(rows[files].to_pylist()):
                found[_inside(one.path, file, path)] = None if codes[row] < 0 else names[codes[row]]
    if not has_classes:
        for argument, value, allowed in (
            ("image_column", image_column, "image"),
            ("label_column", label_column, "label"),
        ):
            if value not in (None, allowed):
                raise InputError(
                    f"{argument}={value} does not apply to {source}: the folder has no table metadata.csv with classes"
                )
    return found if has_classes else None


def _metadata_table(path: str) -> pa.Table:
    with open(path, "rb") as file:
        if path.endswith(".csv"):
            convert = pyarrow.csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
            return pyarrow.csv.read_csv(file, convert_options=convert)
        return pyarrow.json.read_json(file) if path.endswith(".jsonl") else pq.read_table(file)


def _file_names(features: Mapping[str, Any], image_column: str | None, path: str) -> str:
    """The column of file names of a table of metadata."""
    found = [name for name in features if name == "file_name" or name.endswith("_file_name")]
    if image_column not in (None, "image"):
        found = [name for name in found if name == f"{image_column}_file_name"]
    if "file_name" in found:
        return "file_name"
    if len(found) != 1:
        reason = f"columns {' and '.join(found)} name files: select one" if found else "no column of file names"
        raise InputError(f"{path}: {reason} (file_name, or NAME_file_name for image_column=NAME)")
    return found[0]


def _inside(folder: str, name: Any, table: str) -> str:
    """The path of a file that a table in the same folder names.

    Raises:
        InputError: It is not in the folder.
    """
    path = os.path.normpath(str(name).replace("\\", "/"))
    if not isinstance(name, str) or "://" in name or os.path.isabs(path) or path.split("/")[0] in ("..", "."):
        raise InputError(f"{table}: Invalid metadata file_name {name!r}: it must be a path inside the folder")
    return os.path.join(folder, path)
