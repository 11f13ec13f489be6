"""The judge of counterfactuals: an image classifier that had no part in making them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..pipelines.cxr_anomaly import in_evaluation_mode
from ..pipelines.cxr_classifier import classify, is_image_classifier
from .lazy import Lazy

HEALTHY = 0


def check_judge(judge: Any) -> None:
    """ValueError unless `judge` is None or a pipeline with an image classifier of `transformers`."""
    if judge is None:
        return
    classifier = getattr(judge, "components", {}).get("classifier")
    # the classifier of classifier guidance takes noisy images, so it cannot be the judge
    if not is_image_classifier(classifier) or getattr(judge.config, "sample_size", None) is None:
        raise ValueError(
            "expected a judge with an image classifier of transformers, as a GradCAMPipeline has it, "
            f"got a {type(judge).__name__} without one"
        )


def name_of(model: Any) -> str | None:
    """The name of a judge or lung segmenter: that of its folder or repository, else its class; None without one."""
    if model is None:
        return None
    name = str(model.config.get("_name_or_path") or type(model).__name__)
    return Path(name).resolve().name if Path(name).is_dir() else name


def is_its_own_judge(pipeline: Any, judge: Any) -> bool:
    """Whether a method is, or is guided by, the classifier that would judge it."""
    own = getattr(pipeline, "components", {}).get("classifier")
    if not isinstance(own, torch.nn.Module):
        return False
    a, b = own.state_dict(), judge.components["classifier"].state_dict()
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and bool((a[k].cpu() == b[k].cpu()).all()) for k in a)


@torch.no_grad()
def classify_images(
    judge: Any,
    images: Sequence[np.ndarray] | Lazy[np.ndarray],
    references: Sequence[np.ndarray] | Lazy[np.ndarray] | None = None,
    *,
    batch_size: int = 32,
    progress: bool = False,
    desc: str = "judge",
) -> tuple[np.ndarray, np.ndarray]:
    """The judge's probabilities and features of some images.

    If the judge was trained on images stretched to their own minimum and maximum, each image is stretched by the
    minimum and maximum of its reference, so that a counterfactual is normalised like its image.

    Args:
        judge: see `check_judge`.
        images: sequence of (H, W) arrays in [0, 1], all square or framed as the judge's own images are.
        references: likewise, one for each image; None: the images themselves.

    Returns:
        (N, K) probabilities, class 0 healthy, and (N, D) features: the mean of the last feature map, the input of the
        classifier's linear layer.
    """
    references = images if references is None else references
    classifier, size = judge.components["classifier"], judge.config.sample_size
    probabilities, features = [], []
    bar = tqdm(total=len(images), desc=desc, disable=not progress, unit="image")
    for start in range(0, len(images), batch_size):
        stop = min(start + batch_size, len(images))
        stretched = [stretch(images[i], references[i], judge.config.scaling) for i in range(start, stop)]
        batch = torch.cat([resize(image, size) for image in stretched]).to(classifier.device)
        with in_evaluation_mode([classifier]):
            output = classify(classifier, batch, getattr(judge, "feature_extractor", None), output_hidden_states=True)
        last = output.hidden_states[-1].float()
        probabilities.append(output.logits.float().softmax(1).cpu().numpy())
        features.append((last.mean((2, 3)) if last.ndim == 4 else last.mean(1)).cpu().numpy())
        bar.update(stop - start)
    bar.close()
    return np.concatenate(probabilities), np.concatenate(features).astype(np.float64)


def stretch(image: np.ndarray, reference: np.ndarray, scaling: str) -> np.ndarray:
    """An image in [0, 1] as the judge takes it: with `scaling` "minmax" stretched by its reference's extremes."""
    image, reference = (np.asarray(x, np.float32) for x in (image, reference))
    if scaling == "minmax":
        low, high = reference.min(), reference.max()
        image = (image - low) / max(high - low, 1e-6)
    return np.clip(image, 0, 1)


def resize(image: np.ndarray, size: int) -> torch.Tensor:
    """(H, W) array -> (1, 1, size, size) tensor."""
    tensor = torch.from_numpy(image)[None, None]
    if tensor.shape[-2:] == (size, size):
        return tensor
    return F.interpolate(tensor, (size, size), mode="bilinear", antialias=True, align_corners=False)
