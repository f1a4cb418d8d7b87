"""Texts of similar length go through the encoder together: the same embeddings and gradients, of fewer tokens."""

import itertools

import numpy as np
import pytest
import torch

from fmicl_text.text import padding
from fmicl_text.text.model import TextContrastiveModel, build_text_encoder
from fmicl_text.text.padding import length_groups, pass_cost
from tests.support import make_trainer, relative_error, sentences


def least_cost(lengths, cost):
    """By trying all groups."""
    lengths = np.sort(lengths)[::-1]
    return min(
        sum(len(part) * part[0] for part in np.split(lengths, cuts)) + cost * (len(cuts) + 1)
        for number in range(padding.MOST_GROUPS)
        for cuts in itertools.combinations(range(1, len(lengths)), number)
    )


def test_the_groups_cost_least():
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths, cost = random.integers(1, 12, random.integers(1, 9)), random.integers(0, 8)
        groups = length_groups(lengths, cost)
        assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
        total = sum(len(rows) * lengths[rows].max() for rows in groups) + cost * len(groups)
        least, one = least_cost(lengths, cost), len(lengths) * lengths.max() + cost
        assert total == least or (len(groups) == 1 and total == one and least > (1 - padding.LEAST_GAIN) * one)


def test_rows_of_equal_length_are_one_group():
    assert [len(rows) for rows in length_groups(np.array([7] * 20), 0.0)] == [20]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_embeddings_and_gradients_are_those_of_the_padded_batch(no_dropout_folder, side, pooling):
    encoder = build_text_encoder(no_dropout_folder, pooling=pooling)
    encoder.tokenizer.padding_side = side
    model = TextContrastiveModel(encoder, "simcse").double()
    texts = [one * (1 + i % 3) for i, one in enumerate(sentences(24))]
    tokens = dict(encoder.tokenizer(texts, padding=True, return_tensors="pt"))
    shapes = []
    encoder[0].register_forward_pre_hook(lambda module, args: shapes.append(list(args[0]["input_ids"].shape)))
    weights = torch.randn(24, model.width, dtype=torch.float64)
    found = []
    for cost in (0.0, float("inf")):
        model.pass_cost = cost
        model.zero_grad()
        embeddings = model(dict(tokens))
        (embeddings * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((embeddings.detach(), gradient, sum(n * t for n, t in shapes)))
        shapes.clear()
    assert relative_error(found[0][0], found[1][0]) < 1e-12 and relative_error(found[0][1], found[1][1]) < 1e-12
    assert found[0][2] < 0.8 * found[1][2]


def test_the_cost_of_a_pass_is_that_of_few_tokens_in_a_large_encoder(bert_folder):
    class Layers(torch.nn.Sequential):
        def __init__(self, width):
            super().__init__(*(torch.nn.Linear(width, width) for _ in range(6)))

    assert pass_cost(Layers(64)) == pytest.approx(16 * pass_cost(Layers(256)))
    assert pass_cost(torch.nn.Identity()) == float("inf")


def losses(folder, output_dir, cost):
    trainer = make_trainer(folder, output_dir, max_steps=20, per_device_train_batch_size=16)
    trainer.model.pass_cost = cost
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*views of every text are identical")
def test_training_has_the_losses_of_padded_batches(no_dropout_folder, tmp_path):
    padded = losses(no_dropout_folder, tmp_path / "a", float("inf"))
    assert len(padded) == 20 and padded[-1] != padded[0]
    assert losses(no_dropout_folder, tmp_path / "b", 0.0) == pytest.approx(padded, rel=1e-5)


def test_compiled_models_keep_their_shapes(bert_folder, tmp_path):
    assert make_trainer(bert_folder, tmp_path).model.skips_padding
    assert not make_trainer(bert_folder, tmp_path, torch_compile=True).model.skips_padding


def test_a_mask_with_holes_is_one_pass():
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    calls = []
    features = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": mask}
    padding.embed_in_groups(lambda part: calls.append(part) or part["input_ids"].float(), features, 0.0)
    assert len(calls) == 1 and torch.equal(calls[0]["attention_mask"], mask)
