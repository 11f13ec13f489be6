"""What the two players minimise, and the loop in which they do."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from cxr_diffusers import FixedPointDiscriminator, FixedPointGANPipeline, FixedPointGenerator, train_adversarial
from cxr_diffusers.figures import loss_curves
from cxr_diffusers.models.fixed_point_gan import FixedPointDiscriminatorOutput, FixedPointGeneratorOutput
from cxr_diffusers.training import run as run_module
from cxr_diffusers.training.adversarial_loop import decay
from cxr_diffusers.training.adversarial_losses import (
    discriminator_loss,
    domain_classification_loss,
    generator_loss,
    gradient_penalty,
)
from cxr_diffusers.training.checkpoints import checkpoints
from cxr_diffusers.training.recipe import AdversarialConfig, Recipe, load_recipe, parse_command_line
from helpers import Clock

ROOT = Path(__file__).parent.parent
IMAGES = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS, TARGETS = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 1, 0])


def players(seed=0, squash="tanh"):
    torch.manual_seed(seed)
    generator = FixedPointGenerator(16, 1, 2, base_channels=4, num_res_blocks=1, squash=squash)
    return generator, FixedPointDiscriminator(16, 1, 2, base_channels=4, num_layers=2)


def identity(images, labels):
    return FixedPointGeneratorOutput(images)


class Slope(torch.nn.Module):
    """A critic whose patch scores sum to `slope` times the image's projection on a direction of length one."""

    def __init__(self, slope):
        super().__init__()
        direction = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        self.slope = torch.nn.Parameter(torch.tensor(float(slope)))
        self.register_buffer("direction", direction / direction.norm())

    def forward(self, images):
        return FixedPointDiscriminatorOutput(F.avg_pool2d(images * self.direction, 4) * 16 * self.slope)


# the losses


@pytest.mark.parametrize(("slope", "penalty"), [(1.0, 0.0), (3.0, 4.0), (0.0, 1.0)])
def test_the_gradient_penalty_is_the_squared_distance_of_the_slope_from_one(slope, penalty):
    result = gradient_penalty(Slope(slope), IMAGES, -IMAGES)
    assert result.item() == pytest.approx(penalty, abs=1e-5)


def test_the_gradient_penalty_can_be_differentiated_once_more():
    critic = Slope(3.0)
    gradient_penalty(critic, IMAGES, -IMAGES).backward()
    assert critic.slope.grad.item() == pytest.approx(2 * (3 - 1), rel=1e-5)
    _, discriminator = players()
    gradient_penalty(discriminator, IMAGES, -IMAGES).backward()
    assert all(conv.weight.grad.abs().sum() > 0 for conv in discriminator.convs)


def test_alpha_chooses_between_the_real_and_the_translated_image():
    class Seen(Slope):
        def forward(self, images):
            self.seen = images.detach()
            return super().forward(images)

    critic = Seen(1.0)
    gradient_penalty(critic, IMAGES, -IMAGES, alpha=torch.tensor([1.0, 0.0, 0.5, 0.25])[:, None, None, None])
    for seen, image, weight in zip(critic.seen, IMAGES, (1, -1, 0, -0.5), strict=True):
        torch.testing.assert_close(seen, weight * image)


def test_classification_is_cross_entropy_of_one_class_or_of_each_finding():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 2, 1, 1])
    vectors = F.one_hot(labels, 3).float()
    expected = -logits.log_softmax(dim=1)[range(4), labels].mean()
    torch.testing.assert_close(domain_classification_loss(logits, labels), expected)
    torch.testing.assert_close(domain_classification_loss(logits, vectors), expected)
    right = torch.where(vectors == 1, logits, -logits)
    expected = -F.logsigmoid(right).sum(dim=1).mean()
    torch.testing.assert_close(domain_classification_loss(logits, vectors, "binary"), expected)
    torch.testing.assert_close(domain_classification_loss(logits, labels, "binary"), expected)
    with pytest.raises(ValueError, match="softmax or binary"):
        domain_classification_loss(logits, labels, "hinge")


