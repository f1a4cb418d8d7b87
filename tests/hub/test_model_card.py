"""The model card: its content, and no local paths in it."""

import copy
import json
from functools import cache
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from torch.testing import assert_close
from transformers import ResNetConfig, ViTConfig, pipeline

from fmicl_text.errors import InputError
from fmicl_text.hub.model_card import MARK, model_card, write_card
from fmicl_text.hub.run_record import run_record
from fmicl_text.losses import DIVERGENCES, OBJECTIVES, ContrastiveLoss, FDivergence, FMICLLoss, InfoNCELoss
from fmicl_text.losses.divergences import tsallis
from fmicl_text.vision.encoder import new_image_encoder
from fmicl_text.vision.model import ImageContrastiveModel
from fmicl_text.vision.preprocessing import new_preprocessing, open_preprocessing
from tests.support import IMAGE_FAMILIES, IMAGE_PROCESSORS, TINY_VIT

TINY_RESNET = {"embedding_size": 8, "layer_type": "basic", "hidden_sizes": [8, 16], "depths": [1, 1]}

TEXT_RUN = {
    "objective": "fmicl-js",
    "formula": FMICLLoss("js").formula,
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
    "formula": InfoNCELoss.formula,
    "hyperparameters": {"temperature": 0.5, "negatives": "cross_view"},
    "best_step": None,
    "encoder": {"modality": "image", "base_model": None, "pooling": "auto", "feature": "pooler_output.flatten(1)",
                "size": 32, "channels": 3, "processor": True, "small_image_stem": True, "custom_code": False,
                "pipeline": False},
    "scored_on": {"name": "360 held-out images", "dataset_id": None, "task": None, "split": None, "revision": None},
    "data": {"source": "owner/images", "rows": 40, "probes": [{"features": "raw pixels", "k-NN": 31.4}]},
    "settings": {"per_device_train_batch_size": 64, "learning_rate": 0.1, "head_dim": 512, "method": "mocov3",
                 "architecture": "resnet-18-small", "model_name_or_path": None, "dataset_name": "owner/images"},
}  # fmt: skip


class MarginLoss(ContrastiveLoss):
    """Squared distance of positives, and the margin by which negatives exceed it."""

    def __init__(self, margin=0.5, negatives="cross_view", global_batch="none"):
        super().__init__(0.5, negatives, global_batch=global_batch)
        self.margin = margin


LOSSES = {
    **{name: loss_class() for name, loss_class in OBJECTIVES.items() if name != "fmicl"},
    **{f"fmicl-{name}": FMICLLoss(name, 1.0, 40.0, similarity="cosine") for name in DIVERGENCES},
    "fmicl-mine": FMICLLoss(FDivergence.from_convex(lambda u: u**1.5, "mine"), 1.0, 40.0),
    "margin_loss": MarginLoss(margin=0.25),
}


def test_the_card_has_the_verdict_without_its_advice():
    text = "no better than before training: m 2.00 -> 1.00 (-1.00 +- 0.20); the encoder is saved as it came. Try more"
    card = model_card(TEXT_RUN | {"best_step": 0, "verdict": {"text": text}}, "m")
    sentence = text.removesuffix(" Try more").replace("no better", "No better", 1)
    assert f"\n{sentence} The number after +- is the standard error of the difference.\n" in card
    unknown = "better than before training: score 1.0 -> 2.0 (+1.0, its noise is unknown)"
    other = model_card(TEXT_RUN | {"best_step": 4, "verdict": {"text": unknown}}, "m")
    assert f"\nB{unknown[1:]}.\n" in other and "+-" not in other
    assert "Try" not in card and "| best step (saved) | 0, the encoder before training |" in card


