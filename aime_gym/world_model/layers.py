"""The networks of encoders, decoders and policies."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aime_gym.bodies.sensors import IMAGE_SIZE, scale
from aime_gym.errors import AimeGymError
from aime_gym.world_model.config import ModelConfig, NetConfig
from aime_gym.world_model.objective import Bernoulli, Normal, TanhNormal, UnscaledNormal


def activation(name: str) -> nn.Module:
    """The module for the name of an activation in a config."""
    modules: dict[str, nn.Module] = {
        "elu": nn.ELU(),
        "swish": nn.SiLU(),
        "leakyrelu": nn.LeakyReLU(0.1),
        "relu": nn.ReLU(),
        "gelu": nn.GELU(approximate="tanh"),
    }
    return modules[name]


class MLP(nn.Module):
    """Layers of Linear, LayerNorm (if `norm`) and activation, then a Linear head: [..., in_dim] -> [..., out_dim].

    Args:
        in_dim: Size of the input.
        out_dim: Size of the output; None leaves the head out, so that the output has `hidden_size`.
        hidden_size: Units in every hidden layer.
        hidden_layers: How many.
        hidden_activation: One of `config.ACTIVATIONS`.
        norm: ``"ln"`` or None.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int | None,
        hidden_size: int,
        hidden_layers: int,
        hidden_activation: str = "elu",
        norm: str | None = None,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        size = in_dim
        for _ in range(hidden_layers):
            layers += [nn.Linear(size, hidden_size), *([nn.LayerNorm(hidden_size)] if norm else [])]
            layers += [activation(hidden_activation)]
            size = hidden_size
        if out_dim is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Initializing zero-element")  # likelihood models infer no action
                layers.append(nn.Linear(size, out_dim))
        self.out_dim = size if out_dim is None else out_dim
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        return self.net(x)

    @classmethod
    def from_config(cls, in_dim: int, out_dim: int | None, config: NetConfig) -> MLP:
        """An MLP of the config's sizes."""
        return cls(in_dim, out_dim, config.hidden_size, config.hidden_layers, config.hidden_activation, config.norm)


