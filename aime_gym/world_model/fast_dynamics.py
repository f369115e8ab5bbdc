"""One step of the prior, and the decoded means and reward of a latent, as cheap as inference can be.

An env steps a model one latent a slot at a time. With few slots the overhead of each operation dominates, so networks
of equal architecture run as one batched product a layer. With many slots arithmetic dominates, so the products run in
bfloat16 where the CPU is fast at it, while the state stays float32. Standard deviations of decoders, which nobody
asks for, are never computed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
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


class FastDynamics:
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
        config, cell, heads = model.config, model.cell, model.heads
        self._memory_dim, self.dtype = config.memory_dim, dtype
        self._std = cell.std

        def place(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype, copy=True)

        def run(networks: list[Network], units: list[Units]) -> _SideBySide:
            return _SideBySide(networks, units, batch < BIG_BATCH, dtype, device)

        if isinstance(cell, RSSMO):
            self._memory_input: Any = _Hidden([cell.pre_memory.net], dtype, device)
            self._prior = run([cell.prior_net.net], [None])
        else:
            assert isinstance(cell, RSSM)
            self._memory_input = None
            self._prior = run([cell.prior_mean.net, cell.prior_std.net], [None, None])
        gru, rows = cell.memory_cell, 2 * self._memory_dim  # first the reset and update gates, then the candidate
        self._gates = (
            place(torch.cat([gru.weight_ih[:rows], gru.weight_hh[:rows]], 1)),
            place(gru.bias_ih[:rows] + gru.bias_hh[:rows]),
        )
        self._candidate_input = place(gru.weight_ih[rows:]), place(gru.bias_ih[rows:])
        self._candidate_memory = place(gru.weight_hh[rows:]), place(gru.bias_hh[rows:])

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
        self._traces: dict[int, Any] | None = {} if batch < BIG_BATCH else None
        self._ensemble = None if heads is None else copy.deepcopy(heads.ensemble).to(device, dtype)

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
        gates = functional.linear(torch.cat([inputs, old], 1), *self._gates).sigmoid_()  # [N, 2 M]
        reset, update = gates[:, : self._memory_dim], gates[:, self._memory_dim :]
        candidate = functional.linear(inputs, *self._candidate_input)
        candidate = candidate.addcmul_(reset, functional.linear(old, *self._candidate_memory)).float()
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
        if self._traces is None:
            following = self.advance(state, actions, noise)
            return following, self.decode(following)
        inputs = (state, actions) if noise is None else (state, actions, noise)
        if len(inputs) not in self._traces:
            with warnings.catch_warnings():
                # Deprecated in favour of torch.compile, which needs a C++ compiler on the user's machine.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._traces[len(inputs)] = torch.jit.trace(self._step, inputs, check_trace=False)
        return self._traces[len(inputs)](*inputs)

    def __getstate__(self) -> dict[str, Any]:
        """All but the traces, which cannot be copied and are made anew."""
        return self.__dict__ | {"_traces": None if self._traces is None else {}}

    def _step(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        following = self.advance(*inputs)
        return following, self.decode(following)

    def disagreement(self, state: Tensor, actions: Tensor) -> Tensor:
        """`Heads.disagreement` about the step that `actions` [N, A] take from `state` [N, F]: [N] float32."""
        assert self._ensemble is not None
        predicted = self._ensemble(torch.cat([state, actions], 1).to(self.dtype))  # [K, N, D]
        return predicted.float().std(0, correction=0).mean(1)


class _SideBySide:
    """Several MLPs of one input, their outputs side by side in their own units.

    Args:
        networks: The networks.
        units: Of each.
        pack: Whether those of equal architecture share one batched product a layer.
        dtype: Of the products' operands.
        device: Where to run.
    """

    def __init__(
        self,
        networks: list[Network],
        units: list[Units],
        pack: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        groups: dict[Any, list[int]] = {}
        for i, network in enumerate(networks):
            groups.setdefault(str(network[:-1]) if pack else i, []).append(i)
        self._groups = [_Packed([networks[i] for i in members], dtype, device) for members in groups.values()]
        dims = [network[-1].out_features for network in networks]
        columns = torch.arange(sum(dims)).split(dims)
        order = torch.cat([columns[i] for members in groups.values() for i in members]).argsort()
        self._order = None if order.equal(torch.arange(sum(dims))) else order.to(device)

        # The last biases and the units stay float32: in bfloat16 they would lose most.
        own = [unit or (torch.zeros(dim), torch.ones(dim)) for unit, dim in zip(units, dims, strict=True)]
        mean, std = (torch.cat([unit[i].detach().to(device) for unit in own]) for i in (0, 1))
        bias = torch.cat([network[-1].bias.detach().to(device) for network in networks])
        self._scale, self._shift = std, bias * std + mean

    def __call__(self, inputs: Tensor) -> Tensor:
        """[N, I] in the operands' type -> [N, sum of O] float32."""
        outputs = [group(inputs) for group in self._groups]
        merged = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        if self._order is not None:
            merged = merged.index_select(1, self._order)
        return torch.addcmul(self._shift, merged.float(), self._scale)


