"""Settings of hypothesis: the same examples in every run, no time limit, no database of earlier failures."""

import gc
import shutil
from pathlib import Path

import datasets
import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.internal.conjecture import providers

set_hypothesis_home_dir(Path(__file__).parents[2] / ".pytest_cache" / "hypothesis")  # not in the source tree
settings.register_profile("same", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def no_constants_from_elsewhere():
    """Hypothesis also draws constants of the loaded modules, which differ between runs of one test file and of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "_get_local_constants", providers.Constants)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    """Hide the progress bars of hundreds of small datasets."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the files of a test module and for the cache of datasets, removed after the module."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder
    gc.collect()
    shutil.rmtree(folder)
