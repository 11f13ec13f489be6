"""An image classifier of `transformers`, asked about pictures in such a way that its answer has a gradient."""

import torch
import torch.nn.functional as F


def is_image_classifier(model):
    """True for a model of `transformers`, which takes `pixel_values` and knows nothing of noise."""
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)


def number_of_classes(classifier, class_names=None):
    """How many logits it has; ValueError where neither its config nor `class_names` says."""
    config = getattr(classifier, "config", None)
    for name in ("num_classes", "num_labels"):
        if getattr(config, name, None):
            return getattr(config, name)
    if not class_names:
        raise ValueError(f"expected `class_names` of a classifier without a config, {type(classifier).__name__}")
    return len(class_names)


def names_of_classes(classifier):
    """The names in a `transformers` config in the order of their ids; None where they are but LABEL_0, LABEL_1, ..."""
    id2label = getattr(getattr(classifier, "config", None), "id2label", None) or {}
    names = [id2label[key] for key in sorted(id2label, key=int)]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def ask(classifier, pictures, feature_extractor=None, **options):
    """Pictures as the classifier's own image processor would prepare them -> its output, differentiable.

    Args:
        pictures: (B, C, H, W) in [0, 1]; one channel becomes as many as the classifier has.
        feature_extractor: its image processor, for `image_mean`, `image_std` and `size`. None: mean and deviation are
            one half (so it sees [-1, 1]) and the size stays.
        options: further arguments of the classifier's call.
    """
    size = edge_lengths(feature_extractor)
    if size and tuple(size) != tuple(pictures.shape[-2:]):
        pictures = F.interpolate(pictures, size, mode="bilinear", antialias=True, align_corners=False)
    channels = getattr(classifier.config, "num_channels", pictures.shape[1])
    if pictures.shape[1] == 1:
        pictures = pictures.expand(-1, channels, -1, -1)
    mean, std = (
        torch.tensor(getattr(feature_extractor, name, None) or [0.5], device=pictures.device)[:, None, None]
        for name in ("image_mean", "image_std")
    )
    pixels = ((pictures - mean) / std).to(classifier.dtype)
    return classifier(pixel_values=pixels, **options)


def log_odds_against(logits, target):
    """(B, K, ...) logits -> (B, ...) log-odds of all classes but `target` together."""
    others = [k for k in range(logits.shape[1]) if k != target]
    return logits[:, others].logsumexp(dim=1) - logits[:, target]


def edge_lengths(feature_extractor):
    """(height, width) that an image processor hands to its model, or None."""
    for name in ("crop_size", "size"):
        size = getattr(feature_extractor, name, None)
        if size and "height" in size:
            return size["height"], size["width"]
        if size and "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
    return None
