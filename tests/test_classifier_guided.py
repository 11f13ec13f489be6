"""The laws of guidance by a classifier's gradient, and of Grad-CAM."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from transformers import BeitImageProcessorPil as BeitImageProcessor
from transformers import ViTConfig, ViTForImageClassification
from transformers import ViTImageProcessorPil as ViTImageProcessor

from cxr_diffusers import ClassifierGuidedPipeline, DiffPIRDeblurPipeline, GradCAMPipeline
from cxr_diffusers.inference.out_of_distribution import denoising_errors
from cxr_diffusers.pipelines.cxr_classifier import classify
from cxr_diffusers.pipelines.cxr_inversion import noise_from_output, output_from_noise, timesteps_below, view_errors
from helpers import toy_classifier, toy_resnet, toy_unet

FAST = dict(num_inference_steps=10, noise_level=300, output_type="pt")


def guided(classifier=None, unet=None, scheduler=None, **options):
    classifier = classifier or toy_classifier()
    unet = unet or toy_unet()
    pipeline = ClassifierGuidedPipeline(unet, classifier, scheduler or DDIMScheduler(clip_sample=False), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Linear(torch.nn.Module):
    """log p has a closed form: the logits are a . x and 0."""

    def __init__(self, weights):
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, x, t):
        logit = (x * self.weights).sum(dim=(1, 2, 3))
        return torch.stack([logit, torch.zeros_like(logit)], dim=1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_decoding_step_is_the_formula_of_the_paper(prediction_type):
    """eps' = eps - sqrt(1 - abar) s grad log p, then the DDIM update, whatever the network predicts."""
    torch.manual_seed(0)
    a, x = torch.randn(1, 1, 16, 16) / 16, torch.randn(2, 1, 16, 16)
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction_type)
    pipeline = guided(Linear(a), scheduler=scheduler, class_names=["healthy", "diseased"])
    decoded = pipeline.decode(x, 0, 2, noise_level=300, num_inference_steps=4, classifier_scale=7.0)

    steps = timesteps_below(scheduler, 300, 4)
    for t, s in zip(steps, [*steps[1:].tolist(), -1], strict=True):
        abar = scheduler.alphas_cumprod[t]
        previous = scheduler.alphas_cumprod[s] if s >= 0 else torch.tensor(1.0)
        output = pipeline.predict(x, t, 2)
        p = torch.sigmoid((x * a).sum(dim=(1, 2, 3)))
        gradient = (1 - p)[:, None, None, None] * a
        eps = noise_from_output(output, x, abar, prediction_type) - (1 - abar).sqrt() * 7.0 * gradient
        x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
        x = previous.sqrt() * x0 + (1 - previous).sqrt() * eps
    torch.testing.assert_close(decoded, x.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_and_output_convert_into_each_other(prediction_type):
    x, output = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    noise = noise_from_output(output, x, torch.tensor(0.4), prediction_type)
    torch.testing.assert_close(output_from_noise(noise, x, torch.tensor(0.4), prediction_type), output)


def test_without_a_scale_the_image_comes_back_without_a_call_of_the_classifier(images):
    def refuse(*args):
        raise AssertionError("the classifier was called")

    pipeline = guided()
    pipeline.classifier.forward = refuse
    some = pipeline(images, classifier_scale=0, **{**FAST, "num_inference_steps": 400})
    assert some.anomaly_map.mean() < 0.01


def test_guidance_raises_the_probability_of_the_target(images):
    pipeline = guided()
    x = images * 2 - 1
    log_p = []
    for scale in (0.0, 20.0):
        latents = pipeline.invert(x, 2, noise_level=300, num_inference_steps=10)
        with torch.no_grad():
            y = pipeline.decode(latents, 1, 2, noise_level=300, num_inference_steps=10, classifier_scale=scale)
            log_p.append(pipeline.classifier(y, 0).log_softmax(dim=1)[:, 1])
    assert (log_p[1] > log_p[0]).all()


@pytest.mark.parametrize("classifier", [toy_classifier, toy_resnet], ids=["noised", "predicted"])
def test_the_gradient_is_that_of_log_p_by_finite_differences(classifier):
    torch.manual_seed(1)
    pipeline = guided(classifier().double(), toy_unet().double())
    pipeline.predict = lambda x, t, named: pipeline.unet(x.double(), t, torch.full((len(x),), named)).sample
    x, t, direction = torch.randn(1, 1, 16, 16), torch.tensor(200), torch.randn(1, 1, 16, 16)

    def log_p(x):
        with torch.no_grad():
            if classifier is toy_classifier:
                return pipeline.classifier(x.double(), t).log_softmax(dim=1)[0, 1]
            clean = pipeline.clean_image(pipeline.predict(x, t, 2), x.double(), t)
            return pipeline.classifier(2 * clean - 1).logits.log_softmax(dim=1)[0, 1]

    _, gradient = pipeline.predict_with_gradient(x, t, 1, 2)
    step = 1e-5 * direction.double()  # small, for the kinks of the ReLUs
    numeric = (log_p(x + step) - log_p(x - step)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(numeric.item(), rel=2e-3, abs=1e-7)
    assert gradient.dtype == torch.float32


def test_under_autocast_the_gradient_stays_in_float32():
    pipeline, x, t = guided(), torch.randn(1, 1, 16, 16), torch.tensor(200)
    expected = pipeline.predict_with_gradient(x, t, 0, 2)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradient = pipeline.predict_with_gradient(x, t, 0, 2)[1]
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, expected)


def test_a_classifier_trained_without_noise_guides_through_the_predicted_image(images):
    """Three channels, its own size, mean and deviation: as its image processor says."""
    processor = ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
    pipeline = guided(toy_resnet(3, num_channels=3), feature_extractor=processor)
    seen = []
    pipeline.classifier.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].detach()), with_kwargs=True
    )
    with_it = pipeline(images, classifier_scale=50.0, **FAST)
    without = pipeline(images, classifier_scale=0.0, **FAST)
    assert len(seen) == 3 and seen[0].shape == (2, 3, 24, 24)
    assert (with_it.counterfactual - without.counterfactual).abs().max() > 1e-3
    mean = (seen[-1][0, 0] * 0.2 + 0.4).mean()
    assert 0 < mean < 1, "the scaled input is an image again"


