"""Numbers that the original programs computed, against ours. tests/goldens/README.md says what each file holds.

The differences measured here are the figures of docs/faithfulness.md; `pytest tests/test_goldens.py -s` prints them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from goldens.original_unet import OriginalUNet

from cxr_diffusers import CFGAnomalyPipeline
from cxr_diffusers.guided_diffusion import convert_state_dict
from cxr_diffusers.guided_diffusion.original import (
    ddim_loop,
    ddim_step,
    first_noising,
    guided_predictor,
    noise_predictor,
    respaced_chain,
    run_as_original,
)
from cxr_diffusers.training.losses import denoising_terms, variational_bound
from helpers import (
    HERE,
    OFFSET_VARIANTS,
    compared,
    converted,
    correlation,
    golden,
    largest,
    original_checkpoint,
    within,
)

torch.set_num_threads(1)
SHARED = Path(__file__).parents[2] / "shared" / "goldens"
NETWORKS = ("g1a_v1_seedflags", "g1b_v1_scaleshift_updown_heads", "g1d_wolleb_labelemb_4ch_neworder")
# whose weights lie beside them under another name
WEIGHTS = {
    "g3_classifier_unit": "g3_classifier_weights",
    "g3_clfguid_ddim1000_L30_s100": "g3_unet_weights",
    "g5_loop_k10_n0p5_nfe20": "g5_prior_weights",
}
CFG_RUNS = {"g2_cfg_ddim1000_L30_w4": 1000, "g2_cfg_ddim50_L25_w4": 50}


@torch.no_grad()
def forward_error(unet, name, null=False):
    """The largest difference of the UNet's output from the golden one, and from the right one's when broken."""
    g = golden(name)
    labels = torch.full_like(g["y"], unet.config.num_class_embeds - 1) if null else g["y"]
    output = unet(g["x"], g["t"], class_labels=labels).sample
    return largest(output, g["out_null" if null else "out_cond"])


@pytest.fixture(scope="module")
def trained():
    """The briefly trained golden network, (unet, scheduler)."""
    return converted("g1a_v1_seedflags")


# --- the files


def test_the_shipped_files_are_the_originals_bit_for_bit():
    if not SHARED.exists():
        pytest.skip("the originals are not beside this checkout")
    from safetensors.numpy import load_file

    compared = 0
    for file in HERE.glob("*.npz"):
        ours, theirs = np.load(file), dict(np.load(SHARED / file.name))
        name = WEIGHTS.get(file.stem, f"{file.stem}_weights")
        if (SHARED / f"{name}.safetensors").exists():
            weights = load_file(SHARED / f"{name}.safetensors")
            theirs |= {f"weights/{key}": value for key, value in weights.items()}
        for key in set(ours.files) - {"config", "keys"}:
            whole = theirs[key.removesuffix("_every4")]
            np.testing.assert_array_equal(ours[key], whole[..., ::4, ::4] if key.endswith("_every4") else whole)
            compared += 1
    assert compared > 500


# --- the network


@pytest.mark.parametrize("name", NETWORKS)
def test_the_converted_network_gives_the_originals_output(name):
    unet, _ = converted(name)
    assert within(f"{name}, with label", forward_error(unet, name), 2e-5)
    if "out_null" in golden(name):
        assert within(f"{name}, null label", forward_error(unet, name, null=True), 2e-5)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_network_that_test_convert_compares_with_is_the_originals_too(name):
    g, (weights, flags) = golden(name), original_checkpoint(name)
    net = OriginalUNet(
        dict(weights),
        mult=[int(m) for m in flags["channel_mult"].split(",")],
        attention=(1,),
        res_blocks=flags["num_res_blocks"],
        heads=flags["num_heads"],
        head_channels=flags["num_head_channels"],
        new_order=flags["use_new_attention_order"],
        scale_shift=flags["use_scale_shift_norm"],
        updown=flags["resblock_updown"],
        classes=flags["num_classes"],
        class_mlp=flags["clf_free"],
        in_channels=flags["in_channels"],
        out_channels=2 * flags["in_channels"],
    )
    assert largest(net(g["x"], g["t"], g["y"]), g["out_cond"]) <= 2e-5
    assert net.tensors.keys() == weights.keys()


def swap_k_and_v(weights):
    """In the middle block, whose rows are [q, k, v] for one head."""
    swapped = dict(weights)
    for end in ("weight", "bias"):
        q, k, v = weights[f"middle_block.1.qkv.{end}"].chunk(3)
        swapped[f"middle_block.1.qkv.{end}"] = torch.cat([q, v, k])
    return swapped


def broken_networks():
    """(what is wrong, golden file, the broken UNet, null label?)"""
    name = "g1a_v1_seedflags"
    yield "k and v swapped in the middle", name, converted(name, swap_k_and_v)[0], False
    for setting, value in {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}.items():
        yield f"{setting} {value}", name, rebuilt(converted(name)[0], **{setting: value}), False
    unet = converted(name)[0]
    with torch.no_grad():
        unet.class_embedding.weight[2] = unet.class_embedding.weight[:2].mean(dim=0)
    yield "the mean class as null label", name, unet, True
    name = "g1b_v1_scaleshift_updown_heads"
    yield "[Q, K, V] read for [q, k, v] per head", name, converted(name, use_new_attention_order=True)[0], False
    yield "head width 32 for 16", name, converted(name, num_head_channels=32)[0], False
    yield (
        "no norm in the middle attention",
        name,
        rebuilt(converted(name)[0], strict=False, attn_norm_num_groups=None),
        False,
    )
    name = "g1d_wolleb_labelemb_4ch_neworder"
    yield "[q, k, v] per head read for [Q, K, V]", name, converted(name, use_new_attention_order=False)[0], False
    yield "one head for two", name, converted(name, num_heads=1)[0], False


def rebuilt(unet, strict=True, **settings):
    other = type(unet)(**{**unet.config, **settings})
    other.load_state_dict(unet.state_dict(), strict=strict)
    return other.eval()


def test_every_break_of_the_network_is_seen():
    for what, name, unet, null in broken_networks():
        error = forward_error(unet, name, null)
        print(f"\n{what}: {error:.1e}", end="")
        assert error > 2e-5, what


@pytest.mark.slow
@torch.no_grad()
def test_the_full_size_network_gives_the_originals_output():
    g = golden("g1e_v1_full256")
    keys = json.loads(g["keys"])
    unet, _, info = convert_state_dict(recipe_weights(keys["shapes"]), **keys["config"])
    assert sum(np.prod(shape) for shape in keys["shapes"].values()) == 113_998_722
    x = torch.from_numpy(np.random.RandomState(7).standard_normal((1, 1, 256, 256)).astype(np.float32))
    assert torch.equal(x.flatten()[:8], g["x_first8"])
    for key, labels in {"out_cond": g["y"], "out_null": torch.tensor([2])}.items():
        output = unet(x, g["t"], class_labels=labels).sample
        assert within(f"full size, {key}", largest(output[..., ::4, ::4], g[f"{key}_every4"]), 2e-5)


def recipe_weights(shapes):
    """The random weights of golden g1e."""
    random, weights = np.random.RandomState(20240601), {}
    for name in sorted(shapes):
        z = random.standard_normal(shapes[name]).astype(np.float32)
        if z.ndim == 1:
            z = np.float32(0.1) * z + np.float32(name.endswith(".weight"))
        elif name != "label_emb.weight":
            z *= np.float32(np.sqrt(1 / np.prod(shapes[name][1:])))
        weights[name] = torch.from_numpy(z)
    return weights


# --- the schedules


@pytest.mark.parametrize(
    ("schedule", "steps", "bound"), [("linear", 1000, 4e-7), ("linear", 250, 4e-7), ("cosine", 1000, 4e-7)]
)
def test_the_schedulers_tables_are_the_originals(schedule, steps, bound):
    g = golden("g4_schedules")
    weights, flags = original_checkpoint("g1a_v1_seedflags")
    _, scheduler, _ = convert_state_dict(weights, **flags, noise_schedule=schedule, diffusion_steps=steps)
    betas, alphas = g[f"{schedule}{steps}_betas"], g[f"{schedule}{steps}_alphas_cumprod"]
    assert within(f"{schedule}{steps} betas, relative", relative(scheduler.betas, betas), bound)
    assert within(f"{schedule}{steps} alphas_cumprod", largest(scheduler.alphas_cumprod, alphas), bound)
    chain = respaced_chain(scheduler, steps)
    assert within(f"{schedule}{steps}, double precision", largest(torch.tensor(chain.alphas_cumprod), alphas), 1e-14)


def test_a_schedule_of_another_kind_is_seen():
    g = golden("g4_schedules")
    for wrong in (
        DDIMScheduler(beta_schedule="scaled_linear"),
        DDIMScheduler(beta_end=0.0201),
        DDPMScheduler(beta_start=0.0002),
    ):
        assert (wrong.betas / g["linear1000_betas"] - 1).abs().max() > 4e-7


def test_respacing_keeps_the_originals_timesteps():
    g = golden("g4_schedules")
    for name, steps in {"sp_ddim25_map": 25, "sp_ddim50_map": 50, "sp_ddim100_map": 100}.items():
        assert torch.equal(torch.from_numpy(respaced_chain(DDIMScheduler(), steps).timesteps), g[name])
    chain = respaced_chain(DDIMScheduler(), 50)
    assert largest(torch.tensor(chain.alphas_cumprod), g["sp_ddim50_alphas_cumprod"]) < 1e-14
    possible = set(g["possible_ddimN"].tolist())
    for steps in range(1, 1001):
        if steps in possible:
            timesteps = respaced_chain(DDIMScheduler(), steps).timesteps
            stride = int(timesteps[1])
            assert timesteps.tolist() == list(range(0, 1000, stride)) and len(timesteps) == steps
            assert len(range(0, 1000, stride - 1 or 1)) > steps or stride == 1
        else:
            with pytest.raises(ValueError, match="whole stride"):
                respaced_chain(DDIMScheduler(), steps)


def test_where_diffusers_spacing_is_the_originals_and_where_not():
    """Ours is diffusers' "leading": the same for 50, 100, 250, 500, 1000; the originals' "250" is spaced otherwise."""
    g = golden("g4_schedules")
    same = []
    for steps in g["possible_ddimN"].tolist():
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(steps)
        if np.array_equal(scheduler.timesteps.flip(0), respaced_chain(scheduler, steps).timesteps):
            same.append(steps)
    assert {50, 100, 250, 500, 1000} <= set(same) and 39 not in same
    print(f"\n{len(same)} of {len(g['possible_ddimN'])} spacings are diffusers' own", end="")
    scheduler = DDIMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(250)
    assert torch.equal(scheduler.timesteps.flip(0), g["sp_250_map"])


# --- the loss


def loss_errors(unet, scheduler, shift=0):
    """(squared error, bound): largest relative differences of the two terms from the golden ones."""
    g = golden("g4_losses")
    with torch.no_grad():
        terms = denoising_terms(unet, scheduler, g["x0"], g["y"], g["noise"], (g["MSE_t"] + shift).clamp(0, 999))
    return relative(terms["mse"], g["MSE_mse"]), relative(terms["vlb"], g["MSE_vb"], SMALLEST_BOUND)


def relative(a, b, floor=0.0):
    """The largest difference relative to b, or to `floor` where b is smaller."""
    return ((a - b).abs() / b.abs().clamp(min=floor)).max().item()


# bits per pixel: below it float32 rounding is all that is left of the bound
SMALLEST_BOUND = 1e-3


def test_the_hybrid_losss_terms_are_the_originals(trained):
    mse, vlb = loss_errors(*trained)
    assert within("squared error, relative", mse, 1e-4)
    assert within("variational bound, relative", vlb, 2e-4)
    g = golden("g4_losses")
    with torch.no_grad():
        # the same images on the 50-step chain: only the squared error is the same quantity there
        timesteps = g["RESCALED_MSE_ddim50_t"] * 20
        terms = denoising_terms(*trained, g["x0"], g["y"], g["noise"], timesteps)
    assert within("squared error, 50 steps, relative", relative(terms["mse"], g["RESCALED_MSE_ddim50_mse"]), 1e-4)


@torch.no_grad()
def test_the_remaining_difference_of_the_loss_is_rounding_of_diffusers_noise_levels(trained):
    """`add_noise` takes 1 - abar from a float32 abar; on the original's own x_t the squared error is the original's."""
    g, (unet, scheduler) = golden("g4_losses"), trained
    prediction = unet(g["x_t"], g["t"], class_labels=g["y"]).sample[:, :1]
    assert within("predicted noise", largest(prediction, g["MSE_eps_pred"]), 2e-5)
    error = ((prediction - g["noise"]) ** 2).mean(dim=(1, 2, 3))
    assert within("squared error on the original's x_t", largest(error, g["MSE_mse"]), 1e-6)
    output = unet(g["x_t"], g["t"], class_labels=g["y"]).sample
    bound = variational_bound(scheduler, g["x0"], g["x_t"], g["t"], *output.chunk(2, dim=1))
    assert within("bound on the original's x_t, relative", relative(bound, g["MSE_vb"], SMALLEST_BOUND), 1e-4)
    assert within("x_t by add_noise", largest(scheduler.add_noise(g["x0"], g["noise"], g["t"]), g["x_t"]), 2e-5)


def test_a_shifted_timestep_or_another_schedule_changes_the_loss(trained):
    unet, scheduler = trained
    for what, errors in {
        "timesteps one too high": loss_errors(unet, scheduler, shift=1),
        "cosine schedule": loss_errors(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2")),
    }.items():
        print(f"\n{what}: squared error {errors[0]:.1e}, bound {errors[1]:.1e}, relative", end="")
        assert errors[0] > 1e-3 and errors[1] > 1e-3, what


def test_the_gradients_of_the_loss_are_the_originals():
    g = golden("g4_losses")
    unet, scheduler = converted("g1a_v1_seedflags")
    terms = denoising_terms(unet, scheduler, g["x0"], g["y"], g["noise"], g["MSE_t"])
    (terms["mse"] + terms["vlb"]).mean().backward()
    middle = unet.mid_block.attentions[0]
    ours = {
        "input_blocks.0.0.weight": unet.conv_in.weight.grad,
        "out.2.weight": unet.conv_out.weight.grad,
        "out.2.bias": unet.conv_out.bias.grad,
        "middle_block.1.qkv.weight": torch.cat([m.weight.grad for m in (middle.to_q, middle.to_k, middle.to_v)])[
            ..., None
        ],
    }
    for name, gradient in ours.items():
        theirs = g[f"grad__{name}"]
        assert within(f"gradient of {name}, relative", largest(gradient, theirs) / theirs.abs().max().item(), 5e-4)


# --- the procedure


def steps_of(run, direction):
    """(index, x before, x after) of each golden step of one direction."""
    g, level = golden(run), int(golden(run)["noise_level"])
    if direction > 0:
        states = [g["x_noisy"], *g["encode_x"]]
        return list(zip(range(1, level), states[:-1], states[1:], strict=True))
    states = [g["latent"], *g["decode_x"]]
    return list(zip(range(level - 2, -1, -1), states[:-1], states[1:], strict=True))


@torch.no_grad()
def step_error(predict, chain, direction, clip=True, index_shift=0):
    """The largest difference over all single steps, each from the golden's own state before it."""
    errors = []
    for index, before, after in steps_of("g2_cfg_ddim50_L25_w4", direction):
        index += index_shift
        noise = predict(before, int(chain.timesteps[index]))
        x, _ = ddim_step(before, noise, chain.alpha(index), chain.alpha(index + direction), clip)
        errors.append(largest(x, after))
    assert len(errors) == 24
    return max(errors)


