"""What the original's encoder classifier, its guidance and its ancestral steps computed, against ours.

See test_goldens.py; `pytest tests/test_goldens_classifier.py -s` prints the figures of docs/faithfulness.md.
"""

import pytest
import torch
import torch.nn.functional as F
from goldens.original_unet import OriginalClassifier
from transformers import ResNetConfig, ResNetForImageClassification

from cxr_diffusers import ClassifierGuidedPipeline, GradCAMPipeline
from cxr_diffusers.guided_diffusion.original import (
    OriginalProcedure,
    classifier_gradient,
    ddim_loop,
    ddim_step,
    first_noising,
    guided_output,
    noise_predictor,
    respaced_chain,
    run_as_original,
)
from cxr_diffusers.guided_diffusion.original_steps import ancestral_distribution, ancestral_step, noised
from helpers import OFFSET_VARIANTS, compared, converted, golden, largest, original_checkpoint, within

torch.set_num_threads(1)
UNIT, RUN = "g3_classifier_unit", "g3_clfguid_ddim1000_L30_s100"


@pytest.fixture(scope="module")
def classifier():
    return converted(UNIT)[0]


@pytest.fixture(scope="module")
def guided():
    """The golden UNet that the classifier guides, (unet, scheduler)."""
    return converted(RUN)


# --- the classifier


def unit_errors(classifier):
    """The largest difference from the golden logits, log-probabilities, cross-entropies, and gradient / its largest."""
    g = golden(UNIT)
    x = g["x"].clone().requires_grad_()
    logits = classifier(x, g["t"])
    chosen = logits.log_softmax(-1)[torch.arange(3), g["y"]]
    (gradient,) = torch.autograd.grad(chosen.sum(), x)
    return {
        "logits": largest(logits, g["logits"]),
        "log-probability": largest(chosen, g["log_prob_sel"]),
        "cross-entropy": largest(F.cross_entropy(logits, g["y"], reduction="none"), g["ce"]),
        "input gradient, relative": largest(gradient, g["grad_x"]) / g["grad_x"].abs().max().item(),
    }


def test_the_converted_classifier_gives_the_originals_logits_gradient_and_loss(classifier):
    bounds = dict(zip(unit_errors(classifier), (1e-6, 1e-6, 1e-6, 1e-5), strict=True))
    for what, error in unit_errors(classifier).items():
        assert within(what, error, bounds[what]), what


@torch.no_grad()
def test_the_classifier_that_test_convert_classifier_compares_with_is_the_originals_too():
    weights, flags = original_checkpoint(UNIT)
    net = OriginalClassifier(
        dict(weights), mult=(1, 2), attention=(1,), head_channels=32, scale_shift=True, updown=True, out_channels=2
    )
    assert flags["classifier_depth"] == net.res_blocks
    assert largest(net(golden(UNIT)["x"], golden(UNIT)["t"]), golden(UNIT)["logits"]) <= 1e-6
    assert net.tensors.keys() == weights.keys()


def swapped(name, order):
    """The rows of q, k, v of the pool in another order."""

    def change(weights):
        parts = [weights[f"{name}.{end}"].chunk(3) for end in ("weight", "bias")]
        new = {
            f"{name}.{end}": torch.cat([p[i] for i in order]) for end, p in zip(("weight", "bias"), parts, strict=True)
        }
        return {**weights, **new}

    return change


def broken_classifiers(classifier):
    yield "q and k swapped in the pool", converted(UNIT, swapped("out.2.qkv_proj", (1, 0, 2)))[0]
    yield "k and v swapped in the pool", converted(UNIT, swapped("out.2.qkv_proj", (0, 2, 1)))[0]
    yield "legacy order in the pool", converted(UNIT, per_head)[0]
    yield "one head for two", converted(UNIT, classifier_num_head_channels=64)[0]
    for setting, value in {"norm_eps": 1e-4, "resnet_time_scale_shift": "default"}.items():
        yield f"{setting} {value}", rebuilt(classifier, **{setting: value})
    moved = rebuilt(classifier)
    with torch.no_grad():
        moved.head.positional_embedding.copy_(moved.head.positional_embedding.roll(1, 0))
    yield "positions moved by one", moved


def per_head(weights):
    """The pool's rows as [q, k, v] head by head, which is the order of the other attentions."""
    rows = {k: v.unflatten(0, (2, 3, -1)).transpose(0, 1).flatten(0, 2) for k, v in weights.items() if "qkv_proj" in k}
    return {**weights, **rows}


def rebuilt(classifier, **settings):
    other = type(classifier)(**{k: v for k, v in {**classifier.config, **settings}.items() if not k.startswith("_")})
    own = other.state_dict()
    other.load_state_dict({k: v[: len(own[k])] for k, v in classifier.state_dict().items()})
    return other.eval()


