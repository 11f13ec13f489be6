"""The other training loop: two players, each with its own optimizer, who move in turn."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, send_to_device, set_seed
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .adversarial_losses import discriminator_loss, generator_loss
from .data import augment
from .processes import process_state
from .training_loop import (
    FREE,
    RunLog,
    ShuffledForever,
    averaged,
    checkpoint,
    checkpoints,
    flat,
    keep_settings,
    log_pictures,
    replace_into,
    resume,
)


def train_adversarial(generator, discriminator, dataset, config, *, save, validate=None, identity=None):
    """Train both until `config.max_steps`. To resume, call it again with the same `config.output_dir`.

    A step is an update of the discriminator; every `config.n_critic`-th also updates the generator, on the same batch.
    As in `training_loop.train`, what is random in a step is seeded by its number, so a run that was stopped and taken
    up again gives the same numbers as one that was not; both optimizers and the average are in the checkpoint.

    Neither player is wrapped for several processes: the gradient penalty needs a second derivative, and there are
    several forwards to a backward. Each process holds both, and gradients are averaged before each update.

    Args:
        generator, discriminator: of `models.fixed_point_gan`.
        dataset: indexable, of {"images": (C, H, W) in [-1, 1], "labels": class id}.
        config: a `recipe.AdversarialConfig`.
        save: `save(generator, folder)` writes the finished thing with the averaged (EMA) weights in place.
        validate: `validate(generator, step) -> {name: picture path}` or None, every `config.validate_every` steps.
        identity: see `training_loop.train`.

    Raises:
        ValueError: a loss is no longer finite, the data set is smaller than one batch, half precision fp16, or
            `output_dir` holds a run of other settings.
    """
    output_dir = Path(config.output_dir)
    process_state()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        step_scheduler_with_optimizer=False,
    )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"expected mixed_precision no or bf16, got {accelerator.mixed_precision}: the scores of a critic have no "
            "bound, and float16 does"
        )
    if config.n_critic < 1 or config.max_steps < 1:
        raise ValueError(f"expected n_critic and max_steps of 1 or more, got {config.n_critic} and {config.max_steps}")
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(config).items() if key not in FREE}
        keep_settings(output_dir, {**settings, **(identity or {}), "num_processes": accelerator.num_processes})
        accelerator.print(f"{accelerator.num_processes} process(es) on {accelerator.device}")
    if config.report_to is not None:
        accelerator.init_trackers(config.tracker_project_name, config=flat(vars(config)))

    players = {"discriminator": discriminator, "generator": generator}
    optimizers = {}
    for name, player in players.items():
        # on its device and in the checkpoint, but not wrapped: autocast is ours to open, the penalty stays outside
        players[name] = accelerator.prepare_model(player, evaluation_mode=True)
        players[name] = accelerator.unwrap_model(players[name], keep_fp32_wrapper=False).train()
        optimizer = torch.optim.Adam(player.parameters(), lr=config.learning_rate, betas=tuple(config.adam_betas))
        optimizers[name] = accelerator.prepare_optimizer(optimizer)
    ema = EMAModel(generator.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    step = resume(accelerator, ema, output_dir)
    ema.optimization_step = step // config.n_critic

    batches = ShuffledForever(
        len(dataset),
        config.batch_size,
        config.seed,
        start=step,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=config.dataloader_num_workers)
    log = RunLog(output_dir / "log.jsonl", step) if accelerator.is_main_process else None
    bar = tqdm(
        total=config.max_steps, initial=step, desc="training", unit="step", disable=not accelerator.is_main_process
    )
    if accelerator.is_main_process and step:
        bar.write(f"resumed from {checkpoints(output_dir)[-1]}")

    def save_average():
        with averaged(accelerator, ema, generator) as unwrapped:
            if accelerator.is_main_process:
                replace_into(output_dir, lambda folder: save(unwrapped, folder))

    def show_average():
        if validate is None:
            return
        with averaged(accelerator, ema, generator) as unwrapped:
            if accelerator.is_main_process:
                log_pictures(accelerator, validate(unwrapped, step), step)

    def move(name, loss, terms):
        """One update of one player; {term: value} over all processes, with the loss itself."""
        optimizers[name].zero_grad()
        accelerator.backward(loss, inputs=list(players[name].parameters()))
        average_gradients(accelerator, players[name])
        optimizers[name].step()
        values = torch.stack([loss.detach(), *(term.detach() for term in terms.values())]).float()
        values = accelerator.reduce(values, reduction="mean").tolist()
        return {f"{name}/{term}": value for term, value in zip(("loss", *terms), values, strict=True)}

    if step >= config.max_steps:  # it may have been stopped between its last checkpoint and its end
        save_average()
        show_average()
    for batch in loader if step < config.max_steps else ():
        set_seed(config.seed + step * accelerator.num_processes + accelerator.process_index)
        batch = send_to_device(batch, accelerator.device)
        images, labels = batch["images"], batch["labels"]
        if config.augment:
            images = augment(images, **config.augment)
        # to each image the class of another one of the batch, so that targets are as frequent as classes are
        target_labels = labels[torch.randperm(len(labels)).to(labels.device)]
        rate = config.learning_rate * decay(step, config.max_steps, config.lr_decay_steps)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = rate

        with accelerator.autocast():
            loss, terms = discriminator_loss(
                generator,
                discriminator,
                images,
                labels,
                target_labels,
                lambda_cls=config.lambda_cls,
                lambda_gp=config.lambda_gp,
            )
        values = move("discriminator", loss, terms)
        step += 1
        if step % config.n_critic == 0:
            with accelerator.autocast():
                loss, terms = generator_loss(
                    generator,
                    discriminator,
                    images,
                    labels,
                    target_labels,
                    lambda_cls=config.lambda_cls,
                    lambda_rec=config.lambda_rec,
                    lambda_id=config.lambda_id,
                )
            values |= move("generator", loss, terms)
            ema.step(generator.parameters())
        broken = {name: value for name, value in values.items() if not math.isfinite(value)}
        if broken:
            raise ValueError(f"at step {step} the losses are {broken}: lower train.learning_rate or look at the data")
        accelerator.log({**values, "lr": rate}, step=step)
        bar.update()
        bar.set_postfix({name[0]: f"{values[f'{name}/loss']:.3f}" for name in players if f"{name}/loss" in values})
        if log:
            log.write(step, **values, lr=rate)

        last = step == config.max_steps
        if step % config.save_every == 0 or last:
            checkpoint(accelerator, ema, output_dir, step, config.checkpoints_total_limit)
            save_average()
        if step % config.validate_every == 0 or last:
            show_average()
        if last:
            break
    bar.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output_dir


def decay(step, max_steps, decay_steps):
    """What the learning rate of a step (0 the first) is multiplied by: 1, then linearly towards 0, reached at the end.

    >>> [decay(step, max_steps=6, decay_steps=4) for step in range(6)]
    [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return min(1.0, (max_steps - step) / decay_steps) if decay_steps else 1.0


def average_gradients(accelerator, player):
    """Give every process the mean of all processes' gradients, all parameters in one message."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in player.parameters()]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
