"""Every recipe builds."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from transformers import AutoConfig, AutoModelForImageClassification

from cxr_diffusers import CFGAnomalyPipeline, ClassifierGuidedPipeline, GradCAMPipeline, NoisyClassifier
from cxr_diffusers.data import LOADERS
from cxr_diffusers.recipe import ClassifierRecipe, Recipe, load_recipe

ROOT = Path(__file__).parent.parent
PLANS = {"evaluate"}  # what is compared on what: see test_plan.py
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem not in PLANS]


def open_recipe(path):
    return load_recipe(path, ["data.root=/nowhere"] if 'root: "???"' in path.read_text() else [])


def test_there_are_recipes_of_every_kind():
    assert {"chexpert_cfg_256", "cxr_cfg_64", "phantom_cfg_32"} <= {path.stem for path in CONFIGS}
    assert {type(open_recipe(path)) for path in CONFIGS} >= {Recipe, ClassifierRecipe}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_builds(path):
    recipe = open_recipe(path)
    script, settings = BUILD[type(recipe)](recipe)
    assert recipe.data["name"] in LOADERS
    assert set(recipe.pipeline) <= set(settings)
    assert recipe.train.output_dir == f"runs/{path.stem}"
    assert f"accelerate launch training/{script}" in path.read_text()


def build_unet(recipe):
    with torch.device("meta"):
        unet = UNet2DModel(**recipe.unet)
    assert DDIMScheduler(**recipe.scheduler).config.clip_sample is False, "clipping breaks inversion"
    script = "train_unconditional.py" if unet.class_embedding is None else "train_cfg.py"
    return script, CFGAnomalyPipeline.ORIGINAL_SETTINGS


def build_classifier(recipe):
    if "model_type" in recipe.classifier:
        with torch.device("meta"):
            AutoModelForImageClassification.from_config(AutoConfig.for_model(**recipe.classifier))
        assert recipe.images["size"] and not recipe.diffusion
        return "train_classifier.py", GradCAMPipeline.ORIGINAL_SETTINGS
    guided = recipe.diffusion["model"]
    # the shipped model, or the run of another recipe
    size = open_recipe(ROOT / "configs" / f"{'cxr_cfg_64' if guided == 'default' else Path(guided).name}.yaml")
    size = size.unet["sample_size"]
    with torch.device("meta"):
        NoisyClassifier(sample_size=size, **recipe.classifier)
    return "train_classifier.py", ClassifierGuidedPipeline.ORIGINAL_SETTINGS


# a kind of recipe -> function(recipe) that builds its models and answers with (script, the settings of its pipeline)
BUILD = {Recipe: build_unet, ClassifierRecipe: build_classifier}


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
