"""How networks compute fast: in which precision, and packed, in as few operations as can be.

Networks that are trained share the product of their first layers where rows are few (`evaluate_together`). Networks
that act and are of equal architecture share one batched product a layer. `FastDynamics` is made of these;
`aime_gym.world_model.model` says why. Weights are buffers there, and copies: nothing is trained, and later changes of
the networks do not reach them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, reduce, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from aime_gym.errors import unknown_name

PAYS = 1.2
"""From how many times the speed of float32 on bfloat16 is taken for its precision."""

MANY_ROWS = 256
"""Rows of a product from which bfloat16 can pay. With fewer, what surrounds a product takes as long as it, and which
precision is faster depends on the moment; what learns from the steps must not."""


@cache
def bf16_speedup(rows: int = MANY_ROWS, size: int = 256, repeats: int = 9) -> float:
    """How many times as fast as in float32 this CPU multiplies in bfloat16: measured once, in some milliseconds.

    The fastest of several runs in turns count, which other work on the machine hardly changes. Where the CPU has no
    instructions for bfloat16 (AMX, AVX-512 BF16), it is emulated and many times slower.
    """
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    with torch.no_grad():
        pairs = {dtype: (torch.ones(rows, size, dtype=dtype), torch.ones(size, size, dtype=dtype)) for dtype in seconds}
        for _ in range(repeats):
            for dtype, (inputs, weight) in pairs.items():
                begin = time.perf_counter()
                functional.linear(inputs, weight)
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - begin)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def bf16_is_fast() -> bool:
    """Whether the CPU multiplies bfloat16 matrices clearly faster than float32 ones."""
    return bf16_speedup() >= PAYS


PRECISIONS = ("auto", "32-true", "bf16-mixed")


def resolve_precision(precision: str, accelerator: str) -> str:
    """Turns ``"auto"`` into Fabric's ``"bf16-mixed"`` where the hardware has it and ``"32-true"`` elsewhere.

    Args:
        precision: One of `PRECISIONS`.
        accelerator: The kind of device, ``"cpu"`` or ``"cuda"``.

    Raises:
        AimeGymError: If the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    fast = bf16_is_fast() if accelerator == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if fast else "32-true"


_DEVICES = ("cpu", "cuda")

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast() -> Callable[[_Function], _Function]:
    """A decorator: the function runs without its caller's `torch.autocast`."""

    def decorate(function: _Function) -> _Function:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
                return function(*args, **kwargs)
            mixed = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
            with ExitStack() as stack:
                for device in mixed:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate


SEPARATE = 512
"""Rows from which networks on one input are faster one by one: their products are large enough, and nothing is cut."""


def evaluate_together(heads: Mapping[str, nn.Module], x: Tensor) -> dict[str, Any]:
    """The heads' distributions on one input; with few rows the first layers of all their MLPs are one product.

    Args:
        heads: `TabularHead` or a decoder of images by name.
        x: [..., in_dim]
    """
    parts: dict[str, Sequence[Any]] = {name: getattr(head, "networks", ()) for name, head in heads.items()}
    outputs = iter(together([network for networks in parts.values() for network in networks], x))
    every: dict[str, Any] = dict(heads)
    return {
        name: head.distribution(*(next(outputs) for _ in parts[name])) if parts[name] else head(x)
        for name, head in every.items()
    }


def together(networks: Sequence[Any], x: Tensor) -> list[Tensor]:
    """The outputs of MLPs on one input, with one product for all first layers, unless there are many rows."""
    if not networks:
        return []
    if x.shape[:-1].numel() >= SEPARATE:
        return [network.net(x) for network in networks]
    layers = [list(network.net) for network in networks]
    first = [own[0] for own in layers if isinstance(own[0], nn.Linear)]
    weight, bias = torch.cat([layer.weight for layer in first]), torch.cat([layer.bias for layer in first])
    parts = functional.linear(x, weight, bias).split([len(layer.weight) for layer in first], dim=-1)
    return [reduce(lambda y, layer: layer(y), own[1:], part) for own, part in zip(layers, parts, strict=True)]


Network = Any
"""An `nn.Sequential` of Linear, LayerNorm and activations, with a Linear last."""
Units = tuple[Tensor, Tensor] | None
"""Mean and standard deviation [O] that turn a network's output into its own units."""


class SideBySide(nn.Module):
    """Several MLPs of one input, their outputs side by side in their own units.

    Args:
        networks: The networks.
        units: The units of each network's output.
        pack: Whether those of equal architecture share one batched product a layer.
        dtype: Type of the products' operands.
        device: Where to run.
    """

    order: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        networks: list[Network],
        units: list[Units],
        pack: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__()
        groups: dict[Any, list[int]] = {}
        for i, network in enumerate(networks):
            groups.setdefault(str(network[:-1]) if pack else i, []).append(i)
        self._groups = nn.ModuleList(
            _Packed([networks[i] for i in members], dtype, device) for members in groups.values()
        )
        dims = [network[-1].out_features for network in networks]
        columns = torch.arange(sum(dims)).split(dims)
        order = torch.cat([columns[i] for members in groups.values() for i in members]).argsort()
        self._sorted = order.equal(torch.arange(sum(dims)))
        self.register_buffer("order", order.to(device))

        # The last biases and the units stay float32: in bfloat16 they would lose most.
        own = [unit or (torch.zeros(dim), torch.ones(dim)) for unit, dim in zip(units, dims, strict=True)]
        mean, std = (torch.cat([unit[i].detach().to(device) for unit in own]) for i in (0, 1))
        bias = torch.cat([network[-1].bias.detach().to(device) for network in networks])
        self.register_buffer("scale", std)
        self.register_buffer("shift", bias * std + mean)

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, I] in the operands' type -> [N, sum of O] float32."""
        outputs = [group(inputs) for group in self._groups]
        merged = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        if not self._sorted:
            merged = merged.index_select(1, self.order)
        return torch.addcmul(self.shift, merged.float(), self.scale)


