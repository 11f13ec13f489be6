"""`inpaint` and `decode_until` of `CFGAnomalyPipeline`: what is drawn anew, what it costs, what is refused."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from cxr_diffusers import CFGAnomalyPipeline, LungSegmenter
from cxr_diffusers.inference.trajectory import Trajectory
from cxr_diffusers.pipelines.cxr_anomaly import highest_share
from cxr_diffusers.pipelines.cxr_inversion import (
    evidence_noise,
    image_from_noise,
    inpaint,
    noise_from_output,
    timesteps_below,
)
from helpers import evaluations, toy_unet

FAST = dict(num_inference_steps=10, noise_level=500, output_type="pt")
INPAINT = dict(inpaint=0.1, inpaint_steps=10)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_masked_part_is_what_the_network_predicts_and_the_rest_is_kept(images, prediction_type):
    """A network that sees a fixed healthy image in any noise."""
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction_type)
    x, healthy = images * 2 - 1, torch.zeros_like(images) + 0.25
    mask = torch.zeros(len(images), *images.shape[-2:])
    mask[:, 4:12, 4:12] = 1
    mask[:, 12, 4:12] = 0.5

    def predict(latents, t):
        alpha = scheduler.alphas_cumprod[int(t)]
        noise = (latents - alpha**0.5 * healthy) / (1 - alpha) ** 0.5
        output = {"epsilon": noise, "v_prediction": alpha**0.5 * noise - (1 - alpha) ** 0.5 * healthy}
        return output.get(prediction_type, healthy)

    timesteps = timesteps_below(scheduler, 500, 10)
    noise = evidence_noise(x, 400)
    result = inpaint(predict, x, mask, timesteps, scheduler, (-1.0, 1.0), noise)
    expected = x + mask[:, None] * (healthy - x)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    known = mask == 0
    assert known.any() and torch.equal(result[:, 0][known], x[:, 0][known])
    clipped = inpaint(predict, x, mask, timesteps, scheduler, (-1.0, 0.0), noise)
    assert clipped[:, :, 4:12, 4:12].max() == 0.0, "the prediction stays in the range of the data"


def test_the_network_sees_the_known_part_at_the_level_of_each_step(images):
    """Outside the mask, the latents are the noised image, with the same noise in every step."""
    scheduler = DDIMScheduler(clip_sample=False)
    x, seen = images * 2 - 1, []
    mask = torch.zeros(len(images), *images.shape[-2:])
    mask[:, :8] = 1

    def predict(latents, t):
        seen.append((int(t), latents))
        return torch.randn(latents.shape, generator=torch.Generator().manual_seed(int(t)))

    timesteps = timesteps_below(scheduler, 500, 10)
    noise = evidence_noise(x, 400)
    inpaint(predict, x, mask, timesteps, scheduler, (-1.0, 1.0), noise)
    assert [t for t, _ in seen] == timesteps.tolist() and len(seen) == 5
    for t, latents in seen:
        alpha = scheduler.alphas_cumprod[t]
        expected = alpha**0.5 * x + (1 - alpha) ** 0.5 * noise
        torch.testing.assert_close(latents[:, :, 8:], expected[:, :, 8:], atol=2e-5, rtol=0)
    first, alpha = seen[0][1], scheduler.alphas_cumprod[seen[0][0]]
    torch.testing.assert_close(first[:, :, :8], ((1 - alpha) ** 0.5 * noise).expand_as(first)[:, :, :8])


def test_the_highest_share_is_exact_also_on_a_flat_map():
    maps = torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0))
    for values in (maps, torch.zeros_like(maps)):
        mask = highest_share(values, 0.1)
        assert mask.flatten(1).sum(dim=1).tolist() == [60, 60]
    mask = highest_share(maps, 0.1).bool()
    for values, chosen in zip(maps, mask, strict=True):
        assert values[chosen].min() > values[~chosen].max()
    gate = torch.zeros_like(maps)
    gate[0, :10], gate[1, :2] = 1.0, 0.6
    assert highest_share(maps * gate, 0.1, gate).flatten(1).sum(dim=1).tolist() == [30, 6]
    assert highest_share(maps, 0.1, torch.zeros_like(gate)).sum() == 2, "at least one pixel"
    soft = highest_share(maps, 0.1, softness=1.0)
    assert soft.min() >= 0 and soft.max() <= 1 and ((soft > 0.01) & (soft < 0.99)).any()


def spy(pipeline):
    """[(mask, result)] of each inpainting of a pipeline, filled by its calls."""
    calls, draw = [], pipeline.inpaint

    def inpaint(x, mask, *args, **kwargs):
        calls.append((mask, draw(x, mask, *args, **kwargs)))
        return calls[-1][1]

    pipeline.inpaint = inpaint
    return calls


def test_inpainting_changes_the_highest_pixels_alone_and_its_map_is_averaged(pipeline, images):
    before, plain_cost = evaluations(pipeline, images, **FAST)
    calls = spy(pipeline)
    after, cost = evaluations(pipeline, images, **FAST, **INPAINT)
    assert cost == plain_cost + 5 * len(images)
    [(mask, drawn)] = calls
    torch.testing.assert_close(mask, highest_share(before.anomaly_map, 0.1, softness=images.shape[-1] / 64))
    low = mask == 0
    assert low.any() and not low.all()
    assert torch.equal(drawn[:, 0][low], (images * 2 - 1)[:, 0][low])
    change = (images - drawn / 2 - 0.5).abs()[:, 0]
    assert change.max() > 0.01
    torch.testing.assert_close(after.anomaly_map, (before.anomaly_map + change) / 2, atol=1e-5, rtol=0)
    assert torch.equal(after.counterfactual, before.counterfactual), "the decoded image stays the counterfactual"


def test_several_levels_and_rounds_count_once_each_and_inpainting_starts_at_the_lowest(pipeline, images):
    levels = {**FAST, "noise_level": [300, 500]}
    before, plain_cost = evaluations(pipeline, images, **levels)
    calls = spy(pipeline)
    after, cost = evaluations(pipeline, images, **levels, **INPAINT, inpaint_rounds=2)
    assert cost == plain_cost + 2 * 3 * len(images) and len(calls) == 2
    first, second = ((images - drawn / 2 - 0.5).abs()[:, 0] for _, drawn in calls)
    so_far = (2 * before.anomaly_map + first) / 3
    torch.testing.assert_close(calls[1][0], highest_share(so_far, 0.1, softness=images.shape[-1] / 64))
    torch.testing.assert_close(after.anomaly_map, (3 * so_far + second) / 4, atol=1e-5, rtol=0)


def test_a_low_noise_level_is_inpainted_in_one_step(pipeline, images):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    assert pipeline.inpainting_timesteps(500, 4).tolist() == [499, 249]
    assert pipeline.inpainting_timesteps(200, 4).tolist() == [199]
    seen = []
    low = {**FAST, "noise_level": 200, "inpaint": 0.1, "inpaint_steps": 4, "inpaint_rounds": 2}
    pipeline(images[:1], **low, callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(int(t)) or {})
    assert seen == [99, 199, 199, 99, 199, 199] and len(seen) == pipeline.num_timesteps


def test_each_round_has_other_noise(pipeline, images):
    mask = torch.ones(len(images), *images.shape[-2:])
    same = dict(noise_level=500, num_inference_steps=10)
    drawn = [pipeline.inpaint(images * 2 - 1, mask, 0, number=number, **same) for number in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2], atol=1e-3)


def test_the_score_of_the_change_is_that_of_decoding(pipeline, images):
    scores = [pipeline(images, **FAST, score="change", **options).anomaly_score for options in ({}, INPAINT)]
    torch.testing.assert_close(*scores)


def test_an_image_does_not_depend_on_its_batch(pipeline, images):
    together = pipeline(images, **FAST, **INPAINT)
    for i in range(len(images)):
        alone = pipeline(images[i : i + 1], **FAST, **INPAINT)
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[i], atol=1e-5, rtol=0)
    again = pipeline(images, **FAST, **INPAINT).anomaly_map
    assert torch.equal(again, together.anomaly_map), "the noise is fixed"
    other = pipeline(images, **FAST, **INPAINT, generator=torch.Generator().manual_seed(1)).anomaly_map
    assert not torch.allclose(other, together.anomaly_map, atol=1e-4)


def test_only_lungs_are_drawn_anew_with_that_region(images):
    torch.manual_seed(0)
    segmenter = LungSegmenter(sample_size=16, block_out_channels=(8, 8))
    pipeline = CFGAnomalyPipeline(toy_unet(), DDIMScheduler(clip_sample=False), lung_segmenter=segmenter)
    pipeline.set_progress_bar_config(disable=True)
    asked = []
    gate = torch.zeros(len(images), *images.shape[-2:])
    gate[:, 6:10, 6:10] = 1
    pipeline.lung_gate = lambda x: asked.append(1) or gate[: len(x)]
    call = {**FAST, **INPAINT, "region": "lungs", "keep_below": 0.0}
    calls = spy(pipeline)
    pipeline(images, **call)
    [(mask, _)] = calls
    assert (
        mask.sum() > 0 and mask[:, :4].sum() == mask[:, 28:].sum() == mask[:, :, :4].sum() == mask[:, :, 28:].sum() == 0
    )
    assert len(asked) == 1, "the lungs are segmented once"


@pytest.mark.parametrize("solver", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_decoding_that_ends_early_ends_with_the_predicted_image(pipeline, images, solver):
    pipeline.scheduler = solver.from_config(pipeline.scheduler.config)
    x, span = images * 2 - 1, dict(noise_level=500, num_inference_steps=10, guidance_scale=0.0)
    seen = []

    def on_step(i, t, latents):
        seen.append((int(t), latents))
        return latents

    short = pipeline.decode(x, 0, decode_until=250, on_step=on_step, **span)
    scheduler = pipeline.scheduler
    taken, timesteps = pipeline.decoding_timesteps(500, 10, 250)
    assert [t for t, _ in seen] == taken.tolist() and 0 < len(taken) < len(timesteps) and int(taken[-1]) >= 250
    before = seen[-2][1]
    t = taken[-1]
    noise = noise_from_output(
        pipeline.predict(before, t, torch.zeros(len(x), dtype=torch.int64)),
        before,
        scheduler.alphas_cumprod[int(t)],
        scheduler.config.prediction_type,
    )
    after = timesteps[len(taken)]
    expected = image_from_noise(seen[-1][1], noise, scheduler.alphas_cumprod[int(after)])
    torch.testing.assert_close(short, expected, atol=1e-4, rtol=1e-4)
    if solver is DDIMScheduler:  # its step keeps the predicted image
        torch.testing.assert_close(
            short, image_from_noise(before, noise, scheduler.alphas_cumprod[int(t)]), atol=1e-4, rtol=1e-4
        )
    whole = pipeline.decode(x, 0, **span)
    torch.testing.assert_close(pipeline.decode(x, 0, decode_until=0, **span), whole)
    assert not torch.allclose(short, whole, atol=1e-2)


@pytest.mark.parametrize(
    ("level", "until", "taken"),
    [
        (500, 250, [400, 300]),
        (500, 0, [400, 300, 200, 100, 0]),
        (500, 900, [400, 300]),
        (300, 250, [200]),
        (100, 250, [0]),
    ],
)
def test_low_noise_levels_are_decoded_through_half_of_their_steps_at_least(pipeline, level, until, taken):
    assert pipeline.decoding_timesteps(level, 10, until)[0].tolist() == taken


def test_all_levels_but_the_counterfactuals_are_decoded_until_there(pipeline, images):
    one = [evaluations(pipeline, images, **FAST, decode_until=until) for until in (0, 250)]
    assert one[0][1] == one[1][1] == len(images) * (5 + 2 * 5) and torch.equal(
        one[0][0].anomaly_map, one[1][0].anomaly_map
    )
    levels = {**FAST, "noise_level": [300, 500]}
    (whole, whole_cost), (short, cost) = (evaluations(pipeline, images, **levels, decode_until=u) for u in (0, 250))
    assert (whole_cost, cost) == (len(images) * (5 + 2 * (5 + 3)), len(images) * (5 + 2 * (5 + 1)))
    assert torch.equal(whole.counterfactual, short.counterfactual)
    assert not torch.allclose(whole.anomaly_map, short.anomaly_map, atol=1e-4)


def test_steps_are_counted_and_can_be_interrupted(pipeline, images):
    call = {**FAST, **INPAINT, "noise_level": [300, 500], "decode_until": 150}
    for last in (2, 6, 11, 99):  # during inversion, decoding, inpainting, and not at all
        seen = []

        def callback(pipe, i, t, kwargs, seen=seen, last=last):
            seen.append((int(t), pipe.is_inpainting, pipe.num_timesteps))
            pipe._interrupt = i == last
            return {}

        output = pipeline(images[:1], **call, callback_on_step_end=callback)
        times = [0, 100, 200, 300, 400, 200, 400, 300, 200, 100, 0, 200, 100, 0]
        assert [t for t, _, _ in seen] == times[: last + 1]
        assert [inside for _, inside, _ in seen] == [i > 10 for i in range(len(seen))]
        assert {count for _, _, count in seen} == {len(times)}
        assert output.anomaly_map.isfinite().all() and not pipeline.interrupt and not pipeline.is_inpainting


def test_a_trajectory_shows_the_image_that_each_round_predicts(pipeline, images):
    trajectory, calls = Trajectory(), spy(pipeline)
    pipeline(images[:1], **FAST, **INPAINT, inpaint_rounds=2, callback_on_step_end=trajectory)
    frames = [frame for frame in trajectory.frames if frame.direction == "inpainting"]
    assert len(frames) == 10 and trajectory.frames[-10:] == frames
    for (mask, final), part in zip(calls, (frames[:5], frames[5:]), strict=True):
        assert part[0].predicted is None and [frame.level for frame in part] == [300, 200, 100, 0, 0]
        torch.testing.assert_close(part[-1].latents, final, atol=1e-5, rtol=0)
        known = mask[0] == 0
        for frame in part[1:4]:
            torch.testing.assert_close(frame.predicted[0, 0][known], final[0, 0][known], atol=1e-3, rtol=0)
    assert len(trajectory.film()) == len(trajectory.frames)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(inpaint=-0.1), "expected a finite `inpaint` from 0 to 1, got -0.1"),
        (dict(inpaint=1.5), "expected a finite `inpaint` from 0 to 1, got 1.5"),
        (dict(inpaint=True), "expected `inpaint` to be a number, got True"),
        (dict(inpaint=0.1, inpaint_steps=0), "expected `inpaint_steps` from 1 to 1000, got 0"),
        (dict(inpaint=0.1, inpaint_steps=2.5), "expected `inpaint_steps` to be a whole number, got 2.5"),
        (dict(inpaint=0.1, inpaint_rounds=0), "expected `inpaint_rounds` of 1 or more, got 0"),
        (dict(decode_until=-1), "expected `decode_until` to be a timestep, 0 or more, got -1"),
        (dict(decode_until=0.5), "expected `decode_until` to be a timestep, 0 or more, got 0.5"),
    ],
)
def test_invalid_settings_are_refused_before_the_network_runs(pipeline, images, wrong, message):
    pipeline.unet.register_forward_pre_hook(lambda module, args: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=message):
        pipeline(images, **{**FAST, **wrong})
