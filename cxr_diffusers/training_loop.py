"""The one training loop: everything about a run except what is learned, which is `loss_fn`'s business."""

import json
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, send_to_device, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .processes import process_state
from .visualization import write_file


class ShuffledForever:
    """Batches of indices without end, each a function of `seed` and its number alone: so a run resumes mid-epoch.

    With several processes the global batch is `batch_size * num_processes` and each takes its own slice of it.
    """

    def __init__(self, size, batch_size, seed, start=0, process_index=0, num_processes=1):
        if size < batch_size * num_processes:
            raise ValueError(
                f"expected at least one global batch of {batch_size} x {num_processes} processes, "
                f"got a data set of {size} images: lower train.batch_size"
            )
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.process_index, self.num_processes = process_index, num_processes

    def __iter__(self):
        together = self.batch_size * self.num_processes
        per_epoch = self.size // together
        epoch, i = divmod(self.start, per_epoch)
        while True:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch))
            for j in range(i, per_epoch):
                first = j * together + self.process_index * self.batch_size
                yield order[first : first + self.batch_size].tolist()
            epoch, i = epoch + 1, 0


# settings of a run that may change when it is taken up again
FREE = (
    "output_dir max_steps save_every checkpoints_total_limit validate_every validation_images dataloader_num_workers "
    "report_to tracker_project_name push_to_hub hub_model_id hub_private mixed_precision"
).split()


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
        identity: what else makes this run itself, as plain values; it resumes only where this and the settings that
            decide its numbers are the same.
        validate: `validate(model, step) -> {name: picture path}` or None, every `config.validate_every` steps.

    Raises:
        ValueError: the loss is no longer finite, the data set is smaller than one batch, or `output_dir` holds a run of
            other settings.
    """
    output_dir = Path(config.output_dir)
    process_state()  # before the Accelerator, which alone would not see the other processes of a CPU run
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        step_scheduler_with_optimizer=False,
    )
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(config).items() if key not in FREE}
        keep_settings(output_dir, {**settings, **(identity or {}), "num_processes": accelerator.num_processes})
        accelerator.print(f"{accelerator.num_processes} process(es) on {accelerator.device}")
    if config.report_to is not None:
        accelerator.init_trackers(config.tracker_project_name, config=flat(vars(config)))

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    ema = EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema.to(accelerator.device)
    step = resume(accelerator, ema, output_dir)
    # unprepared, hence stepped once per update whatever the number of processes; its state is the step itself
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer.optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_steps,
        last_epoch=step - 1,
    )

    batches = ShuffledForever(
        len(dataset),
        config.batch_size,
        config.seed,
        start=step * config.gradient_accumulation_steps,
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
        with averaged(accelerator, ema, model) as unwrapped:
            if accelerator.is_main_process:
                replace_into(output_dir, lambda folder: save(unwrapped, folder))

    def show_average():
        if validate is None:
            return
        with averaged(accelerator, ema, model) as unwrapped:
            if accelerator.is_main_process:
                log_pictures(accelerator, validate(unwrapped, step), step)

    if step >= config.max_steps:  # it may have been stopped between its last checkpoint and its end
        save_average()
        show_average()
    model.train()
    running = 0.0
    micro_batches = (
        enumerate(loader, start=step * config.gradient_accumulation_steps) if step < config.max_steps else ()
    )
    for i, batch in micro_batches:
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
        running += loss.detach() / config.gradient_accumulation_steps
        if not accelerator.sync_gradients:
            continue

        step += 1
        lr_scheduler.step()
        ema.step(model.parameters())
        value = accelerator.reduce(running, reduction="mean").item()
        running = 0.0
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} at step {step}: lower train.learning_rate or look at the data")
        values = {"loss": value, "lr": lr_scheduler.get_last_lr()[0], **over_processes(accelerator, measured)}
        accelerator.log(values, step=step)
        bar.update()
        bar.set_postfix(loss=f"{value:.4f}")
        if log:
            log.write(step, **values)

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


def over_processes(accelerator, measured):
    """{name: scalar tensor} of this process -> {name: float}, the mean over those that are a number in some process."""
    if not measured:
        return {}
    all_of_them = accelerator.gather(torch.stack([value.detach().float() for value in measured.values()])[None])
    means = all_of_them.nanmean(dim=0).tolist()
    return {name: mean for name, mean in zip(measured, means, strict=True) if math.isfinite(mean)}


@contextmanager
def averaged(accelerator, ema, model):
    """`with averaged(accelerator, ema, model) as unwrapped:` the model in eval mode, EMA weights in place."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    yield accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    ema.restore(model.parameters())
    model.train()
    accelerator.wait_for_everyone()


