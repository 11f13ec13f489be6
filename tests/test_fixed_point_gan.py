"""Fixed-Point GAN: generator, discriminator, pipeline, and the reach of its conditioning."""

import pytest
import torch

from cxr_diffusers import FixedPointDiscriminator, FixedPointGANPipeline, FixedPointGenerator
from helpers import toy_generator

FAST = dict(output_type="pt")


@pytest.fixture
def pipeline():
    pipeline = FixedPointGANPipeline(toy_generator(), ["healthy", "pleural effusion"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def x(images):
    return images * 2 - 1


def count(model):
    return sum(p.numel() for p in model.parameters())


# the players


def test_generator_and_discriminator_have_as_many_weights_as_the_original():
    with torch.device("meta"):
        generator = FixedPointGenerator(256, 3, 2, base_channels=128, num_res_blocks=14, conditioning="concatenate")
        assert count(generator) == 71_384_576
        assert count(FixedPointDiscriminator(256, 3, 2)) == 44_786_624


@torch.no_grad()
def label_effect(generator, size=64, border=3):
    """How far the first norm's answer to one image differs between two labels: (at the border, in the interior)."""
    image = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = []
    hook = generator.norm_in.register_forward_hook(lambda module, args, output: seen.append(output))
    for label in (0, 1):
        generator(image, torch.tensor([label]))
    hook.remove()
    changed = (seen[0] - seen[1]).abs().mean(dim=(0, 1))
    interior = torch.zeros(size, size, dtype=torch.bool)
    interior[border:-border, border:-border] = True
    return changed[~interior].mean().item(), changed[interior].mean().item()


def test_a_constant_label_map_cancels_in_the_first_instance_norm_but_near_the_border():
    border, interior = label_effect(toy_generator(sample_size=64, base_channels=16, conditioning="concatenate"))
    assert border > 0.1 and interior < border / 5


def test_with_running_statistics_it_does_not_cancel():
    generator = toy_generator(sample_size=64, base_channels=16, conditioning="concatenate", use_running_statistics=True)
    border, interior = label_effect(generator)
    assert interior > border / 2 > 0.01


def test_a_conditional_norm_reaches_the_interior():
    border, interior = label_effect(toy_generator(sample_size=64, base_channels=16, conditioning="norm"))
    assert interior > 0.05 and interior == pytest.approx(border, rel=0.5)


@pytest.mark.parametrize("conditioning", ["concatenate", "norm"])
def test_ids_and_vectors_of_classes_are_the_same_labels(x, conditioning):
    generator = toy_generator(conditioning=conditioning)
    ids = torch.tensor([1, 0])
    with torch.no_grad():
        by_id = generator(x, ids)
        by_vector = generator(x, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert torch.equal(by_id.sample, by_vector.sample)
    assert not torch.allclose(by_id.sample, generator(x, 1 - ids).sample)
    torch.testing.assert_close(by_id.sample, (x + by_id.residual).tanh())


def test_a_clipping_generator_starts_as_the_identity(x):
    generator = toy_generator(squash="clip")
    assert torch.equal(generator(x, torch.tensor([0, 1])).sample, x)
    torch.nn.init.normal_(generator.conv_out.weight, std=2.0)
    changed = generator(x, torch.tensor([0, 1])).sample
    assert changed.min() == -1 and changed.max() == 1


def test_each_image_is_normalised_by_itself_without_running_statistics(x):
    labels = torch.tensor([0, 1])
    for wanted in (False, True):
        generator = toy_generator(use_running_statistics=wanted)
        with torch.no_grad():
            same = torch.allclose(generator(x, labels).sample, generator.train()(x, labels).sample)
        assert same is not wanted


def test_the_critic_scores_patches_and_classifies_the_image(x):
    output = FixedPointDiscriminator(16, 1, 3, base_channels=4, num_layers=2)(x)
    assert output.score.shape == (2, 1, 4, 4) and output.logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: toy_generator(sample_size=30), "4 divides"),
        (lambda: toy_generator(conditioning="film"), "conditioning"),
        (lambda: toy_generator(squash="sigmoid"), "squash"),
        (lambda: toy_generator(num_classes=0), "at least one class"),
        (lambda: FixedPointDiscriminator(48, 1, 2, num_layers=5), "2 \\*\\* 5"),
        (lambda: toy_generator()(torch.zeros(2, 1, 16, 16), torch.zeros(2, 3)), r"\(2, 3\)"),
    ],
)
def test_an_invalid_configuration_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# the pipeline; what all have in common is in test_contract.py


def test_the_map_is_the_difference(pipeline, images):
    output = pipeline(images, **FAST)
    torch.testing.assert_close(output.anomaly_map, (output.image - output.counterfactual).abs()[:, 0])


def test_labels_can_be_names_and_have_an_effect(pipeline, images):
    healthy, ill = (pipeline(images, target_label=name, **FAST) for name in ("healthy", "pleural effusion"))
    assert torch.equal(healthy.counterfactual, pipeline(images, target_label=0, **FAST).counterfactual)
    assert not torch.allclose(healthy.counterfactual, ill.counterfactual)


def test_bright_and_dark_are_the_two_halves_and_the_caller_overrides_the_checkpoints_settings(images):
    pipeline = FixedPointGANPipeline(toy_generator(), settings={"direction": "bright", "smoothing": 1.0})
    maps = {d: pipeline(images, direction=d, smoothing=0.0, **FAST).anomaly_map for d in ("bright", "dark", "both")}
    torch.testing.assert_close(maps["bright"] + maps["dark"], maps["both"])
    assert torch.equal(
        pipeline(images, **FAST).anomaly_map,
        pipeline(images, direction="bright", smoothing=1.0, **FAST).anomaly_map,
    )
    assert not torch.equal(pipeline(images, **FAST).anomaly_map, maps["bright"])


def test_four_channels_make_one_map(x):
    pipeline = FixedPointGANPipeline(toy_generator(in_channels=4))
    assert pipeline(torch.rand(1, 4, 16, 16), **FAST).anomaly_map.shape == (1, 16, 16)


def test_half_precision_gives_nearly_the_same_map(images):
    maps = [
        FixedPointGANPipeline(toy_generator().to(dtype))(images, **FAST).anomaly_map for dtype in (None, torch.half)
    ]
    torch.testing.assert_close(maps[0], maps[1], atol=5e-3, rtol=0)
    assert maps[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(target_label=2), r"0\.\.1, 'healthy'"),
        (dict(target_label="null"), "target_label"),
        (dict(direction="up"), "both, bright or dark"),
        (dict(smoothing=-1), "0 or more"),
        (dict(output_type="latent"), "pil, np or pt"),
    ],
)
def test_an_invalid_argument_is_refused_with_the_expected_value(pipeline, images, wrong, message):
    with pytest.raises(ValueError, match=message):
        pipeline(images, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(class_names=["healthy"]), "2 class names"),
        (dict(data_range=[0, 1]), "data_range"),
        (dict(settings={"noise_level": 500}), "direction.*smoothing.*noise_level"),
    ],
)
def test_an_invalid_pipeline_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        FixedPointGANPipeline(toy_generator(), **wrong)
