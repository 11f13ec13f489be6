"""The options of `CFGAnomalyPipeline` that the original did not have, and the recipe that leaves them out."""

import math
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from cxr_diffusers import CFGAnomalyPipeline, ClassifierGuidedPipeline
from cxr_diffusers.pipelines.cxr_anomaly import combine_maps, difference_map, score_map, smooth_map
from cxr_diffusers.pipelines.cxr_inversion import class_evidence, evidence_timesteps, output_from_noise
from helpers import toy_classifier, toy_unet

FAST = dict(num_inference_steps=10, noise_level=300, output_type="pt")


def with_settings(**settings):
    return quiet(CFGAnomalyPipeline(toy_unet(), DDIMScheduler(clip_sample=False), settings=settings))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def evaluations(pipeline, images, **kwargs):
    """(the answer, how many images the UNet was shown)."""
    shown = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, args: shown.append(len(args[0])))
    try:
        return pipeline(images, **kwargs), sum(shown)
    finally:
        handle.remove()


def test_the_original_recipe_leaves_the_checkpoints_settings_out(pipeline, images):
    own = with_settings(guidance_scale=1.0, negative_label=1, direction="bright", smoothing=1.0, noise_level=500)
    original = own(images, recipe="original", **FAST).anomaly_map
    torch.testing.assert_close(original, pipeline(images, **FAST).anomaly_map)  # a pipeline without settings
    assert not torch.allclose(original, own(images, **FAST).anomaly_map, atol=1e-3)
    smoothed = own(images, recipe="original", smoothing=2.0, **FAST).anomaly_map
    torch.testing.assert_close(smoothed, pipeline(images, smoothing=2.0, **FAST).anomaly_map)  # what is given holds


def test_the_original_recipe_of_classifier_guidance_is_the_papers(images):
    parts = (toy_unet(), toy_classifier(), DDIMScheduler(clip_sample=False))
    own = quiet(ClassifierGuidedPipeline(*parts, settings={"classifier_scale": 3.0, "direction": "dark"}))
    plain = quiet(ClassifierGuidedPipeline(*parts))
    original = own(images, recipe="original", **FAST).anomaly_map
    torch.testing.assert_close(original, plain(images, **FAST).anomaly_map)
    assert not torch.allclose(original, own(images, **FAST).anomaly_map, atol=1e-3)


def test_the_original_procedure_asks_the_unet_three_times_for_each_of_its_steps(images):
    own = with_settings(num_inference_steps=20, guidance_scale=0.0)
    _, shown = evaluations(own, images[:1], recipe="original", num_inference_steps=100, noise_level=50)
    assert shown == 5 + 2 * 5


def test_another_recipe_is_refused(pipeline, images):
    with pytest.raises(ValueError, match="expected `recipe` to be original, or None.*got 'wolleb'"):
        pipeline(images, recipe="wolleb", **FAST)


