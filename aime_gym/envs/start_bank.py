"""Where dreams begin, what their slots draw, and what the dreams of one model share in a process.

What a slot draws needs no generator: it is a hash of the slot's key and of how often it has drawn. Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), call that counter-based. The hash is the mixing of SplitMix64
(Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) in the wrapping arithmetic of int64,
which is the same on every device. So neither the number of slots nor the device matters, and both are plain tensors.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from aime_gym.bodies.sensors import IMAGE_SIZE
from aime_gym.errors import AimeGymError, unknown_name
from aime_gym.observations import by_name, from_shown, to_tensors
from aime_gym.world_model.checkpoint import fingerprint, load_pretrained_model, load_starts, model_folder
from aime_gym.world_model.model import WorldModel

_lock = threading.RLock()

_loaded: WeakValueDictionary[Hashable, WorldModel] = WeakValueDictionary()

_as_loaded: WeakKeyDictionary[WorldModel, Hashable] = WeakKeyDictionary()

_parts: WeakKeyDictionary[WorldModel, SharedParts] = WeakKeyDictionary()


class SharedParts:
    """What was made of a model with the weights that it has now, for all dreams of it."""

    def __init__(self, weights: tuple[Hashable, ...]):
        self.weights = weights
        self._made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` makes, without the model itself in it, the first time that somebody asks for the key.

        Args:
            key: All that decides the result but for the model's weights and settings.
            make: Is called without gradients.
        """
        with _lock, torch.inference_mode(False), torch.no_grad():
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]


def shared_parts(model: WorldModel) -> SharedParts:
    """The parts of a model: new ones where its weights or settings have changed since somebody asked."""
    weights = fingerprint(model)
    with _lock:
        parts = _parts.get(model)
        if parts is None or parts.weights != weights:
            parts = _parts[model] = SharedParts(weights)
        return parts


def shared_model(name_or_folder: str | Path) -> WorldModel:
    """The model of a name or folder: one object as long as a dream uses it and neither it nor its files change.

    Raises:
        AimeGymError: For the same reasons as `load_pretrained_model`.
    """
    folder = model_folder(name_or_folder)
    files = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.iterdir()))
    key = (folder, files)
    with _lock:
        model = _loaded.get(key)
        if model is None or fingerprint(model) != _as_loaded[model]:
            model = load_pretrained_model(name_or_folder)
            _loaded[key], _as_loaded[model] = model, fingerprint(model)
        return model


MODES = ("reset", "dataset")


class DreamState(NamedTuple):
    """Everything that decides what comes next in N slots. Its tensors are never changed in place.

    Attributes:
        latents: Features of the model, [N, F] float32.
        observations: What they look like: sensors side by side [N, D] float32, images [N, 64, 64, 3] uint8, or the
            latents.
        keys: What each slot draws with, [N] int64.
        counts: How often it has drawn, [N] int64.
        steps: Taken in the present episode, [N] int64; -1 in slots that have not begun.
        done: Whether the episode is over, [N] bool.
        starts: Index of the real start of the episode in the model's bank, [N] int64; -1 if it was none of them.
    """

    latents: Tensor
    observations: Tensor
    keys: Tensor
    counts: Tensor
    steps: Tensor
    done: Tensor
    starts: Tensor


class Transition(NamedTuple):
    """The result of a step.

    Attributes:
        state: After it, and after the resets that belong to it.
        rewards: [N] float32
        terminations: [N] bool
        truncations: [N] bool
        task_rewards: What the model predicts, without price or doubt: [N] float32.
        termination_logits: Logits of the probability that the episode ends, [N] float32; None if the model does not
            predict it.
        doubt: In nats, or in standard deviations of the ensemble, [N] float32; infinite where the model left the finite
            numbers. None if nothing asks for it.
        diverged: Slots where it did, [N] bool: they keep their last finite latent. None if there are none.
        began: Slots that this step has reset, [N] bool; None if there are none.
        final_observations: The observations before these resets, with SAME_STEP; else None.
    """

    state: DreamState
    rewards: Tensor
    terminations: Tensor
    truncations: Tensor
    task_rewards: Tensor
    termination_logits: Tensor | None
    doubt: Tensor | None
    diverged: Tensor | None
    began: Tensor | None = None
    final_observations: Tensor | None = None