def test_the_identity_is_a_fixed_point_and_a_cycle_and_nothing_else_is():
    _, discriminator = players()
    _, terms = generator_loss(identity, discriminator, IMAGES, LABELS, TARGETS)
    assert terms["identity"] == terms["cycle"] == terms["same_cycle"] == 0
    assert terms["adversarial"] == terms["same_adversarial"]
    assert terms["domain"] != terms["same_domain"]
    _, terms = generator_loss(players()[0], discriminator, IMAGES, LABELS, TARGETS)
    assert terms["identity"] > 0 and terms["cycle"] > 0 and terms["same_cycle"] > 0


def test_when_every_target_is_its_own_label_both_translations_are_one():
    _, terms = generator_loss(*players(), IMAGES, LABELS, LABELS)
    for name in ("adversarial", "domain", "cycle"):
        assert terms[name] == terms[f"same_{name}"]


def test_the_loss_is_its_terms_by_their_weights():
    weights = dict(lambda_cls=2.0, lambda_rec=3.0, lambda_id=5.0)
    loss, t = generator_loss(*players(), IMAGES, LABELS, TARGETS, **weights)
    expected = t["adversarial"] + t["same_adversarial"] + 2 * (t["domain"] + t["same_domain"])
    torch.testing.assert_close(loss, expected + 3 * (t["cycle"] + t["same_cycle"]) + 5 * t["identity"])
    loss, t = discriminator_loss(*players(), IMAGES, LABELS, TARGETS, lambda_cls=2.0, lambda_gp=7.0)
    expected = t["adversarial_real"] + t["adversarial_fake"] + 2 * t["domain"]
    torch.testing.assert_close(loss, expected + 7 * t["gradient_penalty"])


def test_the_critic_cannot_tell_an_image_from_itself_and_its_step_leaves_the_generator_alone():
    generator, discriminator = players()
    _, terms = discriminator_loss(identity, discriminator, IMAGES, LABELS, TARGETS)
    assert terms["adversarial_real"] == -terms["adversarial_fake"]
    loss, _ = discriminator_loss(generator, discriminator, IMAGES, LABELS, TARGETS)
    loss.backward()
    assert all(p.grad is None for p in generator.parameters())
    assert all(p.grad is not None for p in discriminator.parameters())


# the loop

SETTINGS = dict(batch_size=4, learning_rate=1e-3, n_critic=2, save_every=3, validate_every=1000, ema_decay=0.9)


