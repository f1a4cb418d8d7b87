"""Checks of encoders before training: modules, tokenizers, positions, and the dry pass."""

import logging
import random

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Router
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    GPT2Config,
    PreTrainedTokenizerFast,
    ReformerConfig,
    RobertaConfig,
)

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, InputError, TextContrastiveModel, build_text_encoder
from fmicl_text.evaluation.encoders import open_encoder
from fmicl_text.evaluation.encoding import encode_dropout_views, encode_sentences
from fmicl_text.text.checks import has_dropout, position_limit, some_word
from tests.soak.families import write_tiny_model
from tests.support import SPECIAL, WORDS, run_trainers, sentences, tiny_bert, tiny_tokenizer

VOCABULARY = len(SPECIAL) + len(WORDS)
SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 20, "pad_token_id": 1}  # fmt: skip


def write(folder, config, tokenizer):
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def in_one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- modules


def router_encoder(folder):
    parts = [Transformer(folder), Pooling(32, "mean")]
    return SentenceTransformer(modules=[Router.for_query_document(parts, parts)], device="cpu")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("router", "Router"),
        ("no pooling", "Transformer$"),
    ],
)
def test_other_modules_are_rejected_from_a_folder_and_from_python(kind, words, bert_folder, tmp_path):
    plain = SentenceTransformer(modules=[Transformer(bert_folder)], device="cpu")
    encoder = router_encoder(bert_folder) if kind == "router" else plain
    encoder.save(str(tmp_path / "m"), create_model_card=False)
    with pytest.raises(InputError, match=words) as error:
        build_text_encoder(str(tmp_path / "m"))
    assert in_one_line(error).startswith(f"model_name_or_path={tmp_path / 'm'} ")
    args = FMICLTrainingArguments(str(tmp_path / "out"), eval_strategy="no", use_cpu=True)
    with pytest.raises(InputError, match=words):
        FMICLTrainer(encoder, args, train_dataset=sentences(400))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("after", [Dense(64, 16), LayerNorm(64)], ids=["Dense", "LayerNorm"])
def test_pooling_before_a_layer_of_another_width(after, bert_folder, tmp_path):
    parts = [Transformer(bert_folder), Pooling(32, ("cls", "mean")), after]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path), create_model_card=False)
    assert build_text_encoder(str(tmp_path)).encode("a dog").shape == (64 if isinstance(after, LayerNorm) else 16,)
    for load in (build_text_encoder, open_encoder):
        with pytest.raises(
            InputError, match=f"pooling=mean gives 32 dimensions, but .* {type(after).__name__} takes 64"
        ):
            load(str(tmp_path), pooling="mean")


def test_another_pooling_keeps_whether_the_prompt_is_pooled(bert_folder, tmp_path):
    parts = [Transformer(bert_folder), Pooling(32, "mean", include_prompt=False)]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path), create_model_card=False)
    assert build_text_encoder(str(tmp_path), pooling="max")[1].include_prompt is False


def test_truncated_dimensions_with_a_head(bert_folder):
    """Training uses all dimensions, as the losses of sentence-transformers do; encode returns the first."""
    encoder = SentenceTransformer(bert_folder, truncate_dim=8, device="cpu")
    model = TextContrastiveModel(encoder, "simcse")
    assert model.width == 32 and model(encoder.preprocess(["a dog"])).shape == (1, 32)
    assert encode_sentences(encoder, ["a dog"], progress=False).shape == (1, 8)
    assert [view.shape for view in encode_dropout_views(encoder, ["a dog"], progress=False)] == [(1, 8)] * 2


# ---- tokenizers and positions


def roberta(folder):
    """20 positions, of which the padding index 1 leaves 18 for tokens; the tokenizer states no maximum."""
    return write(folder, RobertaConfig(**SIZE), tiny_tokenizer(model_max_length=None))


@pytest.mark.parametrize("load", [build_text_encoder, open_encoder])
def test_positions_that_start_after_the_padding_index(load, tmp_path):
    encoder = load(roberta(tmp_path))
    assert encoder.max_seq_length == 18 == position_limit(encoder[0].model)
    long = " ".join(sentences(10))
    assert encode_sentences(encoder, [long], progress=False).isfinite().all()
    assert len(encoder.tokenizer(long, truncation=True)["input_ids"]) == 18


