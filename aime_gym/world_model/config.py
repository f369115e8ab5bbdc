"""The config of a world model: its sizes, its networks and its loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from aime_gym.bodies.body import (
    EMBODIMENTS,
    EPISODE_CONTROL_STEPS,
    Choices,
    Embodiment,
    Sensor,
    Setup,
    canonical_setup,
    foreign_body,
)
from aime_gym.bodies.sensors import ARMS, AngleCode, Rendering, is_free, name_inside
from aime_gym.errors import AimeGymError, unknown_name

MIN_STD = 1e-6
"""Added to standard deviations where a config sets no `min_std`."""

CellName = Literal["rssm", "rssmo"]

Reweighting = Literal["none", "dim_wise", "modility_wise"]

IDMMode = Literal["none", "detach", "end2end"]

_ACTIVATIONS = ("elu", "swish", "leakyrelu", "relu")

ACTIVATIONS = {1: _ACTIVATIONS, 2: (*_ACTIVATIONS, "gelu")}
"""By the version of the original."""

_IMAGES = ("cnn_ha", "dreamer_resnet")

ENCODERS = {"tabular": ("mlp", "identity"), "visual": _IMAGES}

DECODERS = {"tabular": ("dmlp", "smlp", "ssmlp"), "visual": _IMAGES, "binary": ("binary",)}

REWARDS = ("reward", "viper_reward", "ail_reward", "ot_reward")
"""What the decoder of a reward can be called: the env's, or a surrogate that was learned in its place."""

END = "is_terminal"
"""The output that says whether an episode has ended, [..., 1]."""

LOSS_FIELDS = ("nll_reweight", "kl_scale", "free_nats", "kl_rebalance")
"""Fields of a `ModelConfig` that decide how weights are learned, not what they are."""


@dataclass(frozen=True)
class NetConfig:
    """One network; which of the sizes matter depends on its `name`."""

    name: str
    """Encoders: ``mlp``, ``identity``, ``cnn_ha``, ``dreamer_resnet``; decoders: ``dmlp``, ``smlp``, ``ssmlp``,
    ``binary``, ``cnn_ha``, ``dreamer_resnet``."""
    hidden_size: int = 128
    hidden_layers: int = 2
    hidden_activation: str = "elu"
    norm: str | None = None
    """``"ln"`` puts a LayerNorm before every activation."""
    have_head: bool = True
    """Whether a Linear layer follows the last activation."""
    width: int = 32
    """Channels of the first convolution (of images)."""
    min_std: float = MIN_STD
    """Added to the standard deviations that it gives (``smlp``, ``ssmlp``, policies)."""
    sigmoid: bool = True
    """Whether a sigmoid ends a decoder of images; without one its output is around 0.5."""


