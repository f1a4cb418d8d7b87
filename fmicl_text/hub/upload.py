"""Upload a trained encoder to the Hub."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

from fmicl_text.errors import InputError
from fmicl_text.files import read_json
from fmicl_text.loading import NO_CODE, translate_loading_errors

logger = logging.getLogger(__name__)

PUBLIC_PATTERNS = (  # files of an encoder in the folder itself, besides those of its tokenizer
    *("README.md", "LICENSE*", "training_curve.png", "modules.json", "*config.json", "config_*.json", "*.index.json"),
    *("model.safetensors", "model-*.safetensors", "adapter_model*.safetensors"),
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "*.spm", "*.jinja"),
)
MODULE_PATTERNS = (*PUBLIC_PATTERNS, "*.json", "*.safetensors", "*.txt")  # in the folders of modules
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")
BINARY_SUFFIXES = (".safetensors", ".model", ".spm", *IMAGE_SUFFIXES[:-1])
PROBES = ["A man is eating food.", "Zwölf Vögel singen – 今日は晴れ, 42%!"]  # compared before an upload
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


def files_to_push(folder: Path, trust_remote_code: bool = False) -> list[str]:
    """Sorted names, relative to the folder, of the encoder's files, its model card with images, and .eval_results.

    The files of an encoder are weights, configs, what its tokenizer saves, the folders of its modules, and the Python
    code that its configs name. Records of the run, optimizers, heads and all other files stay.

    Args:
        folder: Output folder of a recipe, a checkpoint, or any folder of a SentenceTransformer or image encoder.
        trust_remote_code: Run the code of a custom tokenizer, to list its files.

    Raises:
        InputError: The folder contains no encoder, or a file that must not become public: one that contains a token or
            a local path, or a link to a place outside the folder.
    """
    found = set((folder / ".eval_results").glob("*.yaml")) | images_in_card(folder)
    for place in (folder, *module_folders(folder)):
        patterns = PUBLIC_PATTERNS if place == folder else MODULE_PATTERNS
        names = {path.name for path in place.iterdir() if any(path.match(pattern) for pattern in patterns)}
        names |= tokenizer_files(place, trust_remote_code) | code_files(place)
        found |= {place / name for name in names if (place / name).is_file()}
    if not any(path.suffix == ".safetensors" for path in found) or not any(path.suffix == ".json" for path in found):
        raise InputError(f"{folder} contains no encoder (config.json and *.safetensors)")
    for path in found:
        check_public(path, folder)
    return sorted(path.relative_to(folder).as_posix() for path in found)


def module_folders(folder: Path) -> list[Path]:
    """Folders of a SentenceTransformer's modules, except the first, which is in the folder itself; also those inside
    modules, such as the routes of a Router."""
    found = []
    for file, read in (("modules.json", lambda modules: [module["path"] for module in modules]),
                       ("router_config.json", lambda router: list(router["types"]))):  # fmt: skip
        try:
            names = [str(name) for name in read(read_json(folder / file)) if name]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / file}: not a list of modules ({error})") from error
        for name in names:
            if ".." in PurePosixPath(name).parts or not (folder / name).is_dir():
                raise InputError(f"{folder / file} names {name!r}, which is not a subfolder of {folder}")
            found += [folder / name, *module_folders(folder / name)]
    return found


def tokenizer_files(folder: Path, trust_remote_code: bool = False) -> set[str]:
    """Names of the files that the tokenizer in a folder saves or reads, such as bpe.codes; empty without a tokenizer.

    Raises:
        InputError: The tokenizer cannot be loaded, or requires custom code.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return set()
    with translate_loading_errors(f"{folder}: its tokenizer"), tempfile.TemporaryDirectory() as saved:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer.save_pretrained(saved)
        names = {path.relative_to(saved).as_posix() for path in Path(saved).rglob("*") if path.is_file()}
    return names | {name for name in tokenizer.vocab_files_names.values() if isinstance(name, str)}


def code_files(folder: Path) -> set[str]:
    """Names of the Python files of custom code that the configs in a folder name, and of those that they import."""
    references: list[Any] = []
    for path in (*folder.glob("*config.json"), *folder.glob("modules.json")):
        with translate_loading_errors(str(path)):
            content = read_json(path)
        if isinstance(content, dict):
            mapped = content.get("auto_map") or {}
            references += chain.from_iterable(
                value if isinstance(value, list) else [value] for value in mapped.values()
            )
        else:
            references += [module.get("type") for module in content]
    named = {folder / f"{str(reference).partition('.')[0]}.py" for reference in references if reference}
    files = [path for path in named if path.is_file()]
    files += [Path(imported) for path in files for imported in get_relative_import_files(path)]
    return {path.relative_to(folder).as_posix() for path in files}


