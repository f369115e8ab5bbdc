"""Actions that are chosen: the env's own space outside, a vector of 0 and 1 inside models and data."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import make_proba_distribution

import aime_gym
from aime_gym.agents.numpy_policies import NoisyPolicy, PlainMLP, load_plain, save_plain
from aime_gym.agents.plain import is_plain
from aime_gym.agents.sb3 import load_agent, save_sb3_agent
from aime_gym.agents.shac import straight_through
from aime_gym.agents.strangers import learn_stranger
from aime_gym.bodies.body import Choices
from aime_gym.bodies.lookup import from_own_actions, get_embodiment, to_own_action
from aime_gym.commands.collect import Collect
from aime_gym.commands.data_sets import ToMinari
from aime_gym.commands.dream import Dream
from aime_gym.commands.play import Game, keys_to_action
from aime_gym.commands.pretrain import PretrainSmall
from aime_gym.commands.score import Score
from aime_gym.commands.strangers import Strangers
from aime_gym.commands.train import Train
from aime_gym.data.minari_sets import read_minari
from aime_gym.data.trajectories import load_trajectory, read_metadata, trajectory_paths
from aime_gym.envs.dream_vector import DreamVectorEnv
from aime_gym.errors import AimeGymError
from aime_gym.evaluation.both_worlds import BothWorlds, replay
from aime_gym.evaluation.explain import explain
from aime_gym.evaluation.measure_trust import measure_trust
from aime_gym.evaluation.strangers import StrangerSet
from aime_gym.evaluation.worlds import Worlds
from aime_gym.flags import HeadsOptions, TrainOptions
from aime_gym.world_model.checkpoint import load_config, load_pretrained_model
from aime_gym.world_model.config import ModelConfig
from aime_gym.world_model.config_file import config_from_yaml, config_to_yaml
from aime_gym.world_model.model import WorldModel
from tests.tiny_model import make_tiny_model

SPACES = {
    "Choice": spaces.Discrete(3),
    "Later": spaces.Discrete(3, start=2),
    "Several": spaces.MultiDiscrete([2, 3]),
    "Table": spaces.MultiDiscrete([[2, 3], [4, 1]], start=[[0, -1], [5, 0]]),
    "Switches": spaces.MultiBinary(3),
}
TINY = {
    **{"memory_dim": 16, "stochastic_dim": 4, "hidden_size": 16, "encoder_size": 16, "decoder_size": 16},
    **{"batch_size": 8, "horizon": 10, "evaluation_windows": 4, "held_out": 0.3, "tensorboard": False, "threads": 1},
    **{
        "updates": 2,
        "heads": HeadsOptions(updates=2, batch_size=4, hidden_size=16, ensemble=1, ensemble_hidden_size=8),
    },
}


class Chooser(gym.Env):
    """Shows the sum of what was chosen so far, and strictly refuses what is no action of its space."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,))

    def __init__(self, kind):
        self.action_space = SPACES[kind]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.total = self.np_random.uniform()
        return np.full(1, self.total, np.float32), {}

    def step(self, action):
        assert action in self.action_space
        self.total += float(np.sum(action))
        return np.full(1, self.total, np.float32), self.total, self.total > 500, False, {}


@pytest.fixture(scope="module", autouse=True)
def envs():
    before = dict(gym.registry)
    for kind in SPACES:
        gym.register(f"{kind}-v3", entry_point=Chooser, kwargs={"kind": kind}, max_episode_steps=30)
    yield
    gym.registry.clear()
    gym.registry.update(before)


@pytest.fixture(scope="module", params=SPACES)
def made(request, tmp_path_factory, envs):
    """The name of an env, and a tiny model of it."""
    name = f"{request.param}-v3"
    return name, make_tiny_model(tmp_path_factory.mktemp("models") / request.param, name)


@st.composite
def any_choices(draw):
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    kinds = [
        spaces.Discrete(counts[0], start=draw(st.integers(-9, 9))),
        spaces.MultiDiscrete(counts),
        spaces.MultiDiscrete([counts, counts], start=np.full((2, len(counts)), draw(st.integers(-9, 9)))),
        spaces.MultiBinary(len(counts)),
        spaces.MultiBinary([2, len(counts)]),
    ]
    return draw(st.sampled_from(kinds))


