"""Views of texts: which tokens they contain, for every kind of vocabulary and both padding sides."""

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from fmicl_text.text.collator import TextViewCollator
from fmicl_text.text.views import TextViews, fixed_tokens
from tests.support import tiny_tokenizer

TEXTS = [
    "Unbelievable aardvarks of southern Australia sing melodiously in winter, and they eat antediluvian porridge.",
    "A dog runs.",
    "Don't re-enter (the) state-of-the-art hippopotamuses!",
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(tokenizer, texts, views, prompt=""):
    """Texts as the collator gives them to the views, and these views."""
    collate = TextViewCollator(tokenizer, ["text"], views.max_seq_length, [prompt] if prompt else None, views)
    batch = collate([{"text": text} for text in texts])
    return {name: value for name, value in batch.items() if name != "text_ids"}


def own_ids(batch):
    """The token ids of each view without padding, as lists."""
    pairs = zip(batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1).bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def trained_tokenizer(kind, **settings):
    """A tokenizer with pieces of words, trained on `TEXTS`, in the form of a family."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    template = {"single": "[CLS] $A [SEP]", "special_tokens": [("[CLS]", 2), ("[SEP]", 3)]}
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=70, special_tokens=special)
    elif kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "sentencepiece":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="[UNK]")
    elif kind == "llama":  # no split into words: a normalizer writes the spaces
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # in training
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special)
    else:  # a mark at the end of words, as in OpenAI GPT and XLM
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=special, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("none", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names, **settings)


KINDS = ("wordpiece", "byte-level", "sentencepiece", "llama", "end of word")


def spelled(tokenizer, text):
    """The words of a text as the views see them, as strings without spaces and marks."""
    make = TextViews(tokenizer, ["delete"], 40)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    words = make.words(ids, torch.tensor([ids.shape[1]]))
    found = {}
    for block, i in zip(words.block[words.is_text].tolist(), ids[words.is_text].tolist(), strict=True):
        piece = tokenizer.convert_ids_to_tokens(i).removeprefix("##").removesuffix("</w>").strip("▁Ġ")
        found[block] = found.get(block, "") + piece
    return list(found.values())


# ---- words


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_every_kind_of_vocabulary(kind):
    """Where the marks are spaces, words are what spaces separate; else, runs of letters with the punctuation after."""
    tokenizer = trained_tokenizer(kind)
    for text in TEXTS:
        assert len(tokenizer.tokenize(text)) > len(text.split())
        if kind in ("wordpiece", "end of word"):
            text = text.lower() if kind == "wordpiece" else text
            assert spelled(tokenizer, text) == [word.replace(" ", "") for word in re.findall(r"\w+\W*", text)]
        else:
            assert spelled(tokenizer, text) == text.split()


def test_words_of_bytes_and_characters():
    text = "A dog runs."
    assert spelled(ByT5Tokenizer(), text) == ["A", " dog", " runs."]
    assert spelled(CanineTokenizer(model_max_length=64), text) == ["A", " dog", " runs."]


def test_words_of_a_vocabulary_of_words():
    assert spelled(tiny_tokenizer(), "a dog runs") == ["a", "dog", "runs"]


def test_characters_of_scripts_without_spaces_are_words():
    """In WordPiece they are tokens of their own; in SentencePiece, the whole sentence follows one mark."""
    text = "\u732b\u5728\u7761\u89c9\u3002 a"
    tokenizer = trained_tokenizer("sentencepiece")
    tokenizer.add_tokens(list("\u732b\u5728\u7761\u89c9"))
    assert spelled(tokenizer, text)[:3] == list("\u732b\u5728\u7761")


def test_a_long_word_is_cut_between_its_tokens():
    tokenizer = trained_tokenizer("byte-level")
    assert spelled(tokenizer, "x" * 16) == ["x" * 16]
    assert spelled(tokenizer, "a" + "x" * 16) == ["a", *"x" * 16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "query: ", "find (in winter): "])
def test_special_tokens_and_prompt(kind, prompt):
    tokenizer = trained_tokenizer(kind)
    prefix, num_last = fixed_tokens(tokenizer, prompt)
    assert num_last == 1
    assert prefix.tolist() == tokenizer(prompt.rstrip())["input_ids"][:-1] if prompt else [2]


# ---- views


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [["crops"], ["repeat"], ["delete"], ["crops", "delete"], ["repeat", "crops"]])
@pytest.mark.parametrize("prompt", ["", "query: "])
def test_views_keep_special_tokens_prompt_length_and_padding(side, kind, names, prompt):
    tokenizer = trained_tokenizer(kind, padding_side=side)
    make = TextViews(tokenizer, names, 20, prompt)
    batch = batch_of(tokenizer, TEXTS, make, prompt)
    fixed = make.prefix.tolist()
    for seed in range(5):
        made = make(batch, seeded(seed))
        shape = made["input_ids"].shape
        assert shape[:2] == (3, 2)
        assert shape[2] <= 20
        assert set(made) == set(batch)
        assert made["attention_mask"].sum(2).max() == shape[2]
        padding = made["attention_mask"] == 0
        assert (made["input_ids"][padding] == 0).all()
        last = made["attention_mask"][..., 0 if side == "right" else -1]
        assert (last == 1).all()
        steps = made["attention_mask"].diff(dim=2)
        assert (steps <= 0).all() if side == "right" else (steps >= 0).all()
        for ids, text in zip(own_ids(made), [text for text in TEXTS for _ in range(2)], strict=True):
            assert ids[: len(fixed)] == fixed
            assert ids[-1] == 3
            assert len(ids) > len(fixed) + 1
            assert 3 not in ids[:-1]
            assert set(ids) <= set(tokenizer(prompt + text)["input_ids"])