def test_an_encoder_of_ones_own_has_its_positions_limited(tmp_path):
    """In evaluation and in training, also where sentence_bert_config.json states more tokens."""
    folder, long = roberta(tmp_path / "m"), " ".join(sentences(10))
    parts = [Transformer(folder, max_seq_length=20), Pooling(32, "mean")]
    encoder = SentenceTransformer(modules=parts, device="cpu")
    assert encoder.max_seq_length == 20
    assert encode_sentences(encoder, [long], progress=False).shape == (1, 32) and encoder.max_seq_length == 18
    encoder.max_seq_length = 20
    rows, collator = TextContrastiveModel(encoder).prepare_data([(long, long)])
    assert collator([rows[0]])["input_ids"].shape == (1, 2, 18)


def test_max_seq_length_above_the_positions(tmp_path):
    with pytest.raises(InputError, match="max_seq_length=19 exceeds the model's maximum of 18 tokens"):
        open_encoder(roberta(tmp_path), max_seq_length=19)


@pytest.mark.parametrize("load", [build_text_encoder, open_encoder])
def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(load, tmp_path):
    """The attention mask hides the padding: alone and next to a longer text, a text has the same embedding."""
    tokenizer = tiny_tokenizer(model_max_length=None)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=20)
    encoder = load(write(tmp_path / "m", config, tokenizer))
    assert encoder.tokenizer.pad_token == "[SEP]" and encoder.max_seq_length == 20
    assert encoder[1].pooling_mode == "lasttoken"  # the first token of a decoder does not depend on the others
    alone, both = encoder.encode(["a dog"]), encoder.encode(["a dog", " ".join(sentences(10))])
    torch.testing.assert_close(torch.tensor(alone[0]), torch.tensor(both[0]))
    assert abs(both[0] - both[1]).max() > 1e-2
    model = TextContrastiveModel(encoder)
    model.save_encoder(str(tmp_path / "saved"), model.state_dict())
    assert abs(SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(["a dog"]) - alone).max() == 0


def test_a_tokenizer_without_any_token_to_pad_with(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    folder = write(tmp_path, GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2), tokenizer)
    with pytest.raises(InputError, match="neither a padding token nor an end-of-text token"):
        build_text_encoder(folder)


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_need_embeddings(special, tmp_path):
    folder = tiny_bert(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<query>"], special_tokens=special)
    tokenizer.save_pretrained(folder)
    for load in (build_text_encoder, open_encoder):
        with pytest.raises(InputError, match=f"ids up to {VOCABULARY} .*<query>.* model {VOCABULARY} embeddings"):
            load(folder)
    model = AutoModel.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    assert TextContrastiveModel(build_text_encoder(folder)).width == 32


# ---- the dry pass


def test_the_dry_pass_changes_nothing(bert_folder):
    encoder = build_text_encoder(bert_folder)
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    encoder.register_buffer("statistics", torch.zeros(3))
    encoder[0].model.register_forward_hook(lambda *_: encoder.statistics.add_(1))
    weights = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    for training in (True, False):
        encoder.train(training)
        state = torch.random.get_rng_state()
        TextContrastiveModel(encoder)
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(torch.equal(weights[name], weight) for name, weight in encoder.state_dict().items())
        assert all((parameter.grad == 1).all() for parameter in encoder.parameters())
        assert {module.training for module in encoder.modules()} == {training}
        assert encoder.max_seq_length == 40


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_model_that_fails_is_named_before_anything_is_written(mode, bert_folder, tmp_path):
    """In training mode, Reformer accepts one length only. In evaluation mode, more than 30 tokens fail here."""
    if mode == "training":
        axial = {
            "axial_pos_shape": [4, 5],
            "axial_pos_embds_dim": [16, 16],
            "attn_layers": ["local"],
            "hidden_size": 32,
        }
        axial |= {
            "num_attention_heads": 2,
            "attention_head_size": 16,
            "feed_forward_size": 32,
            "local_attn_chunk_length": 4,
        }
        folder = write(
            tmp_path / "m",
            ReformerConfig(vocab_size=VOCABULARY, max_position_embeddings=20, **axial),
            tiny_tokenizer(20),
        )
        encoder, name, reason = build_text_encoder(folder), "ReformerModel", "sequence length"
    else:
        encoder, name, reason = build_text_encoder(bert_folder), "BertModel", "index out of range"
        encoder[0].model.embeddings.position_embeddings = torch.nn.Sequential(torch.nn.Embedding(30, 32))
    args = FMICLTrainingArguments(str(tmp_path / "out"), eval_strategy="no", use_cpu=True)
    with pytest.raises(InputError, match=f"{name} cannot be trained; .* in {mode} mode: .*{reason}") as error:
        FMICLTrainer(encoder, args, train_dataset=sentences(400))
    assert in_one_line(error).startswith("model_name_or_path=/") and not (tmp_path / "out").exists()


def test_parameters_without_gradient_are_frozen_and_named(tmp_path, caplog):
    write_tiny_model("longformer", str(tmp_path))
    with caplog.at_level(logging.WARNING, "fmicl_text"):
        model = TextContrastiveModel(build_text_encoder(str(tmp_path)))
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "_global." in name or ".pooler." in name}
    (record,) = (record for record in caplog.records if record.name.startswith("fmicl_text"))
    assert "query_global.weight" in record.getMessage() and "and 9 others" in record.getMessage()
    assert "pooler" not in record.getMessage()


