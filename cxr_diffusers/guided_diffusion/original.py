"""The original codes' procedure with all its index offsets, to reproduce published results."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.image_processor import PipelineImageInput
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from ..pipelines.cxr_anomaly import AnomalyOutput, anomaly_output, difference_map
from ..pipelines.cxr_classifier import is_image_classifier
from ..pipelines.cxr_images import prepare_image
from .flags import SOURCES
from .original_steps import RespacedChain, ancestral_step, ddim_step, first_noising, noised, respaced_chain

Network = Callable[[torch.Tensor, int], torch.Tensor]  # (x, timestep) -> output
Steer = Callable[[torch.Tensor, int], torch.Tensor]  # (x, index into the chain) -> gradient

# first index of ancestral sampling, whatever the noise level: a constant of the originals
ANCESTRAL_START = 499


@dataclass
class OriginalOutput(AnomalyOutput):
    """`AnomalyOutput` and the originals' intermediate results, as tensors in the model's data range.

    latents: (B, C, H, W), the result of encoding.
    sample: (B, C, H, W), the counterfactual after the last step, not clamped to the data's range.
    maps: {name: (B, H, W)} the originals' maps, as `original_maps` describes them.
    """

    latents: torch.Tensor
    sample: torch.Tensor
    maps: dict


@torch.no_grad()
def run_as_original(
    model: DiffusionPipeline | UNet2DModel,
    image: PipelineImageInput,
    *,
    noise_level: int = 500,
    guidance_scale: float = 4.0,
    num_steps: int = 1000,
    target_label: int = 0,
    classifier: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    classifier_scale: float = 100.0,
    classifier_at: str = "timestep",
    use_ddim: bool = True,
    clip_denoised: bool = True,
    scheduler: DDIMScheduler | None = None,
    first_noise: torch.Tensor | None = None,
    step_noises: Iterable[torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
    output_type: str = "pt",
    progress: bool = True,
) -> OriginalOutput:
    """Encode and decode as the CFG fork of guided-diffusion (DDIM) or, with a classifier, as Wolleb's code.

    Differences from our pipelines, all taken from the originals: random noise is first added to the image (of the
    level of the first timestep); encoding starts one index late, and decoding starts two indices below the last index
    of encoding; the predicted image is clamped to [-1, 1], even for data in [0, 1], and the noise is recomputed from
    it. docs/faithfulness.md gives the effect of each difference on a map.

    With a classifier (Wolleb et al. 2022, https://arxiv.org/abs/2203.04306, algorithm 1) encoding and decoding are both
    conditional on the target, and each decoding step adds the classifier's gradient to the noise after the clamp:
    eps <- eps - sqrt(1 - abar) s grad log p.

    Without DDIM random noise of index 499 is added whatever `noise_level` is (500 is therefore the only meaningful
    level), and `noise_level` ancestral steps follow; a classifier's gradient shifts each step's mean.

    Args:
        model: a pipeline with `unet` and `scheduler`, or a `UNet2DModel` (images are then prepared as in the fork). A
            pipeline's `classifier` is used.
        image: as for `prepare_image`. A (B, C, size, size) tensor counts as prepared, in the model's data range.
        noise_level: an *index* into the chain of `num_steps` steps, 2..num_steps: 500 with 1000 steps is 25 with 50.
        guidance_scale: w of eps = (1 + w) eps(target) - w eps(null). -1 switches guidance off: then encoding and
            decoding are both conditional on `target_label` (the only meaningful value for Wolleb's and OpenAI's models,
            which have no null label). Not used with a classifier.
        num_steps: steps of the whole chain, the N of `ddimN`: 1000 // stride, rounded up, for some whole stride.
        target_label: the class to decode to.
        classifier: (x, timesteps) -> logits, for a bare UNet.
        classifier_scale: s above.
        classifier_at: "timestep", or "index" as in Wolleb's code, which evaluates the classifier at the index into the
            chain: another timestep unless `num_steps` is the length of the training chain. (Corrected in the fork.)
        use_ddim: False for ancestral sampling.
        clip_denoised: whether to clamp the predicted image.
        scheduler: of the training chain, for a bare UNet (default: linear, 1000 steps).
        first_noise, step_noises: (B, C, size, size) noise of the first step, and an iterable of the same for the
            ancestral steps; default: drawn with `generator`.
        output_type: type of the fields of `AnomalyOutput`: "pt", "np" or "pil".
        progress: whether to show a progress bar. 1000 steps and noise level 500 are 998 steps with 1497 evaluations of
            the UNet for each image (with a classifier: 998, and 499 of the classifier and its gradient).

    Returns:
        `OriginalOutput`. Unlike the original's, the batch may be larger than 1.

    Raises:
        ValueError: `num_steps` that no whole stride gives, a level or label out of range, a model that does not
            predict the noise, a pipeline that is conditioned on the view, or guidance of one without a null label.
    """
    unet, classifier, scheduler, preparation = parts(model, classifier, scheduler)
    chain = respaced_chain(scheduler, num_steps)
    guided = guidance_scale != -1 and classifier is None
    check_labels(model, guided, guidance_scale)
    check_inputs(unet, classifier, scheduler, noise_level, num_steps, target_label, guided)
    check_variant(classifier_at, use_ddim, num_steps)
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
            latents = ddim_loop(source, x, chain, range(1, noise_level), +1, clip_denoised, bar.update)
            target, indices = guided_noise(unet, weights), range(noise_level - 2, -1, -1)
            sample = ddim_loop(target, latents, chain, indices, -1, clip_denoised, bar.update, steer)
        else:
            latents = noised(x0, first_noise, chain.alpha(ANCESTRAL_START))
            noises = iter(step_noises) if step_noises is not None else iter(draw, None)
            target, indices = guided_output(unet, weights), range(noise_level - 1, -1, -1)
            sample = ancestral_loop(target, latents, chain, indices, clip_denoised, noises, bar.update, steer)

    data_range = preparation["data_range"]
    output = anomaly_output(x0, sample, difference_map(x0, sample, data_range), data_range, output_type)
    return OriginalOutput(**output, latents=latents, sample=sample, maps=original_maps(x0, sample))


class OriginalProcedure:
    """A pipeline that runs the original procedure when called, for `detect` and `evaluate`.

    Args:
        pipeline: its components and image preparation are used, its settings are not.

    `num_inference_steps` is `run_as_original`'s `num_steps`, and `noise_level` an index into as many steps. A pipeline
    with a classifier runs Wolleb's procedure. Without a generator the noise of the first step is that of seed 0.

    Raises:
        ValueError: a pipeline that is conditioned on the view, which the originals' models are not.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        check_labels(pipeline)
        self.pipeline, self.config, self.components = pipeline, pipeline.config, pipeline.components

    def __call__(
        self,
        image: PipelineImageInput,
        guidance_scale: float = 4.0,
        noise_level: int = 500,
        num_inference_steps: int = 1000,
        classifier_scale: float = 100.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> OriginalOutput:
        """`run_as_original` without a progress bar; `num_inference_steps` is its `num_steps`."""
        return run_as_original(
            self.pipeline,
            image,
            guidance_scale=guidance_scale,
            noise_level=noise_level,
            num_steps=num_inference_steps,
            classifier_scale=classifier_scale,
            generator=generator or torch.Generator().manual_seed(0),
            output_type=output_type,
            progress=False,
        )


def original_maps(x0: torch.Tensor, sample: torch.Tensor) -> dict[str, torch.Tensor]:
    """(B, C, H, W) image and counterfactual in the model's range -> {name: (B, H, W)}.

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


def minmax(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W) -> (B, H, W), each stretched to [0, 1]."""
    low, high = images.amin(dim=(1, 2), keepdim=True), images.amax(dim=(1, 2), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-12)


def ddim_loop(
    predict: Network,
    x: torch.Tensor,
    chain: RespacedChain,
    indices: Iterable[int],
    direction: int,
    clip: bool,
    on_step: Callable[[], object] = lambda: None,
    steer: Steer | None = None,
) -> torch.Tensor:
    """DDIM steps from index to index + `direction` for each of `indices`: +1 encodes, -1 decodes.

    `predict(x, t)` -> the noise in x, (B, C, H, W), with `t` a timestep of the training chain.
    `steer(x, index)` -> the gradient of the guidance, (B, C, H, W); None: no guidance.
    """
    for index in indices:
        noise = predict(x, int(chain.timesteps[index]))
        gradient = None if steer is None else steer(x, index)
        x, _ = ddim_step(x, noise, chain.alpha(index), chain.alpha(index + direction), clip, gradient)
        on_step()
    return x


def ancestral_loop(
    output: Network,
    x: torch.Tensor,
    chain: RespacedChain,
    indices: Iterable[int],
    clip: bool,
    noises: Iterator[torch.Tensor],
    on_step: Callable[[], object] = lambda: None,
    steer: Steer | None = None,
) -> torch.Tensor:
    """`ddim_loop` by ancestral sampling: `output(x, t)` includes the variance; `noises` yields (B, C, H, W) tensors."""
    for index in indices:
        gradient = None if steer is None else steer(x, index)
        network = output(x, int(chain.timesteps[index]))
        x = ancestral_step(x, network, chain, index, clip, next(noises).to(x), gradient)
        on_step()
    return x


def guided_output(unet: UNet2DModel, weights: Mapping[int, float]) -> Network:
    """`output(x, t)`: the weighted sum of the UNet's outputs for some labels, {label: weight}.

    (1 + w) for the target and -w for the null label is classifier-free guidance (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598, eq. 6), here also of the learned variance, as in the fork. An unconditional UNet
    takes one weight.
    """

    def output(x, t):
        labels = None
        if unet.config.num_class_embeds:
            labels = torch.tensor(list(weights), device=x.device).repeat_interleave(len(x))
        outputs = unet(torch.cat([x] * len(weights)).to(unet.dtype), t, class_labels=labels).sample.float()
        return sum(w * part for w, part in zip(weights.values(), outputs.chunk(len(weights)), strict=True))

    return output


def guided_noise(unet: UNet2DModel, weights: Mapping[int, float]) -> Network:
    """`predict(x, t)`: the predicted noise in x, without a learned variance; `weights` as of `guided_output`."""
    output = guided_output(unet, weights)
    return lambda x, t: output(x, t)[:, : x.shape[1]]


def noise_predictor(unet: UNet2DModel, label: int) -> Network:
    """`predict(x, t)`: the predicted noise for one class label."""
    return guided_noise(unet, {label: 1.0})


def guided_predictor(unet: UNet2DModel, target_label: int, null_label: int, guidance_scale: float) -> Network:
    """`predict(x, t)`: the predicted noise under classifier-free guidance."""
    return guided_noise(unet, {target_label: 1 + guidance_scale, null_label: -guidance_scale})


def classifier_gradient(
    classifier: Any, target_label: int, scale: float, chain: RespacedChain, at: str = "timestep"
) -> Steer:
    """`steer(x, index)`: s grad_x log p(target | x_t, t); `at` the "timestep", or at the "index" as Wolleb's code."""

    @torch.enable_grad()
    def steer(x, index):
        x = x.detach().requires_grad_()
        t = index if at == "index" else int(chain.timesteps[index])
        logits = classifier(x, torch.full((len(x),), t, device=x.device)).float()
        return scale * torch.autograd.grad(logits.log_softmax(-1)[:, target_label].sum(), x)[0]

    return steer


def parts(
    model: DiffusionPipeline | UNet2DModel, classifier: Any, scheduler: DDIMScheduler | None
) -> tuple[UNet2DModel, Any, DDIMScheduler, dict[str, Any]]:
    """(unet, classifier or None, scheduler, preparation of images) of a pipeline or of a bare UNet."""
    if isinstance(model, UNet2DModel):
        preparation = SOURCES["brats" if model.config.in_channels == 4 else "cfg-fork"]
        return model, classifier, scheduler or DDIMScheduler(), preparation
    if "unet" not in model.components:
        raise ValueError(f"expected a pipeline with a UNet for the originals' procedure, got {type(model).__name__}")
    preparation = {name: model.config[name] for name in ("data_range", "scaling", "aspect")}
    classifier = model.components.get("classifier") if classifier is None else classifier
    if is_image_classifier(classifier):
        raise ValueError(f"expected a classifier of noisy images, (x_t, t) -> logits, got {type(classifier).__name__}")
    return model.unet, classifier, scheduler or model.scheduler, preparation


def prepare(
    image: PipelineImageInput, unet: UNet2DModel, data_range: Sequence[float], scaling: str, aspect: str
) -> torch.Tensor:
    size, channels = unet.config.sample_size, unet.config.in_channels
    if not (torch.is_tensor(image) and image.ndim == 4 and tuple(image.shape[1:]) == (channels, size, size)):
        image = prepare_image(image, size, scaling, aspect, data_range, channels)
    return image.to(unet.device, torch.float32)


def check_inputs(
    unet: UNet2DModel,
    classifier: Any,
    scheduler: DDIMScheduler,
    noise_level: int,
    num_steps: int,
    target_label: int,
    guided: bool,
) -> None:
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
    # with classifier-free guidance the last embedding is the null label; otherwise every embedding may be a class
    last = classes - 2 if guided else classes - 1
    if not 0 <= target_label <= last:
        raise ValueError(f"expected `target_label` in 0..{last}, got {target_label}")


def check_labels(model: DiffusionPipeline | UNet2DModel, guided: bool = False, guidance_scale: float = -1) -> None:
    """Raise ValueError for a pipeline whose class embeddings are not those of the originals' procedure."""
    config = {} if isinstance(model, UNet2DModel) else model.config
    if config.get("views"):
        raise ValueError(f"expected a model that is not conditioned on the view, got one for {config['views']}")
    if guided and not config.get("has_null_label", True):
        raise ValueError(f"expected `guidance_scale` -1 for a model without a null label, got {guidance_scale}")


def check_variant(classifier_at: str, use_ddim: bool, num_steps: int) -> None:
    """Raise ValueError for an unknown `classifier_at`, or too few steps for ancestral sampling."""
    if classifier_at not in ("timestep", "index"):
        raise ValueError(f"expected `classifier_at` timestep or index, got {classifier_at!r}")
    if not use_ddim and num_steps <= ANCESTRAL_START:
        raise ValueError(
            f"expected more than {ANCESTRAL_START} steps without DDIM, which starts there, got {num_steps}"
        )
