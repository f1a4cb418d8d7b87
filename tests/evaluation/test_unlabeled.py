"""Scores without labels: ranks against a loop, ties and copies, and the selection of a checkpoint."""

import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from fmicl_text import build_text_encoder
from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.geometry import alignment, direction_shares, effective_rank, uniformity
from fmicl_text.evaluation.unlabeled import GAMMAS, UnlabeledEvaluator, distances_to, find_documents, some_words
from tests.support import SAVING, make_trainer, sentences, tiny_tokenizer

TEXTS = [f"{first} {second}" for first, second in zip(sentences(30, seed=1), sentences(30, seed=2), strict=True)]


def random_pairs(count, dims=8, noise=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dims, generator=draw)
    return x, x + noise * torch.randn(count, dims, generator=draw)


def by_loop(x, y, queries, documents):
    """Mean 1/rank and recall@1 over every position that the right document can have among those that tie with it."""
    ranks, firsts = [], []
    x, y = (rows / rows.norm(dim=1, keepdim=True) for rows in (x.double(), y.double()))
    for i in range(len(x)):
        right, better, equal = float(x[i] @ y[i]), 0, 1
        for j in range(len(y)):
            if documents[j] == documents[i] or queries[j] == queries[i]:
                continue
            cosine = float(x[i] @ y[j])
            better += cosine > right + 1e-6
            equal += abs(cosine - right) <= 1e-6
        positions = [better + 1 + k for k in range(equal)]
        ranks.append(sum(1 / position for position in positions) / equal)
        firsts.append(positions.count(1) / equal)
    return ranks, firsts


def nats_by_loop(x, y):
    """The largest bound over gamma, of pairs without a text in common."""
    x, y = (rows / rows.norm(dim=1, keepdim=True) for rows in (x.double(), y.double()))
    squared = [[float((a - b).square().sum()) for b in y] for a in x]
    bounds, count = [], len(x)
    for gamma in GAMMAS:
        own = sum(-gamma * squared[i][i] for i in range(count)) / count
        others = [math.exp(-gamma * squared[i][j]) for i in range(count) for j in range(count) if i != j]
        bounds.append(own - math.log(sum(others) / len(others)))
    return max(bounds)


NAMES = [str(i) for i in range(60)]


@pytest.mark.parametrize(
    "queries, documents",
    [(NAMES, NAMES), (NAMES, ["a"] * 5 + NAMES[5:]), (NAMES[:50] + ["b"] * 10, NAMES[:48] + ["c"] * 6 + NAMES[54:])],
)
def test_ranks_are_those_of_a_loop(queries, documents):
    x, y = random_pairs(60)
    y[::7] = y[3]  # ties between different texts
    found = find_documents(x, y, queries, documents)
    ranks, firsts = by_loop(x, y, queries, documents)
    assert found.reciprocal_rank.tolist() == pytest.approx(ranks) and found.first.tolist() == pytest.approx(firsts)
    assert 0.1 < found.first.mean() < 0.9


def test_equal_embeddings_score_as_chance():
    """The same for all texts: each is found with probability 1/N. Rounding errors of an encoder do not help."""
    x = torch.randn(1, 16).expand(50, -1) + 1e-8 * torch.randn(50, 16)
    found = find_documents(x, x, NAMES[:50], NAMES[:50])
    assert found.first.tolist() == pytest.approx([1 / 50] * 50)
    assert found.reciprocal_rank.mean() == pytest.approx(sum(1 / k for k in range(1, 51)) / 50)


def test_blocks_do_not_change_the_ranks(monkeypatch):
    x, y = random_pairs(60)
    whole = find_documents(x, y, NAMES, NAMES)
    monkeypatch.setattr("fmicl_text.evaluation.unlabeled.BLOCK", 7)
    assert all(map(torch.equal, whole, find_documents(x, y, NAMES, NAMES)))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_some_words(share):
    """A share of the words in their order, the same in every call, at least one; of text without spaces, characters."""
    for text in TEXTS:
        words, kept, left = text.split(), some_words(text, share).split(), iter(text.split())
        assert len(kept) == len(words) - round((1 - share) * len(words)) and all(word in left for word in kept)
        assert some_words(text, share).split() == kept
    assert (
        len({tuple(some_words(f"a b c d {number}", 0.5).split()) for number in range(50)}) > 10
    )  # not always the same
    assert some_words("a b", 0.25) in ("a", "b") and len(some_words("我们在公园里散步", 0.25)) == 2


@pytest.fixture(scope="module")
def encoder(bert_folder):
    return build_text_encoder(bert_folder, pooling="mean")


