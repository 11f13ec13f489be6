"""Losses of UNets and noisy classifiers: plain functions of a model and a batch."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr


def drop_labels(labels: torch.Tensor, p_uncond: float, null_label: int | torch.Tensor) -> torch.Tensor:
    """(B,) class ids -> (B,) class ids, each replaced by the null label (one, or (B,)) with probability `p_uncond`.

    Drawn per sample, so that one batch trains both the conditional and the unconditional score (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598, algorithm 1).
    """
    return torch.where(torch.rand(labels.shape, device=labels.device) < p_uncond, null_label, labels)


def denoising_loss(
    unet: torch.nn.Module,
    scheduler: Any,
    images: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    null_labels: torch.Tensor | None = None,
    p_uncond: float = 0.1,
    snr_gamma: float | None = None,
    vlb_weight: float = 1.0,
    logit_normal: Sequence[float] | None = None,
) -> torch.Tensor:
    """The denoising objective of a (class-conditional) UNet, as one scalar.

    Args:
        unet: a `UNet2DModel`. With twice as many output as input channels its variance is learned too and the hybrid
            loss of Nichol & Dhariwal (2021, https://arxiv.org/abs/2102.09672) is returned: mean squared error plus
            `vlb_weight` times the variational bound of the sampled step, in bits per dimension.
        scheduler: of diffusers; adds the noise, and its `prediction_type` (epsilon, v_prediction, sample) is learned.
        images: (B, C, H, W), in the range of the model ([-1, 1] in our recipes).
        labels: (B,) ids of class embeddings, or None for a model without classes.
        null_labels: (B,) replacement of each label when it is dropped; None: the last class embedding.
        p_uncond: probability of dropping a label.
        snr_gamma: None, or the gamma of min-SNR weighting (Hang et al. 2023, https://arxiv.org/abs/2303.09556).
        logit_normal: None draws timesteps uniformly; (mean, std) draws logit(t / T) from that normal distribution,
            concentrated at the noise levels used for detection (Esser et al. 2024, https://arxiv.org/abs/2403.03206,
            section 3.1).
        vlb_weight: 1 is the original's "MSE" type, 0.001 the weight published by Nichol & Dhariwal.

    Raises:
        ValueError: learned variance together with a prediction type other than epsilon.
    """
    noise = torch.randn_like(images)
    timesteps = draw_timesteps(len(images), scheduler.config.num_train_timesteps, logit_normal).to(images.device)
    if labels is not None:
        if null_labels is None:
            null_labels = unwrapped_config(unet).num_class_embeds - 1
        labels = drop_labels(labels, p_uncond, null_labels)
    terms = denoising_terms(unet, scheduler, images, labels, noise, timesteps)
    weight = min_snr_weight(scheduler, timesteps, snr_gamma) if snr_gamma is not None else 1.0
    loss = weight * terms["mse"]
    if "vlb" in terms:
        loss = loss + vlb_weight * terms["vlb"]
    return loss.mean()


def noisy_classification_loss(
    classifier: torch.nn.Module, scheduler: Any, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy of p(label | x_t, t) (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, section 4).

    Args:
        classifier: `classifier(x_t, t)` -> (B, K) logits.
        scheduler: that of the diffusion model to be guided; adds the noise.
        images: (B, C, H, W), in the range of that model.
        labels: (B,) class ids.

    Returns:
        (scalar, {"accuracy_q1": scalar, ... "accuracy_q4"}): the loss, and the accuracy in each quarter of the noise
        levels, q1 with the least noise; NaN if the batch has no image in a quarter.
    """
    timesteps = spread_timesteps(len(images), scheduler.config.num_train_timesteps).to(images.device)
    noisy = scheduler.add_noise(images, torch.randn_like(images), timesteps)
    logits = classifier(noisy, timesteps).float()
    correct = (logits.argmax(dim=1) == labels).float()
    quarter = timesteps * 4 // scheduler.config.num_train_timesteps
    return F.cross_entropy(logits, labels), {f"accuracy_q{q + 1}": correct[quarter == q].mean() for q in range(4)}


def spread_timesteps(count: int, num_train_timesteps: int) -> torch.Tensor:
    """(count,) uniform timesteps in random order, one from each of `count` equal parts of the chain.

    With this stratified sampling, the loss of a batch varies less than with independent draws. Drawn on the CPU.
    """
    u = (torch.randperm(count) + torch.rand(count)) / count
    return (u * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def draw_timesteps(count: int, num_train_timesteps: int, logit_normal: Sequence[float] | None = None) -> torch.Tensor:
    """(count,) timesteps from 0 to num_train_timesteps - 1; see `denoising_loss`. Drawn on the CPU on any device."""
    if logit_normal is None:
        return torch.randint(num_train_timesteps, (count,))
    mean, std = logit_normal
    u = compute_density_for_timestep_sampling("logit_normal", count, logit_mean=mean, logit_std=std)
    return (u * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def unwrapped_config(unet: torch.nn.Module) -> Any:
    """The config of a UNet, also behind the wrapper of a multi-process run."""
    return getattr(unet, "module", unet).config


def denoising_terms(
    unet: torch.nn.Module,
    scheduler: Any,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """{"mse": (B,)} and, for learned variance, {"vlb": (B,)}: the unweighted terms of each sample."""
    noisy = scheduler.add_noise(images, noise, timesteps)
    output = unet(noisy, timesteps, class_labels=labels).sample.float()
    learned_variance = output.shape[1] == 2 * images.shape[1]
    prediction, variance = output.chunk(2, dim=1) if learned_variance else (output, None)

    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        target = scheduler.get_velocity(images, noise, timesteps)
    elif prediction_type == "sample":
        target = images
    else:
        raise ValueError(f"expected `prediction_type` epsilon, v_prediction or sample, got {prediction_type!r}")

    terms = {"mse": F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))}
    if learned_variance:
        if prediction_type != "epsilon":
            raise ValueError(f"learned variance needs `prediction_type: epsilon`, got {prediction_type!r}")
        # only the variance learns from the bound; the mean learns from the squared error
        terms["vlb"] = variational_bound(scheduler, images, noisy, timesteps, prediction.detach(), variance)
    return terms


def min_snr_weight(scheduler: Any, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """(B,) timesteps -> (B,) weights min(SNR, gamma) / SNR, in the form for the prediction type."""
    snr = compute_snr(scheduler, timesteps)
    clipped = snr.clamp(max=gamma)
    return {
        "epsilon": clipped / snr,
        "v_prediction": clipped / (snr + 1),
        "sample": clipped,
    }[scheduler.config.prediction_type]


def variational_bound(
    scheduler: Any,
    images: torch.Tensor,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    eps: torch.Tensor,
    variance: torch.Tensor,
) -> torch.Tensor:
    """(B,) bits per dimension: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the negative log-likelihood.

    `variance` (B, C, H, W) are the network's logits v of the interpolated variance (Nichol & Dhariwal 2021, eq. 15):
    log var = f log beta_t + (1 - f) log beta~_t with f = (v + 1) / 2. The likelihood at t = 0 is that of 8-bit images
    in [-1, 1], as in Ho et al. (2020, eq. 13).
    """
    # the tables are computed from the betas in double precision: at small t the relative error of 1 - abar in the
    # scheduler's float32 table is about 1e-4
    betas = scheduler.betas.double()
    alphas_cumprod = (1 - betas).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1].cpu()]).to(betas.device)
    posterior = betas * (1 - previous) / (1 - alphas_cumprod)
    log_posterior = torch.cat([posterior[1:2], posterior[1:]]).log()

    def at(table):
        return table.to(timesteps.device)[timesteps].float()[:, None, None, None]

    x0_weight, xt_weight = (
        at(betas * previous.sqrt() / (1 - alphas_cumprod)),
        at((1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod)),
    )
    x0 = at(alphas_cumprod.rsqrt()) * noisy - at((1 / alphas_cumprod - 1).sqrt()) * eps
    true_mean = x0_weight * images + xt_weight * noisy
    mean = x0_weight * x0 + xt_weight * noisy
    fraction = (variance + 1) / 2
    log_variance = fraction * at(betas.log()) + (1 - fraction) * at(log_posterior)

    kl = normal_kl(true_mean, at(log_posterior), mean, log_variance)
    nll = -discretized_log_likelihood(images, mean, log_variance / 2)
    bound = torch.where(timesteps[:, None, None, None] == 0, nll, kl)
    return bound.mean(dim=(1, 2, 3)) / math.log(2)


def normal_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise."""
    return 0.5 * (
        log_variance2
        - log_variance1
        + (log_variance1 - log_variance2).exp()
        + (mean1 - mean2) ** 2 * (-log_variance2).exp()
        - 1
    )


def discretized_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats, elementwise, of 8-bit values scaled to [-1, 1] under N(mean, std), bins of 2/255."""

    def cdf(value):
        # the tanh approximation that the published models were trained with
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    upper = cdf((x - mean + 1 / 255) * (-log_std).exp())
    lower = cdf((x - mean - 1 / 255) * (-log_std).exp())
    # the outermost bins are open
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
