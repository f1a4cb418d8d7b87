"""Tiny models made in memory, no network, one thread (other thread counts round differently)."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.hub_server import TOKEN, running_hub

WORDS = (
    *("a", "the", "one", "two", "three", "small", "big", "red", "blue", "old", "man", "woman", "child", "dog", "cat"),
    *("bird", "horse", "boat", "car", "tree", "house", "river", "sea", "runs", "walks", "sleeps", "eats", "sings"),
    *("reads", "holds", "sees", "near", "under", "over", "in", "on", "with", "by", "and", "then", "slowly", "today"),
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def tiny_bert(folder: Path, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> str:
    """A 2-layer BERT, 32 wide, with its tokenizer, in a folder. initializer_range 0.25: at the usual 0.02 a fresh
    BERT maps all sentences to one point, gradients vanish and a gradient test passes for almost any bug."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.25,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).to(dtype).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **names).save_pretrained(folder)
    return str(folder)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Distinct word strings of 4 to 12 of the tiny model's words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)) for length in lengths]


torch.set_num_threads(1)  # for fixtures of modules, which come before


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def no_dropout_folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert-no-dropout"), dropout=0.0)


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process talks to, logged in."""
    constants = huggingface_hub.constants
    with running_hub() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def whole(bert_folder, tmp_path_factory):
    """The trainer of a run of 8 steps that nothing disturbed."""
    from tests.training.test_signals import SAVING
    from tests.training.test_trainer import make_trainer

    trainer = make_trainer(bert_folder, tmp_path_factory.mktemp("whole"), **SAVING)
    trainer.train()
    return trainer
