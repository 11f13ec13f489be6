"""The output of the anomaly pipelines, their maps, and what their calls have in common."""

import functools
import inspect
import itertools
import math
import numbers
import warnings
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput

# arguments of a call that no checkpoint chooses; all others are settings
CALL_ONLY = (
    "self",
    "image",
    "target_label",
    "view",
    "generator",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)

# settings of older checkpoints that no call has any more, each with the value that means what calls do today
RETIRED = {
    "combine": "mean",
    "compare_with": "image",
    "guidance_interval": None,
    "harmonization": 0.0,
    "num_refinements": 0,
}


@dataclass
class AnomalyOutput(BaseOutput):
    """Output of the anomaly pipelines.

    With `output_type` "pil" | "np" | "pt":

    image: the input as the model saw it (scaled, resized, square), values in [0, 1].
        list of PIL images (mode L) | (B, H, W, C) array | (B, C, H, W) tensor
    counterfactual: the same chest as if healthy, in the same scale and format as `image`.
    anomaly_map: how much each pixel had to change, in [0, 1]: 0 nothing, 1 from black to white; changed by the settings
        of the map (see the call of the pipeline).
        list of PIL images (mode I;16, value / 65535) | (B, H, W) array | (B, H, W) tensor
    anomaly_score: one number an image, higher is more abnormal: the mean of the map's highest 5 % of pixels, unless the
        pipeline has another one (see its call).
        (B,) array | (B,) array | (B,) tensor
    """

    image: list | np.ndarray | torch.Tensor
    counterfactual: list | np.ndarray | torch.Tensor
    anomaly_map: list | np.ndarray | torch.Tensor
    anomaly_score: np.ndarray | torch.Tensor


def with_checkpoint_settings(call):
    """Decorator of `__call__`: an argument left out takes the checkpoint's own value, or else the signature's default.

    `help()` and `inspect.signature` show the signature that is written.
    """
    signature = inspect.signature(call)

    @functools.wraps(call)
    def call_with_settings(self, *args, **kwargs):
        given = signature.bind_partial(self, *args, **kwargs).arguments
        given.pop("self")
        self._interrupt = False
        return call(self, **self.settings(**given))

    return call_with_settings


def default_settings(call):
    """{name: default} of the arguments of a call that a checkpoint may choose."""
    parameters = inspect.signature(call).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in CALL_ONLY}


def difference_map(reference, counterfactual, data_range=(-1.0, 1.0), direction="both", highpass=0.0):
    """(B, C, H, W) x (B, C, H, W) in `data_range` -> (B, H, W) in [0, 1]: the change, averaged over channels.

    Neither image is normalised on its own before the subtraction.

    Args:
        direction: "both" takes |reference - counterfactual|. "bright" counts only where the reference is the brighter:
            fluid, consolidation, masses. "dark" only where it is the darker: air where there should be none.
        highpass: sigma in pixels of a Gaussian; the difference blurred by it is subtracted from the difference before
            `direction` applies, so that changes of overall brightness do not count. 0 leaves the difference as it is.
    """
    difference = reference - counterfactual
    if highpass:
        blurred = smooth_map(difference.flatten(0, 1), highpass)
        difference = difference - blurred.unflatten(0, difference.shape[:2])
    change = {"both": difference.abs(), "bright": difference.clamp(min=0), "dark": (-difference).clamp(min=0)}
    return change[direction].mean(dim=1) / (data_range[1] - data_range[0])


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


def score_map(anomaly_map, fraction=0.05):
    """(B, H, W) -> (B,): the mean of each map's highest `fraction` of pixels."""
    flat = anomaly_map.flatten(1)
    return flat.topk(max(1, round(fraction * flat.shape[1])), dim=1).values.mean(dim=1)


