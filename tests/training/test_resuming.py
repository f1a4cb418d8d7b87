"""Interrupted runs are resumed exactly; where that is not possible, resuming raises an error or a warning."""

import errno
import os
import shutil
import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from fmicl_text import FMICLTrainer, InputError, TextContrastiveModel
from fmicl_text.errors import Interrupted
from fmicl_text.text.data import load_training_text
from fmicl_text.text.model import build_text_encoder, set_pooling
from fmicl_text.text.tokenization import RepeatedStream, training_rows
from fmicl_text.training import checkpoint as checkpoints
from fmicl_text.training import checkpointer
from tests.support import SAVING, Signal, make_trainer, one_fast, peft_or_skip, same, sentences, weights


class Killed(BaseException):
    """An exception that no error handler catches."""


def files(folder):
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_checkpoints_are_whole_and_bounded(finished_run):
    folder = Path(finished_run.args.output_dir)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert [checkpoints.validate_checkpoint(path) for path in checkpoints.checkpoints_in(folder)] == [None, None]
    run = checkpoints.saved_run(folder / "checkpoint-8")
    assert (run["processes"], run["per_device_train_batch_size"], run["divergence"]) == (1, 8, "kl")
    assert {path.suffix for path in (folder / "checkpoint-8").rglob("*") if path.is_file()} == {
        *(".json", ".safetensors", ".pt", ".pth")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "owner, name",
    one_fast(
        [
            (checkpointer, "write_manifest"),
            (checkpointer, "move_into_place"),
            (checkpointer, "remove_checkpoint"),
            (FMICLTrainer, "_save_optimizer_and_scheduler"),
            (FMICLTrainer, "_save_rng_state"),
            (TextContrastiveModel, "save_training_only"),
        ]
    ),
)
def test_a_kill_in_mid_save_leaves_the_previous_one_whole(
    finished_run, bert_folder, tmp_path, monkeypatch, owner, name
):
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    original = getattr(owner, name)

    def dies_at_step_6(*args, **kwargs):
        if trainer.state.global_step == 6:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies_at_step_6)
        with pytest.raises(Killed):
            trainer.train()
    resumed = make_trainer(bert_folder, tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint="auto")
    assert same(weights(finished_run), weights(resumed))
    whole_state, resumed_state = finished_run.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert all(torch.equal(whole_state[i]["exp_avg_sq"], resumed_state[i]["exp_avg_sq"]) for i in whole_state)
    assert [checkpoints.validate_checkpoint(path) for path in checkpoints.checkpoints_in(tmp_path)] == [None, None]


def test_a_damaged_checkpoint_is_told_of_and_passed_over(finished_run, bert_folder, tmp_path):
    shutil.copytree(finished_run.args.output_dir, tmp_path / "run")
    weights_file = tmp_path / "run" / "checkpoint-8" / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-5] ^= 1
    weights_file.write_bytes(content)
    resumed = make_trainer(bert_folder, tmp_path / "run", **SAVING)
    with pytest.warns(UserWarning, match=r"checkpoint-8 is corrupted and was skipped: model.safetensors has changed"):
        resumed.train(resume_from_checkpoint=True)
    assert same(weights(finished_run), weights(resumed))
    assert checkpoints.validate_checkpoint(tmp_path / "run" / "checkpoint-8") is None  # written anew


