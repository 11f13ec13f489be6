"""A guided-diffusion encoder classifier as `NoisyClassifier`."""

import math
import re

import torch

from .architecture import Architecture, has_attention, read_encoder, shape, usual_image_size
from .flags import CHANNEL_MULT, check_flags

# pool -> the tensor whose first dimension is the logits, and its number of dimensions
LOGITS = {"attention": ("out.2.c_proj.weight", 3), "adaptive": ("out.3.weight", 4)}


def is_classifier(state_dict):
    """Whether named tensors are those of an encoder and a head, without a decoder."""
    parts = {name.split(".")[0] for name in state_dict}
    return {"input_blocks", "out"} <= parts and not {"output_blocks", "label_emb"} & parts


def build_classifier(architecture, flags):
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


def read_classifier(state_dict, flags):
    """{name: tensor}, `ConversionFlags` -> `Architecture`.

    An encoder alone does not always show where its levels end: residual blocks that resample look like all others.
    What it does show (widths, attention, shortcuts, the number of positions that the head knows) leaves few
    possibilities; the flags, or else the originals' usual multipliers, decide between them.

    Raises:
        ValueError: a pool that is not convertible, a missing tensor, a flag that the tensors contradict, or levels that
            neither tell.
    """
    pool = read_pool(state_dict)
    possible = []
    for layers, levels, updown in possible_levels(state_dict):
        encoder = read_encoder(state_dict, layers, levels)
        architecture = Architecture(
            image_size=picture_side(state_dict, pool, levels, encoder, flags.image_size),
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
        found = "; ".join(f"image_size {a.image_size} with classifier_depth {a.layers_per_block}" for a in agreeing)
        raise ValueError(
            "the levels of this classifier cannot be told from its tensors: hand over the flags image_size and "
            f"classifier_depth (possible are: {found or 'none, tensors of input_blocks are missing'})"
        )
    return agreeing[0]


def read_pool(state_dict):
    """The head's pool; ValueError for those that `NoisyClassifier` has not."""
    if "out.2.positional_embedding" in state_dict:
        return "attention"
    if "out.0.weight" in state_dict and state_dict["out.0.weight"].ndim == 2:
        found = "spatial_v2" if "out.3.weight" in state_dict else "spatial"
        raise ValueError(f"classifier_pool {found} is not convertible: NoisyClassifier knows {' and '.join(LOGITS)}")
    if "out.3.weight" in state_dict:
        return "adaptive"
    raise ValueError("missing tensor out.2.positional_embedding (classifier_pool attention) or out.3.weight (adaptive)")


def possible_levels(state_dict):
    """(residual blocks per level, levels, whether residual blocks resample) that the encoder's tensors allow."""
    blocks = {int(match[1]) for match in map(re.compile(r"input_blocks\.(\d+)\.").match, state_dict) if match}
    strided = {k for k in blocks if f"input_blocks.{k}.0.op.weight" in state_dict}
    # behind the first convolution each level has its residual blocks and, but for the last, what resamples
    count = max(blocks) + 1
    for levels in range(1, count // 2 + 1):
        stride, rest = divmod(count, levels)
        between = {level * stride for level in range(1, levels)}
        if (
            not rest
            and strided in (between, set())
            and all(
                alike(state_dict, range(k - stride + 1, k)) and unchanging(state_dict, k) for k in (*between, count)
            )
        ):
            yield stride - 1, levels, not strided


def alike(state_dict, blocks):
    """Whether the residual blocks of a level are of one width, and all have attention or none."""
    widths = {shape(state_dict, f"input_blocks.{k}.0.out_layers.3.weight", 4)[0] for k in blocks}
    return len(widths) == 1 and len({has_attention(state_dict, [k]) for k in blocks}) == 1


def unchanging(state_dict, block):
    """Whether a block could be what resamples: no attention, and as many channels behind it as before."""
    return not has_attention(state_dict, [block]) and f"input_blocks.{block}.0.skip_connection.weight" not in state_dict


def picture_side(state_dict, pool, levels, encoder, image_size):
    """The attention pool knows every position of the last level; else it is the flag, or usual for the channels."""
    if pool == "attention":
        return math.isqrt(shape(state_dict, "out.2.positional_embedding", 2)[1] - 1) * 2 ** (levels - 1)
    return image_size or usual_image_size(encoder["block_out_channels"], encoder["model_channels"])


def multipliers(architecture):
    return tuple(channels / architecture.model_channels for channels in architecture.block_out_channels)


def agrees(architecture, flags):
    try:
        check_flags(flags, architecture)
    except ValueError:
        return False
    return True
