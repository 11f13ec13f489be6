"""Lung segmentation in chest radiographs: a small U-Net and the soft gate from its output."""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

OUTER = 0.4  # share of a lung's width, from the chest wall inwards, below which `recess` opens the gate


class LungSegmenter(ModelMixin, ConfigMixin):
    """A U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) that segments the right and the left lung.

    The right lung is on the left of the image, as radiographs are displayed. Images of any size are resized to
    `sample_size` inside, and each is stretched from its own darkest to its own brightest value, so brightness, contrast
    and data range (any finite one) have no effect. Sizes that are not square are squashed.

    Args:
        sample_size: side of the network's input, in pixels. 64 is enough for a gate that is dilated and
            smoothed by 2 of 64 pixels, and takes milliseconds for each image on a CPU.
        block_out_channels: channels of each level; every level but the first halves the image.
        norm_num_groups: groups of every group norm, a divisor of each level's channels.
        recess: by how much `field` extends the outer part of each lung downwards, in pixels of 64. The costophrenic
            recess reaches below the visible dome of the diaphragm, and there small effusions collect.

    Raises:
        ValueError: a `sample_size` that the levels do not divide, channels that the groups do not divide, a
            `recess` outside 0 to 64.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        block_out_channels: tuple[int, ...] = (12, 24, 40, 56),
        norm_num_groups: int = 4,
        recess: float = 0.0,
    ) -> None:
        super().__init__()
        if not (isinstance(recess, (int, float)) and 0 <= recess <= 64):
            raise ValueError(f"expected a `recess` of 0 to 64 pixels, got {recess!r}")
        channels, reduction = tuple(block_out_channels), 2 ** (len(block_out_channels) - 1)
        if sample_size % reduction:
            raise ValueError(f"expected a `sample_size` that {reduction} divides, got {sample_size}")
        if any(c % norm_num_groups for c in channels):
            raise ValueError(f"expected `block_out_channels` that {norm_num_groups} divides, got {channels}")
        self.down_blocks = nn.ModuleList(
            convolutions(c_in, c_out, norm_num_groups)
            for c_in, c_out in zip((1, *channels[:-1]), channels, strict=True)
        )
        self.up_blocks = nn.ModuleList(
            convolutions(low + high, high, norm_num_groups)
            for low, high in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.conv_out = nn.Conv2d(channels[0], 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W) images -> (B, 2, H, W) logits of the right and of the left lung.

        Raises:
            ValueError: not (B, 1, H, W).
        """
        return resize(self._logits(images), images.shape[-2:])

    @torch.no_grad()
    def field(self, images: torch.Tensor, dilation: float = 2.0, sigma: float = 1.5) -> torch.Tensor:
        """(B, 1, H, W) images -> (B, H, W) float32 lung gate in [0, 1]: 1 in the lungs, 0 far from them.

        The probability of each lung is combined with the mirror image of the other one by the maximum (if fluid hides
        one lung, the other one gives its place), dilated, extended downwards by `config.recess` below its outer
        part, and smoothed, all at the network's own resolution.

        Args:
            dilation: in pixels of 64, whatever `sample_size` is.
            sigma: of the Gaussian, in pixels of 64; 0: none.
        """
        lungs = self._logits(images).float().sigmoid()
        lungs = torch.maximum(lungs, lungs.flip(1, -1))
        scale = self.config.sample_size / 64
        radius, depth = round(dilation * scale), round(self.config.recess * scale)
        gate = F.max_pool2d(lungs, 2 * radius + 1, stride=1, padding=radius)
        if depth:
            lower = F.max_pool2d(F.pad(gate, (0, 0, depth, 0)), (depth + 1, 1), stride=1)
            gate = torch.maximum(gate, lower * outer_part(lungs))
        gate = gaussian_blur(gate.amax(dim=1, keepdim=True), sigma * scale)
        return resize(gate, images.shape[-2:]).clamp(0, 1)[:, 0]

    @torch.no_grad()
    def zones(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 1, H, W) images -> {name: (B, H, W) booleans} of the lungs and of their thirds.

        "right" and "left": the lungs, without the mirror image and the dilation of `field`; no pixel is in both.
        "upper", "middle", "lower": the thirds of each lung by height, from its own highest to its own lowest row; each
        pixel of a lung is in one of them. The right upper zone is `zones["right"] & zones["upper"]`.
        """
        logits = self(images).float()
        side, lung = logits.argmax(dim=1), logits.amax(dim=1) > 0
        zones = {"right": lung & (side == 0), "left": lung & (side == 1)}
        third = sum(thirds(zones[name]) * zones[name] for name in ("right", "left"))
        return {**zones, **{name: lung & (third == i) for i, name in enumerate(("upper", "middle", "lower"))}}

    def _logits(self, images):
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"expected images of shape (B, 1, H, W), got {tuple(images.shape)}")
        x = stretch(resize(images.float(), (self.config.sample_size,) * 2)).to(self.conv_out.weight.dtype)
        skipped = []
        for block in self.down_blocks:
            x = block(F.avg_pool2d(x, 2) if skipped else x)
            skipped.append(x)
        for block, skip in zip(self.up_blocks, skipped[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], dim=1))
        return self.conv_out(x)


def convolutions(c_in: int, c_out: int, groups: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each with a group norm and SiLU."""
    layers: list[nn.Module] = []
    for channels in (c_in, c_out):
        layers += [nn.Conv2d(channels, c_out, 3, padding=1, bias=False), nn.GroupNorm(groups, c_out), nn.SiLU()]
    return nn.Sequential(*layers)


