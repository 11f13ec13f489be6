"""The training loop of UNets, classifiers and segmenters; `loss_fn` computes the loss of a batch."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from .recipe import TrainConfig, section
from .run import PowerEMA, Run


def train(
    model: torch.nn.Module,
    loss_fn: Callable[[torch.nn.Module, dict[str, torch.Tensor]], Any],
    dataset: torch.utils.data.Dataset,
    config: TrainConfig,
    *,
    save: Callable[[torch.nn.Module, Path], None],
    validate: Callable[[torch.nn.Module, int], dict[str, Path]] | None = None,
    measure: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    identity: dict[str, Any] | None = None,
) -> Path:
    """Train `model` until `config.max_steps`. To resume, call it again with the same `config.output_dir`.

    The random numbers of a step are seeded by its number, so a run that was interrupted (kill -9 included) and resumed
    gives the same numbers as one that was not.

    Args:
        model: a diffusers `ModelMixin`.
        loss_fn: `loss_fn(model, batch)` -> scalar, or (scalar, {name: scalar}) with further values for the log; NaN
            among these means "not measured".
        dataset: indexable, of tensors or dicts of tensors.
        config: the `train:` section of a recipe.
        save: `save(model, folder)` writes the finished model; it is called with the averaged (EMA) weights in place.
        validate: `validate(model, step) -> {name: path of an image}` or None, every `config.validate_every` steps.
        measure: `measure(model) -> {name: number}`, see `Run`.
        identity: settings besides `config` that determine the result, as plain values; a run resumes only if they are
            the same.

    Returns:
        the folder of the run, `config.output_dir`.

    Raises:
        BlockingIOError: another process trains in the folder.
        ValueError: the loss is not finite, the data set is smaller than one batch, or `output_dir` holds a run of other
            settings.
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
    if accelerator.device.type == "cuda" and config.compile:  # uncompiled, group norm is slow in this order
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=has_fused_optimizer(accelerator.device),
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
    running: torch.Tensor | float = 0.0
    for i, batch in enumerate(run.batches(dataset), start=step * accumulated):
        with accelerator.accumulate(model):
            # noise, label dropping and dropout depend on the number of the step alone
            set_seed(config.seed + i * accelerator.num_processes + accelerator.process_index)
            with accelerator.autocast():
                result = loss_fn(compiled, send_to_device(batch, accelerator.device, non_blocking=True))
            loss, measured = result if isinstance(result, tuple) else (result, {})
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
        values = {"loss": accelerator.reduce(running, reduction="mean"), "lr": lr_scheduler.get_last_lr()[0]}
        running = 0.0
        run.end_step(values, {"loss": "loss"}, measured=over_processes(accelerator, measured))
    return run.end()


def has_fused_optimizer(device: torch.device) -> bool:
    """Whether PyTorch updates all weights on a device in one kernel: a third of the optimizer's time on a CPU."""
    return device.type in ("cpu", "cuda", "xpu", "mps")


def new_average(model: torch.nn.Module, config: TrainConfig) -> EMAModel:
    """The running average of a model's weights, as `ema_width` or `ema_decay` defines it."""
    if config.ema_width is not None:
        return PowerEMA(model.parameters(), config.ema_width, foreach=True)
    return EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)


def learning_rates(
    optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, run: Run
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of the learning rate after `step` steps: over the steps, or with `max_seconds` over the time.

    Raises:
        ValueError: an unknown schedule, or with `max_seconds` one that is not defined over time.
    """
    if not config.max_seconds:
        with section("train.lr_scheduler"):
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
        return min(1.0, (done + 1) / max(1, config.lr_warmup_steps)) * shape(run.agreed_progress())

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, shapes[config.lr_scheduler]), step - 1)


def over_processes(accelerator: Accelerator, measured: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{name: scalar} of this process -> {name: scalar}, the mean over the processes in which it is not NaN."""
    if not measured:
        return {}
    stacked = torch.stack([value.detach().float() for value in measured.values()])
    means = accelerator.gather(stacked[None]).nanmean(dim=0)
    return dict(zip(measured, means.unbind(), strict=True))
