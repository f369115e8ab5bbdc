"""The real env against dm_control itself."""

import copy
import pickle
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils import seeding
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_sb3_env

import aime_gym
from aime_gym.bodies import tasks
from aime_gym.bodies.body import EMBODIMENTS
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.commands.collect import RecordTrajectories
from aime_gym.data.trajectories import relabel
from aime_gym.gl import import_without_gl

BODIES = list(EMBODIMENTS.values())
BUILT_IN = [(body, task) for body in BODIES for task in body.tasks]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
@pytest.mark.parametrize("obs_type", ["state", "dict"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkers_pass(body, obs_type):
    env = gymnasium.make(f"AimeReal-{body.title}-v0", obs_type=obs_type)
    check_env(env.unwrapped, skip_render_check=True)
    check_sb3_env(env.unwrapped)
    assert gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json())).spec == env.spec
    assert env.spec.max_episode_steps * body.action_repeat == 1000


def test_worlds_of_one_task_share_nothing():
    first, second = (tasks.load(get_embodiment("reacher"), "easy") for _ in range(2))
    starts = [tuple(env.reset().observation["position"]) for env in (first, second)]
    assert starts[0] != starts[1]  # nobody has given a seed
    place = second.physics.named.model.geom_pos["target"].copy()
    first.physics.named.model.geom_pos["target"] = 7.0
    first.task.get_reward = None
    third = tasks.load(get_embodiment("reacher"), "easy")
    assert np.array_equal(second.physics.named.model.geom_pos["target"], place)
    assert 7.0 not in third.physics.named.model.geom_pos["target"]
    for env in (second, third):
        assert env.task.get_reward(env.physics) >= 0


