"""Randomness that belongs to the slots of a dream: one generator each, so that no slot disturbs another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding
from numpy.typing import NDArray
from torch import Tensor

from aime_gym.errors import AimeGymError

CHUNK = 64
"""Steps of noise drawn from a generator at once: a thousand calls every step would cost more than the model."""


class SlotNoise:
    """Standard normal noise for N slots, each from its own `torch.Generator`.

    What a slot draws depends on its seed and on its own steps alone.

    Args:
        num_slots: N
        dim: S, numbers a step.
    """

    def __init__(self, num_slots: int, dim: int):
        self.num_slots = num_slots
        self._generators = [torch.Generator() for _ in range(num_slots)]
        self._chunks = torch.zeros(num_slots, CHUNK, dim)
        self._cursors = np.full(num_slots, CHUNK)
        self._seeded = np.zeros(num_slots, bool)
        self._slots = torch.arange(num_slots)

    def seed(
        self, seed: int | Sequence[int | None] | None, slots: NDArray[np.int64], np_random: np.random.Generator
    ) -> None:
        """Starts generators anew, with what Gymnasium makes of the seeds.

        Args:
            seed: Of the first slot, the others follow; or one a slot. None goes on with the generators as they are.
            slots: Those to seed.
            np_random: Draws the seeds of slots that have none and never had.

        Raises:
            AimeGymError: If there is not one seed a slot.
        """
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + slot for slot in range(self.num_slots)]
        elif not isinstance(seed, Sequence | np.ndarray):
            raise AimeGymError(f"A seed is an integer, one a slot, or None; got {seed!r}.")
        else:
            seeds = [None if one is None else int(one) for one in seed]
            if len(seeds) != self.num_slots:
                raise AimeGymError(f"Expected one seed a slot, {self.num_slots}; got {len(seeds)}.")
        for slot in slots:
            own = seeds[slot]
            if own is None and not self._seeded[slot]:
                own = int(np_random.integers(2**31))
            if own is not None:
                drawn, _ = seeding.np_random(own)
                self._generators[slot].manual_seed(int(drawn.integers(2**63 - 1)))
                self._cursors[slot], self._seeded[slot] = CHUNK, True

    def integer(self, slot: int, high: int) -> int:
        """A uniform integer in [0, high) from the generator of `slot`."""
        return int(torch.randint(high, (1,), generator=self._generators[slot]))

    def draw(self, active: NDArray[np.bool_] | None = None) -> Tensor:
        """The noise of one step.

        Args:
            active: Slots that take a step, [N]; all by default. The others get arbitrary numbers and draw nothing.

        Returns:
            [N, S] float32 on the CPU.
        """
        cursors = self._cursors
        if cursors.max() == CHUNK:
            empty = (cursors == CHUNK) if active is None else (cursors == CHUNK) & active
            for slot in empty.nonzero()[0]:
                self._chunks[slot].normal_(generator=self._generators[slot])
                cursors[slot] = 0
        used = cursors % CHUNK  # idle slots may have used up theirs
        noise = self._chunks[self._slots, torch.from_numpy(used)]  # [N, S]
        cursors += 1 if active is None else active
        return noise

    def get_state(self) -> dict[str, Any]:
        """Copies of the generators' states, the noise already drawn, and how far it is used."""
        return {
            "generators": torch.stack([generator.get_state() for generator in self._generators]),
            "chunks": self._chunks.clone(),
            "cursors": self._cursors.copy(),
            "seeded": self._seeded.copy(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` gave, bit for bit."""
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.set_state(saved.clone())
        self._chunks.copy_(state["chunks"])
        self._cursors[:] = state["cursors"]
        self._seeded[:] = state["seeded"]
