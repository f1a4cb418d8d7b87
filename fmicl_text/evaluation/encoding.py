"""Encode sentences, with a progress bar."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device, truncate_embeddings
from torch import Tensor
from tqdm.auto import tqdm

from fmicl_text.evaluation.sharing import SHARED, assign_rows, gather_shared, own_rows
from fmicl_text.losses.distributed import world_size
from fmicl_text.text.checks import prepare_tokenizer
from fmicl_text.text.settings import applied_prompt


@torch.no_grad()
def encode_sentences(
    encoder: SentenceTransformer,
    sentences: list[str],
    batch_size: int = 64,
    progress: bool = True,
    prompt: str | None = None,
) -> Tensor:
    """Embeddings [N, D] of N sentences, in their order, on the CPU in float32, without dropout.

    Sentences are sorted by length, longest first, to reduce padding and so that an out-of-memory error occurs early.
    When the trainer evaluates on several processes, each encodes its share of the batches, and all receive all rows.

    Args:
        encoder: Any SentenceTransformer. Its tokenizer is completed: see `text.checks.prepare_tokenizer`.
        sentences: N >= 1 texts.
        batch_size: Sentences per forward pass.
        progress: Show a progress bar, removed at the end.
        prompt: Prepended to the sentences. By default, the encoder's own default prompt, if any.
    """
    prepare_tokenizer(encoder, "encoder")
    order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
    options: Any = {"prompt": prompt, "batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    shared = SHARED.get() and world_size() > 1
    processes = assign_rows(len(order), batch_size)
    own = own_rows(processes) if shared else torch.arange(len(order))
    rows = []
    for batch in tqdm(own.split(batch_size), desc="encode", leave=False, disable=not progress):
        texts = [sentences[order[i]] for i in batch.tolist()]
        rows.append(encoder.encode(texts, **options).float().cpu())
    embeddings = torch.cat(rows) if rows else torch.empty(0, 0)
    if shared:
        embeddings = gather_shared(embeddings, processes, encoder.device)
    return embeddings[torch.tensor(order).argsort()]


@torch.no_grad()
def encode_dropout_views(
    encoder: SentenceTransformer, sentences: list[str], seed: int = 0, batch_size: int = 64, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Two embeddings [N, D] of each sentence under different dropout masks: SimCSE's positive pairs (arXiv 2104.08821).

    Args:
        encoder: Any SentenceTransformer. Its training mode is restored; its tokenizer is completed as in
            `encode_sentences`.
        sentences: N >= 1 texts.
        seed: Seed of the dropout masks. The global random state does not change.
        batch_size: Sentences per forward pass, which has two rows per sentence.
        progress: Show a progress bar, removed at the end.
    """
    prepare_tokenizer(encoder, "encoder")
    training = encoder.training
    encoder.train()
    order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
    views = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(order), batch_size), desc="encode views", leave=False, disable=not progress):
            batch = [sentences[i] for i in order[start : start + batch_size]]
            tokens = encoder.preprocess(batch + batch, prompt=applied_prompt(encoder))
            rows = encoder(batch_to_device(tokens, encoder.device))["sentence_embedding"]
            views.append(truncate_embeddings(rows, encoder.truncate_dim).float().cpu().unflatten(0, (2, len(batch))))
    encoder.train(training)
    x, y = torch.cat(views, dim=1)[:, torch.tensor(order).argsort()]
    return x, y
