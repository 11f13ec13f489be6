"""The settings of `CFGAnomalyPipeline`: those of the original procedure, those of a checkpoint, retired ones."""

import inspect
import json
import math
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from cxr_diffusers import (
    CFGAnomalyPipeline,
    ClassifierGuidedPipeline,
    FixedPointGANPipeline,
    GradCAMPipeline,
    LungSegmenter,
    PyramidCAMPipeline,
)
from cxr_diffusers.commands.options import SETTINGS
from cxr_diffusers.files import as_json
from cxr_diffusers.fingerprints import weights_digest
from cxr_diffusers.inference.reference_scores import ReferenceScores
from cxr_diffusers.pipelines.cxr_anomaly import difference_map, matched_exposure, score_map, smooth_map
from cxr_diffusers.pipelines.cxr_inversion import class_evidence, evidence_timesteps, output_from_noise
from helpers import evaluations, toy_classifier, toy_unet

FAST = dict(num_inference_steps=10, noise_level=300, output_type="pt")


def with_settings(**settings):
    return quiet(CFGAnomalyPipeline(toy_unet(), DDIMScheduler(clip_sample=False), settings=settings))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_original_settings_replace_those_of_the_checkpoint(pipeline, images):
    own = with_settings(guidance_scale=1.0, negative_label=1, direction="bright", smoothing=1.0, noise_level=500)
    original = own(images, **{**own.ORIGINAL_SETTINGS, **FAST}).anomaly_map
    torch.testing.assert_close(original, pipeline(images, **FAST).anomaly_map)  # a pipeline without settings
    assert not torch.allclose(original, own(images, **FAST).anomaly_map, atol=1e-3)
    smoothed = own(images, **{**own.ORIGINAL_SETTINGS, **FAST, "smoothing": 2.0}).anomaly_map
    torch.testing.assert_close(smoothed, pipeline(images, smoothing=2.0, **FAST).anomaly_map)  # what is given holds


def test_original_settings_of_classifier_guidance_replace_those_of_the_checkpoint(images):
    parts = (toy_unet(), toy_classifier(), DDIMScheduler(clip_sample=False))
    own = quiet(ClassifierGuidedPipeline(*parts, settings={"classifier_scale": 3.0, "direction": "dark"}))
    plain = quiet(ClassifierGuidedPipeline(*parts))
    original = own(images, **{**own.ORIGINAL_SETTINGS, **FAST}).anomaly_map
    torch.testing.assert_close(original, plain(images, **FAST).anomaly_map)
    assert not torch.allclose(original, own(images, **FAST).anomaly_map, atol=1e-3)


def test_the_original_procedure_evaluates_the_unet_three_times_a_step(images):
    own = with_settings(num_inference_steps=20, guidance_scale=0.0)
    _, count = evaluations(own, images[:1], **{**own.ORIGINAL_SETTINGS, "num_inference_steps": 100, "noise_level": 50})
    assert count == 5 + 2 * 5


