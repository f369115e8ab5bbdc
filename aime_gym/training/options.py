"""What a world model is made of and how it is trained, as flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from aime_gym.errors import AimeGymError
from aime_gym.flags import Options, check_flags


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
