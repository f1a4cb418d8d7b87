"""Text encoders: pooling, dtype, dropout, heads, saving and loading."""

import json
import logging
import shutil
import warnings
from itertools import islice
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoders import open_encoder
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.quickstart import ENCODER
from fmicl_text.text.model import TextContrastiveModel, build_text_encoder, pooling_source
from tests.soak.families import write_tiny_model
from tests.support import sentences, tiny_bert

SMALL_FILES = (
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "tokenizer_config.json"),
    *("1_Pooling/config.json", "2_Dense/config.json"),
)
TWO_BASES = {
    "full_attention": {"rope_theta": 77.0, "rope_type": "default"},
    "sliding_attention": {"rope_theta": 33.0, "rope_type": "default"},
}
COMMIT = "0123456789" * 4


def pooling_of(encoder):
    return encoder[1].pooling_mode


def test_weights_are_float32_whatever_the_dtype_of_the_file(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        folder = tiny_bert(tmp_path / str(dtype), dtype=dtype)
        assert {p.dtype for p in build_text_encoder(folder).parameters()} == {torch.float32}


def test_pooling_is_the_models_own_else_cls(bert_folder, tmp_path):
    assert pooling_of(build_text_encoder(bert_folder)) == "cls"
    encoder = build_text_encoder(bert_folder, pooling="mean")
    encoder.save(str(tmp_path), create_model_card=False)
    assert pooling_of(build_text_encoder(str(tmp_path))) == "mean"
    assert pooling_of(build_text_encoder(str(tmp_path), pooling="max")) == "max"


def test_every_parameter_gets_a_gradient(bert_folder):
    model = TextContrastiveModel(build_text_encoder(bert_folder), head="simcse")
    features = dict(model.encoder.tokenizer(["a dog runs", "the cat"], return_tensors="pt", padding=True))
    model(features).sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["encoder.0.model.pooler.dense.weight", "encoder.0.model.pooler.dense.bias"]


def test_dropout_is_set_everywhere(bert_folder):
    encoder = build_text_encoder(bert_folder, dropout=0.37)
    assert {m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)} == {0.37}


def test_views_differ_with_dropout_and_coincide_without(bert_folder):
    model = TextContrastiveModel(build_text_encoder(bert_folder))
    features = dict(model.encoder.tokenizer(["a dog runs"] * 2, return_tensors="pt"))
    x, y = model.train()(dict(features))
    assert (x - y).abs().max() > 1e-3
    x, y = model.eval()(dict(features))
    assert torch.equal(x, y)


def test_saved_folder_gives_identical_vectors_everywhere(bert_folder, tmp_path):
    """With sentence-transformers and with `build_text_encoder` bit for bit, with AutoModel and mean pooling to 1e-6."""
    encoder = build_text_encoder(bert_folder, pooling="mean")
    encoder.save(str(tmp_path), create_model_card=False)
    texts = sentences(20)
    own = encode_sentences(encoder, texts, progress=False)
    assert torch.equal(own, encode_sentences(build_text_encoder(str(tmp_path)), texts, progress=False))
    reopened = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(own, encode_sentences(reopened, texts, progress=False))
    direct = encoder.encode(texts, convert_to_tensor=True)
    assert torch.equal(direct, reopened.encode(texts, convert_to_tensor=True))
    features = AutoTokenizer.from_pretrained(tmp_path)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = AutoModel.from_pretrained(tmp_path).eval()(**features).last_hidden_state
    mask = features["attention_mask"][..., None]
    torch.testing.assert_close((states * mask).sum(1) / mask.sum(1), own, rtol=0, atol=1e-6)


