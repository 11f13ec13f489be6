"""Recipes: what is a key, and what is an error."""

import pytest
import torch
import yaml

from cxr_diffusers.training.recipe import Recipe, load_recipe, parse_command_line
from helpers import TOY_UNET

MINIMAL = {
    "data": {"name": "phantom", "root": "???"},
    "unet": {"num_class_embeds": 3},
    "scheduler": {},
    "train": {"output_dir": "runs/x", "lr_warmup_steps": 5},
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_overrides_reach_into_sections(path):
    recipe = load_recipe(
        path, ["data.root=/data", "train.batch_size=8", "train.augment.degrees=3", "pipeline.noise_level=9"]
    )
    assert recipe.data["root"] == "/data" and recipe.train.batch_size == 8
    assert recipe.train.augment == {"degrees": 3} and recipe.pipeline == {"noise_level": 9}


def test_another_loader_does_not_inherit_the_keys_of_the_one_before(path):
    path.write_text(yaml.safe_dump({**MINIMAL, "validation": {"seed": 1}}))
    recipe = load_recipe(path, ["validation.split=test", "data.path=me/x", "data.name=hub"])
    assert recipe.data == {"name": "hub", "path": "me/x"} and recipe.validation == {"split": "test"}
    recipe = load_recipe(path, ["data.name=phantom", "data.root=/data"])
    assert recipe.data == {"name": "phantom", "root": "/data"} and recipe.validation == {"seed": 1}


def test_a_whole_number_will_do_for_a_float(path):
    assert load_recipe(path, ["data.root=/data", "train.learning_rate=1"]).train.learning_rate == 1.0


def test_numbers_may_be_written_with_an_exponent_on_the_command_line_and_in_files(path):
    assert load_recipe(path, ["data.root=/data", "train.learning_rate=1e-3"]).train.learning_rate == 1e-3
    path.write_text(path.read_text().replace("train:\n", "train:\n  learning_rate: 2E-4\n"))
    recipe = load_recipe(path, ["data.root=/data", "unet.norm_eps=-1e+2", "data.view=e3", "data.day=1e"])
    assert recipe.train.learning_rate == 2e-4
    assert (recipe.unet["norm_eps"], recipe.data["view"], recipe.data["day"]) == (-100.0, "e3", "1e")


def test_mixed_precision_no_is_a_word(path):
    assert load_recipe(path, ["data.root=/data", "train.mixed_precision=no"]).train.mixed_precision == "no"
    path.write_text(path.read_text().replace("train:\n", "train:\n  mixed_precision: no\n"))
    assert load_recipe(path, ["data.root=/data"]).train.mixed_precision == "no"
    assert load_recipe(path, ["data.root=/data", "train.mixed_precision=null"]).train.mixed_precision is None


@pytest.mark.parametrize("section", ["data", "unet", "scheduler", "train", "pipeline"])
@pytest.mark.parametrize("values", [3, [1, 2], "text"])
def test_a_section_that_is_no_dict_is_named(path, section, values):
    path.write_text(yaml.safe_dump({**MINIMAL, section: values}))
    with pytest.raises(ValueError, match=f"expected {section} to be a section"):
        load_recipe(path, ["data.root=/data"] if section != "data" else [])


@pytest.mark.parametrize("section", ["data", "unet", "scheduler", "train"])
def test_an_empty_section_is_named(path, section):
    path.write_text(yaml.safe_dump({**MINIMAL, section: None}))
    with pytest.raises(ValueError, match=f"{section}: expected dict, got None"):
        load_recipe(path, ["data.root=/data"] if section != "data" else [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=8", "unknown key 'batchsize'.*batch_size"),
        ("training.batch_size=8", "unknown key 'training'.*train"),
        ("train.learning_rate=fast", ": expected float, got 'fast'"),
        ("train.learning_rate=.nan", "learning_rate: expected a finite number, got nan"),
        ("train.learning_rate=nan", "learning_rate: expected a finite number, got nan"),
        ("train.max_steps=many", "max_steps: expected int, got 'many'"),
        ("scheduler.beta_schedule=foo", "expected linear or scaled_linear or squaredcos_cap_v2, got 'foo'"),
        ("train.mixed_precision=fp8", ": expected no or fp16 or bf16 or auto, got 'fp8'"),
        ("train.output_dir=no", ": expected str, got False.*quote it"),
        ("train.lr_scheduler=constant", "train.lr_warmup_steps: expected 0 with the schedule constant, got 5"),
        ("conditions.view=[PA]", "conditions: expected some of views, got .'view'."),
        ("train.max_steps=0", "train.max_steps: expected 1 or more, got 0"),
        ("train.batch_size=-4", "train.batch_size: expected 1 or more, got -4"),
        ("train.augment=3", ": expected dict or NoneType, got 3"),
        ("train.seed=[1,", "YAML value in .train.seed=.1,., got while parsing"),
        ("train.batch_size=2.5", ": expected int"),
        ("train.push_to_hub=1", ": expected bool"),
        ("data.seed.deep=3", None),
        ("batch_size=8", "section.key=value"),
        ("train.seed", "section.key=value"),
    ],
)
def test_a_wrong_key_or_value_is_named(path, override, message):
    if message is None:
        assert load_recipe(path, ["data.root=/d", override]).data["seed"] == {"deep": 3}
        return
    with pytest.raises(ValueError, match=message):
        load_recipe(path, ["data.root=/data", override])


def test_a_missing_required_value_is_an_error_that_names_it(path):
    with pytest.raises(ValueError, match="give data.root"):
        load_recipe(path)


def test_the_output_folder_is_needed(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**MINIMAL, "data": {}, "train": {}}))
    with pytest.raises(ValueError, match="output_dir"):
        load_recipe(tmp_path / "r.yaml")


def test_options_in_the_style_of_diffusers_are_train_keys(path):
    line = [
        str(path),
        "data.root=/data",
        "--push_to_hub",
        "--hub_model_id",
        "me/model",
        "--max_steps=7",
        "train.seed=3",
    ]
    recipe = parse_command_line(line, "unused.yaml", Recipe)
    assert recipe.train.push_to_hub is True and recipe.train.hub_model_id == "me/model"
    assert recipe.train.max_steps == 7 and recipe.train.seed == 3


def test_without_a_recipe_the_default_is_taken(path):
    assert parse_command_line(["data.root=/d"], path, Recipe).train.output_dir == "runs/x"
    with pytest.raises(FileNotFoundError, match="phantom_cfg_32.*nowhere.yaml"):
        parse_command_line([], "nowhere.yaml", Recipe)


def test_the_toy_of_these_tests_is_a_unet():
    from diffusers import UNet2DModel

    with torch.device("meta"):
        assert UNet2DModel(**TOY_UNET).config.num_class_embeds == 3
