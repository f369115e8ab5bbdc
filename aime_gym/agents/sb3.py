"""Stable-Baselines3 agents on disk, whatever their algorithm."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aime_gym.agents.numpy_policies import PlainMLP, Rhythm
from aime_gym.bodies.body import Choices, Embodiment
from aime_gym.errors import AimeGymError, check_natural, warn_caller
from aime_gym.files import DAMAGED_NPZ, reason, write_atomically
from aime_gym.observations import action_space, observation_space
from aime_gym.parallel import generators_kept

if TYPE_CHECKING:
    from aime_gym.world_model.model import WorldModel


def save_sb3_agent(agent: Any, path: str | Path) -> Path:
    """Saves an agent as `agent.save(path)` does, whole or not at all, and what acts of it without a pickle.

    The latter is one more member of the file, see `aime_gym.agents.plain`, for agents of the parts that
    `aime-gym dream` makes them of.
    """
    from aime_gym.agents.plain import POLICY, plain_policy
    from aime_gym.envs.sb3 import note_dream

    note_dream(agent)
    buffer = io.BytesIO()
    with _no_folder_named_gym():
        agent.save(buffer)
    plain = plain_policy(agent)
    if plain is not None:
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(POLICY, plain)
    return write_atomically(path, buffer.getbuffer())


@contextmanager
def _no_folder_named_gym() -> Iterator[None]:
    """Hides a folder called `gym`, beside the script that runs, from imports.

    Stable-Baselines3 (2.9.2) writes the version of OpenAI Gym into each file that it saves, if it can import it. A
    folder of that name, or a package of one's own, has no version, and the save fails; see
    findings/sb3_cannot_save_beside_a_folder_gym.sh.
    """
    before = sys.modules.get("gym")
    try:
        found: Any = importlib.import_module("gym")
    except ImportError:
        found = None
    if found is None or hasattr(found, "__version__"):
        yield
        return
    sys.modules["gym"] = None  # type: ignore[assignment]  # which makes an import of it an ImportError
    try:
        yield
    finally:
        del sys.modules["gym"]
        if before is not None:
            sys.modules["gym"] = before


def load_agent(path: str | Path) -> Any:
    """Loads what acts of a saved agent: without a pickle where the file allows it, else as `load_sb3_agent`.

    Args:
        path: A zip file of SB3. Name only files that you trust, unless `save_sb3_agent` wrote them: others are code.

    Returns:
        An object with SB3's `predict`, `observation_space` and `action_space`.

    Raises:
        AimeGymError: If the file is not such an agent.
    """
    from aime_gym.agents.plain import is_plain, load_plain_agent

    return load_plain_agent(Path(path)) if is_plain(Path(path)) else load_sb3_agent(path)


def agent_fields(path: Path) -> dict[str, Any]:
    """What an agent's file says of it as plain JSON: numbers and names of the algorithm. No pickle is opened.

    Raises:
        AimeGymError: If the file is no agent.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return dict(json.loads(archive.read("data")))
    except FileNotFoundError as error:
        raise AimeGymError(f"There is no agent {path}.") from error
    except DAMAGED_NPZ as error:
        raise AimeGymError(f"{path} is not an agent saved by Stable-Baselines3 ({reason(error)}).") from error


def take_up(agent: Any, path: Path, counts: Iterable[str] = ("num_timesteps",)) -> int:
    """Gives an agent the weights of a saved one, its optimisers' states and some counts. No pickle is opened.

    Args:
        agent: An agent of the same algorithm and sizes.
        path: The file of the saved agent.
        counts: Names of attributes that are integers.

    Returns:
        The steps that it has learned from.

    Raises:
        AimeGymError: If the file is damaged or holds another agent.
    """
    try:
        fields = agent_fields(path)
        agent.set_parameters(str(path), device=agent.device)  # SB3 reads tensors alone then
        for name in counts:
            setattr(agent, name, check_natural(fields.get(name), name))
    except Exception as error:  # a file from outside can fail in any way inside SB3
        told = f"{path} holds no such agent to go on with ({reason(error)}): delete it, or choose another folder."
        raise AimeGymError(told) from error
    return agent.num_timesteps


def sees_images(policy: Any) -> bool:
    """Whether what an agent observes is one image."""
    return len(getattr(getattr(policy, "observation_space", None), "shape", None) or ()) == 3


def obs_type_of(agent: Any, feature_dim: int | None = None) -> str | None:
    """What an agent observes, found from its observation space; None where it has none.

    Args:
        agent: The agent.
        feature_dim: Size of the latents that there are, if there are any.
    """
    space = getattr(agent, "observation_space", None)
    if space is None:
        return None
    if hasattr(space, "spaces"):
        return "dict"
    if feature_dim is not None and space.shape == (feature_dim,):
        return "latent"
    return "image" if sees_images(agent) else "state"


def shapes_of(space: Any) -> Any:
    """Shapes of a space up to the order of axes, by which agents fit envs: SB3 puts the channels of images first.

    Those of choices are the choices.
    """
    if hasattr(space, "spaces"):
        return {key: part.shape for key, part in space.spaces.items()}
    if choices := Choices.of(space):
        return choices
    return sorted(space.shape or ())


