"""Heads for a frozen world model: rewards of tasks, the ensemble's doubt and the physics state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from aime_gym.bodies import tasks as task_rewards
from aime_gym.bodies.body import OWN_TASK, Embodiment
from aime_gym.bodies.lookup import get_embodiment
from aime_gym.data.dataset import BURN_IN, Batch, TrajectoryDataset, WindowSampler
from aime_gym.data.trajectories import Trajectory, first_world, relabel
from aime_gym.errors import AimeGymError
from aime_gym.flags import HeadsOptions
from aime_gym.observations import to_tensors
from aime_gym.parallel import available_cores, run_in_processes, seeded
from aime_gym.training.callbacks import ProgressBar
from aime_gym.training.trainer import Callback, Trainer, adam, make_fabric
from aime_gym.world_model.heads import Heads
from aime_gym.world_model.model import WorldModel

ROLLOUT = 15
"""Steps of the prior from each start: in a dream the heads see features of the prior."""
HORIZON = BURN_IN + 3 * ROLLOUT
"""Rows of a window."""
REWARD = "reward of {}"
"""The key of a task's rewards in labelled data, see `with_rewards`."""
_LEARNT = {"reward_limits": None, "terminates": None, "pays_ends": None}
"""Sizes that may differ from those of the heads that training goes on from."""


class Samples(NamedTuple):
    """Features at the same moments, filtered (`posterior`) and rolled out (`prior`), and what was true then."""

    posterior: Tensor
    """`[T, B, F]`."""
    prior: Tensor
    """`[T, B, F]`; rollouts of 1 to `ROLLOUT` steps."""
    rewards: Tensor
    """`[T, B, tasks]`."""
    codes: Tensor
    """`[T, B, C]`, see `PhysicsCode`."""
    actions: Tensor
    """`[T, B, A]`, the action that led here."""
    targets: Tensor
    """`[T, B, C]`, codes of all tabular sensors."""
    terminal: Tensor
    """`[T, B]`, 1 where the episode has terminated."""
    is_padding: Tensor
    """`[T, B]` bool, see `aime_gym.data.dataset.Windows`: of these moments only terminations are to be learned."""


def fit_heads(
    model: WorldModel,
    dataset: TrajectoryDataset,
    options: HeadsOptions = HeadsOptions(),  # noqa: B008 - it is frozen
    seed: int = 0,
    callbacks: Sequence[Callback] | None = None,
    initial: Heads | None = None,
) -> Heads:
    """Fits heads on features of the frozen model, half of them filtered and half of them rolled out by the prior.

    Args:
        model: Its weights stay as they are.
        dataset: Trajectories of its body, labelled by `with_rewards` for the tasks of `options`.
        options: Sizes and duration.
        seed: Seed of weights, windows and noise.
        callbacks: A progress bar by default.
        initial: Heads to go on from, if they are of the same tasks and sizes.

    Returns:
        The heads, in eval mode.

    Raises:
        AimeGymError: If the data lack physics or rewards.
    """
    with seeded(seed, next(model.parameters()).device):
        return _fit_heads(model, dataset, options, seed, callbacks, initial)


