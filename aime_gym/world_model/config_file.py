"""`config.yaml`: what a world model is made of, released or this project's own, checked as it is read."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aime_gym.bodies.body import (
    EMBODIMENTS,
    MOST_OPTIONS,
    ChoiceKind,
    Choices,
    Embodiment,
    Sensor,
    action_range,
    canonical_setup,
)
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.files import check_digest, reason, write_atomically
from aime_gym.world_model.config import ACTIVATIONS, DEFAULTS, MIN_STD, IDMMode, ModelConfig, NetConfig, Reweighting

LARGEST = 1_000_000
"""The largest size: far more than any model has, and too little to take long."""

_LONGEST = 200
"""Letters of a text, or entries of a list."""


class Section:
    """A mapping of a config; a value that is null or absent is the default.

    Args:
        path: Where the section is, for messages; empty at the top.
        content: Keys and values.
        known: The keys that may occur; None allows all.
        required: The keys that must.

    Raises:
        AimeGymError: If `content` is no mapping, or a key is unknown or missing; so do all readers for bad values.
    """

    def __init__(self, path: str, content: Any, known: Iterable[str] | None, required: Iterable[str] = ()):
        if not isinstance(content, Mapping):
            raise AimeGymError(f"{path or 'config'}: expected keys and values, got {content!r:.80}.")
        self.path, self.content = path, {str(key): value for key, value in content.items()}
        for key in self.content:
            if known is not None and key not in known:
                raise unknown_name("key", self._at(key), sorted(known))
        for key in required:
            if self.content.get(key) is None:
                raise AimeGymError(f"The key {self._at(key)} is missing.")

    def is_null(self, key: str) -> bool:
        """Whether the key is there and set to null."""
        return key in self.content and self.content[key] is None

    def integer(self, key: str, default: int | None, low: int = 1, high: int = LARGEST) -> int:
        """An integer from `low` to `high`."""
        value = self._value(key, default)
        good = is_integer(value, low) and value <= high
        return value if good else self._fail(key, f"an integer from {low} to {high}", value)

    def number(self, key: str, default: float, high: float = 1e9) -> float:
        """A number from 0 to `high`."""
        value = self._value(key, default)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if good and 0 <= value <= high else self._fail(key, f"a number from 0 to {high:g}", value)

    def choice(self, key: str, known: tuple[str, ...], default: str | None = None) -> Any:
        """One of `known`."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in known:
            raise unknown_name(self._at(key), value, known)
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self._value(key, default)
        return value if isinstance(value, bool) else self._fail(key, "true or false", value)

    def text(self, key: str) -> str:
        """A short text, which must be there."""
        return self._text(key, self.content.get(key))

    def texts(self, key: str) -> list[str]:
        """A list of different short texts."""
        values = self._list(key)
        texts = [self._text(key, value) for value in values]
        return texts if len(set(texts)) == len(texts) else self._fail(key, "different names", values)

    def integers(self, key: str, low: int = 0) -> list[int]:
        """A list of integers of at least `low`."""
        values = self._list(key)
        good = all(is_integer(value, low) for value in values)
        return values if good else self._fail(key, f"integers of at least {low}", values)

    def _text(self, key: str, value: Any) -> str:
        good = isinstance(value, str) and 0 < len(value) <= _LONGEST
        return value if good else self._fail(key, "a short text", value)

    def _list(self, key: str) -> list[Any]:
        value = self._value(key, [])
        good = isinstance(value, list) and len(value) <= _LONGEST
        return value if good else self._fail(key, f"a list of at most {_LONGEST}", value)

    def _value(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        return default if value is None else value

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _fail(self, key: str, expected: str, value: object) -> Any:
        raise AimeGymError(f"{self._at(key)}: expected {expected}, got {value!r:.80}.")


def is_integer(value: object, low: int) -> bool:
    """Whether a value is an integer of at least `low` and of a sane size."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= LARGEST


FORMAT = "aime_gym/1"
"""The `format` of configs that this project writes; released AIME configs have none."""

_KINDS = ("tabular", "visual")


def config_from_yaml(path: str | Path) -> ModelConfig:
    """Reads a `config.yaml`, released or this project's own.

    The scripts of the original (train_model, Dreamer, Plan2Explore, AIME) write all their settings into one file. What
    describes the model is read strictly, ``world_model`` and ``env.sensors`` above all; the rest is passed over. In a
    file of this project everything is known.

    Args:
        path: The file (OmegaConf YAML). Where a value matters, what it says of another one, as in
            ``${env.task}``, is filled in; resolvers, as in ``${oc.env:HOME}``, are refused: they read the machine.

    Raises:
        AimeGymError: If the file cannot be read, is not the one that was saved (see `aime_gym.files`), or holds a key
            or value that is not understood; names it.
    """
    check_digest(Path(path))
    try:
        content = _load(Path(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise AimeGymError(f"Cannot read {path} as a model config: {reason(error)}") from error
    try:
        return _parse({key: _resolved(value, content) for key, value in _described(content).items()})
    except AimeGymError as error:
        raise AimeGymError(f"{path}: {error}") from error


def config_to_yaml(config: ModelConfig, path: str | Path) -> None:
    """Writes a config so that `config_from_yaml` gives it back.

    Args:
        config: What to write.
        path: Where; an existing file is replaced.

    Raises:
        AimeGymError: If the disk is full.
    """
    write_atomically(path, yaml.safe_dump(_document(config), sort_keys=False))


def checked_config(config: ModelConfig) -> ModelConfig:
    """The config as it will be read again, after all checks of a file.

    Raises:
        AimeGymError: If a value is not allowed; names it.
    """
    return _parse(_document(config))


def _document(config: ModelConfig) -> dict[str, Any]:
    sensors: dict[str, Any] = {
        s.name: {
            "modility": "tabular",
            "order": s.order,
            "dim": s.dim,
            **({"rotations": list(s.rotations)} if s.rotations else {}),
            **({"choices": choices_document(s.choices)} if s.choices else {}),
        }
        for s in config.sensors
    }
    if config.has_image:
        sensors["image"] = {"modility": "visual", "order": "first"}
    nets = {part: {kind: asdict(net) for kind, net in getattr(config, part).items()} for part in _NETS}
    ensemble = dict(zip(_ENSEMBLE, config.ensemble, strict=True)) if config.ensemble else None
    plain = ("nll_reweight", "kl_scale", "free_nats", "kl_rebalance", "idm_mode", "standardise")
    return {
        "format": FORMAT,
        "environment_setup": config.setup,
        "use_reward": config.use_reward,
        "env": {
            "embodiment": config.embodiment,
            "action_repeat": config.action_repeat,
            "action_dim": config.action_dim,
            **({"episode_steps": config.episode_steps} if config.episode_steps else {}),
            **({"logged_range": [list(end) for end in config.logged_range]} if config.logged_range else {}),
            **({"choices": choices_document(config.choices)} if config.choices else {}),
            "sensors": sensors,
        },
        "world_model": {
            "name": config.cell,
            "state_dim": [config.memory_dim, config.stochastic_dim],
            **{key: getattr(config, key) for key in ("hidden_size", "hidden_layers", "norm", "min_std", *plain)},
            "intrinsic_reward_config": ensemble,
            **nets,
        },
        "policy": asdict(config.policy) if config.policy else None,
    }


_NETS = ("encoders", "decoders", "probes")

_ENSEMBLE = ("num_ensembles", "hidden_size", "hidden_layers")

_NET_KEYS = tuple(f.name for f in fields(NetConfig))

_TOP_KEYS = ("format", "version", "environment_setup", "use_reward", "world_model", "env", "policy")

_ENV_KEYS = ("embodiment", "action_repeat", "action_dim", "choices", "sensors", "episode_steps", "logged_range")

_MODEL_KEYS = (
    *("name", "state_dim", "hidden_size", "hidden_layers", "norm", "min_std", "nll_reweight", "idm_mode", "kl_scale"),
    *("free_nats", "kl_rebalance", "intrinsic_reward_config", "standardise", *_NETS),
)

_END_TO_END = ("end2end", "end_to_end", "end-to-end")

_LARGEST_FILE = 100_000

_DEEPEST = 16

_LONGEST_VALUE = 200

_MOST_LAYERS, _MOST_MEMBERS, _MOST_SENSORS = 32, 64, 200
"""Each costs time and memory before a weight is read."""

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def _load(path: Path) -> dict[str, Any]:
    """What the file says, before anything is filled in.

    Raises:
        ValueError: If it is no mapping, or could take more memory than it has bytes.
    """
    with open(path, "rb") as file:
        text = file.read(_LARGEST_FILE + 1).decode()
    if len(text) > _LARGEST_FILE:
        raise ValueError(f"it is longer than {_LARGEST_FILE} bytes.")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
            raise ValueError(f"expected no YAML aliases and at most {_DEEPEST} levels.")
    content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    if not isinstance(content, dict):
        raise ValueError("expected keys and values.")
    return {str(key): value for key, value in content.items()}


def _described(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of the model: all of one that this project wrote, the keys that matter of another one."""
    if "format" in content:
        return dict(content)
    described = {key: content[key] for key in _TOP_KEYS if key in content}
    for key, known in (("env", _ENV_KEYS), ("policy", _NET_KEYS)):
        if isinstance(described.get(key), Mapping):
            described[key] = {name: value for name, value in described[key].items() if name in known}
    return described


def _resolved(value: Any, document: Mapping[str, Any]) -> Any:
    """A value with what it says of others filled in."""
    if isinstance(value, dict):
        return {key: _resolved(part, document) for key, part in value.items()}
    if isinstance(value, list):
        return [_resolved(part, document) for part in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    if "${" in _REFERENCE.sub("", value):
        raise AimeGymError(f"{value!r:.80}: only ${{the.name}} of a plain value is filled in. Write the value itself.")
    if whole := _REFERENCE.fullmatch(value):
        return _referred(whole[1], document)
    return _REFERENCE.sub(lambda match: str(_referred(match[1], document)), value)


def _referred(name: str, document: Mapping[str, Any]) -> Any:
    value: Any = document
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, Mapping | list) or "${" in str(value) or len(str(value)) > _LONGEST_VALUE:
        raise AimeGymError(
            f"${{{name:.80}}} stands for {value!r:.80}, not for a plain value of the file. Write that itself."
        )
    return value


def _parse(document: dict[str, Any]) -> ModelConfig:
    top = Section("", document, _TOP_KEYS, required=("environment_setup", "world_model", "env"))
    if top.content.get("version") is not None:
        raise AimeGymError(
            "This is a model of AIME-v2 (the config has a `version`), which computes other numbers and cannot be read "
            "here; give a model of the first AIME or of this project."
        )
    if top.content.get("format") not in (None, FORMAT):
        raise unknown_name("format", top.content["format"], [FORMAT])
    env = Section("env", top.content["env"], _ENV_KEYS, required=("embodiment", "sensors"))
    model = Section("world_model", top.content["world_model"], _MODEL_KEYS, required=("name", "encoders", "decoders"))
    cell = model.choice("name", tuple(DEFAULTS))
    default = DEFAULTS[cell]

    name = str(env.content["embodiment"])
    body = get_embodiment(name, imports=False) if "action_dim" not in env.content or name in EMBODIMENTS else None
    sensors, has_image = _sensors(env, body)
    state_dim = model.content.get("state_dim", [default["memory_dim"], default["stochastic_dim"]])
    if not (isinstance(state_dim, list) and len(state_dim) == 2 and all(is_integer(d, 1) for d in state_dim)):
        raise AimeGymError(
            f"world_model.state_dim: expected [memory, stochastic], two positive integers; got {state_dim!r}."
        )
    ensemble = None
    if model.content.get("intrinsic_reward_config") is not None:
        section = Section("world_model.intrinsic_reward_config", model.content["intrinsic_reward_config"], _ENSEMBLE)
        ensemble = (
            section.integer(_ENSEMBLE[0], 5, high=_MOST_MEMBERS),
            section.integer(_ENSEMBLE[1], 128),
            section.integer(_ENSEMBLE[2], 2, 0, _MOST_LAYERS),
        )
    if model.content.get("idm_mode") in _END_TO_END:
        model.content["idm_mode"] = "end2end"
    policy = top.content.get("policy")
    rebalance = model.content.get("kl_rebalance", default.get("kl_rebalance"))
    return ModelConfig(
        embodiment=body.name if body else name,
        setup=canonical_setup(str(top.content["environment_setup"])),
        sensors=sensors,
        has_image=has_image,
        action_dim=env.integer("action_dim", body.action_dim if body else None),
        action_repeat=env.integer("action_repeat", body.action_repeat if body else 2),
        cell=cell,  # type: ignore[arg-type]
        memory_dim=state_dim[0],
        stochastic_dim=state_dim[1],
        hidden_size=model.integer("hidden_size", default["hidden_size"]),
        hidden_layers=model.integer("hidden_layers", default["hidden_layers"], 0, _MOST_LAYERS),
        norm=_norm(model, default["norm"]),
        min_std=MIN_STD if model.is_null("min_std") else model.number("min_std", default["min_std"]),
        encoders=_nets("encoders", model.content["encoders"]),
        decoders=_nets("decoders", model.content["decoders"]),
        probes=_nets("probes", model.content.get("probes") or {}),
        nll_reweight=model.choice("nll_reweight", get_args(Reweighting), default.get("nll_reweight", "none")),
        kl_scale=model.number("kl_scale", 1.0),
        free_nats=0.0 if model.is_null("free_nats") else model.number("free_nats", default.get("free_nats", 0.0)),
        kl_rebalance=None if rebalance is None else model.number("kl_rebalance", rebalance, high=1.0),
        idm_mode=model.choice("idm_mode", get_args(IDMMode), default["idm_mode"]),  # type: ignore[arg-type]
        use_reward=top.flag("use_reward"),
        ensemble=ensemble,
        standardise=model.flag("standardise"),
        policy=None if policy is None else _net("policy", policy, name="tanh_gaussian"),
        episode_steps=env.integer("episode_steps", 1) if "episode_steps" in env.content else None,
        logged_range=action_range(env.content.get("logged_range")),
        choices=read_choices(env, body),
    )


def choices_document(choices: Choices) -> dict[str, Any]:
    """What a file says of choices: how many there are with so many options each, one after another."""
    groups = [[len(list(same)), count] for count, same in itertools.groupby(choices.counts)]
    return {"kind": choices.kind, "numbers": [own for own, _ in groups], "options": [count for _, count in groups]}


def read_choices(section: Section, body: Embodiment | None = None) -> Choices | None:
    """The choices that a section tells of, if it does; else those of a known body."""
    if section.content.get("choices") is None:
        return body.choices if body else None
    own = Section(f"{section.path}.choices", section.content["choices"], ("kind", "numbers", "options"))
    numbers, options = own.integers("numbers", low=1), own.integers("options", low=1)
    if len(numbers) != len(options) or sum(numbers) > MOST_OPTIONS:
        raise AimeGymError(
            f"{own.path}: expected as many numbers as options, at most {MOST_OPTIONS} in all; got {numbers!s:.80} and "
            f"{options!s:.80}."
        )
    counts = [count for number, count in zip(numbers, options, strict=True) for _ in range(number)]
    return Choices(own.choice("kind", get_args(ChoiceKind)), tuple(counts))


def _sensors(env: Section, body: Embodiment | None) -> tuple[tuple[Sensor, ...], bool]:
    """Tabular sensors in the config's order, and whether there is an image."""
    dims = {sensor.name: sensor.dim for sensor in body.sensors} if body else {}
    content = Section("env.sensors", env.content["sensors"], None).content
    if len(content) > _MOST_SENSORS:
        raise AimeGymError(f"env.sensors: expected at most {_MOST_SENSORS}, got {len(content)}.")
    sensors, has_image = [], False
    for name, entry in content.items():
        section = Section(f"env.sensors.{name}", entry, ("modility", "order", "dim", "rotations", "choices"))
        if section.choice("modility", _KINDS, "tabular") == "visual":
            if name != "image":
                raise unknown_name("visual sensor", name, ["image"])
            has_image = True
            continue
        if "dim" not in section.content and name not in dims:
            raise unknown_name(f"sensor of {env.content['embodiment']} (it has no dim)", name, dims)
        order = section.choice("order", ("first", "second"), "first")
        dim, rotations = section.integer("dim", dims.get(name)), tuple(section.integers("rotations"))
        sensors.append(Sensor(name, dim, order, rotations, read_choices(section)))  # type: ignore[arg-type]
    return tuple(sensors), has_image


def _nets(part: str, content: Any) -> dict[str, NetConfig]:
    section = Section(f"world_model.{part}", content, _KINDS)
    return {kind: _net(f"world_model.{part}.{kind}", net) for kind, net in section.content.items() if net is not None}


def _net(path: str, content: Any, name: str | None = None) -> NetConfig:
    section = Section(path, content, _NET_KEYS, required=() if name else ("name",))
    default = NetConfig(str(section.content.get("name", name)))
    return NetConfig(
        default.name,
        section.integer("hidden_size", default.hidden_size),
        section.integer("hidden_layers", default.hidden_layers, 0, _MOST_LAYERS),
        section.choice("hidden_activation", ACTIVATIONS, default.hidden_activation),
        _norm(section, None),
        section.flag("have_head", True),
        section.integer("width", default.width),
        section.number("min_std", default.min_std),
    )


def _norm(section: Section, default: str | None) -> str | None:
    norm = section.choice("norm", ("ln", "none"), "none" if section.is_null("norm") else default or "none")
    return None if norm == "none" else norm
