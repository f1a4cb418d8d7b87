"""The same examples in every run: no random seed, no time limit, no memory of earlier failures."""

import gc
import shutil
from pathlib import Path

import datasets
import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.internal.conjecture import providers

set_hypothesis_home_dir(Path(__file__).parents[2] / ".pytest_cache" / "hypothesis")  # not beside the code
settings.register_profile("same", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def no_constants_from_elsewhere():
    """Hypothesis draws some from the modules that happen to be loaded, which differ between a run of one file and a run
    of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "_get_local_constants", providers.Constants)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    """Of hundreds of data sets of a few rows."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For a module's files and the cache of data sets; removed at its end."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder
    gc.collect()
    shutil.rmtree(folder)
