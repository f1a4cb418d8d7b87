"""The model card of a run, README.md, made from the run record with model_card_template.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from fmicl_text.evaluation.report import before_after_table, markdown_table
from fmicl_text.files import write_atomic

RESULTS_FOLDER = ".eval_results"
CURVE = "training_curve.png"
TEMPLATE = Path(__file__).parent / "model_card_template.md"
CITATION = """@article{lu2023fmicl,
  title = {f-MICL: Understanding and Generalizing InfoNCE-based Contrastive Learning},
  author = {Lu, Yiwei and Zhang, Guojun and Sun, Sun and Guo, Hongyu and Yu, Yaoliang},
  journal = {Transactions on Machine Learning Research},
  year = {2023},
  url = {https://arxiv.org/abs/2402.10150}
}"""
MARK = "by [fmicl_text](https://arxiv.org/abs/2402.10150)"  # in every card that is written here
R = "r = -gamma ||x - y||^2 of unit embeddings"

# Divergence: f(u), score f'(e^r), conjugate (f* o f')(e^r); the README's table.
FORMULAS = {
    "kl": ("u log u", "r", "e^r - 1"),
    "js": ("u log u - (1+u) log((1+u)/2)", "r - log((1+e^r)/2)", "log((1+e^r)/2)"),
    "pearson": ("(u-1)^2", "2(e^r - 1)", "e^2r - 1"),
    "sh": ("(sqrt u - 1)^2", "1 - e^(-r/2)", "e^(r/2) - 1"),
    "tsallis": ("(u^a - 1)/(a-1)", "a/(a-1) (e^((a-1)r) - 1)", "e^(ar) - 1"),
    "vlc": ("(u-1)^2/(u+1)", "1 - 4/(1+u)^2, u = e^r", "(u-1)(3u+1)/(u+1)^2, u = e^r"),
    "jeffrey": ("(u-1) log u", "r + 1 - e^-r", "e^r - 1 + r"),
    "rkl": ("-log u", "1 - e^-r", "r"),
    "neyman": ("(1-u)^2/u", "1 - e^-2r", "2(1 - e^-r)"),
    "vlc_as_printed": ("(u-1)^2/(u+1)", "1 - 4/(1+u)^2, u = e^r", "3 - 4/(u+1), u = e^r"),
}
BASELINES = {
    "infonce": "loss = -mean log( e^(x_i.y_i/temperature) / (the same + sum over negatives e^(x_i.n/temperature)) )",
    "align_uniform": "loss = mean ||x_i - y_i||^2 + alpha log mean over negatives e^(-gamma ||x_i - n||^2)",
    "spectral": "loss = -2 mean x_i.y_i + alpha mean over negatives (x_i.n)^2",
}

TEXT_USE = """from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer("{name}")
embeddings = encoder.encode(["A man is eating food.", "A man eats a meal.", "The sky is blue."])
print(encoder.similarity(embeddings, embeddings))"""
TEXT_SEARCH = """from sentence_transformers.util import semantic_search

texts = ["A man is eating food.", "A girl plays the violin.", "The sky is blue."]
hits = semantic_search(encoder.encode(["Somebody has lunch."]), encoder.encode(texts), top_k=2)"""
STOCK_IMAGE_USE = """from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("{name}"), AutoModel.from_pretrained("{name}").eval()
output = model(**processor(Image.open("image.png"), return_tensors="pt"))"""
SMALL_STEM_USE = """from fmicl_text.vision.encoder import build_image_encoder  # stock classes lack its small stem

encoder = build_image_encoder("{name}").eval()  # normalized images [B, C, H, W] to features [B, D]"""


def write_card(run: Mapping[str, Any], folder: Path, name: str | None = None) -> None:
    """Write README.md into the folder of a run, unless a person has written one (a card that this wrote says so); and a
    score whose data can be looked up on the Hub also in its other form, `.eval_results/*.yaml`.

    Args:
        run: What results.json holds.
        folder: Where the encoder lies.
        name: Under which it will be opened; by default the folder's.
    """
    if (score := hub_score(run)) is not None:
        results = folder / RESULTS_FOLDER
        results.mkdir(exist_ok=True)
        entries = yaml.safe_dump(eval_result_entries_to_yaml([score]), sort_keys=False)
        write_atomic(results / f"{score.task_id}.yaml", entries)
    path = folder / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    write_atomic(path, model_card(run, name or folder.name, (folder / CURVE).is_file()))


def model_card(run: Mapping[str, Any], name: str, curve: bool = True) -> str:
    """The card's text.

    Args:
        run: What results.json holds.
        name: Under which the encoder will be opened: a folder or a Hub name.
        curve: Whether a picture of training lies beside it.
    """
    text = run["encoder"]["modality"] == "text"
    card = ModelCard.from_template(
        card_metadata(run, name),
        template_path=str(TEMPLATE),
        title=name,
        what="A sentence encoder" if text else "An image encoder",
        objective_sentence=objective_sentence(run),
        use=use_of(run, name),
        search=TEXT_SEARCH if text else None,
        formula=formula(run),
        training=training_facts(run),
        curve=CURVE if curve else None,
        results_sentence=results_sentence(run),
        results=results_table(run),
        limits=limits_of(text),
        citation=CITATION,
    )
    return f"{str(card.content).strip()}\n"


def card_metadata(run: Mapping[str, Any], name: str) -> ModelCardData:
    """What the Hub reads of a card. A score goes in where its data set can be looked up there."""
    encoder, settings, scored_on = run["encoder"], run["settings"], run["scored_on"]
    text = encoder["modality"] == "text"
    dataset = settings.get("dataset_name")
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
        library_name="sentence-transformers" if text else "transformers",
        pipeline_tag="sentence-similarity" if text else "image-feature-extraction",
        tags=["f-micl", "contrastive-learning", run["objective"], "feature-extraction"],
        base_model=encoder["base_model"],
        datasets=[dataset] if dataset else None,
        eval_results=results,
    )