@pytest.mark.parametrize("solver", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_several_noise_levels_share_one_inversion_and_their_maps_are_averaged(pipeline, images, solver):
    pipeline.scheduler = solver.from_config(pipeline.scheduler.config)
    levels = [500, 200, 300]
    call = {**FAST, "smoothing": 1.0}
    each = {level: pipeline(images, **{**call, "noise_level": level}) for level in levels}
    together, count = evaluations(pipeline, images, **{**call, "noise_level": levels})
    mean = torch.stack([answer.anomaly_map for answer in each.values()]).mean(dim=0)
    torch.testing.assert_close(together.anomaly_map, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.counterfactual, each[500].counterfactual, atol=1e-5, rtol=0)
    if solver is DDIMScheduler:  # others take other steps
        assert count == len(images) * (5 + 2 * (5 + 2 + 3))


def test_levels_with_the_same_steps_are_two_levels(pipeline, images):
    one = pipeline(images, **FAST).anomaly_map
    torch.testing.assert_close(pipeline(images, **{**FAST, "noise_level": [300, 290]}).anomaly_map, one)


def test_latents_of_other_steps_are_freed(pipeline, images):
    seen, alive = [], []

    def callback(_, i, t, kwargs):
        seen.append(weakref.ref(kwargs["latents"]))
        alive.append(sum(tensor() is not None for tensor in seen))
        return {}

    pipeline(images[:1], **{**FAST, "noise_level": [800, 200]}, callback_on_step_end=callback)
    assert alive[7] == 2, "at the end of inversion those of the two levels are kept, and no others"


def test_steps_are_counted_through_all_noise_levels(pipeline, images):
    seen = []

    def callback(_, i, t, kwargs):
        seen.append((i, int(t)))
        return {}

    pipeline(images[:1], **{**FAST, "noise_level": [300, 200]}, callback_on_step_end=callback)
    assert [i for i, _ in seen] == list(range(3 + 2 + 3))
    assert [t for _, t in seen] == [0, 100, 200, 100, 0, 200, 100, 0]


def test_a_longer_chain_is_guided_to_its_end(images):
    pipeline = quiet(CFGAnomalyPipeline(toy_unet(), DDIMScheduler(clip_sample=False, num_train_timesteps=4000)))
    call = {"num_inference_steps": 20, "noise_level": 2000, "output_type": "pt"}
    _, count = evaluations(pipeline, images[:1], **call)
    assert count == 10 + 2 * 10


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_label_that_predicts_the_image_better_has_the_evidence(prediction_type):
    """Of two networks that are certain of one image each, the errors and their ratio have a closed form."""
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    first, second = torch.full((1, 4, 4), -0.5), torch.full((1, 4, 4), 0.5)
    x = torch.stack([first, torch.full((1, 4, 4), 0.4)])

    def predict(noised, t):
        alpha = scheduler.alphas_cumprod[t]
        believed = torch.stack([first, first, second, second])
        noise = (torch.cat([noised, noised]) - alpha**0.5 * believed) / (1 - alpha) ** 0.5
        return output_from_noise(noise, torch.cat([noised, noised]), alpha, prediction_type)

    as_first, as_second, ratio = class_evidence(predict, x, scheduler)
    torch.testing.assert_close(as_first, torch.stack([first, first]), atol=1e-4, rtol=0)
    torch.testing.assert_close(as_second, torch.stack([second, second]), atol=1e-4, rtol=0)
    assert ratio[0] < -10 and ratio[1].item() == pytest.approx(math.log(0.9**2 / 0.1**2), abs=1e-2)


def test_evidence_is_added_to_the_map_and_costs_two_evaluations_a_level(pipeline, images):
    call = {**FAST, "negative_label": 1, "direction": "bright", "smoothing": 1.0}
    plain, count = evaluations(pipeline, images, **call)
    added, with_evidence = evaluations(pipeline, images, **call, evidence=3.0)
    assert with_evidence - count == len(images) * 2 * 7
    x = plain.image * 2 - 1
    healthy, diseased, ratio = pipeline.compute_class_evidence(x, 0, 1)
    painted = smooth_map(difference_map(diseased, healthy, direction="bright"), 1.0)
    assert painted.max() > 1e-3
    torch.testing.assert_close(added.anomaly_map, (plain.anomaly_map + 3 * painted).clamp(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(added.anomaly_score, score_map(added.anomaly_map))
    scored = pipeline(images, **call, score="evidence")
    torch.testing.assert_close(scored.anomaly_map, plain.anomaly_map)
    torch.testing.assert_close(scored.anomaly_score, ratio, atol=1e-5, rtol=0)
    other_way = pipeline(images, **{**call, "target_label": 1, "negative_label": 0}, score="evidence").anomaly_score
    torch.testing.assert_close(other_way, -ratio, atol=1e-5, rtol=0)


def test_evidence_of_an_image_does_not_depend_on_its_batch(pipeline, images):
    call = {**FAST, "negative_label": 1, "evidence": 2.0, "score": "evidence"}
    together = pipeline(images, **call)
    for i, image in enumerate(images):
        alone = pipeline(image, **call)
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.anomaly_score[0], together.anomaly_score[i], atol=1e-5, rtol=0)


def test_the_score_of_the_change_is_that_of_the_map_without_highpass(pipeline, images):
    pipeline.register_modules(lung_segmenter=LungSegmenter(sample_size=16, block_out_channels=(4, 4)))
    call = {**FAST, "smoothing": 1.0, "region": "lungs", "direction": "both", "keep_below": 0.01}
    plain, scored = pipeline(images, **call), pipeline(images, **call, highpass=8.0, score="change")
    torch.testing.assert_close(scored.anomaly_score, plain.anomaly_score)
    filtered = pipeline(images, **call, highpass=8.0)
    torch.testing.assert_close(scored.anomaly_map, filtered.anomaly_map)
    assert (filtered.anomaly_score < 0.99 * plain.anomaly_score).all()
    levels = {**call, "noise_level": [200, 300], "score": "change"}  # the change to the returned image: the last level
    torch.testing.assert_close(pipeline(images, **levels).anomaly_score, plain.anomaly_score, atol=1e-5, rtol=0)


def test_the_combined_score_adds_the_evidence_to_the_change(pipeline, images):
    call = {**FAST, "negative_label": 1, "smoothing": 1.0, "highpass": 8.0}
    change, ratio, combined = (pipeline(images, **call, score=score) for score in ("change", "evidence", "combined"))
    expected = change.anomaly_score + 2 * ratio.anomaly_score
    torch.testing.assert_close(combined.anomaly_score, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(combined.anomaly_map, change.anomaly_map)
    assert (combined.anomaly_score - change.anomaly_score).abs().min() > 1e-5


def test_identical_labels_give_no_evidence(pipeline, images):
    weight = pipeline.unet.class_embedding.weight
    weight.data[1] = weight.data[0]
    call = {**FAST, "negative_label": 1}
    output = pipeline(images, **call, evidence=5.0, score="evidence")
    torch.testing.assert_close(output.anomaly_score, torch.zeros(len(images)), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.anomaly_map, pipeline(images, **call).anomaly_map, atol=1e-5, rtol=0)


def test_the_levels_of_evidence_are_shares_of_the_chain():
    assert evidence_timesteps(DDIMScheduler()) == [100, 200, 300, 400, 500, 600, 700]
    assert evidence_timesteps(DDIMScheduler(num_train_timesteps=50)) == [5, 10, 15, 20, 25, 30, 35]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(evidence=-1.0), "expected a finite `evidence` of 0 or more, got -1.0"),
        (dict(score="mean"), "expected `score` map, change, evidence or combined, got 'mean'"),
        (dict(keep_below=-0.1), "expected a finite `keep_below` of 0 or more, got -0.1"),
        (dict(score="evidence", guidance_scale=0.0, negative_label=9), "expected `negative_label` among"),
        ({"noise_level": []}, "expected at least one `noise_level`"),
        ({"noise_level": [300, 2000]}, "expected `noise_level` to be a timestep, 1..1000, got 2000"),
        ({"noise_level": [300, 0.5]}, "expected `noise_level` to be a whole number, got 0.5"),
        ({"match_exposure": 1}, "expected `match_exposure` True or False, got 1"),
        ({"highpass": -0.1}, "expected a finite `highpass` of 0 or more, got -0.1"),
        ({"region": "heart"}, "expected `region` image or lungs, got 'heart'"),
        ({"region": "lungs"}, "expected a pipeline with a `lung_segmenter`"),
        ({"negative_label": "healthy"}, "expected a `negative_label` other than `target_label`, got 'healthy'"),
        ({"view": ["PA", ""]}, "expected no `view` with a model that is not conditioned on the view"),
    ],
)
def test_invalid_settings_are_refused(pipeline, images, wrong, message):
    with pytest.raises(ValueError, match=message):
        pipeline(images, **{**FAST, **wrong})


