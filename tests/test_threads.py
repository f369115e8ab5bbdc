"""Torch's number of threads is the user's, whoever uses one meanwhile."""

import threading

import pytest
import torch

from aime_gym.envs.threads import one_thread


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


def test_many_at_once_leave_it_as_it_was(two_threads):
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
    assert [*seen, torch.get_num_threads()] == [2] * 5