@pytest.mark.parametrize(("body", "task"), BUILT_IN, ids=lambda x: getattr(x, "name", x))
def test_rewards_and_sensors_are_those_of_dm_control(body, task):
    env = gymnasium.make(f"AimeReal-{body.title}-v0", task=task, obs_type="dict").unwrapped
    env.reset(seed=3)
    # dm_control by hand, with the seed that the env's own generator drew. Escape needs GL for its terrain unless loaded
    # our way.
    suite = import_without_gl("dm_control.suite")
    hand = tasks.load(body, task) if task == "escape" else suite.load(body.name, task)
    hand.task._random = np.random.RandomState(seeding.np_random(3)[0].integers(2**31))
    hand.reset()
    rng = np.random.default_rng(0)
    for _ in range(15):
        action = rng.uniform(-1, 1, body.action_dim).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        assert not terminated
        assert not truncated
        steps = [hand.step(action.astype(np.float64)) for _ in range(body.action_repeat)]
        assert reward == pytest.approx(sum(step.reward for step in steps), abs=1e-6)
        for name, value in observation.items():
            np.testing.assert_allclose(value, np.ravel(steps[-1].observation[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "task", "moving"),
    [("walker", "walkbackward", 1), ("walker", "runbackward", 1), ("cheetah", "runbackward", 0)],
)
def test_backward_tasks_reward_moving_backward(name, task, moving):
    body = get_embodiment(name)
    env = tasks.load(body, task)
    env.reset()
    state = env.physics.get_state()
    state[:] = 0  # upright at the origin
    velocity = len(env.physics.data.qpos) + moving

    def reward(speed):
        state[velocity] = speed
        return tasks.rewards_of_states(body, task, state[None])[0]

    assert reward(-0.9) > reward(0.0) + 0.05
    assert reward(0.9) == pytest.approx(reward(0.0), abs=0.02)


def test_v1_formulas_stay_reachable():
    walker = get_embodiment("walker")
    state = np.zeros(18)
    state[9] = -0.5  # falling: the vertical velocity that v1 took for the horizontal one
    honest, v1 = (tasks.rewards_of_states(walker, task, state[None])[0] for task in ("walkbackward", "walkbackward-v1"))
    assert v1 > honest + 0.2
    summed = gymnasium.make("AimeReal-Walker-v0", task="flip").unwrapped
    last = gymnasium.make("AimeReal-Walker-v0", task="flip-v1").unwrapped
    for env in (summed, last):
        env.reset(seed=0)
    action = np.ones(6, np.float32)
    both = [(summed.step(action)[1], last.step(action)[1]) for _ in range(20)]
    assert all(s >= v for s, v in both)
    assert sum(s for s, _ in both) > 1.5 * sum(v for _, v in both) > 0


def _v1_by_hand(physics, standing: list[float], task: str) -> float:
    """The reward of an agent step in AIME's first release; `standing` is walker-stand's reward at its control steps."""
    velocity = physics.velocity()
    return {
        "walkbackward": sum(standing) * (5 * np.clip(-velocity[0] / 1, 0, 1) + 1) / 6,
        "runbackward": sum(standing) * (5 * np.clip(-velocity[0] / 8, 0, 1) + 1) / 6,
        "flip": np.clip(velocity[2] / 5, 0, 1),
        "flipbackward": np.clip(-velocity[2] / 5, 0, 1),
        "jump": np.clip(physics.torso_height() / 5, 0, 1),
    }[task]


@pytest.mark.parametrize("task", ["walkbackward", "runbackward", "flip", "flipbackward", "jump"])
def test_v1_rewards_are_those_of_a_hand_written_loop_on_the_physics(task):
    """In the env and by relabelling: walker's backward tasks sum how well it stands, all else is of the last step."""
    trajectories = []
    env = gymnasium.make("AimeReal-Walker-v0", task=f"{task}-v1", max_episode_steps=40)
    env = RecordTrajectories(env, trajectories.append)
    env.reset(seed=3)
    twin = import_without_gl("dm_control.suite").load("walker", "stand")
    twin.reset()
    tasks.set_physics_state(twin.physics, env.unwrapped.physics_state)
    env.action_space.seed(0)
    expected, earned = [], []
    for _ in range(40):
        action = env.action_space.sample()
        standing = [twin.step(action).reward for _ in range(2)]
        expected.append(_v1_by_hand(twin.physics, standing, task))
        earned.append(env.step(action)[1])
    np.testing.assert_allclose(earned, expected, atol=1e-9)
    assert sum(expected) > 0
    env.close()
    relabelled = relabel(trajectories[0], get_embodiment("walker"), [f"{task}-v1"])[f"{task}-v1"]
    np.testing.assert_allclose(relabelled[1:, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "task", "guide"),
    [("pendulum", "swingup", "lift"), ("hopper", "stand", "rise"), ("finger", "spin", "push")],
)
def test_guiding_tasks_lead_to_the_rewards_of_a_sparse_one(body, task, guide):
    sparse, dense = (gymnasium.make("AimeReal-v0", embodiment=body, task=name).unwrapped for name in (task, guide))
    most = dense.embodiment.action_repeat
    rng = np.random.default_rng(0)
    rewards = []
    for _ in range(400):
        state = np.concatenate(
            [rng.uniform(-1.5, 1.5, sparse.physics.model.nq), rng.normal(0, 15, sparse.physics.model.nv)]
        )
        for env in (sparse, dense):
            env.reset(options={"physics": state})
        rewards.append([env.step(np.zeros(dense.embodiment.action_dim, np.float32))[1] for env in (sparse, dense)])
    earned, guided = np.array(rewards).T
    assert guided.min() >= 0
    assert guided.max() <= most
    full = earned > most - 1e-6
    assert full.any()
    assert guided[full].min() > 0.98 * most  # the guide is best where the sparse task pays
    assert guided[~full].mean() < 0.8 * most
    assert len(np.unique(guided.round(3))) > 50  # and is not flat elsewhere


@pytest.mark.parametrize(("body", "task"), [pair for pair in BUILT_IN if tasks.is_function_of_state(*pair)])
def test_rewards_of_states_equal_the_live_reward(body, task):
    env = tasks.load(body, task)
    env.reset()
    rng = np.random.default_rng(1)
    states, rewards = [], []
    for _ in range(6):
        step = env.step(rng.uniform(-1, 1, body.action_dim))
        states.append(env.physics.get_state())
        rewards.append(step.reward)
    np.testing.assert_allclose(tasks.rewards_of_states(body, task, np.array(states)), rewards, atol=1e-6)


def test_reachers_physics_hold_the_target_that_every_reset_draws():
    env = gymnasium.make("AimeReal-Reacher-v0", task="hard", obs_type="dict").unwrapped
    twin = gymnasium.make("AimeReal-Reacher-v0", task="hard", obs_type="dict").unwrapped
    observation, _ = env.reset(seed=1)
    other, _ = env.reset(seed=2)
    assert np.abs(observation["to_target"] - other["to_target"]).max() > 0.01
    again, _ = twin.reset(seed=3, options={"physics": env.physics_state})
    for name, value in other.items():
        np.testing.assert_allclose(again[name], value, atol=1e-6)
    action = np.array([0.3, -0.8], np.float32)
    np.testing.assert_array_equal(env.step(action)[0]["to_target"], twin.step(action)[0]["to_target"])

    # A finger that is 4 cm beside the target touches the large one of the easy task only.
    state = env.physics_state
    state[-2:] += env.physics.finger_to_target() * -1 + [0.04, 0.0]
    rewards = {task: tasks.rewards_of_states(env.embodiment, task, state[None])[0] for task in ("easy", "hard")}
    assert rewards == {"easy": 1.0, "hard": 0.0}


def test_lpomdp_hides_velocities():
    env = gymnasium.make("AimeReal-Walker-v0", setup="lpomdp")
    assert env.observation_space.shape == (15,)
    assert (
        "velocity" not in gymnasium.make("AimeReal-Walker-v0", setup="pomdp", obs_type="dict").observation_space.spaces
    )


@pytest.mark.parametrize("body", ["Walker", "Reacher", "Quadruped"])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_go_on_alike(body, copy_of):
    env = gymnasium.make(f"AimeReal-{body}-v0")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    twin = copy_of(env)
    for _ in range(3):
        action = env.action_space.sample()
        (mine, reward, *_), (other, same, *_) = env.step(action), twin.step(action)
        np.testing.assert_allclose(mine, other, atol=1e-6)  # older MuJoCos round otherwise in a copy
        assert reward == pytest.approx(same)


def test_an_episode_is_truncated_on_time():
    env = gymnasium.make("AimeReal-Pendulum-v0", max_episode_steps=7)
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(7)]
    assert ends == [(False, False)] * 6 + [(False, True)]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_a_seed_fixes_the_episode(seed):
    first, second = gymnasium.make("AimeReal-Walker-v0"), gymnasium.make("AimeReal-Walker-v0")
    action = np.full(6, 0.3, np.float32)
    for env in (first, second):
        env.reset(seed=seed)
    np.testing.assert_array_equal(first.step(action)[0], second.step(action)[0])
    np.testing.assert_array_equal(first.reset()[0], second.reset()[0])


