"""What the networks minimise: plain functions of a model and a batch."""

import math

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr


def drop_labels(labels, p_uncond, null_label):
    """(B,) class ids -> (B,) class ids, each replaced by the null label (one, or (B,)) with probability `p_uncond`.

    Drawn per sample, so that one batch trains both the conditional and the unconditional score (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598, algorithm 1).
    """
    return torch.where(torch.rand(labels.shape, device=labels.device) < p_uncond, null_label, labels)


def denoising_loss(
    unet,
    scheduler,
    images,
    labels=None,
    *,
    null_labels=None,
    p_uncond=0.1,
    snr_gamma=None,
    vlb_weight=1.0,
    logit_normal=None,
):
    """The denoising objective of a (class-conditional) UNet, as one scalar.

    Args:
        unet: a `UNet2DModel`. With twice as many output as input channels its variance is learned too and the hybrid
            loss of Nichol & Dhariwal (2021, https://arxiv.org/abs/2102.09672) is returned: mean squared error plus
            `vlb_weight` times the variational bound of the sampled step, in bits per dimension.
        scheduler: gives `add_noise`, and decides by `prediction_type` (epsilon, v_prediction, sample) what is learned.
        images: (B, C, H, W), in the range the model is meant for ([-1, 1] in our recipes).
        labels: (B,) ids of class embeddings, or None for a model without classes.
        null_labels: (B,) what each label is replaced by when it is dropped; None: the last class embedding.
        p_uncond: how often a label is dropped.
        snr_gamma: None, or the gamma of min-SNR weighting (Hang et al. 2023, https://arxiv.org/abs/2303.09556).
        logit_normal: None draws timesteps uniformly; (mean, std) draws logit(t / T) from that normal, so that most are
            spent where detection works (Esser et al. 2024, https://arxiv.org/abs/2403.03206, section 3.1).
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


def noisy_classification_loss(classifier, scheduler, images, labels):
    """Cross-entropy of p(label | x_t, t) (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, section 4).

    Args:
        classifier: `classifier(x_t, t)` -> (B, K) logits.
        scheduler: gives `add_noise`; that of the diffusion model which is to be guided.
        images: (B, C, H, W), in the range of that model.
        labels: (B,) class ids.

    Returns:
        (scalar, {"accuracy_q1": scalar, ... "accuracy_q4"}): the loss, and the share of right answers in each quarter
        of the chain, q1 that of least noise; NaN where the batch had none of it.
    """
    timesteps = spread_timesteps(len(images), scheduler.config.num_train_timesteps).to(images.device)
    noisy = scheduler.add_noise(images, torch.randn_like(images), timesteps)
    logits = classifier(noisy, timesteps).float()
    right = (logits.argmax(dim=1) == labels).float()
    quarter = timesteps * 4 // scheduler.config.num_train_timesteps
    return F.cross_entropy(logits, labels), {f"accuracy_q{q + 1}": right[quarter == q].mean() for q in range(4)}


def spread_timesteps(count, num_train_timesteps):
    """(count,) timesteps in random order, each uniform, and together one from each `count`-th part of the chain.

    So the loss of a batch varies less than with independent draws (stratified sampling). Drawn on the CPU.
    """
    u = (torch.randperm(count) + torch.rand(count)) / count
    return (u * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def draw_timesteps(count, num_train_timesteps, logit_normal=None):
    """(count,) timesteps from 0 to num_train_timesteps - 1; see `denoising_loss`. Drawn on the CPU on any device."""
    if logit_normal is None:
        return torch.randint(num_train_timesteps, (count,))
    mean, std = logit_normal
    u = compute_density_for_timestep_sampling("logit_normal", count, logit_mean=mean, logit_std=std)
    return (u * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)


def unwrapped_config(unet):
    """The config of a UNet, also behind the wrapper of a multi-process run."""
    return getattr(unet, "module", unet).config


def denoising_terms(unet, scheduler, images, labels, noise, timesteps):
    """{"mse": (B,)} and, for learned variance, {"vlb": (B,)}: the unweighted terms of each sample."""
    noisy = scheduler.add_noise(images, noise, timesteps)
    output = unet(noisy, timesteps, class_labels=labels).sample.float()
    learned_variance = output.shape[1] == 2 * images.shape[1]
    prediction, variance = output.chunk(2, dim=1) if learned_variance else (output, None)

    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(images, noise, timesteps)
    elif kind == "sample":
        target = images
    else:
        raise ValueError(f"expected `prediction_type` epsilon, v_prediction or sample, got {kind!r}")

    terms = {"mse": F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))}
    if learned_variance:
        if kind != "epsilon":
            raise ValueError(f"learned variance needs `prediction_type: epsilon`, got {kind!r}")
        # only the variance learns from the bound; the mean learns from the squared error
        terms["vlb"] = variational_bound(scheduler, images, noisy, timesteps, prediction.detach(), variance)
    return terms


def min_snr_weight(scheduler, timesteps, gamma):
    """(B,) timesteps -> (B,) weights min(SNR, gamma) / SNR, in the form that belongs to the prediction type."""
    snr = compute_snr(scheduler, timesteps)
    clipped = snr.clamp(max=gamma)
    return {
        "epsilon": clipped / snr,
        "v_prediction": clipped / (snr + 1),
        "sample": clipped,
    }[scheduler.config.prediction_type]


def variational_bound(scheduler, images, noisy, timesteps, eps, variance):
    """(B,) bits per dimension: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the negative log-likelihood.

    `variance` (B, C, H, W) are the network's logits v of the interpolated variance (Nichol & Dhariwal 2021, eq. 15):
    log var = f log beta_t + (1 - f) log beta~_t with f = (v + 1) / 2. The likelihood at t = 0 is that of 8-bit images
    in [-1, 1], as in Ho et al. (2020, eq. 13).
    """
    # the tables anew from the betas, in double precision: at small t, 1 - abar of the scheduler's float32 table is off
    # by some 1e-4 of itself
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


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise."""
    return 0.5 * (
        log_variance2
        - log_variance1
        + (log_variance1 - log_variance2).exp()
        + (mean1 - mean2) ** 2 * (-log_variance2).exp()
        - 1
    )


def discretized_log_likelihood(x, mean, log_std):
    """Log-probability in nats, elementwise, of 8-bit values scaled to [-1, 1] under N(mean, std), bins of 2/255."""

    def cdf(value):
        # the tanh approximation that the published models were trained with
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    upper = cdf((x - mean + 1 / 255) * (-log_std).exp())
    lower = cdf((x - mean - 1 / 255) * (-log_std).exp())
    # the outermost bins are open
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
