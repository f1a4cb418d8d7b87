"""Retrieval in BEIR's format, and as the evaluator of a training."""

import json
import math

import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoders import open_encoder
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.retrieval import load_retrieval
from tests.support import SAVING, make_trainer, same, sentences, weights

QUERIES, CORPUS = sentences(8, seed=1), sentences(40, seed=2)


def write(folder, qrels="qrels.tsv"):
    """Query i has document i, of which the text has a title, as its only relevant one; query 7 has none."""
    rows = [json.dumps({"_id": f"q{i}", "text": text}) for i, text in enumerate(QUERIES)]
    (folder / "queries.jsonl").write_text("\n".join(rows))
    split = [text.split(" ", 1) for text in CORPUS]
    rows = [json.dumps({"_id": f"d{i}", "title": first, "text": rest}) for i, (first, rest) in enumerate(split)]
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n")
    path = folder / qrels
    path.parent.mkdir(exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(7)), "q0\td5\t0"]
    path.write_text("\r\n".join(lines))
    return folder


@pytest.mark.parametrize("qrels", ["qrels.tsv", "qrels/dev.tsv"])
def test_the_score_is_that_of_the_definition(bert_folder, tmp_path, qrels):
    """NDCG@10 with one relevant document: 1 / log2(1 + rank), 0 beyond the tenth."""
    encoder = open_encoder(bert_folder, pooling="mean")
    x, y = (
        torch.nn.functional.normalize(encode_sentences(encoder, texts, progress=False), dim=1)
        for texts in (QUERIES[:7], CORPUS)
    )
    ranks = [1 + int((row > row[i]).sum()) for i, row in enumerate(x @ y.T)]
    evaluator = load_retrieval(write(tmp_path, qrels), progress=False)
    metrics = evaluator(encoder)
    expected = sum(1 / math.log2(1 + rank) for rank in ranks if rank <= 10) / 7
    assert evaluator.primary_metric == "cosine_ndcg@10" and 0 < expected < 1
    assert metrics["cosine_ndcg@10"] == pytest.approx(expected, abs=1e-6)
    assert metrics["cosine_accuracy@1"] == pytest.approx(sum(rank == 1 for rank in ranks) / 7)
    assert {type(value) for value in metrics.values()} == {float}


def make(bert_folder, folder, evaluator, **settings):
    settings = SAVING | {"load_best_model_at_end": True, "save_total_limit": 9, "learning_rate": 3e-3} | settings
    trainer = make_trainer(bert_folder, folder, evaluate=True, **settings)
    trainer.evaluator, trainer.args.metric_for_best_model = evaluator, None
    return trainer


@pytest.mark.parametrize("ours", [True, False])
def test_training_selects_the_best_checkpoint_by_it(bert_folder, tmp_path, monkeypatch, ours):
    """Also with the class of sentence-transformers itself. All metrics are logged as numbers that JSON can store."""
    monkeypatch.setattr("fmicl_text.training.verdict.NOISE", -1e9)  # that of 7 queries is large
    evaluator = load_retrieval(write(tmp_path), progress=False)
    if not ours:
        relevant = {f"q{i}": {f"d{i}"} for i in range(7)}
        texts = (
            {f"{key}{i}": text for i, text in enumerate(values)} for key, values in (("q", QUERIES), ("d", CORPUS))
        )
        evaluator = InformationRetrievalEvaluator(*texts, relevant)
    trainer = make(bert_folder, tmp_path / "out", evaluator)
    trainer.train()
    scores = {
        entry["step"]: entry["eval_cosine_ndcg@10"]
        for entry in json.loads(json.dumps(trainer.state.log_history))
        if "eval_cosine_ndcg@10" in entry
    }
    assert list(scores) == [2, 4, 6, 8] and len(set(scores.values())) > 1
    best = max(scores, key=lambda step: scores[step])
    assert trainer.args.metric_for_best_model == "cosine_ndcg@10" and trainer.state.best_global_step == best
    assert trainer.evaluate()["eval_cosine_ndcg@10"] == pytest.approx(scores[best])
    other = make(bert_folder, tmp_path / "other", evaluator)
    other.model.load_checkpoint(str(tmp_path / "out" / f"checkpoint-{best}"))
    assert same(weights(trainer), weights(other))
    assert trainer.verdict.num_items == (7 if ours else None) and trainer.verdict.after == scores[best]


