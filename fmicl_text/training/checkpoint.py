"""Checkpoint folders on disk: atomic, with a manifest of sizes and hashes, validated before they are used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sized
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fmicl_text.errors import InputError
from fmicl_text.files import WORK_DIR, read_json, sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # {format, run: the resume signature, files: {name: {bytes, sha256}}}
UNFINISHED = f"{WORK_DIR}/unfinished"  # folder of incomplete files in an output folder; deleted at the next start
FORMATS = (1, 2)  # of the manifest; 2: more entries in the resume signature
STATE = "trainer_state.json"
LATEST = ("true", "auto")  # auto starts from scratch if there is no checkpoint


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name; -1 if it has none."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint folders in an output folder, by step. A folder without manifest and state is not a checkpoint."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(path) >= 0]
    found = [path for path in found if (path / MANIFEST).is_file() or (path / STATE).is_file()]
    return sorted(found, key=step_of)


def write_manifest(folder: Path, run: Mapping[str, Any]) -> None:
    """Flush every file of a folder to disk, then write the manifest. A folder without one is not a checkpoint.

    Args:
        folder: A complete checkpoint.
        run: The resume signature of its run.
    """
    files = {}
    manifest = folder / MANIFEST
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != manifest):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest.write_text(
        json.dumps({"format": FORMATS[-1], "run": dict(run), "files": files}, indent=1), encoding="utf-8"
    )
    for path in (manifest, folder):
        sync(path)


def move_into_place(folder: Path, place: Path) -> None:
    """Rename a folder with a manifest to its place. A checkpoint that is already there is removed; anything else is
    renamed."""
    if wrote_checkpoint(place):
        remove_checkpoint(place)
    elif place.exists():
        names = (place.with_name(f"{place.name}.old{i or ''}") for i in count())
        kept = next(path for path in names if not path.exists())
        logger.warning("%s was not written by this program; it is now %s", place, kept)
        place.rename(kept)
    folder.rename(place)
    sync(place.parent)


def wrote_checkpoint(checkpoint: Path) -> bool:
    """Whether a folder has a manifest, as every checkpoint of this package has. Nothing else is ever deleted."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.keys() >= {"format", "files"}


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that an interrupted deletion leaves no partial checkpoint."""
    trash = checkpoint.parent / UNFINISHED / f"removed-{checkpoint.name}"
    trash.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(trash, ignore_errors=True)
    checkpoint.rename(trash)
    if trash.is_symlink() or trash.is_file():
        trash.unlink()
    else:
        shutil.rmtree(trash)


def validate_checkpoint(checkpoint: Path) -> str | None:
    """A description of the first problem of a checkpoint; None if every file matches the manifest."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        files, run, number = manifest["files"], dict(manifest["run"]), manifest.get("format")
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} has changed"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # also other JSON
        return f"its {MANIFEST} cannot be read"
    if STATE not in files:
        return f"{STATE} is missing"
    if number not in FORMATS:
        return f"its {MANIFEST} has format {number}, which this version of fmicl_text does not know"
    return None if run else f"its {MANIFEST} does not describe its run"


def find_checkpoint(
    output_dir: Path, resume_from: str | bool | None, validate: bool = True
) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from.

    Args:
        output_dir: The folder with a run's checkpoints.
        resume_from: None or `false` for no checkpoint; a checkpoint folder; `true` or `auto` for the latest valid one
            in `output_dir`. With `auto`, a folder without any checkpoint gives None.
        validate: Whether all files are read and compared with the manifest. Without, any checkpoint counts as valid.

    Returns:
        The checkpoint, and one line for each later checkpoint that was skipped because it is corrupted.

    Raises:
        InputError: There is no checkpoint, or no valid one.
    """
    wanted = str(resume_from).lower()
    if resume_from is None or wanted == "false":
        return None, []
    if wanted not in LATEST:
        if not (Path(str(resume_from)) / STATE).is_file():
            raise InputError(f"resume_from_checkpoint={resume_from}: not a checkpoint (no {STATE})")
        if validate and (problem := validate_checkpoint(Path(str(resume_from)))):
            raise InputError(f"resume_from_checkpoint={resume_from}: the checkpoint is corrupted: {problem}")
        return Path(str(resume_from)), []
    skipped: list[str] = []
    for checkpoint in reversed(checkpoints_in(output_dir)):
        if not validate or (problem := validate_checkpoint(checkpoint)) is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint} is corrupted and was skipped: {problem}")
    if skipped:
        raise InputError(f"resume_from_checkpoint={resume_from}: no valid checkpoint; {'; '.join(skipped)}")
    if wanted == "auto":
        return None, []
    raise InputError(f"resume_from_checkpoint={resume_from}: {output_dir} contains no checkpoint")


def latest_valid_checkpoint(output_dir: Path) -> Path | None:
    """The latest valid checkpoint, for messages."""
    return next((path for path in reversed(checkpoints_in(output_dir)) if validate_checkpoint(path) is None), None)


def saved_run(checkpoint: Path) -> dict[str, Any]:
    """The resume signature of the run that wrote a checkpoint."""
    return dict(read_json(checkpoint / MANIFEST)["run"])


def stopped_early(state: TrainerState) -> bool:
    """Whether early stopping had ended the run that was saved in this state."""
    callbacks: Any = state.stateful_callbacks
    stopped = callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
    return bool(stopped) and state.global_step < state.max_steps


def dataset_fingerprint(rows: Any) -> str | None:
    """The fingerprint of training data: a hash of all rows of a `datasets.Dataset`, else the result of the method
    `fingerprint`, else the number of rows; None for a stream of unknown content."""
    if isinstance(rows, datasets.Dataset):
        digest = hashlib.sha256(pa.schema(list(rows.features.arrow_schema)).serialize())  # without the metadata
        for table in rows.with_format("arrow").iter(batch_size=10_000):
            plain = table.replace_schema_metadata(None).combine_chunks()
            for batch in plain.take(pa.array(range(len(plain)))).to_batches():  # copies only the rows of a slice
                digest.update(batch.serialize())
        return digest.hexdigest()
    if hasattr(rows, "fingerprint"):
        return None if (found := rows.fingerprint()) is None else str(found)
    return f"{len(rows)} rows" if isinstance(rows, Sized) else None