@settings(max_examples=60, deadline=None)
@given(any_choices(), st.integers(0, 2**31))
def test_vectors_are_those_that_gymnasium_flattens_to(space, seed):
    choices, rng = Choices.of(space), np.random.default_rng(seed)
    assert Choices.of(choices.space) == choices
    drawn = np.stack([choices.draw(rng) for _ in range(5)])
    assert all(one in choices.space for one in drawn)
    vectors = choices.encode(drawn)
    np.testing.assert_array_equal(choices.decode(vectors), drawn)
    own = [to_own_action(vector, space) for vector in vectors]
    assert all(one in space for one in own)
    np.testing.assert_array_equal(vectors, np.stack([spaces.flatten(space, one) for one in own]))
    np.testing.assert_array_equal(from_own_actions(np.stack(own), space), vectors)
    stray = choices.stray(drawn[0], 1.0, rng)
    several = np.array(choices.counts).reshape(choices.shape) > 1
    np.testing.assert_array_equal(stray != drawn[0], several)
    assert choices.stray(drawn[0], 0.0, rng).tolist() == drawn[0].tolist()


@pytest.mark.parametrize("values", [3, -1, 1.5, np.nan, [[0, 1], [7, 0]], "two", None])
def test_what_is_no_element_is_refused(values):
    with pytest.raises(AimeGymError, match=r"Expected elements of Discrete\(3\)"):
        Choices.of(SPACES["Choice"]).encode(values)


def test_noise_takes_other_choices_as_often_as_asked_for():
    policy = NoisyPolicy(lambda: None, 0.3)
    policy.policy.predict = lambda *_: (np.full(2000, 1), None)
    policy.policy.action_space = SPACES["Choice"]
    policy.begin(range(2000))
    actions, _ = policy.predict(np.zeros((2000, 1)))
    assert 0.25 < (actions != 1).mean() < 0.35
    assert set(actions) == {0, 1, 2}


def test_dreams_have_the_actions_of_the_world(made):
    name, model = made
    world, dream = gym.make("AimeReal-v0", embodiment=name), gym.make("AimeDream-v0", model=model)
    own = SPACES[name.removesuffix("-v3")]
    assert world.action_space == dream.action_space
    assert (dream.action_space == own) == (name not in ("Later-v3", "Table-v3"))  # which become those from 0 on
    own = dream.action_space
    check_env(dream.unwrapped, skip_render_check=True)
    check_env(world.unwrapped, skip_render_check=True)
    many = gym.make_vec("AimeDream-v0", num_envs=3, model=model)
    many.reset(seed=0)
    dream.reset(seed=0)
    actions = np.stack([own.sample() for _ in range(3)])
    np.testing.assert_allclose(many.step(actions)[0][0], dream.step(actions[0])[0], atol=1e-5)
    wrong = np.array(actions)
    wrong[1] = 99
    with pytest.raises(AimeGymError, match="Slot 1 is the first"):
        many.step(wrong)
    for odd in (np.nan, 0.5):
        wrong = np.array(actions, float)
        wrong[2] = odd
        with pytest.raises(AimeGymError, match=rf"(?s)got \[.*{odd}.* Slot 2 is the first"):
            many.step(wrong)
    for words in (np.full(actions.shape, "1"), np.full(actions.shape, None)):
        with pytest.raises(AimeGymError, match=r"Expected elements of .*whole numbers"):
            many.step(words)
    with pytest.raises(AimeGymError, match="shape"):
        many.step(actions[:2])
    tensors = aime_gym.TensorDream(model, num_envs=3)
    state = tensors.step(tensors.reset(0), torch.from_numpy(tensors.embodiment.choices.encode(actions)))[0]
    np.testing.assert_allclose(state.observations, many.reset(seed=0)[0] * 0 + state.observations.numpy())
    with pytest.raises(AimeGymError, match=r"choices\.encode"):
        tensors.step(state, torch.zeros(3, dtype=torch.int64))


