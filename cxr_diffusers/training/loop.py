"""The one training loop: everything about a run except what is learned, which is `loss_fn`'s business."""

import math
from functools import partial

import torch
from accelerate.utils import send_to_device, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from .run import PowerEMA, Run


def train(model, loss_fn, dataset, config, *, save, validate=None, measure=None, identity=None):
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
        measure: `measure(model) -> {name: number}`, see `Run`.
        identity: what else makes this run itself, as plain values; it resumes only where this and the settings that
            decide its numbers are the same.

    Raises:
        ValueError: the loss is no longer finite, the data set is smaller than one batch, or `output_dir` holds a run of
            other settings.
    """
    accumulated = config.gradient_accumulation_steps
    run = Run(
        config,
        save=save,
        validate=validate,
        measure=measure,
        identity=identity,
        gradient_accumulation_steps=accumulated,
    )
    run.open()
    accelerator = run.accelerator
    on_gpu = accelerator.device.type == "cuda"
    if on_gpu:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=on_gpu or None
    )
    ema = new_average(model, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    step = run.resume(model, ema)
    # unprepared, hence stepped once per update whatever the number of processes; its state is the step itself
    lr_scheduler = learning_rates(optimizer.optimizer, config, step, run)
    # `accelerator.autocast()` below is enough; saving would take its wrapper off anyway, and compile the network again
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    compiled = torch.compile(model) if config.compile else model

    model.train()
    running = 0.0
    for i, batch in enumerate(run.batches(dataset), start=step * accumulated):
        with accelerator.accumulate(model):
            # noise, label dropping and dropout depend on where we are, not on how we got here
            set_seed(config.seed + i * accelerator.num_processes + accelerator.process_index)
            with accelerator.autocast():
                found = loss_fn(compiled, send_to_device(batch, accelerator.device))
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
        value = accelerator.reduce(running, reduction="mean")
        running = 0.0
        rate, measured = lr_scheduler.get_last_lr()[0], over_processes(accelerator, measured)
        run.end_step({"loss": value, "lr": rate, **measured}, {"loss": "loss"})
    return run.end()


def new_average(model, config):
    """The running average of a model's weights that a recipe asks for."""
    if config.ema_width is not None:
        return PowerEMA(model.parameters(), config.ema_width, foreach=True)
    return EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)


def learning_rates(optimizer, config, step, run):
    """The schedule of the learning rate: over the steps, or with `max_seconds` over the time of the run.

    Raises:
        ValueError: a schedule that cannot follow the clock.
    """
    if not config.max_seconds:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_steps,
            last_epoch=step - 1,
        )
    shapes = {
        "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
        "linear": lambda share: 1 - share,
        "constant_with_warmup": lambda share: 1.0,
    }
    if config.lr_scheduler not in shapes:
        raise ValueError(f"expected `lr_scheduler` {', '.join(shapes)} with `max_seconds`, got {config.lr_scheduler!r}")

    def factor(shape, done):
        return min(1.0, (done + 1) / max(1, config.lr_warmup_steps)) * shape(run.progress)

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, shapes[config.lr_scheduler]), step - 1)


def over_processes(accelerator, measured):
    """{name: scalar tensor} of this process -> {name: float}, the mean over those that are a number in some process."""
    if not measured:
        return {}
    all_of_them = accelerator.gather(torch.stack([value.detach().float() for value in measured.values()])[None])
    means = all_of_them.nanmean(dim=0).tolist()
    return {name: mean for name, mean in zip(measured, means, strict=True) if math.isfinite(mean)}
