"""The laws of the objectives."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from cxr_diffusers import denoising_loss
from cxr_diffusers.training.losses import denoising_terms, draw_timesteps, drop_labels, min_snr_weight, normal_kl
from helpers import toy_unet

IMAGES = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.tensor([0, 1, 0, 1])


def test_labels_are_dropped_as_often_as_asked():
    labels = torch.zeros(20_000, dtype=torch.long)
    torch.manual_seed(0)
    assert (drop_labels(labels, 0.0, 2) == 0).all() and (drop_labels(labels, 1.0, 2) == 2).all()
    dropped = (drop_labels(labels, 0.1, 2) == 2).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=0.01)
    kept = drop_labels(torch.arange(2).repeat(500), 0.5, 2)
    assert set(kept[::2].tolist()) == {0, 2} and set(kept[1::2].tolist()) == {1, 2}


def test_a_dropped_label_is_the_last_embedding(scheduler):
    unet = toy_unet()
    with torch.no_grad():
        unet.class_embedding.weight[2] += 1  # only the null label hears of it
        torch.manual_seed(0)
        kept = denoising_loss(unet, scheduler, IMAGES, LABELS, p_uncond=0.0)
        torch.manual_seed(0)
        dropped = denoising_loss(unet, scheduler, IMAGES, LABELS, p_uncond=1.0)
        unet.class_embedding.weight[2] -= 1
        torch.manual_seed(0)
        as_before = denoising_loss(unet, scheduler, IMAGES, LABELS, p_uncond=0.0)
    assert kept == as_before and kept != dropped


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_network_that_knows_the_answer_has_no_loss(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    noise, t = torch.randn(4, 1, 16, 16), torch.tensor([0, 10, 500, 999])
    answer = {"epsilon": noise, "v_prediction": scheduler.get_velocity(IMAGES, noise, t), "sample": IMAGES}

    class Knows(torch.nn.Module):
        def forward(self, x, t, class_labels):
            return type("Output", (), {"sample": answer[prediction_type]})

    terms = denoising_terms(Knows(), scheduler, IMAGES, LABELS, noise, t)
    assert terms["mse"].max() == 0 and "vlb" not in terms


def test_the_bound_is_zero_for_the_true_posterior_and_positive_otherwise():
    scheduler = DDIMScheduler()
    noise, t = torch.randn(4, 1, 16, 16), torch.tensor([1, 10, 500, 999])

    def bound(eps, variance):
        class Says(torch.nn.Module):
            def forward(self, x, t, class_labels):
                return type("Output", (), {"sample": torch.cat([eps, torch.full_like(eps, variance)], dim=1)})

        return denoising_terms(Says(), scheduler, IMAGES, LABELS, noise, t)["vlb"]

    # v = -1 is the posterior variance (of t = 1 too, whose clipped neighbour it is), v = 1 the larger beta
    assert bound(noise, -1.0).abs().max() < 1e-4
    assert (bound(noise, 1.0)[:2] > 1e-3).all()
    assert (bound(noise + 0.1, -1.0) > 0).all()


def test_learned_variance_trains_both_halves_of_the_output(scheduler):
    unet = toy_unet(out_channels=2)
    torch.manual_seed(0)
    denoising_loss(unet, scheduler, IMAGES, LABELS).backward()
    gradient = unet.conv_out.weight.grad.abs().amax(dim=(1, 2, 3))
    assert (gradient > 0).all()
    with pytest.raises(ValueError, match="epsilon"):
        denoising_loss(unet, DDIMScheduler(prediction_type="v_prediction"), IMAGES, LABELS)


def test_kl_of_a_normal_with_itself_is_zero_and_matches_torch_otherwise():
    mean1, log1, mean2, log2 = torch.randn(4, 100)
    assert normal_kl(mean1, log1, mean1, log1).abs().max() < 1e-6
    p, q = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((mean1, log1), (mean2, log2)))
    torch.testing.assert_close(normal_kl(mean1, log1, mean2, log2), torch.distributions.kl_divergence(p, q))


def test_min_snr_weights_are_one_where_the_paper_says():
    t = torch.arange(1000)
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = DDIMScheduler(prediction_type=prediction_type)
        alpha = scheduler.alphas_cumprod.double()
        snr = alpha / (1 - alpha)
        # the weight of the loss on x_0 is min(SNR, 5), whatever is predicted
        on_x0 = (
            min_snr_weight(scheduler, t, 5.0).double()
            * {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
        )
        torch.testing.assert_close(on_x0, snr.clamp(max=5.0), rtol=1e-3, atol=1e-6)


def test_timesteps_are_uniform_or_gathered_in_the_middle():
    torch.manual_seed(0)
    uniform, gathered = draw_timesteps(20_000, 1000), draw_timesteps(20_000, 1000, (-0.4, 1.25))
    for t in (uniform, gathered):
        assert t.min() >= 0 and t.max() <= 999
    assert np.histogram(uniform, 4, (0, 1000))[0] / 20_000 == pytest.approx([0.25] * 4, abs=0.02)
    median = 1000 / (1 + math.exp(0.4))
    assert gathered.median().item() == pytest.approx(median, abs=10)
    assert (gathered < 100).float().mean() < 0.1 and (gathered > 800).float().mean() < 0.1


def test_the_loss_of_an_unconditional_model_needs_no_labels(scheduler):
    assert denoising_loss(toy_unet(num_class_embeds=None), scheduler, IMAGES).item() > 0
