"""p(label | x_t, t): the model, its loss, and what training it leaves."""

import pytest
import torch
from diffusers import DDIMScheduler

from cxr_diffusers import NoisyClassifier
from cxr_diffusers.training.losses import noisy_classification_loss, spread_timesteps
from helpers import TOY_CLASSIFIER, toy_classifier


@pytest.mark.parametrize("pool", ["attention", "adaptive"])
def test_logits_for_one_timestep_or_one_for_each_image(pool):
    classifier, x = toy_classifier(pool=pool, num_classes=3), torch.randn(2, 1, 16, 16)
    logits = classifier(x, 500)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(classifier(x, torch.tensor([500, 500])), logits)
    assert (classifier(x, torch.tensor([500, 100]))[1] - logits[1]).abs().max() > 1e-4, "it knows the noise level"


def test_an_image_is_classified_independently_of_its_batch():
    classifier, x = toy_classifier(), torch.randn(3, 1, 16, 16)
    t = torch.tensor([10, 500, 900])
    single = torch.cat([classifier(x[i : i + 1], t[i]) for i in range(3)])
    torch.testing.assert_close(classifier(x, t), single, atol=1e-5, rtol=1e-5)


def test_the_attention_pool_depends_on_the_position_and_the_mean_does_not():
    x = torch.randn(1, 16, 8, 8)
    for pool, moved in (("attention", True), ("adaptive", False)):
        head = toy_classifier(pool=pool).head
        assert bool((head(x) - head(x.roll(3, dims=2))).abs().max() > 1e-5) is moved


def test_the_recipe_of_wolleb_et_al_has_as_many_parameters_as_theirs():
    channels, blocks = (32, 32, 64, 64, 128, 128), ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3
    options = dict(block_out_channels=channels, down_block_types=blocks, layers_per_block=4, attention_head_dim=64)
    with torch.device("meta"):
        classifier = NoisyClassifier(sample_size=256, **options)
    assert sum(p.numel() for p in classifier.parameters()) == 5_452_098


def test_a_saved_classifier_is_the_same_when_loaded(tmp_path):
    classifier, x = toy_classifier(num_classes=3), torch.randn(1, 1, 16, 16)
    classifier.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    torch.testing.assert_close(NoisyClassifier.from_pretrained(tmp_path)(x, 7), classifier(x, 7))


@pytest.mark.parametrize(("wrong", "message"), [(dict(pool="spatial"), "spatial"), (dict(sample_size=15), "15")])
def test_an_invalid_configuration_is_refused(wrong, message):
    with pytest.raises(ValueError, match=f"expected .*got '?{message}"):
        NoisyClassifier(**{**TOY_CLASSIFIER, **wrong})


def test_the_loss_is_cross_entropy_on_noised_images_and_accuracy_is_counted_by_quarter():
    seen = []

    def oracle(x, t):
        seen.append((x, t))
        right = torch.where(t[:, None] < 500, torch.tensor([[9.0, -9.0]]), torch.tensor([[-9.0, 9.0]]))
        return right

    images, labels = torch.zeros(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64)
    scheduler = DDIMScheduler()
    loss, accuracy = noisy_classification_loss(oracle, scheduler, images, labels)
    assert loss.item() == pytest.approx(9, abs=0.01)  # half of them wrong by 18
    assert [accuracy[f"accuracy_q{q}"].item() for q in (1, 2, 3, 4)] == [1, 1, 0, 0]
    x, t = seen[0]
    expected = (1 - scheduler.alphas_cumprod[t]) ** 0.5
    assert ((x.flatten(1).std(dim=1) / expected - 1).abs() < 0.35).all(), "noise of each image's own level"


def test_spread_timesteps_are_uniform_and_leave_no_part_of_the_chain_out():
    torch.manual_seed(0)
    t = torch.stack([spread_timesteps(10, 1000) for _ in range(2000)])
    assert (t.sort(dim=1).values // 100 == torch.arange(10)).all()
    assert t.min() >= 0 and t.max() <= 999
    assert (t.float().mean(dim=0) - 499.5).abs().max() < 25, "each place of the batch sees the whole chain"


def test_training_separates_two_classes_of_noised_images():
    torch.manual_seed(0)
    classifier = toy_classifier().train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    labels = torch.arange(16) % 2
    images = torch.zeros(16, 1, 16, 16) - 0.5
    images[labels == 1, :, 8:] = 0.5
    losses = []
    for _ in range(45):
        loss, _ = noisy_classification_loss(classifier, DDIMScheduler(), images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
