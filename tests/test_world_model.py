"""The world model against the original implementation, hand-written loops, and its own promises."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aime_gym.agents.aime import imitation_loss
from aime_gym.bodies.body import EMBODIMENTS, SETUPS
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.errors import AimeGymError
from aime_gym.training.train import renew_standardisation
from aime_gym.world_model import cells
from aime_gym.world_model.checkpoint import load_policy, load_pretrained_model
from aime_gym.world_model.config import ModelConfig, NetConfig, policy_config
from aime_gym.world_model.config_file import config_from_yaml, config_to_yaml
from aime_gym.world_model.fast_dynamics import ImageBytes
from aime_gym.world_model.layers import (
    MLP,
    ConstantStdDecoder,
    Normal,
    NormedGRU,
    StdDecoder,
    TanhGaussianPolicy,
    TanhNormal,
    Upsampling,
)
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.recurrence import Loop, LoopedMLP, layers_of
from benchmarks.update_speed import our_loss, random_batch, step_by_step_loss
from tests.random_models import random_model

FIXTURES = sorted(path.parent for path in (Path(__file__).parent / "parity").glob("*/config.yaml"))
SMALL: dict[str, Any] = {
    "memory_dim": 12,
    "stochastic_dim": 4,
    "hidden_size": 8,
    "encoders": {"tabular": NetConfig("mlp", 8, 2, have_head=False), "visual": NetConfig("cnn_ha", width=2)},
    "decoders": {"tabular": NetConfig("smlp", 6), "visual": NetConfig("cnn_ha", width=2)},
    "probes": {"tabular": NetConfig("ssmlp", 6, 1, "leakyrelu", "ln")},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "rssm": {"cell": "rssm"},
    "rssm with norms": {"cell": "rssm", "norm": "ln", "hidden_layers": 1},
    "rssm without hidden layers": {"cell": "rssm", "hidden_layers": 0},
    "rssm, identity": {"cell": "rssm", "encoders": {"tabular": NetConfig("identity")}},
    "rssmo": {"cell": "rssmo"},
    "rssmo without norms": {"cell": "rssmo", "norm": None},
    "rssmo of images": {"cell": "rssmo", "setup": "visual"},
}


def build(setup: str = "lpomdp", cell: str = "rssm", body: str = "walker", **overrides) -> WorldModel:
    torch.manual_seed(0)
    config = ModelConfig.for_embodiment(get_embodiment(body), setup, cell, **(SMALL | overrides))
    return WorldModel(config)


@pytest.fixture(params=VARIANTS, scope="module")
def model(request) -> WorldModel:
    return build(**VARIANTS[request.param])


def batch_for(model: WorldModel, steps: int = 6, size: int = 3) -> dict[str, Tensor]:
    batch = random_batch(model.config, steps, size)
    generator = torch.Generator().manual_seed(1)
    batch["image"] = torch.rand(steps, size, 3, 64, 64, generator=generator)
    batch["reward"] = torch.randn(steps, size, 1, generator=generator)
    return batch


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_observe_is_a_loop_of_posterior_steps(model):
    batch = batch_for(model)
    with torch.no_grad():
        features, kl = model.observe(batch, batch["pre_action"], generator=seeded())
        noise = torch.randn(6, 3, 4, generator=seeded())
        embeddings = model.encode(batch)
        state = model.initial_state(3)
        for t in range(6):
            state = model.posterior_step(state, batch["pre_action"][t], embeddings[t], noise[t])
            torch.testing.assert_close(features[t], state, atol=1e-5, rtol=1e-4)
        memories = features[..., :12]
        posterior = model.cell.posterior(memories, embeddings)
        torch.testing.assert_close(kl, posterior.kl(model.cell.prior(memories)), atol=1e-4, rtol=1e-3)
    assert features.shape == (6, 3, 16)
    assert kl.shape == (6, 3, 4)


def test_imagine_is_a_loop_of_prior_steps(model):
    batch = batch_for(model)
    start = torch.randn(3, 16, generator=seeded(2))
    with torch.no_grad():
        rollout = model.imagine(start, batch["pre_action"], generator=seeded())
        noise = torch.randn(6, 3, 4, generator=seeded())
        state = start
        for t in range(6):
            state = model.prior_step(state, batch["pre_action"][t], noise[t])
            torch.testing.assert_close(rollout.features[t], state, atol=1e-5, rtol=1e-4)
            for name, mean in model.decode(state).items():
                torch.testing.assert_close(rollout.observations[name][t], mean, atol=1e-4, rtol=1e-3)
    assert set(rollout.observations) == {*model.observed, *model.probed}


def test_filtering_can_be_interrupted(model):
    batch = batch_for(model)
    with torch.no_grad():
        whole, _ = model.observe(batch, batch["pre_action"], sample=False)
        parts, state = [], None
        for part in (slice(0, 2), slice(2, 6)):
            observations = {name: value[part] for name, value in batch.items()}
            features, _ = model.observe(observations, batch["pre_action"][part], state=state, sample=False)
            parts.append(features)
            state = features[-1]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "images" not in name])
def test_gradients_are_those_of_autograd(variant):
    model = build("mdp", **VARIANTS[variant], idm_mode="end2end" if variant == "rssm" else "detach", probes={})
    batch = batch_for(model)
    gradients = []
    for loss_function in (our_loss, step_by_step_loss):
        model.zero_grad()
        loss_function(model, batch, 3).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3, msg=name)


def pulled(looped: Any, inputs: list[Tensor]) -> list[Tensor]:
    """What three steps of something looped give, its gradients, and those of its inputs; the last result is weighed."""
    gradients, results = [torch.zeros_like(x) for x in inputs], []
    for t in range(3):
        following = torch.empty_like(inputs[-1][t])
        result = looped(t, *(x[t] for x in inputs), *([following] if len(inputs) > 1 else []))
        results.append(following if result is None else result)
    weights = torch.linspace(-1, 1, results[0].numel(), dtype=torch.float64).view_as(results[0])
    for t in reversed(range(3)):
        looped.pull(t, (t + 1) * weights, *(gradient[t] for gradient in gradients))
    own = [gradient for layer in looped.layers for gradient in layer.gradients()]
    return [torch.stack(results), *gradients, *(gradient for gradient in own if gradient is not None)]


def expected(results: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The same by autograd."""
    weights = torch.linspace(-1, 1, results[0].numel(), dtype=torch.float64).view_as(results[0])
    loss = sum(((t + 1) * weights * results[t]).sum() for t in range(3))
    return [results, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("norm", [None, "ln"])
@pytest.mark.parametrize("name", ["elu", "swish", "leakyrelu", "relu", "gelu"])
def test_looped_networks_have_the_gradients_of_autograd(name, norm):
    """Two side by side in float64, with a part of the input that is known."""
    torch.manual_seed(0)
    nets = [MLP(5, 2, 4, 2, name, norm).double() for _ in range(2)]
    x, known = (torch.randn(3, 6, size, dtype=torch.float64, requires_grad=True) for size in (3, 2))
    looped = LoopedMLP(layers_of(*(net.net for net in nets)), Loop(3, 6, torch.float64, True), known)
    with torch.no_grad():
        ours = pulled(looped, [x])
    tensors = [tensor for layer in looped.layers for tensor in layer.tensors]
    whole = torch.cat([net(torch.cat([x, known], -1)) for net in nets], -1)
    theirs = expected(whole, [x, *(p for net in nets for p in net.parameters())])
    torch.testing.assert_close(ours[:2], theirs[:2])
    back = torch.autograd.grad(tensors, [p for net in nets for p in net.parameters()], ours[2:], allow_unused=True)
    torch.testing.assert_close([*back], theirs[2:])


@pytest.mark.parametrize("normed", [False, True])
def test_looped_grus_have_the_gradients_of_autograd(normed):
    torch.manual_seed(0)
    cell: Any = (NormedGRU if normed else nn.GRUCell)(5, 4).double()
    x, memory = (torch.randn(3, 6, size, dtype=torch.float64, requires_grad=True) for size in (5, 4))
    looped = (cells._NormedGRU if normed else cells._GRU)(cell, [], Loop(3, 6, torch.float64, True), None)
    with torch.no_grad():
        ours = pulled(looped, [x, memory])
    tensors = [tensor for layer in looped.layers for tensor in layer.tensors]
    theirs = expected(torch.stack([cell(x[t], memory[t]) for t in range(3)]), [x, memory, *cell.parameters()])
    torch.testing.assert_close(ours[:3], theirs[:3])
    back = torch.autograd.grad(tensors, [*cell.parameters()], ours[3:], allow_unused=True)
    torch.testing.assert_close([*back], theirs[3:])


def test_the_graph_of_a_recurrence_cannot_silently_be_used_twice():
    model = build()
    batch = batch_for(model)
    loss, _ = model.loss(batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_bfloat16_stays_close_and_keeps_the_state_in_float32(model):
    batch = batch_for(model)
    loss, _ = model.loss(batch, sample=False)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        features, kl = model.observe(batch, batch["pre_action"], sample=False)
        low, _ = model.loss(batch, sample=False)
    low.backward()
    assert features.dtype == kl.dtype == low.dtype == torch.float32
    assert low.item() == pytest.approx(loss.item(), rel=0.02)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


IMITATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rssm": ({"cell": "rssm"}, {}),
    "rssm with a balance": ({"cell": "rssm", "kl_rebalance": 0.7, "kl_scale": 3.0}, {}),
    "rssm by modality": ({"cell": "rssm", "nll_reweight": "modility_wise", "kl_scale": 0.5}, {"mode": "kl_only"}),
    "rssm with its idm": ({"cell": "rssm", "kl_scale": 3.0}, {"use_idm": True}),
    "rssmo": ({"cell": "rssmo"}, {}),
    "rssmo without a balance": ({"cell": "rssmo", "kl_rebalance": None}, {"mode": "kl_only"}),
    "rssmo, the KL alone": ({"cell": "rssmo", "kl_scale": 3.0}, {"mode": "kl_only"}),
    "rssmo, no KL": ({"cell": "rssmo"}, {"mode": "reconstruction_only"}),
    "rssmo, the KL with its idm": ({"cell": "rssmo", "kl_scale": 3.0}, {"use_idm": True, "mode": "kl_only"}),
}


@pytest.mark.parametrize("name", IMITATIONS)
def test_the_imitation_gradient_is_that_of_a_hand_written_loop(name):
    overrides, arguments = IMITATIONS[name]
    model = build("mdp", **overrides).requires_grad_(False)
    config, mode = model.config, arguments.get("mode", "full")
    policy = TanhGaussianPolicy(16, 6, policy_config(8))
    batch = batch_for(model)
    imitation = imitation_loss(model, batch, policy, generator=seeded(), **arguments)
    loss = imitation.loss
    ours = torch.autograd.grad(loss, [*policy.parameters()])

    generator = seeded()
    noise, action_noise = (torch.randn(6, 3, dim, generator=generator) for dim in (4, 6))
    embeddings, state = model.encode(batch), model.initial_state(3)
    likelihood, kl = torch.zeros(()), torch.zeros(())
    for t in range(6):
        action = policy(state)
        if "use_idm" in arguments:
            assert model.idm is not None
            guess = model.idm(torch.cat([state, embeddings[t]], dim=-1))
            kl = kl + guess.kl(action).sum(-1).mean()
            action = guess
        action = action.sample(action_noise[t])
        torch.testing.assert_close(imitation.actions[t], action, atol=1e-5, rtol=1e-4)
        memory = model.cell.advance(state, action)
        posterior, prior = model.cell.posterior(memory, embeddings[t]), model.cell.prior(memory)
        state = torch.cat([memory, posterior.sample(noise[t])], dim=-1)
        outputs = {name: model.decoders[name](state) for name in model.observed}
        stds = [output.std.detach().expand(3, config.dims[name]) for name, output in outputs.items()]
        weight = {
            "none": torch.ones(3),
            "dim_wise": torch.cat(stds, dim=-1).mean(-1),
            "modility_wise": torch.stack([std.mean(-1) for std in stds]).mean(0),
        }[config.nll_reweight]
        share = config.kl_rebalance
        step_kl = posterior.kl(prior).sum(-1)
        if share is not None:  # the value stays, the gradient is divided
            step_kl = share * posterior.detach().kl(prior).sum(-1) + (1 - share) * posterior.kl(prior.detach()).sum(-1)
        kl = kl + (step_kl * weight).mean()
        for (name, output), std in zip(outputs.items(), stds, strict=True):
            scale = 1.0 if config.nll_reweight == "none" else std
            likelihood = likelihood + (output.log_prob(batch[name][t]) * scale).sum(-1).mean()
    expected = (mode != "reconstruction_only") * config.kl_scale * kl - (mode != "kl_only") * likelihood
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert any(gradient.any() for gradient in ours)
    for gradient, reference in zip(ours, torch.autograd.grad(expected, [*policy.parameters()]), strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-3, rtol=1e-2)


def test_guidance_by_the_inverse_dynamics_model_is_all_that_the_policy_learns_from():
    """The original's figure for this fixture: reconstruction + 3 KL + 3 KL of actions."""
    folder = Path(__file__).parent / "parity" / "walker-mdp-rssm"
    inputs = {name: torch.as_tensor(value) for name, value in np.load(folder / "inputs.npz").items()}
    loaded = load_pretrained_model(folder)
    model = WorldModel(replace(loaded.config, kl_scale=3.0)).requires_grad_(False)
    model.load_state_dict(loaded.state_dict())
    policy = load_policy(folder).requires_grad_(True)
    imitation = imitation_loss(model, inputs, policy, use_idm=True, sample=False)
    loss, metrics = imitation.loss, imitation.metrics
    assert loss.item() == pytest.approx(371.7407, abs=1e-3)
    alone = imitation_loss(model, inputs, policy, "kl_only", use_idm=True, sample=False).loss
    assert alone.item() == pytest.approx(3 * (metrics["model_kl_loss"] + metrics["action_kl_loss"]).item(), rel=1e-5)
    gradients = [torch.autograd.grad(each, [*policy.parameters()]) for each in (loss, alone)]
    for both in zip(*gradients, strict=True):
        torch.testing.assert_close(*both)


def test_imitation_modes_are_parts_of_the_full_loss():
    model = build("lpomdp", "rssmo", nll_reweight="none")
    policy, batch = TanhGaussianPolicy(16, 6, policy_config(8)), batch_for(model)
    loss = {
        mode: imitation_loss(model, batch, policy, mode=mode, sample=False)[0].item()
        for mode in ("full", "kl_only", "reconstruction_only")
    }
    assert loss["full"] == pytest.approx(loss["kl_only"] + loss["reconstruction_only"], rel=1e-5)
    with pytest.raises(AimeGymError, match="kl_only"):
        imitation_loss(model, batch, policy, mode="kl-only")  # type: ignore[arg-type]
    with pytest.raises(AimeGymError, match="idm_mode"):
        imitation_loss(build(idm_mode="none"), batch, policy, use_idm=True)
    with pytest.raises(AimeGymError, match="nothing to learn"):
        imitation_loss(model, batch, policy, "reconstruction_only", use_idm=True)


def test_evidence_is_what_the_plain_loss_minimises(model):
    batch = batch_for(model)
    terms = {"nll_reweight": "none", "free_nats": 0.0, "kl_rebalance": None, "idm_mode": "none", "probes": {}}
    plain = WorldModel(replace(model.config, **terms))
    plain.load_state_dict(model.state_dict(), strict=False)
    evidence = plain.evidence(batch, batch["pre_action"], generator=seeded())
    loss, metrics = plain.loss(batch, generator=seeded())
    assert evidence.elbo.mean().item() == pytest.approx(-loss.item(), rel=1e-4)
    assert evidence.elbo.mean().item() == pytest.approx(metrics["elbo"].item(), rel=1e-4)
    assert evidence.elbo.shape == (3,)
    assert evidence.per_step.shape == evidence.kl.shape == (6, 3)
    total = sum(evidence.log_likelihood.values()) - evidence.kl
    torch.testing.assert_close(evidence.per_step, total)
    torch.testing.assert_close(evidence.per_step.sum(0), evidence.elbo)


def test_the_reward_is_evidence_only_where_it_is_given():
    model = build("mdp", use_reward=True)
    batch = batch_for(model)
    assert "reward" in model.evidence(batch, batch["pre_action"]).log_likelihood
    reward = batch.pop("reward")
    assert "reward" not in model.evidence(batch, batch["pre_action"]).log_likelihood
    with pytest.raises(AimeGymError, match="reward"):
        model.loss(batch)
    assert model.decode(model.initial_state(2))["reward"].shape == (2, 1)
    assert "reward_mse" in model.loss(batch | {"reward": reward})[1]


def test_free_nats_stop_the_gradient_and_not_the_log():
    losses: dict[float, Any] = {}
    for free_nats in (0.0, 1e6):
        model = build("mdp", "rssm", free_nats=free_nats, nll_reweight="none", idm_mode="none")
        loss, metrics = model.loss(batch_for(model), sample=False)
        loss.backward()
        losses[free_nats] = (
            loss.item(),
            metrics["kl_loss"].item(),
            model.get_parameter("cell.prior_mean.net.0.weight").grad,
        )
    assert losses[0.0][:2] == pytest.approx(losses[1e6][:2])
    assert losses[0.0][1] > 0
    assert losses[0.0][2].abs().max() > 0
    assert losses[1e6][2] is None or losses[1e6][2].abs().max() == 0


def test_the_balance_divides_the_gradient_and_not_the_value():
    gradients: dict[float | None, Any] = {}
    values = {}
    for balance in (None, 0.8):
        model = build("mdp", "rssm", kl_rebalance=balance, nll_reweight="none", idm_mode="none")
        loss, metrics = model.loss(batch_for(model), sample=False)
        loss.backward()
        gradients[balance] = model.get_parameter("cell.prior_mean.net.0.weight").grad
        values[balance] = metrics["kl_loss"].item()
    assert values[None] == pytest.approx(values[0.8], rel=1e-5)
    torch.testing.assert_close(gradients[0.8], 0.8 * gradients[None], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reweight", ["dim_wise", "modility_wise"])
def test_reweighting_by_hand(reweight):
    model = build("mdp", "rssm", nll_reweight=reweight, idm_mode="none")
    batch = batch_for(model)
    features, kl = model.observe(batch, batch["pre_action"], sample=False)
    outputs = {name: model.decoders[name](features) for name in model.observed}
    likelihood = sum((o.log_prob(batch[n]) * o.std).sum((0, 2)).mean() for n, o in outputs.items())
    if reweight == "dim_wise":
        weight = torch.cat([output.std for output in outputs.values()], dim=-1).mean(-1)
    else:
        weight = torch.stack([output.std.mean(-1) for output in outputs.values()]).mean(0)
    expected = -likelihood + (kl.sum(-1) * weight).sum(0).mean()
    assert model.loss(batch, sample=False)[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_standardising_model_is_a_plain_one_on_standardised_sensors():
    model, plain = build("lpomdp", "rssmo", standardise=True), build("lpomdp", "rssmo")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("normaliser")})
    batch = batch_for(model)
    rng = np.random.default_rng(0)
    mean = {s.name: torch.as_tensor(rng.normal(size=s.dim)) for s in model.config.sensors}
    std = {s.name: torch.as_tensor(rng.uniform(0.5, 3, size=s.dim)) for s in model.config.sensors}
    model.set_standardisation(mean, std)
    scaled = batch | {name: (batch[name] * std[name] + mean[name]).float() for name in mean}
    assert model.loss(scaled, sample=False)[0].item() == pytest.approx(
        plain.loss(batch, sample=False)[0].item(), rel=1e-4
    )
    state = torch.randn(3, 16, generator=seeded())
    decoded, standardised = model.decode(state), plain.decode(state)
    assert set(decoded) == {"orientations", "height", "velocity"}
    for name, value in decoded.items():
        torch.testing.assert_close(value, (standardised[name] * std[name] + mean[name]).float(), atol=1e-4, rtol=1e-4)


def test_standardisation_survives_constant_sensors_and_rejects_nonsense():
    model = build("lpomdp", standardise=True)
    moments = {s.name: torch.zeros(s.dim) for s in model.config.sensors}
    model.set_standardisation(moments, moments)
    assert model.loss(batch_for(model))[0].isfinite()
    for mean, std in (
        ({}, moments),
        (moments, moments | {"height": torch.zeros(2)}),
        (moments, moments | {"height": torch.tensor([-1.0])}),
    ):
        with pytest.raises(AimeGymError, match=r"mean|moments"):
            model.set_standardisation(mean, std)
    with pytest.raises(AimeGymError, match="standardise=True"):
        build().set_standardisation(moments, moments)


@pytest.mark.parametrize(("setup", "cell", "decoder"), [("mdp", "rssmo", "dmlp"), ("lpomdp", "rssm", "ssmlp")])
def test_renewed_standardisation_leaves_the_model_what_it_was(setup, cell, decoder):
    net = NetConfig(decoder, 16, 2, "swish", "ln")
    model = build(setup, cell, standardise=True, decoders={"tabular": net}, probes={"tabular": net})
    rng = np.random.default_rng(0)

    def moments() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        mean = {s.name: torch.as_tensor(rng.normal(size=s.dim)) for s in model.config.sensors}
        return mean, {s.name: torch.as_tensor(rng.uniform(0.1, 5, size=s.dim)) for s in model.config.sensors}

    model.set_standardisation(*moments())
    batch, states = batch_for(model), torch.randn(3, model.config.feature_dim, generator=seeded())
    seen, actions = {name: batch[name] for name in model.observed}, batch["pre_action"]
    names = (*model.observed, *model.probed)
    features, decoded = model.observe(seen, actions, sample=False)[0], model.decode(states, names)
    mean, std = moments()
    renew_standardisation(model, mean, std)
    torch.testing.assert_close(model.observe(seen, actions, sample=False)[0], features, atol=1e-4, rtol=1e-4)
    for name, value in model.decode(states, names).items():
        torch.testing.assert_close(value, decoded[name], atol=1e-4, rtol=1e-4)
    for name in names:
        torch.testing.assert_close(model.standardise({name: mean[name].float()})[name], torch.zeros(len(mean[name])))


@pytest.mark.parametrize("decoder", ["cnn_ha", "dreamer_resnet"])
@pytest.mark.parametrize(("dtype", "most", "mean"), [(torch.float32, 0.51, 0.3), (torch.bfloat16, 8, 0.8)])
def test_bytes_of_images_are_those_of_the_decoder(decoder, dtype, most, mean):
    model = random_model(setup="visual", decoders={"visual": NetConfig(decoder, width=4)}, probes={})
    with torch.no_grad():
        for weight in model.decoders["image"].parameters():
            weight *= 3.0 if decoder == "cnn_ha" else 2.0  # images with contrasts
        features = torch.randn(7, model.config.feature_dim, generator=torch.Generator().manual_seed(0))
        expected = 255 * model.decode(features, ["image"])["image"].clamp(0, 1).permute(0, 2, 3, 1)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        images = ImageBytes(model, dtype)(features)
    assert images.dtype == torch.uint8
    assert images.shape == (7, 64, 64, 3)
    assert images.is_contiguous()
    assert expected.std() > 10
    difference = (images - expected).abs()
    assert difference.max() <= most
    assert difference.mean() <= mean
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_images_of_any_size_are_seen_at_64():
    model = build("visual")
    batch = batch_for(model, 2, 1)
    large = {"image": batch["image"].repeat_interleave(2, -1).repeat_interleave(2, -2)}
    features, _ = model.observe(large, batch["pre_action"], sample=False)
    reference, _ = model.observe(batch, batch["pre_action"], sample=False)
    torch.testing.assert_close(features, reference, atol=0.02, rtol=0.02)
    decoded = model.decode(features, ["image"])["image"]
    assert decoded.shape == (2, 1, 3, 64, 64)
    assert 0 <= decoded.min() <= decoded.max() <= 1


def test_the_noise_is_the_generators_alone():
    model = build()
    batch = batch_for(model)
    torch.manual_seed(1)
    first = model.observe(batch, batch["pre_action"], generator=seeded())[0]
    torch.manual_seed(2)
    assert torch.equal(first, model.observe(batch, batch["pre_action"], generator=seeded())[0])
    assert not torch.equal(first, model.observe(batch, batch["pre_action"], generator=seeded(6))[0])


def _with(batch: dict, name: str, value) -> dict:
    return batch | {name: value}


MISTAKES = {
    "no mapping": (lambda b: b["height"], None, "by name"),
    "another body": (lambda b: {"position": torch.zeros(6, 3, 8)}, None, "orientations.*position"),
    "numpy": (lambda b: _with(b, "height", np.zeros((6, 3, 1))), None, "height.*torch tensor"),
    "integers": (lambda b: _with(b, "height", torch.zeros(6, 3, 1, dtype=torch.uint8)), None, "height.*uint8"),
    "wrong dim": (lambda b: _with(b, "height", torch.zeros(6, 3, 2)), None, r"height.*\[\.\.\., 1\].*\[6, 3, 2\]"),
    "wrong time": (lambda b: _with(b, "height", torch.zeros(5, 3, 1)), None, "height.*orientations"),
    "NaN": (lambda b: _with(b, "height", torch.full((6, 3, 1), torch.nan)), None, r"height.*\[0, 0, 0\]"),
    "no actions": (None, None, "pre_action"),
    "wrong action dim": (None, torch.zeros(6, 3, 5), r"actions.*6\].*\[6, 3, 5\]"),
    "no batch": (None, torch.zeros(6, 6), "actions"),
    "no steps": (None, torch.zeros(0, 3, 6), "actions"),
    "other batch": (None, torch.zeros(6, 4, 6), "batch 4"),
    "infinite action": (None, torch.full((6, 3, 6), torch.inf), "actions.*finite"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("verb", ["observe", "evidence"])
def test_mistakes_are_told_before_a_network_sees_them(verb, mistake):
    model = build("mdp")
    batch = batch_for(model)
    change, actions, message = MISTAKES[mistake]
    given = batch["pre_action"] if actions is None and mistake != "no actions" else actions
    with pytest.raises(AimeGymError, match=message):
        getattr(model, verb)(change(batch) if change else batch, given)


def test_mistakes_in_states_and_names_are_told():
    model = build("mdp")
    actions = torch.zeros(6, 3, 6)
    for state in (torch.zeros(2, 16), torch.zeros(3, 15), torch.full((3, 16), torch.nan), np.zeros((3, 16))):
        with pytest.raises(AimeGymError, match="state"):
            model.imagine(state, actions)  # type: ignore[arg-type]
    with pytest.raises(AimeGymError, match="velocity"):
        model.imagine(torch.zeros(3, 16), actions, names=["velocities"])
    with pytest.raises(AimeGymError, match="pre_action"):
        model.loss({name: value for name, value in batch_for(model).items() if name != "pre_action"})


@pytest.mark.parametrize("body", EMBODIMENTS)
@pytest.mark.parametrize("setup", SETUPS)
def test_every_body_in_every_setup(body, setup):
    for cell in ("rssm", "rssmo"):
        model = build(setup, cell, body)
        batch = batch_for(model, 3, 2)
        loss, _ = model.loss(batch)
        assert loss.isfinite()
        features, _ = model.observe(batch, batch["pre_action"])
        for name, value in model.imagine(features[-1], batch["pre_action"]).observations.items():
            assert value.shape == batch[name].shape


def test_released_sizes():
    walker, cheetah = get_embodiment("walker"), get_embodiment("cheetah")
    rssm = ModelConfig.for_embodiment(walker, "mdp")
    assert (rssm.memory_dim, rssm.stochastic_dim, rssm.hidden_size, rssm.min_std) == (512, 128, 128, 1e-6)
    assert rssm.decoders["tabular"] == NetConfig("smlp")
    rssmo = ModelConfig.for_embodiment(cheetah, "pomdp", "rssmo")
    assert (rssmo.memory_dim, rssmo.stochastic_dim, rssmo.hidden_size, rssmo.min_std) == (512, 30, 512, 0.1)
    assert (rssmo.observed, rssmo.probed) == (("position",), ("velocity",))
    assert (rssmo.kl_rebalance, rssmo.free_nats, rssmo.nll_reweight) == (0.8, 1.0, "none")


@pytest.mark.parametrize("cell", ["rssm", "rssmo"])
@pytest.mark.parametrize("setup", SETUPS)
def test_configs_survive_the_file(tmp_path, cell, setup):
    changes = {
        "kl_rebalance": None,
        "free_nats": 0.5,
        "ensemble": (3, 16, 1),
        "standardise": True,
        "use_reward": True,
        "policy": NetConfig("tanh_gaussian", 7, 3, "swish", "ln", min_std=0.1),
        "decoders": {"tabular": NetConfig("smlp", 6, min_std=0.2), "visual": NetConfig("cnn_ha", width=2)},
        "idm_mode": "end2end",
    }
    for overrides in ({}, SMALL | changes):
        config = ModelConfig.for_embodiment(get_embodiment("quadruped"), setup, cell, **overrides)
        config_to_yaml(config, tmp_path / "config.yaml")
        assert config_from_yaml(tmp_path / "config.yaml") == config


def test_a_body_of_ones_own(tmp_path):
    config = replace(ModelConfig.for_embodiment(get_embodiment("walker"), "mdp"), embodiment="robot", action_dim=3)
    config_to_yaml(config, tmp_path / "config.yaml")
    assert config_from_yaml(tmp_path / "config.yaml") == config


RELEASED = (FIXTURES[0] / "config.yaml").read_text()
CHANGES = {
    "an unknown key": ("  kl_scale: 1.0", "  kl_scale: 1.0\n  kl_weight: 1.0", "world_model.kl_weight.*kl_scale"),
    "another version": ("seed: 42", "version:\n  version: 3.0", "AIME-v2"),
    "an unknown key of a net": ("      norm: ln", "      nrom: ln", "encoders.tabular.nrom.*norm"),
    "an unknown cell": ("name: rssmo", "name: rsmo", "rsmo.*rssm"),
    "an unknown setup": ("environment_setup: lpomdp", "environment_setup: lpodmp", "lpodmp.*lpomdp"),
    "an unknown body": ("embodiment: cheetah", "embodiment: cheeta", "cheeta.*cheetah"),
    "an unknown sensor": ("    position:", "    positions:", "positions.*position"),
    "an unknown encoder": ("name: mlp", "name: mpl", "mpl.*mlp"),
    "an unknown decoder": ("name: dmlp", "name: dlmp", "dlmp.*dmlp"),
    "an unknown activation": ("hidden_activation: swish", "hidden_activation: swich", "swich.*swish"),
    "a negative size": ("hidden_size: 16", "hidden_size: -16", "hidden_size.*-16"),
    "a word for a number": ("free_nats: 1.0", "free_nats: many", "free_nats.*many"),
    "a number out of this world": ("kl_scale: 1.0", "kl_scale: 1" + "0" * 400, "kl_scale"),
    "layers without end": ("hidden_layers: 2", "hidden_layers: 100000", "hidden_layers.*32"),
    "a list for a name": ("name: rssmo", "name: [rssmo]", "name"),
    "NaN for a number": ("kl_scale: 1.0", "kl_scale: .nan", "kl_scale.*nan"),
    "a number for a flag": ("use_reward: false", "use_reward: 1", "use_reward.*true or false"),
    "a wrong state": ("  - 24\n  - 6\n", "  - 24\n", "state_dim"),
    "a list for a net": ("    visual:\n      name: cnn_ha", "    visual: [cnn_ha]", "encoders.visual"),
    "no sensors": ("  sensors:", "  supported:", "env.sensors is missing"),
    "a missing setup": ("environment_setup: lpomdp\n", "", "environment_setup"),
    "a dead interpolation": ("embodiment: cheetah", "embodiment: ${nowhere}", "nowhere"),
    "broken YAML": ("world_model:", "world_model: [", "config"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_configs_are_read_strictly(tmp_path, change):
    old, new, message = CHANGES[change]
    assert old in RELEASED
    path = tmp_path / "config.yaml"
    path.write_text(RELEASED.replace(old, new, 1))
    with pytest.raises(AimeGymError, match=message) as caught:
        config_from_yaml(path)
    assert str(path) in str(caught.value)


SCRIPTS = {
    "dreamer": (
        "algo_name: dreamer\ngamma: 0.99\nlambda: 0.95\nvnet:\n  hidden_size: 128\n",
        "  render:\n    camera: 0\n    log: ${now:%Y}\n  seed: ${seed}\n",
        "  lr: 8.0e-5\n",
    ),
    "plan2explore": ("algo_name: plan2explore\nprefill: 5\ndefaults: [env, world_model]\n", "  render: true\n", ""),
    "aime": (
        "algo_name: aime\nfreeze_model: true\nuse_idm: false\nkl_only: false\npath: ${oc.env:NOWHERE_AT_ALL}\n",
        "  render: ${nowhere}\n",
        "  min_std: 0.1\n",
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_configs_of_every_script_of_the_original_are_read(tmp_path, script, folder):
    """Whatever else they hold, resolvable here or not: the model is the same, and its policy is as it says."""
    top, env, policy = SCRIPTS[script]
    text = (folder / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(top + text.replace("env:\n", "env:\n" + env) + policy)
    plain, read = config_from_yaml(folder / "config.yaml"), config_from_yaml(tmp_path / "config.yaml")
    assert read == replace(plain, policy=replace(plain.policy, min_std=0.1 if script == "aime" else 1e-6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "key 'sed'"),
        ({"use_rewards": True}, "use_rewards.*Did you mean 'use_reward'"),
        ({"env": {"render": True}}, "env.render"),
        ({"policy": {"lr": 1e-3}}, "policy.lr"),
    ],
    ids=str,
)
def test_configs_of_this_project_hold_nothing_unknown(tmp_path, change, message):
    config_to_yaml(ModelConfig.for_embodiment(get_embodiment("walker"), "mdp"), tmp_path / "config.yaml")
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for key, value in change.items():
        content[key] = {**(content.get(key) or {}), **value} if isinstance(value, dict) else value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(AimeGymError, match=message):
        config_from_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize("content", [b"", b"just words", b"- a\n- list", b"\xff\xfe\x00", b"{" * 2000, b"a: &a [*a]"])
def test_what_is_no_config_is_told(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(AimeGymError, match=r"config\.yaml"):
        config_from_yaml(path)


def test_values_that_do_not_fit_are_told():
    walker = get_embodiment("walker")
    for overrides, message in (
        ({"has_image": False, "setup": "visual"}, "image"),
        ({"encoders": {}}, "encoders.tabular"),
        ({"cell": "lstm"}, "lstm"),
        ({"sensors": ()}, "observe"),
        ({"sensors": (walker.sensors[0], walker.sensors[0])}, "orientations"),
    ):
        with pytest.raises(AimeGymError, match=message):
            replace(ModelConfig.for_embodiment(walker, "mdp"), **overrides)


def test_distributions_are_those_of_torch():
    generator = seeded()
    a, b = (
        Normal(torch.randn(5, 3, generator=generator), torch.rand(5, 3, generator=generator) + 0.1) for _ in range(2)
    )
    value = torch.rand(5, 3, generator=generator) * 1.8 - 0.9
    theirs = [torch.distributions.Normal(d.mean, d.std) for d in (a, b)]
    torch.testing.assert_close(a.log_prob(value), theirs[0].log_prob(value))
    torch.testing.assert_close(a.kl(b), torch.distributions.kl_divergence(*theirs))
    transform = torch.distributions.TanhTransform()
    squashed = torch.distributions.TransformedDistribution(theirs[0], [transform])
    torch.testing.assert_close(TanhNormal(a).log_prob(value), squashed.log_prob(value), atol=1e-4, rtol=1e-4)
    assert TanhNormal(a).log_prob(torch.ones(5, 3)).isfinite().all()


def test_every_std_has_its_floor():
    """The one of its own network, whatever that of the cell is."""
    x = torch.zeros(3)
    for net in (NetConfig("smlp", 6), NetConfig("smlp", 6, min_std=0.3)):
        torch.manual_seed(0)
        policy, decoder = TanhGaussianPolicy(3, 2, net), StdDecoder(3, 2, net)
        for std, raw in ((policy(x).base.std, policy.std_net(x)), (decoder(x).std, decoder.std_net(x))):
            torch.testing.assert_close(std, nn.functional.softplus(raw) + net.min_std, rtol=0, atol=1e-8)
        constant = ConstantStdDecoder(3, 2, net)
        constant.log_std.data.fill_(-20.0)
        torch.testing.assert_close(constant(x).std, torch.full((2,), -20.0).exp() + net.min_std, rtol=1e-6, atol=0)


def test_mlp_modules_are_counted_as_released():
    assert set(MLP(3, 2, 4, 2).state_dict()) == {f"net.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    names = {f"net.{i}.{kind}" for i in (0, 1, 3, 4) for kind in ("weight", "bias")}
    assert set(MLP(3, None, 4, 2, norm="ln").state_dict()) == names


@settings(max_examples=20, deadline=None)
@given(kernel=st.integers(4, 7), size=st.integers(1, 6), seed=st.integers(0, 99))
def test_upsampling_is_a_transposed_convolution(kernel, size, seed):
    torch.manual_seed(seed)
    ours = Upsampling(3, 2, kernel).double()
    theirs = nn.ConvTranspose2d(3, 2, kernel, stride=2).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, size, size, dtype=torch.float64, requires_grad=True)
    results = []
    for layer in (ours, theirs):
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, layer.weight, layer.bias])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