def test_one_encoding_step_is_the_originals(trained):
    unet, scheduler = trained
    chain, predict = respaced_chain(scheduler, 50), noise_predictor(unet, 2)
    assert within("one encoding step", step_error(predict, chain, +1), 2e-5)
    assert step_error(predict, chain, +1, index_shift=1) > 1e-3
    assert step_error(noise_predictor(unet, 0), chain, +1) > 1e-3  # a class named while encoding
    assert step_error(predict, chain, +1, clip=False) > 1e-3


def test_one_decoding_step_with_guidance_is_the_originals(trained):
    unet, scheduler = trained
    chain, predict = respaced_chain(scheduler, 50), guided_predictor(unet, 0, 2, 4.0)
    assert within("one decoding step", step_error(predict, chain, -1), 5e-5)
    assert step_error(predict, chain, -1, index_shift=1) > 1e-3
    assert step_error(predict, chain, -1, clip=False) > 1e-3
    assert step_error(guided_predictor(unet, 0, 2, 5.0), chain, -1) > 1e-3  # diffusers' s = 1 + w taken for w
    assert step_error(guided_predictor(unet, 1, 2, 4.0), chain, -1) > 1e-3


@torch.no_grad()
def test_diffusers_own_decoding_step_is_the_originals_if_told_to_derive_the_noise_anew(trained):
    unet, _ = trained
    scheduler = DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(50)
    predict, errors = guided_predictor(unet, 0, 2, 4.0), {True: [], False: []}
    for index, before, after in steps_of("g2_cfg_ddim50_L25_w4", -1):
        t = int(scheduler.timesteps.flip(0)[index])
        for anew in errors:
            x = scheduler.step(predict(before, t), t, before, use_clipped_model_output=anew).prev_sample
            errors[anew].append(largest(x, after))
    assert within("diffusers' step, use_clipped_model_output", max(errors[True]), 5e-5)
    print(f"\ndiffusers' step without it: {max(errors[False]):.1e}", end="")
    assert max(errors[False]) > 1e-3


