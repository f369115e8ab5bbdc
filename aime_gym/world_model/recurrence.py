"""Layers at one time step after another, without paying at every step for what can be done once.

Autograd takes longer to keep books of many small operations than they take. Here each thing knows how to go forwards
one step and, from the last step on, how to pull a gradient back; `aime_gym.world_model.cells` makes a window of them,
which is one function to autograd. `tests/test_world_model.py` compares all of it with autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_aten = torch.ops.aten

_BACK: dict[type, Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.SiLU: lambda module, gradient, x: _aten.silu_backward.default(gradient, x),
    nn.ELU: lambda module, gradient, x: _aten.elu_backward.default(gradient, module.alpha, 1.0, 1.0, False, x),
    nn.ReLU: lambda module, gradient, x: _aten.threshold_backward.default(gradient, x, 0.0),
    nn.LeakyReLU: lambda module, gradient, x: _aten.leaky_relu_backward(gradient, x, module.negative_slope, False),
    nn.GELU: lambda module, gradient, x: _aten.gelu_backward(gradient, x, approximate=module.approximate),
}
"""By an activation: from itself, the gradient of what it gives and what it got to the gradient of that."""


class Layer(NamedTuple):
    """One layer of an MLP as tensors, or those of several MLPs of equal sizes side by side.

    Attributes:
        weights: That of the layer [O, I], or one of each equal part of input and output.
        bias: [O]
        norms: One of each equal part of the output; empty for none.
        activation: What follows.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor
    norms: tuple[Any, ...] = ()
    activation: nn.Module | None = None


def layers_of(*nets: nn.Sequential) -> list[Layer]:
    """The layers of an MLP's `net`, or of several on the same input, whose outputs are concatenated."""
    layers: list[Layer] = []
    for modules in zip(*nets, strict=True):
        kind = modules[0]
        if isinstance(kind, nn.Linear):
            weights = tuple(module.weight for module in modules)
            weights = weights if layers or len(nets) == 1 else (torch.cat(weights),)
            layers.append(Layer(weights, torch.cat([module.bias for module in modules])))
        elif isinstance(kind, nn.LayerNorm):
            layers[-1] = layers[-1]._replace(norms=modules)
        else:
            layers[-1] = layers[-1]._replace(activation=kind)
    return layers


class Loop(NamedTuple):
    """How something is evaluated over time.

    Attributes:
        steps: T
        batch: B
        dtype: Type of the products' operands; everything else stays of its own.
        kept: Whether there will be gradients.
    """

    steps: int
    batch: int
    dtype: torch.dtype
    kept: bool


