"""Padding of windows: what it is, and that nothing but terminations is learned from it or scored on it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aime_gym.agents.aime import imitation_loss
from aime_gym.bodies.body import foreign_body
from aime_gym.data.dataset import BURN_IN, TrajectoryDataset, WindowSampler
from aime_gym.errors import AimeGymError
from aime_gym.training import fit_heads as heads_module
from aime_gym.training.fit_heads import HeadsOptions, compute_samples, fit_heads, score_heads, with_rewards
from aime_gym.training.model_folder import prediction_error, score_tables
from aime_gym.training.refine import senses_config, senses_loss
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.layers import TanhGaussianPolicy
from aime_gym.world_model.model import WorldModel
from benchmarks.update_speed import random_batch
from tests.random_models import random_config

LENGTHS = range(6, 16)
BODY = foreign_body("Short-v0", random_config().sensors[:1], 2, 100)


def short_episodes(lengths=LENGTHS, terminates: bool = True) -> TrajectoryDataset:
    """Episodes of a body with one sensor that terminate early and earn 5 a step."""
    rng, sensor = np.random.default_rng(0), BODY.sensors[0]
    episodes = []
    for length in lengths:
        reward = np.full((length, 1), 5, np.float32)
        reward[0] = 0
        place = rng.normal(size=(1, sensor.dim)) + rng.normal(size=(length, sensor.dim)).cumsum(0)
        episodes.append(
            {
                sensor.name: place.astype(np.float32),
                "pre_action": rng.uniform(-1, 1, (length, 2)).astype(np.float32),
                "reward": reward,
                "is_terminal": np.arange(length) == (length - 1 if terminates else length),
            }
        )
    return TrajectoryDataset(episodes)


def tiny_model(cell: str = "rssmo", **overrides) -> WorldModel:
    """A random model of that body."""
    net = NetConfig("dmlp", 16, 1, "swish", "ln")
    torch.manual_seed(0)
    config = ModelConfig.for_embodiment(
        BODY,
        "mdp",
        cell,
        **{
            **{"memory_dim": 16, "stochastic_dim": 4, "hidden_size": 16, "episode_steps": 100},
            **{"encoders": {"tabular": NetConfig("mlp", 16, 1, "swish", "ln", have_head=cell == "rssm")}},
            **{"decoders": {"tabular": net}, "probes": {"tabular": net}},
            **overrides,
        },
    )
    return WorldModel(config)


def padded(batch: dict[str, Tensor], lengths: list[int], junk: float = 3.0) -> dict[str, Tensor]:
    """The batch with rows of each window but the first ones replaced by padding with nonsense in it."""
    is_padding = torch.arange(len(batch["pre_action"]))[:, None] >= torch.tensor(lengths)
    fill = {name: value.clone() for name, value in batch.items()}
    for value in fill.values():
        value[is_padding] = junk
    return fill | {"is_padding": is_padding}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=6),
    terminates=st.booleans(),
    horizon=st.integers(2, 40),
    least=st.integers(2, 12),
    lead=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_padding_is_what_lies_outside_a_trajectory(lengths, terminates, horizon, least, lead, seed):
    dataset = short_episodes(lengths, terminates)
    least, lead = min(least, horizon), min(lead, least - 1, horizon - 1)
    sizes, rng = np.array(lengths), np.random.default_rng(seed)
    if max(lengths) < least - lead:
        with pytest.raises(AimeGymError, match="fits into no trajectory"):
            dataset.draw_windows(30, horizon, rng, least=least, lead=lead)
        return
    rows, is_padding = dataset.draw_windows(30, horizon, rng, least=least, lead=lead)
    which = np.searchsorted(dataset.bounds[:, 1], rows[0], side="right")
    assert (rows >= dataset.bounds[which, 0]).all()
    assert (rows < dataset.bounds[which, 1]).all()
    if is_padding is None:
        assert (np.diff(rows, axis=0) == 1).all()
        return
    assert is_padding.any()
    inside = np.diff(rows, axis=0) == 1  # a row that follows from the one before is real, and so is that one
    np.testing.assert_array_equal(~is_padding[1:] & ~is_padding[:-1], inside)
    assert not is_padding[lead:least].any()
    behind = is_padding[lead:].sum(0)
    allowed = np.maximum(horizon // 4 if terminates else 0, horizon - sizes[which])
    assert (behind <= allowed).all()


def test_without_short_episodes_windows_are_those_that_fit():
    dataset = short_episodes([30, 40], terminates=False)
    for least in (None, 2, 12):
        windows = dataset.draw_windows(20, 12, np.random.default_rng(3), least=least)
        plain = dataset.draw_windows(20, 12, np.random.default_rng(3))
        assert windows.is_padding is None
        np.testing.assert_array_equal(windows.rows, plain.rows)


def test_a_batch_says_what_is_padding():
    dataset = short_episodes()
    batch = WindowSampler(dataset, 40, 12, (0,), ["pre_action", "is_terminal", "reward"], least=2).sample()
    padding = batch["is_padding"]
    assert padding.dtype == torch.bool
    assert padding.shape == (12, 40)
    assert not batch["pre_action"][padding].any()
    assert batch["pre_action"][1:][~padding[1:]].all()
    assert (batch["is_terminal"][padding] == 1).all()  # it follows terminations alone
    assert "is_padding" not in WindowSampler(dataset, 40, 6, (0,), ["pre_action"]).sample()


@pytest.mark.parametrize("reweight", ["none", "dim_wise", "modility_wise"])
@pytest.mark.parametrize("cell", ["rssm", "rssmo"])
def test_the_loss_of_padded_windows_is_that_of_windows_cut_short(cell, reweight):
    model = tiny_model(cell, nll_reweight=reweight, idm_mode="none", decoders={"tabular": NetConfig("smlp", 16)})
    lengths, weights = [3, 7, 1, 5], list(model.parameters())
    batch = random_batch(model.config, 7, 4)
    loss, metrics = model.loss(padded(batch, lengths), sample=False)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    expected, errors = torch.zeros((), dtype=torch.float64), []
    for window, length in enumerate(lengths):
        cut = {name: value[:length, window : window + 1] for name, value in batch.items()}
        value, own = model.loss(cut, sample=False)
        expected = expected + value.double() / len(lengths)
        errors.append(own[f"{BODY.sensors[0].name}_mse"].item())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, weights, allow_unused=True), strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
    assert metrics[f"{BODY.sensors[0].name}_mse"].item() == pytest.approx(np.average(errors, weights=lengths), rel=1e-5)

    longer = {name: torch.cat([value, value.new_full((9, *value.shape[1:]), 7)]) for name, value in batch.items()}
    assert model.loss(padded(longer, lengths, 1e30), sample=False)[0].item() == pytest.approx(loss.item(), rel=1e-6)


def test_the_loss_of_padded_windows_by_hand():
    model = tiny_model(idm_mode="detach", kl_rebalance=None, free_nats=0.0, nll_reweight="none", ensemble=(2, 8, 1))
    name, lengths = BODY.sensors[0].name, [2, 6, 4]
    batch = random_batch(model.config, 6, 3)
    loss, metrics = model.loss(padded(batch, lengths), sample=False)
    features, kl = model.observe({name: batch[name]}, batch["pre_action"], sample=False)
    mean = model.decode(features, [name])[name].detach().double().numpy()
    embeddings = model.encode({name: batch[name]})
    guess = model.idm(torch.cat([features[:-1], embeddings[1:]], -1))
    action = guess.log_prob(batch["pre_action"][1:]).detach().double().numpy()
    inputs = torch.cat([features[:-1], batch["pre_action"][1:]], -1)
    ahead = [(head(inputs) - embeddings[1:]).square().detach().double().numpy() for head in model.emb_prediction_heads]
    truth, divergence = batch[name].double().numpy(), kl.detach().double().numpy()
    evidence, actions, errors, pairs = 0.0, 0.0, 0.0, 0
    for window, length in enumerate(lengths):
        for t in range(length):
            error = mean[t, window] - truth[t, window]
            evidence += (-0.5 * error**2 - 0.5 * math.log(2 * math.pi)).sum() - divergence[t, window].sum()
            if t:
                actions += action[t - 1, window].sum()
                errors += sum(error[t - 1, window].mean() for error in ahead)
                pairs += 1
    assert metrics["elbo"].item() == pytest.approx(evidence / 3, rel=1e-5)
    assert metrics["idm_loss"].item() == pytest.approx(-3 * actions / pairs, rel=1e-5)
    assert metrics["emb_prediction_loss"].item() == pytest.approx(errors / pairs, rel=1e-5)
    assert loss.item() == pytest.approx((-evidence - 9 * actions / pairs) / 3 + errors / pairs, rel=1e-5)


def test_a_mask_of_real_steps_changes_nothing():
    model = tiny_model(idm_mode="detach", ensemble=(2, 8, 1))
    batch = random_batch(model.config, 6, 3)
    masked = batch | {"is_padding": torch.zeros(6, 3, dtype=torch.bool)}
    weights = list(model.parameters())
    torch.manual_seed(0)
    plain = torch.autograd.grad(model.loss(batch)[0], weights, allow_unused=True)
    torch.manual_seed(0)
    for ours, theirs in zip(torch.autograd.grad(model.loss(masked)[0], weights, allow_unused=True), plain, strict=True):
        assert ours is theirs is None or torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_evidence_of_padding_is_zero():
    model, lengths = tiny_model(), [2, 6, 4]
    batch = random_batch(model.config, 6, 3)
    whole = model.evidence(batch, batch["pre_action"], sample=False)
    cut = model.evidence(padded(batch, lengths), batch["pre_action"], sample=False)
    for window, length in enumerate(lengths):
        torch.testing.assert_close(cut.per_step[:length, window], whole.per_step[:length, window])
        assert not cut.per_step[length:, window].any()
    torch.testing.assert_close(cut.elbo, cut.per_step.sum(0))


@pytest.mark.parametrize("use_idm", [False, True])
def test_imitation_does_not_see_padding(use_idm):
    model, lengths = tiny_model(idm_mode="detach").requires_grad_(False), [2, 6, 4]
    policy = TanhGaussianPolicy(model.config.feature_dim, 2, NetConfig("tanhmlp", 8, 1))
    batch = random_batch(model.config, 6, 3)
    weights = list(policy.parameters())

    def gradient(batch):
        loss = imitation_loss(model, batch, policy, use_idm=use_idm, sample=False)[0]
        return loss.item(), torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)

    loss, gradients = gradient(padded(batch, lengths))
    again, same = gradient(padded(batch, lengths, junk=-50.0))
    assert loss == pytest.approx(again, rel=1e-6)
    cut = [
        gradient({name: value[:length, i : i + 1] for name, value in batch.items()}) for i, length in enumerate(lengths)
    ]
    assert loss == pytest.approx(np.mean([each for each, _ in cut]), rel=1e-5)
    for ours, other, *parts in zip(gradients, same, *(each for _, each in cut), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-5)


def test_senses_do_not_see_padding():
    states = tiny_model(idm_mode="none")
    model = WorldModel(senses_config(states.config, "mdp", idm_mode="detach"))
    lengths, batch = [2, 6, 4], random_batch(model.config, 6, 3)
    losses = []
    for junk in (3.0, -50.0):
        torch.manual_seed(0)
        losses.append(senses_loss(model, states, padded(batch, lengths, junk)))
    assert losses[0][0].item() == pytest.approx(losses[1][0].item(), rel=1e-6)
    for name, value in losses[0][1].items():
        assert value.item() == pytest.approx(losses[1][1][name].item(), rel=1e-6)


class Still:
    """A model that predicts the last frame for ever."""

    observed, probed, codes = (BODY.sensors[0].name,), (), MappingProxyType({})

    def parameters(self):
        return iter([torch.zeros(1)])

    def observe(self, observations, actions, sample=True):
        return observations[self.observed[0]], None

    def imagine(self, state, actions, **options):
        return type("Rollout", (), {"features": state.expand(len(actions), -1, -1)})

    def decode(self, features, names):
        return {self.observed[0]: features}


def test_horizons_that_no_episode_reaches_are_missing():
    """A model that predicts the last frame would be perfect on padding."""
    dataset, name = short_episodes(), BODY.sensors[0].name
    scores = prediction_error(Still(), dataset, windows=400)
    assert {"nmse", "nmse_1", f"nmse_1/{name}"} == set(scores)
    # Windows begin at the first row: the tenth frame is filtered last, and the eleventh is compared with it.
    steps = [dataset[i][name][10] - dataset[i][name][9] for i in range(len(dataset)) if len(dataset[i][name]) > 10]
    variance = dataset.arrays[name].astype(np.float64).var(0)
    assert scores["nmse_1"] == pytest.approx((np.square(steps).mean(0) / variance).mean(), rel=0.2)  # of 5 episodes
    assert scores["nmse"] == pytest.approx(scores["nmse_1"])
    mixed = short_episodes([*LENGTHS, 25])
    assert {key for key in prediction_error(Still(), mixed, windows=400) if "/" not in key} == {
        "nmse",
        "nmse_1",
        "nmse_10",
    }


def test_scores_of_episodes_shorter_than_the_frames_that_are_filtered():
    scores = prediction_error(Still(), short_episodes([3, 5, 4]), windows=20)
    assert {key for key in scores if "/" not in key} == {"nmse", "nmse_1"}
    with pytest.raises(AimeGymError, match="No trajectory reaches step 10"):
        prediction_error(Still(), short_episodes(), steps=(10, 40))


def test_constants_have_no_error():
    dataset = short_episodes()
    dataset.arrays[BODY.sensors[0].name][:] = 0.1
    assert prediction_error(Still(), dataset, windows=20)["nmse_1"] == 0


def test_missing_horizons_are_told_in_the_table():
    kinds = {"mean": {"nmse_1": 0.5, "nmse": 0.5}, "sampled": {"nmse_1": 0.6, "nmse": 0.6}}
    longer = {"mean": {"nmse_1": 0.5, "nmse_10": 1.0, "nmse": 0.7}}
    table = score_tables({"prediction": {"short": kinds, "long": longer}}).splitlines()
    assert "| step 1 | step 10 |" in table[2]
    assert table[4] == "| short | mean | 0.5000 | no episode is so long |"
    assert table[-1] == "| long | mean | 0.5000 | 1.0000 |"


@pytest.fixture
def labelled() -> TrajectoryDataset:
    return with_rewards(short_episodes(), BODY, ("own",))


OPTIONS = HeadsOptions(updates=15, batch_size=8, hidden_size=16, ensemble_hidden_size=8, ensemble=2, lr=1e-2)


def test_heads_learn_rewards_of_real_steps_alone(labelled):
    model = tiny_model()
    heads = fit_heads(model, labelled, OPTIONS, callbacks=[])
    assert heads.reward_limits == (5.0, 5.0)
    assert heads.config["terminates"]
    assert heads.reward_mean.item() == pytest.approx(5)
    rows = labelled.arrays[BODY.sensors[0].name].astype(np.float64)
    np.testing.assert_allclose(heads.target_mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    scores = score_heads(model, heads, labelled, windows=50)
    assert scores["reward_own"] == scores["reward_own_prior"] == 1
    assert all(math.isfinite(score) for score in scores.values())


def test_heads_ignore_what_padding_holds(labelled, monkeypatch):
    model, fitted = tiny_model(), []
    original = heads_module.compute_samples
    for junk in (0.0, 1e3):

        def with_junk(*arguments, junk=junk):
            samples = original(*arguments)
            spoilt = {
                name: torch.where(samples.is_padding[..., None], getattr(samples, name) + junk, getattr(samples, name))
                for name in ("rewards", "targets", "actions")
            }
            return samples._replace(**spoilt)

        monkeypatch.setattr(heads_module, "compute_samples", with_junk)
        fitted.append(fit_heads(model, labelled, replace(OPTIONS, updates=5), callbacks=[]).state_dict())
    for name, weight in fitted[0].items():
        torch.testing.assert_close(weight, fitted[1][name], rtol=0, atol=0, msg=name)


def test_terminations_are_learned_from_padding_but_not_from_cuts():
    model = tiny_model()
    for terminates in (True, False):
        dataset = with_rewards(short_episodes(terminates=terminates), BODY, ("own",))
        heads = fit_heads(model, dataset, replace(OPTIONS, updates=1), callbacks=[])
        batch = heads_module._sampler(model, dataset, 50, 0, ("own",)).sample()
        samples = compute_samples(model, heads, batch)
        assert samples.is_padding.any()
        assert not samples.is_padding[0].any()  # there is something to learn in each window
        assert (samples.terminal[samples.is_padding] == terminates).all()
        first = batch[BODY.sensors[0].name][0]
        assert (batch[BODY.sensors[0].name][BURN_IN - 2] == first).all(-1).any()  # begins as a dream does