def test_reset_to_a_physics_state():
    env = gymnasium.make("AimeReal-Walker-v0").unwrapped
    env.reset(seed=0)
    env.step(np.ones(6, np.float32))
    state = env.physics_state
    after = env.step(np.zeros(6, np.float32))[0]
    env.reset(seed=5, options={"physics": state})
    np.testing.assert_allclose(env.physics_state, state)
    np.testing.assert_allclose(env.step(np.zeros(6, np.float32))[0], after, atol=1e-4)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"task": "wlak"}, "Did you mean 'walk'"),
        ({"obs_type": "imgae"}, "Did you mean 'image'"),
        ({"setup": "mpd"}, "Did you mean 'mdp'"),
        ({"obs_type": "latent"}, "LatentObservation"),
        ({"render_mode": "depth_array"}, "rgb_array"),
        ({"colour": 1}, "Unknown keyword of a real env 'colour'. Known: embodiment, task, "),
    ],
)
def test_mistakes_are_named(keywords, message):
    with pytest.raises(aime_gym.AimeGymError, match=message):
        gymnasium.make("AimeReal-Walker-v0", **keywords)


@pytest.mark.parametrize("action", [np.zeros(5), np.full(6, 1.2), np.full(6, np.nan), np.full(6, np.inf)])
def test_bad_actions_are_refused(action):
    env = gymnasium.make("AimeReal-Walker-v0", disable_env_checker=True).unwrapped
    env.reset(seed=0)
    with pytest.raises(aime_gym.AimeGymError, match="6 numbers in"):
        env.step(action.astype(np.float32))


