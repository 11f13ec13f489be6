"""The networks that a training starts from."""

from typing import Any

import torch
from diffusers import UNet2DModel

from ..files import as_json
from ..hub.loading import load_pipeline, load_unet
from ..models.space_to_depth_unet import SpaceToDepthUNet
from .recipe import Recipe, section


def initial_unet(recipe: Recipe, unconditional: bool = False) -> UNet2DModel:
    """The UNet of the model `train.init_from`, see `load_unet`; without one, a new UNet of the recipe's `unet:`.

    Raises:
        ValueError: the UNet of `train.init_from` differs from the recipe's.
    """
    init_from = recipe.train.init_from
    if not init_from:
        return new_unet(**recipe.unet)
    unet = load_unet(init_from, unconditional)
    for key, value in as_json(recipe.unet).items():
        if as_json(unet.config.get(key)) != value:
            got = f"{unet.config.get(key)} in {init_from}"
            raise ValueError(f"train.init_from: expected unet.{key} {value}, as in this recipe, got {got}")
    return unet


def new_unet(**options: Any) -> UNet2DModel:
    """An untrained UNet from a recipe's `unet:` section: a `SpaceToDepthUNet` if it has a `patch_size`.

    Raises:
        ValueError: invalid options, or a `sample_size` that the levels of the UNet cannot halve.
    """
    with section("unet"):
        unet = (SpaceToDepthUNet if "patch_size" in options else UNet2DModel)(**options)
        factor = unet.config.get("patch_size", 1) * 2 ** (len(unet.config.block_out_channels) - 1)
        if unet.config.sample_size % factor:
            raise ValueError(f"expected sample_size to be a multiple of {factor}, got {unet.config.sample_size}")
        return unet


def start_from(name: str, model: torch.nn.Module, component: str) -> None:
    """Load the weights of a component of another pipeline, e.g. its "classifier", into `model`.

    Raises:
        ValueError: the pipeline has no such component, or its weights do not fit.
    """
    other = getattr(load_pipeline(name), component, None)
    try:
        model.load_state_dict({} if other is None else other.state_dict())
    except RuntimeError as error:
        raise ValueError(f"train.init_from: expected a {component} of this recipe in {name}: {error}") from None
