"""The output folder of a run: what it contains, whether a run may write into it, and the lock of the run that does.

All programs and the trainer use these functions. A run keeps its own working files in the subfolder `.fmicl_text`, and
replaces or deletes only what a run of this package wrote.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from filelock import BaseFileLock, FileLock, Timeout
from transformers import TrainingArguments

from fmicl_text.errors import InputError
from fmicl_text.files import WORK_DIR, content_hash, move_files, read_json
from fmicl_text.hub.model_card import CARD, wrote_card
from fmicl_text.hub.model_card import RESULTS_FOLDER as EVAL_RESULTS
from fmicl_text.loading import refuse_links
from fmicl_text.training.checkpoint import (
    UNFINISHED,
    checkpoints_in,
    find_checkpoint,
    remove_checkpoint,
    step_of,
    wrote_checkpoint,
)
from fmicl_text.training.ranks import on_main_process

RESULTS_FILE, SETTINGS_FILE, CURVE_FILE = "results.json", "settings.yaml", "training_curve.png"
SETTINGS_MARK = "# Settings of a run of fmicl_text."  # first line of settings.yaml
CURVE_MARK = b"fmicl_text"  # in the metadata of training_curve.png
LOCK_FILE = f"{WORK_DIR}/lock"
REPLACED = f"{WORK_DIR}/replaced"  # exists while a run with overwrite_output_dir has not replaced the old model
COMPLETE = f"{WORK_DIR}/complete"  # the final files of a run, moved to the output folder when all are written
OF_A_RECORD = {"objective", "settings", "versions", "log_history"}  # keys of results.json
MODEL_FILES = ("config.json", "modules.json")  # each marks a folder as a model
OF_A_MODEL = (  # patterns of other names that saving an encoder writes
    *("model*.safetensors", "model.safetensors.index.json", "config_sentence_transformers.json", "[0-9]_[A-Z]*"),
    *("sentence_*_config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer*.json", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


@dataclass
class Contents:
    """What an output folder contains.

    Attributes:
        results: Content of results.json of a finished run; None without one.
        checkpoints: Names of folders that look like checkpoints, including those of other programs.
        model: Files that mark the folder as a model.
        foreign: Names that a run would write to, but that no run of this package wrote.
    """

    results: dict[str, Any] | None = None
    checkpoints: list[str] = field(default_factory=list)
    model: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    @property
    def result(self) -> list[str]:
        """Names of files that training does not need again: results and a model."""
        return [*([] if self.results is None else [RESULTS_FILE]), *self.model]

    @property
    def run(self) -> list[str]:
        """Names of what a new run would overwrite."""
        return [*self.result, *self.checkpoints]


def resolve_output_dir(output_dir: Any) -> Path:
    """The folder of the `output_dir` argument, without symbolic links.

    Raises:
        InputError: The path is invalid, or belongs to a file.
    """
    try:
        folder = Path(str(output_dir)).resolve()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"output_dir={output_dir} is a file, not a folder")
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL character, a loop of links
        if isinstance(error, InputError):
            raise
        raise InputError(f"output_dir={output_dir}: {getattr(error, 'strerror', None) or error}") from error
    return folder


def read_contents(folder: Path) -> Contents:
    """What an output folder contains.

    Raises:
        OSError: The folder or one of its files cannot be read.
    """
    if not folder.is_dir():
        return Contents()
    names = sorted(os.listdir(folder))
    results = read_results(folder)
    checkpoints = [name for name in names if step_of(folder / name) >= 0]
    contents = Contents(results, checkpoints, [name for name in MODEL_FILES if name in names])
    if RESULTS_FILE in names and results is None:
        contents.foreign.append(RESULTS_FILE)
    if SETTINGS_FILE in names and not wrote_settings(folder / SETTINGS_FILE, results):
        contents.foreign.append(SETTINGS_FILE)
    if EVAL_RESULTS in names and results is None:
        contents.foreign.append(EVAL_RESULTS)
    if results and CARD in names and edited_card(folder / CARD, results):
        contents.foreign.append(CARD)
    if CURVE_FILE in names and results is None and CURVE_MARK not in read_start(folder / CURVE_FILE):
        contents.foreign.append(CURVE_FILE)
    if not contents.model:
        contents.foreign += [name for name in names if any(fnmatch(name, pattern) for pattern in OF_A_MODEL)]
    return contents


def read_start(path: Path) -> bytes:
    """The first bytes of a file; nothing for a folder."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(2048)


