"""A UNet on folded images: twice the resolution at the cost of the lower one."""

import inspect
from typing import Any

import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor


class SpaceToDepthUNet(UNet2DModel):
    """`UNet2DModel` behind a space-to-depth transform: each `patch_size` x `patch_size` block becomes channels.

    Its input and output have `in_channels` channels and `sample_size` pixels; the levels inside have
    `patch_size ** 2` times as many channels at `sample_size / patch_size` pixels (Shi et al. 2016,
    https://arxiv.org/abs/1609.05158, section 3.2, in both directions). Arguments, configuration and call are those of
    `UNet2DModel`.

    Args:
        patch_size: side of a block; 1 is the plain UNet.

    Raises:
        ValueError: `sample_size` is not a multiple of `patch_size`.
    """

    def __init__(self, *args: Any, patch_size: int = 2, **kwargs: Any) -> None:
        given = inspect.signature(UNet2DModel.__init__).bind(self, *args, **kwargs)
        given.apply_defaults()
        outer = {name: given.arguments[name] for name in ("sample_size", "in_channels", "out_channels")}
        if patch_size < 1 or outer["sample_size"] is not None and outer["sample_size"] % patch_size:
            raise ValueError(
                f"expected `sample_size` to be a multiple of `patch_size`, got {outer['sample_size']} and {patch_size}"
            )
        inner = {name: size * patch_size**2 for name, size in outer.items() if name != "sample_size"}
        inner["sample_size"] = outer["sample_size"] and outer["sample_size"] // patch_size
        super().__init__(**{**{k: v for k, v in given.arguments.items() if k != "self"}, **inner})
        self.register_to_config(patch_size=patch_size, **outer)

    # diffusers takes the names of a configuration's entries from this signature
    __init__.__signature__ = inspect.signature(UNet2DModel.__init__).replace(  # type: ignore[attr-defined]
        parameters=[
            *inspect.signature(UNet2DModel.__init__).parameters.values(),
            inspect.Parameter("patch_size", inspect.Parameter.KEYWORD_ONLY, default=2, annotation=int),
        ],
        return_annotation=None,
    )

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple:
        """As in `UNet2DModel`: (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        size = self.config.patch_size
        folded = F.pixel_unshuffle(sample, size)
        output = F.pixel_shuffle(super().forward(folded, timestep, class_labels, return_dict=False)[0], size)
        return UNet2DOutput(sample=output) if return_dict else (output,)