def test_layers_that_are_skipped_at_random_and_experts_are_trained(tmp_path):
    """Layer dropout skips layers of a training pass; a text reaches some experts of a mixture only."""
    for name in ("m2m_100", "switch_transformers"):
        write_tiny_model(name, str(tmp_path / name))
        encoder = build_text_encoder(str(tmp_path / name))
        encoder[0].model.layerdrop = 1.0
        model = TextContrastiveModel(encoder)
        assert all(weight.requires_grad for weight in model.parameters()) and encoder[0].model.layerdrop == 1


def test_a_model_without_anything_to_train(bert_folder):
    encoder = build_text_encoder(bert_folder)
    with pytest.raises(InputError, match="no trainable parameter of BertModel gets a gradient"):
        TextContrastiveModel(encoder.requires_grad_(False))


def test_a_chat_template_is_not_trained_without(bert_folder):
    """`encode` would render every text as a message, which training does not do."""
    encoder = build_text_encoder(bert_folder)
    plain = encoder.preprocess
    encoder.preprocess = lambda texts, **options: plain([f"the man {text}" for text in texts], **options)
    with pytest.raises(InputError, match="`encode` adds tokens that its tokenizer does not add"):
        TextContrastiveModel(encoder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["longformer", "bert"])
def test_frozen_parameters_train_under_ddp(name, tmp_path):
    """DDP raises an error for parameters without gradient that are not frozen."""
    write_tiny_model(name, str(tmp_path / "m"))
    (gradients, *_), (others, *_) = run_trainers(
        2, str(tmp_path / "m"), tmp_path / "out", per_device_train_batch_size=4
    )
    assert len(gradients) == 1 and gradients[0].norm() > 0 and torch.equal(gradients[0], others[0])


def test_a_tokenizer_without_unknown_token_trains(tmp_path):
    """It drops what it does not know, such as the word of the dry pass."""
    vocabulary = {"[PAD]": 0, "A": 1, "C": 2, "G": 3, "T": 4}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [])), pad_token="[PAD]")
    tokenizer.save_pretrained(tmp_path)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=5, max_position_embeddings=64, **size)).save_pretrained(tmp_path)
    model = TextContrastiveModel(build_text_encoder(str(tmp_path), pooling="mean"))
    assert some_word(model.encoder.tokenizer) == "A"


def test_a_dry_pass_leaves_all_random_states(tmp_path):
    """BigBird seeds numpy."""
    tiny_tokenizer(4096).save_pretrained(tmp_path)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BigBirdModel(BigBirdConfig(vocab_size=64, block_size=4, num_random_blocks=1, **size)).save_pretrained(tmp_path)
    encoder = build_text_encoder(str(tmp_path), pooling="mean")
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    TextContrastiveModel(encoder)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (str(np.random.get_state()), random.getstate())


@pytest.mark.parametrize("config", [GPT2Config, BertConfig])
def test_left_padding_does_not_change_embeddings(tmp_path, config):
    """Both models count positions from the first token, padding or not."""
    tokenizer = tiny_tokenizer(20)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    folder = write(tmp_path / "a", config(**SIZE), tokenizer)
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    encoder = build_text_encoder(folder)
    encoder.save(str(tmp_path / "b"))
    for found in (encoder, SentenceTransformer(str(tmp_path / "b"), device="cpu")):
        alone, padded = found.encode(["a dog"]), found.encode(["a dog", "a dog " * 6])
        assert abs(alone[0] - padded[0]).max() < 1e-5


@pytest.mark.parametrize(("dropout", "noise", "expected"), [(0.1, 0, True), (0.0, 0, False), (0.0, 1e-6, False)])
def test_dropout_is_found_by_a_pass(dropout, noise, expected, bert_folder):
    """Embeddings of equal texts that differ by rounding only, as in Mamba 2, are not those of dropout."""
    encoder = build_text_encoder(bert_folder, pooling="mean", dropout=dropout)

    def add(module, inputs, features):
        features["sentence_embedding"] = features["sentence_embedding"] * (1 + noise * torch.tensor([[0.0], [1.0]]))
        return features

    encoder[1].register_forward_hook(add)
    assert has_dropout(encoder) is expected
