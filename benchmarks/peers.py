"""How many steps a second dreams make, against envs that other libraries put around world models of the same size.

TorchRL's `DreamerEnv` and `WorldModelEnv` dream with its own `RSSMPrior`, mbrl-lib's `ModelEnv` with its `PlaNetModel`,
an RSSM too, and with its `GaussianMLP`, which has no memory. All have random weights, as these cost what learned ones
do, and the sizes of our model: of memory, latent and every layer of the RSSM and of the reward's network. What shows
states is one network of the same multiply-adds as our one a sensor, in fewer and larger products. Theirs have no
LayerNorm, which ours pay for.

All sample, and give what they show and a predicted reward: states or, as `PlaNetModel` decodes images alone, latents.
They are stepped one by one with the same actions, as tensors (`TensorDream` and TorchRL) or arrays (`gymnasium` and
mbrl-lib), in turns, each in a process of its own. On one thread the seconds are those of the CPU.
Run `python -m benchmarks.peers` where `pip install -e ".[benchmarks]"` and `pip install --no-deps mbrl==0.2.0` were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from torch import nn

import aime_gym
from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.world_model.cells import RSSMO
from aime_gym.world_model.checkpoint import load_pretrained_model
from benchmarks.side_by_side import Kind, Measured, absolute, measure, report, write
from benchmarks.work import Work, place, random_actions

INSTALL = {
    "torchrl": 'pip install -c .ci/constraints.txt -e ".[benchmarks]"',
    "mbrl": 'pip install -c .ci/constraints.txt -e ".[benchmarks]" && pip install --no-deps mbrl==0.2.0',
}
"""Module of a peer -> how to install it: mbrl pins older releases of gymnasium and omegaconf than work with it."""
BASE = "dream, 32-true"
SHOWN = ("state", "latent")


@dataclass
class Peers:
    """Compare the speed of dreams with that of TorchRL's and mbrl-lib's envs of world models."""

    model: str = "walker-state"
    """A folder or a bundled name of a walker model with the cell ``rssmo``, reward heads and starts."""
    task: str = "walk"
    """The task whose reward is predicted."""
    slots: tuple[int, ...] = (1, 64, 1024)
    """Numbers of slots to measure."""
    peers: tuple[str, ...] = tuple(INSTALL)
    """Which libraries to compare with."""
    repeats: int = 9
    """Timed stretches of each kind, taken in turns."""
    seconds: float = 0.4
    """About how long one stretch takes."""
    threads: int = 1
    """CPU threads."""
    output: Path | None = None
    """Where to write the numbers as JSON."""

    def run(self) -> None:
        """Measures, prints, and writes `output`.

        Raises:
            AimeGymError: If a library is unknown or not installed, or the model has other parts than can be compared.
        """
        for peer in self.peers:
            check_installed(peer)
        rows: dict[str, Measured] = {}
        work: dict[str, dict[str, int]] = {}
        model = absolute(self.model)
        for shown in SHOWN:
            work[shown] = self._multiply_adds(model, shown)
            for name, count in work[shown].items():
                print(f"{shown}, {name}: {count:,} multiply-adds a step")
            for slots in self.slots:
                options = {"model": model, "task": self.task, "slots": slots}
                kinds = self._kinds(options, shown)
                rows[f"{shown}, slots: {slots}"] = measure(kinds, self.repeats, self.seconds, self.threads)
        amounts = {name: float(name.rpartition(": ")[2]) for name in rows}
        report(f"{self.model}, {self.task}, threads: {self.threads}", rows, amounts, "steps", BASE)
        told = {"model": self.model, "threads": self.threads, "multiply_adds": work}
        write(self.output, rows, amounts, BASE, **told)

    def _kinds(self, options: Mapping[str, Any], shown: str) -> dict[str, Kind]:
        """What is measured."""
        ours = {**options, "obs_type": shown, "reward": "head"}
        kinds = {"dream, auto": Kind("dream", ours), BASE: Kind("dream", {**ours, "precision": "32-true"})}
        kinds["TensorDream, 32-true"] = Kind("benchmarks.peers:tensor_dream", {**ours, "precision": "32-true"})
        for name, function in self._theirs(shown).items():
            kinds[name] = Kind(f"benchmarks.peers:{function.__name__}", {**options, "shown": shown})
        return kinds

    def _theirs(self, shown: str) -> dict[str, Callable[..., Work]]:
        """What the libraries have that shows states or latents."""
        theirs: dict[str, Callable[..., Work]] = {}
        if "torchrl" in self.peers:
            theirs |= {"TorchRL DreamerEnv": dreamer_env, "TorchRL WorldModelEnv": world_model_env}
        if "mbrl" in self.peers and shown == "latent":
            theirs["mbrl-lib ModelEnv, PlaNetModel"] = model_env
        if "mbrl" in self.peers and shown == "state":
            theirs["mbrl-lib ModelEnv, GaussianMLP"] = model_env
        return theirs

    def _multiply_adds(self, model: str, shown: str) -> dict[str, int]:
        """What all kinds multiply and add a step."""
        sizes = sizes_of(model, self.task)
        counts = {"dream": sizes.rssm + sizes.reward + (sizes.decoders if shown == "state" else 0)}
        if "torchrl" in self.peers:
            prior, reward, decoder = _rssm_networks(sizes)
            counts["TorchRL"] = sum(map(multiply_adds, (prior, reward, *([decoder] if shown == "state" else []))))
        if "mbrl" in self.peers:
            counts["mbrl-lib"] = sum(map(multiply_adds, _mbrl_parts(_mbrl_model(sizes, shown))))
        return counts


def check_installed(peer: str) -> None:
    """Raises an `AimeGymError` that says how to install a library, unless it is there."""
    if peer not in INSTALL:
        raise unknown_name("library", peer, INSTALL)
    if find_spec(peer) is None:
        raise AimeGymError(f"{peer} is not installed: {INSTALL[peer]}; or leave it out with --peers.")


@dataclass(frozen=True)
class Sizes:
    """What a model consists of; the last three are multiply-adds a step."""

    action: int
    latent: int
    memory: int
    hidden: int
    reward_hidden: int
    state: int
    rssm: int
    reward: int
    decoders: int

    @property
    def features(self) -> int:
        """F, what a reward is read from."""
        return self.memory + self.latent


def sizes_of(model: str, task: str) -> Sizes:
    """The sizes of a model.

    Raises:
        AimeGymError: If the peers have no model of these sizes.
    """
    loaded = load_pretrained_model(place(model))
    config, cell, heads = loaded.config, loaded.cell, loaded.heads
    if not isinstance(cell, RSSMO) or config.version != 1 or config.hidden_size != config.memory_dim:
        raise AimeGymError(
            f"{model} has no cell 'rssmo' whose layers are as wide as its memory, as TorchRL's RSSM has."
        )
    if heads is None or "image" in loaded.observed:
        raise AimeGymError(f"{model} needs reward heads and decoders of sensors.")
    return Sizes(
        action=config.action_dim,
        latent=config.stochastic_dim,
        memory=config.memory_dim,
        hidden=config.hidden_size,
        reward_hidden=heads.config["hidden_size"],
        state=sum(config.dims[name] for name in loaded.observed),
        rssm=sum(map(multiply_adds, (cell.pre_memory, cell.memory_cell, cell.prior_net))),
        reward=multiply_adds(heads.rewards[task]),
        decoders=sum(multiply_adds(loaded.decoders[name]) for name in loaded.observed),
    )


def multiply_adds(module: nn.Module) -> int:
    """How many a module does for one slot: as many as its matrices have entries."""
    return sum(weight.numel() for name, weight in module.named_parameters() if "weight" in name and weight.ndim > 1)


def tensor_dream(model: str, task: str, slots: int, **options: Any) -> Work:
    """One step of a `TensorDream`."""
    dream = aime_gym.TensorDream(place(model), task, slots, **options)
    state, actions = dream.reset(seeds=0), torch.from_numpy(random_actions(slots, dream.model.config.action_dim))

    @torch.no_grad()
    def step() -> object:
        nonlocal state
        state, *results = dream.step(state, actions)
        return results

    return step


def dreamer_env(model: str, task: str, slots: int, shown: str) -> Work:
    """One step of TorchRL's `DreamerEnv`, made as its example `sota-implementations/dreamer` makes one."""
    from tensordict.nn import TensorDictModule
    from torchrl.data import Unbounded
    from torchrl.envs import DreamerDecoder, DreamerEnv, GymWrapper, TensorDictPrimer, TransformedEnv
    from torchrl.modules import WorldModelWrapper

    sizes = sizes_of(model, task)
    prior, reward, decoder = _rssm_networks(sizes)
    reads = ["state", "belief"]
    base = TransformedEnv(GymWrapper(gymnasium.make("AimeDream-Walker-v0", task=task)))
    parts = {"state": Unbounded((sizes.latent,)), "belief": Unbounded((sizes.memory,))}
    base = base.append_transform(TensorDictPrimer(random=False, default_value=0, **parts))
    env = DreamerEnv(
        WorldModelWrapper(
            TensorDictModule(prior, in_keys=[*reads, "action"], out_keys=["_", "_", *reads]),
            TensorDictModule(reward, in_keys=reads, out_keys=["reward"]),
        ),
        prior_shape=torch.Size([sizes.latent]),
        belief_shape=torch.Size([sizes.memory]),
        obs_decoder=TensorDictModule(decoder, in_keys=reads, out_keys=["reco_observation"]),
    )
    env.set_specs_from_env(base)
    if shown == "state":
        env = env.append_transform(DreamerDecoder())
    return _torchrl_steps(env, sizes, slots)


