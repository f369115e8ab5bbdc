"""AIME once more, written independently: no module of the package, one step after the other, in float64.

It gives what an `expected.npz` holds for a released folder, with means in place of samples. The fixtures of the
original say that it is right; it then says what is right where there is no fixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
Gaussian = tuple[Tensor, Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "swish": F.silu,
    "leakyrelu": lambda x: F.leaky_relu(x, 0.1),
    "relu": F.relu,
}


def mlp(weights: Weights, path: str, x: Tensor, act: str = "elu", head: bool = True) -> Tensor:
    """[Linear, optional LayerNorm, activation] as often as there are weights, the last Linear bare if it is a head."""
    at = sorted({int(name[len(path) + 5 :].split(".")[0]) for name in weights if name.startswith(f"{path}.net.")})
    last = max(i for i in at if weights[f"{path}.net.{i}.weight"].ndim == 2)
    for i in at:
        weight, bias = weights[f"{path}.net.{i}.weight"], weights[f"{path}.net.{i}.bias"]
        x = x @ weight.T + bias if weight.ndim == 2 else F.layer_norm(x, x.shape[-1:], weight, bias)
        if i + 1 not in at and not (head and i == last):
            x = ACTIVATIONS[act](x)
    return x


def log_prob(of: Gaussian, value: Tensor) -> Tensor:
    mean, std = of
    return -0.5 * ((value - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)


def divergence(of: Gaussian, other: Gaussian) -> Tensor:
    return torch.log(other[1] / of[1]) + (of[1] ** 2 + (of[0] - other[0]) ** 2) / (2 * other[1] ** 2) - 0.5


def fixed(of: Gaussian) -> Gaussian:
    return of[0].detach(), of[1].detach()


class SlowAIME:
    """A released folder with `inputs.npz`; `expected` computes all."""

    def __init__(self, folder: Path):
        self.config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
        self.model: dict[str, Any] = self.config["world_model"]
        self.weights = self._read(folder / "model.pt")
        self.policy = self._read(folder / "policy.pt")
        self.inputs = {name: torch.from_numpy(value).double() for name, value in np.load(folder / "inputs.npz").items()}
        sensors, setup = self.config["env"]["sensors"], self.config["environment_setup"]
        tabular = [name for name, sensor in sensors.items() if sensor["modility"] == "tabular"]
        first = [name for name in tabular if sensors[name]["order"] == "first"]
        self.observed = {"mdp": tabular, "lpomdp": first, "visual": ["image"]}[setup]
        self.outputs = [*self.observed, *(["reward"] if self.config["use_reward"] else [])]
        self.probed = [name for name in tabular if name not in self.observed] if self.model.get("probes") else []
        self.steps, self.batch = self.inputs["pre_action"].shape[:2]

    def _read(self, path: Path) -> Weights:
        return {name: value.double().requires_grad_() for name, value in torch.load(path).items()}

    def expected(self) -> dict[str, np.ndarray]:
        """Everything."""
        results = self.predictions() | self.training()
        for name, mode in (("full", ""), ("kl_only", "kl_only"), ("reconstruction_only", "no_kl"), ("idm", "idm")):
            if mode != "idm" or self.model["idm_mode"] != "none":
                results |= {f"aime_{name}_{key}": value for key, value in self.imitation(mode).items()}
        return {key: value.detach().numpy() for key, value in results.items()}

    # Networks

    def embed(self) -> Tensor:
        if self.model["name"] == "rssm":
            return torch.cat([self._encode(name, self.inputs[name]) for name in self.observed], -1)
        images = [self._encode(name, self.inputs[name]) for name in self.observed if name == "image"]
        tabular = [self.inputs[name] for name in self.observed if name != "image"]
        return torch.cat([*images, *([self._encode("tabular", torch.cat(tabular, -1))] if tabular else [])], -1)

    def _encode(self, name: str, x: Tensor) -> Tensor:
        if name == "image":
            y = x.flatten(0, 1)
            for i in (0, 2, 4, 6):
                weight, bias = (self.weights[f"encoders.image.net.{i}.{kind}"] for kind in ("weight", "bias"))
                y = F.conv2d(y, weight, bias, stride=2)
                y = y if i == 6 else F.relu(y)
            return y.flatten(1).unflatten(0, x.shape[:2])
        net = self.model["encoders"]["tabular"]
        if net["name"] == "identity":
            return x
        return mlp(self.weights, f"encoders.{name}", x, net.get("hidden_activation", "elu"), net.get("have_head", True))

    def decode(self, part: str, name: str, feature: Tensor) -> Gaussian:
        path = f"{part}.{name}"
        if name == "image":
            return self._image(path, feature)
        net = self.model[part]["tabular"]
        act, floor = net.get("hidden_activation", "elu"), net.get("min_std") or 1e-6
        if net["name"] == "dmlp":
            mean = mlp(self.weights, f"{path}.net", feature, act)
            return mean, torch.ones_like(mean)
        mean = mlp(self.weights, f"{path}.mu_net", feature, act)
        if net["name"] == "ssmlp":
            return mean, torch.exp(self.weights[f"{path}.log_std"]).expand_as(mean) + floor
        return mean, F.softplus(mlp(self.weights, f"{path}.std_net", feature, act)) + floor

    def _image(self, path: str, feature: Tensor) -> Gaussian:
        y = feature.flatten(0, -2) @ self.weights[f"{path}.net.0.weight"].T + self.weights[f"{path}.net.0.bias"]
        y = y[..., None, None]
        for i in (2, 4, 6, 8):
            weight, bias = (self.weights[f"{path}.net.{i}.{kind}"] for kind in ("weight", "bias"))
            y = F.conv_transpose2d(y, weight, bias, stride=2)
            y = torch.sigmoid(y) if i == 8 else F.relu(y)
        mean = y.unflatten(0, feature.shape[:-1])
        return mean, torch.ones_like(mean)

    def act(self, weights: Weights, prefix: str, x: Tensor) -> Gaussian:
        policy = (self.config["policy"] or {}) if prefix == "" else {}
        act, floor = policy.get("hidden_activation", "elu"), policy.get("min_std") or 1e-6
        std = F.softplus(mlp(weights, f"{prefix}std_net", x, act)) + floor
        return mlp(weights, f"{prefix}mean_net", x, act), std

    def advance(self, h: Tensor, s: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([s, action], -1)
        if self.model["name"] == "rssmo":
            x = mlp(self.weights, "pre_memory", x, "swish", head=False)
        weight = {
            name: self.weights[f"memory_cell.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        r, z, n = (x @ weight["weight_ih"].T + weight["bias_ih"]).chunk(3, -1)
        r_h, z_h, n_h = (h @ weight["weight_hh"].T + weight["bias_hh"]).chunk(3, -1)
        z = torch.sigmoid(z + z_h)
        return (1 - z) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + z * h

    def latent(self, which: str, x: Tensor) -> Gaussian:
        floor = self.model.get("min_std") or 1e-6
        if self.model["name"] == "rssm":
            std = F.softplus(mlp(self.weights, f"{which}_std", x)) + floor
            return mlp(self.weights, f"{which}_mean", x), std
        mean, raw = mlp(self.weights, f"{which}_net", x, "swish").chunk(2, -1)
        return mean, 2 * torch.sigmoid(raw / 2) + floor

    def start(self) -> tuple[Tensor, Tensor]:
        memory, stochastic = self.model["state_dim"]
        return torch.zeros(self.batch, memory).double(), torch.zeros(self.batch, stochastic).double()

    def filter(self, embedding: Tensor, action: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Gaussian, Gaussian]:
        """Features, posteriors and priors of all steps."""
        h, s = self.start()
        rows = []
        for t in range(self.steps):
            h = self.advance(h, s, action(t, torch.cat([h, s], -1)))
            posterior, prior = self.latent("posterior", torch.cat([h, embedding[t]], -1)), self.latent("prior", h)
            s = posterior[0]
            rows.append((torch.cat([h, s], -1), *posterior, *prior))
        feature, *rest = (torch.stack(column) for column in zip(*rows, strict=True))
        return feature, (rest[0], rest[1]), (rest[2], rest[3])

    # Results

    def predictions(self) -> dict[str, Tensor]:
        actions = self.inputs["pre_action"]
        feature, posterior, prior = self.filter(self.embed(), lambda t, _: actions[t])
        results = {"posterior_feature": feature, "kl": divergence(posterior, prior)}
        memory = self.model["state_dim"][0]
        h, s = feature[-1, :, :memory], feature[-1, :, memory:]
        future = []
        for t in range(self.steps):
            h = self.advance(h, s, actions[t])
            s = self.latent("prior", h)[0]
            future.append(torch.cat([h, s], -1))
        results["prior_feature"] = torch.stack(future)
        for name in self.outputs:
            results[f"out_{name}_mean"], results[f"out_{name}_std"] = self.decode("decoders", name, feature)
            results[f"rollout_{name}"] = self.decode("decoders", name, results["prior_feature"])[0]
        for name in self.probed:
            results[f"probe_{name}"] = self.decode("probes", name, feature)[0]
        return results | {"policy_mode": torch.tanh(self.act(self.policy, "", feature)[0])}

    def weigh(
        self, outputs: list[str], feature: Tensor, posterior: Gaussian, prior: Gaussian, free_nats: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruction with probes, KL, and metrics."""
        metrics, stds, reconstruction, term = {}, [], torch.zeros(()).double(), torch.zeros(()).double()
        reweight = self.model["nll_reweight"]
        for name in outputs:
            mean, std = self.decode("decoders", name, feature)
            density = log_prob((mean, std), self.inputs[name])
            metrics[f"{name}_mse"] = ((mean - self.inputs[name]) ** 2).mean()
            metrics[f"{name}_rec_term"] = density.sum() / self.batch
            part = -(density * (1 if reweight == "none" else std.detach())).sum() / self.batch
            if reweight != "none":
                metrics[f"{name}_reconstruction_loss"] = part
            stds.append(std.detach().flatten(2))
            reconstruction, term = reconstruction + part, term + metrics[f"{name}_rec_term"]
        share = self.model.get("kl_rebalance")
        kl = divergence(posterior, prior)
        real = kl.sum(-1).detach()
        if share is not None:
            kl = share * divergence(fixed(posterior), prior) + (1 - share) * divergence(posterior, fixed(prior))
        kl = kl.sum(-1)
        free = torch.clamp(kl, min=free_nats)
        kl = free + (real - free).detach()  # the gradient of the maximum, the value as it is
        weight = {
            "none": lambda: torch.ones_like(real),
            "dim_wise": lambda: torch.cat(stds, -1).mean(-1),
            "modility_wise": lambda: torch.stack([std.mean(-1) for std in stds]).mean(0),
        }[reweight]()
        for name in self.probed:
            probe = self.decode("probes", name, feature.detach()[1:])
            part = -log_prob(probe, self.inputs[name][1:]).sum() / self.batch
            metrics[f"{name}_probe_mse"] = ((probe[0] - self.inputs[name][1:]) ** 2).mean()
            metrics[f"{name}_probe_reconstruction_loss"] = part
            reconstruction = reconstruction + part
        kl_term = -real.sum() / self.batch
        metrics |= {"rec_term": term, "kl_term": kl_term, "elbo": term + kl_term, "reconstruction_loss": reconstruction}
        return reconstruction, (kl * weight).sum() / self.batch, metrics

    def training(self) -> dict[str, Tensor]:
        actions, embedding = self.inputs["pre_action"], self.embed()
        feature, posterior, prior = self.filter(embedding, lambda t, _: actions[t])
        free_nats = self.model.get("free_nats") or 0.0
        reconstruction, kl, metrics = self.weigh(self.outputs, feature, posterior, prior, free_nats)
        loss = reconstruction + self.model["kl_scale"] * kl
        if self.model["idm_mode"] != "none":
            x = torch.cat([feature[:-1], embedding[1:]], -1)
            guess = self.act(self.weights, "idm.", x.detach() if self.model["idm_mode"] == "detach" else x)
            clamped = actions[1:].clamp(-0.999, 0.999)
            density = log_prob(guess, torch.atanh(clamped)) - torch.log(1 - clamped**2)
            metrics["idm_loss"] = -density.sum((1, 2)).mean()
            metrics["idm_mse"] = ((torch.tanh(guess[0]) - actions[1:]) ** 2).mean()
            loss = loss + metrics["idm_loss"]
        if self.model.get("intrinsic_reward_config"):
            x, target = torch.cat([feature[:-1], actions[1:]], -1).detach(), embedding[1:].detach()
            members = range(self.model["intrinsic_reward_config"]["num_ensembles"])
            errors = [((mlp(self.weights, f"emb_prediction_heads.{k}", x) - target) ** 2).mean() for k in members]
            metrics["emb_prediction_loss"] = torch.stack(errors).sum()
            loss = loss + metrics["emb_prediction_loss"]
        metrics |= {"kl_loss": kl, "total_loss": loss}
        squares: dict[str, Tensor] = {}
        parameters = {name: value for name, value in self.weights.items() if not name.startswith("initial_")}
        for name, gradient in self._gradients(loss, parameters).items():
            module = name.split(".")[0]
            squares[module] = squares.get(module, torch.zeros(()).double()) + (gradient**2).sum()
        metrics |= {f"grad_norm_{module}": torch.sqrt(square) for module, square in squares.items()}
        return {"loss": loss, **{f"metric_{name}": value for name, value in metrics.items()}}

    def imitation(self, mode: str) -> dict[str, Tensor]:
        embedding, actions = self.embed().detach(), []
        guidance = torch.zeros(()).double()

        def action(t: int, feature: Tensor) -> Tensor:
            nonlocal guidance
            chosen = self.act(self.policy, "", feature)
            if mode == "idm":
                guess = self.act(self.weights, "idm.", torch.cat([feature, embedding[t]], -1))
                guidance = guidance + divergence(guess, chosen).sum() / self.batch
                chosen = guess
            actions.append(torch.tanh(chosen[0]))
            return actions[-1]

        feature, posterior, prior = self.filter(embedding, action)
        reconstruction, kl, metrics = self.weigh(self.observed, feature, posterior, prior, 0.0)
        metrics["model_kl_loss"] = kl
        if mode == "idm":
            metrics["action_kl_loss"] = guidance
        scale = 0.0 if mode == "no_kl" else self.model["kl_scale"]
        loss = (0.0 if mode == "kl_only" else 1.0) * reconstruction + scale * (kl + guidance)
        gradients = self._gradients(loss, self.policy)
        metrics |= {"total_loss": loss}
        metrics["policy_grad_norm"] = torch.sqrt(torch.stack([(g**2).sum() for g in gradients.values()]).sum())
        return {
            **{"loss": loss, "actions": torch.stack(actions)},
            **{f"metric_{name}": value for name, value in metrics.items()},
            **{f"grad_{name}": gradient for name, gradient in gradients.items()},
        }

    @staticmethod
    def _gradients(loss: Tensor, weights: Weights) -> Weights:
        gradients = torch.autograd.grad(loss, [*weights.values()], materialize_grads=True, retain_graph=True)
        return dict(zip(weights, gradients, strict=True))
