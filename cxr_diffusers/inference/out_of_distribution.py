"""Images that do not look like the training images, recognised by the errors of a diffusion model that denoises them.

A network predicts the noise worse in images unlike those that it was trained on (after Graham et al. 2023,
https://arxiv.org/abs/2211.07740), and better in one without detail. So the error is taken at several noise levels,
together with the amount of detail in the image, and compared with those of validation images by a Mahalanobis distance.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..files import write_file
from ..fingerprints import weights_digest
from ..pipelines.cxr_anomaly import in_evaluation_mode
from ..pipelines.cxr_images import prepare_image
from ..pipelines.cxr_inversion import class_evidence_errors
from .reference_scores import model_file

ERRORS_FILE = "denoising_errors.json"  # in a model's folder
UNLIKE = "does not look like the chests the model was trained on"
NOISE_LEVELS = (0.05, 0.3, 0.7)  # as shares of the training chain
QUANTILE = 0.98  # of the distances of validation images
FEWEST = 20  # validation images for a covariance of 4 features
SHRINKAGE = 0.05  # of the correlations


@dataclass
class ReferenceErrors:
    """Denoising errors of validation images.

    data: a description of the images. weights: `weights_digest` of the model. mean, covariance: of the features that
    `denoising_errors` returns. threshold: the distance beyond which an image is unlike the training images, the 98 %
    quantile of all validation images. quantiles: {"healthy": {...}, "diseased": {...}}, "n" and the distance's
    quantiles. The distance of a validation image is measured from the other ones.
    """

    data: str
    weights: str
    mean: list[float]
    covariance: list[list[float]]
    threshold: float
    quantiles: dict[str, dict[str, float]]

    @classmethod
    def of(
        cls, pipeline: Any, data: str, healthy: np.ndarray, diseased: np.ndarray | None = None
    ) -> "ReferenceErrors | None":
        """From the features of validation images, (N, F) arrays; None if they are fewer than `FEWEST`."""
        features = healthy if diseased is None else np.concatenate([healthy, diseased])
        if len(features) < FEWEST:
            return None
        others = [np.delete(features, i, axis=0) for i in range(len(features))]
        pairs = zip(features, others, strict=True)
        distances = np.array([distance(image[None], *mean_and_covariance(rest))[0] for image, rest in pairs])
        parts = {"healthy": distances[: len(healthy)], "diseased": distances[len(healthy) :]}
        quantiles = {name: summary(part) for name, part in parts.items() if len(part)}
        mean, covariance = mean_and_covariance(features)
        threshold = round(float(np.quantile(distances, QUANTILE)), 4)
        return cls(data, weights_digest(pipeline), mean.tolist(), covariance.tolist(), threshold, quantiles)

    def distance(self, features: np.ndarray) -> np.ndarray:
        """(B, F) features of `denoising_errors` -> (B,) Mahalanobis distances from the validation images."""
        return distance(features, np.array(self.mean), np.array(self.covariance))

    def describe(self) -> str:
        """A line for the terminal."""
        counts = " and ".join(f"{int(part['n'])} {name}" for name, part in self.quantiles.items())
        return f"denoising errors of {counts} images: distance up to {self.threshold:.2f} ({QUANTILE:.0%} of them)"


def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, F) -> (F,) and (F, F), the correlations shrunk a little, so that a few images are enough."""
    covariance = np.cov(features.T)
    diagonal = np.diag(np.diag(covariance)) + 1e-9 * np.eye(len(covariance))
    return features.mean(axis=0), (1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal


def distance(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """(B, F) -> (B,) Mahalanobis distances."""
    difference = features - mean
    return np.sqrt((difference @ np.linalg.inv(covariance) * difference).sum(axis=1))


def summary(distances: np.ndarray) -> dict[str, float]:
    """Number and quantiles of distances."""
    values = {f"{q:g}": round(float(np.quantile(distances, q)), 4) for q in (0.05, 0.5, 0.95, 0.98, 1)}
    return {"n": len(distances), **values}


def has_denoiser(pipeline: Any) -> bool:
    """Whether a pipeline has a diffusion model that `denoising_errors` can use."""
    return {"unet", "scheduler"} <= set(getattr(pipeline, "components", ())) and hasattr(pipeline, "conditions")


@torch.no_grad()
def denoising_errors(pipeline: Any, images: list) -> np.ndarray:
    """Features of images: how badly they are denoised at each of three noise levels, and their detail.

    An image is denoised under the label that explains it best: the null label, in each view of the model; for a
    model without a null label, each of its classes. That is 6 evaluations of the network for two views.

    Args:
        pipeline: with a diffusion model, see `has_denoiser`.
        images: PIL images or arrays.

    Returns:
        (B, 4) float64: log of the mean squared error of the network's output at `NOISE_LEVELS`, lowest over the labels;
        and log of the mean squared gradient of the image.
    """
    x = prepare_image(images, **pipeline.image_format(pipeline.unet)).to(pipeline._execution_device)
    labels, chain = denoising_labels(pipeline), pipeline.scheduler.config.num_train_timesteps

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        ids = None if labels is None else torch.tensor(labels, device=x.device).repeat_interleave(len(x))
        return pipeline.predict(torch.cat([x] * len(labels or [0])), t, ids)

    features = []
    with in_evaluation_mode([pipeline.unet]):
        for level in NOISE_LEVELS:
            timesteps = [round(level * chain)]
            errors, _ = class_evidence_errors(predict, x, pipeline.scheduler, len(labels or [0]), timesteps)
            features.append(errors.amin(dim=0))
    gradients = [side.diff(dim=dim).square().mean(dim=(1, 2, 3)) for side, dim in ((x, 2), (x, 3))]
    features.append(sum(gradients))
    return torch.stack(features, dim=1).double().clamp(min=1e-12).log().cpu().numpy()


def denoising_labels(pipeline: Any) -> list[int] | None:
    """Ids of the class embeddings under which an image is denoised; None for a network without classes."""
    if not pipeline.unet.config.num_class_embeds:
        return None
    conditions = pipeline.conditions
    if conditions.has_null_label:
        return [conditions.null(view) for view in range(max(1, len(conditions.views)))]
    return list(range(conditions.num_classes))


def keep_errors(reference: ReferenceErrors, folder: Path | str) -> None:
    """Write the errors into a model's folder."""
    write_file(Path(folder) / ERRORS_FILE, (json.dumps(asdict(reference), indent=1) + "\n").encode())


def kept_errors(model: Path | str) -> ReferenceErrors | None:
    """The errors that `keep_errors` wrote into a model's folder, here or on the Hub; None if there are none."""
    path = model_file(model, ERRORS_FILE)
    return None if path is None else ReferenceErrors(**json.loads(path.read_text()))


REFERENCES: WeakKeyDictionary = WeakKeyDictionary()  # cache by pipeline, as `fingerprints.DIGESTS`


def reference_errors(pipeline: Any) -> ReferenceErrors | None:
    """The errors stored with a pipeline's model; None if there are none for its weights."""
    if pipeline not in REFERENCES:
        model = pipeline.config.get("_name_or_path") if has_denoiser(pipeline) else None
        reference = kept_errors(model) if model else None
        fits = reference is not None and reference.weights == weights_digest(pipeline)
        REFERENCES[pipeline] = reference if fits else None
    return REFERENCES[pipeline]


def unlikeness_warnings(pipeline: Any, images: list) -> list[list[str]]:
    """For each image [`UNLIKE`] if it does not look like the images that a calibrated model was trained on, else [].

    Costs three evaluations of the network an image for each view, none if the model was not calibrated.

    Args:
        pipeline: any; without a diffusion model, or not calibrated, there are no warnings.
        images: PIL images or arrays.
    """
    reference = reference_errors(pipeline) if images else None
    if reference is None:
        return [[] for _ in images]
    distances = reference.distance(denoising_errors(pipeline, images))
    return [[UNLIKE] if d > reference.threshold else [] for d in distances]
