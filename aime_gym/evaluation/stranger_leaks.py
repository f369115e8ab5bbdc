"""Strangers that are none: those whose own steps are in a model's data.

A model's `starts.npz` holds windows that were drawn evenly from all its data, as a rule 512 of ten frames. If a policy
collected a share s of the data without noise, all of them miss it with a probability of (1 - s) ** 512: 0.6% where s is
one percent.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aime_gym.agents.numpy_policies import PlainMLP
from aime_gym.embodiments import Embodiment

TOLERANCE = 1e-3
"""Of actions, which were computed in batches of another size or by another library."""
SATURATED = 0.999
"""Actions from there on are alike whoever acts."""
LEAST_STEPS = 3
"""Steps in a row, none of them saturated in all actions, that two policies do not share by chance."""


def acted_in(policy: PlainMLP, body: Embodiment, starts: Mapping[str, np.ndarray]) -> bool:
    """Whether some window holds the steps that the policy itself would have taken.

    Args:
        policy: Acts on all sensors of the body, side by side.
        body: The body.
        starts: Sensors and ``pre_action``, each [K, M, ...], see `aime_gym.data.starts.make_starts`. Without one of the
            sensors, as in a model of images, nothing is found.
    """
    names = [sensor.name for sensor in body.observed("mdp")]
    if not set(names) <= set(starts):
        return False
    frames = np.concatenate([starts[name] for name in names], axis=-1)[:-1]  # [K - 1, M, D]
    taken = starts["pre_action"][1:]
    would = policy.predict(frames.reshape(-1, frames.shape[-1]))[0].reshape(taken.shape)
    same = (np.abs(would - taken) < TOLERANCE).all(-1)
    telling = (np.abs(would) < SATURATED).any(-1)
    steps = np.where(telling, np.where(same, 1, -len(same)), 0).sum(0)  # one that differs outweighs all others
    return bool((steps >= LEAST_STEPS).any())
