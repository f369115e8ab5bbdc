"""Many small networks of one shape, computed together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StackedMLP(nn.Module):
    """`count` independent networks with SiLU between their layers.

    Args:
        count: Networks G.
        sizes: Inputs, hidden units, outputs.
        generator: Draws the weights, as `torch.nn.Linear` does.
    """

    def __init__(self, count: int, sizes: Sequence[int], generator: torch.Generator):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(sizes):
            for target, shape in ((self.weights, (inputs, outputs)), (self.biases, (1, outputs))):
                draw = torch.rand((count, *shape), generator=generator)
                target.append(nn.Parameter((2 * draw - 1) / inputs**0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [G, B, outputs] of inputs [G, B, inputs]."""
        last = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = x if index == last else F.silu(x)
        return x
