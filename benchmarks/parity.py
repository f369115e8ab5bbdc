"""How far our numbers are from those of the original AIME implementation.

`python -m benchmarks.parity FOLDER...` loads the checkpoint in each folder, computes everything that its `expected.npz`
holds from its `inputs.npz`, gradients too, and prints the largest deviation of each array. It exits with 1 if one is
above tolerance, and if `expected.npz` holds a key that is not known here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
import yaml
from torch import Tensor, nn

from aime_gym.agents.aime import Imagined, discriminator_loss, imagine, imitation_loss, policy_loss, value_loss
from aime_gym.agents.online_aime import viper_rewards
from aime_gym.errors import AimeGymError
from aime_gym.world_model.checkpoint import (
    fit_weights,
    load_policy,
    load_pretrained_model,
    name_on_disk,
    read_weights,
)
from aime_gym.world_model.layers import MLP, TanhGaussianPolicy
from aime_gym.world_model.model import WorldModel

TOLERANCE = 1e-5
"""Largest absolute deviation of features and everything else that is none of the following; of numbers beyond 1 it is
relative, as float32 has no more digits."""
LOSS_TOLERANCE = 1e-4
"""Largest relative deviation of losses, metrics and norms of gradients."""
GRADIENT_TOLERANCE = 1e-4
"""Largest deviation of a gradient, in parts of its largest entry."""
IMITATION: dict[str, dict[str, Any]] = {
    "aime_full": {},
    "aime_kl_only": {"mode": "kl_only"},
    "aime_reconstruction_only": {"mode": "reconstruction_only"},
    "aime_idm": {"use_idm": True},
    "aime_idm_prior": {"use_idm": True, "guidance": "prior"},
}
"""Prefix of the keys -> arguments of `imitation_loss`."""


@dataclass
class Parity:
    """Compare world models with what the original implementation computed."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Each with config.yaml, model.pt, policy.pt, inputs.npz and expected.npz."""

    def run(self) -> None:
        """Prints all deviations; exits with 1 if one is above tolerance or a folder cannot be read."""
        failures = 0
        for folder in self.folders:
            print(folder)
            try:
                comparisons = compare(folder)
            except AimeGymError as error:
                print(f"  FAIL {error}")
                failures += 1
                continue
            for comparison in comparisons:
                print(f"  {comparison}")
            failures += sum(not comparison.good for comparison in comparisons)
            print(f"  {summary(comparisons)}")
        print(f"{failures} above tolerance, unknown or not readable" if failures else "all within tolerance")
        sys.exit(1 if failures else 0)


