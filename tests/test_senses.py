"""A model of states that is taught to see keeps its dreams and gains pictures."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import aime_gym  # noqa: F401 - registers the ids
from aime_gym.agents.sb3 import seen_by
from aime_gym.commands.collect import collect
from aime_gym.commands.data_sets import Render
from aime_gym.commands.pretrain import Pretrain
from aime_gym.commands.train import Train
from aime_gym.data.trajectories import load_trajectory, read_metadata, trajectory_paths, write_metadata
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.worlds import Worlds
from aime_gym.observations import to_tensors
from aime_gym.training.refine import keep_dynamics, senses_config, senses_loss
from aime_gym.world_model.checkpoint import load_pretrained_model, read_weights
from aime_gym.world_model.model import WorldModel
from tests.random_data import record_random
from tests.random_models import random_model
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "states")


@pytest.fixture(scope="module")
def data(tmp_path_factory, gl) -> Path:
    """Two short random episodes of the real walker, with images."""
    folder = record_random(tmp_path_factory.mktemp("data") / "walker-images", episodes=2, steps=60)
    Render((folder,), fast=True, workers=1).run()
    return folder


def job(data: Path, states: Path, out: Path) -> Train:
    return Train(
        (data,),
        out=out,
        setup="visual",
        dynamics=str(states),
        image_width=4,
        **{"batch_size": 2, "horizon": 6, "updates": 3, "evaluate_every": 3, "evaluation_windows": 3, "held_out": 0.5},
        **{"precision": "32-true", "accelerator": "cpu", "tensorboard": False},
    )


@pytest.fixture(scope="module")
def seeing(data, states, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "pixels"
    job(data, states, out).run()
    return out


def test_the_dream_is_that_of_the_model_of_states_to_the_bit(states, seeing):
    before, after = load_pretrained_model(states), load_pretrained_model(seeing)
    assert after.observed == ("image",)
    state, actions = torch.randn(3, before.config.feature_dim), torch.rand(8, 3, 6) * 2 - 1
    dreams = [
        model.imagine(state, actions, generator=torch.Generator().manual_seed(0), names=("orientations", "velocity"))
        for model in (before, after)
    ]
    assert torch.equal(dreams[0].features, dreams[1].features)
    for name, decoded in dreams[0].observations.items():
        assert torch.equal(decoded, dreams[1].observations[name])
    assert before.heads is not None
    assert after.heads is not None
    for name, weight in before.heads.state_dict().items():
        assert torch.equal(weight, after.heads.state_dict()[name])


def test_without_velocities_the_dream_is_the_same_and_an_inverse_dynamics_model_is_learned_along(
    data, states, tmp_path
):
    out = tmp_path / "lpomdp"
    dataclasses.replace(job(data, states, out), setup="lpomdp", idm_mode="detach").run()
    before, after = load_pretrained_model(states), load_pretrained_model(out)
    assert after.observed == ("orientations", "height")
    assert after.probed == ("velocity",)
    assert after.idm is not None
    assert after.heads is not None
    state, actions = torch.randn(3, before.config.feature_dim), torch.rand(8, 3, 6) * 2 - 1
    dreams = [model.imagine(state, actions, sample=False) for model in (before, after)]
    assert torch.equal(dreams[0].features, dreams[1].features)
    for name in ("height", "velocity"):
        torch.testing.assert_close(dreams[0].observations[name], dreams[1].observations[name])


def test_with_the_same_senses_only_an_inverse_dynamics_model_is_learned(data, states, tmp_path):
    plan = dataclasses.replace(job(data, states, tmp_path / "idm"), setup="mdp", idm_mode="detach")
    plan.run()
    before, after = (load_pretrained_model(folder).state_dict() for folder in (states, plan.out))
    new = {name for name in after if name not in before}
    assert new
    assert all(name.startswith("idm.") for name in new)
    for name, value in before.items():
        assert torch.equal(value, after[name])


def learn(model: WorldModel, taught: WorldModel, data: Path) -> list[dict[str, float]]:
    """Gives a model of `senses_config` the dynamics and sixty updates on the same windows: the metrics of each."""
    keep_dynamics(model, taught)
    trajectory = load_trajectory(trajectory_paths(data)[0], images="image" in model.observed)
    windows = {
        key: np.stack([trajectory[key][begin : begin + 10] for begin in range(0, 50, 10)], axis=1)
        for key in dict.fromkeys(("pre_action", *model.observed, *model.probed, *taught.observed))
    }
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
    history = []
    for _ in range(60):
        loss, metrics = senses_loss(model, taught, to_tensors(windows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: float(value) for name, value in metrics.items()})
    return history


def test_it_learns_to_tell_all_sensors_from_some(data, states):
    """On the very windows it learns from, sensors come nearer to the truth, those that it does not see too."""
    torch.manual_seed(0)
    taught = load_pretrained_model(states)
    errors = learn(WorldModel(senses_config(taught.config, "lpomdp")), taught, data)
    for name in ("orientations_mse", "velocity_mse"):
        assert errors[-1][name] < errors[0][name]


def test_image_networks_take_two_bytes_a_weight(states, seeing):
    weights, _ = read_weights(seeing / "model.safetensors")
    assert torch.equal(
        weights["decoders.image.net.0.weight"], weights["decoders.image.net.0.weight"].bfloat16().float()
    )
    images = sum(value.numel() for name, value in weights.items() if name.startswith(("encoders.", "decoders.")))
    rest = sum(value.numel() for name, value in weights.items()) - images
    assert (seeing / "model.safetensors").stat().st_size < 2 * images + 4 * rest + 10_000


def test_its_world_is_drawn_as_its_data_were(data, seeing):
    """What the dream is compared with shows a state to the byte as the data did from which the model learned."""
    model = load_pretrained_model(seeing)
    assert model.config.rendering == read_metadata(data)["rendering"] == "fast"
    trajectory = load_trajectory(trajectory_paths(data)[0], images=True)
    with Worlds("walker", "walk", model, obs_type="image", max_episode_steps=5) as worlds:
        envs = worlds.real_envs(1)
        frames, _ = envs.reset(seed=0, options={"physics": trajectory["physics"][10:11]})
        envs.close()
    np.testing.assert_array_equal(frames[0], trajectory["image"][10])
    assert seen_by(None, model.config.body, "random", model) == {"obs_type": "image", "rendering": "fast"}


def test_data_say_how_an_agent_on_latents_saw_the_world(seeing, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("aime_gym.commands.collect.run_in_processes", lambda job, *_, **__: asked.append(job.args[-1]))
    collect("walker", "walk", "random", 1, tmp_path / "seen", model=str(seeing))
    assert asked == [{"obs_type": "image", "rendering": "fast"}]
    assert read_metadata(tmp_path / "seen")["rendering"] == "fast"
    with pytest.raises(AimeGymError, match="aime-gym render --fast"):
        collect("walker", "walk", "random", 1, tmp_path / "unseen", fast=True)
    assert not (tmp_path / "unseen").exists()
    with pytest.raises(AimeGymError, match=r"--train\.setup visual"):
        Pretrain("walker", fast=True, out=tmp_path / "model", work=tmp_path / "work").run()


def test_images_of_two_renderings_are_no_data_of_one_model(data, states, tmp_path):
    full = Path(shutil.copytree(data, tmp_path / "full"))
    write_metadata(full, {key: value for key, value in read_metadata(data).items() if key != "rendering"})
    plan = dataclasses.replace(job(data, states, tmp_path / "model"), datasets=(data, full))
    with pytest.raises(AimeGymError, match=r"one rendering.*fast.*full"):
        plan.run()
    assert not plan.out.exists()


def test_its_dream_env_shows_decoded_frames_and_the_same_rewards(seeing):
    env = gymnasium.make("AimeDream-Walker-v0", model=str(seeing), obs_type="image")
    frame, _ = env.reset(seed=0)
    assert frame.shape == (64, 64, 3)
    _, reward, *_ = env.step(np.zeros(6, np.float32))
    assert 0 <= reward <= 2
    env.close()


def test_it_learns_to_tell_the_sensors_from_images(data, states):
    """On the very windows it learns from, sensors and pixels come nearer to the truth; the dynamics stay."""
    torch.manual_seed(0)
    taught = load_pretrained_model(states)
    model = WorldModel(senses_config(taught.config, "visual", 4))
    losses = learn(model, taught, data)
    assert losses[-1]["image_mse"] < 0.5 * losses[0]["image_mse"]
    assert losses[-1]["total_loss"] < 0.5 * losses[0]["total_loss"]
    assert losses[-1]["orientations_mse"] < losses[0]["orientations_mse"]
    prior = taught.cell.prior_net.state_dict()  # type: ignore[operator]
    for name, weight in model.cell.prior_net.state_dict().items():  # type: ignore[operator]
        assert torch.equal(weight, prior[name])


def test_images_are_learned_from_what_the_model_of_states_knows(data, states):
    """What an encoder makes of a frame, or fails to, is nothing to the decoder: the dream knows where limbs are."""
    taught = load_pretrained_model(states)
    trajectory = load_trajectory(trajectory_paths(data)[0], images=True)
    batch = {key: value[:10, None] for key, value in to_tensors(trajectory).items() if key != "physics"}
    learned = []
    for blind in (False, True):
        torch.manual_seed(0)
        model = WorldModel(senses_config(taught.config, "visual", 4))
        for weight in model.encoders.parameters() if blind else ():
            weight.data.zero_()
        keep_dynamics(model, taught)
        torch.manual_seed(1)
        senses_loss(model, taught, batch)[0].backward()
        learned.append([weight.grad for weight in model.decoders["image"].parameters()])
    for seeing, unseeing in zip(*learned, strict=True):
        assert seeing.abs().max() > 0
        torch.testing.assert_close(seeing, unseeing)


def test_what_cannot_be_taught_is_refused(data, states, tmp_path):
    plan = job(data, states, tmp_path / "model")
    with pytest.raises(AimeGymError, match="has the senses of setup 'mdp' already"):
        dataclasses.replace(plan, setup="mdp").run()
    with pytest.raises(AimeGymError, match="is of cheetah; the data are of walker"):
        dataclasses.replace(plan, dynamics="cheetah-state").run()
    with pytest.raises(AimeGymError, match="sees images already"):
        senses_config(random_model(setup="visual").config, "visual", 4)
    blind = dataclasses.replace(random_model(setup="lpomdp").config, probes={})
    with pytest.raises(AimeGymError, match="does not decode velocity"):
        senses_config(blind, "visual", 4)


def test_the_bundled_dream_of_images_is_looked_at_without_gl(monkeypatch):
    def no_gl(*args):
        raise AssertionError("GL was touched")

    monkeypatch.setattr("aime_gym.envs.rendering.MuJoCoRenderer", no_gl)
    env = gymnasium.make("AimeDream-Walker-v0", obs_type="image", render_mode="rgb_array", height=128)
    frame, _ = env.reset(seed=0)
    assert (frame.shape, frame.dtype) == ((64, 64, 3), np.uint8)
    frame, *_ = env.step(env.action_space.sample())
    picture = env.render()
    assert isinstance(picture, np.ndarray)
    assert np.array_equal(picture, frame.repeat(2, 0).repeat(2, 1))
    env.close()


def test_the_bundled_models_of_states_and_images_dream_alike():
    states, pixels = load_pretrained_model("walker-state"), load_pretrained_model("walker-pixels")
    state, actions = torch.randn(3, states.config.feature_dim), torch.rand(8, 3, 6) * 2 - 1
    dreams = [model.imagine(state, actions, sample=False, names=("velocity",)) for model in (states, pixels)]
    assert torch.equal(dreams[0].features, dreams[1].features)
    assert torch.equal(dreams[0].observations["velocity"], dreams[1].observations["velocity"])
    assert states.heads is not None
    assert pixels.heads is not None
    assert torch.equal(states.heads.reward(state, "walk"), pixels.heads.reward(state, "walk"))


def test_policies_that_do_not_look_cost_no_pictures(monkeypatch):
    def render(self):
        raise AssertionError("rendered")

    monkeypatch.setattr("aime_gym.envs.rendering.MuJoCoRenderer.render", render)
    with Worlds("walker", "walk", "walker-pixels", max_episode_steps=20) as worlds:
        earned = worlds.evaluate("random", 2)[1].returns
        starts = worlds.real_starts(worlds.draw_starts(2))
    world = gymnasium.make("AimeReal-Walker-v0", task="walk").unwrapped
    for seed in range(2):
        world.reset(seed=seed, options={"physics": starts["physics"][seed]})
        rng = np.random.default_rng([seed, 1])
        by_hand = sum(world.step(rng.uniform(-1, 1, 6).astype(np.float32))[1] for _ in range(20))
        assert earned[seed] == pytest.approx(by_hand, rel=1e-5)
