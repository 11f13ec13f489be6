"""Healthy counterfactuals by DDIM inversion and classifier-free guidance (after Sanchez et al. 2022)."""

import math

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.utils import replace_example_docstring

from .cxr_anomaly import (
    AnomalyOutput,
    ContractMixin,
    anomaly_output,
    check_number,
    combine_maps,
    difference_map,
    smooth_map,
)
from .cxr_conditions import Conditions
from .cxr_images import prepare_image
from .cxr_inversion import (
    check_scheduler,
    class_evidence,
    class_evidence_errors,
    harmonize,
    invert,
    timesteps_below,
)
from .cxr_portable import PortableMixin

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from PIL import Image
        >>> from cxr_diffusers import CFGAnomalyPipeline, default_checkpoint

        >>> pipeline = CFGAnomalyPipeline.from_pretrained(default_checkpoint())
        >>> output = pipeline(Image.open("chest.png"), guidance_scale=4, noise_level=500)
        >>> output.anomaly_map[0].save("map.png")
        ```
"""


class CFGAnomalyPipeline(ContractMixin, PortableMixin, DiffusionPipeline):
    """Take an image back to a noise level, decode it guided to the healthy class, and compare.

    After Sanchez et al. 2022 (https://arxiv.org/abs/2207.12268) with the inversion of Song et al. 2021
    (https://arxiv.org/abs/2010.02502) and the guidance of Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598).

    Args:
        unet: class-conditional; its last class embedding is the null label. Learned variance is allowed and not read.
        scheduler: DDIM, or a deterministic solver with the same latents (DPM-Solver++, UniPC, DEIS). `clip_sample`
            should be false: clipping breaks the inversion.
        class_names: one name a label, e.g. `["healthy", "pleural effusion"]` (kept in the config as a dict from id to
            name: diffusers takes a list in a pipeline's config for a component).
        data_range: the darkest and the brightest value the UNet knows.
        scaling: "minmax" or "dtype", see `prepare_image`.
        aspect: "pad", "crop", "squash" or "keep", see `prepare_image`.
        settings: the checkpoint's own defaults of the call: any of noise_level, guidance_scale, num_inference_steps,
            negative_label, source_label, num_refinements, guidance_interval, harmonization, combine, compare_with,
            direction, smoothing, evidence, score.
        map_threshold: the map value above which a pixel counts as abnormal, found on healthy validation images.
        has_null_label: False for a model that was trained without dropping labels (Wolleb's, OpenAI's): all its
            embeddings are classes.
        views: names of the views that the UNet is conditioned on besides the class, e.g. `["PA", "AP"]`; its class
            embeddings are then those of `Conditions`. None: it is not told the view.
    """

    # what a call means when neither the caller nor the checkpoint says otherwise: the original procedure
    ORIGINAL_SETTINGS = {
        "noise_level": 500,
        "guidance_scale": 4.0,
        "num_inference_steps": 1000,
        "negative_label": "null",
        "source_label": "null",
        "num_refinements": 0,
        "guidance_interval": None,
        "harmonization": 0.0,
        "combine": "mean",
        "compare_with": "image",
        "direction": "both",
        "smoothing": 0.0,
        "evidence": 0.0,
        "score": "map",
    }
    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: ModelMixin,  # a UNet2DModel, or what stands in for one
        scheduler: DDIMScheduler,
        class_names: list[str] | dict[str, str] | None = None,
        data_range: list[float] = (-1.0, 1.0),
        scaling: str = "minmax",
        aspect: str = "pad",
        settings: dict | None = None,
        map_threshold: float | None = None,
        has_null_label: bool = True,
        views: list[str] | dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        views = list(views.values()) if isinstance(views, dict) else views
        num_classes = Conditions.of_table(unet.config.num_class_embeds, views, has_null_label).num_classes
        if num_classes < 1:
            raise ValueError(
                f"expected a UNet with class embeddings{' and one for the null label' if has_null_label else ''}, got "
                f"`num_class_embeds={unet.config.num_class_embeds}`"
            )
        self.register_contract(num_classes, class_names, data_range, scaling, aspect, settings, map_threshold)
        self.register_to_config(has_null_label=has_null_label)
        self.register_to_config(views=views and {str(i): name for i, name in enumerate(views)})

    @property
    def conditions(self):
        """Which class embedding of the UNet means which class and view."""
        views = tuple((self.config.views or {}).values())
        return Conditions.of_table(self.unet.config.num_class_embeds, views, self.config.has_null_label)

    @property
    def null_label(self):
        """The label that means "no class named": the number of classes. None for a model without one."""
        return self.conditions.num_classes if self.config.has_null_label else None

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image,
        guidance_scale: float | None = None,
        noise_level: int | list[int] | None = None,
        num_inference_steps: int | None = None,
        target_label: int | str = 0,
        negative_label: int | str | None = None,
        source_label: int | str | None = None,
        num_refinements: int | None = None,
        guidance_interval: tuple[int, int] | None = None,
        harmonization: float | None = None,
        combine: str | None = None,
        compare_with: str | None = None,
        direction: str | None = None,
        smoothing: float | None = None,
        evidence: float | None = None,
        score: str | None = None,
        view: str | list[str | None] | None = None,
        recipe: str | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ):
        """Where would this chest have to change to be healthy?

        An argument left out takes the checkpoint's own value (`pipeline.config.settings`), or else the original
        procedure's (noise level 500, guidance scale 4, 1000 steps, guided against the null label).

        Args:
            image: a PIL image, an array, a tensor or a list of them, any size and bit depth; see `prepare_image`.
            guidance_scale: w of Ho & Salimans: eps = (1 + w) eps(target) - w eps(negative). -1 means no target at all,
                0 the plain conditional model. The `guidance_scale` of other diffusers pipelines is s = 1 + w: what is
                5 there is 4 here.
            noise_level: the timestep of the training chain (1..1000) where inversion stops and decoding starts,
                whatever the number of steps. More may change more. Several levels are decoded one after the other from
                one inversion and their maps combined; the counterfactual is that of the highest.
            num_inference_steps: steps of the whole chain, of which `noise_level / 1000` are taken, once each way.
            target_label: the class to decode to, as an id or a name; 0 is healthy.
            negative_label: the class that guidance pushes away from: an id, a name, or "null" for the null label.
            source_label: the class named while inverting, likewise.
            num_refinements: fixed-point iterations of each inversion step, one UNet evaluation each.
            guidance_interval: the lowest and the highest timestep that are guided (Kynkaanniemi et al. 2024,
                https://arxiv.org/abs/2404.07724); the steps outside are plainly conditional, one evaluation each.
                Without it all are guided.
            harmonization: the change, as a share of the data's range, up to which decoding gives way to the picture
                itself (see `harmonize`); 0 switches it off.
            combine: of the maps of several noise levels: "mean" or "harmonic" (the harmonic mean: all must agree).
            compare_with: "image": the map is |image - counterfactual|. "reconstruction": the same latents are also
                decoded to `source_label` without guidance and the map is |reconstruction - counterfactual|, in which
                the errors of inversion and model cancel; one more evaluation a step, and `image` is still the input.
            direction: "both": the map is the absolute difference. "bright": only what is brighter in the picture than
                in its counterfactual (fluid, consolidation, masses); "dark": only what is darker (air).
            smoothing: sigma of a Gaussian applied to the map, in pixels of the model's resolution.
            evidence: how much of the class evidence is added to the map: where the UNet, shown the picture under noise,
                paints more (in the sense of `direction`) when told `negative_label` than when told `target_label`; see
                `class_evidence`. 14 evaluations an image, with the score's; 0 leaves it out.
            score: "map": the mean of the map's highest 5 % of pixels. "evidence": how much better the noise is found
                when told `negative_label` than when told `target_label`, as the log of the ratio of the errors: 0
                neither, 0.01 by one percent.
            view: "PA" or "AP", or a list with one for each image, for a model that is conditioned on the view; None
            or "" where it is unknown: then the view is taken under which the model explains the image better, 14
            evaluations more.
            recipe: "original": what is left out takes the original procedure's value, not the checkpoint's own.
            eta: of DDIM decoding: 0 deterministic, 1 ancestral; only with `DDIMScheduler`.
            generator: for eta > 0.
            output_type: "pil", "np" or "pt"; see `AnomalyOutput` for shapes and ranges.
            return_dict: False returns the plain tuple.
            callback_on_step_end: `callback(pipeline, i, t, {"latents": ...})`, called after every step of the inversion
                (t rising) and then of the decoding (t falling); a dict it returns replaces the latents.
            callback_on_step_end_tensor_inputs: only "latents" can be asked for.

        Returns:
            `AnomalyOutput`, or the tuple (image, counterfactual, anomaly_map, anomaly_score).

        Raises:
            TypeError: `image` is not a picture. ValueError: an argument out of its range, or a scheduler that cannot
            decode what DDIM inversion encoded; each says what was expected.

        Examples:
        """
        # 1. what was asked for
        settings = self.settings(
            recipe,
            guidance_scale=guidance_scale,
            noise_level=noise_level,
            num_inference_steps=num_inference_steps,
            negative_label=negative_label,
            source_label=source_label,
            num_refinements=num_refinements,
            guidance_interval=guidance_interval,
            harmonization=harmonization,
            combine=combine,
            compare_with=compare_with,
            direction=direction,
            smoothing=smoothing,
            evidence=evidence,
            score=score,
        )
        self.check_inputs(settings, eta, output_type, callback_on_step_end_tensor_inputs)
        target = self.label_id(target_label, "target_label")
        source = self.label_id(settings["source_label"], "source_label")
        # without guidance and evidence the negative is not asked for, and need not exist
        weighed = settings["evidence"] != 0 or settings["score"] == "evidence"
        asked = settings["guidance_scale"] != 0 or weighed
        negative = self.label_id(settings["negative_label"], "negative_label") if asked else target
        if target == self.null_label:
            raise ValueError(f"expected `target_label` to be a class, got the null label {target_label!r}")
        levels = noise_levels(settings)
        on_step = self.on_step(callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 2. picture -> x_0
        config = self.unet.config
        image = prepare_image(
            image,
            config.sample_size,
            self.config.scaling,
            self.config.aspect,
            self.config.data_range,
            config.in_channels,
        ).to(self._execution_device)

        views = self.view_indices(view, image)

        # 3. x_0 -> x_L: inversion, once for all noise levels
        span = dict(num_inference_steps=settings["num_inference_steps"], on_step=on_step, views=views)
        encoded = self.encode(image, source, levels, num_refinements=settings["num_refinements"], **span)

        # 4. x_L -> x_0': denoising, guided to the target class; and what had to change
        low, high = self.config.data_range
        maps = []
        for level in levels:
            counterfactual, reconstruction = self.decode(
                encoded[level],
                target,
                noise_level=level,
                guidance_scale=settings["guidance_scale"],
                negative_label=negative,
                source_label=source,
                guidance_interval=settings["guidance_interval"],
                harmonization=settings["harmonization"],
                image=image,
                with_reconstruction=settings["compare_with"] == "reconstruction",
                eta=eta,
                generator=generator,
                **span,
            )
            reference = image if reconstruction is None else reconstruction.clamp(low, high)
            changed = difference_map(
                reference, counterfactual.clamp(low, high), self.config.data_range, settings["direction"]
            )
            maps.append(smooth_map(changed, settings["smoothing"]))

        # 5. which of the two labels explains the picture better, and where
        anomaly_map, ratio = combine_maps(torch.stack(maps), settings["combine"]), None
        if weighed:
            as_target, as_negative, ratio = self.weigh(image, target, negative, views)
            painted = difference_map(as_negative, as_target, self.config.data_range, settings["direction"])
            anomaly_map = anomaly_map + settings["evidence"] * smooth_map(painted, settings["smoothing"])

        # 6. the answer
        ratio = ratio if settings["score"] == "evidence" else None
        output = anomaly_output(image, counterfactual, anomaly_map, self.config.data_range, output_type, ratio)

        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def label_id(self, label, name="label"):
        """A class id, a class name or "null" -> the class id, or the number of classes for the null label."""
        count = self.conditions.num_classes + self.config.has_null_label
        return self.find_label(label, name, count, self.null_label)

    def view_indices(self, view, image):
        """The view of each image, as named or else as the model explains it best: (B,) indices, or None without views.

        Raises:
            ValueError: an unknown view, or a number of views that differs from the number of images.
        """
        names = self.conditions.views
        given = [view] * len(image) if view is None or isinstance(view, str) else list(view)
        if len(given) != len(image):
            raise ValueError(f"expected a `view` for each of {len(image)} images, got {len(given)}")
        if unknown := [name for name in given if name and names and name not in names]:
            raise ValueError(f"expected `view` among {', '.join(names)}, got {unknown[0]!r}")
        if not names:
            return None
        indices = torch.tensor([names.index(name) if name else -1 for name in given], device=image.device)
        missing = indices < 0
        if missing.any():
            indices[missing] = self.predict_views(image[missing])
        return indices

    def predict_views(self, image):
        """(B, C, H, W) images in the model's range -> (B,) index of the view whose null label explains each best."""
        views = torch.arange(len(self.conditions.views), device=image.device)
        labels = self.conditions.null(views).repeat_interleave(len(image))

        def predict(x, t):
            return self.predict(torch.cat([x] * len(views)), t, labels)

        return class_evidence_errors(predict, image, self.scheduler, len(views))[1].argmin(dim=0)

    def check_inputs(self, settings, eta, output_type, tensor_inputs):
        check_scheduler(self.scheduler)
        levels, interval = noise_levels(settings), settings["guidance_interval"]
        if not levels:
            raise ValueError("expected at least one `noise_level`, got none")
        for level in levels:
            self.check_span({**settings, "noise_level": level}, tensor_inputs)
        self.check_map(settings, output_type)
        check_number("guidance_scale", settings["guidance_scale"], low=-math.inf)
        check_number("harmonization", settings["harmonization"])
        pair = isinstance(interval, (list, tuple)) and len(interval) == 2 and all(isinstance(t, int) for t in interval)
        if interval is not None and not (pair and interval[0] <= interval[1]):
            raise ValueError(f"expected `guidance_interval` as two timesteps (lowest, highest), got {interval!r}")
        if settings["combine"] not in ("mean", "harmonic"):
            raise ValueError(f"expected `combine` mean or harmonic, got {settings['combine']!r}")
        check_number("evidence", settings["evidence"])
        if settings["score"] not in ("map", "evidence"):
            raise ValueError(f"expected `score` map or evidence, got {settings['score']!r}")
        check_number("eta", eta, high=1.0)
        if settings["compare_with"] not in ("image", "reconstruction"):
            raise ValueError(f"expected `compare_with` image or reconstruction, got {settings['compare_with']!r}")
        if eta and type(self.scheduler).__name__ != "DDIMScheduler":
            raise ValueError(
                f"expected `eta=0` with {type(self.scheduler).__name__}, got {eta!r}: only DDIM has an eta"
            )
        if eta and settings["compare_with"] == "reconstruction":
            raise ValueError(f"expected `eta=0` to reconstruct the image, got {eta!r}: noise would not bring it back")

    def predict(self, x, t, labels):
        """(B, C, H, W) latents, a timestep, (B,) labels -> (B, C, H, W) float32; a learned variance is split off."""
        output = self.unet(x.to(self.unet.dtype), t, class_labels=labels).sample
        return output[:, : x.shape[1]].float()

    def label_tensor(self, labels, batch, device, views=None):
        """[label, ...] -> (len(labels) * batch,) ids of embeddings, each label `batch` times, in the images' views."""
        if views is None:
            views = torch.zeros(batch, dtype=torch.int64, device=device)
        ids = [self.conditions.of_class(self.label_id(label), views) + torch.zeros_like(views) for label in labels]
        return torch.cat(ids)

    def invert(
        self, x, source_label="null", *, noise_level, num_inference_steps, num_refinements=0, views=None, on_step=None
    ):
        """(B, C, H, W) image in the model's range -> (B, C, H, W) latents at `noise_level`."""
        span = dict(num_inference_steps=num_inference_steps, num_refinements=num_refinements, views=views)
        return self.encode(x, source_label, [noise_level], on_step=on_step, **span)[noise_level]

    def encode(
        self, x, source_label, noise_levels, *, num_inference_steps, num_refinements=0, views=None, on_step=None
    ):
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
                if int(t) in last.values():  # not of every step: hundreds of them fill a GPU
                    latents[int(t)] = x
                return x

            invert(lambda x, t: self.predict(x, t, labels), x, timesteps, self.scheduler, num_refinements, step)
        return {n: latents[t] for n, t in last.items()}

    def weigh(self, image, target_label=0, negative_label="null", views=None):
        """(B, C, H, W) image in the model's range -> `class_evidence` of the target and the negative label."""
        labels = self.label_tensor([target_label, negative_label], len(image), image.device, views)
        return class_evidence(lambda x, t: self.predict(torch.cat([x, x]), t, labels), image, self.scheduler)

    def decode(
        self,
        x,
        target_label=0,
        *,
        noise_level,
        num_inference_steps,
        guidance_scale,
        negative_label="null",
        source_label="null",
        guidance_interval=None,
        harmonization=0.0,
        image=None,
        with_reconstruction=False,
        eta=0.0,
        generator=None,
        views=None,
        on_step=None,
    ):
        """(B, C, H, W) latents at `noise_level` -> (counterfactual, reconstruction or None), each (B, C, H, W).

        All decodings of a step share one forward of the UNet. Harmonization needs the `image`.
        """
        timesteps = timesteps_below(self.scheduler, noise_level, num_inference_steps, x.device)
        batch, w = len(x), guidance_scale
        extra = {"eta": eta, "generator": generator} if eta else {}
        both = torch.cat([x, x]) if with_reconstruction else x
        for i, t in enumerate(self.progress_bar(timesteps)):
            inside = guidance_interval is None or guidance_interval[0] <= t <= guidance_interval[1]
            weights = guidance_weights(target_label, negative_label, w if inside else 0.0)
            labels = self.label_tensor([*weights] + [source_label] * with_reconstruction, batch, x.device, views)
            inputs = torch.cat([both[:batch]] * len(weights) + [both[batch:]])
            outputs = self.predict(inputs, t, labels).split(batch)
            guided = sum(weight * output for weight, output in zip(weights.values(), outputs, strict=False))
            if harmonization:
                span = self.config.data_range[1] - self.config.data_range[0]
                guided = harmonize(guided, both[:batch], t, image, self.scheduler, harmonization * span, soften)
            prediction = torch.cat([guided, *outputs[len(weights) :]])
            both = self.scheduler.step(prediction, t, both, **extra).prev_sample
            if on_step is not None:
                both = torch.cat([on_step(len(timesteps) + i, t, both[:batch]), both[batch:]])
        return both[:batch], (both[batch:] if with_reconstruction else None)


def soften(change):
    """(B, H, W) -> (B, H, W): the change that harmonization looks at, smoothed by 1.5 pixels."""
    return smooth_map(change, 1.5)


def noise_levels(settings):
    """The noise levels of a call, ascending."""
    level = settings["noise_level"]
    return sorted(set(level)) if isinstance(level, (list, tuple)) else [level]


def guidance_weights(target, negative, w):
    """{label: weight} of (1 + w) eps(target) - w eps(negative), without what would be multiplied by zero."""
    weights = {target: 1 + w}
    weights[negative] = weights.get(negative, 0.0) - w
    return {label: weight for label, weight in weights.items() if weight != 0}


__all__ = ["AnomalyOutput", "CFGAnomalyPipeline"]
