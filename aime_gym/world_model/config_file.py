"""`config.yaml`: what a world model is made of, released or this project's own, checked as it is read."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
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
from aime_gym.bodies.sensors import Rendering
from aime_gym.errors import AimeGymError, Section, is_integer, unknown_name
from aime_gym.files import check_digest, reason, write_atomically
from aime_gym.world_model.config import (
    ACTIVATIONS,
    DEFAULTS,
    MIN_STD,
    REWARDS,
    IDMMode,
    ModelConfig,
    NetConfig,
    Reweighting,
)

FORMAT = "aime_gym/1"
"""The `format` of configs that this project writes; released AIME configs have none."""

_KINDS = ("tabular", "visual")

Names = Callable[[], Iterable[str]]
"""Gives the names of a model's weights."""


def config_from_yaml(path: str | Path, names: Names = tuple) -> ModelConfig:
    """Reads a `config.yaml`, released or this project's own.

    The scripts of the originals (train_model, Dreamer, Plan2Explore, AIME, and those of AIME-v2 and AIME-NoB) write all
    their settings into one file. What describes the model is read strictly, ``world_model`` and ``env.sensors`` above
    all; the rest is passed over. In a file of this project everything is known.

    Args:
        path: The file (OmegaConf YAML). Where a value matters, what it says of another one, as in
            ``${env.task}``, is filled in; resolvers, as in ``${oc.env:HOME}``, are refused: they read the machine.
        names: Names of the weights, which are asked for where the model is a released one of AIME-v2: its file does not
            say whether a surrogate reward is decoded, nor always whether there are probes.

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
        return _parse({key: _resolved(value, content) for key, value in _described(content).items()}, names)
    except AimeGymError as error:
        raise AimeGymError(f"{path}: {error}") from error


def config_to_yaml(config: ModelConfig, path: str | Path) -> None:
    """Writes a config so that `config_from_yaml` gives it back.

    Args:
        config: What to write.
        path: Where; an existing file is replaced.

    Raises:
        OSError: If the disk is full.
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
        sensors["image"] |= {"rendering": config.rendering} if config.rendering != "full" else {}
    nets = {part: {kind: asdict(net) for kind, net in getattr(config, part).items()} for part in _NETS}
    ensemble = dict(zip(_ENSEMBLE, config.ensemble, strict=True)) if config.ensemble else None
    plain = ("nll_reweight", "kl_scale", "free_nats", "kl_rebalance", "idm_mode", "standardise")
    extras = {name: getattr(config, name) for name in ("reward", "use_terminal", "deterministic")}
    groups = [config.stochastic_dim // config.classes, config.classes] if config.classes else [config.stochastic_dim]
    return {
        "format": FORMAT,
        **({"version": config.version} if config.version > 1 else {}),
        "environment_setup": config.setup,
        "use_reward": config.use_reward,
        **{key: value for key, value in extras.items() if config.version > 1 or value not in ("reward", False)},
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
            "state_dim": [config.memory_dim, *groups],
            **({"state_distribution": "discrete"} if config.classes else {}),
            **{key: getattr(config, key) for key in ("hidden_size", "hidden_layers", "norm", "min_std", *plain)},
            "intrinsic_reward_config": ensemble,
            **nets,
        },
        "policy": asdict(config.policy) if config.policy else None,
    }


_NETS = ("encoders", "decoders", "probes")

_ENSEMBLE = ("num_ensembles", "hidden_size", "hidden_layers")

_NET_KEYS = tuple(f.name for f in fields(NetConfig))

_TOP_KEYS = ("version", "environment_setup", "use_reward", "use_terminal", "world_model", "env", "policy")
_OWN_KEYS, _V2_KEYS = ("format", "reward", "deterministic"), ("use_probe", "action_free")
"""More of them, in files of this project and in those of AIME-v2."""

_ENV_KEYS = ("embodiment", "action_repeat", "action_dim", "choices", "sensors", "episode_steps", "logged_range")

_MODEL_KEYS = (
    *("name", "state_dim", "hidden_size", "hidden_layers", "norm", "min_std", "nll_reweight", "idm_mode", "kl_scale"),
    *("free_nats", "kl_rebalance", "intrinsic_reward_config", "standardise", *_NETS),
)

_MODEL_KEYS_V2 = ("state_distribution", "predict_emb", "momentum_parameter", "optimizor")
"""More of them; the last two say how a model was trained."""

_ENSEMBLE_KEYS_V2 = ("algo", "scale", "use_probe")

_META_WORLD = {"sawyer": {"dims": {"state": 39}, "action_dim": 4, "control_steps": 200}}
"""What AIME-v2's files do not say of the one body outside the suite."""

_GROUPS = 32, 32
"""One-hot groups and their classes where a discrete model's file does not say."""

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
    v2 = content.get("version") is not None
    described = {key: content[key] for key in (*_TOP_KEYS, *(_V2_KEYS if v2 else ())) if key in content}
    for key, known in (("env", (*_ENV_KEYS, "size")), ("policy", _NET_KEYS)):
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


