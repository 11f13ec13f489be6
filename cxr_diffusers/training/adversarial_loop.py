"""The training loop of a Fixed-Point GAN: two networks, each with its own optimizer, are updated in turn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from diffusers.training_utils import EMAModel

from .adversarial_losses import discriminator_loss, generator_loss
from .augmentation import augment
from .loop import has_fused_optimizer
from .recipe import AdversarialConfig, section
from .run import Run


def train_adversarial(
    generator: torch.nn.Module,
    discriminator: torch.nn.Module,
    dataset: torch.utils.data.Dataset,
    config: AdversarialConfig,
    *,
    save: Callable[[torch.nn.Module, Path], None],
    validate: Callable[[torch.nn.Module, int], dict[str, Path]] | None = None,
    identity: dict[str, Any] | None = None,
) -> Path:
    """Train both networks until `config.max_steps`. To resume, call it again with the same `config.output_dir`.

    A step is an update of the discriminator; every `config.n_critic`-th also updates the generator, on the same batch.
    As in `loop.train`, the random numbers of a step are seeded by its number, so a run that was interrupted and resumed
    gives the same numbers as one that was not; both optimizers and the average are in the checkpoint.

    Neither network is wrapped for several processes: the gradient penalty needs a second derivative, and there are
    several forward passes per backward pass. Each process holds both, and gradients are averaged before each update.

    Args:
        generator, discriminator: of `models.fixed_point_gan`.
        dataset: indexable, of {"images": (C, H, W) in [-1, 1], "labels": class id}.
        config: the `train:` section of a recipe.
        save, validate, identity: see `loop.train`; of the generator.

    Returns:
        the folder of the run, `config.output_dir`.

    Raises:
        BlockingIOError: another process trains in the folder.
        ValueError: a loss is not finite, the data set is smaller than one batch, half precision fp16, or
            `output_dir` holds a run of other settings.
    """
    run = Run(config, save=save, validate=validate, identity=identity)
    accelerator = run.accelerator
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"expected mixed_precision no or bf16, got {accelerator.mixed_precision}: the discriminator's scores are "
            "unbounded, and the range of float16 is small"
        )
    run.open()
    networks = {"discriminator": discriminator, "generator": generator}
    optimizers = {}
    for name, network in networks.items():
        # on its device and in the checkpoint, but not wrapped: the gradient penalty must stay outside of autocast
        networks[name] = accelerator.prepare_model(network, evaluation_mode=True)
        networks[name] = accelerator.unwrap_model(networks[name], keep_fp32_wrapper=False).train()
        with section("train.adam_betas"):
            optimizer = torch.optim.Adam(
                network.parameters(),
                lr=config.learning_rate,
                betas=tuple(config.adam_betas),
                fused=has_fused_optimizer(accelerator.device),
            )
        optimizers[name] = accelerator.prepare_optimizer(optimizer)
    ema = EMAModel(generator.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    ema.optimization_step = run.resume(generator, ema) // config.n_critic

    def update(name: str, loss: torch.Tensor, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Update one network; {term: mean over all processes}, including the loss."""
        optimizers[name].zero_grad()
        accelerator.backward(loss, inputs=list(networks[name].parameters()))
        average_gradients(accelerator, networks[name])
        optimizers[name].step()
        values = torch.stack([loss.detach(), *(term.detach() for term in terms.values())]).float()
        values = accelerator.reduce(values, reduction="mean").unbind()
        return {f"{name}/{term}": value for term, value in zip(("loss", *terms), values, strict=True)}

    for batch in run.batches(dataset):
        step = run.step
        set_seed(config.seed + step * accelerator.num_processes + accelerator.process_index)
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        images, labels = batch["images"], batch["labels"]
        if config.augment:
            with section("train.augment"):
                images = augment(images, **config.augment)
        # the target of each image is the class of another image of the batch: targets are as frequent as classes
        target_labels = labels[torch.randperm(len(labels)).to(labels.device)]
        done = run.agreed_progress() * config.max_steps
        rate = config.learning_rate * decay(done, config.max_steps, config.lr_decay_steps)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = rate

        with accelerator.autocast():
            weights: dict[str, Any] = {"lambda_cls": config.lambda_cls, "lambda_gp": config.lambda_gp}
            loss, terms = discriminator_loss(generator, discriminator, images, labels, target_labels, **weights)
        values = update("discriminator", loss, terms)
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
            values |= update("generator", loss, terms)
            ema.step(generator.parameters())
        run.end_step({**values, "lr": rate}, {name[0]: f"{name}/loss" for name in networks})
    return run.end()


def decay(step: float, max_steps: int, decay_steps: int) -> float:
    """The factor of the learning rate at a step (the first is 0): 1, then linear to 0 in the last `decay_steps`.

    >>> [decay(step, max_steps=6, decay_steps=4) for step in range(6)]
    [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return min(1.0, (max_steps - step) / decay_steps) if decay_steps else 1.0


def average_gradients(accelerator: Accelerator, network: torch.nn.Module) -> None:
    """Replace the gradients of a network by their mean over all processes, in one message."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in network.parameters()]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
