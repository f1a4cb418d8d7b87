"""Text encoders of every family: a training step, a folder that opens alike; adapters and checkpointed activations."""

import sys

import pytest
import torch
from datasets import Dataset
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

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, InputError, TextContrastiveModel, build_text_encoder
from fmicl_text.cli.text import parse_args
from fmicl_text.text.collator import TextViewCollator
from tests.conftest import SPECIAL, WORDS, sentences, tiny_bert

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
    """A folder of a tiny random model of a family, and how to pool it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_bert(folder)  # its tokenizer
    torch.manual_seed(0)
    AutoModel.from_config(FAMILIES[request.param]()).save_pretrained(folder)
    return str(folder), "lasttoken" if request.param.startswith("qwen") else "mean"


def make_trainer(folder, pooling, output_dir, lora_rank=None, load_in=None, **settings):
    defaults = {
        "max_steps": 2, "per_device_train_batch_size": 8, "eval_strategy": "no", "save_strategy": "no", "gamma": 2.0,
        "alpha": 8.0, "load_best_model_at_end": False, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3,
        "logging_steps": 1,
    }  # fmt: skip
    args = FMICLTrainingArguments(str(output_dir), **(defaults | settings))
    torch.manual_seed(0)
    encoder = build_text_encoder(folder, pooling=pooling, dropout=0.1, lora_rank=lora_rank, load_in=load_in)
    data = Dataset.from_dict({"text": sentences(32)})
    return FMICLTrainer(
        TextContrastiveModel(encoder, "simcse"), args, data, TextViewCollator(encoder.tokenizer, ["text"])
    )


def opened_alike(trainer, folder):
    """The saved folder's vectors are the trained encoder's."""
    trainer.save_model(str(folder))
    texts = sentences(5, seed=9)
    again = SentenceTransformer(str(folder), device="cpu").encode(texts)
    return abs(again - trainer.model.encoder.encode(texts)).max()


def test_a_family_trains_and_opens_alike(family, tmp_path):
    trainer = make_trainer(*family, tmp_path)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert not [name for name, weight in trainer.model.named_parameters() if torch.equal(weight, before[name])]
    assert trainer.state.log_history[0]["alignment"] > 1e-3  # dropout reaches both views
    assert opened_alike(trainer, tmp_path / "final") == 0


def test_checkpointed_activations_change_nothing(family, tmp_path):
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


def test_lora_trains_adapters_and_leaves_none(family, tmp_path):
    pytest.importorskip("peft")
    trainer = make_trainer(*family, tmp_path, lora_rank=4)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all(".lora_" in name or name.startswith("head.") for name in moved)
    assert opened_alike(trainer, tmp_path / "final") < 1e-6
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert "model.safetensors" in names and not any("adapter" in name for name in names)
    plain = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    assert not any("lora" in name or "base_layer" in name for name in plain.state_dict())


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_weights_of_few_bits_under_adapters(tmp_path, load_in):
    """Trained on a CPU here; what is saved has all its bits, and computes the same but for rounded activations."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    folder = tiny_bert(tmp_path / "bert")
    wide = BertConfig.from_pretrained(folder, hidden_size=64, intermediate_size=128)  # bitsandbytes packs blocks of 64
    AutoModel.from_config(wide).save_pretrained(folder)
    trainer = make_trainer(folder, "mean", tmp_path, lora_rank=4, load_in=load_in)
    trainer.model.encoder.encode(sentences(3))  # as evaluation during training does
    trainer.model.train()
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert ("Linear4bit" if load_in == "4bit" else "Linear8bitLt") in kinds
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any(".lora_" in name for name in moved) and not any("base_layer" in name for name in moved)
    assert opened_alike(trainer, tmp_path / "final") < {"4bit": 1e-5, "8bit": 0.1}[load_in]
    trainer.train()  # on, after evaluation
    config = (tmp_path / "final" / "config.json").read_text()
    assert "quantization" not in config and trainer.model.backbone.config.quantization_config is not None


def test_lora_resumes_bit_exactly(bert_folder, tmp_path):
    pytest.importorskip("peft")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora_rank": 4}
    whole = make_trainer(bert_folder, "mean", tmp_path, **settings)
    whole.train()
    resumed = make_trainer(bert_folder, "mean", tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    without = make_trainer(bert_folder, "mean", tmp_path, max_steps=4)
    with pytest.raises(InputError, match=r"checkpoint-2 is of another run: adapters_over [0-9a-f]* -> None"):
        without.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    without.args.resume_changed = True
    with pytest.warns(UserWarning, match="not exact"), pytest.raises(InputError, match="checkpoint-2 does not fit"):
        without.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other_rank = make_trainer(bert_folder, "mean", tmp_path, **settings | {"lora_rank": 2})
    with pytest.raises(InputError, match=r"does not fit: .*lora_A.* is \[4, 32\]"):
        other_rank.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_lora_refuses(bert_folder, monkeypatch):
    with pytest.raises(InputError, match="--lora_rank must be at least 1, got 0"):
        build_text_encoder(bert_folder, lora_rank=0)
    with pytest.raises(InputError, match="--load_in_4bit needs --lora_rank: weights of so few bits cannot be trained"):
        build_text_encoder(bert_folder, load_in="4bit")
    with pytest.raises(InputError, match="--load_in_4bit and --load_in_8bit exclude each other"):
        parse_args(["--load_in_4bit", "True", "--load_in_8bit", "True"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="--lora_rank needs peft: pip install peft"):
        build_text_encoder(bert_folder, lora_rank=4)
    monkeypatch.setattr("fmicl_text.text.lora.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--load_in_8bit needs bitsandbytes: pip install bitsandbytes"):
        build_text_encoder(bert_folder, lora_rank=4, load_in="8bit")