def test_a_base_from_the_hub_is_recorded_with_its_commit(bert_folder, tmp_path, monkeypatch):
    """A model in the layout of the Hub's cache."""
    shutil.copytree(bert_folder, tmp_path / "models--user--bert" / "snapshots" / COMMIT)
    (tmp_path / "models--user--bert" / "refs").mkdir()
    (tmp_path / "models--user--bert" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, base in {"user/bert": ("user/bert", COMMIT), bert_folder: (None, None)}.items():
        described = TextContrastiveModel(build_text_encoder(name)).describe()
        assert (described["base_model"], described["base_revision"]) == base


def test_the_tokenizer_opens_in_transformers_4_too(bert_folder, tmp_path):
    model = TextContrastiveModel(build_text_encoder(bert_folder))
    model.save_encoder(str(tmp_path), model.state_dict())
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    texts = sentences(3)
    assert AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == model.encoder.tokenizer(texts)["input_ids"]


def test_a_checkpoint_restores_encoder_and_head(bert_folder, tmp_path):
    model = TextContrastiveModel(build_text_encoder(bert_folder), head="simcse")
    model.encoder.save(str(tmp_path), create_model_card=False)
    model.save_training_only(str(tmp_path), model.state_dict())
    other = TextContrastiveModel(build_text_encoder(bert_folder), head="simcse")
    for parameter in other.parameters():
        parameter.data.add_(1.0)
    other.load_checkpoint(str(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.state_dict()[name]), name


def test_training_data_and_collator_of_lists_and_streams(bert_folder):
    model = TextContrastiveModel(build_text_encoder(bert_folder))
    rows, collator = model.prepare_data([("a dog", "the dog runs"), ("the cat", "a cat sleeps")])
    assert (collator.settings["columns"], collator.settings["max_seq_length"]) == (["sent0", "sent1"], 40)
    assert collator([rows[0], rows[1]])["input_ids"].shape == (2, 2, 5)
    stream = Dataset.from_dict({"text": ["a dog", " ", "the cat"], "id": [1, 2, 3]}).to_iterable_dataset()
    rows, collator = model.prepare_data(stream)
    assert collator.settings["columns"] == ["text"]
    expected = [[model.encoder.tokenizer(text)["input_ids"]] for text in ("a dog", "the cat", "a dog")]
    assert [row["input_ids"] for row in islice(rows, 3)] == expected


def test_encoding_keeps_the_order_of_the_sentences(bert_folder):
    encoder = build_text_encoder(bert_folder)
    texts = sentences(9)
    one_by_one = torch.cat([encode_sentences(encoder, [text], progress=False) for text in texts])
    torch.testing.assert_close(encode_sentences(encoder, texts, batch_size=4, progress=False), one_by_one)


@pytest.mark.parametrize("terminal", [False, True])
def test_load_reports_are_shown_if_weights_are_missing(bert_folder, tmp_path, caplog, monkeypatch, terminal):
    """In a terminal, transformers writes the report in color."""
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: terminal, write=len, flush=lambda: None))
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        build_text_encoder(bert_folder)
        build_text_encoder(str(ENCODER))  # from masked language modeling: an unused head, no pooler
        assert not caplog.records
        model = AutoModel.from_pretrained(bert_folder)
        state = {k: v for k, v in model.state_dict().items() if "layer.1" not in k}
        model.save_pretrained(tmp_path, state_dict=state)
        AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path)
        build_text_encoder(str(tmp_path))
        assert "layer.1" in caplog.text and "MISSING" in caplog.text
        assert ("\x1b[31m" in caplog.records[-1].getMessage()) == terminal


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no/such/folder", "model_name_or_path=./no/such/folder: no such folder"),
        ("nobody/no-such-model", "model_name_or_path=nobody/no-such-model: "),
        ("not a name", "model_name_or_path=not a name: "),
    ],
)
def test_a_model_that_does_not_exist(name, message):
    with pytest.raises(InputError) as error:
        build_text_encoder(name)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_model_without_its_tokenizer(bert_folder, tmp_path):
    AutoModel.from_pretrained(bert_folder).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^model_name_or_path=.*: its tokenizer files are missing"):
        build_text_encoder(str(tmp_path))