class StartBank:
    """The real frames of a model's `starts.npz`, filtered once, in float32, with posterior means.

    All dreams of a model share it: nothing in it is to be changed.

    Args:
        model: What filters.
        starts: Its bank, see `aime_gym.world_model.checkpoint.load_starts`.

    Attributes:
        starts: The bank: each observed sensor and ``pre_action`` [K, M, ...], ``is_reset`` [M] and ``physics`` [M, n].
        features: The latents after the last frame, [M, F] float32.
    """

    def __init__(self, model: WorldModel, starts: Mapping[str, np.ndarray]):
        self.starts = dict(starts)
        self.features = filter_frames(model, {name: starts[name] for name in model.observed}, starts["pre_action"])
        resets = np.asarray(starts["is_reset"], bool)
        first, anywhere = resets.nonzero()[0], (~resets).nonzero()[0]
        kinds = {"reset": first, "dataset": anywhere if len(anywhere) else first}
        self._kinds = {kind: torch.from_numpy(known).to(self.features.device) for kind, known in kinds.items()}

    def __len__(self) -> int:
        return len(self.features)

    def choose(
        self, start: str | int | Sequence[int], slots: Tensor, num_slots: int, keys: Tensor, counts: Tensor
    ) -> Tensor:
        """Which start each slot takes.

        Args:
            start: ``"reset"`` or ``"dataset"``, drawn for each slot; an index into the bank; or one index for each slot
                of the env.
            slots: The slots that begin, [B].
            num_slots: N
            keys: The keys of the slots that begin, [B]; see `aime_gym.parallel`.
            counts: Theirs, [B].

        Returns:
            Indices [B] int64.

        Raises:
            AimeGymError: If there is no such start.
        """
        if isinstance(start, str):
            if start not in MODES:
                raise unknown_name("start", start, MODES)
            known = self._kinds[start]
            if not len(known):
                raise AimeGymError(f"The model's starts.npz holds no start of the kind {start!r}.")
            return known[integers(keys, counts, len(known))]
        indices = np.asarray(start)
        if not np.issubdtype(indices.dtype, np.integer) or indices.shape not in ((), (num_slots,)):
            raise AimeGymError(
                f"A start is 'reset', 'dataset', an index, one index a slot ({num_slots}), or a mapping with "
                f"'observations' and 'actions'; got {start!r}."
            )
        chosen = torch.from_numpy(np.broadcast_to(indices, num_slots).astype(np.int64)).to(slots.device)[slots]
        if bool(((chosen < 0) | (chosen >= len(self))).any()):
            raise AimeGymError(f"The model has starts 0 to {len(self) - 1}; got {start!r}.")
        return chosen

    def physics(self, index: int) -> NDArray[np.float64]:
        """The physics state at the last frame of a start, [nq + nv (+ na)].

        Raises:
            AimeGymError: If the bank stores none or has no such start.
        """
        if "physics" not in self.starts:
            raise AimeGymError("The model's starts.npz stores no physics states: it was made from data without them.")
        if not 0 <= index < len(self):
            raise AimeGymError(f"The model has starts 0 to {len(self) - 1}; got {index}.")
        return np.array(self.starts["physics"][index], np.float64)


def shared_bank(model: WorldModel) -> StartBank | None:
    """The bank of a model, filtered once a process; None where its folder has no `starts.npz`.

    Raises:
        AimeGymError: If that file does not fit the model.
    """
    path = None if model.folder is None else model.folder / "starts.npz"
    if path is None or not path.exists():
        return None
    file = path.stat()
    key = ("starts", file.st_mtime_ns, file.st_size)
    return shared_parts(model).get(key, lambda: StartBank(model, load_starts(model)))


