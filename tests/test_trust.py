"""What is known of a model's dreams is said where they are made."""

from __future__ import annotations

import json
import shutil
import warnings

import gymnasium as gym
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aime_gym  # noqa: F401  # registers the ids
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.dream_job import PENALTY, Dream
from aime_gym.evaluation.metrics import dope_metrics
from aime_gym.evaluation.worlds import Worlds
from aime_gym.world_model.checkpoint import PRETRAINED, bundled_models
from aime_gym.world_model.trust import TRUST, UntrustworthyDream, load_trust, save_trust


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(PRETRAINED / "walker-state", tmp_path / "model")
    return tmp_path / "model"


def make(folder, task):
    gym.make("AimeDream-Walker-v0", model=str(folder), task=task).close()


def test_a_dream_that_ranks_agents_wrongly_warns_once_for_each_task(folder):
    wrong, right = dope_metrics([1, 2, 3, 4], [2, 1, 4, 3]), dope_metrics(range(5), range(0, 50, 10))
    save_trust(folder, {"walk": wrong, "run": right, "stand": dope_metrics([1, 1], [1, 2])})
    assert wrong["spearman"] == pytest.approx(0.6)
    with pytest.warns(UntrustworthyDream, match=r"walk in dreams of model: .* over 4 policies is 0\.60"):
        make(folder, "walk")
    with pytest.warns(UntrustworthyDream, match="not defined"):
        make(folder, "stand")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrustworthyDream)
        make(folder, "walk")
        make(folder, "run")
    save_trust(folder, {"walk": dope_metrics([1, 2, 3, 4], [4, 3, 2, 1])})  # of other weights in the same folder
    with pytest.warns(UntrustworthyDream, match=r"is -1\.00"):
        make(folder, "walk")


def test_two_policies_do_not_vouch_for_a_dream(folder):
    save_trust(folder, {"walk": dope_metrics([1, 2], [1, 2])})
    with pytest.warns(UntrustworthyDream, match=r"over 2 policies is 1\.00; from 0\.8 over 5 policies on"):
        make(folder, "walk")


def test_every_bundled_model_says_what_its_dreams_are_worth():
    for name in bundled_models():
        for task, measured in load_trust(PRETRAINED / name).items():
            assert measured["policies"] >= 10, f"{name} {task}"
        assert load_trust(PRETRAINED / name), name


def test_what_is_not_measured_is_not_warned_of(folder):
    (folder / TRUST).unlink(missing_ok=True)
    assert load_trust(folder) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrustworthyDream)
        make(folder, "walk")


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ).map(json.dumps),
    )
)
def test_a_broken_file_is_named(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("trust")
    (folder / TRUST).write_text(content, encoding="utf-8", errors="replace")
    readable = True
    try:
        measured = load_trust(folder)
    except AimeGymError as error:
        readable, told = False, str(error)
    if readable:
        assert all(value is None or value == value for of in measured.values() for value in of.values())
    else:
        assert TRUST in told


def test_agents_are_kept_out_of_the_holes_of_models_that_nothing_is_known_of(folder):
    job = Dream()
    with Worlds("walker", "walk", str(folder)) as worlds:
        assert job._penalty(worlds) == 0
        (folder / TRUST).unlink()
        assert job._penalty(worlds) == PENALTY
        assert Dream(uncertainty_penalty=0.5)._penalty(worlds) == 0.5
