"""Our numbers and gradients against the original's fixtures, and against a slow AIME where there is no fixture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from aime_gym.world_model.checkpoint import name_on_disk
from aime_gym.world_model.config_file import config_from_yaml
from aime_gym.world_model.layers import TanhGaussianPolicy
from aime_gym.world_model.model import WorldModel
from benchmarks.parity import GRADIENT_TOLERANCE, LOSS_TOLERANCE, TOLERANCE, Parity, compare
from tests.slow_aime import SlowAIME

FIXTURES = sorted(path.parent for path in (Path(__file__).parent / "parity").glob("*/config.yaml"))


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_all_numbers_and_gradients_are_those_of_the_original(folder):
    comparisons = compare(folder)
    assert sum("_grad_" in comparison.key for comparison in comparisons) > 50
    assert [str(c) for c in comparisons if not c.good] == []


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_so_are_those_of_the_slow_one(folder, tmp_path):
    """That it is AIME is what makes it worth anything below."""
    expected, slow = dict(np.load(folder / "expected.npz")), SlowAIME(folder).expected()
    assert not set(expected) - set(slow)
    for key, value in expected.items():
        size = max(float(np.abs(value).max()), 1e-3)
        np.testing.assert_allclose(slow[key], np.broadcast_to(value, slow[key].shape), rtol=0, atol=1e-5 * size)


SPOILS = {
    "a gradient": ("aime_full_grad_mean_net.net.0.weight", lambda value: value + 2e-4 * np.abs(value).max()),
    "a norm": ("metric_grad_norm_memory_cell", lambda value: value * 1.0002),
    "a zero": ("aime_full_grad_std_net.net.0.weight", lambda value: value + 1e-12),
    "our zero": ("aime_idm_grad_std_net.net.0.weight", np.zeros_like),
    "a zero norm": ("metric_grad_norm_prior_mean", np.zeros_like),
    "a loss": ("aime_kl_only_loss", lambda value: value * 1.0002),
    "a feature": ("posterior_feature", lambda value: value + 2e-5),
    "a shape": ("kl", lambda value: value[:-1]),
    "a name": ("aime_full_grad_norm_net.net.0.weight", lambda value: np.ones(3, np.float32)),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_the_command_sees_what_deviates_and_what_it_does_not_know(tmp_path, spoil, capsys):
    """One array of a fixture, spoilt, is what fails, and the command says so; as does a folder that cannot be read."""
    key, change = SPOILS[spoil]
    folder = shutil.copytree(Path(__file__).parent / "parity" / "walker-mdp-rssm", tmp_path / "fixture")
    expected = dict(np.load(folder / "expected.npz"))
    np.savez(folder / "expected.npz", **{**expected, key: np.asarray(change(expected.get(key)))})
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as exit:
        Parity((tmp_path / "empty", folder)).run()
    assert exit.value.code == 1
    failed = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  FAIL")]
    assert failed[1:] == [key]


MLP = {"hidden_size": 10, "hidden_layers": 1, "hidden_activation": "leakyrelu", "norm": "ln"}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rssm, scaled, balanced, free": (
        "walker-mdp-rssm",
        {"environment_setup": "lpomdp"},
        {"kl_scale": 3.0, "kl_rebalance": 0.8, "free_nats": 0.4, "min_std": 0.05, "idm_mode": "end2end"},
    ),
    "rssm by modality, constant stds, an encoder": (
        "walker-mdp-rssm-reward",
        {"policy": {"hidden_size": 9, "hidden_layers": 1, "min_std": 0.2}},
        {
            **{"nll_reweight": "modility_wise", "kl_scale": 0.3, "kl_rebalance": 0.2},
            **{"encoders": {"tabular": {"name": "mlp", **MLP}}},
            **{"decoders": {"tabular": {"name": "ssmlp", "min_std": 0.1, **MLP}}},
        },
    ),
    "rssm without reweighting, idm or hidden layers": (
        "walker-mdp-rssm",
        {"environment_setup": "lpomdp", "use_reward": True},
        {"nll_reweight": "none", "idm_mode": "none", "hidden_layers": 0, "free_nats": 0.1, "min_std": 0.3},
    ),
    "rssm of images, balanced": ("walker-visual-rssm", {}, {"kl_rebalance": 0.8, "kl_scale": 0.1, "free_nats": 0.5}),
    "rssm without probes": ("walker-visual-rssm", {}, {"probes": None, "idm_mode": "end2end"}),
    "rssmo, reweighted, unbalanced": (
        "cheetah-lpomdp-rssmo",
        {"environment_setup": "mdp"},
        {
            **{"nll_reweight": "dim_wise", "kl_rebalance": None, "free_nats": None, "min_std": None, "kl_scale": 3.0},
            **{"decoders": {"tabular": {"name": "smlp", "hidden_size": 12, "hidden_layers": 2, "min_std": 0.01}}},
        },
    ),
    "rssmo, all free": ("cheetah-lpomdp-rssmo", {"use_reward": True}, {"free_nats": 1e4, "idm_mode": "end2end"}),
    "rssmo without norms": ("cheetah-visual-rssmo", {}, {"norm": None, "free_nats": 0.0, "kl_rebalance": 0.5}),
    "no KL": ("cheetah-lpomdp-rssmo", {}, {"kl_scale": 0.0}),
}


def write_variant(folder: Path, base: str, top: dict[str, Any], model: dict[str, Any]) -> Path:
    """A folder as the fixtures are: another config, new weights, the base's inputs, and what the slow one computes."""
    source = Path(__file__).parent / "parity" / base
    config = yaml.safe_load((source / "config.yaml").read_text()) | top
    config["world_model"] |= model
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    shutil.copy(source / "inputs.npz", folder)
    read = config_from_yaml(folder / "config.yaml")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        nets = {"model": WorldModel(read), "policy": TanhGaussianPolicy(read.feature_dim, read.action_dim, read.policy)}
        for name, net in nets.items():
            weights = {name_on_disk(own): 1.5 * value for own, value in net.state_dict().items()}  # less timid
            torch.save(weights, folder / f"{name}.pt")
    np.savez(folder / "expected.npz", **SlowAIME(folder).expected())
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_other_architectures_and_losses_agree_with_the_slow_one(tmp_path, name):
    comparisons = compare(write_variant(tmp_path, *VARIANTS[name]))
    assert [str(c) for c in comparisons if not c.good] == []
    assert {c.tolerance for c in comparisons} == {TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE}
    values = np.load(tmp_path / "expected.npz")
    assert values["aime_full_metric_policy_grad_norm"] > 0
    assert ("aime_idm_loss" in values) == (VARIANTS[name][2].get("idm_mode") != "none")
