"""Image classifiers of `transformers`, called so that their output has a gradient."""

from typing import Any

import torch
import torch.nn.functional as F


def is_image_classifier(model: Any) -> bool:
    """True for a model of `transformers`, which takes `pixel_values` and no timestep."""
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)


def number_of_classes(classifier: Any, class_names: Any = None) -> int:
    """The number of a classifier's logits, from its config or else `class_names`; ValueError: neither has it."""
    config = getattr(classifier, "config", None)
    for name in ("num_classes", "num_labels"):
        if getattr(config, name, None):
            return getattr(config, name)
    if not class_names:
        raise ValueError(f"expected `class_names` of a classifier without a config, {type(classifier).__name__}")
    return len(class_names)


def names_of_classes(classifier: Any) -> list[str] | None:
    """The names in a `transformers` config in the order of their ids; None for its defaults LABEL_0, LABEL_1, ..."""
    id2label = getattr(getattr(classifier, "config", None), "id2label", None) or {}
    names = [id2label[key] for key in sorted(id2label, key=int)]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def classify(classifier: Any, images: torch.Tensor, feature_extractor: Any = None, **options: Any) -> Any:
    """Prepare images as the classifier's own image processor does, and return its output, differentiable.

    Args:
        images: (B, C, H, W) in [0, 1]; one channel is repeated for as many as the classifier has.
        feature_extractor: its image processor, for `image_mean`, `image_std` (with `do_normalize`) and the size, see
            `edge_lengths`. None: mean and deviation are one half (the classifier's input is in [-1, 1]) and the size is
            not changed.
        options: further arguments of the classifier's call.
    """
    size = edge_lengths(feature_extractor)
    if size and tuple(size) != tuple(images.shape[-2:]):
        images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    channels = getattr(classifier.config, "num_channels", images.shape[1])
    if images.shape[1] == 1:
        images = images.expand(-1, channels, -1, -1)
    if getattr(feature_extractor, "do_normalize", True):
        mean, std = (
            torch.tensor(getattr(feature_extractor, name, None) or [0.5], device=images.device)[:, None, None]
            for name in ("image_mean", "image_std")
        )
        images = (images - mean) / std
    return classifier(pixel_values=images.to(classifier.dtype), **options)


def log_odds_against(logits: torch.Tensor, target: int) -> torch.Tensor:
    """(B, K, ...) logits -> (B, ...) log-odds of all classes but `target` together."""
    others = [k for k in range(logits.shape[1]) if k != target]
    return logits[:, others].logsumexp(dim=1) - logits[:, target]


def edge_lengths(feature_extractor: Any) -> tuple[int, int] | None:
    """(height, width) of an image processor's output, or None if it changes no size."""
    # the values of a step stay in a processor's config when the step is off
    for name, step in (("crop_size", "do_center_crop"), ("size", "do_resize")):
        size = getattr(feature_extractor, name, None) if getattr(feature_extractor, step, True) else None
        if size and "height" in size:
            return size["height"], size["width"]
        if size and "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
    return None