def test_actions_that_led_to_own_frames_may_be_the_envs_own(made):
    name, model = made
    dream = DreamVectorEnv(model=model, num_envs=2)
    choices = get_embodiment(name).choices
    actions = np.stack([choices.draw(np.random.default_rng(seed)) for seed in range(3)])
    frames = np.zeros((4, 1), np.float32)
    own = dream.reset(seed=0, options={"start": {"observations": frames, "actions": actions}})[0]
    coded = {"observations": frames, "actions": choices.encode(actions)}
    np.testing.assert_array_equal(own, dream.reset(seed=0, options={"start": coded})[0])


def test_data_hold_vectors_and_what_they_led_to(made, tmp_path):
    name, _ = made
    Collect(name, trajectories=2, out=tmp_path / "data", workers=1).run()
    trajectory = load_trajectory(tmp_path / "data" / "0.npz")
    assert not trajectory["pre_action"][0].any()
    own = [np.sum(to_own_action(vector, SPACES[name[:-3]])) for vector in trajectory["pre_action"][1:]]
    np.testing.assert_allclose(np.diff(trajectory["observation"][:, 0]), own, atol=1e-3)


def test_agents_learn_in_dreams_and_act_in_both_worlds(made, tmp_path):
    name, model = made
    envs = aime_gym.make_sb3_env("AimeDream-v0", 4, model=model, seed=0)
    shac = aime_gym.SHAC("MlpPolicy", envs, seed=0).learn(64)
    agents = {"shac": shac}
    agents["ppo"] = PPO("MlpPolicy", envs, n_steps=8, batch_size=16, n_epochs=1, seed=0).learn(32)
    # stable-baselines3 2.9.2 acts from 0 on whatever a space's start is
    # (findings/sb3_acts_outside_spaces_with_a_start.sh), so dreams and AimeReal-v0 begin at 0, as `made`'s envs, which
    # refuse what is no element of theirs, would tell.
    if name == "Later-v3":
        agents["dqn"] = DQN("MlpPolicy", envs, learning_starts=8, seed=0).learn(64)
    shown = envs.reset()
    for kind, agent in agents.items():
        path = save_sb3_agent(agent, tmp_path / f"{kind}.zip")
        assert is_plain(path) == (kind != "dqn")
        again = load_agent(path)
        assert again.action_space == envs.action_space
        np.testing.assert_array_equal(*(one.predict(shown, deterministic=True)[0] for one in (agent, again)))
    compared = aime_gym.compare(
        {**agents, "random": "random", "zero": "zero"}, name, None, 2, model, max_episode_steps=10
    )
    assert len(compared.policies) == len(agents) + 2
    agents["shac"].action_space = spaces.Discrete(7)
    with pytest.raises(AimeGymError, match="action space Discrete"):
        aime_gym.compare(agents["shac"], name, model=model, episodes=1)


def test_callbacks_of_shac_see_elements(made):
    _, model = made
    seen = []

    class Watch(BaseCallback):
        def _on_step(self):
            seen.extend(self.locals["actions"])
            return True

    envs = aime_gym.make_sb3_env("AimeDream-v0", 4, model=model, seed=0)
    aime_gym.SHAC("MlpPolicy", envs, seed=0).learn(32, callback=Watch())
    space = envs.action_space
    assert len(seen) == 32
    assert all(np.asarray(one).astype(space.dtype)[()] in space for one in seen)


