"""One step of the prior, what its latent looks like, its reward and its doubt, as cheap as inference can be.

An env steps a model one latent a slot at a time. With few slots the overhead of each operation dominates, so networks
of equal architecture run as one batched product a layer. With many slots arithmetic dominates, so the products run in
bfloat16 where the CPU is fast at it, while the state stays float32. Standard deviations of decoders, which nobody
asks for, are never computed. The definition of these sums, and the tests that compare, are named in
`aime_gym.world_model.model`.
"""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from aime_gym.errors import unknown_name
from aime_gym.world_model.array_code import ArrayFunction, as_arrays
from aime_gym.world_model.cells import RSSM, RSSMO, NormedGRU
from aime_gym.world_model.layers import Upsampling, interleave
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.objective import Normal
from aime_gym.world_model.packed import (
    MANY_ROWS,
    LayerNorm,
    Linear,
    Network,
    SideBySide,
    Units,
    bf16_is_fast,
    ensemble_layers,
    hidden_layers,
    in_place,
)

PRECISIONS = ("auto", "32-true", "bf16")
IMAGE_ROWS = 900
"""Rows of the largest products behind one image, by which `choose_dtype` takes the precision of those."""

BIG_BATCH = 64
"""Slots from which arithmetic dominates."""


def choose_dtype(precision: str, batch: int, device: torch.device | str = "cpu") -> torch.dtype:
    """The type of the products' operands.

    Args:
        precision: ``"32-true"``, ``"bf16"``, or ``"auto"``: bf16 from `MANY_ROWS` slots, on CPUs that are fast at it.
        batch: Number of slots, N.
        device: Where they run.

    Raises:
        AimeGymError: If the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    pays = batch >= MANY_ROWS and torch.device(device).type == "cpu" and bf16_is_fast()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and pays) else torch.float32


_traces: dict[Any, Any] = {}
"""Steps as TorchScript, by all that decides their operations. PyTorch never frees what it has traced: weights are
inputs of a trace, so that all dreams of one architecture and precision share it."""
_tracing = threading.Lock()


class FastDynamics(nn.Module):
    """`WorldModel.prior_step`, `decode`, `doubt` and the heads on states [N, F] in float32.

    It holds copies of the weights: later changes of the model do not reach it. Gradients lead through states and
    actions; without them (`torch.no_grad` or `torch.inference_mode`) it computes in place.

    Args:
        model: The model.
        names: Tabular outputs or probes to decode, in this order.
        task: The reward is that of this task's head; None takes the model's own reward decoder, if there is one.
        batch: N, about; networks run side by side if it is small.
        dtype: Type of the products' operands.
        device: Where to run.
        doubt: Which doubt a step returns: True for `WorldModel.doubt` of the state that it leads to, for which `names`
            must begin with all that the model observes; ``"ensemble"`` for `Heads.disagreement` about the step; False
            for none.

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
        doubt: bool | str = False,
    ):
        super().__init__()
        config, cell, heads = model.config, model.cell, model.heads
        self._memory_dim, self.dtype, self._asked_doubt = config.memory_dim, dtype, doubt
        self._latent = cell.latent  # uses no weights

        def place(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype, copy=True)

        def run(networks: list[Network], units: list[Units]) -> SideBySide:
            return SideBySide(networks, units, batch < BIG_BATCH, dtype, device)

        if isinstance(cell, RSSMO):
            self._memory_input: Any = hidden_layers([cell.pre_memory.net], dtype, device)
            self._prior = run([cell.prior_net.net], [None])
        else:
            assert isinstance(cell, RSSM)
            self._memory_input = None
            self._prior = run([cell.prior_mean.net, cell.prior_std.net], [None, None])
        gru, rows = cell.memory_cell, 2 * self._memory_dim  # first the reset and update gates, then the candidate
        self._normed: nn.Sequential | None = None
        if isinstance(gru, NormedGRU):
            linear, norm = gru.input_layer, gru.norm
            gates = Linear(place(linear.weight), place(linear.bias))
            normed = LayerNorm(list(norm.normalized_shape), place(norm.weight), place(norm.bias), norm.eps)
            self._normed = nn.Sequential(gates, normed)
        else:
            both = torch.cat([gru.weight_ih[:rows], gru.weight_hh[:rows]], 1)
            self._gates = Linear(place(both), place(gru.bias_ih[:rows] + gru.bias_hh[:rows]))
            self._candidate_input = Linear(place(gru.weight_ih[rows:]), place(gru.bias_ih[rows:]))
            self._candidate_memory = Linear(place(gru.weight_hh[rows:]), place(gru.bias_hh[rows:]))

        self._code = config.code_of(names)
        networks = [_mean_network(model, name) for name in names]
        units = [_units(model, name) for name in names]
        self._reward_limits: tuple[float, float] | None = None
        self._paid = 1  # what comes last: a reward, and before it that of an end where it has a head of its own
        self.terminates = model.termination is not None
        if model.termination is not None:
            networks.append(model.termination)
            units.append(None)
        if task is None and not config.use_reward:
            pass  # nothing predicts a reward
        elif task is None:
            networks.append(_mean_network(model, config.reward))
            units.append(None)
        else:
            if heads is None or task not in heads.tasks:
                raise unknown_name("task of this model's heads", task, heads.tasks if heads else ())
            i = heads.tasks.index(task)
            if heads.ends:
                networks.append(heads.ends[task])
                units.append((heads.end_mean[i : i + 1], heads.end_std[i : i + 1]))
                self._paid = 2
            networks.append(heads.rewards[task])
            units.append((heads.reward_mean[i : i + 1], heads.reward_std[i : i + 1]))
            self._reward_limits = heads.reward_limits
        self.rewards = task is not None or config.use_reward
        """Whether the last number that it decodes is a reward."""
        self._decoders = run(networks, units) if networks else None
        if doubt == "ensemble":
            assert heads is not None and heads.ensemble is not None  # noqa: PT018
            self._members = heads.ensemble.size
            self._ensemble = ensemble_layers(heads.ensemble.weights, heads.ensemble.biases, dtype, device)
        elif doubt:
            assert tuple(names[: len(model.observed)]) == model.observed
            self._encode = _Encoders(model, dtype, device)
            posteriors = [cell.posterior_net] if isinstance(cell, RSSMO) else [cell.posterior_mean, cell.posterior_std]
            self._posterior = run([mlp.net for mlp in posteriors], [None] * len(posteriors))

        self._places = [(module, name) for module in self.modules() for name in module._buffers]
        self._weights = [module._buffers[name] for module, name in self._places]
        parts = (config, self._code.parts, *networks, self._reward_limits, doubt, *map(_kind, self._weights))
        self._operations = sys.intern(repr(parts))  # which is compared with others by its address
        self._array_steps: dict[int, ArrayFunction | None] = {}  # by how many inputs there are

    def advance(self, state: Tensor, actions: Tensor, noise: Tensor | None = None) -> Tensor:
        """One step of the prior.

        Args:
            state: [N, F] float32
            actions: [N, A] float32
            noise: Standard-normal [N, S] float32, or None for the mean.

        Returns:
            The next state, [N, F] float32.
        """
        return self._advance(state, actions, noise)[0]

    def _advance(self, state: Tensor, actions: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next state [N, F], and what `Cell.latent` takes of the prior, [N, 2 S] or [N, S]."""
        memory, latent = state[:, : self._memory_dim], state[:, self._memory_dim :]
        inputs = torch.cat([latent, actions], 1).to(self.dtype)
        if self._memory_input is not None:
            inputs = self._memory_input(inputs)
        old = memory.to(self.dtype)
        if self._normed is not None:
            gates = self._normed(torch.cat([inputs, old], 1)).float()
            memory = NormedGRU.update(gates, memory)
            prior = self._prior(memory.to(self.dtype))
            return torch.cat([memory, self._latent(prior).sample(noise)], 1), prior

        gates = self._gates(torch.cat([inputs, old], 1)).sigmoid_()  # [N, 2 M]
        reset, update = gates[:, : self._memory_dim], gates[:, self._memory_dim :]
        candidate = self._candidate_input(inputs)
        candidate = candidate.addcmul_(reset, self._candidate_memory(old)).float()
        if torch.is_grad_enabled():
            candidate = candidate.tanh()
            memory = candidate + update * (memory - candidate)
            prior = self._prior(memory.to(self.dtype))
            return torch.cat([memory, self._latent(prior).sample(noise)], 1), prior

        candidate.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0)  # tanh, in a quarter of the time of torch's
        following = torch.empty_like(state)
        memory = torch.sub(memory, candidate, out=following[:, : self._memory_dim]).mul_(update).add_(candidate)
        prior = self._prior(memory.to(self.dtype))
        mean, std = cast(Normal, self._latent(prior))  # its GRU has no norm, and its latents are no classes
        latent = following[:, self._memory_dim :].copy_(mean)
        if noise is not None:
            latent.addcmul_(noise, std)
        return following, prior

    def decode(self, state: Tensor) -> Tensor:
        """Means of the names in their own units, then if it `terminates` the logit of that, last if any the reward.

        Where heads predict what an end pays (see `Heads`), it comes before the reward. [N, F] -> [N, D] to [N, D + 3]
        float32.
        """
        return self._code.decode(self._decode(state))

    def _decode(self, state: Tensor) -> Tensor:
        """The same as a code: [N, F] -> [N, C] to [N, C + 3] float32."""
        if self._decoders is None:
            return state[:, :0]
        means = self._decoders(state.to(self.dtype))
        if self._reward_limits is not None:
            means[:, -self._paid :].clamp_(*self._reward_limits)
        return means

    def step(
        self, state: Tensor, actions: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`advance`, `decode` of where it leads, the sum of all numbers [], and the `doubt` [N] if that is asked for.

        All of them are finite where their sum is.

        Without gradients it is traced at the first call on a CPU: with few slots Python takes longer than the
        arithmetic.
        """
        if torch.is_grad_enabled() or state.device.type != "cpu":
            results: Any = self.compute(state, actions, noise)
        else:
            given = (state, actions) if noise is None else (state, actions, noise)
            if len(state) == 1 and (array_step := self._array_step(given)) is not None:
                arrays = array_step(*[tensor.detach().numpy() for tensor in given])
                results = [torch.from_numpy(array) for array in arrays]
                return tuple(results if self._asked_doubt else [*results, None])  # type: ignore[return-value]
            inputs = (*given, *self._weights)
            key = (self._operations, len(state), noise is None)
            if key not in _traces:
                self._trace(key, inputs)
            results = _traces[key](*inputs)
        return results if self._asked_doubt else (*results, None)

    def __getstate__(self) -> dict[str, Any]:
        """All but code, which cannot be pickled."""
        return {**self.__dict__, "_array_steps": {}}

    def _array_step(self, given: tuple[Tensor, ...]) -> ArrayFunction | None:
        """`compute` for one slot as a function of arrays, where it can be one."""
        if self.dtype != torch.float32:
            return None
        if len(given) not in self._array_steps:
            self._array_steps[len(given)] = as_arrays(self.compute, given)
        return self._array_steps[len(given)]

    def _trace(self, key: Any, inputs: Any) -> None:
        with _tracing, warnings.catch_warnings():
            # Deprecated in favour of torch.compile, which needs a C++ compiler on the user's machine.
            warnings.simplefilter("ignore", DeprecationWarning)
            twin = copy.deepcopy(self)  # as weights are replaced while tracing, and others may be stepping
            _traces[key] = torch.jit.trace(lambda *all: twin._step_with(*all), inputs, check_trace=False)

    def compute(self, state: Tensor, actions: Tensor, noise: Tensor | None = None) -> Any:
        """What `step` gives, by torch's operations one by one, without a doubt if there is none."""
        following, prior = self._advance(state, actions, noise)
        codes = self._decode(following)
        means = self._code.decode(codes)
        total = following.sum() + means.sum()
        if not self._asked_doubt:
            return following, means, total
        if self._asked_doubt == "ensemble":
            doubt = self.disagreement(state, actions)
        else:
            doubt = self._doubt_of(following, codes, prior)
        return following, means, total + doubt.sum(), doubt

    def _step_with(self, *inputs: Any) -> Any:
        """`compute` with the weights that end the inputs."""
        for (module, name), weight in zip(self._places, inputs[-len(self._places) :], strict=True):
            module._buffers[name] = weight
        return self.compute(*inputs[: -len(self._places)])

    def doubt(self, state: Tensor) -> Tensor:
        """`WorldModel.doubt`: [N, F] -> [N] float32."""
        prior = self._prior(state[:, : self._memory_dim].to(self.dtype))
        return self._doubt_of(state, self._decode(state), prior)

    def _doubt_of(self, state: Tensor, codes: Tensor, prior: Tensor) -> Tensor:
        embedding = self._encode(codes)
        posterior = self._posterior(torch.cat([state[:, : self._memory_dim].to(self.dtype), embedding], 1))
        return self._latent(posterior).kl(self._latent(prior)).sum(1)

    def disagreement(self, state: Tensor, actions: Tensor) -> Tensor:
        """`Heads.disagreement` about the step that `actions` [N, A] take from `state` [N, F]: [N] float32."""
        inputs = torch.cat([state, actions], 1).to(self.dtype)
        predicted = self._ensemble(inputs.expand(self._members, *inputs.shape))  # [K, N, D]
        return predicted.float().std(0, correction=0).mean(1)


class _Encoders(nn.Module):
    """What the posterior reads of the decoded codes [N, C or more] of all observed sensors: embeddings [N, E]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: WorldModel, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        codes = model.config.codes
        sizes = {name: codes[name].size for name in model.observed}
        own = [_units(model, name) or (torch.zeros(dim), torch.ones(dim)) for name, dim in sizes.items()]
        for i, part in enumerate(("mean", "std")):
            self.register_buffer(part, torch.cat([unit[i].detach().to(device, copy=True) for unit in own]))
        self._dims = [sum(sizes.values())] if model.config.cell == "rssmo" else [*sizes.values()]
        self._dtype = dtype
        self._networks = nn.ModuleList(
            nn.Identity() if isinstance(encoder, nn.Identity) else hidden_layers([encoder.net], dtype, device)
            for encoder in model.encoders.values()
        )

    def forward(self, codes: Tensor) -> Tensor:
        frame = ((codes[:, : sum(self._dims)] - self.mean) / self.std).to(self._dtype)
        parts = [network(part) for network, part in zip(self._networks, frame.split(self._dims, 1), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _kind(tensor: Tensor | None) -> Any:
    """What must be the same of an input wherever a trace is used again."""
    return tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _mean_network(model: WorldModel, name: str) -> Network:
    """The network that gives the mean of a tabular decoder or probe."""
    decoder: Any = (model.decoders if name in model.decoders else model.probes)[name]
    return (decoder.mu_net if hasattr(decoder, "mu_net") else decoder.net).net


def _units(model: WorldModel, name: str) -> Units:
    """The units of a sensor that the model standardises."""
    if name not in model.normaliser:
        return None
    standardiser: Any = model.normaliser[name]
    return standardiser.mean, standardiser.std


class ImageBytes(nn.Module):
    """An image decoder that gives bytes, its weights laid out once: [N, F] -> [N, 64, 64, 3] uint8.

    Two linear layers without anything between them are one, and numbers become bytes before the last rows and columns
    are interleaved.

    Args:
        model: Decodes images, as it observes or predicts them.
        dtype: Type of the products' operands.
    """

    def __init__(self, model: WorldModel, dtype: torch.dtype = torch.float32):
        super().__init__()
        decoder: Any = (model.decoders if "image" in model.decoders else model.probes)["image"]
        self._dtype, modules = dtype, [*copy.deepcopy(decoder.net)]
        self._squashed = isinstance(modules[-1], nn.Sigmoid)
        *modules, last = modules[:-1] if self._squashed else modules
        layers: list[nn.Module] = []
        with torch.no_grad():
            if modules[1].unflattened_size[1:] == (1, 1):
                layers, modules = _from_one_pixel(modules[0], modules[2]), modules[3:]
            for module in modules:
                if isinstance(module, nn.ReLU) and isinstance(layers[-1], _Interleave):
                    layers.insert(-1, in_place(module))  # of every number on its own, before they are strewn
                else:
                    layers += _convolution(module) if isinstance(module, Upsampling) else [in_place(module)]
            (convolution, _), self._odd, self._cut = _convolution(last), last.odd, last.cut
            rows = torch.arange(len(convolution.weight)).view(-1, 4).T.flatten()  # a pixel's colours are neighbours
            convolution.weight, convolution.bias = (nn.Parameter(each[rows]) for each in convolution.parameters())
        self._net = nn.Sequential(*layers, convolution).requires_grad_(False).to(dtype)

    def forward(self, features: Tensor) -> Tensor:
        """[N, F] -> [N, 64, 64, 3] uint8."""
        values = self._net(features.to(self._dtype)).float()
        values = values.sigmoid_() if self._squashed else values.add_(0.5).clamp_(0, 1)
        numbers = values.mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1)  # [N, H, W, 2 * 2 * colours]
        rows = numbers.unflatten(3, (2, -1)).transpose(2, 3).flatten(1, 2)  # [N, 2 H, W, 2 * colours]
        images, end = rows.unflatten(3, (2, -1)).flatten(2, 3), self._odd + self._cut
        return images[:, self._cut : images.shape[1] - end, self._cut : images.shape[2] - end].contiguous()


class _Interleave(nn.Module):
    def __init__(self, odd: int, cut: int):
        super().__init__()
        self._odd, self._cut = odd, cut

    def forward(self, x: Tensor) -> Tensor:
        return interleave(x, self._odd, self._cut)


class _ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def _convolution(layer: Upsampling) -> tuple[nn.Conv2d, nn.Module]:
    """The plain convolution of a transposed one, and what interleaves its rows and columns."""
    weight, bias = layer.convolution()
    plain = nn.Conv2d(weight.shape[1], len(weight), weight.shape[-1], padding=weight.shape[-1] - 1)
    plain.weight, plain.bias = nn.Parameter(weight.contiguous(memory_format=torch.channels_last)), nn.Parameter(bias)
    return plain, _Interleave(layer.odd, layer.cut)


def _from_one_pixel(first: nn.Linear, layer: Upsampling) -> list[nn.Module]:
    """A linear layer, and a transposed convolution of the one pixel that it gives: [N, I] -> [N, out, K, K]."""
    assert layer.bias is not None
    out, *sizes = layer.weight.shape[1:]
    taps = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)  # channels last
    both = nn.Linear(first.in_features, len(taps))
    both.weight = nn.Parameter(taps @ first.weight)
    both.bias = nn.Parameter(taps @ first.bias + layer.bias.repeat(len(taps) // out))
    return [both, nn.Unflatten(1, (*sizes, out)), _ChannelsFirst()]