class _Packed(nn.Module):
    """G networks of one architecture, but for the sizes of their outputs, without their last biases."""

    weight: Tensor
    real: Tensor

    def __init__(self, networks: list[Network], dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self._size = len(networks)
        self._hidden = hidden_layers([network[:-1] for network in networks], dtype, device)
        lasts = [network[-1] for network in networks]
        dims = [last.out_features for last in lasts]
        padded = [functional.pad(last.weight.T, (0, max(dims) - last.out_features)) for last in lasts]
        self.register_buffer("weight", torch.stack(padded).detach().to(device, dtype))  # [G, H, widest O]
        real = [i * max(dims) + column for i, dim in enumerate(dims) for column in range(dim)]
        self.register_buffer("real", torch.tensor(real, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, I] -> [N, sum of O]."""
        if self._size == 1:
            return torch.mm(self._hidden(inputs), self.weight[0])
        outputs = torch.bmm(self._hidden(inputs.expand(self._size, *inputs.shape)), self.weight)  # [G, N, widest O]
        return outputs.transpose(0, 1).flatten(1).index_select(1, self.real)


def hidden_layers(networks: list[Network], dtype: torch.dtype, device: torch.device | str) -> nn.Sequential:
    """The hidden layers of G networks of one architecture: [G, N, I] -> [G, N, H], or [N, I] -> [N, H] of one."""

    def place(tensors: list[Tensor]) -> Tensor:
        stacked = torch.stack([tensor.detach().to(device, dtype) for tensor in tensors])
        return stacked if len(networks) > 1 else stacked[0]

    layers: list[nn.Module] = []
    for modules in zip(*networks, strict=True):
        kind = modules[0]
        if isinstance(kind, nn.Linear):
            weight = place([module.weight.T if len(networks) > 1 else module.weight for module in modules])
            bias = place([module.bias[None] if len(networks) > 1 else module.bias for module in modules])
            layers.append(Linear(weight, bias))
        elif isinstance(kind, nn.LayerNorm):
            scale, shift = (
                place([part[None] if len(networks) > 1 else part for part in parts])
                for parts in zip(*((module.weight, module.bias) for module in modules), strict=True)
            )
            layers.append(LayerNorm(list(kind.normalized_shape), scale, shift, kind.eps))
        else:
            layers.append(in_place(kind))
    return nn.Sequential(*layers)


def ensemble_layers(
    weights: Iterable[Tensor], biases: Iterable[Tensor], dtype: torch.dtype, device: torch.device | str
) -> nn.Sequential:
    """An ensemble with norms without parameters, from its weights [K, I, O] and biases [K, 1, O] a layer."""
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases, strict=True):
        if layers:
            layers += [nn.LayerNorm(weight.shape[1], elementwise_affine=False), nn.SiLU(inplace=True)]
        layers.append(Linear(*(tensor.detach().to(device, dtype, copy=True) for tensor in (weight, bias))))
    return nn.Sequential(*layers)


class Linear(nn.Module):
    """One layer [N, I] -> [N, O], or a batch of G side by side, whose weights are transposed."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, I] -> [N, O], or [G, N, I] -> [G, N, O]."""
        if self.weight.ndim == 2:
            return functional.linear(hidden, self.weight, self.bias)
        return torch.baddbmm(self.bias, hidden, self.weight)


class LayerNorm(nn.Module):
    """Layer norm of one network or, with a scale and a shift each, of G side by side."""

    scale: Tensor
    shift: Tensor

    def __init__(self, size: list[int], scale: Tensor, shift: Tensor, eps: float):
        super().__init__()
        self._size, self._eps = size, eps
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, H], or [G, N, H] -> [G, N, H]."""
        if self.scale.ndim == 1:
            return torch.layer_norm(hidden, self._size, self.scale, self.shift, self._eps)
        return torch.addcmul(self.shift, torch.layer_norm(hidden, self._size, None, None, self._eps), self.scale)


def in_place(activation: nn.Module) -> nn.Module:
    """The same activation, writing over what it is given, where it can."""
    if isinstance(activation, nn.SiLU):
        return nn.SiLU(inplace=True)
    if isinstance(activation, nn.ELU):
        return nn.ELU(activation.alpha, inplace=True)
    if isinstance(activation, nn.ReLU):
        return nn.ReLU(inplace=True)
    return activation
