"""Angles of hinges without limits: networks see sines and cosines, users see the turns."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aime_gym.agents.plain import sensor_statistics
from aime_gym.bodies import tasks
from aime_gym.bodies.body import EMBODIMENTS, Sensor
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.bodies.sensors import AngleCode
from aime_gym.data.dataset import TrajectoryDataset
from aime_gym.data.trajectories import first_world
from aime_gym.envs.tensor_dream import TensorDream
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.both_worlds import replay
from aime_gym.evaluation.explanation import Windows
from aime_gym.evaluation.real_episodes import Moment, compared, observation_scale
from aime_gym.evaluation.worlds import SENSORS, Worlds, make_dream_envs
from aime_gym.observations import to_tensors
from aime_gym.training.model_folder import prediction_error
from aime_gym.training.train import TrainingRun, renew_standardisation
from aime_gym.world_model.checkpoint import load_pretrained_model, save_model
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.config_file import config_from_yaml, config_to_yaml
from aime_gym.world_model.fast_dynamics import FastDynamics
from aime_gym.world_model.formulas import TaskFormula
from aime_gym.world_model.model import WorldModel
from tests.tiny_model import make_tiny_model

REACHER = get_embodiment("reacher")
NET = NetConfig("dmlp", 16, 2, "swish", "ln")
ENCODERS = {"rssmo": NetConfig("mlp", 16, 2, "swish", "ln", have_head=False), "rssm": NetConfig("identity")}


def build(cell: str = "rssmo", gain: float = 1.0, **overrides: Any) -> WorldModel:
    """A reacher model with random weights; `gain` is how far its decoded angles move."""
    settings: dict[str, Any] = {"memory_dim": 16, "stochastic_dim": 4, "hidden_size": 16, "standardise": True}
    settings |= {"encoders": {"tabular": ENCODERS[cell]}, "decoders": {"tabular": NET}, "probes": {"tabular": NET}}
    config = ModelConfig.for_embodiment(REACHER, "mdp", cell, **settings | {"use_reward": True} | overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = WorldModel(config)
        if config.standardise:
            mean, std = ({s.name: draw(config.codes[s.name].size) for s in config.sensors} for draw in MOMENTS)
            model.set_standardisation(mean, std)
    with torch.no_grad():
        last = model.decoders["position"].networks[0].net[-1]
        last.weight *= gain
    return model.eval().requires_grad_(False)


MOMENTS = (lambda dim: 0.1 * torch.randn(dim), lambda dim: torch.rand(dim) + 0.5)


def frames(model: WorldModel, steps: int, batch: int, turns: float = 0.0) -> dict[str, Tensor]:
    """Random observations whose shoulder has turned so often."""
    generator = torch.Generator().manual_seed(0)
    seen = {s.name: torch.randn(steps, batch, s.dim, generator=generator) for s in model.config.sensors}
    seen["position"][..., 0] += turns * math.tau
    return seen


@pytest.fixture(scope="module")
def reacher(tmp_path_factory) -> Path:
    """A tiny reacher model with starts whose shoulders have turned seven times."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "reacher", "reacher")
    starts = dict(np.load(folder / "starts.npz"))
    starts["position"][..., 0] += 7 * math.tau
    np.savez(folder / "starts.npz", **starts)
    return folder


def test_a_code_holds_the_plain_numbers_then_sines_then_cosines():
    code = AngleCode(Sensor("a", 4, rotations=(1, 3)), Sensor("b", 2), Sensor("c", 1, rotations=(0,)))
    assert (code.dim, code.size, code.rotations) == (7, 10, [1, 3, 6])
    values = torch.randn(5, 3, 7) * 9
    angles = values[..., code.rotations]
    sin, cos = angles.sin(), angles.cos()
    expected = [values[..., [0, 2]], sin[..., :2], cos[..., :2], values[..., 4:6], sin[..., 2:], cos[..., 2:]]
    torch.testing.assert_close(code.encode(values), torch.cat(expected, -1))
    np.testing.assert_allclose(code.encode(values.numpy()), code.encode(values).numpy())
    behind = torch.randn(5, 3, 2)
    decoded = code.decode(torch.cat([code.encode(values), behind], -1))
    assert (decoded[..., code.rotations].abs() <= math.pi).all()
    torch.testing.assert_close(decoded[..., 7:], behind)
    torch.testing.assert_close(code.nearest(decoded[..., :7], values), values, atol=1e-5, rtol=1e-5)
    plain = AngleCode(Sensor("a", 4), Sensor("b", 3))
    assert all(of(values) is values for of in (plain.encode, plain.decode))


