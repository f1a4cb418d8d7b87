"""Who may write into an output folder: the table in tests/README.md, one test per cell, and its siblings."""

import json
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from fmicl_text.evaluation.bootstrap import bootstrap_difference
from fmicl_text.files import WORK_DIR
from fmicl_text.training.output_dir import create_folder, lock_folder, unlock_folder
from tests.support import recipe_flags, tree, write_recipe_data

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "simcse_fmicl.py"

OPTIONS = {
    "none": [],
    "auto": ["--resume_from_checkpoint", "auto"],
    "path": ["--resume_from_checkpoint", "PATH"],
    "auto, changed": ["--resume_from_checkpoint", "auto", "--gamma", "3"],
    "overwrite": ["--overwrite_output_dir"],
    "overwrite, changed": ["--overwrite_output_dir", "--gamma", "3"],
}
# For each content: the outcome of each of OPTIONS. `error` leaves every byte as it was, and creates nothing.
TABLE = {
    "nothing": "trains trains resumes trains trains trains",
    "foreign files": "trains trains resumes trains trains trains",
    "a folder named checkpoint-7 of the user's": "error trains resumes trains trains trains",
    "a settings.yaml of the user's": "error error error error error error",
    "a model": "error error error error trains trains",
    "a finished run without checkpoints": "error done done error trains trains",
    "a finished run with checkpoints": "error done done error trains trains",
    "an unfinished run": "error resumes resumes resumes trains trains",
    "a read-only folder": "error error error error error error",
    "a folder that another process trains into": "error error error error error error",
}
MINE = {"notes.txt": "mine", "unfinished/work.txt": "mine", ".lock": "mine"}
KEPT = [*(Path(name).name for name in MINE), "data.txt"]
CELLS = [
    pytest.param(content, options, outcome, linked, marks=[pytest.mark.slow] if linked else [])
    for linked in (False, True)
    for content, outcomes in TABLE.items()
    for options, outcome in zip(OPTIONS, outcomes.split(), strict=True)
]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few draws for the verdict, and no plot: these take half of the time of a run."""
    monkeypatch.setattr("fmicl_text.training.verdict.bootstrap_difference", partial(bootstrap_difference, resamples=9))
    monkeypatch.setattr("fmicl_text.cli.recipe.plot_training_curve", lambda history, path, *_: path.write_bytes(b"png"))


@pytest.fixture(scope="module")
def material(tmp_path_factory, bert_folder):
    """A folder with data, and with the output of three runs of two steps."""
    folder = tmp_path_factory.mktemp("material")
    write_recipe_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(folder, bert_folder, patch, "checkpoints")
        run(folder, bert_folder, patch, "no_checkpoints", "--save_strategy", "no", "--load_best_model_at_end", "False")
    shutil.copytree(folder / "checkpoints", folder / "unfinished")
    for path in (folder / "unfinished").iterdir():
        if path.name != "checkpoint-1":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def run(folder, model, monkeypatch, output_dir, *flags):
    """Run the text recipe in this process for two steps; returns the exit status."""
    usual = [*recipe_flags(model), "--use_cpu", "True", "--max_steps", "2", "--eval_steps", "1", "--save_steps", "1"]
    argv = [str(RECIPE), *map(str, usual), "--disable_tqdm", "True", "--output_dir", str(output_dir), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def make(content, place, material):
    """Create an output folder with a content; returns additional flags, and files that must stay in any case."""
    sources = {
        "a finished run without checkpoints": "no_checkpoints",
        "a finished run with checkpoints": "checkpoints",
        "an unfinished run": "unfinished",
    }
    if content in sources:
        shutil.copytree(material / sources[content], place)
    elif content != "nothing":
        place.mkdir()
    if content in ("foreign files", *sources):
        for name, text in MINE.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(text)
    if content == "a settings.yaml of the user's":
        (place / "settings.yaml").write_text("# mine\ngamma: 2\n")
    if content == "a folder named checkpoint-7 of the user's":
        (place / "checkpoint-7").mkdir()
        (place / "checkpoint-7" / "data.txt").write_text("mine")
    if content == "a model":
        (place / "config.json").write_text("{}")
        (place / "model.safetensors").write_text("weights")
    return ["--save_strategy", "no", "--load_best_model_at_end", "False"] if "without" in content else []


@pytest.mark.filterwarnings("ignore:resuming is not exact")
@pytest.mark.parametrize("content, options, outcome, linked", CELLS)
def test_a_cell(content, options, outcome, linked, material, bert_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(material)
    place = tmp_path / "folder" if linked else tmp_path / "out"
    if content == "a read-only folder":
        place = Path("/sys/kernel")
        if not place.is_dir():
            pytest.skip("no file system that is always read-only")
        flags = []
    else:
        flags = make(content, place, material)
    if linked:
        (tmp_path / "out").symlink_to(place)
    checkpoint = place / "checkpoint-1"
    checkpoint = checkpoint if checkpoint.is_dir() else material / "unfinished" / "checkpoint-1"
    flags += [str(checkpoint) if flag == "PATH" else flag for flag in OPTIONS[options]]
    out = place if content == "a read-only folder" and not linked else tmp_path / "out"
    if "another process" in content:
        create_folder(place, WORK_DIR)
    lock = lock_folder(place) if "another process" in content else None
    before = tree(tmp_path)
    status = run(material, bert_folder, monkeypatch, out, *flags)
    printed = capfd.readouterr()
    after = tree(tmp_path)
    if lock is not None:
        unlock_folder(lock)
    assert out.is_symlink() == linked
    if outcome in ("error", "done"):
        assert after == before
    if outcome == "error":
        (line,) = [line for line in printed.err.splitlines() if "error:" in line]
        assert status == 2 and str(out) in line
        return
    assert status == 0, printed.err
    assert ("nothing to do" in printed.out) == (outcome == "done")
    kept = {name: content for name, content in before.items() if Path(name).name in KEPT}
    assert kept.items() <= after.items()
    results = json.loads((place / "results.json").read_text())
    assert results["hyperparameters"]["gamma"] == (3.0 if "changed" in options else 2.0)
    assert (out / "modules.json").is_file() and not (place / ".fmicl_text" / "unfinished").exists()


def test_the_table_is_in_the_documentation():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    lines = text.partition("## Output folders")[2].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    documented = {row[0]: " ".join(cell.partition(",")[0] for cell in row[1:]) for row in rows}
    assert {name: documented.get(name) for name in TABLE} == TABLE


@pytest.mark.slow
def test_a_finished_image_run_is_not_replaced(tmp_path, monkeypatch, capfd):
    """The image recipe saves no checkpoints by default."""
    recipe = ROOT / "recipes" / "vision_fmicl.py"
    flags = [
        "--max_steps",
        "1",
        "--max_train_samples",
        "64",
        "--per_device_train_batch_size",
        "32",
        "--use_cpu",
        "True",
    ]

    def status(*more):
        monkeypatch.setattr(sys, "argv", [str(recipe), *flags, "--output_dir", str(tmp_path / "out"), *more])
        try:
            runpy.run_path(str(recipe), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return 0

    auto = ["--resume_from_checkpoint", "auto"]
    assert status(*auto) == 0
    before = tree(tmp_path)
    for more in ([], [*auto, "--gamma", "3"], [*auto, "--seed", "7"], [*auto, "--image_size", "12"]):
        assert status(*more) == 2, more
    for more in ([], ["--logging_steps", "3"], ["--save_steps", "7"], ["--report-to", "none"]):
        assert status(*auto, *more) == 0, more
    assert tree(tmp_path) == before and "nothing to do" in capfd.readouterr().out