def hub_score(run: Mapping[str, Any]) -> EvalResultEntry | None:
    """The score on a data set of the Hub, named as MTEB names it; None of other data."""
    where = run["scored_on"]
    if not where["dataset_id"] or "eval_sts_spearman" not in run["after"]:
        return None
    return EvalResultEntry(
        dataset_id=where["dataset_id"],
        task_id=f"{where['task']}_default_{where['split']}",
        value=round(run["after"]["eval_sts_spearman"], 5),
        dataset_revision=where["revision"],
        notes="Spearman x 100 of cosine and score, by fmicl_text; this split chose the checkpoint"
        if run["best_step"] is not None
        else "Spearman x 100 of cosine and score, by fmicl_text",
    )


def objective_sentence(run: Mapping[str, Any]) -> str:
    """f-MICL (kl), or a baseline; and MoCo where positives come from a slow copy."""
    objective = run["objective"]
    named = f"f-MICL ({objective.removeprefix('fmicl-')})" if objective.startswith("fmicl-") else f"`{objective}`"
    method = run["settings"].get("method", "simclr")
    return named if method == "simclr" else f"{named} in {method}"


def formula(run: Mapping[str, Any]) -> str:
    """The loss that was minimized, with its hyperparameters."""
    kwargs = {
        name: value for name, value in run["hyperparameters"].items() if name not in ("global_batch", "divergence")
    }
    with_knobs = "with " + ", ".join(f"{name} {value}" for name, value in kwargs.items())
    if not run["objective"].startswith("fmicl-"):
        return f"    {BASELINES[run['objective']]}\n\n{with_knobs}."
    name = run["hyperparameters"]["divergence"]
    f, score, conjugate = FORMULAS.get(name, ("of the user's own", "f'(e^r)", "(f* o f')(e^r)"))
    terms = "loss = -mean score(r of positives) + alpha mean conjugate(r of negatives)"
    if run["hyperparameters"]["similarity"] == "cosine":
        return f"    {terms}, on cosines instead of r, score(t) = t, conjugate = f*\n\nfor f(u) = {f}, {with_knobs}."
    return (
        f"    {terms}\n    score(r) = {score}\n    conjugate(r) = {conjugate}\n\nfor f(u) = {f} and {R}, {with_knobs}."
    )


