"""Checkpoint files: read, and written as the folder of a pipeline."""

import json
import pickle
from pathlib import Path

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files import new_folder
from .unet import convert_state_dict


def convert_checkpoint(path, output_dir, *, classifier_path=None, overwrite=False, **flags):
    """A guided-diffusion checkpoint file -> a folder that `CFGAnomalyPipeline.from_pretrained` opens.

    With the checkpoint of an encoder classifier beside it, one that `ClassifierGuidedPipeline.from_pretrained` opens.

    How pictures have to be prepared travels in the pipeline's config; `conversion.json` beside it keeps all of `info`.

    A model with classes but without a null label (Wolleb's, OpenAI's) opens too, as one with `has_null_label=False`.
    Its settings are `source_label` 0 and `guidance_scale` 0: encoded and decoded as healthy, as Wolleb's does without
    its classifier.
    An unconditional model without a classifier is written as `unet/` and `scheduler/` alone, a classifier without a
    model as `classifier/` and `scheduler/`.

    Args:
        path: a `.pt` file (opened with `weights_only=True`) or a `.safetensors` file; model and EMA files are alike.
        classifier_path: likewise, of the classifier that guides the model.
        output_dir: written whole or not at all.
        overwrite: replace the folder if there is one.
        flags: fields of `ConversionFlags`, under the originals' names.

    Returns:
        the `info` of `convert_state_dict`, and `pipeline`: the name of the pipeline class written, or None; and with
        `classifier_path` the classifier's own `info` as `classifier`.

    Raises:
        FileExistsError: `output_dir` is there and not empty, without `overwrite`.
        ValueError, TypeError: see `convert_state_dict` and `read_checkpoint`; a classifier in the model's place or the
            other way round, or one for other pictures than the model's.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"expected a folder to write, {output_dir} is a file")
    if output_dir.exists() and any(output_dir.iterdir()) and not overwrite:
        raise FileExistsError(f"expected a new or empty folder, {output_dir} has files in it (overwrite replaces it)")
    names = {"class_names": flags.pop("class_names", None)}  # where there is a classifier they are its own
    network, scheduler, info = convert_state_dict(read_checkpoint(path), **flags, **({} if classifier_path else names))
    classifier = None
    if classifier_path is not None:
        classifier, _, info["classifier"] = convert_state_dict(read_checkpoint(classifier_path), **flags, **names)
        check_pair(network, classifier, path, classifier_path)
    pipeline = build_pipeline(network, classifier, scheduler, info)
    info["pipeline"] = pipeline and type(pipeline).__name__

    with new_folder(output_dir) as folder:
        if pipeline is None:
            network.save_pretrained(folder / ("unet" if isinstance(network, UNet2DModel) else "classifier"))
            scheduler.save_pretrained(folder / "scheduler")
        else:
            pipeline.save_pretrained(folder)
        (folder / "conversion.json").write_text(json.dumps(info, indent=2) + "\n")
    return info


def check_pair(unet, classifier, path, classifier_path):
    """Raise ValueError unless a model and a classifier are what they are said to be, and of the same pictures."""
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"expected {path} to hold a UNet, it holds an encoder classifier")
    if isinstance(classifier, UNet2DModel):
        raise ValueError(f"expected {classifier_path} to hold an encoder classifier, it holds a UNet")
    theirs, ours = ((x.config.in_channels, x.config.sample_size) for x in (unet, classifier))
    if ours != theirs:
        raise ValueError(
            f"expected a classifier of {theirs[0]} channels and {theirs[1]} px, as the model's pictures are, got "
            f"{ours[0]} channels and {ours[1]} px"
        )


def build_pipeline(unet, classifier, scheduler, info):
    """The pipeline that carries the preparation; None for a model without classes, and for a lone classifier."""
    from ..pipelines import CFGAnomalyPipeline, ClassifierGuidedPipeline

    if not isinstance(unet, UNet2DModel):
        return None
    preparation = {name: info[name] for name in ("data_range", "scaling", "aspect")}
    if classifier is not None:
        names, known = info["classifier"]["class_names"], info["class_names"]
        if names is None and known is not None and len(known) == classifier.config.num_classes:
            names = known
        return ClassifierGuidedPipeline(
            unet, classifier, scheduler, class_names=names, has_null_label=info["null_label"], **preparation
        )
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
        try:
            return load_file(path)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error
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
