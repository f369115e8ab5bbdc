"""One step of the prior, and the decoded means and reward of a latent, as cheap as inference can be.

An env steps a model one latent a slot at a time. With few slots the overhead of each operation dominates, so networks
of equal architecture run as one batched product a layer. With many slots arithmetic dominates, so the products run in
bfloat16 where the CPU is fast at it, while the state stays float32. Standard deviations of decoders, which nobody
asks for, are never computed.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aime_gym.errors import unknown_name
from aime_gym.world_model.cells import RSSM, RSSMO
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.precision import bf16_is_fast

PRECISIONS = ("auto", "32-true", "bf16")
BIG_BATCH = 64
"""Slots from which arithmetic dominates."""

Network = Any
"""An `nn.Sequential` of Linear, LayerNorm and activations, with a Linear last."""
Units = tuple[Tensor, Tensor] | None
"""Mean and standard deviation [O] that turn a network's output into its own units."""


def choose_dtype(precision: str, batch: int, device: torch.device | str = "cpu") -> torch.dtype:
    """The type of the products' operands.

    Args:
        precision: ``"32-true"``, ``"bf16"``, or ``"auto"``: bf16 for big batches on CPUs that are fast at it.
        batch: Number of slots, N.
        device: Where they run.

    Raises:
        AimeGymError: If the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    pays = batch >= BIG_BATCH and torch.device(device).type == "cpu" and bf16_is_fast()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and pays) else torch.float32


_traces: dict[Any, Any] = {}
"""Steps as TorchScript, by all that decides their operations. PyTorch never frees what it has traced: weights are
inputs of a trace, so that all dreams of one architecture and precision share it."""


class FastDynamics(nn.Module):
    """`WorldModel.prior_step`, `WorldModel.decode` and the heads for inference on states [N, F] in float32.

    It holds copies of the weights: later changes of the model do not reach it. Call it under `torch.inference_mode`.

    Args:
        model: The model.
        names: Tabular outputs or probes to decode, in this order.
        task: The reward is that of this task's head; None takes the model's own reward decoder.
        batch: N, about; networks run side by side if it is small.
        dtype: Of the products' operands.
        device: Where to run.

    Raises:
        AimeGymError: If there is no such task.
    """

    def __init__(
        self,
        model: WorldModel,
        names: Sequence[str],
        task: str | None,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        config, cell, heads = model.config, model.cell, model.heads
        self._memory_dim, self.dtype = config.memory_dim, dtype
        self._std = cell.std  # no module, but a function of numbers

        def place(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype, copy=True)

        def run(networks: list[Network], units: list[Units]) -> _SideBySide:
            return _SideBySide(networks, units, batch < BIG_BATCH, dtype, device)

        if isinstance(cell, RSSMO):
            self._memory_input: Any = _hidden([cell.pre_memory.net], dtype, device)
            self._prior = run([cell.prior_net.net], [None])
        else:
            assert isinstance(cell, RSSM)
            self._memory_input = None
            self._prior = run([cell.prior_mean.net, cell.prior_std.net], [None, None])
        gru, rows = cell.memory_cell, 2 * self._memory_dim  # first the reset and update gates, then the candidate
        gates = torch.cat([gru.weight_ih[:rows], gru.weight_hh[:rows]], 1)
        self._gates = _Linear(place(gates), place(gru.bias_ih[:rows] + gru.bias_hh[:rows]))
        self._candidate_input = _Linear(place(gru.weight_ih[rows:]), place(gru.bias_ih[rows:]))
        self._candidate_memory = _Linear(place(gru.weight_hh[rows:]), place(gru.bias_hh[rows:]))

        networks = [_mean_network(model, name) for name in names]
        units = [_units(model, name) for name in names]
        self._reward_limits: tuple[float, float] | None = None
        self.terminates = heads is not None and heads.termination is not None
        if heads is not None and heads.termination is not None:
            networks.append(heads.termination)
            units.append(None)
        if task is None:
            networks.append(_mean_network(model, "reward"))
            units.append(None)
        else:
            if heads is None or task not in heads.tasks:
                raise unknown_name("task of this model's heads", task, heads.tasks if heads else ())
            i = heads.tasks.index(task)
            networks.append(heads.rewards[task])
            units.append((heads.reward_mean[i : i + 1], heads.reward_std[i : i + 1]))
            self._reward_limits = heads.reward_limits
        self._decoders = run(networks, units)
        self._weights = [(module, name) for module in self.modules() for name in module._buffers]
        self._operations: str | None = None
        if batch < BIG_BATCH:
            parts = (config, *networks, self._reward_limits, *map(_kind, self._own_weights()))
            self._operations = sys.intern(repr(parts))  # which is compared with others by its address
        ensemble = None if heads is None else heads.ensemble
        self._ensemble = None if ensemble is None else copy.deepcopy(ensemble).to(device, dtype)

    def advance(self, state: Tensor, actions: Tensor, noise: Tensor | None = None) -> Tensor:
        """One step of the prior.

        Args:
            state: [N, F] float32
            actions: [N, A] float32
            noise: Standard-normal [N, S] float32, or None for the mean.

        Returns:
            The next state, [N, F] float32.
        """
        memory, latent = state[:, : self._memory_dim], state[:, self._memory_dim :]
        inputs = torch.cat([latent, actions], 1).to(self.dtype)
        if self._memory_input is not None:
            inputs = self._memory_input(inputs)
        old = memory.to(self.dtype)
        gates = self._gates(torch.cat([inputs, old], 1)).sigmoid_()  # [N, 2 M]
        reset, update = gates[:, : self._memory_dim], gates[:, self._memory_dim :]
        candidate = self._candidate_input(inputs)
        candidate = candidate.addcmul_(reset, self._candidate_memory(old)).float()
        candidate.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0)  # tanh, in a quarter of the time of torch's

        following = torch.empty_like(state)
        memory = torch.sub(memory, candidate, out=following[:, : self._memory_dim]).mul_(update).add_(candidate)
        mean, raw = self._prior(memory.to(self.dtype)).chunk(2, 1)
        latent = following[:, self._memory_dim :].copy_(mean)
        if noise is not None:
            latent.addcmul_(noise, self._std(raw))
        return following

    def decode(self, state: Tensor) -> Tensor:
        """Means of the names in their own units, then if it `terminates` the logit of that, last the reward.

        [N, F] -> [N, D + 1] or [N, D + 2] float32.
        """
        means = self._decoders(state.to(self.dtype))
        if self._reward_limits is not None:
            means[:, -1].clamp_(*self._reward_limits)
        return means

    def step(self, state: Tensor, actions: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`advance`, and `decode` of where it leads; arguments and results as theirs.

        For few slots it is traced at the first call: Python would take longer than the arithmetic.
        """
        if self._operations is None:
            return self._step(state, actions, noise)
        weights: list[Any] = self._own_weights()
        inputs = (state, actions, *weights) if noise is None else (state, actions, noise, *weights)
        key = (self._operations, *map(_kind, inputs[: -len(weights)]))
        if key not in _traces:
            with warnings.catch_warnings():
                # Deprecated in favour of torch.compile, which needs a C++ compiler on the user's machine.
                warnings.simplefilter("ignore", DeprecationWarning)
                _traces[key] = torch.jit.trace(lambda *all: self._step_with(*all), inputs, check_trace=False)
        return _traces[key](*inputs)

    def _step(self, state: Tensor, actions: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        following = self.advance(state, actions, noise)
        return following, self.decode(following)

    def _step_with(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """`_step` with the weights that end the inputs."""
        inputs, weights = inputs[: -len(self._weights)], inputs[-len(self._weights) :]
        own = self._own_weights()
        try:
            self._put(weights)
            return self._step(*inputs)
        finally:
            self._put(own)

    def _own_weights(self) -> list[Tensor | None]:
        return [module._buffers[name] for module, name in self._weights]

    def _put(self, weights: Sequence[Tensor | None]) -> None:
        for (module, name), weight in zip(self._weights, weights, strict=True):
            module._buffers[name] = weight

    def disagreement(self, state: Tensor, actions: Tensor) -> Tensor:
        """`Heads.disagreement` about the step that `actions` [N, A] take from `state` [N, F]: [N] float32."""
        assert self._ensemble is not None
        predicted = self._ensemble(torch.cat([state, actions], 1).to(self.dtype))  # [K, N, D]
        return predicted.float().std(0, correction=0).mean(1)


class _SideBySide(nn.Module):
    """Several MLPs of one input, their outputs side by side in their own units.

    Args:
        networks: The networks.
        units: Of each.
        pack: Whether those of equal architecture share one batched product a layer.
        dtype: Of the products' operands.
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
        self._hidden = _hidden([network[:-1] for network in networks], dtype, device)
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


def _hidden(networks: list[Network], dtype: torch.dtype, device: torch.device | str) -> nn.Sequential:
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
            layers.append(_Linear(weight, bias))
        elif isinstance(kind, nn.LayerNorm):
            scale, shift = (
                place([part[None] if len(networks) > 1 else part for part in parts])
                for parts in zip(*((module.weight, module.bias) for module in modules), strict=True)
            )
            layers.append(_LayerNorm(list(kind.normalized_shape), scale, shift, kind.eps))
        else:
            layers.append(_in_place(kind))
    return nn.Sequential(*layers)


class _Linear(nn.Module):
    """One layer [N, I] -> [N, O], or a batch of G side by side, whose weights are transposed."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.weight.ndim == 2:
            return functional.linear(hidden, self.weight, self.bias)
        return torch.baddbmm(self.bias, hidden, self.weight)


class _LayerNorm(nn.Module):
    """Layer norm of one network or, with a scale and a shift each, of G side by side."""

    scale: Tensor
    shift: Tensor

    def __init__(self, size: list[int], scale: Tensor, shift: Tensor, eps: float):
        super().__init__()
        self._size, self._eps = size, eps
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.scale.ndim == 1:
            return torch.layer_norm(hidden, self._size, self.scale, self.shift, self._eps)
        return torch.addcmul(self.shift, torch.layer_norm(hidden, self._size, None, None, self._eps), self.scale)


def _in_place(activation: nn.Module) -> nn.Module:
    if isinstance(activation, nn.SiLU):
        return nn.SiLU(inplace=True)
    if isinstance(activation, nn.ELU):
        return nn.ELU(activation.alpha, inplace=True)
    return activation


def _kind(tensor: Tensor | None) -> Any:
    """What a trace takes for granted about its inputs."""
    return tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _mean_network(model: WorldModel, name: str) -> Network:
    """The network that gives the mean of a tabular decoder or probe."""
    decoder: Any = (model.decoders if name in model.decoders else model.probes)[name]
    return (decoder.mu_net if hasattr(decoder, "mu_net") else decoder.net).net


def _units(model: WorldModel, name: str) -> Units:
    """Those of a sensor that the model standardises."""
    if name not in model.normaliser:
        return None
    standardiser: Any = model.normaliser[name]
    return standardiser.mean, standardiser.std
