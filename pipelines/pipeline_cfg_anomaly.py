"""Healthy counterfactuals by DDIM inversion and classifier-free guidance (after Sanchez et al. 2022)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.image_processor import PipelineImageInput

from .cxr_anomaly import (
    AnomalyOutput,
    ContractMixin,
    anomaly_call,
    check_number,
    default_settings,
    difference_map,
    highest_share,
    smooth_map,
)
from .cxr_conditions import ViewsMixin
from .cxr_images import prepare_image
from .cxr_inversion import (
    Generators,
    check_scheduler,
    class_evidence,
    decode_step,
    evidence_noise,
    image_from_noise,
    inpaint,
    invert,
    noise_from_output,
    output_from_noise,
    timesteps_below,
    view_errors,
)
from .cxr_portable import PortableMixin

EVIDENCE_WEIGHT = 2.0  # of the class evidence in the combined score


class CFGAnomalyPipeline(ContractMixin, ViewsMixin, PortableMixin, DiffusionPipeline):
    """Take an image back to a noise level, decode it guided to the healthy class, and compare.

    After Sanchez et al. 2022 (https://arxiv.org/abs/2207.12268) with the inversion of Song et al. 2021
    (https://arxiv.org/abs/2010.02502) and the guidance of Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598).

    Args:
        unet: class-conditional; its last class embedding is the null label. A learned variance is ignored.
        scheduler: DDIM, or a deterministic solver with the same latents (DPM-Solver++, UniPC, DEIS). `clip_sample`
            must be false: clipping breaks the inversion.
        class_names: one name for each class, e.g. `["healthy", "pleural effusion"]`; kept in the config as a dict from
            id to name, since diffusers takes a list in a pipeline's config for a component.
        data_range: the UNet's values for black and white.
        scaling: "minmax" or "dtype", see `prepare_image`.
        aspect: "pad", "edge", "crop", "squash" or "keep", see `prepare_image`.
        settings: the checkpoint's own defaults of the call, any of `CFGAnomalyPipeline.ORIGINAL_SETTINGS`.
        map_threshold: the map value above which a pixel counts as abnormal, chosen on healthy validation images.
        has_null_label: False for a model that was trained without dropping labels (Wolleb's, OpenAI's): all its
            embeddings are classes.
        views: names of the views that the UNet is conditioned on besides the class, e.g. `["PA", "AP"]`; its class
            embeddings are then those of `Conditions`. None: the UNet is not conditioned on the view.
        lung_segmenter: a `LungSegmenter`, or any module with `field(images)` -> (B, H, W) in [0, 1]; needed only for
            `region="lungs"`.

    Attributes:
        null_label: the label for "no class given": the number of classes. None for a model without one.
    """

    title = "Classifier-free guidance"
    summary = (
        "A class-conditional diffusion model turns a radiograph into the same chest as if healthy, by classifier-free "
        "guidance; the anomaly map is what had to change."
    )

    has_fixed_noise = True

    model_cpu_offload_seq = "unet"
    _optional_components = ["lung_segmenter"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: ModelMixin,  # a UNet2DModel or a replacement such as ExportedNet
        scheduler: DDIMScheduler,
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
        self.register_modules(unet=unet, scheduler=scheduler, lung_segmenter=lung_segmenter)
        self.register_views(views, has_null_label, unet.config.num_class_embeds)
        if self.conditions is None or self.conditions.num_classes < 1:
            raise ValueError(
                f"expected a UNet with class embeddings{' and one for the null label' if has_null_label else ''}, got "
                f"`num_class_embeds={unet.config.num_class_embeds}`"
            )
        num_classes = self.conditions.num_classes
        self.register_contract(num_classes, class_names, data_range, scaling, aspect, settings, map_threshold)
        self.null_label = num_classes if has_null_label else None

    @anomaly_call
    def __call__(
        self,
        image: PipelineImageInput,
        guidance_scale: float = 4.0,
        noise_level: int | list[int] = 500,
        num_inference_steps: int = 1000,
        inversion: str = "plain",
        guidance_every: int = 1,
        decode_until: int = 0,
        inpaint: float = 0.0,
        inpaint_steps: int = 10,
        inpaint_rounds: int = 1,
        target_label: int | str = 0,
        negative_label: int | str = "null",
        source_label: int | str = "null",
        direction: str = "both",
        smoothing: float = 0.0,
        highpass: float = 0.0,
        match_exposure: bool = False,
        region: str = "image",
        keep_below: float = 0.0,
        evidence: float = 0.0,
        score: str = "map",
        view: str | list[str | None] | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> AnomalyOutput | tuple:
        """Compute the healthy counterfactual of a chest radiograph, and the map of the changes.

        An omitted argument takes the checkpoint's own value (`pipeline.config.settings`), or else the default of the
        signature, which is the original procedure's; `**CFGAnomalyPipeline.ORIGINAL_SETTINGS` gives all of these.

        Args:
            image: a PIL image, an array, a tensor or a list of them, any size and bit depth; see `prepare_image`.
            guidance_scale: w of Ho & Salimans: eps = (1 + w) eps(target) - w eps(negative). -1: no target, 0: the
                plain conditional model. The `guidance_scale` of other diffusers pipelines is s = 1 + w: their 5
                is 4 here.
            noise_level: the timestep of the training chain (1..1000) where inversion stops and decoding starts,
                whatever the number of steps. Higher levels allow larger changes. Several levels are decoded from one
                inversion and their maps averaged; the counterfactual is that of the highest level.
            num_inference_steps: steps of the whole chain, of which `noise_level / 1000` are taken, once each way.
            inversion: "plain", or "averaged": each step uses the mean of its own noise and that of the step before, so
                that fewer steps are needed.
            guidance_every: n: of n steps of decoding, only the first evaluates the UNet under both labels. The others
                evaluate it under the target label and reuse the last difference of the noise (as in Dinh et al. 2024,
                https://arxiv.org/abs/2408.11194). 1: every step.
            decode_until: a timestep. Decoding takes no steps below it (nor, from noise levels under twice its value,
                below half of the level), and ends with the image that the UNet predicts from there. Its fine details
                are missing, but a smoothed map hardly changes. The highest noise level, whose image is the
                counterfactual, is decoded to the end. 0: all are.
            inpaint: 0, or a share of the image's pixels (with `region="lungs"`, of the lungs). That many pixels, those
                where the map is highest, are drawn anew from noise, as `target_label` and so that they fit the rest of
                the image. The map of the result is averaged with those of the noise levels; the counterfactual stays
                the decoded one. After Bercea et al. 2023, https://arxiv.org/abs/2305.19643.
            inpaint_steps: steps of the whole chain for `inpaint`; those below the lowest noise level are taken, or one
                step if there are none.
            inpaint_rounds: the number of inpaintings. Each has other noise, and redraws where the average of all maps
                so far is highest.
            target_label: the class to decode to, as an id or a name; 0 is healthy.
            negative_label: the class that guidance pushes away from: an id, a name, or "null" for the null label; not
                `target_label`, from which it would not differ.
            source_label: the class of the inversion, likewise.
            direction: "both": the map is the absolute difference. "bright": only where the image is brighter than its
                counterfactual (fluid, consolidation, masses); "dark": only where it is darker (air).
            smoothing: sigma of a Gaussian applied to the map, in pixels of the model's resolution.
            highpass: sigma of a Gaussian, in pixels of an image of 64 pixels (scaled with the model's resolution); the
                difference of image and counterfactual blurred by it is subtracted before `direction` applies. 0: off.
            match_exposure: decoding often changes the exposure. True: subtract a + b * counterfactual instead of the
                counterfactual, with the a and b for which it is closest to the image (least squares over all pixels).
            region: "image", or "lungs": the map is multiplied by the soft lung mask of the pipeline's `lung_segmenter`.
            keep_below: a value of the map. Where the map is below it, the returned counterfactual is the image itself;
                above twice the value, it is the decoded image, and in between a mixture. Neither the map nor the score
                depends on it. 0: the decoded image everywhere.
            evidence: weight of the class evidence in the map: where the UNet, given the image under noise, predicts
                more (in the sense of `direction`) for `negative_label` than for `target_label`; see `class_evidence`.
                14 evaluations of the UNet for each image, shared with the score; 0: none.
            score: "map": the mean of the map's highest 5 % of pixels. "change": the same of the change to the decoded
                image of the highest level with neither high-pass nor `match_exposure`: overall brightness counts, too.
                "evidence": how much better the UNet predicts the noise for `negative_label` than for `target_label`, as
                the log of the ratio of the errors: 0 equally well, 0.01 one percent better. "combined": change + 2 x
                evidence, which separates disease from health better than either (docs/experiments.md); it can be
                below 0.
            view: "PA" or "AP", or a list with one for each image, for a model that is conditioned on the view alone;
                None or "" if it is unknown: then the view that explains the image best is used (six more evaluations).
            generator: of the noise of the class evidence: one for all images, or a list with one for each. None: fixed
                noise, the same in every call and on any device.
            output_type: "pil", "np" or "pt"; see `AnomalyOutput` for shapes and ranges.
            return_dict: False returns the plain tuple.
            callback_on_step_end: `callback(pipeline, i, t, {"latents": ...})`, called after every step of the inversion
                (t rising) and then of the decoding (t falling); a dict it returns replaces the latents.
            callback_on_step_end_tensor_inputs: the tensors that the callback gets; only "latents" exist.

        Returns:
            `AnomalyOutput`, or the tuple (image, counterfactual, anomaly_map, anomaly_score).

        Raises:
            TypeError: `image` is not an image. ValueError: an argument out of its range, or a scheduler that cannot
            decode the latents of DDIM inversion.

        Examples:
            ```py
            >>> from PIL import Image
            >>> from cxr_diffusers import CFGAnomalyPipeline, default_checkpoint

            >>> pipeline = CFGAnomalyPipeline.from_pretrained(default_checkpoint())
            >>> output = pipeline(Image.open("chest.png"), guidance_scale=4, noise_level=500)
            >>> output.anomaly_map[0].save("map.png")
            ```
        """
        # 1. check the arguments
        levels = noise_levels(noise_level)
        self.check_inputs(
            levels,
            num_inference_steps,
            guidance_scale,
            guidance_every,
            evidence,
            score,
            callback_on_step_end_tensor_inputs,
            decode_until,
            inpaint,
            inpaint_steps,
            inpaint_rounds,
        )
        averaged = self.is_averaged(inversion)
        map_settings: dict[str, Any] = dict(
            direction=direction, smoothing=smoothing, highpass=highpass, match_exposure=match_exposure
        )
        self.check_map(output_type, **map_settings, region=region, keep_below=keep_below)
        target = self.label_id(target_label, "target_label")
        source = self.label_id(source_label, "source_label")
        # without guidance and evidence the negative label is not used and may be missing
        needs_evidence = evidence != 0 or score in ("evidence", "combined")
        uses_negative = guidance_scale != 0 or needs_evidence
        negative = self.label_id(negative_label, "negative_label") if uses_negative else target
        if target == self.null_label:
            raise ValueError(f"expected `target_label` to be a class, got the null label {target_label!r}")
        if uses_negative and negative == target:
            raise ValueError(f"expected a `negative_label` other than `target_label`, got {negative_label!r} for both")
        on_step = self.on_step(callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 2. image -> x_0
        image = prepare_image(image, **self.image_format(self.unet)).to(self._execution_device)
        if isinstance(generator, list) and len(generator) != len(image):
            raise ValueError(f"expected one generator for each of the {len(image)} images, got {len(generator)}")
        views = self.view_indices(view, image, view_errors)

        # 3. x_0 -> x_L: inversion, once for all noise levels
        chains = [self.inpainting_timesteps(min(levels), inpaint_steps)] * inpaint_rounds if inpaint else []
        until = {n: decode_until if n < max(levels) else 0 for n in levels}
        chains += [self.decoding_timesteps(n, num_inference_steps, until[n])[0] for n in levels]
        self.count_timesteps(timesteps_below(self.scheduler, max(levels), num_inference_steps), *chains)
        span: dict[str, Any] = dict(num_inference_steps=num_inference_steps, on_step=on_step, views=views)
        encoded = self.encode(image, source, levels, averaged=averaged, **span)

        # 4. x_L -> x_0': denoising, guided to the target class; and the map of the change
        maps = []
        for level in levels:
            counterfactual = self.decode(
                encoded[level],
                target,
                noise_level=level,
                guidance_scale=guidance_scale,
                guidance_every=guidance_every,
                decode_until=until[level],
                negative_label=negative,
                **span,
            )
            maps.append(self.map_change(image, counterfactual, **map_settings))
        gate = self.lung_gate(image) if region == "lungs" and (inpaint or needs_evidence) else None
        change = None
        if score in ("change", "combined"):
            change = self.map_change(
                image, counterfactual, **{**map_settings, "highpass": 0.0, "match_exposure": False}
            )

        # 5. inpainting, where the map is highest
        for number in range(inpaint_rounds if inpaint and not self.interrupt else 0):
            suspicious = torch.stack(maps).mean(dim=0) * (1 if gate is None else gate)
            mask = highest_share(suspicious, inpaint, gate, softness=image.shape[-1] / 64)
            drawn = self.inpaint(
                image,
                mask,
                target,
                noise_level=min(levels),
                num_inference_steps=inpaint_steps,
                views=views,
                generator=generator,
                number=number,
                on_step=on_step,
            )
            maps.append(self.map_change(image, drawn, **map_settings))
        anomaly_map, ratio, added = torch.stack(maps).mean(dim=0), None, None

        # 6. class evidence: the comparison of the two labels
        if needs_evidence:
            weights = None if gate is None else 1 + gate  # errors in the lungs count double
            as_target, as_negative, ratio = self.compute_class_evidence(
                image, target, negative, views, generator, weights
            )
            difference = difference_map(as_negative, as_target, self.config.data_range, direction)
            anomaly_map = anomaly_map + evidence * smooth_map(difference, smoothing)
            added = EVIDENCE_WEIGHT * ratio if score == "combined" else None
            ratio = ratio if score == "evidence" else None

        # 7. the output
        data_range = self.config.data_range
        return self.finish(
            image,
            counterfactual,
            anomaly_map,
            data_range,
            region,
            output_type,
            return_dict,
            score=ratio,
            keep_below=keep_below,
            scored_map=change,
            added_score=added,
            gate=gate,
        )

    ORIGINAL_SETTINGS = default_settings(__call__)

    def describe_score(self) -> str:
        """The meaning of the `anomaly_score` under the checkpoint's own settings."""
        return {
            "map": self.score_meaning,
            "change": "mean of the highest 5 % of pixels of the change to a healthy image, with its overall brightness",
            "evidence": "how much better the disease explains the image than health does; 0: neither, 0.01: by 1 %",
            "combined": "mean of the highest 5 % of pixels of the change to a healthy image "
            f"+ {EVIDENCE_WEIGHT:g} x evidence of disease",
        }[self.settings()["score"]]

    def label_id(self, label: int | str, name: str = "label") -> int:
        """Class id of a class id, a class name or "null" (the number of classes)."""
        count = self.num_classes + self.config.has_null_label
        return self.find_label(label, name, count, self.null_label)

    def check_inputs(
        self,
        levels: list[int],
        num_inference_steps: int,
        guidance_scale: float,
        guidance_every: int,
        evidence: float,
        score: str,
        tensor_inputs: Sequence[str] = (),
        decode_until: int = 0,
        inpaint: float = 0.0,
        inpaint_steps: int = 10,
        inpaint_rounds: int = 1,
    ) -> None:
        """Raise ValueError for an invalid scheduler, or an invalid value of one of these arguments."""
        check_scheduler(self.scheduler)
        if not levels:
            raise ValueError("expected at least one `noise_level`, got none")
        for level in levels:
            self.check_steps(level, num_inference_steps, tensor_inputs)
        check_number("guidance_scale", guidance_scale, low=-math.inf)
        if not isinstance(guidance_every, int) or guidance_every < 1:
            raise ValueError(f"expected a `guidance_every` of 1 or more steps, got {guidance_every!r}")
        check_number("evidence", evidence)
        check_number("inpaint", inpaint, high=1.0)
        if not isinstance(decode_until, int) or decode_until < 0:
            raise ValueError(f"expected `decode_until` to be a timestep, 0 or more, got {decode_until!r}")
        if inpaint:
            self.check_steps(min(levels), inpaint_steps, tensor_inputs, "inpaint_steps")
            if not isinstance(inpaint_rounds, int) or inpaint_rounds < 1:
                raise ValueError(f"expected `inpaint_rounds` of 1 or more, got {inpaint_rounds!r}")
        if score not in ("map", "change", "evidence", "combined"):
            raise ValueError(f"expected `score` map, change, evidence or combined, got {score!r}")

    def predict(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) latents, a timestep, (B,) labels -> (B, C, H, W) float32; a learned variance is split off."""
        output = self.unet(x.to(self.unet.dtype), t, class_labels=labels).sample
        return output[:, : x.shape[1]].float()

    def label_tensor(
        self,
        labels: Sequence[int | str] | dict[int | str, float],
        batch: int,
        device: torch.device,
        views: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[label, ...] -> (len(labels) * batch,) ids of embeddings, each label `batch` times, in the images' views."""
        if views is None:
            views = torch.zeros(batch, dtype=torch.int64, device=device)
        ids = [self.conditions.of_class(self.label_id(label), views) + torch.zeros_like(views) for label in labels]
        return torch.cat(ids)

    def invert(
        self,
        x: torch.Tensor,
        source_label: int | str = "null",
        *,
        noise_level: int,
        num_inference_steps: int,
        num_refinements: int = 0,
        averaged: bool = False,
        views: torch.Tensor | None = None,
        on_step: Callable | None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) image in the model's range -> (B, C, H, W) latents at `noise_level`."""
        span: dict[str, Any] = dict(num_refinements=num_refinements, averaged=averaged, views=views, on_step=on_step)
        levels = self.encode(x, source_label, [noise_level], num_inference_steps=num_inference_steps, **span)
        return levels[noise_level]

    def encode(
        self,
        x: torch.Tensor,
        source_label: int | str,
        noise_levels: list[int],
        *,
        num_inference_steps: int,
        num_refinements: int = 0,
        averaged: bool = False,
        views: torch.Tensor | None = None,
        on_step: Callable | None = None,
    ) -> dict[int, torch.Tensor]:
        """(B, C, H, W) image in the model's range -> {noise level: (B, C, H, W) latents}, by one inversion."""
        # the last step on the way to each level
        last = {n: int(timesteps_below(self.scheduler, n, num_inference_steps)[0]) for n in noise_levels}
        timesteps = timesteps_below(self.scheduler, max(noise_levels), num_inference_steps, x.device)
        labels = self.label_tensor([source_label], len(x), x.device, views)
        latents = {}
        with self.progress_bar(total=len(timesteps)) as bar:

            def step(i, t, x):
                bar.update()
                x = x if on_step is None else on_step(i, t, x)
                if int(t) in last.values():  # keeping every step would fill a GPU's memory
                    latents[int(t)] = x
                return x

            def predict(x, t):
                return self.predict(x, t, labels)

            options = num_refinements, step, lambda: self.interrupt, averaged
            last_x = invert(predict, x, timesteps, self.scheduler, *options)
        return {n: latents.get(t, last_x) for n, t in last.items()}  # an interrupted inversion misses some

    def compute_class_evidence(
        self,
        image: torch.Tensor,
        target_label: int | str = 0,
        negative_label: int | str = "null",
        views: torch.Tensor | None = None,
        generator: Generators = None,
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, C, H, W) image in the model's range -> `class_evidence` of the target and the negative label."""
        labels = self.label_tensor([target_label, negative_label], len(image), image.device, views)

        def predict(x, t):
            return self.predict(torch.cat([x, x]), t, labels)

        return class_evidence(predict, image, self.scheduler, generator, weights)

    def decode(
        self,
        x: torch.Tensor,
        target_label: int | str = 0,
        *,
        noise_level: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_every: int = 1,
        decode_until: int = 0,
        negative_label: int | str = "null",
        views: torch.Tensor | None = None,
        on_step: Callable | None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) latents at `noise_level` -> (B, C, H, W) counterfactual."""
        taken, timesteps = self.decoding_timesteps(noise_level, num_inference_steps, decode_until, x.device)
        weights = guidance_weights(target_label, negative_label, guidance_scale)
        labels = self.label_tensor(weights, len(x), x.device, views)
        alphas = self.scheduler.alphas_cumprod.to(x.device, torch.float32)
        prediction_type, difference = self.scheduler.config.prediction_type, torch.zeros(())
        for i, t in enumerate(self.progress_bar(taken)):
            if self.interrupt:
                return x
            alpha = alphas[t.long()]
            if len(weights) == 2 and i % guidance_every:
                output = self.predict(x, t, labels[: len(x)])
                noise = noise_from_output(output, x, alpha, prediction_type) + guidance_scale * difference
                guided = output_from_noise(noise, x, alpha, prediction_type)
            else:
                outputs = self.predict(torch.cat([x] * len(weights)), t, labels).split(len(x))
                guided = sum(weight * output for weight, output in zip(weights.values(), outputs, strict=True))
                if guidance_every > 1:
                    first, last = (noise_from_output(outputs[k], x, alpha, prediction_type) for k in (0, -1))
                    difference = first - last
            last_noise = noise_from_output(guided, x, alpha, prediction_type)
            x = decode_step(self.scheduler, timesteps, i, guided, x)
            if on_step is not None:
                x = on_step(len(timesteps) + i, t, x)
        if len(taken) < len(timesteps):
            x = image_from_noise(x, last_noise, alphas[timesteps[len(taken)].long()])
        return x

    def decoding_timesteps(
        self, noise_level: int, num_inference_steps: int, decode_until: int = 0, device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The timesteps below `noise_level` that `decode` takes (see `decode_until`), and all of them, descending."""
        timesteps = timesteps_below(self.scheduler, noise_level, num_inference_steps, device)
        taken = timesteps[timesteps >= min(decode_until, noise_level / 2)]
        taken = taken if len(taken) else timesteps
        return taken, timesteps

    def inpainting_timesteps(
        self, noise_level: int, num_inference_steps: int, device: torch.device | None = None
    ) -> torch.Tensor:
        """The timesteps below `noise_level`, descending; where there are none, one step from just below the level."""
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        below = timesteps[timesteps < noise_level]
        return below if len(below) else timesteps.new_tensor([noise_level - 1])

    def inpaint(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        target_label: int | str = 0,
        *,
        noise_level: int,
        num_inference_steps: int,
        views: torch.Tensor | None = None,
        generator: Generators = None,
        number: int = 0,
        on_step: Callable | None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) images in the model's range, drawn anew as `target_label` where the (B, H, W) mask is 1.

        Without a generator, the noise is fixed; another `number` gives other noise.
        """
        timesteps = self.inpainting_timesteps(noise_level, num_inference_steps, x.device)
        labels = self.label_tensor([target_label], len(x), x.device, views)
        self._is_inpainting = True
        try:
            with self.progress_bar(total=len(timesteps)) as bar:

                def predict(x, t):
                    bar.update()
                    return self.predict(x, t, labels)

                # a seed of its own for each number and first timestep
                seed = int(timesteps[0]) + number * self.scheduler.config.num_train_timesteps
                noise = evidence_noise(x, seed, generator)
                data_range = self.config.data_range
                return inpaint(
                    predict, x, mask, timesteps, self.scheduler, data_range, noise, on_step, lambda: self.interrupt
                )
        finally:
            self._is_inpainting = False


def noise_levels(noise_level: int | list[int] | tuple[int, ...]) -> list[int]:
    """One noise level or several -> a list, ascending."""
    return sorted(set(noise_level)) if isinstance(noise_level, (list, tuple)) else [noise_level]


def guidance_weights(target: int | str, negative: int | str, w: float) -> dict[int | str, float]:
    """{label: weight} of (1 + w) eps(target) - w eps(negative), without weights of zero."""
    weights = {target: 1 + w}
    weights[negative] = weights.get(negative, 0.0) - w
    return {label: weight for label, weight in weights.items() if weight != 0}


__all__ = ["AnomalyOutput", "CFGAnomalyPipeline"]
