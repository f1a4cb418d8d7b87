"""The resume signature: everything that decides the weights is compared when a run is resumed."""

import json
import os
import shutil
import sys
import warnings

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState

from fmicl_text import FDivergence, FMICLLoss, FMICLTrainer, InputError, TextContrastiveModel, build_text_encoder
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.hub.run_record import run_record
from fmicl_text.text.data import load_training_text
from fmicl_text.text.tokenization import training_rows
from fmicl_text.training import checkpointer
from fmicl_text.training.checkpoint import MANIFEST, find_checkpoint, validate_checkpoint
from tests.support import SAVING, make_trainer, same, sentences, sts_pairs, trained, weights


@pytest.fixture
def train_file(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n".join(sentences(40)), encoding="utf-8")
    return path


def file_trainer(model, output_dir, train_file, max_seq_length=16, streaming=False, **settings):
    """A trainer of a text file, as the recipe builds it."""
    encoder = build_text_encoder(model, pooling="mean")
    data = load_training_text(str(train_file), streaming=streaming)
    rows, collator, _ = training_rows(data, encoder.tokenizer, max_seq_length)
    args = make_trainer(model, output_dir, **SAVING, **settings).args
    return FMICLTrainer(TextContrastiveModel(encoder), args, train_dataset=rows, data_collator=collator)


def messages(resume):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume()
    return " ".join(str(one.message) for one in caught)


def resume(trainer):
    return messages(lambda: trainer.train(resume_from_checkpoint=str(trainer.args.output_dir) + "/checkpoint-6"))


def edit_keeping_times(path, text):
    """As `cp -p`, rsync and tar replace a file."""
    before = path.stat()
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_another_length_is_reported(bert_folder, tmp_path, train_file, streaming):
    how = {"streaming": streaming}
    file_trainer(bert_folder, tmp_path / "out", train_file, **how).train()
    assert resume(file_trainer(bert_folder, tmp_path / "out", train_file, **how)) == ""
    again = file_trainer(bert_folder, tmp_path / "out", train_file, max_seq_length=5, **how)
    if not streaming:
        with pytest.raises(InputError, match="data"):
            resume(again)
    else:
        assert "max_seq_length 16 -> 5" in resume(again)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_another_content_with_the_same_time_is_other_data(bert_folder, tmp_path, train_file, streaming):
    how = {"streaming": streaming}
    file_trainer(bert_folder, tmp_path / "out", train_file, **how).train()
    edit_keeping_times(train_file, "\n".join(sentences(41)[1:]))
    with pytest.raises(InputError, match="data "):
        resume(file_trainer(bert_folder, tmp_path / "out", train_file, **how))


def test_the_cache_is_keyed_by_content(tmp_path, train_file):
    for suffix, text in ((".txt", "{}\n"), (".csv", "text\n{}\n"), (".jsonl", '{{"text": "{}"}}\n')):
        path = tmp_path / f"data{suffix}"
        path.write_text(text.format("a dog"))
        assert load_training_text(str(path)).dataset[0]["text"] == "a dog"
        edit_keeping_times(path, text.format("a cat"))
        assert load_training_text(str(path)).dataset[0]["text"] == "a cat", suffix


def test_the_cache_of_a_dataset_folder_is_keyed_by_content(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train.csv"
    path.write_text("text\na dog\n")
    assert load_training_text(dataset_name=str(tmp_path / "data")).dataset[0]["text"] == "a dog"
    edit_keeping_times(path, "text\na cat\n")
    assert load_training_text(dataset_name=str(tmp_path / "data")).dataset[0]["text"] == "a cat"


def test_a_row_that_moves_to_another_file_is_seen(tmp_path):
    """As an image does that is moved to the folder of another class."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(f"text\n{name}\n")
    first = load_training_text(dataset_name=str(tmp_path)).dataset["text"][:]
    (tmp_path / "a.csv").rename(tmp_path / "c.csv")
    assert first == ["a", "b"] and load_training_text(dataset_name=str(tmp_path)).dataset["text"][:] == ["b", "a"]


def test_a_cached_file_is_found_again(tmp_path, train_file):
    first = load_training_text(str(train_file)).dataset
    again = load_training_text(str(train_file)).dataset
    assert first.cache_files == again.cache_files
    copy = shutil.copy2(train_file, tmp_path / "copy.txt")
    assert load_training_text(str(copy)).dataset[:] == first[:]


@pytest.mark.slow
def test_other_evaluation_data_are_reported(bert_folder, tmp_path):
    def trainer(pairs):
        one = make_trainer(bert_folder, tmp_path / "out", evaluate=True, **SAVING)
        one.evaluator = STSEvaluator(datasets.Dataset.from_list(pairs), progress=False)
        return one

    pairs = list(sts_pairs())
    trainer(pairs).train()
    assert resume(trainer(pairs)) == ""
    changed = [*pairs[:-1], pairs[-1] | {"score": 2.5}]
    assert "evaluation_data" in resume(trainer(changed))


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torch", "transformers", "fmicl_text"])
def test_other_versions_are_reported(bert_folder, tmp_path, library, monkeypatch):
    make_trainer(bert_folder, tmp_path, **SAVING).train()
    versions = checkpointer.library_versions()
    monkeypatch.setattr(checkpointer, "library_versions", lambda: versions | {library: "0.1"})
    assert f"{library} {versions[library]} -> 0.1" in resume(make_trainer(bert_folder, tmp_path, **SAVING))
    finished = make_trainer(bert_folder, tmp_path, **SAVING)
    messages(lambda: finished.train(resume_from_checkpoint="auto"))  # a finished run is still finished
    assert finished.state.global_step == 8


@pytest.mark.slow
def test_other_intervals_are_reported_as_harmless(bert_folder, tmp_path, caplog):
    make_trainer(bert_folder, tmp_path, **SAVING | {"save_total_limit": 9}).train()
    said = resume(make_trainer(bert_folder, tmp_path, **SAVING | {"save_steps": 4, "save_total_limit": 9}))
    assert "save_steps 2 -> 4" in caplog.text and said == ""


def test_a_manifest_is_of_a_known_format_and_describes_its_run(bert_folder, tmp_path):
    trained(make_trainer(bert_folder, tmp_path, **SAVING))
    path = tmp_path / "checkpoint-8" / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"run": {}}))
    assert "does not describe its run" in str(validate_checkpoint(tmp_path / "checkpoint-8"))
    path.write_text(json.dumps(manifest | {"format": 99}))
    assert "99" in str(validate_checkpoint(tmp_path / "checkpoint-8"))
    checkpoint, skipped = find_checkpoint(tmp_path, "auto")
    assert checkpoint == tmp_path / "checkpoint-6" and "99" in skipped[0]
    del manifest["format"]
    path.write_text(json.dumps(manifest))
    assert validate_checkpoint(tmp_path / "checkpoint-8") is not None
    path.write_text("[" * 100_000)
    assert validate_checkpoint(tmp_path / "checkpoint-8") is not None


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["learning_rate", "weight_decay", "adam_beta1", "adam_epsilon"])
def test_settings_of_the_optimizer_that_are_given_at_a_resume_count(bert_folder, tmp_path, setting):
    """The last two steps differ from those of the unchanged run, and the log states the new rate."""
    first = trained(make_trainer(bert_folder, tmp_path, **SAVING))
    value = {"learning_rate": 0.01, "weight_decay": 0.5, "adam_beta1": 0.1, "adam_epsilon": 0.1}[setting]
    changed = make_trainer(bert_folder, tmp_path, **SAVING, **{setting: value})
    assert f"{setting} " in resume(changed)
    assert not same(weights(first), weights(changed))
    group = changed.optimizer.param_groups[0]
    key = {"learning_rate": "initial_lr", "adam_beta1": "betas", "adam_epsilon": "eps"}.get(setting, setting)
    assert group[key] == ((value, 0.999) if key == "betas" else pytest.approx(value))
    if setting == "learning_rate":
        rates = {one["step"]: one["learning_rate"] for one in changed.state.log_history if "learning_rate" in one}
        assert rates[8] == pytest.approx(0.01 / 8)


def test_an_optimizer_that_is_passed_keeps_its_options(bert_folder, tmp_path):
    def make(**settings):
        trainer = make_trainer(bert_folder, tmp_path, **SAVING, **settings)
        optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3, weight_decay=0.3)
        trainer.optimizer, trainer.optimizer_is_given = optimizer, True
        return trainer

    make().train()
    resumed = make(weight_decay=0.1, learning_rate=0.5)
    resume(resumed)
    group = resumed.optimizer.param_groups[0]
    assert (group["weight_decay"], group["initial_lr"]) == (0.3, 1e-3)


@pytest.mark.parametrize("settings", [{"optim": "sgd"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_the_state_of_another_optimizer_cannot_be_resumed(bert_folder, tmp_path, settings):
    make_trainer(bert_folder, tmp_path, evaluate=True, **SAVING).train()
    other = make_trainer(bert_folder, tmp_path, evaluate=True, **SAVING, **settings, resume_changed=True)
    with pytest.raises(InputError, match="another optimizer or schedule"):
        resume(other)


@pytest.mark.slow
def test_another_config_or_padding_is_reported(bert_folder, tmp_path):
    trained(make_trainer(bert_folder, tmp_path, **SAVING))
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.model.backbone.config.layer_norm_eps = 0.1
    assert "config " in resume(trainer)
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.data_collator.tokenizer.padding_side = "left"
    assert "padding_side right -> left" in resume(trainer)
    trainer = make_trainer(bert_folder, tmp_path, **SAVING, accelerator_config={"use_seedable_sampler": False})
    assert "use_seedable_sampler True -> False" in resume(trainer)


@pytest.mark.slow
def test_the_best_of_a_run_is_not_a_checkpoint_of_another(bert_folder, tmp_path):
    """Resumed from a folder whose best is step 2, in a folder with another run's checkpoint-2."""

    def make(folder, **settings):
        trainer = make_trainer(
            bert_folder,
            folder,
            evaluate=True,
            load_best_model_at_end=True,
            **SAVING | {"save_total_limit": 9},
            **settings,
        )
        trainer.evaluator = lambda encoder: {"sts_spearman": -float(trainer.state.global_step or 99)}
        return trainer

    make(tmp_path / "a").train()
    make(tmp_path / "b", seed=7).train()
    for step in (4, 6, 8):
        shutil.rmtree(tmp_path / "b" / f"checkpoint-{step}")
    best = make(tmp_path / "c")
    best.model.load_checkpoint(str(tmp_path / "a" / "checkpoint-2"))
    resumed = make(tmp_path / "b")
    messages(lambda: resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4")))
    assert same(weights(resumed), weights(best))


DIVERGENCE = """
from fmicl_text import FDivergence
power = FDivergence.from_convex(lambda u: u**{power}, "power")
def convex(u):
    return u**{power}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, then, message",
    [
        ({"divergence": "tsallis"}, {"divergence": "tsallis", "tsallis_order": 1.5}, "tsallis_order 3.0 -> 1.5"),
        ({"divergence": "first:power"}, {"divergence": "second:power"}, "divergence first:power -> second:power"),
        ({"divergence": "first:convex"}, {"divergence": "second:convex"}, "divergence first:convex -> second:convex"),
        ({"objective": "first:Loss"}, {"objective": "second:Loss"}, "loss_class first:Loss -> second:Loss"),
    ],
)
def test_another_objective_of_the_same_name_is_reported(bert_folder, tmp_path, monkeypatch, first, then, message):
    for name in ("first", "second"):
        text = "from fmicl_text.losses import InfoNCELoss\nclass Loss(InfoNCELoss):\n    pass\n"
        (tmp_path / f"{name}.py").write_text(text + DIVERGENCE.format(power=1.5))
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    how = SAVING | ({} if "divergence" in first else {"gamma": None, "alpha": None})
    make_trainer(bert_folder, tmp_path / "out", **how, **first).train()
    assert resume(make_trainer(bert_folder, tmp_path / "out", **how, **first)) == ""
    assert message in resume(make_trainer(bert_folder, tmp_path / "out", **how, **then))


@pytest.mark.slow
def test_a_divergence_that_was_edited_is_reported(bert_folder, tmp_path):
    def make(power):
        trainer = make_trainer(bert_folder, tmp_path, **SAVING)
        trainer.loss = FMICLLoss(FDivergence.from_convex(lambda u: u**power, "power"), 2.0, 4.0)
        return trainer

    make(1.5).train()
    assert resume(make(1.5)) == ""
    assert "objective_values" in resume(make(1.7))


@pytest.mark.slow
def test_another_precision_of_products_is_reported(bert_folder, tmp_path):
    """On a GPU, `tf32=True`; on a CPU, bfloat16 products."""
    make_trainer(bert_folder, tmp_path, **SAVING).train()
    products = torch.backends.mkldnn.matmul
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        trainer = make_trainer(bert_folder, tmp_path, **SAVING)
        assert "float32_products float32 -> bf16" in resume(trainer)
        assert run_record(trainer, {})["float32_products"] == "bf16"
    finally:
        products.fp32_precision = before


@pytest.mark.slow
def test_mixed_precision_of_the_launcher_is_reported(bert_folder, tmp_path, monkeypatch):
    make_trainer(bert_folder, tmp_path, **SAVING).train()
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    assert "precision no -> bf16" in resume(trainer)
    assert run_record(trainer, {})["precision"] == "bf16"