@torch.no_grad()
def test_the_image_predicted_by_guided_noise_equals_the_originals(trained):
    """The golden files keep the noise only in this form: x0 = clamp(x / sqrt(abar) - noise sqrt(1 / abar - 1))."""
    unet, scheduler = trained
    chain, predict = respaced_chain(scheduler, 50), guided_predictor(unet, 0, 2, 4.0)
    images = golden("g2_cfg_ddim50_L25_w4")["decode_pred_x0"]
    errors = []
    for (index, before, _), image in zip(steps_of("g2_cfg_ddim50_L25_w4", -1), images, strict=True):
        noise = predict(before, int(chain.timesteps[index]))
        errors.append(largest(ddim_step(before, noise, chain.alpha(index), 1.0, True)[1], image))
    assert within("predicted image by guided noise", max(errors), 5e-5)


@pytest.mark.parametrize("run", CFG_RUNS)
def test_the_whole_procedure_gives_the_originals_counterfactual_and_maps(trained, run):
    unet, scheduler = trained
    g = golden(run)
    output = run_as_original(
        unet,
        g["x0"],
        noise_level=int(g["noise_level"]),
        guidance_scale=float(g["guidance_scale"]),
        num_steps=CFG_RUNS[run],
        scheduler=scheduler,
        first_noise=g["first_noise"],
        progress=False,
    )
    assert within(f"{run}: latents", largest(output.latents, g["latent"]), 2e-5)
    assert within(f"{run}: counterfactual", largest(output.sample, g["sample"]), 2e-5)
    for ours, theirs in MAPS.items():
        assert within(f"{run}: map {ours}", largest(output.maps[ours][0], g[theirs]), 2e-5)
    assert largest(output.anomaly_map[0], g["anomaly_map_seed"]) <= 2e-5


