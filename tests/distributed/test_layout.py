"""A run goes on with another number of processes: the same batches, dropout masks, views and batch statistics."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from fmicl_text import FMICLLoss, InputError, build_text_encoder
from fmicl_text.cli.vision import VisionTrainingArguments
from fmicl_text.text.collator import TextViewCollator, TokenCollator
from fmicl_text.text.tokenization import RepeatedStream, tokenize_dataset
from fmicl_text.text.views import TextViews
from fmicl_text.training.checkpoint import saved_run
from fmicl_text.vision.data import Images, TrainingRows, collate_images
from fmicl_text.vision.encoder import new_image_encoder
from fmicl_text.vision.model import ImageContrastiveModel
from fmicl_text.vision.views import ImageViews
from tests.support import (
    make_momentum_trainer,
    make_trainer,
    one_fast,
    run_trainers,
    sentences,
    tiny_small_image_resnet,
    words_missing,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:method=moco"),
    pytest.mark.filterwarnings("ignore:.*views of every text are identical"),
]
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "save_total_limit": 5}
SAVING |= {"load_best_model_at_end": False}
MIXED = [text for pair in zip(sentences(32), sentences(64, 1)[32:], strict=True) for text in pair]


class FixedLength(TextViewCollator):
    """Pads every batch to the same length."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        ids = batch.pop("text_ids")
        missing = 40 - batch["input_ids"].shape[-1]
        values = {"input_ids": self.tokenizer.pad_token_id}
        padded = {
            name: torch.nn.functional.pad(one, (0, missing), value=values.get(name, 0)) for name, one in batch.items()
        }
        return padded | {"text_ids": ids}


class OwnBatch(FMICLLoss):
    """The loss of a process's own batch, with a method of its own."""

    def terms(self, *views):
        return super().terms(*views)


def text(folder, output_dir, fixed=False, own_loss=False, grouped=False, streamed=False, views=None, **settings):
    """Sentences of different lengths, with dropout."""
    rows = Dataset.from_dict({"text": [one if i % 3 else one * 3 for i, one in enumerate(MIXED)]})
    encoder = build_text_encoder(folder)
    collator = TextViewCollator(encoder.tokenizer, ["text"])
    if views:
        collator = TextViewCollator(
            encoder.tokenizer, ["text"], views=TextViews(encoder.tokenizer, views, max_seq_length=32)
        )
    if streamed:
        rows = RepeatedStream(rows.to_iterable_dataset())
    if grouped:
        rows = tokenize_dataset(rows, encoder.tokenizer, ["text"], 32)
        collator, settings = TokenCollator(encoder.tokenizer), settings | {"train_sampling_strategy": "group_by_length"}
    trainer = make_trainer(folder, output_dir, head="simcse", dataset=rows, **settings)
    trainer.data_collator = FixedLength(encoder.tokenizer, ["text"]) if fixed else collator
    if own_loss:
        trainer.loss = OwnBatch("kl", gamma=2.0, alpha=4.0, global_batch="gather")
    return trainer


def moco(folder, output_dir, **settings):
    """MoCo v3, whose predictor has batch statistics."""
    method = {"predictor": True, "increase_momentum": True}
    return make_momentum_trainer(folder, output_dir, method, **settings)


def images(folder, output_dir, **settings):
    """A convolutional network with batch statistics, and random augmentations."""
    defaults = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "gamma": 2.0, "alpha": 8.0, "logging_steps": 1}
    args = VisionTrainingArguments(
        str(output_dir), eval_strategy="no", disable_tqdm=True, use_cpu=True, **defaults | settings
    )
    torch.manual_seed(0)
    model = ImageContrastiveModel(new_image_encoder(tiny_small_image_resnet()), 32, head_dim=8)
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    rows = Images(torch.arange(64) % 3, ("a", "b", "c"), 3, "noise", np.arange(64, dtype=np.uint64), pixels=pixels)
    views = ImageViews("cifar", size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    trainer = args.build_trainer(
        model,
        train_dataset=TrainingRows(rows, 32, None, seed=0),
        data_collator=collate_images,
        views=lambda images, generator: views(images, generator).double(),
    )
    return trainer


def train(make, folder, output_dir, resume=None, dtype=torch.float64, **settings):
    """All weights and buffers, and the logged losses, after 6 steps."""
    trainer = make(folder, output_dir, **SAVING | settings)
    trainer.model.to(dtype)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}, losses


def difference(a, b):
    """The norm of the difference relative to the norm, of all floating-point values together."""
    names = [name for name in a if a[name].is_floating_point()]
    apart = sum((a[name] - b[name]).double().square().sum() for name in names)
    return (apart / sum(a[name].double().square().sum() for name in names)).sqrt().item()


