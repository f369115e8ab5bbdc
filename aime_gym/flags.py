"""A command's flags: numbers are checked before its work begins, and what decides it is kept with what it leaves.

Those of training, which several commands share, are here, too: what a world model is made of and how it is trained.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from aime_gym.errors import AimeGymError, check_switch
from aime_gym.files import json_text, read_json, write_json
from aime_gym.parallel import join_cluster

CONTENT = "content of "
"""What the names of digests begin with, which say what a run read; runs of older versions have none."""


class Options:
    """What the dataclasses of commands share, as Python makes them, too: text stands for a path, but not for a switch.

    Raises:
        AimeGymError: If a field that is annotated ``bool`` is neither True nor False.
    """

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):  # type: ignore[arg-type]  # those that inherit are dataclasses
            value, kind = getattr(self, one.name), str(one.type)
            if kind == "bool":
                check_switch(value, one.name)
            elif "tuple[Path" in kind:
                setattr(self, one.name, tuple(map(Path, [value] if isinstance(value, str | Path) else value)))
            elif "Path" in kind and isinstance(value, str):
                setattr(self, one.name, Path(value))


def check_flags(options: object, least: float, *names: str, prefix: str = "") -> None:
    """Checks that numbers are not too small; those that are None are not given, and words are choices of their own.

    Args:
        options: A command, or a part of one, whose attributes they are.
        least: The smallest number that is allowed.
        *names: Names of the attributes.
        prefix: What the flags of a part begin with, e.g. ``"heads."``.

    Raises:
        AimeGymError: If one is smaller, or not a number; names its flag.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not isinstance(value, str) and not value >= least:  # nor where it is NaN
            raise AimeGymError(f"--{prefix}{name.replace('_', '-')} starts at {least:g}; got {value}.")


def check_workers(options: Any) -> None:
    """Checks ``workers``: a number from 1 on, or ``"ray"`` where this machine belongs to a Ray cluster that runs.

    Raises:
        AimeGymError: If it is neither, or there is no cluster.
    """
    check_flags(options, 1, "workers")
    if options.workers == "ray":
        join_cluster()


