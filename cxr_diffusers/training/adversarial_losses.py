"""The losses of the generator and the discriminator of a Fixed-Point GAN, as functions of both and a batch.

Siddiquee et al. 2019 (https://arxiv.org/abs/1908.06965); the terms have the names of the paper. A generator is a
function `(images, labels) -> output with .sample`, a discriminator `images -> output with .score and .logits`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def discriminator_loss(
    generator: Callable[[torch.Tensor, torch.Tensor], Any],
    discriminator: Callable[[torch.Tensor], Any],
    images: torch.Tensor,
    labels: torch.Tensor,
    target_labels: torch.Tensor,
    *,
    lambda_cls: float = 1.0,
    lambda_gp: float = 10.0,
    classification: str = "softmax",
    alpha: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the discriminator (a critic): tell real from translated images, and classify the real ones.

    Args:
        images: (B, C, H, W) in [-1, 1].
        labels, target_labels: (B,) class ids, or (B, K) vectors: classes of the images and of their translations.
        lambda_cls, lambda_gp: weights of domain classification and gradient penalty.
        classification: see `domain_classification_loss`.
        alpha: see `gradient_penalty`.

    Returns:
        the loss, and {term: unweighted value}: adversarial_real, adversarial_fake, domain, gradient_penalty.
    """
    with torch.no_grad():
        fake = generator(images, target_labels).sample
    real = discriminator(images)
    terms = {
        "adversarial_real": -real.score.float().mean(),
        "adversarial_fake": discriminator(fake).score.float().mean(),
        "domain": domain_classification_loss(real.logits, labels, classification),
        "gradient_penalty": gradient_penalty(discriminator, images, fake, alpha),
    }
    adversarial = terms["adversarial_real"] + terms["adversarial_fake"]
    return adversarial + lambda_cls * terms["domain"] + lambda_gp * terms["gradient_penalty"], terms


def generator_loss(
    generator: Callable[[torch.Tensor, torch.Tensor], Any],
    discriminator: Callable[[torch.Tensor], Any],
    images: torch.Tensor,
    labels: torch.Tensor,
    target_labels: torch.Tensor,
    *,
    lambda_cls: float = 1.0,
    lambda_rec: float = 10.0,
    lambda_id: float = 10.0,
    classification: str = "softmax",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The generator's loss: translation across domains and back, and identity within the image's own domain.

    The terms named `same_` are those of the fixed point: an image that is translated to its own labels must look real,
    keep its class, be recovered by a second translation, and equal the input (`identity`).

    Args:
        images, labels, target_labels, classification: as in `discriminator_loss`.
        lambda_cls, lambda_rec, lambda_id: weights of domain classification, cycle consistency, conditional identity.

    Returns:
        the loss, and {term: unweighted value}: adversarial, domain, cycle, same_adversarial, same_domain, same_cycle,
        identity.
    """

    across, within = generator(images, target_labels).sample, generator(images, labels).sample
    terms = {}
    for prefix, translated, classes in (("", across, target_labels), ("same_", within, labels)):
        judged = discriminator(translated)
        terms[f"{prefix}adversarial"] = -judged.score.float().mean()
        terms[f"{prefix}domain"] = domain_classification_loss(judged.logits, classes, classification)
        terms[f"{prefix}cycle"] = (images - generator(translated, labels).sample).abs().mean()
    terms["identity"] = (images - within).abs().mean()
    loss = lambda_id * terms["identity"]
    for name, weight in (("adversarial", 1.0), ("domain", lambda_cls), ("cycle", lambda_rec)):
        loss = loss + weight * (terms[name] + terms[f"same_{name}"])
    return loss, terms


def domain_classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, classification: str = "softmax"
) -> torch.Tensor:
    """Cross-entropy of (B, K) logits, as one scalar.

    Args:
        labels: (B,) class ids, or (B, K) vectors of zeros and ones.
        classification: "softmax", one class an image: the mean of the batch. "binary", any number of findings an image:
            summed over the K of them, mean over the batch.
    """
    if classification == "softmax":
        return F.cross_entropy(logits, labels if labels.ndim == 1 else labels.argmax(dim=1))
    if classification == "binary":
        vectors = F.one_hot(labels.long(), logits.shape[1]) if labels.ndim == 1 else labels
        loss = F.binary_cross_entropy_with_logits(logits, vectors.to(logits.dtype), reduction="sum")
        return loss / len(logits)
    raise ValueError(f"expected `classification` softmax or binary, got {classification!r}")


def gradient_penalty(
    discriminator: Callable[[torch.Tensor], Any],
    real: torch.Tensor,
    fake: torch.Tensor,
    alpha: torch.Tensor | None = None,
) -> torch.Tensor:
    """(|grad of the critic| - 1)^2 between a real and a translated image, mean over the batch, as one scalar.

    After Gulrajani et al. 2017 (https://arxiv.org/abs/1704.00028, algorithm 1). The gradient is that of the summed
    patch scores, its norm is over all pixels of an image; always in float32, since it is differentiated once more.

    Args:
        alpha: (B, 1, 1, 1) in [0, 1], share of the real image; None: drawn uniformly, on the CPU for any device.
    """
    if alpha is None:
        alpha = torch.rand(len(real), 1, 1, 1)
    with torch.autocast(real.device.type, enabled=False):
        real, fake, alpha = real.float(), fake.float(), alpha.to(real.device, torch.float32)
        between = (alpha * real + (1 - alpha) * fake).detach().requires_grad_()
        score = discriminator(between).score
        gradient = torch.autograd.grad(score.sum(), between, create_graph=True)[0]
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()
