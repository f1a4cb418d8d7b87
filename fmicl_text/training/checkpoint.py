"""Checkpoint folders that are whole or not there: written beside, moved into place, checked before they are trusted;
and what a run's data are known by."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fmicl_text.errors import InputError
from fmicl_text.files import sync

MANIFEST = "manifest.json"  # {format, run: what must be the same to go on, files: {name: {bytes, sha256}}}
UNFINISHED = "unfinished"  # folder beside the checkpoints; what a killed run leaves in it is worth nothing
STATE = "trainer_state.json"
NEWEST = ("true", "auto")  # auto starts afresh where there is none


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name; -1 if it has none."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint folders in an output folder, by step."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def seal(folder: Path, run: Mapping[str, Any]) -> None:
    """Put every file of a folder on the disk, and last the manifest, without which a folder is no checkpoint.

    Args:
        folder: Everything a checkpoint holds.
        run: What must be the same for a run that goes on from it.
    """
    files = {}
    manifest = folder / MANIFEST
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != manifest):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest.write_text(json.dumps({"format": 1, "run": dict(run), "files": files}, indent=1), encoding="utf-8")
    for path in (manifest, folder):
        sync(path)


def move_into_place(folder: Path, place: Path) -> None:
    """Rename a sealed folder to its place; a checkpoint that is there already is removed."""
    if place.exists():
        remove(place)
    folder.rename(place)
    sync(place.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; first its name, so that none of it passes for a checkpoint if that is cut short."""
    away = checkpoint.parent / UNFINISHED / f"removed-{checkpoint.name}"
    away.parent.mkdir(exist_ok=True)
    shutil.rmtree(away, ignore_errors=True)
    checkpoint.rename(away)
    if away.is_symlink() or away.is_file():
        away.unlink()
    else:
        shutil.rmtree(away)


def fault(checkpoint: Path) -> str | None:
    """The first thing that is wrong with a checkpoint; None if every file is what its manifest says."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files, _ = manifest["files"], dict(manifest["run"])
        for name, is_to_be in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != is_to_be["bytes"]:
                return f"{name} has {size} bytes, not {is_to_be['bytes']}"
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != is_to_be["sha256"]:
                    return f"{name} has changed"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # also what is JSON, but no manifest
        return f"its {MANIFEST} cannot be read"
    return None if STATE in files else f"{STATE} is missing"


def find_checkpoint(output_dir: Path, named: str | bool | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from.

    Args:
        output_dir: Where a run's checkpoints lie.
        named: None or `false` for none; a checkpoint folder; `true` or `auto` for the newest whole one in
            `output_dir`, of which `auto` does without where there is no checkpoint at all.

    Returns:
        It, and a line for each newer one that is damaged.

    Raises:
        InputError: There is none, or none that is whole.
    """
    wanted = str(named).lower()
    if named is None or wanted == "false":
        return None, []
    if wanted not in NEWEST:
        if not (Path(str(named)) / STATE).is_file():
            raise InputError(f"--resume_from_checkpoint {named}: no checkpoint, it has no {STATE}")
        if damage := fault(Path(str(named))):
            raise InputError(f"--resume_from_checkpoint {named}: the checkpoint is damaged, {damage}")
        return Path(str(named)), []
    skipped: list[str] = []
    for checkpoint in reversed(checkpoints_in(output_dir)):
        if (damage := fault(checkpoint)) is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint} is damaged and was passed over: {damage}")
    if skipped:
        raise InputError(f"--resume_from_checkpoint {named}: no whole checkpoint; {'; '.join(skipped)}")
    if wanted == "auto":
        return None, []
    raise InputError(f"--resume_from_checkpoint {named}: {output_dir} holds no checkpoint")


def latest_valid_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, for messages."""
    return next((path for path in reversed(checkpoints_in(output_dir)) if fault(path) is None), None)


def run_of(checkpoint: Path) -> dict[str, Any]:
    """What its manifest says of the run that wrote it."""
    return dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["run"])


def stopped_early(state: TrainerState) -> bool:
    """Whether a run that was saved in this state had been ended by early stopping."""
    callbacks: Any = state.stateful_callbacks
    said_stop = callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
    return bool(said_stop) and state.global_step < state.max_steps


def fingerprint(rows: Any) -> str | None:
    """A hash of all training data in an Arrow data set; of others what their method `fingerprint` says, or the number
    of rows; None of a stream, which has no end to look at."""
    if isinstance(rows, datasets.Dataset):
        digest = hashlib.sha256(pa.schema(list(rows.features.arrow_schema)).serialize())  # without the metadata
        for table in rows.with_format("arrow").iter(batch_size=10_000):
            plain = table.replace_schema_metadata(None).combine_chunks()
            for batch in plain.take(pa.array(range(len(plain)))).to_batches():  # without what a slice drags along
                digest.update(batch.serialize())
        return digest.hexdigest()
    if hasattr(rows, "fingerprint"):
        return str(rows.fingerprint())
    return f"{len(rows)} rows" if isinstance(rows, Sized) else None