@dataclass(frozen=True)
class Comparison:
    """One array of `expected.npz` and ours."""

    key: str
    deviation: float
    """Largest deviation of an entry. Infinite if shapes differ, we have no such quantity, or what is 0 there is not."""
    tolerance: float
    unit: str
    """What the deviation is measured in: ``"absolute"``, ``"relative"`` or ``"of the largest entry"``."""
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether the deviation is within tolerance (NaN is not)."""
        return self.deviation <= self.tolerance

    def __str__(self) -> str:
        return f"{'ok  ' if self.good else 'FAIL'} {self.key:55} {self.deviation:.1e} {self.unit} {self.note}".rstrip()


def compare(folder: Path) -> list[Comparison]:
    """All arrays of `expected.npz` against ours: every key is checked, and one that we do not know is a failure.

    Raises:
        AimeGymError: If the folder is incomplete, or its inputs do not fit the model.
    """
    inputs = {name: torch.as_tensor(value) for name, value in _arrays(folder / "inputs.npz").items()}
    expected = _arrays(folder / "expected.npz")
    model = load_pretrained_model(folder)
    inputs["pre_action"] = inputs["pre_action"][..., : model.config.action_dim]  # none of a likelihood model
    policy = load_policy(folder) if (folder / "policy.pt").exists() else None
    ours = compute(model, policy, inputs)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    if policy is not None and model.emb_prediction_heads is not None:
        steps = len(expected.get("imagined_action", ()))
        ours |= _explored(model, policy, ours["posterior_feature"], steps, settings["world_model"]) if steps else {}
    if not model.config.action_dim:
        reward, elbo = viper_rewards(model, {name: inputs[name] for name in model.config.outputs})
        ours |= {"viper_reward": reward[..., None], "viper_elbo": elbo[..., None]}
    if policy is not None and (folder / "value.pt").exists():
        ours |= _online(folder, model, policy, inputs, settings)
    return [_compare(key, value, ours.get(key)) for key, value in expected.items()]


def summary(comparisons: list[Comparison]) -> str:
    """How many arrays are within tolerance, and the largest deviation in each unit."""
    units = sorted({comparison.unit for comparison in comparisons})
    worst = (f"{max(c.deviation for c in comparisons if c.unit == unit):.1e} {unit}" for unit in units)
    return f"{sum(c.good for c in comparisons)} of {len(comparisons)} within tolerance; largest: {', '.join(worst)}"


def compute(model: WorldModel, policy: TanhGaussianPolicy | None, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that an `expected.npz` may hold, with means in place of samples.

    Args:
        model: Loaded; its parameters need no gradient, before and afterwards.
        policy: The policy of phase 2; None for phase 1 alone.
        inputs: Sensors, ``pre_action`` and, if the model decodes it, ``reward``: [T, B, ...].
    """
    with torch.no_grad():
        ours = _predictions(model, policy, inputs)
    ours |= _training(model, inputs)
    if policy is None:
        return ours
    for prefix, arguments in IMITATION.items():
        if not (arguments.get("use_idm") and model.idm is None):
            results = _imitation(model, policy, inputs, arguments)
            ours |= {f"{prefix}_{name}": value for name, value in results.items()}
    return ours


