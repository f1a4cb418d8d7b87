"""Every text family that transformers builds: a tiny random model of each is trained, saved, reopened and evaluated.

    python tests/soak/families.py [NAME ...]

Prints a table in Markdown. The exit status is 1 if a family neither works nor is rejected with one `InputError`: a
traceback, another embedding after saving, or a run of more than two minutes.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers import CONFIG_MAPPING, AutoModel, CanineTokenizer
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging as transformers_logging

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, InputError, TextContrastiveModel, build_text_encoder
from tests.support import SPECIAL, WORDS, sentences, tiny_tokenizer

TIMEOUT = 120
MOST_PARAMETERS = 10**7
LIMIT = 48  # positions of the tiny models
VOCABULARY = len(SPECIAL) + len(WORDS)
OTHER_INPUTS = {"pixel_values", "input_features", "input_values", "visual_embeds", "bbox"}

# Small values of the entries of a config, by the names that families use.
WIDTH, INNER, LAYERS, HEADS = 32, 64, 2, 2
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "emb_dim", "embedding_size", "d_embed"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "expert_hidden_size", "lru_width"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner", "d_inner", "dim_ff"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "expert_ffn_hidden_size"), INNER),
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "num_kv_heads", "num_encoder_attention_heads"),
                    HEADS),
    **dict.fromkeys(("num_decoder_attention_heads",), HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "kv_channels", "rotary_dim"), WIDTH // HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_length"), LIMIT),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "vocab_size": VOCABULARY},
    **{"num_buckets": 4, "entity_emb_size": 16, "entity_vocab_size": 8, "attention_window": 8},
    **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
    **dict.fromkeys(("pad_token_id", "padding_idx"), 0),
    **dict.fromkeys(("unk_token_id", "unk_index"), 1),
    **dict.fromkeys(("cls_token_id", "bos_token_id", "bos_index"), 2),
    **dict.fromkeys(("sep_token_id", "eos_token_id", "eos_index", "decoder_start_token_id"), 3),
}  # fmt: skip

# Families whose entries depend on each other.
SPECIAL_CASES: dict[str, dict[str, Any]] = {
    "canine": {"num_hash_buckets": 64, "local_transformer_stride": 8},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "codegen": {"n_head": 4, "rotary_dim": 8},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 1, "pad_token_id": 0},
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "ministral": {"head_dim": 16},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1, "d_head": 16},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "reformer": {"axial_pos_shape": [6, 8], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"],
                 "feed_forward_size": 64},
}  # fmt: skip

# Entries of `SMALL` that a family computes from others.
NOT_SET = {
    "codegen": ("num_attention_heads",),
    "falcon": ("head_dim",),
    "funnel": ("num_hidden_layers", "n_layer", "num_layers"),
    "prophetnet": ("num_hidden_layers",),
    "xlnet": ("max_position_embeddings",),
    "xlstm": ("v_head_dim",),
}


def text_families() -> list[str]:
    """The families whose base model maps token ids to hidden states and has no other input."""
    found = []
    for name in sorted(CONFIG_MAPPING.keys()):
        try:
            model = MODEL_MAPPING[CONFIG_MAPPING[name]]
            model = model[0] if isinstance(model, list | tuple) else model
            main_input = model.main_input_name
        except (KeyError, ValueError, ImportError):  # no base model, or one that needs another package
            continue
        inputs = inspect.signature(model.forward).parameters.keys()
        if main_input == "input_ids" and "input_ids" in inputs and not inputs & OTHER_INPUTS:
            found.append(name)
    return found


def tiny_config(name: str) -> Any:
    """A config of a family with small values wherever `SMALL` or `SPECIAL_CASES` has one."""
    default = CONFIG_MAPPING[name]()
    small = {key: value for key, value in SMALL.items() if isinstance(getattr(default, key, None), int)}
    fixed = NOT_SET.get(name, ())
    return CONFIG_MAPPING[name](
        **({key: value for key, value in small.items() if key not in fixed} | SPECIAL_CASES.get(name, {}))
    )


def write_tiny_model(name: str, folder: str) -> None:
    """Write a tiny random model of a family to a folder, with a tokenizer that does not state a maximum length."""
    torch.manual_seed(0)
    config = tiny_config(name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters, so not tiny: it has configs inside its config")
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = CanineTokenizer(model_max_length=LIMIT) if name == "canine" else tiny_tokenizer(model_max_length=None)
    tokenizer.save_pretrained(folder)


def train(folder: str, output_dir: str, dropout: float | None) -> FMICLTrainer:
    """Two steps on texts, with views that dropout makes, or with deleted words if it is None."""
    args = FMICLTrainingArguments(
        output_dir, max_steps=2, per_device_train_batch_size=8, eval_strategy="no", save_strategy="no", gamma=2.0,
        alpha=8.0, load_best_model_at_end=False, use_cpu=True, disable_tqdm=True, learning_rate=1e-3, logging_steps=1,
        report_to=[],
    )  # fmt: skip
    rows = Dataset.from_dict({"text": sentences(16)})
    encoder = build_text_encoder(folder, dropout=dropout)
    trainer = FMICLTrainer(TextContrastiveModel(encoder), args, train_dataset=rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "both views of every text are identical")  # MPT's dropout has no effect
        trainer.train()
    return trainer


def outcome(name: str, folder: str) -> dict[str, Any]:
    """What a family does: built, views, moved (the share of trained parameters that moved), difference (the largest
    between embeddings before and after saving), long (whether a long text is encoded); or rejected, with the reason."""
    try:
        write_tiny_model(name, f"{folder}/model")
    except Exception as error:
        return {"unbuilt": f"{type(error).__name__}: {error}"}
    result: dict[str, Any] = {}
    try:
        try:
            trainer = train(f"{folder}/model", f"{folder}/run", 0.1)
        except (InputError, UserWarning) as error:
            if "dropout" not in str(error):
                raise
            trainer = train(f"{folder}/model", f"{folder}/run", None)
        result["views"] = " ".join(trainer.resume_signature()["views"])
        encoder = trainer.model.encoder
        original = build_text_encoder(f"{folder}/model").state_dict()
        names = [key for key, weight in encoder.named_parameters() if weight.requires_grad]
        moved = [key for key in names if not torch.equal(original[key], encoder.state_dict()[key])]
        result["moved"], result["frozen"] = len(moved) / len(names), len(list(encoder.parameters())) - len(names)
        trainer.save_model(f"{folder}/saved")
        again = SentenceTransformer(f"{folder}/saved", device="cpu")
        texts = [*sentences(5, seed=9), " ".join(sentences(100))]
        result["difference"] = float(abs(again.encode(texts) - encoder.encode(texts)).max())
        result["tokens"] = len(again.tokenizer(texts[-1:], truncation=True)["input_ids"][0])
    except InputError as error:
        result["rejected"] = str(error)
    return result


def run(name: str, answers: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # the trainer's log
        try:
            answer = outcome(name, folder)
        except Exception:
            answer = {"traceback": traceback.format_exc()}
        answers.put(json.dumps(answer).replace(folder, "FOLDER"))


def in_process(name: str) -> dict[str, Any]:
    """The outcome of a family, in a process of its own."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=run, args=(name, answers), daemon=True)
    process.start()
    try:
        answer: dict[str, Any] = json.loads(answers.get(timeout=TIMEOUT))
    except Exception as error:
        answer = {"traceback": f"no answer: {type(error).__name__}"}
    process.join(5)
    process.kill()
    return answer