@torch.no_grad()
def filter_frames(model: WorldModel, observations: Mapping[str, np.ndarray], actions: np.ndarray) -> Tensor:
    """Estimates the latent after real frames, with posterior means.

    Args:
        model: What filters.
        observations: Observed sensor -> [K, B, dim]; images [K, B, 64, 64, 3] uint8.
        actions: The actions that led to the frames (`pre_action`), [K, B, A].

    Returns:
        [B, F] float32.

    Raises:
        AimeGymError: If a sensor is missing or something is of a wrong shape or not finite.
    """
    device = model.cell.initial_state.device
    frames = to_tensors(observations, device)
    led = to_tensors({"pre_action": actions}, device)["pre_action"]
    return model.observe(frames, led, sample=False)[0][-1]


def to_frames(model: WorldModel, observation: Any) -> tuple[dict[str, Tensor], bool]:
    """What an env shows, as the model observes it.

    Args:
        model: Says which sensors there are, and where the tensors go.
        observation: ``"state"``, ``"dict"`` or ``"image"``, of one env or of N.

    Returns:
        Observed sensor -> [N, ...], and whether it was the observation of one env, without the axis of N.

    Raises:
        AimeGymError: If a sensor is missing, of a wrong shape or not finite.
    """
    config = model.config
    sensors = [sensor for sensor in config.sensors if sensor.name in model.observed]
    if not isinstance(observation, Mapping):
        observation = by_name(sensors, observation)
    missing = [name for name in model.observed if name not in observation]
    if missing:
        raise AimeGymError(
            f"The model observes {', '.join(model.observed)}; the observation lacks {', '.join(missing)}."
        )
    if "image" in model.observed:
        image, shape = np.asarray(observation["image"]), (IMAGE_SIZE, IMAGE_SIZE, 3)
        if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-3:] != shape:
            raise AimeGymError(f"'image' is {shape} uint8, or N of them; got {image.shape} {image.dtype}.")
    observation = from_shown(sensors, observation)
    frames = to_tensors({name: observation[name] for name in model.observed})
    shapes = {name: (3, IMAGE_SIZE, IMAGE_SIZE) if name == "image" else (config.dims[name],) for name in frames}
    single = {name: tensor.shape == shapes[name] for name, tensor in frames.items()}
    if any(single.values()):
        frames = {name: tensor[None] for name, tensor in frames.items()}
    for name, tensor in frames.items():
        if tensor.shape[1:] != shapes[name] or len(tensor) != len(frames[model.observed[0]]):
            raise AimeGymError(f"{name!r} is {shapes[name]}, or N of them; got {tuple(tensor.shape)}.")
        if not tensor.isfinite().all():
            raise AimeGymError(f"{name!r} holds values that are not finite.")
    device = model.cell.initial_state.device
    return {name: tensor.to(device) for name, tensor in frames.items()}, any(single.values())


AHEAD = 64
"""Steps of noise made at once for few slots: an operation takes as long for one number as for thousands."""
_NUMBERS_AHEAD = 2**15
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 2**64


