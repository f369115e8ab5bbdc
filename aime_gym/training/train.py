"""Phase 1 from the command line: `aime-gym train DATASET...` makes a model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from aime_gym.bodies.body import Embodiment, Sensor, canonical_setup
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.data.dataset import Places, TrajectoryDataset, WindowSampler, read_data_sets
from aime_gym.data.trajectories import data_digest, rendering_of_all
from aime_gym.errors import AimeGymError
from aime_gym.files import reason, weights_digest
from aime_gym.flags import CONTENT, TrainingOptions, check_above_zero, check_flags
from aime_gym.observations import to_tensors
from aime_gym.parallel import claimed, seeded, so_many_threads
from aime_gym.training import callbacks
from aime_gym.training.fit_heads import check_labels, check_tasks
from aime_gym.training.model_folder import (
    Parts,
    as_long_as_seen,
    check_parts,
    claim_model_folder,
    finish_model_folder,
    geometric_mean,
    prediction_error,
    split_by_name,
)
from aime_gym.training.refine import keep_dynamics, senses_config, senses_loss
from aime_gym.training.trainer import Trainer, adam, check_processes, load_module, load_snapshot, make_fabric
from aime_gym.world_model.checkpoint import load_config, load_pretrained_model
from aime_gym.world_model.config import LOSS_FIELDS, ModelConfig, NetConfig
from aime_gym.world_model.config_file import checked_config
from aime_gym.world_model.model import WorldModel
from aime_gym.world_model.packed import resolve_precision

_NO_EFFECT = {"out", "accelerator", "devices", "num_nodes", "strategy", "threads"} | {
    "evaluation_windows",
    "checkpoint_every",
    "checkpoint_minutes",
    "log_every",
    "tensorboard",
    "deterministic",
    "heads",
}
"""Flags that a resumed run may change: they decide nothing about the weights."""
_COUNTS = (
    *("memory_dim", "stochastic_dim", "hidden_size", "encoder_size", "decoder_size", "image_width"),
    *("batch_size", "horizon", "updates", "evaluate_every", "evaluation_windows", "checkpoint_every", "log_every"),
)


class TrainingRun(TrainingOptions):
    """Does what the flags of `aime-gym train` ask for."""

    _command: TrainingOptions | None = None

    @classmethod
    def of(cls, command: TrainingOptions) -> TrainingRun:
        """The run of a command, which the model's card names."""
        run = cls(**{field.name: getattr(command, field.name) for field in fields(command)})
        run._command = command
        return run

    def train(self) -> None:
        """Trains, fits heads and writes the model folder."""
        self.check()
        on_cpu = self.accelerator == "cpu" or (self.accelerator == "auto" and not torch.cuda.is_available())
        precision = resolve_precision(self.precision, "cpu" if on_cpu else "cuda")
        fabric = self._fabric(precision)
        fabric.launch()
        check_processes(fabric)
        with ExitStack() as stack:
            stack.enter_context(so_many_threads(self.threads))
            self._claim_folder(fabric, stack)
            self._train(fabric, precision, stack)

    def _train(self, fabric: Fabric, precision: str, stack: ExitStack) -> None:
        body, data = self.load_data()
        states = self._states(body)
        self._check_heads(body, data, states)
        config = self._taught_config(states.config) if states else self.model_config(body)
        config = checked_config(replace(config, rendering=rendering_of_all(self.datasets if config.has_image else ())))

        stack.enter_context(seeded(self.seed + 1_000_003 * fabric.global_rank, fabric.device))
        model = WorldModel(config)
        train = TrajectoryDataset.join([part for part, _ in data.values()])
        heads = states.heads if states else None
        base = self.load_base(config)
        if base is not None:
            heads, base.heads = base.heads, None
            model.load_state_dict(base.state_dict())
            if self.standardise and self.encoder != "identity":
                renew_standardisation(model, *map(to_tensors, train.statistics(model.normaliser, model.codes)))
        if states:
            keep_dynamics(model, states.to(fabric.device))
        elif base is None and self.standardise:
            model.set_standardisation(*map(to_tensors, train.statistics(model.normaliser, model.codes)))
        trainer = self._trainer(fabric, model, states, train, {name: held for name, (_, held) in data.items()})
        self._claim_run(fabric, data)
        checkpoints = self.out / "run" / "checkpoints"
        last = checkpoints / "last.pt"
        if last.exists():
            trainer.load(last)
            fabric.print(f"Resuming {self.out} at update {trainer.update} of {self.updates}.")

        def saved() -> str:
            return f"saved up to update {load_snapshot(last)['update']}" if last.exists() else "nothing saved"

        try:
            trainer.train()
        except KeyboardInterrupt:
            fabric.print(f"Stopped at update {trainer.update}, {saved()}.")
            raise
        except RuntimeError as error:  # as those who average gradients have it when one of them is gone
            if fabric.world_size == 1:
                raise
            raise ChildProcessError(
                f"One of the {fabric.world_size} processes that train together was lost, or failed, at update "
                f"{trainer.update}, {saved()} ({reason(error)}). The same command goes on from there"
            ) from error
        fabric.barrier()
        if not trainer.is_main:
            return
        best = checkpoints / "best.pt"
        load_module(best if best.exists() else last, model)
        cost = {
            "updates": trainer.update,
            "seconds": round(trainer.seconds),
            "precision": precision,
        }
        options = replace(self.heads, updates=0) if states else self.heads
        heads = heads if states or options.updates else None
        finish_model_folder(model, self.out, data, options, self.seed, self._command or self, cost, heads)

    def check(self) -> None:
        """Checks the numbers of the flags.

        Raises:
            AimeGymError: If one is too small.
        """
        check_flags(self, 1, *_COUNTS, "threads", "patience")
        check_flags(self, 0, "seed", "lr", "min_std", "free_nats", "kl_scale", "checkpoint_minutes")
        check_above_zero(self, "grad_clip")
        if self.idm_mode != "none" and self.horizon < 2:
            raise AimeGymError("--idm-mode needs windows of two steps: --horizon starts at 2.")

    def _fabric(self, precision: str) -> Fabric:
        try:
            return make_fabric(
                accelerator=self.accelerator,
                devices=self.devices,
                num_nodes=self.num_nodes,
                strategy=self.strategy,
                precision=precision,  # type: ignore[arg-type]
            )
        except Exception as error:  # of nearly any kind
            raise AimeGymError(
                f"--accelerator {self.accelerator}, --devices {self.devices}, --num-nodes {self.num_nodes} and "
                f"--strategy {self.strategy} cannot be had here: {error}"
            ) from error

    def _states(self, body: Embodiment) -> WorldModel | None:
        """The model of states that gets other senses, if there is one."""
        if self.dynamics is None:
            return None
        states = load_pretrained_model(self.dynamics)
        if states.config.embodiment != body.name:
            raise AimeGymError(
                f"--dynamics {self.dynamics} is of {states.config.embodiment}; the data are of {body.name}."
            )
        return states

    def _check_heads(self, body: Embodiment, data: Parts, states: WorldModel | None) -> None:
        """Checks what heads will need after the training: those to be fitted, or those of `states`, to be scored."""
        if not (states.heads if states else self.heads.updates):
            return
        if states is None:
            check_tasks(body, self.heads.tasks)
        for part, _ in data.values():
            check_labels(body, part)

    def _taught_config(self, states: ModelConfig) -> ModelConfig:
        return senses_config(states, canonical_setup(self.setup), self.image_width, self.idm_mode)

    def load_base(self, config: ModelConfig) -> WorldModel | None:
        """The model of --pretrained, if there is one.

        Raises:
            AimeGymError: If it cannot be read, or is of another architecture than `config`.
        """
        if self.pretrained is None:
            return None
        base = load_pretrained_model(self.pretrained)
        free = (*LOSS_FIELDS, "episode_steps", "rendering", "deterministic")
        differing = [
            f"{f.name}: {getattr(base.config, f.name)} there, {getattr(config, f.name)} here"
            for f in fields(config)
            if f.name not in free and getattr(base.config, f.name) != getattr(config, f.name)
        ]
        if differing:
            raise AimeGymError(f"--pretrained {self.pretrained} is of another architecture: {'; '.join(differing)}.")
        return base

    def load_data(self) -> tuple[Embodiment, dict[str, tuple[TrajectoryDataset, TrajectoryDataset]]]:
        """Reads the data sets: the body, and name -> (training part, held-out part).

        Raises:
            AimeGymError: If they are broken, of several bodies, or lack what the setup needs.
        """
        if not self.datasets:
            raise AimeGymError("Training needs at least one data set folder; `aime-gym collect` makes one.")
        images = canonical_setup(self.setup) == "visual"
        parts = read_data_sets(self.datasets, images)
        data = split_by_name(self.datasets, parts, self.held_out, self.seed)
        body = get_embodiment(self.embodiment) if self.embodiment else parts[0].body
        if body is None:
            raise AimeGymError(f"{', '.join(data)} do not say which body they are of: give --embodiment.")
        if not (body.sensors or images):
            print(f"{body.name} shows an image and nothing else: --setup is visual.")
            self.setup = "visual"
            return self.load_data()
        if parts[0].body not in (None, body):
            raise AimeGymError(
                f"One model is of one body: --embodiment {body.name}, but data of {parts[0].embodiment}."
            )
        check_parts(data, body, self.setup, self.use_reward)
        return as_long_as_seen(body, parts), data

    def model_config(self, body: Embodiment) -> ModelConfig:
        """The architecture that the flags describe, for the given body; an `AimeGymError` if it shows no image."""
        if canonical_setup(self.setup) == "visual" and body.foreign and not body.has_image:
            raise AimeGymError(f"--setup visual: what {body.name} shows has no image. Take mdp.")
        norm, sensors = None if self.norm == "none" else self.norm, body.sensors
        if self.pretrained is not None:
            theirs = load_config(self.pretrained).sensors
            if _without_codes(theirs) == _without_codes(sensors):
                sensors = theirs  # what goes on reads angles as it did

        def mlp(name: str, size: int, layers: int, have_head: bool) -> NetConfig:
            return NetConfig(name, size, layers, self.activation, norm, have_head=have_head)

        image = NetConfig("cnn_ha", width=self.image_width)
        have_head = self.cell == "rssm"
        return ModelConfig(
            embodiment=body.name,
            setup=canonical_setup(self.setup),
            sensors=sensors,
            has_image=canonical_setup(self.setup) == "visual",
            action_dim=body.action_dim,
            choices=body.choices,
            action_repeat=body.action_repeat,
            episode_steps=body.episode_steps if body.foreign else None,
            logged_range=body.logged_range,
            cell=self.cell,
            memory_dim=self.memory_dim,
            stochastic_dim=self.stochastic_dim,
            hidden_size=self.hidden_size,
            hidden_layers=self.hidden_layers,
            norm=norm if self.cell == "rssmo" else None,
            min_std=self.min_std,
            encoders={"tabular": mlp(self.encoder, self.encoder_size, self.encoder_layers, have_head), "visual": image},
            decoders={"tabular": mlp(self.decoder, self.decoder_size, self.decoder_layers, True), "visual": image},
            probes={"tabular": mlp(self.decoder, self.decoder_size, self.decoder_layers, True), "visual": image},
            nll_reweight=self.nll_reweight,
            kl_scale=self.kl_scale,
            free_nats=self.free_nats,
            kl_rebalance=self.kl_rebalance,
            idm_mode=self.idm_mode,
            use_reward=self.use_reward,
            ensemble=None,
            standardise=self.standardise,
            deterministic=self.deterministic,
            policy=None,
        )

    def _trainer(
        self,
        fabric: Fabric,
        model: WorldModel,
        states: WorldModel | None,
        train: TrajectoryDataset,
        held_out: Mapping[str, TrajectoryDataset],
    ) -> Trainer:
        if self.batch_size % fabric.world_size:
            raise AimeGymError(f"--batch-size {self.batch_size} does not divide among {fabric.world_size} processes.")
        names = [*model.observed, *model.probed, "pre_action", *(["reward"] if self.use_reward else [])]
        rank = fabric.global_rank
        size, horizon = self.batch_size // fabric.world_size, min(self.horizon, train.longest)
        if horizon < self.horizon:
            fabric.print(f"No episode has {self.horizon} rows: --horizon is {horizon}, as many as the longest.")
        places = Places(least=2, at_events=self.events, events=reward_events(train) if self.events else None)
        batches = WindowSampler(train, size, horizon, (self.seed, rank), names, fabric.device, **places)

        def score(module: WorldModel) -> dict[str, float]:
            scores: dict[str, float] = {}
            for name, dataset in held_out.items():
                errors = prediction_error(module, dataset, windows=self.evaluation_windows, seed=self.seed)
                scores |= {f"{name}/{key}": value for key, value in errors.items() if "/" not in key}
            return {"nmse": geometric_mean(scores[f"{name}/nmse"] for name in held_out), **scores}

        run = self.out / "run"
        title = f"Training {self.out.name}"
        hooks: list[callbacks.Callback] = [callbacks.Evaluation(score, self.evaluate_every)]
        hooks += [callbacks.EarlyStopping(self.patience)] if self.patience else []
        hooks += [callbacks.JsonLog(run / "log.jsonl", self.log_every)]
        hooks += [callbacks.TensorBoardLog(run / "tensorboard", self.log_every)] if self.tensorboard else []
        hooks += [callbacks.ProgressBar(title)]
        hooks += [callbacks.Checkpoint(run / "checkpoints", self.checkpoint_every, self.checkpoint_minutes)]
        return Trainer(
            model,
            adam([weight for weight in model.parameters() if weight.requires_grad], self.lr),
            batches,
            lambda module, batch: senses_loss(module, states, batch) if states else module.loss(batch),
            self.updates,
            fabric=fabric,
            schedule=self.schedule,
            grad_clip=self.grad_clip,
            callbacks=hooks,
        )

    def _claim_folder(self, fabric: Fabric, stack: ExitStack) -> None:
        """Keeps the folder for this run; where the main process cannot, all processes say so."""
        refusal = None
        try:
            if fabric.is_global_zero:
                stack.enter_context(claimed(self.out))
        except AimeGymError as error:
            refusal = str(error)
        refusal = fabric.broadcast(refusal)
        if refusal:
            raise AimeGymError(refusal)

    def _claim_run(self, fabric: Fabric, data: Parts) -> None:
        """Writes flags and content of this run into its folder, or compares them with those of the run there."""
        counts = {name: len(train) + len(held) for name, (train, held) in data.items()}  # decide which are held out
        images = canonical_setup(self.setup) == "visual"
        sources = zip(data, self.datasets, strict=True)
        content = {f"{CONTENT}{name}": data_digest(source, images) for name, source in sources}
        for model in filter(None, (self.pretrained, self.dynamics)):
            content[f"{CONTENT}{model}"] = weights_digest(load_pretrained_model(model).folder or "")
        flags = {**asdict(self), "trajectories": counts, **content}
        try:
            claim_model_folder(self.out, "train.json", flags, _NO_EFFECT)
        except AimeGymError as error:
            raise AimeGymError(
                f"{error} With another --out, --pretrained {self.out} goes on from its weights, if it is complete."
            ) from error
        fabric.barrier()