@contextmanager
def seeded(seed):
    """Draw torch's random numbers from `seed` inside the block; afterwards all is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def checkpoints(output_dir):
    """The finished checkpoint folders of a run, oldest first."""
    return sorted(p for p in Path(output_dir).glob("checkpoint-*") if p.suffix != ".tmp")


def checkpoint(accelerator, ema, output_dir, step, limit):
    """Write `checkpoint-STEP` under a temporary name, rename it when it is whole, then drop the oldest over `limit`."""
    final = Path(output_dir) / f"checkpoint-{step:07d}"
    temporary = final.with_suffix(".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        averages = {str(i): p.contiguous() for i, p in enumerate(ema.shadow_params)}
        save_file(averages, temporary / "ema.safetensors", metadata={"optimization_step": str(ema.optimization_step)})
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        for old in checkpoints(output_dir)[:-limit] if limit else ():
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator, ema, output_dir):
    """Load the newest checkpoint, if there is one; the number of steps already done."""
    found = checkpoints(output_dir)
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    averages = load_file(found[-1] / "ema.safetensors")
    for i, parameter in enumerate(ema.shadow_params):
        parameter.copy_(averages[str(i)])
    step = int(found[-1].name.split("-")[1])
    ema.optimization_step = step
    return step


def keep_settings(output_dir, settings):
    """Write down what decides a run's numbers; ValueError where a run that has begun was of other settings."""
    path = output_dir / "run.json"
    settings = json.loads(json.dumps(settings, default=str))
    if path.exists() and checkpoints(output_dir):
        old = json.loads(path.read_text())
        changed = sorted(key for key in old.keys() | settings.keys() if old.get(key) != settings.get(key))
        if changed:
            found = ", ".join(f"{key}: {old.get(key)!r}, now {settings.get(key)!r}" for key in changed)
            raise ValueError(f"{output_dir} holds a run of other settings ({found}): name a new train.output_dir")
    write_file(path, (json.dumps(settings, indent=2) + "\n").encode())


def replace_into(folder, write):
    """`write(temporary)`, then move what it wrote into `folder`, `model_index.json` last: no half-written model."""
    temporary = Path(folder) / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    for item in sorted(temporary.iterdir(), key=lambda p: p.name == "model_index.json"):
        target = Path(folder) / item.name
        if item.is_dir() and target.exists():
            shutil.rmtree(target)
        os.replace(item, target)
    temporary.rmdir()


class RunLog:
    """One JSON object a line. A resumed run first forgets the lines after its checkpoint, which it will write again."""

    def __init__(self, path, step):
        self.path = Path(path)
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_file(self.path, "".join(kept).encode())

    def write(self, step, **values):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def log_pictures(accelerator, pictures, step):
    """Hand {name: path} to the trackers that show images."""
    for tracker in accelerator.trackers:
        if not hasattr(tracker, "log_images"):
            continue
        loaded = {name: Image.open(path).convert("RGB") for name, path in pictures.items()}
        if tracker.name == "tensorboard":
            tracker.log_images({k: np.asarray(v)[None] for k, v in loaded.items()}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({k: [v] for k, v in loaded.items()}, step=step)


def flat(values):
    """A tracker's hyper-parameters: numbers and strings only."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
