"""Generator and discriminator of Fixed-Point GAN (Siddiquee et al. 2019, https://arxiv.org/abs/1908.06965)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class FixedPointGeneratorOutput(BaseOutput):
    """
    sample: (B, C, H, W) in [-1, 1], the image translated to the given labels.
    residual: (B, C, H, W), the change that is added to the image before the sum is mapped back into [-1, 1].
    """

    sample: torch.Tensor
    residual: torch.Tensor | None = None


@dataclass
class FixedPointDiscriminatorOutput(BaseOutput):
    """
    score: (B, 1, h, w), for each patch; higher is more real.
    logits: (B, num_classes), of the image's class.
    """

    score: torch.Tensor
    logits: torch.Tensor | None = None


def class_vectors(class_labels: torch.Tensor, num_classes: int, like: torch.Tensor) -> torch.Tensor:
    """(B,) class ids or (B, num_classes) vectors -> (B, num_classes) in the type and on the device of `like`."""
    if class_labels.ndim == 1:
        class_labels = F.one_hot(class_labels.long(), num_classes)
    if class_labels.shape != (like.shape[0], num_classes):
        raise ValueError(
            f"expected class ids of shape ({len(like)},) or vectors ({len(like)}, {num_classes}), "
            f"got {tuple(class_labels.shape)}"
        )
    return class_labels.to(like.device, like.dtype)


class ConditionalInstanceNorm2d(nn.InstanceNorm2d):
    """Instance norm whose scale and shift also depend on the class (Dumoulin et al. 2017, arXiv 1610.07629).

    With `num_classes=0` it is plain affine instance norm and ignores the class.
    """

    def __init__(self, channels: int, num_classes: int = 0, track_running_stats: bool = False) -> None:
        super().__init__(channels, affine=True, track_running_stats=track_running_stats)
        self.of_class = nn.Linear(num_classes, 2 * channels, bias=False) if num_classes else None
        if self.of_class is not None:
            nn.init.normal_(self.of_class.weight, std=0.1)  # with zeros all classes would start equal

    def forward(self, x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        if self.of_class is None:
            return x
        scale, shift = self.of_class(vectors)[..., None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class FixedPointResBlock(nn.Module):
    """Convolution, norm, ReLU, convolution, norm; the input is added to the result."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)

    def forward(self, x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm1(self.conv1(x), vectors))
        return x + self.norm2(self.conv2(h), vectors)


