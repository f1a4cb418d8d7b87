"""Upload a trained encoder to the Hub."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from fmicl_text.errors import InputError
from fmicl_text.files import read_json

logger = logging.getLogger(__name__)

PUBLIC_NAMES = ("README.md", "training_curve.png", "modules.json", "vocab.txt", "merges.txt")
PUBLIC_SUFFIXES = (".json", ".safetensors", ".model")  # .model: sentencepiece
RUN_FILES = (  # of those, files that describe a run and not an encoder
    "manifest.json",
    "results.json",
    "trainer_state.json",
    "training_only.safetensors",
    "optimizer.safetensors",
)
NOT_PUSHED = "%s was not pushed; training continues: %s"
TOKEN_PATTERN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
STATUS_REASONS = {
    401: "not logged in, or the token has expired; run hf auth login or set HF_TOKEN",
    403: "no write access, or a read-only token",
    404: "the repository does not exist, or the token has no access to it",
    409: "the repository exists; pass exist_ok to commit to it, or choose another name",
}


class HubError(InputError):
    """An upload that failed. The message gives the reason and a command to retry; no local file has changed.

    Args:
        reason: What failed and why.
        retry: The command to retry, if any.
    """

    def __init__(self, reason: str, retry: str | None = None) -> None:
        super().__init__(f"{reason}; no local file has changed. To retry: {retry}" if retry else reason)
        self.reason = reason


def files_to_push(folder: Path) -> list[str]:
    """Sorted names, relative to the folder, of the encoder's files, its model card, training curve and .eval_results.

    Raises:
        InputError: The folder contains no encoder, or a file that must not become public: one that contains a token or
            a local path, or a link to a place outside the folder.
    """
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise InputError(f"{folder} contains no encoder (config.json and *.safetensors)")
    places = [folder, *(folder / name for name in module_folders(folder))]
    found = [path for place in places for path in place.iterdir() if path.is_file() and is_public(path.name)]
    found += (folder / ".eval_results").glob("*.yaml")
    for path in found:
        check_public(path, folder)
    return sorted(path.relative_to(folder).as_posix() for path in found)


def module_folders(folder: Path) -> list[str]:
    """Folders of a SentenceTransformer's modules, except the first, which is in the folder itself."""
    try:
        modules = read_json(folder / "modules.json")
        names = [str(module["path"]) for module in modules if module["path"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'modules.json'}: not a list of modules ({error})") from error
    for name in names:
        if ".." in PurePosixPath(name).parts or not (folder / name).is_dir():
            raise InputError(f"{folder / 'modules.json'} names {name!r}, which is not a subfolder of {folder}")
    return names


def is_public(name: str) -> bool:
    """Whether a file of this name belongs to an encoder."""
    return name not in RUN_FILES and (name in PUBLIC_NAMES or name.endswith(PUBLIC_SUFFIXES))


def check_public(path: Path, folder: Path) -> None:
    """Raise `InputError` for a link to a place outside the folder, or a text that contains a token or a local path."""
    root = folder.resolve()
    if not path.resolve().is_relative_to(root):
        raise InputError(f"{path} is a symbolic link that points outside {folder}; not pushed")
    if path.suffix in (".safetensors", ".model", ".png"):
        return
    content = path.read_bytes()
    if TOKEN_PATTERN.search(content):
        raise InputError(f"{path} seems to contain a Hub token; not pushed")
    for private in {str(root), str(Path.home()), str(Path.cwd())} - {"/"}:
        if private.encode() in content:
            raise InputError(f"{path} contains the local path {private}; not pushed")


def push(
    folder: Path,
    repo_id: str,
    message: str = "Upload encoder",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    exist_ok: bool = False,
    token: str | None = None,
) -> str:
    """Upload an encoder in one commit.

    Args:
        folder: Output folder of a recipe, or a checkpoint.
        repo_id: `name` or `owner/name`.
        message: Commit message.
        private: Create the repository as private.
        revision: Branch to push to, created if missing.
        create_pr: Open a pull request instead.
        exist_ok: Do not fail if the repository exists.
        token: By default the token of `hf auth login` or HF_TOKEN.

    Returns:
        URL of the commit or the pull request.

    Raises:
        InputError: The folder or the repository name is not valid.
        HubError: The Hub could not be reached or rejected the upload.
    """
    files = files_to_push(folder)
    repo_id = create_repository(repo_id, private, exist_ok or create_pr, folder, token)
    with translate_hub_errors(repo_id, retry_command(folder, repo_id, private, revision, create_pr)):
        api = HfApi(token=token)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in files]
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=None if create_pr else revision, create_pr=create_pr
        )
    return str(commit.pr_url or commit.commit_url)


