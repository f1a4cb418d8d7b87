"""Views of texts: which tokens they contain, for every kind of vocabulary and both padding sides."""

import re
from dataclasses import replace
from functools import cache

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, TextContrastiveModel, build_text_encoder
from fmicl_text.errors import InputError
from fmicl_text.quickstart import ENCODER
from fmicl_text.text import views as views_module
from fmicl_text.text.collator import TextViewCollator
from fmicl_text.text.data import TextData
from fmicl_text.text.tokenization import training_rows
from fmicl_text.text.views import TextViews, choose_views, fixed_tokens
from fmicl_text.training.momentum import MomentumModel, MomentumTrainer
from tests.support import WORDS, one_fast, run_trainers, same, sentences, tiny_tokenizer, weights

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


@cache
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


@pytest.mark.parametrize("make", one_fast([ByT5Tokenizer, CanineTokenizer]))
def test_words_of_bytes_and_characters(make):
    assert spelled(make(model_max_length=64), "A dog runs.") == ["A", " dog", " runs."]


def test_words_of_a_vocabulary_of_words():
    assert spelled(tiny_tokenizer(), "a dog runs") == ["a", "dog", "runs"]


def test_characters_of_scripts_without_spaces_are_words():
    """In WordPiece they are tokens of their own; in SentencePiece, the whole sentence follows one mark."""
    text = "\u732b\u5728\u7761\u89c9\u3002 a"
    tokenizer = trained_tokenizer("sentencepiece", padding_side="right")  # a copy of its own
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


def test_special_tokens_of_other_templates():
    """T5 has none before a text, XLNet two after it."""
    tokenizer = trained_tokenizer("sentencepiece", padding_side="left", truncation_side="right")
    for template, first, num_last in (("$A [SEP]", [], 1), ("$A [SEP] [CLS]", [], 2), ("[CLS] [SEP] $A", [2, 3], 0)):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        prefix, number = fixed_tokens(tokenizer, "")
        assert (prefix.tolist(), number) == (first, num_last)
        make = TextViews(tokenizer, ["crops"], 8)
        for ids in own_ids(make(batch_of(tokenizer, TEXTS, make), seeded())):
            assert ids[: len(first)] == first
            assert set(ids[len(first) : len(ids) - num_last]).isdisjoint({2, 3})
            assert len(first) + num_last < len(ids) <= 8


# ---- views


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [["crops"], ["delete"], ["repeat", "crops"]])
def test_views_keep_special_tokens_prompt_length_and_padding(side, kind, names):
    tokenizer, prompt = trained_tokenizer(kind, padding_side=side), "query: " if names == ["delete"] else ""
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