def slot_keys(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The keys of slots, [N] int64.

    Args:
        seeds: One integer a slot, 0 or larger, of any size.
        device: Where the keys are to be.

    Raises:
        AimeGymError: If a seed is negative.
    """
    folded = []
    for seed in map(int, seeds):
        if seed < 0:
            raise AimeGymError(f"A seed is an integer of 0 or more; got {seed}.")
        word = seed % _WORD
        while seed >= _WORD:
            seed //= _WORD
            word = ((word + _GOLDEN) * _FIRST + seed) % _WORD
        folded.append(_signed(word))
    return _mix(torch.tensor(folded, dtype=torch.int64, device=device) + _signed(_GOLDEN))


def integers(keys: Tensor, counts: Tensor, high: int) -> Tensor:
    """Uniform integers in [0, high) from keys and counts of one shape: [...] int64."""
    return (_mix(_words(keys, counts)) & (2**63 - 1)) % high


def standard_normal(keys: Tensor, counts: Tensor, dim: int) -> Tensor:
    """Independent standard-normal numbers (Box and Muller, 1958).

    Args:
        keys: [...] int64
        counts: How often each has drawn, int64; their shape broadcasts with that of the keys.
        dim: S

    Returns:
        [..., S] float32, none beyond 6.6.
    """
    pairs = -(-dim // 2)
    places = torch.arange(1, pairs + 1, device=keys.device) * _signed(_GOLDEN)
    bits = _mix(_words(keys, counts)[..., None] + places)  # [..., S / 2], of which each half makes one number
    radius = (bits >> 32).float().abs_().add_(0.5).mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
    angle = bits.to(torch.int32).float().mul_(math.pi / 2**31)
    return torch.cat([radius * angle.cos(), radius.mul_(angle.sin_())], -1)[..., :dim]


def recover(before: Tensor, sensed: Tensor | None, after: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Puts slots that are not finite back, without a look at any number.

    Args:
        before: Latents to put them back to, [N, F].
        sensed: What was decoded there, [N, D or more], if it matters.
        after: Latents, [N, F].
        means: What was decoded of them, [N, D or more].

    Returns:
        Latents [N, F], what is decoded of them, and which slots were put back [N].
    """
    bad = ~(after.isfinite().all(1) & means.isfinite().all(1))
    last = torch.zeros_like(means)
    if sensed is not None:
        last = functional.pad(sensed.nan_to_num(), (0, means.shape[1] - sensed.shape[1]))  # or crops
    return torch.where(bad[:, None], before, after), torch.where(bad[:, None], last, means), bad


class SlotNoise:
    """The noise of the steps of N slots, made for some steps ahead where slots are few.

    The buffer only saves time: every number follows from keys and counts.

    Args:
        dim: S, numbers a step.
        ahead: Whether to look which steps are made already, for which a GPU would have to wait.
    """

    def __init__(self, dim: int, ahead: bool = True):
        self._dim, self._most = dim, AHEAD if ahead else 1
        self._keys = self._ahead = self._counts = torch.empty(0)  # [N], [steps, N, S], [steps + 1, N]
        self._last: tuple[Any, Any, int] = None, None, 0  # keys, counts and row of the step to come
        self._rows = 0
        self._each_step: tuple[Tensor, ...] = ()
        self._each_count: tuple[Tensor, ...] = ()

    def draw(self, keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The noise of one step, `standard_normal(keys, counts, S)`, and the counts after it.

        Args:
            keys: [N] int64, never changed in place, as the counts.
            counts: [N] int64

        Returns:
            [N, S] and [N].
        """
        known, given, row = self._last
        if known is not keys or given is not counts or row == self._rows:  # else it goes on from the last step
            steps = min(self._most, _NUMBERS_AHEAD // (len(keys) * self._dim))
            if steps <= 1:
                return standard_normal(keys, counts, self._dim), counts + 1
            row = 0
            if not torch.equal(keys, self._keys):
                self._look_ahead(keys, counts, steps)
            offsets = counts - self._counts[0]
            least, most = (int(end) for end in offsets.aminmax())
            if least < 0 or most >= self._rows:
                self._look_ahead(keys, counts, steps)
            elif least < most:
                return self._ahead[offsets, torch.arange(len(keys))], counts + 1
            else:
                row = least
        following = self._each_count[row + 1]
        self._last = keys, following, row + 1
        return self._each_step[row], following

    def _look_ahead(self, keys: Tensor, counts: Tensor, steps: int) -> None:
        with torch.inference_mode(False):  # as gradients may be taken with what was made without
            self._keys = keys.clone()
            self._counts = counts.clone() + torch.arange(steps + 1)[:, None]
            self._ahead = standard_normal(self._keys, self._counts[:-1], self._dim)
            self._each_step, self._each_count = self._ahead.unbind(), self._counts.unbind()  # to index is slower
        self._rows = steps


def _words(keys: Tensor, counts: Tensor) -> Tensor:
    return _mix(keys + counts * _signed(_GOLDEN))


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's mixing of int64, in place."""
    words.bitwise_xor_((words >> 30).bitwise_and_(2**34 - 1)).mul_(_signed(_FIRST))  # a shift copies the sign
    words.bitwise_xor_((words >> 27).bitwise_and_(2**37 - 1)).mul_(_signed(_SECOND))
    return words.bitwise_xor_((words >> 31).bitwise_and_(2**33 - 1))


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
