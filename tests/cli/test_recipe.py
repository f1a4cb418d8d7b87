"""What the two recipes share: the check of the output folder, signals, and the record of a run."""

import json

import numpy as np
import pytest

from fmicl_text import FMICLTrainingArguments, InputError
from fmicl_text.cli.parser import default_settings
from fmicl_text.cli.recipe import (
    claim_output_dir,
    input_hashes,
    is_finished,
    judge_run,
    print_verdict,
    run_training,
    save_run,
)
from fmicl_text.errors import Interrupted
from fmicl_text.hub.run_record import scored_on
from fmicl_text.processes import check_processes
from tests.support import SAVING, Signal, make_trainer

RECORD = {"objective": "fmicl-kl", "versions": {}, "log_history": []}
DEFAULTS = default_settings(FMICLTrainingArguments)


def arguments(folder, **settings):
    return FMICLTrainingArguments(output_dir=str(folder), use_cpu=True, **settings)


def claim(folder, **settings):
    return claim_output_dir(arguments(folder, **settings), {}, DEFAULTS)


@pytest.mark.parametrize("held", ["results.json", "modules.json", "config.json", "checkpoint-10"])
def test_what_a_run_would_overwrite_is_kept(tmp_path, held):
    (tmp_path / held).mkdir() if held.startswith("checkpoint") else (tmp_path / held).write_text("{}")
    for resume in (None, "False"):
        with pytest.raises(InputError, match=f"already contains {held}.*overwrite_output_dir"):
            claim(tmp_path, resume_from_checkpoint=resume)
    assert (tmp_path / held).exists()


def test_a_checkpoint_that_is_not_there_or_damaged_is_told_of_at_once(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    for named, words in [
        ("auto", "auto: .*checkpoint-10 .*no manifest.json"),
        ("nope", "nope: .*no trainer_state.json"),
    ]:
        with pytest.raises(InputError, match=f"resume_from_checkpoint={words}"):
            claim(tmp_path, resume_from_checkpoint=named)
    with pytest.raises(InputError, match=r"resume_from_checkpoint=True: .*empty contains no checkpoint"):
        claim(tmp_path / "empty", resume_from_checkpoint="True")
    claim(tmp_path / "empty", resume_from_checkpoint="auto")


def test_links_in_the_folder_are_rejected(tmp_path):
    (tmp_path / "precious").write_text("")
    (tmp_path / "out" / "1_Pooling").mkdir(parents=True)
    (tmp_path / "out" / "1_Pooling" / "config.json").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=r"1_Pooling"):
        claim(tmp_path / "out", overwrite_output_dir=True)