def summary(answer: dict[str, Any]) -> str:
    """One cell of the table."""
    if "traceback" in answer:
        return "FAILED: " + answer["traceback"].strip().splitlines()[-1]
    if reason := answer.get("rejected") or answer.get("unbuilt"):
        return ("rejected: " if "rejected" in answer else "not built: ") + " ".join(reason.split())
    frozen = f", {answer['frozen']} weights frozen" if answer["frozen"] else ""
    return (
        f"{answer['views']}, {answer['moved']:.0%} of the weights moved{frozen}, reopened to "
        f"{answer['difference']:.0e}, long text cut to {answer['tokens']} tokens"
    )


def kind(answer: dict[str, Any]) -> str:
    failed = "traceback" in answer or answer.get("difference", 0) > 1e-5
    return "failed" if failed else next((key for key in ("rejected", "unbuilt") if key in answer), "works")


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    kinds: Counter[str] = Counter()
    print("| family | result |\n|---|---|")
    for name in names or text_families():
        answer = in_process(name)
        kinds[kind(answer)] += 1
        print(f"| {name} | {summary(answer)} |", flush=True)
        if names and "traceback" in answer:
            print(answer["traceback"])
    print("\n" + ", ".join(f"{count} {key}" for key, count in kinds.items()))
    return 1 if kinds["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
