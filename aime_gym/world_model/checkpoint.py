"""World models as folders: bundled ones, this project's own, and those that AIME and AIME-v2 released.

A released folder holds `config.yaml`, `model.pt` and, for an agent, `policy.pt`. Ours hold `config.yaml`,
`model.safetensors`, `digests.json`, `revision.json` and, as may be, `heads.safetensors`, `starts.npz`, `scores.json`
and a card. Weights have the same names in both; every name, shape and number is checked.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.files import (
    Revision,
    check_archive,
    check_digest,
    count_revision,
    parse_json,
    read_npz,
    read_revision,
    reason,
    write_atomically,
    write_digests,
)
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.config_file import Names, config_from_yaml, config_to_yaml
from aime_gym.world_model.layers import TanhGaussianPolicy
from aime_gym.world_model.model import WorldModel

if TYPE_CHECKING:
    from aime_gym.world_model.heads import Heads

Weights = dict[str, Tensor]

_LARGEST = 1e18
"""The largest weight: the product of two stays finite. No network holds one that comes near."""


def read_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """Reads a state dict; pickled code is never run.

    Args:
        path: A `.safetensors` file, or one of `torch.save`.

    Returns:
        Name -> float32 tensor, and the file's metadata (empty for `torch.save`).

    Raises:
        AimeGymError: If there is no such file, it is corrupt or not the one that was saved (see `aime_gym.files`), or
            holds something else than finite tensors by name.
    """
    if not path.is_file():
        raise AimeGymError(f"There is no file {path}.")
    check_digest(path)
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if zipfile.is_zipfile(path):  # PyTorch's own format before 1.6 is no zip archive
                    check_archive(path)
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a corrupt file makes the readers raise nearly anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise AimeGymError(f"{path} is not a readable file of weights ({reason:.200}). Get it again.") from error
    return checked_weights(path, content), metadata


def checked_weights(path: Path, content: object) -> Weights:
    """What was read as a state dict: finite float32 tensors by name, or an `AimeGymError` that names the file."""
    if not isinstance(content, Mapping):
        raise AimeGymError(f"{path}: expected a state dict, got {type(content).__name__}.")
    return {str(name): _checked(path, str(name), value) for name, value in content.items()}


def _checked(path: Path, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
        got = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise AimeGymError(f"{path}: {name}: expected a dense floating-point tensor, got {got}.")
    value = value.detach().float()
    if not bool(value.isfinite().all()):
        raise AimeGymError(f"{path}: {name} holds numbers that are not finite.")
    if value.numel() and float(value.abs().max()) > _LARGEST:
        raise AimeGymError(f"{path}: {name} holds numbers that are far too large: beyond {_LARGEST:g}.")
    return value


def fit_weights(module: nn.Module, weights: Weights, path: Path, own_names: Mapping[str, str] | None = None) -> None:
    """Gives a module its weights; those of a module on the `meta` device become real.

    Args:
        module: Gets them.
        weights: Exactly those that the module has.
        path: Where they are from, for messages.
        own_names: Name in the file -> name in the module; by default the same.

    Raises:
        AimeGymError: If a weight is missing, left over, or of another shape; names it.
    """
    state = module.state_dict()
    own_names = own_names or {name: name for name in state}
    missing = [name for name in own_names if name not in weights]
    if missing:
        raise AimeGymError(f"{path} lacks weights that config.yaml asks for: {_list(missing)}.")
    extra = [name for name in weights if name not in own_names]
    if extra:
        raise AimeGymError(f"{path} holds weights that config.yaml has no place for: {_list(extra)}.")
    for name, own in own_names.items():
        expected, got = list(state[own].shape), list(weights[name].shape)
        if got != expected:
            raise AimeGymError(f"{path}: {name}: expected shape {expected} by config.yaml, got {got}.")
    module.load_state_dict({own: weights[name] for name, own in own_names.items()}, assign=True)


def _list(names: Sequence[str], at_most: int = 6) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def fingerprint(model: WorldModel) -> tuple[Hashable, ...]:
    """Identifies settings, folder, weights (by a checksum of each) and devices of a model, however it was changed."""
    heads = model.heads and repr(model.heads.config)
    state = model.state_dict()
    sums = tuple((name, tensor.shape, tensor.dtype, zlib.crc32(_bytes(tensor))) for name, tensor in state.items())
    return repr(model.config), heads, model.folder, sums, tuple(str(tensor.device) for tensor in state.values())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def revision_of(model: WorldModel, now: tuple[Hashable, ...] | None = None) -> Revision | None:
    """Which weights a model has; None if it was not loaded from a folder, or has been changed since.

    Args:
        model: The model.
        now: Its `fingerprint`, if it is known.
    """
    return model.revision if (now or fingerprint(model))[:-1] == model.as_loaded else None


PRETRAINED = Path(__file__).parents[1] / "pretrained"
"""Where the bundled models are."""


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/config.yaml"))


def load_config(name_or_folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads the config of a model without its weights; for arguments and errors see `load_pretrained_model`."""
    return _config(model_folder(name_or_folder))