def test_every_break_of_the_classifier_is_seen(classifier):
    for what, broken in broken_classifiers(classifier):
        error = unit_errors(broken)["logits"]
        print(f"\n{what}: {error:.1e}", end="")
        assert error > 1e-6, what


# --- its guidance


def steps():
    """(index, x before, x after, predicted image, gradient) of each golden step of decoding."""
    g = golden(RUN)
    before = [g["latent"], *g["decode_x"][:-1]]
    return list(zip(range(28, -1, -1), before, g["decode_x"], g["decode_pred_x0"], g["grads_unscaled"], strict=True))


def step_errors(unet, scheduler, classifier, scale=100.0, target=0, label=0, index_shift=0, root=True, every=1):
    """(gradient, relative, image predicted, x after), largest over all steps, each from the golden's own state."""
    chain = respaced_chain(scheduler, 1000)
    predict, steer = noise_predictor(unet, label), classifier_gradient(classifier, target, 1.0, chain)
    errors = []
    for index, before, after, image, golden_gradient in steps()[::every]:
        gradient, alpha = steer(before, index + index_shift), chain.alpha(index)
        with torch.no_grad():
            noise = predict(before, index)
            # `root` False: as if the gradient were not multiplied by sqrt(1 - abar)
            factor = scale if root else scale / (1 - alpha) ** 0.5
            x, x0 = ddim_step(before, noise, alpha, chain.alpha(index - 1), True, factor * gradient)
        relative = largest(gradient, golden_gradient) / golden_gradient.abs().max().item()
        errors.append((relative, largest(x0, image), largest(x, after)))
    return tuple(map(max, zip(*errors, strict=True)))


# bounds; the gradient moves the image by up to 2e-3 here, so the usual 2e-5 would let one percent of it pass
GRADIENT, PREDICTED_IMAGE = 1e-5, 2e-6


def test_one_guided_step_and_its_gradient_are_the_originals(guided, classifier):
    assert len(steps()) == 29
    gradient, image, x = step_errors(*guided, classifier)
    assert within("gradient, relative", gradient, GRADIENT)
    assert within("predicted image under guidance", image, PREDICTED_IMAGE)
    assert within("one guided decoding step", x, 1e-5)


def test_every_break_of_a_guided_step_is_seen(guided, classifier):
    for what, change in {
        "no sqrt(1 - abar) on the gradient": dict(root=False),
        "the gradient's sign": dict(scale=-100.0),
        "scale 99 for 100": dict(scale=99.0),
        "towards the other class": dict(target=1),
        "the UNet told the other class": dict(label=1),
        "the classifier one timestep late": dict(index_shift=1),
    }.items():
        gradient, image, x = step_errors(*guided, classifier, every=7, **change)
        print(f"\n{what}: gradient {gradient:.1e}, predicted image {image:.1e}, x {x:.1e}", end="")
        assert gradient > GRADIENT or image > PREDICTED_IMAGE, what


def as_original(guided, classifier, **changes):
    unet, scheduler = guided
    g = golden(RUN)
    settings = dict(noise_level=int(g["noise_level"]), classifier_scale=float(g["classifier_scale"]))
    settings |= dict(scheduler=scheduler, first_noise=g["first_noise"], progress=False)
    return run_as_original(unet, g["x0"], classifier=classifier, **{**settings, **changes})


@pytest.fixture(scope="module")
def run(guided, classifier):
    """(`OriginalOutput` of the golden run, the UNet's timesteps, its labels, the classifier's timesteps)"""
    return spied(guided, classifier)


def test_wollebs_whole_procedure_gives_the_originals_counterfactual_and_maps(guided, run):
    g, output = golden(RUN), run[0]
    chain = respaced_chain(guided[1], 1000)
    assert within("first noising", largest(first_noising(g["x0"], g["first_noise"], chain), g["x_noisy"]), 1e-6)
    assert within("latents", largest(output.latents, g["latent"]), 2e-5)
    assert within("counterfactual", largest(output.sample, g["sample"]), 2e-5)
    assert within("map summed over channels", largest(output.maps["summed"][0], g["anomaly_map_sum"]), 2e-5)
    assert within("map of CheXpert", largest(output.maps["normalized"][0], g["anomaly_map_chexpert"]), 2e-5)


def spied(guided, classifier, **changes):
    """(output, the UNet's timesteps, its labels, the classifier's timesteps) of one run."""
    asked, told, shown_at = [], [], []

    def spy(x, t):
        shown_at.extend(t.tolist())
        return classifier(x, t)

    spy.config = classifier.config

    def listen(_, args, kwargs):
        asked.append(args[1])
        told.extend(kwargs["class_labels"].tolist())

    hook = guided[0].register_forward_pre_hook(listen, with_kwargs=True)
    try:
        output = as_original(guided, spy, **changes)
    finally:
        hook.remove()
    return output, asked, told, shown_at