def world_model_env(model: str, task: str, slots: int, shown: str) -> Work:
    """One step of TorchRL's `WorldModelEnv`.

    Of release 0.14.1 it can be made for envs of a single action alone, whose specs get a wrong shape: those that are
    right are put in their place.
    """
    from tensordict.nn import TensorDictModule
    from torchrl.data import Binary, Bounded, Composite, Unbounded
    from torchrl.envs import GymEnv, WorldModelEnv
    from torchrl.modules import WorldModel

    sizes = sizes_of(model, task)
    prior, reward, decoder = _rssm_networks(sizes)
    nexts: list[Any] = [("next", "state"), ("next", "belief")]
    shows = TensorDictModule(decoder, in_keys=nexts, out_keys=[("next", "observation")])
    world_model = WorldModel(
        TensorDictModule(nn.Linear(sizes.state, sizes.latent), in_keys=["observation"], out_keys=["state"]),
        TensorDictModule(prior, in_keys=["state", "belief", "action"], out_keys=["_", "_", *nexts]),
        TensorDictModule(reward, in_keys=nexts, out_keys=[("next", "reward")]),
        decoder=shows if shown == "state" else None,
    )
    spec = Composite(state=Unbounded((slots, sizes.latent)), belief=Unbounded((slots, sizes.memory)), shape=[slots])
    if shown == "state":
        spec["observation"] = Unbounded((slots, sizes.state))
    one_action, keys = GymEnv("Pendulum-v1"), {"observation_spec": spec, "latent_key": "belief"}
    env = WorldModelEnv(world_model, one_action, batch_size=[slots], **keys)
    env.action_spec, env.reward_spec = Bounded(-1, 1, (slots, sizes.action)), Unbounded((slots, 1))
    ends = {name: Binary(1, (slots, 1), dtype=torch.bool) for name in ("done", "terminated", "truncated")}
    env.done_spec = Composite(**ends, shape=[slots])
    return _torchrl_steps(env, sizes, slots)