def load_pretrained_model(name_or_folder: str | os.PathLike[str]) -> WorldModel:
    """Loads a model, strictly: nothing may be missing, left over, misshapen or not finite.

    Examples:
        >>> import aime_gym
        >>> model = aime_gym.load_pretrained_model("walker-state")
        >>> model.observed, model.heads.tasks
        (('orientations', 'height', 'velocity'), ('walk', 'stand', 'run'))

    Args:
        name_or_folder: A bundled name (see `bundled_models`; ``"walker"`` is short for ``"walker-state"``), a folder of
            this project, or one that AIME (Zhang et al., 2023), AIME-v2 or AIME-NoB (2024) released; of a folder that
            has a bundled name, give the `Path`.

    Returns:
        The model in eval mode, without gradients, with its `heads` where the folder has some.

    Raises:
        AimeGymError: If there is no such model or something is wrong with it; names the file and the weight.
    """
    folder = model_folder(name_or_folder)
    read = cache(lambda: read_weights(_weights_file(folder))[0])
    config = _config(folder, read)
    with torch.device("meta"):
        model = WorldModel(config)
    fit_weights(model, read(), _weights_file(folder), {name_on_disk(own): own for own in model.state_dict()})
    if (folder / "heads.safetensors").exists():
        model.heads = _load_heads(folder / "heads.safetensors", config)
    model.folder, model.revision = folder, read_revision(folder)
    model.as_loaded = fingerprint(model)[:-1]
    return model.eval().requires_grad_(False)


def save_model(
    model: WorldModel,
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    halved: tuple[str, ...] = (),
) -> None:
    """Writes a model, and its heads if it has some, so that `load_pretrained_model` gives them back.

    Args:
        model: What to write.
        folder: Where; made when missing. Each file is written whole or not at all.
        dtype: Type of the weights on disk; means and standard deviations of sensors stay float32.
        halved: What the names of weights begin with that are kept as bfloat16 in any case.

    Raises:
        OSError: If the disk is full.
    """
    folder = Path(folder)
    parts: dict[str, bytes | None] = {
        "model.safetensors": _serialised(model, dtype, without=("heads.",), halved=halved),
        "heads.safetensors": None,
    }
    if model.heads is not None:
        metadata = {"config": json.dumps(model.heads.config)}
        parts["heads.safetensors"] = _serialised(model.heads, dtype, metadata=metadata)
    for name, content in parts.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_atomically(folder / name, content)
    config_to_yaml(model.config, folder / "config.yaml")
    write_digests(folder, ("config.yaml", *parts))
    count_revision(folder)


def load_policy(folder: str | os.PathLike[str]) -> TanhGaussianPolicy:
    """Loads the policy of a released agent, in eval mode, without gradients.

    Args:
        folder: With `config.yaml` (its `policy` gives the sizes) and `policy.pt`.

    Raises:
        AimeGymError: For the same reasons as `load_pretrained_model`.
    """
    folder = model_folder(folder)
    config = _config(folder)
    if config.policy is None:
        raise AimeGymError(f"{folder / 'config.yaml'} says nothing of a policy: expected policy.hidden_size.")
    with torch.device("meta"):
        policy = TanhGaussianPolicy(config.feature_dim, config.action_dim, config.policy)
    fit_weights(policy, read_weights(folder / "policy.pt")[0], folder / "policy.pt")
    return policy.eval().requires_grad_(False)


def load_starts(model: WorldModel) -> dict[str, np.ndarray]:
    """Reads a model's bank of real frames, `starts.npz`, from which dreams begin.

    Examples:
        >>> import aime_gym
        >>> starts = aime_gym.load_starts(aime_gym.load_pretrained_model("walker-state"))
        >>> starts["height"].shape, starts["pre_action"].shape  # ten frames each of 640 moments
        ((10, 640, 1), (10, 640, 6))

    Args:
        model: One that was loaded from a folder.

    Returns:
        Each observed sensor and ``pre_action`` [K, N, ...] float32 and ``is_reset`` [N] bool; ``physics`` [N, n]
        float64, the state at the last frame, where the file has it.

    Raises:
        AimeGymError: If there is no such file, or it does not fit the model; names the array.
    """
    config = model.config
    if model.folder is None or not (model.folder / "starts.npz").is_file():
        where = "It was not loaded from a folder" if model.folder is None else f"{model.folder} has no starts.npz"
        raise AimeGymError(f"This model has no frames to start from. {where}; give frames of your own.")
    path = model.folder / "starts.npz"
    starts = read_npz(path)
    dims = {name: config.dims.get(name, 0) for name in config.observed} | {"pre_action": config.action_dim}
    for name in (*dims, "is_reset"):
        if name not in starts:
            raise AimeGymError(f"{path} lacks the array {name}.")
    leading = starts["pre_action"].shape[:2]
    for name, dim in dims.items():
        expected = (*leading, 64, 64, 3) if name == "image" else (*leading, dim)
        if starts[name].shape != expected or starts[name].dtype.kind not in "fu" or not min(leading, default=0):
            raise AimeGymError(f"{path}: {name}: expected numbers of shape {expected}, got {starts[name].shape}.")
        if not np.isfinite(starts[name]).all():
            raise AimeGymError(f"{path}: {name} holds numbers that are not finite.")
    for name, axes in (("is_reset", 1), ("physics", 2)):
        array = starts.get(name, np.zeros((leading[1], 0)))
        if array.shape[:1] != leading[1:] or (name in starts and array.ndim != axes):
            raise AimeGymError(f"{path}: {name}: expected {leading[1]} rows, got shape {array.shape}.")
        if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
            raise AimeGymError(f"{path}: {name} holds something else than finite numbers.")
    return starts


