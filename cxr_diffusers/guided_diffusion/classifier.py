"""A guided-diffusion encoder classifier as `NoisyClassifier`."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .architecture import Architecture, has_attention, read_encoder, shape, usual_image_size
from .flags import CHANNEL_MULT, ConversionFlags, check_flags

if TYPE_CHECKING:
    from ..models.noisy_classifier import NoisyClassifier

# pool -> the tensor whose first dimension is the logits, and its number of dimensions
LOGITS = {"attention": ("out.2.c_proj.weight", 3), "adaptive": ("out.3.weight", 4)}


def is_classifier(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether named tensors are those of an encoder and a head, without a decoder."""
    parts = {name.split(".")[0] for name in state_dict}
    return {"input_blocks", "out"} <= parts and not {"output_blocks", "label_emb"} & parts


def build_classifier(architecture: Architecture, flags: ConversionFlags) -> "NoisyClassifier":
    """A `NoisyClassifier` without weights, on the meta device."""
    from ..models.noisy_classifier import NoisyClassifier

    a, width = architecture, flags.classifier_num_head_channels
    bad = [channels for channels in {a.block_out_channels[i] for i in (*a.attention_levels, -1)} if channels % width]
    if bad:
        raise ValueError(f"classifier_num_head_channels {width} does not divide the {bad} attention channels")
    plain = "ResnetDownsampleBlock2D" if a.updown else "DownBlock2D"
    with torch.device("meta"):
        return NoisyClassifier(
            sample_size=a.image_size,
            in_channels=a.in_channels,
            num_classes=a.out_channels,
            down_block_types=tuple(
                "AttnDownBlock2D" if i in a.attention_levels else plain for i in range(len(a.block_out_channels))
            ),
            block_out_channels=a.block_out_channels,
            layers_per_block=a.layers_per_block,
            downsample_type="resnet" if a.updown else "conv",
            attention_head_dim=width,
            norm_num_groups=32,
            norm_eps=1e-5,
            resnet_time_scale_shift="scale_shift" if a.scale_shift else "default",
            pool=a.pool,
        )


def read_classifier(state_dict: Mapping[str, torch.Tensor], flags: ConversionFlags) -> Architecture:
    """{name: tensor}, `ConversionFlags` -> `Architecture`.

    The tensors of an encoder do not always determine its levels, because residual blocks that downsample have the same
    tensors as all others. Widths, attention, shortcuts and the head's number of positions leave few possibilities; the
    flags, or else the originals' default multipliers, decide between these.

    Raises:
        ValueError: a pool that is not convertible, a missing tensor, a flag that the tensors contradict, or levels that
            neither determines.
    """
    pool = read_pool(state_dict)
    possible = []
    for layers, levels, updown in possible_levels(state_dict):
        encoder = read_encoder(state_dict, layers, levels)
        architecture = Architecture(
            image_size=image_side(state_dict, pool, levels, encoder, flags.image_size),
            out_channels=shape(state_dict, *LOGITS[pool])[0],
            updown=updown,
            num_classes=None,
            class_mlp=False,
            pool=pool,
            **encoder,
        )
        possible.append(architecture)
    agreeing = [a for a in possible if agrees(a, flags)]
    if possible and not agreeing:
        check_flags(flags, possible[-1])  # raises, and names the flag
    usual = [a for a in agreeing if CHANNEL_MULT.get(a.image_size) == multipliers(a)]
    if len(agreeing) > 1 and usual:
        agreeing = usual
    if len(agreeing) != 1:
        candidates = "; ".join(
            f"image_size {a.image_size} with classifier_depth {a.layers_per_block}" for a in agreeing
        )
        raise ValueError(
            "the levels of this classifier cannot be derived from its tensors: give the flags image_size and "
            f"classifier_depth (possible are: {candidates or 'none, tensors of input_blocks are missing'})"
        )
    return agreeing[0]


def read_pool(state_dict: Mapping[str, torch.Tensor]) -> str:
    """The head's pool; ValueError for a pool that `NoisyClassifier` does not have."""
    if "out.2.positional_embedding" in state_dict:
        return "attention"
    if "out.0.weight" in state_dict and state_dict["out.0.weight"].ndim == 2:
        pool = "spatial_v2" if "out.3.weight" in state_dict else "spatial"
        raise ValueError(f"classifier_pool {pool} is not convertible: NoisyClassifier has {' and '.join(LOGITS)}")
    if "out.3.weight" in state_dict:
        return "adaptive"
    raise ValueError("missing tensor out.2.positional_embedding (classifier_pool attention) or out.3.weight (adaptive)")


def possible_levels(state_dict: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, int, bool]]:
    """(residual blocks per level, levels, whether residual blocks resample) that the encoder's tensors allow."""
    blocks = {int(match[1]) for match in map(re.compile(r"input_blocks\.(\d+)\.").match, state_dict) if match}
    strided = {k for k in blocks if f"input_blocks.{k}.0.op.weight" in state_dict}
    # after the first convolution each level has its residual blocks and, except the last level, a downsampling block
    count = max(blocks) + 1
    for levels in range(1, count // 2 + 1):
        stride, rest = divmod(count, levels)
        between = {level * stride for level in range(1, levels)}
        if (
            not rest
            and strided in (between, set())
            and all(
                is_uniform(state_dict, range(k - stride + 1, k)) and may_resample(state_dict, k)
                for k in (*between, count)
            )
        ):
            yield stride - 1, levels, not strided


def is_uniform(state_dict: Mapping[str, torch.Tensor], blocks: Sequence[int]) -> bool:
    """Whether all blocks have the same width, and either all or none have attention: the blocks of one level."""
    widths = {shape(state_dict, f"input_blocks.{k}.0.out_layers.3.weight", 4)[0] for k in blocks}
    return len(widths) == 1 and len({has_attention(state_dict, [k]) for k in blocks}) == 1


def may_resample(state_dict: Mapping[str, torch.Tensor], block: int) -> bool:
    """Whether a block can be one that downsamples: without attention, and with an unchanged number of channels."""
    return not has_attention(state_dict, [block]) and f"input_blocks.{block}.0.skip_connection.weight" not in state_dict


def image_side(
    state_dict: Mapping[str, torch.Tensor], pool: str, levels: int, encoder: Mapping[str, Any], image_size: int | None
) -> int:
    """The side of the images: from the attention pool's positions, else the flag, else the default for the channels."""
    if pool == "attention":
        return math.isqrt(shape(state_dict, "out.2.positional_embedding", 2)[1] - 1) * 2 ** (levels - 1)
    return image_size or usual_image_size(encoder["block_out_channels"], encoder["model_channels"])


def multipliers(architecture: Architecture) -> tuple[float, ...]:
    return tuple(channels / architecture.model_channels for channels in architecture.block_out_channels)


def agrees(architecture: Architecture, flags: ConversionFlags) -> bool:
    try:
        check_flags(flags, architecture)
    except ValueError:
        return False
    return True
