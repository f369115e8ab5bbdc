"""Policies in NumPy: random actions, and small networks in plain files that hold arrays and no code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from aime_gym.bodies.body import Choices
from aime_gym.errors import AimeGymError
from aime_gym.files import json_text, parse_json, write_atomically


@dataclass(frozen=True)
class CallablePolicy:
    """A function from a batch of observations to a batch of actions."""

    function: Callable[[Any], np.ndarray]

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """See SB3's `predict`."""
        return self.function(observation), None


@dataclass
class RandomPolicy:
    """Uniform actions, a stream of its own for each episode: the same in every world and batch size."""

    space: gym.Space
    generators: list[np.random.Generator] = field(default_factory=list)

    def begin(self, seeds: Sequence[int]) -> None:
        """Starts one stream a slot."""
        self.generators = [np.random.default_rng([seed, 1]) for seed in seeds]

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Returns uniform actions [B, A], whatever is observed; the signature is that of SB3's agents."""
        if choices := Choices.of(self.space):
            return np.stack([choices.draw(rng) for rng in self.generators]), None
        assert isinstance(self.space, spaces.Box)
        low, high = self.space.low, self.space.high
        return np.stack([rng.uniform(low, high) for rng in self.generators]).astype(self.space.dtype), None


class HeldActions:
    """Random actions that stay for a while, for data that show more of a body than uniform noise does.

    Each entry keeps its value for a geometric number of steps. Its mean is drawn once, between 1 and `LONGEST` steps.
    Half of the values are uniform, half are a bound.

    Args:
        size: A, the entries of an action; ignored for choices.
        rng: Where the numbers come from.
        choices: The choices that actions are, if they are; each is uniform then.
    """

    LONGEST = 20.0

    def __init__(self, size: int, rng: np.random.Generator, choices: Choices | None = None):
        self._size, self._rng, self._choices = len(choices.counts) if choices else size, rng, choices
        self._ends = 1 / np.exp(rng.uniform(0, np.log(self.LONGEST)))
        self._held = self._draw()

    def __call__(self) -> np.ndarray:
        """The next action: [A] float64 within -1 and 1, or an element of the choices' space."""
        self._held = np.where(self._rng.random(self._size) < self._ends, self._draw(), self._held)
        return self._held.reshape(self._choices.shape)[()] if self._choices else self._held

    def _draw(self) -> np.ndarray:
        if self._choices:
            return np.reshape(self._choices.draw(self._rng), -1)
        values = self._rng.uniform(-1, 1, self._size)
        return np.where(self._rng.random(self._size) < 0.5, np.sign(values), values)


class Stray:
    """Replaces some of an agent's actions by held random ones, a stretch of steps at a time.

    Args:
        held: The random actions.
        share: The share of steps that they decide, 0 to below 1.
        rng: Where the numbers come from.
    """

    LENGTH = 8.0
    """Mean number of steps of a stretch."""

    def __init__(self, held: HeldActions, share: float, rng: np.random.Generator):
        self._held, self._rng, self._strays = held, rng, False
        self._ends, self._begins = 1 / self.LENGTH, share / (1 - share) / self.LENGTH

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """An agent's action, or a held one in its place."""
        changes = self._rng.random() < (self._ends if self._strays else self._begins)
        self._strays ^= bool(changes)
        held = self._held()
        return held if self._strays else action


@dataclass(frozen=True)
class ZeroPolicy:
    """Actions of zeros; of choices the first options."""

    space: gym.Space

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Returns actions [B, A], whatever is observed."""
        slots = len(next(iter(observation.values())) if isinstance(observation, Mapping) else observation)
        if choices := Choices.of(self.space):
            return choices.decode(np.zeros((slots, choices.dim))), None
        return np.zeros((slots, *(self.space.shape or ())), np.float32), None


Array = NDArray[np.float32]

PLAIN = ".safetensors"
"""What the names of plain policies' files end with."""

MOST_NUMBERS = 10_000_000
"""A file with more is refused before its arrays are read."""