def resize(images: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, *size), bilinear, with an antialiasing filter along sides that shrink."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images.float(), size=tuple(size), mode="bilinear", antialias=True, align_corners=False)


def stretch(images: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) -> each image scaled so that its darkest value is -1 and its brightest 1; a constant becomes -1."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp_min(1e-6) * 2 - 1


def gaussian_blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """(B, 1, H, W) -> the blurred images; `sigma` in pixels, edges repeated."""
    if sigma <= 0:
        return images
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))


def outer_part(lungs: torch.Tensor) -> torch.Tensor:
    """(B, 2, H, W) probabilities of the right and the left lung -> (B, 2, 1, W) weights of columns, soft at the edge.

    1 in the columns from the outermost column of a lung inwards by `OUTER` of its width, and outside it; 0 elsewhere.
    """
    columns = main_piece(lungs > 0.5).any(dim=2)
    x = torch.arange(lungs.shape[-1], device=lungs.device) + 0.5
    low = torch.where(columns, x - 0.5, math.inf).amin(dim=2)
    high = torch.where(columns, x + 0.5, -math.inf).amax(dim=2)
    inwards = OUTER * (high - low)
    distance = torch.stack([x - (low + inwards)[:, :1], (high - inwards)[:, 1:] - x], dim=1)
    distance = distance.nan_to_num(math.inf)  # a lung that is not there has no outer part
    return torch.sigmoid(-distance / (0.02 * lungs.shape[-1]))[:, :, None]


def main_piece(mask: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) booleans -> of each mask, the connected piece where it is densest: stray pixels are left out."""
    density = F.avg_pool2d(mask.float(), 9, stride=1, padding=4) * mask
    seed = F.one_hot(density.flatten(2).argmax(dim=2), mask.shape[2] * mask.shape[3]).view(mask.shape)
    piece = (seed > 0) & mask
    while True:  # grow by the eight neighbours until nothing is added; on booleans, ten times as fast as pooling
        wide = piece.clone()
        wide[..., 1:] |= piece[..., :-1]
        wide[..., :-1] |= piece[..., 1:]
        tall = wide.clone()
        tall[..., 1:, :] |= wide[..., :-1, :]
        tall[..., :-1, :] |= wide[..., 1:, :]
        grown = tall & mask
        if torch.equal(grown, piece):
            return piece
        piece = grown


def thirds(mask: torch.Tensor) -> torch.Tensor:
    """(B, H, W) booleans -> (B, H, 1) integers: 0, 1 or 2, the third of the mask's height that a row lies in."""
    rows = mask.any(dim=2)
    index = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(rows, index, mask.shape[1]).amin(dim=1, keepdim=True)
    height = torch.where(rows, index + 1, 0).amax(dim=1, keepdim=True) - first
    return ((index - first) * 3 // height.clamp_min(1)).clamp(0, 2)[:, :, None]
