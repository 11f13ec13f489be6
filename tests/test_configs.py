"""Every recipe builds."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from cxr_diffusers.data import LOADERS
from cxr_diffusers.pipelines.pipeline_cfg_anomaly import ORIGINAL_SETTINGS
from cxr_diffusers.recipe import load_recipe

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def open_recipe(path):
    return load_recipe(path, ["data.root=/nowhere"] if 'root: "???"' in path.read_text() else [])


def test_there_are_recipes():
    known = {"chexpert_cfg_256", "cxr_cfg_64", "phantom_cfg_32", "vindr_unconditional_256", "cxr_unconditional_64"}
    assert known <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_builds(path):
    recipe = open_recipe(path)
    with torch.device("meta"):
        unet = UNet2DModel(**recipe.unet)
    scheduler = DDIMScheduler(**recipe.scheduler)
    assert scheduler.config.clip_sample is False, "clipping breaks inversion"
    assert recipe.data["name"] in LOADERS
    assert set(recipe.pipeline) <= set(ORIGINAL_SETTINGS)
    assert recipe.train.output_dir == f"runs/{path.stem}"
    assert (
        f"accelerate launch training/train_{'unconditional' if unet.class_embedding is None else 'cfg'}.py"
        in path.read_text()
    )


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


def test_the_prior_is_the_seeds_model_without_classes():
    names = ("chexpert_cfg_256", "vindr_unconditional_256")
    model, prior = (open_recipe(next(path for path in CONFIGS if path.stem == name)) for name in names)
    with torch.device("meta"):
        unet = UNet2DModel(**prior.unet)
    assert sum(p.numel() for p in unet.parameters()) == 113_669_762
    assert prior.unet == {k: v for k, v in model.unet.items() if k != "num_class_embeds"}
    assert prior.scheduler == model.scheduler and prior.data["splits"] == ["train", "test"]