def anomaly_output(image, counterfactual, anomaly_map, data_range, output_type, score=None):
    """Tensors in the model's range -> `AnomalyOutput` in the documented range and `output_type`.

    `score` is a (B,) tensor; None: `score_map` of the map.
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
    """(H, W, C) in [0, 1] -> PIL, grey for one channel; the first of more than three channels (MRI)."""
    array = (array * 255).round().astype(np.uint8)
    return PIL.Image.fromarray(array if array.shape[-1] == 3 else array[..., 0])


class ContractMixin:
    """Put before `DiffusionPipeline` among the bases of a pipeline class that returns an `AnomalyOutput`.

    Such a class describes its method to readers of model cards and of the page: `title`, a name; `summary`, one or two
    sentences; `score_meaning`, what its `anomaly_score` measures (a class whose score depends on the settings
    overrides `describe_score`).

    Such a class has `ORIGINAL_SETTINGS = default_settings(__call__)`: the settings of the original procedure, which
    hold where neither the caller nor the checkpoint chooses. A call with `**pipeline.ORIGINAL_SETTINGS` leaves the
    checkpoint's own out.

    `from_pipe(pipeline)` shares the components and keeps class names, settings and threshold; components alone,
    `TheClass(**pipeline.components)`, carry none of them: pass them as well.
    """

    title: str = "A method of your own"
    summary: str = "A model of anomalies in chest X-rays."
    score_meaning: str = "mean of the highest 5 % of the anomaly map's pixels"

    ORIGINAL_SETTINGS = {}
    _interrupt = False
    _num_timesteps = None

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """As in diffusers; of another class's settings those that the call has are kept, its threshold is not."""
        if type(pipeline) is not cls:
            settings = pipeline.config.get("settings") or {}
            kwargs.setdefault("settings", {k: v for k, v in settings.items() if k in cls.ORIGINAL_SETTINGS})
            kwargs.setdefault("map_threshold", None)
        return super().from_pipe(pipeline, **kwargs)

    @property
    def interrupt(self):
        """True from the moment a callback sets `pipeline._interrupt = True`: the call leaves its other steps out."""
        return self._interrupt

    @property
    def num_timesteps(self):
        """Steps of the last call, inversion and decoding together; None before the first."""
        return self._num_timesteps

    def count_timesteps(self, *timesteps):
        """Set `num_timesteps` of a call to the number of all its timesteps."""
        self._num_timesteps = sum(len(t) for t in timesteps)

    def register_contract(self, num_classes, class_names, data_range, scaling, aspect, settings, map_threshold):
        """Write the preparation of images, the classes and the defaults of the call into the pipeline's config.

        `data_range` None: the class has no choice of it.

        Raises:
            ValueError: the number of names differs from the number of classes, or the call has no such setting.
        """
        if retired := sorted(set(settings or {}) & set(RETIRED)):
            warnings.warn(
                f"these settings of the checkpoint have been retired and are ignored: "
                f"{', '.join(f'{name}={settings[name]!r}' for name in retired)}",
                stacklevel=3,
            )
            settings = {name: value for name, value in settings.items() if name not in RETIRED}
        if unknown := sorted(set(settings or {}) - set(self.ORIGINAL_SETTINGS)):
            raise ValueError(f"expected `settings` among {sorted(self.ORIGINAL_SETTINGS)}, got {unknown}")
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

    def settings(self, **given):
        """The settings of a call: those given, else the checkpoint's own, else the original procedure's.

        None counts as not given, unless it is the original procedure's value.
        """
        given = {name: v for name, v in given.items() if v is not None or self.ORIGINAL_SETTINGS.get(name) is None}
        return {**self.ORIGINAL_SETTINGS, **(self.config.settings or {}), **given}

    def describe_score(self):
        """What the `anomaly_score` measures under the checkpoint's own settings."""
        return self.score_meaning

    def current_settings(self, settings):
        """The settings of an older version's call in terms of today's: retired ones that changed nothing are dropped.

        Settings that did not exist yet get today's default.
        """
        kept = {name: v for name, v in settings.items() if name not in RETIRED or v != RETIRED[name]}
        return {**self.ORIGINAL_SETTINGS, **kept}

    def image_format(self, model):
        """The arguments of `prepare_image` for a model with `sample_size` and `in_channels` in its config."""
        return {
            "size": model.config.sample_size,
            "scaling": self.config.scaling,
            "aspect": self.config.aspect,
            "data_range": self.config.data_range,
            "num_channels": model.config.in_channels,
        }

    def map_change(self, image, counterfactual, direction, highpass, smoothing):
        """(B, C, H, W) x (B, C, H, W) in the model's range -> (B, H, W) map in [0, 1] of the change.

        `highpass` is in pixels of an image of 64 pixels, `smoothing` in pixels of this one.
        """
        low, high = self.config.data_range
        highpass = highpass * image.shape[-1] / 64
        change = difference_map(image, counterfactual.clamp(low, high), (low, high), direction, highpass)
        return smooth_map(change, smoothing)

    def finish(self, image, counterfactual, anomaly_map, data_range, region, output_type, return_dict, score=None):
        """The last step of a call: the map inside `region`, the output, and the models back where offloading has them.

        Returns:
            `AnomalyOutput`, or its tuple with `return_dict` False.
        """
        if region == "lungs":
            segmenter = self.lung_segmenter
            images = image.mean(dim=1, keepdim=True).to(segmenter.device)  # offloading leaves it where it is
            anomaly_map = anomaly_map * segmenter.field(images).to(anomaly_map.device)
        output = anomaly_output(image, counterfactual, anomaly_map, data_range, output_type, score)
        self.maybe_free_model_hooks()
        self._interrupt = False  # `invert` and `decode` may be called next, by themselves
        return output if return_dict else output.to_tuple()

    def find_label(self, label, name, count, null=None):
        """A class id below `count`, a class name or "null" -> the id; `null` is that of the null label, if any."""
        names = self.class_names
        if isinstance(label, str) and label in names:
            return names.index(label)
        if label == "null" and null is not None:
            return null
        if isinstance(label, int) and 0 <= label < count:
            return label
        labels = [f"0..{count - 1}", *map(repr, names), *(["'null'"] if null is not None else [])]
        raise ValueError(f"expected `{name}` among {', '.join(labels)}, got {label!r}")

    def check_map(self, output_type, *, smoothing, region, direction="both", highpass=0.0):
        """Raise ValueError for invalid settings of the map, or an invalid `output_type`."""
        if direction not in ("both", "bright", "dark"):
            raise ValueError(f"expected `direction` both, bright or dark, got {direction!r}")
        check_number("highpass", highpass)
        check_number("smoothing", smoothing)
        if region not in ("image", "lungs"):
            raise ValueError(f"expected `region` image or lungs, got {region!r}")
        if region == "lungs" and self.lung_segmenter is None:
            raise ValueError("expected a pipeline with a `lung_segmenter` for `region='lungs'`, got one without")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"expected `output_type` pil, np or pt, got {output_type!r}")

    def check_steps(self, noise_level, num_inference_steps, tensor_inputs):
        """Raise ValueError for an invalid noise level or number of steps, or tensors that the callback cannot get."""
        chain = self.scheduler.config.num_train_timesteps
        for name, value, limits in (
            ("noise_level", noise_level, f"to be a timestep, 1..{chain}"),
            ("num_inference_steps", num_inference_steps, f"from 1 to {chain}"),
        ):
            if not isinstance(value, int):
                raise ValueError(f"expected `{name}` to be a whole number, got {value!r}")
            if not 1 <= value <= chain:
                raise ValueError(f"expected `{name}` {limits}, got {value!r}")
        if unknown := sorted(set(tensor_inputs) - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"expected `callback_on_step_end_tensor_inputs` among {self._callback_tensor_inputs}, got {unknown}"
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