def test_a_finished_run_started_again_does_nothing(finished_run, bert_folder, tmp_path):
    shutil.copytree(finished_run.args.output_dir, tmp_path / "run")
    before = files(tmp_path / "run")
    for constant in (False, True):
        schedule = {"lr_scheduler_type": "constant", "resume_changed": True} if constant else {}
        again = make_trainer(bert_folder, tmp_path / "run", **SAVING | schedule)
        with warnings.catch_warnings(action="ignore"):
            result = again.train(resume_from_checkpoint="auto")
        assert result.global_step == 8 and same(weights(finished_run), weights(again))
        assert files(tmp_path / "run") == before


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size 8 -> 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 -> 2"),
        ({"dataset": Dataset.from_dict({"text": sentences(64, seed=3)})}, "data [0-9a-f]* -> [0-9a-f]*"),
    ],
    ids=["batch", "accumulation", "data"],
)
def test_another_run_is_not_gone_on_with_unless_asked_for(finished_run, bert_folder, tmp_path, changed, words):
    shutil.copytree(Path(finished_run.args.output_dir) / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.raises(InputError, match=rf"checkpoint-6 .*{words}; .*resume_changed=True"):
        make_trainer(bert_folder, tmp_path, **SAVING | changed).train(resume_from_checkpoint="auto")
    asked = make_trainer(bert_folder, tmp_path, **SAVING | changed, resume_changed=True)
    with pytest.warns(UserWarning, match=rf"not exact: .*checkpoint-6 was written with .*{words}"):
        asked.train(resume_from_checkpoint="auto")
    assert asked.state.global_step == 8


def test_other_differences_are_told_of(finished_run, bert_folder, tmp_path):
    shutil.copytree(Path(finished_run.args.output_dir) / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.warns(
        UserWarning, match=r"not exact: .* with max_steps 8 -> 9, learning_rate 0.001 -> 0.01, alpha 4.0"
    ):
        make_trainer(bert_folder, tmp_path, **SAVING | {"max_steps": 9, "learning_rate": 0.01, "alpha": 5.0}).train(
            resume_from_checkpoint="auto"
        )


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"adam_beta2": 0.9}, "adam_beta2 0.999 -> 0.9"),
        ({"max_grad_norm": 0.1}, "max_grad_norm 1.0 -> 0.1"),
        ({"data_seed": 7}, "data_seed None -> 7"),
        ({"lr_scheduler_kwargs": {"lr_end": 1e-4}, "lr_scheduler_type": "polynomial"}, "lr_scheduler_kwargs None -> "),
        ({"bf16": True}, "precision no -> bf16"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_no_setting_that_decides_the_weights_changes_without_a_word(
    finished_run, bert_folder, tmp_path, changed, words
):
    shutil.copytree(Path(finished_run.args.output_dir) / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.warns(UserWarning, match=rf"not exact: .*{words}"):
        make_trainer(bert_folder, tmp_path, **SAVING | changed).train(resume_from_checkpoint="auto")


def test_nor_does_the_model(finished_run, bert_folder, tmp_path):
    shutil.copytree(Path(finished_run.args.output_dir) / "checkpoint-6", tmp_path / "checkpoint-6")
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.model.encoder[0].model.config.hidden_dropout_prob = 0.2
    set_pooling(trainer.model.encoder, "cls")
    with pytest.warns(UserWarning, match=r"hidden_dropout_prob 0.1 -> 0.2, pooling mean -> cls$"):
        trainer.train(resume_from_checkpoint="auto")


@pytest.mark.slow
def test_adapters_go_on_over_the_weights_that_they_were_trained_over(bert_folder, tmp_path):
    peft_or_skip()

    def adapters(folder):
        trainer = make_trainer(bert_folder, tmp_path / folder, **SAVING | {"save_strategy": "no"})
        torch.manual_seed(3)
        encoder = build_text_encoder(bert_folder, pooling="mean", lora_rank=2)
        model = TextContrastiveModel(encoder)
        return FMICLTrainer(
            model, trainer.args, train_dataset=trainer.train_dataset, data_collator=trainer.data_collator
        )

    whole, cut, resumed, others = (adapters(folder) for folder in ("whole", "cut", "cut", "cut"))
    whole.train()
    cut.add_callback(Signal(5))
    with pytest.raises(Interrupted):
        cut.train()
    torch.nn.init.zeros_(others.model.encoder[0].model.embeddings.word_embeddings.weight)
    with pytest.raises(InputError, match=r"checkpoint-5 .*adapters_over"):
        others.train(resume_from_checkpoint="auto")
    resumed.train(resume_from_checkpoint="auto")
    assert same(weights(whole), weights(resumed))


def test_a_checkpoint_of_a_model_only_is_no_run(bert_folder, tmp_path):
    make_trainer(bert_folder, tmp_path, **SAVING, save_only_model=True).train()
    with pytest.raises(InputError, match=r"checkpoint-8 .*save_only_model=True"):
        make_trainer(bert_folder, tmp_path, **SAVING).train(resume_from_checkpoint="auto")


@pytest.mark.parametrize(
    "owner, name, number", [(torch, "save", errno.ENOSPC), (os, "makedirs", errno.EROFS)], ids=["full", "read-only"]
)
def test_a_disk_that_takes_no_more_keeps_the_last_good_checkpoint(
    bert_folder, tmp_path, monkeypatch, owner, name, number
):
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    original = getattr(owner, name)

    def fails_at_step_4(*args, **kwargs):
        if trainer.state.global_step == 4:
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails_at_step_4)
    words = rf"checkpoint-4 could not be written: {os.strerror(number)}; last good checkpoint: .*checkpoint-2$"
    with pytest.raises(InputError, match=words):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert checkpoints.validate_checkpoint(tmp_path / "checkpoint-2") is None


def test_a_disk_without_room_is_told_of_before_training(bert_folder, tmp_path, monkeypatch):
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    with pytest.raises(
        InputError,
        match=r"output_dir=.*: 3 checkpoints .* 1 MiB.* 0 MiB.* save_total_limit",
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_saving_keeps_what_is_there_until_all_is_written(bert_folder, tmp_path, monkeypatch):
    trainer = make_trainer(bert_folder, tmp_path)
    trainer.save_model()
    before = files(tmp_path)
    monkeypatch.setattr("fmicl_text.training.trainer.move_files", lambda *args: (_ for _ in ()).throw(Killed))
    torch.nn.init.zeros_(next(trainer.model.parameters()))
    with pytest.raises(Killed):
        trainer.save_model()
    assert {name: content for name, content in files(tmp_path).items() if "unfinished" not in name} == before


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("step", one_fast([9, 3, 6]), ids=["second pass", "first pass", "end of it"])
def test_a_stream_is_gone_on_with_exactly(bert_folder, tmp_path, step, workers):
    """5 batches of 8 per epoch, and a remainder of 3."""
    (tmp_path / "text.txt").write_text("\n".join(sentences(43)))
    data = load_training_text(str(tmp_path / "text.txt"), streaming=True, shuffle_seed=1)

    def run(folder):
        settings = {"save_strategy": "no", "max_steps": 12, "dataloader_num_workers": workers}
        trainer = make_trainer(bert_folder, tmp_path / folder, **settings)
        tokenizer = trainer.model.encoder.tokenizer
        trainer.train_dataset, trainer.data_collator = training_rows(data, tokenizer, 32)[:2]
        return trainer

    whole, cut, resumed = run("whole"), run("cut"), run("cut")
    whole.train()
    cut.add_callback(Signal(step))
    with pytest.raises(Interrupted):
        cut.train()
    resumed.train(resume_from_checkpoint="auto")
    assert whole.state.global_step == resumed.state.global_step == 12
    assert same(weights(whole), weights(resumed))


def test_a_stream_begins_anew_in_another_order(tmp_path):
    texts = sentences(20)
    (tmp_path / "text.txt").write_text("\n".join(texts))
    data = load_training_text(str(tmp_path / "text.txt"), streaming=True, shuffle_seed=1)
    rows = [row["text"] for row in islice(RepeatedStream(data.dataset), 60)]
    passes = [rows[:20], rows[20:40], rows[40:]]
    assert all(sorted(one) == sorted(texts) for one in passes) and len({tuple(one) for one in passes}) == 3
    assert [row["text"] for row in islice(RepeatedStream(data.dataset), 60)] == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    one_fast(
        [
            {"gradient_accumulation_steps": 2},
            {"mini_batch_size": 3},
            {"mini_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 6},
            {"bf16": True},
            {"dataloader_num_workers": 1},
            {"optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 3},
            {"objective": "infonce", "gamma": None, "alpha": None},
            {"head": "simcse", "max_steps": 20},
            {"num_train_epochs": 3, "max_steps": -1, "gradient_accumulation_steps": 3},  # 2 2/3 steps per epoch
            {
                "num_train_epochs": 2,
                "max_steps": -1,
                "save_strategy": "epoch",
                "eval_strategy": "epoch",
                "evaluate": True,
            },
        ]
    ),
    ids=lambda settings: " ".join(settings),
)
def test_every_way_of_training_goes_on_exactly(bert_folder, tmp_path, settings):
    """8 batches of 8 per epoch; interrupted in the middle of an epoch, the second if there is one."""
    whole, cut, resumed = (
        make_trainer(bert_folder, tmp_path / name, **{"max_steps": 12, "save_strategy": "no"} | settings)
        for name in ("whole", "cut", "cut")
    )
    whole.train()
    cut.add_callback(Signal(whole.state.global_step * 3 // 4))
    with pytest.raises(Interrupted):
        cut.train()
    resumed.train(resume_from_checkpoint="auto")
    assert whole.state.global_step == resumed.state.global_step
    assert same(weights(whole), weights(resumed))
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_a_run_that_finished_in_mid_epoch_takes_no_step_more(bert_folder, tmp_path):
    settings = SAVING | {"max_steps": 5}
    whole, again = (make_trainer(bert_folder, tmp_path, **settings) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 5 and same(weights(whole), weights(again))


def test_checkpoints_ahead_of_the_run_are_left_alone(bert_folder, tmp_path):
    make_trainer(bert_folder, tmp_path, **SAVING | {"save_total_limit": 9}).train()
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.add_callback(Signal(5))
    with pytest.raises(Interrupted):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    steps = [checkpoints.step_of(path) for path in checkpoints.checkpoints_in(tmp_path)]
    assert steps == [4, 5, 6, 8]


def test_what_a_killed_run_left_unfinished_is_cleared_away(bert_folder, tmp_path):
    (tmp_path / checkpoints.UNFINISHED / "checkpoint-9").mkdir(parents=True)
    make_trainer(bert_folder, tmp_path, max_steps=1).train()
    assert not (tmp_path / checkpoints.UNFINISHED).exists()


def test_checkpoints_that_are_there_need_no_room(bert_folder, tmp_path, monkeypatch):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "manifest.json").write_text('{"format": 1, "files": {}}')
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    with pytest.raises(InputError, match=": 1 checkpoints need"):
        make_trainer(bert_folder, tmp_path, **SAVING, overwrite_output_dir=True).train()


def test_every_epoch_is_told_to_the_sampler(bert_folder, tmp_path):
    trainer, seen = make_trainer(bert_folder, tmp_path, max_steps=20), []
    trainer.length_sampler = SimpleNamespace(set_epoch=seen.append)
    trainer.train()
    assert seen == [0, 1, 2]


def test_a_stream_that_has_nothing_for_a_worker_ends():
    class Empty(list):
        def set_epoch(self, number):
            assert number < 3

    assert list(RepeatedStream(Empty())) == []


def test_going_on_without_the_optimizer_in_later_checkpoints_changes_nothing(finished_run, bert_folder, tmp_path):
    shutil.copytree(Path(finished_run.args.output_dir) / "checkpoint-6", tmp_path / "checkpoint-6")
    resumed = make_trainer(bert_folder, tmp_path, **SAVING, save_only_model=True)
    with warnings.catch_warnings(action="error"):
        resumed.train(resume_from_checkpoint="auto")
    assert same(weights(finished_run), weights(resumed))


@pytest.mark.parametrize("limit, kept", [(3, [3, 4, 5]), (4, [2, 3, 4, 5]), (5, [1, 2, 3, 4, 5])])
def test_no_more_checkpoints_are_removed_than_the_limit_says(bert_folder, tmp_path, limit, kept):
    make_trainer(
        bert_folder, tmp_path, save_strategy="steps", save_steps=1, max_steps=5, save_total_limit=limit
    ).train()
    assert sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*")) == kept


def test_checkpoints_of_the_model_only_need_less_room(bert_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    told = []
    for only in (False, True):
        with pytest.raises(InputError, match="checkpoints need about") as refusal:
            make_trainer(bert_folder, tmp_path, head="simcse", **SAVING, save_only_model=only).train()
        told.append(str(refusal.value))
    assert told[0] != told[1]


def test_a_finished_run_is_not_resumed_with_other_settings(finished_run, bert_folder, tmp_path):
    """No step would be taken, and the record would state settings that the weights were not trained with."""
    shutil.copytree(finished_run.args.output_dir, tmp_path, dirs_exist_ok=True)
    other = make_trainer(bert_folder, tmp_path, **SAVING | {"alpha": 5.0})
    with pytest.warns(UserWarning, match=r"alpha 4.0 -> 5.0"), pytest.raises(InputError, match=r"alpha 4.0 -> 5.0"):
        other.train(resume_from_checkpoint="auto")
    again = make_trainer(bert_folder, tmp_path, **SAVING)
    again.train(resume_from_checkpoint="auto")
    assert same(weights(finished_run), weights(again))
