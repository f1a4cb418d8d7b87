"""The losses in sentence-transformers' trainer: columns, plain and cached gradients, Matryoshka, adapters."""

import copy
import inspect
import json
import math
import pickle
import re
import textwrap

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import TrainerCallback

from fmicl_text import build_text_encoder
from fmicl_text import losses as core
from fmicl_text.integrations.sentence_transformers import CachedFMICLLoss, FMICLLoss, token_ids
from fmicl_text.losses import tsallis
from tests.support import WORDS, one_fast, peft_or_skip, run_trainers, sentences

COLUMNS = {
    "text": ["text"],
    "pairs": ["anchor", "positive"],
    "triplets": ["anchor", "positive", "negative"],
    "tuples": ["anchor", "positive", "negative_1", "negative_2", "negative_3"],
}
SETTINGS = {"divergence": "js", "gamma": 2.0, "alpha": 4.0, "negatives": "same_view"}
DEFAULT_NEGATIVES = {"divergence": "js", "gamma": 2.0, "alpha": 4.0}


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


@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
def test_default_negatives_depend_on_the_columns(bert_folder, make):
    """One loss may receive both kinds of data. A choice is kept, also one that is made later."""
    model = encoder(bert_folder).eval()
    loss = make(model, **DEFAULT_NEGATIVES)
    assert loss.get_config_dict()["negatives"] is None
    for kind, negatives in (
        ("text", "same_view"),
        ("pairs", "cross_view"),
        ("tuples", "cross_view"),
        ("text", "same_view"),
    ):
        expected = make(model, **DEFAULT_NEGATIVES, negatives=negatives)
        torch.testing.assert_close(loss(features(model, kind), None), expected(features(model, kind), None))
        assert loss.negatives == negatives == expected.get_config_dict()["negatives"]
    loss.negatives = "both"
    loss(features(model, "pairs"), None)
    assert loss.negatives == loss.get_config_dict()["negatives"] == "both"


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


def flat(model, texts):
    """Features as for flash attention, without padding."""
    rows = model.tokenizer(texts)["input_ids"]
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
    }


def bag(model, texts):
    """Features of a StaticEmbedding."""
    rows = model.tokenizer(texts)["input_ids"]
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)[:-1]
    return {"input_ids": torch.tensor([token for row in rows for token in row]), "offsets": offsets}


def padded(model, texts, side="right", width=None, pad=0):
    """Padded features on a side, to a width, with any pad token."""
    rows = model.tokenizer(texts)["input_ids"]
    width = width or max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


FORMS = {
    "left": lambda model, texts: padded(model, texts, side="left"),
    "wide": lambda model, texts: padded(model, texts, width=40),
    "left and wide": lambda model, texts: padded(model, texts, side="left", width=40),
    "another pad token": lambda model, texts: padded(model, texts, pad=9),
    "bool mask, int32 tokens": lambda model, texts: {
        "input_ids": padded(model, texts)["input_ids"].int(),
        "attention_mask": padded(model, texts)["attention_mask"].bool(),
    },
    "flattened": flat,
    "bag": bag,
}


class Fixed(torch.nn.Module):
    """Returns given embeddings, whatever the features."""

    def __init__(self, *embeddings):
        super().__init__()
        self.embeddings, self.calls = embeddings, 0

    def forward(self, features):
        self.calls += 1
        return {"sentence_embedding": self.embeddings[self.calls - 1]}


@pytest.mark.parametrize("form", FORMS)
def test_ids_do_not_depend_on_the_form_of_the_batch(no_dropout_folder, form):
    model = encoder(no_dropout_folder)
    texts = [*sentences(6), "", *sentences(3), "a dog", "dog a", "a dog dog", ""]
    ids = token_ids(FORMS[form](model, texts))
    assert torch.equal(ids, token_ids(padded(model, texts)))
    assert (ids[:, None] == ids).tolist() == [[a == b for a in texts] for b in texts]


def test_ids_of_texts_without_tokens():
    """The first and the last have none; StaticEmbedding adds no special tokens."""
    ids = token_ids({"input_ids": torch.tensor([5, 6, 5]), "offsets": torch.tensor([0, 0, 2, 3, 3])})
    assert ids[0] == ids[3] and len(ids.unique()) == 4 - 1


