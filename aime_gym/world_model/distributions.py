"""Normal and tanh-normal distributions, factorised over the last dimension."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_ACTION_LIMIT = 0.999
"""`TanhNormal.log_prob` clamps actions to ± this, where the inverse of tanh is still tame."""


class Normal(NamedTuple):
    """Independent normals.

    Attributes:
        mean: [..., D]
        std: Of a shape that broadcasts to that of the mean.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor | None) -> Tensor:
        """The reparameterised sample for standard-normal noise [..., D]; the mean for None."""
        return self.mean if noise is None else torch.addcmul(self.mean, self.std, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density per dim: [..., D] -> [..., D]."""
        return -0.5 * ((value - self.mean) / self.std).square() - self.std.log() - _HALF_LOG_TWO_PI

    def detach(self) -> Normal:
        """The same distribution, without gradients."""
        return Normal(self.mean.detach(), self.std.detach())

    def kl(self, other: Normal) -> Tensor:
        """KL(self ‖ other) per dim, [..., D]."""
        ratio = self.std / other.std
        distance = (self.mean - other.mean) / other.std
        return 0.5 * (ratio.square() + distance.square() - 1) - ratio.log()


class TanhNormal(NamedTuple):
    """The tanh of a normal: actions in (-1, 1).

    Attributes:
        base: The normal before the tanh.
    """

    base: Normal

    @property
    def mode(self) -> Tensor:
        """Tanh of the base's mean, [..., D]: what is called the mode of a policy."""
        return self.base.mean.tanh()

    def sample(self, noise: Tensor | None) -> Tensor:
        """The reparameterised sample for standard-normal noise [..., D]; the mode for None."""
        return self.base.sample(noise).tanh()

    def log_prob(self, action: Tensor) -> Tensor:
        """Log density per dim of actions clamped to ±0.999: [..., D] -> [..., D]."""
        value = action.clamp(-_ACTION_LIMIT, _ACTION_LIMIT).atanh()
        log_slope = 2 * (math.log(2) - value - F.softplus(-2 * value))
        return self.base.log_prob(value) - log_slope

    def kl(self, other: TanhNormal) -> Tensor:
        """KL(self ‖ other) per dim, [..., D]: that of the bases."""
        return self.base.kl(other.base)
