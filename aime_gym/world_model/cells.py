"""The cells of world models, and their unrolling over time: forwards, and backwards by hand.

What can be done once is out of the loop, see `aime_gym.world_model.recurrence`; all steps are one function to autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from aime_gym.world_model.config import ModelConfig
from aime_gym.world_model.layers import MLP, NormedGRU, TanhGaussianPolicy
from aime_gym.world_model.objective import Latent, Normal, OneHot, TanhNormal
from aime_gym.world_model.packed import together
from aime_gym.world_model.recurrence import Drawn, Layer, Loop, LoopedLayer, LoopedMLP, Pointwise, layers_of


class Actor(NamedTuple):
    """What acts while a cell is unrolled.

    Attributes:
        policy: From features [B, F], and what it sees beside them, to actions.
        noise: Standard-normal [T, B, A], or None for modes.
        beside: What it sees beside features, [T, B, K].
        detached: Whether features have no gradients from it.
    """

    policy: TanhGaussianPolicy
    noise: Tensor | None
    beside: Tensor | None = None
    detached: bool = False


class Unrolled(NamedTuple):
    """Steps of a cell.

    Attributes:
        features: [T, B, F]
        latents: The distributions of their latents, [T, B, S], in float32.
        actions: What was given or the first actor did, [T, B, A].
        policies: What each actor would do, [T, B, A].
    """

    features: Tensor
    latents: Latent
    actions: Tensor
    policies: tuple[TanhNormal, ...]


class _GRU:
    """A GRU (Cho et al., EMNLP 2014) at one time step after another, from what it reads and the memory before."""

    def __init__(self, cell: nn.GRUCell, layers: Sequence[Layer], loop: Loop, known: Tensor | None):
        self._read, size = LoopedMLP(layers, loop, known), cell.hidden_size
        # Four parts: the candidate's from the memory, reset, update, the candidate's from what is read.
        weights = cell.weight_ih, cell.weight_hh.roll(size, 0)
        bias = F.pad(cell.bias_ih, (size, 0)) + F.pad(cell.bias_hh.roll(size), (0, size))
        self._gates = LoopedLayer(Layer(weights, bias), loop, None if layers else known, (size, 0))
        self._sizes, self._kept = [size, 2 * size, size], loop.kept
        self.layers = [*self._read.layers, self._gates]
        self._rows: list[tuple[Tensor, ...]] = []
        self._slopes: Sequence[Tensor] = ()
        self._shares: Sequence[Tensor] = ()

    def __call__(self, t: int, x: Tensor, memory: Tensor, following: Tensor) -> None:
        """Step t: from latent and action [B, S + A] and the memory to the following one, [B, M]."""
        sums = self._gates(t, self._read(t, x), memory)
        proposal, gates, read = sums.split(self._sizes, 1)
        reset, update = gates.sigmoid_().chunk(2, 1)
        candidate = torch.addcmul(read, reset, proposal).tanh_()
        if self._kept:
            self._rows.append((sums, candidate, memory))
        torch.lerp(candidate, memory, update, out=following)

    def pull(self, t: int, gradient: Tensor, into: Tensor, into_memory: Tensor) -> None:
        """Adds the gradients of step t's latent and action and of the memory from that of the following one."""
        if not self._slopes:
            sums, candidate, memory = (torch.stack(x) for x in zip(*self._rows, strict=True))
            proposal, gates, _ = sums.split(self._sizes, -1)
            reset, update = gates.chunk(2, -1)
            slopes = sums.new_empty(*memory.shape[:2], 4, memory.shape[2])
            slope = torch.mul(1 - update, 1 - candidate.square(), out=slopes[:, :, 3])
            torch.mul(torch.mul(slope, reset, out=slopes[:, :, 0]) * proposal, 1 - reset, out=slopes[:, :, 1])
            torch.mul((memory - candidate) * update, 1 - update, out=slopes[:, :, 2])
            self._slopes = slopes.unbind()
            self._shares = update.unbind()
        gates = (gradient.unsqueeze(1) * self._slopes[t]).flatten(1)
        into_memory.addcmul_(gradient, self._shares[t])
        read, _ = self._gates.pull(t, gates, (None, into_memory))
        self._read.pull(t, read, into)