def images_in_card(folder: Path) -> set[Path]:
    """Images in the folder that its model card shows."""
    if not (folder / "README.md").is_file():
        return set()
    text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    names = re.findall(r'!\[[^\]]*\]\(([^)\s]+)|<img[^>]+src="([^"]+)"', text)
    paths = [PurePosixPath(markdown or html) for markdown, html in names]
    inside = [folder / path for path in paths if not path.is_absolute() and ".." not in path.parts]
    return {path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()}


def check_public(path: Path, folder: Path) -> None:
    """Raise `InputError` for a link to a place outside the folder, or a text that contains a token or a local path."""
    root = folder.resolve()
    if not path.resolve().is_relative_to(root):
        raise InputError(f"{path} is a symbolic link that points outside {folder}; not pushed")
    if path.suffix in BINARY_SUFFIXES:
        return
    content = path.read_bytes()
    if TOKEN_PATTERN.search(content):
        raise InputError(f"{path} seems to contain a Hub token; not pushed")
    for private in {str(root), str(Path.home()), str(Path.cwd())} - {"/"}:
        if private.encode() in content:
            raise InputError(f"{path} contains the local path {private}; not pushed")
    if path.name.endswith("config.json") and isinstance(config := json.loads(content), dict):
        for key in (key for key in config if key.endswith("name_or_path")):  # the base model of an adapter, for example
            if isinstance(value := config[key], str) and value.startswith((".", "/", "~")) and os.path.exists(value):
                raise InputError(f"{path} contains the local path {value}; not pushed")


def check_opens(folder: Path, files: list[str], trust_remote_code: bool = False) -> None:
    """Open a copy of an encoder that consists of the files to upload, and compare its embeddings with the encoder's.

    Raises:
        InputError: The copy does not open, or its embeddings differ.
    """
    here = probe_embeddings(folder, str(folder), trust_remote_code)
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for file in files:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).symlink_to((folder / file).resolve())
        there = probe_embeddings(copy, f"{folder}: the {len(files)} files to upload do not open", trust_remote_code)
    if here.shape != there.shape or not torch.allclose(here, there, atol=1e-5, equal_nan=True):
        raise InputError(f"{folder}: an encoder of the {len(files)} files to upload has other embeddings; not pushed")


def probe_embeddings(folder: Path, source: str, trust_remote_code: bool) -> torch.Tensor:
    """Embeddings of two fixed inputs by the encoder in a folder, on the CPU. `source` begins an error's message."""
    with translate_loading_errors(source), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # weights that the files lack, such as an unused pooler
        if not (folder / "modules.json").is_file() and is_image_encoder(folder):
            from fmicl_text.vision.encoder import build_image_encoder  # opens stems that AutoModel does not

            image_encoder = build_image_encoder(str(folder), trust_remote_code=trust_remote_code).eval()
            size = getattr(image_encoder.backbone.config, "image_size", None) or 64
            height, width = size if isinstance(size, list | tuple) else (size, size)
            channels = image_encoder.num_channels
            pixels = torch.linspace(-1, 1, 2 * channels * height * width).reshape(2, channels, height, width)
            if (folder / "preprocessor_config.json").is_file():
                AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
            return image_encoder(pixels)
        encoder = SentenceTransformer(
            str(folder), device="cpu", trust_remote_code=trust_remote_code, model_kwargs={**NO_CODE}
        )
        return encoder.encode_document(PROBES, convert_to_tensor=True, show_progress_bar=False)


def is_image_encoder(folder: Path) -> bool:
    """Whether a folder contains an image encoder, if any: it has an image processor, or was saved by `ImageEncoder`."""
    if (folder / "preprocessor_config.json").is_file():
        return True
    return (folder / "config.json").is_file() and "image_pooling" in read_json(folder / "config.json")


def push(
    folder: Path,
    repo_id: str,
    message: str = "Upload encoder",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    exist_ok: bool = False,
    token: str | None = None,
    trust_remote_code: bool = False,
    check: bool = True,
) -> str:
    """Upload an encoder in one commit, after a copy of what is uploaded has been opened.

    Args:
        folder: Output folder of a recipe, or a checkpoint.
        repo_id: `name` or `owner/name`.
        message: Commit message.
        private: Create the repository as private.
        revision: Branch to push to, created if missing.
        create_pr: Open a pull request instead.
        exist_ok: Do not fail if the repository exists.
        token: By default the token of `hf auth login` or HF_TOKEN.
        trust_remote_code: Run custom code that belongs to the encoder, to open the copy.
        check: Open the copy; see `check_opens`.

    Returns:
        URL of the commit or the pull request.

    Raises:
        InputError: The folder or the repository name is not valid.
        HubError: The Hub could not be reached or rejected the upload.
    """
    files = files_to_push(folder, trust_remote_code)
    if check:
        check_opens(folder, files, trust_remote_code)
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
            for name in files_to_push(folder, options.get("trust_remote_code", False)):
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
                push(Path(copy.name), repo_id, check=False, **options)  # opening it would slow down training
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
