"""Validation during training: the loss with fixed noise, the best model, the clock, and damaged logs."""

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler

from cxr_diffusers import denoising_loss, load_phantom, train
from cxr_diffusers.pipelines.cxr_conditions import Conditions
from cxr_diffusers.training import run as run_module
from cxr_diffusers.training.recipe import TrainConfig
from cxr_diffusers.training.run import RunLog
from cxr_diffusers.training.script import load_program
from cxr_diffusers.training.tensors import TensorImages
from cxr_diffusers.training.validation_loss import ValidationLoss
from helpers import Clock, toy_unet

CLASSES = ["healthy", "pleural effusion"]


@pytest.fixture(scope="module")
def chests():
    return TensorImages(load_phantom(n=16, size=32), 16)


def validation_loss(images, limit=16, conditions=None):
    conditions = conditions or Conditions(2)
    return ValidationLoss(images, conditions, CLASSES, DDIMScheduler(clip_sample=False), limit, batch_size=5)


def train_toy(folder, images, steps, unet=None, **settings):
    """(the trained UNet, the lines of the log)"""
    unet, scheduler = unet or toy_unet(), DDIMScheduler(clip_sample=False)
    settings = {"batch_size": 8, "learning_rate": 3e-3, "save_every": 1000, "ema_decay": 0.5, **settings}
    measure, stop_after = settings.pop("measure", None), settings.pop("stop_after", None)
    batches = []
    config = TrainConfig(output_dir=str(folder), max_steps=steps, validate_every=1000, **settings)

    def loss_fn(model, batch):
        if len(batches) == stop_after:
            raise KeyboardInterrupt
        batches.append(batch)
        return denoising_loss(model, scheduler, batch["images"], batch["labels"])

    def save(model, folder):
        model.save_pretrained(folder)

    train(unet, loss_fn, images, config, save=save, measure=measure)
    return unet, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_validation_loss_has_fixed_noise_and_falls_with_training(chests, tmp_path):
    loss, unet = validation_loss(chests), toy_unet()
    first = loss(unet)
    torch.manual_seed(5)
    assert loss(unet) == first, "the same noise whatever the random state"
    assert set(first) == {
        "validation_loss",
        "validation_loss/healthy",
        "validation_loss/pleural effusion",
        "auroc/pleural effusion",
    }
    counts = torch.bincount(chests.labels).tolist()
    mean = (counts[0] * first["validation_loss/healthy"] + counts[1] * first["validation_loss/pleural effusion"]) / 16
    assert first["validation_loss"] == pytest.approx(mean, rel=1e-5) and 0 <= first["auroc/pleural effusion"] <= 1
    trained, _ = train_toy(tmp_path, chests, 40, unet=unet)
    assert loss(trained.eval())["validation_loss"] < 0.8 * first["validation_loss"]


def test_the_validation_loss_takes_labelled_images_only_and_each_view_by_itself(chests):
    images = TensorImages(load_phantom(n=16, size=32), 16)
    images.labels[:8] = -1
    assert set(images.labels[8:].tolist()) == {0, 1}
    loss = validation_loss(images, limit=4)
    assert len(loss.batch["labels"]) == 4 and (loss.batch["labels"] >= 0).all()
    images.views = torch.arange(16) // 2 % 3 - 1  # -1: unknown
    conditions = Conditions(2, ("PA", "AP"))
    by_view = validation_loss(images, conditions=conditions)
    assert (by_view.batch["views"] >= 0).all() and len(by_view.batch["views"]) < 8
    values = by_view(toy_unet(num_class_embeds=conditions.num_embeddings))
    assert {"validation_loss/healthy PA", "validation_loss/healthy AP"} <= set(values) and "validation_loss" in values
    images.labels[:] = -1
    with pytest.raises(ValueError, match="expected labelled validation images"):
        validation_loss(images)


def test_the_model_with_the_lowest_validation_loss_is_kept(chests, tmp_path):
    """Measured values 3, 1, 2: `best` holds the weights of the second measurement."""
    saved, values = [], iter([3.0, 1.0, 2.0])

    def measure(model):
        saved.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"validation_loss": next(values)}

    train_toy(tmp_path, chests, 3, save_every=1, measure=measure)
    best = type(toy_unet()).from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(best[key], saved[1][key]) for key in best)
    assert any(not torch.equal(best[key], saved[2][key]) for key in best)


def test_losses_of_other_validation_images_are_not_compared(chests, tmp_path):
    """3 and 1 on some images, then 2 on others: `best` holds the last weights, though their loss is not the lowest."""

    class Measure:
        def __init__(self, digest, *values):
            self.digest, self.values, self.saved = digest, iter(values), []

        def __call__(self, model):
            self.saved.append({key: value.clone() for key, value in model.state_dict().items()})
            return {"validation_loss": next(self.values)}

    first, other = Measure("aaaaaaaa", 3.0, 1.0), Measure("bbbbbbbb", 2.0)
    train_toy(tmp_path, chests, 2, save_every=1, measure=first)
    train_toy(tmp_path, chests, 3, save_every=1, measure=other)
    best = type(toy_unet()).from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(best[key], other.saved[0][key]) for key in best)
    kept = type(toy_unet()).from_pretrained(tmp_path / "best_of_other_images").state_dict()
    assert all(torch.equal(kept[key], first.saved[1][key]) for key in kept), "nothing is lost"


