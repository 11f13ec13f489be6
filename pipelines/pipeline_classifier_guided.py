"""Healthy counterfactuals by DDIM inversion and the gradient of a classifier (after Wolleb et al. 2022)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.image_processor import PipelineImageInput

from .cxr_anomaly import AnomalyOutput, ContractMixin, anomaly_call, check_number, default_settings
from .cxr_classifier import classify, is_image_classifier, names_of_classes, number_of_classes
from .cxr_conditions import ViewsMixin
from .cxr_images import prepare_image
from .cxr_inversion import (
    check_scheduler,
    decode_step,
    invert,
    noise_from_output,
    output_from_noise,
    timesteps_below,
    view_errors,
)
from .cxr_portable import PortableMixin


class ClassifierGuidedPipeline(ContractMixin, ViewsMixin, PortableMixin, DiffusionPipeline):
    """Take an image back to a noise level, decode it along a classifier's gradient to "healthy", and compare.

    After Wolleb et al. 2022 (https://arxiv.org/abs/2203.04306, algorithm 1) with the gradient guidance of Dhariwal &
    Nichol 2021 (https://arxiv.org/abs/2105.05233, algorithm 2): eps' = eps - sqrt(1 - abar) s grad log p(target | x_t).

    Args:
        unet: a diffusion model, with or without classes.
        classifier: any module `classifier(x_t, t)` -> (B, K) logits of noised images (`NoisyClassifier`), in the UNet's
            range; or an image classifier of `transformers`, trained without noise: it gets the clean image that the
            UNet predicts, and the gradient goes through both (Augustin et al. 2022, https://arxiv.org/abs/2210.11841,
            section 3), at the cost of a backward pass of the UNet in each step.
        scheduler: as of `CFGAnomalyPipeline`.
        feature_extractor: the image processor of a `transformers` classifier, for its mean, deviation and size.
        class_names: the classifier's classes; None: those in the config of a `transformers` classifier.
        data_range, scaling, aspect, map_threshold: as of `CFGAnomalyPipeline`.
        settings: the checkpoint's own defaults of the call, any of `ClassifierGuidedPipeline.ORIGINAL_SETTINGS`.
        has_null_label: the last class embedding of the UNet means "no class given". False for models trained without
            dropping labels (Wolleb's, OpenAI's); ignored for a UNet without classes.
        views: as of `CFGAnomalyPipeline`; the label of the UNet is then that of each image's view.
        lung_segmenter: as of `CFGAnomalyPipeline`.

    Raises:
        ValueError: the number of names differs from the number of classes.
    """

    title = "Classifier guidance"
    summary = (
        "A diffusion model turns a radiograph into the same chest as if healthy, along the gradient of a classifier; "
        "the anomaly map is what had to change."
    )

    model_cpu_offload_seq = "classifier->unet"
    _optional_components = ["feature_extractor", "lung_segmenter"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: UNet2DModel,
        classifier: torch.nn.Module,
        scheduler: DDIMScheduler,
        feature_extractor: Any = None,
        class_names: list[str] | dict[str, str] | None = None,
        data_range: list[float] | tuple[float, ...] = (-1.0, 1.0),
        scaling: str = "minmax",
        aspect: str = "pad",
        settings: dict[str, Any] | None = None,
        map_threshold: float | None = None,
        has_null_label: bool = True,
        views: list[str] | dict[str, str] | None = None,
        lung_segmenter: ModelMixin | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            classifier=classifier,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            lung_segmenter=lung_segmenter,
        )
        class_names = class_names or names_of_classes(classifier)
        num_classes = number_of_classes(classifier, class_names)
        self.register_contract(num_classes, class_names, data_range, scaling, aspect, settings, map_threshold)
        self.register_views(views, has_null_label, unet.config.num_class_embeds)

    @anomaly_call
    def __call__(
        self,
        image: PipelineImageInput,
        classifier_scale: float = 100.0,
        noise_level: int = 500,
        num_inference_steps: int = 1000,
        inversion: str = "plain",
        target_label: int | str = 0,
        unet_label: int | str | None = None,
        direction: str = "both",
        smoothing: float = 0.0,
        highpass: float = 0.0,
        match_exposure: bool = False,
        region: str = "image",
        keep_below: float = 0.0,
        view: str | list[str | None] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> AnomalyOutput | tuple:
        """Compute the counterfactual that the classifier calls healthy, and the map of the changes.

        An omitted argument takes the checkpoint's own value (`pipeline.config.settings`), or else the default of the
        signature, which is that of the paper.

        Args:
            image: a PIL image, an array, a tensor or a list of them, any size and bit depth; see `prepare_image`.
            classifier_scale: s, the factor of the gradient; 0: without the classifier.
            noise_level: one timestep of the training chain (1..1000), see `CFGAnomalyPipeline`.
            target_label: the class to decode to, as an id or a name of the classifier; 0 is healthy.
            unet_label: the class given to a UNet with classes, in inversion and decoding: an id, a name, "null", or
                "target" (as Wolleb et al. do). None: "null" if the UNet has a null label, else "target".
            num_inference_steps, inversion, direction, smoothing, highpass, match_exposure, region, keep_below, view,
            output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: see the call of
            `CFGAnomalyPipeline`.

        Returns:
            `AnomalyOutput`, or the tuple (image, counterfactual, anomaly_map, anomaly_score).

        Raises:
            TypeError, ValueError: as of `CFGAnomalyPipeline`.

        Examples:
            ```py
            >>> from PIL import Image
            >>> from cxr_diffusers import ClassifierGuidedPipeline

            >>> pipeline = ClassifierGuidedPipeline.from_pretrained("runs/phantom_classifier_32")
            >>> output = pipeline(Image.open("chest.png"), classifier_scale=100, noise_level=500)
            >>> output.anomaly_map[0].save("map.png")
            ```
        """
        # 1. check the arguments
        check_scheduler(self.scheduler)
        check_number("classifier_scale", classifier_scale)
        self.check_steps(noise_level, num_inference_steps, callback_on_step_end_tensor_inputs)
        map_settings: dict[str, Any] = dict(
            direction=direction, smoothing=smoothing, highpass=highpass, match_exposure=match_exposure
        )
        self.check_map(output_type, **map_settings, region=region, keep_below=keep_below)
        target = self.find_label(target_label, "target_label", self.num_classes)
        label = self.unet_class(unet_label, target)
        on_step = self.on_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        averaged = self.is_averaged(inversion)
        span: dict[str, Any] = dict(noise_level=noise_level, num_inference_steps=num_inference_steps, on_step=on_step)

        # 2. image -> x_0
        image = prepare_image(image, **self.image_format(self.unet)).to(self._execution_device)

        views = self.view_indices(view, image, view_errors)
        if views is not None:
            label = self.conditions.of_class(label, views)
        steps = timesteps_below(self.scheduler, noise_level, num_inference_steps)
        self.count_timesteps(steps, steps)

        # 3. x_0 -> x_L: inversion, without the classifier
        latents = self.invert(image, label, averaged=averaged, **span)

        # 4. x_L -> x_0': denoising along the classifier's gradient
        counterfactual = self.decode(latents, target, label, classifier_scale=classifier_scale, **span)

        # 5. the map of the change
        anomaly_map = self.map_change(image, counterfactual, **map_settings)
        data_range = self.config.data_range
        output = image, counterfactual, anomaly_map, data_range, region, output_type, return_dict
        return self.finish(*output, keep_below=keep_below)

    ORIGINAL_SETTINGS = default_settings(__call__)

    def unet_class(self, label: int | str | None, target: int) -> int | None:
        """`unet_label` of a call -> the id of the UNet's class, whatever the view; None for a UNet without classes."""
        if not self.unet.config.num_class_embeds:
            if label not in (None, "null", "target"):
                raise ValueError(f"expected no `unet_label` with a UNet without classes, got {label!r}")
            return None
        count = self.conditions.num_classes + self.config.has_null_label
        null = count - 1 if self.config.has_null_label else None
        if label == "target" or (label is None and null is None):
            label = target
        return self.find_label("null" if label is None else label, "unet_label", count, null)

    def predict(self, x: torch.Tensor, t: torch.Tensor, label: int | torch.Tensor | None) -> torch.Tensor:
        """(B, C, H, W) latents, a timestep, None or an id or (B,) ids of embeddings -> (B, C, H, W) float32."""
        if label is not None:
            label = torch.as_tensor(label, device=x.device).expand(len(x))
        return self.unet(x.to(self.unet.dtype), t, class_labels=label).sample[:, : x.shape[1]].float()

    def invert(
        self,
        x: torch.Tensor,
        label: int | torch.Tensor | None = None,
        *,
        noise_level: int,
        num_inference_steps: int,
        num_refinements: int = 0,
        averaged: bool = False,
        on_step: Callable | None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) image in the model's range -> (B, C, H, W) latents at `noise_level`; `label` as of `predict`."""
        timesteps = timesteps_below(self.scheduler, noise_level, num_inference_steps, x.device)
        with self.progress_bar(total=len(timesteps)) as bar:

            def step(i, t, x):
                bar.update()
                return x if on_step is None else on_step(i, t, x)

            return invert(
                lambda x, t: self.predict(x, t, label),
                x,
                timesteps,
                self.scheduler,
                num_refinements,
                step,
                lambda: self.interrupt,
                averaged,
            )

    def decode(
        self,
        x: torch.Tensor,
        target_label: int | str = 0,
        label: int | torch.Tensor | None = None,
        *,
        noise_level: int,
        num_inference_steps: int,
        classifier_scale: float,
        on_step: Callable | None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) latents at `noise_level` -> (B, C, H, W) counterfactual; `label` as of `predict`."""
        timesteps = timesteps_below(self.scheduler, noise_level, num_inference_steps, x.device)
        target = self.find_label(target_label, "target_label", self.num_classes)
        alphas = self.scheduler.alphas_cumprod.to(x.device, torch.float32)
        prediction_type = self.scheduler.config.prediction_type
        for i, t in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                break
            alpha = alphas[t.long()]
            if classifier_scale:
                output, gradient = self.predict_with_gradient(x, t, target, label)
                noise = noise_from_output(output, x, alpha, prediction_type)
                noise = noise - (1 - alpha) ** 0.5 * classifier_scale * gradient
                output = output_from_noise(noise, x, alpha, prediction_type)
            else:
                output = self.predict(x, t, label)
            x = decode_step(self.scheduler, timesteps, i, output, x)
            if on_step is not None:
                x = on_step(len(timesteps) + i, t, x)
        return x

    def predict_with_gradient(
        self, x: torch.Tensor, t: torch.Tensor, target: int, label: int | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The UNet's output, and the gradient of log p(target | x_t, t) with respect to x_t: (B, C, H, W) float32 each.

        Each image's gradient is independent of the rest of the batch. Under autocast the classifier keeps its own
        precision: in half precision gradients of this size would be lost.
        """
        takes_noise = not is_image_classifier(self.classifier)
        output: Any = self.predict(x, t, label) if takes_noise else None
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach().float().requires_grad_()
            if takes_noise:
                logits = self.classifier(x.to(getattr(self.classifier, "dtype", x.dtype)), t)
            else:
                output = self.predict(x, t, label)
                logits = classify(self.classifier, self.clean_image(output, x, t), self.feature_extractor).logits
            log_p = logits.float().log_softmax(dim=1)[:, target]
            (gradient,) = torch.autograd.grad(log_p.sum(), x)
        return output.detach(), gradient

    def clean_image(self, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The UNet's output at x_t -> the clean image that it predicts, scaled to [0, 1] but not clamped."""
        alpha = self.scheduler.alphas_cumprod.to(x.device, torch.float32)[t.long()]
        noise = noise_from_output(output, x, alpha, self.scheduler.config.prediction_type)
        low, high = self.config.data_range
        return ((x - (1 - alpha) ** 0.5 * noise) / alpha**0.5 - low) / (high - low)


__all__ = ["AnomalyOutput", "ClassifierGuidedPipeline"]