def test_the_metrics_are_those_of_the_definition(encoder):
    evaluator = UnlabeledEvaluator(TEXTS, progress=False)
    metrics = evaluator(encoder)
    queries = [some_words(text) for text in TEXTS]
    x, y = (encode_sentences(encoder, side, progress=False) for side in (queries, TEXTS))
    ranks, firsts = by_loop(x, y, queries, TEXTS)
    assert metrics == pytest.approx(
        {
            "held_out_nats": nats_by_loop(x, y),
            "held_out_mrr": 100 * sum(ranks) / 30,
            "held_out_recall@1": 100 * sum(firsts) / 30,
            "held_out_alignment": float(alignment(x, y)),
            "held_out_uniformity": float(uniformity(y)),
            "held_out_effective_rank": float(effective_rank(direction_shares(y))),
        },
        rel=1e-4,
    )
    assert {type(value) for value in metrics.values()} == {float}
    assert metrics == UnlabeledEvaluator(TEXTS, progress=False)(encoder)
    assert metrics == UnlabeledEvaluator([(text,) for text in TEXTS], progress=False)(encoder)  # as held out


def test_observations_give_the_primary_metric(encoder):
    evaluator = UnlabeledEvaluator(TEXTS, progress=False)
    metrics = evaluator(encoder)
    seen = evaluator.observations
    assert evaluator.primary_metric == "held_out_nats" and evaluator.greater_is_better
    assert seen.shape == (30, 1 + len(GAMMAS)) and seen.dtype == np.float64
    assert evaluator.metric_of(seen) == metrics["held_out_nats"]
    assert evaluator.metric_of(np.concatenate([seen, seen])) == pytest.approx(metrics["held_out_nats"])
    assert evaluator.metric_of(seen[:15]) != metrics["held_out_nats"]


def test_nats_of_equal_texts():
    """Rows that share a text are not compared; a row without other texts counts as log 0."""
    x, y = random_pairs(12)
    queries, documents = NAMES[:12], ["a", "a", *NAMES[2:12]]
    found = distances_to(x, y, queries, documents)
    alone = distances_to(x[1:], y[1:], queries[1:], documents[1:])
    assert torch.allclose(found[1], alone[0])
    incomparable = distances_to(x, y, ["q"] * 12, NAMES[:12])
    assert incomparable[:, 1:].eq(-torch.inf).all() and UnlabeledEvaluator(TEXTS).metric_of(incomparable.numpy()) == 0


def test_nats_do_not_depend_on_blocks(monkeypatch):
    x, y = random_pairs(60)
    whole = distances_to(x, y, NAMES, NAMES)
    monkeypatch.setattr("fmicl_text.evaluation.unlabeled.BLOCK", 7)
    assert torch.allclose(whole, distances_to(x, y, NAMES, NAMES))


def test_pairs_find_each_other(encoder):
    """And the columns that follow, hard negatives, are not used."""
    pairs = list(zip(sentences(20, seed=1), sentences(20, seed=2), strict=True))
    metrics = UnlabeledEvaluator(pairs, progress=False)(encoder)
    assert metrics == UnlabeledEvaluator([(*pair, "other") for pair in pairs], progress=False)(encoder)
    x, y = (encode_sentences(encoder, list(side), progress=False) for side in zip(*pairs, strict=True))
    assert metrics["held_out_mrr"] == pytest.approx(
        100 * np.mean(by_loop(x, y, *zip(*pairs, strict=True))[0]), abs=1e-3
    )


@pytest.mark.parametrize("prompts", [("query: ",), ("query: ", "document: "), ("query: ", "document: ", "document: ")])
def test_prompts_of_queries_and_documents(encoder, prompts):
    prompts = tuple(f"{sentences(1, seed=len(prompt))[0]} " for prompt in prompts)
    evaluator = UnlabeledEvaluator(TEXTS, progress=False, prompts=prompts)
    x, y = evaluator.embed(encoder)
    whole = [prompts[0] + some_words(TEXTS[0]), prompts[min(1, len(prompts) - 1)] + TEXTS[0]]
    assert torch.allclose(torch.stack([x[0], y[0]]), encode_sentences(encoder, whole, progress=False), atol=1e-5)


def test_the_default_prompt_is_that_of_the_encoder(bert_folder):
    encoder = build_text_encoder(bert_folder, pooling="mean")
    encoder.prompts, encoder.default_prompt_name = {"default": TEXTS[5] + " "}, "default"
    plain = UnlabeledEvaluator(TEXTS, progress=False, prompts=("",)).embed(encoder)
    given = UnlabeledEvaluator(TEXTS, progress=False, prompts=(TEXTS[5] + " ",)).embed(encoder)
    own = UnlabeledEvaluator(TEXTS, progress=False).embed(encoder)
    assert torch.equal(own[0], given[0]) and torch.equal(own[1], given[1])
    assert not torch.allclose(own[0], plain[0], atol=1e-3)


