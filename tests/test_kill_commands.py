"""Every command, killed or stopped at random moments: the same command then gives the files of an undisturbed run."""

import csv
import hashlib
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline
from helpers import chest, flags_of, random_original, toy_unet
from local_hub import local_hub

ROOT = Path(__file__).parent.parent
CARD = "---\nlicense: apache-2.0\n---\n# Toy\n"
FEW_STEPS = "--num-inference-steps 20 --noise-level 300 --batch-size 2 --device cpu"
CONVERSION = "--class_names healthy,ill --diffusion_steps 1000"
# in a folder of its own, beside what `inputs` has made
COMMANDS = {
    "detect": f"detect ../images --out out --model ../model --save-counterfactual {FEW_STEPS}",
    "prepare": "prepare ../many out --size 16 --workers 2",
    "pack": "prepare folder:root=../images out/packed.parquet --pack --size 16 --overwrite",
    "deblur": "deblur ../images out --kernel gaussian:sigma=1 --model ../model --num-inference-steps 4 --batch-size 2",
    "evaluate": f"evaluate ../images --out out --model ../model --bootstrap 20 {FEW_STEPS}",
    "calibrate": "calibrate model --healthy ../images/healthy --batch-size 2 --device cpu",
    "convert": "convert ../original.pt out --overwrite",
    "export": "export ../small out --format onnx --overwrite",
    "publish": "publish model me/{name}",
    "train": "train ../recipe.yaml train.output_dir=out",
}
RECIPE = """\
data: {name: phantom, n: 24}
validation: {n: 4, seed: 1}
unet:
  sample_size: 16
  in_channels: 1
  out_channels: 1
  block_out_channels: [8, 8]
  layers_per_block: 1
  down_block_types: [DownBlock2D, AttnDownBlock2D]
  up_block_types: [AttnUpBlock2D, UpBlock2D]
  norm_num_groups: 4
  attention_head_dim: 8
  num_class_embeds: 3
scheduler: {prediction_type: v_prediction, clip_sample: false}
train: {max_steps: 12, batch_size: 4, save_every: 2, validate_every: 6, validation_images: 2, validation_loss_images: 4}
pipeline: {num_inference_steps: 2}
"""
# of a training: random states, and what holds its seconds
NOT_COMPARED = (".lock", "random_states", "digests", "validation.jsonl", "ema")
# numbers that depend on the moment: seconds, and how many results an earlier run had left
NUMBER = rb"(?:[-+.\de]+|null)"
NAMES = rb'"(?:seconds|seconds_per_image|written|computed|kept|_diffusers_version|process)"'
MOMENT = re.compile(NAMES + rb": (?:\{[^}]*\}|" + NUMBER + rb")|- seconds per image: .*")