def model_env(model: str, task: str, slots: int, shown: str) -> Work:
    """One step of mbrl-lib's `ModelEnv`: of a `PlaNetModel` that shows latents, or of a `GaussianMLP` of states."""
    from mbrl.models import ModelEnv

    sizes = sizes_of(model, task)
    torch.manual_seed(0)
    dynamics = _mbrl_model(sizes, shown)
    begin = np.zeros((slots, sizes.state), np.float32)
    if shown == "latent":
        begin = np.zeros((slots, *dynamics.obs_shape), np.float32)
        dynamics.update_posterior(begin[0])
    never = torch.zeros(slots, 1, dtype=torch.bool)
    env = ModelEnv(
        gymnasium.make("AimeDream-Walker-v0", task=task),
        dynamics,
        termination_fn=lambda actions, states: never,
        generator=torch.Generator().manual_seed(0),
    )
    state, actions = env.reset(begin), random_actions(slots, sizes.action)

    def step() -> object:
        nonlocal state
        *results, following = env.step(actions, dict(state), sample=True)
        if shown == "latent":  # states that random weights lead to would leave the finite numbers
            state = following
        return results

    return step


def _rssm_networks(sizes: Sizes) -> tuple[nn.Module, nn.Module, nn.Module]:
    """TorchRL's prior, and its networks of reward and states."""
    from torchrl.data import Bounded
    from torchrl.modules import MLP, RSSMPrior

    torch.manual_seed(0)
    prior = RSSMPrior(
        Bounded(-1, 1, (sizes.action,)),
        hidden_dim=sizes.hidden,
        rnn_hidden_dim=sizes.memory,
        state_dim=sizes.latent,
        action_dim=sizes.action,
    )

    def network(out: int, width: int) -> nn.Module:
        return MLP(in_features=sizes.features, out_features=out, depth=2, num_cells=width, activation_class=nn.ELU)

    width = _width(sizes.decoders, sizes.features, sizes.state)
    return prior, network(1, sizes.reward_hidden), network(sizes.state, width)