class FixedPointGenerator(ModelMixin, ConfigMixin):
    """Translates an image to given labels in one pass, changing as little as possible.

    The network computes a difference; its output is tanh(image + difference). Two stride-2 convolutions down,
    residual blocks, two up, instance norm throughout.

    Args:
        sample_size: side of the image in pixels, a multiple of 4.
        in_channels: of the image.
        num_classes: length of the class vector.
        base_channels: of the first convolution; doubled twice on the way down.
        num_res_blocks: residual blocks at a quarter of the resolution.
        conditioning: the input of the labels. "concatenate", the original: as constant maps beside the image. Instance
            norm removes a constant, so such a map has an effect only near the border (zero padding). "norm": as a scale
            and a shift for each class in every norm, which have an effect everywhere.
        squash: the function that maps image + difference into [-1, 1]. "tanh", the original: to keep an image, the
            difference must be atanh(x) - x everywhere. "clip": a difference of zero keeps the image, and the last
            convolution starts at zero, so that training starts from the identity.
        use_running_statistics: keep running means and variances while training and normalise with them in eval mode.
            False: always each image's own, as the original does at test time (its generator is never put into eval
            mode); then the result of an image does not depend on its batch.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 1,
        num_classes: int = 2,
        base_channels: int = 64,
        num_res_blocks: int = 6,
        conditioning: str = "norm",
        squash: str = "tanh",
        use_running_statistics: bool = False,
    ) -> None:
        super().__init__()
        if conditioning not in ("concatenate", "norm"):
            raise ValueError(f"expected `conditioning` concatenate or norm, got {conditioning!r}")
        if squash not in ("tanh", "clip"):
            raise ValueError(f"expected `squash` tanh or clip, got {squash!r}")
        if sample_size % 4 or sample_size < 8:
            raise ValueError(f"expected a `sample_size` of 8 or more that 4 divides, got {sample_size}")
        if num_classes < 1:
            raise ValueError(f"expected at least one class, got `num_classes={num_classes}`")

        def norm(channels):
            return ConditionalInstanceNorm2d(
                channels, num_classes if conditioning == "norm" else 0, use_running_statistics
            )

        d = base_channels
        label_maps = num_classes if conditioning == "concatenate" else 0
        self.conv_in = nn.Conv2d(in_channels + label_maps, d, 7, padding=3, bias=False)
        self.norm_in = norm(d)
        self.down_convs = nn.ModuleList(nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False) for c in (d, 2 * d))
        self.down_norms = nn.ModuleList(norm(c) for c in (2 * d, 4 * d))
        self.res_blocks = nn.ModuleList(FixedPointResBlock(4 * d, norm) for _ in range(num_res_blocks))
        self.up_convs = nn.ModuleList(nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False) for c in (4 * d, 2 * d))
        self.up_norms = nn.ModuleList(norm(c) for c in (2 * d, d))
        self.conv_out = nn.Conv2d(d, in_channels, 7, padding=3, bias=False)
        if squash == "clip":
            nn.init.zeros_(self.conv_out.weight)

    def forward(
        self, sample: torch.Tensor, class_labels: torch.Tensor, return_dict: bool = True
    ) -> FixedPointGeneratorOutput | tuple:
        """(B, C, H, W) in [-1, 1]; (B,) class ids or (B, num_classes) vectors -> `FixedPointGeneratorOutput`."""
        vectors = class_vectors(class_labels, self.config.num_classes, sample)
        h = sample
        if self.config.conditioning == "concatenate":
            h = torch.cat([sample, vectors[..., None, None].expand(-1, -1, *sample.shape[2:])], dim=1)
        h = F.relu(self.norm_in(self.conv_in(h), vectors))
        for conv, norm in zip(self.down_convs, self.down_norms, strict=True):
            h = F.relu(norm(conv(h), vectors))
        for block in self.res_blocks:
            h = block(h, vectors)
        for conv, norm in zip(self.up_convs, self.up_norms, strict=True):
            h = F.relu(norm(conv(h), vectors))
        residual = self.conv_out(h)
        changed = sample + residual
        changed = changed.tanh() if self.config.squash == "tanh" else changed.clamp(-1, 1)
        return FixedPointGeneratorOutput(changed, residual) if return_dict else (changed, residual)


class FixedPointDiscriminator(ModelMixin, ConfigMixin):
    """An image -> a score of realism for each of its patches (a critic, unbounded) and logits of its class.

    Args:
        sample_size: side of the image in pixels, the generator's; 2 ** num_layers divides it.
        in_channels: of the image, the generator's.
        num_classes: number of logits, the generator's.
        base_channels: of the first convolution; each further one doubles them.
        num_layers: stride-2 convolutions.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        num_classes: int,
        base_channels: int = 64,
        num_layers: int = 6,
    ) -> None:
        super().__init__()
        if num_layers < 1 or sample_size % 2**num_layers:
            raise ValueError(f"expected a `sample_size` that 2 ** {num_layers} layers divide, got {sample_size}")
        channels = [in_channels, *(base_channels * 2**i for i in range(num_layers))]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(channels[:-1], channels[1:], strict=True))
        self.conv_score = nn.Conv2d(channels[-1], 1, 3, padding=1, bias=False)
        self.conv_class = nn.Conv2d(channels[-1], num_classes, sample_size // 2**num_layers, bias=False)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> FixedPointDiscriminatorOutput | tuple:
        """(B, C, H, W) in [-1, 1] -> `FixedPointDiscriminatorOutput`."""
        h = sample
        for conv in self.convs:
            h = F.leaky_relu(conv(h), 0.01)
        score, logits = self.conv_score(h), self.conv_class(h).flatten(1)
        return FixedPointDiscriminatorOutput(score, logits) if return_dict else (score, logits)