def read_results(folder: Path) -> dict[str, Any] | None:
    """The content of results.json, if a run of this package wrote it, or if it is an empty object."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        return None
    try:
        results = read_json(path)
    except ValueError:
        return None
    ours = isinstance(results, dict) and isinstance(results.get("settings"), dict) and results.keys() >= OF_A_RECORD
    return results if ours or results == {} else None


def edited_card(path: Path, results: Mapping[str, Any]) -> bool:
    """Whether a model card has changed since a run wrote it. Pushes write it again."""
    recorded, pushed = results.get("card"), results["settings"].get("push_to_hub")
    return bool(recorded and not pushed and wrote_card(path) and content_hash(path) != recorded)


def settings_text(settings: Mapping[str, Any]) -> str:
    """The text of settings.yaml."""
    return f"{SETTINGS_MARK}\n" + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def wrote_settings(path: Path, results: Mapping[str, Any] | None) -> bool:
    """Whether settings.yaml is as a run wrote it. A user may have added comments or changed values."""
    if not path.is_file():
        return False
    text = path.read_bytes()
    try:
        if text.startswith(SETTINGS_MARK.encode()):
            return text == settings_text(yaml.safe_load(text)).encode()
        return results is not None and text == settings_text(results.get("settings", {})).encode().partition(b"\n")[2]
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return False


def check_output_dir(
    output_dir: Any, resume_from: str | bool | None, overwrite: bool, finished: bool = False, validate: bool = True
) -> None:
    """Check that a run may write into its output folder. Nothing is written, except that an interrupted final save of
    an earlier run is completed.

    Args:
        output_dir: The folder, which may be missing or a symbolic link.
        resume_from: The argument `resume_from_checkpoint`.
        overwrite: The argument `overwrite_output_dir`.
        finished: Whether the folder contains the results of this very run.
        validate: Whether the files of the checkpoint are read and compared with its manifest.

    Raises:
        InputError: The run would overwrite something; the folder is not writable, or another process trains into it;
            the checkpoint to resume from is missing or corrupted; the folder contains symbolic links.
    """
    folder = resolve_output_dir(output_dir)
    try:
        contents = read_contents(folder)
        check_contents(contents, output_dir, resume_from, overwrite)
        if (folder / LOCK_FILE).is_file():
            unlock_folder(lock_folder(output_dir))
        place = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryFile(dir=place).close()  # permission bits do not cover root and read-only file systems
        if folder.is_dir():
            refuse_links(folder)
        checkpoint, _ = find_checkpoint(folder, None if finished else resume_from, validate)
    except OSError as error:
        raise InputError(f"output_dir={output_dir} is not readable and writable: {error.strerror}") from error
    own = checkpoint is not None and checkpoint.resolve().parent == folder and saved_model(folder, contents, checkpoint)
    if names_checkpoint(resume_from) and contents.result and not own and not finished:
        raise InputError(
            f"output_dir={output_dir} already contains {contents.result[0]}, and resume_from_checkpoint={resume_from} "
            "has no checkpoint of it: choose another folder, or pass overwrite_output_dir=True"
        )


def saved_model(folder: Path, contents: Contents, checkpoint: Path) -> bool:
    """Whether the model in an output folder, if there is one, is that of the run with a checkpoint: a finished run, an
    encoder that was saved, or one that the run was allowed to replace."""
    if not contents.model or contents.results is not None or (folder / REPLACED).is_file():
        return True
    names = [name for name in contents.model if (checkpoint / name).is_file()]
    return bool(names) and all(content_hash(folder / name) == content_hash(checkpoint / name) for name in names)


def check_contents(contents: Contents, output_dir: Any, resume_from: str | bool | None, overwrite: bool) -> None:
    """The part of `check_output_dir` that depends only on what the folder contains."""
    if contents.run and not names_checkpoint(resume_from) and not overwrite:
        how = "overwrite_output_dir=True" + (" or resume_from_checkpoint=auto" if contents.checkpoints else "")
        raise InputError(
            f"output_dir={output_dir} already contains {contents.run[0]}: choose another folder, or pass {how}"
        )
    if contents.foreign:
        raise InputError(
            f"output_dir={output_dir}: {contents.foreign[0]} would be replaced, but this program did not write it, or "
            "it was edited since: move it, or choose another folder"
        )


def names_checkpoint(resume_from: str | bool | None) -> bool:
    """Whether the argument `resume_from_checkpoint` asks for a checkpoint."""
    return resume_from is not None and str(resume_from).lower() != "false"


def lock_folder(output_dir: Any) -> BaseFileLock:
    """Lock an output folder in which a run has begun.

    Raises:
        InputError: Another process holds the lock, or the folder is not writable.
    """
    lock = FileLock(resolve_output_dir(output_dir) / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"output_dir={output_dir}: another process is training into it") from error
    except OSError as error:
        raise InputError(f"output_dir={output_dir} is not writable: {error.strerror}") from error
    return lock


def unlock_folder(lock: BaseFileLock) -> None:
    """Release a lock, and remove its file, and its folder if nothing else is in it."""
    Path(lock.lock_file).unlink(missing_ok=True)  # another process that has opened it notices, and opens a new one
    remove_empty([Path(lock.lock_file).parent])
    lock.release()


def complete_save(output_dir: Any) -> None:
    """Complete the final save of a run that was killed while it moved its files into the output folder, and delete the
    other unfinished files of a killed run.

    Raises:
        InputError: Another process is training into the folder, or it is not writable.
    """
    folder = resolve_output_dir(output_dir)
    if not (folder / COMPLETE).is_dir() and not (folder / UNFINISHED).is_dir():
        return
    refuse_links(folder)
    lock = lock_folder(output_dir)
    try:
        if (folder / COMPLETE).is_dir():
            (folder / REPLACED).unlink(missing_ok=True)
            move_files(folder / COMPLETE, folder)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    except OSError as error:
        raise InputError(f"output_dir={output_dir} is not writable: {error.strerror}") from error
    finally:
        unlock_folder(lock)


def clear_output_dir(folder: Path) -> None:
    """Remove checkpoints and results of the run in a folder, nothing else. Its model stays until it is replaced."""
    if any((folder / name).is_file() for name in MODEL_FILES):
        (folder / WORK_DIR).mkdir(exist_ok=True)
        (folder / REPLACED).touch()
    if read_results(folder) is not None:
        (folder / RESULTS_FILE).unlink()
    for checkpoint in checkpoints_in(folder):
        if wrote_checkpoint(checkpoint):
            remove_checkpoint(checkpoint)


def create_folder(output_dir: Any, subfolder: str = "") -> list[Path]:
    """Create an output folder, or a subfolder of it, with its parents.

    Returns:
        The folders that did not exist, deepest first.

    Raises:
        InputError: It cannot be created.
    """
    folder = resolve_output_dir(output_dir) / subfolder
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for last in (False, True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            break
        except OSError as error:
            # Another process may have made and removed it in between; see `remove_empty`.
            if last or not isinstance(error, FileExistsError | FileNotFoundError):
                raise InputError(f"output_dir={output_dir} is not writable: {error.strerror}") from error
    return missing


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove the folders that are empty, in this order."""
    for path in folders:
        with suppress(OSError):
            path.rmdir()


