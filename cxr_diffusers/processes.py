"""Sharing work among the processes of one machine and the shards of several; progress bars."""

import atexit
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed.distributed_c10d as c10d
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

RENDEZVOUS = timedelta(minutes=5)  # for all processes to start
BARRIER = timedelta(days=7)  # for a process that has finished early to wait for the others
TASK_NUMBERS = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")
Item = TypeVar("Item")


def process_state() -> PartialState:
    """accelerate's `PartialState`: index of this process, number of processes, device.

    Use this function instead of `PartialState()`, which on a machine without an accelerator treats each of several
    processes as the only one, so that each would do all of the work.
    """
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not (alone or torch.accelerator.is_available())
    first = not torch.distributed.is_initialized()
    state = PartialState(cpu=cpu, timeout=RENDEZVOUS)
    if state.num_processes > 1:
        if first and torch.distributed.is_initialized():
            c10d._set_pg_timeout(BARRIER)  # torch has no public name for it
        atexit.unregister(leave)  # or each call would register it once more
        atexit.register(leave)
    return state


def usable_device(name: str | None = None) -> torch.device:
    """The device of this name, such as "cpu" or "cuda:1"; without a name the device of this process.

    Raises:
        ValueError: no device of this name can be used here.
    """
    if name is None:
        return process_state().device
    try:
        torch.empty(0, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"expected a device that PyTorch can use here, such as cpu, got {name!r}: {reason}") from None
    return torch.device(name)


def leave() -> None:
    """End the process group before Python exits: a thread of it that outlives its data would abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass
class Shard:
    """One of `count` shares of a list of items: every `count`-th item, from number `index` on.

    Shards do not communicate. They share the output folder, which must hold one file of results an item: a shard
    writes those of its own items, and a run without a shard computes the missing items and writes the tables. So each
    shard can run at any time, on any machine, and more than once.

    Attributes:
        index: from 0.
        count: number of shards; 1 for all items.
        items: how many items `of` has given out so far.

    Raises:
        ValueError: `index` is not in [0, count).
    """

    index: int = 0
    count: int = 1
    items: int = field(default=0, init=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"expected --shard i/n with 0 <= i < n, got {self}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def is_all(self) -> bool:
        """Whether it is the only shard, which also writes the tables."""
        return self.count == 1

    @classmethod
    def parse(cls, text: str | None = None, environment: Mapping[str, str] | None = None) -> "Shard":
        """The shard of `--shard`, or that of a job array.

        Args:
            text: "i/n"; "/n" takes i from the scheduler's variable, whose numbers must begin at 0; None takes both
                from the scheduler.
            environment: None: `os.environ`. Slurm sets SLURM_ARRAY_TASK_ID, _COUNT, _MIN and _STEP. Kubernetes sets
                JOB_COMPLETION_INDEX, to which the job must add JOB_COMPLETIONS.

        Returns:
            `Shard()`, all items, without a text and outside of a job array.

        Raises:
            ValueError: not such a text, an index outside [0, n), or a job array of unknown length.
        """
        environment = os.environ if environment is None else environment
        if text is None:
            return cls(*array_task(environment))
        match = re.fullmatch(r"(\d*)/(\d+)", text)
        index = match and (match[1] or next((environment[k] for k in TASK_NUMBERS if k in environment), ""))
        if not match or not index:
            raise ValueError(f"expected --shard i/n with 0 <= i < n, got {text}")
        return cls(int(index), int(match[2]))

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This shard's share of all items, which every shard must list in the same order."""
        own = items[self.index :: self.count]
        self.items += len(own)
        return own


def split_pending(items: Sequence[Item], is_done: Callable[[Item], bool]) -> tuple[list[Item], list[Item]]:
    """Share work among the processes of one launch: (the items that are not done, those of them for this process).

    Every process must call it, before it writes anything.
    """
    state = process_state()
    pending = [item for item in items if not is_done(item)]
    state.wait_for_everyone()  # barrier: every process lists the pending items before any of them is done
    return pending, pending[state.process_index :: state.num_processes]


def array_task(environment: Mapping[str, str]) -> tuple[int, int]:
    """(index from 0, count) of this task of a job array of Slurm or Kubernetes; (0, 1) outside of one.

    Raises:
        ValueError: a task of an array whose length is not in the environment.
    """
    slurm, kubernetes = TASK_NUMBERS
    if slurm in environment:
        name, task = "SLURM_ARRAY_TASK_COUNT", int(environment[slurm])
        task -= int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
        task //= int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
    elif kubernetes in environment:
        name, task = "JOB_COMPLETIONS", int(environment[kubernetes])
    else:
        return 0, 1
    if name not in environment:
        raise ValueError(f"expected the number of shards in {name}, got none: set it, or give --shard /n")
    return task, int(environment[name])


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Turn off the pipeline's own progress bar, for use inside another one."""
    if not hasattr(pipeline, "set_progress_bar_config"):
        yield
        return
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
