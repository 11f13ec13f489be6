"""Checkpoint files: read, and written as the folder of a pipeline."""

import json
import os
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from .unet import convert_state_dict


def convert_checkpoint(path, output_dir, *, overwrite=False, **flags):
    """A guided-diffusion checkpoint file -> a folder that `CFGAnomalyPipeline.from_pretrained` opens.

    How pictures have to be prepared travels in the pipeline's config; `conversion.json` beside it keeps all of `info`.

    A model with classes but without a null label (Wolleb's, OpenAI's) opens too, as one with `has_null_label=False`.
    Its settings are `source_label` 0 and `guidance_scale` 0: encoded and decoded as healthy, as Wolleb's does without
    its classifier.
    An unconditional model is written as `unet/` and `scheduler/` alone.

    Args:
        path: a `.pt` file (opened with `weights_only=True`) or a `.safetensors` file; model and EMA files are alike.
        output_dir: written whole or not at all.
        overwrite: replace the folder if there is one.
        flags: fields of `ConversionFlags`, under the originals' names.

    Returns:
        the `info` of `convert_state_dict`, and `pipeline`: the name of the pipeline class written, or None.

    Raises:
        FileExistsError: `output_dir` is there and not empty, without `overwrite`.
        ValueError, TypeError: see `convert_state_dict` and `read_checkpoint`.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"expected a folder to write, {output_dir} is a file")
    if output_dir.exists() and any(output_dir.iterdir()) and not overwrite:
        raise FileExistsError(f"expected a new or empty folder, {output_dir} has files in it (overwrite replaces it)")
    unet, scheduler, info = convert_state_dict(read_checkpoint(path), **flags)
    pipeline = build_pipeline(unet, scheduler, info)
    info["pipeline"] = pipeline and type(pipeline).__name__

    def write(folder):
        if pipeline is None:
            unet.save_pretrained(folder / "unet")
            scheduler.save_pretrained(folder / "scheduler")
        else:
            pipeline.save_pretrained(folder)
        (folder / "conversion.json").write_text(json.dumps(info, indent=2) + "\n")

    write_folder(write, output_dir)
    return info


def build_pipeline(unet, scheduler, info):
    """The pipeline that carries the preparation; None for a model without classes."""
    from ..pipelines import CFGAnomalyPipeline

    preparation = {name: info[name] for name in ("data_range", "scaling", "aspect")}
    if not unet.config.num_class_embeds:
        return None
    if info["null_label"]:
        return CFGAnomalyPipeline(unet, scheduler, class_names=info["class_names"], **preparation)
    settings = {"source_label": 0, "guidance_scale": 0.0}
    return CFGAnomalyPipeline(unet, scheduler, settings=settings, has_null_label=False, **preparation)


def read_checkpoint(path):
    """A `.pt` or `.safetensors` file -> {name: tensor}, on the CPU.

    Raises ValueError where the file holds anything but named tensors (an optimizer's state, a whole pickled model).
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a checkpoint of tensors only: {str(error).splitlines()[0]}") from error
    if not isinstance(state_dict, dict):
        raise ValueError(f"expected {path} to hold a dict of tensors, got {type(state_dict).__name__}")
    for name, value in state_dict.items():
        if not torch.is_tensor(value):
            raise ValueError(f"expected {path} to hold tensors only, got {type(value).__name__} under {name!r}")
    return state_dict


def write_folder(write, folder):
    """`write(temporary)`, which then takes the place of `folder`: never a half-written one."""
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{word}") for word in ("writing", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(temporary, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
