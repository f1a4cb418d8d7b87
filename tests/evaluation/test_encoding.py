"""Embeddings do not depend on order, padding or mode."""

import pytest
import torch
from torch.testing import assert_close

from fmicl_text.evaluation.encoding import encode_dropout_views, encode_sentences
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.evaluation.sharing import all_processes
from fmicl_text.evaluation.unlabeled import UnlabeledEvaluator
from fmicl_text.text.model import build_text_encoder
from tests.support import run_ranks, sentences, sts_pairs


@pytest.fixture(scope="module")
def encoder(bert_folder):
    return build_text_encoder(bert_folder, pooling="mean")


def test_embeddings_come_in_the_order_of_the_sentences(encoder):
    texts = sentences(20)
    together = encode_sentences(encoder, texts, batch_size=7)
    alone = torch.cat([encode_sentences(encoder, [text]) for text in texts])
    assert_close(together, alone)


def test_views_differ_by_dropout_only(encoder, no_dropout_folder):
    texts = sentences(20)
    encoder.eval()
    state = torch.get_rng_state()
    x, y = encode_dropout_views(encoder, texts, seed=3, batch_size=7)
    assert not encoder.training and torch.equal(torch.get_rng_state(), state)
    cosine = torch.nn.functional.cosine_similarity
    assert (cosine(x, y) < 0.9999).all() and cosine(x, y).mean() > cosine(x, x.roll(1, 0)).mean()
    again = encode_dropout_views(encoder, texts, seed=3, batch_size=7)
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    without = build_text_encoder(no_dropout_folder, pooling="mean")
    x, y = encode_dropout_views(without, texts, batch_size=7)
    assert_close(x, y)
    assert_close(x, encode_sentences(without, texts))


def scores(rank, folder, shared):
    """The scores of two evaluators, embeddings of fewer batches than processes, and the number of encoded texts."""
    torch.set_num_threads(1)
    encoder, texts = build_text_encoder(folder, pooling="mean"), sentences(40)
    preprocess, seen = encoder.preprocess, []
    encoder.preprocess = lambda batch, **kwargs: seen.extend(batch) or preprocess(batch, **kwargs)
    with all_processes(shared):
        found = STSEvaluator(sts_pairs(), batch_size=8)(encoder) | UnlabeledEvaluator(texts, batch_size=8)(encoder)
        few = encode_sentences(encoder, texts[:5])
    return found, few, len(seen)


def test_processes_share_the_sentences_of_evaluators(bert_folder):
    """Scores are equal to the last bit."""
    expected, few, all_texts = scores(0, bert_folder, False)
    ranks = run_ranks(2, scores, bert_folder, True)
    assert all(found == expected and torch.equal(rows, few) for found, rows, _ in ranks)
    first, second = (count for *_, count in ranks)
    assert first + second == all_texts and abs(first - second) <= 3 * 8 + 5


def only_the_first(rank, folder):
    return scores(rank, folder, False)[0] if rank == 0 else None


def test_a_process_may_evaluate_alone(bert_folder):
    assert run_ranks(2, only_the_first, bert_folder)[0] == scores(0, bert_folder, False)[0]
