"""The losses in sentence-transformers' trainer: columns, plain and cached gradients, Matryoshka, adapters."""

import copy
import json
import pickle

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from transformers import TrainerCallback

from fmicl_text import build_text_encoder
from fmicl_text import losses as core
from fmicl_text.integrations.sentence_transformers import CachedFMICLLoss, FMICLLoss, token_ids
from fmicl_text.losses import tsallis
from tests.support import one_fast, peft_or_skip, run_trainers, sentences

COLUMNS = {
    "text": ["text"],
    "pairs": ["anchor", "positive"],
    "triplets": ["anchor", "positive", "negative"],
    "tuples": ["anchor", "positive", "negative_1", "negative_2", "negative_3"],
}
SETTINGS = {"divergence": "js", "gamma": 2.0, "alpha": 4.0}


def data(kind, rows=16):
    return Dataset.from_dict({name: sentences(rows, seed) for seed, name in enumerate(COLUMNS[kind])})


def encoder(folder):
    torch.manual_seed(0)
    return build_text_encoder(folder, pooling="mean")


def features(model, kind, rows=12):
    return [dict(model.preprocess(data(kind, rows)[name])) for name in COLUMNS[kind]]


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def close(a, b, bar=1e-6):
    assert b.norm() > 1e-2
    return ((a - b).norm() / b.norm()).item() < bar


@pytest.mark.parametrize("kind", ["pairs", "triplets", "tuples"])
def test_the_loss_is_that_of_the_core(no_dropout_folder, kind):
    model = encoder(no_dropout_folder)
    x, y, *hard = (model(columns)["sentence_embedding"] for columns in features(model, kind))
    expected = core.FMICLLoss(**SETTINGS)(x, y, torch.stack(hard, dim=1) if hard else None)
    found = FMICLLoss(model, **SETTINGS)(features(model, kind), None)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(FMICLLoss(model, **SETTINGS).compute_loss_from_embeddings([x, y, *hard]), expected)


@pytest.mark.filterwarnings("ignore:.*views of every text are identical")  # of one column, without dropout
@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("size", [{"mini_batch_size": 5}, {"mini_batch_num_tokens": 40}], ids=str)
def test_cached_gradients_are_the_plain_ones(no_dropout_folder, kind, size):
    model = encoder(no_dropout_folder)
    plain = gradient(model, FMICLLoss(model, **SETTINGS)(features(model, kind), None))
    assert close(gradient(model, CachedFMICLLoss(model, **SETTINGS, **size)(features(model, kind), None)), plain)


@pytest.mark.parametrize("kind", ["text", "pairs"])
@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
def test_warning_about_identical_views(no_dropout_folder, kind, make):
    """It is given in training only: in evaluation, dropout is off."""
    model = encoder(no_dropout_folder)
    loss = make(model, **SETTINGS)
    views = features(model, "text") * (2 if kind == "pairs" else 1)
    with torch.no_grad():
        loss(views, None)
    model.train()
    with pytest.warns(UserWarning, match=r"views of every text are identical .* dropout"):
        loss(views, None)
    loss(views, None)  # once


def test_cached_dropout_is_the_same_in_both_passes(bert_folder):
    """With one mini-batch per column, the draws are those of the plain loss."""
    model = encoder(bert_folder).train()
    torch.manual_seed(5)
    plain = gradient(model, FMICLLoss(model, **SETTINGS)(features(model, "text"), None))
    torch.manual_seed(5)
    assert close(gradient(model, CachedFMICLLoss(model, **SETTINGS)(features(model, "text"), None)), plain)


def test_equal_texts_are_no_negatives(no_dropout_folder):
    model = encoder(no_dropout_folder)
    texts = ["a dog runs", "the cat sleeps", "a dog runs", "one man sings", "two birds"]
    pairs = [dict(model.preprocess(texts)), dict(model.preprocess(sentences(5)))]
    ids = torch.tensor([0, 1, 0, 2, 3])
    x, y = (model(dict(column))["sentence_embedding"] for column in pairs)
    own = torch.stack([ids, 10 + torch.arange(5)], dim=1)
    expected = core.FMICLLoss(**SETTINGS)(x, y, text_ids=own)
    assert (expected - core.FMICLLoss(**SETTINGS)(x, y)).abs() > 1e-4
    torch.testing.assert_close(FMICLLoss(model, **SETTINGS)(pairs, None), expected)


