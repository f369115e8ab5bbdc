"""Models of AIME-v2 and AIME-NoB: read strictly, the same numbers as the originals', and at work everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml

import aime_gym
from aime_gym.errors import AimeGymError
from aime_gym.world_model.checkpoint import load_config, load_pretrained_model, save_model
from aime_gym.world_model.fast_dynamics import FastDynamics
from aime_gym.world_model.layers import ResNetDecoder, ResNetEncoder
from aime_gym.world_model.objective import Normal, OneHot, UnscaledNormal
from benchmarks.parity import compare

FOLDERS = Path(__file__).parent / "parity_v2"
FIXTURES = sorted(path.parent for path in FOLDERS.glob("*/config.yaml"))
STATES = "cheetah-lpomdp-rssmo"  # of tabular sensors, with reward, probes and early ends
DISCRETE = "walker-visual-rssmo-discrete"
LIKELIHOOD = "walker-run-viper"


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_all_numbers_and_gradients_are_those_of_the_originals(folder):
    comparisons = compare(folder)
    assert sum("grad_norm" in comparison.key or "_grad_" in comparison.key for comparison in comparisons) > 6
    assert [str(c) for c in comparisons if not c.good] == []


def variant(folder: Path, base: str, change: Any = None, weights: Any = None) -> Path:
    """A copy of a fixture's model with another config, or other weights."""
    folder.mkdir()
    config = yaml.safe_load((FOLDERS / base / "config.yaml").read_text())
    state = torch.load(FOLDERS / base / "model.pt", weights_only=True)
    for edit, of in ((change, config), (weights, state)):
        if edit is not None:
            edit(of)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    torch.save(state, folder / "model.pt")
    return folder


