"""The bundled model and data: a small encoder, training sentences, STS pairs and recommended settings."""

from pathlib import Path

FOLDER = Path(__file__).parent
ENCODER = FOLDER / "encoder"
SENTENCES = FOLDER / "sentences.txt"
PAIRS = FOLDER / "pairs.tsv"
PRESET = FOLDER / "preset.yaml"
