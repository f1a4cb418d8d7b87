"""The disk: how much a run will write, and what it says when there is no room."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from fmicl_text import InputError
from fmicl_text.evaluation.plots import plot_training_curve
from fmicl_text.files import DISK_FULL, is_disk_full, write_atomic
from fmicl_text.text.data import load_training_text
from fmicl_text.text.tokenization import tokenize_dataset
from fmicl_text.training.checkpoint import checkpoints_in
from tests.programs import run_program
from tests.support import (
    SAVING,
    make_family_trainer,
    make_trainer,
    one_fast,
    peft_or_skip,
    recipe_flags,
    sentences,
    write_recipe_data,
)

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "Adam": {},
    "SGD": {"optim": "sgd"},
    "model only": {"save_only_model": True},
    "LoRA": {"lora_rank": 2},
    "Adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("name", one_fast(SETTINGS))
def test_the_room_asked_for_is_what_a_checkpoint_takes(bert_folder, tmp_path, name):
    if name == "LoRA":
        peft_or_skip()
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1} | SETTINGS[name]
    trainer = make_family_trainer(bert_folder, "mean", tmp_path, **settings)
    encoder, checkpoint = trainer.checkpointer.sizes()
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    (saved,) = checkpoints_in(tmp_path)
    weights = sum(path.stat().st_size for path in (tmp_path / "final").glob("*.safetensors"))
    tensors = sum(path.stat().st_size for path in saved.iterdir() if path.suffix in (".safetensors", ".pt"))
    assert 0.9 < encoder / weights < 1.2
    assert 0.9 * (tensors - 40_000) < checkpoint < 1.2 * tensors  # torch's archives have some overhead per tensor


@pytest.mark.slow
def test_a_disk_without_room_may_be_overridden(bert_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000})())
    for settings in (SAVING, {"max_steps": 1}):
        with pytest.raises(InputError, match=r"check_disk_space=False"):
            make_trainer(bert_folder, tmp_path, **settings).train()
        assert list(tmp_path.iterdir()) == []
    make_trainer(bert_folder, tmp_path, **SAVING, check_disk_space=False).train()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, DISK_FULL),
        OSError(122, "Disk quota exceeded"),
        Exception(f"{DISK_FULL} (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    ],
    ids=str,
)
def test_a_full_disk_is_known(error):
    assert is_disk_full(error)
    wrapped = ValueError("generating failed")
    wrapped.__cause__ = error
    assert is_disk_full(wrapped) and not is_disk_full(ValueError("another")) and not is_disk_full(None)


def test_a_tokenizer_that_cannot_be_written(bert_folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise Exception(f"{DISK_FULL} (os error 28)")

    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    monkeypatch.setattr(SentenceTransformer, "save", full)
    with pytest.raises(InputError, match=rf"checkpoint-2 could not be written: {DISK_FULL}"):
        trainer.train()
    with pytest.raises(InputError, match=rf"final could not be written: {DISK_FULL}"):
        trainer.save_model(str(tmp_path / "final"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_atomic_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, DISK_FULL)

    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=DISK_FULL):
        write_atomic(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of a few MiB."""
    mounted = []

    def make(mebibytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={int(1024 * mebibytes)}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_cache_that_is_full(small_disk, tmp_path, bert_folder, monkeypatch):
    disk = small_disk(1)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", disk)
    path = tmp_path / "train.txt"
    path.write_text("\n".join(f"{line} {i}" for i, line in enumerate(sentences(40) * 1000)))
    with pytest.raises(InputError, match=rf"{DISK_FULL}: .*{disk}.*HF_DATASETS_CACHE"):
        load_training_text(str(path))
    path.write_text("\n".join(f"{line} {i}" for i, line in enumerate(sentences(40) * 100)))
    data = load_training_text(str(path))
    (disk / "filler").write_bytes(b"0" * (shutil.disk_usage(disk).free - 40_000))
    tokenizer = SentenceTransformer(bert_folder, device="cpu").tokenizer
    before = sorted(path for path in disk.rglob("*") if path.is_file())
    with pytest.raises(InputError, match=DISK_FULL):
        tokenize_dataset(data.dataset, tokenizer, data.columns, 32)
    assert sorted(path for path in disk.rglob("*") if path.is_file()) == before


@pytest.mark.slow
@pytest.mark.parametrize("mebibytes", [0.2, 0.4, 0.8, 1, 2])
def test_a_recipe_on_a_disk_that_fills_up(small_disk, bert_folder, tmp_path, mebibytes):
    """One line at any of these sizes, of which only the last has room for all files, and nothing unfinished is left."""
    disk = small_disk(mebibytes)
    write_recipe_data(tmp_path)
    flags = [*recipe_flags(bert_folder), "--use_cpu", "True", "--max_steps", "6", "--save_total_limit", "9"]
    flags += ["--check_disk_space", "False", "--output_dir", str(disk / "out"), "--disable_tqdm", "True"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = run_program(ROOT / "recipes" / "simcse_fmicl.py", *flags, cwd=tmp_path, env=environment)
    assert done.returncode == (0 if mebibytes == 2 else 2), done.stderr
    if done.returncode:
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
        assert DISK_FULL in line
    assert not list(disk.glob("out/.fmicl_text/*/*")), done.stderr


def test_a_plot_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")

    def full(figure, place, **options):
        Path(place).write_bytes(b"part")
        raise OSError(28, DISK_FULL)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match=DISK_FULL):
        plot_training_curve([{"step": 1, "loss": 1.0}], path, "title")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
