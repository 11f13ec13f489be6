"""Numbers that the original Fixed-Point GAN computed, against ours.

They come from a program whose licence is non-commercial, so they stay out of this project: ../shared/goldens has them,
or these tests are skipped. `pytest tests/test_goldens_fixed_point_gan.py -s` prints the differences.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cxr_diffusers.models.fixed_point_gan import FixedPointDiscriminator, FixedPointGenerator
from cxr_diffusers.pipelines.cxr_anomaly import difference_map
from cxr_diffusers.training.adversarial_losses import discriminator_loss, generator_loss

torch.set_num_threads(1)
SHARED = Path(__file__).parents[2] / "shared" / "goldens"
FILES = {"g6_fpgan_Directory": "softmax", "g6_fpgan_BRATS": "binary"}


@pytest.fixture(scope="module", params=FILES)
def golden(request):
    """{key: tensor} of one file, its weights under "weights", its kind of classification under "classification"."""
    path = SHARED / f"{request.param}.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: the original's numbers are kept outside the project")
    arrays = np.load(path)
    weights = load_file(SHARED / f"{request.param}_weights.safetensors")
    return {
        **{key: torch.from_numpy(arrays[key]) for key in arrays},
        "weights": {k: v.float() if v.is_floating_point() else v for k, v in weights.items()},
        "classification": FILES[request.param],
    }


def our_name(name, num_res_blocks=2):
    """A key of the original's weights -> (player, key in ours)."""
    player, _, key = name.partition(".")
    parts = key.split(".")
    if player == "D":
        head = {"conv1": "conv_score", "conv2": "conv_class"}
        return player, f"{head[parts[0]]}.{parts[1]}" if parts[0] in head else f"convs.{int(parts[1]) // 2}.{parts[2]}"
    i, up = int(parts[1]), 9 + num_res_blocks
    if 9 <= i < up:
        inside = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
        return player, f"res_blocks.{i - 9}.{inside[parts[3]]}.{parts[4]}"
    places = {0: "conv_in", 1: "norm_in", 3: "down_convs.0", 4: "down_norms.0", 6: "down_convs.1", 7: "down_norms.1"}
    places |= {up: "up_convs.0", up + 1: "up_norms.0", up + 3: "up_convs.1", up + 4: "up_norms.1", up + 6: "conv_out"}
    return player, f"{places[i]}.{parts[2]}"


def players(golden):
    """(generator, discriminator) with the original's weights, in training mode as the original's always are."""
    classes = golden["c"].shape[1]
    settings = dict(sample_size=32, in_channels=3, num_classes=classes, base_channels=8)
    generator = FixedPointGenerator(
        **settings, num_res_blocks=2, conditioning="concatenate", squash="tanh", use_running_statistics=True
    )
    discriminator = FixedPointDiscriminator(**settings, num_layers=3)
    states = {"G": {}, "D": {}}
    for name, tensor in golden["weights"].items():
        player, key = our_name(name)
        states[player][key] = tensor.clone()
    generator.load_state_dict(states["G"])
    discriminator.load_state_dict(states["D"])
    return generator.train(), discriminator.train()


def assert_near(what, result, expected, atol):
    error = (result.detach().double() - expected.double()).abs().max().item()
    print(f"\n{what}: {error:.1e} (bound {atol:.0e})", end="")
    assert result.shape == expected.shape and error < atol, what


@torch.no_grad()
def test_both_players_answer_as_the_originals(golden):
    generator, discriminator = players(golden)
    x, c = golden["x"], golden["c"]
    fresh = [m for m in generator.modules() if isinstance(m, torch.nn.InstanceNorm2d)]
    for norm in fresh:
        norm.reset_running_stats()
    assert_near(
        "generator, eval, fresh statistics", generator.eval()(x, c).residual, golden["G_eval_fresh_stats"], 2e-5
    )
    output = generator.train()(x, c)
    assert_near("generator", output.residual, golden["G_train"], 2e-5)
    assert_near("translated", output.sample, golden["translated"], 2e-5)
    difference = 2 * difference_map(x, output.sample)  # ours is of the range's width, theirs of the values
    assert_near("difference", difference, golden["localisation_difference"], 2e-5)
    judged = discriminator(x)
    assert_near("critic", judged.score, golden["D_src"], 2e-5)
    assert_near("classes", judged.logits, golden["D_cls"], 2e-5)


def test_without_running_statistics_we_answer_as_the_original_does_in_training_mode(golden):
    generator, _ = players(golden)
    again = FixedPointGenerator(**{**generator.config, "use_running_statistics": False}).eval()
    again.load_state_dict({k: v for k, v in generator.state_dict().items() if k in again.state_dict()})
    with torch.no_grad():
        assert_near("generator", again(golden["x"], golden["c"]).residual, golden["G_train"], 2e-5)


THEIR_TERMS = {
    "D_loss_real": "adversarial_real",
    "D_loss_fake": "adversarial_fake",
    "D_loss_cls": "domain",
    "D_loss_gp": "gradient_penalty",
    "G_loss_fake": "adversarial",
    "G_loss_rec": "cycle",
    "G_loss_cls": "domain",
    "G_loss_fake_id": "same_adversarial",
    "G_loss_rec_id": "same_cycle",
    "G_loss_cls_id": "same_domain",
    "G_loss_id": "identity",
}


def test_one_training_step_is_the_originals(golden):
    """All loss terms, then the weights and running statistics that a step of each player leaves."""
    generator, discriminator = players(golden)
    images, labels = golden["x"], golden["label"]
    targets, classification = labels[golden["randperm"]], golden["classification"]
    optimizers = [torch.optim.Adam(p.parameters(), lr=1e-4, betas=(0.5, 0.999)) for p in (discriminator, generator)]
    together = (generator, discriminator, images, labels, targets)

    d_loss, d_terms = discriminator_loss(*together, classification=classification, alpha=golden["alpha"])
    d_loss.backward()
    optimizers[0].step()
    g_loss, g_terms = generator_loss(*together, classification=classification)
    optimizers[1].zero_grad()
    g_loss.backward()
    optimizers[1].step()

    for theirs, ours in THEIR_TERMS.items():
        result = (d_terms if theirs.startswith("D") else g_terms)[ours]
        assert_near(theirs, result, golden[f"loss_{theirs}"], 1e-6)
    assert_near("d_loss", d_loss, golden["d_loss"], 2e-5)
    assert_near("g_loss", g_loss, golden["g_loss"], 2e-5)
    states = {"G": generator.state_dict(), "D": discriminator.state_dict()}
    seen = [key for key in golden if key.startswith("after")]
    assert len(seen) >= 10
    for key in seen:
        player, ours = our_name(key.removeprefix("after"))
        assert_near(key, states[player][ours], golden[key], 2e-4)
