"""The cells of world models, and their unrolling over time without paying at every step for what can be done once.

Three things are taken out of the loop: the part of a first layer that acts on inputs known beforehand, the cast of
weights to the precision of autocast, and the gradients of weights, which are one product over all steps. Each
function with a derivative of its own is compared with autograd by `tests/test_world_model.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aime_gym.world_model.config import ModelConfig
from aime_gym.world_model.layers import MLP, NormedGRU
from aime_gym.world_model.objective import Latent, Normal, OneHot
from aime_gym.world_model.packed import together


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
            loop.offset = F.linear(known, low[:, loop.recurrent_dim :], loop.offset)
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
            weight = F.pad(weight, (0, low.shape[1] - weight.shape[1]))
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
            layer = Layer(cell.input_layer.weight, cell.input_layer.bias, (cell.norm,), None)
            gates = LoopedMLP([layer], None, cell.input_layer.in_features, *sizes)

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
