"""Networks that are evaluated once a time step, without paying at every step for what can be done once.

Three things are taken out of the loop: the part of a first layer that acts on inputs known beforehand, the cast of
weights to the precision of autocast, and the gradients of weights, which are one product over all steps. Each
function here has a derivative of its own; `tests/test_world_model.py` compares them with those of autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


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
        weight = torch.block_diag(a.weight, b.weight) if index else torch.cat([a.weight, b.weight])
        layers.append(Layer(weight, torch.cat([a.bias, b.bias]), (*a.norm, *b.norm), a.activation))
    return layers


class LoopedMLP:
    """An MLP on `concat(x, k)` that is evaluated once a time step, where x recurs and k may be known for all steps.

    Args:
        layers: What to compute.
        known: k, [T, B, K]; None if there is no k, or if each call brings its own.
        recurrent_dim: The size of x.
        steps: T
        batch: B
        dtype: Type of the products' operands; everything else is float32.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        known: Tensor | None,
        recurrent_dim: int,
        steps: int,
        batch: int,
        dtype: torch.dtype,
    ):
        self.layers = layers
        first, *rest = layers
        self.linears = [LoopedLinear(first.weight, first.bias, known, recurrent_dim, steps, batch, dtype)]
        for layer in rest:
            size = layer.weight.shape[1]
            self.linears.append(LoopedLinear(layer.weight, layer.bias, None, size, steps, batch, dtype))

    def __call__(self, t: int, x: Tensor, own: Tensor | None = None) -> Tensor:
        """Step t: [B, recurrent_dim], and k [B, K] if it was not known -> [B, out_dim]."""
        for layer, linear in zip(self.layers, self.linears, strict=True):
            x, own = layer.finish(linear(t, x, own)), None
        return x


class LoopedLinear:
    """`concat(x, k) @ weight.T + bias`, called at most once for each t; arguments as those of `LoopedMLP`.

    Attributes:
        weight: The columns for x, transposed and in the products' precision.
        offset: What k and the bias add: [T, B, out] or [out].
        inputs: The x of all steps [T, B, in], if gradients are wanted.
        gradients: The gradients of the outputs [T, B, out]; zero where there was none.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        known: Tensor | None,
        recurrent_dim: int,
        steps: int,
        batch: int,
        dtype: torch.dtype,
    ):
        self.full_weight, self.bias = weight, bias
        self.recurrent_dim, self.dtype = recurrent_dim, dtype
        self.weight = self.offset = weight  # set by `_Prepare`
        wanted = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (weight, bias, known)
        )
        self.inputs = weight.new_empty(steps, batch, recurrent_dim, dtype=dtype) if wanted else None
        self.gradients = weight.new_zeros(steps, batch, len(weight), dtype=dtype) if wanted else None
        self.handle = _Prepare.apply(weight, bias, known, self)

    def __call__(self, t: int, x: Tensor, own: Tensor | None = None) -> Tensor:
        """Step t: [B, in], and k [B, K] if it was not known -> [B, out] in float32."""
        y = _Step.apply(x, self.handle, self, t)
        if own is not None:
            y = y + own @ self.full_weight[:, self.recurrent_dim :].t()
        return y


class _Prepare(torch.autograd.Function):
    """Computes what is the same at all steps; its backward comes last and computes the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, known: Tensor | None, loop: LoopedLinear) -> Tensor:
        low = weight.to(loop.dtype)
        loop.weight, loop.offset = low[:, : loop.recurrent_dim].t().contiguous(), bias.to(loop.dtype)
        if known is not None:
            known = known.to(loop.dtype)
            loop.offset = torch.nn.functional.linear(known, low[:, loop.recurrent_dim :], loop.offset)
        ctx.save_for_backward(low, known)
        ctx.loop = loop
        return weight.new_empty(0)  # a handle: no number, but an edge of the graph

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        loop: LoopedLinear = ctx.loop
        if loop.inputs is None or loop.gradients is None:
            raise RuntimeError("The gradients of a recurrence can be computed once.")
        low, known = ctx.saved_tensors
        gradients = loop.gradients.flatten(0, 1)
        weight = gradients.t() @ loop.inputs.flatten(0, 1)
        loop.inputs = loop.gradients = None
        known_gradient = None
        if known is not None:
            weight = torch.cat([weight, gradients.t() @ known.flatten(0, 1)], dim=1)
            if ctx.needs_input_grad[2]:
                known_gradient = (gradients @ low[:, loop.recurrent_dim :]).view(*known.shape[:2], -1).float()
        elif weight.shape != low.shape:
            weight = torch.nn.functional.pad(weight, (0, low.shape[1] - weight.shape[1]))
        bias = gradients.sum(0, dtype=torch.float32)
        return weight.float(), bias, known_gradient, None


class _Step(torch.autograd.Function):
    """One product; its backward notes the gradient of the output, and computes that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: Tensor, loop: LoopedLinear, t: int) -> Tensor:
        low = x.to(loop.dtype) if loop.inputs is None else loop.inputs[t].copy_(x)
        ctx.loop, ctx.t = loop, t
        offset = loop.offset if loop.offset.ndim == 1 else loop.offset[t]
        return torch.addmm(offset, low, loop.weight).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        loop: LoopedLinear = ctx.loop
        low = gradient.to(loop.dtype) if loop.gradients is None else loop.gradients[ctx.t].copy_(gradient)
        return (low @ loop.weight.t()).float(), None, None, None


class GRU(torch.autograd.Function):
    """A GRU's new memory from the products of its weights (Cho et al., EMNLP 2014)."""

    @staticmethod
    def forward(ctx: Any, input_gates: Tensor, memory_gates: Tensor, memory: Tensor) -> Tensor:
        """[B, 3 M], [B, 3 M], [B, M] -> [B, M]."""
        size = memory.shape[-1]
        gates = torch.add(input_gates[:, : 2 * size], memory_gates[:, : 2 * size]).sigmoid_()
        reset, update = gates.chunk(2, dim=-1)
        proposal = memory_gates[:, 2 * size :]
        candidate = torch.addcmul(input_gates[:, 2 * size :], reset, proposal).tanh_()
        ctx.save_for_backward(gates, proposal, candidate, memory)
        return torch.lerp(candidate, memory, update)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        """[B, M] -> [B, 3 M], [B, 3 M], [B, M]."""
        gates, proposal, candidate, memory = ctx.saved_tensors
        size = memory.shape[-1]
        reset, update = gates.chunk(2, dim=-1)
        to_memory = gradient * update
        input_gates = gradient.new_empty(len(gradient), 3 * size)
        inner = input_gates[:, 2 * size :]
        torch.ops.aten.tanh_backward.grad_input(gradient - to_memory, candidate, grad_input=inner)
        torch.mul(inner, proposal, out=input_gates[:, :size])
        torch.sub(memory, candidate, out=input_gates[:, size : 2 * size]).mul_(gradient)
        both = input_gates[:, : 2 * size]
        both.copy_(torch.ops.aten.sigmoid_backward(both, gates))
        memory_gates = input_gates.clone()
        memory_gates[:, 2 * size :].mul_(reset)
        return input_gates, memory_gates, to_memory
