"""Deterministic DDIM inversion, inpainting, and the class evidence of a diffusion model."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from diffusers.utils.torch_utils import randn_tensor

# Schedulers that share DDIM's latents (variance preserving, no scaling of the input) and can be run without noise.
DETERMINISTIC_SCHEDULERS = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None


def check_scheduler(scheduler: Any) -> None:
    """Raise ValueError unless `scheduler` can decode the latents of DDIM inversion."""
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


def timesteps_below(
    scheduler: Any, noise_level: int, num_inference_steps: int, device: torch.device | None = None
) -> torch.Tensor:
    """The scheduler's timesteps below `noise_level`, descending.

    Args:
        noise_level: a timestep of the training chain, 1..T, whatever `num_inference_steps` is.
        num_inference_steps: steps of the whole chain; about `num_inference_steps * noise_level / T` of them are used.

    Raises:
        ValueError: no step lies below the noise level.
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


def noise_from_output(output: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """A network's prediction (epsilon, v or x_0) at signal level `alpha` (alpha bar) -> the noise in `x`."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return alpha**0.5 * output + (1 - alpha) ** 0.5 * x
    return (x - alpha**0.5 * output) / (1 - alpha) ** 0.5


def output_from_noise(noise: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """The inverse of `noise_from_output`: the prediction of a network for which the noise in `x` is `noise`."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return (noise - (1 - alpha) ** 0.5 * x) / alpha**0.5
    return (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5


def image_from_noise(x: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The image x_0 in the latents `x` at signal level `alpha` (alpha bar), whose noise is `noise`."""
    return (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5


def move(x: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, new_alpha: torch.Tensor) -> torch.Tensor:
    """The DDIM update without randomness (Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12 with sigma = 0).

    It goes both ways: from alpha bar `alpha` to a smaller one (towards noise) or to a larger one (towards the image).
    """
    return new_alpha**0.5 * image_from_noise(x, noise, alpha) + (1 - new_alpha) ** 0.5 * noise


def invert(
    predict: Callable,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    scheduler: Any,
    num_refinements: int = 0,
    on_step: Callable | None = None,
    interrupted: Callable[[], bool] | None = None,
    averaged: bool = False,
) -> torch.Tensor:
    """Image -> latents, the inverse of decoding by DDIM over the same timesteps.

    A decoding step goes from x_t to x_s with the noise predicted at x_t. Its inverse is implicit:
    x_t = move(x_s, eps(x_t)). The plain inversion uses x_s in place of x_t on the right; each refinement uses the
    previous x_t and so solves the equation by fixed-point iteration (Pan et al. 2023,
    https://arxiv.org/abs/2309.04907).

    Args:
        predict: `predict(x, t)` -> the network's output, the variance already split off, float32.
        x: (B, C, H, W) images in the model's range.
        timesteps: descending, from `timesteps_below`.
        num_refinements: further evaluations of the network in each step.
        on_step: `on_step(i, t, x)` -> x, called after each step.
        interrupted: `interrupted()` -> True to skip the remaining steps.
        averaged: each step, from the second on, uses the mean of its own noise and that of the step before, as the
            trapezoidal rule does. With long steps it is more accurate, at no cost.

    Returns:
        (B, C, H, W) latents at the level of `timesteps[0]`.
    """
    alphas = scheduler.alphas_cumprod.to(x.device, torch.float32)
    alpha, last_noise = clean_alpha(scheduler).to(x.device), None
    for i, t in enumerate(timesteps.flip(0)):
        if interrupted is not None and interrupted():
            break
        new_alpha = alphas[t.long()]
        new_x = x
        for _ in range(1 + num_refinements):
            noise = noise_from_output(predict(new_x, t), new_x, new_alpha, scheduler.config.prediction_type)
            mean = (noise + last_noise) / 2 if averaged and last_noise is not None else noise
            new_x = move(x, mean, alpha, new_alpha)
        x, alpha, last_noise = new_x, new_alpha, noise
        if on_step is not None:
            x = on_step(i, t, x)
    return x


def decode_step(scheduler: Any, timesteps: torch.Tensor, i: int, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The scheduler's step from `timesteps[i]` to the next one, or to the clean image.

    `DDIMScheduler.step` goes to t - T // steps, which is not the next timestep where T is no multiple of the steps and
    `timestep_spacing` is not "leading". So its update is computed here.
    """
    config = scheduler.config
    if type(scheduler).__name__ != "DDIMScheduler" or config.clip_sample or config.thresholding:
        return scheduler.step(output, timesteps[i], x).prev_sample
    alphas = scheduler.alphas_cumprod.to(x.device, torch.float32)
    alpha = alphas[timesteps[i].long()]
    new_alpha = alphas[timesteps[i + 1].long()] if i + 1 < len(timesteps) else clean_alpha(scheduler).to(x.device)
    return move(x, noise_from_output(output, x, alpha, config.prediction_type), alpha, new_alpha)


def inpaint(
    predict: Callable,
    x: torch.Tensor,
    mask: torch.Tensor,
    timesteps: torch.Tensor,
    scheduler: Any,
    data_range: Sequence[float],
    noise: torch.Tensor,
    on_step: Callable | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """Draw a part of the images anew, so that it fits the rest.

    DDIM from noise. In each step, the image that the network predicts is replaced by the known one outside the mask;
    RePaint (Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865, algorithm 1) replaces the latents instead.

    Args:
        predict: `predict(x, t)` -> the network's output, the variance already split off, float32.
        x: (B, C, H, W) images in the model's range.
        mask: (B, H, W), 1: drawn anew, 0: known; in between, a mixture.
        timesteps: descending; each step goes to the next one, the last one to the clean image.
        data_range: limits of the predicted images.
        noise: standard normal, of the shape of `x` or one for all images.
        on_step, interrupted: as in `invert`; an interrupted call returns the images themselves.

    Returns:
        (B, C, H, W) images, equal to `x` outside the mask.
    """
    alphas = scheduler.alphas_cumprod.to(x.device, torch.float32)
    mask = mask[:, None].to(x.dtype)
    alpha = alphas[timesteps[0].long()]
    latents = alpha**0.5 * (1 - mask) * x + (1 - alpha) ** 0.5 * noise
    for i, t in enumerate(timesteps):
        if interrupted is not None and interrupted():
            return x
        alpha = alphas[t.long()]
        noise = noise_from_output(predict(latents, t), latents, alpha, scheduler.config.prediction_type)
        predicted = image_from_noise(latents, noise, alpha).clamp(*data_range)
        result = x + mask * (predicted - x)
        if i + 1 < len(timesteps):
            noise = (latents - alpha**0.5 * result) / (1 - alpha) ** 0.5  # the noise for which `result` is the image
            new_alpha = alphas[timesteps[i + 1].long()]
            latents = new_alpha**0.5 * result + (1 - new_alpha) ** 0.5 * noise
        else:
            latents = result
        if on_step is not None:
            latents = on_step(i, t, latents)
    return latents


def evidence_timesteps(scheduler: Any) -> list[int]:
    """The timesteps of `class_evidence`: from a tenth to seven tenths of the chain."""
    return [scheduler.config.num_train_timesteps * k // 10 for k in range(1, 8)]


def evidence_noise(x: torch.Tensor, t: int, generator: Generators = None) -> torch.Tensor:
    """(1, C, H, W), the noise that `class_evidence` adds to all images at timestep `t`; see there.

    With a list of generators, one for each image: (B, C, H, W).
    """
    generator = torch.Generator().manual_seed(int(t)) if generator is None else generator
    count = len(x) if isinstance(generator, list) else 1
    return randn_tensor((count, *x.shape[1:]), generator=generator, device=x.device, dtype=torch.float32)


def predict_noised(
    predict: Callable,
    x: torch.Tensor,
    scheduler: Any,
    num_labels: int,
    timesteps: Sequence[int],
    generator: Generators = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Noise the images at each timestep and predict them under each of several labels.

    Yields:
        (alpha bar, the noise of `evidence_noise`, the noised images (B, C, H, W), the network's outputs
        (num_labels, B, C, H, W)).
    """
    alphas = scheduler.alphas_cumprod.to(x.device, torch.float32)
    for t in timesteps:
        alpha, noise = alphas[t], evidence_noise(x, t, generator)
        noised = alpha**0.5 * x + (1 - alpha) ** 0.5 * noise
        output = predict(noised, torch.tensor(t, device=x.device))
        yield alpha, noise, noised, output.unflatten(0, (num_labels, len(x)))


def class_evidence(
    predict: Callable,
    x: torch.Tensor,
    scheduler: Any,
    generator: Generators = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compare two labels by how well the network predicts the same noised image under each, and where.

    A diffusion model is a classifier of its labels: the label under which it predicts the noise better is the likelier
    one (Li et al. 2023, https://arxiv.org/abs/2303.16203). And the predictions differ where the labels do (after
    Couairon et al. 2022, https://arxiv.org/abs/2210.11427, section 3). At each level all images get the same noise, or
    each that of its own generator, so the result of an image does not depend on its batch.

    Args:
        predict: `predict(x, t)` -> the network's outputs (2 * B, C, H, W) under the first and then under the second
            label, the variance already split off, float32.
        x: (B, C, H, W) images in the model's range.
        generator: of the noise, one for all images or a list with one for each; None: a fixed seed for each level.
        weights: (B, H, W), how much the error of each pixel counts; None: all the same.

    Returns:
        (first, second, log_ratio): the images predicted under each label, (B, C, H, W) each, the mean over the levels;
        and (B,) log(error of the first / error of the second), where an error is the squared error of the noise,
        summed over levels and pixels. 0.01 means that the error is one percent smaller under the second label.
    """
    timesteps, prediction_type = evidence_timesteps(scheduler), scheduler.config.prediction_type
    weights = torch.ones_like(x) if weights is None else weights[:, None]
    images, errors = torch.zeros(()), torch.zeros(())
    for alpha, noise, noised, output in predict_noised(predict, x, scheduler, 2, timesteps, generator):
        predicted_noise = noise_from_output(output, noised, alpha, prediction_type)
        images = images + image_from_noise(noised, predicted_noise, alpha) / len(timesteps)
        errors = errors + ((predicted_noise - noise) ** 2 * weights).flatten(2).sum(dim=2)
    return images[0], images[1], (errors[0] / errors[1]).log()


def class_evidence_errors(
    predict: Callable, x: torch.Tensor, scheduler: Any, num_labels: int, timesteps: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The errors of the predictions of noised images under several labels; noise and levels are `class_evidence`'s.

    Args:
        predict: `predict(x, t)` -> the network's outputs (num_labels * B, C, H, W), label by label, float32.
        x: (B, C, H, W) images in the model's range.
        timesteps: the noise levels; None: those of `class_evidence`.

    Returns:
        (output_errors, noise_errors), (num_labels, B) each: the mean squared error of the network's output, the mean
        over the levels; and the squared error of the noise, summed over levels and pixels.
    """
    timesteps, prediction_type = timesteps or evidence_timesteps(scheduler), scheduler.config.prediction_type
    output_errors, noise_errors = torch.zeros(()), torch.zeros(())
    for alpha, noise, noised, output in predict_noised(predict, x, scheduler, num_labels, timesteps):
        target = output_from_noise(noise, noised, alpha, prediction_type)
        output_errors = output_errors + ((output - target) ** 2).flatten(2).mean(dim=2) / len(timesteps)
        predicted_noise = noise_from_output(output, noised, alpha, prediction_type)
        noise_errors = noise_errors + ((predicted_noise - noise) ** 2).flatten(2).sum(dim=2)
    return output_errors, noise_errors


def view_errors(predict: Callable, x: torch.Tensor, scheduler: Any, num_views: int) -> torch.Tensor:
    """(num_views, B) errors of `class_evidence_errors` for labels that are views, at three of the noise levels."""
    return class_evidence_errors(predict, x, scheduler, num_views, evidence_timesteps(scheduler)[1:6:2])[1]


def clean_alpha(scheduler: Any) -> torch.Tensor:
    """alpha bar of the image itself: 1, or for DDIM with `set_alpha_to_one: false` that of the first timestep."""
    return torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0), dtype=torch.float32)