class Server:
    """A `command_server.py`: one command at a time."""

    def __init__(self, environment):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        command = [sys.executable, str(Path(__file__).with_name("command_server.py"))]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(command, env=environment, cwd=ROOT, bufsize=0, **pipes)
        self.read(300)

    def read(self, timeout):
        """The next number that the server says; None if it says nothing for `timeout` seconds."""
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        return int(self.process.stdout.readline()) if ready else None

    def start(self, arguments, folder):
        """The id of the command's process."""
        job = {"arguments": arguments, "folder": str(folder), "log": str(folder / "output.txt")}
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        return self.read(60)

    def run(self, arguments, folder, after=None, send=signal.SIGKILL, timeout=240):
        """(exit code, output) of a command; its process group is sent a signal `after` seconds."""
        (folder / "output.txt").unlink(missing_ok=True)
        group = self.start(arguments, folder)
        code = None if after is None else self.read(after)
        if after is not None and code is None:
            os.killpg(group, send)
        code = self.read(timeout) if code is None else code
        if code is None:
            os.killpg(group, signal.SIGKILL)
            self.read(60)
        output = (folder / "output.txt").read_text()
        assert code is not None, f"no end after {timeout} s: {output[-2000:]}"
        return code, output

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def hub():
    with local_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, hub):
    """The folder of images and models, small ones of the real classes."""
    folder = tmp_path_factory.mktemp("inputs")
    for i in range(6):
        rows = np.roll(chest(40, 40), 3 * i, axis=1)
        home = folder / "images" / ("healthy" if i < 3 else "diseased")
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rows).save(home / f"{i}.png")
        if i >= 3:
            mask = np.zeros((40, 40), np.uint8)
            mask[10:20, 4 + i : 14 + i] = 255
            Image.fromarray(mask).save(home / f"{i}_mask.png")
        for k in range(6):
            many = folder / "many" / f"{k}" / f"{i}.png"
            many.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(rows, k, axis=0)).save(many)
    for name, unet in (("model", toy_unet()), ("small", toy_unet(block_out_channels=(8,), **ONE_LEVEL))):
        pipeline = CFGAnomalyPipeline(unet, DDIMScheduler(clip_sample=False), ["healthy", "pleural effusion"])
        pipeline.register_to_config(settings={"num_inference_steps": 20, "noise_level": 300})
        pipeline.save_pretrained(folder / name)
        (folder / name / "README.md").write_text(CARD)
    (folder / "recipe.yaml").write_text(RECIPE)
    net = random_original(mult=(1, 2), attention=(1,), classes=2, class_mlp=True)
    torch.save(net.tensors, folder / "original.pt")
    (folder / "flags.json").write_text(json.dumps(flags_of(net)))
    return folder


ONE_LEVEL = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))


@pytest.fixture(scope="module")
def server(hub, inputs):
    server = Server({**hub.environment, "CXR_DIFFUSERS_CACHE": str(inputs / "cache"), "HF_HUB_OFFLINE": "0"})
    yield server
    server.close()


class Case:
    """One command in fresh folders beside its inputs."""

    numbers = itertools.count()

    def __init__(self, name, server, inputs, hub):
        self.name, self.server, self.inputs, self.hub = name, server, inputs, hub
        self.renew()
        begin = time.monotonic()
        self.finish()
        self.seconds, self.undisturbed, self.whole = time.monotonic() - begin, self.files(), self.folder
        assert len(self.undisturbed), self.folder
        self.renew()

    def renew(self):
        """A folder that no run has written to."""
        self.folder = self.inputs / f"{self.name}-{next(self.numbers)}"
        self.folder.mkdir()
        if self.name in ("calibrate", "publish"):  # they write into the model
            shutil.copytree(self.inputs / "model", self.folder / "model")
        shutil.rmtree(self.inputs / "cache", ignore_errors=True)  # of exports
        self.arguments = COMMANDS[self.name].format(name=self.folder.name).split()
        if self.name == "convert":
            flags = json.loads((self.inputs / "flags.json").read_text())
            self.arguments += [text for key, value in flags.items() for text in (f"--{key}", str(value))]

    def finish(self):
        code, output = self.server.run(self.arguments, self.folder)
        assert code == 0, output[-3000:]

    def disturb(self, moment, send):
        """(exit code, output) of the command, which is sent a signal at `moment` (0 to 1) of its usual duration."""
        return self.server.run(self.arguments, self.folder, moment * self.seconds, send)

    def files(self):
        """{name: digest}, of the Hub for `publish`."""
        if self.name == "publish":
            contents = {name: bytes(content) for name, content in self.hub.files(f"me/{self.folder.name}").items()}
        else:
            paths = [
                path
                for path in self.folder.rglob("*")
                if path.is_file() and path.name != "output.txt" and not path.name.startswith(NOT_COMPARED)
            ]
            contents = {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}
        return {name: hashlib.sha256(self.steady(name, content)).hexdigest() for name, content in contents.items()}

    def steady(self, name, content):
        """A file's content without what depends on the moment."""
        if name.endswith(".jsonl") and "_sources." in name:  # a journal: in the order of the workers' ends
            content = b"\n".join(sorted(set(content.split(b"\n")) - {b""}))
        if name.endswith(".csv"):
            content = drop_seconds(content.decode())
        if name.endswith(".npz"):
            with np.load(self.folder / name) as arrays:
                content = b"".join(arrays[key].tobytes() for key in sorted(arrays.files) if key != "seconds")
        return MOMENT.sub(b"", content.replace(self.folder.name.encode(), b"NAME"))

    def check(self):
        """After the same command: the files of an undisturbed run, and no other."""
        self.finish()
        files = self.files()
        different = sorted(
            name for name in files.keys() | self.undisturbed if files.get(name) != self.undisturbed.get(name)
        )
        assert not different
        places = [self.folder, self.inputs / "cache"]
        assert not [path for place in places for path in place.rglob("*") if path.name.endswith((".tmp", ".saving"))]


