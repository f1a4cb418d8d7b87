"""The model card: what a reader needs, and nothing of where things lay."""

import copy

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from fmicl_text.hub.model_card import BASELINES, FORMULAS, MARK, model_card, write_card
from fmicl_text.losses.contrastive import OBJECTIVES
from fmicl_text.losses.divergences import DIVERGENCES

TEXT_RUN = {
    "objective": "fmicl-js",
    "hyperparameters": {
        **{"divergence": "js", "gamma": 20.0, "alpha": 4096.0, "negatives": "same_view", "similarity": "gaussian"},
    },
    "seed": 7,
    "steps": 100,
    "processes": 2,
    "best_step": 75,
    "before": {"eval_sts_spearman": 42.0},
    "after": {"eval_sts_spearman": 50.5},
    "encoder": {"modality": "text", "base_model": "google-bert/bert-base-uncased", "pooling": "cls", "size": 32},
    "scored_on": {"name": "STS Benchmark, dev", "dataset_id": "mteb/stsbenchmark-sts", "task": "STSBenchmark",
                  "split": "validation", "revision": "b0fddb56ed78048fa8b90373c8a3cfc37b684831"},
    "data": {"source": "/home/user/texts.txt", "columns": "text", "rows": 1000},
    "settings": {"per_device_train_batch_size": 64, "learning_rate": 3e-5, "head": "simcse", "max_seq_length": 32,
                 "model_name_or_path": "google-bert/bert-base-uncased", "dataset_name": None,
                 "train_file": "/home/user/texts.txt"},
    "versions": {"torch": "2.13.0"},
}  # fmt: skip
IMAGE_RUN = TEXT_RUN | {
    "objective": "infonce",
    "hyperparameters": {"temperature": 0.5, "negatives": "cross_view"},
    "best_step": None,
    "encoder": {"modality": "image", "base_model": None, "pooling": "auto", "size": 32, "small_image_stem": True},
    "scored_on": {"name": "360 held-out images", "dataset_id": None, "task": None, "split": None, "revision": None},
    "data": {"source": "owner/images", "rows": 40, "probes": [{"features": "raw pixels", "k-NN": 31.4}]},
    "settings": {"per_device_train_batch_size": 64, "learning_rate": 0.1, "head_dim": 512, "method": "mocov3",
                 "architecture": "resnet-18-small", "model_name_or_path": None, "dataset_name": "owner/images"},
}  # fmt: skip


def test_every_divergence_and_baseline_has_its_formula():
    assert set(FORMULAS) == set(DIVERGENCES) and set(BASELINES) == set(OBJECTIVES) - {"fmicl"}
    for name in DIVERGENCES:
        run = TEXT_RUN | {
            "objective": f"fmicl-{name}",
            "hyperparameters": TEXT_RUN["hyperparameters"] | {"divergence": name},
        }
        assert all(part in model_card(run, "m") for part in FORMULAS[name])
    own = TEXT_RUN | {
        "objective": "fmicl-custom",
        "hyperparameters": TEXT_RUN["hyperparameters"] | {"divergence": "custom"},
    }
    assert "f(u) = of the user's own" in model_card(own, "m")


def test_a_text_encoders_card():
    content = model_card(TEXT_RUN, "user/encoder")
    card = ModelCard(content)  # parses as the Hub does
    assert card.data.library_name == "sentence-transformers" and card.data.pipeline_tag == "sentence-similarity"
    assert card.data.base_model == "google-bert/bert-base-uncased"
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_split) == ("mteb/stsbenchmark-sts", "validation")
    assert result.dataset_revision.startswith("b0fddb") and result.metric_value == 50.5
    for said in ('SentenceTransformer("user/encoder")', "alpha 4096.0", "| batch | 128 |", "| best step, kept | 75 |",
                 "| sts_spearman | 42.00  | 50.50 | 8.50   |", "The checkpoint was chosen by this score",
                 "torch 2.13.0", "| seed | 7 |", "@article{lu2023fmicl", "training_curve.png",
                 "semantic_search"):  # fmt: skip
        assert said in content, said


def test_an_image_encoders_card():
    card = ModelCard(model_card(IMAGE_RUN, "user/encoder"))
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.datasets == ["owner/images"] and card.data.eval_results is None and card.data.base_model is None
    for said in ("`infonce` in mocov3", "build_image_encoder", "| raw pixels | 31.40 |", "temperature 0.5",
                 "random weights, resnet-18-small", "two random views of an image"):  # fmt: skip
        assert said in card.content, said
    stock = copy.deepcopy(IMAGE_RUN)
    stock["encoder"]["small_image_stem"] = False
    assert 'AutoModel.from_pretrained("user/encoder")' in model_card(stock, "user/encoder")


def test_no_card_names_a_folder(tmp_path):
    """Data, model and pairs of the user's own machine are named by their last part."""
    texts, model = tmp_path / "texts.txt", tmp_path / "my-bert"
    texts.write_text("a\nb\n")
    run = copy.deepcopy(TEXT_RUN)
    run["data"]["source"], run["settings"]["model_name_or_path"] = str(texts), str(model)
    run["encoder"]["base_model"] = None
    content = model_card(run, "encoder")
    assert (
        str(tmp_path) not in content and "| data | texts.txt |" in content and "| started from | my-bert |" in content
    )


@pytest.mark.parametrize("before, kept", [("# My own words\n", True), (f"old, {MARK}\n", False), (None, False)])
def test_a_card_that_a_person_wrote_stays(tmp_path, before, kept):
    if before:
        (tmp_path / "README.md").write_text(before)
    write_card(TEXT_RUN, tmp_path)
    assert ((tmp_path / "README.md").read_text() == before) == kept


def test_the_score_in_the_hubs_other_form(tmp_path):
    """Where its data can be looked up; named as MTEB names it."""
    write_card(TEXT_RUN, tmp_path)
    (file,) = (tmp_path / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id) == ("mteb/stsbenchmark-sts", "STSBenchmark_default_validation")
    assert entry.value == 50.5 and entry.dataset_revision.startswith("b0fddb") and "chose the checkpoint" in entry.notes
    images = tmp_path / "images"
    images.mkdir()
    write_card(IMAGE_RUN, images)
    assert [path.name for path in images.iterdir()] == ["README.md"]