def test_the_digest_of_the_validation_images_depends_on_each_of_them(chests):
    assert validation_loss(chests).digest == validation_loss(chests).digest
    changed = TensorImages(load_phantom(n=16, size=32), 16)
    changed.labels[0] = 1 - changed.labels[0]
    digests = [validation_loss(chests).digest, validation_loss(chests, limit=4).digest, validation_loss(changed).digest]
    assert len(set(digests)) == 3


def test_a_validation_log_that_was_cut_in_the_middle_of_a_line_is_continued(chests, tmp_path):
    def measure(model):
        return {"validation_loss": 1.0}

    train_toy(tmp_path, chests, 2, save_every=1, measure=measure)
    path = tmp_path / "validation.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    train_toy(tmp_path, chests, 4, save_every=1, measure=measure)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_opening_a_log_drops_later_steps_and_everything_from_a_damaged_line_on(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "loss"')
    assert [line["step"] for line in RunLog(path, 5).lines()] == [1, 2]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    assert [line["step"] for line in RunLog(path, 5).lines()] == [1]
    path.write_text('{"step": 1}\n{"step": 2}\n')
    log = RunLog(path, 1)
    log.write(2, loss=0.5)
    assert log.lines() == [{"step": 1}, {"step": 2, "loss": 0.5}]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_with_max_seconds_the_learning_rate_follows_the_clock(chests, tmp_path, monkeypatch, capsys, schedule):
    """The run ends by the clock, long before `max_steps`, and the rate has then fallen along the schedule."""
    monkeypatch.setattr(run_module, "time", Clock())
    _, log = train_toy(tmp_path, chests, 10_000, max_seconds=30.0, lr_scheduler=schedule, batch_size=2)
    rates = [line["lr"] / 3e-3 for line in log]
    assert 5 < len(rates) < 31
    assert f"| {len(rates)}/{len(rates)} [" in capsys.readouterr().err, "the bar ends at the end"
    if schedule == "constant_with_warmup":
        assert rates == pytest.approx([1.0] * len(rates))
        return
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(1.0, abs=0.01) and rates[-1] < 0.2
    middle = rates[len(rates) // 2]
    share = (len(rates) // 2) / len(rates)
    expected = 1 - share if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    assert middle == pytest.approx(expected, abs=0.15)


def test_time_before_an_interruption_counts(chests, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "time", Clock())
    settings = {"max_seconds": 40.0, "lr_scheduler": "linear", "batch_size": 2, "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path, chests, 10_000, stop_after=9, **settings)
    _, log = train_toy(tmp_path, chests, 10_000, **settings)
    rates = [line["lr"] for line in log]
    assert len(log) > 10 and rates == sorted(rates, reverse=True)
    assert rates[9] < 0.8 * rates[0], "the schedule goes on where it was, not from its beginning"


def test_a_schedule_that_is_not_defined_over_time_is_refused(chests, tmp_path):
    with pytest.raises(ValueError, match="`lr_scheduler` cosine, linear, .* with `max_seconds`, got 'polynomial'"):
        train_toy(tmp_path, chests, 2, max_seconds=5.0, lr_scheduler="polynomial")
    with pytest.raises(ValueError, match="train.lr_scheduler: .*sawtooth"):
        train_toy(tmp_path / "steps", chests, 2, lr_scheduler="sawtooth")


def test_an_image_without_class_or_view_gets_the_embedding_of_unlabelled_images():
    embedding_ids = load_program("train_cfg").embedding_ids
    labels, views = torch.tensor([0, 1, -1, 1]), torch.tensor([1, 0, 0, -1])
    conditions = Conditions(2, ("PA", "AP"))
    ids, null_ids = embedding_ids(conditions, labels, views)
    assert ids.tolist() == [1, 2, conditions.unlabelled, conditions.unlabelled]
    assert null_ids.tolist() == [conditions.null(1), conditions.null(0), conditions.unlabelled, conditions.unlabelled]
    ids, null_ids = embedding_ids(Conditions(2), labels, views)
    assert ids.tolist() == [0, 1, 2, 1] and null_ids.tolist() == [2, 2, 2, 2]


def test_the_training_program_measures_the_validation_loss_on_the_validation_images(tmp_path):
    values = [
        "data.n=24",
        "train.batch_size=4",
        "validation.n=8",
        "train.max_steps=1",
        "train.validation_loss_images=8",
    ]
    values += ["unet.block_out_channels=[8, 16, 16]", "unet.attention_head_dim=8", "unet.norm_num_groups=4"]
    values += ["unet.attn_norm_num_groups=4", "pipeline.num_inference_steps=2", f"train.output_dir={tmp_path / 'run'}"]
    load_program("train_cfg").main(values)
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines())
    assert line["step"] == 1 and line["validation_loss"] > 0
    assert (tmp_path / "run" / "best" / "model_index.json").is_file()
