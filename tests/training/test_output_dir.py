"""The output folder of a trainer in Python: what it contains, its lock, and what is never deleted."""

import json
import threading
from pathlib import Path

import pytest
import yaml

from fmicl_text import InputError
from fmicl_text.files import content_hash
from fmicl_text.hub.model_card import MARK
from fmicl_text.training.checkpoint import checkpoints_in, move_into_place, write_manifest
from fmicl_text.training.output_dir import (
    COMPLETE,
    SETTINGS_MARK,
    check_output_dir,
    clear_output_dir,
    complete_save,
    create_folder,
    read_contents,
    resolve_output_dir,
    settings_text,
)
from tests.support import SAVING, make_trainer, tree

RESULTS = {"objective": "fmicl-kl", "versions": {}, "log_history": [], "settings": {"gamma": 2.0, "divergence": "kl"}}


@pytest.mark.slow
def test_another_run_is_not_overwritten(bert_folder, tmp_path):
    first = make_trainer(bert_folder, tmp_path, **SAVING)
    first.train()
    before = tree(tmp_path)
    with pytest.raises(InputError, match="already contains checkpoint-"):
        make_trainer(bert_folder, tmp_path, **SAVING).train()
    assert tree(tmp_path) == before
    first.train()  # its own folder
    make_trainer(bert_folder, tmp_path, **SAVING).train(resume_from_checkpoint="auto")
    trainer = make_trainer(bert_folder, tmp_path, **SAVING | {"max_steps": 2}, overwrite_output_dir=True)
    trainer.train()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2"]


