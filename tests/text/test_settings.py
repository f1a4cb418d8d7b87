"""Settings that decide embeddings: the values, and that each of them changes the vectors that are recorded with it."""

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Normalize

from fmicl_text import TextContrastiveModel, build_text_encoder
from fmicl_text.evaluation import encode_dropout_views, encode_sentences, encoder_metadata
from fmicl_text.text.settings import encoder_settings, truncated_share
from tests.support import sentences


@pytest.fixture
def encoder(no_dropout_folder):
    return build_text_encoder(no_dropout_folder, pooling="mean")


DEFAULTS = {
    "prompt": None, "prompt_is_pooled": True, "do_lower_case": False, "truncation_side": "right", "truncate_dim": None,
    "similarity_fn_name": "cosine", "modules": ["Transformer", "Pooling"],
}  # fmt: skip


def test_the_settings_of_an_encoder(encoder):
    assert encoder_settings(encoder) == DEFAULTS
    encoder.prompts, encoder.truncate_dim = {"query": "a red ", "document": ""}, 8
    assert encoder_settings(encoder) == DEFAULTS | {"truncate_dim": 8}  # no prompt is applied by default
    encoder.default_prompt_name = "query"
    encoder.set_pooling_include_prompt(False)
    encoder.similarity_fn_name, encoder.tokenizer.truncation_side = "dot", "left"
    encoder.append(Normalize())
    now = {"prompt": "a red ", "prompt_is_pooled": False, "truncation_side": "left", "truncate_dim": 8}
    now |= {"similarity_fn_name": "dot", "modules": ["Transformer", "Pooling", "Normalize"]}
    assert encoder_settings(encoder) == DEFAULTS | now
    described = TextContrastiveModel(encoder).describe()
    assert now.items() <= described.items() and described["pooling"] == "mean" and described["size"] == 40
    metadata = encoder_metadata("m", encoder)
    assert (metadata["prompt"], metadata["truncate_dim"], metadata["head"]) == ("a red ", 8, ["Normalize"])
    assert (metadata["float32_products"], metadata["device"], metadata["precision"]) == ("float32", "cpu", "float32")


def test_dropout_views_have_the_prompt_and_the_dimensions_of_encode(encoder):
    """Without dropout, both views are what `encode` returns."""
    texts = sentences(5)
    plain = encode_sentences(encoder, texts, progress=False)
    encoder.prompts, encoder.default_prompt_name, encoder.truncate_dim = {"query": "a red "}, "query", 8
    encoder.set_pooling_include_prompt(False)
    expected = encode_sentences(encoder, texts, progress=False)
    assert expected.shape == (5, 8) and not torch.allclose(expected, plain[:, :8], atol=1e-3)
    x, y = encode_dropout_views(encoder, texts, progress=False)
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(y, expected)


def test_the_share_of_truncated_texts(encoder):
    """[CLS] and [SEP] count: 6 words are 8 tokens."""
    texts = ["a red dog", "a red dog sees a cat", "a red dog sees a cat today", "a red dog sees a big cat today"]
    encoder.max_seq_length = 8
    assert truncated_share(encoder, texts) == 0.5
    encoder.prompts, encoder.default_prompt_name = {"query": "the "}, "query"
    assert truncated_share(encoder, texts) == 0.75
    assert truncated_share(encoder, texts, prompt="") == 0.5
    encoder.max_seq_length = None
    assert truncated_share(encoder, texts) in (None, 0.0)
