"""Healthy counterfactuals in one pass of a generator (Fixed-Point GAN, Siddiquee et al. 2019)."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import PipelineImageInput

from .cxr_anomaly import AnomalyOutput, ContractMixin, anomaly_call, default_settings
from .cxr_images import prepare_image
from .cxr_portable import PortableMixin


class FixedPointGANPipeline(ContractMixin, PortableMixin, DiffusionPipeline):
    """Translate an image to the healthy class in one pass, and compare.

    After Siddiquee et al. 2019 (https://arxiv.org/abs/1908.06965). The method may be covered by a patent; see
    docs/fixed_point_gan.md.

    Args:
        generator: (image in [-1, 1], class ids) -> output whose `sample` is the translated image: a
            `FixedPointGenerator`. (Not a generator of random numbers: the method uses none.)
        class_names: one name for each class, e.g. `["healthy", "pleural effusion"]`; kept in the config as a dict from
            id to name, since diffusers takes a list in a pipeline's config for a component.
        scaling: "minmax" or "dtype", see `prepare_image`.
        aspect: "pad", "edge", "crop", "squash" or "keep", see `prepare_image`.
        data_range: the generator's values for black and white: only [-1, 1], the range of its tanh.
        settings: the checkpoint's own defaults of the call: any of `FixedPointGANPipeline.ORIGINAL_SETTINGS`.
        map_threshold: the map value above which a pixel counts as abnormal, chosen on healthy validation images.
        lung_segmenter: as of `CFGAnomalyPipeline`.
    """

    title = "Fixed-Point GAN"
    summary = (
        "A Fixed-Point GAN translates a radiograph to the same chest as if healthy in one pass; the anomaly map is "
        "what had to change."
    )

    model_cpu_offload_seq = "generator"
    _optional_components = ["lung_segmenter"]

    def __init__(
        self,
        generator: ModelMixin,
        class_names: list[str] | dict[str, str] | None = None,
        scaling: str = "minmax",
        aspect: str = "pad",
        data_range: list[float] | tuple[float, ...] = (-1.0, 1.0),
        settings: dict[str, Any] | None = None,
        map_threshold: float | None = None,
        lung_segmenter: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(generator=generator, lung_segmenter=lung_segmenter)
        if tuple(data_range) != (-1, 1):
            raise ValueError(f"expected `data_range` [-1, 1], the range of a generator's output, got {data_range!r}")
        num_classes = generator.config.num_classes
        self.register_contract(num_classes, class_names, data_range, scaling, aspect, settings, map_threshold)

    @anomaly_call
    def __call__(
        self,
        image: PipelineImageInput,
        target_label: int | str = 0,
        direction: str = "both",
        smoothing: float = 0.0,
        highpass: float = 0.0,
        match_exposure: bool = False,
        region: str = "image",
        keep_below: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> AnomalyOutput | tuple:
        """Translate a chest radiograph to the healthy class, and map the changes.

        An omitted argument takes the checkpoint's own value (`pipeline.config.settings`), or else the default of the
        signature, which is the original procedure's.

        Args:
            target_label: the class to translate to, as an id or a name; 0 is healthy.
            image, direction, smoothing, highpass, match_exposure, region, keep_below, output_type, return_dict: see the
                call of `CFGAnomalyPipeline`.

        Returns:
            `AnomalyOutput`, or the tuple (image, counterfactual, anomaly_map, anomaly_score).

        Raises:
            TypeError: `image` is not an image. ValueError: an argument out of its range.

        Examples:
            ```py
            >>> from PIL import Image
            >>> from cxr_diffusers import FixedPointGANPipeline

            >>> pipeline = FixedPointGANPipeline.from_pretrained("runs/phantom_fixed_point_gan_32")
            >>> output = pipeline(Image.open("chest.png"), direction="bright")
            >>> output.anomaly_map[0].save("map.png")
            ```
        """
        # 1. check the arguments
        map_settings: dict[str, Any] = dict(
            direction=direction, smoothing=smoothing, highpass=highpass, match_exposure=match_exposure
        )
        self.check_map(output_type, **map_settings, region=region, keep_below=keep_below)
        target = self.label_id(target_label)

        # 2. image -> x
        image = prepare_image(image, **self.image_format(self.generator)).to(self._execution_device)

        # 3. x -> x': translated to the target class
        counterfactual = self.translate(image, target)

        # 4. the map of the change
        anomaly_map = self.map_change(image, counterfactual, **map_settings)
        data_range = self.config.data_range
        output = image, counterfactual, anomaly_map, data_range, region, output_type, return_dict
        return self.finish(*output, keep_below=keep_below)

    ORIGINAL_SETTINGS = default_settings(__call__)

    def label_id(self, label: int | str) -> int:
        """Class id of a class id or a class name."""
        return self.find_label(label, "target_label", self.num_classes)

    def translate(self, x: torch.Tensor, target_label: int | str = 0) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, C, H, W) float32 in [-1, 1], the same chests as if of the target class."""
        labels = torch.full((len(x),), self.label_id(target_label), device=x.device)
        return self.generator(x.to(self.generator.dtype), labels).sample.float()


__all__ = ["AnomalyOutput", "FixedPointGANPipeline"]
