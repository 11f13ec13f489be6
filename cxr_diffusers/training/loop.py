"""The one training loop: everything about a run except what is learned, which is `loss_fn`'s business."""

import math

import torch
from accelerate.utils import send_to_device, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from .run import Run


def train(model, loss_fn, dataset, config, *, save, validate=None, identity=None):
    """Train `model` until `config.max_steps`. To resume, call it again with the same `config.output_dir`.

    The noise of a step is seeded by its number, so a run that was stopped anywhere (kill -9 included) and started
    again gives the same numbers as one that was not.

    Args:
        model: a diffusers `ModelMixin`.
        loss_fn: `loss_fn(model, batch)` -> scalar, or (scalar, {name: scalar}) with what else is to be logged; a NaN
            among these counts as not measured.
        dataset: indexable, of tensors or dicts of tensors.
        config: a `recipe.TrainConfig`.
        save: `save(model, folder)` writes the finished thing with the averaged (EMA) weights in place.
        validate: `validate(model, step) -> {name: picture path}` or None, every `config.validate_every` steps.
        identity: what else makes this run itself, as plain values; it resumes only where this and the settings that
            decide its numbers are the same.

    Raises:
        ValueError: the loss is no longer finite, the data set is smaller than one batch, or `output_dir` holds a run of
            other settings.
    """
    accumulated = config.gradient_accumulation_steps
    run = Run(config, save=save, validate=validate, identity=identity, gradient_accumulation_steps=accumulated)
    run.open()
    accelerator = run.accelerator
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    ema = EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    model, optimizer = accelerator.prepare(model, optimizer)
    step = run.resume(model, ema)
    # unprepared, hence stepped once per update whatever the number of processes; its state is the step itself
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer.optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_steps,
        last_epoch=step - 1,
    )

    model.train()
    running = 0.0
    for i, batch in enumerate(run.batches(dataset), start=step * accumulated):
        with accelerator.accumulate(model):
            # noise, label dropping and dropout depend on where we are, not on how we got here
            set_seed(config.seed + i * accelerator.num_processes + accelerator.process_index)
            with accelerator.autocast():
                found = loss_fn(model, send_to_device(batch, accelerator.device))
            loss, measured = found if isinstance(found, tuple) else (found, {})
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        running += loss.detach() / accumulated
        if not accelerator.sync_gradients:
            continue

        lr_scheduler.step()
        ema.step(model.parameters())
        value = accelerator.reduce(running, reduction="mean").item()
        running = 0.0
        rate, measured = lr_scheduler.get_last_lr()[0], over_processes(accelerator, measured)
        run.end_step({"loss": value, "lr": rate, **measured}, {"loss": f"{value:.4f}"})
    return run.end()


def over_processes(accelerator, measured):
    """{name: scalar tensor} of this process -> {name: float}, the mean over those that are a number in some process."""
    if not measured:
        return {}
    all_of_them = accelerator.gather(torch.stack([value.detach().float() for value in measured.values()])[None])
    means = all_of_them.nanmean(dim=0).tolist()
    return {name: mean for name, mean in zip(measured, means, strict=True) if math.isfinite(mean)}
