"""Faster dropout for CPUs, where the masks of torch's dropout take a sixth of a small encoder's training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 2**16  # values of a 16-bit draw; each 64-bit random number yields four draws


class DropoutFunction(torch.autograd.Function):
    """Forward and backward of `CheapDropout`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_dropped: int) -> Tensor:
        numbers = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        draws = numbers.view(torch.int16)[: x.numel()].view(x.shape)
        scale = (draws >= num_dropped - LEVELS // 2).to(x.dtype).mul_(LEVELS / (LEVELS - num_dropped))
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


class CheapDropout(nn.Dropout):
    """`nn.Dropout` with faster masks on CPUs, where p is rounded to a multiple of 2^-16: 0.1 becomes 0.100006."""

    def forward(self, x: Tensor) -> Tensor:
        num_dropped = round(self.p * LEVELS)
        if not self.training or x.device.type != "cpu" or not 0 < num_dropped < LEVELS:
            return super().forward(x)
        return DropoutFunction.apply(x, num_dropped)


def replace_dropout(module: nn.Module) -> None:
    """Replace every `nn.Dropout` inside a module with `CheapDropout`. Saved weights are not affected."""
    for child in module.modules():
        for name, part in child.named_children():
            if type(part) is nn.Dropout:
                setattr(child, name, CheapDropout(part.p).train(part.training))
