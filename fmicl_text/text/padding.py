"""Less padding: the texts of a batch go through the encoder in groups of similar length.

The batch, its loss and its gradient stay the same. Dropout masks are drawn in another order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MOST_GROUPS = 4
LEAST_GAIN = 0.05  # share of the time of the batch
# A forward and backward pass takes as long as so many products of a token with a weight, for each linear layer,
# in addition to those of its tokens. Measured on CPUs; see recipes/README.md, "Speed".
PASS_COST = 6e7


def embed_in_groups(embed: Callable[[dict[str, Tensor]], Tensor], features: dict[str, Tensor], cost: float) -> Tensor:
    """Embeddings [N, D] of tokens {input_ids, attention_mask, ...} [N, T], padded on either side.

    Args:
        embed: Maps tokens [n, t] to embeddings [n, D].
        features: The tokens.
        cost: Of another pass, in tokens.
    """
    mask = features["attention_mask"]
    if any(not isinstance(value, Tensor) or value.shape != mask.shape for value in features.values()):
        return embed(features)
    lengths = mask.sum(1)
    first = torch.arange(mask.shape[1]) < lengths[:, None]
    left = not torch.equal(mask.bool(), first)
    if left and not torch.equal(mask.bool(), first.flip(1)):  # padding inside
        return embed(features)
    groups = length_groups(lengths.cpu().numpy(), cost)
    if len(groups) == 1:
        return embed(features)
    parts = []
    for rows in map(torch.from_numpy, groups):
        longest = max(1, int(lengths[rows].max()))
        kept = slice(mask.shape[1] - longest, None) if left else slice(longest)
        parts.append(embed({name: value[rows, kept] for name, value in features.items()}))
    return torch.cat(parts)[torch.from_numpy(np.concatenate(groups)).argsort()]


def length_groups(lengths: NDArray[np.int64], cost: float) -> list[NDArray[np.int64]]:
    """The rows of at most `MOST_GROUPS` groups, longest first, such that the padded tokens of all groups and the cost
    of their passes are the least; one group if the gain is below `LEAST_GAIN`.

    Args:
        lengths: Tokens of each row without padding, [N].
        cost: Of a pass, in tokens.
    """
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(-lengths, return_counts=True)
    values, ends = -values, np.concatenate([[0], counts.cumsum()])
    # cell [s, e]: padded tokens of a group of the distinct lengths s to e - 1
    padded = np.where(ends[None, :] > ends[:-1, None], values[:, None] * (ends[None, :] - ends[:-1, None]), np.inf)
    best, cuts = padded[0], list[NDArray[np.int64]]()
    total = [best[-1] + cost]
    for _ in range(1, min(MOST_GROUPS, len(values))):
        options = best[:-1, None] + padded
        cuts.append(options.argmin(0))
        best = options.min(0)
        total.append(best[-1] + cost * (len(cuts) + 1))
    number = int(np.argmin(total))
    if total[number] > (1 - LEAST_GAIN) * total[0]:
        return [order]
    last, places = len(values), []
    for cut in reversed(cuts[:number]):
        last = int(cut[last])
        places.append(int(ends[last]))
    return np.split(order, places[::-1])


def pass_cost(encoder: nn.Module) -> float:
    """The cost of a pass through an encoder on a CPU, in tokens."""
    weights = [layer.weight.numel() for layer in encoder.modules() if isinstance(layer, nn.Linear)]
    return PASS_COST * len(weights) / sum(weights) if weights else float("inf")