@dataclass(frozen=True)
class PlainMLP:
    """A deterministic network: standardise, dense layers, then tanh or a clip to [-1, 1].

    Args:
        weights: One ``[inputs, outputs]`` array a layer.
        biases: One ``[outputs]`` array a layer.
        mean: ``[D]``, subtracted from observations.
        std: ``[D]``, by which they are divided.
        limit: Standardised observations are clipped to it.
        activation: Between layers.
        squash: Whether actions are the tanh of the last layer rather than the layer itself, clipped.
        choices: What the last layer chooses from: its options with the largest numbers, or binaries above 0.
    """

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    mean: Array
    std: Array
    limit: float = 10.0
    activation: Literal["relu", "tanh"] = "relu"
    squash: bool = True
    choices: Choices | None = None

    @property
    def observation_space(self) -> spaces.Box:
        """The space of what it observes, as SB3's agents have it."""
        return spaces.Box(-np.inf, np.inf, self.mean.shape)

    @property
    def action_space(self) -> spaces.Space:
        """What it gives, as SB3's agents tell."""
        return self.choices.space if self.choices else spaces.Box(-1.0, 1.0, self.biases[-1].shape)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """Actions [B, A] of observations [B, D]; see `aime_gym.evaluation.returns.Policy`."""
        x = np.asarray(observation, np.float32)
        x = np.clip((x - self.mean) / self.std, -self.limit, self.limit)
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            if index < len(self.weights) - 1:
                x = np.maximum(x, 0) if self.activation == "relu" else np.tanh(x)
        if self.choices:
            return self.choices.decode(x + 0.5), None
        return np.tanh(x) if self.squash else np.clip(x, -1, 1), None

    def arrays(self) -> dict[str, Array]:
        """What the file holds, by name."""
        layers = {f"weight{i}": w for i, w in enumerate(self.weights)} | {
            f"bias{i}": b for i, b in enumerate(self.biases)
        }
        return {**layers, "mean": self.mean, "std": self.std}

    def check_sizes(self, name: str, seen: int, acts: int, choices: Choices | None = None) -> None:
        """Raises an `AimeGymError` unless it takes `seen` numbers and gives `acts` or choices; `name` is for it."""
        _check_choices(name, self.choices, choices)
        inputs, outputs = len(self.mean), len(self.biases[-1])
        if (inputs, outputs) != (seen, acts):
            raise AimeGymError(
                f"{name} sees {inputs} numbers and gives {outputs}; the body shows {seen} and takes {acts}."
            )

    def settings(self) -> dict[str, Any]:
        """What the file's metadata says beside the kind."""
        numbers = {"limit": self.limit, "activation": self.activation, "squash": self.squash}
        return numbers | _told(self.choices)


@dataclass(frozen=True)
class Rhythm:
    """Blind sine waves, one an action: ``clip(offset + amplitude * sin(2 pi (frequency * t + phase)))`` at step t.

    Args:
        offset: ``[A]``
        amplitude: ``[A]``
        frequency: ``[A]``, cycles a step.
        phase: ``[A]``, in cycles.
        choices: What the waves choose from: the options whose waves are highest, or binaries whose waves are above 0.
    """

    offset: Array
    amplitude: Array
    frequency: Array
    phase: Array
    choices: Choices | None = None

    @property
    def action_space(self) -> spaces.Space:
        """What it gives, as SB3's agents tell."""
        return self.choices.space if self.choices else spaces.Box(-1.0, 1.0, self.offset.shape)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """Actions [B, A]; the state is each episode's step [B]; see `aime_gym.evaluation.returns.Policy`."""
        slots = len(next(iter(observation.values())) if isinstance(observation, Mapping) else observation)
        step = np.zeros(slots, int) if state is None else np.asarray(state)
        if episode_start is not None:
            step = np.where(episode_start, 0, step)
        wave = np.sin(2 * np.pi * (self.frequency * step[:, None] + self.phase))
        waves = (self.offset + self.amplitude * wave).astype(np.float32)
        return self.choices.decode(waves + 0.5) if self.choices else np.clip(waves, -1, 1), step + 1

    def arrays(self) -> dict[str, Array]:
        """What the file holds, by name."""
        return {name: getattr(self, name) for name in ("offset", "amplitude", "frequency", "phase")}

    def check_sizes(self, name: str, seen: int, acts: int, choices: Choices | None = None) -> None:
        """Raises an `AimeGymError` unless it gives `acts` numbers or choices; `name` is for the message."""
        _check_choices(name, self.choices, choices)
        if len(self.offset) != acts:
            raise AimeGymError(f"{name} gives {len(self.offset)} numbers; the body takes {acts}.")

    def settings(self) -> dict[str, Any]:
        """Choices, if it acts by them."""
        return _told(self.choices)


PlainPolicy = PlainMLP | Rhythm


def _told(choices: Choices | None) -> dict[str, Any]:
    return {"choices": [choices.kind, list(choices.counts)]} if choices else {}


def _choices(settings: Mapping[str, Any]) -> Choices | None:
    """What `_told` told; a ValueError, TypeError or KeyError says what is wrong with it."""
    if "choices" not in settings:
        return None
    kind, counts = settings["choices"]
    if not isinstance(kind, str) or not all(type(count) is int for count in counts):
        raise ValueError(f"choices {settings['choices']!s:.80}")
    return Choices(kind, tuple(counts))  # type: ignore[arg-type]  # which it checks


def _check_choices(name: str, own: Choices | None, expected: Choices | None) -> None:
    if own != expected:
        acts = [each.space if each else "numbers in [-1, 1]" for each in (own, expected)]
        raise AimeGymError(f"{name} gives {acts[0]}; the body takes {acts[1]}.")