def many(names, texts, max_seq_length=32, draws=400, tokenizer=None, **settings):
    """The words of `draws` views of texts of a word per token, without special tokens, as lists."""
    tokenizer = tokenizer or tiny_tokenizer(model_max_length=512)
    make = TextViews(tokenizer, names, max_seq_length, **settings)
    batch = batch_of(tokenizer, texts * (draws // 2), make)
    return [tokenizer.decode(ids[1:-1]).split() for ids in own_ids(make(batch, seeded()))]


TEN = "a the one two three small big red blue old"


def test_crops_are_spans_of_every_length_and_place():
    """A text of 10 words gives spans of 4 to 8 words, ceil(10 share) of a share in [0.3, 0.8], each place equally
    often."""
    text = TEN.split()
    crops = many(["crops"], [TEN], draws=10_000)
    spans = {tuple(text[start : start + length]) for length in range(4, 9) for start in range(11 - length)}
    assert {tuple(crop) for crop in crops} == spans
    lengths = torch.tensor(list(map(len, crops))).bincount(minlength=9) / len(crops)
    assert torch.allclose(lengths[4:], torch.full((5,), 0.2), atol=0.03)
    starts = torch.tensor([text.index(crop[0]) for crop in crops if len(crop) == 4]).bincount() / lengths[4] / 10_000
    assert torch.allclose(starts, torch.full((7,), 1 / 7), atol=0.03)


def test_the_two_crops_of_a_text_are_independent():
    crops = many(["crops"], [TEN], draws=10_000)
    first = torch.tensor([crop[0] == "a" for crop in crops]).float().unflatten(0, (-1, 2))
    assert torch.corrcoef(first.T)[0, 1].abs() < 0.05
    assert 0.1 < first.mean() < 0.4


def test_crops_come_from_beyond_the_length_of_a_view():
    """40 words, views of 6 tokens: each is 4 words, from anywhere."""
    words = tuple(WORDS[:40])
    crops = many(["crops"], [" ".join(words)], max_seq_length=6, draws=2000)
    assert {tuple(crop) for crop in crops} == {words[i : i + 4] for i in range(37)}


def test_a_crop_has_whole_words():
    """Of a text of long words, each view has one: two do not fit into 5 tokens of the text."""
    tokenizer = trained_tokenizer("byte-level")
    text = "zqxj" + " zqxj" * 5
    assert len(tokenizer.tokenize(text)) == 29
    for words in many(["crops"], [text], 7, tokenizer=tokenizer):
        assert words == ["zqxj"]


def test_a_crop_of_a_single_long_word_is_a_part_of_it():
    tokenizer = trained_tokenizer("byte-level")
    views = many(["crops"], ["q" * 12], 8, tokenizer=tokenizer)  # one word
    assert set(map(tuple, views)) == {("q" * 6,)}
    views = many(["crops"], ["".join(f"{i}" for i in range(10)) * 5], 8, tokenizer=tokenizer)  # 50 tokens
    assert {len(view[0]) for view in views} == {6}
    assert {view[0][0] for view in views} == set("0123456789")


def test_repeated_words_follow_their_word():
    """Up to 32 % of the words, at least 2, twice. Of 10 words 0, 1, 2 or 3 are."""
    views = many(["repeat"], [TEN], draws=10_000)
    for view in views:
        assert [word for i, word in enumerate(view) if i == 0 or view[i - 1] != word] == TEN.split()
    numbers = torch.tensor([len(view) - 10 for view in views]).bincount() / len(views)
    assert torch.allclose(numbers, torch.full((4,), 0.25), atol=0.03)
    place = [[i for i in range(1, len(view)) if view[i] == view[i - 1]] for view in views if len(view) == 11]
    places = torch.tensor([i[0] - 1 for i in place]).bincount() / len(place)
    assert torch.allclose(places, torch.full((10,), 0.1), atol=0.03)


def test_a_repeated_word_of_several_tokens_is_repeated_whole():
    tokenizer = trained_tokenizer("byte-level")
    views = {" ".join(view) for view in many(["repeat"], ["zq xj"], tokenizer=tokenizer)}
    assert views == {"zq xj", "zqzq xj", "zq xj xj", "zqzq xj xj"}


def test_repetition_breaks_the_link_of_positive_pairs_and_length():
    """Without it, the two views of a text have the same length, and a model can find them by their length."""
    texts = [" ".join(WORDS[:n]) for n in range(2, 30)] * 30
    tokenizer = tiny_tokenizer(model_max_length=512)
    make = TextViews(tokenizer, ["repeat"], 64)
    lengths = make(batch_of(tokenizer, texts, make), seeded())["attention_mask"].sum(2).float()
    same = (lengths[:, 0] == lengths[:, 1]).float().mean()
    assert 0.1 < same < 0.4
    assert torch.corrcoef(lengths.T)[0, 1] < 0.98


def test_words_are_deleted_independently():
    views = many(["delete"], [TEN], draws=10_000)
    kept = sum(map(len, views)) / len(views) / 10
    assert kept == pytest.approx(1 - views_module.DELETED, abs=0.005)
    first, second = (torch.tensor([word in view for view in views]).float() for word in ("a", "old"))
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.03
    assert all(view == [word for word in TEN.split() if word in view] for view in views)


@pytest.mark.slow
def test_a_view_is_never_empty(monkeypatch):
    monkeypatch.setattr(views_module, "DELETED", 1.0)
    views = many(["delete"], [TEN], draws=10_000)
    assert set(map(len, views)) == {1}
    shares = torch.tensor([TEN.split().index(view[0]) for view in views]).bincount() / len(views)
    assert torch.allclose(shares, torch.full((10,), 0.1), atol=0.03)
    assert {tuple(view) for names in (["crops"], ["delete"], ["crops", "delete"]) for view in many(names, ["a"])} == {
        ("a",)
    }


def test_several_views_are_composed_in_their_order():
    """A crop of 4 to 8 words, of which up to 2 are twice."""
    composed = many(["crops", "repeat"], [TEN], draws=2000)
    assert max(map(len, composed)) == 10
    assert {len(set(view)) for view in composed} == {4, 5, 6, 7, 8}
    for view in composed:
        start = TEN.split().index(view[0])
        assert list(dict.fromkeys(view)) == TEN.split()[start : start + len(set(view))]


def test_dropout_keeps_the_text():
    assert set(map(tuple, many(["dropout"], [TEN]))) == {tuple(TEN.split())}


def test_a_long_view_is_cut_as_the_tokenizer_truncates():
    tokenizer = tiny_tokenizer(model_max_length=512)
    views = many(["repeat"], [TEN], 7, tokenizer=tokenizer)
    assert max(map(len, views)) == 5
    assert {view[0] for view in views} == {"a"}
    tokenizer.truncation_side = "left"
    views = many(["repeat"], [TEN], 7, tokenizer=tokenizer)
    assert {view[-1] for view in views} == {"old"}


def test_a_truncated_prompt_is_not_expected():
    """A tokenizer that truncates on the left cuts the prompt of a long text."""
    tokenizer = tiny_tokenizer(model_max_length=512)
    tokenizer.truncation_side = "left"
    make = TextViews(tokenizer, ["repeat"], 8, "red boat ")
    long, short = own_ids(make(batch_of(tokenizer, [TEN, "a dog"], make, "red boat "), seeded()))[::2]
    assert len(long) == 8
    assert tokenizer.decode(short[1:3]) == "red boat"


def test_the_same_generator_gives_the_same_views():
    tokenizer = tiny_tokenizer(model_max_length=512)
    make = TextViews(tokenizer, ["crops", "delete"])
    batch = batch_of(tokenizer, [TEN] * 8, make)
    first, again, other = (make(batch, seeded(seed))["input_ids"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_padding_of_a_batch_does_not_matter():
    """The views of a text are the same whatever the other texts, if they are drawn alike."""
    tokenizer = tiny_tokenizer(model_max_length=512)
    make = TextViews(tokenizer, ["crops"])
    batch = batch_of(tokenizer, [TEN, "a dog"], make)
    wider = {name: torch.nn.functional.pad(value, (0, 7)) for name, value in batch.items()}
    first, second = make(batch, seeded()), make(wider, seeded())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_token_types_are_kept():
    tokenizer = AutoTokenizer.from_pretrained(
        ENCODER, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    make = TextViews(tokenizer, ["delete"])
    batch = batch_of(tokenizer, TEXTS, make)
    batch["token_type_ids"] = batch["input_ids"] % 7
    made = make(batch, seeded())
    own = made["attention_mask"] == 1
    assert torch.equal(made["token_type_ids"][own], made["input_ids"][own] % 7)
    assert (made["token_type_ids"][~own] == tokenizer.pad_token_type_id).all()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "views must be one or more of dropout, crops, repeat, delete; got none"),
        (["crop"], "views must be one or more of dropout, crops, repeat, delete; got crop"),
        (["crops", "crops"], "views=crops crops names one twice"),
        (["crops", "dropout"], "views=crops dropout: dropout leaves both views as they are"),
        (["auto"], "got auto"),
        ("crops", "views must be a list of names, got 'crops'"),
        (None, "views must be a list of names, got None"),
    ],
)
def test_names_that_are_not_accepted(names, message):
    with pytest.raises(InputError, match=message):
        TextViews(tiny_tokenizer(), names)


def test_lengths_that_are_not_accepted():
    with pytest.raises(InputError, match="max_seq_length=41 exceeds the model's maximum of 40 tokens"):
        TextViews(tiny_tokenizer(), ["crops"], 41)
    assert TextViews(tiny_tokenizer(), ["crops"], 40).read_length == 256
    with pytest.raises(InputError, match="max_seq_length=2 leaves no token for the text besides 2 special tokens"):
        TextViews(tiny_tokenizer(), ["crops"], 2)
    assert TextViews(tiny_tokenizer(), ["crops"], 3).max_seq_length == 3
    with pytest.raises(InputError, match="prompts: 'a dog ' has 4 tokens, which leaves none of max_seq_length=4"):
        TextViews(tiny_tokenizer(), ["crops"], 4, "a dog ")


# ---- the choice


def data_of(texts, columns=("text",)):
    rows = datasets.Dataset.from_dict(dict.fromkeys(columns, texts))
    return TextData(rows, columns, None, "train_file=a.txt")


PARAGRAPHS = [" ".join(sentences(20, seed)) for seed in range(64)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("texts", "dropout", "names", "words"),
    [
        (sentences(64), 0.1, ["dropout"], "dropout (a median of 10 tokens per text, and the encoder has dropout)"),
        (sentences(64), 0.0, ["delete"], "delete (a median of 10 tokens per text, and the encoder has no dropout)"),
        (PARAGRAPHS, 0.1, ["crops"], "crops (a median of 163 tokens per text)"),
        (PARAGRAPHS, 0.0, ["crops"], "crops (a median of 163 tokens per text)"),
    ],
)
def test_views_are_chosen_from_texts_and_encoder(streaming, texts, dropout, names, words, bert_folder):
    data = data_of(texts)
    data = replace(data, dataset=data.dataset.to_iterable_dataset()) if streaming else data
    encoder = build_text_encoder(bert_folder, pooling="mean", dropout=dropout)
    encoder.train(dropout > 0)
    views, reason = choose_views(encoder, data, 16)
    assert reason == words
    assert (["dropout"] if views is None else list(views.views)) == names
    assert encoder.training is (dropout > 0)


def test_given_views_are_used(bert_folder):
    encoder = build_text_encoder(bert_folder, pooling="mean")
    views, reason = choose_views(encoder, data_of(sentences(8)), 16, ("a dog ",), ["delete", "repeat"])
    assert reason == "delete repeat (as given)"
    assert views.describe() == {"views": ["delete", "repeat"], "max_seq_length": 16, "read_length": 16}
    assert views.prompt == "a dog "
    assert choose_views(encoder, data_of(sentences(8)), 16, (), ["dropout"]) == (None, "dropout (as given)")


@pytest.mark.parametrize("names", [["crops"], ["dropout"]])
def test_pairs_are_the_views(names, bert_folder):
    encoder, data = build_text_encoder(bert_folder, pooling="mean"), data_of(sentences(8), ("sent0", "sent1"))
    assert choose_views(encoder, data, 16) == (None, "the columns sent0 sent1")
    with pytest.raises(InputError, match=f"views={names[0]} applies to one text column, got sent0 sent1"):
        choose_views(encoder, data, 16, (), names)


def test_a_row_of_a_stream_that_cannot_be_read(bert_folder):
    def rows():
        yield from ({"text": text} for text in sentences(20))
        raise ValueError("no more")

    stream = datasets.IterableDataset.from_generator(rows)
    data = TextData(stream, ("text",), None, "train_file=a.txt")
    with pytest.raises(InputError, match=r"^train_file=a\.txt cannot be read: ValueError: no more"):
        choose_views(build_text_encoder(bert_folder, pooling="mean"), data, 16)


# ---- training


def make_views_trainer(folder, output_dir, names=("crops", "delete"), streaming=False, momentum=False, **settings):
    """A trainer of 4 steps of 8 of 64 texts of 20 sentences each, with views of at most 16 tokens."""
    defaults = {
        "per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-3, "gamma": 2.0, "alpha": 4.0,
        "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
        "use_cpu": True, "disable_tqdm": True, "report_to": [],
    }  # fmt: skip
    args = FMICLTrainingArguments(str(output_dir), **(defaults | settings))
    torch.manual_seed(3)
    encoder = build_text_encoder(folder, pooling="mean")
    data = data_of(PARAGRAPHS)
    data = replace(data, dataset=data.dataset.to_iterable_dataset(num_shards=4)) if streaming else data
    rows, collator, _ = training_rows(data, encoder.tokenizer, 16, None, TextViews(encoder.tokenizer, names, 16))
    model = TextContrastiveModel(encoder)
    if momentum:
        return MomentumTrainer(MomentumModel(model, predictor=True), args, train_dataset=rows, data_collator=collator)
    return FMICLTrainer(model, args, train_dataset=rows, data_collator=collator)


def seen_by(trainer):
    """The token ids of the batches that the encoder gets."""
    batches, make = [], trainer.make_views

    def recorded(inputs):
        made = make(inputs)
        batches.append(made["input_ids"].clone())
        return made

    trainer.make_views = recorded
    return batches


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    one_fast([
        {}, {"streaming": True}, {"momentum": True}, {"train_sampling_strategy": "group_by_length"},
        {"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    ]),
)  # fmt: skip
def test_a_resumed_run_makes_the_same_views(settings, bert_folder, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2} | settings
    whole = make_views_trainer(bert_folder, tmp_path, **settings)
    batches = seen_by(whole)
    whole.train()
    again = make_views_trainer(bert_folder, tmp_path, **settings)
    resumed = seen_by(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(batches) == 2 * len(resumed) > 0
    assert all(torch.equal(one, other) for one, other in zip(batches[len(resumed) :], resumed, strict=True))
    assert not torch.equal(batches[0][:, 0, :4], batches[0][:, 1, :4])
    assert all(batch.shape[1] == 2 and 3 < batch.shape[2] <= 16 for batch in batches)
    assert same(weights(whole), weights(again))


def test_mini_batches_get_the_views_of_the_batch(bert_folder, tmp_path):
    whole, parts = (make_views_trainer(bert_folder, tmp_path / str(size), mini_batch_size=size) for size in (8, 4))
    batches, others = seen_by(whole), seen_by(parts)
    whole.train()
    parts.train()
    assert all(torch.equal(one, other) for one, other in zip(batches, others, strict=True))


def test_processes_make_different_views(bert_folder, tmp_path):
    first, second = run_trainers(2, bert_folder, str(tmp_path), function=views_of_one_process)
    assert torch.equal(first[0], second[0])  # the same texts
    assert first[1].shape != second[1].shape or not torch.equal(first[1], second[1])


def views_of_one_process(folder, output_dir):
    trainer = make_views_trainer(folder, output_dir)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    return batch["input_ids"].clone(), trainer.make_views(dict(batch))["input_ids"]


def test_a_resumed_run_with_other_views_is_not_exact(bert_folder, tmp_path):
    make_views_trainer(bert_folder, tmp_path, ["repeat"], save_strategy="steps", save_steps=2).train()
    other = make_views_trainer(bert_folder, tmp_path, ["delete"], save_strategy="steps", save_steps=2)
    with pytest.warns(UserWarning, match=r"resuming is not exact: .*views \['repeat'\] -> \['delete'\]"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_views_of_the_trainer(bert_folder, tmp_path, caplog):
    """Without a collator, the trainer reads as much of the texts as its views need. By default they are chosen."""
    args = FMICLTrainingArguments(str(tmp_path), eval_strategy="no", per_device_train_batch_size=8, use_cpu=True)
    encoder = build_text_encoder(bert_folder, pooling="mean")
    given = TextViews(encoder.tokenizer, ["crops"], 16)
    trainer = FMICLTrainer(encoder, args, train_dataset=PARAGRAPHS, views=given)
    assert trainer.views is given
    assert max(map(len, (row[0] for row in trainer.train_dataset["input_ids"]))) > 100
    assert trainer.resume_signature()["views"] == ["crops"]
    chosen = FMICLTrainer(encoder, args, train_dataset=PARAGRAPHS)
    assert chosen.views.describe() == {"views": ["crops"], "max_seq_length": 40, "read_length": 256}
    assert "views of train_dataset: crops (a median of 163 tokens per text)" in caplog.text
    dropout = FMICLTrainer(encoder, args, train_dataset=sentences(64))
    assert dropout.views is None
    assert dropout.resume_signature()["views"] == ["dropout"]


def test_views_of_the_users_own(bert_folder, tmp_path):
    """A function of the batch of the collator, a dict of tokens [B, 2, T]."""

    def last_token_removed(tokens, generator):
        return {name: torch.stack([value[:, 0, :-1], value[:, 1, 1:]], 1) for name, value in tokens.items()}

    settings = {"eval_strategy": "no", "per_device_train_batch_size": 8, "max_steps": 1, "use_cpu": True}
    args = FMICLTrainingArguments(str(tmp_path), save_strategy="no", load_best_model_at_end=False, **settings)
    encoder = build_text_encoder(bert_folder, pooling="mean")
    trainer = FMICLTrainer(encoder, args, train_dataset=sentences(64), views=last_token_removed)
    batches = seen_by(trainer)
    trainer.train()
    ids = batches[0]
    assert torch.equal(ids[:, 0, 1:], ids[:, 1, :-1])
    assert (ids[:, 0, 0] == 2).all()


def test_tokens_of_views_are_not_counted(bert_folder, tmp_path):
    with pytest.raises(InputError, match="include_num_input_tokens_seen=all does not apply to views"):
        make_views_trainer(bert_folder, tmp_path, include_num_input_tokens_seen="all")


def test_views_of_the_trainer_that_do_not_apply(bert_folder, tmp_path):
    args = FMICLTrainingArguments(str(tmp_path), eval_strategy="no", per_device_train_batch_size=8, use_cpu=True)
    encoder = build_text_encoder(bert_folder, pooling="mean")
    views = TextViews(encoder.tokenizer, ["crops"], 16, "a dog ")
    with pytest.raises(InputError, match="views are made for the prompt 'a dog '; the encoder has"):
        FMICLTrainer(encoder, args, train_dataset=sentences(64), views=views)
    for named in ("crops", ["crops"]):
        with pytest.raises(InputError, match=r"views must be a callable such as TextViews, got .*crops"):
            FMICLTrainer(encoder, args, train_dataset=sentences(64), views=named)
    pairs = list(zip(sentences(64), sentences(64, 1), strict=True))
    with pytest.raises(InputError, match="views apply to one text column, got sent0 sent1"):
        FMICLTrainer(encoder, args, train_dataset=pairs, views=TextViews(encoder.tokenizer, ["crops"], 16))


def test_cropped_texts_are_read_beyond_the_length_of_the_encoder(bert_folder):
    """Positions exist for 40 tokens only; views fit, whatever the texts."""
    encoder = build_text_encoder(bert_folder, pooling="mean")
    views, _ = choose_views(encoder, data_of(PARAGRAPHS), 40, (), ["crops"])
    _, collator, data = training_rows(data_of(PARAGRAPHS), encoder.tokenizer, 40, None, views)
    assert data.truncated_share == 0
    assert collator.describe()["read_length"] == 256
