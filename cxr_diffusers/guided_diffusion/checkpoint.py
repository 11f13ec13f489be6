"""Checkpoint files: read, and written as the folder of a pipeline."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files import new_folder
from .unet import convert_state_dict


def convert_checkpoint(
    path: Path | str,
    output_dir: Path | str,
    *,
    classifier_path: Path | str | None = None,
    overwrite: bool = False,
    **flags: Any,
) -> dict[str, Any]:
    """A guided-diffusion checkpoint file -> a folder that `CFGAnomalyPipeline.from_pretrained` opens.

    With `classifier_path`, it is a folder that `ClassifierGuidedPipeline.from_pretrained` opens.

    The pipeline's config states how images are prepared; `conversion.json` in the folder has all of `info`.

    A model with classes but without a null label (Wolleb's, OpenAI's) becomes a pipeline with `has_null_label=False`
    and the settings `source_label` 0 and `guidance_scale` 0: it encodes and decodes as healthy, as Wolleb's code does
    without a classifier.
    An unconditional model without a classifier is written as `unet/` and `scheduler/` alone, a classifier without a
    model as `classifier/` and `scheduler/`.

    Args:
        path: a `.pt` file (opened with `weights_only=True`) or a `.safetensors` file; of a model or its EMA.
        classifier_path: the same for the classifier that guides the model.
        output_dir: written completely or not at all.
        overwrite: replace an existing folder.
        flags: fields of `ConversionFlags`, under the originals' names.

    Returns:
        the `info` of `convert_state_dict`, and `pipeline`: the name of the pipeline class written, or None; and with
        `classifier_path` the classifier's own `info` as `classifier`.

    Raises:
        FileExistsError: `output_dir` is not empty, without `overwrite`.
        ValueError, TypeError: see `convert_state_dict` and `read_checkpoint`; a classifier in place of the model or
            the reverse, or a classifier whose images have another size or number of channels than the model's.
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


def check_pair(unet: Any, classifier: Any, path: Path | str, classifier_path: Path | str) -> None:
    """Raise ValueError unless these are a UNet and a classifier of images of the same size and channels."""
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"expected {path} to hold a UNet, it holds an encoder classifier")
    if isinstance(classifier, UNet2DModel):
        raise ValueError(f"expected {classifier_path} to hold an encoder classifier, it holds a UNet")
    theirs, ours = ((x.config.in_channels, x.config.sample_size) for x in (unet, classifier))
    if ours != theirs:
        raise ValueError(
            f"expected a classifier of {theirs[0]} channels and {theirs[1]} px, as the model's images have, got "
            f"{ours[0]} channels and {ours[1]} px"
        )


def build_pipeline(
    unet: Any, classifier: Any, scheduler: DDIMScheduler, info: dict[str, Any]
) -> DiffusionPipeline | None:
    """The pipeline of the converted networks; None for a model without classes and for a classifier without a model."""
    from ..pipelines import CFGAnomalyPipeline, ClassifierGuidedPipeline

    if not isinstance(unet, UNet2DModel):
        return None
    preparation = {name: info[name] for name in ("data_range", "scaling", "aspect")}
    if classifier is not None:
        names, unet_names = info["classifier"]["class_names"], info["class_names"]
        if names is None and unet_names is not None and len(unet_names) == classifier.config.num_classes:
            names = unet_names
        return ClassifierGuidedPipeline(
            unet, classifier, scheduler, class_names=names, has_null_label=info["null_label"], **preparation
        )
    if not unet.config.num_class_embeds:
        return None
    preparation |= {"class_names": info["class_names"], "has_null_label": info["null_label"]}
    settings = None if info["null_label"] else {"source_label": 0, "guidance_scale": 0.0}
    return CFGAnomalyPipeline(unet, scheduler, settings=settings, **preparation)


def read_checkpoint(path: Path | str) -> dict[str, torch.Tensor]:
    """A `.pt` or `.safetensors` file -> {name: tensor}, on the CPU.

    Raises FileNotFoundError without such a file, and ValueError where it holds anything but named tensors (an
    optimizer's state, a whole pickled model).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file, got {path}")
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
