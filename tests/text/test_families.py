"""Text encoders of every family: training, saving and loading, adapters, activation checkpointing."""

import sys

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from fmicl_text import InputError, build_text_encoder
from fmicl_text.cli.text import parse_args
from tests.soak.families import outcome, write_tiny_model
from tests.support import SPECIAL, WORDS, one_fast, peft_or_skip, sentences, tiny_bert
from tests.support import make_family_trainer as make_trainer

SIZE = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 48, "pad_token_id": 0}  # fmt: skip
DECODER = {"num_key_value_heads": 2, "attention_dropout": 0.1}
FAMILIES = {
    "bert": lambda: BertConfig(**SIZE),
    "roberta": lambda: RobertaConfig(**SIZE),
    "xlm-roberta": lambda: XLMRobertaConfig(**SIZE),
    "modernbert": lambda: ModernBertConfig(**SIZE, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=SIZE["vocab_size"], dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=48
    ),
    "mpnet": lambda: MPNetConfig(**SIZE),
    "albert": lambda: AlbertConfig(**SIZE, embedding_size=16),
    "electra": lambda: ElectraConfig(**SIZE, embedding_size=16),
    "qwen2": lambda: Qwen2Config(**SIZE, **DECODER),
    "qwen3": lambda: Qwen3Config(**SIZE, **DECODER, head_dim=16),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A folder with a tiny random model of a family, and its pooling."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_bert(folder)  # its tokenizer
    torch.manual_seed(0)
    AutoModel.from_config(FAMILIES[request.param]()).save_pretrained(folder)
    return str(folder), "lasttoken" if request.param.startswith("qwen") else "mean"


# Of the sweep in tests/soak: views, frozen weights, tokens of a long text. The tokenizer states no maximum length, the
# models have 48 positions: in RoBERTa and related models, 47 for tokens.
SWEEP = {
    "roberta": ("dropout", 2, 47),
    "longformer": ("dropout", 14, 47),  # no gradient in the pooler and in global attention
    "squeezebert": ("dropout", 2, 48),  # its forward pass needs the pooler
    "gpt2": ("dropout", 0, 48),
    "opt": ("dropout", 0, 48),  # two rows more than positions
    "canine": ("dropout", 2, 48),  # characters
    "t5": ("dropout", 0, 835),  # no limit
    "mpt": ("delete", 0, 48),  # no position embeddings, but biases for max_seq_len positions
    "mamba": ("delete", 0, 835),  # no dropout
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "canine")) for name in SWEEP])
def test_families_of_the_sweep(name, tmp_path):
    measured = outcome(name, str(tmp_path))
    views, frozen, tokens = SWEEP[name]
    assert measured == {"views": views, "frozen": frozen, "tokens": tokens, "moved": 1.0, "difference": 0.0}


def reload_difference(trainer, folder):
    """The largest difference between embeddings of the trained encoder and of the saved one."""
    trainer.save_model(str(folder))
    texts = sentences(5, seed=9)
    again = SentenceTransformer(str(folder), device="cpu").encode(texts)
    return abs(again - trainer.model.encoder.encode(texts)).max()


def test_a_family_trains_and_reloads(family, tmp_path):
    trainer = make_trainer(*family, tmp_path)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    fixed = [name for name, weight in trainer.model.named_parameters() if torch.equal(weight, before[name])]
    assert fixed == [name for name, weight in trainer.model.named_parameters() if not weight.requires_grad]
    assert all(".pooler." in name for name in fixed)  # no embedding depends on it
    assert trainer.state.log_history[0]["alignment"] > 1e-3  # dropout reaches both views
    assert reload_difference(trainer, tmp_path / "final") == 0


@pytest.mark.parametrize("family", one_fast(FAMILIES), indirect=True)
def test_activation_checkpointing_changes_nothing(family, tmp_path):
    weights = []
    if family[0].rstrip("0123456789").endswith(("mpnet", "albert")):
        with pytest.raises(InputError, match=r"activation_checkpointing=True is not supported: .* does not support"):
            make_trainer(*family, tmp_path, activation_checkpointing=True).train()
        return
    for checkpointing in (False, True):
        trainer = make_trainer(*family, tmp_path, activation_checkpointing=checkpointing)
        trainer.train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules()) == checkpointing
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("family", one_fast(FAMILIES), indirect=True)
def test_lora_trains_adapters_and_saves_merged_weights(family, tmp_path):
    peft_or_skip()
    trainer = make_trainer(*family, tmp_path, lora_rank=4)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all(".lora_" in name or name.startswith("head.") for name in moved)
    assert reload_difference(trainer, tmp_path / "final") < 1e-6
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert "model.safetensors" in names and not any("adapter" in name for name in names)
    plain = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    assert not any("lora" in name or "base_layer" in name for name in plain.state_dict())


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_quantized_weights_under_adapters(tmp_path, load_in):
    """Trained on a CPU. The saved weights are in float32 and give the same embeddings, up to rounded activations."""
    peft_or_skip()
    pytest.importorskip("bitsandbytes")
    folder = tiny_bert(tmp_path / "bert")
    wide = BertConfig.from_pretrained(folder, hidden_size=64, intermediate_size=128)  # the block size of bitsandbytes
    AutoModel.from_config(wide).save_pretrained(folder)
    trainer = make_trainer(folder, "mean", tmp_path, lora_rank=4, load_in=load_in)
    trainer.model.encoder.encode(sentences(3))  # as in evaluation during training
    trainer.model.train()
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert ("Linear4bit" if load_in == "4bit" else "Linear8bitLt") in kinds
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any(".lora_" in name for name in moved) and not any("base_layer" in name for name in moved)
    assert reload_difference(trainer, tmp_path / "final") < {"4bit": 1e-5, "8bit": 0.1}[load_in]
    trainer.train()  # continues after evaluation
    config = (tmp_path / "final" / "config.json").read_text()
    assert "quantization" not in config and trainer.model.backbone.config.quantization_config is not None


