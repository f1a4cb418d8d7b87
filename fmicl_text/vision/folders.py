"""Folders of images: their files, and the classes and splits that the names of subfolders give."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import xxhash

from fmicl_text.errors import InputError

# Suffixes of the formats that `decoding` opens.
IMAGE_SUFFIXES = (
    *(".bmp", ".dib", ".gif", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    *(".png", ".apng", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".tif", ".tiff", ".webp"),
)
TABLE_SUFFIXES = (".parquet", ".arrow")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
# Folders of operating systems, archives and storage devices; hidden ones are ignored too.
_IGNORED = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__")


@dataclass
class ImageFolder:
    """The images in a folder and in its subfolders.

    Args:
        path: The folder.
        images: Names of the images directly in it, sorted.
        folders: Subfolders, sorted by name, by their names.
        tables, metadata: Names of the .parquet and .arrow files, and of the tables of metadata, directly in it.
        others: Number of further files here and below, and one of them.
        total: Number of images here and below.
        digest: A hash of the name, size and modification time of each image directly in it.
        changed: When an image here or below was last written, renamed or replaced, in nanoseconds. Unlike the
            modification time, `cp -p`, rsync and tar do not set it.
    """

    path: str
    images: list[str] = field(default_factory=list)
    folders: dict[str, ImageFolder] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    others: tuple[int, str] = (0, "")
    total: int = 0
    digest: str = ""
    changed: int = 0

    def walk(self) -> Iterator[ImageFolder]:
        """This folder and all below it, in a fixed order."""
        yield self
        for one in self.folders.values():
            yield from one.walk()

    def paths(self) -> Iterator[str]:
        """The paths of all images, in a fixed order."""
        for one in self.walk():
            yield from (os.path.join(one.path, name) for name in one.images)

    def fingerprint(self) -> str:
        """A hash of the path, size and modification time of every image."""
        digest = xxhash.xxh3_128()
        for one in self.walk():
            if one.images:
                digest.update(f"{one.path}\0{one.digest}\0".encode())
        return digest.hexdigest()


def read_folder(path: str, argument: str) -> ImageFolder:
    """List a folder, in one pass. Links are followed, except to folders that contain them.

    Args:
        path: The folder.
        argument: The argument that names it, which begins the messages.

    Raises:
        InputError: A folder cannot be read, or the name of an image is not UTF-8.
    """
    top = os.path.abspath(path)
    parents, folder = set(), os.path.realpath(top)
    while folder != (folder := os.path.dirname(folder)):
        parents.add(_identity(folder))
    try:
        return _read(top, f"{argument}={path}", frozenset(parents))
    except OSError as error:
        raise InputError(f"{argument}={path}: {error.filename} cannot be read: {error.strerror}") from error


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _read(path: str, source: str, parents: frozenset[tuple[int, int]]) -> ImageFolder:
    """`ImageFolder` of a folder.

    Args:
        parents: Identities of the folders that contain it, which links may not lead back to.
    """
    with os.scandir(path) as listed:
        entries = sorted((entry for entry in listed if _is_visible(entry.name)), key=lambda entry: entry.name)
    folder, digest, inside = ImageFolder(path), xxhash.xxh3_128(), parents | {_identity(path)}
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():  # the method raises for links in a circle
            if not (entry.is_symlink() and _identity(entry.path) in inside):
                below = folder.folders[entry.name] = _read(entry.path, source, inside)
                folder.total += below.total
                folder.changed = max(folder.changed, below.changed)
                folder.others = folder.others[0] + below.others[0], folder.others[1] or below.others[1]
        elif suffix in IMAGE_SUFFIXES and (entry.is_symlink() or entry.is_file()):
            _check_name(entry.path, source)
            folder.images.append(entry.name)
            size, modified, changed = _size_and_times(entry)
            digest.update(f"{entry.name}\0{size, modified}\0".encode())
            folder.changed = max(folder.changed, changed)
        elif entry.name in METADATA:
            folder.metadata.append(entry.name)
        elif suffix in TABLE_SUFFIXES and os.path.isfile(entry) and not entry.name.startswith("cache-"):
            folder.tables.append(entry.name)
        else:
            folder.others = folder.others[0] + 1, folder.others[1] or entry.path
    folder.total += len(folder.images)
    folder.digest = digest.hexdigest()
    return folder


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in _IGNORED


def _check_name(path: str, source: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{source}: the path {os.fsencode(path)!r} is not UTF-8: rename it") from error


def _size_and_times(entry: os.DirEntry[str]) -> tuple[int, int, int]:
    try:
        found = entry.stat()
    except OSError:  # a link to a missing file, which is skipped with the other unreadable images
        return -1, -1, 0
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def without_wrappers(folder: ImageFolder, classes: Collection[str] = ()) -> ImageFolder:
    """The folder below those that contain one subfolder with images and nothing else, as in unpacked archives.

    Args:
        classes: Names of subfolders that are classes, even if they are the only subfolder.
    """
    while not folder.images and len(found := with_images(folder)) == 1 and found.keys().isdisjoint(classes):
        folder = next(iter(found.values()))
    return folder


def with_images(folder: ImageFolder) -> dict[str, ImageFolder]:
    """The subfolders that contain images, at any depth."""
    return {name: one for name, one in folder.folders.items() if one.total}


def split_folders(folder: ImageFolder, source: str) -> dict[str, ImageFolder]:
    """The folder of each split, if all subfolders with images have names of splits, one of them of a training split;
    else the folder is the training split.

    Raises:
        InputError: Two subfolders are the same split, or there are other subfolders beside splits with equal classes.
    """
    found = with_images(folder)
    names = {name: SPLITS.get(name.lower()) for name in found}
    if "train" not in names.values() or None in names.values():
        classes = {name: set(with_images(without_wrappers(found[name]))) for name, split in names.items() if split}
        for name, others in classes.items():
            train = next((one for one in classes if names[one] == "train" and one != name), None)
            if train is not None and len(classes[train] & others) > 1:
                extra = next(one for one, split in names.items() if split is None)
                raise InputError(
                    f"{source}: {train} and {name} are folders of the same classes, but {extra} is no split: pass "
                    f"train_file={found[train].path} and test_file={found[name].path}"
                )
        return {"train": folder}
    splits: dict[str, ImageFolder] = {}
    for name, split in names.items():
        if str(split) in splits:
            first = os.path.basename(splits[str(split)].path)
            raise InputError(f"{source}: {first} and {name} are both folders of the split {split}")
        splits[str(split)] = found[name]
    return splits


def classes_of(folder: ImageFolder) -> Iterator[tuple[str | None, ImageFolder]]:
    """(class, folder): the class of the images in a folder is the name of the subfolder of the first level that
    contains it; None for the images beside these subfolders."""
    yield None, ImageFolder(folder.path, folder.images, total=len(folder.images), digest=folder.digest)
    yield from with_images(folder).items()