@pytest.mark.parametrize("solver", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_several_noise_levels_share_one_inversion_and_their_maps_are_averaged(pipeline, images, solver):
    pipeline.scheduler = solver.from_config(pipeline.scheduler.config)
    levels = [500, 200, 300]
    call = {**FAST, "smoothing": 1.0, "compare_with": "reconstruction"}
    each = {level: pipeline(images, **{**call, "noise_level": level}) for level in levels}
    together, shown = evaluations(pipeline, images, **{**call, "noise_level": levels})
    mean = torch.stack([answer.anomaly_map for answer in each.values()]).mean(dim=0)
    torch.testing.assert_close(together.anomaly_map, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.counterfactual, each[500].counterfactual, atol=1e-5, rtol=0)
    if solver is DDIMScheduler:  # others take other steps
        assert shown == len(images) * (5 + 3 * (5 + 2 + 3))
    harmonic = pipeline(images, **{**call, "noise_level": levels, "combine": "harmonic"}).anomaly_map
    expected = 3 / sum(1 / answer.anomaly_map.clamp(min=1e-6) for answer in each.values())
    torch.testing.assert_close(harmonic, expected, atol=1e-5, rtol=0)
    assert (harmonic < mean).any()


def test_levels_with_the_same_steps_are_two_levels(pipeline, images):
    one = pipeline(images, **FAST).anomaly_map
    torch.testing.assert_close(pipeline(images, **{**FAST, "noise_level": [300, 290]}).anomaly_map, one)


def test_a_harmonic_mean_is_high_only_where_all_maps_are():
    maps = torch.tensor([[[[0.5, 0.0, 0.2]]], [[[0.5, 1.0, 0.8]]]])
    torch.testing.assert_close(combine_maps(maps, "harmonic"), torch.tensor([[[0.5, 0.0, 0.32]]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(combine_maps(maps), torch.tensor([[[0.5, 0.5, 0.5]]]))


def test_latents_of_other_steps_are_let_go(pipeline, images):
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


def test_outside_the_interval_there_is_no_guidance(pipeline, images):
    call = {**FAST, "guidance_scale": 3.0}
    guided, plain = (
        pipeline(images, **call).anomaly_map,
        pipeline(images, **{**call, "guidance_scale": 0.0}).anomaly_map,
    )
    everywhere, shown = evaluations(pipeline, images, **call, guidance_interval=(0, 1000))
    torch.testing.assert_close(everywhere.anomaly_map, guided)
    assert shown == len(images) * (3 + 2 * 3)
    nowhere, shown = evaluations(pipeline, images, **call, guidance_interval=(900, 1000))
    torch.testing.assert_close(nowhere.anomaly_map, plain)
    assert shown == len(images) * (3 + 3)
    between, shown = evaluations(pipeline, images, **call, guidance_interval=(100, 150))
    assert shown == len(images) * (3 + 2 + 2)
    assert not torch.allclose(between.anomaly_map, guided, atol=1e-3)
    assert not torch.allclose(between.anomaly_map, plain, atol=1e-3)


def test_a_longer_chain_is_guided_to_its_end(images):
    pipeline = quiet(CFGAnomalyPipeline(toy_unet(), DDIMScheduler(clip_sample=False, num_train_timesteps=4000)))
    call = {"num_inference_steps": 20, "noise_level": 2000, "output_type": "pt"}
    _, shown = evaluations(pipeline, images[:1], **call)
    assert shown == 10 + 2 * 10


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_harmonization_takes_small_changes_back_and_leaves_large_ones(pipeline, images, prediction_type):
    pipeline.scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction_type)
    free = pipeline(images, **FAST).anomaly_map
    assert free.mean() > 0.01
    kept = pipeline(images, **FAST, harmonization=1e-9).anomaly_map  # every change is large
    torch.testing.assert_close(kept, free, atol=1e-3, rtol=0)
    maps = [pipeline(images, **FAST, harmonization=scale).anomaly_map for scale in (1.0, 10.0, 1e6)]
    assert free.mean() > maps[0].mean() > maps[1].mean() > maps[2].mean()
    assert maps[2].max() < 1e-3  # every change is small: the image comes back


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_label_that_knows_the_picture_better_has_the_evidence(prediction_type):
    """Of two networks that are certain of one picture each, the errors and their ratio are known in closed form."""
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
    plain, shown = evaluations(pipeline, images, **call)
    added, with_evidence = evaluations(pipeline, images, **call, evidence=3.0)
    assert with_evidence - shown == len(images) * 2 * 7
    x = plain.image * 2 - 1
    healthy, diseased, ratio = pipeline.weigh(x, 0, 1)
    painted = smooth_map(difference_map(diseased, healthy, direction="bright"), 1.0)
    assert painted.max() > 1e-3
    torch.testing.assert_close(added.anomaly_map, (plain.anomaly_map + 3 * painted).clamp(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(added.anomaly_score, score_map(added.anomaly_map))
    scored = pipeline(images, **call, score="evidence")
    torch.testing.assert_close(scored.anomaly_map, plain.anomaly_map)
    torch.testing.assert_close(scored.anomaly_score, ratio, atol=1e-5, rtol=0)
    other_way = pipeline(images, **{**call, "target_label": 1, "negative_label": 0}, score="evidence").anomaly_score
    torch.testing.assert_close(other_way, -ratio, atol=1e-5, rtol=0)


def test_evidence_of_a_picture_is_its_own_in_any_batch(pipeline, images):
    call = {**FAST, "negative_label": 1, "evidence": 2.0, "score": "evidence"}
    together = pipeline(images, **call)
    for i, image in enumerate(images):
        alone = pipeline(image, **call)
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.anomaly_score[0], together.anomaly_score[i], atol=1e-5, rtol=0)


def test_between_labels_that_mean_the_same_there_is_no_evidence(pipeline, images):
    weight = pipeline.unet.class_embedding.weight
    weight.data[1] = weight.data[0]
    call = {**FAST, "negative_label": 1}
    found = pipeline(images, **call, evidence=5.0, score="evidence")
    torch.testing.assert_close(found.anomaly_score, torch.zeros(len(images)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.anomaly_map, pipeline(images, **call).anomaly_map, atol=1e-5, rtol=0)


def test_the_levels_of_evidence_are_shares_of_the_chain():
    assert evidence_timesteps(DDIMScheduler()) == [100, 200, 300, 400, 500, 600, 700]
    assert evidence_timesteps(DDIMScheduler(num_train_timesteps=50)) == [5, 10, 15, 20, 25, 30, 35]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(evidence=-1.0), "expected a finite `evidence` of 0 or more, got -1.0"),
        (dict(score="mean"), "expected `score` map or evidence, got 'mean'"),
        (dict(score="evidence", guidance_scale=0.0, negative_label=9), "expected `negative_label` among"),
        ({"noise_level": []}, "expected at least one `noise_level`"),
        ({"noise_level": [300, 2000]}, "expected `noise_level` to be a timestep, 1..1000, got 2000"),
        ({"noise_level": [300, 0.5]}, "expected `noise_level` to be a whole number, got 0.5"),
        ({"combine": "max"}, "expected `combine` mean or harmonic, got 'max'"),
        ({"guidance_interval": (500, 200)}, r"expected `guidance_interval` as two timesteps .*got \(500, 200\)"),
        ({"guidance_interval": 500}, "expected `guidance_interval` as two timesteps .*got 500"),
        ({"harmonization": -0.1}, "expected a finite `harmonization` of 0 or more, got -0.1"),
    ],
)
def test_what_cannot_be_meant_is_refused(pipeline, images, wrong, message):
    with pytest.raises(ValueError, match=message):
        pipeline(images, **{**FAST, **wrong})


def test_its_own_settings_may_name_several_levels(images, tmp_path):
    own = with_settings(noise_level=[200, 300], guidance_interval=(100, 1000), num_inference_steps=10)
    own.save_pretrained(tmp_path)
    again = quiet(CFGAnomalyPipeline.from_pretrained(tmp_path))
    expected = own(images, output_type="pt").anomaly_map
    torch.testing.assert_close(again(images, output_type="pt").anomaly_map, expected)