def drop_seconds(text):
    """A CSV table without its column of seconds."""
    rows = list(csv.reader(text.splitlines()))
    kept = [i for i, name in enumerate(rows[0]) if name != "seconds"]
    return json.dumps([[row[i] for i in kept] for row in rows]).encode()


@pytest.fixture(params=COMMANDS, scope="module")
def case(request, server, inputs, hub):
    if request.param == "export":
        pytest.importorskip("onnxruntime")
    return Case(request.param, server, inputs, hub)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_minus_nine_and_ctrl_c_cost_nothing(case, kills):
    seed = random.randrange(10**6)
    moments, killed, stopped, whole = random.Random(seed), 0, 0, 0
    while killed < kills or stopped < kills:
        ends = signal.SIGKILL if killed < kills and (stopped == kills or moments.random() < 0.5) else signal.SIGINT
        code, output = case.disturb(moments.uniform(0.05, 0.95), ends)
        killed, stopped = killed + (ends == signal.SIGKILL), stopped + (ends == signal.SIGINT)
        if code == -signal.SIGINT:  # all was done and Python was ending
            assert "Traceback" not in output, output[-3000:]
        elif ends == signal.SIGINT and code:
            assert code in (2, 130) and "Traceback" not in output, output[-3000:]
            lines = [line for line in re.split(r"[\r\n]", output) if line.startswith("cxr-diffusers")]
            assert len(lines) == 1, output[-3000:]
        if code == 0:  # it was ready before
            whole += 1
            case.check()
            case.renew()
    case.check()
    case.renew()
    print(f"\n{case.name}: seed {seed}, {killed} kills, {stopped} times Ctrl-C, {whole} runs were ready before")


@pytest.fixture
def small_disk():
    """`small_disk(folder, size)` mounts a disk of so many bytes there; `small_disk(folder, size)` again enlarges it."""
    mounted = []

    def mount(folder, size):
        again = folder in mounted
        folder.mkdir(exist_ok=True)
        options = f"size={size}" + (",remount" if again else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, timeout=60)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode()}")
        mounted.extend([] if again else [folder])

    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a disk")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True, timeout=60)


@pytest.mark.parametrize("case", ["detect", "prepare", "deblur", "evaluate", "train"], indirect=True)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(case, small_disk):
    sizes = [path.stat().st_size for path in (case.whole / "out").rglob("*") if path.is_file()]
    out = case.folder / "out"
    small_disk(out, max(8192, sum(-(-size // 4096) for size in sizes) // 2 * 4096))
    code, output = case.server.run(case.arguments, case.folder)
    assert code == 2 and "Traceback" not in output, (code, output[-3000:])
    lines = [line for line in re.split(r"[\r\n]", output) if line.startswith("cxr-diffusers")]
    assert len(lines) == 1 and "space" in lines[0], output[-3000:]
    leftovers = [path for path in out.rglob("*") if path.name.endswith((".tmp", ".saving"))]
    assert not leftovers
    small_disk(out, 2**28)
    case.check()
    case.renew()
