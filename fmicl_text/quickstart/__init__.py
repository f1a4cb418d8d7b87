"""The embedded default: a small encoder, training sentences, graded pairs and their preset. No network."""

from pathlib import Path

FOLDER = Path(__file__).parent
ENCODER = FOLDER / "encoder"
SENTENCES = FOLDER / "sentences.txt"
PAIRS = FOLDER / "pairs.tsv"
PRESET = FOLDER / "preset.yaml"
