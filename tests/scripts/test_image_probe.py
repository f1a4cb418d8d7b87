"""eval/image_probe.py: a table with raw pixels and random weights as baselines."""

import json
import runpy
import sys
from pathlib import Path

from fmicl_text.vision.architectures import IMAGE_CONFIGS
from fmicl_text.vision.data import load_digits
from fmicl_text.vision.encoder import new_image_encoder, pixel_statistics
from tests.support import IMAGE_FAMILIES, image_parquet, picture

SCRIPT = Path(__file__).parent.parent.parent / "eval" / "image_probe.py"


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["image_probe.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT))["main"]()


def test_digits_with_every_probe(monkeypatch, capsys, tmp_path):
    digits = load_digits()
    few = type(digits)(digits.pixels[:300], digits.labels[:300], digits.source)
    monkeypatch.setattr("fmicl_text.vision.data.load_digits", lambda: few)
    folder, output = tmp_path / "model", tmp_path / "r.json"
    new_image_encoder(IMAGE_CONFIGS["digits"]()).save_pretrained(folder)
    main(
        monkeypatch, "--model", f"mine={folder}", "--held_out", 100, "--ks", 1, 20, "--temperatures", 0.07, 0.1,
        "--linear_epochs", 2, "--output", output,
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
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3 and "| linear layer |" in header and " ± " in rows[0]


def test_a_parquet_file_and_pixel_statistics_of_the_model(monkeypatch, tmp_path):
    from transformers import ViTImageProcessorPil

    path = image_parquet(tmp_path, [picture(size=(32, 32), seed=i) for i in range(30)])
    config = IMAGE_FAMILIES["vit"][0]
    processor = ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    new_image_encoder(type(config).from_dict(config.to_dict())).save_pretrained(tmp_path / "vit", processor)
    assert pixel_statistics(str(tmp_path / "vit"), 3) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert pixel_statistics(str(tmp_path / "vit"), 1) is None and pixel_statistics(str(tmp_path), 3) is None
    used = []
    original = runpy.run_path(str(SCRIPT))["encode_images"]

    def record(encoder, pixels, size, mean, std):
        used.append(mean)
        return original(encoder, pixels, size, mean, std, progress=False)

    monkeypatch.setattr("fmicl_text.vision.model.encode_images", record)
    output = tmp_path / "r.json"
    main(monkeypatch, "--model", tmp_path / "vit", "--images", path, "--held_out", 10, "--ks", 5, "--output", output)
    assert used == [(0.1, 0.2, 0.3)] * 4
    assert json.loads(output.read_text())[2]["pixel_mean"] == [0.1, 0.2, 0.3]