def test_a_home_relative_path_keeps_its_pooling(bert_folder, tmp_path, monkeypatch):
    build_text_encoder(bert_folder, pooling="mean").save(str(tmp_path / "m"), create_model_card=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pooling_of(build_text_encoder("~/m")) == "mean"


def test_dropout_out_of_range(bert_folder):
    with pytest.raises(InputError, match=r"^dropout must be in \[0, 1\), got 1.0"):
        build_text_encoder(bert_folder, dropout=1.0)


def test_progress_bars_are_enabled_again_after_loading(bert_folder):
    transformers_logging.enable_progress_bar()
    build_text_encoder(bert_folder)
    assert transformers_logging.is_progress_bar_enabled()


# ---- dropout


def test_dropout_under_every_name(tmp_path):
    """GPT-2's are called resid_pdrop, embd_pdrop and attn_pdrop. ESM's token_dropout is a flag. Layer dropout, which
    skips layers, is kept."""
    expected = {
        "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
        "mpt": {"emb_pdrop": 0.3, "resid_pdrop": 0.3},  # its attn_pdrop must be an integer
        "esm": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "token_dropout": False},
        "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.0},
    }
    for name, values in expected.items():
        write_tiny_model(name, str(tmp_path / name))
        config = build_text_encoder(str(tmp_path / name), dropout=0.3)[0].model.config
        assert {key: getattr(config, key) for key in values} == values
        if name == "gpt2":
            modules = build_text_encoder(str(tmp_path / name), dropout=0.3).modules()
            assert {m.p for m in modules if isinstance(m, torch.nn.Dropout)} == {0.3}


def test_dropout_of_a_model_without_dropout(tmp_path):
    write_tiny_model("mamba", str(tmp_path))
    with pytest.raises(InputError, match=r"^dropout=0.1: .*\(mamba\) has no dropout probability; train on pairs"):
        build_text_encoder(str(tmp_path), dropout=0.1)
    build_text_encoder(str(tmp_path), dropout=0.0)


# ---- padding for compiled models


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_padding_does_not_change_embeddings(bert_folder, side, pooling):
    encoder = build_text_encoder(bert_folder, pooling=pooling).eval()
    encoder.tokenizer.padding_side = side
    model = TextContrastiveModel(encoder)
    rows, collator = model.prepare_data(Dataset.from_dict({"anchor": sentences(8), "positive": sentences(8, seed=1)}))
    batch = collator([rows[i] for i in range(8)])
    ids = batch.pop("text_ids")
    padded = model.pad(batch)
    assert batch["input_ids"].shape[-1] not in (16, 32) and padded["input_ids"].shape == (*ids.shape, 16)
    expected, got = (model({key: value.flatten(0, 1) for key, value in one.items()}) for one in (batch, padded))
    assert torch.allclose(got, expected, atol=1e-6)


def test_padding_ends_at_the_models_maximum(bert_folder):
    model = TextContrastiveModel(build_text_encoder(bert_folder))  # 40 positions
    for length, expected in ((1, 16), (16, 16), (33, 40), (40, 40)):
        tokens = torch.ones(2, 2, length, dtype=torch.long)
        padded = model.pad({"input_ids": tokens, "attention_mask": tokens})
        assert {value.shape[-1] for value in padded.values()} == {expected}


# ---- the pooling of a plain folder


@pytest.mark.parametrize(
    ("name", "pooling"), [("bert", "cls"), ("t5", "cls"), ("qwen3", "lasttoken"), ("clip_text_model", "lasttoken")]
)
def test_training_and_evaluation_assume_the_same_pooling(name, pooling, tmp_path):
    write_tiny_model(name, str(tmp_path))
    training, evaluation = build_text_encoder(str(tmp_path)), open_encoder(str(tmp_path))
    assert pooling_of(training) == pooling_of(evaluation) == pooling
    assert pooling_source(training, None) == f"{pooling} (assumed)"
    assert (training.encode(["a dog runs"]) == evaluation.encode(["a dog runs"])).all()
    with pytest.raises(InputError, match="does not specify its pooling"):
        open_encoder(str(tmp_path), strict=True)


