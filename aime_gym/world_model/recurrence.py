"""Networks that are evaluated once a time step, without paying at every step for what can be done once.

Four things are taken out of the loop: the part of a first layer that acts on inputs known beforehand, the cast of
weights to the precision of autocast, the gradients of weights, which are one product over all steps, and autograd's
own work: a step is one node of its graph, with a derivative that is written out. `tests/test_world_model.py` compares
these with autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Norm(NamedTuple):
    """A LayerNorm of each of some equal parts."""

    scale: Tensor
    shift: Tensor
    parts: int
    eps: float


class Layer(NamedTuple):
    """One layer of an MLP as tensors."""

    weight: Tensor
    bias: Tensor
    norm: Norm | None = None
    activation: nn.Module | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (self.weight, self.bias, *(self.norm[:2] if self.norm else ()))


def layers_of(net: nn.Sequential) -> list[Layer]:
    """The layers of an MLP's `net`."""
    layers: list[Layer] = []
    for module in net:
        if isinstance(module, nn.Linear):
            layers.append(Layer(module.weight, module.bias))
        elif isinstance(module, nn.LayerNorm):
            layers[-1] = layers[-1]._replace(norm=Norm(module.weight, module.bias, 1, module.eps))
        else:
            layers[-1] = layers[-1]._replace(activation=module)
    return layers


def side_by_side(first: nn.Sequential, second: nn.Sequential) -> list[Layer]:
    """Two MLPs of the same sizes on the same input as one, whose output is both outputs concatenated."""
    layers = []
    for index, (a, b) in enumerate(zip(layers_of(first), layers_of(second), strict=True)):
        weight = torch.block_diag(a.weight, b.weight) if index else torch.cat([a.weight, b.weight])
        norm = None
        if a.norm and b.norm:
            norm = Norm(torch.cat([a.norm.scale, b.norm.scale]), torch.cat([a.norm.shift, b.norm.shift]), 2, a.norm.eps)
        layers.append(Layer(weight, torch.cat([a.bias, b.bias]), norm, a.activation))
    return layers


class LoopedMLP:
    """An MLP on `concat(x, k)` that is evaluated once a time step, where x recurs and k may be known for all steps.

    Args:
        layers: What to compute.
        known: k, [T, B, K]; None if there is no k, or if each call brings its own.
        recurrent_dim: The size of x.
        steps: T
        batch: B
        dtype: Type of the products' operands; everything else is that of the weights, float32.
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
        first, *rest = layers
        sizes = steps, batch, dtype
        self._layers = [_LoopedLayer(first, known, recurrent_dim, *sizes)]
        self._layers += [_LoopedLayer(layer, None, layer.weight.shape[1], *sizes) for layer in rest]
        self.handles = [layer.handle for layer in self._layers]

    def __call__(self, t: int, x: Tensor, own: Tensor | None = None) -> Tensor:
        """Step t, at most once for each: [B, recurrent_dim], and k [B, K] if it was not known -> [B, out_dim]."""
        return _Step.apply(self, t, len(self.handles), *self.handles, x, own)

    def forward(self, t: int, x: Tensor, own: Tensor | None = None) -> Tensor:
        """What a call computes, without a graph."""
        for layer in self._layers:
            x, own = layer.forward(t, x, own), None
        return x

    def backward(self, t: int, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of x, and of k if step t brought its own."""
        to_own = None
        for layer in reversed(self._layers):
            gradient, to_own = layer.backward(t, gradient)
        return gradient, to_own