@pytest.mark.parametrize("kind", ["Choice", "Several", "Switches"])
def test_gradients_of_samples_are_those_of_probabilities(kind):
    choices, worth = Choices.of(SPACES[kind]), torch.randn(Choices.of(SPACES[kind]).dim)
    logits = torch.randn(6, choices.dim, requires_grad=True)
    vectors, entropies = straight_through(make_proba_distribution(SPACES[kind]).proba_distribution(logits))
    assert entropies.shape == (6,)
    np.testing.assert_allclose(choices.encode(choices.decode(vectors.detach().numpy())), vectors.detach(), atol=1e-6)
    parts = logits.split([1, 1, 1] if kind == "Switches" else list(choices.counts), -1)
    chances = [part.sigmoid() if kind == "Switches" else part.softmax(-1) for part in parts]
    (expected,) = torch.autograd.grad((torch.cat(chances, -1) @ worth).sum(), logits)
    (gradient,) = torch.autograd.grad((vectors @ worth).sum(), logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_both_worlds_are_played_replayed_and_explained(made):
    name, model = made
    with Worlds(name, model=model) as worlds:
        game = Game(BothWorlds(worlds, render_mode=None))
        game.reset(seed=0)
        keys = keys_to_action(get_embodiment(name).action_dim)
        for action in (np.zeros_like(keys["q",]), keys["q",]):
            assert np.isfinite(game.step(action)[1])
        acted = Game(BothWorlds(worlds, render_mode=None), "random")
        acted.reset(seed=0)
        acted.step(keys["q",])
        assert len(replay("random", worlds, dreams=2).real_rewards) > 1
    explained = explain(model, ["random"], episodes=2, max_episode_steps=10)
    assert np.isfinite(explained.policies[0].dream)


def test_a_wrapped_world_shows_latents_of_the_actions_that_were_chosen(made):
    name, model = made
    shown = aime_gym.LatentObservation(gym.make("AimeReal-v0", embodiment=name), load_pretrained_model(model))
    shown.reset(seed=0)
    first = [shown.step(shown.action_space.sample())[0] for _ in range(2)]
    assert np.isfinite(first).all()
    with pytest.raises(AimeGymError, match="needs actions in"):
        aime_gym.LatentObservation(gym.make("AimeReal-v0", embodiment="Pendulum-v1"), load_pretrained_model(model))


def test_training_knows_the_actions_and_files_tell_them(tmp_path):
    Collect("Several-v3", trajectories=4, out=tmp_path / "data", workers=1).run()
    Train((tmp_path / "data",), out=tmp_path / "model", **TINY).run()
    dream = gym.make("AimeDream-v0", model=tmp_path / "model")
    assert dream.action_space == SPACES["Several"]
    config = load_config(tmp_path / "model")
    assert config.body == get_embodiment("Several-v3")


@pytest.mark.parametrize("space", [*SPACES.values(), spaces.MultiBinary([30, 30]), spaces.MultiDiscrete([7] * 300)])
def test_configs_keep_choices(space, tmp_path):
    choices = Choices.of(space)
    config = ModelConfig.for_embodiment(get_embodiment("Choice-v3"), "mdp", choices=choices, action_dim=choices.dim)
    config_to_yaml(config, tmp_path / "config.yaml")
    assert config_from_yaml(tmp_path / "config.yaml").choices == choices


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("{kind: discrete, numbers: [1], options: [4]}", "are 3 numbers"),
        ("{kind: dice, numbers: [1], options: [3]}", "Unknown env.choices.kind"),
        ("{kind: discrete, numbers: [2], options: [3]}", "Expected choices"),
        ("{kind: discrete, numbers: [1, 1], options: [3]}", "as many numbers as options"),
        ("{kind: multi_discrete, numbers: [9999999999], options: [3]}", "integers of at least 1"),
        ("{kind: multi_discrete, numbers: [999999], options: [3]}", "at most 10000 in all"),
        ("{kind: multi_discrete, numbers: [3], options: [999999]}", "1 to 10000 options"),
        ("{kind: multi_discrete, numbers: [], options: []}", "Expected choices"),
        ("{kind: multi_binary, numbers: [3], options: [3]}", "Expected choices"),
        ("{kind: discrete, numbers: [1], options: [3], code: x}", "Unknown key"),
        ("[3]", "expected keys and values"),
    ],
)
def test_choices_of_a_file_are_checked(told, message, tmp_path):
    path = tmp_path / "config.yaml"
    config_to_yaml(ModelConfig.for_embodiment(get_embodiment("Choice-v3"), "mdp"), path)
    lines = path.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.strip() == "choices:")
    end = next(i for i, line in enumerate(lines) if line.strip() == "sensors:")
    path.write_text("\n".join([*lines[:begin], f"  choices: {told}", *lines[end:]]))
    with pytest.raises(AimeGymError, match=message):
        config_from_yaml(path)


