"""The UNet that a training starts from."""

from typing import Any

from diffusers import UNet2DModel

from ..hub.loading import load_unet
from ..models.space_to_depth_unet import SpaceToDepthUNet
from .recipe import Recipe, section


def initial_unet(recipe: Recipe, unconditional: bool = False) -> UNet2DModel:
    """The UNet of the model `train.init_from`, see `load_unet`; without one, a new UNet of the recipe's `unet:`."""
    init_from = recipe.train.init_from
    return load_unet(init_from, unconditional) if init_from else new_unet(**recipe.unet)


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
