"""AIME that goes on learning where it acts: AIME-v2 and AIME-NoB (Zhang et al., arXiv 2404.18896).

After each episode the model learns from it, beside data that it was trained with. A surrogate reward says how much
what is seen looks like the demonstrations: ``"ail"`` by a discriminator (Ho and Ermon, NIPS 2016),
``"viper"`` by the evidence under a model that has seen nothing but demonstrations (Escontrela et al., NeurIPS 2023).
The model learns to decode it, and the policy learns from AIME's loss and from what it gains where the model imagines
that it acts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast, get_args

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import Tensor, nn

from aime_gym.agents.aime import AIME, discriminator_loss, policy_loss, value_loss
from aime_gym.data.dataset import Batch, TrajectoryDataset, WindowSampler
from aime_gym.envs.start_bank import to_frames
from aime_gym.envs.wrappers import check_shown
from aime_gym.errors import AimeGymError, check_natural, check_positive, checked_switches, unknown_name
from aime_gym.observations import to_tensors
from aime_gym.parallel import seeded
from aime_gym.training.trainer import adam
from aime_gym.world_model.checkpoint import load_pretrained_model, with_reward
from aime_gym.world_model.config import END
from aime_gym.world_model.layers import MLP, Standardiser, TanhGaussianPolicy
from aime_gym.world_model.model import Observations, WorldModel

Surrogate = Literal["ail", "viper"]

Sight = Literal["moves", "embeddings"]

LEAST = 0.02
"""The smallest unit of what a discriminator sees, in those of the model: what hardly varies would tell too easily."""


@torch.no_grad()
def viper_rewards(likelihood_model: WorldModel, observations: Observations) -> tuple[Tensor, Tensor]:
    """How likely each step of whole episodes is under a model of demonstrations that knows no actions.

    Args:
        likelihood_model: The model of demonstrations.
        observations: What it observes, from the first frame of episodes, [T, B, ...].

    Returns:
        The rewards, symlog of the evidence of each step, and that evidence, [T, B] each; 0 for the first frame.
    """
    actions = next(iter(observations.values())).new_zeros(*next(iter(observations.values())).shape[:2], 0)
    evidence = likelihood_model.evidence(observations, actions, sample=False).per_step.clone()
    evidence[0] = 0.0
    return evidence.sign() * evidence.abs().log1p(), evidence


class OnlineAIME(AIME):
    """AIME in a real env: imitates first, then acts, and learns after each episode, as SB3's algorithms do.

    The world model is a copy that learns on; `save` writes it beside the agent. The defaults are small enough for two
    cores; ``OnlineAIME.original(...)`` has the sizes of the paper.

    Examples:
        >>> import gymnasium, aime_gym
        >>> world = gymnasium.make("AimeReal-Walker-v0", task="walk")
        >>> small = {"imitation_updates": 1, "updates": 1, "batch_size": 4, "horizon": 8}
        >>> agent = aime_gym.OnlineAIME("walker-state", "walker-walk", world, **small).learn(20)
        >>> agent.num_timesteps, agent.model.config.outputs[-1]
        (20, 'ail_reward')

    Args:
        model: See `AIME`.
        demonstrations: See `AIME`.
        env: Where it acts: a Gymnasium env with the model's actions that shows what the model observes, or its id; None
            for an agent that only acts.
        reward: The surrogate reward: ``"ail"`` or ``"viper"``. The env's own is never learned from.
        body_data: Folders of trajectories with actions that the model was trained with: half of each batch, so that it
            does not forget.
        likelihood_model: For ``"viper"``: a model of the demonstrations that knows no actions; by default one is
            trained before the first episode.
        imitation_updates: Updates of the policy by AIME alone, before the first episode.
        likelihood_updates: Updates of a likelihood model that is trained here.
        updates: Updates after each episode.
        imagined_starts: States from which each update imagines.
        imagined_steps: Steps that it imagines, H.
        demonstrated_starts: As many more states, of those in which the model sees the demonstrations.
        average: Share by which an average of the policy's weights moves to them at each update. `predict` acts with it
            where it is deterministic: the policy itself walks after one update and stumbles after the next.
        noise: Standard deviation of the noise on its actions in the env, so that the model meets what they do.
        sight: What a discriminator sees: ``"moves"``, sensors and how they have changed since the step before, in units
            of the demonstrations (embeddings, of images), or the original's ``"embeddings"`` of single frames.
        gain: The weight of what the policy gains there; by default 1 with ``"ail"`` and 0.1 with ``"viper"``.
        model_lr: The model's learning rate.
        value_lr: The value network's.
        discriminator_lr: The discriminator's.
        discriminator_size: Units in each of its three hidden layers.
        batch_size: Windows an update, B, of demonstrations and of data each.
        lr: The policy's learning rate.
        held_out: See `Imitator`; for the updates before the first episode.
        **options: Options of `AIME`.

    Attributes:
        num_timesteps: Steps in the env so far.
        returns: The env's own returns of the episodes so far, for logs.

    Raises:
        AimeGymError: If model, demonstrations, env and data do not fit together.
    """

    name = "online"
    original_settings: ClassVar[dict[str, Any]] = {
        **AIME.original_settings,
        **{"imitation_updates": 2000, "updates": 100, "discriminator_size": 1024, "sight": "embeddings", "noise": 0.0},
        **{"imagined_starts": 2500, "imagined_steps": 15, "demonstrated_starts": 0, "average": 1.0},
        **{"model_lr": 3e-4, "value_lr": 8e-5, "discriminator_lr": 1e-4},
    }

    def __init__(
        self,
        model: WorldModel | str | Path,
        demonstrations: str | Path | None = None,
        env: gymnasium.Env | str | None = None,
        *,
        reward: Surrogate = "ail",
        body_data: str | Path | Sequence[str | Path] = (),
        likelihood_model: WorldModel | str | Path | None = None,
        imitation_updates: int = 1000,
        likelihood_updates: int = 500,
        updates: int = 60,
        imagined_starts: int = 128,
        imagined_steps: int = 8,
        demonstrated_starts: int = 32,
        average: float = 0.01,
        noise: float = 0.2,
        sight: Sight = "moves",
        gain: float | None = None,
        model_lr: float = 5e-4,
        value_lr: float = 1e-3,
        discriminator_lr: float = 3e-4,
        discriminator_size: int = 256,
        batch_size: int = 24,
        horizon: int = 24,
        lr: float = 5e-4,
        held_out: float = 0.0,
        **options: Any,
    ):
        for name, word, words in (("reward", reward, get_args(Surrogate)), ("sight", sight, get_args(Sight))):
            if word not in words:
                raise unknown_name(name, word, words)
        for name, number in (("updates", updates), ("imagined_starts", imagined_starts)):
            check_positive(number, name)
        if check_positive(imagined_steps, "imagined_steps") < 2:
            raise AimeGymError(f"imagined_steps is 2 or more; got {imagined_steps!r}.")
        if not 0 <= noise < math.inf:
            raise AimeGymError(f"noise is a finite number, 0 or more; got {noise!r}.")
        if not 0 < average <= 1:
            raise AimeGymError(f"average is a share above 0 and at most 1; got {average!r}.")
        self.reward, self.sight = reward, sight
        self.noise, self.average = noise, average
        self.demonstrated_starts = check_natural(demonstrated_starts, "demonstrated_starts")
        self.imitation_updates = check_natural(imitation_updates, "imitation_updates")
        self.likelihood_updates = check_positive(likelihood_updates, "likelihood_updates")
        self.discriminator_size = check_positive(discriminator_size, "discriminator_size")
        self.updates, self.imagined_starts, self.imagined_steps = updates, imagined_starts, imagined_steps
        self.gain = gain if gain is not None else {"ail": 1.0, "viper": 0.1}[reward]
        self._rates = {"model": model_lr, "value": value_lr, "discriminator": discriminator_lr, "policy": lr}
        self._rates["likelihood"] = model_lr
        sizes = {"batch_size": batch_size, "horizon": horizon, "lr": lr, "held_out": held_out}
        super().__init__(model, demonstrations, **{"schedule": "constant", **options, **sizes})
        self.num_timesteps = 0
        self.returns: list[float] = []
        self.logger: Logger = configure(None, [""])
        self._replay: list[dict[str, np.ndarray]] = []
        folders = [body_data] if isinstance(body_data, str | Path) else [*body_data]
        needed, images = (*self.model.observed, "pre_action"), "image" in self.model.observed
        self._body = TrajectoryDataset([*map(str, folders)], needed, images) if folders else None
        known = likelihood_model
        self._likelihood = known = load_pretrained_model(known) if isinstance(known, str | Path) else known
        if known is not None and (known.config.action_dim or known.observed != self.model.observed):
            raise AimeGymError(
                f"likelihood_model: expected one without actions that observes {self.model.observed}; got one of "
                f"{known.config.action_dim} actions that observes {known.observed}."
            )
        self.env: gymnasium.Env | None = None
        if env is not None:
            self.set_env(gymnasium.make(env) if isinstance(env, str) else env)

    def _build(self) -> nn.Module:
        module = super()._build()
        self.model = self._frozen = with_reward(self._frozen, f"{self.reward}_reward")
        config = self.model.config
        value = MLP(config.feature_dim, 1, 128, 2)
        networks: dict[str, nn.Module] = {"value": value, "target": copy.deepcopy(value).requires_grad_(False)}
        networks["average"] = copy.deepcopy(cast(nn.ModuleDict, module)["policy"]).requires_grad_(False)
        if self.reward == "ail":
            dims = {name: (3, 64, 64) if name == "image" else (config.dims[name],) for name in self.model.observed}
            seen = {name: torch.zeros(1, 1, *dim, device=self.device) for name, dim in dims.items()}
            networks["discriminator"] = MLP(size := self._sights(seen).shape[-1], 1, self.discriminator_size, 3)
            if self.sight == "moves":
                networks["units"] = units = Standardiser(size)
                if (shown := self.demonstrations) is not None and "image" not in seen:
                    whole = [{name: shown[i][name][:, None] for name in seen} for i in range(len(shown))]
                    moves = torch.cat([self._sights(to_tensors(one, self.device))[1:, 0] for one in whole])
                    units.set(moves.mean(0), moves.std(0).clamp_min(LEAST))
        cast(nn.ModuleDict, module).update(networks)
        self._optimisers: dict[str, torch.optim.Adam] = {}
        return module

    def _settings(self) -> dict[str, Any]:
        own = {"reward": self.reward, "sight": self.sight, "discriminator_size": self.discriminator_size}
        return {**super()._settings(), **own}

    def _sights(self, batch: Observations) -> Tensor:
        """What the discriminator sees of windows, [T, B, E]; the first row of each has no move yet."""
        model, module = self._frozen, cast(Any, getattr(self, "module", {}))
        if self.sight == "embeddings":
            return model.encode(batch)
        seen = {name: batch[name] for name in model.observed}
        shown = model.encode(seen) if "image" in seen else torch.cat([*model.standardise(seen).values()], -1)
        moves = torch.cat([shown, shown.diff(dim=0, prepend=shown[:1])], -1)
        return module["units"](moves) if "units" in module else moves

    def set_env(self, env: gymnasium.Env) -> None:
        """Takes an env to act in.

        Raises:
            AimeGymError: If it does not take the model's actions or shows something else than the model observes.
        """
        check_shown(self.model, env)
        self.env = env

    def get_env(self) -> VecEnv | None:
        """The env as SB3's callbacks know it."""
        return None if self.env is None else DummyVecEnv([lambda: cast(gymnasium.Env, self.env)])

    def get_vec_normalize_env(self) -> None:
        """None: nothing is normalised outside the model."""

    def imitate(self, updates: int, callback: Any = (), folder: str | Path | None = None) -> Self:
        """Learns from the demonstrations alone, as `AIME.learn` does; `learn` begins with it where nobody else did."""
        super().learn(updates, callback, folder)
        polyak_update(self._acting(False).parameters(), self._acting(True).parameters(), 1.0)
        self._begun = True
        return self

    @checked_switches
    def learn(  # type: ignore[override]  # steps of an env, as SB3 counts, and not updates
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True
    ) -> Self:
        """Acts and learns, for at least so many steps of the env.

        Args:
            total_timesteps: Agent steps in the env; the last episode is cut there.
            callback: Callbacks of SB3, which are called after each step of the env.
            reset_num_timesteps: Whether the count begins anew; what was learned and seen stays in any case.

        Returns:
            The agent.

        Raises:
            AimeGymError: If there are no demonstrations or no env, or a loss is not finite.
        """
        self.check_data()
        check_positive(total_timesteps, "total_timesteps")
        if self.env is None:
            raise AimeGymError("OnlineAIME has no env to act in: pass env=, or call set_env.")
        hook = CallbackList(callback) if isinstance(callback, list) else callback
        hook = hook if isinstance(hook, BaseCallback) else ConvertCallback(hook)
        hook.init_callback(cast(Any, self))
        if reset_num_timesteps:
            self.num_timesteps = 0
        total_timesteps += self.num_timesteps
        if not self._begun and self.imitation_updates:
            self.imitate(self.imitation_updates)
        self._begun = True
        with seeded(self.seed + 1 + len(self.returns), self.device):
            if self.reward == "viper" and self._likelihood is None:
                self._likelihood = self._learn_likelihood()
            hook.on_training_start(locals(), globals())
            demonstrations = self._batches(cast(TrajectoryDataset, self.demonstrations), self.batch_size, self._seed(2))
            while self.num_timesteps < total_timesteps:
                hook.on_rollout_start()
                goes_on = self._act_out(self.env, total_timesteps, hook)
                hook.on_rollout_end()
                self._improve(demonstrations)
                if not goes_on:
                    break
            hook.on_training_end()
        return self

    def _seed(self, kind: int) -> tuple[int, ...]:
        return self.seed, kind, len(self.returns)

    def _act_out(self, env: gymnasium.Env, total: int, hook: BaseCallback) -> bool:
        """Keeps one episode; whether the callbacks want another one."""
        observation, _ = env.reset(seed=None if self.returns else self.seed)
        rows, state, earned = [self._row(observation)], None, 0.0
        over = goes_on = False
        while not over:
            action, state = self.predict(observation, state, deterministic=False)
            if self.noise:
                tensor = (state[1] + self.noise * torch.randn_like(state[1])).clamp(-1, 1)
                action, state = tensor[0].cpu().numpy(), (state[0], tensor)
            observation, reward, terminated, truncated, _ = env.step(action)
            rows.append(self._row(observation, action, terminated))
            earned += float(reward)
            self.num_timesteps += 1
            hook.update_locals(locals())
            goes_on = hook.on_step()
            over = terminated or truncated or not goes_on or self.num_timesteps >= total
        episode = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        if self._likelihood is not None:
            seen = {name: episode[name] for name in self.model.observed}
            tensors = {name: value[:, None] for name, value in to_tensors(seen, self.device).items()}
            episode["viper_reward"] = viper_rewards(self._likelihood, tensors)[0].cpu().numpy()
        self._replay.append(episode)
        self.returns.append(earned)
        self.logger.record("rollout/ep_rew_mean", float(np.mean(self.returns[-10:])))
        self.logger.record("time/total_timesteps", self.num_timesteps)
        return goes_on

    def _row(self, observation: Any, action: np.ndarray | None = None, ended: bool = False) -> dict[str, np.ndarray]:
        frames, _ = to_frames(self.model, observation)
        row = {name: frame[0].cpu().numpy() for name, frame in frames.items()}
        if "image" in row:
            row["image"] = (row["image"] * 255).round().astype(np.uint8).transpose(1, 2, 0)
        action = np.zeros(self.model.config.action_dim, np.float32) if action is None else action
        return {**row, "pre_action": action, END: np.array([ended], np.float32)}

    def _improve(self, demonstrations: WindowSampler) -> None:
        names = [*self.model.observed, "pre_action", *([END] if self.model.config.use_terminal else [])]
        extra = ["viper_reward"] if self.reward == "viper" else []
        ours = self.batch_size // 2 if self._body is not None else 0
        sources = [(TrajectoryDataset(self._replay), self.batch_size - ours, [*names, *extra])]
        if self._body is not None and ours:
            sources = [(self._body, ours, [name for name in names if name in self._body.keys]), *sources]
        samplers = [
            WindowSampler(data, size, self.horizon, self._seed(kind), wanted, self.device, least=2)
            for kind, (data, size, wanted) in enumerate(sources)
        ]
        metrics: dict[str, Tensor] = {}
        for _ in range(self.updates):
            metrics = self.update([sampler.sample() for sampler in samplers], demonstrations.sample())
        for name, value in metrics.items():
            self.logger.record(f"train/{name}", float(value))
        self.logger.dump(self.num_timesteps)

    def update(self, seen: Sequence[Batch], demonstrations: Batch) -> dict[str, Tensor]:
        """One update of everything.

        Args:
            seen: Windows of the body's data, if there are some, and of episodes that it has acted out, with
                ``pre_action``, and with ``"viper_reward"`` if that is learned: [T, B, ...].
            demonstrations: Windows of demonstrations, [T, B, ...].

        Returns:
            Parts of the losses, scalars.

        Raises:
            AimeGymError: If a loss is not finite.
        """
        module, model, name = cast(Any, self.module), self.model, self.model.config.reward
        shown = {key: value for key, value in demonstrations.items() if key != "true_action"}
        batch, metrics = _joined(seen, name), dict[str, Tensor]()
        if self.reward == "ail":
            begin = int(self.sight == "moves")
            sights, demonstrated = self._sights(batch), self._sights(shown)[begin:]
            between = torch.rand(*sights[begin:].shape[:2], 1, device=self.device)
            loss, told = discriminator_loss(module["discriminator"], demonstrated, sights[begin:], between)
            metrics |= {f"discriminator_{key}": value for key, value in told.items()}
            self._step("discriminator", loss, module["discriminator"])
            with torch.no_grad():
                batch[name] = module["discriminator"](sights)
            batch[f"{name}_mask"] = torch.ones_like(batch[name])
            batch[f"{name}_mask"][:begin] = 0.0
        with torch.no_grad():
            states = model.observe(batch, batch["pre_action"])[0].flatten(0, 1)
        real = ~batch["is_padding"].flatten() if "is_padding" in batch else torch.ones(len(states), dtype=torch.bool)
        states = states[real.to(self.device)]
        states = states[torch.randperm(len(states), device=self.device)[: self.imagined_starts]]
        loss, told = model.requires_grad_(True).loss(batch)
        self._step("model", loss, model)
        model.requires_grad_(False)
        metrics |= {f"model_{key}": told[key] for key in (f"{name}_mse", "elbo", "kl_loss") if key in told}

        policy, value, target = module["policy"], module["value"], module["target"]
        steps, gain, more = self.imagined_steps, self.gain, self.demonstrated_starts
        loss, future, judged, told = policy_loss(model, policy, target, shown, states, steps, gain, demonstrated=more)
        self._step("policy", loss, policy)
        metrics |= {key: told[key] for key in ("elbo", "value_gradient_policy_loss", "aime_action_entropy_loss")}
        loss = value_loss(future, judged, value)
        self._step("value", loss, value)
        metrics["value_loss"] = loss.detach()
        polyak_update(value.parameters(), target.parameters(), {"ail": 0.05, "viper": 0.01}[self.reward])
        polyak_update(policy.parameters(), module["average"].parameters(), self.average)
        return metrics

    def _acting(self, deterministic: bool) -> TanhGaussianPolicy:
        return cast(Any, self.module)["average" if deterministic else "policy"]

    def _step(self, name: str, loss: Tensor, module: nn.Module) -> None:
        if not bool(loss.isfinite()):
            raise AimeGymError(f"The loss of the {name} is not finite after {self.num_timesteps} steps: lower its lr.")
        parameters = [*module.parameters()]
        optimiser = self._optimisers.setdefault(name, adam(parameters, self._rates[name]))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip)
        optimiser.step()

    def _learn_likelihood(self) -> WorldModel:
        """A model of the demonstrations that knows no actions."""
        config = replace(self.model.config, action_dim=0, idm_mode="none", use_reward=False, ensemble=None)
        model = WorldModel(replace(config, reward="reward", logged_range=None)).to(self.device)
        units = {key: value for key, value in self.model.state_dict().items() if key.startswith("normaliser.")}
        model.load_state_dict(units, strict=False)
        batches = self._batches(cast(TrajectoryDataset, self.demonstrations), self.batch_size, self._seed(3))
        for _ in range(self.likelihood_updates):
            batch = batches.sample()
            size = batch[self.model.observed[0]].shape[:2]
            loss, _ = model.loss({**batch, "pre_action": torch.zeros(*size, 0, device=self.device)})
            self._step("likelihood", loss, model)
        del self._optimisers["likelihood"]
        return model.eval().requires_grad_(False)


def _joined(parts: Sequence[Batch], reward: str) -> Batch:
    """Windows side by side; the rewards of those without any are masked."""
    keys = set.intersection(*(set(part) for part in parts)) - {reward}
    batch = {key: torch.cat([part[key] for part in parts], 1) for key in keys}
    blanks = [part["pre_action"].new_zeros(*part["pre_action"].shape[:2], 1) for part in parts]
    if any("is_padding" in part for part in parts):
        paddings = [part.get("is_padding", blank[..., 0].bool()) for part, blank in zip(parts, blanks, strict=True)]
        batch["is_padding"] = torch.cat(paddings, 1)
    if any(reward in part for part in parts):
        batch[reward] = torch.cat([part.get(reward, blank) for part, blank in zip(parts, blanks, strict=True)], 1)
        masks = [blank + float(reward in part) for part, blank in zip(parts, blanks, strict=True)]
        batch[f"{reward}_mask"] = torch.cat(masks, 1)
    return batch
