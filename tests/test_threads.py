"""Torch's number of threads is the user's, whoever uses one meanwhile."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from aime_gym.commands.dream import Dream
from aime_gym.commands.imitate import Imitate
from aime_gym.commands.train import Train
from aime_gym.errors import AimeGymError
from aime_gym.parallel import one_thread, so_many_threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_it_is_one_inside_and_as_before_outside(two_threads):
    with one_thread():
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with one_thread(False):
        assert torch.get_num_threads() == 2


def test_a_number_of_threads_is_for_a_while(two_threads):
    with so_many_threads(1):
        with one_thread():
            pass
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with so_many_threads(None):
        assert torch.get_num_threads() == 2


def test_a_command_leaves_the_callers_threads(two_threads, tmp_path):
    """What fails before its work begins is enough to see it."""
    for job in (
        Dream(task="none", threads=1, out=tmp_path / "dream"),
        Imitate(task="none", threads=1, out=tmp_path / "imitate"),
        Train((tmp_path / "data",), threads=1, out=tmp_path / "model"),
    ):
        with pytest.raises(AimeGymError):
            job.run()
        assert torch.get_num_threads() == 2, type(job)


def test_many_at_once_leave_it_as_it_was(two_threads):
    """Also for threads that begin later, which torch 2.13.0 gives what any of them set last.

    See findings/torch_threads_are_set_for_those_to_come.sh.
    """
    seen, ready = [], threading.Barrier(4)

    def work():
        ready.wait()
        for _ in range(50):
            with one_thread():
                torch.zeros(4) + 1
        ready.wait()
        seen.append(torch.get_num_threads())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with ThreadPoolExecutor(1) as later:
        seen.append(later.submit(torch.get_num_threads).result())
    assert [*seen, torch.get_num_threads()] == [2] * 6
