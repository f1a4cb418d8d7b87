"""Claiming the output folder."""

import json

import pytest
from filelock import FileLock, Timeout

from fmicl_text import FMICLTrainingArguments, InputError
from fmicl_text.cli.output_dir import (
    check_processes,
    claim_output_dir,
    clear_output_dir,
    is_finished,
    run_training,
    save_run,
)
from fmicl_text.errors import Interrupted
from tests.support import SAVING, Signal, make_trainer


def arguments(folder, **settings):
    return FMICLTrainingArguments(output_dir=str(folder), use_cpu=True, **settings)


def test_a_new_folder_is_made_and_an_unrelated_file_is_no_obstacle(tmp_path):
    claim_output_dir(arguments(tmp_path / "a" / "b"))
    (tmp_path / "a" / "b" / "notes.txt").write_text("mine")
    claim_output_dir(arguments(tmp_path / "a" / "b"))


@pytest.mark.parametrize("held", ["results.json", "modules.json", "config.json", "checkpoint-10"])
def test_what_a_run_would_overwrite_is_kept(tmp_path, held):
    (tmp_path / held).mkdir() if held.startswith("checkpoint") else (tmp_path / held).write_text("{}")
    with pytest.raises(InputError, match=f"already contains {held}.*--overwrite_output_dir"):
        claim_output_dir(arguments(tmp_path))
    with pytest.raises(InputError, match=f"already contains {held}"):
        claim_output_dir(arguments(tmp_path, resume_from_checkpoint="False"))
    assert (tmp_path / held).exists()
    if not held.startswith("checkpoint"):
        claim_output_dir(arguments(tmp_path, resume_from_checkpoint="auto"))
    assert (tmp_path / held).exists()


def test_a_checkpoint_that_is_not_there_or_damaged_is_told_of_at_once(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    for named, words in [
        ("auto", "auto: .*checkpoint-10 .*no manifest.json"),
        ("nope", "nope: .*no trainer_state.json"),
    ]:
        with pytest.raises(InputError, match=f"resume_from_checkpoint={words}"):
            claim_output_dir(arguments(tmp_path, resume_from_checkpoint=named))
    with pytest.raises(InputError, match=r"resume_from_checkpoint=True: .*empty contains no checkpoint"):
        claim_output_dir(arguments(tmp_path / "empty", resume_from_checkpoint="True"))
    claim_output_dir(arguments(tmp_path / "empty", resume_from_checkpoint="auto"))


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(InputError, match=r"--output_dir .*another"):
        claim_output_dir(arguments(tmp_path))


def test_the_folder_is_held_until_the_process_ends(tmp_path):
    claim_output_dir(arguments(tmp_path))
    with pytest.raises(Timeout):
        FileLock(tmp_path / ".lock").acquire(timeout=0)


def test_links_in_the_folder_are_refused_in_it_and_in_its_folders(tmp_path):
    (tmp_path / "precious").write_text("")
    (tmp_path / "out" / "1_Pooling").mkdir(parents=True)
    (tmp_path / "out" / "1_Pooling" / "config.json").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="is a symbolic link"):
        claim_output_dir(arguments(tmp_path / "out"))


@pytest.mark.parametrize("begun_at, words", [(None, "auto"), (2, "(.*)checkpoint-5")], ids=["newest", "not the newest"])
def test_the_command_in_the_message_goes_on_from_what_was_saved(bert_folder, tmp_path, begun_at, words):
    trainer = make_trainer(bert_folder, tmp_path, **SAVING | {"save_total_limit": 9})
    if begun_at is not None:
        trainer.train()
        trainer.args.resume_from_checkpoint = str(tmp_path / f"checkpoint-{begun_at}")
    trainer.add_callback(Signal(5))
    with pytest.raises(Interrupted, match=rf"To resume: .* --resume_from_checkpoint {words}$"):
        run_training(trainer)


def test_an_old_run_is_cleared_away_when_training_begins(bert_folder, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    trainer = make_trainer(bert_folder, tmp_path, overwrite_output_dir=True)
    assert (tmp_path / "results.json").exists()
    run_training(trainer)
    assert not (tmp_path / "results.json").exists()


def test_a_disk_that_is_full_at_the_end_is_told_of(bert_folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.train()
    trainer.metadata = {}
    monkeypatch.setattr("fmicl_text.cli.output_dir.write_atomic", full)
    words = r"results.json could not be written: No space left on device; last good checkpoint: .*checkpoint-8$"
    with pytest.raises(InputError, match=words):
        save_run(trainer, {"sts_spearman": 1.0})


def test_a_finished_run_is_known_by_its_settings(tmp_path):
    settings = {"alpha": 4.0, "output_dir": "a", "divergence": "kl", "report_to": ("none",)}
    (tmp_path / "results.json").write_text(json.dumps({"settings": settings}))
    args = arguments(tmp_path, resume_from_checkpoint="auto")
    assert is_finished(args, settings | {"output_dir": "b", "resume_from_checkpoint": "auto"})
    assert not is_finished(args, settings | {"alpha": 5.0}) and not is_finished(args, settings | {"gamma": 1.0})
    assert not is_finished(arguments(tmp_path), settings)
    for text in ("[", "[" * 100_000, "5", '{"settings": 5}', '{"settings": [1]}'):
        (tmp_path / "results.json").write_text(text)
        assert not is_finished(args, settings)


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    mine = {"notes.txt", "checkpoint-notes.txt"}
    for name in ("results.json", *mine):
        (tmp_path / name).write_text("{}")
    args = arguments(tmp_path, overwrite_output_dir=True)
    claim_output_dir(args)
    assert len(list(tmp_path.iterdir())) == 5
    clear_output_dir(args)
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "unfinished", ".lock"}


def test_a_process_of_several_that_is_alone_is_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    check_processes(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"2 processes .* 1: .*--use_cpu True"):
        check_processes(args)


def test_no_command_is_given_where_nothing_goes_on(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, **SAVING, save_only_model=True)
    trainer.add_callback(Signal(3))
    with pytest.raises(Interrupted, match=r"saved .*checkpoint-3$"):
        run_training(trainer)
