"""Class evidence of a plain image classifier (Grad-CAM, Selvaraju et al. 2017): a baseline for counterfactuals."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import PipelineImageInput

from .cxr_anomaly import AnomalyOutput, ContractMixin, anomaly_call, default_settings, smooth_map
from .cxr_classifier import (
    classify,
    edge_lengths,
    is_image_classifier,
    log_odds_against,
    names_of_classes,
    number_of_classes,
)
from .cxr_images import prepare_image
from .cxr_portable import PortableMixin


class GradCAMPipeline(ContractMixin, PortableMixin, DiffusionPipeline):
    """The evidence against "healthy", by the gradient of an image classifier at its last feature map.

    Selvaraju et al. 2017 (https://arxiv.org/abs/1610.02391, eq. 1 and 2). The method has no counterfactual: that of
    the output is the image itself. The `anomaly_score` is the classifier's probability of not healthy.

    Args:
        classifier: an image classifier of `transformers` that can return its hidden states: feature maps (ResNet,
            ConvNeXt, ...) or tokens of a square grid (ViT, DeiT, ...). Where its logits depend on the class token
            alone, as ViT's do, the tokens before the last layer are taken.
        feature_extractor: its image processor, for its mean, deviation and size.
        class_names: None: those of the classifier's own config.
        sample_size: side of the image in pixels; None: the image processor's, or the classifier's `image_size`.
        scaling, aspect: see `prepare_image`.
        settings: the checkpoint's own defaults of the call: any of `GradCAMPipeline.ORIGINAL_SETTINGS`.
        map_threshold: the map value above which a pixel counts as abnormal, chosen on healthy validation images.
        lung_segmenter: as of `CFGAnomalyPipeline`.

    Raises:
        TypeError: not a classifier of `transformers`. ValueError: no `sample_size`, neither given nor in the
            image processor or the classifier's config.
    """

    title = "Grad-CAM"
    summary = (
        "The anomaly map shows where an image classifier finds evidence of disease (Grad-CAM). The method makes no "
        "counterfactual; it is a baseline for methods that do."
    )
    score_meaning = "the classifier's probability of not healthy"
    has_counterfactual = False

    model_cpu_offload_seq = "classifier"
    _optional_components = ["feature_extractor", "lung_segmenter"]

    def __init__(
        self,
        classifier: torch.nn.Module,
        feature_extractor: Any = None,
        class_names: list[str] | dict[str, str] | None = None,
        sample_size: int | None = None,
        scaling: str = "minmax",
        aspect: str = "pad",
        settings: dict[str, Any] | None = None,
        map_threshold: float | None = None,
        lung_segmenter: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        if not is_image_classifier(classifier):
            raise TypeError(f"expected an image classifier of `transformers`, got {type(classifier).__name__}")
        self.register_modules(classifier=classifier, feature_extractor=feature_extractor, lung_segmenter=lung_segmenter)
        size = edge_lengths(feature_extractor) or (getattr(classifier.config, "image_size", None),)
        sample_size = sample_size or size[0]
        if not sample_size:
            raise ValueError("expected `sample_size`, got none, also from the image processor and the classifier")
        class_names = class_names or names_of_classes(classifier)
        num_classes = number_of_classes(classifier, class_names)
        self.register_contract(num_classes, class_names, None, scaling, aspect, settings, map_threshold)
        self.register_to_config(sample_size=sample_size)

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
        """Map the classifier's evidence of disease in a chest radiograph.

        An omitted argument takes the checkpoint's own value (`pipeline.config.settings`), or else the default.

        Args:
            image: a PIL image, an array, a tensor or a list of them, any size and bit depth; see `prepare_image`.
            target_label: the class that the evidence is against, as an id or a name; 0 is healthy. The map explains the
                log-odds of all other classes together.
            explained_label: instead, a class whose logit the map explains (the method as published).
            smoothing: sigma of a Gaussian applied to the map, in pixels of the model's resolution.
            region: "image", or "lungs": the map is multiplied by the soft lung mask of the pipeline's `lung_segmenter`;
                the score stays as it is.
            output_type: "pil", "np" or "pt"; see `AnomalyOutput` for shapes and ranges.
            return_dict: False returns the plain tuple.

        Returns:
            `AnomalyOutput`, or the tuple (image, counterfactual, anomaly_map, anomaly_score). The map is tanh(s / 2) of
            the local evidence s >= 0 in units of log-odds: the change of a probability of one half by s alone, doubled
            to reach 1. All images have the same scale; none is stretched to its own maximum.

        Raises:
            TypeError: `image` is not an image. ValueError: an argument out of its range.

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
        # 1. check the arguments
        self.check_map(output_type, smoothing=smoothing, region=region)
        target = self.find_label(target_label, "target_label", self.num_classes)
        if explained_label is not None:
            explained_label = self.find_label(explained_label, "explained_label", self.num_classes)

        # 2. image -> x
        size, config = self.config.sample_size, self.config
        image = prepare_image(image, size, config.scaling, config.aspect, (0.0, 1.0))
        image = image.to(self._execution_device)

        # 3. x -> evidence at the last feature map
        evidence, probability = self.explain(image, target, explained_label)

        # 4. evidence -> map
        evidence = F.interpolate(evidence[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
        anomaly_map = smooth_map(torch.tanh(evidence / 2), smoothing)
        return self.finish(image, image, anomaly_map, (0.0, 1.0), region, output_type, return_dict, probability)

    ORIGINAL_SETTINGS = default_settings(__call__)

    def explain(
        self, x: torch.Tensor, target_label: int | str = 0, explained_label: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 1, H, W) in [0, 1] -> (B, h, w) evidence of 0 and more, and (B,) probability of not `target_label`.

        For a linear layer on the mean of the feature map, the mean of the evidence before clamping is the log-odds
        without their constant.
        """
        target = self.find_label(target_label, "target_label", self.num_classes)
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            output = classify(self.classifier, x, self.feature_extractor, output_hidden_states=True)
            layers, logits = output.hidden_states[-1:], output.logits.float()
            odds = log_odds_against(logits, target)
            explained = odds if explained_label is None else logits[:, explained_label]
            if not layers[0].requires_grad:  # frozen weights
                raise ValueError("expected a classifier whose last hidden state has a gradient: unfreeze its weights")
            if layers[0].ndim == 3:
                layers = [layer for layer in output.hidden_states[:-3:-1] if layer.requires_grad]
            gradients = torch.autograd.grad(explained.sum(), layers)
        pairs = zip(layers, gradients, strict=True)
        maps = [[feature_map(value.detach().float()) for value in pair] for pair in pairs]
        # where the logits depend on the class token alone, the other tokens of the last layer have no gradient
        features, gradient = next((pair for pair in maps if pair[1].any()), maps[0])
        weights = gradient.sum(dim=(2, 3), keepdim=True)  # the sum, not the mean: evidence in log-odds on any grid
        return (weights * features).sum(dim=1).clamp(min=0), odds.detach().sigmoid()


def feature_map(features: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w), or tokens (B, n, C) that end in a square grid (after a class token, say) -> (B, C, h, w)."""
    if features.ndim == 4:
        return features
    side = int(features.shape[1] ** 0.5)
    grid = features[:, features.shape[1] - side * side :]
    return grid.transpose(1, 2).unflatten(2, (side, side))


__all__ = ["AnomalyOutput", "GradCAMPipeline"]