def test_ids_are_of_tokens_alone(no_dropout_folder):
    """They depend on the order and the number of tokens, not on padding. Images have none."""
    model = encoder(no_dropout_folder)
    short = model.preprocess(["a dog", "dog a", "a dog dog"])
    long = model.preprocess(["the man walks over the river today", "a dog"])
    first, second = token_ids(short), token_ids(long)
    assert first[0] == second[1] and len({*first.tolist(), *second.tolist()}) == 4
    assert token_ids({"pixel_values": torch.zeros(2, 3, 4, 4)}) is None
    many = torch.randint(0, 30000, (4000, 12), generator=torch.Generator().manual_seed(0))
    ids = token_ids({"input_ids": many, "attention_mask": torch.ones_like(many)})
    assert len(ids.unique()) == len(many.unique(dim=0)) == 4000


def train(model, loss, kind, folder, rows=32, callbacks=None, **settings):
    args = SentenceTransformerTrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True, report_to="none",
        save_strategy="no", learning_rate=1e-3, logging_steps=1, **settings,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=data(kind, rows), loss=loss, callbacks=callbacks
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer.train()
    moved = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
    return trainer, moved


@pytest.mark.filterwarnings("ignore")  # sentence-transformers' own
@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
def test_it_trains_and_saves(bert_folder, tmp_path, kind, make):
    model = encoder(bert_folder)
    trainer, moved = train(model, make(model, **SETTINGS), kind, tmp_path)
    assert len(moved) > 20 and all("loss" in entry for entry in trainer.state.log_history[:3])
    model.save_pretrained(str(tmp_path / "final"))
    again = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    texts = sentences(4, seed=9)
    assert (again.encode(texts) == model.encode(texts)).all()
    card = (tmp_path / "final" / "README.md").read_text()
    assert '"divergence": "js"' in card and "lu2023fmicl" in card and f"loss:{make.__name__}" in card


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
def test_matryoshka(no_dropout_folder, tmp_path, make):
    """The gradient is the sum over widths, plain and cached."""
    model = encoder(no_dropout_folder)
    wrapped = MatryoshkaLoss(model, make(model, **SETTINGS), [32, 16, 8])
    found = gradient(model, wrapped(features(model, "pairs"), None))
    x, y = (model(column)["sentence_embedding"] for column in features(model, "pairs"))
    parts = [core.FMICLLoss(**SETTINGS)(x[:, :width], y[:, :width]) for width in (32, 16, 8)]
    assert close(found, gradient(model, sum(parts)))
    _, moved = train(model, wrapped, "pairs", tmp_path)
    assert len(moved) > 20


