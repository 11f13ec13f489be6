"""The procedure as the original ran it, offsets and all, so that a published result can be reproduced first."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from ..pipelines.cxr_anomaly import AnomalyOutput, anomaly_output, difference_map
from ..pipelines.cxr_classifier import is_image_classifier
from ..pipelines.cxr_images import prepare_image
from .flags import SOURCES
from .original_steps import ancestral_step, ddim_step, first_noising, noised, respaced_chain

# where ancestral sampling starts, whatever the noise level: a constant of the originals
ANCESTRAL_START = 499


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
    use_ddim=True,
    clip_denoised=True,
    scheduler=None,
    first_noise=None,
    step_noises=None,
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

    Without DDIM the picture is noised at random to index 499, whatever `noise_level` is (so 500 is the only level that
    means something), and `noise_level` ancestral steps lead back; a classifier's gradient shifts each step's mean.

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
        use_ddim: False for ancestral sampling.
        clip_denoised: the clamp above.
        scheduler: the training chain's, for a bare UNet (default: linear, 1000 steps).
        first_noise, step_noises: (B, C, size, size), the noise of the first step, and a sequence of such for the
            ancestral steps; default: drawn with `generator`.
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
    if not use_ddim and num_steps <= ANCESTRAL_START:
        raise ValueError(
            f"expected more than {ANCESTRAL_START} steps without DDIM, which starts there, got {num_steps}"
        )
    x0 = prepare(image, unet, **preparation)

    def draw():
        return randn_tensor(x0.shape, generator=generator, device=x0.device)

    first_noise = draw() if first_noise is None else first_noise.to(x0)
    null_label = (unet.config.num_class_embeds or 0) - 1
    weights = {target_label: 1.0}
    if guided:
        weights = {target_label: 1 + guidance_scale, null_label: -guidance_scale}
    steer = None
    if classifier is not None:
        steer = classifier_gradient(classifier, target_label, classifier_scale, chain, classifier_at)

    with tqdm(total=2 * (noise_level - 1) if use_ddim else noise_level, disable=not progress, unit="step") as bar:
        if use_ddim:
            x = first_noising(x0, first_noise, chain)
            source = noise_predictor(unet, null_label if guided else target_label)
            latents = travel(source, x, chain, range(1, noise_level), +1, clip_denoised, bar.update)
            target, indices = noise_of(unet, weights), range(noise_level - 2, -1, -1)
            sample = travel(target, latents, chain, indices, -1, clip_denoised, bar.update, steer)
        else:
            latents = noised(x0, first_noise, chain.alpha(ANCESTRAL_START))
            noises = iter(step_noises) if step_noises is not None else iter(draw, None)
            target, indices = output_of(unet, weights), range(noise_level - 1, -1, -1)
            sample = wander(target, latents, chain, indices, clip_denoised, noises, bar.update, steer)

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


def wander(output, x, chain, indices: Iterable[int], clip, noises, on_step=lambda: None, steer=None):
    """The same by ancestral sampling; `output(x, t)` has the variance too, `noises` gives one (B, C, H, W) a step."""
    for index in indices:
        gradient = None if steer is None else steer(x, index)
        network = output(x, int(chain.timesteps[index]))
        x = ancestral_step(x, network, chain, index, clip, next(noises).to(x), gradient)
        on_step()
    return x


def output_of(unet, weights):
    """`output(x, t)`: the UNet's outputs for some labels, weighted, {label: weight}; an unconditional one has one.

    (1 + w) for the target and -w for the null label is classifier-free guidance (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598, eq. 6), here also of the learned variance, as in the fork.
    """

    def output(x, t):
        labels = None
        if unet.config.num_class_embeds:
            labels = torch.tensor(list(weights), device=x.device).repeat_interleave(len(x))
        outputs = unet(torch.cat([x] * len(weights)).to(unet.dtype), t, class_labels=labels).sample.float()
        return sum(w * part for w, part in zip(weights.values(), outputs.chunk(len(weights)), strict=True))

    return output


def noise_of(unet, weights):
    """`predict(x, t)`: the noise in it; a learned variance is split off."""
    output = output_of(unet, weights)
    return lambda x, t: output(x, t)[:, : x.shape[1]]


def noise_predictor(unet, label):
    """`predict(x, t)` of one class."""
    return noise_of(unet, {label: 1.0})


def guided_predictor(unet, target_label, null_label, guidance_scale):
    """`predict(x, t)` by classifier-free guidance."""
    return noise_of(unet, {target_label: 1 + guidance_scale, null_label: -guidance_scale})


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
    if isinstance(model, UNet2DModel):
        preparation = SOURCES["brats" if model.config.in_channels == 4 else "cfg-fork"]
        return model, classifier, scheduler or DDIMScheduler(), preparation
    if "unet" not in model.components:
        raise ValueError(
            f"expected a pipeline with a UNet, which the originals' procedure runs, got {type(model).__name__}"
        )
    preparation = {name: model.config[name] for name in ("data_range", "scaling", "aspect")}
    classifier = model.components.get("classifier") if classifier is None else classifier
    if is_image_classifier(classifier):
        raise ValueError(
            f"expected a classifier of noised pictures, (x_t, t) -> logits, got {type(classifier).__name__}"
        )
    return model.unet, classifier, scheduler or model.scheduler, preparation


def prepare(image, unet, data_range, scaling, aspect):
    size, channels = unet.config.sample_size, unet.config.in_channels
    if not (torch.is_tensor(image) and image.ndim == 4 and tuple(image.shape[1:]) == (channels, size, size)):
        image = prepare_image(image, size, scaling, aspect, data_range, channels)
    return image.to(unet.device, torch.float32)


def check_inputs(unet, classifier, scheduler, noise_level, num_steps, target_label, guided):
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(f"expected a model that predicts the noise, got {scheduler.config.prediction_type!r}")
    if not isinstance(noise_level, int) or not 2 <= noise_level <= num_steps:
        raise ValueError(
            f"expected `noise_level` to be an index into {num_steps} steps, 2..{num_steps}, got {noise_level}"
        )
    classes = unet.config.num_class_embeds
    if classifier is not None:
        classes = min(n for n in (classes, classifier.config.num_classes) if n)
    if not classes:
        raise ValueError("expected a UNet with class embeddings, got an unconditional one")
    # the last embedding is the null label, unless guidance is off or a classifier's: then every one may be a class
    last = classes - 2 if guided else classes - 1
    if not 0 <= target_label <= last:
        raise ValueError(f"expected `target_label` in 0..{last}, got {target_label}")
