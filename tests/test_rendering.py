"""Renderers of one process draw what they draw alone, whatever others do meanwhile."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading

import gymnasium as gym
import numpy as np
import pytest

import aime_gym
from aime_gym.bodies import tasks
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.envs.rendering import MuJoCoRenderer
from aime_gym.gl import import_without_gl

suite = import_without_gl("dm_control.suite")


def scene(body="walker", task="walk"):
    return tasks.load(get_embodiment(body), task).physics


@pytest.fixture(scope="module")
def walker(gl):
    """Physics, and how they look alone."""
    physics = scene()
    renderer = MuJoCoRenderer(physics, 64, 64)
    frame = renderer.render()
    renderer.close()
    assert frame.std() > 10
    return physics, frame


@pytest.mark.parametrize(("body", "task"), [("walker", "walk"), ("cheetah", "run"), ("ball_in_cup", "catch")])
def test_fast_frames_differ_by_less_than_half_a_step_of_255(gl, body, task):
    """From random poses; a second renderer of the same physics draws in full quality as before."""
    physics, rng = scene(body, task), np.random.default_rng(0)
    fast, full = (MuJoCoRenderer(physics, 64, 64, rendering=kind) for kind in ("fast", "full"))
    pairs = []
    for _ in range(4):
        physics.reset()
        physics.data.qpos[:] += 0.5 * rng.standard_normal(physics.model.nq)
        physics.forward()
        pairs.append([renderer.render().astype(float) for renderer in (fast, full)])
    for renderer in (fast, full):
        renderer.close()
    first, second = np.moveaxis(np.array(pairs), 1, 0)
    assert 0 < np.abs(first - second).mean() < 0.5
    assert physics.model.vis.quality.shadowsize == 2048
    with pytest.raises(aime_gym.AimeGymError, match=r"Unknown rendering 'quick'.*full, fast"):
        MuJoCoRenderer(physics, 64, 64, rendering="quick")


def test_closing_one_leaves_the_other(walker):
    physics, alone = walker
    kept, closed = MuJoCoRenderer(physics, 64, 64), MuJoCoRenderer(scene("cheetah", "run"), 80, 48)
    closed.render()
    np.testing.assert_array_equal(kept.render(), alone)
    closed.close()
    closed.close()
    np.testing.assert_array_equal(kept.render(), alone)
    with pytest.raises(aime_gym.AimeGymError, match="closed"):
        closed.render()
    kept.close()


def test_what_garbage_collection_frees_leaves_the_other(walker):
    physics, alone = walker
    kept, dropped = MuJoCoRenderer(physics, 64, 64), MuJoCoRenderer(scene("cheetah", "run"), 64, 64)
    dropped.render()
    kept.render()
    thread = dropped._canvas._thread
    del dropped
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive(), "the context was not freed"
    np.testing.assert_array_equal(kept.render(), alone)
    kept.close()


def test_dm_controls_own_pictures_and_ours_leave_each_other(walker):
    physics, alone = walker
    ours = MuJoCoRenderer(physics, 64, 64)
    theirs = suite.load("walker", "walk").physics
    before = theirs.render(48, 48)
    np.testing.assert_array_equal(ours.render(), alone)
    np.testing.assert_array_equal(theirs.render(48, 48), before)
    theirs.free()
    np.testing.assert_array_equal(ours.render(), alone)
    ours.close()


def test_any_thread_may_make_draw_and_close(walker):
    _, alone = walker
    frames, physics = [], [scene() for _ in range(3)]
    renderers = [MuJoCoRenderer(physics[0], 64, 64)]

    def work(own):
        renderer = MuJoCoRenderer(own, 64, 64)
        renderers.append(renderer)
        frames.extend(renderer.render() for _ in range(3))

    threads = [threading.Thread(target=work, args=(own,)) for own in physics[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    frames += [renderer.render() for renderer in renderers]
    for renderer in renderers:
        renderer.close()
    assert len(frames) == 9
    for frame in frames:
        np.testing.assert_array_equal(frame, alone)


def test_envs_of_images_and_a_dream_that_renders_leave_each_other(gl):
    def episode(env, between=lambda: None):
        seen = [env.reset(seed=3)[0]]
        env.action_space.seed(0)
        for _ in range(2):
            between()
            seen.append(env.step(env.action_space.sample())[0])
        return np.stack(seen)

    def make_image_env():
        return gym.make("AimeReal-Walker-v0", obs_type="image")

    env = make_image_env()
    alone = episode(env)
    env.close()
    first, second = make_image_env(), make_image_env()
    dream = gym.make("AimeDream-Walker-v0", render_mode="rgb_array", width=64, height=64)
    second.reset(seed=1)
    dream.reset(seed=1)
    np.testing.assert_array_equal(episode(first, lambda: dream.render()), alone)
    dream.close()
    np.testing.assert_array_equal(episode(first, second.close), alone)
    first.close()


def test_mujoco_envs_of_gymnasium_leave_each_other(gl):
    """Gymnasium 1.4.0 alone draws them into one context: findings/gymnasium_two_mujoco_envs_share_a_picture.sh."""

    def make(body):
        env = gym.make("AimeReal-v0", embodiment=body, render_mode="rgb_array")
        env.reset(seed=0)
        return env

    kept = make("InvertedPendulum-v5")
    alone = kept.render()
    closed = make("HalfCheetah-v5")
    cheetah = closed.render()
    np.testing.assert_array_equal(kept.render(), alone)
    np.testing.assert_array_equal(closed.render(), cheetah)
    closed.close()
    np.testing.assert_array_equal(kept.render(), alone)
    kept.close()


def test_envs_of_gymnasium_and_of_shimmy_leave_each_other(gl):
    shimmy = "shimmy.registration:dm_control"
    bodies = ("InvertedPendulum-v5", f"{shimmy}/pendulum-swingup-v0", "Pusher-v5", f"{shimmy}/cartpole-balance-v0")

    def make(body):
        size = {"width": 64, "height": 64}
        options = {"render_kwargs": size} if shimmy in body else size
        env = gym.make("AimeReal-v0", embodiment=body, render_mode="rgb_array", **options)
        env.reset(seed=0)
        return env

    alone = []
    for body in bodies:
        env = make(body)
        alone.append(env.render())
        env.close()
        assert alone[-1].std() > 10, body
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        envs = dict(zip(order, (make(bodies[index]) for index in order), strict=True))
        for index, env in envs.items():
            np.testing.assert_array_equal(env.render(), alone[index], err_msg=bodies[index])
        for closed in order:
            if closed != order[-2]:  # the last but one is dropped without being closed
                envs[closed].close()
                envs[closed].close()
            del envs[closed]
            gc.collect()
            for index, env in envs.items():
                message = f"{bodies[index]} after {bodies[closed]}"
                np.testing.assert_array_equal(env.render(), alone[index], err_msg=message)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*")
def test_a_forked_process_is_told_that_gl_did_not_survive(walker):
    physics, _ = walker
    renderer = MuJoCoRenderer(physics, 64, 64)
    child = os.fork()
    if not child:
        refused = []
        for draw in (renderer.render, lambda: MuJoCoRenderer(physics, 64, 64)):
            try:
                draw()
            except aime_gym.AimeGymError as error:
                refused.append("spawn" in str(error))
        os._exit(0 if refused == [True, True] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    renderer.close()


def test_threads_that_import_at_once_leave_the_users_backend(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    first_is_over, second_is_inside, seen = threading.Event(), threading.Event(), []

    def slow_import(name):
        seen.append(os.environ["MUJOCO_GL"])
        if name == "first":
            second.start()
            second_is_inside.wait(timeout=0.2)
        else:
            second_is_inside.set()
            first_is_over.wait()

    second = threading.Thread(target=import_without_gl, args=("second",))
    monkeypatch.setattr("aime_gym.envs.rendering.importlib.import_module", slow_import)
    import_without_gl("first")
    first_is_over.set()
    second.join()
    assert seen == ["disable", "disable"]
    assert os.environ["MUJOCO_GL"] == "egl"


def test_a_process_ends_with_what_nobody_closed(gl):
    probe = """