def test_unet_and_classifier_are_asked_at_the_originals_timesteps(run):
    g, (_, asked, told, shown_at) = golden(RUN), run
    assert asked == g["unet_t"].tolist() and shown_at == g["clf_t"].tolist()
    assert set(told) == {0}, "encoding and decoding both name the target"


def test_with_fewer_steps_the_originals_classifier_is_asked_at_indices_and_ours_at_timesteps(guided, classifier):
    """Its bug: 50 steps are 20 timesteps apart, and the classifier is told that the image is nearly clean."""
    chain = dict(num_steps=50, noise_level=25)
    theirs, asked, _, at_indices = spied(guided, classifier, classifier_at="index", **chain)
    ours, _, _, at_timesteps = spied(guided, classifier, **chain)
    assert at_indices == list(range(23, -1, -1))
    assert at_timesteps == asked[24:] == list(range(460, -1, -20))
    theirs, ours = theirs.maps["difference"], ours.maps["difference"]
    print(f"\nthe bug mended, 50 steps: map mean {theirs.mean():.4f}, {compared(ours[0], theirs[0])}", end="")
    assert largest(ours, theirs) > 1e-3


# --- what its offsets change, and our pipeline


def procedure(guided, classifier, x0, noise, steps, level, *, noising=True, first=1, below=2, clip=True):
    """As `test_goldens.procedure`, with the classifier's guidance."""
    unet, scheduler = guided
    chain = respaced_chain(scheduler, steps)
    x = first_noising(x0, noise, chain) if noising else x0
    steer, predict = classifier_gradient(classifier, 0, 100.0, chain), noise_predictor(unet, 0)
    with torch.no_grad():
        latents = ddim_loop(predict, x, chain, range(first, level), +1, clip)
        return ddim_loop(predict, latents, chain, range(level - below, -1, -1), -1, clip, steer=steer)


def measure_variants(guided, classifier, steps, level):
    g = golden(RUN)

    def difference(**change):
        result = procedure(guided, classifier, g["x0"], g["first_noise"], steps, level, **change)
        return (g["x0"] - result).abs()[0, 0]

    theirs = difference()
    print(f"\n{steps} steps, level {level}: map mean {theirs.mean():.4f}, max {theirs.max():.3f}", end="")
    for what, change in OFFSET_VARIANTS.items():
        ours = difference(**change)
        print(f"\n  {what}: {compared(ours, theirs)}", end="")
        assert largest(ours, theirs) > 1e-4 or what == "no clamp", what
    return theirs


def measure_pipeline(guided, classifier, theirs, steps, level):
    pipeline = guided_pipeline(guided, classifier)
    settings = dict(noise_level=level, num_inference_steps=steps, classifier_scale=100.0, output_type="pt")
    ours = pipeline(golden(RUN)["x0"], **settings).anomaly_map[0]
    print(f"\n  our pipeline: {compared(ours, theirs)}", end="")
    return ours


def guided_pipeline(guided, classifier):
    preparation = dict(data_range=(0.0, 1.0), scaling="minmax", aspect="squash")
    pipeline = ClassifierGuidedPipeline(guided[0], classifier, guided[1], has_null_label=False, **preparation)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "level", "timestep"), [(1000, 500, 500), (50, 25, 500), (1000, 30, 30)])
def test_how_much_each_offset_of_wollebs_code_changes_the_map(guided, classifier, steps, level, timestep):
    theirs = measure_variants(guided, classifier, steps, level)
    if level == 30:
        assert largest(theirs, golden(RUN)["anomaly_map_sum"]) < 2e-5
    measure_pipeline(guided, classifier, theirs, steps, timestep)


def test_a_pipeline_with_a_classifier_answers_as_wollebs_code(guided, classifier):
    g, pipeline = golden(RUN), guided_pipeline(guided, classifier)
    settings = dict(noise_level=5, num_steps=50)
    expected = run_as_original(
        pipeline, g["x0"], generator=torch.Generator().manual_seed(0), progress=False, **settings
    )
    noise = torch.randn(g["x0"].shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(expected.sample, as_original(guided, classifier, first_noise=noise, **settings).sample)
    procedure = OriginalProcedure(pipeline)
    output = procedure(g["x0"], noise_level=5, num_inference_steps=50, output_type="pt")
    assert torch.equal(output.anomaly_map, expected.anomaly_map)
    other = procedure(g["x0"], noise_level=5, num_inference_steps=50, classifier_scale=500.0, output_type="pt")
    assert largest(other.anomaly_map, output.anomaly_map) > 1e-6


def test_a_batch_equals_its_images_one_by_one_also_with_a_classifier(guided, classifier):
    x0 = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    settings = dict(noise_level=4, num_steps=50)
    unet, scheduler = guided
    together, *alone = (
        run_as_original(
            unet, x0[i], classifier=classifier, scheduler=scheduler, first_noise=noise[i], progress=False, **settings
        ).sample
        for i in (slice(0, 2), slice(0, 1), slice(1, 2))
    )
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(classifier_at="step"), "timestep or index"),
        (dict(target_label=2), "target_label"),
        (dict(use_ddim=False, num_steps=250), "more than 499 steps"),
    ],
)
def test_arguments_that_make_no_sense_with_a_classifier_are_refused(guided, classifier, wrong, message):
    with pytest.raises(ValueError, match=message):
        as_original(guided, classifier, **wrong)