def test_ppo_collects_its_training_and_goes_on(tmp_path):
    out = tmp_path / "buffer"
    for number in (2, 4):
        Collect("Choice-v3", policy="ppo", trajectories=number, expert=0, out=out, workers=1).run()
    steps = sum(len(load_trajectory(path)["reward"]) - 1 for path in trajectory_paths(out))
    assert steps >= 4 * 30
    assert read_metadata(out)["policy"] == "ppo"
    expert = tmp_path / "expert"
    agent = str(out / "latest.zip")
    Collect("Choice-v3", policy=agent, trajectories=2, noise=0.5, out=expert, workers=1).run()
    assert len(trajectory_paths(expert)) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"embodiment": "Choice-v3", "policy": "sac"}, "--policy ppo learns it"),
        ({"embodiment": "Pendulum-v1", "policy": "ppo"}, "--policy sac learns it"),
        ({"embodiment": "Choice-v3", "noise": 1.5}, "a probability"),
    ],
)
def test_what_cannot_collect_is_refused_before_a_step(flags, message, tmp_path):
    with pytest.raises(AimeGymError, match=message):
        Collect(out=tmp_path / "data", workers=1, **flags).run()
    assert not (tmp_path / "data").exists()


def test_what_needs_numbers_says_what_does_not(made, tmp_path):
    name, model = made
    with pytest.raises(AimeGymError, match="SHAC, PPO and DQN"):
        aime_gym.BC(load_pretrained_model(model))
    with pytest.raises(AimeGymError, match="explain"):
        Score(str(model), embodiment=name, out=tmp_path / "score").run()
    assert not (tmp_path / "score").exists()


def test_choices_survive_minari(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    Collect("Several-v3", trajectories=2, out=tmp_path / "data", workers=1).run()
    ToMinari(tmp_path / "data", "several-v0").run()
    episode = next(iter(minari.load_dataset("several-v0").iterate_episodes()))
    assert all(action in SPACES["Several"] for action in episode.actions)
    body, again = read_minari("minari:several-v0")
    assert body.choices == get_embodiment("Several-v3").choices
    np.testing.assert_array_equal(again[0]["pre_action"], load_trajectory(tmp_path / "data" / "0.npz")["pre_action"])


def test_sensors_of_a_file_that_are_choices_have_their_numbers(tmp_path):
    body = get_embodiment("FrozenLake-v1")
    path = tmp_path / "config.yaml"
    config_to_yaml(ModelConfig.for_embodiment(body, "mdp"), path)
    assert config_from_yaml(path).body == body
    path.write_text(path.read_text().replace("dim: 16", "dim: 15"))
    with pytest.raises(AimeGymError, match=r"observation has 15 numbers.*16 of Discrete\(16\)"):
        config_from_yaml(path)


@pytest.mark.parametrize("family", ["rhythm", "dqn", "trpo", "ars"])
def test_strangers_learn_to_choose_and_are_plain_files(family, tmp_path):
    if family in ("trpo", "ars"):
        pytest.importorskip("sb3_contrib")
    steps = {"rhythm": 60, "dqn": 1300, "trpo": 2048, "ars": 400}[family]
    ((taken, policy),) = learn_stranger(family, "Choice-v3", "own", 0, (1.0,), steps)
    assert taken >= steps
    path = save_plain(policy, tmp_path / "policy.safetensors")
    again, shown = load_plain(path), np.linspace(-9, 99, 50, dtype=np.float32)[:, None]
    assert again.action_space == SPACES["Choice"]
    np.testing.assert_array_equal(again.predict(shown)[0], policy.predict(shown)[0])
    Collect("Choice-v3", policy=str(path), kin=True, trajectories=1, out=tmp_path / "data", workers=1).run()
    with pytest.raises(AimeGymError, match=r"gives Discrete\(3\); the body takes MultiDiscrete"):
        Collect("Several-v3", policy=str(path), kin=True, out=tmp_path / "other", workers=1).run()


@pytest.mark.parametrize("kind", ["Several", "Switches"])
def test_a_plain_network_chooses_what_has_the_most(kind, tmp_path):
    choices, rng = Choices.of(SPACES[kind]), np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, choices.dim)).astype("f4"), rng.normal(size=choices.dim).astype("f4")
    policy = PlainMLP((weight,), (bias,), np.zeros(2, "f4"), np.ones(2, "f4"), choices=choices)
    shown = rng.normal(size=(40, 2)).astype("f4")
    chosen = load_plain(save_plain(policy, tmp_path / "policy.safetensors")).predict(shown)[0]
    numbers = shown @ weight + bias
    if kind == "Switches":
        np.testing.assert_array_equal(chosen, numbers > 0)
    else:
        np.testing.assert_array_equal(chosen, np.stack([numbers[:, :2].argmax(1), numbers[:, 2:].argmax(1)], 1))
    wrong = PlainMLP((weight[:, 1:],), (bias[1:],), np.zeros(2, "f4"), np.ones(2, "f4"), choices=choices)
    with pytest.raises(AimeGymError, match="no plain policy"):
        load_plain(save_plain(wrong, tmp_path / "wrong.safetensors"))


