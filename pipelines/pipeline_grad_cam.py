"""Where a plain classifier looks (Grad-CAM, Selvaraju et al. 2017): what every counterfactual is compared with."""

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import replace_example_docstring

from .cxr_anomaly import AnomalyOutput, ContractMixin, default_settings, smooth_map, with_checkpoint_settings
from .cxr_classifier import (
    ask,
    edge_lengths,
    is_image_classifier,
    log_odds_against,
    names_of_classes,
    number_of_classes,
)
from .cxr_images import prepare_image
from .cxr_portable import PortableMixin

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from PIL import Image
        >>> from transformers import AutoModelForImageClassification
        >>> from cxr_diffusers import GradCAMPipeline

        >>> classifier = AutoModelForImageClassification.from_pretrained("USER/CHEST-CLASSIFIER")
        >>> output = GradCAMPipeline(classifier, sample_size=224)(Image.open("chest.png"))
        >>> output.anomaly_map[0].save("map.png")
        ```
"""


class GradCAMPipeline(ContractMixin, PortableMixin, DiffusionPipeline):
    """The evidence against "healthy", by the gradient of an image classifier at its last feature map.

    Selvaraju et al. 2017 (https://arxiv.org/abs/1610.02391, eq. 1 and 2). The method has no counterfactual: that of
    the output is the image itself. The `anomaly_score` is the classifier's probability of not healthy.

    Args:
        classifier: an image classifier of `transformers` that can return its hidden states: feature maps (ResNet,
            ConvNeXt, ...) or tokens of a square grid (ViT, DeiT, ...).
        feature_extractor: its image processor, for its mean, deviation and size.
        class_names: None: those of the classifier's own config.
        sample_size: side of the image in pixels; None: the image processor's, or the classifier's `image_size`.
        scaling, aspect: see `prepare_image`.
        settings: the checkpoint's own defaults of the call: any of `GradCAMPipeline.ORIGINAL_SETTINGS`.
        map_threshold: the map value above which a pixel counts as abnormal, chosen on healthy validation images.
        lung_segmenter: as of `CFGAnomalyPipeline`.

    Raises:
        TypeError: not a classifier of `transformers`. ValueError: the size of the image is not given anywhere.
    """

    title = "Grad-CAM"
    summary = (
        "The anomaly map shows where an image classifier finds evidence of disease (Grad-CAM). The method makes no "
        "counterfactual; it is a baseline for methods that do."
    )
    score_meaning = "the classifier's probability of not healthy"

    model_cpu_offload_seq = "classifier"
    _optional_components = ["feature_extractor", "lung_segmenter"]

    def __init__(
        self,
        classifier: torch.nn.Module,
        feature_extractor=None,
        class_names: list[str] | dict[str, str] | None = None,
        sample_size: int | None = None,
        scaling: str = "minmax",
        aspect: str = "pad",
        settings: dict | None = None,
        map_threshold: float | None = None,
        lung_segmenter: ModelMixin | None = None,
    ):
        super().__init__()
        if not is_image_classifier(classifier):
            raise TypeError(f"expected an image classifier of `transformers`, got {type(classifier).__name__}")
        self.register_modules(classifier=classifier, feature_extractor=feature_extractor, lung_segmenter=lung_segmenter)
        size = edge_lengths(feature_extractor) or (getattr(classifier.config, "image_size", None),)
        sample_size = sample_size or size[0]
        if not sample_size:
            raise ValueError("expected `sample_size`: neither an image processor nor the classifier's config says it")
        class_names = class_names or names_of_classes(classifier)
        self.num_classes = number_of_classes(classifier, class_names)
        self.register_contract(self.num_classes, class_names, None, scaling, aspect, settings, map_threshold)
        self.register_to_config(sample_size=sample_size)

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
            target_label: the class that the evidence is against, as an id or a name; 0 is healthy. What is explained is
                the log-odds of all other classes together.
            explained_label: instead, a class whose logit is explained (the method as published).
            smoothing: sigma of a Gaussian applied to the map, in pixels of the model's resolution.
            region: "image", or "lungs": the map is multiplied by the soft lung mask of the pipeline's `lung_segmenter`;
                the score stays as it is.
            output_type: "pil", "np" or "pt"; see `AnomalyOutput` for shapes and ranges.
            return_dict: False returns the plain tuple.

        Returns:
            `AnomalyOutput`, or the tuple (image, counterfactual, anomaly_map, anomaly_score). The map is tanh(s / 2) of
            the local evidence s >= 0 in units of log-odds: what s alone would add to a probability of one half, doubled
            to reach 1. It is on one scale for all images; none is stretched to its own maximum.

        Raises:
            TypeError: `image` is not an image. ValueError: an argument out of its range; each says what was expected.

        Examples:
        """
        # 1. check the arguments
        self.check_map(output_type, smoothing=smoothing, region=region)
        target = self.find_label(target_label, "target_label", self.num_classes)
        explained = explained_label
        if explained is not None:
            explained = self.find_label(explained, "explained_label", self.num_classes)

        # 2. image -> x
        size, config = self.config.sample_size, self.config
        image = prepare_image(image, size, config.scaling, config.aspect, (0.0, 1.0))
        image = image.to(self._execution_device)

        # 3. x -> evidence at the last feature map
        evidence, probability = self.explain(image, target, explained)

        # 4. evidence -> map
        evidence = F.interpolate(evidence[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
        anomaly_map = smooth_map(torch.tanh(evidence / 2), smoothing)
        return self.finish(image, image, anomaly_map, (0.0, 1.0), region, output_type, return_dict, probability)

    ORIGINAL_SETTINGS = default_settings(__call__)

    def explain(self, x, target_label=0, explained_label=None):
        """(B, 1, H, W) in [0, 1] -> (B, h, w) evidence of 0 and more, and (B,) probability of not `target_label`.

        With a linear layer on the mean of the feature map, the evidence without its negative part has the log-odds (but
        for their constant) as its mean over the map.
        """
        target = self.find_label(target_label, "target_label", self.num_classes)
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            output = ask(self.classifier, x, self.feature_extractor, output_hidden_states=True)
            features, logits = output.hidden_states[-1], output.logits.float()
            odds = log_odds_against(logits, target)
            explained = odds if explained_label is None else logits[:, explained_label]
            if not features.requires_grad:  # frozen weights
                raise ValueError("expected a classifier whose last hidden state has a gradient: unfreeze its weights")
            (gradient,) = torch.autograd.grad(explained.sum(), features)
        features, gradient = (feature_map(value.detach().float()) for value in (features, gradient))
        weights = gradient.sum(dim=(2, 3), keepdim=True)  # the sum, not the mean: evidence in log-odds on any grid
        return (weights * features).sum(dim=1).clamp(min=0), odds.detach().sigmoid()


def feature_map(features):
    """(B, C, h, w), or tokens (B, n, C) of a square grid and what stands before them -> (B, C, h, w)."""
    if features.ndim == 4:
        return features
    side = int(features.shape[1] ** 0.5)
    grid = features[:, features.shape[1] - side * side :]
    return grid.transpose(1, 2).unflatten(2, (side, side))


__all__ = ["AnomalyOutput", "GradCAMPipeline"]
