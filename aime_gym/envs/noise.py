"""Randomness that belongs to the slots of a dream, without a generator: a hash of a slot's key and of what it counts.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), call it counter-based. The hash is the mixing of
SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) in the wrapping arithmetic of
int64, which is the same on every device. What a slot draws depends on its key and its count alone, whatever the number
of slots, and both are plain tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aime_gym.errors import AimeGymError

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


class SlotNoise:
    """The noise of the steps of N slots, made for some steps ahead where slots are few.

    The buffer only saves time: every number follows from keys and counts.

    Args:
        dim: S, numbers a step.
    """

    def __init__(self, dim: int):
        self._dim = dim
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
            steps = min(AHEAD, _NUMBERS_AHEAD // (len(keys) * self._dim)) if keys.device.type == "cpu" else 1
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