def test_a_wrong_physics_state_is_refused():
    env = gymnasium.make("AimeReal-Walker-v0").unwrapped
    with pytest.raises(aime_gym.AimeGymError, match="18 finite numbers"):
        env.reset(options={"physics": np.zeros(17)})


def test_an_unknown_option_is_refused():
    with pytest.raises(aime_gym.AimeGymError, match="Unknown reset option 'state'"):
        gymnasium.make("AimeReal-Pendulum-v0").reset(options={"state": np.zeros(2)})


def test_unknown_body_suggests_the_nearest():
    with pytest.raises(aime_gym.AimeGymError, match="Did you mean 'walker'"):
        get_embodiment("Wallker")


@pytest.fixture
def gl():
    from aime_gym.envs.rendering import MuJoCoRenderer

    env = tasks.load(get_embodiment("walker"), "walk")
    try:
        MuJoCoRenderer(env.physics, 8, 8).close()
    except aime_gym.AimeGymError as error:
        pytest.skip(str(error))


def test_images_show_the_body(gl):
    env = gymnasium.make("AimeReal-Walker-v0", obs_type="image", render_mode="rgb_array", width=96, height=80)
    first, _ = env.reset(seed=0)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    second = env.step(np.ones(6, np.float32))[0]
    assert (first != second).any()
    assert env.render().shape == (80, 96, 3)
    check_env(gymnasium.make("AimeReal-Cheetah-v0", obs_type="image", render_mode="rgb_array").unwrapped)
    env.close()


def test_pictures_of_others_in_the_same_process_begin_with_gl_too(gl):
    probe = """
import gymnasium, aime_gym
gymnasium.make("AimeReal-Walker-v0").reset()
import mujoco
from dm_control import suite
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='.1'/></worldbody></mujoco>")
mujoco.Renderer(model, 8, 8).render()
print(suite.load("cartpole", "swingup").physics.render(8, 8).shape)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "(8, 8, 3)" in done.stdout, done.stderr


def test_a_camera_has_a_name(gl):
    def look(camera):
        env = gymnasium.make("AimeReal-Walker-v0", render_mode="rgb_array", camera=camera, width=32, height=24)
        env.reset(seed=0)
        frame = env.render()
        env.close()
        return frame

    np.testing.assert_array_equal(look("back"), look(1))
    assert (look("back") != look(0)).any()
    assert (look(-1) != look(0)).any()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        *[({"camera": camera}, "'side', 'back', its id from 0 to 1") for camera in (2, -2, "front", 0.5, None)],
        ({"width": 0}, "width is a positive integer"),
        ({"height": -3}, "height is a positive integer"),
    ],
)
def test_pictures_that_cannot_be_are_refused(keywords, message):
    env = gymnasium.make("AimeReal-Walker-v0", render_mode="rgb_array", disable_env_checker=True, **keywords)
    env.reset(seed=0)
    with pytest.raises(aime_gym.AimeGymError, match=message):
        env.render()
