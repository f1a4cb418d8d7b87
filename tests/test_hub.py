"""Pushing an encoder, to a server of the tests' own: what arrives, what opens, and every way it can fail."""

import hashlib
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import snapshot_download
from sentence_transformers import SentenceTransformer

from fmicl_text import ContrastiveModel, InputError, build_text_encoder
from fmicl_text.errors import one_line_errors
from fmicl_text.hub import HubError, files_to_push, main, push
from tests.conftest import sentences
from tests.hub_server import TOKEN, running_hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes")  # huggingface_hub's own


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process talks to, logged in."""
    constants = huggingface_hub.constants
    with running_hub() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def folder(bert_folder, tmp_path):
    """What a run leaves: an encoder, and much that is no part of it."""
    path = tmp_path / "run"
    model = ContrastiveModel(build_text_encoder(bert_folder, pooling="cls"), head="simcse")
    model.save_encoder(str(path), model.state_dict())
    model.save_training_only(str(path), model.state_dict())
    (path / "README.md").write_text("---\nlibrary_name: sentence-transformers\n---\n# Encoder\n")
    (path / "training_curve.png").write_bytes(b"\x89PNG")
    for name in ("results.json", "settings.yaml", "trainer_state.json", "optimizer.pt", "rng_state.pth", "train.txt"):
        (path / name).write_text(f"{tmp_path} private")
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "model.safetensors").write_bytes(b"no")
    return path


ENCODER_FILES = {
    "1_Pooling/config.json", "README.md", "config.json", "config_sentence_transformers.json", "model.safetensors",
    "modules.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json", "training_curve.png",
}  # fmt: skip


def digest(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_only_the_encoder_its_card_and_its_curve_would_go(folder):
    assert set(files_to_push(folder)) == ENCODER_FILES


def test_a_pushed_encoder_opens_with_the_same_vectors(hub, folder, tmp_path):
    url = push(folder, "user/encoder", private=True)
    assert "/user/encoder/commit/" in url and hub.private["user/encoder"]
    assert set(hub.repos["user/encoder"]["main"]) == ENCODER_FILES
    texts = sentences(6)
    here = SentenceTransformer(str(folder), device="cpu").encode(texts)
    fetched = snapshot_download("user/encoder", cache_dir=tmp_path / "cache")
    assert (SentenceTransformer(fetched, device="cpu").encode(texts) == here).all()
    opened = SentenceTransformer("user/encoder", device="cpu", cache_folder=str(tmp_path / "other"))
    assert (opened.encode(texts) == here).all() and opened[1].pooling_mode == "cls"


def test_a_revision_a_second_push_and_a_pull_request(hub, folder):
    push(folder, "encoder", revision="v2")
    assert set(hub.repos["user/encoder"]["v2"]) == ENCODER_FILES and hub.repos["user/encoder"]["main"] == {}
    (folder / "README.md").write_text("---\nlibrary_name: sentence-transformers\n---\n# Another\n")
    push(folder, "user/encoder", exist_ok=True)
    assert b"Another" in hub.repos["user/encoder"]["main"]["README.md"]
    url = push(folder, "user/encoder", create_pr=True)
    assert url.endswith("/discussions/1") and len(hub.pull_requests) == 1


FAILURES = [
    ({"repos/create": 401}, "not logged in, or the token has expired: hf auth login, or set HF_TOKEN"),
    ({"repos/create": 403}, "no right to write there, or the token is for reading only"),
    ({"repos/create": 500}, "the Hub answered 500, it may be back in a while"),
    ({"preupload": 503}, "the Hub answered 503, it may be back in a while"),
    ({"blob": "close"}, "the connection failed"),
    ({"commit": "close"}, "the connection failed"),
    ({"commit": 403}, "no right to write there"),
    ({"commit": 429}, "the Hub answered 429"),
]


@pytest.mark.parametrize("fail, message", FAILURES, ids=str)
def test_a_failed_push_is_one_line_and_the_folder_stays(hub, folder, fail, message):
    before = digest(folder)
    hub.fail = fail
    with pytest.raises(HubError) as error:
        push(folder, "user/encoder", private=True)
    said = str(error.value)
    assert "user/encoder: " in said and message in said and "\n" not in said
    assert f"to try again: python -m fmicl_text.hub push {folder} user/encoder --exist_ok --private" in said
    assert TOKEN not in said and digest(folder) == before
    hub.fail = {}
    push(folder, "user/encoder", exist_ok=True)  # what the command does
    assert set(hub.repos["user/encoder"]["main"]) == ENCODER_FILES


def test_no_connection_at_all(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="user/encoder: the connection failed"):
        push(folder, "user/encoder")


def test_a_repository_that_exists_is_left_alone(hub, folder):
    push(folder, "user/encoder")
    with pytest.raises(HubError, match="it exists already: add --exist_ok to commit on top of it, or choose another"):
        push(folder, "user/encoder")


def test_no_token(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match="not logged in, or the token has expired"):
        push(folder, "user/encoder")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["a/b/c", "user/../x", "-x", "user/name.git", "übung", ""])
def test_names_that_are_not_allowed(hub, folder, name):
    with pytest.raises(InputError, match="is no name of a repository") as error:
        push(folder, name)
    assert "\n" not in str(error.value) and hub.requests == []


SENTENCE = "A sentence that was trained on and that nobody may read."


def plant_token(folder):
    (folder / "config.json").write_text('{"token": "' + TOKEN + '"}')


def plant_path(folder):
    (folder / "tokenizer_config.json").write_text(f'{{"name_or_path": "{folder}"}}')


def plant_home(folder):
    (folder / "README.md").write_text(f"trained on {Path.home()}/texts")


def plant_link(folder):
    (folder.parent / "secret.json").write_text("{}")
    (folder / "vocab.txt").symlink_to(folder.parent / "secret.json")


def plant_module(folder):
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "../other", "type": "x"}]')


PLANTED = {
    plant_token: "holds what looks like a Hub token: not pushed",
    plant_path: "names a folder of this machine",
    plant_home: "names a folder of this machine",
    plant_link: "is a link that leads out of",
    plant_module: "names '../other', which is no folder within",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_what_must_not_be_public_is_not(hub, folder, plant):
    plant(folder)
    with pytest.raises(InputError, match=PLANTED[plant]):
        push(folder, "user/encoder")
    assert hub.requests == []


def test_no_encoder(tmp_path):
    with pytest.raises(InputError, match="holds no encoder"):
        files_to_push(tmp_path)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fmicl_text.hub", *map(str, arguments)])
    with one_line_errors("fmicl_text.hub"):
        main()


def test_the_command(hub, folder, monkeypatch, capsys):
    command(monkeypatch, "push", folder, "user/encoder", "--dry-run")
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert set(listed) == ENCODER_FILES and hub.requests == []
    command(monkeypatch, "push", folder, "user/encoder", "--private")
    assert "/user/encoder/commit/" in capsys.readouterr().out and hub.private["user/encoder"]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "push", folder, "user/encoder")
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("fmicl_text.hub: error: user/encoder: it exists")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "push", folder / "absent", "user/encoder")
    assert stop.value.code == 2 and "absent is no folder" in capsys.readouterr().err