def test_a_pipeline_without_a_unet_or_a_classifier_that_knows_no_noise_has_no_original_procedure(guided):
    resnet = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=2))
    with pytest.raises(ValueError, match="with a UNet.* got GradCAMPipeline"):
        run_as_original(GradCAMPipeline(resnet, sample_size=32), torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="classifier of noisy images"):
        run_as_original(guided_pipeline(guided, resnet), torch.zeros(1, 1, 32, 32))


# --- ancestral sampling


@torch.no_grad()
def ancestral_errors(shift=0, clip=True, change=lambda output: output):
    """(mean, log variance, image predicted), largest over six timesteps."""
    g, (unet, scheduler) = golden("g4_losses"), converted("g1a_v1_seedflags")
    chain, errors = respaced_chain(scheduler, 1000), []
    for i, t in enumerate(g["t"].tolist()):
        x, label = g["x_t"][i : i + 1], int(g["y"][i])
        output = change(guided_output(unet, {label: 1.0})(x, t))
        result = ancestral_distribution(x, output, chain, min(t + shift, 999), clip)
        names = ("pmv_clip_mean", "pmv_clip_log_variance", "pmv_clip_pred_xstart")
        errors.append([largest(a, g[name][i : i + 1]) for a, name in zip(result, names, strict=True)])
    return tuple(map(max, zip(*errors, strict=True)))


def test_mean_and_variance_of_an_ancestral_step_are_the_originals():
    mean, log_variance, image = ancestral_errors()
    assert within("mean", mean, 1e-6)
    assert within("log variance", log_variance, 1e-5)
    # the noise is weighed by up to 157 at t = 999, and so is its rounding
    assert within("predicted image", image, 1e-3)


def test_every_break_of_an_ancestral_step_is_seen():
    def noise_for_variance(output):
        return output.roll(1, dims=1)

    for what, change in {
        "the index one too high": dict(shift=1),
        "no clamp": dict(clip=False),
        "the halves of the output swapped": dict(change=noise_for_variance),
        "no learned variance": dict(change=lambda output: output[:, :1]),
    }.items():
        mean, log_variance, image = ancestral_errors(**change)
        print(f"\n{what}: mean {mean:.1e}, log variance {log_variance:.1e}, predicted image {image:.1e}", end="")
        assert mean > 1e-6 or log_variance > 1e-5, what


@torch.no_grad()
def test_the_ancestral_procedure_starts_at_index_499_and_takes_as_many_steps_as_the_level(guided, classifier):
    """The original's constant: what goes into the first of 3 steps is as noisy as index 499, whatever the level."""
    unet, scheduler = converted("g1a_v1_seedflags")
    x0, chain = golden("g2_cfg_ddim1000_L30_w4")["x0"], respaced_chain(scheduler, 1000)
    noises = [torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    settings = dict(scheduler=scheduler, first_noise=noises[0], step_noises=noises[1:], noise_level=3, progress=False)
    output = run_as_original(unet, x0, use_ddim=False, guidance_scale=4.0, **settings)

    x = noised(x0, noises[0], chain.alpha(499))
    assert torch.equal(output.latents, x)
    for index, noise in zip((2, 1, 0), noises[1:], strict=True):
        cond, null = (unet(x, index, class_labels=torch.tensor([label])).sample for label in (0, 2))
        x = ancestral_step(x, 5 * cond - 4 * null, chain, index, True, noise)
    torch.testing.assert_close(output.sample, x, atol=2e-5, rtol=0)

    settings |= dict(scheduler=guided[1], step_noises=None)
    with_gradient, without = (
        run_as_original(
            guided[0],
            x0,
            use_ddim=False,
            classifier=classifier,
            classifier_scale=scale,
            generator=torch.Generator().manual_seed(7),
            **settings,
        ).sample
        for scale in (100.0, 0.0)
    )
    assert largest(with_gradient, without) > 1e-6