def test_a_step_that_the_image_processor_leaves_out_is_left_out(images):
    """`do_normalize`, `do_resize` and `do_center_crop`: the values of a step stay in the config when it is off."""

    def prepared(**options):
        processor = BeitImageProcessor(
            size={"height": 24, "width": 24}, crop_size={"height": 20, "width": 20}, **options
        )
        seen = []
        classifier = toy_resnet(num_channels=3)
        classifier.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
        )
        classify(classifier, images, processor)
        return seen[0]

    off = dict(do_normalize=False, do_resize=False, do_center_crop=False)
    torch.testing.assert_close(prepared(**off), images.expand(-1, 3, -1, -1))
    mean, std = BeitImageProcessor().image_mean[0], BeitImageProcessor().image_std[0]
    normalised = prepared(**off | dict(do_normalize=True))
    torch.testing.assert_close(normalised[:, 0], ((images - mean) / std)[:, 0])
    assert prepared(**off | dict(do_resize=True)).shape[-2:] == (24, 24)
    assert prepared(**off | dict(do_resize=True, do_center_crop=True)).shape[-2:] == (20, 20)


def test_a_unet_without_classes_needs_no_label_and_one_without_null_label_gets_the_target(images):
    plain = guided(unet=toy_unet(num_class_embeds=None))
    assert plain(images, **FAST).anomaly_map.shape == (2, 16, 16)
    with pytest.raises(ValueError, match="unet_label"):
        plain(images, unet_label=1, **FAST)
    wolleb = guided(unet=toy_unet(num_class_embeds=2), has_null_label=False, class_names=["healthy", "diseased"])
    assert wolleb.unet_class(None, 1) == 1 and wolleb.unet_class("diseased", 0) == 1
    assert guided().unet_class(None, 1) == guided().unet_class("null", 0) == 2
    assert guided().unet_class("target", 1) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(classifier_scale=-1.0), "classifier_scale"),
        (dict(classifier_scale=float("nan")), "classifier_scale"),
        (dict(target_label=2), "target_label"),
        (dict(unet_label="pneumonia"), "unet_label"),
        (dict(noise_level=0), "noise_level"),
        (dict(direction="up"), "direction"),
    ],
)
def test_an_invalid_argument_is_refused_with_the_expected_value(images, wrong, message):
    with pytest.raises(ValueError, match=message):
        guided()(images, **{**FAST, **wrong})


def test_the_number_of_names_must_equal_that_of_classes():
    with pytest.raises(ValueError, match="2 class names"):
        guided(class_names=["healthy"])
    with pytest.raises(ValueError, match="class_names"):
        guided(Linear(torch.zeros(1)))


# Grad-CAM


def cam(classifier, **options):
    return GradCAMPipeline(classifier, sample_size=16, **options)