def _torchrl_steps(env: Any, sizes: Sizes, slots: int) -> Work:
    from tensordict import TensorDict
    from torchrl.envs.utils import step_mdp

    begin = {"state": torch.zeros(slots, sizes.latent), "belief": torch.zeros(slots, sizes.memory)}
    actions = torch.from_numpy(random_actions(slots, sizes.action))
    with torch.no_grad():
        state = env.reset(TensorDict({**begin, "action": actions}, [slots]))

    @torch.no_grad()
    def step() -> object:
        nonlocal state
        result = env.step(state.set("action", actions))
        state = step_mdp(result)
        return result

    return step


def _mbrl_model(sizes: Sizes, shown: str) -> Any:
    """A `PlaNetModel` or a `GaussianMLP`, with the settings of mbrl-lib's own examples but for the sizes."""
    from mbrl.models import GaussianMLP, OneDTransitionRewardModel, PlaNetModel

    if shown == "state":
        inputs, outputs = sizes.state + sizes.action, sizes.state + 1
        width = _width(sizes.rssm + sizes.reward + sizes.decoders, inputs, 2 * outputs, layers=4)
        activation = {"_target_": "torch.nn.SiLU"}
        mlp = GaussianMLP(inputs, outputs, "cpu", num_layers=4, hid_size=width, activation_fn_cfg=activation)
        return OneDTransitionRewardModel(mlp, target_is_delta=True, normalize=True, learned_rewards=True)
    planet = PlaNetModel(
        obs_shape=(3, 64, 64),  # images, whose networks do not run in a step
        obs_encoding_size=1024,
        encoder_config=((3, 32, 4, 2), (32, 64, 4, 2), (64, 128, 4, 2), (128, 256, 4, 2)),
        decoder_config=((1024, 1, 1), ((1024, 128, 5, 2), (128, 64, 5, 2), (64, 32, 6, 2), (32, 3, 6, 2))),
        latent_state_size=sizes.latent,
        action_size=sizes.action,
        belief_size=sizes.memory,
        hidden_size_fcs=sizes.hidden,
        device="cpu",
    )
    units = [sizes.features, sizes.reward_hidden, sizes.reward_hidden]
    hidden = [layer for pair in pairwise(units) for layer in (nn.Linear(*pair), nn.ReLU())]
    planet.reward_model = nn.Sequential(*hidden, nn.Linear(units[-1], 1))  # which else is as wide as the prior
    return planet


def _mbrl_parts(dynamics: Any) -> list[nn.Module]:
    """What runs in a step."""
    if not hasattr(dynamics, "belief_model"):
        return [dynamics.model]
    return [dynamics.belief_model, dynamics.prior_transition_model, dynamics.reward_model]


def _width(count: int, inputs: int, outputs: int, layers: int = 2) -> int:
    """The width of hidden layers that makes so many multiply-adds."""
    both = inputs + outputs
    return round((math.sqrt(both**2 + 4 * (layers - 1) * count) - both) / (2 * (layers - 1)))


if __name__ == "__main__":
    tyro.cli(Peers).run()