@pytest.mark.parametrize("name", LOSSES)
def test_record_and_card_of_every_objective(name):
    """Everything about the loss comes from the loss, also for custom objectives and divergences."""
    loss = LOSSES[name]
    trainer = SimpleNamespace(
        loss=loss,
        args=SimpleNamespace(per_device_train_batch_size=8, learning_rate=0.1, seed=1, world_size=1,
                             load_best_model_at_end=False, device=torch.device("cpu")),
        state=SimpleNamespace(log_history=[], global_step=3),
        accelerator=SimpleNamespace(distributed_type=SimpleNamespace(value="NO"), mixed_precision="bf16"),
        model=SimpleNamespace(describe=lambda: TEXT_RUN["encoder"]),
        metadata={},
        verdict=None,
        views=None,
    )  # fmt: skip
    run = json.loads(json.dumps(run_record(trainer, {"eval_sts_spearman": 50.5})))
    assert (run["objective"], run["hyperparameters"]) == (name, loss.hyperparameters)
    card = model_card(run, "m")
    assert loss.formula in card
    for argument, value in loss.hyperparameters.items():
        assert argument in ("divergence", "global_batch") or f"{argument} {value}" in card
    assert run["verdict"] is None and "before training:" not in card
    title = f"f-MICL ({name[6:]})" if name.startswith("fmicl-") else f"`{name}`"
    assert f"trained with {title} by" in card


def test_a_text_encoders_card():
    content = model_card(TEXT_RUN, "user/encoder")
    card = ModelCard(content)  # parsed as on the Hub
    assert card.data.library_name == "sentence-transformers" and card.data.pipeline_tag == "sentence-similarity"
    assert card.data.base_model == "google-bert/bert-base-uncased"
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_split) == ("mteb/stsbenchmark-sts", "validation")
    assert result.dataset_revision.startswith("b0fddb") and result.metric_value == 50.5
    for part in ('SentenceTransformer("user/encoder")', "alpha 4096.0", "| batch | 128 |", "| best step (saved) | 75 |",
                 "| sts_spearman | 42.00  | 50.50 | 8.50   |", "checkpoint was selected",
                 "torch 2.13.0", "| seed | 7 |", "@article{lu2023fmicl", "training_curve.png",
                 "semantic_search"):  # fmt: skip
        assert part in content, part


def test_what_decides_a_score_is_in_the_card(monkeypatch, tmp_path):
    """The prompt, dimensions, similarity, precision, revisions, the order of tsallis, the module of a divergence."""
    encoder = {"prompt": "query: ", "truncate_dim": 64, "similarity_fn_name": "dot"}
    run = TEXT_RUN | {
        "encoder": TEXT_RUN["encoder"] | encoder | {"base_revision": "abc123"},
        "data": {
            "source": "owner/texts",
            "columns": "text",
            "rows": 1000,
            "revision": "def456",
            "prompts": r"'q: ' 'a|b\n'",
        },
        "settings": TEXT_RUN["settings"] | {"train_file": None},
        "objective": "fmicl-tsallis",
        "hyperparameters": FMICLLoss(tsallis(1.5)).hyperparameters,
        "precision": "bf16",
    }
    content = model_card(run, "m")
    for part in ('| prompt of `encode` | "query: " |', r"| prompts, in training | 'q: ' 'a\|b\n' |",
                 "| dimensions kept | 64 |", "| similarity | dot |", "| precision | bf16 (mixed) |", "revision abc123",
                 "| data | owner/texts, revision def456 |", "tsallis_order 1.5"):  # fmt: skip
        assert part in content, part
    assert "| precision | float32 with tf32 products |" in model_card(
        run | {"precision": "no", "float32_products": "tf32"}, "m"
    )
    (tmp_path / "mine.py").write_text("def power(u):\n    return u**1.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    loss = FMICLLoss("mine:power")
    content = model_card(run | {"objective": loss.objective_name, "hyperparameters": loss.hyperparameters}, "m")
    assert "f-MICL (power)" in content and "divergence mine:power" in content
    assert loss.objective_name == "fmicl-power"


def test_an_image_encoders_card():
    card = ModelCard(model_card(IMAGE_RUN, "user/encoder"))
    assert card.data.datasets == ["owner/images"] and card.data.eval_results is None and card.data.base_model is None
    for part in ("`infonce` in mocov3", "build_image_encoder", "| raw pixels | 31.40 |", "temperature 0.5",
                 "random weights, resnet-18-small", "two random views of an image"):  # fmt: skip
        assert part in card.content, part
    stock = copy.deepcopy(IMAGE_RUN)
    stock["encoder"] |= {"small_image_stem": False, "custom_code": True}
    assert 'AutoModel.from_pretrained("user/encoder", trust_remote_code=True)' in model_card(stock, "user/encoder")


def test_the_results_of_a_run_without_probes_or_held_out_images():
    run = copy.deepcopy(IMAGE_RUN)
    run["data"].pop("probes")
    content = model_card(run | {"before": {}, "after": {}}, "m")
    assert "Not evaluated." in content and "yet" not in content and "accuracy" not in content
    scores = {"eval_knn_accuracy": 90.0}
    content = model_card(run | {"before": scores, "after": scores}, "m")
    assert "360 held-out images: accuracy in percent of k-NN classification (k = 200)." in content


@cache
def opened(variant):
    """The preprocessing of a variant, read from a folder once for all families."""
    with TemporaryDirectory() as folder:
        IMAGE_PROCESSORS[variant]().save_pretrained(folder)
        return open_preprocessing(folder, 3, image_size=32)


def image_run(folder, family, variant=None, pooling=None):
    """Save a new encoder of a family with a processor, by default for images of its channels; the record of its run,
    the encoder and its preprocessing."""
    torch.manual_seed(0)
    config = IMAGE_FAMILIES[family][0]
    encoder = new_image_encoder(type(config).from_dict(config.to_dict()), pooling).eval()
    if variant is None:
        preprocessing = new_preprocessing(32, (0.5,) * encoder.num_channels, (0.25,) * encoder.num_channels)
    else:
        preprocessing = opened(variant)
    for module in encoder.train().modules():  # with the first weights, the features of deep models vanish
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
            module.momentum = 1.0
    encoder(torch.randn(16, encoder.num_channels, 32, 32))
    model = ImageContrastiveModel(encoder.eval(), preprocessing.size, 8, preprocessing.processor)
    model.save_encoder(str(folder / "out"), model.state_dict())
    return IMAGE_RUN | {"encoder": model.describe()}, encoder, preprocessing


def features_by_the_card(run, folder, picture, monkeypatch):
    """Run the code of a card in a folder with image.png."""
    monkeypatch.chdir(folder)
    picture.save("image.png")
    code = model_card(run, "out").split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    return names["features"]


def colors(mode="RGB", size=(48, 40)):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size).convert(mode)