class CNNEncoder(nn.Module):
    """Four strided convolutions: images [..., 3, 64, 64] -> [..., 32 * width]."""

    def __init__(self, width: int):
        super().__init__()
        channels = (3, width, 2 * width, 4 * width, 8 * width)
        layers: list[nn.Module] = []
        for size, next_size in pairwise(channels):
            layers += [nn.Conv2d(size, next_size, 4, stride=2), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.out_dim = 32 * width

    def forward(self, images: Tensor) -> Tensor:
        """[..., 3, 64, 64] in [0, 1] -> [..., 32 * width]."""
        flat = images.flatten(0, -4).contiguous(memory_format=torch.channels_last)  # as CPUs and tensor cores like it
        return self.net(flat).flatten(1).unflatten(0, images.shape[:-3])


class ResNetEncoder(nn.Module):
    """``dreamer_resnet``: strided convolutions with instance norms, [..., 3, 64, 64] -> [..., 128 * width]."""

    def __init__(self, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        for size, next_size in pairwise((3, width, 2 * width, 4 * width, 8 * width)):
            layers += [nn.Conv2d(size, next_size, 4, stride=2, padding=1)]
            layers += [nn.InstanceNorm2d(next_size, affine=True), nn.SiLU()]
        self.net = nn.Sequential(*layers)
        self.out_dim = 8 * width * 4 * 4

    def forward(self, images: Tensor) -> Tensor:
        """[..., 3, 64, 64] in [0, 1] -> [..., 128 * width]."""
        return self.net(images.flatten(0, -4) - 0.5).flatten(1).unflatten(0, images.shape[:-3])


def interleave(x: Tensor, odd: int, cut: int) -> Tensor:
    """Channels of four as every second row and column, without `cut` on each side and `odd` more at the end."""
    x, end = F.pixel_shuffle(x, 2), odd + cut
    return x[..., cut : x.shape[-2] - end, cut : x.shape[-1] - end]


class Upsampling(nn.ConvTranspose2d):
    """A transposed convolution of stride 2, as a convolution that CPUs are faster at.

    Each of its outputs with the same parity of row and column is a plain convolution of the input with every second
    tap; these four are computed as channels of one convolution and interleaved (Shi et al., "Real-Time Single Image and
    Video Super-Resolution", CVPR 2016). The same weights and, up to rounding, the same numbers.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0):
        super().__init__(in_channels, out_channels, kernel_size, stride=2)
        self.odd, self.cut = kernel_size % 2, padding

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[B, in, H, W] -> [B, out, 2 (H - 1) + kernel - 2 padding, 2 (W - 1) + kernel - 2 padding]."""
        assert self.bias is not None
        if x.shape[2:] == (1, 1):
            y = (x.flatten(1) @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:]) + self.bias[:, None, None]
            return y.contiguous(memory_format=torch.channels_last)  # which convolutions that follow keep, and like
        weight, bias = self.convolution()
        return interleave(F.conv2d(x, weight, bias, padding=weight.shape[-1] - 1), self.odd, self.cut)

    def convolution(self) -> tuple[Tensor, Tensor]:
        """The weight [out * 4, in, taps, taps] and bias of the plain convolution, whose padding is taps - 1."""
        assert self.bias is not None
        weight = F.pad(self.weight, (0, self.odd, 0, self.odd)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return weight.permute(1, 3, 5, 0, 2, 4).flip(4, 5).flatten(0, 2), self.bias.repeat_interleave(4)


class ImageDecoder(nn.Module):
    """Features [..., F] -> Normal over images, std 1.

    Attributes:
        net: Ends with a sigmoid, or its output is around 0.5.
        normal: What it gives.
    """

    net: nn.Sequential
    normal: type[Normal] = Normal

    def mean(self, features: Tensor) -> Tensor:
        """[..., F] -> [..., 3, 64, 64]."""
        images = self.net(features.flatten(0, -2)).unflatten(0, features.shape[:-1])
        return images if isinstance(self.net[-1], nn.Sigmoid) else images + 0.5

    def forward(self, features: Tensor) -> Normal:
        """[..., F] -> Normal [..., 3, 64, 64]."""
        mean = self.mean(features).float()
        return self.normal(mean, mean.new_ones(()))


class CNNDecoder(ImageDecoder):
    """``cnn_ha``: a Linear layer and four transposed convolutions."""

    def __init__(self, in_dim: int, width: int, sigmoid: bool = True):
        super().__init__()
        size = 32 * width
        self.net = nn.Sequential(
            nn.Linear(in_dim, size),
            nn.Unflatten(-1, (size, 1, 1)),
            Upsampling(size, 4 * width, 5),
            nn.ReLU(),
            Upsampling(4 * width, 2 * width, 5),
            nn.ReLU(),
            Upsampling(2 * width, width, 6),
            nn.ReLU(),
            Upsampling(width, 3, 6),
            *([nn.Sigmoid()] if sigmoid else []),
        )


class ResNetDecoder(ImageDecoder):
    """``dreamer_resnet``: a Linear layer and four transposed convolutions with instance norms without parameters."""

    def __init__(self, in_dim: int, width: int, sigmoid: bool = False):
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(in_dim, 16 * 8 * width), nn.Unflatten(-1, (8 * width, 4, 4))]
        for size, next_size in pairwise((8 * width, 4 * width, 2 * width, width)):
            layers += [Upsampling(size, next_size, 4, padding=1), nn.InstanceNorm2d(next_size), nn.SiLU()]
        layers += [Upsampling(width, 3, 4, padding=1), *([nn.Sigmoid()] if sigmoid else [])]
        self.net = nn.Sequential(*layers)


class TabularHead(nn.Module, ABC):
    """A distribution whose parameters are the outputs of MLPs on one input.

    Attributes:
        normal: What decoders of numbers give.
    """

    normal: type[Normal] = Normal

    @property
    @abstractmethod
    def networks(self) -> tuple[MLP, ...]:
        """The MLPs; the first one gives the mean."""

    @abstractmethod
    def distribution(self, *outputs: Tensor) -> Any:
        """What the outputs [..., D] of the networks say."""

    def mean(self, x: Tensor) -> Tensor:
        """The first network alone: [..., in_dim] -> [..., D]."""
        return self.networks[0](x)

    @torch.no_grad()
    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Makes its mean in other units what it was: units [D] of before are `scale` new ones plus `shift`."""
        last: Any = self.networks[0].net[-1]
        last.weight /= scale[:, None]
        last.bias.sub_(shift).div_(scale)

    def forward(self, x: Tensor) -> Any:
        """[..., in_dim] -> a distribution [..., D]."""
        return self.distribution(*(network(x) for network in self.networks))


class UnitDecoder(TabularHead):
    """``dmlp``: an MLP for the mean, std 1."""

    def __init__(self, in_dim: int, out_dim: int, config: NetConfig):
        super().__init__()
        self.net = MLP.from_config(in_dim, out_dim, config)

    @property
    def networks(self) -> tuple[MLP, ...]:
        """One."""
        return (self.net,)

    def distribution(self, *outputs: Tensor) -> Normal:
        """[..., D] -> Normal [..., D]."""
        mean = outputs[0].float()
        return self.normal(mean, mean.new_ones(()))


class StdDecoder(TabularHead):
    """``smlp``: an MLP for the mean and one for the std (softplus)."""

    def __init__(self, in_dim: int, out_dim: int, config: NetConfig):
        super().__init__()
        self.mu_net = MLP.from_config(in_dim, out_dim, config)
        self.std_net = MLP.from_config(in_dim, out_dim, config)
        self.min_std = config.min_std

    @property
    def networks(self) -> tuple[MLP, ...]:
        """Two."""
        return self.mu_net, self.std_net

    def distribution(self, *outputs: Tensor) -> Normal:
        """[..., D], [..., D] -> Normal [..., D]."""
        mean, raw = outputs
        return self.normal(mean.float(), F.softplus(raw.float()) + self.min_std)


class ConstantStdDecoder(TabularHead):
    """``ssmlp``: an MLP for the mean, and one learnt std a dim (exp)."""

    def __init__(self, in_dim: int, out_dim: int, config: NetConfig):
        super().__init__()
        self.mu_net = MLP.from_config(in_dim, out_dim, config)
        self.log_std = nn.Parameter(torch.zeros(out_dim))
        self.min_std = config.min_std

    @property
    def networks(self) -> tuple[MLP, ...]:
        """One."""
        return (self.mu_net,)

    def distribution(self, *outputs: Tensor) -> Normal:
        """[..., D] -> Normal [..., D]."""
        return self.normal(outputs[0].float(), self.log_std.exp() + self.min_std)

    @torch.no_grad()
    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """See `TabularHead.rescale`."""
        super().rescale(scale, shift)
        self.log_std.sub_(scale.log())


class EventDecoder(TabularHead):
    """``binary``: an MLP for the logit of an event."""

    def __init__(self, in_dim: int, out_dim: int, config: NetConfig):
        super().__init__()
        self.prob_net = MLP.from_config(in_dim, out_dim, config)

    @property
    def networks(self) -> tuple[MLP, ...]:
        """One."""
        return (self.prob_net,)

    def distribution(self, *outputs: Tensor) -> Bernoulli:
        """[..., D] -> Bernoulli [..., D]."""
        return Bernoulli(outputs[0].float().sigmoid())

    def mean(self, x: Tensor) -> Tensor:
        """The probability: [..., in_dim] -> [..., D]."""
        return self.prob_net(x).float().sigmoid()


class TanhGaussianPolicy(TabularHead):
    """A distribution over actions: one MLP for the mean and one for the std before the tanh.

    Args:
        in_dim: Size of the input.
        action_dim: Size of the actions.
        config: The config of both MLPs; its `min_std` is added to the std (softplus).
    """

    def __init__(self, in_dim: int, action_dim: int, config: NetConfig):
        super().__init__()
        self.mean_net = MLP.from_config(in_dim, action_dim, config)
        self.std_net = MLP.from_config(in_dim, action_dim, config)
        self.min_std = config.min_std

    @property
    def networks(self) -> tuple[MLP, ...]:
        """Two."""
        return self.mean_net, self.std_net

    def distribution(self, *outputs: Tensor) -> TanhNormal:
        """[..., A], [..., A] -> TanhNormal [..., A]."""
        mean, raw = outputs
        return TanhNormal(Normal(mean.float(), F.softplus(raw.float()) + self.min_std))


class Standardiser(nn.Module):
    """Mean 0 and standard deviation 1 for one sensor."""

    def __init__(self, dim: int):
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Own units -> standardised, [..., D]."""
        return (x - self.mean) / self.std

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Takes over moments of shape [D], for constants see `scale`.

        Raises:
            AimeGymError: If they are of another shape, not finite or negative.
        """
        shape = self.mean.shape
        if mean.shape != shape or std.shape != shape or not bool((mean + std).isfinite().all() & (std >= 0).all()):
            raise AimeGymError(f"Standardising expected finite moments of shape {list(shape)}, got {mean} and {std}.")
        self.mean.copy_(mean)
        self.std.copy_(scale(mean, std))

    def inverse(self, x: Tensor) -> Tensor:
        """Standardised -> own units, [..., D]."""
        return torch.addcmul(self.mean, x, self.std)


def build_encoders(config: ModelConfig) -> tuple[nn.ModuleDict, int]:
    """The encoders by sensor (rssmo: one for all tabular ones) and the dim of the embedding."""
    encoders, embedding_dim = nn.ModuleDict(), 0
    sizes = {name: code.size for name, code in config.codes.items()}
    groups: dict[str, int] = {}
    for name in config.observed:
        if name == "image" or config.cell == "rssm":
            groups[name] = sizes.get(name, 0)
        else:
            groups["tabular"] = groups.get("tabular", 0) + sizes[name]
    for name, dim in groups.items():
        if name == "image":
            net = config.encoders["visual"]
            cnn = (ResNetEncoder if net.name == "dreamer_resnet" else CNNEncoder)(net.width)
            encoders[name], size = cnn, cnn.out_dim
        else:
            net = config.encoders["tabular"]
            mlp = MLP.from_config(dim, net.hidden_size if net.have_head else None, net)
            encoders[name], size = (nn.Identity(), dim) if net.name == "identity" else (mlp, mlp.out_dim)
        embedding_dim += size
    return encoders, embedding_dim


def build_decoder(name: str, config: ModelConfig, part: str, in_dim: int | None = None) -> nn.Module:
    """The decoder of an output or probe.

    Args:
        name: A sensor, a reward or ``"is_terminal"``.
        config: Says which network.
        part: ``"decoders"`` or ``"probes"``.
        in_dim: What it reads; by default features.
    """
    nets, in_dim = getattr(config, part), in_dim or config.feature_dim
    if name == "is_terminal":
        return EventDecoder(in_dim, 1, nets["binary"])
    decoder: Any
    if name == "image":
        net = nets["visual"]
        decoder = (ResNetDecoder if net.name == "dreamer_resnet" else CNNDecoder)(in_dim, net.width, net.sigmoid)
    else:
        classes: dict[str, Callable[[int, int, NetConfig], nn.Module]]
        classes = {"dmlp": UnitDecoder, "smlp": StdDecoder, "ssmlp": ConstantStdDecoder}
        decoder = classes[nets["tabular"].name](in_dim, config.codes[name].size, nets["tabular"])
    if config.version == 2:
        decoder.normal = UnscaledNormal
    return decoder


def resize(images: Tensor) -> Tensor:
    """Images [..., C, H, W] at the model's own 64 x 64 (bilinear, with antialiasing)."""
    if images.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
        return images
    flat = images.flatten(0, -4)
    resized = F.interpolate(flat, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True, align_corners=False)
    return resized.unflatten(0, images.shape[:-3])


class NormedGRU(nn.Module):
    """The GRU of AIME-v2: one product for all gates, and a LayerNorm over them (Hafner et al., ICLR 2021)."""

    def __init__(self, input_dim: int, memory_dim: int):
        super().__init__()
        self.input_layer = nn.Linear(input_dim + memory_dim, 3 * memory_dim)
        self.norm = nn.LayerNorm(3 * memory_dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """[B, I], [B, M] -> [B, M]."""
        return self.update(self.norm(self.input_layer(torch.cat([x, memory], dim=-1))), memory)

    @staticmethod
    def update(gates: Tensor, memory: Tensor) -> Tensor:
        """The next memory from the normed gates: [B, 3 M], [B, M] -> [B, M]."""
        keep, reset, proposal = gates.chunk(3, dim=-1)
        return torch.lerp(torch.tanh(reset.sigmoid() * proposal), memory, keep.sigmoid())