def test_a_checkpoints_settings_can_have_several_levels(images, tmp_path):
    own = with_settings(noise_level=[200, 300], num_inference_steps=10)
    own.save_pretrained(tmp_path)
    again = quiet(CFGAnomalyPipeline.from_pretrained(tmp_path))
    expected = own(images, output_type="pt").anomaly_map
    torch.testing.assert_close(again(images, output_type="pt").anomaly_map, expected)


def test_help_shows_the_defaults():
    parameters = inspect.signature(CFGAnomalyPipeline.__call__).parameters
    assert parameters["noise_level"].default == 500 and parameters["image"].default is inspect.Parameter.empty
    assert {
        name: parameters[name].default for name in CFGAnomalyPipeline.ORIGINAL_SETTINGS
    } == with_settings().settings()


def test_settings_can_be_positional(images):
    own = with_settings(guidance_scale=0.0, noise_level=500, num_inference_steps=10)
    by_name = own(images, guidance_scale=2.0, noise_level=300, output_type="pt").anomaly_map
    torch.testing.assert_close(own(images, 2.0, 300, output_type="pt").anomaly_map, by_name)


def test_a_retired_setting_of_a_checkpoint_is_ignored_with_a_warning(pipeline, images, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["settings"] = {"compare_with": "reconstruction", "harmonization": 0.1, "smoothing": 1.0}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="compare_with='reconstruction', harmonization=0.1"):
        opened = quiet(CFGAnomalyPipeline.from_pretrained(tmp_path))
    assert opened.config.settings == {"smoothing": 1.0}
    expected = pipeline(images, smoothing=1.0, **FAST).anomaly_map
    torch.testing.assert_close(opened(images, **FAST).anomaly_map, expected)