# ---- saved files: the spelling that sentence-transformers 5.1 and transformers 4.57 read


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", ("cls", "mean"), ("mean", "cls")])
def test_saved_files_open_in_older_and_in_this_version(mode, bert_folder, tmp_path, caplog):
    """sentence-transformers 5.1.2 with transformers 4.57.6, not installed here, opened such files."""
    width = 64 if isinstance(mode, tuple) else 32
    parts = [Transformer(bert_folder), Pooling(32, mode), Dense(width, 16), Normalize()]
    encoder = SentenceTransformer(modules=parts, device="cpu")
    model = TextContrastiveModel(encoder)
    model.save_encoder(str(tmp_path), model.state_dict())
    content = {name: json.loads((tmp_path / name).read_text()) for name in SMALL_FILES}
    assert [module["type"] for module in content["modules.json"]] == [
        f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Dense", "Normalize")
    ]
    assert content["sentence_bert_config.json"] == {"max_seq_length": 40}
    chosen = {mode} if isinstance(mode, str) else set(mode)
    flags = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean", "lasttoken": "lasttoken"}
    flags |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean_tokens": "weightedmean"}
    expected = {f"pooling_mode_{key}": value in chosen for key, value in flags.items()}
    expected |= {"word_embedding_dimension": 32, "include_prompt": True}
    if mode == ("mean", "cls"):  # an order that the flags do not contain
        expected = {"embedding_dimension": 32, "pooling_mode": ["mean", "cls"], "include_prompt": True}
    assert content["1_Pooling/config.json"] == expected
    assert content["2_Dense/config.json"].keys() == {"in_features", "out_features", "bias", "activation_function"}
    assert "sentence_transformers" not in content["config_sentence_transformers.json"]["__version__"]
    names = content["tokenizer_config.json"]["model_input_names"]
    assert names == list(AutoTokenizer.from_pretrained(bert_folder).model_input_names)
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = SentenceTransformer(str(tmp_path), device="cpu")
    assert not caplog.records  # no missing pooler
    assert (again.encode(sentences(5)) == encoder.encode(sentences(5))).all()


def test_the_pooler_is_saved_as_it_came(bert_folder, tmp_path):
    model = TextContrastiveModel(build_text_encoder(bert_folder))
    model.save_encoder(str(tmp_path), model.state_dict())
    before, after = AutoModel.from_pretrained(bert_folder).pooler, AutoModel.from_pretrained(tmp_path).pooler
    assert torch.equal(before.dense.weight, after.dense.weight) and torch.equal(before.dense.bias, after.dense.bias)


@pytest.mark.slow
def test_rotary_bases_and_added_tokens_in_the_older_spelling(tmp_path):
    """transformers 4 would use its default base, 10,000, without a warning."""
    bases = {
        "qwen3": ({"rope_theta": 77.0, "rope_type": "default"}, {"rope_theta": 77.0}),
        "llama": (
            {"rope_theta": 77.0, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 77.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        "modernbert": (TWO_BASES, {"global_rope_theta": 77.0, "local_rope_theta": 33.0}),
        "gemma3_text": (TWO_BASES, {"rope_theta": 77.0, "rope_local_base_freq": 33.0}),
    }
    for name, (parameters, expected) in bases.items():
        write_tiny_model(name, str(tmp_path / name))
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": parameters}))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        tokenizer.add_special_tokens({"additional_special_tokens": ["[UNK]"]})
        tokenizer.save_pretrained(tmp_path / name)
        model = TextContrastiveModel(build_text_encoder(str(tmp_path / name), pooling="mean"))
        saved = tmp_path / f"{name}-saved"
        model.save_encoder(str(saved), model.state_dict())
        config = json.loads((saved / "config.json").read_text())
        assert {key: config[key] for key in expected} == expected
        assert not isinstance(
            json.loads((saved / "tokenizer_config.json").read_text()).get("extra_special_tokens"), list
        )
        again = SentenceTransformer(str(saved), device="cpu")
        assert (again.encode(sentences(3)) == model.encoder.encode(sentences(3))).all()
