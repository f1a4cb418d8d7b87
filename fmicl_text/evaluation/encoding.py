"""Sentences to embeddings, with a progress bar."""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

CHUNK = 512


@torch.no_grad()
def encode_sentences(
    encoder: SentenceTransformer, sentences: list[str], batch_size: int = 64, progress: bool = True
) -> Tensor:
    """Embeddings [N, D] of N sentences, in their order, on the CPU in float32, without dropout.

    Encoded from long to short, so that a batch holds little padding and a lack of memory shows at once.

    Args:
        encoder: Any SentenceTransformer.
        sentences: N >= 1 texts.
        batch_size: Sentences per forward pass.
        progress: Show a bar, which goes when it is done.
    """
    order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
    rows = []
    for start in tqdm(range(0, len(order), CHUNK), desc="encode", leave=False, disable=not progress):
        chunk = [sentences[i] for i in order[start : start + CHUNK]]
        rows.append(
            encoder.encode(chunk, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False).float().cpu()
        )
    return torch.cat(rows)[torch.tensor(order).argsort()]