def check_above_zero(options: object, *names: str) -> None:
    """Checks that flags are finite numbers larger than 0, as `check_flags` does for integers."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise AimeGymError(f"--{name.replace('_', '-')} is more than 0; got {value}.")


def command_line(options: Any) -> str:
    """The shell command that does what a command's dataclass says, however that was made; defaults are left out.

    Args:
        options: E.g. a `Train`, whose command is ``aime-gym train``.
    """
    kebab = re.sub(r"(?<!^)(?=[A-Z])", "-", type(options).__name__).lower()
    return shlex.join(["aime-gym", kebab, *_words(options)])


def _words(options: Any, defaults: Any = None, prefix: str = "") -> list[str]:
    """Positional arguments and flags; `defaults` are the options of a part where none of them is given."""
    hints = get_type_hints(type(options), include_extras=True)
    positional: list[str] = []
    flags: list[str] = []
    for one in dataclasses.fields(options):
        value, name = getattr(options, one.name), one.name.replace("_", "-")
        default = getattr(defaults, one.name) if defaults is not None else _default(one)
        words = [str(each) for each in (value if isinstance(value, tuple) else [value])]
        if tyro.conf.Positional in getattr(hints[one.name], "__metadata__", ()):
            positional += words
        elif dataclasses.is_dataclass(value):
            flags += _words(value, default, f"{prefix}{name}.")
        elif value == default:
            continue
        elif isinstance(value, bool):
            flags.append(f"--{prefix}{name}" if value else f"--{prefix}no-{name}")
        else:
            flags += [f"--{prefix}{name}", *words]
    return positional + flags


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def claim_run(path: Path, flags: Mapping[str, Any], free: Container[str] = (), begun: bool = True) -> None:
    """Writes the flags of a run, or compares them with those of the run that is there, which would be resumed.

    Args:
        path: The JSON file in the run's folder.
        flags: What JSON holds, or has a name as a string, as paths do.
        free: Names of those that may differ.
        begun: Whether the run there has left something. One that has not, as its flags were wrong, is forgotten.

    Raises:
        AimeGymError: If others differ, or the file is damaged.
    """
    flags = json.loads(json_text(flags))
    if path.exists():
        there = read_json(path, "the flags of a run", "Choose another folder.")
        if begun:
            check_same_run(path.parent, there, flags, free)
    write_json(path, flags)


def check_same_run(folder: Path, there: Mapping[str, Any], flags: Mapping[str, Any], free: Container[str] = ()) -> None:
    """Checks that a folder's run has the flags of the one that would go on with it.

    Where the run there has not noted a digest, whose name begins with `CONTENT`, it is unknown and may be any.

    Args:
        folder: For the message.
        there: The flags of the run there, as JSON has them.
        flags: The flags of the run that would go on, as JSON has them.
        free: Names of those that may differ.

    Raises:
        AimeGymError: If others differ.
    """
    known = [name for name in flags if name not in free and (name in there or not name.startswith(CONTENT))]
    pairs = {name: (there.get(name), flags[name]) for name in known}
    changed = [f"{name}: {old!r} there, {new!r} now" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise AimeGymError(
            f"{folder} holds a run with other flags ({'; '.join(changed)}). Resume it with its own, or choose another "
            "folder."
        )


@dataclass(frozen=True)
class HeadsOptions:
    """What is fitted on the frozen model, and how long.

    Examples:
        >>> import aime_gym
        >>> aime_gym.HeadsOptions(updates=300, hidden_size=64).batch_size
        32
    """

    tasks: tuple[str, ...] = ()
    """Tasks with a reward head; by default those of the body whose reward follows from the physics state."""
    updates: int = 3000
    """Gradient steps; 0 fits no heads."""
    batch_size: int = 32
    """Windows an update."""
    lr: float = 1e-3
    """Adam's learning rate, with cosine decay."""
    hidden_size: int = 128
    """Width of the reward and physics heads."""
    ensemble: int = 5
    """Members of the ensemble."""
    ensemble_hidden_size: int = 64
    """Width of each member."""
    trajectories: int = 300
    """At most so many trajectories are replayed to compute rewards, spread over all data."""

    def __post_init__(self):
        sizes = ("batch_size", "hidden_size", "ensemble", "ensemble_hidden_size", "trajectories")
        check_flags(self, 1, *sizes, prefix="heads.")
        check_flags(self, 0, "updates", "lr", prefix="heads.")
        if len(set(self.tasks)) < len(self.tasks):
            raise AimeGymError(f"--heads.tasks names a task twice: {', '.join(self.tasks)}.")