def _predictions(model: WorldModel, policy: TanhGaussianPolicy | None, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    actions = inputs["pre_action"]
    features, kl = model.observe(inputs, actions, sample=False)
    rollout = model.imagine(features[-1], actions, sample=False)
    embedding = model.encode(inputs)
    ours = {"posterior_feature": features, "kl": kl, "prior_feature": rollout.features, "embedding": embedding}
    ours |= {f"rollout_{name}": value for name, value in rollout.observations.items()}
    for name, decoder in model.decoders.items():
        output = decoder(features)
        ours |= {f"out_{name}_mean": output.mean, f"out_{name}_std": output.std}
    ours |= {f"probe_{name}": probe(features).mean for name, probe in model.probes.items()}
    ours |= {f"baseline_probe_{name}": probe(embedding).mean for name, probe in model.baseline_probes.items()}
    return ours if policy is None else ours | {"policy_mode": policy(features).mode}


def _training(model: WorldModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss of phase 1, its parts, and the norm of its gradient by the parameters of each module on disk."""
    loss, metrics = model.requires_grad_(True).loss(inputs, sample=False)
    modules: dict[str, list[Tensor]] = {}
    for name, gradient in _gradients(loss, model).items():
        modules.setdefault(name_on_disk(name).split(".")[0], []).append(gradient)
    model.requires_grad_(False)
    metrics |= {f"grad_norm_{name}": _norm(gradients) for name, gradients in modules.items()}
    return {"loss": loss.detach(), **{f"metric_{name}": value for name, value in metrics.items()}}


def _imitation(
    model: WorldModel, policy: TanhGaussianPolicy, inputs: dict[str, Tensor], arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """The loss of phase 2, its parts, and its gradient by the policy."""
    imitation = imitation_loss(model, inputs, policy.requires_grad_(True), sample=False, **arguments)
    gradients = _gradients(imitation.loss, policy)
    policy.requires_grad_(False)
    metrics = imitation.metrics | {"policy_grad_norm": _norm(gradients.values())}
    metrics["per_step_elbo"] = -imitation.per_step.detach()[..., None]
    actions, entropy = imitation.actions.detach(), imitation.entropy.detach()
    return {
        **{"loss": imitation.loss.detach(), "actions": actions, "action_entropy": entropy},
        **{f"metric_{name}": value for name, value in metrics.items()},
        **{f"grad_{name}": gradient for name, gradient in gradients.items()},
    }


def _imagined(imagined: Imagined, reward: str | None) -> dict[str, Tensor]:
    """What `expected.npz` holds of imagined futures."""
    steps = {"is_terminal": imagined.ends, **({reward: imagined.rewards} if reward else {})}
    return {
        **{"feature": imagined.features, "action": imagined.actions},
        **{"action_entropy": imagined.entropy, "action_logp": imagined.log_prob},
        **{name: values[..., None] for name, values in steps.items()},
    }


@torch.no_grad()
def _explored(
    model: WorldModel, policy: TanhGaussianPolicy, features: Tensor, steps: int, settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Plan2Explore's imagination, and the reward that its ensemble gives."""
    assert model.emb_prediction_heads is not None
    imagined = imagine(model, policy, features.flatten(0, 1), steps, sample=False)
    guesses = model.emb_prediction_heads(torch.cat([imagined.features[:-1], imagined.actions], -1))  # [K, H, N, E]
    scale = (settings.get("intrinsic_reward_config") or {}).get("scale", 0.1)
    reward = scale * guesses.std(0).log().mean(-1, keepdim=True)  # [H, N, 1]
    told = _imagined(imagined, None) | {"intrinsic_reward": torch.cat([reward[:1], reward])}
    return {f"imagined_{name}": value for name, value in told.items()}


def _online(
    folder: Path,
    model: WorldModel,
    policy: TanhGaussianPolicy,
    inputs: dict[str, Tensor],
    settings: dict[str, Any],
) -> dict[str, Tensor]:
    """One update of the online algorithm, step by step, without stepping: losses, gradients and what they come from."""
    name, others = model.config.reward, {key.removeprefix("online_") for key in inputs if key.startswith("online_")}
    names = [key for key in others if f"embodiment_{key}" in inputs]
    batch = {key: torch.cat([inputs[f"embodiment_{key}"], inputs[f"online_{key}"]], 1) for key in names}
    ours: dict[str, Tensor] = {}
    if (folder / "likelihood").exists():
        seen = {"demonstration": "", "online": "online_"}
        likelihood = load_pretrained_model(folder / "likelihood")
        for key, prefix in seen.items():
            watched = {output: inputs[prefix + output] for output in likelihood.config.outputs}
            reward, elbo = viper_rewards(likelihood, watched)
            ours |= {f"{key}_viper_reward": reward[..., None], f"{key}_viper_elbo": elbo[..., None]}
    if (folder / "discriminator.pt").exists():
        sizes = settings["ail_config"]
        discriminator = _network(folder / "discriminator.pt", sizes["hidden_size"], sizes["hidden_layers"])
        embedded, demonstrated = model.encode(batch), model.encode(inputs)
        loss, metrics = discriminator_loss(discriminator, demonstrated, embedded, inputs["gradient_penalty_alpha"])
        ours |= _told("discriminator", loss, discriminator, metrics, "")
        batch[name] = discriminator(embedded).detach()
        ours[f"online_{name}"] = batch[name]
    else:
        told = inputs[f"online_{name}"]
        blank = torch.zeros(len(told), inputs["embodiment_pre_action"].shape[1], 1)
        batch[name] = torch.cat([blank, told], 1)
        batch[f"{name}_mask"] = torch.cat([blank, torch.ones_like(told)], 1)

    states = model.observe(batch, batch["pre_action"], sample=False)[0].flatten(0, 1)
    loss, metrics = model.requires_grad_(True).loss(batch, sample=False)
    ours |= _told("model", loss, model, metrics, "")
    model.requires_grad_(False)

    path, sizes = f"vnets.{name}", settings["vnet"]
    values = {
        part: _network(folder / "value.pt", sizes["hidden_size"], sizes["hidden_layers"], f"{path}.{part}.")
        for part in ("vnet", "vnet_target")
    }
    target = values["vnet_target"].requires_grad_(False)
    gain, entropy = settings["value_gradient_loss_scale"], settings["policy_entropy_scale"]
    loss, imagined, judged, metrics = policy_loss(
        model, policy.requires_grad_(True), target, inputs, states, settings["imagine_horizon"], gain, entropy, False
    )
    inferred = imitation_loss(model, inputs, policy, sample=False).actions
    metrics["action_mse"] = (inferred - inputs["pre_action"]).square().mean().detach()
    metrics[f"value_gradient_policy_loss_{name}"] = metrics["value_gradient_policy_loss"]
    ours |= _told("policy", loss, policy, metrics, "")
    policy.requires_grad_(False)

    loss = value_loss(imagined, judged, values["vnet"])
    metrics = {"value_loss": loss.detach(), f"value_loss_{name}": loss.detach()}
    metrics[f"value_{name}"] = values["vnet"](imagined.features[:-1].detach()).mean().detach()
    ours |= _told("value", loss, values["vnet"], metrics, f"{path}.vnet.")
    ours |= {f"online_imagined_{key}": value.detach() for key, value in _imagined(imagined, name).items()}
    ours |= {f"online_target_value_{name}": judged.values.detach()[..., None]}
    return ours | {f"online_return_{name}": judged.returns.detach()[..., None]}


def _network(path: Path, hidden_size: int, hidden_layers: int, prefix: str = "") -> MLP:
    """A network that gives one number; its weights' names begin with the prefix."""
    weights = {name.removeprefix(prefix): value for name, value in read_weights(path)[0].items() if prefix in name}
    network = MLP(weights["net.0.weight"].shape[1], 1, hidden_size, hidden_layers)
    fit_weights(network, weights, path)
    return network


def _told(part: str, loss: Tensor, module: nn.Module, metrics: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What `expected.npz` holds of a loss in an update of the online algorithm."""
    gradients = _gradients(loss, module)
    norm = {"discriminator": "grad_norm", "value": "vnet_grad_norm"}.get(part, f"{part}_grad_norm")
    metrics = metrics | {norm: _norm(gradients.values())}
    return {
        **{f"online_metric_{part}_{name}": value for name, value in metrics.items()},
        **{f"online_grad_{part}_{prefix}{name}": gradient for name, gradient in gradients.items()},
    }


def _gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Parameter -> its gradient, zero where the loss does not depend on it."""
    parameters = dict(module.named_parameters())
    if not loss.requires_grad:
        return {name: torch.zeros_like(value) for name, value in parameters.items()}
    gradients = torch.autograd.grad(loss, [*parameters.values()], materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([gradient.double().flatten() for gradient in gradients]).norm()


def _compare(key: str, expected: np.ndarray, ours: Tensor | None) -> Comparison:
    unit, tolerance = "absolute", TOLERANCE
    if key.endswith("loss") or "metric_" in key:
        unit, tolerance = "relative", LOSS_TOLERANCE
    elif "_grad_" in key:
        unit, tolerance = "of the largest entry", GRADIENT_TOLERANCE
    if ours is None:
        return Comparison(key, np.inf, tolerance, unit, "we have no such quantity")
    values = ours.double().numpy()
    if key.endswith("_std"):  # a constant std is kept as one number
        values, expected = np.broadcast_arrays(values, expected)
    if values.shape != expected.shape:
        return Comparison(key, np.inf, tolerance, unit, f"expected shape {expected.shape}, got {values.shape}")
    deviation = np.abs(values - expected)
    if "_grad_" in key:
        if not expected.any():
            return Comparison(key, np.inf if values.any() else 0.0, tolerance, unit, "all zero")
        deviation = deviation / np.abs(expected).max()
    else:
        deviation = deviation / np.maximum(np.abs(expected), 1.0 if unit == "absolute" else 1e-3)
    return Comparison(key, float(deviation.max()), tolerance, unit)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise AimeGymError(f"There is no file {path}.")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


if __name__ == "__main__":
    try:
        tyro.cli(Parity).run()
    except AimeGymError as error:
        sys.exit(f"error: {error}")
