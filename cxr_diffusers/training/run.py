"""What every training run has, whoever learns in it: its folder, processes, batches, averages, checkpoints and log."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..files import keep_settings, write_file
from ..processes import process_state
from .checkpoints import checkpoint, checkpoints, replace_into, resume

# settings of a run that may change when it is taken up again
FREE = (
    "output_dir max_steps save_every checkpoints_total_limit validate_every validation_images dataloader_num_workers "
    "report_to tracker_project_name push_to_hub hub_model_id hub_private mixed_precision"
).split()


class Run:
    """A run in `config.output_dir`: open it, resume it, take its batches, end each step and, at the end, the run.

    Args:
        config: a `recipe.RunConfig`.
        save: `save(model, folder)` writes the finished thing with the averaged (EMA) weights in place.
        validate: `validate(model, step) -> {name: picture path}` or None, every `config.validate_every` steps.
        identity: what else makes this run itself, as plain values; it resumes only where this and the settings that
            decide its numbers are the same.
        gradient_accumulation_steps: batches of a step.
    """

    def __init__(self, config, *, save, validate=None, identity=None, gradient_accumulation_steps=1):
        self.config, self.save, self.validate, self.identity = config, save, validate, identity or {}
        self.output_dir, self.step = Path(config.output_dir), 0
        process_state()  # before the Accelerator, which alone would not see the other processes of a CPU run
        self.accelerator = Accelerator(
            gradient_accumulation_steps=gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=config.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(self.output_dir), logging_dir=str(self.output_dir / "logs")
            ),
            step_scheduler_with_optimizer=False,
        )
        self.is_main = self.accelerator.is_main_process

    def open(self):
        """Make the folder and start the trackers; ValueError where it holds a run of other settings."""
        if self.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            settings = {key: value for key, value in vars(self.config).items() if key not in FREE}
            processes = {"num_processes": self.accelerator.num_processes}
            path, settings = self.output_dir / "run.json", {**settings, **self.identity, **processes}
            if not checkpoints(self.output_dir):  # nothing was learned from those that lie there
                path.unlink(missing_ok=True)
            keep_settings(path, settings, advice="name a new train.output_dir")
            print(f"{self.accelerator.num_processes} process(es) on {self.accelerator.device}")
        if self.config.report_to is not None:
            self.accelerator.init_trackers(self.config.tracker_project_name, config=flat(vars(self.config)))

    def resume(self, model, ema):
        """Take up the newest checkpoint of what the accelerator has prepared, and of `ema`, the average of `model`."""
        self.model, self.ema = model, ema
        ema.to(self.accelerator.device)
        self.step = resume(self.accelerator, ema, self.output_dir)
        return self.step

    def batches(self, dataset):
        """The batches from where the run is to its end, of this process; `end_step` counts the steps.

        A run that has had all its steps has no batches, but is saved and shown again: it may have been stopped between
        its last checkpoint and its end.
        """
        accumulated = self.accelerator.gradient_accumulation_steps
        indices = ShuffledForever(
            len(dataset),
            self.config.batch_size,
            self.config.seed,
            start=self.step * accumulated,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        loader = DataLoader(dataset, batch_sampler=indices, num_workers=self.config.dataloader_num_workers)
        self.log = RunLog(self.output_dir / "log.jsonl", self.step) if self.is_main else None
        self.bar = tqdm(
            total=self.config.max_steps, initial=self.step, desc="training", unit="step", disable=not self.is_main
        )
        if self.is_main and self.step:
            self.bar.write(f"resumed from {checkpoints(self.output_dir)[-1]}")
        if self.step >= self.config.max_steps:
            self.save_average()
            self.show_average()
            return
        for batch in loader:
            yield batch
            if self.step == self.config.max_steps:
                return

    def end_step(self, values, shown):
        """Log {name: number} of the step that was made, `shown` beside the bar; write down what is due after it.

        Raises:
            ValueError: a number is not finite.
        """
        self.step += 1
        broken = {name: value for name, value in values.items() if not math.isfinite(value)}
        if broken:
            raise ValueError(f"at step {self.step} not finite: {broken}; lower train.learning_rate or look at the data")
        self.accelerator.log(values, step=self.step)
        self.bar.update()
        self.bar.set_postfix(shown)
        if self.log:
            self.log.write(self.step, **values)
        last = self.step == self.config.max_steps
        if self.step % self.config.save_every == 0 or last:
            checkpoint(self.accelerator, self.ema, self.output_dir, self.step, self.config.checkpoints_total_limit)
            self.save_average()
        if self.step % self.config.validate_every == 0 or last:
            self.show_average()

    def end(self):
        """Close what is open; the folder of the run."""
        self.bar.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.output_dir

    def save_average(self):
        """The finished thing, as it would be if the run ended now, into the folder."""
        with averaged(self.accelerator, self.ema, self.model) as unwrapped:
            if self.is_main:
                replace_into(self.output_dir, lambda folder: self.save(unwrapped, folder))

    def show_average(self):
        """Its pictures to the trackers."""
        if self.validate is None:
            return
        with averaged(self.accelerator, self.ema, self.model) as unwrapped:
            if self.is_main:
                log_pictures(self.accelerator, self.validate(unwrapped, self.step), self.step)


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
