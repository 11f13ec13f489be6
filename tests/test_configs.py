"""Every recipe builds."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, UNet2DModel
from transformers import AutoConfig, AutoModelForImageClassification

from cxr_diffusers import (
    CFGAnomalyPipeline,
    ClassifierGuidedPipeline,
    FixedPointDiscriminator,
    FixedPointGANPipeline,
    FixedPointGenerator,
    GradCAMPipeline,
    LungSegmenter,
    NoisyClassifier,
    PyramidCAMPipeline,
    PyramidClassifier,
)
from cxr_diffusers.data import LOADERS
from cxr_diffusers.training.lungs import augment_lungs
from cxr_diffusers.training.networks import new_unet
from cxr_diffusers.training.recipe import (
    AdversarialRecipe,
    ClassifierRecipe,
    Recipe,
    SegmenterRecipe,
    UnconditionalRecipe,
    load_recipe,
)

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))  # plans/ are evaluations: see test_plan.py


def open_recipe(path):
    sections = yaml.safe_load(path.read_text())
    missing = [name for name in ("data", "validation") if (sections.get(name) or {}).get("root") == "???"]
    return load_recipe(path, [f"{name}.root=/nowhere" for name in missing])


def test_there_are_recipes_of_every_kind():
    required = {
        "chexpert_cfg_256",
        "cxr_cfg_64",
        "phantom_cfg_32",
        "vindr_unconditional_256",
        "cxr_unconditional_64",
    }
    assert required <= {path.stem for path in CONFIGS}
    assert {type(open_recipe(path)) for path in CONFIGS} >= {Recipe, ClassifierRecipe, AdversarialRecipe}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_builds(path):
    recipe = open_recipe(path)
    script, settings = BUILD[type(recipe)](recipe)
    assert recipe.data["name"] in LOADERS
    assert set(getattr(recipe, "pipeline", {})) <= set(settings)
    assert recipe.train.output_dir == f"runs/{path.stem}"
    assert f"accelerate launch training/{script}" in path.read_text()


def build_unet(recipe):
    with torch.device("meta"):
        unet = new_unet(**recipe.unet)
    assert DDIMScheduler(**recipe.scheduler).config.clip_sample is False, "clipping breaks inversion"
    script = "train_unconditional.py" if unet.class_embedding is None else "train_cfg.py"
    return script, CFGAnomalyPipeline.ORIGINAL_SETTINGS


def build_classifier(recipe):
    if recipe.classifier.pop("architecture", None) == "pyramid":
        with torch.device("meta"):
            PyramidClassifier(sample_size=recipe.images["size"], **recipe.classifier)
        return "train_classifier.py", PyramidCAMPipeline.ORIGINAL_SETTINGS
    if "model_type" in recipe.classifier:
        with torch.device("meta"):
            AutoModelForImageClassification.from_config(AutoConfig.for_model(**recipe.classifier))
        assert recipe.images["size"] and not recipe.diffusion
        return "train_classifier.py", GradCAMPipeline.ORIGINAL_SETTINGS
    guided = recipe.diffusion["model"]
    # the run of another recipe
    size = open_recipe(ROOT / "configs" / f"{Path(guided).name}.yaml")
    size = size.unet["sample_size"]
    with torch.device("meta"):
        NoisyClassifier(sample_size=size, **recipe.classifier)
    return "train_classifier.py", ClassifierGuidedPipeline.ORIGINAL_SETTINGS


def build_gan(recipe):
    with torch.device("meta"):
        generator = FixedPointGenerator(**recipe.generator)
        shared = {key: generator.config[key] for key in ("sample_size", "in_channels", "num_classes")}
        FixedPointDiscriminator(**shared, **recipe.discriminator)
    return "train_fixed_point_gan.py", FixedPointGANPipeline.ORIGINAL_SETTINGS


def build_segmenter(recipe):
    with torch.device("meta"):
        LungSegmenter(**recipe.segmenter)
    assert set(recipe.train.augment) <= set(inspect.signature(augment_lungs).parameters)
    return "train_lung_segmenter.py", {}


# a kind of recipe -> function(recipe) that builds its models and answers with (script, the settings of its pipeline)
BUILD = {
    Recipe: build_unet,
    UnconditionalRecipe: build_unet,
    ClassifierRecipe: build_classifier,
    AdversarialRecipe: build_gan,
    SegmenterRecipe: build_segmenter,
}


def test_the_seeds_recipe_is_the_seeds_model():
    """113,998,722 parameters in the original, whose class MLP (128 to 512 to 512) is an embedding table here."""
    path = next(path for path in CONFIGS if path.stem == "chexpert_cfg_256")
    with torch.device("meta"):
        unet = UNet2DModel(**open_recipe(path).unet)
    count = sum(p.numel() for p in unet.parameters())
    class_mlp = 2 * 128 + (128 * 512 + 512) + (512 * 512 + 512)
    assert count - 3 * 512 + class_mlp == 113_998_722
    heads = {module.heads for module in unet.modules() if type(module).__name__ == "Attention"}
    assert heads == {1}


def test_the_seeds_gan_is_the_seeds():
    recipe = open_recipe(next(path for path in CONFIGS if path.stem == "chexpert_fixed_point_gan_256"))
    train = recipe.train
    assert (train.max_steps, train.batch_size, train.learning_rate, train.n_critic) == (50_000, 4, 1e-4, 5)
    assert (train.lambda_cls, train.lambda_gp, train.lambda_id, train.lambda_rec) == (1, 10, 10, 10)
    with torch.device("meta"):
        as_there = {**recipe.generator, "in_channels": 3, "conditioning": "concatenate"}
        generator = FixedPointGenerator(**as_there)
        discriminator = FixedPointDiscriminator(256, 3, 2, **recipe.discriminator)
    assert sum(p.numel() for p in generator.parameters()) == 71_384_576
    assert sum(p.numel() for p in discriminator.parameters()) == 44_786_624


def test_the_prior_is_the_seeds_model_without_classes():
    names = ("chexpert_cfg_256", "vindr_unconditional_256")
    model, prior = (open_recipe(next(path for path in CONFIGS if path.stem == name)) for name in names)
    with torch.device("meta"):
        unet = UNet2DModel(**prior.unet)
    assert sum(p.numel() for p in unet.parameters()) == 113_669_762
    assert prior.unet == {k: v for k, v in model.unet.items() if k != "num_class_embeds"}
    assert prior.scheduler == model.scheduler and prior.data["splits"] == ["train", "test"]