def test_gradients_lead_through_a_code():
    code = AngleCode(Sensor("a", 2, rotations=(0,)))
    values = torch.tensor([[0.3, 1.0], [3.0, -2.0], [46.0, 0.0]], requires_grad=True)
    again = code.nearest(code.decode(code.encode(values)), torch.tensor([[9.0, 0.0]] * 3))
    again.sum().backward()
    torch.testing.assert_close(values.grad, torch.ones(3, 2))
    centre = torch.zeros(1, 3, requires_grad=True)  # where there is no angle
    code.decode(centre).sum().backward()
    assert centre.grad is not None
    assert centre.grad.isfinite().all()


def test_moments_of_narrow_angles_are_the_plain_ones():
    """Also where they lie at the border of a turn; those of a full turn are finite."""
    code = AngleCode(Sensor("a", 2, rotations=(1,)))
    values = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)) * 0.1 + math.pi
    written = code.encode(values)
    mean, std = code.moments(written.mean(0), written.std(0))
    torch.testing.assert_close(code.nearest(mean, values.mean(0)), values.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(std, values.std(0), atol=0.005, rtol=0)
    assert code.moments(torch.zeros(3), torch.ones(3))[1].isfinite().all()


@pytest.mark.parametrize("name", EMBODIMENTS)
def test_the_table_names_what_turns_with_the_hinges(name):
    """What a full turn of an unlimited hinge moves in the sensors, by a full turn, is a rotation of the table."""
    body, world = EMBODIMENTS[name], first_world(name)
    physics = world.physics
    hinges = (physics.model.jnt_type == 3) & (physics.model.jnt_limited == 0)
    world.reset()
    before = {key: np.atleast_1d(value).copy() for key, value in world.task.get_observation(physics).items()}
    physics.data.qpos[physics.model.jnt_qposadr[hinges]] += math.tau
    physics.forward()
    after = world.task.get_observation(physics)
    for sensor in body.sensors:
        moved = np.isclose(np.atleast_1d(after[sensor.name]) - before[sensor.name], math.tau, atol=1e-6)
        assert tuple(np.flatnonzero(moved)) == sensor.rotations, sensor.name


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("cell", ["rssmo", "rssm"])
def test_all_turns_look_alike(cell, standardise):
    model = build(cell, standardise=standardise)
    actions = torch.randn(5, 3, 2).clamp(-1, 1)
    here, there = frames(model, 5, 3), frames(model, 5, 3, turns=7)
    reward = {"reward": torch.zeros(5, 3, 1)}
    features, kl = model.observe(here, actions, sample=False)
    features_there, kl_there = model.observe(there, actions, sample=False)
    torch.testing.assert_close(features_there, features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kl_there, kl, atol=1e-3, rtol=1e-3)
    bounds = [model.evidence(seen | reward, actions, sample=False).elbo for seen in (here, there)]
    torch.testing.assert_close(bounds[1], bounds[0], atol=1e-2, rtol=1e-3)
    decoded = model.decode(features)["position"]
    assert decoded.shape == (5, 3, 2)
    assert decoded[..., 0].abs().max() <= math.pi


@pytest.mark.parametrize("cell", ["rssmo", "rssm"])
@pytest.mark.parametrize("batch", [3, 80])
def test_fast_steps_decode_and_doubt_as_the_model_does(cell, batch):
    model = build(cell, gain=4.0)
    model.heads = None
    state, actions = torch.randn(batch, model.config.feature_dim), torch.rand(batch, 2) * 2 - 1
    fast = FastDynamics(model, model.observed, None, batch, doubt=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            following, means, total, doubt = fast.step(state, actions)
        decoded = model.decode(following, model.observed)
        expected = torch.cat([decoded[name] for name in model.observed], 1)
        torch.testing.assert_close(following, model.prior_step(state, actions, None), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(means[:, :-1], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(doubt, model.doubt(following), atol=1e-3, rtol=1e-3)
        assert total.isfinite()


def test_layouts_of_equal_sizes_do_not_share_a_trace():
    """Two sensors whose networks are alike, of which one holds an angle."""
    body = replace(REACHER, sensors=(Sensor("spins", 2, rotations=(0,)), Sensor("slides", 3)))
    config = replace(build().config, embodiment="robot", sensors=body.sensors, use_reward=True)
    model = WorldModel(config).eval().requires_grad_(False)
    state, actions = torch.randn(2, config.feature_dim), torch.zeros(2, 2)
    for name in model.observed:
        with torch.no_grad():
            following, means, *_ = FastDynamics(model, [name], None, 2).step(state, actions)
        torch.testing.assert_close(means[:, :-1], model.decode(following)[name], atol=1e-5, rtol=1e-5)


def test_a_dream_shows_angles_that_go_on(tmp_path):
    """Each slot goes on from its own turn, beyond half a turn, and the next episode begins anew."""
    save_model(build(gain=60.0), tmp_path)
    dream = TensorDream(load_pretrained_model(tmp_path), num_envs=3, max_episode_steps=None)
    seen = {name: rows.numpy() for name, rows in frames(dream.model, 4, 3).items()}
    turns = np.array([0.0, 7.0, -5.0], np.float32)
    seen["position"][..., 0] += turns * math.tau
    start = {"observations": seen, "actions": np.zeros((4, 3, 2), np.float32)}
    state = dream.reset(0, start)
    assert ((state.observations[:, 0] - torch.from_numpy(seen["position"][-1, :, 0])).abs() <= math.pi + 1e-4).all()
    shown = [state.observations]
    for _ in range(60):
        state, observations, *_ = dream.step(state, torch.rand(3, 2) * 2 - 1)
        shown.append(observations)
        own = dream.model.decode(state.latents)["position"][:, 0]
        torch.testing.assert_close((observations[:, 0] - own).cos(), torch.ones(3))
    angles = torch.stack(shown)[..., 0]  # [T, N]
    assert (angles.diff(dim=0).abs() <= math.pi + 1e-4).all()
    assert ((angles - angles[0]).abs().amax(0) > math.pi).all()  # or the test would say nothing
    begun = dream.begin(state, torch.tensor([1]), start)
    torch.testing.assert_close(begun.observations[1], shown[0][1])
    torch.testing.assert_close(begun.observations[[0, 2]], state.observations[[0, 2]])


def test_starts_show_their_own_turns(reacher):
    dream = TensorDream(reacher, num_envs=4)
    state = dream.reset(0)
    real = np.load(reacher / "starts.npz")["position"][-1, state.starts, 0]
    assert (np.abs(state.observations[:, 0].numpy() - real) <= math.pi + 1e-4).all()
    assert state.observations[:, 0].min() > 5 * math.tau


def test_gradients_lead_through_a_dream(reacher):
    dream = TensorDream(reacher, num_envs=4)
    state = dream.reset(0)
    actions = torch.zeros(4, 2, requires_grad=True)
    for _ in range(3):
        state, observations, *_ = dream.step(state, actions)
    observations[:, 0].sum().backward()
    assert actions.grad is not None
    assert actions.grad.isfinite().all()
    assert (actions.grad != 0).any()


def targets(shown: np.ndarray) -> np.ndarray:
    """Where targets lie by MuJoCo's own kinematics, given what a dream shows of arms: [N, 6] -> [N, 2]."""
    physics, found = tasks.load(REACHER, "easy").physics, []
    for row in shown.astype(float):
        with physics.reset_context():
            physics.data.qpos[:] = row[:2]
        found.append(physics.named.data.geom_xpos["finger", :2] + row[2:4])
    return np.stack(found)


def test_a_dream_keeps_an_arm_s_target_where_it_is(reacher):
    """It is that of the real frame where the dream begins, and rewards are about it; the model's own moves away."""
    dream = TensorDream(reacher, num_envs=4, task="easy")
    state = dream.reset(0)
    bank = np.load(reacher / "starts.npz")
    real = np.concatenate([bank[name][-1, state.starts] for name in ("position", "to_target", "velocity")], 1)
    formula, moved = TaskFormula("reacher", "easy"), 0.0
    for _ in range(30):
        before = state.observations
        state, observations, rewards, *_ = dream.step(state, torch.rand(4, 2) * 2 - 1)
        np.testing.assert_allclose(targets(observations.numpy()), targets(real), atol=1e-4)
        sensed = [
            dict(zip(("position", "to_target", "velocity"), rows.split(2, 1), strict=True))
            for rows in (before, observations)
        ]
        torch.testing.assert_close(rewards, formula(*sensed, torch.zeros(4, 2)))
        own = dream.model.decode(state.latents, ["position", "to_target"])
        moved = max(moved, np.abs(targets(torch.cat([*own.values()], 1).numpy()) - targets(real)).max())
    assert moved > 0.01


def test_decoded_sensors_go_on_as_well(tmp_path, reacher):
    model = build(gain=60.0)
    save_model(model, tmp_path)
    (tmp_path / "starts.npz").write_bytes((reacher / "starts.npz").read_bytes())
    envs = make_dream_envs(REACHER, 2, load_pretrained_model(tmp_path), SENSORS, max_episode_steps=25)
    shown, began = [envs.reset(seed=0)[0][:, 0]], []
    for _ in range(40):
        observation, _, _, truncated, _ = envs.step(np.zeros((2, 2), np.float32))
        shown.append(observation[:, 0])
        began.append(truncated.all())
    jumps = np.abs(np.diff(shown, axis=0)).max(1)
    new = began.index(True) + 1  # the step after the last one of an episode begins the next
    assert np.delete(jumps, new).max() <= math.pi + 1e-4
    assert np.ptp(shown, axis=0).max() > math.tau
    for begun in (shown[0], shown[new + 1]):  # their starts have turned seven times
        assert (np.abs(begun - 7 * math.tau) <= math.tau).all()
    seen = {name: rows.numpy() for name, rows in frames(model, 4, 2, turns=-3).items()}
    start = {"observations": seen, "actions": np.zeros((4, 2, 2), np.float32)}
    begun, _ = envs.reset(seed=1, options={"start": start})
    assert (np.abs(begun[:, 0] - seen["position"][-1, :, 0]) <= math.pi + 1e-4).all()
    envs.close()


def test_a_config_keeps_its_rotations(tmp_path):
    config = build().config
    config_to_yaml(config, tmp_path / "config.yaml")
    assert config_from_yaml(tmp_path / "config.yaml") == config
    plain = replace(config, sensors=tuple(replace(sensor, rotations=()) for sensor in config.sensors))
    config_to_yaml(plain, tmp_path / "config.yaml")
    assert "rotations" not in (tmp_path / "config.yaml").read_text()
    assert config_from_yaml(tmp_path / "config.yaml") == plain  # though the table of bodies has some
    for wrong in ((2,), (-1,), (0, 0), (1, 0)):
        with pytest.raises(AimeGymError, match="rotations of position"):
            replace(config, sensors=(Sensor("position", 2, rotations=wrong), *config.sensors[1:]))


def test_a_saved_model_is_the_same(tmp_path):
    model = build()
    save_model(model, tmp_path)
    loaded, state = load_pretrained_model(tmp_path), torch.randn(4, model.config.feature_dim)
    assert loaded.config == model.config
    assert all(torch.equal(value, model.decode(state)[name]) for name, value in loaded.decode(state).items())
    assert torch.equal(loaded.doubt(state), model.doubt(state))


@pytest.mark.parametrize("cell", ["rssmo", "rssm"])
def test_renewed_standardisation_leaves_the_model_what_it_was(cell):
    encoder = NetConfig("mlp", 16, 2, "swish", "ln", have_head=cell == "rssm")
    model = build(cell, encoders={"tabular": encoder})
    seen, actions, states = frames(model, 4, 3), torch.zeros(4, 3, 2), torch.randn(3, model.config.feature_dim)
    features, decoded = model.observe(seen, actions, sample=False)[0], model.decode(states)
    data = TrajectoryDataset([{name: rows[:, i].numpy() for name, rows in seen.items()} for i in range(3)])
    renew_standardisation(model, *map(to_tensors, data.statistics(model.normaliser, model.config.codes)))
    torch.testing.assert_close(model.observe(seen, actions, sample=False)[0], features, atol=1e-4, rtol=1e-4)
    for name, value in model.decode(states).items():
        torch.testing.assert_close(value, decoded[name], atol=1e-4, rtol=1e-4)
    written = model.standardise(seen)["position"].flatten(0, 1)
    torch.testing.assert_close(written.mean(0), torch.zeros(3), atol=1e-5, rtol=0)


def test_agents_standardise_what_they_see(reacher):
    """Moments in the sensors' own units for agents; of codes, [C], for errors."""
    model = load_pretrained_model(reacher)
    own, coded = sensor_statistics(model), sensor_statistics(model, coded=True)
    assert [len(std) for _, std in own.values()] == [2, 2, 2]
    assert [len(std) for _, std in coded.values()] == [3, 2, 2]
    assert 0.5 < own["position"][1][0] < 4.5
    np.testing.assert_array_equal(own["velocity"][1], coded["velocity"][1])


def test_errors_compare_directions(reacher):
    """A turn more in the data changes no error: not that of rollouts, nor that of closed loops, nor a replay's."""
    model = load_pretrained_model(reacher)
    rng = np.random.default_rng(0)
    episodes = [
        {s.name: rng.normal(size=(30, s.dim)).astype(np.float32) for s in REACHER.sensors}
        | {"pre_action": rng.uniform(-1, 1, (30, 2)).astype(np.float32)}
        for _ in range(3)
    ]
    turned = [{**e, "position": e["position"] + np.float32([i * math.tau, 0])} for i, e in enumerate(episodes)]
    errors = [prediction_error(model, TrajectoryDataset(data), steps=(1, 5), windows=20) for data in (episodes, turned)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    with Worlds("reacher", model=model, max_episode_steps=20) as worlds:
        observed = rng.normal(size=(5, 6)).astype(np.float32)
        gap = compared(worlds, observed + np.float32([math.tau, 0, 0, 0, 0, 0])) - compared(worlds, observed)
        assert gap.shape[-1:] == observation_scale(worlds).shape
        np.testing.assert_allclose(gap, 0, atol=1e-5)
        both = replay("random", worlds, dreams=2)
        apart = both.dream["position"][..., 0] - both.real["position"][:, None, 0]
        assert np.abs(apart).max() <= math.pi + 1e-4


def test_explanations_show_policies_the_real_turns(reacher):
    seen: list[np.ndarray] = []

    class Watcher:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            seen.append(observation["position"] if isinstance(observation, dict) else observation)
            return np.ones((len(observation), 2), np.float32), None

    with Worlds("reacher", model=load_pretrained_model(reacher), max_episode_steps=20) as worlds:
        windows = Windows(worlds, 2)
        real = {s.name: np.zeros((2, s.dim), np.float32) for s in REACHER.sensors}
        real["position"][:, 0] = 46.0, -46.0
        windows.under_policy(Moment(0, Watcher(), None), worlds.start_features[:2], 8, None, real)
    angles = np.stack(seen)[..., 0]
    assert (np.abs(angles[0] - [46.0, -46.0]) <= math.pi + 1e-4).all()
    assert (np.abs(np.diff(angles, axis=0)) <= math.pi).all()


def test_training_writes_angles_as_codes_unless_it_goes_on_from_a_model_that_does_not(tmp_path):
    """New models do; a model that reads plain angles goes on reading them."""
    sizes: Any = {"memory_dim": 8, "stochastic_dim": 4, "hidden_size": 8, "encoder_size": 8, "decoder_size": 8}
    new = TrainingRun((), out=tmp_path / "new", **sizes).model_config(REACHER)
    assert new.sensors == REACHER.sensors
    plain = replace(new, sensors=tuple(replace(sensor, rotations=()) for sensor in new.sensors))
    save_model(WorldModel(plain), tmp_path / "plain")
    more = TrainingRun((), out=tmp_path / "more", pretrained=str(tmp_path / "plain"), **sizes)
    assert more.model_config(REACHER).sensors == plain.sensors
    assert more.load_base(more.model_config(REACHER)) is not None


def test_a_spinning_body_is_learnt_better(tmp_path):
    """The same updates on the same data; the error is that of the direction, five steps ahead."""
    rng = np.random.default_rng(0)
    time, episodes = np.arange(60) * 0.4, []
    for _ in range(24):
        angle = rng.uniform(-math.pi, math.pi) + rng.uniform(0.6, 1.4) * rng.choice([-1, 1]) * time
        seen = {"angle": angle[:, None].astype(np.float32), "speed": np.gradient(angle)[:, None].astype(np.float32)}
        episodes.append(seen | {"pre_action": np.zeros((60, 2), np.float32)})
    train, held = TrajectoryDataset(episodes[:20]), TrajectoryDataset(episodes[20:])

    def error(rotations: tuple[int, ...]) -> float:
        sensors = (Sensor("angle", 1, rotations=rotations), Sensor("speed", 1, "second"))
        settings: dict[str, Any] = {"embodiment": "top", "sensors": sensors, "episode_steps": 60, "use_reward": False}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = WorldModel(replace(build().config, probes={}, kl_scale=0.1, free_nats=0.0, **settings))
            model.set_standardisation(*map(to_tensors, train.statistics(model.normaliser, model.config.codes)))
            optimiser, draw = torch.optim.Adam(model.parameters(), 4e-3), np.random.default_rng(1)
            for _ in range(60):
                loss, _ = model.loss(to_tensors(train.sample_windows(16, 12, draw)))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        windows = to_tensors(held.sample_windows(64, 15, np.random.default_rng(2)))
        with torch.no_grad():
            features, _ = model.observe(
                {n: windows[n][:10] for n in model.observed}, windows["pre_action"][:10], sample=False
            )
            future = model.imagine(features[-1], windows["pre_action"][10:], sample=False).observations["angle"]
        return float((1 - (future - windows["angle"][10:]).cos()).mean())

    assert error((0,)) < 0.5 * error(())