RUNS = {
    "dropout": (text, {}),
    "views": (text, {"views": ["delete"]}),
    "fixed length": (text, {"fixed": True}),
    "InfoNCE": (text, {"objective": "infonce", "gamma": None, "alpha": None}),
    "length groups": (text, {"grouped": True}),
    "mini-batches": (text, {"mini_batch_size": 3}),
    "stream": (text, {"streamed": True}),
    "accumulation": (text, {"gradient_accumulation_steps": 2}),
    "MoCo v3": (moco, {}),
    "images": (images, {}),
    "MoCo": (images, {"method": "moco", "queue_size": 64}),
}


ROUNDING = 1e-7  # weights are loaded in float32


@pytest.mark.slow
@pytest.mark.parametrize("name", one_fast(RUNS))
def test_two_processes_then_one_then_two_are_two(bert_folder, tmp_path, name):
    make, settings = RUNS[name]
    (whole, losses), _ = run_trainers(2, make, bert_folder, tmp_path / "whole", function=train, **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    one = train(make, bert_folder, tmp_path / "one", checkpoint, **settings, per_device_train_batch_size=16)
    saved = saved_run(tmp_path / "one" / "checkpoint-4")
    assert (saved["processes"], saved["per_device_train_batch_size"], saved["examples_per_seed"]) == (1, 16, 8)
    checkpoint = tmp_path / "one" / "checkpoint-4"
    two = run_trainers(2, make, bert_folder, tmp_path / "two", checkpoint, function=train, **settings)
    for end, logged in (one, two[0]):  # batch statistics are those of the first process
        assert difference(whole, end) < ROUNDING
        assert all(logged[step] == pytest.approx(losses[step], rel=1e-6) for step in losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropout", "images"])
def test_four_processes_go_on_as_two(bert_folder, tmp_path, name):
    """Two parts in each of two processes."""
    make, settings = RUNS[name]
    settings |= {"per_device_train_batch_size": 4}
    (whole, _), *_ = run_trainers(4, make, bert_folder, tmp_path / "whole", function=train, **settings)
    settings |= {"per_device_train_batch_size": 8}
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    (end, _), _ = run_trainers(2, make, bert_folder, tmp_path / "two", checkpoint, function=train, **settings)
    assert difference(whole, end) < ROUNDING


def split(folder, output_dir, checkpoint):
    with pytest.warns(UserWarning, match="not exact: .* dropout masks and augmentations are drawn for 8 examples"):
        return train(text, folder, output_dir, checkpoint)


@pytest.mark.slow
def test_one_process_goes_on_as_two(bert_folder, no_dropout_folder, tmp_path):
    """The batches are equal; dropout masks are not, which a warning says."""
    one = train(text, bert_folder, tmp_path / "a", per_device_train_batch_size=16)[0]
    (two, _), _ = run_trainers(2, bert_folder, tmp_path / "b", tmp_path / "a" / "checkpoint-2", function=split)
    assert difference(one, two) > 1e-4
    one = train(text, no_dropout_folder, tmp_path / "c", per_device_train_batch_size=16)[0]
    checkpoint = tmp_path / "c" / "checkpoint-2"
    with_warning = run_trainers(2, no_dropout_folder, tmp_path / "d", checkpoint, function=split)
    assert difference(one, with_warning[0][0]) < ROUNDING


def refused(folder, output_dir, checkpoint, **settings):
    with pytest.raises(InputError) as error:
        train(text, folder, output_dir, checkpoint, **settings)
    return str(error.value)


@pytest.mark.slow
def test_other_batches_are_refused(bert_folder, tmp_path):
    for name in (False, True):
        train(text, bert_folder, tmp_path / f"{name}", own_loss=name, per_device_train_batch_size=16)
    checkpoint = tmp_path / "True" / "checkpoint-2"
    for message in run_trainers(2, bert_folder, tmp_path / "b", checkpoint, function=refused, own_loss=True):
        assert "processes 1 -> 2" in message
    checkpoint = tmp_path / "False" / "checkpoint-2"
    sampler = {"accelerator_config": {"use_seedable_sampler": False}}
    cases = ({"per_device_train_batch_size": 16}, True), ({"global_batch": "none"}, False), (sampler, False)
    for settings, hint in cases:
        for message in run_trainers(2, bert_folder, tmp_path / "b", checkpoint, function=refused, **settings):
            assert not words_missing(message, ("processes 1 -> 2", "original settings")), message
            assert ("or per_device_train_batch_size=8" in message) is hint
