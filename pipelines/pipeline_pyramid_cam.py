"""Where a classifier with a feature pyramid finds disease (after PYLON, Preechakul et al. 2022)."""

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import replace_example_docstring

from .cxr_anomaly import AnomalyOutput, ContractMixin, default_settings, smooth_map, with_checkpoint_settings
from .cxr_classifier import log_odds_against
from .cxr_images import prepare_image
from .cxr_portable import PortableMixin

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from PIL import Image
        >>> from cxr_diffusers import PyramidCAMPipeline

        >>> pipeline = PyramidCAMPipeline.from_pretrained("runs/cxr_pyramid_128")
        >>> output = pipeline(Image.open("chest.png"))
        >>> output.anomaly_map[0].save("map.png")
        ```
"""


class PyramidCAMPipeline(ContractMixin, PortableMixin, DiffusionPipeline):
    """The class maps of a classifier that pools them to its answer, as an anomaly map.

    After Preechakul et al. 2022 (https://arxiv.org/abs/2010.11475). The method has no counterfactual: that of
    the output is the image itself. The `anomaly_score` is the classifier's probability of not healthy.

    Args:
        classifier: images in [-1, 1] -> output with `logits` (B, K) and `maps` (B, K, h, w): a `PyramidClassifier`.
        class_names: one name a class, e.g. `["healthy", "pleural effusion"]`.
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

    model_cpu_offload_seq = "classifier"
    _optional_components = ["lung_segmenter"]

    def __init__(
        self,
        classifier: ModelMixin,
        class_names: list[str] | dict[str, str] | None = None,
        scaling: str = "minmax",
        aspect: str = "pad",
        settings: dict | None = None,
        map_threshold: float | None = None,
        lung_segmenter: ModelMixin | None = None,
    ):
        super().__init__()
        self.register_modules(classifier=classifier, lung_segmenter=lung_segmenter)
        classes = classifier.config.num_classes
        self.register_contract(classes, class_names, None, scaling, aspect, settings, map_threshold)

    @with_checkpoint_settings
    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image,
        target_label: int | str = 0,
        explained_label: int | str | None = None,
        smoothing: float = 0.0,
        region: str = "image",
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Where does the classifier see evidence against this chest being healthy?

        Args:
            image: a PIL image, an array, a tensor or a list of them, any size and bit depth; see `prepare_image`.
            target_label: the class that the evidence is against, as an id or a name; 0 is healthy. What is shown is
                the log-odds of all other classes together.
            explained_label: instead, a class whose log-odds against class 0 are shown.
            smoothing: sigma of a Gaussian applied to the map, in pixels of the model's resolution.
            region: "image", or "lungs": the map is multiplied by the soft lung mask of the pipeline's `lung_segmenter`;
                the score stays as it is.
            output_type: "pil", "np" or "pt"; see `AnomalyOutput` for shapes and ranges.
            return_dict: False returns the plain tuple.

        Returns:
            `AnomalyOutput`, or the tuple (image, counterfactual, anomaly_map, anomaly_score). The map is the
            probability of each place, 1 / (1 + exp(-s)) of its log-odds s. It is on one scale for all images; none is
            stretched to its own maximum.

        Raises:
            TypeError: `image` is not an image. ValueError: an argument out of its range; each says what was expected.

        Examples:
        """
        # 1. check the arguments
        config, model = self.config, self.classifier.config
        self.check_map(output_type, smoothing=smoothing, region=region)
        target = self.find_label(target_label, "target_label", model.num_classes)
        explained = explained_label
        if explained is not None:
            explained = self.find_label(explained, "explained_label", model.num_classes)

        # 2. image -> x
        size = model.sample_size
        x = prepare_image(image, size, config.scaling, config.aspect, (-1.0, 1.0), model.in_channels)
        x = x.to(self._execution_device)

        # 3. x -> log-odds of each place
        evidence, probability = self.explain(x, target, explained)

        # 4. log-odds -> map
        evidence = F.interpolate(evidence[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
        anomaly_map = smooth_map(evidence.sigmoid(), smoothing)
        return self.finish(x, x, anomaly_map, (-1.0, 1.0), region, output_type, return_dict, probability)

    ORIGINAL_SETTINGS = default_settings(__call__)

    def explain(self, x, target_label=0, explained_label=None):
        """(B, C, H, W) in [-1, 1] -> (B, h, w) log-odds of each place, and (B,) probability of not `target_label`."""
        target = self.find_label(target_label, "target_label", self.classifier.config.num_classes)
        with torch.autocast(x.device.type, enabled=False):
            output = self.classifier(x.to(self.classifier.dtype))
        maps, odds = output.maps, log_odds_against(output.logits, target)
        evidence = log_odds_against(maps, target) if explained_label is None else maps[:, explained_label]
        return evidence, odds.sigmoid()


__all__ = ["AnomalyOutput", "PyramidCAMPipeline"]
