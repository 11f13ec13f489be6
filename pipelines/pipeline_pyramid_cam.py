"""Class maps of a classifier with a feature pyramid (after PYLON, Preechakul et al. 2022): a baseline."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import PipelineImageInput

from .cxr_anomaly import AnomalyOutput, ContractMixin, anomaly_call, default_settings, smooth_map
from .cxr_classifier import log_odds_against
from .cxr_images import prepare_image
from .cxr_portable import PortableMixin


class PyramidCAMPipeline(ContractMixin, PortableMixin, DiffusionPipeline):
    """The class maps of a classifier that pools them to its logits, as an anomaly map.

    After Preechakul et al. 2022 (https://arxiv.org/abs/2010.11475). The method has no counterfactual: that of
    the output is the image itself. The `anomaly_score` is the classifier's probability of not healthy.

    Args:
        classifier: images in [-1, 1] -> output with `logits` (B, K) and `maps` (B, K, h, w): a `PyramidClassifier`.
        class_names: one name for each class, e.g. `["healthy", "pleural effusion"]`.
        scaling, aspect: see `prepare_image`.
        settings: the checkpoint's own defaults of the call: any of `PyramidCAMPipeline.ORIGINAL_SETTINGS`.
        map_threshold: the map value above which a pixel counts as abnormal, chosen on healthy validation images.
        lung_segmenter: as of `CFGAnomalyPipeline`.
    """

    title = "Pyramid CAM"
    summary = (
        "The anomaly map shows where a classifier with a feature pyramid finds disease (after PYLON). The method makes "
        "no counterfactual; it is a baseline for methods that do."
    )
    score_meaning = "the classifier's probability of not healthy"
    has_counterfactual = False

    model_cpu_offload_seq = "classifier"
    _optional_components = ["lung_segmenter"]

    def __init__(
        self,
        classifier: ModelMixin,
        class_names: list[str] | dict[str, str] | None = None,
        scaling: str = "minmax",
        aspect: str = "pad",
        settings: dict[str, Any] | None = None,
        map_threshold: float | None = None,
        lung_segmenter: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(classifier=classifier, lung_segmenter=lung_segmenter)
        num_classes = classifier.config.num_classes
        self.register_contract(num_classes, class_names, None, scaling, aspect, settings, map_threshold)

    @anomaly_call
    def __call__(
        self,
        image: PipelineImageInput,
        target_label: int | str = 0,
        explained_label: int | str | None = None,
        smoothing: float = 0.0,
        region: str = "image",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> AnomalyOutput | tuple:
        """Map the classifier's local log-odds of disease in a chest radiograph.

        Args:
            target_label: the class that the evidence is against, as an id or a name; 0 is healthy. The map has the
                log-odds of all other classes together.
            explained_label: instead, a class other than 0; the map then has its log-odds against class 0.
            image, smoothing, region, output_type, return_dict: see the call of `GradCAMPipeline`.

        Returns:
            `AnomalyOutput`, or the tuple (image, counterfactual, anomaly_map, anomaly_score). The map is the
            probability at each pixel, 1 / (1 + exp(-s)) of its log-odds s. All images have the same scale; none is
            stretched to its own maximum.

        Raises:
            TypeError: `image` is not an image. ValueError: an argument out of its range.

        Examples:
            ```py
            >>> from PIL import Image
            >>> from cxr_diffusers import PyramidCAMPipeline

            >>> pipeline = PyramidCAMPipeline.from_pretrained("runs/cxr_pyramid_128")
            >>> output = pipeline(Image.open("chest.png"))
            >>> output.anomaly_map[0].save("map.png")
            ```
        """
        # 1. check the arguments
        self.check_map(output_type, smoothing=smoothing, region=region)
        target = self.find_label(target_label, "target_label", self.num_classes)
        if explained_label is not None:
            explained_label = self.find_label(explained_label, "explained_label", self.num_classes)
        if explained_label == 0:
            raise ValueError("expected an `explained_label` other than class 0, which its log-odds are against, got 0")

        # 2. image -> x
        size, config = self.classifier.config.sample_size, self.config
        channels = self.classifier.config.in_channels
        x = prepare_image(image, size, config.scaling, config.aspect, (-1.0, 1.0), channels)
        x = x.to(self._execution_device)

        # 3. x -> log-odds at each place of the feature map
        evidence, probability = self.explain(x, target, explained_label)

        # 4. log-odds -> map
        evidence = F.interpolate(evidence[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
        anomaly_map = smooth_map(evidence.sigmoid(), smoothing)
        return self.finish(x, x, anomaly_map, (-1.0, 1.0), region, output_type, return_dict, probability)

    ORIGINAL_SETTINGS = default_settings(__call__)

    def explain(
        self, x: torch.Tensor, target_label: int | str = 0, explained_label: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, W) in [-1, 1] -> (B, h, w) log-odds of each place, and (B,) probability of not `target_label`."""
        target = self.find_label(target_label, "target_label", self.num_classes)
        with torch.autocast(x.device.type, enabled=False):
            output = self.classifier(x.to(self.classifier.dtype))
        maps, odds = output.maps, log_odds_against(output.logits, target)
        evidence = log_odds_against(maps, target) if explained_label is None else maps[:, explained_label]
        return evidence, odds.sigmoid()


__all__ = ["AnomalyOutput", "PyramidCAMPipeline"]
