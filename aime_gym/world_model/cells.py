"""The cells of world models, and their unrolling over time by the means of `aime_gym.world_model.recurrence`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aime_gym.world_model.config import ModelConfig
from aime_gym.world_model.layers import MLP
from aime_gym.world_model.objective import Latent, Normal, OneHot
from aime_gym.world_model.packed import together
from aime_gym.world_model.recurrence import GRU, Layer, LoopedMLP, layers_of, side_by_side


class NormedGRU(nn.Module):
    """The GRU of AIME-v2: one product for all gates, and a LayerNorm over them (Hafner et al., ICLR 2021)."""

    def __init__(self, input_dim: int, memory_dim: int):
        super().__init__()
        self.input_layer = nn.Linear(input_dim + memory_dim, 3 * memory_dim)
        self.norm = nn.LayerNorm(3 * memory_dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """[B, I], [B, M] -> [B, M]."""
        return self.update(self.norm(self.input_layer(torch.cat([x, memory], dim=-1))), memory)

    @staticmethod
    def update(gates: Tensor, memory: Tensor) -> Tensor:
        """The next memory from the normed gates: [B, 3 M], [B, M] -> [B, M]."""
        keep, reset, proposal = gates.chunk(3, dim=-1)
        return torch.lerp(torch.tanh(reset.sigmoid() * proposal), memory, keep.sigmoid())

    @property
    def layer(self) -> Layer:
        """The gates of `concat(x, h)`."""
        return Layer(self.input_layer.weight, self.input_layer.bias, (self.norm,), None)


Advance = Callable[[int, Tensor, "Tensor | None", Tensor], Tensor]
"""The next memory [B, M] from step, latent [B, S], action [B, A] (None where all are known) and memory [B, M]."""

Actions = Tensor | Callable[[int, Tensor], Tensor]
"""All actions [T, B, A], or a function of the step and the state [B, F] before it that gives one step's [B, A]."""


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
        actions: Actions,
        embeddings: Tensor | None,
        noise: Tensor | None,
        steps: int,
        is_first: Tensor | None = None,
    ) -> tuple[Tensor, Latent]:
        """Steps of the posterior, or of the prior where there are no embeddings.

        The same numbers as a loop of `WorldModel.posterior_step` or `prior_step`, faster: why there are both is said in
        `aime_gym.world_model.model`.

        Args:
            state: [B, F]
            actions: All of them, or a policy.
            embeddings: [T, B, E], or None for the prior.
            noise: Standard-normal [T, B, S], or None to go on with means or the most likely classes.
            steps: T
            is_first: Steps that begin an episode, before which the state is zeros, [T, B, 1] of 0 and 1.

        Returns:
            Features [T, B, F] and the distributions [T, B, S] of their latents, in float32.
        """
        device = state.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        with torch.autocast(device, enabled=False):
            known = actions if isinstance(actions, Tensor) else None
            sizes = steps, len(state), dtype
            advance = self._recurrence(known, *sizes)
            layers = self._prior_layers() if embeddings is None else self._posterior_layers()
            estimator = LoopedMLP(layers, embeddings, self.memory_dim, *sizes)
            begins = [False] * steps if is_first is None else is_first.flatten(1).any(1).tolist()

            memory, latent = state.float().split([self.memory_dim, self.stochastic_dim], dim=-1)
            memories, latents, outputs = [], [], []
            for t in range(steps):
                if is_first is not None and begins[t]:
                    memory, latent = (part * (1 - is_first[t]) for part in (memory, latent))
                own = None if known is not None else actions(t, torch.cat([memory, latent], dim=-1))  # type: ignore[operator]
                memory = advance(t, latent, own, memory)  # [B, M]
                output = estimator(t, memory)  # [B, 2 S], or logits [B, S]
                latent = self.latent(output).sample(None if noise is None else noise[t])
                memories.append(memory)
                latents.append(latent)
                outputs.append(output)
            features = torch.cat([torch.stack(memories), torch.stack(latents)], dim=-1)
            return features, self.latent(torch.stack(outputs))

    def _recurrence(self, known: Tensor | None, steps: int, batch: int, dtype: torch.dtype) -> Advance:
        """What makes the next memory of so many steps, whose actions [T, B, A] may be known."""
        cell, sizes = self.memory_cell, (steps, batch, dtype)
        if isinstance(cell, NormedGRU):
            read = LoopedMLP(self._memory_input_layers(), known, self.stochastic_dim, *sizes)
            gates = LoopedMLP([cell.layer], None, cell.input_layer.in_features, *sizes)

            def advance_normed(t: int, latent: Tensor, own: Tensor | None, memory: Tensor) -> Tensor:
                return cell.update(gates(t, torch.cat([read(t, latent, own), memory], dim=-1)), memory)

            return advance_normed
        input_gates = [*self._memory_input_layers(), Layer(cell.weight_ih, cell.bias_ih, (), None)]
        from_input = LoopedMLP(input_gates, known, self.stochastic_dim, *sizes)
        from_memory = LoopedMLP([Layer(cell.weight_hh, cell.bias_hh, (), None)], None, self.memory_dim, *sizes)

        def advance(t: int, latent: Tensor, own: Tensor | None, memory: Tensor) -> Tensor:
            return GRU.apply(from_input(t, latent, own), from_memory(t, memory), memory)

        return advance

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
        return side_by_side(self.prior_mean.net, self.prior_std.net)

    def _posterior_layers(self) -> list[Layer]:
        return side_by_side(self.posterior_mean.net, self.posterior_std.net)


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