class OutputDir:
    """The output folder of one trainer.

    Attributes:
        held: Whether this process, or the main process for it, holds the lock.
        used: The folder, if the trainer has trained into it.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.args = args
        self.held = False
        self.used: Path | None = None
        self.lock: BaseFileLock | None = None  # in the main process

    @contextmanager
    def hold(self, resume_from: str | bool | None, check: bool = True) -> Iterator[None]:
        """Within this context, no other process trains into the folder. Nested contexts have no effect.

        Args:
            resume_from: The argument `resume_from_checkpoint`.
            check: Whether the content of the folder is checked, unless this trainer has trained into it.

        Raises:
            InputError: See `check_output_dir`.
        """
        if self.held:
            yield
            return
        PartialState().wait_for_everyone()  # another process may be removing the folder that its trainer made
        created = on_main_process(lambda: self.acquire(resume_from, check))
        self.held, self.used = True, resolve_output_dir(self.args.output_dir) if check else self.used
        failed = True
        try:
            yield
            failed = False
        finally:
            self.held = False
            if self.lock is not None:
                unlock_folder(self.lock)
                remove_empty(created if failed else [])

    def acquire(self, resume_from: str | bool | None, check: bool) -> list[Path]:
        """Check the folder, create it and lock it. Returns the folders that were created."""
        args: Any = self.args
        if check and self.used != resolve_output_dir(args.output_dir):
            complete_save(args.output_dir)
            # the checkpointer validates the checkpoint next
            check_output_dir(args.output_dir, resume_from, args.overwrite_output_dir, validate=False)
        created = create_folder(args.output_dir, WORK_DIR)
        try:
            self.lock = lock_folder(args.output_dir)
        except InputError:
            remove_empty(created)
            raise
        return created
