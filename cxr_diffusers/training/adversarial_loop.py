"""The other training loop: two players, each with its own optimizer, who move in turn."""

import torch
from accelerate.utils import send_to_device, set_seed
from diffusers.training_utils import EMAModel

from .adversarial_losses import discriminator_loss, generator_loss
from .augmentation import augment
from .recipe import section
from .run import Run


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
    run = Run(config, save=save, validate=validate, identity=identity)
    accelerator = run.accelerator
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"expected mixed_precision no or bf16, got {accelerator.mixed_precision}: the scores of a critic have no "
            "bound, and float16 does"
        )
    if config.n_critic < 1 or config.max_steps < 1:
        raise ValueError(f"expected n_critic and max_steps of 1 or more, got {config.n_critic} and {config.max_steps}")
    run.open()
    players = {"discriminator": discriminator, "generator": generator}
    optimizers = {}
    for name, player in players.items():
        # on its device and in the checkpoint, but not wrapped: autocast is ours to open, the penalty stays outside
        players[name] = accelerator.prepare_model(player, evaluation_mode=True)
        players[name] = accelerator.unwrap_model(players[name], keep_fp32_wrapper=False).train()
        with section("train.adam_betas"):
            optimizer = torch.optim.Adam(player.parameters(), lr=config.learning_rate, betas=tuple(config.adam_betas))
        optimizers[name] = accelerator.prepare_optimizer(optimizer)
    ema = EMAModel(generator.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    ema.optimization_step = run.resume(generator, ema) // config.n_critic

    def move(name, loss, terms):
        """One update of one player; {term: value} over all processes, with the loss itself."""
        optimizers[name].zero_grad()
        accelerator.backward(loss, inputs=list(players[name].parameters()))
        average_gradients(accelerator, players[name])
        optimizers[name].step()
        values = torch.stack([loss.detach(), *(term.detach() for term in terms.values())]).float()
        values = accelerator.reduce(values, reduction="mean").tolist()
        return {f"{name}/{term}": value for term, value in zip(("loss", *terms), values, strict=True)}

    for batch in run.batches(dataset):
        step = run.step
        set_seed(config.seed + step * accelerator.num_processes + accelerator.process_index)
        batch = send_to_device(batch, accelerator.device)
        images, labels = batch["images"], batch["labels"]
        if config.augment:
            with section("train.augment"):
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
        if (step + 1) % config.n_critic == 0:
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
        run.end_step({**values, "lr": rate}, {name[0]: f"{name}/loss" for name in players})
    return run.end()


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
