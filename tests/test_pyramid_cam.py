"""A classifier with a feature pyramid: its maps, its pool, its answer as an anomaly method, and that it learns."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from cxr_diffusers import PyramidCAMPipeline, load_phantom
from cxr_diffusers.training.tensors import TensorImages
from helpers import toy_pyramid

ROOT = Path(__file__).parent.parent
CLASSES = ["healthy", "effusion", "other"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_classifier", ROOT / "training" / "train_classifier.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_maps_are_a_quarter_of_the_image_and_those_of_healthy_are_zero(images):
    for levels in ((8, 8), (8, 8, 16), (8, 8, 16, 16)):
        output = toy_pyramid(3, block_out_channels=levels)(images)
        assert output.maps.shape == (2, 3, 4, 4) and output.logits.shape == (2, 3)
        assert (output.maps[:, 0] == 0).all() and output.maps[:, 1:].std() > 0
        torch.testing.assert_close(output.logits[:, 0], torch.zeros(2), atol=1e-6, rtol=0)


def test_the_pool_lies_between_the_mean_and_the_maximum_and_sharpness_leads_from_one_to_the_other():
    maps = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, highest = maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))
    pooled = [toy_pyramid(sharpness=r).pool(maps) for r in (0.001, 4.0, 1000.0)]
    torch.testing.assert_close(pooled[0], mean, atol=1e-2, rtol=0)
    assert (mean < pooled[1]).all() and (pooled[1] < highest).all()
    torch.testing.assert_close(pooled[2], highest, atol=1e-2, rtol=0)


def test_map_and_image_are_aligned():
    """Of a change in one corner, the map changes most in that corner."""
    model = toy_pyramid(sample_size=64)
    x = torch.zeros(1, 1, 64, 64)
    changed = x.clone()
    changed[:, :, :12, 48:] = torch.rand(12, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        change = (model(changed).maps - model(x).maps)[0, 1].abs()
    row, column = divmod(int(change.argmax()), 16)
    assert change.max() > 0 and row < 5 and column > 10


def test_every_weight_has_a_gradient_and_nothing_is_a_running_statistic(images):
    """So the average of the weights (EMA) is the whole of the averaged model."""
    model = toy_pyramid(3).train()
    model(images).logits.logsumexp(dim=1).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not list(model.buffers())


def test_under_bfloat16_the_output_is_float32_and_nearly_the_same(images):
    model = toy_pyramid(3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
    assert output.logits.dtype == output.maps.dtype == torch.float32
    torch.testing.assert_close(output.logits, model(images).logits, atol=0.1, rtol=0)


def test_the_map_is_the_probability_of_each_place_and_the_score_the_classifiers(images):
    pipeline = PyramidCAMPipeline(toy_pyramid(3), CLASSES)
    answer = pipeline(images, output_type="pt")
    with torch.no_grad():
        output = pipeline.classifier(2 * images - 1)
    torch.testing.assert_close(answer.anomaly_score, 1 - output.logits.softmax(dim=1)[:, 0])
    evidence, _ = pipeline.explain(2 * images - 1)
    torch.testing.assert_close(evidence.sigmoid(), 1 - output.maps.softmax(dim=1)[:, 0])
    assert (answer.counterfactual == answer.image).all()
    low, high = evidence.sigmoid().amin(), evidence.sigmoid().amax()
    assert low <= answer.anomaly_map.min() and answer.anomaly_map.max() <= high, "enlarged, not stretched"


def test_one_class_can_be_mapped_instead_of_all_that_is_not_healthy(images):
    pipeline = PyramidCAMPipeline(toy_pyramid(3), CLASSES)
    maps = [pipeline(images, explained_label=k, output_type="pt").anomaly_map for k in (None, "effusion", 2)]
    assert all((a - b).abs().max() > 1e-5 for a, b in ((maps[0], maps[1]), (maps[1], maps[2])))
    by_name, by_id = (pipeline(images, target_label=k, output_type="pt") for k in ("other", 2))
    assert torch.equal(by_name.anomaly_map, by_id.anomaly_map) and torch.equal(
        by_name.anomaly_score, by_id.anomaly_score
    )
    with pytest.raises(ValueError, match="expected `explained_label`"):
        pipeline(images, explained_label="pneumonia")
    with pytest.raises(ValueError, match="expected an `explained_label` other than class 0"):
        pipeline(images, explained_label="healthy")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sample_size": 20}, "that 8 divides"),
        ({"block_out_channels": (8,)}, "two levels or more"),
        ({"sharpness": 0.0}, "expected a `sharpness` above 0"),
    ],
)
def test_an_invalid_configuration_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        toy_pyramid(**wrong)


def test_pyramid_cam_learns_the_lesion_from_image_labels_alone():
    """Phantoms of both classes at 32 px, a few steps: the loss falls, and the map is higher inside the lesions."""
    data = load_phantom(n=64, seed=0, size=32)
    tensors = TensorImages(data, 32)
    x, labels = tensors.cache, tensors.labels
    model = toy_pyramid(sample_size=32, block_out_channels=(8, 16, 16)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(60):
        batch = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:32]
        loss = torch.nn.functional.cross_entropy(model(x[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    diseased = data.filter(lambda label: label > 0, input_columns="label")
    maps = PyramidCAMPipeline(model.eval(), scaling="minmax")(diseased["image"][:], output_type="pt").anomaly_map
    masks = TensorImages(diseased.remove_columns("image").rename_column("mask", "image"), 32, "dtype").cache[:, 0] > 0
    assert maps[masks].mean() > maps[~masks].mean() + 0.1


SHORT = ["data.n=24", "validation.n=12", "train.batch_size=4", "train.max_steps=2", "train.save_every=1"]


def write_recipe(tmp_path, **sections):
    recipe = {
        "data": {"name": "phantom", "seed": 0, "size": 32},
        "validation": {"seed": 1},
        "images": {"size": 32, "scaling": "minmax", "aspect": "pad"},
        "classifier": {
            "architecture": "pyramid",
            "block_out_channels": [8, 8],
            "decoder_channels": 8,
            "attention_head_dim": 8,
            "norm_num_groups": 4,
        },
        "loss": {"balanced": True, "label_smoothing": 0.1},
        "train": {"output_dir": str(tmp_path / "run")},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**recipe, **sections}))
    return str(path)


def test_the_training_program_ends_in_a_pipeline(script, tmp_path):
    script.main([write_recipe(tmp_path), *SHORT])
    script.main([write_recipe(tmp_path), *SHORT, "train.max_steps=3"])  # resumes
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    pipeline = PyramidCAMPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.class_names == ["healthy", "pleural effusion"]
    assert pipeline(load_phantom(n=2, seed=3)["image"][:], output_type="pt").anomaly_map.shape == (2, 32, 32)


def test_classes_weigh_the_same_in_a_balanced_loss(script, tmp_path):
    """Of logits that are the same for all, the loss of a class counts by its weight, not by how often it comes."""
    recipe = script.parse_command_line([write_recipe(tmp_path)], None, script.ClassifierRecipe)
    labels = [0] * 6 + [1] * 2
    task = script.task_of(recipe)(recipe, ["healthy", "effusion"], labels)
    task.label_smoothing = 0.0
    images, labels = torch.rand(8, 1, 32, 32), torch.tensor(labels)
    loss, _ = task.loss(task.model.eval(), images, labels)
    each = -task.model(images).logits.log_softmax(dim=1)[range(8), labels]
    torch.testing.assert_close(loss, (each[:6].mean() + each[6:].mean()) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("classifier.architecture=transformer", "expected `classifier.architecture` pyramid"),
        ("loss.focal=2", "loss: expected some of balanced, label_smoothing, got .'focal'."),
        ("diffusion.model=default", "no diffusion section"),
        ("images.size=null", "expected images.size"),
    ],
)
def test_an_invalid_recipe_is_refused(script, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        script.main([write_recipe(tmp_path), *SHORT, change])