def test_ids_are_a_function_of_the_tokens():
    """So they are equal in every process: the sum of the hashes of (token, place), in Python's integers."""

    def int64(number):
        return (number + 2**63) % 2**64 - 2**63

    def scramble(number):
        for factor, shift in ((-4658895280553007687, 31), (-7723592293110705685, 27)):
            number = int64((number ^ (number >> shift)) * factor)
        return number ^ (number >> 33)

    features = {"input_ids": torch.tensor([[2, 7, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    expected = int64(sum(scramble((token << 32) + place) for place, token in enumerate([2, 7, 3], start=1)))
    assert token_ids(features).item() == expected


def test_texts_that_differ_after_the_last_token_are_one(no_dropout_folder):
    model = encoder(no_dropout_folder)
    model.max_seq_length = 6
    begin = ["a dog runs near", "the cat sleeps on", "one man sings with"]
    texts = [f"{text} {word}" for text in begin for word in ("a tree", "the red car")]
    pairs = [model.preprocess(texts), model.preprocess(sentences(6))]
    x, y = (model(dict(column))["sentence_embedding"] for column in pairs)
    ids = torch.tensor([[0, 10], [0, 11], [1, 12], [1, 13], [2, 14], [2, 15]])
    torch.testing.assert_close(FMICLLoss(model, **SETTINGS)(pairs), core.FMICLLoss(**SETTINGS)(x, y, text_ids=ids))


def test_flattened_duplicates_are_no_negatives(no_dropout_folder):
    """The loss is that of padded inputs with the same embeddings."""
    model = encoder(no_dropout_folder)
    texts = ["a dog runs", "the cat sleeps", "a dog runs", "one man sings", "two birds"]
    columns = [model.preprocess(texts), model.preprocess(sentences(5))]
    embeddings = [model(dict(column))["sentence_embedding"] for column in columns]
    found = FMICLLoss(Fixed(*embeddings), **SETTINGS)([flat(model, texts), flat(model, sentences(5))])
    torch.testing.assert_close(found, FMICLLoss(model, **SETTINGS)(columns))


def test_images_and_their_captions():
    """Texts with images are not compared by their tokens, which are placeholders; captions are."""
    x, y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    same = {"input_ids": torch.ones(4, 3).long(), "attention_mask": torch.ones(4, 3).long()}
    images = {"pixel_values": torch.zeros(4, 3, 2, 2)}
    different = core.FMICLLoss(**SETTINGS)(x, y)
    torch.testing.assert_close(FMICLLoss(Fixed(x, y), **SETTINGS)([same | images, images]), different)
    torch.testing.assert_close(FMICLLoss(Fixed(x, y), **SETTINGS)([images, images]), different)
    captions = {"input_ids": torch.tensor([[1], [2], [1], [3]]), "attention_mask": torch.ones(4, 1).long()}
    ids = torch.tensor([[0, 10], [1, 11], [0, 12], [2, 13]])
    masked = core.FMICLLoss(**SETTINGS)(x, y, text_ids=ids)
    assert (masked - different).abs() > 1e-3
    torch.testing.assert_close(FMICLLoss(Fixed(x, y), **SETTINGS)([captions, images]), masked)
    torch.testing.assert_close(FMICLLoss(Fixed(x, y), **SETTINGS)([images, captions]), masked)


def static_model():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


def test_static_embeddings():
    model = static_model()
    texts = ["a dog runs", "the cat sleeps", "a dog runs", "one man sings", "two bird"]
    pairs = [model.preprocess(texts), model.preprocess(sentences(5))]
    x, y = (model(dict(column))["sentence_embedding"] for column in pairs)
    ids = torch.tensor([[0, 10], [1, 11], [0, 12], [2, 13], [3, 14]])
    torch.testing.assert_close(FMICLLoss(model, **SETTINGS)(pairs), core.FMICLLoss(**SETTINGS)(x, y, text_ids=ids))
    router = Router({"query": [static_model()[0]], "document": [static_model()[0]]})
    for refused in (model, SentenceTransformer(modules=[router], device="cpu")):
        with pytest.raises(ValueError, match=r"CachedFMICLLoss .* StaticEmbedding .* FMICLLoss"):
            CachedFMICLLoss(refused)


@pytest.mark.filterwarnings("ignore")
def test_static_embeddings_are_trained(tmp_path):
    model = static_model()
    trainer, moved = train(model, FMICLLoss(model, **SETTINGS), "tuples", tmp_path)
    assert moved == ["0.embedding.weight"] and all("loss" in entry for entry in trainer.state.log_history[:3])


def test_the_routes_of_a_router_have_tokens_of_their_own():
    """Equal tokens are equal texts within a route only: here, token 1 is `a` for queries and `the` for documents."""
    first, second = static_model()[0], static_model()[0]
    model = SentenceTransformer(modules=[Router({"query": [first], "document": [second]})], device="cpu")
    queries = {"input_ids": torch.tensor([1, 2, 3, 2]), "offsets": torch.arange(4), "task": "query"}
    answers = {"input_ids": torch.tensor([2, 3, 1, 4]), "offsets": torch.arange(4), "task": "document"}
    x, y = first(dict(queries))["sentence_embedding"], second(dict(answers))["sentence_embedding"]
    ids = torch.tensor([[1, 12], [2, 13], [3, 11], [2, 14]])
    loss = FMICLLoss(model, **SETTINGS)
    masked = loss.masked_loss([x, y], loss.ids_of_columns([queries, answers]))
    torch.testing.assert_close(masked, core.FMICLLoss(**SETTINGS)(x, y, text_ids=ids))


@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
@pytest.mark.parametrize("kind", ["pairs", "tuples"])
@pytest.mark.parametrize("case", ["one row", "one text"])
@pytest.mark.filterwarnings("ignore:no negative pair in a batch of 8")
def test_a_batch_without_negatives_has_its_positive_term(no_dropout_folder, make, kind, case):
    """One query with eight positives, and its only negative, or a last batch of one row."""
    model = encoder(no_dropout_folder)
    columns = features(model, kind, rows=1 if case == "one row" else 8)
    if case == "one text":
        columns[0] = model.preprocess(["a dog runs"] * 8)
        columns[2:] = [dict(columns[0]) for _ in columns[2:]]
    elif kind == "tuples":
        columns[2:] = [dict(columns[0]) for _ in columns[2:]]
    x, y = (model(dict(column))["sentence_embedding"] for column in columns[:2])
    expected = core.FMICLLoss(**SETTINGS)(x, y, text_ids=torch.zeros(len(x), 1, dtype=torch.long))
    found = make(model, **SETTINGS)(columns)
    torch.testing.assert_close(found, expected)
    assert expected > 1e-3 and close(gradient(model, found), gradient(model, expected))


@pytest.mark.filterwarnings("ignore")
def test_adaptive_layers_of_one_column(bert_folder):
    """The loss is called once per layer; both views of a lower layer are those of the same two forward passes."""
    model = encoder(bert_folder).train()
    seen = []

    class Recorded(FMICLLoss):
        def masked_loss(self, embeddings, ids):
            seen.append([rows.detach() for rows in embeddings])
            return super().masked_loss(embeddings, ids)

    loss = AdaptiveLayerLoss(model, Recorded(model, **SETTINGS), n_layers_per_step=-1)
    loss(features(model, "text"), None).backward()
    assert len(seen) == 3  # of the last layer, the embeddings, the first layer
    assert all((x - y).norm() > 1e-2 for x, y in seen)


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


def default_trainer(model, loss, folder, train_dataset, eval_dataset=None, **settings):
    """A trainer with default arguments, but quiet, on the CPU, and without reports."""
    args = SentenceTransformerTrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **settings
    )
    return SentenceTransformerTrainer(model, args, train_dataset, eval_dataset, loss=loss)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
@pytest.mark.parametrize("kind", one_fast(["pairs", "text", "triplets", "tuples"]))
def test_default_arguments_train_any_number_of_rows(bert_folder, tmp_path, kind, make):
    """From one batch of 8, the default, to two batches and a row; none is dropped in training or in evaluation."""
    model = encoder(bert_folder)
    for rows in range(8, 18):
        loss = make(model, **SETTINGS)
        trainer = default_trainer(
            model, loss, tmp_path, data(kind, rows), data(kind, rows), num_train_epochs=1, logging_steps=1,
            save_strategy="no", eval_strategy="epoch",
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == math.ceil(rows / 8)
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(logged) == math.ceil(rows / 8) and len(evaluated) == 1
        assert all(math.isfinite(value) for value in logged + evaluated)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
def test_evaluation_of_a_batch_and_a_row(no_dropout_folder, tmp_path, make):
    """The mean over 9 rows, any of which may come last, because the trainer shuffles them in evaluation, too."""
    model = encoder(no_dropout_folder)
    rows = data("pairs", 9)
    columns = [model.preprocess(rows[name]) for name in COLUMNS["pairs"]]
    x, y = (model(column)["sentence_embedding"].detach() for column in columns)
    loss, expected = core.FMICLLoss(**SETTINGS), []
    for last in range(9):
        others = [i for i in range(9) if i != last]
        first, alone = loss(x[others], y[others]), loss(x[[last]], y[[last]])
        assert first > alone > 0  # a row has no negatives
        expected.append((8 * first + alone).item() / 9)
    found = default_trainer(model, make(model, **SETTINGS), tmp_path, rows, rows).evaluate()["eval_loss"]
    assert min(abs(found - value) for value in expected) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
def test_gamma_and_alpha_are_measured_on_the_first_batch(no_dropout_folder, tmp_path, make):
    model = encoder(no_dropout_folder)
    rows = data("pairs", 8)
    x, y = (model(model.preprocess(rows[name]))["sentence_embedding"].detach() for name in COLUMNS["pairs"])
    separation = core.FMICLLoss("pearson", 1.0, 1.0, "cross_view").distances(x, y).separation
    gamma = min(max(1.25 * separation / 2, 2.5), 10)
    expected = core.FMICLLoss("pearson", gamma, 1.0, "cross_view").balance(x, y).alpha
    loss = make(model, "pearson", "auto", "auto")
    assert loss.get_config_dict()["alpha"] == "auto"
    default_trainer(model, loss, tmp_path, rows).train()
    measured = [loss.get_config_dict()[name] for name in ("gamma", "alpha")]
    assert measured == pytest.approx([gamma, expected], rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", one_fast([CachedFMICLLoss, FMICLLoss]))
def test_prompts_datasets_and_accumulation(bert_folder, tmp_path, make):
    """Two datasets with their own losses and columns, labels, prompts, no duplicates, bfloat16, two batches a step."""
    model = encoder(bert_folder)
    datasets = {"pairs": data("pairs", 20).add_column("label", [0, 1] * 10), "tuples": data("tuples", 13)}
    trainer = default_trainer(
        model, {"pairs": make(model, **SETTINGS), "tuples": make(model, **SETTINGS)}, tmp_path,
        DatasetDict(datasets), DatasetDict(datasets), prompts={"anchor": "a dog ", "positive": "the cat "},
        batch_sampler="no_duplicates", bf16=True, gradient_accumulation_steps=2, num_train_epochs=1, logging_steps=1,
        save_strategy="no", gradient_checkpointing=True,
    )  # fmt: skip
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all(math.isfinite(value) for value in logged)
    assert {"eval_pairs_loss", "eval_tuples_loss"} <= set(trainer.evaluate())


def test_ids_with_prompts(no_dropout_folder):
    """Duplicates are found behind a prompt, on either side of the padding."""
    model = encoder(no_dropout_folder)
    texts = ["a dog runs", "the cat sleeps near one tree", "a dog runs"]
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        ids = token_ids(model.preprocess(texts, prompt="one man sees "))
        assert ids[0] == ids[2] != ids[1]
        assert ids[0] == token_ids(model.preprocess(["one man sees a dog runs"]))[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
def test_the_example_of_the_docstring_runs(bert_folder, tmp_path, monkeypatch, make):
    """With the tiny model in place of the one on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    example = textwrap.dedent(make.__init__.__doc__.split("::\n\n")[-1])
    assert 'SentenceTransformer("microsoft/mpnet-base")' in example and f"loss = {make.__name__}(" in example
    variables = {}
    exec(example.replace("microsoft/mpnet-base", bert_folder), variables)
    assert isinstance(variables["loss"], make) and variables["trainer"].state.global_step == 3


def test_the_docstring_names_every_argument():
    for make in (FMICLLoss, CachedFMICLLoss):
        text = make.__init__.__doc__
        sections = "Args Raises References Requirements Inputs Recommendations Relations Example"
        assert re.findall(r"^        (\w+):$", text, re.M) == sections.split()
        arguments = re.findall(r"^            (\w+):", text[text.index("Args:") : text.index("Raises:")], re.M)
        assert arguments == list(inspect.signature(make).parameters)


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


@pytest.mark.parametrize("number", [np.float32(3), torch.tensor(3.0), 3])
def test_hyperparameters_of_other_libraries_are_numbers_in_the_config(bert_folder, number):
    loss = FMICLLoss(encoder(bert_folder), **SETTINGS)
    loss.alpha = number
    assert json.loads(json.dumps(loss.get_config_dict()))["alpha"] == 3.0


def test_changed_hyperparameters_are_checked(bert_folder):
    loss = CachedFMICLLoss(encoder(bert_folder), **SETTINGS)
    loss.gather_across_devices, loss.mini_batch_size = True, 7
    assert loss.global_batch == "gather" and loss.get_config_dict()["mini_batch_size"] == 7
    wrong = {
        "alpha": -1.0, "gamma": float("nan"), "negatives": "queue", "divergence": "chi", "similarity": "dot",
        "mini_batch_size": 0, "mini_batch_num_tokens": 0,
    }  # fmt: skip
    other_types = [("alpha", "4"), ("alpha", None), ("gamma", True), ("divergence", None), ("divergence", torch.exp)]
    other_types += [("mini_batch_size", "8"), ("mini_batch_size", 2.5), ("mini_batch_size", None)]
    for name, value in [*wrong.items(), *other_types]:
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


def weights_after(folder, output_dir, make, kind, **settings):
    model = encoder(folder)
    loss = make(model, **SETTINGS, gather_across_devices=True)
    settings |= {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.05}
    args = SentenceTransformerTrainingArguments(
        str(output_dir), max_steps=3, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", **settings
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    rows = data(kind, 64).remove_columns("anchor").add_column("anchor", sentences(24) * 2 + sentences(16))
    rows = rows.select_columns(COLUMNS[kind])
    SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss).train()
    return before, {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "kind"),
    one_fast([(CachedFMICLLoss, "tuples"), (CachedFMICLLoss, "pairs"), (FMICLLoss, "pairs"), (FMICLLoss, "tuples")]),
)
def test_two_processes_of_8_are_one_of_16(no_dropout_folder, tmp_path, make, kind):
    """Anchors recur within and across the processes."""
    before, one = weights_after(no_dropout_folder, tmp_path, make, kind, per_device_train_batch_size=16)
    for _, two in run_trainers(
        2, no_dropout_folder, tmp_path, make, kind, function=weights_after, per_device_train_batch_size=8
    ):
        assert max((two[name] - one[name]).abs().max() for name in one) < 1e-6
    assert max((one[name] - before[name]).abs().max() for name in one) > 1e-3


@pytest.mark.parametrize("kind", ["text", "pairs"])
@pytest.mark.parametrize("make", [FMICLLoss, CachedFMICLLoss])
def test_an_evaluation_before_training_leaves_gamma_and_alpha_to_it(bert_folder, make, kind):
    """Without dropout, positive pairs are closer than in training."""
    model = encoder(bert_folder)
    loss, other = make(model, "pearson"), make(model, "pearson")
    model.eval()
    with torch.no_grad():
        assert loss(features(model, kind)).isfinite()
    assert [loss.get_config_dict()[name] for name in ("gamma", "alpha")] == ["auto", "auto"]
    model.train()
    for one in (loss, other):
        torch.manual_seed(0)
        one(features(model, kind))
    assert (loss.gamma, loss.alpha) == (other.gamma, other.alpha) and isinstance(loss.alpha, float)
    model.eval()
    with torch.no_grad():
        loss(features(model, kind))
    assert (loss.gamma, loss.alpha) == (other.gamma, other.alpha)
