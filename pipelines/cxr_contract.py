"""What the calls of all anomaly pipelines have in common: names, settings, labels, step callbacks, and their checks."""

import itertools
import math
import numbers


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
