"""Dreams for Stable-Baselines3, whose VecEnv differs from Gymnasium's in shape though not in meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from aime_gym.envs.dream import DreamVectorEnv
from aime_gym.errors import AimeGymError
from aime_gym.files import Revision


def make_sb3_env(
    env_id: str,
    n_envs: int = 1,
    seed: int | None = None,
    wrap: Callable[[gymnasium.Env], gymnasium.Env] | None = None,
    **kwargs: Any,
) -> VecEnv:
    """Makes envs that Stable-Baselines3 can train on.

    Examples:
        >>> import aime_gym
        >>> from stable_baselines3 import PPO
        >>> envs = aime_gym.make_sb3_env("AimeDream-Walker-v0", n_envs=8, task="walk", seed=0)
        >>> agent = PPO("MlpPolicy", envs, n_steps=4, batch_size=32, n_epochs=1).learn(32)

    Args:
        env_id: ``"AimeDream-*-v0"`` or an id of `register_dream` for the native batched dream, or any other id, whose
            envs are stepped in turn.
        n_envs: How many.
        seed: Seed of the first env's first reset, which the others count on from.
        wrap: Put around each env, where envs are stepped in turn.
        **kwargs: Keywords of the env.

    Returns:
        The envs in a `VecMonitor`, with the return, length and time of every episode in ``info["episode"]``. Dreams and
        real envs have equally many wrappers, on which SB3's `EvalCallback` relies where both are in a `VecNormalize`.

    Raises:
        AimeGymError: If `wrap` is given for a native batched dream, which has no single envs.
    """
    name = env_id.rsplit(":", 1)[-1]
    spec = gymnasium.registry.get(name)
    if spec is None or not str(spec.vector_entry_point).startswith("aime_gym."):
        return VecMonitor(_stepped_in_turn(env_id, n_envs, seed, wrap, kwargs))
    if wrap is not None:
        raise AimeGymError(
            f"{env_id} steps all its slots at once and has no single envs to wrap: put one of SB3's VecEnvWrappers "
            "around what make_sb3_env returns."
        )
    envs = gymnasium.make_vec(env_id, num_envs=n_envs, autoreset_mode=AutoresetMode.SAME_STEP, **kwargs)
    assert isinstance(envs, DreamVectorEnv)
    adapter = DreamVecEnv(envs)
    adapter.seed(seed)
    return VecMonitor(adapter)


def _stepped_in_turn(
    env_id: str,
    n_envs: int,
    seed: int | None,
    wrap: Callable[[gymnasium.Env], gymnasium.Env] | None,
    options: Mapping[str, Any],
) -> VecEnv:
    def make(index: int) -> gymnasium.Env:
        env = _make_rendered(env_id, **options)
        env = env if wrap is None else wrap(env)
        if seed is not None:
            env.action_space.seed(seed + index)
        return env

    envs = DummyVecEnv([partial(make, index) for index in range(n_envs)])
    envs.seed(seed)
    return envs


def _make_rendered(env_id: str, **kwargs: Any) -> gymnasium.Env:
    """Makes an env that SB3's recorders can film, if it knows how to be rendered."""
    try:
        return gymnasium.make(env_id, **{"render_mode": "rgb_array", **kwargs})
    except (TypeError, AimeGymError):
        return gymnasium.make(env_id, **kwargs)


def note_dream(agent: Any) -> None:
    """Notes in an agent, where SB3 saves it, with which weights the dreams were made that its envs are."""
    envs = agent.get_env()
    while isinstance(envs, VecEnvWrapper):
        envs = envs.venv
    if isinstance(envs, DreamVecEnv):
        agent.dream_weights = envs.envs.revision and envs.envs.revision._asdict()


def learned_in(agent: Any) -> Revision | None:
    """With which weights the dreams were made that an agent learned in, as `note_dream` noted it; None if unknown."""
    try:
        return Revision.from_dict(getattr(agent, "dream_weights", None))
    except ValueError:
        return None


def stray_note(name: str, learned: Revision | None, weights: Revision | None) -> str:
    """Says that a policy learned in the dreams of other weights; empty if it did not or nothing is known.

    Args:
        name: The name of the policy.
        learned: The weights in whose dreams it learned.
        weights: The weights that dream now.
    """
    if learned is None or weights is None or learned.digest == weights.digest:
        return ""
    kind = "another revision of this dream" if learned.model == weights.model else "the dreams of another model"
    return f"{name} learned in {kind}: {learned}"


class DreamVecEnv(VecEnv):
    """A `DreamVectorEnv` as SB3's VecEnv.

    What SB3 asks of single envs goes to the one vector env: attributes are those of all slots, and a method is
    called once.

    Args:
        envs: With `autoreset_mode` SAME_STEP.

    Raises:
        AimeGymError: If it has another autoreset mode.
    """

    def __init__(self, envs: DreamVectorEnv):
        if envs.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise AimeGymError(f"SB3 resets in the same step: expected SAME_STEP, got {envs.autoreset_mode}.")
        self.envs = envs
        self.spec = envs.spec
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self.metadata["render_fps"] = envs.metadata["render_fps"]  # by which SB3's recorder films

    def reset(self) -> VecEnvObs:
        """Begins all episodes, with the seeds and options set before."""
        options = self._options[0]
        if any(not data_equivalence(other, options) for other in self._options[1:]):
            raise AimeGymError("A dream's slots are reset together: set the same options for all of them.")
        observations, infos = self.envs.reset(seed=self._seeds, options=options)
        self.reset_infos = self._infos(infos)
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        """Takes the actions of the next step."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Steps; slots that end begin anew, their last observation is ``info["terminal_observation"]``."""
        observations, rewards, terminations, truncations, infos = self.envs.step(self._actions)
        slot_infos, dones = self._infos(infos), terminations | truncations
        if dones.any():
            finals = self._infos(infos["final_info"])
            for slot in dones.nonzero()[0]:
                self.reset_infos[slot], slot_infos[slot] = slot_infos[slot], finals[slot]
                slot_infos[slot]["terminal_observation"] = infos["final_obs"][slot]
                slot_infos[slot]["TimeLimit.truncated"] = bool(truncations[slot] and not terminations[slot])
        return observations, rewards.astype(np.float32), dones, slot_infos

    def close(self) -> None:
        """Closes the envs."""
        self.envs.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """A frame of every slot."""
        return self.envs.render() or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of the vector env, once for every index; spaces are those of a slot."""
        of_slot = attr_name in ("observation_space", "action_space")
        value = getattr(self.envs, f"single_{attr_name}" if of_slot else attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets the attribute for all slots.

        Raises:
            AimeGymError: If only some slots are named.
        """
        if len(set(self._get_indices(indices))) != self.num_envs:
            raise AimeGymError(f"The slots of a dream share their attributes: set {attr_name!r} for all of them.")
        setattr(self.envs, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list:
        """Calls the method of the vector env once; its result is given for every index."""
        result = getattr(self.envs, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Never: a native vector env has no wrappers of single envs."""
        return [False for _ in self._get_indices(indices)]

    def _infos(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        """One dict a slot; of keys with a mask, which leaves out ``final_obs`` and ``final_info``."""
        slots: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for key, values in infos.items():
            if f"_{key}" not in infos or key in ("final_obs", "final_info"):
                continue
            for slot, (value, has) in enumerate(zip(values.tolist(), infos[f"_{key}"].tolist(), strict=True)):
                if has:
                    slots[slot][key] = value
        return slots
