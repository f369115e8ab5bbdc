"""The two recurrent state-space models: how memory and latent move from one step to the next.

Both are GRUs with a stochastic latent (Hafner et al., "Learning Latent Dynamics for Planning from Pixels", ICML 2019);
RSSMO has the sizes and norms of Dreamer's. The state is the feature `concat(h, s)` of memory and stochastic latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aime_gym.world_model.config import ModelConfig
from aime_gym.world_model.distributions import Normal
from aime_gym.world_model.layers import MLP, together
from aime_gym.world_model.recurrence import GRU, Layer, LoopedMLP, layers_of, side_by_side

Actions = Tensor | Callable[[int, Tensor], Tensor]
"""All actions [T, B, A], or a function of the step and the state [B, F] before it that gives one step's [B, A]."""


class Cell(nn.Module, ABC):
    """One posterior step, one prior step, and the unrolling of either over time."""

    def __init__(self, config: ModelConfig, memory_input_dim: int):
        super().__init__()
        self.memory_dim, self.stochastic_dim = config.memory_dim, config.stochastic_dim
        self.min_std = config.min_std
        self.memory_cell = nn.GRUCell(memory_input_dim, self.memory_dim)
        self.initial_memory: Tensor
        self.initial_state: Tensor
        self.register_buffer("initial_memory", torch.zeros(1, self.memory_dim))
        self.register_buffer("initial_state", torch.zeros(1, self.stochastic_dim))

    @abstractmethod
    def prior(self, memory: Tensor) -> Normal:
        """The latent given the memory: [..., M] -> Normal [..., S]."""

    def priors(self, memories: Tensor) -> Normal:
        """The prior of many steps at once, where that is faster: [T, B, M] -> Normal [T, B, S]."""
        return self.prior(memories)

    @abstractmethod
    def posterior(self, memory: Tensor, embedding: Tensor) -> Normal:
        """The latent given the memory and what is observed: [..., M], [..., E] -> Normal [..., S]."""

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
        self, state: Tensor, actions: Actions, embeddings: Tensor | None, noise: Tensor | None, steps: int
    ) -> tuple[Tensor, Normal]:
        """Steps of the posterior, or of the prior where there are no embeddings.

        The same numbers as a loop of single steps, faster: see `recurrence`.

        Args:
            state: [B, F]
            actions: All of them, or a policy.
            embeddings: [T, B, E], or None for the prior.
            noise: Standard-normal [T, B, S], or None to go on with the means.
            steps: T

        Returns:
            Features [T, B, F] and the distributions [T, B, S] of their latents, in float32.
        """
        device = state.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        with torch.autocast(device, enabled=False):
            return self._unroll(state.float(), actions, embeddings, noise, steps, dtype)

    def _unroll(
        self,
        state: Tensor,
        actions: Actions,
        embeddings: Tensor | None,
        noise: Tensor | None,
        steps: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Normal]:
        gru, batch = self.memory_cell, len(state)
        known = actions if isinstance(actions, Tensor) else None
        layers = self._prior_layers() if embeddings is None else self._posterior_layers()
        recurrent_gates = [Layer(gru.weight_hh, gru.bias_hh, (), None)]
        sizes = (steps, batch, dtype)
        memory_input = LoopedMLP(self._memory_input_layers(), known, self.stochastic_dim, *sizes)
        memory_gates = LoopedMLP(recurrent_gates, None, self.memory_dim, *sizes)
        estimator = LoopedMLP(layers, embeddings, self.memory_dim, *sizes)

        memory, latent = state.split([self.memory_dim, self.stochastic_dim], dim=-1)
        memories, latents, outputs = [], [], []
        for t in range(steps):
            own = None if known is not None else actions(t, torch.cat([memory, latent], dim=-1))  # type: ignore[operator]
            memory = GRU.apply(memory_input(t, latent, own), memory_gates(t, memory), memory)  # [B, M]
            output = estimator(t, memory)  # [B, 2 S]
            latent, raw = output.chunk(2, dim=-1)
            if noise is not None:
                latent = Normal(latent, self.std(raw)).sample(noise[t])
            memories.append(memory)
            latents.append(latent)
            outputs.append(output)
        mean, raw = torch.stack(outputs).chunk(2, dim=-1)
        return torch.cat([torch.stack(memories), torch.stack(latents)], dim=-1), Normal(mean, self.std(raw))

    @abstractmethod
    def _memory_input_layers(self) -> list[Layer]:
        """From `concat(s, a)` to the input's part of the GRU's gates."""

    @abstractmethod
    def _prior_layers(self) -> list[Layer]:
        """From the memory to `concat(mean, raw std)`."""

    @abstractmethod
    def _posterior_layers(self) -> list[Layer]:
        """From `concat(h, e)` to `concat(mean, raw std)`."""


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
        return [Layer(self.memory_cell.weight_ih, self.memory_cell.bias_ih, (), None)]

    def _prior_layers(self) -> list[Layer]:
        return side_by_side(self.prior_mean.net, self.prior_std.net)

    def _posterior_layers(self) -> list[Layer]:
        return side_by_side(self.posterior_mean.net, self.posterior_std.net)


class RSSMO(Cell):
    """The cell of the released Cheetah models: one network for means and standard deviations, LayerNorm and SiLU."""

    def __init__(self, config: ModelConfig, embedding_dim: int):
        super().__init__(config, config.hidden_size)

        def net(in_dim: int, out_dim: int | None) -> MLP:
            return MLP(in_dim, out_dim, config.hidden_size, 1, "swish", config.norm)

        self.pre_memory = net(self.stochastic_dim + config.action_dim, None)
        self.prior_net = net(self.memory_dim, 2 * self.stochastic_dim)
        self.posterior_net = net(self.memory_dim + embedding_dim, 2 * self.stochastic_dim)

    def prior(self, memory: Tensor) -> Normal:
        """[..., M] -> Normal [..., S]."""
        return self._normal(self.prior_net(memory))

    def posterior(self, memory: Tensor, embedding: Tensor) -> Normal:
        """[..., M], [..., E] -> Normal [..., S]."""
        return self._normal(self.posterior_net(torch.cat([memory, embedding], dim=-1)))

    def memory_input(self, latent_and_action: Tensor) -> Tensor:
        """One layer: [B, S + A] -> [B, hidden_size]."""
        return self.pre_memory(latent_and_action)

    def std(self, raw: Tensor) -> Tensor:
        """A sigmoid between `min_std` and `min_std + 2`."""
        return 2 * torch.sigmoid(raw / 2) + self.min_std

    def _normal(self, output: Tensor) -> Normal:
        mean, raw = output.float().chunk(2, dim=-1)
        return Normal(mean, self.std(raw))

    def _memory_input_layers(self) -> list[Layer]:
        gates = Layer(self.memory_cell.weight_ih, self.memory_cell.bias_ih, (), None)
        return [*layers_of(self.pre_memory.net), gates]

    def _prior_layers(self) -> list[Layer]:
        return layers_of(self.prior_net.net)

    def _posterior_layers(self) -> list[Layer]:
        return layers_of(self.posterior_net.net)