def policy_config(hidden_size: int = 128, hidden_layers: int = 2) -> NetConfig:
    """What a `TanhGaussianPolicy` of these sizes is made of."""
    return NetConfig("tanh_gaussian", hidden_size, hidden_layers)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and loss of a world model of AIME (Zhang et al., NeurIPS 2023) or AIME-v2 (arXiv 2404.18896).

    Raises:
        AimeGymError: If a value is unknown or values do not fit together.
    """

    embodiment: str
    setup: Setup
    sensors: tuple[Sensor, ...]
    """All tabular sensors of the body, in order."""
    has_image: bool
    """Whether the body has a camera; only the ``visual`` setup uses it."""
    action_dim: int
    action_repeat: int
    cell: CellName
    memory_dim: int
    stochastic_dim: int
    hidden_size: int
    hidden_layers: int
    norm: str | None
    min_std: float
    encoders: dict[str, NetConfig]
    """By kind of sensor: ``tabular``, ``visual``."""
    decoders: dict[str, NetConfig]
    """The same, and ``binary`` for the end of episodes."""
    probes: dict[str, NetConfig]
    """Empty for no probes."""
    version: int = 1
    """Which original it follows. 2, AIME-v2 (``rssmo`` alone), has a LayerNorm in its GRU, probes of the embedding
    beside those of features, and log densities without their constant."""
    classes: int = 0
    """Classes of each one-hot group that the latent is made of (``version`` 2); 0 where it is of normals."""
    nll_reweight: Reweighting = "none"
    kl_scale: float = 1.0
    free_nats: float = 0.0
    kl_rebalance: float | None = None
    idm_mode: IDMMode = "none"
    use_reward: bool = False
    """Whether a decoder predicts a reward."""
    reward: str = "reward"
    """What it is called, one of `REWARDS`."""
    use_terminal: bool = False
    """Whether a decoder predicts the end of episodes."""
    ensemble: tuple[int, int, int] | None = None
    """Embedding predictors of Plan2Explore: (how many, hidden size, hidden layers)."""
    standardise: bool = False
    """Whether sensors have mean 0 and standard deviation 1 inside the model (this project's folders only)."""
    policy: NetConfig | None = field(default=None)
    """Sizes of the policy that belongs to the model, if any."""
    episode_steps: int | None = None
    """Agent steps in an episode of a foreign body; the suite's table knows those of its own."""
    logged_range: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """What -1 and 1 stand for in the actions of logged data; None where an env knows it."""
    choices: Choices | None = None
    """What the actions of a foreign body are chosen from; None for numbers in [-1, 1]."""
    rendering: Rendering = "full"
    """How the images were drawn that the model learned from, and so those that it sees in the world."""
    deterministic: bool = False
    """Whether its dreams go on by the means of latents and not by samples, unless they are told otherwise."""

    def __post_init__(self):
        kinds = {"cell": CellName, "nll_reweight": Reweighting, "idm_mode": IDMMode, "rendering": Rendering}
        choices: dict[str, tuple[Any, ...]] = {name: get_args(kind) for name, kind in kinds.items()}
        for name, known in (choices | {"reward": REWARDS, "version": (1, 2)}).items():
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), [str(one) for one in known])
        if self.version == 2 and self.cell != "rssmo":
            raise AimeGymError(f"A model of AIME-v2 has the cell 'rssmo'; got {self.cell!r}.")
        if self.classes and (self.version == 1 or self.stochastic_dim % self.classes):
            raise AimeGymError(
                f"One-hot latents are AIME-v2's, of so many groups of {self.classes} classes; got version "
                f"{self.version} and {self.stochastic_dim} numbers."
            )
        canonical_setup(self.setup)
        if self.setup == "visual" and not self.has_image:
            raise AimeGymError("The setup 'visual' needs the sensor 'image', which env.sensors lacks.")
        names = [sensor.name for sensor in self.sensors]
        for name in names:
            if not is_free(name) or names.count(name) > 1:
                raise AimeGymError(
                    f"{name!r} cannot name a sensor: expected a unique identifier that names nothing else in a model "
                    f"or its data, such as {name_inside(name)!r}."
                )
        for sensor in self.sensors:
            if not all(low < high for low, high in pairwise((-1, *sensor.rotations, sensor.dim))):
                raise AimeGymError(
                    f"The rotations of {sensor.name} are entries of its {sensor.dim}, each once, in ascending order; "
                    f"got {list(sensor.rotations)}."
                )
            if sensor.choices and (sensor.choices.dim != sensor.dim or sensor.rotations):
                raise AimeGymError(
                    f"{sensor.name} has {sensor.dim} numbers, with rotations {list(sensor.rotations)}; expected the "
                    f"{sensor.choices.dim} of {sensor.choices.space} without any."
                )
        if self.logged_range is not None and len(self.logged_range[0]) != self.action_dim:
            raise AimeGymError(
                f"logged_range is of {len(self.logged_range[0])} actions; {self.embodiment} has {self.action_dim}."
            )
        if self.choices and (self.choices.dim != self.action_dim or self.embodiment in EMBODIMENTS):
            raise AimeGymError(
                f"The actions of {self.embodiment} are {self.action_dim} numbers; got {self.choices.space}, which are "
                f"{self.choices.dim} as a vector."
            )
        if not self.observed:
            raise AimeGymError(f"Nothing to observe: no sensor of {self.embodiment} belongs to setup {self.setup!r}.")
        for name in (*self.observed, *self.probed):
            kind = _kind(name)
            if name in self.observed:
                _check_net(f"encoders.{kind}", self.encoders.get(kind), ENCODERS[kind])
                _check_net(f"decoders.{kind}", self.decoders.get(kind), DECODERS[kind])
            else:
                _check_net(f"probes.{kind}", self.probes.get(kind), DECODERS[kind])
        if self.use_reward:
            _check_net("decoders.tabular", self.decoders.get("tabular"), DECODERS["tabular"])
        if self.use_terminal:
            _check_net("decoders.binary", self.decoders.get("binary"), DECODERS["binary"])
        if self.norm not in (None, "ln"):
            raise unknown_name("norm", self.norm, ["ln"])

    @property
    def body(self) -> Embodiment:
        """The body: that of the suite's table, or a foreign one as far as the model knows it (no env is made)."""
        if self.embodiment in EMBODIMENTS:
            known = EMBODIMENTS[self.embodiment]
            same = known.action_repeat == self.action_repeat
            return known if same else replace(known, action_repeat=self.action_repeat)
        steps = self.episode_steps or EPISODE_CONTROL_STEPS
        body = foreign_body(self.embodiment, self.sensors, self.action_dim, steps, self.has_image, self.choices)
        return replace(body, logged_range=self.logged_range)

    @property
    def observed(self) -> tuple[str, ...]:
        """What the model sees and reconstructs: inputs, and outputs without the reward."""
        if self.setup == "visual":
            return ("image",)
        return tuple(s.name for s in self.sensors if self.setup == "mdp" or s.order == "first")

    @property
    def probed(self) -> tuple[str, ...]:
        """Hidden sensors that are decoded from detached features."""
        if not self.probes:
            return ()
        return tuple(sensor.name for sensor in self.sensors if sensor.name not in self.observed)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the evidence is about: the observed sensors, and reward and end if the model decodes them."""
        return (*self.observed, *([self.reward] if self.use_reward else []), *([END] if self.use_terminal else []))

    @property
    def dims(self) -> dict[str, int]:
        """Dims of the tabular sensors, the reward and the end."""
        return {sensor.name: sensor.dim for sensor in self.sensors} | {self.reward: 1, "reward": 1, END: 1}

    @property
    def codes(self) -> dict[str, AngleCode]:
        """How networks see the tabular sensors and the reward: angles without limits as sines and cosines."""
        sensors = (*self.sensors, *(Sensor(name, 1) for name in ("reward", self.reward, END)))
        return {sensor.name: AngleCode(sensor) for sensor in sensors}

    def code_of(self, names: Iterable[str]) -> AngleCode:
        """How networks see some tabular sensors side by side."""
        sensors = {sensor.name: sensor for sensor in self.sensors}
        return AngleCode(*(sensors[name] for name in names if name != "image"), arm=ARMS.get(self.embodiment))

    @property
    def feature_dim(self) -> int:
        """F, of the state: memory and stochastic latent."""
        return self.memory_dim + self.stochastic_dim

    def check_acts(self) -> None:
        """Raises an `AimeGymError` for a likelihood model, which knows no actions: it observes and scores alone."""
        if not self.action_dim:
            raise AimeGymError(
                f"This model of {self.embodiment} knows no actions: it is a likelihood model, which observes and "
                "scores (`observe`, `evidence`) and is neither dreamt in nor imitated with. Take a world model."
            )

    @classmethod
    def for_embodiment(cls, embodiment: Embodiment, setup: str, cell: str = "rssm", **overrides: Any) -> ModelConfig:
        """The released defaults of either cell for a body.

        Args:
            embodiment: The body.
            setup: ``"mdp"``, ``"lpomdp"`` or ``"visual"``.
            cell: ``"rssm"`` or ``"rssmo"``.
            **overrides: Fields to set otherwise.

        Raises:
            AimeGymError: If a name is unknown or values do not fit together.
        """
        if cell not in DEFAULTS:
            raise unknown_name("cell", cell, DEFAULTS)
        body: dict[str, Any] = {
            "embodiment": embodiment.name,
            "setup": canonical_setup(setup),
            "sensors": embodiment.sensors,
            "has_image": embodiment.has_image or not embodiment.foreign,
            "action_dim": embodiment.action_dim,
            "action_repeat": embodiment.action_repeat,
            "episode_steps": embodiment.episode_steps if embodiment.foreign else None,
            "logged_range": embodiment.logged_range,
            "choices": embodiment.choices,
            "cell": cell,
        }
        return cls(**(body | DEFAULTS[cell] | overrides))


def _kind(sensor: str) -> str:
    return "visual" if sensor == "image" else "tabular"


def _check_net(path: str, net: NetConfig | None, known: tuple[str, ...]) -> None:
    if net is None:
        raise AimeGymError(f"world_model.{path} is missing: the setup needs it.")
    if net.name not in known:
        raise unknown_name(f"world_model.{path}.name", net.name, known)
    if net.hidden_activation not in ACTIVATIONS[2]:
        raise unknown_name(f"world_model.{path}.hidden_activation", net.hidden_activation, ACTIVATIONS[2])
    if net.norm not in (None, "ln"):
        raise unknown_name(f"world_model.{path}.norm", net.norm, ["ln"])


_CNN = NetConfig("cnn_ha")

_DREAMER = NetConfig("dmlp", 512, 2, "swish", "ln")

DEFAULTS: dict[str, dict[str, Any]] = {
    "rssm": {
        "memory_dim": 512,
        "stochastic_dim": 128,
        "hidden_size": 128,
        "hidden_layers": 2,
        "norm": None,
        "min_std": MIN_STD,
        "encoders": {"tabular": NetConfig("identity"), "visual": _CNN},
        "decoders": {"tabular": NetConfig("smlp"), "visual": _CNN},
        "probes": {"tabular": NetConfig("dmlp"), "visual": _CNN},
        "nll_reweight": "dim_wise",
        "idm_mode": "detach",
    },
    "rssmo": {
        "memory_dim": 512,
        "stochastic_dim": 30,
        "hidden_size": 512,
        "hidden_layers": 2,
        "norm": "ln",
        "min_std": 0.1,
        "encoders": {"tabular": replace(_DREAMER, name="mlp", have_head=False), "visual": _CNN},
        "decoders": {"tabular": _DREAMER, "visual": _CNN},
        "probes": {"tabular": _DREAMER, "visual": _CNN},
        "free_nats": 1.0,
        "kl_rebalance": 0.8,
        "idm_mode": "detach",
    },
}
"""What the released configs leave out, by cell."""


def check_observations(
    config: ModelConfig, observations: Mapping[str, Tensor], names: Iterable[str], finite: bool = False
) -> None:
    """Checks that sensors are there, are float tensors of the right dims, and agree in time and batch.

    Args:
        config: The config of the model.
        observations: Name -> [..., D]; images [..., 3, H, W].
        names: Names of the sensors that are needed.
        finite: Whether to look for NaN and infinities too.

    Raises:
        AimeGymError: If not; names the sensor.
    """
    names = tuple(names)
    if not isinstance(observations, Mapping):
        raise AimeGymError(f"Expected observations by name ({', '.join(names)}), got {type(observations).__name__}.")
    missing = [name for name in names if name not in observations]
    if missing:
        raise AimeGymError(
            f"The {config.setup} model of {config.embodiment} needs {', '.join(missing)}; "
            f"got {', '.join(observations) or 'nothing'}."
        )
    leading = None
    for name in names:
        value = observations[name]
        _check_tensor(name, value)
        expected = "[..., 3, height, width]" if name == "image" else f"[..., {config.dims[name]}]"
        good = value.ndim >= 4 and value.shape[-3] == 3 if name == "image" else value.shape[-1:] == (config.dims[name],)
        if not good:
            raise AimeGymError(f"{name}: expected shape {expected} for {config.embodiment}, got {list(value.shape)}.")
        shape = value.shape[: -3 if name == "image" else -1]
        if leading is not None and shape != leading:
            raise AimeGymError(
                f"{name} has leading shape {list(shape)}, {names[0]} has {list(leading)}; expected the same."
            )
        leading = shape
        if finite:
            _check_finite(name, value)


def check_actions(
    config: ModelConfig, actions: Tensor | None, observations: Mapping[str, Tensor] | None = None, finite: bool = False
) -> tuple[int, int]:
    """Checks that actions are [T, B, A] and fit the observations; returns T and B.

    Raises:
        AimeGymError: If not.
    """
    if actions is None:
        raise AimeGymError("The batch lacks pre_action, the actions that led to the observations.")
    _check_tensor("actions", actions)
    if actions.ndim != 3 or actions.shape[-1] != config.action_dim or not len(actions) or not actions.shape[1]:
        raise AimeGymError(
            f"actions: expected shape [time, batch, {config.action_dim}] for {config.embodiment}, "
            f"got {list(actions.shape)}."
        )
    steps, batch = actions.shape[:2]
    if observations is not None:
        first = config.observed[0]
        leading = observations[first].shape[: -3 if first == "image" else -1]
        if tuple(leading) != (steps, batch):
            raise AimeGymError(
                f"actions are [time {steps}, batch {batch}, ...], {first} is {list(leading)} before its own dims; "
                "expected the same."
            )
    if finite:
        _check_finite("actions", actions)
    return steps, batch


def check_state(config: ModelConfig, state: Tensor, batch: int) -> Tensor:
    """Checks that a state is [B, F] and finite, and returns it.

    Raises:
        AimeGymError: If not.
    """
    _check_tensor("state", state)
    if state.shape != (batch, config.feature_dim):
        raise AimeGymError(f"state: expected shape [{batch}, {config.feature_dim}], got {list(state.shape)}.")
    _check_finite("state", state)
    return state


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise AimeGymError(f"{name}: expected a torch tensor, got {type(value).__name__}; `torch.as_tensor` makes one.")
    if not value.dtype.is_floating_point:
        hint = "; images are channels first and divided by 255" if value.dtype == torch.uint8 else ""
        raise AimeGymError(f"{name}: expected floating-point values, got {value.dtype}{hint}.")


def _check_finite(name: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise AimeGymError(
            f"{name} holds values that are not finite, first at {(~value.isfinite()).nonzero()[0].tolist()}."
        )