def create_repository(
    repo_id: str, private: bool | None, exist_ok: bool, folder: Path | None = None, token: str | None = None
) -> str:
    """Create a model repository, and return its full name.

    Raises:
        InputError: The name is not valid.
        HubError: There is no token, or the Hub could not be reached or rejected the request.
    """
    check_repo_id(repo_id)
    if token is None and get_token() is None:
        raise HubError(f"{repo_id}: {STATUS_REASONS[401]}")
    with translate_hub_errors(repo_id, retry_command(folder, repo_id, private) if folder else None):
        return str(HfApi(token=token).create_repo(repo_id, private=private, exist_ok=exist_ok).repo_id)


def check_repo_id(repo_id: str) -> None:
    """Raise `InputError` for a name that is not valid on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not a valid repository name: {' '.join(str(error).split())}") from error


@contextmanager
def translate_hub_errors(repo_id: str, retry: str | None) -> Iterator[None]:
    """Convert errors of the Hub, and of the connection to it, into a `HubError`."""
    try:
        yield
    except (HTTPError, OSError) as error:
        raise HubError(f"{repo_id}: {reason_of(error)}", retry) from error
    except RuntimeError as error:  # raised from the error in an upload thread
        if not isinstance(error.__cause__, HTTPError | OSError):
            raise
        raise HubError(f"{repo_id}: {reason_of(error.__cause__)}", retry) from error.__cause__


def reason_of(error: Exception) -> str:
    """One line for an error of the Hub or of the connection."""
    words = " ".join(str(error).split())[:200]
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if status in STATUS_REASONS:
        return STATUS_REASONS[status]
    if status >= 500:
        return f"the Hub returned {status}, try again later"
    return f"the Hub returned {status}: {words}" if status else f"connection failed ({words or type(error).__name__})"


class BackgroundPush:
    """Pushes checkpoints during training, one at a time. A failed push only logs a warning."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(1)
        self.running: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a push is in progress."""
        return self.running is not None and not self.running.done()

    def start(self, folder: Path, repo_id: str, **options: Any) -> None:
        """Push a copy of the folder, because the folder may be removed meanwhile. Waits for the previous push."""
        self.wait()
        copy = tempfile.TemporaryDirectory()
        try:
            for name in files_to_push(folder):
                (Path(copy.name) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, Path(copy.name) / name)
        except (OSError, InputError) as error:
            logger.warning(NOT_PUSHED, folder, error)
            copy.cleanup()
            return
        self.running = self.executor.submit(self.run, folder, copy, repo_id, options)

    def run(self, folder: Path, copy: tempfile.TemporaryDirectory[str], repo_id: str, options: dict[str, Any]) -> None:
        """Push the copy, in the worker thread. The warning omits the retry command, because the copy is removed."""
        with copy:
            try:
                push(Path(copy.name), repo_id, **options)
            except HubError as error:
                logger.warning(NOT_PUSHED, folder, error.reason)
            except InputError as error:
                logger.warning(NOT_PUSHED, folder, error)

    def wait(self) -> None:
        """Wait for the push in progress."""
        if self.running is not None:
            self.running.result()


def retry_command(
    folder: Path, repo_id: str, private: bool | None = None, revision: str | None = None, create_pr: bool = False
) -> str:
    """The command that pushes the folder again."""
    revision_flag = f" --revision {shlex.quote(revision)}" if revision else ""
    flags = [" --private"] * bool(private) + [revision_flag] + [" --create_pr"] * create_pr
    return f"fmicl-text push {shlex.quote(str(folder))} {shlex.quote(repo_id)} --exist_ok{''.join(flags)}"