class LoopedLayer:
    """One layer of an MLP at one time step after another.

    Autograd takes longer to keep books of so many small operations than they take, so that what it would do is done
    here. What can be done once is out of the loop: the share of inputs that are known at all steps, the cast of weights
    and the layout that products like best, and the gradients of weights, which are one product over all steps.

    Args:
        layer: What to compute.
        loop: How.
        known: What the first weight multiplies beside its own input, [T, B, K]; None if there is nothing.
        starts: Columns of the output from which each weight's product is added; by default one after the other.

    Attributes:
        tensors: What it depends on beside its inputs.
    """

    def __init__(self, layer: Layer, loop: Loop, known: Tensor | None = None, starts: Sequence[int] | None = None):
        self._norms, self._activation, self._kept = layer.norms, layer.activation, loop.kept
        self._low, self._wide = loop.dtype, layer.bias.dtype
        self._known: Tensor | None = None
        self._back = None if layer.activation is None else _BACK[type(layer.activation)]
        affine = [part for norm in layer.norms for part in (norm.weight, norm.bias)]
        self.tensors = [*layer.weights, layer.bias, *affine, *([] if known is None else [known])]
        self._learns = loop.kept and any(tensor.requires_grad for tensor in self.tensors)
        ends = accumulate((len(weight) for weight in layer.weights), initial=0)
        self._places = [(i, i + len(weight)) for i, weight in zip(starts or ends, layer.weights)]  # noqa: B905
        with torch.no_grad():
            self._rows = [weight.to(loop.dtype) for weight in layer.weights]
            sums = layer.bias.to(loop.dtype).expand(loop.steps, loop.batch, -1)
            if loop.kept or known is not None:
                sums = sums.contiguous()
            if known is not None:
                self._known, size = known.to(loop.dtype).flatten(0, 1), self._rows[0].shape[1] - known.shape[-1]
                self._rows[0], self._beside = self._rows[0][:, :size], self._rows[0][:, size:]
                self._of(0, sums.flatten(0, 1)).addmm_(self._known, self._beside.t())
            self._columns = [rows.t().contiguous() for rows in self._rows]
            self._sums = sums.unbind()
            self._parts = [*zip(*(self._of(i, sums).unbind() for i in range(len(self._rows))), strict=True)]
        self._inputs: list[tuple[Tensor, ...]] = []
        self._moments: list[list[Any]] = []
        self._active: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._normed_gradients: list[Tensor] = []

    def _of(self, i: int, x: Tensor) -> Tensor:
        """The columns of an output that a weight adds to."""
        begin, end = self._places[i]
        return x if end - begin == x.shape[-1] else x[..., begin:end]

    def __call__(self, t: int, *inputs: Tensor) -> Tensor:
        """Step t: an input of each weight, [B, I] -> [B, O]."""
        if self._low != self._wide:
            inputs = tuple(x.to(self._low) for x in inputs)
        if self._learns:
            self._inputs.append(inputs)
        y, parts = self._sums[t], self._parts[t]
        if not self._kept:
            y = y.clone()
            parts = tuple(self._of(i, y) for i in range(len(inputs)))
        for part, x, columns in zip(parts, inputs, self._columns, strict=True):
            part.addmm_(x, columns)
        if self._low != self._wide:
            y = y.to(self._wide)
        if self._norms:
            y, moments = _normalise(y, self._norms)
            if self._kept:
                self._moments.append(moments)
        if self._activation is None:
            return y
        if self._kept:
            self._active.append(y)
        return self._activation.forward(y)

    def pull(self, t: int, gradient: Tensor, into: Sequence[Tensor | None] = (None,)) -> list[Tensor]:
        """The gradients of step t's inputs from that of the result, [B, O]; the last step is asked for first.

        Args:
            t: The step.
            gradient: [B, O]
            into: What each is added to, [B, I]; None for nothing.
        """
        if self._back is not None:
            gradient = self._back(self._activation, gradient, self._active[t])
        if self._norms:
            if self._learns:
                self._normed_gradients.append(gradient)
            x = self._sums[t] if self._low == self._wide else self._sums[t].to(self._wide)
            gradient = _normalise_back(gradient, x, self._moments[t], self._norms)
        if self._low != self._wide:
            gradient = gradient.to(self._low)
        if self._learns:
            self._gradients.append(gradient)
        results = []
        for i, rows in enumerate(self._rows):
            part, place = self._of(i, gradient), into[i] if i < len(into) else None
            if self._low == self._wide:
                results.append(part @ rows if place is None else place.addmm_(part, rows))
            else:
                result = (part @ rows).to(self._wide)
                results.append(result if place is None else place.add_(result))
        return results

    def gradients(self) -> Sequence[Tensor | None]:
        """One of each of `tensors`, where it is asked for, after all steps were pulled."""
        if not self._learns:
            return [None] * len(self.tensors)
        asked = [tensor.requires_grad for tensor in self.tensors]
        gradients = torch.cat(self._gradients[::-1])
        inputs = [torch.cat(column) for column in zip(*self._inputs, strict=True)]
        if self._known is not None:
            inputs[0] = torch.cat([inputs[0], self._known], 1)
        result = [(self._of(i, gradients).t() @ x).to(self._wide) if asked[i] else None for i, x in enumerate(inputs)]
        result.append(gradients.sum(0, dtype=self._wide))
        if self._norms:
            every = torch.cat(self._normed_gradients[::-1]), torch.cat(self._sums).to(self._wide)
            number = len(self._norms)
            for i, norm in enumerate(self._norms):
                part, x = (each.chunk(number, 1)[i] for each in every)
                moments = [torch.cat([step[i][k] for step in self._moments]) for k in (0, 1)]
                result += _norm_back(part, x, norm.normalized_shape, *moments, norm.weight, norm.bias, _AFFINE)[1:]
        if self._known is not None:
            beside = (self._of(0, gradients) @ self._beside).view(self.tensors[-1].shape) if asked[-1] else None
            result.append(None if beside is None else beside.to(self._wide))
        return result


_norm_back = _aten.native_layer_norm_backward.default
_INPUT, _AFFINE = (True, False, False), (False, True, True)  # whose gradients it is to compute


