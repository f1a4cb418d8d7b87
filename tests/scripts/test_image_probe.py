"""eval/image_probe.py: a table with raw pixels and random weights as baselines."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fmicl_text.errors import InputError
from fmicl_text.vision.architectures import IMAGE_CONFIGS
from fmicl_text.vision.data import load_digits
from fmicl_text.vision.encoder import new_image_encoder
from fmicl_text.vision.preprocessing import new_preprocessing
from tests.support import IMAGE_FAMILIES, LabeledPictures, image_parquet, picture

SCRIPT = Path(__file__).parent.parent.parent / "eval" / "image_probe.py"


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["image_probe.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT))["main"]()


def tiny_vit(folder, processor=None):
    """Write a ViT for 32 x 32 pixels."""
    torch.manual_seed(0)
    config = IMAGE_FAMILIES["vit"][0]
    new_image_encoder(type(config).from_dict(config.to_dict())).save_pretrained(folder, processor)
    return folder


def write_classes(folder, count, seed=0, size=(40, 30)):
    """Write a folder of dark and light pictures, with a subfolder per class."""
    for i, image in enumerate(LabeledPictures(count, seed, sizes=[size], noise=80).made):
        place = folder / ("dark", "light")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i}.png")
    return folder


@pytest.mark.slow
def test_digits_with_every_probe(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        "fmicl_text.vision.data.load_digits",
        lambda channels, held_out, max_train_samples: load_digits(channels, held_out, 0, max_train_samples or 200),
    )
    folder, output = tmp_path / "model", tmp_path / "r.json"
    new_image_encoder(IMAGE_CONFIGS["digits"]()).save_pretrained(folder)
    main(
        monkeypatch, "--model", f"mine={folder}", "--held_out", 100, "--ks", 1, 20, "--temperatures", 0.07, 0.1,
        "--linear_epochs", 2, "--image_size", 16, "--output", output,
    )  # fmt: skip
    results = json.loads(output.read_text())
    assert [result["name"] for result in results] == ["raw pixels", "mine, random weights", "mine"]
    assert all(result["num_train"] == 200 and result["num_test"] == 100 for result in results)
    probes = ["k-NN, k 1, T 0.07", "k-NN, k 1, T 0.1", "k-NN, k 20, T 0.07", "k-NN, k 20, T 0.1", "logistic regression"]
    assert list(results[2]["metrics"]) == [*probes, "5 labels per class", "linear layer"]
    assert list(results[0]["metrics"]) == [*probes, "5 labels per class"]  # raw pixels have no encoder to freeze
    assert results[0]["metrics"]["k-NN, k 1, T 0.1"] > 80 and len(results[2]["metrics"]["5 labels per class"]) == 5
    assert results[2]["model"] == str(folder) and results[2]["layer"] == "encoder"
    assert (
        results[2]["pooling"] == "auto" and results[2]["commit"] is None and results[2]["float32_products"] == "float32"
    )
    for made in results:  # everything that decides the scores and can be set
        assert (made["image_size"], made["views"], made["linear_epochs"], made["seed"]) == (16, "gray", 2, 0)
        assert made["pixel_mean"] == results[0]["pixel_mean"] and len(made["fingerprint"]) > 8
        assert made["preprocessing"]["crop_size"] == {"height": 16, "width": 16}
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3 and "| linear layer |" in header and " ± " in rows[0]


def test_a_folder_with_a_test_set_in_the_models_own_preprocessing(monkeypatch, tmp_path):
    """The size, crop, mean and deviation of the processor that is saved with the model."""
    processor = new_preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)).processor
    train, test = write_classes(tmp_path / "a", 60), write_classes(tmp_path / "b", 20, seed=1)
    vit, output = tiny_vit(tmp_path / "vit", processor), tmp_path / "r.json"
    main(monkeypatch, "--model", vit, "--images", train, "--test_file", test, "--ks", 5, "--output", output)
    raw, new, made = json.loads(output.read_text())
    assert (made["num_train"], made["num_test"], made["image_size"]) == (60, 20, 32)
    assert made["pixel_mean"] == [0.1, 0.2, 0.3] and made["preprocessing"]["size"] == {"shortest_edge": 32}
    assert raw["pixel_mean"] != new["pixel_mean"] == [0.1, 0.2, 0.3] and raw["metrics"]["k-NN, k 5, T 0.1"] > 90


@pytest.mark.slow
def test_parquet_files_and_few_rows_to_fit(monkeypatch, tmp_path):
    """Two files; the images without a class take part in no probe."""
    for name, labels in [("a", [0, 1] * 10), ("b", [1, 0, -1] * 6)]:
        (tmp_path / name).mkdir()
        image_parquet(
            tmp_path / name, [picture(size=(32, 32), seed=i + 100 * len(labels)) for i in range(len(labels))], labels
        )
    vit, output = tiny_vit(tmp_path / "vit"), tmp_path / "r.json"
    files = (tmp_path / "a" / "images.parquet", tmp_path / "b" / "images.parquet")
    main(monkeypatch, "--model", vit, "--images", *files, "--held_out", 8, "--ks", 5, "--output", output)
    made = json.loads(output.read_text())[2]
    assert (made["num_train"], made["num_test"], made["image_size"]) == (24, 8, 32)


@pytest.mark.parametrize("kind", ["flat", "one class"])
def test_images_without_classes_are_one_line(monkeypatch, tmp_path, kind):
    folder = tmp_path / "photos" if kind == "flat" else tmp_path / "photos" / "cats"
    folder.mkdir(parents=True)
    for i in range(10):
        Image.new("RGB", (32, 32), (i, i, i)).save(folder / f"{i}.png")
    with pytest.raises(InputError, match=r"^--images .*photos.*: probes need images of at least two classes"):
        main(monkeypatch, "--model", tiny_vit(tmp_path / "vit"), "--images", tmp_path / "photos")
