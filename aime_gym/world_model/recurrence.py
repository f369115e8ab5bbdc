"""Networks inside a loop over time, without paying at every step for what can be done once.

Three things are taken out of the loop: the part of a first layer that acts on inputs known beforehand, the cast of
weights to the precision of autocast, and the gradients of weights, which are one product over all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(NamedTuple):
    """One layer of an MLP as tensors."""

    weight: Tensor
    bias: Tensor
    norm: Sequence[nn.LayerNorm]
    """One per equal part of the output; empty for none."""
    activation: nn.Module | None

    def finish(self, x: Tensor) -> Tensor:
        """Norm and activation."""
        if len(self.norm) == 1:
            x = self.norm[0](x)
        elif self.norm:
            parts = x.chunk(len(self.norm), dim=-1)
            x = torch.cat([norm(part) for norm, part in zip(self.norm, parts, strict=True)], dim=-1)
        return x if self.activation is None else self.activation(x)


def layers_of(net: nn.Sequential) -> list[Layer]:
    """The layers of an MLP's `net`."""
    layers: list[Layer] = []
    for module in net:
        if isinstance(module, nn.Linear):
            layers.append(Layer(module.weight, module.bias, (), None))
        elif isinstance(module, nn.LayerNorm):
            layers[-1] = layers[-1]._replace(norm=(module,))
        else:
            layers[-1] = layers[-1]._replace(activation=module)
    return layers


def side_by_side(first: nn.Sequential, second: nn.Sequential) -> list[Layer]:
    """Two MLPs of the same sizes on the same input as one, whose output is both outputs concatenated."""
    layers = []
    for index, (a, b) in enumerate(zip(layers_of(first), layers_of(second), strict=True)):
        join = torch.block_diag if index else lambda *weights: torch.cat(weights)
        weight = join(a.weight, b.weight)  # type: ignore[no-untyped-call]
        layers.append(Layer(weight, torch.cat([a.bias, b.bias]), (*a.norm, *b.norm), a.activation))
    return layers


class LoopedMLP:
    """An MLP that is evaluated once a time step on an input of which a part is known for all steps.

    Args:
        layers: What to compute.
        recurrent_dim: The first entries of the input are the ones that recur; the rest is known beforehand.
        dtype: Of the matrix products; everything else is float32.
    """

    def __init__(self, layers: Sequence[Layer], recurrent_dim: int, dtype: torch.dtype):
        self.layers, self.dtype = layers, dtype
        first = layers[0].weight
        self.known_weight = first[:, recurrent_dim:]
        recurrent = [first[:, :recurrent_dim], *(layer.weight for layer in layers[1:])]
        self.products = [LoopedProduct(weight, dtype) for weight in recurrent]

    def known_part(self, known: Tensor) -> Tensor:
        """What the known inputs [..., K] contribute to the first layer: [..., H]."""
        bias = self.layers[0].bias
        return F.linear(known.to(self.dtype), self.known_weight.to(self.dtype), bias.to(self.dtype)).float()

    def __call__(self, x: Tensor, known_part: Tensor | None = None) -> Tensor:
        """[B, recurrent_dim], and the step's `known_part` [B, H] if there is one -> [B, out_dim]."""
        for index, (layer, product) in enumerate(zip(self.layers, self.products, strict=True)):
            x = layer.finish(product(x, layer.bias if index or known_part is None else known_part))
        return x


class LoopedProduct:
    """`x @ weight.T + rest`, called many times with one weight."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.calls: dict[int, tuple[Tensor, Tensor]] = {}
        self.count = 0
        weight = weight.to(dtype)
        self.tracked = weight.requires_grad and torch.is_grad_enabled()
        self.weight = _CollectGradients.apply(weight, self.calls) if self.tracked else weight

    def __call__(self, x: Tensor, rest: Tensor) -> Tensor:
        """[B, in], [B, out] or [out] -> [B, out] in float32."""
        if self.tracked:
            self.count += 1
            return _TrackedProduct.apply(x, rest, self.weight, self.calls, self.count)  # type: ignore[no-any-return]
        return _product(x, rest, self.weight)


def _product(x: Tensor, rest: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == x.dtype:
        return torch.addmm(rest, x, weight.t())
    return rest + x.to(weight.dtype) @ weight.t()


class _TrackedProduct(torch.autograd.Function):
    """The product; its backward notes what the weight's gradient is made of in place of computing it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: Tensor, weight: Tensor, calls: dict, index: int) -> Tensor:
        x_low = x.to(weight.dtype)
        ctx.save_for_backward(x_low, weight)
        ctx.calls, ctx.index, ctx.rest_ndim = calls, index, rest.ndim
        return _product(x, rest, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        low = gradient.to(weight.dtype)
        ctx.calls[ctx.index] = (x, low)
        rest = gradient if ctx.rest_ndim == gradient.ndim else gradient.sum(0)
        return (low @ weight).to(gradient.dtype), rest, None, None, None


class _CollectGradients(torch.autograd.Function):
    """The identity on a weight; runs backward after all its products, whose gradients it computes in one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, calls: dict) -> Tensor:
        ctx.calls = calls
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        inputs, gradients = zip(*ctx.calls.values(), strict=True)
        ctx.calls.clear()
        return torch.cat(gradients).t() @ torch.cat(inputs), None
