"""What every anomaly pipeline here returns, its map, and what the calls have in common."""

import itertools
import math
import numbers
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput


@dataclass
class AnomalyOutput(BaseOutput):
    """The answer of every detector here: the picture, the same chest as if healthy, and what had to change.

    With `output_type` "pil" | "np" | "pt":

    image: the input as the model saw it (scaled, resized, square), values in [0, 1].
        list of PIL images (mode L) | (B, H, W, C) array | (B, C, H, W) tensor
    counterfactual: the same chest as if healthy, in the same scale as `image`.
        likewise
    anomaly_map: how much each pixel had to change, in [0, 1]: 0 nothing, 1 from black to white; with what the
        pipeline was asked to add to it (see its call).
        list of PIL images (mode I;16, value / 65535) | (B, H, W) array | (B, H, W) tensor
    anomaly_score: one number an image, higher is more abnormal: the mean of the map's highest 5 % of pixels, unless the
        pipeline has another one (see its call).
        (B,) array | (B,) array | (B,) tensor
    """

    image: list | np.ndarray | torch.Tensor
    counterfactual: list | np.ndarray | torch.Tensor
    anomaly_map: list | np.ndarray | torch.Tensor
    anomaly_score: np.ndarray | torch.Tensor


def difference_map(reference, counterfactual, data_range=(-1.0, 1.0), direction="both"):
    """(B, C, H, W) x (B, C, H, W) in `data_range` -> (B, H, W) in [0, 1]: what changed, averaged over channels.

    Neither picture is normalised on its own before they are subtracted.

    Args:
        direction: "both" takes |reference - counterfactual|. "bright" counts only where the reference is the brighter:
            fluid, consolidation, masses. "dark" only where it is the darker: air where there should be none.
    """
    difference = reference - counterfactual
    changed = {"both": difference.abs(), "bright": difference.clamp(min=0), "dark": (-difference).clamp(min=0)}
    return changed[direction].mean(dim=1) / (data_range[1] - data_range[0])