def test_healthy_scores_of_an_older_version_fit_unless_a_retired_setting_changed_them(pipeline):
    call = {**pipeline.settings(), "compare_with": "image", "combine": "mean"}
    del call["highpass"], call["region"]  # older than these
    reference = ReferenceScores("toys", as_json(call), [0.1], weights_digest(pipeline))
    assert reference.fits(pipeline, {}) and not reference.fits(pipeline, {"highpass": 4.0})
    changed = ReferenceScores("toys", as_json({**call, "harmonization": 0.1}), [0.1], weights_digest(pipeline))
    assert not changed.fits(pipeline, {})


def test_the_command_lines_options_are_the_settings_of_the_pipelines():
    pipelines = (
        CFGAnomalyPipeline,
        ClassifierGuidedPipeline,
        FixedPointGANPipeline,
        GradCAMPipeline,
        PyramidCAMPipeline,
    )
    assert set(SETTINGS) == {name for pipeline in pipelines for name in pipeline.ORIGINAL_SETTINGS}


def test_a_highpass_removes_wide_changes_and_keeps_narrow_ones():
    reference, narrow = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    narrow[..., 30:34, 30:34] = 0.5
    wide = torch.linspace(0, 0.4, 64).expand(1, 1, 64, 64)
    filtered = difference_map(reference, -(narrow + wide), direction="bright", highpass=6.0)
    plain = difference_map(reference, -(narrow + wide), direction="bright")
    inside = torch.zeros(1, 64, 64, dtype=torch.bool)
    inside[:, 30:34, 30:34] = True
    assert filtered[~inside].mean() < 0.1 * plain[~inside].mean()
    assert filtered[inside].mean() > 0.8 * 0.25
    difference = narrow + wide
    by_hand = (difference - smooth_map(difference[0], 6.0)[None]).clamp(min=0)[:, 0] / 2
    torch.testing.assert_close(filtered, by_hand)


def test_matched_exposure_takes_away_contrast_and_brightness_and_keeps_a_small_change():
    generator = torch.Generator().manual_seed(0)
    healthy = smooth_map(torch.rand(3, 32, 32, generator=generator), 2.0)[:, None]
    lesion = torch.zeros_like(healthy)
    lesion[..., 10:13, 20:23] = 0.2
    contrast, brightness = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.3, 0.0, -0.4])
    decoded = contrast[:, None, None, None] * healthy + brightness[:, None, None, None]
    torch.testing.assert_close(matched_exposure(decoded, healthy), healthy)
    change = difference_map(healthy + lesion, decoded, match_exposure=True) * 2
    inside = lesion[:, 0] > 0
    assert (change[inside] > 0.15).all() and (change[~inside] < 0.03).all()
    plain = difference_map(healthy + lesion, decoded) * 2
    assert plain[0][~inside[0]].max() > 0.1 and plain[2][~inside[2]].max() > 0.1
    flat = torch.full((1, 1, 4, 4), 0.5)  # has no contrast that could be matched
    assert torch.equal(matched_exposure(flat, healthy[:1, :, :4, :4]).std(), torch.tensor(0.0))


def test_matched_exposure_is_in_the_map_and_not_in_the_scores_change(pipeline, images):
    call = {**FAST, "direction": "both", "region": "image"}
    output = pipeline(images, match_exposure=True, score="change", **call)
    plain = pipeline(images, score="change", **call)
    torch.testing.assert_close(output.counterfactual, plain.counterfactual)
    torch.testing.assert_close(output.anomaly_score, plain.anomaly_score)
    expected = difference_map(output.image, output.counterfactual, (0.0, 1.0), match_exposure=True)
    torch.testing.assert_close(output.anomaly_map, expected, atol=1e-5, rtol=0)
    assert (output.anomaly_map - plain.anomaly_map).abs().max() > 1e-3


def test_the_highpass_is_in_pixels_of_64(pipeline, images):
    output = pipeline(images, highpass=8.0, direction="dark", **FAST)  # of 16 pixels
    expected = difference_map(output.image, output.counterfactual, (0.0, 1.0), "dark", highpass=2.0)
    torch.testing.assert_close(output.anomaly_map, expected, atol=1e-5, rtol=0)
