"""The architecture of a network, read from the names and shapes of its tensors."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .flags import CHANNEL_MULT


@dataclass(frozen=True)
class Architecture:
    """A guided-diffusion UNet, or its encoder with a head: a classifier.

    block_out_channels: channels of each level, the finest first.
    attention_levels: indices of the levels with attention (the middle block always has attention).
    num_classes: None without labels.  class_mlp: an MLP transforms the class vector (the CFG fork, `clf_free`).
    class_matrix: the CFG fork's version 2, whose attention is conditional on the class.
    pool: of a classifier, "attention" or "adaptive"; `out_channels` is then the number of logits.
    """

    image_size: int
    in_channels: int
    out_channels: int
    model_channels: int
    block_out_channels: tuple
    layers_per_block: int
    attention_levels: tuple
    updown: bool
    scale_shift: bool
    num_classes: int | None
    class_mlp: bool
    class_matrix: bool = False
    pool: str | None = None


def read_architecture(state_dict: Mapping[str, torch.Tensor], image_size: int | None = None) -> Architecture:
    """{name: tensor} -> `Architecture`.

    Raises:
        ValueError: a tensor that determines the architecture is missing, or the first level has not the base number of
            channels (512 px).
    """
    if not any(name.startswith("output_blocks.") for name in state_dict):
        raise ValueError("expected the state_dict of a guided-diffusion UNet, got no tensor output_blocks.*")
    updown, layers, levels = read_decoder(state_dict)
    encoder = read_encoder(state_dict, layers, levels)
    return Architecture(
        image_size=image_size or usual_image_size(encoder["block_out_channels"], encoder["model_channels"]),
        out_channels=shape(state_dict, "out.2.weight", 4)[0],
        updown=updown,
        num_classes=shape(state_dict, "label_emb.weight", 2)[0] if "label_emb.weight" in state_dict else None,
        class_mlp=any(name.startswith("cond_embed.") for name in state_dict),
        class_matrix=any(".encoder_kv." in name for name in state_dict),
        **encoder,
    )


def read_encoder(state_dict: Mapping[str, torch.Tensor], layers: int, levels: int) -> dict[str, Any]:
    """The fields of `Architecture` that the encoder determines.

    Args:
        layers: residual blocks per level.
        levels: number of levels.
    """
    first = [1 + level * (layers + 1) for level in range(levels)]
    channels = tuple(shape(state_dict, f"input_blocks.{k}.0.out_layers.3.weight", 4)[0] for k in first)
    model_channels = shape(state_dict, "time_embed.0.weight", 2)[1]
    if channels[0] != model_channels:
        raise ValueError(
            f"the first level has {channels[0]} channels (input_blocks.1.0.out_layers.3.weight) and the time embedding "
            f"{model_channels} (time_embed.0.weight), as with channel_mult {channels[0] / model_channels:g},... (the "
            "default at 512 px): UNet2DModel takes both from one number, so this is not convertible"
        )
    return {
        "in_channels": shape(state_dict, "input_blocks.0.0.weight", 4)[1],
        "model_channels": model_channels,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "attention_levels": tuple(i for i, k in enumerate(first) if has_attention(state_dict, range(k, k + layers))),
        "scale_shift": shape(state_dict, "input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * channels[0],
    }


def read_decoder(state_dict: Mapping[str, torch.Tensor]) -> tuple[bool, int, int]:
    """(whether residual blocks resample, residual blocks per encoder level, number of levels).

    They are read from the decoder, where the last block of each level but the finest has an upsampler: a `conv` or a
    second residual block. In the encoder, residual blocks that downsample have the same tensors as all others.
    """
    blocks = {int(match[1]) for match in map(re.compile(r"output_blocks\.(\d+)\.").match, state_dict) if match}
    upsampler = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers)\.")
    upsamplers = [match for match in map(upsampler.match, state_dict) if match]
    levels = len({match[1] for match in upsamplers}) + 1
    if (max(blocks) + 1) % levels:
        raise ValueError(
            f"expected as many output_blocks on each of {levels} levels, got {max(blocks) + 1} output_blocks: "
            f"tensors after output_blocks.{max(blocks)} or of an upsampler are missing"
        )
    return any(match[2] == "in_layers" for match in upsamplers), (max(blocks) + 1) // levels - 1, levels


def has_attention(state_dict: Mapping[str, torch.Tensor], blocks: Iterable[int]) -> bool:
    """Whether any of some blocks of the encoder has attention."""
    prefixes = tuple(f"input_blocks.{k}.1." for k in blocks)
    return any(name.startswith(prefixes) for name in state_dict)


def shape(state_dict: Mapping[str, torch.Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor; ValueError unless it is there and has `dimensions` dimensions."""
    if name not in state_dict:
        raise ValueError(f"missing tensor {name}")
    sizes = tuple(state_dict[name].shape)
    if len(sizes) != dimensions:
        raise ValueError(f"expected tensor {name} with {dimensions} dimensions, got shape {sizes}")
    return sizes


def usual_image_size(channels: Sequence[int], model_channels: int) -> int:
    """The side of the images, from the originals' default channel multipliers: no tensor depends on it."""
    multipliers = tuple(c / model_channels for c in channels)
    for size, usual in CHANNEL_MULT.items():
        if multipliers == usual:
            return size
    raise ValueError(f"image_size cannot be derived from the channels {list(channels)}: give the flag image_size")