@pytest.mark.filterwarnings("ignore")
def test_lora(bert_folder, tmp_path):
    peft = peft_or_skip()
    model = encoder(bert_folder)
    model.add_adapter(peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query", "value"]))
    _, moved = train(model, FMICLLoss(model, **SETTINGS), "pairs", tmp_path)
    assert moved and all("lora" in name for name in moved)


def test_hyperparameters_are_attributes_and_json(bert_folder):
    model = encoder(bert_folder)
    loss = FMICLLoss(model, **SETTINGS, gather_across_devices=True)
    config = {
        "divergence": "js", "gamma": 2.0, "alpha": 4.0, "negatives": "same_view", "similarity": "gaussian",
        "gather_across_devices": True,
    }  # fmt: skip
    assert json.loads(json.dumps(loss.get_config_dict())) == config
    assert (loss.gamma, loss.alpha, loss.global_batch) == (2.0, 4.0, "gather")
    cached = CachedFMICLLoss(model, **SETTINGS, gather_across_devices=True)
    assert cached.get_config_dict() == config | {"mini_batch_size": 32, "mini_batch_num_tokens": None}


def test_invalid_arguments(bert_folder):
    model = encoder(bert_folder)
    with pytest.raises(ValueError, match=r"one or more columns .* 0"):
        FMICLLoss(model)([], None)
    with pytest.raises(ValueError, match=r"two columns of embeddings, got 1"):
        FMICLLoss(model).compute_loss_from_embeddings([torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"divergence=chi: .* kl, js"):
        FMICLLoss(model, divergence="chi")
    with pytest.raises(ValueError, match=r"negatives must be one of same_view, cross_view, both; got 'queue'"):
        FMICLLoss(model, negatives="queue")
    with pytest.raises(ValueError, match=r"mini_batch_size .* 1, got 0"):
        CachedFMICLLoss(model, mini_batch_size=0)
    with pytest.raises(ValueError, match=r"mini_batch_num_tokens .* 1, got 0"):
        CachedFMICLLoss(model, mini_batch_num_tokens=0)


CHANGES = {
    "alpha": 4000.0, "gamma": 1.0, "negatives": "both", "divergence": "kl", "similarity": "cosine",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
def test_a_changed_hyperparameter_acts_at_the_next_step(no_dropout_folder, name, make):
    model = encoder(no_dropout_folder)
    loss = make(model, **SETTINGS)
    before = loss(features(model, "pairs"), None)
    setattr(loss, name, CHANGES[name])
    expected = make(model, **(SETTINGS | {name: CHANGES[name]}))
    after = loss(features(model, "pairs"), None)
    assert after == expected(features(model, "pairs"), None) and (after - before).abs() > 1e-3
    assert loss.get_config_dict() == expected.get_config_dict()
    assert close(gradient(model, after), gradient(model, expected(features(model, "pairs"), None)))


def test_changed_hyperparameters_are_checked(bert_folder):
    loss = CachedFMICLLoss(encoder(bert_folder), **SETTINGS)
    loss.gather_across_devices, loss.mini_batch_size = True, 7
    assert loss.global_batch == "gather" and loss.get_config_dict()["mini_batch_size"] == 7
    wrong = {
        "alpha": -1.0, "gamma": float("nan"), "negatives": "queue", "divergence": "chi", "similarity": "dot",
        "mini_batch_size": 0, "mini_batch_num_tokens": 0,
    }  # fmt: skip
    for name, value in wrong.items():
        before = getattr(loss, name)
        with pytest.raises(ValueError, match=name):
            setattr(loss, name, value)
        assert getattr(loss, name) is before


class Schedule(TrainerCallback):
    def __init__(self, loss):
        self.loss = loss

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss.alpha = 4.0 * 10**state.global_step


@pytest.mark.filterwarnings("ignore")
def test_alpha_scheduled_by_a_callback(no_dropout_folder, tmp_path):
    """Logged losses are near -log(2) alpha."""
    model = encoder(no_dropout_folder)
    loss = FMICLLoss(model, **SETTINGS)
    trainer, _ = train(model, loss, "pairs", tmp_path, callbacks=[Schedule(loss)])
    first, second, third = (entry["loss"] for entry in trainer.state.log_history[:3])
    assert 6 < second / first < 30 and 6 < third / second < 30


@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
@pytest.mark.parametrize("divergence", ["kl", "js", tsallis(1.5)], ids=["kl", "js", "tsallis"])
def test_losses_are_pickled_and_copied(no_dropout_folder, make, divergence):
    model = encoder(no_dropout_folder)
    loss = make(model, **(SETTINGS | {"divergence": divergence}))
    expected = loss(features(model, "triplets"), None)
    for copied in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert copied.model is not model
        assert copied(features(model, "triplets"), None) == expected


def weights_after(folder, output_dir, make, **settings):
    model = encoder(folder)
    loss = make(model, **SETTINGS, gather_across_devices=True)
    settings |= {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.05}
    args = SentenceTransformerTrainingArguments(
        str(output_dir), max_steps=3, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", **settings
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    SentenceTransformerTrainer(model=model, args=args, train_dataset=data("pairs", 64), loss=loss).train()
    return before, {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", one_fast([CachedFMICLLoss, FMICLLoss]))
def test_two_processes_of_8_are_one_of_16(no_dropout_folder, tmp_path, make):
    before, one = weights_after(no_dropout_folder, tmp_path, make, per_device_train_batch_size=16)
    for _, two in run_trainers(
        2, no_dropout_folder, tmp_path, make, function=weights_after, per_device_train_batch_size=8
    ):
        assert max((two[name] - one[name]).abs().max() for name in one) < 1e-6
    assert max((one[name] - before[name]).abs().max() for name in one) > 1e-3
