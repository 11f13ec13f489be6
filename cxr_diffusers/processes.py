"""Which of the processes of `accelerate launch` or `torchrun` this one is."""

import atexit
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed.distributed_c10d as c10d
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

RENDEZVOUS = timedelta(minutes=5)  # processes that start together; one that is missing is an error soon
BARRIER = timedelta(days=7)  # a process that is done early waits for the others, as long as a whole data set may take


def process_state():
    """accelerate's `PartialState`, which knows this process's index, their number, and its device.

    Ask here, not `PartialState()`: on a machine without an accelerator that one takes each of several processes for
    the only one, and all of them would do all of the work.
    """
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not (alone or torch.accelerator.is_available())
    first = not torch.distributed.is_initialized()
    state = PartialState(cpu=cpu, timeout=RENDEZVOUS)
    if state.num_processes > 1:
        if first and torch.distributed.is_initialized():
            c10d._set_pg_timeout(BARRIER)  # torch has no public name for it
        atexit.unregister(leave)  # it would be registered again at each call
        atexit.register(leave)
    return state


def leave():
    """End the group of processes before Python ends: its threads must not outlive what they use, or one aborts."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def quiet(pipeline):
    """No progress bar of the pipeline's own inside ours."""
    if not hasattr(pipeline, "set_progress_bar_config"):
        yield
        return
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
