"""A training that is killed at random moments ends, after the same command, with the files of an undisturbed run."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # one kill and one Ctrl-C of a smaller training are in test_kill_commands.py
ROOT = Path(__file__).parent.parent
OPTIONS = ["data.n=24", "train.batch_size=4", "train.validation_images=2", "unet.block_out_channels=[8, 16, 16]"]
OPTIONS += ["unet.attention_head_dim=8", "unet.norm_num_groups=4", "unet.attn_norm_num_groups=4"]
OPTIONS += ["train.max_steps=24", "train.save_every=2", "train.validate_every=8", "pipeline.num_inference_steps=2"]
OPTIONS += ["train.validation_loss_images=4"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def start(folder, launcher=()):
    """The training, in the folder above its run's, as the leader of a process group of its own."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *launcher, str(ROOT / "training" / "train_cfg.py"), *OPTIONS, "train.output_dir=run"]
    log = open(folder / "output.txt", "ab")
    options = dict(cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
    # a test run in the background hands on that Ctrl-C is ignored
    return subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def finish(folder):
    """Give the command again until it succeeds; its files."""
    process = start(folder)
    assert process.wait(timeout=300) == 0, (folder / "output.txt").read_text()[-2000:]
    return files_of(folder / "run")


def files_of(run):
    """{name: digest} of a run, without what holds times or depends on the moment (the random state, seconds)."""
    files = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and not path.name.startswith(
            (".lock", "random_states", "digests", "validation.jsonl", "ema")
        ):
            files[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("undisturbed"))


def wait_for_steps(folder, steps, deadline=120):
    log, end = folder / "run" / "log.jsonl", time.time() + deadline
    while time.time() < end:
        if log.is_file() and log.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.005)
    raise TimeoutError((folder / "output.txt").read_text()[-2000:])


def interrupt(folder, seed, number, send):
    """Start it and `send(process)` something at a random moment after a random step."""
    moments = random.Random(f"{seed} {number}")
    done = folder / "run" / "log.jsonl"
    already = done.read_bytes().count(b"\n") if done.is_file() else 0
    process = start(folder)
    try:
        wait_for_steps(folder, min(already + moments.randrange(1, 6), 24))
        time.sleep(moments.random() * 0.2)
        send(process)
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)


def kill_tree(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def test_kill_minus_nine_at_random_moments(undisturbed, tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    for number in range(12):
        interrupt(tmp_path, seed, number, kill_tree)
    assert finish(tmp_path) == undisturbed
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "run" / ".saving").exists()


def test_ctrl_c_is_a_line_and_costs_nothing(undisturbed, tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)
    interrupt(tmp_path, seed, 0, lambda process: process.send_signal(signal.SIGINT))
    output = (tmp_path / "output.txt").read_text()
    assert "train_cfg.py: stopped" in output and "Traceback" not in output
    assert finish(tmp_path) == undisturbed


def test_the_launcher_killed_alone_leaves_the_folder_to_its_child_until_that_ends(undisturbed, tmp_path):
    process = start(tmp_path, launcher=("-m", "accelerate.commands.launch", "--num_processes", "1"))
    try:
        wait_for_steps(tmp_path, 1)
        process.kill()
        process.wait(timeout=60)
        second = start(tmp_path)
        code = second.wait(timeout=120)
        output = (tmp_path / "output.txt").read_text()
        assert code == 0 or (code == 2 and "is being written by another run" in output), output[-2000:]
    finally:
        with contextlib.suppress(ProcessLookupError):  # the child has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
    time.sleep(0.5)
    assert finish(tmp_path) == undisturbed