@torch.no_grad()
def renew_standardisation(model: WorldModel, mean: Mapping[str, Tensor], std: Mapping[str, Tensor]) -> None:
    """Sets what sensors are standardised by, and rescales weights so that the model predicts what it did before.

    Learnt deviations that a network decodes are left to be learned anew. Encoders that are no network keep what
    they were standardised by.

    Args:
        model: What was trained in other units.
        mean: See `WorldModel.set_standardisation`.
        std: The same.

    Raises:
        AimeGymError: If the config does not standardise, or values are missing or of another shape.
    """
    units: dict[str, Any] = dict(model.normaliser.items())
    before = {name: (unit.mean.clone(), unit.std.clone()) for name, unit in units.items()}
    model.set_standardisation(mean, std)
    column = 0
    for (name, (old_mean, old_std)), new in zip(before.items(), units.values(), strict=True):
        scale, shift = new.std / old_std, (new.mean - old_mean) / old_std  # old units are scale * new ones + shift
        if name in model.observed:
            shared = model.config.cell == "rssmo"  # one encoder reads all sensors side by side
            encoder: Any = model.encoders["tabular" if shared else name]
            first, begin = encoder.net[0], column if shared else 0
            columns = first.weight[:, begin : begin + len(scale)]
            first.bias += columns @ shift
            columns *= scale
            column += len(scale)
        decoder: Any = model.decoders[name] if name in model.decoders else model.probes[name]
        decoder.rescale(scale, shift)


def _without_codes(sensors: Sequence[Sensor]) -> list[Sensor]:
    return [replace(sensor, rotations=()) for sensor in sensors]


def reward_events(data: TrajectoryDataset) -> np.ndarray:
    """Where the reward jumps by more than a tenth of its range: trajectory and row of each, [K, 2].

    There are none where it does so at more than a tenth of all rows, as that is no rare event, and none without a
    ``reward``.
    """
    found = [np.empty((0, 2), int)]
    if "reward" in data.arrays:
        reward = data.arrays["reward"].reshape(-1)
        least = 0.1 * max(np.ptp(reward[begin:end]) for begin, end in data.bounds)
        for index, (begin, end) in enumerate(data.bounds):
            rows = begin + 1 + np.flatnonzero(np.abs(np.diff(reward[begin:end])) > least)
            found.append(np.stack([np.full_like(rows, index), rows], 1))
    events = np.concatenate(found)
    return events if len(events) <= 0.1 * (data.bounds[:, 1] - data.bounds[:, 0]).sum() else found[0]
