"""Shared fixtures. Tests use no network, and one thread, because rounding depends on the number of threads."""

import gc
import os
import re

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import time

import huggingface_hub
import pytest
import torch

from tests.hub_server import TOKEN, running_hub
from tests.support import SAVING, make_trainer, tiny_bert, trained

torch.set_num_threads(1)  # for the fixtures of modules and sessions, which are set up before one_thread


def pytest_addoption(parser):
    parser.addoption("--one-case", action="store_true", help="run each parametrized test with one set of parameters")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    if config.option.one_case:
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        chosen = set(first.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


def pytest_configure(config):
    """Hide GPUs, except from `pytest -m gpu`: rounding differs, and tests fork processes, which cannot use CUDA."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish():
    # accelerate collects garbage at the start of every training: 0.3 s if it looks at all imported modules
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def no_dropout_folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert-no-dropout"), dropout=0.0)


@pytest.fixture
def hub(monkeypatch):
    """A local Hub server that this process uses and is logged in to."""
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


@pytest.fixture(scope="module")
def finished_run(bert_folder, tmp_path_factory):
    """The trainer of an uninterrupted run of 8 steps."""
    return trained(make_trainer(bert_folder, tmp_path_factory.mktemp("finished"), **SAVING))
