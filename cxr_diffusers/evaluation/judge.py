"""An image classifier that looks at pictures and counterfactuals, and had no part in making them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..pipelines.cxr_classifier import classify, is_image_classifier

HEALTHY = 0


def check_judge(judge):
    """ValueError unless `judge` is None or a pipeline with an image classifier of `transformers`."""
    if judge is None:
        return
    classifier = getattr(judge, "components", {}).get("classifier")
    # the classifier of classifier guidance is asked about noised pictures: it is none
    if not is_image_classifier(classifier) or getattr(judge.config, "sample_size", None) is None:
        raise ValueError(
            "expected a judge with an image classifier of transformers, as a GradCAMPipeline has it, "
            f"got a {type(judge).__name__} without one"
        )


def name_of(model):
    """The name of a judge or lung segmenter: that of its folder or repository, else its class; None without one."""
    if model is None:
        return None
    name = str(model.config.get("_name_or_path") or type(model).__name__)
    return Path(name).resolve().name if Path(name).is_dir() else name


def is_its_own_judge(pipeline, judge):
    """Whether a method is (or is guided by) the very classifier that would judge it."""
    own = getattr(pipeline, "components", {}).get("classifier")
    if not isinstance(own, torch.nn.Module):
        return False
    a, b = own.state_dict(), judge.components["classifier"].state_dict()
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and bool((a[k].cpu() == b[k].cpu()).all()) for k in a)


@torch.no_grad()
def look(judge, pictures, references=None, *, batch_size=32, progress=False, desc="judge"):
    """Pictures -> the judge's probabilities and features.

    Each is stretched to its reference's darkest and brightest value, if the judge was trained on pictures stretched to
    theirs, so that a counterfactual is never normalised apart from its picture.

    Args:
        judge: see `check_judge`.
        pictures: sequence of (H, W) arrays in [0, 1], all square or framed as the judge's own pictures are.
        references: likewise, a picture for each; None: the pictures themselves.

    Returns:
        (N, K) probabilities, class 0 healthy, and (N, D) features: the mean of the last feature map, which the
        classifier's linear layer reads.
    """
    references = pictures if references is None else references
    classifier, size = judge.components["classifier"], judge.config.sample_size
    probabilities, features = [], []
    bar = tqdm(total=len(pictures), desc=desc, disable=not progress, unit="image")
    for start in range(0, len(pictures), batch_size):
        stop = min(start + batch_size, len(pictures))
        batch = [stretched(pictures[i], references[i], judge.config.scaling) for i in range(start, stop)]
        batch = torch.cat([resized(picture, size) for picture in batch]).to(classifier.device)
        output = classify(classifier, batch, getattr(judge, "feature_extractor", None), output_hidden_states=True)
        last = output.hidden_states[-1].float()
        probabilities.append(output.logits.float().softmax(1).cpu().numpy())
        features.append((last.mean((2, 3)) if last.ndim == 4 else last.mean(1)).cpu().numpy())
        bar.update(stop - start)
    bar.close()
    return np.concatenate(probabilities), np.concatenate(features).astype(np.float64)


def stretched(picture, reference, scaling):
    picture, reference = (np.asarray(x, np.float32) for x in (picture, reference))
    if scaling == "minmax":
        low, high = reference.min(), reference.max()
        picture = (picture - low) / max(high - low, 1e-6)
    return np.clip(picture, 0, 1)


def resized(picture, size):
    """(H, W) array -> (1, 1, size, size) tensor."""
    picture = torch.from_numpy(picture)[None, None]
    if picture.shape[-2:] == (size, size):
        return picture
    return F.interpolate(picture, (size, size), mode="bilinear", antialias=True, align_corners=False)