def test_long_texts_are_truncated_as_in_training(encoder, monkeypatch):
    before = encoder.max_seq_length
    short = UnlabeledEvaluator(TEXTS, progress=False, max_seq_length=4).embed(encoder)
    assert encoder.max_seq_length == before
    words = [" ".join(text.split()[:2]) for text in TEXTS]  # two special tokens
    assert torch.allclose(short[1], encode_sentences(encoder, words, progress=False), atol=1e-5)
    long = UnlabeledEvaluator(TEXTS, progress=False, max_seq_length=10**6).embed(encoder)
    assert torch.equal(long[1], UnlabeledEvaluator(TEXTS, progress=False).embed(encoder)[1])
    monkeypatch.setattr("fmicl_text.evaluation.unlabeled.encode_sentences", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        UnlabeledEvaluator(TEXTS, progress=False, max_seq_length=4).embed(encoder)
    assert encoder.max_seq_length == before


def test_static_embeddings():
    encoder = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer(), embedding_dim=16)], device="cpu")
    metrics = UnlabeledEvaluator(TEXTS, progress=False, max_seq_length=8)(encoder)
    assert 0 < metrics["held_out_mrr"] <= 100


def test_embeddings_without_direction_are_an_error(bert_folder):
    """They would be found at once: no document is nearer than NaN."""
    encoder = build_text_encoder(bert_folder, pooling="mean")
    for weight in encoder.parameters():
        weight.data.fill_(math.nan)
    with pytest.raises(InputError, match=r"60 of 60 embeddings contain NaN, infinity or only zeros"):
        UnlabeledEvaluator(TEXTS, progress=False)(encoder)


def test_a_collapsed_encoder_is_scored(encoder, monkeypatch):
    monkeypatch.setattr(UnlabeledEvaluator, "embed", lambda self, encoder: (torch.ones(30, 8), torch.ones(30, 8)))
    metrics = UnlabeledEvaluator(TEXTS, progress=False)(encoder)
    assert metrics["held_out_recall@1"] == pytest.approx(100 / 30) and abs(metrics["held_out_nats"]) < 1e-9
    assert metrics["held_out_uniformity"] == 0 and metrics["held_out_effective_rank"] == pytest.approx(1)


@pytest.mark.parametrize(
    "texts, words",
    [
        ([], "at least 2 got 0"),
        (["one text here"], "at least 2 got 1"),
        (["two words", "x"], "two words or more 'x' index 1"),
        (["two words", "  "], "index 1"),
        ([("a", "b"), ("c",)], "pair ('c',) index 1"),
        ([("a", "b"), (None,)], "pair (None,) index 1"),
        ([("a", "b"), ()], "pair () index 1"),
        ([("a", "b"), ("c", " ")], "pair index 1"),
        ([("a", "b"), ("c", None)], "pair index 1"),
        (["two words", None], "None index 1"),
        ([1, 2], "1 index 0"),
        ([("a", "b"), "two words"], "equally many 'two words' index 1"),
        ("two words", "list str"),
        (iter(["two words"] * 2), "list list_iterator"),
        (Dataset.from_dict({"text": ["two words"] * 2}), "list Dataset column"),
    ],
)
def test_texts_that_are_too_short(texts, words):
    with pytest.raises(InputError) as caught:
        UnlabeledEvaluator(texts)
    assert not [word for word in words.split() if word not in str(caught.value)], caught.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "query: "}, "prompts must be a list of one or two texts, got 'query: '"),
        ({"prompts": ["a", None]}, "prompts must be a list of one or two texts"),
        ({"max_seq_length": 0}, "max_seq_length must be an integer of at least 1, got 0"),
        ({"max_seq_length": "x"}, "max_seq_length must be an integer of at least 1, got 'x'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_options_that_are_not_accepted(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        UnlabeledEvaluator(TEXTS, **options)


def test_the_description_changes_with_the_data():
    settings = ({}, {"max_seq_length": 32}, {"prompts": ("query: ",)})
    found = [UnlabeledEvaluator(TEXTS, **options).describe()["evaluation_data"] for options in settings]
    found += [UnlabeledEvaluator(TEXTS[::-1]).describe()["evaluation_data"]]
    assert len(set(found)) == 4 and UnlabeledEvaluator(TEXTS, batch_size=3).describe()["evaluation_data"] == found[0]


@pytest.mark.slow
def test_training_selects_the_best_checkpoint_by_it(bert_folder, tmp_path):
    settings = SAVING | {"load_best_model_at_end": True, "save_total_limit": 9, "learning_rate": 3e-3}
    trainer = make_trainer(bert_folder, tmp_path, evaluate=True, **settings)
    trainer.evaluator, trainer.args.metric_for_best_model = UnlabeledEvaluator(TEXTS, progress=False), None
    trainer.train()
    scores = {
        entry["step"]: entry["eval_held_out_nats"]
        for entry in trainer.state.log_history
        if "eval_held_out_nats" in entry
    }
    assert len(scores) > 1 and trainer.args.metric_for_best_model == "held_out_nats"
    assert scores[trainer.verdict.step] == max(scores.values())  # step 0 is kept unless this is better by its noise
    kept = trainer.verdict.before if trainer.verdict.saved_step == 0 else max(scores.values())
    assert trainer.run_evaluator()["eval_held_out_nats"] == pytest.approx(kept, abs=1e-3)