MAPS = {
    "difference": "anomaly_map_seed",
    "minmax": "anomaly_map_minmax",
    "normalized": "anomaly_map_wolleb_chexpert",
}


@pytest.mark.parametrize("run", CFG_RUNS)
def test_the_network_is_asked_at_the_originals_timesteps_and_labels(trained, run):
    unet, scheduler = trained
    g, calls = golden(run), []
    hook = unet.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args[1], kwargs["class_labels"])), with_kwargs=True
    )
    level = int(g["noise_level"])
    try:
        run_as_original(unet, g["x0"], noise_level=level, num_steps=CFG_RUNS[run], scheduler=scheduler, progress=False)
    finally:
        hook.remove()
    # ours asks for the two labels of a guided step at once
    flat = [(t, label == 2) for t, labels in calls for label in labels.tolist()]
    assert [t for t, _ in flat] == g["model_calls_t"].tolist()
    assert [null for _, null in flat[: level - 1]] == g["model_calls_null"][: level - 1].tolist()
    assert sum(null for _, null in flat) == g["model_calls_null"].sum()


def test_a_batch_equals_its_images_one_by_one_and_the_pipelines_preparation_is_used(trained):
    pipeline = CFGAnomalyPipeline(*trained, data_range=(-1.0, 1.0), aspect="pad")
    images = [np.random.RandomState(i).randint(0, 256, (40, 30), dtype=np.uint8) for i in range(2)]
    noise = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = dict(noise_level=5, num_steps=50, progress=False, output_type="np")
    together = run_as_original(pipeline, images, first_noise=noise, **settings)
    for i, radiograph in enumerate(images):
        alone = run_as_original(pipeline, radiograph, first_noise=noise[i : i + 1], **settings)
        np.testing.assert_allclose(together.anomaly_map[i], alone.anomaly_map[0], atol=2e-5)
    assert together.image.shape == (2, 32, 32, 1) and together.anomaly_map.shape == (2, 32, 32)
    assert (together.image[:, :, :3] == 0).all()  # the bars of "pad"
    assert together.image.min() == 0 and together.image.max() == 1