def _parse(document: dict[str, Any], names: Names = tuple) -> ModelConfig:
    own = document.get("format") is not None
    keys = (*_TOP_KEYS, *(_OWN_KEYS if own else _V2_KEYS))
    top = Section("", document, keys, required=("environment_setup", "world_model", "env"))
    if top.content.get("format") not in (None, FORMAT):
        raise unknown_name("format", top.content["format"], [FORMAT])
    version = _version(top, own)
    env = Section("env", top.content["env"], (*_ENV_KEYS, "size"), required=("embodiment", "sensors"))
    model_keys = (*_MODEL_KEYS, *(_MODEL_KEYS_V2 if version == 2 else ()))
    model = Section("world_model", top.content["world_model"], model_keys, required=("name", "encoders", "decoders"))
    cell = model.choice("name", tuple(DEFAULTS))
    default = DEFAULTS[cell]
    if env.content.get("size", [64, 64]) != [64, 64]:
        raise AimeGymError(f"env.size: expected images of [64, 64], got {env.content['size']!r:.80}.")
    if model.flag("predict_emb"):
        raise AimeGymError("world_model.predict_emb: models that predict embeddings of a momentum encoder are unknown.")

    name = str(env.content["embodiment"])
    outside: dict[str, Any] = _META_WORLD.get(name, {}) if version == 2 and not own else {}
    known = name in EMBODIMENTS or not ("action_dim" in env.content or outside)
    body = get_embodiment(name, imports=False) if known else None
    sensors, rendering = _sensors(env, body, outside.get("dims", {}))
    action_repeat = env.integer("action_repeat", body.action_repeat if body else 2)
    steps = outside["control_steps"] // action_repeat if outside else None
    memory_dim, stochastic_dim, classes = _state_dim(model, default, version)
    if model.content.get("idm_mode") in _END_TO_END:
        model.content["idm_mode"] = "end2end"
    policy = top.content.get("policy")
    rebalance = model.content.get("kl_rebalance", default.get("kl_rebalance"))
    decoders, probes = (_nets(part, model.content.get(part) or {}, version) for part in ("decoders", "probes"))
    use_reward, use_terminal = top.flag("use_reward"), top.flag("use_terminal", version == 2)
    reward = top.choice("reward", REWARDS, "reward")
    if version == 2 and not own:
        parts = {".".join(weight.split(".")[:2]) for weight in names()}
        if surrogate := next((each for each in REWARDS[1:] if f"decoders.{each}" in parts), None):
            reward, use_reward = surrogate, True
        there = any(part.startswith(("probes.", "baseline_probes.")) for part in parts)
        probes = probes if top.flag("use_probe", there) else {}
    if use_terminal:
        decoders.setdefault("binary", NetConfig("binary"))
    return ModelConfig(
        embodiment=body.name if body else name,
        setup=canonical_setup(str(top.content["environment_setup"])),
        sensors=tuple(sensors),
        has_image=rendering is not None,
        rendering=rendering or "full",
        action_dim=_action_dim(top, env, version, body.action_dim if body else outside.get("action_dim")),
        action_repeat=action_repeat,
        cell=cell,  # type: ignore[arg-type]
        memory_dim=memory_dim,
        stochastic_dim=stochastic_dim,
        hidden_size=model.integer("hidden_size", default["hidden_size"]),
        hidden_layers=model.integer("hidden_layers", default["hidden_layers"], 0, _MOST_LAYERS),
        norm=_norm(model, default["norm"]),
        min_std=MIN_STD if model.is_null("min_std") else model.number("min_std", default["min_std"]),
        encoders=_nets("encoders", model.content["encoders"], version),
        decoders=decoders,
        probes=probes,
        version=version,
        classes=classes,
        nll_reweight=model.choice("nll_reweight", get_args(Reweighting), default.get("nll_reweight", "none")),
        kl_scale=model.number("kl_scale", 1.0),
        free_nats=0.0 if model.is_null("free_nats") else model.number("free_nats", default.get("free_nats", 0.0)),
        kl_rebalance=None if rebalance is None else model.number("kl_rebalance", rebalance, high=1.0),
        idm_mode=model.choice("idm_mode", get_args(IDMMode), default["idm_mode"]),  # type: ignore[arg-type]
        use_reward=use_reward,
        reward=reward,
        use_terminal=use_terminal,
        deterministic=top.flag("deterministic"),
        ensemble=_ensemble(model, version),
        standardise=model.flag("standardise"),
        policy=None if policy is None else _net("policy", policy, version, name="tanh_gaussian"),
        episode_steps=env.integer("episode_steps", 1) if "episode_steps" in env.content else steps,
        logged_range=action_range(env.content.get("logged_range")),
        choices=read_choices(env, body),
    )


def _version(top: Section, own: bool) -> int:
    """Which original a model is of: 1 for AIME, 2 for AIME-v2 and AIME-NoB."""
    if top.content.get("version") is None:
        return 1
    if own:
        return top.integer("version", 1, high=2)
    told = Section("version", top.content["version"], None).content.get("version")
    if isinstance(told, bool) or told != 2:
        raise AimeGymError(f"version.version: expected 2.0, for AIME-v2 or AIME-NoB; got {told!r:.80}.")
    return 2


