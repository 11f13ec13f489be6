"""Deterministic DDIM inversion: an image to a noise level and back; and which label explains it, by the same chain."""

import torch
from diffusers.utils.torch_utils import randn_tensor

# Swaps for DDIM that share its latents (variance preserving, no scaling of the input) and can be run without noise.
DETERMINISTIC_SCHEDULERS = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def check_scheduler(scheduler):
    """Raise ValueError unless `scheduler` can decode what DDIM inversion encoded."""
    name, config = type(scheduler).__name__, scheduler.config
    if name not in DETERMINISTIC_SCHEDULERS:
        raise ValueError(
            f"expected a deterministic scheduler that shares DDIM's latents, one of {list(DETERMINISTIC_SCHEDULERS)}, "
            f"got {name}"
        )
    if str(config.get("algorithm_type", "")).startswith("sde"):
        raise ValueError(f"expected a deterministic `algorithm_type`, got {config.algorithm_type!r}")
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"expected `prediction_type` epsilon, v_prediction or sample, got {config.prediction_type!r}")
    for option in (
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_flow_sigmas",
        "use_lu_lambdas",
    ):
        if config.get(option):
            raise ValueError(f"expected a scheduler on the training timesteps, got `{option}=True`")


def timesteps_below(scheduler, noise_level, num_inference_steps, device=None):
    """The timesteps between the image and `noise_level`, descending: those of the scheduler's own that are smaller.

    Args:
        noise_level: a timestep of the training chain, 1..T, whatever `num_inference_steps` is.
        num_inference_steps: steps of the whole chain; about `num_inference_steps * noise_level / T` of them are used.
    """
    scheduler.set_timesteps(num_inference_steps, device=device)
    timesteps = scheduler.timesteps[scheduler.timesteps < noise_level]
    if len(timesteps) == 0:
        raise ValueError(
            f"expected at least one of the {num_inference_steps} steps below `noise_level`, got noise level "
            f"{noise_level}: take more steps or a higher level"
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))
    return timesteps