@pytest.mark.parametrize("begun_at, words", [(None, "auto"), (2, "(.*)checkpoint-5")], ids=["newest", "not the newest"])
def test_the_command_in_the_message_goes_on_from_what_was_saved(bert_folder, tmp_path, begun_at, words):
    trainer = make_trainer(bert_folder, tmp_path, **SAVING | {"save_total_limit": 9})
    if begun_at is not None:
        trainer.train()
        trainer.args.resume_from_checkpoint = str(tmp_path / f"checkpoint-{begun_at}")
    trainer.add_callback(Signal(5))
    with pytest.raises(Interrupted, match=rf"To resume: .* --resume_from_checkpoint {words}$"):
        run_training(trainer)


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_is_told_of(bert_folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.train()
    trainer.metadata = {}
    monkeypatch.setattr("fmicl_text.cli.recipe.write_json", full)
    words = r"results.json could not be written: No space left on device; last good checkpoint: .*checkpoint-8$"
    with pytest.raises(InputError, match=words):
        save_run(trainer, {"sts_spearman": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, outcome", [(0.5, "better"), (-0.5, "worse"), (0.0, "no better")], ids=["better", "worse", "no better"]
)
def test_a_run_without_selection_ends_with_a_verdict(bert_folder, tmp_path, capsys, monkeypatch, change, outcome):
    """The noise of the change of 100 values is 0.1."""
    monkeypatch.setattr("fmicl_text.cli.recipe.FLAGS", {"learning_rate", "load_best_model_at_end"})
    trainer = make_trainer(bert_folder, tmp_path)
    values = [np.zeros(100), np.tile([-1.0, 1.0], 50) + change]

    def evaluate(encoder):
        evaluate.observations = values.pop(0)
        return {"score": float(evaluate.observations.mean())}

    evaluate.metric_of, evaluate.items = lambda rows: float(rows.mean()), "texts"
    trainer.evaluator = evaluate
    before, start = trainer.run_evaluator(), trainer.scores
    trainer.metadata = {"before": before, "scored_on": scored_on("my.txt")}
    run_training(trainer)
    after = trainer.run_evaluator()
    judge_run(trainer, start)
    save_run(trainer, after)
    print_verdict(trainer)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    difference = f"{change:+.4f}" if change else "+0"
    assert line.startswith(f"Verdict: {outcome} than before training: score 0.0000 -> {change:.4f} ({difference} +- 0.")
    assert "on 100 texts of my.txt)" in line and ("the encoder of step 4 is saved" in line) == (outcome != "better")
    assert ("--load_best_model_at_end True, " in line and "--learning_rate (now 0.001)" in line) == (outcome == "worse")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["verdict"]["outcome"] == outcome and results["verdict"]["saved_step"] == results["steps"] == 4
    assert f"\n{outcome.capitalize()} than before training: score" in (tmp_path / "README.md").read_text()


def finished_with(folder, **settings):
    (folder / "results.json").write_text(json.dumps(RECORD | {"settings": settings}))


def test_a_finished_run_is_known_by_its_settings(tmp_path, monkeypatch):
    saved = {"alpha": 4.0, "output_dir": "a", "divergence": "kl", "report_to": ("none",), "weight_decay": 0.1}
    finished_with(tmp_path, **saved)
    same = [
        {"output_dir": "b", "resume_from_checkpoint": "auto"},
        {"logging_steps": 3, "report_to": ["tensorboard"], "hub_model_id": "a/b", "save_total_limit": 4},
        {"block_size": 64, "dataloader_num_workers": 2, "overwrite_output_dir": False, "check_disk_space": False},
        {"save_steps": 3, "ddp_timeout": 99, "per_device_eval_batch_size": 3, "do_train": True, "local_rank": 0},
    ]
    for changes in same:
        assert is_finished(tmp_path, saved | changes, DEFAULTS), changes
    other = [{"alpha": 5.0}, {"gamma": 1.0}, {"seed": 1}, {"weight_decay": 0.0}]
    for changes in other:
        assert not is_finished(tmp_path, saved | changes, DEFAULTS), changes
    without = {name: value for name, value in saved.items() if name != "weight_decay"}  # now at its default
    assert not is_finished(tmp_path, without, DEFAULTS)


def test_a_finished_run_is_known_after_an_upgrade_and_by_another_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text("")
    (tmp_path / "other.txt").write_text("")
    finished_with(tmp_path, train_file="train.txt", removed_option=5)
    defaults = DEFAULTS | {"train_file": None, "new_option": 7}
    for path in ("train.txt", "./train.txt", str(tmp_path / "train.txt")):
        assert is_finished(tmp_path, {"train_file": path, "new_option": 7}, defaults)
    assert not is_finished(tmp_path, {"train_file": "train.txt", "new_option": 8}, defaults)
    assert not is_finished(tmp_path, {"train_file": "other.txt"}, defaults)


def test_a_finished_run_of_other_data_is_another_run(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("old")
    settings = {"train_file": str(path)}
    (tmp_path / "results.json").write_text(
        json.dumps(RECORD | {"settings": settings, "inputs": input_hashes(settings)})
    )
    defaults = DEFAULTS | {"train_file": None}
    assert is_finished(tmp_path, settings, defaults)
    path.write_text("new")
    assert not is_finished(tmp_path, settings, defaults)


def test_a_finished_run_of_several_files(tmp_path, monkeypatch):
    """Files are known by content, also those that match a pattern; one file may have been recorded as a string."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    defaults = DEFAULTS | {"train_file": None}
    for saved, now in (
        (["a.txt", "b.txt"], ["./a.txt", str(tmp_path / "b.txt")]),
        (["*.txt"], ["*.txt"]),
        ("a.txt", ["a.txt"]),
    ):
        record = {"settings": {"train_file": saved}, "inputs": input_hashes({"train_file": saved})}
        (tmp_path / "results.json").write_text(json.dumps(RECORD | record))
        assert is_finished(tmp_path, {"train_file": now}, defaults)
        assert not is_finished(tmp_path, {"train_file": ["b.txt", "a.txt"]}, defaults)
        (tmp_path / "a.txt").write_text("new")
        assert not is_finished(tmp_path, {"train_file": now}, defaults)
        (tmp_path / "a.txt").write_text("a.txt")


def test_output_inside_any_folder_of_training_text(tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(InputError, match="would be read as data"):
        settings = {"train_file": ["a.txt", str(tmp_path / "texts")]}
        claim_output_dir(arguments(tmp_path / "texts" / "out"), settings, DEFAULTS)
    with pytest.raises(InputError, match=r"retrieval_dev_folder=.* would be read as data"):
        settings = {"train_file": ["a.txt"], "retrieval_dev_folder": str(tmp_path / "texts")}
        claim_output_dir(arguments(tmp_path / "texts" / "out"), settings, DEFAULTS)


def test_a_finished_run_in_another_precision_of_the_launcher_is_another_run(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(json.dumps(RECORD | {"settings": {}, "precision": "no"}))
    assert claim(tmp_path, resume_from_checkpoint="auto")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(InputError, match=r"already contains results\.json"):
        claim(tmp_path, resume_from_checkpoint="auto")


@pytest.mark.parametrize("text", ["[", "[" * 100_000, "5", '{"settings": 5}', '{"settings": [1]}'])
def test_results_of_something_else_are_never_replaced(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    assert not is_finished(tmp_path, {}, DEFAULTS)
    for settings in ({"resume_from_checkpoint": "auto"}, {"overwrite_output_dir": True}):
        with pytest.raises(InputError, match=r"results\.json would be replaced"):
            claim(tmp_path, **settings)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_process_of_several_that_is_alone_is_refused(tmp_path, monkeypatch, variable):
    args = arguments(tmp_path)
    check_processes(args)
    monkeypatch.setenv(variable, "2")
    with pytest.raises(InputError, match=r"2 processes .* 1: .*--multi_gpu"):
        check_processes(args)


def test_no_command_is_given_where_nothing_goes_on(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, **SAVING, save_only_model=True)
    trainer.add_callback(Signal(3))
    with pytest.raises(Interrupted, match=r"saved .*checkpoint-3$"):
        run_training(trainer)


def test_patterns_in_a_folder_with_brackets_are_hashed(tmp_path):
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a[1]/a.txt").write_text("one\n")
    settings = {"train_file": [str(tmp_path / "a[1]/*.txt")]}
    first = input_hashes(settings)
    (tmp_path / "a[1]/a.txt").write_text("two\n")
    assert first and input_hashes(settings) != first