def test_the_first_noise_is_the_generators(trained):
    unet, scheduler = trained
    x0 = golden("g2_cfg_ddim50_L25_w4")["x0"]
    first, again, other = (
        run_as_original(
            unet, x0, noise_level=2, num_steps=50, generator=torch.Generator().manual_seed(seed), progress=False
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.sample, again.sample) and not torch.equal(first.sample, other.sample)


def test_without_guidance_encoding_and_decoding_both_name_the_target():
    """Wolleb's procedure, its classifier left out; every embedding is a class there."""
    unet, scheduler = converted("g1d_wolleb_labelemb_4ch_neworder")
    labels = []
    unet.register_forward_pre_hook(
        lambda _, args, kwargs: labels.extend(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    x0 = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    output = run_as_original(
        unet, x0, guidance_scale=-1, target_label=1, noise_level=3, num_steps=50, scheduler=scheduler, progress=False
    )
    assert labels == [1] * 4
    assert torch.equal(output.maps["summed"], (x0 - output.sample).abs().sum(dim=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(noise_level=500, num_steps=50), "index into 50 steps"),
        (dict(noise_level=1), "2..1000"),
        (dict(num_steps=41, noise_level=5), "whole stride"),
        (dict(target_label=2), "target_label"),
    ],
)
def test_arguments_that_the_original_could_not_run_are_refused(trained, wrong, message):
    with pytest.raises(ValueError, match=message):
        run_as_original(*trained[:1], torch.zeros(1, 1, 32, 32), progress=False, **wrong)


# --- what the original's offsets change


def procedure(unet, scheduler, x0, noise, steps, level, *, noising=True, first=1, below=2, clip=True):
    """The original's image with some of its offsets mended.

    noising: begin with random noise. first: the index where encoding begins. below: how many indices below the
    latents' own level decoding begins. clip: clamp the predicted image and derive the noise anew.
    """
    chain = respaced_chain(scheduler, steps)
    x = first_noising(x0, noise, chain) if noising else x0
    latents = ddim_loop(noise_predictor(unet, 2), x, chain, range(first, level), +1, clip)
    return ddim_loop(guided_predictor(unet, 0, 2, 4.0), latents, chain, range(level - below, -1, -1), -1, clip)


@torch.no_grad()
def measure_variants(unet, scheduler, run, steps, level):
    """Print what each offset changes; {what: (map, the original's map)}."""
    g, maps = golden(run), {}

    def anomaly_map(**change):
        return (g["x0"] - procedure(unet, scheduler, g["x0"], g["first_noise"], steps, level, **change)).abs()[0, 0]

    theirs = anomaly_map()
    print(f"\n{steps} steps, level {level}: map mean {theirs.mean():.4f}, max {theirs.max():.3f}", end="")
    for what, change in OFFSET_VARIANTS.items():
        maps[what] = (anomaly_map(**change), theirs)
        print(f"\n  {what}: {compared(*maps[what])}", end="")
    return maps


def test_how_much_each_offset_of_the_original_changes_the_map(trained):
    run = "g2_cfg_ddim50_L25_w4"
    for ours, theirs in measure_variants(*trained, run, steps=50, level=25).values():
        assert largest(theirs, golden(run)["anomaly_map_seed"]) < 2e-5
        assert largest(ours, theirs) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "level"), [(1000, 30), (1000, 500)])
