"""What is fitted on the frozen features of a world model: task rewards, doubt, and the physics state."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aime_gym.bodies.body import EMBODIMENTS, Sensor
from aime_gym.bodies.sensors import AngleCode, scale
from aime_gym.errors import AimeGymError, Section, unknown_name
from aime_gym.files import are_numbers


class Heads(nn.Module):
    """Small networks on features f = concat(h, s); all of them regress standardised targets.

    The ensemble is that of Plan2Explore (Sekar et al., ICML 2020): members that agree where there were data and
    disagree where there were none.

    Args:
        feature_dim: F, of the world model.
        action_dim: A.
        tasks: One reward head each.
        embodiment: The body's name.
        target_dim: C, of the codes of all its tabular sensors together, see `ModelConfig.codes`.
        nq: Size of its `qpos`; 0 for a body without a known physics state.
        nv: Size of its `qvel`.
        quaternions: Where unit quaternions begin in `qpos`.
        reward_limits: Smallest and largest reward of a step; by default those of the suite's tasks, 0 and the action
            repeat.
        terminates: Whether episodes can terminate, which a head predicts.
        pays_ends: Whether what a step pays that ends an episode has heads of its own. Those of rewards are then of
            steps that do not: as a mean over both they would pay a part of it, and a dream ends or goes on.
        ensemble: Members, K; 0 for no ensemble, as where there is no tabular sensor for it to predict.
        hidden_size: Units in the hidden layers of the reward and physics heads.
        ensemble_hidden_size: The same for the members of the ensemble; smaller, as a dream may ask all of them at every
            step.

    Attributes:
        config: The arguments, as JSON can hold them.
    """

    reward_mean: Tensor
    reward_std: Tensor
    target_mean: Tensor
    target_std: Tensor
    physics_mean: Tensor
    physics_std: Tensor
    end_mean: Tensor
    end_std: Tensor

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        tasks: Sequence[str],
        embodiment: str,
        target_dim: int,
        nq: int,
        nv: int,
        quaternions: Sequence[int] = (),
        ensemble: int = 5,
        hidden_size: int = 128,
        ensemble_hidden_size: int = 64,
        reward_limits: Sequence[float] | None = None,
        terminates: bool = False,
        pays_ends: bool = False,
    ):
        super().__init__()
        self.config: dict[str, Any] = {
            "feature_dim": feature_dim,
            "action_dim": action_dim,
            "tasks": list(tasks),
            "embodiment": embodiment,
            "target_dim": target_dim,
            "nq": nq,
            "nv": nv,
            "quaternions": list(quaternions),
            "ensemble": ensemble,
            "hidden_size": hidden_size,
            "ensemble_hidden_size": ensemble_hidden_size,
            "reward_limits": None if reward_limits is None else [float(limit) for limit in reward_limits],
            "terminates": terminates,
            "pays_ends": pays_ends,
        }
        self.tasks = tuple(tasks)
        body = EMBODIMENTS.get(embodiment)
        low, high = reward_limits or (0.0, float(body.action_repeat if body else 1))
        self.reward_limits = float(low), float(high)
        self.code = PhysicsCode(
            nq, nv, body.rotations if body else (), tuple(body.translations) if body else (), tuple(quaternions)
        )

        self.rewards = nn.ModuleDict({task: _network(feature_dim, hidden_size, 1) for task in self.tasks})
        inputs = feature_dim + action_dim
        self.ensemble = _Ensemble(ensemble, inputs, ensemble_hidden_size, target_dim) if ensemble else None
        self.state = _network(feature_dim, hidden_size, self.code.dim) if self.code.dim else None
        self.termination = _network(feature_dim, hidden_size, 1) if terminates else None
        self.ends = nn.ModuleDict({task: _network(feature_dim, hidden_size, 1) for task in self.tasks if pays_ends})
        sizes = {"reward": len(self.tasks), "target": target_dim, "physics": self.code.dim}
        for name, dim in (sizes | ({"end": len(self.tasks)} if pays_ends else {})).items():
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))

    @property
    def reward_scale(self) -> float:
        """The size of a step's reward: 1 for the suite's tasks, else the largest in the data, 1 if all are 0."""
        limits = self.config["reward_limits"]
        return (max(map(abs, limits)) if limits else 0.0) or 1.0

    @torch.no_grad()
    def standardise_by(self, rewards: Tensor, targets: Tensor, codes: Tensor, keep_outputs: bool = False) -> None:
        """Takes the scales of the targets from data; for constants see `scale`.

        Args:
            rewards: `[N, tasks]`.
            targets: `[N, C]`, codes of tabular sensors.
            codes: `[N, C]`, see `PhysicsCode.encode`.
            keep_outputs: Whether what the heads say, in own units, stays what it is: for heads that have learned
                (Pop-Art, van Hasselt et al., NeurIPS 2016). A reward that was rare gets the scale it needs.
        """
        for name, values in (("reward", rewards), ("target", targets), ("physics", codes)):
            self._standardise(name, values, keep_outputs)

    @torch.no_grad()
    def standardise_ends(self, rewards: Tensor, keep_outputs: bool = False) -> None:
        """Takes the scales of what ends pay from that, `[N, tasks]`; for `keep_outputs` see `standardise_by`."""
        self._standardise("end", rewards, keep_outputs)

    def _standardise(self, name: str, values: Tensor, keep_outputs: bool) -> None:
        if not values.shape[1]:
            return
        mean, std = values.double().mean(0), values.double().std(0, correction=min(1, len(values) - 1))
        std = scale(mean, std)
        own_mean, own_std = getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
        if keep_outputs:
            self._rescale(name, own_std / std, (own_mean - mean) / std)
        own_mean.copy_(mean)
        own_std.copy_(std)

    def _rescale(self, name: str, scale: Tensor, shift: Tensor) -> None:
        """Outputs [..., D] of the networks for one kind of target become `outputs * scale + shift`."""
        if name == "target":
            if self.ensemble is None:
                return
            self.ensemble.weights[-1].mul_(scale)  # [K, H, D]
            self.ensemble.biases[-1].mul_(scale).add_(shift)
        elif name == "physics":
            _rescale_outputs(self.state, scale, shift)
        else:
            for i, network in enumerate((self.ends if name == "end" else self.rewards).values()):
                _rescale_outputs(network, scale[i : i + 1], shift[i : i + 1])

    def reward(self, features: Tensor, task: str) -> Tensor:
        """Reward of the agent step that led to each feature, as a dream pays it: see `paid`.

        Args:
            features: `[..., F]`.
            task: One of `tasks`.

        Returns:
            `[...]`, within `reward_limits`.

        Raises:
            AimeGymError: If there is no head for this task.
        """
        if task not in self.tasks:
            raise unknown_name("task of this model's heads", task, self.tasks)
        i = self.tasks.index(task)
        reward = self.rewards[task](features).squeeze(-1).float() * self.reward_std[i] + self.reward_mean[i]
        reward = reward.clamp(*self.reward_limits)
        if self.termination is None or not self.ends:
            return reward
        end = self.ends[task](features).squeeze(-1).float() * self.end_std[i] + self.end_mean[i]
        logits = self.termination(features).squeeze(-1).float()
        return paid(reward, end.clamp(*self.reward_limits), logits)

    def continuation(self, features: Tensor) -> Tensor:
        """The probability that the episode goes on after each feature `[..., F]`: `[...]`; 1 if it never terminates."""
        if self.termination is None:
            return features.new_ones(features.shape[:-1])
        return torch.sigmoid(-self.termination(features).squeeze(-1).float())

    def disagreement(self, features: Tensor, actions: Tensor) -> Tensor:
        """How much the ensemble disagrees about the next observation: its standard deviation, averaged over dims.

        Args:
            features: `[..., F]`, f_t.
            actions: `[..., A]`, the action a_{t+1} that is taken there.

        Returns:
            `[...]`, in standard deviations of the sensors.
        """
        assert self.ensemble is not None
        return self.ensemble(torch.cat([features, actions], -1)).std(0, correction=0).mean(-1)

    def physics(self, features: Tensor) -> Tensor:
        """The physics state, `[..., nq + nv]`: qpos (unseen translations 0) and qvel; empty if it is not known."""
        if self.state is None:
            return features[..., :0]
        return self.code.decode(self.state(features).float() * self.physics_std + self.physics_mean)

    def losses(self, features: Tensor, rewards: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared errors of the reward heads and of the physics head, in standardised units; 0 without such.

        Args:
            features: `[N, F]`.
            rewards: `[N, tasks]`.
            codes: `[N, C]`.
        """
        physics = features.new_zeros(())
        if self.state is not None:
            physics = functional.mse_loss(self.state(features), (codes - self.physics_mean) / self.physics_std)
        if not self.tasks:
            return torch.zeros_like(physics), physics
        predicted = torch.cat([head(features) for head in self.rewards.values()], -1)  # [N, tasks]
        reward = _mean_square(predicted, (rewards - self.reward_mean) / self.reward_std)
        return reward, physics

    def end_loss(self, features: Tensor, rewards: Tensor) -> Tensor:
        """Mean squared error of what ends pay, in standardised units; 0 where no head predicts it.

        Args:
            features: `[N, F]`, of rows that end an episode.
            rewards: `[N, tasks]`.
        """
        if not self.ends:
            return features.new_zeros(())
        predicted = torch.cat([head(features) for head in self.ends.values()], -1)  # [N, tasks]
        return _mean_square(predicted, (rewards - self.end_mean) / self.end_std)

    def ensemble_loss(self, features: Tensor, actions: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of the members, each with a batch of its own; 0 without an ensemble.

        Args:
            features: `[K, N, F]`.
            actions: `[K, N, A]`.
            targets: `[K, N, C]`, the codes of sensors one step later.
        """
        if self.ensemble is None:
            return features.new_zeros(())
        predicted = self.ensemble.members(torch.cat([features, actions], -1))
        return functional.mse_loss(predicted, (targets - self.target_mean) / self.target_std)


def paid(rewards: Tensor, ends: Tensor, logits: Tensor) -> Tensor:
    """What steps pay where an end pays otherwise: the one or the other, with the gradient of their expectation.

    The one that is paid has a gradient that knows nothing of how actions make an end more likely, which is what an
    agent is to learn of a crash or a landing.

    Args:
        rewards: What a step pays that does not end the episode, [...].
        ends: What it pays if it does, [...].
        logits: The logits of the probability that it does, [...]; where they are positive it does.
    """
    chosen = torch.where(logits > 0, ends, rewards)
    if not torch.is_grad_enabled():
        return chosen
    expected = torch.lerp(rewards, ends, torch.sigmoid(logits))
    return chosen.detach() + (expected - expected.detach())  # less itself it is 0, whose gradient stays


_MOST_MEMBERS = 64


def heads_arguments(content: Any) -> dict[str, Any]:
    """The arguments of `Heads` from a file, checked before memory is taken.

    Raises:
        AimeGymError: If one is missing, unknown or of another kind or size than it can be.
    """
    least = {"feature_dim": 1, "action_dim": 1, "target_dim": 0, "nq": 0, "nv": 0}
    least |= {"ensemble": 0, "hidden_size": 1, "ensemble_hidden_size": 1}
    known = (*least, "tasks", "embodiment", "quaternions", "reward_limits", "terminates", "pays_ends")
    section = Section("heads", content, known, required=(*least, "tasks", "embodiment"))
    sizes = {key: section.integer(key, None, low) for key, low in least.items()}
    section.integer("ensemble", None, 0, _MOST_MEMBERS)
    name, quaternions = section.text("embodiment"), section.integers("quaternions")
    body = EMBODIMENTS.get(name) if sizes["nq"] else None
    entries = [*(begin + 3 for begin in quaternions), *(body.rotations if body else ())]
    if any(entry >= sizes["nq"] for entry in entries):
        raise AimeGymError(f"heads.nq: qpos of {name} has more than {max(entries)} entries; got {sizes['nq']}.")
    limits = content.get("reward_limits")
    if limits is not None and not (are_numbers(limits) and len(limits) == 2 and limits[0] <= limits[1]):
        raise AimeGymError(f"heads.reward_limits: expected the smallest and the largest reward, got {limits!r:.80}.")
    told = {"embodiment": name, "tasks": section.texts("tasks"), "quaternions": quaternions, "reward_limits": limits}
    flags = {key: section.flag(key) for key in ("terminates", "pays_ends")}
    if flags["pays_ends"] and not flags["terminates"]:
        raise AimeGymError("heads.pays_ends: expected heads whose episodes can end (terminates: true).")
    return {**sizes, **told, **flags}


class PhysicsCode:
    """Writes `qpos` and `qvel` as numbers that can be regressed, and reads them back.

    Unseen translations are left out; unlimited rotations are written by an `AngleCode`; quaternions stay and are
    normalised when read back.

    Args:
        nq: Size of `qpos`.
        nv: Size of `qvel`.
        rotations: Entries of `qpos` that are unlimited rotations.
        unseen: Entries of `qpos` that no sensor sees.
        quaternions: Where quaternions begin in `qpos`.
    """

    def __init__(
        self,
        nq: int,
        nv: int,
        rotations: Sequence[int] = (),
        unseen: Sequence[int] = (),
        quaternions: tuple[int, ...] = (),
    ):
        self.nq, self.nv, self.quaternions = nq, nv, quaternions
        self.seen = [i for i in range(nq) if i not in unseen]
        angles = tuple(self.seen.index(i) for i in rotations)
        self.angles = AngleCode(Sensor("qpos", len(self.seen), rotations=angles), Sensor("qvel", nv))
        self.dim = self.angles.size

    def encode(self, physics: Tensor) -> Tensor:
        """`[..., nq + nv (+ na)]` -> `[..., C]`; muscle activations are left out."""
        qpos, qvel = physics[..., : self.nq], physics[..., self.nq : self.nq + self.nv]
        return self.angles.encode(torch.cat([qpos[..., self.seen], qvel], -1))

    def decode(self, code: Tensor) -> Tensor:
        """`[..., C]` -> `[..., nq + nv]`."""
        seen, qvel = self.angles.decode(code).split([len(self.seen), self.nv], -1)
        qpos = code.new_zeros(*code.shape[:-1], self.nq)
        qpos[..., self.seen] = seen
        for begin in self.quaternions:
            qpos[..., begin : begin + 4] = functional.normalize(qpos[..., begin : begin + 4], dim=-1)
        return torch.cat([qpos, qvel], -1)


class MLPs(nn.ModuleList):
    """K MLPs on one input, each with weights of its own: [..., in_dim] -> [K, ..., out_dim]."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [K, ..., out_dim]."""
        return torch.stack([network(x) for network in self])


class BatchedMLPs(nn.Module):
    """K MLPs with ELU on one input, whose weights are one array a layer: [..., in_dim] -> [K, ..., out_dim]."""

    def __init__(self, members: int, in_dim: int, out_dim: int, hidden_size: int, hidden_layers: int):
        super().__init__()
        sizes = [in_dim, *[hidden_size] * hidden_layers, out_dim]
        layers: list[nn.Module] = []
        for size, next_size in pairwise(sizes):
            layers += [BatchedLinear(members, size, next_size), nn.ELU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [K, ..., out_dim]."""
        return self.net(x.flatten(0, -2)[None]).unflatten(1, x.shape[:-1])


class BatchedLinear(nn.Module):
    """K Linear layers: [K or 1, N, in_dim] -> [K, N, out_dim]."""

    def __init__(self, members: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = in_dim**-0.5  # torch's default for Linear
        self.weight = nn.Parameter(torch.empty(members, out_dim, in_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """[K or 1, N, in_dim] -> [K, N, out_dim]."""
        return x @ self.weight.mT + self.bias[:, None]


class _Ensemble(nn.Module):
    """K networks of two hidden layers, evaluated in batched matrix products."""

    def __init__(self, members: int, in_dim: int, hidden: int, out_dim: int):
        super().__init__()
        sizes = ((in_dim, hidden), (hidden, hidden), (hidden, out_dim))
        self.weights = nn.ParameterList(_uniform(members, i, o, fan_in=i) for i, o in sizes)
        self.biases = nn.ParameterList(_uniform(members, 1, o, fan_in=i) for i, o in sizes)
        self.size = members

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., I]` -> `[K, ..., D]`: all members on the same inputs."""
        flat = inputs.reshape(1, -1, inputs.shape[-1]).expand(self.size, -1, -1)  # [K, N, I]
        return self.members(flat).unflatten(1, inputs.shape[:-1]) if inputs.ndim > 1 else self.members(flat)[:, 0]

    def members(self, hidden: Tensor) -> Tensor:
        """`[K, N, I]` -> `[K, N, D]`: each member on inputs of its own."""
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            if i < last:
                hidden = functional.silu(functional.layer_norm(hidden, hidden.shape[-1:]))
        return hidden


def _uniform(members: int, in_dim: int, out_dim: int, fan_in: int) -> nn.Parameter:
    bound = fan_in**-0.5  # torch's default for Linear
    return nn.Parameter(torch.empty(members, in_dim, out_dim).uniform_(-bound, bound))


def _network(in_dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, hidden),
        nn.LayerNorm(hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.LayerNorm(hidden),
        nn.SiLU(),
        nn.Linear(hidden, out_dim),
    )


def _mean_square(predicted: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error of rows [N, D]; 0 where there are none."""
    return functional.mse_loss(predicted, targets) if len(targets) else predicted.sum()


def _rescale_outputs(network: nn.Module | None, scale: Tensor, shift: Tensor) -> None:
    """Rescales and shifts the outputs of a `_network`, in place: [D], [D]."""
    assert isinstance(network, nn.Sequential)
    last = network[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(scale[:, None])
    last.bias.mul_(scale).add_(shift)
