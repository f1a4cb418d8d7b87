"""eval/geometry.py on tiny data: table, JSON, plot and errors."""

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import MobileViTImageProcessorPil, ViTConfig

from fmicl_text.errors import InputError
from fmicl_text.evaluation import density
from fmicl_text.evaluation.synthetic import kernel_pairs
from fmicl_text.vision.architectures import IMAGE_CONFIGS
from fmicl_text.vision.data import ImageSets, load_digits, load_images
from fmicl_text.vision.encoder import new_image_encoder
from fmicl_text.vision.model import ImageContrastiveModel
from fmicl_text.vision.preprocessing import new_preprocessing
from tests.support import IMAGE_FAMILIES, TINY_VIT, image_parquet, sentences

SCRIPT = Path(__file__).parent.parent.parent / "eval" / "geometry.py"


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["geometry.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT))["main"]()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(sentences(60)), encoding="utf-8")
    return path


def test_models_side_by_side(monkeypatch, capsys, bert_folder, no_dropout_folder, text, tmp_path):
    output, plot = tmp_path / "r.json", tmp_path / "r.png"
    models = [f"with={bert_folder}", f"without={no_dropout_folder}"]
    main(monkeypatch, "--model", *models, "--text", text, "--output", output, "--plot", plot, "--pooling", "mean")
    first, second = json.loads(output.read_text())
    assert [first["name"], second["name"]] == ["with", "without"]
    assert first["metrics"]["alignment"] > 0.05 and second["metrics"]["alignment"] < 1e-6
    assert first["num_pairs"] == 60 and first["width"] == 32
    assert first["positive_pairs"] == "dropout views" and first["pooling_from"] == "argument" and "kernel" not in first
    assert (first["prompt"], first["truncated"], first["float32_products"]) == (None, 0.0, "float32")
    assert first["dropout"]["hidden_dropout_prob"] == 0.1 and second["dropout"]["hidden_dropout_prob"] == 0.0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 and "effective_rank" in header
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_pairs_share_no_sentence(monkeypatch, bert_folder, tmp_path):
    first, second = sentences(30), sentences(30, seed=1)
    rows = [(a, b, 5.0 if i % 2 else 1.0) for i, (a, b) in enumerate(zip(first, second, strict=True))]
    rows.append((first[1], first[3], 4.5))  # both occur in another pair
    path, output = tmp_path / "pairs.tsv", tmp_path / "r.json"
    path.write_text("sentence1\tsentence2\tscore\n" + "\n".join(f"{a}\t{b}\t{s}" for a, b, s in rows))
    main(monkeypatch, "--model", bert_folder, "--file", path, "--output", output)
    (result,) = json.loads(output.read_text())
    assert result["num_pairs"] in (14, 15) and result["positive_pairs"] == "score of 4 or more"


@pytest.mark.slow
def test_embeddings_of_any_encoder_and_the_flow(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(density, "NUM_FLOWS", 1)
    pairs = kernel_pairs(1500, dims=4)
    np.savez(tmp_path / "e.npz", x=5 * pairs.x.numpy(), y=pairs.y.numpy())
    output, plot = tmp_path / "r.json", tmp_path / "r.png"
    named = f"known={tmp_path / 'e.npz'}"
    main(monkeypatch, "--embeddings", named, "--flow", "--divergence", "vlc", "--output", output, "--plot", plot)
    (result,) = json.loads(output.read_text())
    assert result["kernel"]["joint"]["r2_bins"] > 0.97
    assert result["metrics"]["alignment"] == pytest.approx(kernel_distance(pairs), rel=1e-3)
    assert list(result["kernel"]["distances"]) == ["vlc"]
    table = capsys.readouterr().out
    assert "| R2, bins |" in table and "| to f'(u), vlc |" in table and "| known " in table
    assert plot.stat().st_size > 20_000


def kernel_distance(pairs):
    return (pairs.x - pairs.y).square().sum(1).mean().item()


def test_a_collapsed_encoder_is_flagged(monkeypatch, capsys, tmp_path):
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(16, generator=generator)
    x, y = (point + 0.05 * torch.randn(100, 16, generator=generator) for _ in range(2))
    np.savez(tmp_path / "e.npz", x=x.numpy(), y=y.numpy())
    main(monkeypatch, "--embeddings", f"e={tmp_path / 'e.npz'}", "--output", tmp_path / "r.json")
    printed = capsys.readouterr()
    assert "COLLAPSED" in printed.out and "e: collapsed, mean cosine 1.00, " in printed.err
    assert json.loads((tmp_path / "r.json").read_text())[0]["collapsed"] is True


def test_synthetic_data_needs_no_model(monkeypatch, capsys):
    main(monkeypatch, "--synthetic", "--num_pairs", "300")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["kernel", "two scales", "clusters"]


def test_images_after_the_projection_head(monkeypatch, tmp_path):
    """--after_head applies the head of a checkpoint; an exported encoder has none."""
    digits = {channels: ImageSets(load_digits(channels, 0).train.take(slice(50))) for channels in (1, 3)}
    monkeypatch.setattr("fmicl_text.vision.data.load_digits", lambda channels, held_out: digits[channels])
    model = ImageContrastiveModel(new_image_encoder(IMAGE_CONFIGS["digits"]()), 16, head_dim=24)
    model.save_encoder(str(tmp_path / "run"), model.state_dict())
    model.save_encoder(str(tmp_path / "checkpoint-1"), model.state_dict())
    model.save_training_only(str(tmp_path / "checkpoint-1"), model.state_dict())
    flags = ["--images", "digits", "--views", "gray", "--image_size", 16, "--output", tmp_path / "r.json"]
    widths = []
    for extra in ([], ["--after_head"]):
        main(monkeypatch, "--model", tmp_path / "checkpoint-1", *flags, *extra)
        (result,) = json.loads((tmp_path / "r.json").read_text())
        widths.append((result["width"], result["layer"]))
    assert widths == [(128, "encoder"), (24, "projection head")]
    with pytest.raises(InputError, match=r"run .*training_only\.safetensors"):
        main(monkeypatch, "--model", tmp_path / "run", *flags, "--after_head")


@pytest.fixture
def dark(tmp_path):
    """A parquet file of dark images, and a ResNet with batch statistics of such images as its processor normalizes
    them: far from 0, in a narrow range."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(60):
        buffer = io.BytesIO()
        blocks = Image.fromarray(random.integers(0, 40, (4, 4, 3), dtype=np.uint8))
        blocks.resize((32, 32), Image.Resampling.NEAREST).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": f"{i}.png"})
    path = image_parquet(tmp_path, rows, column="photo")
    torch.manual_seed(0)
    config = IMAGE_FAMILIES["resnet"][0]
    encoder = new_image_encoder(type(config).from_dict(config.to_dict())).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    preprocessing = new_preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    encoder(preprocessing(load_images(path, held_out=0).train.pictures(range(60))))
    encoder.save_pretrained(tmp_path / "model", preprocessing.processor)
    return path, tmp_path / "model"


def test_images_are_normalized_as_the_models_processor_does(monkeypatch, capsys, dark, tmp_path):
    """Normalized by their own mean and deviation, as of a model without a processor, they collapse this encoder."""
    path, model = dark
    flags = ["--images", path, "--image_column", "photo", "--output", tmp_path / "r.json"]
    main(monkeypatch, "--model", model, *flags)
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert not result["collapsed"] and "COLLAPSED" not in capsys.readouterr().out
    assert (result["pixel_mean"], result["pixel_std"], result["image_size"]) == ([0.5] * 3, [0.25] * 3, 32)
    (model / "preprocessor_config.json").unlink()
    main(monkeypatch, "--model", model, *flags)
    (other,) = json.loads((tmp_path / "r.json").read_text())
    assert other["collapsed"] and "COLLAPSED" in capsys.readouterr().out
    assert other["pixel_mean"] == pytest.approx([20 / 255] * 3, rel=0.1)


def test_the_image_size_is_the_models_own(monkeypatch, dark, tmp_path):
    """That of its processor, else that of its config; a folder of images without classes is read too."""
    path, _ = dark
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, row in enumerate(pq.read_table(path)["photo"].to_pylist()[:20]):
        (photos / f"{i}.png").write_bytes(row["bytes"])
    new_image_encoder(ViTConfig(**TINY_VIT)).save_pretrained(tmp_path / "vit")
    main(monkeypatch, "--model", tmp_path / "vit", "--images", photos, "--output", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())[0]["image_size"] == 32
    processor = MobileViTImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "vit")
    main(monkeypatch, "--model", tmp_path / "vit", "--images", photos, "--output", tmp_path / "r.json")
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert (result["image_size"], result["pixel_mean"], result["num_pairs"]) == (32, [0.0] * 3, 20)
    with pytest.raises(InputError, match="--image_column requires --images"):
        main(monkeypatch, "--image_column", "photo")


@pytest.mark.slow
def test_text_options_do_not_apply_to_images(monkeypatch, tmp_path):
    for flags, message in (
        (["--images", "digits", "--pooling", "mean"], "--pooling applies to --text and --file only"),
        (["--image_size", "16"], "--image_size requires --images"),
    ):
        with pytest.raises(InputError, match=message):
            main(monkeypatch, "--model", tmp_path, *flags)


def test_an_image_encoder_has_no_sentences(monkeypatch, tmp_path):
    model = ImageContrastiveModel(
        new_image_encoder(ViTConfig(**TINY_VIT)), 32, 8, new_preprocessing(32, (0.5,) * 3, (0.5,) * 3).processor
    )
    model.save_encoder(str(tmp_path), model.state_dict())
    with pytest.raises(InputError, match=r"^model=.* does not encode text: its inputs are image$"):
        main(monkeypatch, "--model", tmp_path)


@pytest.mark.slow
def test_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--embeddings", "absent.npz"],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("geometry.py: error: --embeddings absent.npz: ")
