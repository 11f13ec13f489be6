"""Healthy counterfactuals in one pass of a generator (Fixed-Point GAN, Siddiquee et al. 2019)."""

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import replace_example_docstring

from .cxr_anomaly import AnomalyOutput, ContractMixin, default_settings, with_checkpoint_settings
from .cxr_images import prepare_image
from .cxr_portable import PortableMixin

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from PIL import Image
        >>> from cxr_diffusers import FixedPointGANPipeline

        >>> pipeline = FixedPointGANPipeline.from_pretrained("runs/phantom_fixed_point_gan_32")
        >>> output = pipeline(Image.open("chest.png"), direction="bright")
        >>> output.anomaly_map[0].save("map.png")
        ```
"""


class FixedPointGANPipeline(ContractMixin, PortableMixin, DiffusionPipeline):
    """Translate an image to the healthy class in one pass, and compare.

    After Siddiquee et al. 2019 (https://arxiv.org/abs/1908.06965). The method may be covered by a patent; see
    docs/fixed_point_gan.md.

    Args:
        generator: (image in [-1, 1], class ids) -> output whose `sample` is the translated image: a
            `FixedPointGenerator`. (Not a source of random numbers: there is no chance in this method.)
        class_names: one name a label, e.g. `["healthy", "pleural effusion"]` (kept in the config as a dict from id to
            name: diffusers takes a list in a pipeline's config for a component).
        data_range: the darkest and the brightest value the generator knows; only [-1, 1], the range of its tanh.
        scaling: "minmax" or "dtype", see `prepare_image`.
        aspect: "pad", "crop" or "squash", see `prepare_image`.
        settings: the checkpoint's own defaults of the call: any of `FixedPointGANPipeline.ORIGINAL_SETTINGS`.
        map_threshold: the map value above which a pixel counts as abnormal, chosen on healthy validation images.
        lung_segmenter: as of `CFGAnomalyPipeline`.
    """

    title = "Fixed-Point GAN"
    summary = (
        "A Fixed-Point GAN translates a radiograph to the same chest as if healthy in one pass; the anomaly map is what "
        "had to change."
    )

    model_cpu_offload_seq = "generator"
    _optional_components = ["lung_segmenter"]

    def __init__(
        self,
        generator: ModelMixin,
        class_names: list[str] | dict[str, str] | None = None,
        data_range: list[float] = (-1.0, 1.0),
        scaling: str = "minmax",
        aspect: str = "pad",
        settings: dict | None = None,
        map_threshold: float | None = None,
        lung_segmenter: ModelMixin | None = None,
    ):
        super().__init__()
        self.register_modules(generator=generator, lung_segmenter=lung_segmenter)
        if tuple(data_range) != (-1, 1):
            raise ValueError(f"expected `data_range` [-1, 1], the range of a generator's output, got {data_range!r}")
        classes = generator.config.num_classes
        self.register_contract(classes, class_names, data_range, scaling, aspect, settings, map_threshold)

    @with_checkpoint_settings
    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image,
        target_label: int | str = 0,
        direction: str = "both",
        smoothing: float = 0.0,
        highpass: float = 0.0,
        region: str = "image",
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Where would this chest have to change to be healthy?

        An argument left out takes the checkpoint's own value (`pipeline.config.settings`), or else the default of the
        signature, which is the original procedure's.

        Args:
            image: a PIL image, an array, a tensor or a list of them, any size and bit depth; see `prepare_image`.
            target_label: the class to translate to, as an id or a name; 0 is healthy.
            direction: "both": the map is the absolute difference. "bright": only where the image is brighter than its
                counterfactual (fluid, consolidation, masses); "dark": only where it is darker (air).
            smoothing: sigma of a Gaussian applied to the map, in pixels of the model's resolution.
            highpass: sigma of a Gaussian, in pixels of an image of 64 pixels (scaled with the model's resolution); the
                difference of image and counterfactual blurred by it is subtracted before `direction` applies. 0: off.
            region: "image", or "lungs": the map is multiplied by the soft lung mask of the pipeline's `lung_segmenter`.
            output_type: "pil", "np" or "pt"; see `AnomalyOutput` for shapes and ranges.
            return_dict: False returns the plain tuple.

        Returns:
            `AnomalyOutput`, or the tuple (image, counterfactual, anomaly_map, anomaly_score).

        Raises:
            TypeError: `image` is not an image. ValueError: an argument out of its range; each says what was expected.

        Examples:
        """
        # 1. check the arguments
        self.check_map(output_type, direction=direction, smoothing=smoothing, highpass=highpass, region=region)
        target = self.label_id(target_label)

        # 2. image -> x
        image = prepare_image(image, **self.image_format(self.generator)).to(self._execution_device)

        # 3. x -> x': translated to the target class
        counterfactual = self.translate(image, target)

        # 4. the map of the change
        anomaly_map = self.map_change(image, counterfactual, direction, highpass, smoothing)
        data_range = self.config.data_range
        return self.finish(image, counterfactual, anomaly_map, data_range, region, output_type, return_dict)

    ORIGINAL_SETTINGS = default_settings(__call__)

    def label_id(self, label):
        """Class id of a class id or a class name."""
        return self.find_label(label, "target_label", self.generator.config.num_classes)

    def translate(self, x, target_label=0):
        """(B, C, H, W) in [-1, 1] -> (B, C, H, W) float32 in [-1, 1], the same chests as if of the target class."""
        labels = torch.full((len(x),), self.label_id(target_label), device=x.device)
        return self.generator(x.to(self.generator.dtype), labels).sample.float()


__all__ = ["AnomalyOutput", "FixedPointGANPipeline"]
