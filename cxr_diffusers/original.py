"""The procedure as the original ran it, offsets and all, so that a published result can be reproduced first."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from .pipelines.cxr_anomaly import AnomalyOutput, anomaly_output, difference_map, prepare_image


@dataclass
class OriginalOutput(AnomalyOutput):
    """`AnomalyOutput`, and what only the originals have, always as tensors in the model's own range.

    latents: (B, C, H, W), where encoding ended.
    sample: (B, C, H, W), the counterfactual as it left the last step, not clamped to the data's range.
    maps: {name: (B, H, W)} the originals' maps, as `original_maps` describes them.
    """

    latents: torch.Tensor
    sample: torch.Tensor
    maps: dict


@torch.no_grad()
def run_as_original(
    model,
    image,
    *,
    noise_level=500,
    guidance_scale=4.0,
    num_steps=1000,
    target_label=0,
    classifier=None,
    classifier_scale=100.0,
    classifier_at="timestep",
    clip_denoised=True,
    scheduler=None,
    first_noise=None,
    generator=None,
    output_type="pt",
    progress=True,
):
    """Encode and decode as the CFG fork of guided-diffusion does (DDIM), or, with a classifier, as Wolleb's code does.

    Differences from our pipelines, all of them the originals': the picture is first noised at random (to the level of
    the first timestep); encoding starts one index late and decoding two indices below where encoding ended; the
    predicted picture is clamped to [-1, 1], even for data in [0, 1], and the noise derived anew from it.
    docs/faithfulness.md says how much each of these changes a map.

    With a classifier (Wolleb et al. 2022, https://arxiv.org/abs/2203.04306, algorithm 1) both ways name the target, and
    each step of decoding adds its gradient to the noise after the clamp: eps <- eps - sqrt(1 - abar) s grad log p.

    Args:
        model: a pipeline with `unet` and `scheduler`, or a `UNet2DModel` (then the preparation is the fork's). A
            pipeline's `classifier` is used.
        image: whatever `prepare_image` takes. A (B, C, size, size) tensor is taken as prepared, in the model's range.
        noise_level: an *index* into the chain of `num_steps` steps, 2..num_steps: 500 with 1000 steps is 25 with 50.
        guidance_scale: w of eps = (1 + w) eps(target) - w eps(null). -1 switches guidance off: then encoding and
            decoding are both conditional on `target_label` (with Wolleb's and OpenAI's models, which know no null
            label, this is the only value that means something). Not used with a classifier.
        num_steps: steps of the whole chain, the N of `ddimN`: 1000 // stride, rounded up, for some whole stride.
        target_label: the class to decode to.
        classifier: (x, timesteps) -> logits, for a bare UNet.
        classifier_scale: s above.
        classifier_at: "timestep", or "index" for what Wolleb's code does: it asks the classifier at the index into the
            chain, which is another timestep whenever `num_steps` is not the training chain's. (Corrected in the fork.)
        clip_denoised: the clamp above.
        scheduler: the training chain's, for a bare UNet (default: linear, 1000 steps).
        first_noise: (B, C, size, size), the noise of the first step; default: drawn with `generator`.
        output_type: of `AnomalyOutput`'s fields: "pt", "np" or "pil".
        progress: show a bar; at 1000 steps and noise level 500 there are 998 steps with 1497 evaluations a picture
            (with a classifier: 998, and 499 of the classifier and its gradient).

    Returns:
        `OriginalOutput`. Unlike the original's, the batch may be larger than 1.

    Raises:
        ValueError: `num_steps` without a stride, a level or label out of range, a model that predicts something else
            than the noise.
    """
    unet, classifier, scheduler, preparation = parts(model, classifier, scheduler)
    chain = respaced_chain(scheduler, num_steps)
    guided = guidance_scale != -1 and classifier is None
    check_inputs(unet, classifier, scheduler, noise_level, num_steps, target_label, guided)
    if classifier_at not in ("timestep", "index"):
        raise ValueError(f"expected `classifier_at` timestep or index, got {classifier_at!r}")
    x0 = prepare(image, unet, **preparation)
    if first_noise is None:
        first_noise = randn_tensor(x0.shape, generator=generator, device=x0.device)
    null_label = (unet.config.num_class_embeds or 0) - 1
    steer = None
    if classifier is not None:
        steer = classifier_gradient(classifier, target_label, classifier_scale, chain, classifier_at)

    with tqdm(total=2 * (noise_level - 1), disable=not progress, unit="step") as bar:
        x = first_noising(x0, first_noise.to(x0), chain)
        bar.set_description("encoding")
        source = noise_predictor(unet, null_label if guided else target_label)
        latents = travel(source, x, chain, range(1, noise_level), +1, clip_denoised, bar.update)
        bar.set_description("decoding")
        target = guided_predictor(unet, target_label, null_label, guidance_scale) if guided else source
        sample = travel(target, latents, chain, range(noise_level - 2, -1, -1), -1, clip_denoised, bar.update, steer)

    output = anomaly_output(
        x0, sample, difference_map(x0, sample, preparation["data_range"]), preparation["data_range"], output_type
    )
    return OriginalOutput(**output, latents=latents, sample=sample, maps=original_maps(x0, sample))


class OriginalProcedure:
    """A pipeline, answering as the original did: for `detect` and `evaluate`, which call it as they call any other.

    Args:
        pipeline: its components and its preparation of pictures are used, its settings are not.

    `num_inference_steps` is `run_as_original`'s `num_steps`, and `noise_level` an index into as many steps. A pipeline
    with a classifier runs Wolleb's procedure. Without a generator the noise of the first step is that of seed 0.
    """

    def __init__(self, pipeline):
        self.pipeline, self.config, self.components = pipeline, pipeline.config, pipeline.components

    def __call__(
        self,
        image,
        guidance_scale=4.0,
        noise_level=500,
        num_inference_steps=1000,
        target_label=0,
        classifier_scale=100.0,
        generator=None,
        output_type="pil",
    ):
        return run_as_original(
            self.pipeline,
            image,
            guidance_scale=guidance_scale,
            noise_level=noise_level,
            num_steps=num_inference_steps,
            target_label=target_label,
            classifier_scale=classifier_scale,
            generator=generator or torch.Generator().manual_seed(0),
            output_type=output_type,
            progress=False,
        )


def original_maps(x0, sample):
    """(B, C, H, W) picture and counterfactual in the model's range -> {name: (B, H, W)}.

    difference: |x0 - sample| of the first channel (the fork's CFG script), and minmax: scaled to [0, 1] as displayed.
    normalized: |minmax(x0) - minmax(sample)| (the fork's classifier script, Wolleb's CheXpert), and
    normalized_minmax: that scaled to [0, 1] once more (the fork's evaluation).
    summed: |x0 - sample| summed over the channels (BraTS).
    """
    difference = (x0 - sample)[:, 0].abs()
    normalized = (minmax(x0[:, 0]) - minmax(sample[:, 0])).abs()
    return {
        "difference": difference,
        "minmax": minmax(difference),
        "normalized": normalized,
        "normalized_minmax": minmax(normalized),
        "summed": (x0 - sample).abs().sum(dim=1),
    }


def minmax(pictures):
    """(B, H, W) -> (B, H, W), each stretched to [0, 1]."""
    low, high = pictures.amin(dim=(1, 2), keepdim=True), pictures.amax(dim=(1, 2), keepdim=True)
    return (pictures - low) / (high - low).clamp(min=1e-12)


@dataclass(frozen=True)
class RespacedChain:
    """Some timesteps of the training chain, ascending, and the signal level (alpha bar, double precision) of each."""

    timesteps: np.ndarray
    alphas_cumprod: np.ndarray

    def alpha(self, index):
        """alpha bar at an index: 1 below the chain, 0 above it (the original's own convention)."""
        if index < 0:
            return 1.0
        return float(self.alphas_cumprod[index]) if index < len(self.alphas_cumprod) else 0.0


def respaced_chain(scheduler, num_steps):
    """The original's `ddimN`: the smallest whole stride over the training chain that leaves `num_steps` steps.

    1000 training steps allow 62 values of N. diffusers' "leading" spacing divides and rounds down instead, and differs
    for some of them (39 steps: stride 26 there, 25 here).
    """
    betas = training_betas(scheduler)
    lengths = {}
    for stride in range(1, len(betas)):
        lengths.setdefault(len(range(0, len(betas), stride)), stride)
    if num_steps not in lengths:
        raise ValueError(f"expected `num_steps` that a whole stride gives, one of {sorted(lengths)}, got {num_steps}")
    timesteps = np.arange(0, len(betas), lengths[num_steps])
    return RespacedChain(timesteps, np.cumprod(1 - betas)[timesteps])


def training_betas(scheduler):
    """(T,) float64: the scheduler's betas, recomputed where its float32 table came from a formula."""
    config = scheduler.config
    steps = config.num_train_timesteps
    if config.trained_betas is None and config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, steps, dtype=np.float64)
    if config.trained_betas is None and config.beta_schedule == "squaredcos_cap_v2":
        level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - level[1:] / level[:-1], 0.999)
    return scheduler.betas.double().numpy()


def first_noising(x0, noise, chain):
    """(B, C, H, W) x 2 -> x at index 0, by random noise: sigma 0.01 with the linear schedule."""
    return chain.alpha(0) ** 0.5 * x0 + (1 - chain.alpha(0)) ** 0.5 * noise


def travel(predict, x, chain, indices: Iterable[int], direction, clip, on_step=lambda: None, steer=None):
    """From index to index + `direction`, for each of `indices`: +1 encodes, -1 decodes.

    `predict(x, t)` -> the noise in x, (B, C, H, W), with `t` a timestep of the training chain.
    `steer(x, index)` -> the gradient that guides, (B, C, H, W); None: nothing does.
    """
    for index in indices:
        noise = predict(x, int(chain.timesteps[index]))
        gradient = None if steer is None else steer(x, index)
        x, _ = ddim_step(x, noise, chain.alpha(index), chain.alpha(index + direction), clip, gradient)
        on_step()
    return x


def ddim_step(x, noise, alpha, new_alpha, clip, gradient=None):
    """One deterministic DDIM step from alpha bar `alpha` to `new_alpha`: (new x, predicted picture), (B, C, H, W) each.

    With `clip` the predicted picture is clamped to [-1, 1] and the noise derived anew from it. A classifier's gradient
    comes after that (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, algorithm 2), and nothing is clamped
    any more.
    """
    # the coefficients of x and of the noise in the picture that they predict
    a, b = (1 / alpha) ** 0.5, (1 / alpha - 1) ** 0.5
    x0 = a * x - b * noise
    if clip:
        x0 = x0.clamp(-1, 1)
    noise = (a * x - x0) / b
    if gradient is not None:
        noise = noise - (1 - alpha) ** 0.5 * gradient
        x0 = a * x - b * noise
    return new_alpha**0.5 * x0 + (1 - new_alpha) ** 0.5 * noise, x0


def noise_predictor(unet, label):
    """`predict(x, t)` of one class (of none for an unconditional UNet); a learned variance is split off."""

    def predict(x, t):
        labels = torch.full((len(x),), label, device=x.device) if unet.config.num_class_embeds else None
        return unet(x.to(unet.dtype), t, class_labels=labels).sample[:, : x.shape[1]].float()

    return predict


def guided_predictor(unet, target_label, null_label, guidance_scale):
    """`predict(x, t)` by classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, eq. 6)."""

    def predict(x, t):
        labels = torch.tensor([target_label, null_label], device=x.device).repeat_interleave(len(x))
        both = torch.cat([x, x]).to(unet.dtype)
        cond, null = unet(both, t, class_labels=labels).sample[:, : x.shape[1]].float().chunk(2)
        return (1 + guidance_scale) * cond - guidance_scale * null

    return predict


def classifier_gradient(classifier, target_label, scale, chain, at="timestep"):
    """`steer(x, index)`: s grad_x log p(target | x_t, t); `at` the "timestep", or at the "index" as Wolleb's code."""

    @torch.enable_grad()
    def steer(x, index):
        x = x.detach().requires_grad_()
        t = index if at == "index" else int(chain.timesteps[index])
        logits = classifier(x, torch.full((len(x),), t, device=x.device)).float()
        return scale * torch.autograd.grad(logits.log_softmax(-1)[:, target_label].sum(), x)[0]

    return steer


def parts(model, classifier, scheduler):
    """(unet, classifier or None, scheduler, how pictures are prepared) of a pipeline or of a bare UNet."""
    preparation = {"data_range": (0.0, 1.0), "scaling": "minmax", "aspect": "squash"}
    if isinstance(model, UNet2DModel):
        return model, classifier, scheduler or DDIMScheduler(), preparation
    preparation = {name: model.config[name] for name in preparation}
    return model.unet, classifier or model.components.get("classifier"), scheduler or model.scheduler, preparation


def prepare(image, unet, data_range, scaling, aspect):
    size, channels = unet.config.sample_size, unet.config.in_channels
    if not (torch.is_tensor(image) and image.ndim == 4 and tuple(image.shape[1:]) == (channels, size, size)):
        image = prepare_image(image, size, scaling, aspect, data_range, channels)
    return image.to(unet.device, torch.float32)


def check_inputs(unet, classifier, scheduler, noise_level, num_steps, target_label, guided):
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(f"expected a model that predicts the noise, got {scheduler.config.prediction_type!r}")
    if not 2 <= noise_level <= num_steps:
        raise ValueError(
            f"expected `noise_level` to be an index into {num_steps} steps, 2..{num_steps}, got {noise_level}"
        )
    classes = unet.config.num_class_embeds or (classifier is not None and classifier.config.num_classes)
    if not classes:
        raise ValueError("expected a UNet with class embeddings, got an unconditional one")
    # the last embedding is the null label, unless guidance is off or a classifier's: then every one may be a class
    last = classes - 2 if guided else classes - 1
    if not 0 <= target_label <= last:
        raise ValueError(f"expected `target_label` in 0..{last}, got {target_label}")