class _Packed:
    """G networks of one architecture, but for the sizes of their outputs, without their last biases."""

    def __init__(self, networks: list[Network], dtype: torch.dtype, device: torch.device | str):
        self._size = len(networks)
        self._hidden = _Hidden([network[:-1] for network in networks], dtype, device)
        lasts = [network[-1] for network in networks]
        dims = [last.out_features for last in lasts]
        padded = [functional.pad(last.weight.T, (0, max(dims) - last.out_features)) for last in lasts]
        self._weight = torch.stack(padded).detach().to(device, dtype)  # [G, H, widest O]
        real = [i * max(dims) + column for i, dim in enumerate(dims) for column in range(dim)]
        self._real = torch.tensor(real, device=device)

    def __call__(self, inputs: Tensor) -> Tensor:
        """[N, I] -> [N, sum of O]."""
        if self._size == 1:
            return torch.mm(self._hidden(inputs), self._weight[0])
        outputs = torch.bmm(self._hidden(inputs.expand(self._size, *inputs.shape)), self._weight)  # [G, N, widest O]
        return outputs.transpose(0, 1).flatten(1).index_select(1, self._real)


class _Hidden:
    """The hidden layers of G networks of one architecture: [G, N, I] -> [G, N, H], or [N, I] -> [N, H] of one.

    Modules would do, but calling them costs as much as a small product.
    """

    def __init__(self, networks: list[Network], dtype: torch.dtype, device: torch.device | str):
        def place(tensors: list[Tensor]) -> Tensor:
            stacked = torch.stack([tensor.detach().to(device, dtype) for tensor in tensors])
            return stacked if len(networks) > 1 else stacked[0]

        self._layers: list[Callable[[Tensor], Tensor]] = []
        for modules in zip(*networks, strict=True):
            kind = modules[0]
            if isinstance(kind, nn.Linear):
                weight = place([module.weight.T if len(networks) > 1 else module.weight for module in modules])
                bias = place([module.bias[None] for module in modules])
                self._layers.append(partial(_linear, weight, bias))
            elif isinstance(kind, nn.LayerNorm):
                scale, shift = place([m.weight[None] for m in modules]), place([m.bias[None] for m in modules])
                self._layers.append(partial(_layer_norm, list(kind.normalized_shape), scale, shift, kind.eps))
            else:
                self._layers.append(_in_place(kind))

    def __call__(self, hidden: Tensor) -> Tensor:
        for layer in self._layers:
            hidden = layer(hidden)
        return hidden


def _linear(weight: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    if weight.ndim == 2:
        return functional.linear(hidden, weight, bias[0])
    return torch.baddbmm(bias, hidden, weight)


def _layer_norm(size: list[int], scale: Tensor, shift: Tensor, eps: float, hidden: Tensor) -> Tensor:
    if scale.ndim == 2:
        return torch.layer_norm(hidden, size, scale[0], shift[0], eps)
    return torch.addcmul(shift, torch.layer_norm(hidden, size, None, None, eps), scale)


def _in_place(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(activation, nn.SiLU):
        return partial(functional.silu, inplace=True)
    if isinstance(activation, nn.ELU):
        return partial(functional.elu, alpha=activation.alpha, inplace=True)
    return activation.forward


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
