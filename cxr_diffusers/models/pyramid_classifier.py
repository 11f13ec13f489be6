"""A classifier that pools its logits from class maps of high resolution."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class PyramidClassifierOutput(BaseOutput):
    """
    logits: (B, num_classes) float32; that of class 0 is 0.
    maps: (B, num_classes, H / 4, W / 4) float32, the log-odds of the class against class 0 at each place.
    """

    logits: torch.Tensor
    maps: torch.Tensor | None = None


class PyramidClassifier(ModelMixin, ConfigMixin):
    """An encoder, a feature pyramid on top of it, and class maps at a quarter of the resolution, pooled to logits.

    After the idea of PYLON (Preechakul et al. 2022, https://arxiv.org/abs/2010.11475): the map of an image-level
    classifier is as fine as its last features, so these are upsampled and the finer levels added before the
    pool. Differences: residual blocks with group norm (no running statistics), self-attention on the coarsest level for
    the context of the whole image, and the log of the mean of exponentials for a pool, so that a small finding counts
    (Pinheiro & Collobert 2015, https://arxiv.org/abs/1411.6228, eq. 6).

    Class 0 (healthy) is the absence of all others at every place: its map is 0, the others are relative to it.

    Args:
        sample_size: side of the image in pixels, a multiple of 2 ** len(block_out_channels).
        in_channels: of the image, whose values are in [-1, 1].
        num_classes: number of logits, class 0 included.
        block_out_channels: of the encoder's levels, the first at half the resolution, each further one at half of that.
        layers_per_block: residual blocks of a level.
        decoder_channels: of the pyramid.
        attention_head_dim: channels of a head of the attention.
        norm_num_groups: of every group norm.
        dropout: in every residual block, and before the maps.
        sharpness: r of the pool log(mean(exp(r m))) / r. Towards 0 it is the mean of a map, for large r its maximum.

    Raises:
        ValueError: fewer than two levels, a `sample_size` that they do not divide, or a `sharpness` of 0 or less.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        in_channels: int = 1,
        num_classes: int = 2,
        block_out_channels: tuple[int, ...] = (32, 64, 128, 192),
        layers_per_block: int = 2,
        decoder_channels: int = 96,
        attention_head_dim: int = 32,
        norm_num_groups: int = 8,
        dropout: float = 0.0,
        sharpness: float = 4.0,
    ) -> None:
        super().__init__()
        reduction = 2 ** len(block_out_channels)
        if reduction < 4 or sample_size % reduction:
            raise ValueError(
                f"expected two levels or more, and a `sample_size` that {reduction} divides (each level halves it), "
                f"got {len(block_out_channels)} levels and {sample_size}"
            )
        if not 0 < sharpness < math.inf:
            raise ValueError(f"expected a `sharpness` above 0, got {sharpness}")

        def block(channels, out_channels):
            options = {"temb_channels": None, "groups": norm_num_groups, "dropout": dropout}
            return ResnetBlock2D(in_channels=channels, out_channels=out_channels, **options)

        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, first, 7, stride=2, padding=3)
        self.downsamplers, self.levels = nn.ModuleList(), nn.ModuleList()
        before = first
        for channels in block_out_channels:
            down = nn.Conv2d(before, before, 3, stride=2, padding=1) if len(self.levels) else nn.Identity()
            self.downsamplers.append(down)
            inputs = [before] + [channels] * (layers_per_block - 1)
            self.levels.append(nn.Sequential(*(Unconditional(block(n, channels)) for n in inputs)))
            before = channels
        self.mid_block = UNetMidBlock2D(
            in_channels=last,
            temb_channels=None,
            dropout=dropout,
            attention_head_dim=attention_head_dim,
            resnet_groups=norm_num_groups,
        )
        # of the levels from a quarter of the resolution down; the coarsest is merged with none
        self.laterals = nn.ModuleList(nn.Conv2d(n, decoder_channels, 1) for n in block_out_channels[1:])
        merges = (block(decoder_channels, decoder_channels) for _ in block_out_channels[2:])
        self.merges = nn.ModuleList(Unconditional(merge) for merge in merges)
        self.norm_out = nn.GroupNorm(norm_num_groups, decoder_channels)
        self.drop = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(decoder_channels, num_classes - 1, 1)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> PyramidClassifierOutput | tuple:
        """(B, C, H, W) images in [-1, 1] -> `PyramidClassifierOutput`, or the tuple (logits, maps)."""
        x, features = self.conv_in(sample), []
        for down, level in zip(self.downsamplers, self.levels, strict=True):
            x = level(down(x))
            features.append(x)
        features[-1] = self.mid_block(x)
        y, *finer = (lateral(f) for lateral, f in zip(self.laterals[::-1], features[:0:-1], strict=True))
        for skip, merge in zip(finer, self.merges[::-1], strict=True):
            y = merge(skip + F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False))
        maps = self.conv_out(self.drop(F.silu(self.norm_out(y)))).float()
        maps = F.pad(maps, (0, 0, 0, 0, 1, 0))  # class 0
        logits = self.pool(maps)
        return PyramidClassifierOutput(logits, maps) if return_dict else (logits, maps)

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, K, h, w) -> (B, K): the log of the mean of exponentials, of the config's sharpness."""
        r, places = self.config.sharpness, maps.shape[-2] * maps.shape[-1]
        return ((r * maps).logsumexp(dim=(2, 3)) - math.log(places)) / r


class Unconditional(nn.Module):
    """A residual block of diffusers without a time embedding."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x, None)
