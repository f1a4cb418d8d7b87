"""Geometry of embeddings: how close partners lie, how evenly the rest spreads, whether the Gaussian-kernel assumption holds.

    python eval/geometry.py                                             # the package's encoder and sentences
    python eval/geometry.py --model before=BERT after=runs/js --text SENTENCES.txt --flow --plot geometry.png
    python eval/geometry.py --model runs/js --file PAIRS.tsv            # partners: pairs graded 4 or more
    python eval/geometry.py --embeddings FEATURES.npz                   # x and y [N, D] of any encoder
    python eval/geometry.py --synthetic --flow                          # data of which the density is known

Partners are two dropout views of a sentence (--text), or graded pairs (--file). eval/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from fmicl_text.errors import InputError, OneLineParser, check_writable, one_line_errors, whole_number
from fmicl_text.evaluation.encoders import encoder_facts, open_encoder
from fmicl_text.evaluation.encoding import encode_dropout_views, encode_sentences
from fmicl_text.evaluation.geometry import describe_geometry, is_collapsed
from fmicl_text.evaluation.plots import plot_geometry
from fmicl_text.evaluation.report import library_versions, markdown_table, named_model, pooling_label, write_json
from fmicl_text.evaluation.sts import POSITIVE_SCORE, embed_pairs, load_pairs
from fmicl_text.model import POOLINGS
from fmicl_text.quickstart import ENCODER, SENTENCES
from fmicl_text.text.data import load_training_text
