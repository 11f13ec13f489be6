"""A recipe is a YAML file whose sections are keyword arguments; see configs/."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from ..config import build, override_value, read_sections


@dataclass
class RunConfig:
    """How a run goes on, whatever it trains."""

    output_dir: str
    max_steps: int = 50_000  # optimizer updates
    max_seconds: float | None = None  # end after so much training time, the learning rate decaying with the clock
    batch_size: int = 4  # per process
    learning_rate: float = 1e-4
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = (
        None  # no, fp16, bf16; auto: bf16 where fast; None: what `accelerate launch` says
    )
    compile: bool = False  # torch.compile the network: a minute or two once, then faster steps on a GPU
    ema_decay: float = 0.9999  # reached slowly: EMAModel's warm-up
    augment: dict | None = None  # keyword arguments of data.augment; None: none
    save_every: int = 5_000  # steps between checkpoints
    checkpoints_total_limit: int = 2  # older ones are deleted; 0 keeps all
    validate_every: int = 5_000  # steps between pictures
    validation_images: int = 4
    dataloader_num_workers: int = 0
    seed: int = 0
    report_to: str | None = None  # tensorboard, wandb, trackio, ... or all
    tracker_project_name: str = "cxr_diffusers"
    push_to_hub: bool = False  # publish the finished model
    hub_model_id: str | None = None  # USER/NAME; None: the name of output_dir
    hub_private: bool = False

    def __post_init__(self):
        """Raise ValueError for a count below 1 or a rate that is no finite number."""
        counts = "max_steps batch_size save_every validate_every validation_images gradient_accumulation_steps n_critic"
        for name in counts.split():
            if getattr(self, name, 1) < 1:
                raise ValueError(f"train.{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"train.learning_rate: expected a finite number of 0 or more, got {self.learning_rate}")
        for name in ("dataloader_num_workers", "checkpoints_total_limit", "lr_warmup_steps"):
            if getattr(self, name, 0) < 0:
                raise ValueError(f"train.{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass
class TrainConfig(RunConfig):
    """How a UNet or a classifier is trained; the `train:` section of its recipe."""

    gradient_accumulation_steps: int = 1
    lr_scheduler: str = "constant_with_warmup"  # a name of diffusers.optimization.get_scheduler
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    ema_width: float | None = None  # relative width of a power-function average in place of `ema_decay`, e.g. 0.1
    balance: bool = False  # draw every (class, view), and the images without a class, equally often
    validation_loss_images: int = 0  # so many validation images give a loss with fixed noise; the best model is kept
    max_grad_norm: float = 1.0
    p_uncond: float = 0.1  # how often a label is dropped; 0 trains no null label
    snr_gamma: float | None = None  # min-SNR weighting; 5 is the paper's
    logit_normal: list | None = None  # [mean, std] of logit(t / T) of the training timesteps; None: uniform
    vlb_weight: float = 1.0  # of the variational bound, for models with learned variance
    init_from: str | None = None  # a pipeline folder or Hub name whose weights of the same part the run starts from


@dataclass
class Recipe:
    """One result: what it is learned from, by which model, and how."""

    data: dict  # `name` of a loader in cxr_diffusers.data, and its keyword arguments
    unet: dict  # keyword arguments of diffusers.UNet2DModel
    scheduler: dict  # keyword arguments of diffusers.DDIMScheduler
    train: TrainConfig
    images: dict = field(default_factory=dict)  # scaling, aspect, data_range: of prepare_image, kept by the pipeline
    validation: dict = field(default_factory=dict)  # keys of `data` that differ for the pictures shown while training
    conditions: dict = field(default_factory=dict)  # `views`, e.g. [PA, AP]: the network is told the view too
    pipeline: dict = field(default_factory=dict)  # the pipeline's `settings`: defaults of its call

    def identity(self):
        """What makes a run this run and no other, apart from `train`: a run resumes only where it is the same."""
        data = {key: value for key, value in self.data.items() if key != "root"}  # a disk may be mounted elsewhere
        conditions = {"conditions": self.conditions} if self.conditions else {}
        return {"data": data, "unet": self.unet, "scheduler": self.scheduler, "images": self.images, **conditions}


@dataclass
class AdversarialConfig(RunConfig):
    """How two players are trained against each other; the `train:` section of a recipe with a generator.

    `max_steps` are updates of the critic, `learning_rate` is of both, and `mixed_precision` is no or bf16.
    """

    ema_decay: float = 0.999  # of the generator, per update of it
    n_critic: int = 5  # the generator is updated once in so many steps
    lr_decay_steps: int = 0  # over the last so many steps the rate falls linearly to 0
    adam_betas: list = field(default_factory=lambda: [0.5, 0.999])
    lambda_cls: float = 1.0  # domain classification
    lambda_rec: float = 10.0  # cycle consistency
    lambda_id: float = 10.0  # conditional identity
    lambda_gp: float = 10.0  # gradient penalty


@dataclass
class AdversarialRecipe:
    """One result of two players: what it is learned from, by which generator and discriminator, and how."""

    data: dict  # `name` of a loader in cxr_diffusers.data, and its keyword arguments
    generator: dict  # keyword arguments of models.fixed_point_gan.FixedPointGenerator
    discriminator: dict  # keyword arguments of FixedPointDiscriminator; size, channels, classes are the generator's
    train: AdversarialConfig
    images: dict = field(default_factory=dict)  # scaling, aspect: of prepare_image, kept by the pipeline
    validation: dict = field(default_factory=dict)  # keys of `data` that differ for the pictures shown while training
    pipeline: dict = field(default_factory=dict)  # the pipeline's `settings`: defaults of its call

    def identity(self):
        """As `Recipe.identity`."""
        data = {key: value for key, value in self.data.items() if key != "root"}
        players = {"generator": self.generator, "discriminator": self.discriminator}
        return {"data": data, **players, "images": self.images}


@dataclass
class ClassifierRecipe:
    """A classifier: of noised pictures, to guide a diffusion model with, or of pictures as they are."""

    data: dict  # `name` of a loader in cxr_diffusers.data, and its keyword arguments
    # of NoisyClassifier; with `architecture: pyramid`, of PyramidClassifier; with a `model_type`, of that transformers
    # config (resnet, convnext, ...)
    classifier: dict
    train: TrainConfig
    diffusion: dict = field(default_factory=dict)  # `model`: folder or Hub name of the pipeline that is to be guided
    images: dict = field(default_factory=dict)  # size, scaling, aspect of the pictures, where there is no `diffusion`
    loss: dict = field(default_factory=dict)  # label_smoothing, balanced (classes weigh the same), likewise
    validation: dict = field(default_factory=dict)  # keys of `data` that differ for the images measured while training
    pipeline: dict = field(default_factory=dict)  # the pipeline's `settings`: defaults of its call

    def identity(self):
        """As `Recipe.identity`."""
        data = {key: value for key, value in self.data.items() if key != "root"}
        parts = {"classifier": self.classifier, "diffusion": self.diffusion, "images": self.images}
        return {"data": data, **parts, "loss": self.loss or None}  # as in the runs of before there was such a section


@dataclass
class SegmenterRecipe:
    """A lung segmenter, learned from lung masks."""

    data: dict  # `name` of a loader in cxr_diffusers.data that yields masks, and its keyword arguments
    segmenter: dict  # keyword arguments of LungSegmenter
    train: TrainConfig  # whose `augment` are keyword arguments of training.lungs.augment_lungs
    images: dict = field(default_factory=dict)  # aspect: of prepare_image
    validation: dict = field(default_factory=dict)  # keys of `data` that differ for the images measured while training

    def identity(self):
        """As `Recipe.identity`."""
        data = {key: value for key, value in self.data.items() if key != "root"}
        return {"data": data, "segmenter": self.segmenter, "images": self.images}


# a section that only one kind of recipe has -> the kind, and that of its `train:`
KINDS = {
    "generator": (AdversarialRecipe, AdversarialConfig),
    "classifier": (ClassifierRecipe, TrainConfig),
    "segmenter": (SegmenterRecipe, TrainConfig),
}


RENAMES = ("data.name=", "--data.name=")


def load_recipe(path, overrides=()):
    """Read a recipe: a `Recipe`, or the kind of `KINDS` whose section it has.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings, as given on the command line; the value is read as YAML, a deeper key
            (`train.augment.degrees=3`) reaches inside. Another `data.name` than the file's empties `data` and
            `validation` first: their keys were another loader's.

    Raises:
        ValueError: an unknown section or key (named, with the known ones), a value of the wrong type, or a value still
            `???`, which means "yours to give".
    """
    sections = read_sections(path, Recipe)
    for section, values in sections.items():
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"{path}: expected {section} to be a section of key: value lines, got {values!r}")
    for override in sorted(overrides, key=lambda override: not override.startswith(RENAMES)):
        before = (sections.get("data") or {}).get("name")
        override_value(sections, override)
        if override.startswith(RENAMES) and sections["data"]["name"] != before:
            sections["data"], sections["validation"] = {"name": sections["data"]["name"]}, {}
    for section, values in sections.items():
        for key, value in (values or {}).items():
            if value == "???":
                raise ValueError(f"{path}: give {section}.{key}, for example: {section}.{key}=/data/CheXpert-v1.0")
    kind, config = next((KINDS[section] for section in sections if section in KINDS), (Recipe, TrainConfig))
    if isinstance(sections.get("train"), dict):
        sections["train"] = build(config, sections["train"], f"{path}: train")
    return build(kind, sections, str(path))


def parse_command_line(arguments, default_recipe, kind=Recipe):
    """[RECIPE.yaml] [section.key=value ...] [--train_field[=value] ...] -> a recipe of `kind`, else ValueError.

    `--name value`, `--name=value` and a bare `--name` (true) set `train.name`, as in diffusers' own training scripts.
    """
    arguments = list(arguments)
    path = arguments.pop(0) if arguments and arguments[0].endswith((".yaml", ".yml")) else default_recipe
    if not Path(path).is_file():
        raise ValueError(f"expected a recipe file, got {path}: see configs/")
    overrides = []
    while arguments:
        argument = arguments.pop(0)
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if not equals:
                value = (
                    arguments.pop(0)
                    if arguments and not arguments[0].startswith("--") and "=" not in arguments[0]
                    else "true"
                )
            argument = f"{name if '.' in name else 'train.' + name}={value}"
        overrides.append(argument)
    recipe = load_recipe(path, overrides)
    if not isinstance(recipe, kind):
        sections = [f.name for f in fields(kind)]
        raise ValueError(f"{path}: expected a recipe with the sections {sections}, got another script's")
    return recipe