REFUSED: dict[str, tuple[str, Any, Any, str]] = {
    "another version": (STATES, lambda c: c["version"].update(version=3.0), None, "AIME-v2"),
    "no version number": (STATES, lambda c: c.update(version={}), None, "AIME-v2"),
    "the other cell": (STATES, lambda c: c["world_model"].update(name="rssm"), None, "rssmo"),
    "an unknown key": (STATES, lambda c: c["world_model"].update(symlog=True), None, "symlog"),
    "an unknown key of a net": (
        STATES,
        lambda c: c["world_model"]["decoders"]["binary"].update(bias=False),
        None,
        "bias",
    ),
    "a momentum encoder": (STATES, lambda c: c["world_model"].update(predict_emb=True), None, "predict_emb"),
    "residual blocks": (
        STATES,
        lambda c: c["world_model"]["encoders"]["visual"].update(blocks=2),
        None,
        "blocks",
    ),
    "another norm": (STATES, lambda c: c["world_model"].update(norm="bn"), None, "norm"),
    "small images": (DISCRETE, lambda c: c["env"].update(size=[32, 32]), None, "size"),
    "two sizes for classes": (DISCRETE, lambda c: c["world_model"].update(state_dim=[24, 20]), None, "three"),
    "three sizes for normals": (STATES, lambda c: c["world_model"].update(state_dim=[24, 3, 2]), None, "two"),
    "another latent": (STATES, lambda c: c["world_model"].update(state_distribution="beta"), None, "beta"),
    "an ensemble of another kind": (
        STATES,
        lambda c: c["world_model"].update(intrinsic_reward_config={"algo": "rnd"}),
        None,
        "rnd",
    ),
    "no end": (STATES, None, lambda w: [w.pop(n) for n in [*w] if "is_terminal" in n], "is_terminal"),
    "an end too many": (STATES, lambda c: c.update(use_terminal=False), None, "is_terminal"),
    "probes too many": (STATES, lambda c: c.update(use_probe=False), None, "probes"),
    "no baseline": (STATES, None, lambda w: [w.pop(n) for n in [*w] if "baseline" in n], "baseline_probes"),
    "a reward too many": (STATES, lambda c: c.update(use_reward=False), None, "reward"),
    "two rewards": (
        "walker-run-online-viper",
        None,
        lambda w: w.update({"decoders.reward.net.net.0.bias": torch.zeros(12)}),
        "decoders.reward",
    ),
    "actions in a likelihood model": (LIKELIHOOD, lambda c: c.update(action_free=False), None, "shape"),
    "the first one's memory": (
        STATES,
        None,
        lambda w: w.update({"memory_cell.weight_hh": w.pop("memory_cell.norm.weight")}),
        "memory_cell",
    ),
    "a size": (STATES, None, lambda w: w.update({"memory_cell.norm.bias": torch.zeros(73)}), "memory_cell.norm.bias"),
    "no number": (STATES, None, lambda w: w["memory_cell.norm.bias"].fill_(torch.nan), "finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(tmp_path, name):
    base, change, weights, told = REFUSED[name]
    with pytest.raises(AimeGymError, match=told):
        load_pretrained_model(variant(tmp_path / "model", base, change, weights))


def test_what_a_config_leaves_out_is_by_default_or_as_the_weights_say(tmp_path):
    def drop(config: dict[str, Any]) -> None:
        for key in ("use_terminal", "use_probe", "action_free"):
            config.pop(key, None)

    model = load_pretrained_model(variant(tmp_path / "probed", STATES, drop))
    assert model.config.outputs == ("position", "reward", "is_terminal")
    assert list(model.baseline_probes) == list(model.probes) == ["velocity"]
    without = variant(tmp_path / "bare", STATES, drop, lambda w: [w.pop(n) for n in [*w] if "probes" in n])
    assert not load_pretrained_model(without).probes
    assert load_config(FOLDERS / "hopper-stand-online-ail").outputs == ("image", "ail_reward", "is_terminal")
    sawyer = load_config(FOLDERS / "metaworld-visual-rssmo-m")
    assert (sawyer.action_dim, sawyer.dims["state"], sawyer.body.episode_steps) == (4, 39, 100)


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_a_model_that_is_saved_anew_is_the_same(folder, tmp_path):
    model = load_pretrained_model(folder)
    save_model(model, tmp_path / "model")
    again = load_pretrained_model(tmp_path / "model")
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def random_frames(model: Any, steps: int, size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    dims = {name: (3, 64, 64) if name == "image" else (model.config.dims[name],) for name in model.observed}
    return {name: torch.rand(steps, size, *dim, generator=generator) for name, dim in dims.items()}


@pytest.mark.parametrize("name", [STATES, DISCRETE])
def test_unrolling_is_a_loop_of_steps_and_episodes_begin_at_zeros(name):
    model = load_pretrained_model(FOLDERS / name)
    seen, actions = random_frames(model, 5, 3), 2 * torch.rand(5, 3, model.config.action_dim) - 1
    begins = torch.zeros(5, 3, 1)
    begins[2, 1] = 1.0
    noise = model.draw_noise(5, 3, True, torch.Generator().manual_seed(1))
    assert noise is not None
    features, _ = model.observe(
        seen | {"is_first": begins[..., 0]}, actions, generator=torch.Generator().manual_seed(1)
    )
    dreams = model.imagine(features[0], actions, generator=torch.Generator().manual_seed(1), names=()).features
    state, dream, embeddings = model.initial_state(3), features[0], model.encode(seen)
    for t in range(5):
        state = model.posterior_step(state * (1 - begins[t]), actions[t], embeddings[t], noise[t])
        dream = model.prior_step(dream, actions[t], noise[t])
        torch.testing.assert_close(features[t], state)
        torch.testing.assert_close(dreams[t], dream)


def test_steps_after_an_end_do_not_count_and_outputs_can_be_masked():
    model = load_pretrained_model(FOLDERS / STATES).requires_grad_(True)
    inputs = {name: torch.as_tensor(value) for name, value in np.load(FOLDERS / STATES / "inputs.npz").items()}
    over = inputs["is_terminal"][:, 1, 0].cumsum(0) > 1
    assert over.any()
    bound = model.evidence(inputs, inputs["pre_action"], sample=False)
    assert not bound.per_step[over, 1].any()
    assert bound.per_step[~over, 1].all()
    assert bound.per_step[:, [0, 2]].all()

    def gradient(**more: torch.Tensor) -> float:
        loss = model.loss(inputs | more, sample=False)[0]
        return float(torch.autograd.grad(loss, [*model.decoders["reward"].parameters()])[0].abs().sum())

    assert gradient() > 0
    assert gradient(reward_mask=torch.zeros_like(inputs["reward"])) == 0


@pytest.mark.parametrize("name", [STATES, DISCRETE])
@pytest.mark.parametrize("grad", [False, True])
def test_the_fast_dynamics_are_the_model(name, grad):
    model = load_pretrained_model(FOLDERS / name)
    tabular = model.observed if name == STATES else ()
    fast = FastDynamics(model, tabular, None, batch=3, doubt=name == STATES)
    state = model.observe(random_frames(model, 4, 3), torch.zeros(4, 3, model.config.action_dim))[0][-1]
    actions, noise = torch.rand(3, model.config.action_dim), torch.randn(3, model.config.stochastic_dim)
    with torch.set_grad_enabled(grad):
        following, means, _, doubt = fast.step(state, actions.requires_grad_(grad), noise)
    expected = model.prior_step(state, actions, noise)
    torch.testing.assert_close(following, expected, atol=1e-5, rtol=1e-5)
    logit = model.termination(expected)  # type: ignore[misc]
    decoded = [*model.decode(expected, tabular).values(), logit]
    decoded += [model.decode(expected, ["reward"])["reward"]] if model.config.use_reward else []
    torch.testing.assert_close(means, torch.cat(decoded, -1), atol=1e-5, rtol=1e-4)
    if doubt is not None:
        torch.testing.assert_close(doubt, model.doubt(expected), atol=1e-4, rtol=1e-3)
    if grad:
        assert torch.autograd.grad(following.sum(), actions)[0].abs().sum() > 0


def test_classes_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([[[2.0, 0.0, -1.0], [0.0, 0.0, 3.0]]])
    noise = torch.randn(40_000, 6, generator=torch.Generator().manual_seed(0))
    drawn = OneHot(logits.expand(40_000, 2, 3)).sample(noise).unflatten(-1, (2, 3))
    assert drawn.sum(-1).eq(1).all()
    torch.testing.assert_close(drawn.mean(0), logits[0].softmax(-1), atol=0.01, rtol=0)
    likeliest = OneHot(logits.requires_grad_()).sample(None)
    assert likeliest.tolist() == [[1, 0, 0, 0, 0, 1]]
    weights = torch.arange(6.0)
    (straight,) = torch.autograd.grad((likeliest * weights).sum(), logits, retain_graph=True)
    (soft,) = torch.autograd.grad((logits.softmax(-1).flatten() * weights).sum(), logits)
    torch.testing.assert_close(straight, soft)
    assert OneHot(logits).kl(OneHot(logits)).abs().max() < 1e-6
    extreme = OneHot(torch.tensor([[[200.0, -200.0]]])), OneHot(torch.tensor([[[-200.0, 200.0]]]))
    assert extreme[0].kl(extreme[1]).isfinite().all()


def test_log_densities_lack_the_constant_alone():
    mean, std, value = torch.randn(3, 4), torch.rand(3, 4) + 0.1, torch.randn(3, 4)
    ours = UnscaledNormal(mean, std).log_prob(value) - Normal(mean, std).log_prob(value)
    torch.testing.assert_close(ours, torch.full((3, 4), 0.5 * float(np.log(2 * np.pi))))


def test_the_quick_upsampling_of_the_resnet_is_a_transposed_convolution():
    decoder, images = ResNetDecoder(7, 2), torch.rand(2, 3, 64, 64)
    assert ResNetEncoder(2)(images).shape == (2, 256)
    plain = torch.nn.Sequential(*decoder.net)
    for index, layer in enumerate(plain):
        if isinstance(layer, torch.nn.ConvTranspose2d):
            copy = torch.nn.ConvTranspose2d(layer.in_channels, layer.out_channels, 4, stride=2, padding=1)
            copy.load_state_dict(layer.state_dict())
            plain[index] = copy
    features = torch.randn(2, 7)
    torch.testing.assert_close(decoder.mean(features), plain(features) + 0.5, atol=1e-5, rtol=1e-5)


def start_of(model: Any, size: int) -> dict[str, Any]:
    rng, frames = np.random.default_rng(0), {}
    for name in model.observed:
        if name == "image":
            frames[name] = rng.integers(0, 256, (3, size, 64, 64, 3), np.uint8)
        else:
            frames[name] = rng.normal(size=(3, size, model.config.dims[name])).astype(np.float32)
    actions = rng.uniform(-1, 1, (3, size, model.config.action_dim)).astype(np.float32)
    return {"observations": frames, "actions": actions}


@pytest.mark.parametrize("folder", [f for f in FIXTURES if f.name != LIKELIHOOD], ids=lambda folder: folder.name)
def test_all_world_models_can_be_dreamt_in(folder):
    model = load_pretrained_model(folder)
    reward = "task" if model.config.use_reward else "none"
    dreams = gym.make_vec("AimeDream-v0", num_envs=4, model=folder, reward=reward, doubt=True)
    shown, _ = dreams.reset(seed=0, options={"start": start_of(model, 4)})
    assert shown.dtype == (np.uint8 if "image" in model.observed else np.float32)
    dreams.action_space.seed(0)
    shown, rewards, terminated, _, info = dreams.step(dreams.action_space.sample())
    state = dreams.unwrapped.state.latents  # type: ignore[attr-defined]
    assert terminated.tolist() == (model.decode(state, ["is_terminal"])["is_terminal"][:, 0] > 0.5).tolist()
    assert rewards.any() == model.config.use_reward
    assert (info["doubt"] > 0).all()
    dreams.close()


def test_a_model_without_a_reward_says_how_to_dream_in_it():
    folder = FOLDERS / "hopper-mdp-rssmo-plan2explore"
    with pytest.raises(AimeGymError, match=r"reward='none'"):
        gym.make("AimeDream-v0", model=folder)
    dreams = gym.make_vec("AimeDream-v0", num_envs=2, model=folder, reward_fn=lambda before, action, after: after[:, 0])
    dreams.reset(seed=0, options={"start": start_of(load_pretrained_model(folder), 2)})
    shown, rewards, *_ = dreams.step(np.zeros((2, 4), np.float32))
    np.testing.assert_allclose(rewards, shown[:, 0])


def test_a_likelihood_model_scores_and_is_refused_as_a_world():
    model = load_pretrained_model(FOLDERS / LIKELIHOOD)
    seen = random_frames(model, 4, 2)
    assert model.evidence(seen, torch.zeros(4, 2, 0)).elbo.shape == (2,)
    with pytest.raises(AimeGymError, match="likelihood model"):
        gym.make("AimeDream-v0", model=FOLDERS / LIKELIHOOD, reward="none")
    with pytest.raises(AimeGymError, match="likelihood model"):
        aime_gym.AIME(model)


def test_a_model_of_more_or_fewer_control_steps_is_not_compared_with_the_real_env(tmp_path):
    def slow(config: dict[str, Any]) -> None:
        config["env"]["action_repeat"] = 4

    folder = variant(tmp_path / "model", STATES, slow)
    assert load_config(folder).body.episode_steps == 250
    shutil.copy(FOLDERS / STATES / "inputs.npz", folder)
    with pytest.raises(AimeGymError, match="control steps"):
        aime_gym.compare("random", "cheetah", model=folder, episodes=1)