@dataclass
class NoisyPolicy:
    """Another policy's actions with noise, a stream of its own for each episode: alike in every world.

    Args:
        policy: The other one.
        noise: Standard deviation of Gaussian noise, in units of the action's half range; of choices the probability of
            another one.
    """

    policy: Any
    noise: float
    generators: list[np.random.Generator] = field(default_factory=list)

    @property
    def observation_space(self) -> Any:
        """That of the other one, if it tells."""
        return getattr(self.policy, "observation_space", None)

    @property
    def action_space(self) -> Any:
        """That of the other one, if it tells."""
        return getattr(self.policy, "action_space", None)

    def begin(self, seeds: Sequence[int]) -> None:
        """Starts one stream a slot."""
        self.generators = [np.random.default_rng([seed, 2]) for seed in seeds]
        if hasattr(self.policy, "begin"):
            self.policy.begin(seeds)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[NDArray[np.float32], Any]:
        """See `aime_gym.evaluation.returns.Policy`."""
        actions, state = self.policy.predict(observation, state, episode_start, deterministic)
        if choices := Choices.of(self.action_space):
            strayed = zip(actions, self.generators, strict=True)
            return np.stack([choices.stray(action, self.noise, rng) for action, rng in strayed]), state
        noise = np.stack([rng.standard_normal(actions.shape[1:]) for rng in self.generators])
        return np.clip(actions + self.noise * noise, -1, 1).astype(np.float32), state


def save_plain(policy: PlainPolicy, path: Path) -> Path:
    """Writes a policy's file, whole or not at all; equal policies have equal files."""
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in policy.arrays().items()}
    metadata = {
        "kind": "mlp" if isinstance(policy, PlainMLP) else "rhythm",
        "settings": json_text(policy.settings(), None),
    }
    return write_atomically(path, same_bytes(save(arrays, metadata)))


def load_plain(path: Path) -> PlainPolicy:
    """Reads what `save_plain` wrote; nothing in the file is run.

    Raises:
        AimeGymError: If it is no such file, or its arrays do not fit together.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            numbers = sum(int(np.prod(file.get_slice(name).get_shape())) for name in names)
            if numbers > MOST_NUMBERS:
                raise ValueError(f"{numbers} numbers")
            arrays = {name: np.asarray(file.get_tensor(name), np.float32) for name in names}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("numbers that are not finite")
        settings = dict(parse_json(metadata["settings"]))
        return _rhythm(arrays, settings) if metadata.get("kind") == "rhythm" else _mlp(arrays, settings)
    except FileNotFoundError as error:
        raise AimeGymError(f"There is no policy {path}.") from error
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        raise AimeGymError(f"{path} holds no plain policy of aime_gym ({error!r:.200}). Get it again.") from error


def _rhythm(arrays: Mapping[str, Array], settings: Mapping[str, Any]) -> Rhythm:
    """Waves of the same number of actions; a ValueError or KeyError says what does not fit."""
    choices = _choices(settings)
    offset, amplitude, frequency, phase = (arrays[name] for name in ("offset", "amplitude", "frequency", "phase"))
    rhythm = Rhythm(offset, amplitude, frequency, phase, choices)
    sizes = {array.shape for array in arrays.values()} | ({(choices.dim,)} if choices else set())
    if len(sizes) > 1 or rhythm.offset.ndim != 1:
        raise ValueError("arrays of different shapes")
    return rhythm


def _mlp(arrays: Mapping[str, Array], settings: Mapping[str, Any]) -> PlainMLP:
    """A network whose layers fit together; a ValueError or KeyError says what does not."""
    layers = sum(name.startswith("weight") for name in arrays)
    weights = tuple(arrays[f"weight{i}"] for i in range(layers))
    biases = tuple(arrays[f"bias{i}"] for i in range(layers))
    mean, std = arrays["mean"], arrays["std"]
    sizes = [mean.shape, *(bias.shape for bias in biases)]
    fits = all(w.shape == (*before, *after) for w, before, after in zip(weights, sizes, sizes[1:], strict=False))
    if not layers or not fits or std.shape != mean.shape or not (std > 0).all():
        raise ValueError("layers that do not fit together")
    if settings["activation"] not in ("relu", "tanh"):
        raise ValueError(f"activation {settings['activation']!r}")
    limit, squash, choices = float(settings["limit"]), bool(settings["squash"]), _choices(settings)
    if choices and biases[-1].shape != (choices.dim,):
        raise ValueError(f"{len(biases[-1])} numbers for {choices.space}")
    return PlainMLP(weights, biases, mean, std, limit, settings["activation"], squash, choices)


def same_bytes(content: bytes) -> bytes:
    """A safetensors file with its header in order: the library draws that of metadata anew whenever it writes.

    Args:
        content: The bytes of the file, with metadata.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = parse_json(content[8:end].decode())
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json_text(header, None).encode()
    padded = text.ljust(-(-len(text) // 8) * 8)  # tensors begin at multiples of eight bytes
    return len(padded).to_bytes(8, "little") + padded + content[end:]