def _fit_heads(
    model: WorldModel,
    dataset: TrajectoryDataset,
    options: HeadsOptions,
    seed: int,
    callbacks: Sequence[Callback] | None,
    initial: Heads | None,
) -> Heads:
    device = next(model.parameters()).device
    body = model.config.body
    tasks = check_tasks(body, options.tasks)
    missing = [key for key in _truths(body, tasks) if key not in dataset.keys]
    if missing:
        raise AimeGymError(
            f"Heads are fitted to {', '.join(missing)}, which these data lack; `with_rewards` adds rewards."
        )
    nq, nv, quaternions = _physics_layout(body)
    trajectories = [dataset[i] for i in range(len(dataset))]
    rewards = [REWARD.format(task) for task in tasks]
    rows = {
        key: np.concatenate([trajectory[key][int(key in rewards) :] for trajectory in trajectories])  # none at a reset
        for key in _truths(body, tasks)
    }
    terminates = body.foreign and bool(rows["is_terminal"].any())
    ends = _otherwise_paid(trajectories, rewards) if terminates else np.zeros(0)
    heads = Heads(
        feature_dim=model.config.feature_dim,
        action_dim=body.action_dim,
        tasks=tasks,
        embodiment=body.name,
        target_dim=sum(model.config.codes[sensor.name].size for sensor in body.sensors),
        nq=nq,
        nv=nv,
        quaternions=quaternions,
        ensemble=options.ensemble if body.sensors else 0,
        hidden_size=options.hidden_size,
        ensemble_hidden_size=options.ensemble_hidden_size,
        reward_limits=_limits(rows[rewards[0]]) if body.foreign else None,
        terminates=terminates,
        pays_ends=bool(len(ends)),
    ).to(device)
    goes_on = initial is not None and initial.config | _LEARNT == heads.config | _LEARNT
    if initial is not None and goes_on:
        same = all(heads.config[key] == initial.config[key] for key in ("terminates", "pays_ends"))
        heads.load_state_dict(initial.state_dict(), strict=same)
    heads.standardise_by(*_truth_tensors(heads, model, to_tensors(rows, device)), keep_outputs=goes_on)
    if heads.ends:
        learned = initial is not None and goes_on and bool(initial.ends)
        heads.standardise_ends(torch.as_tensor(ends, device=device), keep_outputs=learned)
    was_trainable = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)

    def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(module, Heads)
        samples = compute_samples(model, module, batch)
        features = torch.cat([samples.posterior, samples.prior], 1)  # [T, 2B, F]
        real = ~samples.is_padding.repeat(1, 2)  # [T, 2B]
        terminal = samples.terminal.repeat(1, 2)
        ends = real & (terminal > 0.5) & bool(module.ends)  # which heads of their own learn
        rewards, codes = (x.repeat(1, 2, 1) for x in (samples.rewards, samples.codes))
        others = real & ~ends
        reward, physics = module.losses(features[others], rewards[others], codes[others])
        reward = reward + module.end_loss(features[ends], rewards[ends])
        termination = features.new_zeros(())
        if module.termination is not None:
            logits = module.termination(features).squeeze(-1)  # [T, 2B]
            known = real | (terminal > 0.5)  # rows after a termination are terminations; after a cut they are unknown
            termination = functional.binary_cross_entropy_with_logits(logits[known], terminal[known])
        before, actions, after = (
            x[real[1:]]
            for x in (features[:-1], samples.actions[1:].repeat(1, 2, 1), samples.targets[1:].repeat(1, 2, 1))
        )
        # Members that learn from different draws differ where data are rare.
        ensemble = features.new_zeros(())
        if len(before):
            size = (module.config["ensemble"], max(1, len(before) // 4))
            draw = torch.randint(len(before), size, device=device)  # [K, N]
            ensemble = module.ensemble_loss(before[draw], actions[draw], after[draw])
        parts = {"reward": reward, "physics": physics, "termination": termination, "ensemble": ensemble}
        return reward + physics + termination + ensemble, parts

    Trainer(
        heads,
        adam(heads.parameters(), options.lr),
        _sampler(model, dataset, options.batch_size, seed, heads.tasks),
        loss,
        options.updates,
        fabric=make_fabric(accelerator=device.type, devices=1 if device.index is None else [device.index]),
        schedule="cosine",
        callbacks=[ProgressBar("Fitting heads")] if callbacks is None else callbacks,
    ).train()
    for parameter, trainable in zip(model.parameters(), was_trainable, strict=True):
        parameter.requires_grad_(trainable)
    return heads.eval().requires_grad_(False)


@torch.no_grad()
def score_heads(
    model: WorldModel, heads: Heads, dataset: TrajectoryDataset, windows: int = 100, seed: int = 0
) -> dict[str, float]:
    """Scores heads on held-out, labelled data.

    Args:
        model: The world model.
        heads: Fitted on it.
        dataset: Held-out trajectories, labelled by `with_rewards`.
        windows: How many windows.
        seed: Draws windows and noise.

    Returns:
        R² of each ``reward_{task}`` and of ``physics``, by the variance in the data of the heads, on filtered features
        and (``_prior``) on rolled-out ones; the F1 score of ``termination`` likewise; and, where there is an ensemble,
        ``disagreement``: the correlation of its disagreement with the error of its mean.
    """
    device = next(model.parameters()).device
    batch = _sampler(model, dataset, windows, seed, heads.tasks).sample()
    with seeded(seed, device):
        samples = compute_samples(model, heads, batch)
    scores, real = {}, ~samples.is_padding
    known = real | (samples.terminal > 0.5)
    for suffix, features in (("", samples.posterior), ("_prior", samples.prior)):
        for i, task in enumerate(heads.tasks):
            predicted, true = heads.reward(features, task)[real][:, None], samples.rewards[real][:, i : i + 1]
            scores[f"reward_{task}{suffix}"] = _r2(predicted, true, heads.reward_std[i : i + 1])
        if heads.state is not None:
            codes = heads.code.encode(heads.physics(features))
            scores[f"physics{suffix}"] = _r2(codes[real], samples.codes[real], heads.physics_std)
        if heads.termination is not None:
            predicted = heads.continuation(features) < 0.5
            scores[f"termination{suffix}"] = _f1(predicted[known], samples.terminal[known] > 0.5)
    if heads.ensemble is None:
        return scores
    before, actions = samples.prior[:-1][real[1:]], samples.actions[1:][real[1:]]  # [N, F], [N, A]
    members = heads.ensemble(torch.cat([before, actions], -1))  # [K, N, D]
    truth = (samples.targets[1:][real[1:]] - heads.target_mean) / heads.target_std
    error = (members.mean(0) - truth).square().mean(-1).sqrt()
    pair = torch.stack([heads.disagreement(before, actions), error])
    scores["disagreement"] = float(torch.corrcoef(pair)[0, 1])
    return scores


@torch.no_grad()
def compute_samples(model: WorldModel, heads: Heads, batch: Batch) -> Samples:
    """Filters windows, and rolls the prior out from every `ROLLOUT`-th filtered feature.

    Args:
        model: The world model.
        heads: Say which tasks, and how physics is encoded.
        batch: Windows `[HORIZON, B, ...]` of observed sensors, ``pre_action`` and all truths.

    Returns:
        The samples after the burn-in, T = 3 · `ROLLOUT`.
    """
    actions = batch["pre_action"]
    posterior, _ = model.observe({name: batch[name] for name in model.observed}, actions)
    starts = posterior[BURN_IN - 1 : -1 : ROLLOUT]  # [n, B, F]
    n, size = starts.shape[:2]
    taken = actions[BURN_IN:].unflatten(0, (n, ROLLOUT)).transpose(0, 1).flatten(1, 2)  # [L, n·B, A]
    prior = model.imagine(starts.flatten(0, 1), taken, names=()).features  # [L, n·B, F]
    prior = prior.unflatten(1, (n, size)).transpose(0, 1).flatten(0, 1)  # [n·L, B, F]
    after = {key: value[BURN_IN:] for key, value in batch.items()}
    rewards, targets, codes = _truth_tensors(heads, model, after)
    actions = actions[BURN_IN:]
    terminal = after.get("is_terminal", torch.zeros_like(actions[..., 0]))
    is_padding = after.get("is_padding", torch.zeros_like(terminal, dtype=torch.bool))
    return Samples(posterior[BURN_IN:].float(), prior.float(), rewards, codes, actions, targets, terminal, is_padding)


def with_rewards(dataset: TrajectoryDataset, body: Embodiment, tasks: Sequence[str]) -> TrajectoryDataset:
    """Adds the reward of every task by replaying the physics, over several processes if there is much to do.

    Args:
        dataset: With ``physics``; of a foreign body with its own ``reward``.
        body: Its body.
        tasks: Tasks to add, as ``"reward of {task}"`` `[T, 1]`.

    Returns:
        The same trajectories with the rewards.

    Raises:
        AimeGymError: If there is no physics, or a reward does not follow from it.
    """
    check_labels(body, dataset)
    if body.foreign:
        labelled = dataset.subset(range(len(dataset)))
        labelled.add(REWARD.format(OWN_TASK), [dataset[i]["reward"].reshape(-1, 1) for i in range(len(dataset))])
        return labelled
    inputs: list[Trajectory] = [
        {key: dataset[i][key] for key in ("physics", "pre_action")} for i in range(len(dataset))
    ]
    jobs = {f"the rewards of trajectory {index}": trajectory for index, trajectory in enumerate(inputs)}
    much = all(len(trajectory["pre_action"]) > 100 for trajectory in inputs)
    workers = min(available_cores(), len(inputs) // 8) if much else 1
    rewards = run_in_processes(partial(_relabel, body.name, tuple(tasks)), jobs, workers)
    labelled = dataset.subset(range(len(dataset)))
    for task in tasks:
        labelled.add(REWARD.format(task), [reward[task] for reward in rewards])
    return labelled


def check_labels(body: Embodiment, dataset: TrajectoryDataset) -> None:
    """Checks that data have what rewards are computed from, and all else that heads are fitted to.

    Args:
        body: Theirs.
        dataset: The data.

    Raises:
        AimeGymError: If not, or if the physics are those of another MuJoCo model than that of the body's first task.
    """
    missing = [key for key in (("reward", "is_terminal") if body.foreign else ("physics",)) if key not in dataset.keys]
    if missing:
        raise AimeGymError(
            f"Heads of {body.name} need {' and '.join(missing)}, which these data lack. `aime-gym collect` makes data "
            "that have it; `aime-gym train --heads.updates 0` makes a model without heads."
        )
    if not body.foreign:
        expected, got = len(first_world(body.name).physics.get_state()), dataset.arrays["physics"].shape[-1]
        if got != expected:
            raise AimeGymError(
                f"A physics state of {body.name} is {expected} numbers (qpos, qvel); in these data it is {got}. Heads "
                "are not for data of a task with more in its world (quadruped's fetch has a ball): leave them out."
            )


def check_tasks(body: Embodiment, tasks: Sequence[str]) -> tuple[str, ...]:
    """Returns the tasks, or by default all built-in ones whose reward follows from the physics state.

    Raises:
        AimeGymError: If a task is unknown, or its reward cannot be computed from the physics state.
    """
    if not tasks:
        return tuple(task for task in body.tasks if task_rewards.is_replayable(body, task))
    for task in tasks:
        if body.foreign:
            body.check_task(task)
        else:
            task_rewards.check_replayable(body, task)
    return tuple(tasks)


def _relabel(body: str, tasks: Sequence[str], trajectory: Trajectory) -> dict[str, np.ndarray]:
    return relabel(trajectory, get_embodiment(body), tasks)


def _sampler(
    model: WorldModel, dataset: TrajectoryDataset, windows: int, seed: int, tasks: Sequence[str]
) -> WindowSampler:
    """Windows with at least one row after those that are filtered.

    Those of a foreign body, whose episodes may be over soon, can begin before the episode does, with its first frame
    held: so do its dreams (see `make_starts`).
    """
    body = model.config.body
    names = dict.fromkeys([*model.observed, "pre_action", *_truths(body, tasks)])
    lead = BURN_IN - 1 if body.foreign else 0
    device = next(model.parameters()).device
    return WindowSampler(dataset, windows, HORIZON, (seed,), names, device, least=BURN_IN + 1, lead=lead)


def _truths(body: Embodiment, tasks: Sequence[str]) -> list[str]:
    known = "is_terminal" if body.foreign else "physics"
    return [sensor.name for sensor in body.sensors] + [REWARD.format(task) for task in tasks] + [known]


def _truth_tensors(heads: Heads, model: WorldModel, arrays: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards `[..., tasks]`, codes of tabular sensors and of physics, `[..., C]` each."""
    codes_of = model.config.codes
    sensors = [codes_of[sensor.name].encode(arrays[sensor.name]) for sensor in model.config.body.sensors]
    rewards = [arrays[REWARD.format(task)] for task in heads.tasks]
    none = (sensors or rewards)[0][..., :0]
    targets = torch.cat(sensors or [none], -1)
    codes = heads.code.encode(arrays["physics"]) if heads.code.dim else none
    return torch.cat(rewards or [none], -1), targets, codes


def _physics_layout(body: Embodiment) -> tuple[int, int, tuple[int, ...]]:
    """Sizes of qpos and qvel, and where quaternions begin in qpos (those of MuJoCo's free and ball joints)."""
    if body.foreign:
        return 0, 0, ()
    physics = first_world(body.name).physics
    model = physics.model
    offset = {0: 3, 1: 0}  # mjJNT_FREE: three coordinates first; mjJNT_BALL
    joints = zip(model.jnt_type, model.jnt_qposadr, strict=True)
    target = len(physics.get_state()) - model.nq - model.nv - model.na  # its place, where it is drawn: see tasks
    quaternions = tuple(int(begin) + offset[int(kind)] for kind, begin in joints if int(kind) in offset)
    return model.nq, model.nv + target, quaternions


def _otherwise_paid(trajectories: Sequence[Trajectory], rewards: Sequence[str]) -> np.ndarray:
    """What ends of episodes pay, [E, tasks], if that is something else than what steps pay before them; else nothing.

    It is if at ends the reward of a task differs from that of the row before by more than twice of what it does
    elsewhere, as roots of mean squares. Row 0 has no reward.
    """
    paid = [np.concatenate([trajectory[key][1:] for key in rewards], 1) for trajectory in trajectories]
    ends = [trajectory["is_terminal"].reshape(-1)[1:] > 0 for trajectory in trajectories]
    changes = np.concatenate([np.diff(rows.astype(np.float64), axis=0) for rows in paid])
    at_ends = np.concatenate([rows[1:] for rows in ends])
    sizes = [np.square(changes[rows]).sum(0) / max(1, rows.sum()) for rows in (at_ends, ~at_ends)]
    found = np.concatenate(paid)[np.concatenate(ends)]
    return found if (sizes[0] > 4 * sizes[1]).any() else found[:0]


def _limits(rewards: np.ndarray) -> tuple[float, float]:
    """Smallest and largest reward of a step in the data."""
    return float(rewards.min()), float(rewards.max())


def _f1(predicted: Tensor, truth: Tensor) -> float:
    """Harmonic mean of precision and recall; 1 where nothing was to be found and nothing was."""
    either = int(predicted.sum() + truth.sum())
    return 2 * int((predicted & truth).sum()) / either if either else 1.0


def _r2(predicted: Tensor, truth: Tensor, std: Tensor) -> float:
    """One minus the mean over dims of squared error by the variance in the data of the heads.

    That of the scored set would say nothing of sets in which hardly anything happens.
    """
    error = (predicted - truth).square().flatten(0, -2).mean(0)  # [D]
    return float(1 - (error / std.square()).mean())
