"""Upload a trained encoder to the Hub."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from fmicl_text.errors import InputError

logger = logging.getLogger(__name__)

NAMES = ("README.md", "training_curve.png", "modules.json", "vocab.txt", "merges.txt")
SUFFIXES = (".json", ".safetensors", ".model")  # .model: of sentencepiece
OURS = (  # of those, what describes a run and not an encoder
    "manifest.json",
    "results.json",
    "trainer_state.json",
    "training_only.safetensors",
    "optimizer.safetensors",
)
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
REASONS = {
    401: "not logged in, or the token has expired: hf auth login, or set HF_TOKEN",
    403: "no right to write there, or the token is for reading only",
    404: "there is no such repository, or no right to see it",
    409: "it exists already: add --exist_ok to commit on top of it, or choose another name",
}


class HubError(InputError):
    """A push that failed: says why, and the command that tries again. The local folder is as it was."""


def files_to_push(folder: Path) -> list[str]:
    """Names relative to the folder, sorted, of the encoder's files, its card, curve and .eval_results.

    Raises:
        InputError: The folder holds no encoder, or a file that must not be public: a token or a path of this machine in
            it, or a link that leads out of the folder.
    """
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds no encoder (config.json and *.safetensors)")
    places = [folder, *(folder / name for name in module_folders(folder))]
    found = [path for place in places for path in place.iterdir() if path.is_file() and is_public(path.name)]
    found += (folder / ".eval_results").glob("*.yaml")
    for path in found:
        check_public(path, folder)
    return sorted(path.relative_to(folder).as_posix() for path in found)


def module_folders(folder: Path) -> list[str]:
    """Folders of a SentenceTransformer's modules beside the first, which lies in the folder itself."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        names = [str(module["path"]) for module in modules if module["path"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'modules.json'}: not a list of modules ({error})") from error
    for name in names:
        if ".." in PurePosixPath(name).parts or not (folder / name).is_dir():
            raise InputError(f"{folder / 'modules.json'} names {name!r}, which is no folder within")
    return names


def is_public(name: str) -> bool:
    """Whether a file of this name belongs to an encoder."""
    return name not in OURS and (name in NAMES or name.endswith(SUFFIXES))


def check_public(path: Path, folder: Path) -> None:
    """InputError for a link out of the folder, and for a token or a path of this machine in a text."""
    root = folder.resolve()
    if not path.resolve().is_relative_to(root):
        raise InputError(f"{path} is a link that leads out of {folder}: not pushed")
    if path.suffix in (".safetensors", ".model", ".png"):
        return
    content = path.read_bytes()
    if TOKEN.search(content):
        raise InputError(f"{path} holds what looks like a Hub token: not pushed")
    for private in {str(root), str(Path.home()), str(Path.cwd())} - {"/"}:
        if private.encode() in content:
            raise InputError(f"{path} names a folder of this machine, {private}: not pushed")


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
    """Upload an encoder's folder in one commit, and return where it can be seen.

    Args:
        folder: What a recipe left, or a checkpoint.
        repo_id: `name` or `owner/name`.
        message: Of the commit.
        private: Of a repository that is made here.
        revision: A branch, made if need be.
        create_pr: Open a pull request instead.
        exist_ok: Whether the repository may exist already.
        token: By default that of `hf auth login` or HF_TOKEN.

    Raises:
        InputError: A folder or a name that cannot be pushed.
        HubError: The Hub could not be reached, or refused.
    """
    files = files_to_push(folder)
    repo_id = create_repository(repo_id, private, exist_ok or create_pr, folder, token)
    with one_line(f"{repo_id}", retry_command(folder, repo_id, private, revision, create_pr)):
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
    """Make a model repository, and return its whole name.

    Raises:
        InputError: A name that the Hub does not allow, or no token.
        HubError: The Hub could not be reached, or refused.
    """
    check_repo_id(repo_id)
    if token is None and get_token() is None:
        raise HubError(f"{repo_id}: {REASONS[401]}")
    with one_line(repo_id, retry_command(folder, repo_id, private) if folder else None):
        return str(HfApi(token=token).create_repo(repo_id, private=private, exist_ok=exist_ok).repo_id)


def check_repo_id(repo_id: str) -> None:
    """InputError for a name that the Hub does not allow."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no name of a repository: {' '.join(str(error).split())}") from error


class one_line:
    """Turns what the Hub, or the way to it, raises into a `HubError`."""

    def __init__(self, repo_id: str, retry: str | None) -> None:
        self.repo_id, self.retry = repo_id, retry

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):  # what an upload in a thread raises of what stopped it
            error = error.__cause__
        if not isinstance(error, HTTPError | OSError):
            return
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if status in REASONS:
            reason = REASONS[status]
        elif status >= 500:
            reason = f"the Hub answered {status}, it may be back in a while"
        elif status:
            reason = f"the Hub answered {status}: {' '.join(str(error).split())[:200]}"
        else:
            reason = f"the connection failed ({' '.join(str(error).split())[:200] or type(error).__name__})"
        again = f"; nothing local has changed, to try again: {self.retry}" if self.retry else ""
        raise HubError(f"{self.repo_id}: {reason}{again}") from error


class BackgroundPush:
    """Pushes of checkpoints while training goes on, one at a time. One that fails is a warning, no more."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.running: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a push is under way."""
        return self.running is not None and not self.running.done()

    def start(self, folder: Path, repo_id: str, **options: Any) -> None:
        """Push what the folder holds now: of a copy, since a checkpoint may be removed meanwhile. Waits for the push
        before."""
        self.wait()
        copy = tempfile.TemporaryDirectory()
        try:
            for name in files_to_push(folder):
                (Path(copy.name) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, Path(copy.name) / name)
        except (OSError, InputError) as error:
            logger.warning("%s was not pushed, training goes on: %s", folder, error)
            copy.cleanup()
            return
        self.running = self.thread.submit(self.run, folder, copy, repo_id, options)

    def run(self, folder: Path, copy: tempfile.TemporaryDirectory[str], repo_id: str, options: dict[str, Any]) -> None:
        """In the thread."""
        with copy:
            try:
                push(Path(copy.name), repo_id, **options)
            except InputError as error:
                reason = str(error).partition("; nothing local")[0]
                logger.warning("%s was not pushed, training goes on: %s", folder, reason)

    def wait(self) -> None:
        """Until the push under way has ended."""
        if self.running is not None:
            self.running.result()


def retry_command(
    folder: Path, repo_id: str, private: bool | None = None, revision: str | None = None, create_pr: bool = False
) -> str:
    """What pushes the folder again."""
    flags = [" --private"] * bool(private) + [f" --revision {revision}"] * bool(revision) + [" --create_pr"] * create_pr
    return f"fmicl-text push {folder} {repo_id} --exist_ok{''.join(flags)}"
