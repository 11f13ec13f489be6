"""The originals' command-line flags that determine the output of a checkpoint."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from .architecture import Architecture

logger = logging.getLogger(__name__)

# side of the images -> the originals' channel multipliers, when --channel_mult is not given
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
# image preparation of each family of checkpoints, which the converted pipeline repeats
SOURCES = {
    "cfg-fork": {"data_range": [0.0, 1.0], "scaling": "minmax", "aspect": "squash"},
    "wolleb": {"data_range": [0.0, 1.0], "scaling": "minmax", "aspect": "squash"},
    # four channels: MRI slices, scaled to [0, 1] beforehand, zeros around them
    "brats": {"data_range": [0.0, 1.0], "scaling": "dtype", "aspect": "keep"},
    "openai": {"data_range": [-1.0, 1.0], "scaling": "dtype", "aspect": "crop"},
}


def flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ConversionFlags:
    """The flags of `image_train.py`, under their own names: give those that the checkpoint was trained with.

    The first group cannot be read from the tensors and has the originals' defaults. The second group can; a value
    given there is checked against the tensors. The `metadata["help"]` of a field describes it.
    """

    # not in the tensors
    num_heads: int = flag(4, "attention heads of every attention block")
    num_head_channels: int = flag(-1, "channels of one attention head, in place of num_heads; -1: by num_heads")
    num_heads_upsample: int = flag(-1, "attention heads of the decoder, -1: as num_heads")
    use_new_attention_order: bool = flag(False, "rows of the qkv tensors: [all Q, K, V] instead of [q, k, v] per head")
    noise_schedule: str = flag("linear", "linear or cosine")
    diffusion_steps: int = flag(1000, "length of the training chain")
    predict_xstart: bool = flag(False, "the network predicts the image, not the noise")
    rescale_timesteps: bool = flag(False, "timesteps were scaled to 0..1000 (no effect with 1000 diffusion steps)")
    classifier_num_head_channels: int = flag(64, "channels of one head of a classifier (64 in all the originals)")
    dropout: float = flag(0.0, "dropout of the residual blocks in further training")
    source: str | None = flag(None, f"data preparation of: {', '.join(SOURCES)} (default: derived from the tensors)")
    class_names: tuple | None = flag(None, "a name for each class, in the order of its label")

    # in the tensors; checked if given
    image_size: int | None = flag(None, "side of the images (default: from the channels, where these are the defaults)")
    in_channels: int | None = flag(None, "channels of the images")
    num_channels: int | None = flag(None, "base channels")
    channel_mult: str | None = flag(None, "channel multipliers, as '1,1,2,2'")
    num_res_blocks: int | None = flag(None, "residual blocks per level")
    attention_resolutions: str | None = flag(None, "sides of the feature maps with attention, as '32,16'")
    learn_sigma: bool | None = flag(None, "the variance is learned: twice as many output channels")
    use_scale_shift_norm: bool | None = flag(None, "the time embedding scales and shifts")
    resblock_updown: bool | None = flag(None, "residual blocks resample")
    class_cond: bool | None = flag(None, "the network takes class labels")
    num_classes: int | None = flag(None, "number of classes")
    clf_free: bool | None = flag(None, "the CFG fork's class MLP, trained with dropped labels")
    unet_version: str | None = flag(None, "v1 or v2 of the CFG fork")
    classifier_width: int | None = flag(None, "a classifier's base channels")
    classifier_depth: int | None = flag(None, "its residual blocks per level")
    classifier_attention_resolutions: str | None = flag(None, "its sides of the feature maps with attention")
    classifier_use_scale_shift_norm: bool | None = flag(None, "its time embedding scales and shifts")
    classifier_resblock_updown: bool | None = flag(None, "its residual blocks resample")
    classifier_pool: str | None = flag(None, "attention or adaptive (others are refused)")


def read_flags(values: Mapping[str, Any]) -> ConversionFlags:
    """{flag: value} -> `ConversionFlags`; a flag that is None counts as not given, one that is unknown is an error."""
    names = {f.name for f in fields(ConversionFlags)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise TypeError(f"unknown flag {', '.join(unknown)}: expected some of {', '.join(sorted(names))}")
    flags = ConversionFlags(**{name: value for name, value in values.items() if value is not None})
    if flags.noise_schedule not in ("linear", "cosine"):
        raise ValueError(f"expected noise_schedule linear or cosine, got {flags.noise_schedule!r}")
    if flags.source is not None and flags.source not in SOURCES:
        raise ValueError(f"expected source {', '.join(SOURCES)}, got {flags.source!r}")
    if flags.rescale_timesteps and flags.diffusion_steps != 1000:
        raise ValueError(
            f"rescale_timesteps with {flags.diffusion_steps} diffusion steps feeds the network timesteps that a "
            "diffusers scheduler cannot give: not convertible"
        )
    if flags.unet_version not in (None, "v1", "v2"):
        raise ValueError(f"expected unet_version v1 or v2, got {flags.unet_version!r}")
    return flags


def parse_flag(name: str, text: str) -> Any:
    """The text of a flag on the command line -> its value; class_names are separated by commas."""
    (annotation,) = [f.type for f in fields(ConversionFlags) if f.name == name]
    types = {t for t in (bool, tuple, int, float, str) if t in (annotation, *get_args(annotation))}
    if bool in types:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"expected {name} True or False, got {text!r}")
        return text.lower() == "true"
    if tuple in types:
        return tuple(part.strip() for part in text.split(","))
    return types.pop()(text)


def flags_in_tensors(architecture: "Architecture") -> dict[str, Any]:
    """{flag: value}, the originals' flags as derived from the tensors."""
    a = architecture
    if a.pool:
        return {
            "image_size": a.image_size,
            "in_channels": a.in_channels,
            "num_classes": a.out_channels,
            "classifier_width": a.model_channels,
            "classifier_depth": a.layers_per_block,
            "classifier_attention_resolutions": sides_with_attention(a),
            "classifier_use_scale_shift_norm": a.scale_shift,
            "classifier_resblock_updown": a.updown,
            "classifier_pool": a.pool,
        }
    return {
        "image_size": a.image_size,
        "in_channels": a.in_channels,
        "num_channels": a.model_channels,
        "channel_mult": ",".join(f"{c / a.model_channels:g}" for c in a.block_out_channels),
        "num_res_blocks": a.layers_per_block,
        "attention_resolutions": sides_with_attention(a),
        "learn_sigma": a.out_channels == 2 * a.in_channels,
        "use_scale_shift_norm": a.scale_shift,
        "resblock_updown": a.updown,
        "class_cond": a.num_classes is not None,
        "num_classes": a.num_classes,
        "clf_free": a.class_mlp,
        "unet_version": "v2" if a.class_matrix else "v1",
    }


def sides_with_attention(architecture: "Architecture") -> str:
    return ",".join(str(architecture.image_size // 2**level) for level in architecture.attention_levels)


def check_flags(flags: ConversionFlags, architecture: "Architecture") -> None:
    """Raise ValueError, naming the flag, if a given flag contradicts the tensors."""
    # lists may be written in several ways, and resolutions that the network never reaches have no effect
    sides = {str(architecture.image_size // 2**level) for level in range(len(architecture.block_out_channels))}
    resolutions = lambda text: {side.strip() for side in str(text).split(",")} & sides  # noqa: E731
    parsers = {
        "channel_mult": lambda text: [float(m) for m in str(text).split(",") if m],
        "attention_resolutions": resolutions,
        "classifier_attention_resolutions": resolutions,
    }
    for name, value in flags_in_tensors(architecture).items():
        given = getattr(flags, name)
        without_effect = architecture.num_classes is None and not architecture.pool
        if given in (None, "") or (without_effect and name in ("num_classes", "clf_free")):
            continue  # not given, or of no effect
        parse = parsers.get(name, lambda text: text)
        if parse(given) != parse(value):
            raise ValueError(f"the flag {name} is {given!r}, but the tensors say {value!r}")