def smooth_map(anomaly_map, sigma):
    """(B, H, W) -> (B, H, W): Gaussian smoothing, `sigma` in pixels of the map; 0 leaves it as it is."""
    if not sigma:
        return anomaly_map
    radius = max(1, round(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=anomaly_map.dtype, device=anomaly_map.device)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    maps = F.pad(anomaly_map[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(maps, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]


def combine_maps(maps, how="mean"):
    """(K, B, H, W) maps of the same pictures in [0, 1] -> (B, H, W): their mean, or their "harmonic" mean.

    The harmonic mean is high only where all are (Bercea et al. 2024, https://arxiv.org/abs/2403.08464).
    """
    if how == "harmonic":
        return 1 / (1 / maps.clamp(min=1e-6)).mean(dim=0)
    return maps.mean(dim=0)


def score_map(anomaly_map, fraction=0.05):
    """(B, H, W) -> (B,): the mean of each map's highest `fraction` of pixels."""
    flat = anomaly_map.flatten(1)
    return flat.topk(max(1, round(fraction * flat.shape[1])), dim=1).values.mean(dim=1)


def anomaly_output(image, counterfactual, anomaly_map, data_range, output_type, score=None):
    """Tensors in the model's range -> `AnomalyOutput` in the documented range and `output_type`.

    `score` is a (B,) tensor; None: that of the map.
    """
    low, high = data_range
    image, counterfactual = (((x.float() - low) / (high - low)).clamp(0, 1) for x in (image, counterfactual))
    anomaly_map = anomaly_map.float().clamp(0, 1)
    score = score_map(anomaly_map) if score is None else score.float()
    if output_type == "pt":
        return AnomalyOutput(image, counterfactual, anomaly_map, score)
    image, counterfactual = (x.permute(0, 2, 3, 1).cpu().numpy() for x in (image, counterfactual))
    anomaly_map, score = anomaly_map.cpu().numpy(), score.cpu().numpy()
    if output_type == "np":
        return AnomalyOutput(image, counterfactual, anomaly_map, score)
    return AnomalyOutput(
        image=[_to_pil(x) for x in image],
        counterfactual=[_to_pil(x) for x in counterfactual],
        anomaly_map=[PIL.Image.fromarray((x * 65535).round().astype(np.uint16)) for x in anomaly_map],
        anomaly_score=score,
    )


def _to_pil(array):
    """(H, W, C) in [0, 1] -> PIL, grey for one channel; of more than three channels (MRI) the first is shown."""
    array = (array * 255).round().astype(np.uint8)
    return PIL.Image.fromarray(array if array.shape[-1] == 3 else array[..., 0])


class ContractMixin:
    """Put before `DiffusionPipeline` among the bases of a pipeline class that answers with an `AnomalyOutput`.

    A class of it has `ORIGINAL_SETTINGS`: what a call means when neither the caller nor the checkpoint says otherwise.
    """

    ORIGINAL_SETTINGS = {}

    def register_contract(self, num_classes, class_names, data_range, scaling, aspect, settings, map_threshold):
        """Into the pipeline's config: what its pictures, its classes and the defaults of its call are.

        `data_range` None: the class has no choice of it.

        Raises:
            ValueError: as many names as there are no classes, or a setting that the call does not have.
        """
        unknown = set(settings or {}) - set(self.ORIGINAL_SETTINGS)
        if unknown:
            raise ValueError(f"expected `settings` among {sorted(self.ORIGINAL_SETTINGS)}, got {sorted(unknown)}")
        if isinstance(class_names, dict):
            class_names = [class_names[str(i)] for i in range(len(class_names))]
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"expected {num_classes} class names (a null label has none), got {class_names}")
        if data_range is not None:
            self.register_to_config(data_range=list(data_range))
        self.register_to_config(
            # not a list: diffusers takes a list in a pipeline's config for a component
            class_names=class_names and {str(i): name for i, name in enumerate(class_names)},
            scaling=scaling,
            aspect=aspect,
            settings=settings,
            map_threshold=map_threshold,
        )

    @property
    def class_names(self):
        """The classes' names in the order of their ids, or [] where none were given."""
        return list((self.config.class_names or {}).values())

    def settings(self, recipe=None, **given):
        """The settings of a call: those given, over the checkpoint's own, over the original procedure's.

        `recipe` "original" leaves the checkpoint's out.
        """
        if recipe not in (None, "original"):
            raise ValueError(f"expected `recipe` to be original, or None for the checkpoint's own, got {recipe!r}")
        given = {name: value for name, value in given.items() if value is not None}
        own = {} if recipe == "original" else self.config.settings or {}
        return {**self.ORIGINAL_SETTINGS, **own, **given}

    def find_label(self, label, name, count, null=None):
        """A class id below `count`, a class name or "null" -> the id; `null` is that of the null label, if any."""
        names = self.class_names
        if isinstance(label, str) and label in names:
            return names.index(label)
        if label == "null" and null is not None:
            return null
        if isinstance(label, int) and 0 <= label < count:
            return label
        known = [f"0..{count - 1}", *map(repr, names), *(["'null'"] if null is not None else [])]
        raise ValueError(f"expected `{name}` among {', '.join(known)}, got {label!r}")

    def check_map(self, settings, output_type):
        """ValueError where the settings of the map, or the type of the answer, are not what they can be."""
        if settings["direction"] not in ("both", "bright", "dark"):
            raise ValueError(f"expected `direction` both, bright or dark, got {settings['direction']!r}")
        check_number("smoothing", settings["smoothing"])
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"expected `output_type` pil, np or pt, got {output_type!r}")

    def check_span(self, settings, tensor_inputs):
        """ValueError where the settings of inversion are not what they can be, or the callback asks for what is not."""
        chain = self.scheduler.config.num_train_timesteps
        allowed = {"noise_level": f"to be a timestep, 1..{chain}", "num_inference_steps": f"from 1 to {chain}"}
        for name, what in allowed.items():
            if not isinstance(settings[name], int):
                raise ValueError(f"expected `{name}` to be a whole number, got {settings[name]!r}")
            if not 1 <= settings[name] <= chain:
                raise ValueError(f"expected `{name}` {what}, got {settings[name]!r}")
        if not isinstance(settings["num_refinements"], int) or settings["num_refinements"] < 0:
            raise ValueError(
                f"expected `num_refinements` to be a whole number of 0 or more, got {settings['num_refinements']!r}"
            )
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"expected `callback_on_step_end_tensor_inputs` among {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}"
            )

    def on_step(self, callback, tensor_inputs):
        """diffusers' step callback as `on_step(i, t, latents) -> latents`, or None."""
        if callback is None:
            return None

        steps = itertools.count()  # of the whole call, over inversion and all decodings

        def call(_, t, latents):
            kwargs = {}
            for name in tensor_inputs:
                kwargs[name] = latents
            return (callback(self, next(steps), t, kwargs) or {}).get("latents", latents)

        return call


def check_number(name, value, low=0.0, high=math.inf):
    """ValueError unless `value` is a finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"expected `{name}` to be a number, got {value!r}")
    if not math.isfinite(value) or not low <= value <= high:
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of {low:g} or more"
        raise ValueError(f"expected a finite `{name}` {limits if math.isfinite(low) else ''}, got {value!r}")
