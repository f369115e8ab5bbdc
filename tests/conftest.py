"""Set before torch and MuJoCo are imported: small tensors want one thread, and machines have no display."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def gl():
    """Skips tests of pictures where no GL library works."""
    from aime_gym.bodies import tasks
    from aime_gym.bodies.lookup import get_embodiment
    from aime_gym.envs.rendering import MuJoCoRenderer
    from aime_gym.errors import AimeGymError

    try:
        MuJoCoRenderer(tasks.load(get_embodiment("walker"), "walk").physics, 8, 8).close()
    except AimeGymError as error:
        pytest.skip(str(error))
