"""Embeddings do not depend on order, padding or mode."""

import pytest
import torch
from torch.testing import assert_close

from fmicl_text.evaluation.encoding import encode_dropout_views, encode_sentences
from fmicl_text.text.model import build_text_encoder
from tests.support import sentences


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
