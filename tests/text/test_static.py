"""Static embeddings: the tokens and embeddings that sentence-transformers gives them, and their training."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, InputError, TextContrastiveModel, build_text_encoder
from fmicl_text.quickstart import ENCODER
from fmicl_text.text.static import static_features, tokenizer_of
from tests.support import same, sentences, tiny_tokenizer, weights


def static_encoder(tokenizer=None, *others):
    torch.manual_seed(0)
    first = StaticEmbedding(tokenizer or tiny_tokenizer().backend_tokenizer, embedding_dim=8)
    return SentenceTransformer(modules=[first, *others], device="cpu")


def make_static_trainer(output_dir, rows=None, encoder=None, **settings):
    defaults = {
        "max_steps": 4, "per_device_train_batch_size": 8, "eval_strategy": "no", "save_strategy": "no", "gamma": 2.0,
        "alpha": 8.0, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "load_best_model_at_end": False,
    }  # fmt: skip
    args = FMICLTrainingArguments(str(output_dir), **(defaults | settings))
    return FMICLTrainer(encoder or static_encoder(), args, train_dataset=rows or sentences(64))


@pytest.mark.parametrize("texts", [["a dog runs", "the", "a small cat sleeps slowly"], ["a dog"]])
def test_padded_tokens_give_the_embeddings_of_encode(texts):
    encoder = static_encoder(None, Normalize())
    tokens = tokenizer_of(encoder)(texts, padding=True, return_tensors="pt")
    embeddings = TextContrastiveModel(encoder).embed(dict(tokens))
    assert np.allclose(embeddings.detach().numpy(), encoder.encode(texts), atol=1e-6)


def test_features_are_concatenated_texts():
    ids = torch.tensor([[5, 6, 0], [7, 8, 9], [4, 0, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    features = static_features({"input_ids": ids, "attention_mask": mask})
    assert features["input_ids"].tolist() == [5, 6, 7, 8, 9, 4]
    assert features["offsets"].tolist() == [0, 2, 5]


def test_the_tokenizer_adds_no_special_tokens_and_does_not_truncate():
    own = Tokenizer.from_file(str(ENCODER / "tokenizer.json"))  # it adds [CLS] and [SEP]
    own.enable_truncation(3)
    encoder = static_encoder(own)
    own.no_truncation()
    text = "an unbelievable aardvark sings melodiously"
    assert tokenizer_of(encoder)(text)["input_ids"] == own.encode(text, add_special_tokens=False).ids
    assert own.encode("a").ids != tokenizer_of(encoder)("a")["input_ids"]  # the encoder's is not changed


def test_the_tokenizer_of_a_transformer_is_its_own(bert_folder):
    encoder = build_text_encoder(bert_folder)
    assert tokenizer_of(encoder) is encoder.tokenizer


def test_training_on_texts(tmp_path, caplog):
    """Words are deleted, since there is no dropout; the encoder is saved as sentence-transformers opens it."""
    trainer = make_static_trainer(tmp_path)
    assert "delete (a median of 8 tokens per text, and the encoder has no dropout)" in caplog.text
    before = weights(trainer)
    trainer.train()
    assert not same(before, weights(trainer))
    assert all(entry["loss_positive"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    trainer.save_model(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.array_equal(again.encode(sentences(5)), trainer.model.encoder.encode(sentences(5)))


def test_training_on_pairs(tmp_path):
    pairs = list(zip(sentences(64), sentences(64, seed=1), strict=True))
    trainer = make_static_trainer(tmp_path, pairs)
    before = weights(trainer)
    trainer.train()
    assert trainer.views is None
    assert not same(before, weights(trainer))


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    whole = make_static_trainer(tmp_path / "a", save_strategy="steps", save_steps=2)
    whole.train()
    again = make_static_trainer(tmp_path / "a", save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(weights(whole), weights(again))


def test_a_folder_is_opened_in_float32(tmp_path):
    static_encoder().half().save(str(tmp_path), create_model_card=False)
    encoder = build_text_encoder(str(tmp_path))
    assert encoder[0].embedding.weight.dtype == torch.float32
    assert TextContrastiveModel(encoder).describe()["base_model"] is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooling": "mean"}, "pooling does not apply to .* a StaticEmbedding"),
        ({"lora_rank": 2}, "lora_rank does not apply to .* a StaticEmbedding"),
        ({"dropout": 0.1}, "dropout=0.1 does not apply to .* StaticEmbedding"),
    ],
)
def test_options_that_do_not_apply(settings, words, tmp_path):
    static_encoder().save(str(tmp_path), create_model_card=False)
    with pytest.raises(InputError, match=words) as error:
        build_text_encoder(str(tmp_path), **settings)
    assert "\n" not in str(error.value)


def test_activation_checkpointing_does_not_apply():
    with pytest.raises(InputError, match="activation_checkpointing=True is not supported"):
        TextContrastiveModel(static_encoder()).activation_checkpointing_enable()


def test_a_tokenizer_with_more_tokens_than_embeddings():
    encoder = static_encoder()
    encoder[0].tokenizer.add_tokens(["new"])
    with pytest.raises(InputError, match=r"tokenizer and model do not match; .* ids up to 46, the model 46 embeddings"):
        TextContrastiveModel(encoder)