@pytest.mark.parametrize(
    ("body", "family", "message"),
    [("Several-v3", "dqn", "dqn learns no MultiDiscrete"), ("Pendulum-v1", "trpo", "trpo learns no Box")],
)
def test_families_that_cannot_learn_a_body_are_refused(body, family, message, tmp_path):
    with pytest.raises(AimeGymError, match=message):
        Strangers(body, families=(family,), out=tmp_path / "set").run()
    assert not (tmp_path / "set").exists()


def test_what_strangers_earn_is_dreamt(made, tmp_path):
    """Both worlds' returns and the judgement over a set of strangers."""
    name, model = made
    Strangers(name, families=("rhythm",), seeds=1, stages=(0.5, 1.0), effort=0.003, episodes=2, out=tmp_path).run()
    measured = measure_trust(load_pretrained_model(model), StrangerSet.load(tmp_path), episodes=2)
    assert len(measured.comparison.policies) == 2


@pytest.mark.slow
def test_pretrain_makes_a_model_of_choices_and_an_agent_learns_in_it(tmp_path):
    trains = {key: value for key, value in TINY.items() if key not in ("horizon", "held_out")}
    PretrainSmall(
        "Choice-v3",
        **{"out": tmp_path / "model", "work": tmp_path / "work", "random": 4, "buffer": 4, "expert": 2},
        **{
            "random_steps": 0,
            "rounds": 1,
            "workers": 1,
            "steps": 2,
            "trajectories": 2,
            "slots": 4,
            "horizon": 16,
            "noise": (0.3,),
        },
        **{"episodes": 2, "round_updates": 2, "round_head_updates": 2, "explorers": 0},
        train=TrainOptions(horizon=6, held_out=0.5, **trains),
    ).run()
    assert read_metadata(tmp_path / "work" / "datasets" / "own-buffer")["policy"] == "ppo"
    Dream(
        **{"model": str(tmp_path / "model"), "embodiment": "Choice-v3", "out": tmp_path / "run", "steps": 512},
        **{"slots": 8, "horizon": 16, "trials": 1, "episodes": 2, "video_steps": 0},
    ).run()
    assert (tmp_path / "run" / "report.html").exists()
    assert load_agent(tmp_path / "run" / "agent.zip").action_space == SPACES["Choice"]
    for algo, message in (("sac", "SAC takes no Discrete"), ("td3", "TD3 takes no Discrete")):
        with pytest.raises(AimeGymError, match=message):
            Dream(model=str(tmp_path / "model"), algo=algo, out=tmp_path / algo).run()


def test_an_env_of_binaries_in_a_row_takes_those_of_a_model():
    """Gymnasium 1.4.0 calls `MultiBinary(3)` and `MultiBinary((3,))` different; see findings/."""
    body = get_embodiment("Switches-v3")
    model = WorldModel(ModelConfig.for_embodiment(body, "mdp", memory_dim=16, stochastic_dim=4, hidden_size=16))

    class Row(Chooser):
        def __init__(self):
            super().__init__("Switches")
            self.action_space = spaces.MultiBinary((3,))

    shown = []
    for env in (Row(), Chooser("Switches")):
        seen = aime_gym.LatentObservation(env, model)
        shown.append([seen.reset(seed=0)[0], seen.step(np.array([1, 0, 1], np.int8))[0]])
    np.testing.assert_array_equal(*shown)
    table = Chooser("Switches")
    for other in (spaces.MultiBinary(4), spaces.MultiBinary((3, 1)), spaces.MultiDiscrete([2, 2, 2])):
        table.action_space = other
        with pytest.raises(AimeGymError, match=r"needs actions in MultiBinary\(3\)"):
            aime_gym.LatentObservation(table, model)
