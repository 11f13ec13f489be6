"""What every training run has, whoever learns in it: its folder, processes, batches, averages, checkpoints and log."""

import itertools
import json
import math
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import accelerate.utils
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..files import keep_settings, remove_dead, write_file
from ..processes import process_state
from .checkpoints import FolderLock, checkpoint, newest_intact, replace_into, restore_records, resume
from ..precision import has_fast_bfloat16

# settings that may differ when a run is resumed
CHANGEABLE_SETTINGS = (
    "output_dir max_steps max_seconds compile save_every checkpoints_total_limit validate_every validation_images "
    "dataloader_num_workers "
    "report_to tracker_project_name push_to_hub hub_model_id hub_private mixed_precision validation_loss_images"
).split()


class Run:
    """A run in `config.output_dir`: open it, resume it, take its batches, end each step and, at the end, the run.

    Args:
        config: a `recipe.RunConfig`.
        save: `save(model, folder)` writes the finished thing with the averaged (EMA) weights in place.
        validate: `validate(model, step) -> {name: picture path}` or None, every `config.validate_every` steps.
        measure: `measure(model) -> {name: number}` or None, each time the model is saved; the model with the lowest
            "validation_loss" is kept in the folder's `best`.
        identity: what else makes this run itself, as plain values; it resumes only where this and the settings that
            decide its numbers are the same.
        gradient_accumulation_steps: batches of a step.
    """

    def __init__(self, config, *, save, validate=None, measure=None, identity=None, gradient_accumulation_steps=1):
        self.config, self.save, self.validate, self.identity = config, save, validate, identity or {}
        self.measure = measure
        self.output_dir, self.step, self.seconds_before = Path(config.output_dir), 0, 0.0
        self.pending, self.started, self.last = [], None, False
        precision = config.mixed_precision
        if precision == "auto":
            precision = "bf16" if has_fast_bfloat16(process_state().device) else "no"
        process_state()  # before the Accelerator, which alone would not see the other processes of a CPU run
        self.accelerator = Accelerator(
            gradient_accumulation_steps=gradient_accumulation_steps,
            mixed_precision=precision,
            log_with=config.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(self.output_dir), logging_dir=str(self.output_dir / "logs")
            ),
            step_scheduler_with_optimizer=False,
        )
        self.is_main = self.accelerator.is_main_process
        # reading a number off an accelerator waits for it, so there the numbers of several steps are read at once
        self.read_every = 1 if self.accelerator.device.type == "cpu" else 20

    def open(self):
        """Make the folder, choose the checkpoint to resume from and start the trackers.

        Raises:
            BlockingIOError: another process trains in the folder.
            ValueError: the folder holds a run of other settings.
        """
        if self.is_main:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.lock = FolderLock(self.output_dir)
            remove_dead(self.output_dir)
            for unfinished in self.output_dir.glob("checkpoint-*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
        self.checkpoint = newest_intact(self.accelerator, self.output_dir)
        if self.is_main:
            settings = {key: value for key, value in vars(self.config).items() if key not in CHANGEABLE_SETTINGS}
            processes = {"num_processes": self.accelerator.num_processes}
            path, settings = self.output_dir / "run.json", {**settings, **self.identity, **processes}
            if self.checkpoint:
                restore_records(self.checkpoint, self.output_dir)
            else:  # the settings of a run without a checkpoint bind nobody
                path.unlink(missing_ok=True)
            keep_settings(path, settings, advice="name a new train.output_dir")
            print(f"{self.accelerator.num_processes} process(es) on {self.accelerator.device}")
        if self.config.report_to is not None:
            self.accelerator.init_trackers(self.config.tracker_project_name, config=flat(vars(self.config)))

    def resume(self, model, ema):
        """Take up the newest checkpoint of what the accelerator has prepared, and of `ema`, the average of `model`."""
        self.model, self.ema = model, ema
        ema.to(self.accelerator.device)
        self.step, self.seconds_before = resume(self.accelerator, ema, self.checkpoint)
        return self.step

    @property
    def seconds(self):
        """Training time so far, in seconds, that of the run's earlier parts included."""
        return self.seconds_before + (time.monotonic() - self.started if self.started else 0.0)

    @property
    def progress(self):
        """The share of the run that is done, 0 to 1: of its steps or of its time, whichever is further."""
        shares = [self.step / self.config.max_steps]
        if self.config.max_seconds:
            shares.append(self.seconds / self.config.max_seconds)
        return min(max(shares), 1.0)

    @property
    def finished(self):
        """Whether the run has had all its steps or all its time."""
        return self.progress >= 1.0

    def batches(self, dataset):
        """The batches from where the run is to its end, of this process; `end_step` counts the steps.

        A run that has had all its steps has no batches, but is saved and shown again: it may have been stopped between
        its last checkpoint and its end.
        """
        accumulated = self.accelerator.gradient_accumulation_steps
        groups = groups_of(dataset) if getattr(self.config, "balance", False) else None
        indices = ShuffledForever(
            len(dataset) if groups is None else groups,
            self.config.batch_size,
            self.config.seed,
            start=self.step * accumulated,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        if getattr(dataset, "in_memory", False):
            dataset.to(self.accelerator.device)
            loader = (dataset.batch(batch) for batch in indices)
        else:
            loader = DataLoader(
                dataset,
                batch_sampler=indices,
                num_workers=self.config.dataloader_num_workers,
                persistent_workers=self.config.dataloader_num_workers > 0,
                pin_memory=self.accelerator.device.type == "cuda",
            )
        self.log = RunLog(self.output_dir / "log.jsonl", self.step) if self.is_main else None
        self.bar = tqdm(
            total=self.config.max_steps, initial=self.step, desc="training", unit="step", disable=not self.is_main
        )
        if self.is_main and self.step:
            self.bar.write(f"resumed from {self.checkpoint}")
        if self.finished:
            self.save_average()
            self.show_average()
            return
        for batch in loader:
            yield batch
            if self.started is None:  # the first step may have compiled the network: it is not of the time given
                self.started = time.monotonic()
            if self.last:
                return

    def end_step(self, values, shown):
        """Log {name: number} of the step that was made, `shown` of it beside the bar; write down what is due after it.

        Args:
            values: numbers, or scalar tensors, the same in every process; a tensor that is NaN was not measured.
            shown: {label: name among them} of those that stand beside the bar.

        Raises:
            ValueError: a number is not finite.
        """
        self.step += 1
        self.pending.append((self.step, values))
        due = self.step % self.config.save_every == 0
        show = self.step % self.config.validate_every == 0
        if due or show or self.step == self.config.max_steps or len(self.pending) >= self.read_every:
            self.read_pending(shown)
            self.last = self.agreed_end()
        if due or self.last:
            self.save_average()
        if show or self.last:
            self.show_average()
        if due or self.last:  # at the end: what belongs to this step is complete, or the step is repeated
            limit = self.config.checkpoints_total_limit
            checkpoint(self.accelerator, self.ema, self.output_dir, self.step, limit, self.seconds)

    def read_pending(self, shown):
        """Bring the numbers of the steps since the last reading to the log, the trackers and the bar."""
        for step, values in self.pending:
            values = {name: float(value) for name, value in values.items()}
            broken = {name: value for name, value in values.items() if not math.isfinite(value)}
            if broken:
                raise ValueError(f"at step {step} not finite: {broken}; lower train.learning_rate or look at the data")
            self.accelerator.log(values, step=step)
            if self.log:
                self.log.write(step, **values)
        self.bar.update(len(self.pending))
        self.bar.set_postfix({label: f"{values[name]:.4f}" for label, name in shown.items() if name in values})
        self.pending = []

    def agreed_end(self):
        """Whether the run ends here: by the clock of the main process, for all of them."""
        if not self.config.max_seconds:
            return self.finished
        flag = torch.tensor(float(self.finished), device=self.accelerator.device)
        return bool(accelerate.utils.broadcast(flag).item())

    def end(self):
        """Close what is open; the folder of the run."""
        self.bar.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.is_main:
            self.lock.release()
        return self.output_dir

    def save_average(self):
        """The finished thing, as it would be if the run ended now, into the folder; into `best` if it is the best."""
        with averaged(self.accelerator, self.ema, self.model) as unwrapped:
            if not self.is_main:
                return
            replace_into(self.output_dir, lambda folder: self.save(unwrapped, folder))
            if self.measure is None:
                return
            with self.accelerator.autocast():
                values = {name: float(value) for name, value in self.measure(unwrapped).items()}
            log = RunLog(self.output_dir / "validation.jsonl", self.step - 1)
            log.write(self.step, seconds=round(self.seconds, 1), **values)
            self.accelerator.log(values, step=self.step)
            self.bar.write(f"step {self.step}: " + ", ".join(f"{name} {value:.5f}" for name, value in values.items()))
            if values["validation_loss"] <= min(line["validation_loss"] for line in log.lines()):
                (self.output_dir / "best").mkdir(exist_ok=True)
                replace_into(self.output_dir / "best", lambda folder: self.save(unwrapped, folder))

    def show_average(self):
        """Its pictures to the trackers."""
        if self.validate is None:
            return
        with averaged(self.accelerator, self.ema, self.model) as unwrapped:
            if self.is_main:
                log_pictures(self.accelerator, self.validate(unwrapped, self.step), self.step)


class ShuffledForever:
    """Batches of indices without end, each a function of `seed` and its number alone: so a run resumes mid-epoch.

    `size` may be a list of groups of indices instead, which are then drawn from in turn: each equally often.
    With several processes the global batch is `batch_size * num_processes` and each takes its own slice of it.
    """

    def __init__(self, size, batch_size, seed, start=0, process_index=0, num_processes=1):
        self.groups = None
        if not isinstance(size, int):
            self.groups = [torch.as_tensor(group) for group in size]
            size = sum(map(len, self.groups))
        if size < batch_size * num_processes:
            raise ValueError(
                f"expected at least one global batch of {batch_size} x {num_processes} processes, "
                f"got a data set of {size} images: lower train.batch_size"
            )
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.process_index, self.num_processes = process_index, num_processes

    def __iter__(self):
        together = self.batch_size * self.num_processes
        if self.groups is not None:
            yield from self._in_turn(together)
        per_epoch = self.size // together
        epoch, i = divmod(self.start, per_epoch)
        while True:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch))
            for j in range(i, per_epoch):
                first = j * together + self.process_index * self.batch_size
                yield order[first : first + self.batch_size].tolist()
            epoch, i = epoch + 1, 0

    def _in_turn(self, together):
        """As above, and the groups take turns: draw k of a group is the k-th of its own shuffled epochs."""
        orders = {}

        def draw(position):
            turn, which = divmod(position, len(self.groups))
            group = self.groups[which]
            epoch, k = divmod(turn, len(group))
            if orders.get(which, (None,))[0] != epoch:
                generator = torch.Generator().manual_seed(self.seed + epoch * len(self.groups) + which)
                orders[which] = epoch, group[torch.randperm(len(group), generator=generator)].tolist()
            return orders[which][1][k]

        for i in itertools.count(self.start):
            first = i * together + self.process_index * self.batch_size
            yield [draw(position) for position in range(first, first + self.batch_size)]


