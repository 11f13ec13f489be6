"""Shared by the training loops: the folder of a run, its processes, batches, averages, checkpoints and log."""

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate.utils
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..files import as_json, check_settings, remove_dead, write_file
from ..precision import has_fast_bfloat16
from ..processes import process_state
from .checkpoints import FolderLock, checkpoint, newest_intact, replace_into, restore_records, resume
from .recipe import RunConfig

if TYPE_CHECKING:
    from .tensors import TensorImages

# settings that may differ when a run is resumed
CHANGEABLE_SETTINGS = (
    "output_dir max_steps max_seconds compile save_every checkpoints_total_limit validate_every validation_images "
    "dataloader_num_workers "
    "report_to tracker_project_name push_to_hub hub_model_id hub_private mixed_precision validation_loss_images"
).split()


class Run:
    """A training run in the folder `config.output_dir`.

    A loop calls `open`, `resume`, then `end_step` for each (last) batch of `batches` of a step, and `end`.

    Args:
        config: the `train:` section of a recipe.
        save: `save(model, folder)` writes the finished model; it is called with the averaged (EMA) weights in place.
        validate: `validate(model, step) -> {name: path of an image}` or None, every `config.validate_every` steps.
        measure: `measure(model) -> {name: number}` or None, each time the model is saved; the model with the lowest
            "validation_loss" is kept in the subfolder `best`.
        identity: settings besides `config` that determine the result, as plain values; a run resumes only if they are
            the same.
        gradient_accumulation_steps: batches per step.

    Attributes:
        accelerator: of accelerate.
        step: number of finished steps.
        output_dir: the folder.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        save: Callable[[torch.nn.Module, Path], None],
        validate: Callable[[torch.nn.Module, int], dict[str, Path]] | None = None,
        measure: Callable[[torch.nn.Module], dict[str, float]] | None = None,
        identity: dict[str, Any] | None = None,
        gradient_accumulation_steps: int = 1,
    ) -> None:
        self.config, self.save, self.validate, self.identity = config, save, validate, identity or {}
        self.measure = measure
        self.output_dir, self.step, self.seconds_before = Path(config.output_dir), 0, 0.0
        self.pending: list[tuple[int, dict, dict]] = []
        self.started: float | None = None
        self.last = False
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
        # reading a number from a GPU waits for it to finish, so there the numbers of several steps are read together
        self.read_every = 1 if self.accelerator.device.type == "cpu" else 20

    def open(self) -> None:
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
            path, settings = self.output_dir / "run.json", {**settings, **self.identity}
            if self.checkpoint:
                restore_records(self.checkpoint, self.output_dir)
            else:  # a run without a checkpoint starts anew, with any settings
                path.unlink(missing_ok=True)
            check_settings(path, settings, ignore=("num_processes",), advice="name a new train.output_dir")
            print(f"{self.accelerator.num_processes} process(es) on {self.accelerator.device}")
            settings["num_processes"] = self.record_processes(path)
            write_file(path, (json.dumps(as_json(settings), indent=2) + "\n").encode())
        if self.config.report_to is not None:
            self.accelerator.init_trackers(self.config.tracker_project_name, config=flat(vars(self.config)))

    def record_processes(self, path: Path) -> int | list[int]:
        """The number of processes, or the list of numbers if it has changed since the run began; says so."""
        history = json.loads(path.read_text()).get("num_processes", []) if path.is_file() else []
        history = history if isinstance(history, list) else [history]
        if history[-1:] != [self.accelerator.num_processes]:
            history = [*history, self.accelerator.num_processes]
        if len(history) == 1:
            return history[0]
        print(
            f"the number of processes of this run has changed ({', then '.join(map(str, history))}): it continues from "
            "the same weights, but its numbers are no longer those of an undisturbed run"
        )
        return history

    def resume(self, model: torch.nn.Module, ema: EMAModel) -> int:
        """Load the newest checkpoint into the objects prepared by the accelerator and `ema`, the average of `model`.

        Returns:
            the number of steps already done.
        """
        self.model, self.ema = model, ema
        ema.to(self.accelerator.device)
        self.step, self.seconds_before = resume(self.accelerator, ema, self.checkpoint)
        return self.step

    @property
    def seconds(self) -> float:
        """Training time so far in seconds, including the time before the run was resumed."""
        return self.seconds_before + (time.monotonic() - self.started if self.started else 0.0)

    @property
    def progress(self) -> float:
        """The finished share of the run, 0 to 1: of its steps or of its time, whichever is larger."""
        shares = [self.step / self.config.max_steps]
        if self.config.max_seconds:
            shares.append(self.seconds / self.config.max_seconds)
        return min(max(shares), 1.0)

    @property
    def finished(self) -> bool:
        """Whether all steps or all the time have been used."""
        return self.progress >= 1.0

    def batches(self, dataset: torch.utils.data.Dataset) -> Iterator[dict[str, torch.Tensor]]:
        """The remaining batches of this process; `end_step` counts the steps.

        A finished run has no batches, but is saved and validated again: it may have been interrupted between its last
        checkpoint and its end.
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
            self.validate_average()
            return
        for batch in loader:
            yield batch
            if self.started is None:  # the first step may have compiled the network, which does not count
                self.started = time.monotonic()
            if self.last:
                return

    def end_step(
        self,
        values: dict[str, float | torch.Tensor],
        in_bar: dict[str, str],
        measured: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Count and log a step; save, validate and write a checkpoint if they are due.

        Args:
            values: {name: number or scalar tensor}, the same in every process.
            in_bar: {label: name among `values`} of the numbers in the progress bar.
            measured: further values; NaN means "not measured", and is not logged.

        Raises:
            ValueError: one of `values` is not finite.
        """
        self.step += 1
        self.pending.append((self.step, values, measured or {}))
        save_due = self.step % self.config.save_every == 0
        validation_due = self.step % self.config.validate_every == 0
        last_step = self.step == self.config.max_steps
        if save_due or validation_due or last_step or len(self.pending) >= self.read_every:
            self.read_pending(in_bar)
            self.last = self.agreed_progress() >= 1.0
        if save_due or self.last:
            self.save_average()
        if validation_due or self.last:
            self.validate_average()
        if save_due or self.last:  # last: with its checkpoint a step is complete, without it the step is repeated
            limit = self.config.checkpoints_total_limit
            checkpoint(self.accelerator, self.ema, self.output_dir, self.step, limit, self.seconds)

    def read_pending(self, in_bar: dict[str, str]) -> None:
        """Write the numbers of the steps since the last reading to the log, the trackers and the progress bar."""
        for step, pending, measured in self.pending:
            values = {name: float(value) for name, value in pending.items()}
            broken = {name: value for name, value in values.items() if not math.isfinite(value)}
            if broken:
                raise ValueError(f"at step {step} not finite: {broken}; lower train.learning_rate or check the data")
            numbers = {name: float(value) for name, value in measured.items()}
            values |= {name: value for name, value in numbers.items() if math.isfinite(value)}
            self.accelerator.log(values, step=step)
            if self.log:
                self.log.write(step, **values)
        if self.config.max_seconds and self.progress:
            self.bar.total = round(self.step / self.progress)  # as many steps as the time allows
        self.bar.update(len(self.pending))
        self.bar.set_postfix({label: f"{values[name]:.4f}" for label, name in in_bar.items() if name in values})
        self.pending = []

    def agreed_progress(self) -> float:
        """`progress` by the clock of the main process, for all processes: each must call this at the same places.

        With learning rates by clocks of their own, the weights of the processes would drift apart.
        """
        if not self.config.max_seconds or self.accelerator.num_processes == 1:
            return self.progress
        return accelerate.utils.broadcast(torch.tensor(self.progress, device=self.accelerator.device)).item()

    def end(self) -> Path:
        """Close the log, the trackers and the lock; returns the folder of the run."""
        self.bar.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.is_main:
            self.lock.release()
        return self.output_dir

    def save_average(self) -> None:
        """Save the model with averaged weights into the folder, and into `best` if its validation loss is lowest."""
        with averaged(self.accelerator, self.ema, self.model) as unwrapped:
            if not self.is_main:
                return
            replace_into(self.output_dir, lambda folder: self.save(unwrapped, folder))
            if self.measure is None:
                return
            with self.accelerator.autocast():
                values = {name: float(value) for name, value in self.measure(unwrapped).items()}
            log = RunLog(self.output_dir / "validation.jsonl", self.step - 1)
            images = getattr(self.measure, "digest", "")  # losses of other images are not comparable
            log.write(self.step, seconds=round(self.seconds, 1), images=images, **values)
            self.accelerator.log(values, step=self.step)
            self.bar.write(f"step {self.step}: " + ", ".join(f"{name} {value:.5f}" for name, value in values.items()))
            lines, best = log.lines(), self.output_dir / "best"
            comparable = [line for line in lines if line.get("images") == images]
            if len(comparable) == 1 < len(lines) and best.is_dir():  # the first loss of these images
                kept = new_name(self.output_dir / "best_of_other_images")
                best.rename(kept)
                self.bar.write(f"the validation images have changed: the best model so far is kept in {kept}")
            if values["validation_loss"] <= min(line["validation_loss"] for line in comparable):
                best.mkdir(exist_ok=True)
                replace_into(best, lambda folder: self.save(unwrapped, folder))

    def validate_average(self) -> None:
        """Call `validate` with averaged weights; its images go to the trackers."""
        if self.validate is None:
            return
        with averaged(self.accelerator, self.ema, self.model) as unwrapped:
            if self.is_main:
                log_images(self.accelerator, self.validate(unwrapped, self.step), self.step)


def new_name(path: Path) -> Path:
    """`path`, or with a number behind it the first that does not exist."""
    names = itertools.chain([path], (path.with_name(f"{path.name}_{i}") for i in itertools.count(2)))
    return next(name for name in names if not name.exists())


class ShuffledForever:
    """Endless batches of shuffled indices; each depends on `seed` and its number only, so a run can resume mid-epoch.

    With several processes the global batch is `batch_size * num_processes`, and each process takes its slice of it.

    Args:
        size: number of rows, or a list of groups of indices, which then take turns and are drawn equally often.
        batch_size: of one process.
        start: number of the first batch.

    Raises:
        ValueError: fewer rows than a global batch.
    """

    def __init__(
        self,
        size: int | Sequence[Sequence[int] | torch.Tensor],
        batch_size: int,
        seed: int,
        start: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
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

    def __iter__(self) -> Iterator[list[int]]:
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
        """Groups take turns: draw k from a group is the k-th row of its own shuffled epochs."""
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


def groups_of(dataset: "TensorImages") -> list[torch.Tensor]:
    """The rows of a data set by class and view: [indices, ...]; rows without class or view are the last group."""
    labels, views = dataset.labels.cpu(), dataset.views.cpu()
    unknown = (labels < 0) | ((views < 0) & (views >= 0).any())
    keys = torch.where(unknown, -1, labels * (views.max() + 2) + views + 1)
    return [torch.nonzero(keys == key).flatten() for key in sorted(set(keys.tolist()), key=lambda key: (key < 0, key))]


@contextmanager
def averaged(accelerator: Accelerator, ema: EMAModel, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Inside the block, the unwrapped model in eval mode with averaged (EMA) weights."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    yield accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    ema.restore(model.parameters())
    model.train()
    accelerator.wait_for_everyone()


class PowerEMA(EMAModel):
    """An average of the weights with a power-function profile (Karras et al. 2024,
    https://arxiv.org/abs/2312.02696, section 3.1).

    Its decay at step t is (1 - 1/t)^(gamma + 1): the average reaches back over a fixed share of the run so far.

    Args:
        width: the relative width of the profile, as a share of the run so far; below 0.28.

    Raises:
        ValueError: another `width`.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], width: float, **kwargs: Any) -> None:
        super().__init__(parameters, **kwargs)
        if not 0 < width < 0.28:
            raise ValueError(f"expected `ema_width` between 0 and 0.28, got {width}")
        self.gamma = float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())

    def get_decay(self, optimization_step: int) -> float:
        """The decay at step t = 1, 2, ...; 0 at the first, so that the initial weights have no influence."""
        return (1 - 1 / max(optimization_step, 1)) ** (self.gamma + 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU random numbers inside the block; afterwards their state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class RunLog:
    """A file with one JSON object per line. Opening it at a step removes the lines of later steps and damaged lines."""

    def __init__(self, path: str | Path, step: int) -> None:
        self.path = Path(path)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        valid = itertools.takewhile(lambda line: line.endswith(b"\n") and step_of_line(line) <= step, lines)
        write_file(self.path, b"".join(valid))

    def lines(self) -> list[dict[str, Any]]:
        """The objects, oldest first."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def write(self, step: int, **values: float | str) -> None:
        """Append a line."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def step_of_line(line: bytes) -> float:
    """The step of a line of a `RunLog`; infinity if the line is damaged."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


def log_images(accelerator: Accelerator, paths: dict[str, Path], step: int) -> None:
    """Pass the images at {name: path} to the trackers that can display images."""
    for tracker in accelerator.trackers:
        if not hasattr(tracker, "log_images"):
            continue
        loaded = {name: Image.open(path).convert("RGB") for name, path in paths.items()}
        if tracker.name == "tensorboard":
            tracker.log_images({k: np.asarray(v)[None] for k, v in loaded.items()}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({k: [v] for k, v in loaded.items()}, step=step)


def flat(values: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """Hyper-parameters for a tracker: numbers and strings only."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items()}
