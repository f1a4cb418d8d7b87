"""Write the model card of a run, README.md, from the run record and model_card_template.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from fmicl_text.evaluation.report import before_after_table, markdown_table
from fmicl_text.files import write_atomic

RESULTS_FOLDER = ".eval_results"
CARD = "README.md"
CURVE = "training_curve.png"
TEMPLATE = Path(__file__).parent / "model_card_template.md"
CITATION = """@article{lu2023fmicl,
  title = {f-MICL: Understanding and Generalizing InfoNCE-based Contrastive Learning},
  author = {Lu, Yiwei and Zhang, Guojun and Sun, Sun and Guo, Hongyu and Yu, Yaoliang},
  journal = {Transactions on Machine Learning Research},
  year = {2023},
  url = {https://arxiv.org/abs/2402.10150}
}"""
MARK = "by [fmicl_text](https://arxiv.org/abs/2402.10150)"  # in every card that this module writes

TEXT_USE = """from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer("{name}")
embeddings = encoder.encode(["A man is eating food.", "A man eats a meal.", "The sky is blue."])
print(encoder.similarity(embeddings, embeddings))"""
TEXT_SEARCH = """from sentence_transformers.util import semantic_search

texts = ["A man is eating food.", "A girl plays the violin.", "The sky is blue."]
hits = semantic_search(encoder.encode_query(["Somebody has lunch."]), encoder.encode_document(texts), top_k=2)"""
STOCK_IMAGE_USE = """import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{name}"{options}).eval()
{pixels}
with torch.no_grad():
    features = model(pixel_values=pixels).{feature}  # [1, D]"""
SMALL_STEM_USE = """import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from fmicl_text.vision.encoder import build_image_encoder  # transformers' own classes do not support the small stem

model = build_image_encoder("{name}").eval()
{pixels}
with torch.no_grad():
    features = model(pixels)  # [1, D]"""
PIXELS = """processor = AutoImageProcessor.from_pretrained("{name}")
image = ImageOps.exif_transpose(Image.open("image.png")){mode}
pixels = processor(image, return_tensors="pt").pixel_values"""
PIXELS_WITHOUT_PROCESSOR = (
    "pixels = torch.zeros(1, {channels}, {size}, {size})  # instead: images, processed as in training"
)


def write_card(run: Mapping[str, Any], folder: Path, name: str | None = None) -> None:
    """Write README.md into the folder of a run, unless there is one that this module did not write. A score on a
    dataset of the Hub is also written to `.eval_results/*.yaml`.

    Args:
        run: Content of results.json, see `run_record`.
        folder: Folder of the encoder.
        name: Name under which users load the encoder; by default the folder's name.
    """
    if (score := hub_score(run)) is not None:
        results = folder / RESULTS_FOLDER
        results.mkdir(exist_ok=True)
        entries = yaml.safe_dump(eval_result_entries_to_yaml([score]), sort_keys=False)
        write_atomic(results / f"{score.task_id}.yaml", entries)
    path = folder / CARD
    if path.exists() and not wrote_card(path):
        return
    write_atomic(path, model_card(run, name or folder.name, (folder / CURVE).is_file()))


def wrote_card(path: Path) -> bool:
    """Whether this module wrote a model card."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def model_card(run: Mapping[str, Any], name: str, curve: bool = True) -> str:
    """Text of the model card.

    Args:
        run: Content of results.json, see `run_record`.
        name: Name under which users load the encoder: a folder or a Hub name.
        curve: Whether the folder contains the training curve.
    """
    text = run["encoder"]["modality"] == "text"
    card = ModelCard.from_template(
        card_metadata(run, name),
        template_path=str(TEMPLATE),
        title=name,
        kind="A sentence encoder" if text else "An image encoder",
        objective_sentence=objective_sentence(run),
        use=use_of(run, name),
        search=TEXT_SEARCH if text else None,
        formula=run["formula"],
        hyperparameters=hyperparameters_sentence(run),
        training=training_facts(run),
        curve=CURVE if curve else None,
        results_sentence=results_sentence(run),
        results=results_table(run),
        verdict=verdict_sentence(run),
        limits=limits_of(text),
        citation=CITATION,
    )
    return f"{str(card.content).strip()}\n"


def card_metadata(run: Mapping[str, Any], name: str) -> ModelCardData:
    """Metadata of the card for the Hub, with the score if its dataset is on the Hub."""
    encoder, settings, scored_on = run["encoder"], run["settings"], run["scored_on"]
    text = encoder["modality"] == "text"
    dataset = settings.get("dataset_name")
    pipeline = encoder.get("pipeline")  # of transformers, for images
    results = None
    if hub_score(run) is not None:
        results = [
            EvalResult(
                task_type="semantic-similarity",
                dataset_type=scored_on["dataset_id"],
                dataset_name=scored_on["name"],
                dataset_split=scored_on["split"],
                dataset_revision=scored_on["revision"],
                metric_type="cosine_spearman",
                metric_name="Spearman x 100 of cosine and score",
                metric_value=run["after"]["eval_sts_spearman"],
            )
        ]
    return ModelCardData(
        model_name=name,
        library_name="sentence-transformers" if text else "transformers" if pipeline else None,
        pipeline_tag="sentence-similarity" if text else "image-feature-extraction" if pipeline else None,
        tags=["f-micl", "contrastive-learning", run["objective"], *(["feature-extraction"] if text else [])],
        base_model=encoder["base_model"],
        datasets=[dataset] if dataset else None,
        eval_results=results,
    )


def hub_score(run: Mapping[str, Any]) -> EvalResultEntry | None:
    """The score on a dataset of the Hub, under MTEB's name; None for other data."""
    where = run["scored_on"]
    if not where["dataset_id"] or "eval_sts_spearman" not in run["after"]:
        return None
    return EvalResultEntry(
        dataset_id=where["dataset_id"],
        task_id=f"{where['task']}_default_{where['split']}",
        value=round(run["after"]["eval_sts_spearman"], 5),
        dataset_revision=where["revision"],
        notes="Spearman x 100 of cosine and score, by fmicl_text"
        + ("; the checkpoint was selected on this split" if run["best_step"] is not None else ""),
    )


def objective_sentence(run: Mapping[str, Any]) -> str:
    """The objective, and the method if positives come from a momentum encoder: "f-MICL (kl) in mocov3"."""
    objective = run["objective"]
    named = f"f-MICL ({objective.removeprefix('fmicl-')})" if objective.startswith("fmicl-") else f"`{objective}`"
    method = run["settings"].get("method", "simclr")
    return named if method == "simclr" else f"{named} in {method}"


def hyperparameters_sentence(run: Mapping[str, Any]) -> str:
    """Values of the hyperparameters, except `global_batch` and a divergence that the first line names completely."""
    named = str(run["objective"]).removeprefix("fmicl-")
    hidden = {"global_batch": run["hyperparameters"].get("global_batch"), "divergence": named}
    values = {k: v for k, v in run["hyperparameters"].items() if k not in hidden or hidden[k] != v}
    return f"Hyperparameters: {', '.join(f'{name} {value}' for name, value in values.items())}." if values else ""


def training_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the card's table. Files are given by name, without their folder."""
    encoder, settings, data = run["encoder"], run["settings"], run["data"]
    files = settings.get("train_file") or []
    files = [files] if isinstance(files, str) else files
    started_from = settings.get("model_name_or_path")
    if started_from is None and settings.get("architecture"):
        started_from = f"random weights, {settings['architecture']}"
    start = encoder["base_model"] or (started_from and Path(started_from).name)
    facts = {
        "started from": start and at_revision(start, encoder.get("base_revision")),
        "data": at_revision(", ".join(Path(file).name for file in files) or data["source"], data.get("revision")),
        "rows": data.get("rows"),
        "positives": "two random views of an image" if encoder["modality"] == "image" else positives(data),
        "prompts, in training": data.get("prompts") and str(data["prompts"]).replace("|", r"\|"),
        "prompt of `encode`": quoted(encoder.get("prompt")),
        "pooling": encoder["pooling"],
        "tokens per text, in training": settings.get("max_seq_length"),
        "maximum tokens per text" if encoder["modality"] == "text" else "image size": encoder["size"],
        "dimensions kept": encoder.get("truncate_dim"),
        "similarity": encoder.get("similarity_fn_name"),
        "training-only head": head_of(settings),
        "LoRA rank (merged)": settings.get("lora_rank"),
        "batch": settings["per_device_train_batch_size"] * run["processes"],
        "steps": run["steps"],
        "best step (saved)": "0, the encoder before training" if run["best_step"] == 0 else run["best_step"],
        "learning rate": settings["learning_rate"],
        "precision": precision_of(run),
        "seed": run["seed"],
        "versions": ", ".join(f"{package} {number}" for package, number in run["versions"].items()),
    }
    return {name: value for name, value in facts.items() if value is not None}


def at_revision(name: Any, revision: str | None) -> str:
    """The name of a model or of data, with its revision on the Hub if it has one."""
    return f"{name}, revision {revision}" if revision else str(name)


def quoted(prompt: str | None) -> str | None:
    """A prompt for a cell of a table, with its spaces; None without one."""
    return json.dumps(prompt, ensure_ascii=False).replace("|", r"\|") if prompt else None


def precision_of(run: Mapping[str, Any]) -> str | None:
    """The precision of training: `bf16 (mixed)`, `float32`, `float32 with tf32 products`."""
    mixed, products = run.get("precision"), run.get("float32_products", "float32")
    if mixed not in (None, "no"):
        return f"{mixed} (mixed)"
    return mixed and ("float32" if products == "float32" else f"float32 with {products} products")


def head_of(settings: Mapping[str, Any]) -> str | None:
    """The training-only head."""
    return f"projection, width {settings['head_dim']}" if "head_dim" in settings else settings.get("head")


def positives(data: Mapping[str, Any]) -> str:
    """The positive pairs of texts."""
    columns = str(data.get("columns", "text"))
    if len(columns.split()) > 1:
        return f"columns {columns}"
    views = str(data.get("views", "dropout")).partition(" (")[0]  # without the reason
    return "two dropout views of a text" if views == "dropout" else f"two random views of a text: {views}"


def results_sentence(run: Mapping[str, Any]) -> str:
    """The evaluation data and the metric."""
    where = run["scored_on"]
    revision = f", revision {where['revision']}" if where["revision"] else ""
    if run["encoder"]["modality"] == "text":
        what = "Spearman x 100 of cosine and score, over all pairs"
        metric = str(run["settings"].get("metric_for_best_model") or "sts_spearman").removeprefix("eval_")
        if ndcg := [name.removeprefix("eval_") for name in run["after"] if name.endswith("ndcg@10")]:
            what = "search, from 0 to 1, of `encode_document` by `encode_query`"
            metric = ndcg[0] if metric == "loss" else metric  # the evaluator's primary metric
        elif "eval_held_out_nats" in run["after"]:
            searched = "a quarter of its words" if len(str(run["data"].get("columns")).split()) == 1 else "its pair"
            what = f"mutual information of each text and {searched}, in nats"
            metric = "held_out_nats" if metric == "loss" else metric
        elif not run["after"]:
            return ""
        selected = f" The checkpoint was selected by {metric}." if run["best_step"] is not None else ""
        return f"{where['name']}{revision}: {what}.{selected}"
    probes = run["data"].get("probes")
    if not probes:
        scores = [name.removeprefix("eval_") for name in run["after"] if name.startswith("eval_")]
        what = ": accuracy in percent of k-NN classification (k = 200)" if "knn_accuracy" in scores else ""
        return f"{where['name']}{what}."
    what = "accuracy in percent of probes of the frozen features"
    if "view retrieval" in probes[-1]:
        what = (
            "two random views of each image; view retrieval is the percentage whose second view is the nearest to "
            "the first"
        )
    return f"{where['name']}: {what}, compared with raw pixels and with the encoder before training."


def results_table(run: Mapping[str, Any]) -> str:
    """Scores before and after training (probe results for images); during training, the scores so far."""
    if probes := run["data"].get("probes"):
        return markdown_table(probes)
    if run["before"]:
        return before_after_table(run["before"], run["after"])
    scores = {name.removeprefix("eval_"): v for name, v in run["after"].items() if name.startswith("eval_")}
    return (
        markdown_table([{"metric": name, "value": value} for name, value in scores.items()])
        if scores
        else "Not evaluated."
    )


def verdict_sentence(run: Mapping[str, Any]) -> str | None:
    """Whether training made the encoder better; None if it was not measured, as in mid-training."""
    if not (verdict := run.get("verdict")):
        return None
    text, _, _ = verdict["text"].partition(". Try ")
    noise = " The number after +- is the standard error of the difference." if " +- " in text else ""
    return f"{text[0].upper()}{text[1:]}.{noise}"


def limits_of(text: bool) -> str:
    """Limitations of the encoder."""
    if text:
        return (
            "Trained on texts of up to the length given above and evaluated on the data given above. It covers the "
            "languages of its base model and training text and inherits their biases. `pooler_output` of "
            "`AutoModel` is not trained; use the pooling given above."
        )
    return (
        "Trained without labels on the images given above; evaluate it before use on other images or sizes. It "
        "inherits the biases of its training images. In training, images of more than 8 bits per channel were scaled "
        "to 8 bits; the image processor clips them."
    )


def use_of(run: Mapping[str, Any], name: str) -> str:
    """Code that loads the encoder and, for images, ends with the features of one."""
    encoder = run["encoder"]
    if encoder["modality"] == "text":
        return TEXT_USE.format(name=name)
    pixels = PIXELS if encoder["processor"] else PIXELS_WITHOUT_PROCESSOR
    mode = '.convert("L")' if encoder["channels"] == 1 else ""
    return (SMALL_STEM_USE if encoder["small_image_stem"] else STOCK_IMAGE_USE).format(
        name=name,
        options=", trust_remote_code=True" if encoder["custom_code"] else "",
        pixels=pixels.format(name=name, mode=mode, **encoder),
        feature=encoder["feature"],
    )
