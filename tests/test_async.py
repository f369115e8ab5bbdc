"""Envs with a model in Gymnasium's `AsyncVectorEnv`, which makes one, and then forks."""

import os
import signal
import subprocess
import sys

import pytest

PROBE = """
import gymnasium, torch
import aime_gym

torch.rand(999, 999) @ torch.rand(999, 999)  # threads of the parent, which a fork does not inherit
envs = gymnasium.make_vec({env}, num_envs=2, vectorization_mode="async", {options})
envs.reset(seed=0)
envs.step(envs.action_space.sample())
{more}
envs.close()
"""


SLOW = pytest.mark.slow  # all three run on one thread by the same decorator


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
@pytest.mark.parametrize(
    ("env", "options", "more"),
    [
        ("'AimeDream-Walker-v0'", "model='walker-pixels', obs_type='latent', render_mode='rgb_array'", "envs.render()"),
        *(
            pytest.param(
                "'AimeReal-Walker-v0'", f"wrappers=[lambda env: {wrapper}(env, 'walker-state')]", "", marks=SLOW
            )
            for wrapper in ("aime_gym.LatentObservation", "aime_gym.Evidence")
        ),
    ],
    ids=["dream", "LatentObservation", "Evidence"],
)
def test_no_slot_waits_for_threads_that_a_fork_lost(env, options, more):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROBE.format(env=env, options=options, more=more)],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        start_new_session=True,
    )
    try:
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:  # it hangs, and so do its children
            os.killpg(process.pid, signal.SIGKILL)