@pytest.mark.slow
def test_other_data_are_reported_at_a_resume(bert_folder, tmp_path):
    make(bert_folder, tmp_path / "out", load_retrieval(write(tmp_path), progress=False)).train()
    with open(tmp_path / "qrels.tsv", "a") as file:
        file.write("\nq1\td9\t2")
    again = make(bert_folder, tmp_path / "out", load_retrieval(tmp_path, progress=False))
    with pytest.warns(UserWarning, match="evaluation_data"):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))


def test_blank_documents_are_searched_too(bert_folder, tmp_path):
    """Some corpora of BEIR have them; the others keep their ranks."""
    encoder = open_encoder(bert_folder, pooling="mean")
    before = load_retrieval(write(tmp_path), progress=False)(encoder)
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write('{"_id": "blank", "title": "", "text": " "}\n')
    evaluator = load_retrieval(tmp_path, progress=False)
    assert evaluator.corpus[-1] == "" and len(evaluator.corpus) == 41
    assert 0 < evaluator(encoder)["cosine_ndcg@10"] <= before["cosine_ndcg@10"] + 1e-6


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("corpus.jsonl", None, "corpus.jsonl: No such file"),
        ("queries.jsonl", "", "queries.jsonl is empty"),
        ("queries.jsonl", '{"_id": "q0", "text": "a"}\n{"_id": "q1"', "queries.jsonl, line 2: expected a JSON object"),
        ("queries.jsonl", '{"_id": 1, "text": "a"}', "queries.jsonl, line 1: _id and text must be strings"),
        ("queries.jsonl", '{"_id": "q0", "text": " "}', "queries.jsonl, line 1: the text is blank"),
        ("corpus.jsonl", '{"_id": "d", "text": "a"}\n\n{"_id": "d", "text": "b"}', "line 3: the _id 'd' occurs twice"),
        ("corpus.jsonl", '{"_id": "d", "text": "a \\ud800"}', "corpus.jsonl, line 1: .*surrogates"),
        ("queries.jsonl", '{"_id": "q0", "text": ' + "[" * 100_000, "queries.jsonl, line 1: expected a JSON object"),
        ("corpus.jsonl", "[1]", "corpus.jsonl, line 1: expected a JSON object"),
        ("qrels.tsv", None, "expected qrels.tsv or qrels/dev.tsv"),
        ("qrels.tsv", "q0\td0", "qrels.tsv, line 1: expected query-id, corpus-id"),
        ("qrels.tsv", "q0\td0\tx", "qrels.tsv, line 1: expected query-id, corpus-id"),
        ("qrels.tsv", "q0\td0\t1\nq99\td0\t1", "qrels.tsv, line 2: 'q99' is not in queries.jsonl"),
        ("qrels.tsv", "q0\td99\t1", "qrels.tsv, line 1: 'd99' is not in corpus.jsonl"),
        ("qrels.tsv", "q0\td0\t0", "qrels.tsv: no query has a relevant document"),
    ],
)
def test_bad_files_are_one_line(tmp_path, file, content, message):
    write(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_retrieval(tmp_path)
    assert "\n" not in str(error.value)


def test_a_score_of_any_size_counts(tmp_path):
    write(tmp_path)
    (tmp_path / "qrels.tsv").write_text(f"q0\td0\t{'9' * 5000}\nq1\td1\t000\nq2\td2\t-1\nq3\td3\t10\n")
    assert load_retrieval(tmp_path, progress=False).relevant_docs == {"q0": {"d0"}, "q3": {"d3"}}