def groups_of(dataset):
    """Rows of a `TensorImages` by class and view: [indices, ...], those without class or view together as the last."""
    labels, views = dataset.labels.cpu(), dataset.views.cpu()
    unknown = (labels < 0) | ((views < 0) & (views >= 0).any())
    keys = torch.where(unknown, -1, labels * (views.max() + 2) + views + 1)
    return [torch.nonzero(keys == key).flatten() for key in sorted(set(keys.tolist()), key=lambda key: (key < 0, key))]


@contextmanager
def averaged(accelerator, ema, model):
    """`with averaged(accelerator, ema, model) as unwrapped:` the model in eval mode, EMA weights in place."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    yield accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    ema.restore(model.parameters())
    model.train()
    accelerator.wait_for_everyone()


class PowerEMA(EMAModel):
    """An average of the weights with a power-function profile (Karras et al. 2024,
    https://arxiv.org/abs/2312.02696, section 3.1).

    Its decay is (1 - 1/t)^(gamma + 1): it forgets in proportion to the length of the run.

    Args:
        width: the relative width of the profile, as a share of the run so far; below 0.28.
    """

    def __init__(self, parameters, width, **kwargs):
        super().__init__(parameters, **kwargs)
        if not 0 < width < 0.28:
            raise ValueError(f"expected `ema_width` between 0 and 0.28, got {width}")
        self.gamma = float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())

    def get_decay(self, optimization_step):
        """Of step t = 1, 2, ...: 0 at the first, so that the initial weights take no part."""
        return (1 - 1 / max(optimization_step, 1)) ** (self.gamma + 1)


@contextmanager
def seeded(seed):
    """Draw torch's random numbers from `seed` inside the block; afterwards all is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class RunLog:
    """A file of one JSON object per line. Opening it at a step drops the lines of later steps, and what is damaged."""

    def __init__(self, path, step):
        self.path = Path(path)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept = list(itertools.takewhile(lambda line: line.endswith(b"\n") and step_of_line(line) <= step, lines))
        write_file(self.path, b"".join(kept))

    def lines(self):
        """What was written, oldest first."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def write(self, step, **values):
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def step_of_line(line):
    """The step of a line of a `RunLog`; infinity for a damaged one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


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
