"""A guided-diffusion network as `UNet2DModel` or `NoisyClassifier`, and its chain as `DDIMScheduler`."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel

from .architecture import Architecture, read_architecture
from .classifier import build_classifier, is_classifier, read_classifier
from .flags import SOURCES, ConversionFlags, check_flags, flags_in_tensors, logger, read_flags
from .weights import convert_weights

# flags that change the result, cannot be read from the tensors, and are reported as assumed if they were not given
DECISIVE = ("num_heads", "noise_schedule", "source")


def convert_state_dict(
    state_dict: Mapping[str, torch.Tensor], **flags: Any
) -> tuple[Any, DDIMScheduler, dict[str, Any]]:
    """The tensors of a guided-diffusion UNet or encoder classifier as diffusers' classes, exact but for rounding.

    Args:
        state_dict: {name: tensor}, as the `image_train.py` of OpenAI, Wolleb and the CFG fork writes it (model or EMA),
            or their `classifier_train.py`.
        flags: fields of `ConversionFlags`, under the originals' names; for a classifier those that begin with
            `classifier_`, the chain's, image_size, in_channels, num_classes and class_names.

    Returns:
        (unet, scheduler, info): a `UNet2DModel` (for the fork's unet_version v2 our subclass of it, `ClassMatrixUNet`)
        in evaluation mode, float32; a `DDIMScheduler` with the schedule of
        the training chain (`clip_sample` off: `run_as_original` clips by itself); and a dict with the following.
        For a classifier a `NoisyClassifier` is in the UNet's place, and the dict has `class_names`, `flags`, `assumed`
        and `num_parameters` alone.

        null_label: whether the last class embedding is the null label. Only the CFG fork's models have one: its class
            MLP is folded into the embedding table, and a row of zeros is added. The tables of Wolleb's and OpenAI's
            models are kept: those networks were never trained with a row of zeros.
        source, data_range, scaling, aspect: the family of the checkpoint, and its image preparation (see
            `prepare_image`).
        class_names: a list, or None.
        flags: the value of every flag. assumed: the flags of `DECISIVE` that were neither given nor in the tensors.
        num_parameters: of the UNet.

    Raises:
        ValueError: names the tensor that is missing, left over, of the wrong shape or not finite; the flag that the
            tensors contradict; or the feature that UNet2DModel cannot express.
        TypeError: an unknown flag.
    """
    given = {name for name, value in flags.items() if value is not None}
    options = read_flags(flags)
    if is_classifier(state_dict):
        return convert_classifier(state_dict, options, given)
    architecture = read_architecture(state_dict, options.image_size)
    check_flags(options, architecture)
    with torch.device("meta"):
        unet = unet_class(architecture, options)(**unet_config(architecture, options))
    unet.load_state_dict(convert_weights(state_dict, unet, architecture, options.use_new_attention_order), assign=True)
    source = options.source or guess_source(architecture)
    info = {
        "null_label": architecture.class_mlp,
        "source": source,
        **SOURCES[source],
        "class_names": class_names(options, architecture),
        "flags": {**asdict(options), **flags_in_tensors(architecture), "source": source},
        "assumed": [name for name in DECISIVE if name not in given and not superseded(name, options)],
        "num_parameters": sum(p.numel() for p in unet.parameters()),
    }
    if "num_heads" in info["assumed"]:
        logger.warning("neither num_heads nor num_head_channels was given: assuming %s heads", options.num_heads)
    return unet.eval(), build_scheduler(options), info


def convert_classifier(
    state_dict: Mapping[str, torch.Tensor], flags: ConversionFlags, given: Collection[str]
) -> tuple[Any, DDIMScheduler, dict[str, Any]]:
    """(`NoisyClassifier`, `DDIMScheduler`, info) of an encoder classifier; see `convert_state_dict`."""
    architecture = read_classifier(state_dict, flags)
    classifier = build_classifier(architecture, flags)
    # in all the originals a classifier's attention has the legacy order, its pool the new one
    classifier.load_state_dict(convert_weights(state_dict, classifier, architecture, new_order=False), assign=True)
    width = flags.classifier_num_head_channels
    info = {
        "class_names": class_names(flags, architecture),
        "flags": {"classifier_num_head_channels": width, **flags_in_tensors(architecture)},
        "assumed": [name for name in ("noise_schedule",) if name not in given],
        "num_parameters": sum(p.numel() for p in classifier.parameters()),
    }
    return classifier.eval(), build_scheduler(flags), info


def superseded(name: str, flags: ConversionFlags) -> bool:
    return name == "num_heads" and flags.num_head_channels != -1


def guess_source(architecture: Architecture) -> str:
    """The family of a checkpoint: four channels are BraTS, three OpenAI's; only the fork has a class MLP."""
    if architecture.in_channels == 4:
        return "brats"
    if architecture.class_mlp:
        return "cfg-fork"
    return "openai" if architecture.in_channels == 3 else "wolleb"


def class_names(flags: ConversionFlags, architecture: Architecture) -> list[str] | None:
    """The given names; for the fork's two classes the default is its loaders' order: healthy 0, diseased 1."""
    if flags.class_names is None:
        return ["healthy", "diseased"] if architecture.class_mlp and architecture.num_classes == 2 else None
    count = architecture.out_channels if architecture.pool else architecture.num_classes or 0
    if len(flags.class_names) != count:
        raise ValueError(f"expected a class name for each of {count} classes, got {list(flags.class_names)}")
    return list(flags.class_names)


def unet_class(architecture: Architecture, flags: ConversionFlags) -> type[UNet2DModel]:
    if not architecture.class_matrix:
        return UNet2DModel
    from ..models.class_matrix_unet import ClassMatrixUNet

    if not architecture.class_mlp or flags.use_new_attention_order:
        raise ValueError(
            "unet_version v2 (tensors encoder_kv) is convertible only with the fork's class MLP and the legacy "
            f"attention order, got clf_free {architecture.class_mlp}, "
            f"use_new_attention_order {flags.use_new_attention_order}"
        )
    return ClassMatrixUNet


def unet_config(architecture: Architecture, flags: ConversionFlags) -> dict[str, Any]:
    """Keyword arguments of `UNet2DModel`."""
    a = architecture
    if a.out_channels not in (a.in_channels, 2 * a.in_channels):
        raise ValueError(
            f"expected {a.in_channels} or {2 * a.in_channels} output channels for {a.in_channels} input channels, "
            f"got {a.out_channels} (out.2.weight)"
        )
    levels = range(len(a.block_out_channels))
    down = "ResnetDownsampleBlock2D" if a.updown else "DownBlock2D"
    up = "ResnetUpsampleBlock2D" if a.updown else "UpBlock2D"
    return {
        "sample_size": a.image_size,
        "in_channels": a.in_channels,
        "out_channels": a.out_channels,
        "block_out_channels": a.block_out_channels,
        "layers_per_block": a.layers_per_block,
        "down_block_types": tuple("AttnDownBlock2D" if i in a.attention_levels else down for i in levels),
        "up_block_types": tuple("AttnUpBlock2D" if i in a.attention_levels else up for i in reversed(levels)),
        "downsample_type": "resnet" if a.updown else "conv",
        "upsample_type": "resnet" if a.updown else "conv",
        "downsample_padding": 1,
        "resnet_time_scale_shift": "scale_shift" if a.scale_shift else "default",
        "attention_head_dim": attention_head_dim(a, flags),
        # without it the middle attention has no norm when the time embedding scales and shifts
        "attn_norm_num_groups": 32,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "dropout": flags.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "num_class_embeds": None if a.num_classes is None else a.num_classes + a.class_mlp,
    }


def attention_head_dim(architecture: Architecture, flags: ConversionFlags) -> int | None:
    """The channels of one head: UNet2DModel has one number for the whole network (None: one head everywhere)."""
    widths = {architecture.block_out_channels[i] for i in (*architecture.attention_levels, -1)}
    if flags.num_head_channels != -1:
        bad = [w for w in sorted(widths) if w % flags.num_head_channels]
        if bad:
            raise ValueError(
                f"num_head_channels {flags.num_head_channels} does not divide the {bad} attention channels"
            )
        return flags.num_head_channels
    if flags.num_heads_upsample not in (-1, flags.num_heads):
        raise ValueError(
            f"num_heads_upsample {flags.num_heads_upsample} differs from num_heads {flags.num_heads}: UNet2DModel has "
            "one head width for the whole network, so this is not convertible"
        )
    if flags.num_heads == 1:
        return None
    if len(widths) > 1:
        raise ValueError(
            f"num_heads {flags.num_heads} with attention at several widths ({sorted(widths)} channels): UNet2DModel "
            "has one head width for the whole network, so this is not convertible. (num_heads 1 and num_head_channels "
            "are.)" + (" num_heads was not given: 4 is the originals' default." if flags.num_heads == 4 else "")
        )
    (width,) = widths
    if width % flags.num_heads:
        raise ValueError(f"num_heads {flags.num_heads} does not divide the {width} attention channels")
    return width // flags.num_heads


def build_scheduler(flags: ConversionFlags) -> DDIMScheduler:
    """The scheduler of the training chain; `timestep_spacing` as in the originals' `ddimN`."""
    steps = flags.diffusion_steps
    betas = (
        {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps}
        if flags.noise_schedule == "linear"
        else {"beta_schedule": "squaredcos_cap_v2"}
    )
    return DDIMScheduler(
        num_train_timesteps=steps,
        **betas,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="leading",
        prediction_type="sample" if flags.predict_xstart else "epsilon",
    )