def _normalise(x: Tensor, norms: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """Equal parts of columns [B, O] by a norm each, and what its derivative needs."""
    if len(norms) == 1:
        norm = norms[0]
        x, *moments = torch.native_layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return x, [moments]
    done = [_normalise(part, [norm]) for part, norm in zip(x.chunk(len(norms), 1), norms, strict=True)]
    return torch.cat([part for part, _ in done], 1), [moments for _, (moments,) in done]


def _normalise_back(gradient: Tensor, x: Tensor, moments: Sequence[Any], norms: Sequence[Any]) -> Tensor:
    """The gradient of `_normalise`'s x."""
    if len(norms) == 1:
        norm, (mean, scale) = norms[0], moments[0]
        return _norm_back(gradient, x, norm.normalized_shape, mean, scale, norm.weight, norm.bias, _INPUT)[0]
    parts = zip(gradient.chunk(len(norms), 1), x.chunk(len(norms), 1), moments, norms, strict=True)
    return torch.cat([_normalise_back(part, own, [each], [norm]) for part, own, each, norm in parts], 1)


class LoopedMLP:
    """Layers at one time step after another, see `LoopedLayer`; k is what the first one knows."""

    def __init__(self, layers: Sequence[Layer], loop: Loop, known: Tensor | None = None):
        self.layers = [LoopedLayer(layer, loop, None if i else known) for i, layer in enumerate(layers)]
        self._numbers = [len(layer.weights) for layer in layers]

    def __call__(self, t: int, x: Tensor) -> Tensor:
        """Step t: [B, I] -> [B, O]."""
        for layer, number in zip(self.layers, self._numbers, strict=True):
            x = layer(t, x) if number == 1 else layer(t, *x.chunk(number, 1))
        return x

    def pull(self, t: int, gradient: Tensor, into: Tensor) -> None:
        """Adds to `into` the gradient of step t's x from that of the result."""
        for i in range(len(self.layers) - 1, -1, -1):
            results = self.layers[i].pull(t, gradient, () if i else (into,))
            gradient = results[0] if len(results) == 1 else torch.cat(results, 1)
        if not self.layers:
            into.add_(gradient)


class Pointwise:
    """A function of numbers one by one, at one time step after another; its slopes at all steps are computed at once.

    Args:
        function: From arrays [..., P * N], with a P of each, and what is given for their steps to one of [..., N].
        loop: How.
        given: [T, ...]
    """

    def __init__(self, function: Callable[..., Tensor], loop: Loop, given: Tensor | None = None):
        self._function, self._kept, self._given = function, loop.kept, given
        self._each = [None] * loop.steps if given is None else given.unbind()
        self._rows: list[tuple[Tensor, ...]] = []
        self._slopes: list[Sequence[Tensor]] = []

    def __call__(self, t: int, *x: Tensor) -> Tensor:
        """Step t: arrays [B, P * N] -> [B, N]."""
        if self._kept:
            self._rows.append(x)
        return self._function(*x, self._each[t])

    def pull(self, t: int, gradient: Tensor) -> list[Tensor]:
        """The gradients of step t's arrays from that of the result, [B, N]; the last step is asked for first."""
        if not self._slopes:
            with torch.inference_mode(False), torch.no_grad():
                every = [torch.stack(rows).requires_grad_() for rows in zip(*self._rows, strict=True)]
            with torch.inference_mode(False), torch.enable_grad():
                result = self._function(*every, self._given)
                slopes = torch.autograd.grad(result, every, torch.ones_like(result))
            self._slopes = [slope.unflatten(-1, (-1, result.shape[-1])).unbind() for slope in slopes]
        return [(gradient.unsqueeze(1) * slope[t]).flatten(1) for slope in self._slopes]


class Drawn(Pointwise):
    """The same for a function of an array that is none of numbers one by one: autograd is asked at every step."""

    def __call__(self, t: int, *x: Tensor) -> Tensor:
        """Step t."""
        if not self._kept:
            return self._function(*x, self._each[t])
        with torch.inference_mode(False), torch.no_grad():
            inputs = [each.clone().requires_grad_() for each in x]
        with torch.inference_mode(False), torch.enable_grad():
            result = self._function(*inputs, self._each[t])
        self._rows.append((result, *inputs))
        return result.detach()

    def pull(self, t: int, gradient: Tensor) -> list[Tensor]:
        """The gradients of step t's arrays."""
        result, *inputs = self._rows[t]
        with torch.inference_mode(False):
            return list(torch.autograd.grad(result, inputs, gradient.clone()))
