"""The originals' chains of timesteps, and one step along them."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler


@dataclass(frozen=True)
class RespacedChain:
    """Some timesteps of the training chain, ascending, and the signal level (alpha bar, double precision) of each."""

    timesteps: np.ndarray
    alphas_cumprod: np.ndarray

    def alpha(self, index: int) -> float:
        """alpha bar at an index: 1 below the chain, 0 above it (the original's own convention)."""
        if index < 0:
            return 1.0
        return float(self.alphas_cumprod[index]) if index < len(self.alphas_cumprod) else 0.0


def respaced_chain(scheduler: DDIMScheduler, num_steps: int) -> RespacedChain:
    """The original's `ddimN`: the smallest whole stride over the training chain that leaves `num_steps` steps.

    1000 training steps allow 62 values of N. diffusers' "leading" spacing divides and rounds down instead, and differs
    for some of them (39 steps: stride 26 there, 25 here).
    """
    betas = training_betas(scheduler)
    lengths: dict[int, int] = {}  # number of steps -> smallest stride
    for stride in range(1, len(betas)):
        lengths.setdefault(len(range(0, len(betas), stride)), stride)
    if num_steps not in lengths:
        raise ValueError(f"expected `num_steps` that a whole stride gives, one of {sorted(lengths)}, got {num_steps}")
    timesteps = np.arange(0, len(betas), lengths[num_steps])
    return RespacedChain(timesteps, np.cumprod(1 - betas)[timesteps])


def training_betas(scheduler: DDIMScheduler) -> np.ndarray:
    """(T,) float64: the scheduler's betas, recomputed where its float32 table came from a formula."""
    config = scheduler.config
    steps = config.num_train_timesteps
    if config.trained_betas is None and config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, steps, dtype=np.float64)
    if config.trained_betas is None and config.beta_schedule == "squaredcos_cap_v2":
        level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - level[1:] / level[:-1], 0.999)
    return scheduler.betas.double().numpy()


def first_noising(x0: torch.Tensor, noise: torch.Tensor, chain: RespacedChain) -> torch.Tensor:
    """(B, C, H, W) x 2 -> x at index 0, by random noise: sigma 0.01 with the linear schedule."""
    return noised(x0, noise, chain.alpha(0))


def noised(x0: torch.Tensor, noise: torch.Tensor, alpha: float) -> torch.Tensor:
    """(B, C, H, W) x 2 -> x at alpha bar `alpha`."""
    return alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise


def ddim_step(
    x: torch.Tensor,
    noise: torch.Tensor,
    alpha: float,
    new_alpha: float,
    clip: bool,
    gradient: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One deterministic DDIM step from alpha bar `alpha` to `new_alpha`: (new x, predicted image), (B, C, H, W) each.

    With `clip` the predicted image is clamped to [-1, 1] and the noise recomputed from it. A classifier's gradient
    is added after that (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, algorithm 2), without
    another clamp.
    """
    # the coefficients of x and of the noise in the predicted image
    a, b = (1 / alpha) ** 0.5, (1 / alpha - 1) ** 0.5
    x0 = a * x - b * noise
    if clip:
        x0 = x0.clamp(-1, 1)
    noise = (a * x - x0) / b
    if gradient is not None:
        noise = noise - (1 - alpha) ** 0.5 * gradient
        x0 = a * x - b * noise
    return new_alpha**0.5 * x0 + (1 - new_alpha) ** 0.5 * noise, x0


def ancestral_step(
    x: torch.Tensor,
    output: torch.Tensor,
    chain: RespacedChain,
    index: int,
    clip: bool,
    noise: torch.Tensor,
    gradient: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of Ho et al. 2020 (https://arxiv.org/abs/2006.11239, algorithm 2), from index to index - 1: the new x.

    Args:
        x: (B, C, H, W).
        output: of the network, (B, C or 2 C, H, W): the noise and, where it is learned, the variance's logits (Nichol &
            Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 15). Else the variance is beta, the originals' default.
        noise: (B, C, H, W), not used for the last step.
        gradient: of a classifier, (B, C, H, W): it shifts the mean (Dhariwal & Nichol 2021, algorithm 1).
    """
    mean, log_variance, _ = ancestral_distribution(x, output, chain, index, clip)
    if gradient is not None:
        mean = mean + log_variance.exp() * gradient
    return mean + (log_variance / 2).exp() * noise if index > 0 else mean


def ancestral_distribution(
    x: torch.Tensor, output: torch.Tensor, chain: RespacedChain, index: int, clip: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, log variance, predicted image) of p(x at index - 1 | x at index), (B, C, H, W) each."""
    alpha, previous = chain.alpha(index), chain.alpha(index - 1)
    beta = 1 - alpha / previous
    prediction, logits = output.split(x.shape[1], dim=1) if output.shape[1] > x.shape[1] else (output, None)
    x0 = (1 / alpha) ** 0.5 * x - (1 / alpha - 1) ** 0.5 * prediction
    if clip:
        x0 = x0.clamp(-1, 1)
    mean = beta * previous**0.5 / (1 - alpha) * x0 + (1 - previous) * (1 - beta) ** 0.5 / (1 - alpha) * x
    posterior = posterior_variance(chain, max(index, 1))  # that of index 0 is 0, and has no logarithm
    if logits is None:
        return mean, torch.full_like(x, float(np.log(beta if index else posterior))), x0
    fraction = (logits + 1) / 2
    return mean, fraction * float(np.log(beta)) + (1 - fraction) * float(np.log(posterior)), x0


def posterior_variance(chain: RespacedChain, index: int) -> float:
    """beta~ of Ho et al. (eq. 7)."""
    alpha, previous = chain.alpha(index), chain.alpha(index - 1)
    return (1 - alpha / previous) * (1 - previous) / (1 - alpha)
