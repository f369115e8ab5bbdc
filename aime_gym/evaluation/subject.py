"""Which body and model a command is about, where it is not told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aime_gym.data.metadata import METADATA, read_metadata
from aime_gym.embodiments import get_embodiment
from aime_gym.errors import AimeGymError
from aime_gym.files import read_json
from aime_gym.world_model.checkpoint import bundled_models, load_config

DEFAULT_BODY = "walker"


def find_subject(embodiment: str | None, model: str | Path | None, agents: Iterable[Any] = ()) -> tuple[str, Any]:
    """Finds the body in the model's folder or in what lies beside the agents, and a model where none is bundled.

    Args:
        embodiment: What was asked for; it stays.
        model: What was asked for; it stays.
        agents: Paths of agents, beside which `aime-gym dream` left a job.json or `aime-gym collect` a dataset.json.
            Others, such as ``"random"``, say nothing.

    Returns:
        The body's name, and the model; None for the bundled one.

    Raises:
        AimeGymError: If the agents are of several bodies, or their body is an env of a package that is not imported.
    """
    if embodiment is not None:
        return embodiment, model
    if model is not None:
        return _checked(load_config(model).embodiment), model
    named = [subject for subject in map(_beside, agents) if subject]
    bodies, models = {body for body, _ in named}, {model for _, model in named}
    if len(bodies) > 1:
        raise AimeGymError(f"These agents are of several bodies: {', '.join(sorted(bodies))}. Compare those of one.")
    if not bodies:
        return DEFAULT_BODY, None
    body = get_embodiment(_checked(bodies.pop()))
    bundled = f"{body.slug}-state" in bundled_models()
    return body.name, models.pop() if len(models) == 1 and not bundled else None


def _beside(agent: Any) -> tuple[str, str | None] | None:
    """Body and model that are named beside an agent."""
    if not isinstance(agent, str | Path) or not Path(agent).exists():
        return None
    folder = Path(agent) if Path(agent).is_dir() else Path(agent).parent
    if (folder / "job.json").exists():
        settings = read_json(folder / "job.json", "what became of a run").get("settings")
        if isinstance(settings, dict) and isinstance(settings.get("embodiment"), str):
            model = settings.get("model")
            return settings["embodiment"], model if isinstance(model, str) else None
    if (folder / METADATA).exists() and isinstance(body := read_metadata(folder).get("embodiment"), str):
        return body, None
    return None


def _checked(name: str) -> str:
    """The name, if it can be taken from a file."""
    return get_embodiment(name, imports=False).name
