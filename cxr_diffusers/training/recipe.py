"""A recipe is a YAML file whose sections are keyword arguments; see configs/."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ..config import build, config_file, override_value, read_sections
from ..files import check_output_folder


@dataclass
class RunConfig:
    """The settings that all training runs share."""

    output_dir: str
    max_steps: int = 50_000  # optimizer updates
    max_seconds: float | None = None  # end after so much training time; the learning rate decays with the clock
    batch_size: int = 4  # per process
    learning_rate: float = 1e-4
    # auto: bf16 where the hardware has it; None: as `accelerate launch` is configured
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = None
    ema_decay: float = 0.9999  # reached slowly: EMAModel's warm-up
    augment: dict | None = None  # keyword arguments of training.augmentation.augment; None: no augmentation
    save_every: int = 5_000  # steps between checkpoints
    checkpoints_total_limit: int = 2  # older ones are deleted; 0 keeps all
    validate_every: int = 5_000  # steps between validation images
    dataloader_num_workers: int = 0
    seed: int = 0
    init_from: str | None = None  # pipeline folder or Hub name; training starts from its weights
    report_to: str | None = None  # tensorboard, wandb, trackio, ... or all
    tracker_project_name: str = "cxr_diffusers"
    push_to_hub: bool = False  # publish the finished model
    hub_model_id: str | None = None  # USER/NAME; None: the name of output_dir
    hub_private: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError if a number is out of its range."""
        counts = "max_steps batch_size save_every validate_every validation_images gradient_accumulation_steps n_critic"
        for name in counts.split():
            if getattr(self, name, 1) < 1:
                raise ValueError(f"train.{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"train.learning_rate: expected a finite number of 0 or more, got {self.learning_rate}")
        for name in ("logit_normal", "adam_betas"):
            pair = getattr(self, name, None)
            if pair is not None and (len(pair) != 2 or not all(isinstance(x, int | float) for x in pair)):
                raise ValueError(f"train.{name}: expected two numbers, got {pair}")
        for name in ("dataloader_num_workers", "checkpoints_total_limit", "lr_warmup_steps"):
            if getattr(self, name, 0) < 0:
                raise ValueError(f"train.{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass
class TrainConfig(RunConfig):
    """The `train:` section of a recipe that `loop.train` runs; a classifier's has just these settings."""

    compile: bool = False  # torch.compile the network: a minute or two once, then faster steps on a GPU
    gradient_accumulation_steps: int = 1
    lr_scheduler: str = "constant_with_warmup"  # a name of diffusers.optimization.get_scheduler
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    ema_width: float | None = None  # relative width of a power-function average in place of `ema_decay`, e.g. 0.1
    balance: bool = False  # draw each (class, view), and the unlabelled images, equally often
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError if a number is out of its range, or for a warm-up that the schedule does not have."""
        super().__post_init__()
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            got = f"got {self.lr_warmup_steps}: see constant_with_warmup"
            raise ValueError(f"train.lr_warmup_steps: expected 0 with the schedule constant, {got}")


@dataclass
class SegmenterConfig(TrainConfig):
    """The `train:` section of a lung segmenter's recipe."""

    validation_images: int = 4  # shown at each validation


@dataclass
class DenoisingConfig(TrainConfig):
    """The `train:` section of an unconditional UNet's recipe."""

    validation_images: int = 4  # shown at each validation
    snr_gamma: float | None = None  # min-SNR weighting; 5 is the paper's
    logit_normal: list | None = None  # [mean, std] of logit(t / T) of the training timesteps; None: uniform
    vlb_weight: float = 1.0  # of the variational bound, for models with learned variance


@dataclass
class CFGConfig(DenoisingConfig):
    """The `train:` section of a class-conditional UNet's recipe."""

    p_uncond: float = 0.1  # probability of dropping a label; with 0 the null label is not trained
    validation_loss_images: int = 0  # number of validation images for a loss with fixed noise; the best model is kept


def check_keys(values: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Raise ValueError for a key of a section `where` that is not among `names`."""
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{where}: expected some of {', '.join(names)}, got {unknown}")


SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # of DDIMScheduler


@dataclass
class UnconditionalRecipe:
    """Recipe of a UNet without classes: data, model, noise schedule and training."""

    data: dict  # `name` of a loader in cxr_diffusers.data, and its keyword arguments
    unet: dict  # keyword arguments of diffusers.UNet2DModel
    scheduler: dict  # keyword arguments of diffusers.DDIMScheduler
    train: DenoisingConfig
    images: dict = field(default_factory=dict)  # scaling, aspect, data_range: of prepare_image, kept by the pipeline

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown `beta_schedule`."""
        name = self.scheduler.get("beta_schedule", SCHEDULES[0])
        if name not in SCHEDULES:
            raise ValueError(f"scheduler.beta_schedule: expected {' or '.join(SCHEDULES)}, got {name!r}")

    def identity(self) -> dict[str, Any]:
        """The settings outside `train` that determine the result: a run resumes only if they are the same."""
        data = {key: value for key, value in self.data.items() if key != "root"}  # a disk may be mounted elsewhere
        return {"data": data, "unet": self.unet, "scheduler": self.scheduler, "images": self.images}


@dataclass
class Recipe(UnconditionalRecipe):
    """Recipe of a class-conditional UNet."""

    train: CFGConfig
    validation: dict = field(default_factory=dict)  # keys of `data` that differ for the validation images
    conditions: dict = field(default_factory=dict)  # `views`, e.g. [PA, AP]: the network is conditioned on the view too
    pipeline: dict = field(default_factory=dict)  # the pipeline's `settings`: defaults of its call

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown key of `conditions`, or an unknown `beta_schedule`."""
        super().__post_init__()
        check_keys(self.conditions, ["views"], "conditions")

    def identity(self) -> dict[str, Any]:
        """See `UnconditionalRecipe.identity`."""
        return super().identity() | ({"conditions": self.conditions} if self.conditions else {})


@dataclass
class AdversarialConfig(RunConfig):
    """The `train:` section of a Fixed-Point GAN's recipe.

    `max_steps` counts updates of the discriminator, `learning_rate` is that of both networks, and `mixed_precision` is
    no or bf16.
    """

    validation_images: int = 4  # shown at each validation
    ema_decay: float = 0.999  # of the generator, per update of it
    n_critic: int = 5  # discriminator updates per generator update
    # number of last steps in which the learning rate falls linearly to 0; with `max_seconds`, the same part of the time
    lr_decay_steps: int = 0
    adam_betas: list = field(default_factory=lambda: [0.5, 0.999])
    lambda_cls: float = 1.0  # domain classification
    lambda_rec: float = 10.0  # cycle consistency
    lambda_id: float = 10.0  # conditional identity
    lambda_gp: float = 10.0  # gradient penalty


@dataclass
class AdversarialRecipe:
    """Recipe of a Fixed-Point GAN: data, generator, discriminator and training."""

    data: dict  # `name` of a loader in cxr_diffusers.data, and its keyword arguments
    generator: dict  # keyword arguments of models.fixed_point_gan.FixedPointGenerator
    discriminator: dict  # of FixedPointDiscriminator; size, channels and classes are the generator's
    train: AdversarialConfig
    images: dict = field(default_factory=dict)  # scaling, aspect: of prepare_image, kept by the pipeline
    validation: dict = field(default_factory=dict)  # keys of `data` that differ for the validation images
    pipeline: dict = field(default_factory=dict)  # the pipeline's `settings`: defaults of its call

    def identity(self) -> dict[str, Any]:
        """See `UnconditionalRecipe.identity`."""
        data = {key: value for key, value in self.data.items() if key != "root"}
        networks = {"generator": self.generator, "discriminator": self.discriminator}
        return {"data": data, **networks, "images": self.images}


@dataclass
class ClassifierRecipe:
    """Recipe of a classifier: of noisy images, to guide a diffusion model, or of clean images."""

    data: dict  # `name` of a loader in cxr_diffusers.data, and its keyword arguments
    # keyword arguments of NoisyClassifier; with `architecture: pyramid`, of PyramidClassifier; with a `model_type`, of
    # that configuration of transformers (resnet, convnext, ...)
    classifier: dict
    train: TrainConfig
    diffusion: dict = field(default_factory=dict)  # `model`: folder or Hub name of the pipeline to be guided
    images: dict = field(default_factory=dict)  # size, scaling, aspect: without a `diffusion` section
    loss: dict = field(default_factory=dict)  # label_smoothing, balanced (equal class weights): without `diffusion`
    validation: dict = field(default_factory=dict)  # keys of `data` that differ for the validation images
    pipeline: dict = field(default_factory=dict)  # the pipeline's `settings`: defaults of its call

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown key of `diffusion` or `loss`."""
        check_keys(self.diffusion, ["model"], "diffusion")
        check_keys(self.loss, ["balanced", "label_smoothing"], "loss")

    def identity(self) -> dict[str, Any]:
        """See `UnconditionalRecipe.identity`."""
        data = {key: value for key, value in self.data.items() if key != "root"}
        parts = {"classifier": self.classifier, "diffusion": self.diffusion, "images": self.images}
        return {"data": data, **parts, "loss": self.loss or None}  # None: as in runs older than this section


@dataclass
class SegmenterRecipe:
    """Recipe of a lung segmenter, trained on lung masks."""

    data: dict  # `name` of a loader in cxr_diffusers.data that yields masks, and its keyword arguments
    segmenter: dict  # keyword arguments of LungSegmenter
    train: SegmenterConfig  # `augment`: keyword arguments of training.lungs.augment_lungs
    images: dict = field(default_factory=dict)  # aspect: of prepare_image
    validation: dict = field(default_factory=dict)  # keys of `data` that differ for the validation images

    def identity(self) -> dict[str, Any]:
        """See `UnconditionalRecipe.identity`."""
        data = {key: value for key, value in self.data.items() if key != "root"}
        return {"data": data, "segmenter": self.segmenter, "images": self.images}


# program in training/ -> type of its recipe, and of the section `train:` of that
RECIPE_TYPES: dict[str, tuple[type, type[RunConfig]]] = {
    "train_cfg": (Recipe, CFGConfig),
    "train_unconditional": (UnconditionalRecipe, DenoisingConfig),
    "train_classifier": (ClassifierRecipe, TrainConfig),
    "train_fixed_point_gan": (AdversarialRecipe, AdversarialConfig),
    "train_lung_segmenter": (SegmenterRecipe, SegmenterConfig),
}
# a section that only one type of recipe has -> the program
PROGRAM_OF_SECTION = {
    "generator": "train_fixed_point_gan",
    "classifier": "train_classifier",
    "segmenter": "train_lung_segmenter",
}
AnyRecipe = UnconditionalRecipe | Recipe | AdversarialRecipe | ClassifierRecipe | SegmenterRecipe
R = TypeVar("R", UnconditionalRecipe, Recipe, AdversarialRecipe, ClassifierRecipe, SegmenterRecipe)

DATA_NAME = ("data.name=", "--data.name=")


def program_of(sections: Mapping[str, Any]) -> str:
    """The name of the program in training/ that a recipe is for, from its sections (of a recipe: `vars(recipe)`)."""
    for section, program in PROGRAM_OF_SECTION.items():
        if section in sections:
            return program
    return "train_cfg" if (sections.get("unet") or {}).get("num_class_embeds") else "train_unconditional"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read a recipe, of the type in `RECIPE_TYPES` that its sections belong to.

    Args:
        path: the YAML file, or the name of a recipe that comes with the package.
        overrides: `section.key=value` strings, as given on the command line; the value is read as YAML, a deeper key
            (`train.augment.degrees=3`) reaches inside. If `data.name` is changed, `data` and `validation` are emptied
            first, because their keys belong to the other loader.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: an unknown section or key (the message lists the valid ones), a value of the wrong type, or a value
            that is still `???`, the placeholder for a value that the user has to give.
    """
    path = config_file(path)
    sections = read_sections(path, Recipe)
    for section, values in sections.items():
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"{path}: expected {section} to be a section of key: value lines, got {values!r}")
    for override in sorted(overrides, key=lambda override: not override.startswith(DATA_NAME)):
        before = (sections.get("data") or {}).get("name")
        override_value(sections, override)
        if override.startswith(DATA_NAME) and sections["data"]["name"] != before:
            sections["data"] = {"name": sections["data"]["name"]}
            sections.pop("validation", None)
    for section, values in sections.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if value == "???":
                raise ValueError(f"{path}: give {section}.{key}, for example: {section}.{key}=/data/CheXpert-v1.0")
    recipe_type, config_type = RECIPE_TYPES[program_of(sections)]
    if isinstance(sections.get("train"), dict):
        sections["train"] = build(config_type, sections["train"], f"{path}: train")
    return build(recipe_type, sections, str(path))


def parse_command_line(arguments: Sequence[str], default_recipe: str | Path, recipe_type: type[R]) -> R:
    """[RECIPE] [section.key=value ...] [--train_field[=value] ...] -> a recipe of `recipe_type`.

    RECIPE is a YAML file or the name of a recipe that comes with the package.

    Raises:
        FileNotFoundError, ValueError: see `load_recipe`; also ValueError for a recipe of another type, or an output
            folder that cannot be written.
    """
    path = default_recipe
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        path, *arguments = arguments
    recipe = load_recipe(path, parse_overrides(arguments))
    if type(recipe) is not recipe_type:
        names, program = [f.name for f in fields(recipe_type)], program_of(vars(recipe))
        raise ValueError(f"{path}: expected a recipe with the sections {names}, got one for {program}.py")
    check_output_folder(recipe.train.output_dir)
    return recipe


def parse_overrides(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments -> `section.key=value` strings.

    `--name value`, `--name=value` and a bare `--name` (true) set `train.name`, as in diffusers' own training scripts.
    """
    remaining, overrides = list(arguments), []
    while remaining:
        argument = remaining.pop(0)
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if not equals:
                has_value = remaining and not remaining[0].startswith("--") and "=" not in remaining[0]
                value = remaining.pop(0) if has_value else "true"
            argument = f"{name if '.' in name else 'train.' + name}={value}"
        overrides.append(argument)
    return overrides


@contextmanager
def section(name: str) -> Iterator[None]:
    """Raise any error that a library raises for the values of a recipe's section as a ValueError that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{name}: {reason}") from error