def name_on_disk(own: str) -> str:
    """The name of a weight in a folder: the released checkpoints keep the cell's weights at the top."""
    return own.removeprefix("cell.")


def model_folder(name_or_folder: str | os.PathLike[str]) -> Path:
    """The folder of a bundled name, or a folder itself; for errors see `load_pretrained_model`."""
    if not isinstance(name_or_folder, (str, os.PathLike)):
        raise AimeGymError(f"Expected the name or folder of a model, got {name_or_folder!r}.")
    if isinstance(name_or_folder, str) and name_or_folder in bundled_models():
        return PRETRAINED / name_or_folder  # a path of that name is a folder of the user's
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise AimeGymError(f"{folder} is a file; expected the folder of a model.")
    if len(folder.parts) > 1:
        raise AimeGymError(f"There is no model folder {folder}.")
    if isinstance(name_or_folder, str) and f"{folder}-state" in bundled_models():
        return PRETRAINED / f"{folder}-state"  # the name of a body stands for its model of states
    raise unknown_name("model (no bundled name, no folder)", str(folder), bundled_models())


def _config(folder: Path, names: Names | None = None) -> ModelConfig:
    if not (folder / "config.yaml").is_file():
        raise AimeGymError(f"{folder} is no model folder: it has no config.yaml.")
    return config_from_yaml(folder / "config.yaml", names or (lambda: read_weights(_weights_file(folder))[0]))


def _weights_file(folder: Path) -> Path:
    for name in ("model.safetensors", "model.pt"):
        if (folder / name).exists():
            return folder / name
    raise AimeGymError(f"{folder} is no model folder: it has neither model.safetensors nor model.pt.")


def _serialised(
    module: nn.Module,
    dtype: torch.dtype,
    without: tuple[str, ...] = (),
    metadata: dict[str, str] | None = None,
    halved: tuple[str, ...] = (),
) -> bytes:
    parameters = dict(module.named_parameters())

    def kept_as(own: str) -> torch.dtype:
        if own.startswith(halved):
            return torch.bfloat16
        return dtype if own in parameters else torch.float32

    weights = {
        name_on_disk(own): value.detach().to("cpu", kept_as(own)).contiguous()
        for own, value in module.state_dict().items()
        if not own.startswith(without)
    }
    return save(weights, metadata)


def _load_heads(path: Path, config: ModelConfig) -> Heads:
    from aime_gym.world_model.heads import Heads, heads_arguments

    weights, metadata = read_weights(path)
    try:
        arguments = heads_arguments(parse_json(metadata.get("config", "")))
    except ValueError as error:
        raise AimeGymError(f"{path}: its metadata do not describe heads ({reason(error)}).") from error
    if arguments["feature_dim"] != config.feature_dim or arguments["action_dim"] != config.action_dim:
        raise AimeGymError(
            f"{path} belongs to another model: feature and action dims {arguments['feature_dim']} and "
            f"{arguments['action_dim']}, expected {config.feature_dim} and {config.action_dim}."
        )
    with torch.device("meta"):
        heads = Heads(**arguments)
    fit_weights(heads, weights, path)
    return heads


def with_reward(model: WorldModel, name: str) -> WorldModel:
    """A copy of a model that decodes a reward of this name, with new weights if it did not, and has no probes."""
    own = model.config
    decoders = {"tabular": NetConfig("dmlp"), **own.decoders}
    config = replace(own, use_reward=True, reward=name, probes={}, decoders=decoders)
    grown = WorldModel(config).to(model.cell.initial_state.device)
    weights = model.state_dict()
    grown.load_state_dict({key: weights.get(key, value) for key, value in grown.state_dict().items()})
    return grown.eval().requires_grad_(False)
