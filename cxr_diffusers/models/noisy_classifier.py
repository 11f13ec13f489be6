"""p(label | x_t, t): the class of an image, predicted from a noisy version of it."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn


class NoisyClassifier(ModelMixin, ConfigMixin):
    """The encoder of a diffusion UNet with a head: the classifier of Dhariwal & Nichol 2021 (section 4).

    https://arxiv.org/abs/2105.05233. It consists of `UNet2DModel`'s modules, under their names; arguments
    that are not listed have the same meaning as there.

    Args:
        sample_size: side of the image, in pixels.
        num_classes: number of logits.
        attention_head_dim: channels of a head of every attention, that of the head's pool too; None: one head.
        pool: "attention": a learned query over the last feature map, its mean as the query and positions learned (the
            pool of Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 2.4). "adaptive": the mean of the
            last feature map and a linear layer.

    Raises:
        ValueError: an unknown `pool`, or a `sample_size` that the levels do not divide.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int = 1,
        num_classes: int = 2,
        down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) + ("AttnDownBlock2D",) * 3,
        block_out_channels: tuple[int, ...] = (32, 64, 96, 128),
        layers_per_block: int = 1,
        downsample_type: str = "resnet",  # of the blocks with attention
        dropout: float = 0.0,
        attention_head_dim: int | None = 32,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
        pool: str = "attention",
    ) -> None:
        super().__init__()
        last, reduction = block_out_channels[-1], 2 ** (len(block_out_channels) - 1)
        if pool not in ("attention", "adaptive"):
            raise ValueError(f"expected `pool` attention or adaptive, got {pool!r}")
        if sample_size % reduction:
            raise ValueError(f"expected a `sample_size` that {reduction} divides (the levels halve), got {sample_size}")
        unet = UNet2DModel(
            sample_size=sample_size,
            in_channels=in_channels,
            down_block_types=down_block_types,
            up_block_types=("UpBlock2D",) * len(down_block_types),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            downsample_type=downsample_type,
            dropout=dropout,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=norm_num_groups,  # without it, scale_shift leaves the middle attention without a norm
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
        )
        self.conv_in, self.time_proj, self.time_embedding = unet.conv_in, unet.time_proj, unet.time_embedding
        self.down_blocks, self.mid_block = unet.down_blocks, unet.mid_block
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, last, eps=norm_eps)
        if pool == "attention":
            side = sample_size // reduction
            self.head = AttentionPool(side * side, last, num_classes, last // (attention_head_dim or last))
        else:
            self.head = MeanPool(last, num_classes)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float | int) -> torch.Tensor:
        """(B, C, H, W) noisy images, their timestep (a number, or (B,)) -> (B, num_classes) logits."""
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        emb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        x = self.conv_in(sample)
        for block in self.down_blocks:
            x, _ = block(x, emb)
        return self.head(F.silu(self.conv_norm_out(self.mid_block(x, emb))))


class AttentionPool(nn.Module):
    """(B, C, H, W) -> (B, num_outputs): the mean of the map attends to itself and to all positions."""

    def __init__(self, num_positions: int, channels: int, num_outputs: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(num_positions + 1, channels) / channels**0.5)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positional_embedding
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.to_qkv(tokens).chunk(3, -1)
        )
        return self.to_out(F.scaled_dot_product_attention(q[:, :, :1], k, v).flatten(1))


class MeanPool(nn.Module):
    """(B, C, H, W) -> (B, num_outputs): a linear layer of the map's mean."""

    def __init__(self, channels: int, num_outputs: int) -> None:
        super().__init__()
        self.to_out = nn.Linear(channels, num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out(x.mean(dim=(2, 3)))
