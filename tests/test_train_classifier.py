"""training/train_classifier.py: what it leaves, of both kinds, and that it resumes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from cxr_diffusers import ClassifierGuidedPipeline, GradCAMPipeline, load_phantom

ROOT = Path(__file__).parent.parent
SHORT = [
    "data.n=24",
    "validation.n=12",
    "data.size=32",
    "train.batch_size=4",
    "train.max_steps=2",
    "train.save_every=1",
]
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_classifier", ROOT / "training" / "train_classifier.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def guided(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "guided")
    small = ["classifier.block_out_channels=[8, 16]", "classifier.norm_num_groups=4", "classifier.attention_head_dim=8"]
    small += ["classifier.down_block_types=[ResnetDownsampleBlock2D, AttnDownBlock2D]"]
    return [*SHORT, *small, f"diffusion.model={tmp_path / 'guided'}", f"train.output_dir={tmp_path / 'run'}"]


def steps(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_classifier_of_noisy_images_ends_around_the_unet_that_it_guides(script, guided, pipeline, tmp_path):
    script.main(guided)
    run = tmp_path / "run"
    script.main([*guided, "train.max_steps=3"])  # resumes
    assert [line["step"] for line in steps(run)] == [1, 2, 3]
    assert {f"accuracy_q{q}" for q in (1, 2, 3, 4)} <= set(steps(run)[-1]), "accuracy by quarter of the chain is logged"
    measured = json.loads((run / "validation" / "step-0000003.json").read_text())
    assert measured["noise_level"] == [0, 200, 400, 600, 800]
    assert all(0 <= value <= 1 for name in measured if name != "noise_level" for value in measured[name])
    assert (run / "validation" / "step-0000003.png").is_file()

    opened = ClassifierGuidedPipeline.from_pretrained(run)
    opened.set_progress_bar_config(disable=True)
    assert opened.class_names == ["healthy", "pleural effusion"] and opened.config.data_range == [-1.0, 1.0]
    for ours, theirs in zip(opened.unet.parameters(), pipeline.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    output = opened(load_phantom(n=2, seed=3, size=32)["image"][:], num_inference_steps=5, output_type="pt")
    assert output.anomaly_map.shape == (2, 16, 16) and torch.isfinite(output.anomaly_map).all()


def test_a_classifier_of_images_ends_in_grad_cam(script, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "data": {"name": "phantom", "seed": 0},
                "validation": {"seed": 1},
                "images": {"size": 32, "scaling": "minmax", "aspect": "pad"},
                "classifier": RESNET,
                "train": {"output_dir": str(tmp_path / "run")},
            }
        )
    )
    script.main([str(recipe), *SHORT])
    assert "accuracy" in steps(tmp_path / "run")[-1]
    opened = GradCAMPipeline.from_pretrained(tmp_path / "run")
    assert opened.class_names == ["healthy", "pleural effusion"] and opened.config.sample_size == 32
    assert opened(load_phantom(n=2, seed=3)["image"][:], output_type="pt").anomaly_map.shape == (2, 32, 32)
    with pytest.raises(ValueError, match="images.size"):
        script.main([str(recipe), *SHORT, "images.size=null"])
    with pytest.raises(ValueError, match="classifier: expected keys of a ResNetConfig, got .'hidden_size'."):
        script.main([str(recipe), *SHORT, "classifier.hidden_size=8"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "diffusion.model=runs/not_there",
            "diffusion.model: .*; train one: .*train_cfg.py configs/phantom_cfg_32.yaml",
        ),
        ("diffusion.model=null", "give diffusion.model"),
        ("diffusion.unet=x", "diffusion: expected some of model, got .'unet'."),
        ("data.fraction_healthy=1.0", "more than one class|unknown key"),
        ("classifier.pool=spatial", "expected `pool`"),
        ("images.scaling=window", "expected no `images` for a classifier of noisy images"),
        ("loss.balanced=true", "expected no `loss` for a classifier of noisy images"),
    ],
)
def test_an_invalid_recipe_is_refused_with_the_reason(script, guided, change, message):
    with pytest.raises(ValueError, match=message):
        script.main([*guided, change])


def test_training_starts_from_the_classifier_of_another_model(script, guided, tmp_path):
    script.main(guided)
    still = ["train.learning_rate=0.0", "train.max_steps=1", "train.ema_decay=0.0"]
    again = [f"train.init_from={tmp_path / 'run'}", f"train.output_dir={tmp_path / 'again'}"]
    script.main([*guided, *still, *again])
    before, after = (ClassifierGuidedPipeline.from_pretrained(tmp_path / name) for name in ("run", "again"))
    for ours, theirs in zip(after.classifier.parameters(), before.classifier.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for other in (tmp_path / "guided", "cxr_classifier_128"):  # no classifier, and one of another size
        with pytest.raises(ValueError, match="train.init_from: expected a classifier of this recipe"):
            script.main([*guided, f"train.init_from={other}", f"train.output_dir={tmp_path / 'third'}"])


def test_the_recipe_of_another_script_is_refused(script):
    with pytest.raises(ValueError, match="expected a recipe with the sections .*classifier"):
        script.main([str(ROOT / "configs" / "phantom_cfg_32.yaml")])