class _NormedGRU:
    """The same of AIME-v2's GRU."""

    def __init__(self, cell: NormedGRU, layers: Sequence[Layer], loop: Loop, known: Tensor | None):
        self._read = LoopedMLP(layers, loop, known)
        (layer,) = layers_of(nn.Sequential(cell.input_layer, cell.norm))
        self._gates = LoopedLayer(layer, loop)
        self._update = Pointwise(lambda gates, memory, _: cell.update(gates, memory), loop)
        self.layers = [*self._read.layers, self._gates]

    def __call__(self, t: int, x: Tensor, memory: Tensor, following: Tensor) -> None:
        """See `_GRU`."""
        following.copy_(self._update(t, self._gates(t, torch.cat([self._read(t, x), memory], 1)), memory))

    def pull(self, t: int, gradient: Tensor, into: Tensor, into_memory: Tensor) -> None:
        """See `_GRU`."""
        gates, memory = self._update.pull(t, gradient)
        read, before = self._gates.pull(t, gates)[0].tensor_split([-memory.shape[1]], 1)
        into_memory.add_(before).add_(memory)
        self._read.pull(t, read, into)


class _Window:
    """All steps of a cell: forwards, and backwards to the gradients of all that they depend on."""

    def __init__(
        self,
        cell: Cell,
        loop: Loop,
        actions: Tensor | Sequence[Actor],
        embeddings: Tensor | None,
        noise: Tensor | None,
        is_first: Tensor | None,
    ):
        known, actors = (actions, ()) if isinstance(actions, Tensor) else (None, actions)
        self._loop, self._memory, self._feature = loop, cell.memory_dim, cell.memory_dim + cell.stochastic_dim
        self._actors = [LoopedMLP(layers_of(*(n.net for n in a.policy.networks)), loop, a.beside) for a in actors]
        self._detached = [actor.detached for actor in actors]
        self._width, act_noise = self._feature, None
        if actors:
            policy, act_noise = actors[0][:2]
            self._width += policy.networks[0].out_dim
        sample = lambda output, noise: policy.distribution(*output.chunk(2, -1)).sample(noise)  # noqa: E731
        self._act = Pointwise(sample, loop, act_noise)
        draw = lambda output, noise: cell.latent(output).sample(noise)  # noqa: E731
        self._draw = (Drawn if cell.classes else Pointwise)(draw, loop, noise)
        gru, layers = cell.memory_cell, cell._memory_input_layers()
        self._advance: _GRU | _NormedGRU
        if isinstance(gru, NormedGRU):
            self._advance = _NormedGRU(gru, layers, loop, known)
        else:
            self._advance = _GRU(gru, layers, loop, known)
        estimator = cell._prior_layers() if embeddings is None else cell._posterior_layers()
        self._estimator = LoopedMLP(estimator, loop, embeddings)
        self._begins = [False] * loop.steps if is_first is None else is_first.flatten(1).any(1).tolist()
        self._stays: Any = None if is_first is None else 1 - is_first
        mlps = [*self._actors, self._estimator]
        self._layers = [*(layer for mlp in mlps for layer in mlp.layers), *self._advance.layers]
        self.tensors = [tensor for layer in self._layers for tensor in layer.tensors]

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Parts of memory, latent and action side by side: state, memory, latent, action, and latent with action."""
        memory, feature = self._memory, self._feature
        cuts = (0, feature), (0, memory), (memory, feature), (feature, self._width), (memory, self._width)
        return tuple(rows[..., begin:end] for begin, end in cuts)

    def run(self, state: Tensor) -> tuple[Tensor, ...]:
        """From the state before, [B, F], the features, outputs of the estimator, actions, and outputs of actors."""
        rows = state.new_empty(self._loop.steps + 1, self._loop.batch, self._width)
        states, memories, latents, actions, reads = (part.unbind() for part in self._parts(rows))
        states[0].copy_(state)
        outputs, acted, asked = list[Tensor](), list[Tensor](), [list[Tensor]() for _ in self._actors]
        for t in range(self._loop.steps):
            state, memory, action, read = states[t], memories[t], actions[t], reads[t]
            if self._begins[t]:
                state, memory, _, action, read = self._parts(rows[t] * self._stays[t])
            for actor, told in zip(self._actors, asked, strict=True):
                told.append(actor(t, state))
            if asked:
                acted.append(self._act(t, asked[0][t]))
                action.copy_(acted[t])
            self._advance(t, read, memory, memories[t + 1])
            outputs.append(self._estimator(t, memories[t + 1]))
            latents[t + 1].copy_(self._draw(t, outputs[t]))
        every = [outputs, *([acted] if asked else []), *asked]
        return self._parts(rows[1:])[0], *(torch.stack(each) for each in every)

    def pull(self, features: Tensor, outputs: Tensor, *acted: Tensor) -> list[Tensor | None]:
        """From the gradients of what `run` gives, those of the state and of `tensors`."""
        rows = features.new_zeros(self._loop.steps + 1, self._loop.batch, self._width)
        whole = self._parts(rows)
        whole[0][1:] = features
        if acted:
            whole[3][:-1] = acted[0]
        states, memories, latents, actions, reads = (part.unbind() for part in whole)
        told, asked = outputs.unbind(), [each.unbind() for each in acted[1:]]
        for t in range(self._loop.steps - 1, -1, -1):
            (output,) = self._draw.pull(t, latents[t + 1])
            self._estimator.pull(t, output.add_(told[t]), memories[t + 1])
            state, memory, action, read = states[t], memories[t], actions[t], reads[t]
            if self._begins[t]:
                state, memory, _, action, read = self._parts(torch.zeros_like(rows[t]))
                action.copy_(actions[t])
            self._advance.pull(t, memories[t + 1], read, memory)
            for i, actor in enumerate(self._actors):
                own = asked[i][t]
                if not i:
                    own = self._act.pull(t, action)[0].add_(own)
                actor.pull(t, own, torch.zeros_like(state) if self._detached[i] else state)
            if self._begins[t]:
                states[t].addcmul_(state, self._stays[t])
        return [states[0], *(gradient for layer in self._layers for gradient in layer.gradients())]


class _Steps(torch.autograd.Function):
    """A window as autograd sees it: one function of the state before and of all tensors."""

    @staticmethod
    def forward(ctx: Any, window: _Window, state: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        """What `run` gives."""
        ctx.window = window
        with torch.inference_mode():
            results = window.run(state)
        return tuple(result.clone() for result in results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        """What `pull` gives."""
        window, ctx.window = ctx.window, None
        if window is None:
            raise RuntimeError("The gradients of a recurrence can be computed once.")
        with torch.inference_mode():
            results = window.pull(*gradients)
        return None, *(None if result is None else result.clone() for result in results)


class Cell(nn.Module, ABC):
    """One posterior step, one prior step, and the unrolling of either over time."""

    def __init__(self, config: ModelConfig, memory_input_dim: int):
        super().__init__()
        self.memory_dim, self.stochastic_dim = config.memory_dim, config.stochastic_dim
        self.min_std, self.classes = config.min_std, config.classes
        self.memory_cell: nn.GRUCell | NormedGRU
        self.memory_cell = (NormedGRU if config.version == 2 else nn.GRUCell)(memory_input_dim, self.memory_dim)
        self.initial_memory: Tensor
        self.initial_state: Tensor
        self.register_buffer("initial_memory", torch.zeros(1, self.memory_dim))
        self.register_buffer("initial_state", torch.zeros(1, self.stochastic_dim))

    @abstractmethod
    def prior(self, memory: Tensor) -> Latent:
        """The latent given the memory: [..., M] -> a distribution of [..., S]."""

    def priors(self, memories: Tensor) -> Latent:
        """The prior of many steps at once, where that is faster: [T, B, M] -> a distribution of [T, B, S]."""
        return self.prior(memories)

    @abstractmethod
    def posterior(self, memory: Tensor, embedding: Tensor) -> Latent:
        """The latent given the memory and what is observed: [..., M], [..., E] -> a distribution of [..., S]."""

    def latent(self, output: Tensor) -> Latent:
        """The distribution that networks tell of by means and raw deviations [..., 2 S], or by logits [..., S]."""
        if self.classes:
            return OneHot(output.float().unflatten(-1, (-1, self.classes)))
        mean, raw = output.float().chunk(2, dim=-1)
        return Normal(mean, self.std(raw))

    @abstractmethod
    def memory_input(self, latent_and_action: Tensor) -> Tensor:
        """What the GRU reads: [B, S + A] -> [B, I]."""

    @abstractmethod
    def std(self, raw: Tensor) -> Tensor:
        """Standard deviations from the output of a network."""

    def advance(self, state: Tensor, action: Tensor) -> Tensor:
        """The next memory: [B, F], [B, A] -> [B, M]."""
        memory, latent = state.split([self.memory_dim, self.stochastic_dim], dim=-1)
        return self.memory_cell(self.memory_input(torch.cat([latent, action], dim=-1)), memory)

    def unroll(
        self,
        state: Tensor,
        actions: Tensor | Sequence[Actor],
        embeddings: Tensor | None,
        noise: Tensor | None,
        steps: int,
        is_first: Tensor | None = None,
    ) -> Unrolled:
        """Steps of the posterior, or of the prior where there are no embeddings.

        The same numbers as a loop of `WorldModel.posterior_step` or `prior_step`, faster: why there are both is said in
        `aime_gym.world_model.model`.

        Args:
            state: [B, F]
            actions: All of them [T, B, A], or the actors, the first of which acts.
            embeddings: [T, B, E], or None for the prior.
            noise: Standard-normal [T, B, S], or None to go on with means or the most likely classes.
            steps: T
            is_first: Steps that begin an episode, before which the state is zeros, [T, B, 1] of 0 and 1.
        """
        device = state.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        known, actors = ((actions,), ()) if isinstance(actions, Tensor) else ((), actions)
        used = [state, *self.parameters(), *known, *([] if embeddings is None else [embeddings])]
        used += [tensor for actor in actors for tensor in actor.policy.parameters()]
        kept = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in used)
        with torch.autocast(device, enabled=False):
            window = _Window(self, Loop(steps, len(state), dtype, kept), actions, embeddings, noise, is_first)
            features, outputs, *acted = _Steps.apply(window, state.float(), *window.tensors)
            policies = [
                actor.policy.distribution(*output.chunk(2, -1)) for actor, output in zip(actors, acted[1:], strict=True)
            ]
            return Unrolled(features, self.latent(outputs), (*known, *acted)[0], tuple(policies))

    @abstractmethod
    def _memory_input_layers(self) -> list[Layer]:
        """From `concat(s, a)` to what the GRU reads."""

    @abstractmethod
    def _prior_layers(self) -> list[Layer]:
        """From the memory to what `latent` takes."""

    @abstractmethod
    def _posterior_layers(self) -> list[Layer]:
        """From `concat(h, e)` to what `latent` takes."""


class RSSM(Cell):
    """The cell of the released Walker models: separate networks for means and standard deviations."""

    def __init__(self, config: ModelConfig, embedding_dim: int):
        super().__init__(config, config.stochastic_dim + config.action_dim)

        def net(in_dim: int) -> MLP:
            sizes = (config.hidden_size, config.hidden_layers)
            return MLP(in_dim, self.stochastic_dim, *sizes, norm=config.norm)

        self.prior_mean, self.prior_std = net(self.memory_dim), net(self.memory_dim)
        self.posterior_mean = net(self.memory_dim + embedding_dim)
        self.posterior_std = net(self.memory_dim + embedding_dim)

    def prior(self, memory: Tensor) -> Normal:
        """[..., M] -> Normal [..., S]."""
        return Normal(self.prior_mean(memory).float(), self.std(self.prior_std(memory).float()))

    def priors(self, memories: Tensor) -> Normal:
        """[T, B, M] -> Normal [T, B, S]."""
        mean, raw = together((self.prior_mean, self.prior_std), memories)
        return Normal(mean.float(), self.std(raw.float()))

    def posterior(self, memory: Tensor, embedding: Tensor) -> Normal:
        """[..., M], [..., E] -> Normal [..., S]."""
        x = torch.cat([memory, embedding], dim=-1)
        return Normal(self.posterior_mean(x).float(), self.std(self.posterior_std(x).float()))

    def memory_input(self, latent_and_action: Tensor) -> Tensor:
        """The identity."""
        return latent_and_action

    def std(self, raw: Tensor) -> Tensor:
        """Softplus, plus `min_std`."""
        return F.softplus(raw) + self.min_std

    def _memory_input_layers(self) -> list[Layer]:
        return []

    def _prior_layers(self) -> list[Layer]:
        return layers_of(self.prior_mean.net, self.prior_std.net)

    def _posterior_layers(self) -> list[Layer]:
        return layers_of(self.posterior_mean.net, self.posterior_std.net)


class RSSMO(Cell):
    """The cell of the released Cheetah models and of AIME-v2's: one network for a latent, LayerNorm and SiLU."""

    def __init__(self, config: ModelConfig, embedding_dim: int):
        super().__init__(config, config.hidden_size)

        def net(in_dim: int, out_dim: int | None) -> MLP:
            return MLP(in_dim, out_dim, config.hidden_size, 1, "swish", config.norm)

        self.pre_memory = net(self.stochastic_dim + config.action_dim, None)
        size = self.stochastic_dim if self.classes else 2 * self.stochastic_dim
        self.prior_net = net(self.memory_dim, size)
        self.posterior_net = net(self.memory_dim + embedding_dim, size)

    def prior(self, memory: Tensor) -> Latent:
        """[..., M] -> a distribution of [..., S]."""
        return self.latent(self.prior_net(memory))

    def posterior(self, memory: Tensor, embedding: Tensor) -> Latent:
        """[..., M], [..., E] -> a distribution of [..., S]."""
        return self.latent(self.posterior_net(torch.cat([memory, embedding], dim=-1)))

    def memory_input(self, latent_and_action: Tensor) -> Tensor:
        """One layer: [B, S + A] -> [B, hidden_size]."""
        return self.pre_memory(latent_and_action)

    def std(self, raw: Tensor) -> Tensor:
        """A sigmoid between `min_std` and `min_std + 2`."""
        return 2 * torch.sigmoid(raw / 2) + self.min_std

    def _memory_input_layers(self) -> list[Layer]:
        return layers_of(self.pre_memory.net)

    def _prior_layers(self) -> list[Layer]:
        return layers_of(self.prior_net.net)

    def _posterior_layers(self) -> list[Layer]:
        return layers_of(self.posterior_net.net)