def load_sb3_agent(path: str | Path, device: str = "cpu") -> Any:
    """Loads an agent that SB3 saved, finding its algorithm in the file.

    Only load agents you trust: SB3 stores parts of an agent as pickles, which are code. So are the statistics of a
    `VecNormalize`, which are taken, if they lie beside the agent where SB3 or RL Zoo put them: ``vecnormalize.pkl``
    there or in the folder of the agent's name, or ``NAME_vecnormalize_N_steps.pkl`` beside ``NAME_N_steps.zip``.

    Args:
        path: A zip file as `agent.save(path)` writes it.
        device: Where to.

    Returns:
        The agent: SHAC, PPO, A2C, SAC, TD3, DDPG or DQN.

    Raises:
        AimeGymError: If the file is not such an agent.
    """
    import stable_baselines3 as sb3

    from aime_gym.agents.shac import SHAC

    path = Path(path)
    data = agent_fields(path)
    # Off-policy agents of one family share most fields; these differ.
    if "critic_epochs" in data:
        algorithm: Any = SHAC
    elif "clip_range" in data:
        algorithm = sb3.PPO
    elif "ent_coef" in data and "target_entropy" in data:
        algorithm = sb3.SAC
    elif "policy_delay" in data:
        algorithm = sb3.TD3
    elif "exploration_fraction" in data:
        algorithm = sb3.DQN
    elif "gae_lambda" in data:
        algorithm = sb3.A2C
    else:
        known = "known: SHAC, PPO, A2C, SAC, TD3, DDPG, DQN"
        raise AimeGymError(f"{path} holds an agent of an unknown algorithm; {known}.{_way_out(data)}")
    try:
        with generators_kept():  # which SB3 seeds with the agent's seed
            agent = algorithm.load(path, device=device)
    except Exception as error:  # a file from outside can fail in any way inside SB3
        told = f"{path} cannot be loaded as a {algorithm.__name__} agent ({reason(error)}).{_way_out(data)}"
        raise AimeGymError(told) from error
    agent._vec_normalize_env = _find_statistics(path, agent)
    return agent


def _way_out(data: dict[str, Any]) -> str:
    """What to do with an agent that is not loaded here, for a message, by what its file says of its policy."""
    kind = data.get("policy_class")
    module = kind.get("__module__") if isinstance(kind, dict) else None
    library = module.partition(".")[0] if isinstance(module, str) else ""
    if not library.isidentifier() or library == "stable_baselines3":
        return ""
    return (
        f" Its policy is of {library} ({module:.60}): load it in Python by its own class, and give the object to "
        "aime_gym.compare, which takes whatever has predict()."
    )


def _find_statistics(path: Path, agent: Any) -> Any:
    """The `VecNormalize` behind which the agent learned, without envs; None where there are no signs of one."""
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    from stable_baselines3.common.vec_env import VecNormalize

    checkpoint = re.fullmatch(r"(.+)_(\d+)_steps", path.stem)
    names = ["vecnormalize.pkl", f"{path.stem}/vecnormalize.pkl"]
    names += [f"{checkpoint[1]}_vecnormalize_{checkpoint[2]}_steps.pkl"] if checkpoint else []
    found = next((path.parent / name for name in reversed(names) if (path.parent / name).is_file()), None)
    if found is None:
        # Only SB3's on-policy agents keep a sign of one: the observation before it was normalised.
        if isinstance(agent, OnPolicyAlgorithm) and agent._last_original_obs is not None:
            warn_caller(
                f"{path} learned behind a VecNormalize, whose statistics are not beside it ({names[0]}): it sees "
                "observations as they are, and will do worse than it can if they were normalised for it. Put the file "
                "there that VecNormalize.save wrote."
            )
        return None
    try:
        with open(found, "rb") as file:
            statistics = pickle.load(file)
        if not isinstance(statistics, VecNormalize):
            raise TypeError(f"it holds a {type(statistics).__name__}")
        if shapes_of(statistics.observation_space) != shapes_of(agent.observation_space):
            raise ValueError(f"it is of {statistics.observation_space}, the agent of {agent.observation_space}")
    except Exception as error:  # a pickle can fail in any way
        raise AimeGymError(f"{found} does not hold the VecNormalize of {path.name} ({reason(error)}).") from error
    statistics.training = False
    return statistics


def seen_by(agent: Any, body: Embodiment, name: str, model: WorldModel | None = None) -> dict[str, Any]:
    """Keywords of the real env by which it shows what an agent sees.

    Args:
        agent: An SB3 agent; None for actions without a look.
        body: It acts with.
        name: Name of the agent, for errors.
        model: The model whose latents it sees.

    Raises:
        AimeGymError: If no env of this body shows what it sees, or takes what it does.
    """
    from aime_gym.envs.wrappers import drawn_as, shown_to

    if agent is None:
        return {} if model is None else {"obs_type": shown_to(model), **drawn_as(model)}
    if isinstance(agent, PlainMLP | Rhythm):
        agent.check_sizes(name, sum(sensor.dim for sensor in body.observed("mdp")), body.action_dim, body.choices)
        return {"obs_type": "state"}
    kind = "latent" if model is not None else obs_type_of(agent)
    assert kind is not None
    space = observation_space(body.sensors, kind, None if model is None else model.config.feature_dim)
    for seen, shown in ((agent.observation_space, space), (agent.action_space, action_space(body))):
        if shapes_of(seen) != shapes_of(shown):
            raise AimeGymError(
                f"{name} is made for {seen}; {body.name} has {shown}. Is it of another body? An agent on latents needs "
                "the --model whose latents they are."
            )
    return {"obs_type": kind} if model is None else {"obs_type": shown_to(model), **drawn_as(model)}