def _state_dim(model: Section, default: Mapping[str, Any], version: int) -> tuple[int, int, int]:
    """Sizes of memory and latent, and the classes of one-hot groups, 0 for normals."""
    kinds = ("continuous", "discrete")
    discrete = version == 2 and model.choice("state_distribution", kinds, "continuous") == "discrete"
    usual = [default["memory_dim"], *(_GROUPS if discrete else (default["stochastic_dim"],))]
    sizes = model.content.get("state_dim", usual)
    if not (isinstance(sizes, list) and len(sizes) == len(usual) and all(is_integer(d, 1) for d in sizes)):
        expected = "memory, groups, classes], three" if discrete else "memory, stochastic], two"
        raise AimeGymError(f"world_model.state_dim: expected [{expected} positive integers; got {sizes!r:.80}.")
    latent = math.prod(sizes[1:])
    if not is_integer(latent, 1):
        raise AimeGymError(f"world_model.state_dim: {sizes} are too many classes.")
    return sizes[0], latent, sizes[2] if discrete else 0


def _action_dim(top: Section, env: Section, version: int, default: int | None) -> int:
    """How many numbers an action has; none in a likelihood model."""
    if top.flag("action_free"):
        return 0
    return env.integer("action_dim", default, 0 if version == 2 else 1)


def _ensemble(model: Section, version: int) -> tuple[int, int, int] | None:
    """The embedding predictors of Plan2Explore, if there are some."""
    content = model.content.get("intrinsic_reward_config")
    if content is None or (version == 2 and not content):
        return None
    path = "world_model.intrinsic_reward_config"
    section = Section(path, content, (*_ENSEMBLE, *(_ENSEMBLE_KEYS_V2 if version == 2 else ())))
    section.choice("algo", ("disagreement",), "disagreement")
    if section.flag("use_probe"):
        raise AimeGymError(f"{path}.use_probe: an ensemble with a head for probes is unknown.")
    return (
        section.integer(_ENSEMBLE[0], 5, high=_MOST_MEMBERS),
        section.integer(_ENSEMBLE[1], 128),
        section.integer(_ENSEMBLE[2], 2, 0, _MOST_LAYERS),
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


def _sensors(env: Section, body: Embodiment | None, dims: Mapping[str, int]) -> tuple[list[Sensor], Rendering | None]:
    """Tabular sensors in order, and how images are drawn if there are any; dims may be those of no known body."""
    dims = {sensor.name: sensor.dim for sensor in body.sensors} if body else dims
    content = Section("env.sensors", env.content["sensors"], None).content
    if len(content) > _MOST_SENSORS:
        raise AimeGymError(f"env.sensors: expected at most {_MOST_SENSORS}, got {len(content)}.")
    sensors, rendering = list[Sensor](), None
    for name, told in content.items():
        own = Section(
            f"env.sensors.{name}", told, ("modility", "order", "dim", "rotations", "choices", "type", "rendering")
        )
        if own.choice("modility", _KINDS, "tabular") == "visual":
            if name != "image":
                raise unknown_name("visual sensor", name, ["image"])
            rendering = own.choice("rendering", get_args(Rendering), "full")
            continue
        if "dim" not in own.content and name not in dims:
            raise unknown_name(f"sensor of {env.content['embodiment']} (it has no dim)", name, dims)
        order = own.choice("order", ("first", "second"), "first")
        dim, rotations = own.integer("dim", dims.get(name)), tuple(own.integers("rotations"))
        sensors.append(Sensor(name, dim, order, rotations, read_choices(own)))  # type: ignore[arg-type]
    return sensors, rendering  # type: ignore[return-value]


def _nets(part: str, content: Any, version: int) -> dict[str, NetConfig]:
    kinds = (*_KINDS, *(("binary",) if version == 2 else ()))
    section = Section(f"world_model.{part}", content, kinds)
    nets = {kind: net for kind, net in section.content.items() if net is not None}
    return {kind: _net(f"world_model.{part}.{kind}", net, version) for kind, net in nets.items()}


def _net(path: str, content: Any, version: int, name: str | None = None) -> NetConfig:
    known = (*_NET_KEYS, *(("blocks",) if version == 2 else ()))
    section = Section(path, content, known, required=() if name else ("name",))
    default = NetConfig(str(section.content.get("name", name)))
    section.integer("blocks", 0, 0, 0)
    return NetConfig(
        default.name,
        section.integer("hidden_size", default.hidden_size),
        section.integer("hidden_layers", default.hidden_layers, 0, _MOST_LAYERS),
        section.choice("hidden_activation", ACTIVATIONS[version], default.hidden_activation),
        _norm(section, None),
        section.flag("have_head", True),
        section.integer("width", default.width),
        section.number("min_std", default.min_std),
        section.flag("sigmoid", default.name != "dreamer_resnet"),
    )


def _norm(section: Section, default: str | None) -> str | None:
    norm = section.choice("norm", ("ln", "none"), "none" if section.is_null("norm") else default or "none")
    return None if norm == "none" else norm
