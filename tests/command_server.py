"""Runs commands in processes forked from one that has imported the libraries: the seconds of the import are spent once.

Each line of the standard input is a job, {"arguments", "folder", "log"}; the answers are lines, too: the id of the
process, which leads a process group of its own, and, when it has ended, its exit code.
"""

import gc
import importlib
import json
import os
import signal
import sys

from cxr_diffusers import cli, commands

HEAVY = """
data evaluation deblurring.dataset inference.detection inference.calibration inference.export inference.trajectory
data.preparation hub.loading hub.publishing hub.model_card guided_diffusion precision processes training.script
training.run training.recipe training.validation_loss
""".split()


def run(job):
    """Become the command."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands on that it is ignored
    os.chdir(job["folder"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(stream, target)
    # forked at a moment when no computation has been started: no thread of it exists
    sys.exit(cli.main(job["arguments"]))


for name in HEAVY:
    importlib.import_module(f"cxr_diffusers.{name}")
gc.collect()
gc.freeze()  # else every child, when it ends, copies and searches all these objects: more than a second
print(len(commands.COMMANDS), flush=True)
while line := sys.stdin.readline():
    child = os.fork()
    if not child:
        run(json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