def test_a_result_without_checkpoints_is_not_trained_over(bert_folder, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    for resume in (None, "auto"):
        with pytest.raises(InputError, match=r"already contains results\.json"):
            make_trainer(bert_folder, tmp_path, max_steps=1).train(resume_from_checkpoint=resume)


def test_two_trainers_do_not_train_into_one_folder(bert_folder, tmp_path):
    first, second = (make_trainer(bert_folder, tmp_path, max_steps=1) for _ in range(2))
    with first.hold_output_dir():
        error = []

        def train():
            try:
                second.train()
            except InputError as caught:
                error.append(str(caught))

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        assert error and "another process is training into it" in error[0]
        first.train()
    second.train()


def test_a_rejected_start_creates_nothing(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path / "new" / "out", max_steps=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="not a checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_after_the_lock_creates_nothing(bert_folder, tmp_path, monkeypatch):
    trainer = make_trainer(bert_folder, tmp_path / "new" / "out", **SAVING)
    monkeypatch.setattr(trainer.checkpointer, "choose", lambda resume: (_ for _ in ()).throw(InputError("disk")))
    with pytest.raises(InputError, match="disk"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chain", [1, 2])
def test_a_link_to_a_missing_folder_is_followed(bert_folder, tmp_path, chain):
    (tmp_path / "link1").symlink_to(tmp_path / "real" / "out")
    (tmp_path / "link2").symlink_to(tmp_path / "link1")
    link = tmp_path / f"link{chain}"
    trainer = make_trainer(bert_folder, link, max_steps=2, save_strategy="steps", save_steps=1)
    assert not (tmp_path / "real").exists()
    trainer.train()
    trainer.save_model()
    assert link.is_symlink() and (tmp_path / "real" / "out" / "modules.json").is_file()
    assert [path.name for path in checkpoints_in(tmp_path / "real" / "out")] == ["checkpoint-1", "checkpoint-2"]


def test_paths_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path in (tmp_path / "file", tmp_path / "link", tmp_path / "loop", tmp_path / ("a" * 300), "a\0b"):
        with pytest.raises(InputError, match=r"^output_dir="):
            check_output_dir(path, None, overwrite=True)
    with pytest.raises(InputError, match=r"^output_dir="):
        check_output_dir(tmp_path / "file" / "below", None, overwrite=True)


def test_only_checkpoints_with_a_manifest_are_removed(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-1")
    for name in ("checkpoint-2", "checkpoint-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")  # as transformers' own trainer writes it
    (tmp_path / "checkpoint-3" / "manifest.json").write_text('{"name": "of an app"}')
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    clear_output_dir(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {".fmicl_text"} == {"checkpoint-2", "checkpoint-3"}


def write_checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    write_manifest(folder, {})


def test_what_is_in_the_way_of_a_checkpoint_is_renamed(tmp_path, caplog):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "mine").write_text("mine")
    (tmp_path / "checkpoint-5.old").write_text("mine")
    write_checkpoint(tmp_path / "new")
    move_into_place(tmp_path / "new", tmp_path / "checkpoint-5")
    assert "checkpoint-5.old1" in caplog.text
    assert (tmp_path / "checkpoint-5.old1" / "mine").read_text() == "mine"
    assert (tmp_path / "checkpoint-5" / "manifest.json").is_file()


def test_a_final_save_that_was_killed_is_completed(tmp_path):
    for name in ("1_Pooling/config.json", "modules.json", "results.json"):
        (tmp_path / COMPLETE / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / COMPLETE / name).write_text("new")
    (tmp_path / "modules.json").write_text("old")
    complete_save(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in ("1_Pooling/config.json", "modules.json")} == {
        "1_Pooling/config.json": "new",
        "modules.json": "new",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1_Pooling", "modules.json", "results.json"]


def test_an_edited_settings_file_is_the_users(tmp_path):
    path = tmp_path / "settings.yaml"
    text = settings_text(RESULTS["settings"])
    assert text.startswith(SETTINGS_MARK) and yaml.safe_load(text) == RESULTS["settings"]
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    for ours in (text, text.partition("\n")[2]):  # with the first line, and as older versions wrote it
        path.write_text(ours)
        assert read_contents(tmp_path).foreign == []
    for theirs in (text + "# a comment\n", text.replace("2.0", "3.0 "), "gamma: [", "- 5", "", "a: &b [1]\nc: *b\n"):
        path.write_text(theirs)
        assert read_contents(tmp_path).foreign == ["settings.yaml"], theirs
    path.unlink()
    path.mkdir()
    assert read_contents(tmp_path).foreign == ["settings.yaml"]


@pytest.mark.parametrize(
    "name", ["vocab.txt", "tokenizer.json", "model.safetensors", "1_Pooling", "training_curve.png"]
)
def test_files_that_an_encoder_would_replace_are_the_users(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=f"{name} would be replaced"):
            check_output_dir(tmp_path, None, overwrite)
    for other in ("data.txt", "my_config.json", "1_notes.txt", "vocab.csv"):
        (tmp_path / other).write_text("mine")
    (tmp_path / name).unlink()
    check_output_dir(tmp_path, None, overwrite=False)


def test_the_folder_is_the_target_of_the_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert resolve_output_dir(tmp_path / "link") == tmp_path / "real"


def test_rotation_removes_only_own_checkpoints(bert_folder, tmp_path):
    for name in ("checkpoint-1", "checkpoint-3"):  # of transformers' own trainer, and of an app
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-3" / "manifest.json").write_text('{"name": "of an app"}')
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    make_trainer(bert_folder, tmp_path, **settings, overwrite_output_dir=True).train()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-1", "checkpoint-3", "checkpoint-8"]


@pytest.mark.slow
def test_another_folder_is_checked_by_a_second_training(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path / "first", **SAVING)
    trainer.train()
    make_trainer(bert_folder, tmp_path / "second", **SAVING).train()
    trainer.args.output_dir = str(tmp_path / "second")
    with pytest.raises(InputError, match="already contains checkpoint-"):
        trainer.train()


@pytest.mark.parametrize("name, text", [("README.md", "edited"), (".eval_results", "mine")])
def test_an_edited_card_and_results_of_others_are_the_users(tmp_path, name, text):
    card = f"# A model\n{MARK}\n"
    (tmp_path / "README.md").write_text(card)
    results = RESULTS | {"card": content_hash(tmp_path / "README.md")}
    if name == "README.md":
        (tmp_path / "results.json").write_text(json.dumps(results))
        assert read_contents(tmp_path).foreign == []
        (tmp_path / name).write_text(card + text)
    else:
        (tmp_path / name).mkdir()
    assert read_contents(tmp_path).foreign == [name]


def test_results_of_another_program_are_not_deleted(tmp_path):
    (tmp_path / "results.json").write_text('{"objective": "minimize", "settings": {"a": 1}, "best": 3}')
    clear_output_dir(tmp_path)
    assert read_contents(tmp_path).foreign == ["results.json"]


def test_saving_without_training_does_not_replace_another_model(bert_folder, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    trainer = make_trainer(bert_folder, tmp_path)
    with pytest.raises(InputError, match=r"already contains config\.json"):
        trainer.save_model()
    assert (tmp_path / "config.json").read_text() == "mine"
    make_trainer(bert_folder, tmp_path, overwrite_output_dir=True).save_model()
    trainer.save_model(str(tmp_path / "other"))
    assert (tmp_path / "other" / "modules.json").is_file()


def test_saving_waits_for_no_other_process(bert_folder, tmp_path):
    first, second = (make_trainer(bert_folder, tmp_path, max_steps=1) for _ in range(2))
    with first.hold_output_dir(), pytest.raises(InputError, match="another process"):
        second.save_model()
    second.save_model()


@pytest.mark.slow
def test_a_model_of_others_beside_an_unfinished_run(bert_folder, tmp_path):
    """The encoder that the run saved, and one that it overwrites, are no obstacle."""
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.train()
    trainer.save_model()
    check_output_dir(tmp_path, "auto", overwrite=False)
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(InputError, match=r"already contains config\.json"):
        check_output_dir(tmp_path, "auto", overwrite=False)
    clear_output_dir(tmp_path)  # as with overwrite_output_dir
    make_trainer(bert_folder, tmp_path / "new", **SAVING).train()
    (tmp_path / "new" / "checkpoint-8").rename(tmp_path / "checkpoint-8")
    check_output_dir(tmp_path, "auto", overwrite=False)


def test_a_folder_that_another_process_removes_meanwhile(tmp_path, monkeypatch):
    mkdir, calls = Path.mkdir, []

    def removed_once(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 1:
            raise FileExistsError(17, "File exists")
        return mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", removed_once)
    assert create_folder(tmp_path / "out") == [tmp_path / "out"] and (tmp_path / "out").is_dir()