ALL = [(family, variant) for family in IMAGE_FAMILIES for variant in IMAGE_PROCESSORS]
VARIANTS = list(IMAGE_PROCESSORS)
FEW = [(family, VARIANTS[i % len(VARIANTS)]) for i, family in enumerate(IMAGE_FAMILIES)]


@pytest.mark.parametrize(
    "family, variant", [pytest.param(*one, marks=[] if one in FEW else pytest.mark.slow) for one in ALL]
)
def test_features_by_the_cards_code_are_the_encoders(family, variant, monkeypatch, tmp_path):
    run, encoder, preprocessing = image_run(tmp_path, family, variant)
    picture = colors()
    try:
        encoder.check_shapes(preprocessing)
    except InputError:  # the model takes squares only and this processor does not crop
        assert variant == "no crop"
        picture = colors(size=(40, 40))
    with torch.no_grad():
        expected = encoder(preprocessing([picture]))
    found = features_by_the_card(run, tmp_path, picture, monkeypatch)
    assert_close(found, expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=1e-5)
    assert found.std() > 1e-4


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "resnet", "convnext", "resnet, small stem"])
def test_features_of_every_pooling_by_the_cards_code(family, pooling, monkeypatch, tmp_path):
    try:
        run, encoder, preprocessing = image_run(tmp_path, family, pooling=pooling)
    except InputError as error:
        assert f"pooling={pooling}" in str(error)
        return
    with torch.no_grad():
        expected = encoder(preprocessing([colors()]))
    assert_close(features_by_the_card(run, tmp_path, colors(), monkeypatch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_mode_by_the_cards_code(mode, channels, monkeypatch, tmp_path):
    """The card's code also turns pictures upright; a model of one channel takes color pictures."""
    monkeypatch.setitem(IMAGE_FAMILIES, "gray", (ResNetConfig(num_channels=1, **TINY_RESNET), "pooler"))
    run, encoder, preprocessing = image_run(tmp_path, "gray" if channels == 1 else "vit")
    picture = colors(mode)
    with torch.no_grad():
        expected = encoder(preprocessing([picture.convert("L" if channels == 1 else "RGB")]))
    assert_close(features_by_the_card(run, tmp_path, picture, monkeypatch), expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_saved_without_a_processor(monkeypatch, tmp_path):
    """Trained on views of the user's own: the card's code shows the shape of the input."""
    torch.manual_seed(0)
    model = ImageContrastiveModel(new_image_encoder(ViTConfig(**TINY_VIT)).eval(), 32, 8)
    model.save_encoder(str(tmp_path / "out"), model.state_dict())
    run = IMAGE_RUN | {"encoder": model.describe()}
    with torch.no_grad():
        expected = model.encoder(torch.zeros(1, 3, 32, 32))
    assert_close(features_by_the_card(run, tmp_path, colors(), monkeypatch), expected, atol=1e-5, rtol=1e-5)
    assert ModelCard(model_card(run, "out")).data.pipeline_tag is None


@pytest.mark.parametrize("family", [*IMAGE_FAMILIES, "gray"])
def test_the_metadata_promise_a_pipeline_where_it_works(family, monkeypatch, tmp_path):
    monkeypatch.setitem(IMAGE_FAMILIES, "gray", (ResNetConfig(num_channels=1, **TINY_RESNET), "pooler"))
    run, encoder, preprocessing = image_run(tmp_path, family)
    data = ModelCard(model_card(run, "out")).data
    assert "feature-extraction" not in data.tags  # from which the Hub would infer a pipeline of texts
    if family in ("gray", "resnet, small stem"):
        assert data.pipeline_tag is None and data.library_name is None
        return
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-feature-extraction")
    found = pipeline(data.pipeline_tag, model=str(tmp_path / "out"), device="cpu")(colors())
    with torch.no_grad():
        expected = encoder.backbone(pixel_values=preprocessing([colors()])).last_hidden_state
    assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-5)


def test_no_card_names_a_folder(tmp_path):
    """Local data and models are given by the last part of their path."""
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
def test_a_card_that_a_user_wrote_is_kept(tmp_path, before, kept):
    if before:
        (tmp_path / "README.md").write_text(before)
    write_card(TEXT_RUN, tmp_path)
    assert ((tmp_path / "README.md").read_text() == before) == kept


def test_eval_results(tmp_path):
    """Written if the data set is on the Hub, under MTEB's name."""
    write_card(TEXT_RUN, tmp_path)
    (file,) = (tmp_path / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id) == ("mteb/stsbenchmark-sts", "STSBenchmark_default_validation")
    assert entry.value == 50.5 and entry.dataset_revision.startswith("b0fddb") and "selected" in entry.notes
    images = tmp_path / "images"
    images.mkdir()
    write_card(IMAGE_RUN, images)
    assert [path.name for path in images.iterdir()] == ["README.md"]


def test_several_files_are_named_without_their_folders():
    run = TEXT_RUN | {"settings": TEXT_RUN["settings"] | {"train_file": ["/home/user/a.csv", "/home/user/b.csv"]}}
    card = str(model_card(run, "name"))
    assert "a.csv, b.csv" in card and "/home/user" not in card


def test_search_is_described_as_search():
    """The metric, what selected the checkpoint, and code that applies the prompts of training."""
    settings = TEXT_RUN["settings"] | {"metric_for_best_model": "loss"}
    scores = {"eval_cosine_accuracy@1": 0.1, "eval_cosine_ndcg@10": 0.5}
    content = model_card(TEXT_RUN | {"settings": settings, "before": scores, "after": scores}, "m")
    assert "search, from 0 to 1" in content and "The checkpoint was selected by cosine_ndcg@10." in content
    assert "Spearman" not in content and "evaluated on sentences" not in content
    assert "encoder.encode_query([" in content and "encoder.encode_document(texts)" in content
    chosen = TEXT_RUN["settings"] | {"metric_for_best_model": "sts_pearson"}
    assert "selected by sts_pearson." in model_card(TEXT_RUN | {"settings": chosen}, "m")
