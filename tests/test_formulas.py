"""Rewards by formulas on sensors, against dm_control's own, and dreams that pay by them."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
import torch

import aime_gym
from aime_gym.bodies import tasks
from aime_gym.bodies.body import EMBODIMENTS
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.explain import explain
from aime_gym.files import json_text, read_json
from aime_gym.world_model.checkpoint import load_pretrained_model
from aime_gym.world_model.formulas import GEOMETRY, TaskFormula, formula_lacks
from tests.geometry import measure
from tests.tiny_model import make_tiny_model

UNSEEN = {("finger", "turn_easy"), ("finger", "turn_hard"), ("quadruped", "escape"), ("quadruped", "fetch")}

TASKS = [
    (body.name, task)
    for body in EMBODIMENTS.values()
    for task in (*body.tasks, *body.custom_tasks, *body.guiding_tasks, *(f"{each}-v1" for each in body.custom_tasks))
    if (body.name, task) not in UNSEEN
]

NEAR = {"ball_in_cup": 0.1, "pendulum": 0.3, "hopper": 0.5}
"""How far from the first pose positions are drawn where others hardly ever earn anything; elsewhere 1."""


def states(body: str, task: str, count: int = 30) -> tuple[dict[str, torch.Tensor], torch.Tensor, np.ndarray]:
    """Sensors [count, D] and actions in float64, and dm_control's reward of a control step in each of these states."""
    embodiment, rng = EMBODIMENTS[body], np.random.default_rng(0)
    env = tasks.load(embodiment, task)
    env.reset()
    physics, spec, rows, actions, rewards = env.physics, env.action_spec(), [], [], []
    for index in range(count):
        state = physics.get_state()
        near = (1.0 if task == "rise" else NEAR.get(body, 1.0)) * index / count
        state[: physics.model.nq] = physics.model.qpos0 + rng.normal(0, near, physics.model.nq)
        if body == "reacher":  # the target lies near the finger
            tip = 0.12 * np.exp(1j * np.cumsum(state[:2])).sum()
            state[-2:] = np.array([tip.real, tip.imag]) + rng.normal(0, 0.04, 2)
        moving = slice(physics.model.nq, physics.model.nq + physics.model.nv)
        state[moving] = rng.normal(0, 30 if body == "finger" else 3, physics.model.nv)
        physics.set_state(state)
        physics.forward()
        if body == "ball_in_cup":  # the ball is near the middle of the cup
            physics.data.qpos[2:] += physics.ball_to_target() + rng.normal(0, 0.03, 2)
            physics.forward()
        actions.append(rng.uniform(spec.minimum, spec.maximum))
        physics.set_control(actions[-1])
        rewards.append(env.task.get_reward(physics))
        rows.append(env.task.get_observation(physics))
    sensed = {
        sensor.name: torch.from_numpy(np.stack([np.reshape(row[sensor.name], sensor.dim) for row in rows])).double()
        for sensor in embodiment.sensors
    }
    return sensed, torch.from_numpy(np.stack(actions)), np.array(rewards)


def test_formulas_know_the_sizes_and_masses_of_dm_control():
    """Else write them anew by `python -m tests.geometry`."""
    assert _rounded(read_json(GEOMETRY)) == _rounded(measure())


def _rounded(content: dict) -> dict:
    return json.loads(json_text(content), parse_float=lambda digits: round(float(digits), 9))


@pytest.mark.parametrize(("body", "task"), TASKS)
def test_a_formula_pays_what_the_suite_does(body, task):
    """In any state, with a step that changes nothing; sensors are those of the suite, not of ours."""
    sensed, actions, rewards = states(body, task)
    assert rewards.max() > 0.1
    assert rewards.min() < rewards.max() - 0.05
    formula = TaskFormula(body, task)
    once = task.endswith("-v1") and not task.startswith(("walkbackward", "runbackward"))
    steps = 1 if once or (body == "cheetah" and task.endswith("-v1")) else EMBODIMENTS[body].action_repeat
    np.testing.assert_allclose(formula(sensed, sensed, actions).numpy(), steps * rewards, atol=1e-6)
    with torch.no_grad():
        traced = formula(sensed, sensed, actions)
    np.testing.assert_allclose(traced.numpy(), formula(sensed, sensed, actions).numpy(), atol=1e-12)


@pytest.mark.parametrize(("body", "task"), [("cartpole", "swingup"), ("walker", "stand"), ("cheetah", "flip")])
def test_what_happens_within_a_step_counts(body, task):
    """The sum over control steps is nearer to the real reward than the last of them times their number."""
    world = gym.make("AimeReal-v0", embodiment=body, task=task)
    world.action_space.seed(1)
    world.reset(seed=1)
    real, rows, actions, rewards = world.unwrapped, [], [], []
    rows.append(real.readings())  # type: ignore[attr-defined]
    for _ in range(30):
        actions.append(world.action_space.sample())
        rewards.append(float(world.step(actions[-1])[1]))
        rows.append(real.readings())  # type: ignore[attr-defined]
    world.close()
    formula = TaskFormula(body, task)
    sensed = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in formula.sensors}
    before, after = ({name: rows[part] for name, rows in sensed.items()} for part in (slice(-1), slice(1, None)))
    done, true = torch.from_numpy(np.stack(actions)), np.array(rewards)
    errors = [abs(formula(first, after, done).numpy() - true).mean() for first in (before, after)]
    assert errors[0] < errors[1] / 2


