"""Gradients of a large batch in the memory of a mini-batch (GradCache, arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cached_step(
    mini_batches: Sequence[tuple[dict[str, Tensor], int, int]],
    embed: Callable[[dict[str, Tensor], int, int], Tensor],
    loss_of_views: Callable[[Sequence[Tensor]], Tensor],
    backward: Callable[[Tensor], None],
    no_sync: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """Backpropagate the loss of a batch, with the activations of only one mini-batch in memory at a time.

    Embeds every mini-batch without a graph, computes the gradient of the loss with respect to the embeddings, then
    embeds each mini-batch again and backpropagates that gradient. Processes exchange gradients once, in the last
    mini-batch.

    Args:
        mini_batches: What is embedded at a time: tensors [b, V, ...], and two numbers for `embed`.
        embed: Maps a mini-batch and its numbers to embeddings [b, V, D]; must give the same result in both passes.
        loss_of_views: Maps V views [B, D] to the scalar loss.
        backward: Backpropagates a scalar, such as `accelerator.backward`.
        no_sync: Context in which `backward` does not exchange gradients.

    Returns:
        The loss, detached.
    """
    with torch.no_grad():
        embeddings = [embed(*mini_batch) for mini_batch in mini_batches]
    views = [view.requires_grad_() for view in torch.cat(embeddings).unbind(1)]
    sizes = [len(part) for part in embeddings]
    loss = loss_of_views(views)
    gradients = zip(*(g.split(sizes) for g in torch.autograd.grad(loss, views)), strict=True)
    del embeddings, views
    for k, (mini_batch, parts) in enumerate(zip(mini_batches, gradients, strict=True)):
        last = k == len(mini_batches) - 1
        with nullcontext() if last else no_sync():
            backward((embed(*mini_batch) * torch.stack(parts, dim=1)).sum())
    return loss.detach()