import gymnasium, weakref
import aime_gym
env = gymnasium.make("AimeReal-Walker-v0", render_mode="rgb_array", width=8, height=8)
weakref.finalize(env, print)  # the interpreter ends weak references before renderers
env.reset(seed=0)
print(env.render().shape)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "(8, 8, 3)"), done.stderr


def test_a_process_that_has_rendered_by_dm_control_too_ends_without_a_word(gl):
    probe = """
import gymnasium
import aime_gym
options = {"render_mode": "rgb_array", "width": 8, "height": 8}
first = gymnasium.make("AimeReal-Walker-v0", **options)
first.reset(seed=0)
first.render()
from dm_control import suite
physics = suite.load("cartpole", "swingup").physics  # dm_control's own pictures, whose display ends at exit, too
print(physics.render(8, 8).shape)
second = gymnasium.make("AimeReal-Walker-v0", **options)
second.reset(seed=0)
second.render()
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "(8, 8, 3)"), done.stderr
    assert "EGLError" not in done.stderr


@pytest.mark.parametrize("world", ["Real", "Dream"])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_of_envs_that_have_rendered_draw_their_own_states(world, copy_of, gl):
    env = gym.make(f"Aime{world}-Walker-v0", render_mode="rgb_array", width=64, height=48)
    env.reset(seed=0)
    before = env.render()
    twin = copy_of(env)
    for _ in range(5):
        env.step(np.ones(6, np.float32))
    apart = [np.abs(each.render().astype(int) - before).mean() for each in (twin, env)]
    assert apart[0] < 0.01 < apart[1]
    env.close()
    assert np.abs(twin.render().astype(int) - before).mean() < 0.01
    twin.close()