def noise_from_output(output, x, alpha, prediction_type):
    """What a network predicts (epsilon, v or x_0) at signal level `alpha` (alpha bar) -> the noise in `x`."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return alpha**0.5 * output + (1 - alpha) ** 0.5 * x
    return (x - alpha**0.5 * output) / (1 - alpha) ** 0.5


def output_from_noise(noise, x, alpha, prediction_type):
    """The inverse of `noise_from_output`: what the network would have said for the noise in `x` to be `noise`."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return (noise - (1 - alpha) ** 0.5 * x) / alpha**0.5
    return (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5


def move(x, noise, alpha, new_alpha):
    """The DDIM update without randomness (Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12 with sigma = 0).

    It goes either way: from alpha bar `alpha` to a smaller one (towards noise) or to a larger one (towards the image).
    """
    x0 = (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5
    return new_alpha**0.5 * x0 + (1 - new_alpha) ** 0.5 * noise


def invert(predict, x, timesteps, scheduler, num_refinements=0, on_step=None, interrupted=None):
    """Image -> latents, the exact mirror of decoding by DDIM over the same timesteps.

    A decoding step takes x_t to x_s with the noise predicted at x_t. Its inverse is implicit:
    x_t = move(x_s, eps(x_t)). The plain inversion puts x_s in place of x_t on the right; each refinement puts in the
    x_t of the last one and so solves the equation by fixed-point iteration (Pan et al. 2023,
    https://arxiv.org/abs/2309.04907).

    Args:
        predict: `predict(x, t)` -> the network's output, the variance already split off, float32.
        x: (B, C, H, W) images in the model's range.
        timesteps: descending, as `timesteps_below` gives them.
        num_refinements: evaluations per step beyond the first.
        on_step: `on_step(i, t, x)` -> x, called after each step.
        interrupted: `interrupted()` -> True where the remaining steps are to be left out.

    Returns:
        (B, C, H, W) latents at the level of `timesteps[0]`.
    """
    alphas = scheduler.alphas_cumprod.to(x.device, torch.float32)
    alpha = clean_alpha(scheduler).to(x.device)
    for i, t in enumerate(timesteps.flip(0)):
        if interrupted is not None and interrupted():
            break
        new_alpha = alphas[t.long()]
        new_x = x
        for _ in range(1 + num_refinements):
            noise = noise_from_output(predict(new_x, t), new_x, new_alpha, scheduler.config.prediction_type)
            new_x = move(x, noise, alpha, new_alpha)
        x, alpha = new_x, new_alpha
        if on_step is not None:
            x = on_step(i, t, x)
    return x


def evidence_timesteps(scheduler):
    """The timesteps of `class_evidence`: a tenth to seven tenths of the chain."""
    return [scheduler.config.num_train_timesteps * k // 10 for k in range(1, 8)]


def class_evidence(predict, x, scheduler, generator=None):
    """Which of two labels explains an image better, and where: the same noised image is predicted under either.

    A diffusion model is a classifier of its labels: the label with which it predicts the noise better is the likelier
    one (Li et al. 2023, https://arxiv.org/abs/2303.16203). And the predictions differ where the labels do (after
    Couairon et al. 2022, https://arxiv.org/abs/2210.11427, section 3). All images get the same noise, another one at
    each level, so the result of an image does not depend on its batch.

    Args:
        predict: `predict(x, t)` -> the network's outputs (2 * B, C, H, W) under the one and under the other label, the
            variance already split off, float32.
        x: (B, C, H, W) images in the model's range.
        generator: of the noise; None: a fixed seed for each level.

    Returns:
        (first, second, log_ratio): the images predicted under either label, (B, C, H, W) each, the mean over the
        levels; and (B,) log(error of the first / error of the second), errors being the squared errors of the noise,
        summed over levels and pixels. So 0.01 is one percent of error less under the second label.
    """
    alphas, kind = scheduler.alphas_cumprod.to(x.device, torch.float32), scheduler.config.prediction_type
    images, errors = 0.0, 0.0
    timesteps = evidence_timesteps(scheduler)
    for t in timesteps:
        alpha, noise = alphas[t], evidence_noise(x, t, generator)
        noised = alpha**0.5 * x + (1 - alpha) ** 0.5 * noise
        both = torch.cat([noised, noised])
        predicted_noise = noise_from_output(predict(noised, torch.tensor(t, device=x.device)), both, alpha, kind)
        images = images + (both - (1 - alpha) ** 0.5 * predicted_noise) / alpha**0.5 / len(timesteps)
        errors = errors + ((predicted_noise - noise) ** 2).flatten(1).sum(dim=1)
    first, second = images.chunk(2)
    return first, second, (errors[: len(x)] / errors[len(x) :]).log()


def class_evidence_errors(predict, x, scheduler, num_labels, timesteps=None):
    """How badly images under noise are predicted under each of several labels; noise and levels of `class_evidence`.

    Args:
        predict: `predict(x, t)` -> the network's outputs (num_labels * B, C, H, W), label by label, float32.
        x: (B, C, H, W) images in the model's range.
        timesteps: the noise levels; None: those of `class_evidence`.

    Returns:
        (output_errors, noise_errors), (num_labels, B) each: the mean squared error of what the network predicts, the
        mean over the levels; and the squared error of the noise, summed over levels and pixels.
    """
    alphas, kind = scheduler.alphas_cumprod.to(x.device, torch.float32), scheduler.config.prediction_type
    output_errors, noise_errors = 0.0, 0.0
    timesteps = timesteps or evidence_timesteps(scheduler)
    for t in timesteps:
        alpha, noise = alphas[t], evidence_noise(x, t)
        noised = alpha**0.5 * x + (1 - alpha) ** 0.5 * noise
        output = predict(noised, torch.tensor(t, device=x.device)).unflatten(0, (num_labels, len(x)))
        target = output_from_noise(noise, noised, alpha, kind)
        output_errors = output_errors + ((output - target) ** 2).flatten(2).mean(dim=2) / len(timesteps)
        predicted_noise = noise_from_output(output, noised, alpha, kind)
        noise_errors = noise_errors + ((predicted_noise - noise) ** 2).flatten(2).sum(dim=2)
    return output_errors, noise_errors


def view_errors(predict, x, scheduler, num_views):
    """(num_views, B) errors of `class_evidence_errors` for labels that are views, at three of the noise levels."""
    return class_evidence_errors(predict, x, scheduler, num_views, evidence_timesteps(scheduler)[1:6:2])[1]


def evidence_noise(x, t, generator=None):
    """(1, C, H, W), the noise that `class_evidence` adds to all images at timestep `t`.

    Without a `generator` it is always the same, on any device.
    """
    generator = torch.Generator().manual_seed(int(t)) if generator is None else generator
    return randn_tensor((1, *x.shape[1:]), generator=generator, device=x.device, dtype=torch.float32)


def clean_alpha(scheduler):
    """alpha bar of the image itself: 1, or for DDIM with `set_alpha_to_one: false` that of the first timestep."""
    return torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0), dtype=torch.float32)