@dataclass(kw_only=True)
class TrainOptions(Options):
    """Architecture, loss and optimisation of phase 1 (Zhang et al., NeurIPS 2023), and where it runs."""

    setup: Literal["mdp", "lpomdp", "pomdp", "visual"] = "mdp"
    """What the model sees: all tabular sensors, those without velocities, or images."""

    cell: Literal["rssm", "rssmo"] = "rssmo"
    """The recurrence."""
    memory_dim: int = 256
    """Size of the deterministic memory h."""
    stochastic_dim: int = 32
    """Size of the stochastic latent s."""
    hidden_size: int = 256
    """Width of the networks of the cell."""
    hidden_layers: int = 1
    """Hidden layers of the networks of the cell."""
    norm: Literal["ln", "none"] = "ln"
    """Layer normalisation in every network ('ln') or nowhere; rssm's cell has none."""
    min_std: float = 0.1
    """Smallest standard deviation of a latent."""
    activation: Literal["swish", "elu", "relu", "leakyrelu"] = "swish"
    """Nonlinearity of encoders and decoders."""
    encoder: Literal["mlp", "identity"] = "mlp"
    """What encodes tabular sensors; 'identity' only for rssm."""
    encoder_size: int = 256
    """Hidden size of the encoder."""
    encoder_layers: int = 2
    """Hidden layers of the encoder."""
    decoder: Literal["dmlp", "smlp", "ssmlp"] = "dmlp"
    """Standard deviation of decoded sensors: one, a network's, or one learnt number a dim."""
    decoder_size: int = 256
    """Hidden size of decoders and probes."""
    decoder_layers: int = 2
    """Hidden layers of decoders and probes."""
    image_width: int = 32
    """Channels of the first layer of the image encoder."""
    use_reward: bool = False
    """Decode the reward of the data too (heads for the rewards of all tasks are fitted anyway)."""
    standardise: bool = True
    """Feed and predict sensors with mean 0 and standard deviation 1 over the training data."""

    nll_reweight: Literal["none", "dim_wise", "modility_wise"] = "none"
    """Weights of the likelihood's dims: none, or the dim's own detached standard deviation."""
    kl_scale: float = 1.0
    """Weight of the KL."""
    free_nats: float = 1.0
    """KL below this has no gradient."""
    kl_rebalance: float | None = 0.8
    """Share of the KL's gradient that trains the prior; None splits nothing."""
    idm_mode: Literal["none", "detach", "end2end"] = "none"
    """Train an inverse dynamics model along, on detached features or through them."""
    deterministic: bool = False
    """The model's dreams go on by the means of latents and not by samples, unless they are told otherwise. It changes
    nothing that is learned: with it, the same command makes the model of a finished run anew."""

    batch_size: int = 50
    """Windows an update, over all processes."""
    horizon: int = 50
    """Steps a window."""
    events: float = 0.0
    """Share of windows around rows where the reward jumps, if they are rare."""
    updates: int = 20_000
    """Gradient steps."""
    lr: float = 1e-3
    """Adam's learning rate."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Schedule of the learning rate."""
    grad_clip: float = 100.0
    """Largest gradient norm."""
    seed: int = 0
    """Seed of weights, split, windows and noise."""
    held_out: float = 0.1
    """Share of each data set's trajectories that is only evaluated on."""
    evaluate_every: int = 1000
    """Updates between held-out evaluations."""
    evaluation_windows: int = 200
    """Windows a data set in an evaluation."""
    patience: int | None = None
    """Stop after this many evaluations without improvement."""

    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """'auto' takes bf16-mixed where the hardware multiplies bfloat16 fast."""
    accelerator: str = "auto"
    """Fabric's: 'cpu', 'cuda', 'auto'."""
    devices: str = "1"
    """Fabric's: how many, or which."""
    num_nodes: int = 1
    """Fabric's: machines."""
    strategy: str = "auto"
    """Fabric's: 'ddp' and its variants."""
    threads: int | None = None
    """CPU threads; torch's choice by default."""
    checkpoint_every: int = 1000
    """Updates between checkpoints."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    log_every: int = 50
    """Updates between log entries."""
    tensorboard: bool = True
    """Write TensorBoard logs beside the JSONL log."""

    heads: HeadsOptions = field(default_factory=HeadsOptions)
    """What is fitted on the frozen model afterwards."""


@dataclass
class TrainingOptions(TrainOptions):
    """How a model is trained, on what, and where it goes."""

    datasets: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of trajectories, all of one embodiment."""
    out: Path = Path("models/new")
    """The model folder; the run's checkpoints and logs go to its subfolder `run`."""
    embodiment: str | None = None
    """Only for data sets that do not say which body they are of, or whose body is the env of a package, as in
    'package:Id-v0', which is imported only if it is named here."""
    pretrained: str | None = None
    """Train on from the weights of this model (a folder or a bundled name) of the same architecture."""
    dynamics: str | None = None
    """Give this model of states (a folder or a bundled name) the senses of --setup: its dynamics, heads and sizes stay;
    encoder, posterior and image decoder are learned, and an inverse dynamics model with --idm-mode detach."""
