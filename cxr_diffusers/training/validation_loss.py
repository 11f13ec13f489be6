"""A loss of a diffusion model on images it was not trained on, with the same noise each time."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from diffusers import SchedulerMixin
from sklearn.metrics import roc_auc_score

from ..pipelines.cxr_conditions import Conditions
from ..pipelines.cxr_inversion import class_evidence_errors

if TYPE_CHECKING:
    from .tensors import TensorImages


class ValidationLoss:
    """How well a class-conditional UNet predicts the noise in validation images, by class and view.

    A small training set is memorised long before the training loss shows it; this loss does, because levels and noise
    are fixed (seven levels, one noise image each). The prediction under each class gives the image-level AUROC too: log
    ratio of the errors as healthy and as the class (Li et al. 2023, https://arxiv.org/abs/2303.16203).

    Args:
        images: a `TensorImages` in memory, with labels and, where `conditions` has views, views.
        conditions: a `pipelines.cxr_conditions.Conditions`.
        class_names: names of the classes, healthy first.
        scheduler: defines the noise levels and the `prediction_type` of the UNet.
        limit: at most so many images, evenly spaced over the rows.
        batch_size: images at once.
    """

    def __init__(
        self,
        images: "TensorImages",
        conditions: Conditions,
        class_names: Sequence[str],
        scheduler: SchedulerMixin,
        limit: int,
        batch_size: int = 64,
    ) -> None:
        self.conditions, self.class_names, self.scheduler = conditions, class_names, scheduler
        usable = (images.labels >= 0) & ((images.views >= 0) | (not conditions.views))
        rows = torch.nonzero(usable.cpu()).flatten()
        if not len(rows):
            raise ValueError("expected labelled validation images for the validation loss, got none")
        picked = torch.linspace(0, len(rows) - 1, min(limit, len(rows))).round().long()
        self.batch = images.batch(rows[picked])
        self.batch_size = batch_size
        # of the images, classes and views: a run that is resumed with others does not compare their losses with these
        self.digest = hashlib.blake2b(
            b"".join(self.batch[name].cpu().numpy().tobytes() for name in sorted(self.batch)), digest_size=4
        ).hexdigest()

    @torch.no_grad()
    def __call__(self, unet: torch.nn.Module) -> dict[str, float]:
        """The losses and AUROCs of a UNet: {"validation_loss", "validation_loss/CLASS[ VIEW]", "auroc/CLASS"}.

        A loss is the mean squared error of the UNet's output, under each image's own class and view; an AUROC is that
        of healthy against the class.
        """
        device = next(unet.parameters()).device
        labels, views = self.batch["labels"].to(device), self.batch["views"].to(device).clamp(min=0)
        num_classes = self.conditions.num_classes
        losses, noise_errors = [], []
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            x, view = self.batch["images"][part].to(device), views[part]
            ids = torch.cat([self.conditions.of_class(torch.full_like(view, k), view) for k in range(num_classes)])

            def predict(noised, t, ids=ids):
                stacked = torch.cat([noised] * num_classes)
                return unet(stacked, t, class_labels=ids).sample[:, : noised.shape[1]].float()

            output_errors, errors = class_evidence_errors(predict, x, self.scheduler, num_classes)  # (K, B) each
            losses.append(output_errors.gather(0, labels[part][None])[0])
            noise_errors.append(errors)
        losses, noise_errors = torch.cat(losses).cpu(), torch.cat(noise_errors, dim=1).cpu()
        return self.summary(losses, noise_errors)

    def summary(self, losses: torch.Tensor, noise_errors: torch.Tensor) -> dict[str, float]:
        """(N,) losses and (K, N) errors of the noise -> the numbers of a call."""
        labels, views = self.batch["labels"].cpu(), self.batch["views"].cpu()
        values = {"validation_loss": losses.mean()}
        for k, name in enumerate(self.class_names):
            for v, view in enumerate(self.conditions.views or ("",)):
                rows = (labels == k) & ((views == v) | (not self.conditions.views))
                if rows.any():
                    values[f"validation_loss/{name} {view}".strip()] = losses[rows].mean()
        for k, name in enumerate(self.class_names[1:], start=1):
            rows = (labels == 0) | (labels == k)
            ratio = (noise_errors[0] / noise_errors[k]).log()
            if 0 < int((labels[rows] == k).sum()) < int(rows.sum()):
                values[f"auroc/{name}"] = roc_auc_score((labels[rows] == k).numpy(), ratio[rows].numpy())
        return {name: float(value) for name, value in values.items()}
