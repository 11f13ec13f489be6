"""The output and the maps of the anomaly pipelines, and the parts that their calls share."""

import contextlib
import functools
import inspect
import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput

if TYPE_CHECKING:  # a type checker sees the methods of the pipeline that the mixin is put before
    from diffusers import DiffusionPipeline as Base
else:
    Base = object

# arguments of a call that are not settings of a checkpoint
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

# settings of older checkpoints that no call has any more, each with the value that changed nothing
RETIRED: dict[str, Any] = {
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

    image: the model's input (scaled, resized, square), values in [0, 1].
        list of PIL images (mode L) | (B, H, W, C) array | (B, C, H, W) tensor
    counterfactual: the same chest as if healthy, in the same scale and format as `image`; with the setting
        `keep_below` it is the image itself where the map is low.
    anomaly_map: the change of each pixel, in [0, 1]: 0 none, 1 from black to white; it depends on the settings of the
        map (see the call of the pipeline).
        list of PIL images (mode I;16, value / 65535) | (B, H, W) array | (B, H, W) tensor
    anomaly_score: one number for each image, higher is more abnormal: the mean of the map's highest 5 % of pixels,
        unless the pipeline defines another one (see its call).
        (B,) array | (B,) array | (B,) tensor
    """

    image: list | np.ndarray | torch.Tensor
    counterfactual: list | np.ndarray | torch.Tensor
    anomaly_map: list | np.ndarray | torch.Tensor
    anomaly_score: np.ndarray | torch.Tensor


def anomaly_call(call: Callable) -> Callable:
    """Decorator of `__call__`: no gradients, no training mode; omitted arguments take the checkpoint's own values.

    Where the checkpoint has none, the signature's default holds. `help()` and `inspect.signature` show the signature
    of `call`.
    """
    signature = inspect.signature(call)

    @functools.wraps(call)
    @torch.no_grad()
    def call_with_settings(self, *args, **kwargs):
        given = signature.bind_partial(self, *args, **kwargs).arguments
        given.pop("self")
        self._interrupt = False
        with in_evaluation_mode(self.components.values()):
            return call(self, **self.settings(**given))

    return call_with_settings


@contextlib.contextmanager
def in_evaluation_mode(components: Iterable[Any]) -> Iterator[None]:
    """Networks that are in training mode are in evaluation mode within the context; other components are skipped.

    In training mode batch norm would mix the images of a batch and change, and dropout would make a result random.
    """
    networks = [component for component in components if isinstance(component, torch.nn.Module)]
    training = [part for network in networks for part in network.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def default_settings(call: Callable) -> dict[str, Any]:
    """{name: default} of the arguments of a call that can be settings of a checkpoint."""
    parameters = inspect.signature(call).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in CALL_ONLY}


def difference_map(
    reference: torch.Tensor,
    counterfactual: torch.Tensor,
    data_range: Sequence[float] = (-1.0, 1.0),
    direction: str = "both",
    highpass: float = 0.0,
    match_exposure: bool = False,
) -> torch.Tensor:
    """(B, C, H, W) x (B, C, H, W) in `data_range` -> (B, H, W) in [0, 1]: the change, averaged over channels.

    Args:
        direction: "both": |reference - counterfactual|. "bright": only where the reference is brighter (fluid,
            consolidation, masses). "dark": only where it is darker (air where there should be none).
        highpass: sigma in pixels of a Gaussian; the difference blurred by it is subtracted from the difference before
            `direction` applies, so that changes of overall brightness do not count. 0 leaves the difference as it is.
        match_exposure: subtract the counterfactual with the exposure of the reference, see `matched_exposure`. False:
            the images are not normalised before the subtraction.
    """
    difference = reference - (matched_exposure(counterfactual, reference) if match_exposure else counterfactual)
    if highpass:
        blurred = smooth_map(difference.flatten(0, 1), highpass)
        difference = difference - blurred.unflatten(0, difference.shape[:2])
    change = {"both": difference.abs(), "bright": difference.clamp(min=0), "dark": (-difference).clamp(min=0)}
    return change[direction].mean(dim=1) / (data_range[1] - data_range[0])


def matched_exposure(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) x (B, C, H, W) -> a + b * image, with the a and b for which it is closest to the reference.

    One a and one b for each image: those of the least squares over all pixels. Differences of contrast and brightness
    disappear, and a change of a small part remains.
    """
    mean, reference_mean = (x.float().mean(dim=(1, 2, 3), keepdim=True) for x in (image, reference))
    centred = image - mean
    variance = centred.square().mean(dim=(1, 2, 3), keepdim=True)
    covariance = (centred * (reference - reference_mean)).mean(dim=(1, 2, 3), keepdim=True)
    return reference_mean + covariance / variance.clamp(min=1e-12) * centred


def smooth_map(anomaly_map: torch.Tensor, sigma: float) -> torch.Tensor:
    """(B, H, W) -> (B, H, W): Gaussian smoothing, `sigma` in pixels of the map; 0 leaves it as it is."""
    if not sigma:
        return anomaly_map
    radius = max(1, round(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=anomaly_map.dtype, device=anomaly_map.device)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    maps = F.pad(anomaly_map[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(maps, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]


def highest_share(
    anomaly_map: torch.Tensor, share: float, gate: torch.Tensor | None = None, softness: float = 0.0
) -> torch.Tensor:
    """(B, H, W) -> (B, H, W) in [0, 1]: 1 for the given share of pixels of each map that are highest, else 0.

    Args:
        share: of all pixels, or with a (B, H, W) `gate` of those where it is above 0.5; at least one pixel.
        softness: sigma of a Gaussian that smooths the edge, in pixels of the map.
    """
    flat, total = anomaly_map.flatten(1), anomaly_map[0].numel()
    counts = [total] * len(flat) if gate is None else (gate.flatten(1) > 0.5).sum(dim=1).tolist()
    mask = torch.zeros_like(flat)
    for i, count in enumerate(counts):
        mask[i, flat[i].topk(max(1, round(share * count))).indices] = 1
    return smooth_map(mask.view_as(anomaly_map), softness).clamp(0, 1)


def composite(
    image: torch.Tensor, counterfactual: torch.Tensor, anomaly_map: torch.Tensor, keep_below: float
) -> torch.Tensor:
    """(B, C, H, W) counterfactual that differs from the (B, C, H, W) image only where the (B, H, W) map is high.

    The image is kept where the map is below `keep_below`, the counterfactual where it is above twice this value; in
    between, their weights change linearly with the map. A `keep_below` of 0 keeps the whole counterfactual.
    """
    if not keep_below:
        return counterfactual
    weight = (anomaly_map / keep_below - 1).clamp(0, 1)[:, None]
    return image + weight * (counterfactual - image)


def score_map(anomaly_map: torch.Tensor, fraction: float = 0.05) -> torch.Tensor:
    """(B, H, W) -> (B,): the mean of each map's highest `fraction` of pixels."""
    flat = anomaly_map.flatten(1)
    return flat.topk(max(1, round(fraction * flat.shape[1])), dim=1).values.mean(dim=1)


def anomaly_output(
    image: torch.Tensor,
    counterfactual: torch.Tensor,
    anomaly_map: torch.Tensor,
    data_range: Sequence[float],
    output_type: str,
    score: torch.Tensor | None = None,
) -> AnomalyOutput:
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


class ContractMixin(Base):
    """Put before `DiffusionPipeline` among the bases of a pipeline class that returns an `AnomalyOutput`.

    Such a class describes its method to readers of model cards and of the page: `title`, a name; `summary`, one or two
    sentences; `score_meaning`, a description of its `anomaly_score` (a class whose score depends on the settings
    overrides `describe_score`); `has_counterfactual`, False for a method that returns the image itself as such;
    `has_fixed_noise`, True for a method whose noise is always the same without a `generator`.

    Such a class has `ORIGINAL_SETTINGS = default_settings(__call__)`: the settings of the original procedure, which
    hold where neither the caller nor the checkpoint gives a value. A call with `**pipeline.ORIGINAL_SETTINGS` ignores
    the checkpoint's own settings.

    `from_pipe(pipeline)` shares the components and keeps class names, settings and threshold; components alone,
    `TheClass(**pipeline.components)`, carry none of them: pass them as well.

    `num_classes` is set by `register_contract`.
    """

    title: str = "A method of your own"
    summary: str = "A model of anomalies in chest X-rays."
    score_meaning: str = "mean of the highest 5 % of the anomaly map's pixels"
    has_counterfactual: bool = True
    has_fixed_noise: bool = False

    ORIGINAL_SETTINGS: dict[str, Any] = {}
    num_classes: int
    _interrupt = False
    _is_inpainting = False
    _num_timesteps: int | None = None

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As in diffusers. From a pipeline of another class, settings that the call has are kept, the threshold not."""
        if type(pipeline) is not cls:
            settings = pipeline.config.get("settings") or {}
            kwargs.setdefault("settings", {k: v for k, v in settings.items() if k in cls.ORIGINAL_SETTINGS})
            kwargs.setdefault("map_threshold", None)
        return super().from_pipe(pipeline, **kwargs)

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `pipeline._interrupt = True`: the call then skips the remaining steps."""
        return self._interrupt

    @property
    def is_inpainting(self) -> bool:
        """Whether the steps that a callback sees now are those of inpainting."""
        return self._is_inpainting

    @property
    def num_timesteps(self) -> int | None:
        """Number of steps of the last call, inversion and decoding together; None before the first call."""
        return self._num_timesteps

    def count_timesteps(self, *timesteps: torch.Tensor) -> None:
        """Set `num_timesteps` to the number of all timesteps of a call."""
        self._num_timesteps = sum(len(t) for t in timesteps)

    def register_contract(
        self,
        num_classes: int,
        class_names: Sequence[str] | dict[str, str] | None,
        data_range: Sequence[float] | None,
        scaling: str,
        aspect: str,
        settings: dict[str, Any] | None,
        map_threshold: float | None,
    ) -> None:
        """Write the preparation of images, the classes and the defaults of the call into the pipeline's config.

        `data_range` None: the class has a fixed one.

        Raises:
            ValueError: the number of names differs from the number of classes, or the call has no such setting.
        """
        self.num_classes = num_classes
        given = dict(settings or {})
        if retired := sorted(set(given) & set(RETIRED)):
            warnings.warn(
                f"these settings of the checkpoint have been retired and are ignored: "
                f"{', '.join(f'{name}={given[name]!r}' for name in retired)}",
                stacklevel=3,
            )
            settings = {name: value for name, value in given.items() if name not in RETIRED}
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
    def class_names(self) -> list[str]:
        """The names of the classes in the order of their ids, [] without names."""
        return list((self.config.class_names or {}).values())

    def settings(self, **given: Any) -> dict[str, Any]:
        """The settings of a call: those given, else the checkpoint's own, else the original procedure's.

        None counts as not given, unless it is the original procedure's value.
        """
        given = {name: v for name, v in given.items() if v is not None or self.ORIGINAL_SETTINGS.get(name) is None}
        return {**self.ORIGINAL_SETTINGS, **(self.config.settings or {}), **given}

    def describe_score(self) -> str:
        """The meaning of the `anomaly_score` under the checkpoint's own settings."""
        return self.score_meaning

    def current_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of an older version's call as settings of today's: retired ones without effect are dropped.

        Newer settings get their defaults.
        """
        kept = {name: v for name, v in settings.items() if name not in RETIRED or v != RETIRED[name]}
        return {**self.ORIGINAL_SETTINGS, **kept}

    def image_format(self, model: Any) -> dict[str, Any]:
        """The arguments of `prepare_image` for a model with `sample_size` and `in_channels` in its config."""
        return {
            "size": model.config.sample_size,
            "scaling": self.config.scaling,
            "aspect": self.config.aspect,
            "data_range": self.config.data_range,
            "num_channels": model.config.in_channels,
        }

    def map_change(
        self,
        image: torch.Tensor,
        counterfactual: torch.Tensor,
        direction: str,
        highpass: float,
        smoothing: float,
        match_exposure: bool,
    ) -> torch.Tensor:
        """(B, C, H, W) x (B, C, H, W) in the model's range -> (B, H, W) map in [0, 1] of the change.

        `highpass` is in pixels of an image of 64 pixels, `smoothing` in pixels of this one.
        """
        low, high = self.config.data_range
        highpass = highpass * image.shape[-1] / 64
        counterfactual = counterfactual.clamp(low, high)
        change = difference_map(image, counterfactual, (low, high), direction, highpass, match_exposure)
        return smooth_map(change, smoothing)

    def finish(
        self,
        image: torch.Tensor,
        counterfactual: torch.Tensor,
        anomaly_map: torch.Tensor,
        data_range: Sequence[float],
        region: str,
        output_type: str,
        return_dict: bool,
        score: torch.Tensor | None = None,
        keep_below: float = 0.0,
        scored_map: torch.Tensor | None = None,
        added_score: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
    ) -> AnomalyOutput | tuple:
        """The last step of a call: restrict the map to `region`, offload the models, and convert the output.

        Args:
            score: (B,), the anomaly score; None: `score_map` of `scored_map`.
            keep_below: see `composite`.
            scored_map: (B, H, W), restricted to `region` as well; None: the anomaly map.
            added_score: (B,), added to the anomaly score; None: nothing.
            gate: `lung_gate` of the image, if the call has computed it already.

        Returns:
            `AnomalyOutput`, or its tuple with `return_dict` False.
        """
        scored_map = anomaly_map if scored_map is None else scored_map
        if region == "lungs":
            gate = self.lung_gate(image) if gate is None else gate
            anomaly_map, scored_map = anomaly_map * gate, scored_map * gate
        low, high = data_range
        counterfactual = composite(image, counterfactual.clamp(low, high), anomaly_map, keep_below)
        score = score_map(scored_map.float().clamp(0, 1)) if score is None else score
        score = score if added_score is None else score + added_score
        output = anomaly_output(image, counterfactual, anomaly_map, data_range, output_type, score)
        self.maybe_free_model_hooks()
        self._interrupt = False  # for `invert` and `decode` called on their own
        return output if return_dict else output.to_tuple()

    def is_averaged(self, inversion: str) -> bool:
        """Whether a call's `inversion` is the averaged one; ValueError if it is neither that nor the plain one."""
        if inversion not in ("plain", "averaged"):
            raise ValueError(f"expected `inversion` plain or averaged, got {inversion!r}")
        return inversion == "averaged"

    def lung_gate(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) images -> (B, H, W) soft lung mask of the pipeline's `lung_segmenter`."""
        images = image.mean(dim=1, keepdim=True)
        # offloading does not move the segmenter
        return self.lung_segmenter.field(images.to(self.lung_segmenter.device)).to(image.device)

    def find_label(self, label: Any, name: str, count: int, null: int | None = None) -> int:
        """A class id below `count`, a class name or "null" -> the id; `null` is the id of the null label, if any.

        Raises:
            ValueError: an unknown label; `name` is the argument that the message names.
        """
        names = self.class_names
        if isinstance(label, str) and label in names:
            return names.index(label)
        if label == "null" and null is not None:
            return null
        if isinstance(label, int) and 0 <= label < count:
            return label
        labels = [f"0..{count - 1}", *map(repr, names), *(["'null'"] if null is not None else [])]
        raise ValueError(f"expected `{name}` among {', '.join(labels)}, got {label!r}")

    def check_map(
        self,
        output_type: str,
        *,
        smoothing: float,
        region: str,
        direction: str = "both",
        highpass: float = 0.0,
        match_exposure: bool = False,
        keep_below: float = 0.0,
    ) -> None:
        """Raise ValueError for invalid settings of the map, or an invalid `output_type`."""
        if direction not in ("both", "bright", "dark"):
            raise ValueError(f"expected `direction` both, bright or dark, got {direction!r}")
        check_number("highpass", highpass)
        check_number("smoothing", smoothing)
        check_number("keep_below", keep_below)
        if not isinstance(match_exposure, bool):
            raise ValueError(f"expected `match_exposure` True or False, got {match_exposure!r}")
        if region not in ("image", "lungs"):
            raise ValueError(f"expected `region` image or lungs, got {region!r}")
        if region == "lungs" and self.lung_segmenter is None:
            raise ValueError("expected a pipeline with a `lung_segmenter` for `region='lungs'`, got one without")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"expected `output_type` pil, np or pt, got {output_type!r}")

    def check_steps(
        self, noise_level: Any, steps: Any, tensor_inputs: Sequence[str], name: str = "num_inference_steps"
    ) -> None:
        """Raise ValueError for an invalid noise level, number of steps (the argument `name`), or callback's tensor."""
        chain = self.scheduler.config.num_train_timesteps
        for argument, value, limits in (
            ("noise_level", noise_level, f"to be a timestep, 1..{chain}"),
            (name, steps, f"from 1 to {chain}"),
        ):
            if not isinstance(value, int):
                raise ValueError(f"expected `{argument}` to be a whole number, got {value!r}")
            if not 1 <= value <= chain:
                raise ValueError(f"expected `{argument}` {limits}, got {value!r}")
        if unknown := sorted(set(tensor_inputs) - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"expected `callback_on_step_end_tensor_inputs` among {self._callback_tensor_inputs}, got {unknown}"
            )

    def on_step(self, callback: Callable | None, tensor_inputs: Sequence[str]) -> Callable | None:
        """diffusers' step callback as `on_step(i, t, latents) -> latents`, or None."""
        if callback is None:
            return None

        steps = itertools.count()  # over the inversion and all decodings of the call

        def call(_, t, latents):
            kwargs = {}
            for name in tensor_inputs:
                kwargs[name] = latents
            return (callback(self, next(steps), t, kwargs) or {}).get("latents", latents)

        return call


def check_number(name: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """Raise ValueError unless `value` is a finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"expected `{name}` to be a number, got {value!r}")
    if not math.isfinite(value) or not low <= float(value) <= high:
        limits = f" from {low:g} to {high:g}" if math.isfinite(high) else f" of {low:g} or more"
        raise ValueError(f"expected a finite `{name}`{limits if math.isfinite(low) else ''}, got {value!r}")
