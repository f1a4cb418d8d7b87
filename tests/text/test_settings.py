"""Settings that decide embeddings: the values, and that each of them changes the vectors that are recorded with it."""

from functools import partial

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Normalize

from fmicl_text import TextContrastiveModel, build_text_encoder
from fmicl_text.evaluation import encode_dropout_views, encode_sentences, encoder_metadata
from fmicl_text.text.settings import encoder_settings, log_encoding, set_prompt, truncated_share
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
    assert truncated_share(encoder, texts, "the ") == 0.75
    encoder.tokenizer.model_max_length, encoder.max_seq_length = 10**30, None
    assert truncated_share(encoder, texts) is None


def test_the_log_of_what_is_encoded(encoder):
    """Also by methods that choose their own prompts. A prompt and its tokens count."""
    encoder.max_seq_length = 8
    texts = ["a red dog", "a red dog sees a cat", "a red dog sees a cat today", "a red dog sees a big cat today"]
    with log_encoding(encoder) as log:
        assert log.describe() == {}
        plain = encode_sentences(encoder, texts, progress=False)
    assert log.describe() == {"prompt": None, "truncated": 0.5}
    torch.testing.assert_close(encode_sentences(encoder, texts, progress=False), plain)
    set_prompt(encoder, "the ")
    with log_encoding(encoder) as log:
        prompted = encode_sentences(encoder, texts, progress=False)
        assert log.describe() == {"prompt": "the ", "truncated": 0.75}
        encoder.encode_query(texts[:1], prompt="a ")
    assert log.describe()["prompt"] == ["a ", "the "]
    set_prompt(encoder, "none")
    torch.testing.assert_close(prompted[:1], encode_sentences(encoder, ["the a red dog"], progress=False))


def test_a_prompt_is_a_text_or_the_name_of_one_of_the_models(encoder):
    texts, encode = ["a red dog"], partial(encode_sentences, progress=False)
    plain = encode(encoder, texts)
    encoder.prompts, encoder.default_prompt_name = {"query": "the ", "empty": ""}, "query"
    the = encode(encoder, texts)
    prompts = encoder.prompts
    assert not torch.allclose(plain, the, atol=1e-3)
    for prompt, expected in (("none", plain), ("the ", the), ("query", the), ("empty", plain)):
        encoder.prompts = prompts
        set_prompt(encoder, prompt)
        torch.testing.assert_close(encode(encoder, texts), expected)
        torch.testing.assert_close(torch.tensor(encoder.encode_query(texts)), expected)
