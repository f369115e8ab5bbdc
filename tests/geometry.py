"""What formulas know of the suite's bodies, measured on dm_control's own models.

`python -m tests.geometry` writes it anew to where `aime_gym.world_model.formulas` reads it.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from aime_gym.bodies import tasks
from aime_gym.bodies.body import EMBODIMENTS
from aime_gym.files import write_json
from aime_gym.world_model.formulas import GEOMETRY

PLANE = [0, 2]
"""Bodies that move in a plane do so along x and z."""


def measure() -> dict[str, Any]:
    """All that `GEOMETRY` holds."""
    cup = _model("ball_in_cup")
    target, ball = cup.site("target"), cup.geom("ball")
    assert not cup.jnt_pos.any()
    return {
        "ball_in_cup": {
            "rooms": (target.size[PLANE] - ball.size[0]).tolist(),
            "offset": (cup.body("cup").pos + target.pos - cup.body("ball").pos)[PLANE].tolist(),
        },
        "cheetah": _parts("cheetah"),
        "hopper": _parts("hopper"),
        "reacher": {"finger": float(_model("reacher").geom("finger").size[0])},
        "walker": _parts("walker"),
    }


def _parts(body: str) -> list[dict[str, Any]]:
    """The parts of a body, the world being the first; see `_Chain`."""
    model, parts = _model(body), []
    for index in range(model.nbody):
        part, first = model.body(index), int(model.body_jntadr[index])
        joints = range(first, first + int(model.body_jntnum[index]))
        assert [int(model.jnt_qposadr[joint]) for joint in joints] == list(joints)
        parts.append(
            {
                "name": part.name,
                "parent": int(part.parentid[0]),
                "mass": float(part.mass[0]),
                "position": part.pos[PLANE].tolist(),
                "centre": part.ipos[PLANE].tolist(),
                "joints": [_joint(model, joint) for joint in joints],
            }
        )
    return parts


def _joint(model: Any, index: int) -> dict[str, Any]:
    slides, axis = model.jnt_type[index] == mujoco.mjtJoint.mjJNT_SLIDE, model.jnt_axis[index]
    motion = {"slides": "xyz"[int(np.argmax(axis))]} if slides else {"turns": float(axis[1])}
    return motion | {"anchor": model.jnt_pos[index, PLANE].tolist(), "zero": float(model.qpos0[index])}


def _model(body: str) -> Any:
    embodiment = EMBODIMENTS[body]
    return tasks.load(embodiment, embodiment.tasks[0]).physics.model.ptr


if __name__ == "__main__":
    print(write_json(GEOMETRY, measure()))