def training_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the card's table: names of files, never where they lie."""
    encoder, settings, data = run["encoder"], run["settings"], run["data"]
    file = settings.get("train_file")
    started_from = settings.get("model_name_or_path")
    if started_from is None and settings.get("architecture"):
        started_from = f"random weights, {settings['architecture']}"
    facts = {
        "started from": encoder["base_model"] or (started_from and Path(started_from).name),
        "data": Path(file).name if file else data["source"],
        "rows": data.get("rows"),
        "positives": "two random views of an image" if encoder["modality"] == "image" else positives(data),
        "pooling": encoder["pooling"],
        "tokens per text, in training": settings.get("max_seq_length"),
        "tokens per text, at most" if encoder["modality"] == "text" else "image size": encoder["size"],
        "head, in training only": head_of(settings),
        "LoRA rank, merged": settings.get("lora_rank"),
        "batch": settings["per_device_train_batch_size"] * run["processes"],
        "steps": run["steps"],
        "best step, kept": run["best_step"],
        "learning rate": settings["learning_rate"],
        "seed": run["seed"],
        "versions": ", ".join(f"{package} {number}" for package, number in run["versions"].items()),
    }
    return {name: value for name, value in facts.items() if value is not None}


def head_of(settings: Mapping[str, Any]) -> str | None:
    """The head that only training saw."""
    return f"projection, width {settings['head_dim']}" if "head_dim" in settings else settings.get("head")


def positives(data: Mapping[str, Any]) -> str:
    """What a positive pair of text is."""
    columns = str(data.get("columns", "text"))
    return "dropout views of a text" if len(columns.split()) == 1 else f"columns {columns}"


def results_sentence(run: Mapping[str, Any]) -> str:
    """On what the scores are, and how to read them."""
    where = run["scored_on"]
    revision = f", revision {where['revision']}" if where["revision"] else ""
    if run["encoder"]["modality"] == "text":
        chosen = " The checkpoint was chosen by this score." if run["best_step"] is not None else ""
        return f"{where['name']}{revision}: Spearman x 100 of cosine and score, over all pairs.{chosen}"
    return (
        f"{where['name']}: percent of held-out images whose class a probe of the frozen features finds, beside raw "
        "pixels and the encoder before training."
    )


def results_table(run: Mapping[str, Any]) -> str:
    """Scores before and after, of images the probes; in mid-training those there are."""
    if probes := run["data"].get("probes"):
        return markdown_table(probes)
    if run["before"]:
        return before_after_table(run["before"], run["after"])
    scores = {name.removeprefix("eval_"): v for name, v in run["after"].items() if name.startswith("eval_")}
    return (
        markdown_table([{"metric": name, "value": value} for name, value in scores.items()]) if scores else "None yet."
    )


def limits_of(text: bool) -> str:
    """What a reader should not expect."""
    if text:
        return (
            "Trained on texts of the length named above and scored on sentences; it knows the "
            "languages and carries the biases of its base model and training text. The weights hold no BERT pooler: "
            "`pooler_output` of `AutoModel` is random, use the pooling named above."
        )
    return (
        "Trained without labels on the images named above; on others, or at another size, probe it first. It carries "
        "the biases of its training images."
    )


def use_of(run: Mapping[str, Any], name: str) -> str:
    """Lines that open the encoder."""
    if run["encoder"]["modality"] == "text":
        return TEXT_USE.format(name=name)
    return (SMALL_STEM_USE if run["encoder"]["small_image_stem"] else STOCK_IMAGE_USE).format(name=name)
