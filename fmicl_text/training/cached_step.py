"""Gradients of a large batch in the memory of a mini-batch (GradCache, arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cached_step(
    inputs: dict[str, Tensor],
    mini_batch_size: int,
    embed: Callable[[dict[str, Tensor], int], Tensor],
    loss_of_views: Callable[[Sequence[Tensor]], Tensor],
    backward: Callable[[Tensor], None],
    no_sync: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """Backpropagate the loss of a batch, with the activations of only one mini-batch in memory at a time.

    Embeds every mini-batch without a graph, computes the gradient of the loss with respect to the embeddings, then
    embeds each mini-batch again and backpropagates that gradient. Processes exchange gradients once, in the last
    mini-batch.

    Args:
        inputs: A batch, tensors [B, V, ...].
        mini_batch_size: Examples embedded at a time.
        embed: Maps (mini-batch, its index) to embeddings [b, V, D]; must give the same result in both passes.
        loss_of_views: Maps V views [B, D] to the scalar loss.
        backward: Backpropagates a scalar, such as `accelerator.backward`.
        no_sync: Context in which `backward` does not exchange gradients.

    Returns:
        The loss, detached.
    """
    columns = {name: value.split(mini_batch_size) for name, value in inputs.items()}
    mini_batches = [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]
    with torch.no_grad():
        embeddings = torch.cat([embed(mini_batch, k) for k, mini_batch in enumerate(mini_batches)])
    views = [view.requires_grad_() for view in embeddings.unbind(1)]
    loss = loss_of_views(views)
    gradients = zip(*(g.split(mini_batch_size) for g in torch.autograd.grad(loss, views)), strict=True)
    del embeddings, views
    for k, (mini_batch, parts) in enumerate(zip(mini_batches, gradients, strict=True)):
        last = k == len(mini_batches) - 1
        with nullcontext() if last else no_sync():
            backward((embed(mini_batch, k) * torch.stack(parts, dim=1)).sum())
    return loss.detach()