class ToyImages(torch.utils.data.Dataset):
    """Label 1 is the brighter below."""

    def __init__(self):
        self.images = torch.rand(13, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
        self.images[1::2, :, 10:] += 0.5
        self.images.clamp_(-1, 1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"images": self.images[i], "labels": i % 2}


class Stopped(Exception):
    pass


def run(output_dir, steps, stop_at=None, squash="tanh", **changes):
    """A run of `steps`; `stop_at` breaks it off at the first save after that checkpoint. -> (log, saved weights)"""
    config = AdversarialConfig(output_dir=str(output_dir), max_steps=steps, **{**SETTINGS, **changes})

    def save(model, folder):
        if stop_at and (Path(output_dir) / f"checkpoint-{stop_at:07d}").exists():
            raise Stopped
        model.save_pretrained(folder)

    try:
        train_adversarial(*players(squash=squash), ToyImages(), config, save=save)
    except Stopped:
        return log_of(output_dir), None
    return log_of(output_dir), load_file(Path(output_dir) / "diffusion_pytorch_model.safetensors")


def log_of(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]


def assert_same_files(a, b):
    for name in ("model.safetensors", "model_1.safetensors", "ema.safetensors"):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("stop_at", [3, 6])
def test_stopping_and_resuming_gives_the_same_numbers_to_the_bit(tmp_path, stop_at):
    """Between two updates of the generator and right after one, in the midst of the decay."""
    options = dict(lr_decay_steps=6, augment={"degrees": 5, "gamma": 0.1})
    straight, weights = run(tmp_path / "straight", 8, **options)
    broken_off, _ = run(tmp_path / "resumed", 8, stop_at=stop_at, **options)
    assert stop_at < len(broken_off)
    resumed, again = run(tmp_path / "resumed", 8, **options)
    assert straight == resumed and [line["step"] for line in resumed] == list(range(1, 9))
    assert all(torch.equal(weights[k], again[k]) for k in weights)
    assert_same_files(checkpoints(tmp_path / "straight")[-1], checkpoints(tmp_path / "resumed")[-1])


def test_the_generator_moves_once_in_n_critic_steps_and_every_term_is_logged(tmp_path):
    log, _ = run(tmp_path, 6, n_critic=3)
    moved = [line["step"] for line in log if "generator/loss" in line]
    assert moved == [3, 6]
    critic = {f"discriminator/{t}" for t in ("loss adversarial_real adversarial_fake domain gradient_penalty").split()}
    terms = "loss adversarial domain cycle same_adversarial same_domain same_cycle identity".split()
    assert all(critic | {"step", "lr"} <= line.keys() for line in log)
    assert log[-1].keys() == critic | {"step", "lr"} | {f"generator/{t}" for t in terms}


def test_the_learning_rate_falls_to_nothing_at_every_step_of_the_last(tmp_path):
    log, _ = run(tmp_path, 5, lr_decay_steps=4)
    assert [line["lr"] for line in log] == pytest.approx([1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert decay(5, 5, 4) == 0 and decay(4, 5, 0) == 1


def test_with_max_seconds_it_falls_in_the_same_last_part_of_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "time", Clock())
    log, _ = run(tmp_path, 10_000, max_seconds=40.0, lr_decay_steps=5_000)
    rates = [line["lr"] / 1e-3 for line in log]
    half = len(rates) // 2
    assert 5 < len(rates) < 41 and rates[: half - 1] == [1.0] * (half - 1)
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.2


def test_the_saved_weights_are_the_generators_average(tmp_path):
    _, saved = run(tmp_path, 8)
    last = load_file(checkpoints(tmp_path)[-1] / "model_1.safetensors")
    assert saved.keys() == last.keys() and any(not torch.equal(saved[k], last[k]) for k in saved)


def test_the_classes_are_learned_and_the_images_left_as_they_are(tmp_path):
    log, _ = run(tmp_path, 100, learning_rate=3e-3, save_every=1000)

    def mean(name, lines):
        values = [line[name] for line in lines if name in line]
        return sum(values) / len(values)

    for name, factor in (
        ("discriminator/gradient_penalty", 0.5),
        ("discriminator/domain", 0.8),
        ("generator/identity", 0.8),
        ("generator/cycle", 0.8),
        ("generator/same_cycle", 0.8),
    ):
        assert mean(name, log[-20:]) < factor * mean(name, log[:10]), name


def test_bfloat16_is_near_and_float16_is_refused(tmp_path):
    straight, _ = run(tmp_path / "float32", 2, mixed_precision="no")
    AcceleratorState._reset_state(True)
    rounded, _ = run(tmp_path / "bf16", 2, mixed_precision="bf16")
    AcceleratorState._reset_state(True)
    assert rounded != straight
    for name in ("discriminator/gradient_penalty", "discriminator/loss", "generator/loss"):
        assert rounded[1][name] == pytest.approx(straight[1][name], rel=0.05)
    with pytest.raises(ValueError, match="no or bf16"):
        run(tmp_path / "fp16", 2, mixed_precision="fp16")
    AcceleratorState._reset_state(True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="learning_rate"):
        run(tmp_path, 50, learning_rate=1e30)


def test_another_run_does_not_go_on_where_one_has_begun(tmp_path):
    run(tmp_path, 3)
    with pytest.raises(ValueError, match="n_critic: 2, now 5"):
        run(tmp_path, 6, n_critic=5)


@pytest.mark.slow
def test_two_processes_hold_the_same_players(tmp_path):
    """They see different halves of each batch; averaged gradients keep their weights equal."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from cxr_diffusers import train_adversarial
        from cxr_diffusers.training.recipe import AdversarialConfig
        from test_adversarial import SETTINGS, ToyImages, players

        both = players()
        config = AdversarialConfig(output_dir="two", max_steps=4, **{{**SETTINGS, "batch_size": 2}})
        train_adversarial(*both, ToyImages(), config, save=lambda model, folder: model.save_pretrained(folder))
        print("weights", [p.double().sum().item() for player in both for p in player.parameters()])
    """
    (tmp_path / "two_players.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29519"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "two_players.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    weights = [line for line in done.stdout.splitlines() if line.startswith("weights")]
    assert len(weights) == 2 and weights[0] == weights[1], done.stderr
    assert [line["step"] for line in log_of(tmp_path / "two")] == [1, 2, 3, 4]


def test_a_loss_curve_is_the_means_of_its_windows(tmp_path):
    log = [{"step": i, "lr": 1e-4, "a": float(i)} | ({"b": 1.0} if i % 2 == 0 else {}) for i in range(1, 7)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    figure = loss_curves({"one": tmp_path / "log.jsonl", "two": tmp_path / "log.jsonl"}, parts=3)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    x, y = figure.axes[0].lines[1].get_data()
    assert x.tolist() == y.tolist() == [1.5, 3.5, 5.5]
    assert figure.axes[1].lines[0].get_data()[1].tolist() == [1, 1, 1]
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="got none"):
        loss_curves({"one": tmp_path / "log.jsonl"})


# the script


def script():
    path = ROOT / "training" / "train_fixed_point_gan.py"
    spec = importlib.util.spec_from_file_location("train_fixed_point_gan", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = ["data.n=16", "data.size=32", "validation.n=6", "train.batch_size=4", "train.validation_images=2"]
SMALL += ["generator.sample_size=16", "generator.base_channels=4", "generator.num_res_blocks=1"]
SMALL += ["discriminator.base_channels=4", "train.n_critic=1", "train.max_steps=2"]


def test_the_script_trains_resumes_and_leaves_a_pipeline_an_image_and_a_card(tmp_path, capsys):
    run = tmp_path / "run"
    main = script().main
    main([*SMALL, f"train.output_dir={run}"])
    main([*SMALL, f"train.output_dir={run}", "train.max_steps=3"])
    assert [line["step"] for line in log_of(run)] == [1, 2, 3]
    assert (run / "validation" / "step-0000003.png").is_file() and (run / "losses.png").is_file()
    assert "cxr-diffusers detect" in capsys.readouterr().out
    assert "phantom" in (run / "README.md").read_text()
    pipeline = FixedPointGANPipeline.from_pretrained(run)
    assert pipeline.class_names == ["healthy", "pleural effusion"]


def test_training_starts_from_the_generator_of_another_model(tmp_path):
    main = script().main
    main([*SMALL, f"train.output_dir={tmp_path / 'first'}"])
    more = ["train.learning_rate=0.0", f"train.init_from={tmp_path / 'first'}", "train.seed=1"]
    main([*SMALL, *more, f"train.output_dir={tmp_path / 'more'}"])
    before, after = (FixedPointGANPipeline.from_pretrained(tmp_path / name).generator for name in ("first", "more"))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    with pytest.raises(ValueError, match="train.init_from: expected a generator of this recipe in cxr_fixed_point_gan"):
        main([*SMALL, "train.init_from=cxr_fixed_point_gan_128", f"train.output_dir={tmp_path / 'other'}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generator.num_classes=3", "num_classes=2"),
        ("train.p_uncond=0.1", "unknown key 'p_uncond'"),
        ("pipeline.noise_level=500", "direction"),
        ("images.data_range=[0, 1]", "data_range"),
    ],
)
def test_an_invalid_recipe_is_refused_with_the_reason(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        script().main([*SMALL, f"train.output_dir={tmp_path / 'run'}", override])


def test_a_script_refuses_the_recipe_of_another(tmp_path):
    gan = ROOT / "configs" / "phantom_fixed_point_gan_32.yaml"
    with pytest.raises(ValueError, match="unet"):
        parse_command_line([str(gan)], "unused.yaml", Recipe)
    with pytest.raises(ValueError, match="discriminator"):
        script().main([str(ROOT / "configs" / "phantom_cfg_32.yaml")])
    assert load_recipe(gan).identity().keys() == {"data", "generator", "discriminator", "images"}