def test_the_evidence_of_a_linear_head_is_its_log_odds():
    """Of a linear layer on the mean of the map: where none is negative, its mean is the log-odds without the bias."""
    classifier, x = toy_resnet(), torch.rand(2, 1, 16, 16)
    head = classifier.classifier[-1]
    with torch.no_grad():
        head.weight.copy_(torch.stack([torch.zeros(16), torch.rand(16)]))  # then no evidence is negative
        logits = classifier(2 * x - 1).logits
    evidence, probability = cam(classifier).explain(x)
    odds = logits[:, 1] - logits[:, 0]
    bias = head.bias[1] - head.bias[0]
    torch.testing.assert_close(evidence.mean(dim=(1, 2)), odds - bias, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(probability, odds.sigmoid())


def test_a_classifier_that_sees_a_bright_corner_points_to_it():
    classifier = toy_resnet(hidden_sizes=[8], depths=[1], embedding_size=8)
    x = torch.zeros(1, 1, 64, 64)
    x[:, :, :16, 48:] = 1
    evidence, _ = GradCAMPipeline(classifier, sample_size=64).explain(x)
    background, _ = GradCAMPipeline(classifier, sample_size=64).explain(x * 0)
    height, width = evidence.shape[-2:]
    change = (evidence - background)[0].abs()
    assert change[: height // 2, width // 2 :].sum() > 0.9 * change.sum() > 0


def test_a_map_is_on_one_scale_and_the_score_is_the_classifiers(images):
    pipeline = cam(toy_resnet(3))
    both = pipeline(images, output_type="pt")
    alone = pipeline(images[:1], output_type="pt")
    torch.testing.assert_close(both.anomaly_map[:1], alone.anomaly_map)
    assert 0 <= both.anomaly_map.min() and both.anomaly_map.max() < 1
    with torch.no_grad():
        p = pipeline.classifier(2 * images - 1).logits.softmax(dim=1)
    torch.testing.assert_close(both.anomaly_score, 1 - p[:, 0])
    np.testing.assert_allclose(pipeline(images, output_type="np").anomaly_score, 1 - p[:, 0], rtol=1e-5)
    assert (both.counterfactual == both.image).all()


def test_one_class_can_be_explained_instead_of_all_that_is_not_healthy(images):
    pipeline = cam(toy_resnet(3), class_names=["healthy", "effusion", "other"])
    maps = [pipeline(images, explained_label=k, output_type="pt").anomaly_map for k in (None, "effusion", 2)]
    assert all((a - b).abs().max() > 1e-5 for a, b in ((maps[0], maps[1]), (maps[1], maps[2])))


def test_tokens_of_a_vision_transformer_are_a_map_too(images):
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=4)
    torch.manual_seed(0)
    classifier = ViTForImageClassification(ViTConfig(**shape, image_size=16, num_channels=1, num_labels=2)).eval()
    pipeline = GradCAMPipeline(classifier)
    assert pipeline.config.sample_size == 16
    evidence, _ = pipeline.explain(images)
    assert evidence.shape == (2, 4, 4)
    assert (
        evidence > 0
    ).any()  # the class token alone reaches the logits: no gradient at the last layer's other tokens
    assert (evidence[0] - evidence[1]).abs().max() > 0


def test_a_call_does_not_train(images):
    """In training mode a batch norm mixes the images of a batch and changes, and dropout makes the maps random."""
    classifier = toy_resnet().train()
    classifier.resnet.encoder.eval()
    modes = [module.training for module in classifier.modules()]
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    maps = cam(classifier)(images, output_type="pt").anomaly_map
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())
    assert [module.training for module in classifier.modules()] == modes
    torch.testing.assert_close(maps, cam(classifier.eval())(images, output_type="pt").anomaly_map)
    unet = toy_unet(dropout=0.3).train()
    first, second = (guided(unet=unet)(images, **FAST).anomaly_map for _ in range(2))
    assert torch.equal(first, second) and unet.training
    first, second = (denoising_errors(guided(unet=unet), images) for _ in range(2))
    assert (first == second).all()
    prior = DiffPIRDeblurPipeline(unet, DDIMScheduler(clip_sample=False))
    prior.set_progress_bar_config(disable=True)
    first, second = (
        prior(images, [[1.0]], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
        for _ in range(2)
    )
    assert torch.equal(first.restored, second.restored) and unet.training


def test_grad_cam_needs_an_image_classifier():
    with pytest.raises(TypeError, match="NoisyClassifier"):
        cam(toy_classifier())
    with pytest.raises(ValueError, match="sample_size"):
        GradCAMPipeline(toy_resnet())


# views


def test_the_unet_is_given_the_null_label_of_each_images_view(images):
    unet = toy_unet(num_class_embeds=7)  # (2 classes + null) x 2 views + 1
    pipeline = guided(unet=unet, views=["PA", "AP"])
    labels = []
    handle = unet.register_forward_pre_hook(
        lambda module, args, kwargs: labels.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    both = pipeline(images, view=["AP", "PA"], **FAST)
    handle.remove()
    assert labels and all(row == [5, 4] for row in labels)
    for i, view in enumerate(("AP", "PA")):
        alone = pipeline(images[i : i + 1], view=view, **FAST)
        torch.testing.assert_close(alone.anomaly_map[0], both.anomaly_map[i], atol=2e-5, rtol=0)
    unknown = pipeline(images, **FAST)
    x = images * 2 - 1
    predicted = pipeline.predict_views(x, view_errors)
    named = pipeline(images, view=[["PA", "AP"][i] for i in predicted], **FAST)
    torch.testing.assert_close(unknown.anomaly_map, named.anomaly_map)


def test_unknown_views_are_refused(images):
    with pytest.raises(ValueError, match="class embeddings for the views"):
        guided(unet=toy_unet(num_class_embeds=6), views=["PA", "AP"])
    with pytest.raises(ValueError, match="expected `view` among PA, AP, got 'LL'"):
        guided(unet=toy_unet(num_class_embeds=7), views=["PA", "AP"])(images, view="LL", **FAST)