@pytest.mark.slow
def test_lora_resumes_bit_exactly(bert_folder, tmp_path):
    peft_or_skip()
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora_rank": 4}
    whole = make_trainer(bert_folder, "mean", tmp_path, **settings)
    whole.train()
    resumed = make_trainer(bert_folder, "mean", tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    without = make_trainer(bert_folder, "mean", tmp_path, max_steps=4)
    with pytest.raises(InputError, match=r"checkpoint-2 .*adapters_over [0-9a-f]* -> None"):
        without.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    without.args.resume_changed = True
    with pytest.warns(UserWarning, match="not exact"), pytest.raises(InputError, match="checkpoint-2 is incompatible"):
        without.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other_rank = make_trainer(bert_folder, "mean", tmp_path, **settings | {"lora_rank": 2})
    with pytest.raises(InputError, match=r"checkpoint-2 .*lora_A.* is \[4, 32\]"):
        other_rank.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_invalid_lora_arguments(bert_folder, monkeypatch):
    with pytest.raises(InputError, match="lora_rank must be at least 1, got 0"):
        build_text_encoder(bert_folder, lora_rank=0)
    with pytest.raises(InputError, match="load_in=4bit requires lora_rank: quantized weights cannot be trained"):
        build_text_encoder(bert_folder, load_in="4bit")
    with pytest.raises(InputError, match="load_in_4bit and load_in_8bit"):
        parse_args(["--load_in_4bit", "True", "--load_in_8bit", "True"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="lora_rank=4 requires peft: pip install peft"):
        build_text_encoder(bert_folder, lora_rank=4)
    monkeypatch.setattr("fmicl_text.text.lora.find_spec", lambda name: None)
    with pytest.raises(InputError, match="load_in=8bit requires bitsandbytes: pip install bitsandbytes"):
        build_text_encoder(bert_folder, lora_rank=4, load_in="8bit")


# ---- folders saved with adapters


def save_with_adapter(base, folder, **settings):
    """A SentenceTransformer folder with an untrained but not neutral adapter, and its embeddings."""
    from peft import LoraConfig

    encoder = SentenceTransformer(base, device="cpu")
    torch.manual_seed(3)
    encoder.add_adapter(
        LoraConfig(task_type="FEATURE_EXTRACTION", **({"r": 2, "target_modules": ["query", "value"]} | settings))
    )
    for name, weight in encoder.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    encoder.save(str(folder), create_model_card=False)
    return encoder.encode(sentences(5))


@pytest.mark.parametrize("rank", [None, 4])
def test_a_folder_with_an_adapter_trains_it_or_a_new_one(rank, bert_folder, tmp_path):
    """Without lora_rank, the saved adapter is trained. With it, it is merged, and a new one is trained."""
    peft_or_skip()
    expected = save_with_adapter(bert_folder, tmp_path / "m")
    trainer = make_trainer(str(tmp_path / "m"), None, tmp_path / "out", lora_rank=rank)
    assert abs(trainer.model.encoder.encode(sentences(5)) - expected).max() < 1e-5
    names = {name for name, weight in trainer.model.encoder.named_parameters() if weight.requires_grad}
    assert names and all(".lora_" in name for name in names)
    assert {min(weight.shape) for name, weight in trainer.model.named_parameters() if ".lora_" in name} == {rank or 2}
    before = {name: weight.detach().clone() for name, weight in trainer.model.encoder.named_parameters()}
    trainer.train()
    after = dict(trainer.model.encoder.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    assert abs(trainer.model.encoder.encode(sentences(5)) - expected).max() > 1e-3
    assert reload_difference(trainer, tmp_path / "final") < 1e-5
    assert not list((tmp_path / "final").glob("adapter*"))


def test_training_of_a_saved_adapter_resumes(bert_folder, tmp_path):
    peft_or_skip()
    save_with_adapter(bert_folder, tmp_path / "m")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = (make_trainer(str(tmp_path / "m"), None, tmp_path / "out", **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("settings", "found"),
    [({"use_dora": True}, "lora_magnitude"), ({"target_modules": ["word_embeddings", "query"]}, "lora_embedding_A")],
)
def test_other_adapters_are_rejected(settings, found, bert_folder, tmp_path):
    peft_or_skip()
    save_with_adapter(bert_folder, tmp_path / "m", **settings)
    for rank in (None, 4):
        with pytest.raises(InputError, match=rf"m has adapters \(LORA\) that are not plain LoRA .*{found}") as error:
            build_text_encoder(str(tmp_path / "m"), lora_rank=rank)
        assert "\n" not in str(error.value)


def test_lora_on_transposed_layers(tmp_path):
    """GPT-2's linear layers are transposed, and so are the changes that are merged into them."""
    peft_or_skip()
    write_tiny_model("gpt2", str(tmp_path / "m"))
    trainer = make_trainer(str(tmp_path / "m"), "mean", tmp_path, lora_rank=4)
    trainer.train()
    assert reload_difference(trainer, tmp_path / "final") < 1e-5
