"""Opening files of text: format, compression, encoding, and errors that name the file."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from fmicl_text.errors import InputError
from fmicl_text.files import is_disk_full
from fmicl_text.text.columns import no_text

FORMATS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
COMPRESSIONS: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.input_stream(path, compression="zstd"),
}
ACCEPTED = ".txt, .csv, .tsv, .json or .jsonl (also as .gz, .bz2, .xz or .zst), .parquet or .arrow"
BINARY = (".parquet", ".arrow")
_CONTENTS = {  # first bytes of files that are not text
    b"version https://git-lfs": "a Git LFS pointer: get the file with `git lfs pull`",
    b"<!DOCTYPE html": "a web page",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<HTML": "a web page",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"%PDF-": "a PDF document",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "compressed (gzip)",
    b"BZh91AY": "compressed (bzip2)",
    b"\xfd7zXZ\0": "compressed (xz)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
}


@dataclass(frozen=True)
class TextFile:
    """A file and how it is read.

    Args:
        path: The file.
        suffix: Its format, one of `FORMATS`.
        kinds: The type of each column, as in `columns.select_columns`.
        separator: Between the cells of a .csv or .tsv file.
        skip: Number of lines before the header.
        names: The columns to read, or None for those that `columns.select_columns` selects.
    """

    path: str
    suffix: str
    kinds: Mapping[str, str] = field(default_factory=dict)
    separator: str = ""
    skip: int = 0
    names: tuple[str, ...] | None = None

    @property
    def quoted(self) -> bool:
        """Whether double quotes enclose cells."""
        return self.suffix == ".csv" or self.separator != "\t"


def suffix_of(path: str) -> str | None:
    """The suffix that specifies the format, .txt for both a.txt and a.txt.gz; None if it is not supported."""
    suffixes = Path(path.lower()).suffixes
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    suffix = "".join(suffixes[-2:-1] if compressed else suffixes[-1:])
    return suffix if suffix in FORMATS and not (compressed and suffix in BINARY) else None


@contextmanager
def reading(file: TextFile) -> Iterator[None]:
    """Within this context, errors of reading are raised as `InputError` with the name of the file."""
    try:
        yield
    except (InputError, Warning):  # a Warning is raised where filters turn warnings into errors
        raise
    except Exception as error:  # for invalid files, any type
        if is_disk_full(error):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise fault(file, " ".join(reason.split())[:300]) from error


def fault(file: TextFile, reason: str) -> InputError:
    return InputError(f"{file.path} cannot be read as {file.suffix}: {reason}")


def open_text(file: TextFile, newline: str | None = None) -> io.TextIOWrapper:
    """The decompressed text. Bytes that are not UTF-8 become surrogates, so that only the cells that are used are
    checked, and the error has their line."""
    opener = COMPRESSIONS.get(Path(file.path.lower()).suffix, partial(open, mode="rb"))
    with opener(file.path) as binary:
        beginning = binary.read(64)
    start = beginning[:4]
    if not start:
        raise no_text(file.path)
    check_content(file, beginning)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or re.fullmatch(rb"[\t -~]\0[\t -~]\0|\0[\t -~]\0[\t -~]", start):
        shown = f" (byte 0x{start[0]:02x})" if start[0] >= 0xFE else ""
        raise fault(file, f"line 1 is not UTF-8{shown} but UTF-16: save it as UTF-8")
    return io.TextIOWrapper(opener(file.path), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def check_content(file: TextFile, start: bytes) -> None:
    """Raise `InputError` if a file of another kind is named as a file of text."""
    start = start.removeprefix(b"\xef\xbb\xbf")
    if kind := next((kind for sign, kind in _CONTENTS.items() if start.startswith(sign)), None):
        raise fault(file, f"it is {kind}")


def not_utf8(text: str) -> str | None:
    """Why a text cannot be encoded, if it cannot."""
    found = re.search("[\ud800-\udfff]", text)
    if found is None:
        return None
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # from surrogateescape
        return f"is not UTF-8 (byte 0x{code - 0xDC00:02x})"
    return f"has one half of a surrogate pair (\\u{code:x}), which is not a character"