class LoopedGRU:
    """A GRU's step (Cho et al., EMNLP 2014), and what an MLP says of its new memory.

    Args:
        from_input: From the latent, and the action, to the gates [B, 3 M].
        from_memory: From the memory to the gates [B, 3 M].
        estimator: From the new memory to the output.
    """

    def __init__(self, from_input: LoopedMLP, from_memory: LoopedMLP, estimator: LoopedMLP):
        self._input, self._memory, self._estimator = from_input, from_memory, estimator
        self.handles = [*from_input.handles, *from_memory.handles, *estimator.handles]
        self._differentiable = torch.is_grad_enabled()
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def __call__(self, t: int, latent: Tensor, own: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Step t: latent [B, S], action [B, A] if it was not known, and memory [B, M] -> next memory and output."""
        return _Step.apply(self, t, len(self.handles), *self.handles, latent, own, memory)

    def forward(self, t: int, latent: Tensor, own: Tensor | None, memory: Tensor) -> tuple[Tensor, Tensor]:
        """What a call computes, without a graph."""
        size = memory.shape[-1]
        input_gates, memory_gates = self._input.forward(t, latent, own), self._memory.forward(t, memory)
        gates = torch.add(input_gates[:, : 2 * size], memory_gates[:, : 2 * size]).sigmoid_()
        reset, update = gates[:, :size], gates[:, size:]
        proposal = memory_gates[:, 2 * size :]
        candidate = torch.addcmul(input_gates[:, 2 * size :], reset, proposal)
        candidate.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0)  # tanh, in half of the time of torch's
        if self._differentiable:
            self._kept[t] = gates, proposal, candidate, memory.detach()
        following = torch.lerp(candidate, memory, update)
        return following, self._estimator.forward(t, following)

    def backward(self, t: int, to_memory: Tensor, to_output: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The gradients of latent, action and memory."""
        gates, proposal, candidate, memory = self._kept[t]
        gradient = self._estimator.backward(t, to_output)[0].add_(to_memory)
        size = memory.shape[-1]
        reset, update = gates[:, :size], gates[:, size:]
        through = gradient * update
        input_gates = gradient.new_empty(len(gradient), 3 * size)
        inner = input_gates[:, 2 * size :]
        torch.ops.aten.tanh_backward.grad_input(gradient - through, candidate, grad_input=inner)
        torch.mul(inner, proposal, out=input_gates[:, :size])
        torch.sub(memory, candidate, out=input_gates[:, size : 2 * size]).mul_(gradient)
        both = input_gates[:, : 2 * size]
        both.copy_(torch.ops.aten.sigmoid_backward(both, gates))
        memory_gates = input_gates.clone()
        memory_gates[:, 2 * size :].mul_(reset)
        to_latent, to_own = self._input.backward(t, input_gates)
        return to_latent, to_own, through.add_(self._memory.backward(t, memory_gates)[0])


class _LoopedLayer:
    """One layer of a `LoopedMLP`, for whose arguments see there.

    It keeps what its derivative needs: by steps, and for the weights' gradients, if they are wanted, all inputs and
    gradients of outputs side by side [T, B, ...]. Nothing that it keeps has a graph, which would keep it in return.
    """

    def __init__(
        self, layer: Layer, known: Tensor | None, recurrent_dim: int, steps: int, batch: int, dtype: torch.dtype
    ):
        weight = layer.weight
        self.layer, self.recurrent_dim, self.dtype = layer, recurrent_dim, dtype
        differentiable = torch.is_grad_enabled()
        wanted = differentiable and any(
            tensor is not None and tensor.requires_grad for tensor in (known, *layer.parameters)
        )
        self.inputs = weight.new_empty(steps, batch, recurrent_dim, dtype=dtype) if wanted else None
        self.gradients = weight.new_zeros(steps, batch, len(weight), dtype=dtype) if wanted else None
        self.kept: dict[int, tuple[Tensor, ...]] | None = {} if differentiable else None
        self.own: dict[int, Tensor] = {}
        self.scaled: dict[int, Tensor] = {}  # by steps, the gradients of what the norm gives
        self.weight = self.offset = weight  # set by `_Prepare`
        self.handle = _Prepare.apply(self, known, *layer.parameters)

    def forward(self, t: int, x: Tensor, own: Tensor | None) -> Tensor:
        """Step t: [B, in], and k [B, K] if it was not known -> [B, out]."""
        low = x.to(self.dtype) if self.inputs is None else self.inputs[t].copy_(x)
        offset = self.offset if self.offset.ndim == 1 else self.offset[t]
        y = torch.addmm(offset, low, self.weight).to(self.layer.weight.dtype)
        if own is not None:
            self.own[t] = own.detach()
            y.addmm_(own, self.layer.weight[:, self.recurrent_dim :].t())
        kept: tuple[Tensor, ...] = ()
        norm = self.layer.norm
        if norm is not None:
            parts = y.view(len(y), norm.parts, -1)
            scale, shift = (norm.scale, norm.shift) if norm.parts == 1 else (None, None)
            y, *moments = torch.native_layer_norm(parts, parts.shape[2:], scale, shift, norm.eps)
            y = y.flatten(1) if norm.parts == 1 else torch.addcmul(norm.shift, y.flatten(1), norm.scale)
            kept = (parts, *moments)
        if self.layer.activation is not None:
            kept, y = (*kept, y), self.layer.activation(y)
        if self.kept is not None:
            self.kept[t] = kept
        return y

    def backward(self, t: int, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of x, and of k if step t brought its own; notes that of the output."""
        if self.kept is None:
            raise RuntimeError("The gradients of a recurrence can be computed once.")
        kept, norm = self.kept[t], self.layer.norm
        if self.layer.activation is not None:
            gradient = _slope(self.layer.activation, gradient, kept[-1])
        if norm is not None:
            parts, *moments = kept[:3]
            if self.gradients is not None:
                self.scaled[t] = gradient
            scale = norm.scale if norm.parts == 1 else None
            through = (gradient if norm.parts == 1 else gradient * norm.scale).view_as(parts)
            through, *_ = torch.ops.aten.native_layer_norm_backward(
                through, parts, parts.shape[2:], *moments, scale, None, [True, False, False]
            )
            gradient = through.flatten(1)
        low = gradient.to(self.dtype) if self.gradients is None else self.gradients[t].copy_(gradient)
        to_own = gradient @ self.layer.weight[:, self.recurrent_dim :] if t in self.own else None
        return (low @ self.weight.t()).to(gradient.dtype), to_own

    def gradients_of_norm(self) -> tuple[Tensor, ...]:
        """The gradients of the scale and the shift, if there is a norm."""
        norm, kept = self.layer.norm, self.kept
        if norm is None or kept is None:
            return ()
        steps = list(self.scaled)
        gradients = torch.cat([self.scaled[t] for t in steps])
        parts, means, deviations = (torch.cat([kept[t][i] for t in steps]) for i in range(3))
        normed = parts.sub_(means).mul_(deviations).flatten(1)
        return normed.mul_(gradients).sum(0), gradients.sum(0)


class _Prepare(torch.autograd.Function):
    """Computes what is the same at all steps; its backward comes last and computes the gradients of weights."""

    @staticmethod
    def forward(ctx: Any, loop: _LoopedLayer, known: Tensor | None, weight: Tensor, bias: Tensor, *_: Tensor) -> Tensor:
        low = weight.to(loop.dtype)
        loop.weight, loop.offset = low[:, : loop.recurrent_dim].t().contiguous(), bias.to(loop.dtype)
        if known is not None:
            known = known.to(loop.dtype)
            loop.offset = F.linear(known, low[:, loop.recurrent_dim :], loop.offset)
        ctx.save_for_backward(low, known)
        ctx.loop = loop
        return weight.new_empty(0)  # a handle: no number, but an edge of the graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple:
        loop: _LoopedLayer = ctx.loop
        if loop.inputs is None or loop.gradients is None or loop.kept is None:
            raise RuntimeError("The gradients of a recurrence can be computed once.")
        low, known = ctx.saved_tensors
        dtype = loop.layer.weight.dtype
        gradients = loop.gradients.flatten(0, 1)
        weight = gradients.t() @ loop.inputs.flatten(0, 1)
        known_gradient = None
        if known is not None:
            weight = torch.cat([weight, gradients.t() @ known.flatten(0, 1)], dim=1)
            if ctx.needs_input_grad[1]:
                known_gradient = (gradients @ low[:, loop.recurrent_dim :]).view(*known.shape[:2], -1).to(dtype)
        elif loop.own:
            own = torch.stack([loop.own[t] for t in range(len(loop.gradients))]).flatten(0, 1).to(loop.dtype)
            weight = torch.cat([weight, gradients.t() @ own], dim=1)
        bias = gradients.sum(0, dtype=dtype)
        norm = loop.gradients_of_norm()
        loop.inputs = loop.gradients = loop.kept = None
        return None, known_gradient, weight.to(dtype), bias, *norm


class _Step(torch.autograd.Function):
    """One step of a `LoopedMLP` or `LoopedGRU`, after the handles of all its layers."""

    @staticmethod
    def forward(ctx: Any, part: Any, t: int, handles: int, *inputs: Any) -> Any:
        ctx.part, ctx.t, ctx.handles = part, t, handles
        return part.forward(t, *inputs[handles:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        return None, None, None, *[None] * ctx.handles, *ctx.part.backward(ctx.t, *gradients)


def _slope(activation: nn.Module, gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of an activation's input x from that of its output."""
    if isinstance(activation, nn.SiLU):
        return torch.ops.aten.silu_backward(gradient, x)
    if isinstance(activation, nn.ELU):
        return torch.ops.aten.elu_backward(gradient, activation.alpha, 1, 1, False, x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(activation(x), x, gradient)[0]
