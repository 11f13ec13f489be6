"""cxr-diffusers convert: a guided-diffusion checkpoint to a diffusers folder."""

import argparse
from pathlib import Path
from typing import Any

from .options import add_command

CONVERT = """\
example (flags as in the original's README; those of training and sampling are accepted and ignored):
  cxr-diffusers convert model.pt converted --image_size 256 --num_channels 128 --class_cond True --num_classes 2 \\
      --num_res_blocks 2 --num_heads 1 --learn_sigma True --use_scale_shift_norm False --attention_resolutions 16
and with the classifier that guides it, as in Wolleb's README: --classifier_path classifier.pt
"""
# the originals' flags without effect on the converted network
NOT_NEEDED = (
    "anneal_lr batch_size classifier_scale classifier_use_fp16 data_dir dataset ema_rate eval_interval "
    "fp16_scale_growth guidance_scale log_interval lr lr_anneal_steps microbatch model_path "
    "noise_level num_samples p_uncond rescale_learned_sigmas resume_checkpoint save_interval schedule_sampler "
    "timestep_respacing use_checkpoint use_ddim use_fp16 use_kl weight_decay"
).split()


def add(commands: Any) -> None:
    """Add the command to the subparsers of `cxr-diffusers`."""
    convert = add_command(commands, "convert", run, "a guided-diffusion checkpoint to a diffusers folder", CONVERT)
    convert.add_argument("checkpoint", type=Path, help=".pt or .safetensors")
    convert.add_argument("output", type=Path)
    convert.add_argument("--classifier_path", type=Path, help="checkpoint of the encoder classifier that guides it")
    convert.add_argument("--overwrite", action="store_true", help="replace the output folder")
    add_conversion_flags(convert)


def add_conversion_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the original programs, in their own spelling."""
    from dataclasses import fields

    from ..guided_diffusion.flags import ConversionFlags

    group = parser.add_argument_group("the flags that the checkpoint was trained with")
    for field in fields(ConversionFlags):
        text = field.metadata["help"] + (f" (default: {field.default})" if field.default is not None else "")
        group.add_argument(f"--{field.name}", metavar="VALUE", help=text)
    for name in NOT_NEEDED:
        group.add_argument(f"--{name}", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from dataclasses import fields

    from ..guided_diffusion import ConversionFlags, convert_checkpoint, parse_flag

    given = {field.name: getattr(options, field.name) for field in fields(ConversionFlags)}
    flags: dict[str, Any] = {}
    for name, text in given.items():
        try:
            flags |= {name: parse_flag(name, text)} if text is not None else {}
        except ValueError as error:
            raise ValueError(f"--{name} {text}: {error}") from None
    more = {"classifier_path": options.classifier_path, "overwrite": options.overwrite}
    info = convert_checkpoint(options.checkpoint, options.output, **more, **flags)
    written = info["pipeline"] or "a network and its scheduler/ (no classes or no model to guide, hence no pipeline)"
    print(f"{options.output}: {written}. See {options.output / 'conversion.json'} for the flags read from the tensors")