def test_rewards_have_a_gradient():
    sensed, actions, _ = states("walker", "walk")
    velocity = sensed["velocity"].requires_grad_()
    TaskFormula("walker", "walk")(sensed, sensed, actions).sum().backward()
    assert velocity.grad is not None
    assert velocity.grad[:, 1].abs().max() > 0.01  # along x


@pytest.mark.parametrize(
    ("body", "task", "sensor", "better"),
    [
        ("reacher", "hard", "to_target", lambda to_target: -to_target),
        ("finger", "spin", "velocity", lambda velocity: velocity * 0 - torch.tensor([0.0, 0.0, 1.0])),
        ("ball_in_cup", "catch", "position", None),
        ("pendulum", "swingup", "orientation", None),
        ("hopper", "stand", "position", None),
    ],
)
def test_what_is_paid_in_steps_is_led_by_a_guide(body, task, sensor, better):
    """Rewards of 0 and 1 stay what they are, and the way to them is uphill."""
    sensed, actions, rewards = states(body, task)
    values = sensed[sensor].requires_grad_()
    paid = TaskFormula(body, task)(sensed, sensed, actions)
    assert set(np.unique(paid.detach().numpy().round(9) > 0)) == {False, True}
    assert paid.detach().numpy().max() <= EMBODIMENTS[body].action_repeat + 1e-9
    paid.sum().backward()
    assert values.grad is not None
    unpaid = torch.from_numpy(rewards == 0)
    assert values.grad[unpaid].abs().max() > 1e-3
    if better is not None:
        assert (((values.grad * better(values.detach())).sum(1) >= 0)[unpaid]).all()


def test_a_guide_leads_on_until_the_goal_is_firmly_held():
    """What is paid at the rim of the target is soon lost there: the gradient leads to its middle, and ends."""
    radius = 0.025  # of the target and the finger together, at "hard"
    far = torch.tensor([[2.0, 0], [0.9, 0], [0.5, 0], [0.05, 0]]) * radius
    sensed = {"to_target": far.requires_grad_(), "position": torch.zeros(4, 2), "velocity": torch.zeros(4, 2)}
    paid = TaskFormula("reacher", "hard")(sensed, sensed, torch.zeros(4, 2))
    assert paid.tolist() == [0, *3 * [EMBODIMENTS["reacher"].action_repeat]]
    paid.sum().backward()
    assert (far.grad[:3, 0] < -0.1).all()
    assert not far.grad[3].any()


def test_a_dream_pays_by_the_formula_whatever_it_shows():
    """Rewards are those of the sensors that it shows before and after; agents on latents earn the same."""
    made = {
        kind: aime_gym.TensorDream("walker-state", task="run", num_envs=3, obs_type=kind, precision="32-true")
        for kind in ("state", "latent")
    }
    head = aime_gym.TensorDream("walker-state", task="run", num_envs=3, reward="head")
    formula = TaskFormula("walker", "run")
    states_of = {kind: dream.reset(seeds=1, start=2) for kind, dream in made.items()}
    states_of["head"] = head.reset(seeds=1, start=2)
    torch.manual_seed(0)
    differs = 0.0
    for _ in range(5):
        actions = torch.rand(3, 6) * 2 - 1
        shown = states_of["state"].observations
        paid = {}
        for kind, dream in (made | {"head": head}).items():
            states_of[kind], _, paid[kind], *_ = dream.step(states_of[kind], actions)
        sensed = [
            dict(zip(formula.sensors, rows.split([14, 1, 9], 1), strict=True))
            for rows in (shown, states_of["state"].observations)
        ]
        torch.testing.assert_close(paid["state"], formula(*sensed, actions))
        torch.testing.assert_close(paid["latent"], paid["state"], atol=1e-4, rtol=1e-4)
        differs += float((paid["head"] - paid["state"]).abs().max())
    assert differs > 1e-3


def test_what_a_dream_pays_is_explained(tmp_path):
    """Shares sum to the error, and none is the head's where the formula pays and sees true frames."""
    model = load_pretrained_model(make_tiny_model(tmp_path / "model", "cartpole"))
    options = {"episodes": 2, "max_episode_steps": 12, "horizons": (2, 5)}
    (explained,) = explain(model, "random", "swingup", **options).policies  # type: ignore[arg-type]
    assert sum(explained.shares.values()) == pytest.approx(explained.error, abs=1e-6)
    assert abs(explained.shares["head"]) < 0.05
    assert explained.estimates["formula in the dream"] == pytest.approx(explained.estimates["whole episode"], abs=1e-4)


def test_what_has_no_formula_is_told(tmp_path):
    model = load_pretrained_model("cartpole-state")
    assert "no sensor sees" in str(formula_lacks(EMBODIMENTS["finger"], "turn_easy", model))
    assert "does not decode" in str(formula_lacks(EMBODIMENTS["humanoid"], "walk", model))
    assert formula_lacks(EMBODIMENTS["cartpole"], "swingup", model) is None
    foreign = make_tiny_model(tmp_path / "model", "Pendulum-v1")
    with pytest.raises(AimeGymError, match="known to its env alone"):
        aime_gym.TensorDream(foreign, reward="formula")
    aime_gym.TensorDream(foreign)  # its head pays
    with pytest.raises(AimeGymError, match="no sensor sees"):
        TaskFormula("finger", "turn_easy")
