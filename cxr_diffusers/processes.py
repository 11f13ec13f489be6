"""This process among those of `accelerate launch` or `torchrun`, and progress bars."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

RENDEZVOUS = timedelta(minutes=5)  # for all processes to start
BARRIER = timedelta(days=7)  # for a process that has finished early to wait for the others


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


def leave() -> None:
    """End the process group before Python exits: a thread of it that outlives its data would abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