def test_how_much_they_change_it_with_1000_steps(trained, steps, level):
    maps = measure_variants(*trained, "g2_cfg_ddim1000_L30_w4", steps, level)
    # at a level as low as 30 nothing reaches the clamp
    assert all(largest(*pair) > 1e-3 for what, pair in maps.items() if (what, level) != ("no clamp", 30))


def test_how_far_our_pipelines_map_is_from_the_originals(trained):
    for run, level in {"g2_cfg_ddim1000_L30_w4": 30, "g2_cfg_ddim50_L25_w4": 500}.items():
        measure_pipeline(*trained, golden(run)["x0"], golden(run)["anomaly_map_seed"], CFG_RUNS[run], level)


@pytest.mark.slow
def test_how_far_it_is_at_the_published_settings(trained):
    g = golden("g2_cfg_ddim50_L25_w4")
    output = run_as_original(trained[0], g["x0"], scheduler=trained[1], first_noise=g["first_noise"], progress=False)
    measure_pipeline(*trained, g["x0"], output.maps["difference"][0], 1000, 500)


def measure_pipeline(unet, scheduler, x0, theirs, steps, level):
    pipeline = CFGAnomalyPipeline(unet, scheduler, data_range=(0.0, 1.0), aspect="squash")
    pipeline.set_progress_bar_config(disable=True)
    settings = dict(noise_level=level, num_inference_steps=steps, guidance_scale=4.0, output_type="pt")
    ours = pipeline(x0, **settings).anomaly_map[0]
    print(f"\n{steps} steps, level {level}: our pipeline: {compared(ours, theirs)}", end="")
    assert correlation(ours, theirs) > 0.5
