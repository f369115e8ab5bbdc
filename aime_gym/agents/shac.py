"""SHAC: an SB3 agent that learns from the gradient of the dream itself.

A dream can be differentiated: how rewards change with actions need not be estimated from samples, as PPO and SAC do.
The short-horizon actor-critic (Xu et al., "Accelerated Policy Learning with Parallel Differentiable Simulation", ICLR
2022) back-propagates the rewards of a short window, and a critic's values, through the simulator into the policy. With
a world model for a simulator and lambda-returns for an objective this is the actor-critic of Dreamer (Hafner et al.,
"Dream to Control", ICLR 2020, equations 6 to 8), but that it acts on observations, as SB3's agents do; with latents for
observations it is that actor-critic.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor, VecTransposeImage
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional

from aime_gym.bodies.body import Choices
from aime_gym.envs.dream import DreamRollout, rollout
from aime_gym.envs.dream_vector import DreamVectorEnv
from aime_gym.envs.sb3 import DreamVecEnv, note_dream
from aime_gym.errors import AimeGymError, warn_caller

WINDOW = 4
"""Steps of a window through which gradients go, by default."""


class TanhPolicy(ActorCriticPolicy):
    """SB3's actor-critic policy with actions squashed by tanh, so that gradients reach the edges of the box.

    Choices stay what they are there: categories, or Bernoulli numbers.
    """

    def _build(self, lr_schedule: Schedule) -> None:
        if Choices.of(self.action_space) is None:
            self.action_dist = SquashedDiagGaussianDistribution(get_action_dim(self.action_space))
        super()._build(lr_schedule)
        if isinstance(self.optimizer, torch.optim.Adam):
            for group in self.optimizer.param_groups:
                group["fused"] = True  # one operation in place of eight a parameter, which are small


class SHAC(OnPolicyAlgorithm):
    """Short-horizon actor-critic, for envs of `aime_gym.make_sb3_env("AimeDream-...")`.

    They show ``"state"`` or ``"latent"``. Agents act, save and load like any other of SB3's. Where actions are choices,
    gradients go through their samples as through their probabilities (straight-through: Bengio et al., 2013).

    Examples:
        >>> import aime_gym
        >>> envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=8, task="walk", seed=0)
        >>> agent = aime_gym.SHAC("MlpPolicy", envs, seed=0).learn(64)
        >>> agent.predict(envs.reset(), deterministic=True)[0].shape
        (8, 6)

    Args:
        policy: ``"MlpPolicy"``.
        env: Dreams; None for an agent that only acts.
        learning_rate: Adam's learning rate, for actor and critic.
        n_steps: H, steps of a window through which gradients go.
        gamma: Discount. Rewards are scaled by 1 - gamma and the dream's `reward_scale`, so that values are averages of
            rewards, and of size 1 in whatever units rewards are.
        gae_lambda: Lambda of the lambda-returns that the actor maximises and the critic learns.
        critic_epochs: Passes over a window's steps for the critic.
        batch_size: Batch size of the critic's updates.
        tau: Share of the critic that moves into its target after each window.
        max_grad_norm: Limit of the norm of the gradient, for actor and critic.
        ent_coef: Weight of the policy's entropy, in rewards a step of size 1. Without it actions drift to the edges of
            the box, where tanh has no gradient and the agent stops to learn.
        policy_kwargs: Keywords of `TanhPolicy`.
        verbose: See SB3's algorithms.
        seed: Seed of weights and actions.
        device: The device of the policy, which is that of the dream.
        tensorboard_log: See SB3's algorithms.
        _init_setup_model: See SB3's algorithms.

    Raises:
        AimeGymError: If the env is no dream, or shows neither ``"state"`` nor ``"latent"``.
    """

    policy_aliases = {"MlpPolicy": TanhPolicy}  # noqa: RUF012 - SB3's own convention
    critic_target: ActorCriticPolicy

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-3,
        n_steps: int = WINDOW,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        critic_epochs: int = 4,
        batch_size: int = 1024,
        tau: float = 0.2,
        max_grad_norm: float = 1.0,
        ent_coef: float = 1e-3,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        tensorboard_log: str | None = None,
        _init_setup_model: bool = True,
    ):
        if isinstance(getattr(env, "observation_space", None), spaces.Dict):  # which SB3 would send in a circle
            raise AimeGymError(
                "SHAC sees observations as one vector: make the dreams with obs_type='state' (all sensors side by "
                "side) or 'latent', not 'dict'. Functions of yours then get the sensors side by side, too."
            )
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]  # SB3's own `load` passes None
            learning_rate,
            n_steps,
            gamma,
            gae_lambda,
            ent_coef,
            vf_coef=1.0,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            seed=seed,
            _init_setup_model=_init_setup_model,
        )
        if self.env is not None:
            dream_of(self.env)
        self.critic_epochs, self.batch_size, self.tau = critic_epochs, batch_size, tau
        self._window: DreamRollout | None = None
        self._actions: list[Tensor] = []
        self._raw: list[Tensor] = []  # what tanh made actions of, [N, A] a step; of choices there is none
        self._uncertainties: list[Tensor] = []  # entropies of these, [N, A] a step, or of choices, [N]

    def _setup_model(self) -> None:
        super()._setup_model()
        self.critic_target = copy.deepcopy(self.policy).requires_grad_(False)
        self._trained = list(self.policy.parameters())  # to list them anew takes long
        self._targets: list[Tensor] = [*self.critic_target.parameters()]
        self._random_states = self._get_random_states()

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seeds what this agent draws and, as every agent of SB3 does, the global generators."""
        super().set_random_seed(seed)
        self._random_states = self._get_random_states()

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Random numbers inside continue the agent's own stream, whatever else draws from torch in between."""
        with torch.random.fork_rng(devices=self._cuda_devices()):
            self._set_random_states(self._random_states)
            yield
            self._random_states = self._get_random_states()

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _get_random_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._cuda_devices())]

    def _set_random_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._cuda_devices(), states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        ready = super()._setup_learn(*args, **kwargs)
        note_dream(self)
        self._began = time.monotonic()
        self._earned, self._taken = np.zeros(self.n_envs), np.zeros(self.n_envs, int)  # of the present episodes
        self._diverged = 0
        return ready

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Dreams one window with the graph that leads to its rewards; the buffer is not used.

        Callbacks find in `locals` what those of PPO do; an episode that ends in a window is done at the window's end.
        """
        dream = dream_of(env)
        callback.on_rollout_start()
        self.policy.set_training_mode(False)
        self._actions, self._raw, self._uncertainties = [], [], []
        with self._own_randomness():
            window = self._window = rollout(dream, self._act, n_rollout_steps)
        rewards_of_steps, counted = window.rewards.detach().cpu().numpy(), window.before_end.cpu().numpy()  # [H, N]
        rewards_of_steps = np.where(np.isfinite(rewards_of_steps), rewards_of_steps, 0)
        self._count_diverged(int((~window.finite).sum()))
        actions, observations = (
            rows.detach().cpu().numpy() for rows in (torch.stack(self._actions), window.observations)
        )  # [H, N, A] and [H + 1, N, D]
        if choices := Choices.of(self.action_space):
            actions = choices.decode(actions)
        self._earned += (rewards_of_steps * counted).sum(0)
        self._taken += counted.sum(0)
        for t, rewards in enumerate(rewards_of_steps):
            dones = window.finished if t == n_rollout_steps - 1 else np.zeros(env.num_envs, bool)
            infos: list[dict[str, Any]] = [{} for _ in dones]
            for slot in dones.nonzero()[0]:
                infos[slot]["episode"] = {
                    "r": float(self._earned[slot]),
                    "l": int(self._taken[slot]),
                    "t": time.monotonic() - self._began,
                }
            self.num_timesteps += env.num_envs
            self._update_info_buffer(infos, dones)
            seen = {"actions": actions[t], "new_obs": observations[t + 1]}
            callback.update_locals(
                {"self": self, "env": env, "rewards": rewards, "dones": dones, "infos": infos, **seen}
            )
            if not callback.on_step():
                return False
        self._earned[window.finished], self._taken[window.finished] = 0.0, 0
        self.logger.record("rollout/reward", float(rewards_of_steps[counted].mean()))
        callback.on_rollout_end()
        return True

    def _count_diverged(self, slots: int) -> None:
        if slots and not self._diverged:
            warn_caller(
                f"In {slots} of {self.n_envs} dreams the model left the finite numbers. Nothing is learned from them, "
                "and they begin anew; how many there were is logged as rollout/diverged. If it goes on, the agent has "
                "found states that the model knows nothing of: max_doubt= cuts dreams before."
            )
        self._diverged += slots
        self.logger.record("rollout/diverged", self._diverged)

    def _act(self, observations: Tensor) -> Tensor:
        """[N, D] -> [N, A], reparameterised; notes what `_entropies` are made of."""
        distribution: Any = self.policy.get_distribution(observations)
        if Choices.of(self.action_space):
            actions, uncertainty = straight_through(distribution)
        else:
            actions, uncertainty = distribution.get_actions(), distribution.distribution.entropy()
            self._raw.append(distribution.gaussian_actions)
        self._uncertainties.append(uncertainty)
        self._actions.append(actions)
        return actions

    def _entropies(self) -> Tensor:
        """The entropies of a window's actions [H, N], which keep them off the flat ends of tanh."""
        uncertainties = torch.stack(self._uncertainties)
        if not self._raw:
            return uncertainties
        raw = torch.stack(self._raw)  # [H, N, A]
        slope = 2 * (math.log(2) - raw - functional.softplus(-2 * raw))  # log of the derivative of tanh
        return (uncertainties + slope).sum(-1)

    def train(self) -> None:
        """One step of the actor, and some of the critic, on the window dreamt last; both weigh steps by `alive`."""
        assert self._window is not None
        window, self._window = self._window, None
        entropies, finite = self._entropies(), window.finite  # [H, N], [N]
        if not finite.any():
            return
        if not finite.all():
            window, entropies = window.only(finite), entropies[:, finite]
        observations, rewards, continuations, cuts, *_ = window
        alive = window.alive  # [H, N]
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        if continuations is None:
            continuations = torch.ones_like(rewards)
        if cuts is None:
            cuts = torch.zeros_like(rewards, dtype=torch.bool)
        returns = self._lambda_returns(observations[1:], rewards * self._reward_weight, continuations, cuts)  # [H, N]
        entropy = (alive * entropies).mean()
        loss = -(alive * returns).mean() - self.ent_coef * entropy
        actor_norm = self._step(loss)

        inputs, targets, weights = (rows[alive > 0] for rows in (observations[:-1].detach(), returns.detach(), alive))
        losses = []
        for _ in range(self.critic_epochs):
            for seen, target, weight in self._batches(inputs, targets, weights):
                error = self.policy.predict_values(seen).squeeze(-1) - target
                value_loss = (weight * error.square()).mean()
                self._step(value_loss)
                losses.append(value_loss.item())
        torch._foreach_lerp_(self._targets, [weight.detach() for weight in self._trained], self.tau)

        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/actor_loss", loss.item())
        self.logger.record("train/entropy", entropy.item())
        self.logger.record("train/actor_grad_norm", actor_norm)
        self.logger.record("train/value_loss", float(np.mean(losses)))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())

    def _batches(self, *rows: Tensor) -> Iterable[Sequence[Tensor]]:
        """Rows [M, ...] in batches, in an order of chance where there are more than one."""
        if len(rows[0]) <= self.batch_size:
            return [rows]
        with self._own_randomness():
            order = torch.randperm(len(rows[0]), device=rows[0].device)
        return zip(*(some[order].split(self.batch_size) for some in rows), strict=True)

    @property
    def _reward_weight(self) -> float:
        """By which rewards are scaled: values are then averages of rewards in units of the largest one."""
        assert self.env is not None
        return (1 - self.gamma) / dream_of(self.env).reward_scale

    def _step(self, loss: Tensor) -> float:
        """One gradient step on what the loss depends on; parameters without a gradient stay. Returns the norm."""
        self.policy.optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=self._trained)  # and not what rewards of the user's are made of
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self.max_grad_norm, foreach=True)
        if norm.isfinite():
            self.policy.optimizer.step()
        return norm.item()

    def _lambda_returns(self, observations: Tensor, rewards: Tensor, continuations: Tensor, cuts: Tensor) -> Tensor:
        """TD(lambda) by the target critic from every step: after the steps [H, N, D] and [H, N] each -> [H, N].

        Beyond a cut there is the critic's value alone.
        """
        values = self.critic_target.predict_values(observations.flatten(0, 1)).view(rewards.shape)
        returns, following = [], values[-1]
        steps = zip(rewards.flip(0), values.flip(0), continuations.flip(0), cuts.flip(0), strict=True)
        for reward, value, goes_on, cut in steps:
            ahead = torch.where(cut, value, (1 - self.gae_lambda) * value + self.gae_lambda * following)
            following = reward + self.gamma * goes_on * ahead
            returns.append(following)
        return torch.stack(returns[::-1])

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", "critic_target"], []

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "critic_target",
            "_trained",
            "_targets",
            "_window",
            "_raw",
            "_uncertainties",
            "_actions",
            "_earned",
            "_taken",
            "_random_states",
            "_diverged",
        ]


