"""Training of the last layers: which weights move, by the recipe and in other architectures."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel, T5Config, T5EncoderModel

from fmicl_text import build_text_encoder
from fmicl_text.errors import InputError
from fmicl_text.text.layers import train_last_layers
from tests.support import sentences, sts_pairs, tiny_bert

RECIPE = Path(__file__).parents[2] / "recipes" / "simcse_fmicl.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 9}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "t5": lambda: T5EncoderModel(T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_heads=2)),
}
LAST = {  # prefixes of the names of what is trained with two layers of three
    "bert": ("encoder.layer.1.", "encoder.layer.2.", "pooler."),
    "modernbert": ("layers.1.", "layers.2.", "final_norm."),
    "t5": ("encoder.block.1.", "encoder.block.2.", "encoder.final_layer_norm."),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_last_layers_and_what_follows_are_trained(name):
    model = MODELS[name]()
    every = trained(model)
    train_last_layers(SimpleNamespace(transformers_model=model), 2)
    assert trained(model) == {weight for weight in every if weight.startswith(LAST[name])}
    assert all(any(weight.startswith(prefix) for weight in every) for prefix in LAST[name])


@pytest.mark.parametrize("number", [0, -1, 3])
def test_numbers_out_of_range(folder, number):
    with pytest.raises(InputError, match=f"trained_layers must be from 1 to 2, the layers of the model; got {number}"):
        build_text_encoder(folder, trained_layers=number)


def test_a_model_without_layers():
    with pytest.raises(InputError, match="from 1 to 0"):
        train_last_layers(SimpleNamespace(transformers_model=torch.nn.Linear(2, 2)), 1)


def test_not_with_adapters(folder):
    with pytest.raises(InputError, match="trained_layers=1 and lora_rank=2 are mutually exclusive"):
        build_text_encoder(folder, lora_rank=2, trained_layers=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_the_recipe_trains_the_last_layer(folder, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("\n".join(sentences(32)), encoding="utf-8")
    rows = sts_pairs()
    pairs = [f"{a}\t{b}\t{c}" for a, b, c in zip(rows["sentence1"], rows["sentence2"], rows["score"], strict=True)]
    (tmp_path / "dev.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *pairs]), encoding="utf-8")
    options = ["--train_file", tmp_path / "text.txt", "--sts_dev_file", tmp_path / "dev.tsv", "--trained_layers", 1]
    options += ["--max_steps", 2, "--per_device_train_batch_size", 8, "--learning_rate", 1e-2, "--eval_strategy", "no"]
    options += ["--pooling", "mean", "--use_cpu", "True", "--output_dir", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["simcse_fmicl.py", "--model_name_or_path", folder, *map(str, options)])
    runpy.run_path(str(RECIPE), run_name="__main__")
    before = build_text_encoder(folder, pooling="mean").state_dict()
    after = SentenceTransformer(str(tmp_path / "run"), device="cpu").state_dict()
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert moved and all(".layer.1." in name for name in moved)
    assert {name.rpartition(".layer.1.")[2] for name in moved} >= {"output.dense.weight", "attention.self.query.weight"}
