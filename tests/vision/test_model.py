"""The image model in the trainer: new views in every micro-step, a head that is stored only in checkpoints."""

import numpy as np
import pytest
import torch
from PIL import Image

from fmicl_text.cli.vision import VisionTrainingArguments
from fmicl_text.training.trainer import FMICLTrainer
from fmicl_text.vision.data import Images, TrainingRows, collate_images, load_images
from fmicl_text.vision.encoder import new_image_encoder
from fmicl_text.vision.model import ImageContrastiveModel, projection_head
from fmicl_text.vision.preprocessing import new_preprocessing
from fmicl_text.vision.views import ImageViews
from tests.support import IMAGE_FAMILIES

MEAN, STD = (0.5,) * 3, (0.25,) * 3


def pixels(count=24):
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def images():
    hashes = np.arange(24, dtype=np.uint64)
    return Images(torch.arange(24) % 3, ("a", "b", "c"), 3, "noise", hashes, pixels=pixels())


def model():
    torch.manual_seed(0)
    config = IMAGE_FAMILIES["resnet, small stem"][0]
    return ImageContrastiveModel(new_image_encoder(type(config).from_dict(config.to_dict())), 16, head_dim=8)


def test_equal_embeddings_of_both_views_are_warned_of(tmp_path):
    """In words for images: they have no dropout that could be set."""
    args = VisionTrainingArguments(str(tmp_path), per_device_train_batch_size=4, max_steps=1, eval_strategy="no")
    rows = TrainingRows(images(), 16, (0.2, 1.0), seed=0)
    trainer = FMICLTrainer(
        model(),
        args,
        train_dataset=rows,
        data_collator=collate_images,
        views=lambda images, generator: torch.zeros(len(images), 2, 3, 16, 16),
    )
    with pytest.warns(UserWarning, match="both views of every image have the same embedding"):
        trainer.train()


def test_every_micro_step_draws_new_views(tmp_path):
    seeds = []
    make = ImageViews("cifar", 16, MEAN, STD)

    def record(images, generator):
        seeds.append(generator.initial_seed())
        return make(images, generator)

    args = VisionTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=3,
        eval_strategy="no",
        gamma=1.0,
        alpha=40.0,
    )
    wrapped = model()
    before = {name: weight.clone() for name, weight in wrapped.named_parameters()}
    rows = TrainingRows(images(), 16, (0.2, 1.0), seed=0)
    trainer = FMICLTrainer(wrapped, args, train_dataset=rows, data_collator=collate_images, views=record)
    trainer.train()
    assert len(seeds) == len(set(seeds)) == 6
    assert all(not torch.equal(weight, before[name]) for name, weight in wrapped.named_parameters())
    again = FMICLTrainer(model(), args, train_dataset=rows, data_collator=collate_images, views=record)
    again.train()
    assert seeds[6:] == seeds[:6]
    assert all(
        torch.equal(a, b) for a, b in zip(wrapped.state_dict().values(), again.model.state_dict().values(), strict=True)
    )


def test_a_checkpoint_contains_encoder_and_head_an_export_only_the_encoder(tmp_path):
    wrapped = model()
    with torch.no_grad():
        wrapped({"pixel_values": pixels() / 64 - 2})  # to change the batch statistics
    wrapped.save_encoder(str(tmp_path), wrapped.state_dict())
    assert not (tmp_path / "training_only.safetensors").exists()
    wrapped.save_training_only(str(tmp_path), wrapped.state_dict())
    other = model()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(1)
    other.load_checkpoint(str(tmp_path))
    for name, weight in wrapped.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name


def test_custom_views_from_the_collator(tmp_path):
    """Transforms of single images in the workers, such as torchvision's, instead of the trainer's `views`."""
    seen = []

    def two_views(rows):
        views = [torch.stack([row.float() / 255 + 0.1 * torch.randn(row.shape) for _ in range(2)]) for row in rows]
        seen.append(torch.stack(views))
        return {"pixel_values": seen[-1]}

    args = VisionTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, eval_strategy="no", gamma=1.0, alpha=40.0
    )
    wrapped = model()
    inputs = []
    wrapped.register_forward_hook(lambda module, args, output: inputs.append(args[0]["pixel_values"]))
    FMICLTrainer(wrapped, args, train_dataset=TrainingRows(images(), 16, None, seed=0), data_collator=two_views).train()
    assert len(inputs) == 2 and torch.equal(inputs[0], seen[0].flatten(0, 1))


def test_the_head_has_three_layers():
    head = projection_head(32, 8)
    linear = [module for module in head if isinstance(module, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(32, 8), (8, 8), (8, 8)]
    assert head(torch.randn(4, 32)).shape == (4, 8)


@pytest.mark.parametrize(
    "family, channels, expected",
    [
        ("vit", 3, {"feature": "last_hidden_state[:, 0]", "pipeline": True, "small_image_stem": False}),
        ("resnet", 1, {"feature": "pooler_output.flatten(1)", "pipeline": False, "small_image_stem": False}),
        ("resnet, small stem", 3, {"feature": "pooler_output.flatten(1)", "pipeline": False, "small_image_stem": True}),
    ],
)
def test_the_description_for_the_model_card(family, channels, expected):
    config = IMAGE_FAMILIES[family][0]
    encoder = new_image_encoder(type(config).from_dict(config.to_dict() | {"num_channels": channels}))
    processor = new_preprocessing(32, MEAN[:channels], STD[:channels]).processor
    described = ImageContrastiveModel(encoder, 32, 8, processor).describe()
    expected |= {"channels": channels, "size": 32, "processor": True, "custom_code": False, "base_model": None}
    assert {name: described[name] for name in expected} == expected
    assert ImageContrastiveModel(encoder, 32, 8).describe() == described | {"processor": False, "pipeline": False}


def test_mini_batches_are_not_supported():
    with pytest.raises(ValueError, match=r"mini_batch_size=2 .*: batch normalization"):
        VisionTrainingArguments("runs/x", mini_batch_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_persistent_workers_draw_the_crops_of_each_epoch(tmp_path, resumed):
    """Image files, whose crops are drawn by the workers: 3 epochs of 3 steps, with and without workers."""
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "images" / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        size = (20 + i % 2, 24)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    files = load_images(str(tmp_path / "images"), held_out=0).train
    assert files.pixels is None and len(files) == 24
    found = []
    for name, workers in (("none", 0), ("two", 2)):
        args = VisionTrainingArguments(
            str(tmp_path / name),
            per_device_train_batch_size=8,
            max_steps=9,
            eval_strategy="no",
            save_strategy="steps",
            save_steps=4,
            save_total_limit=9,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
        )
        for again in (False, True)[: 1 + (resumed and workers > 0)]:
            rows = TrainingRows(files, 16, (0.2, 1.0), seed=0)
            views = ImageViews("cifar", 16, MEAN, STD)
            trainer = FMICLTrainer(model(), args, train_dataset=rows, data_collator=collate_images, views=views)
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-4") if again else None)
        found.append(trainer.model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