def straight_through(distribution: Any) -> tuple[Tensor, Tensor]:
    """A sample of choices as their vectors [N, A], with the gradient of their probabilities, and its entropy [N].

    Args:
        distribution: SB3's `CategoricalDistribution`, `MultiCategoricalDistribution` or `BernoulliDistribution`.
    """
    of_choices = distribution.distribution
    vectors = []
    for one in of_choices if isinstance(of_choices, list) else [of_choices]:
        sample = one.sample()
        vector = functional.one_hot(sample, one.probs.shape[-1]) if isinstance(one, Categorical) else sample
        vectors.append(vector.detach() + one.probs - one.probs.detach())
    return torch.cat(vectors, -1), distribution.entropy()


def dream_of(env: VecEnv) -> DreamVectorEnv:
    """The dream inside SB3's VecEnv.

    Raises:
        AimeGymError: If there is none, a wrapper would be left out, or it shows neither ``"state"`` nor ``"latent"``.
    """
    inner: Any = env.venv if isinstance(env, VecMonitor) else env
    if isinstance(inner, VecTransposeImage):
        raise AimeGymError(
            "SHAC learns from states and latents, not from images: make_sb3_env(..., obs_type='latent')."
        )
    if isinstance(inner, VecEnvWrapper):
        raise AimeGymError(
            f"SHAC learns through the dream itself, without the {type(inner).__name__} around it: pass what "
            "aime_gym.make_sb3_env gave, unwrapped."
        )
    if not isinstance(inner, DreamVecEnv):
        raise AimeGymError(
            "SHAC learns from gradients, which only a dream has: pass aime_gym.make_sb3_env('AimeDream-...-v0'), "
            f"not {type(inner).__name__}."
        )
    if inner.envs.obs_type not in ("state", "latent"):
        raise AimeGymError(f"SHAC sees obs_type 'state' or 'latent'; these dreams show {inner.envs.obs_type!r}.")
    return inner.envs
