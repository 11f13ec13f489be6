"""Two processes share the images of each command. They are started once, since their imports take longest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline, DiffPIRDeblurPipeline
from cxr_diffusers.deblurring.dataset import deblur
from cxr_diffusers.evaluation import evaluate
from helpers import BrightSpots, run_detect, spot_chest, spot_rows, toy_unet

HERE = Path(__file__).parent
KERNEL = "gaussian:sigma=0.8"
RUNS = """
import json, sys
from cxr_diffusers.cli import main
from cxr_diffusers.processes import process_state
from test_two_processes import pixel_ap
from helpers import BrightSpots

class Counting(BrightSpots):
    images = 0

    def __call__(self, image, output_type="np"):
        Counting.images += len(image)
        return super().__call__(image)

def say(*values):
    print(json.dumps(values) + "\\n", end="", flush=True)

for command in json.loads(sys.argv[1]):
    say("exit code", command[0], main(command))
value = pixel_ap(Counting(), "evaluation")
say("evaluation", process_state().process_index, Counting.images, value)
"""


def pixel_ap(pipeline, output_dir):
    """Of five chests with a spot; None in a process that does not write the tables."""
    result = evaluate(pipeline, spot_rows(5), output_dir=output_dir, batch_size=2, n_bootstrap=50, progress=False)
    return result and result.summary["rows"]["method"]["pixel_ap"]["value"]


@pytest.fixture
def runs(tmp_path_factory):
    """The folder of the runs, the lines that they print as JSON, and all of their output.

    `accelerate launch --cpu --num_processes 2` starts ONE process without MPI; `--multi_gpu` starts two, also without a
    GPU.
    """
    folder = tmp_path_factory.mktemp("two")
    for i in range(5):
        home = folder / "images" / ("healthy" if i < 3 else "diseased")
        home.mkdir(parents=True, exist_ok=True)
        image, mask = spot_chest(i, height=24, width=20 + i)
        image.save(home / f"{i}.png")
    mask.save(folder / "images" / "diseased" / "4_mask.png")
    (folder / "broken").mkdir()
    (folder / "broken" / "broken.png").write_bytes(b"not an image")
    model().save_pretrained(folder / "model")
    prior().save_pretrained(folder / "prior")
    steps = ["--num-inference-steps", "20", "--noise-level", "300", "--dtype", "float32"]
    detect = [
        "detect",
        "images/healthy",
        "images/diseased/4.png",
        "broken",
        "--model",
        "model",
        "--out",
        "maps",
        *steps,
    ]
    deblurred = ["deblur", "images", "deblurred", "--model", "prior", "--kernel", KERNEL]
    deblurred += ["--num-inference-steps", "2", "--dtype", "float32"]
    (folder / "runs.py").write_text(RUNS)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launch, "runs.py", json.dumps([detect, deblurred])],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")], done


def model():
    pipeline = CFGAnomalyPipeline(toy_unet(), DDIMScheduler(clip_sample=False), ["healthy", "pleural effusion"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prior():
    pipeline = DiffPIRDeblurPipeline(toy_unet(num_class_embeds=None), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_two_processes_share_the_images_of_each_command(runs, tmp_path):
    """One test: the tests of a file may run in several processes, and each of these would start the two."""
    check_detection(*runs, tmp_path / "detection")
    check_deblurring(*runs, tmp_path / "deblurring")
    check_evaluation(*runs, tmp_path / "evaluation")


def check_detection(folder, lines, done, alone):
    """`alone`: the folder for the run of one process."""
    assert done.stdout.count("5 images: 4 computed (") == 1, done.stderr[-3000:]
    assert ["exit code", "detect", 1] in lines and "broken.png" in done.stderr  # one file failed
    rows = {path.name: json.loads(path.read_text()) for path in (folder / "maps" / "rows").iterdir()}
    assert sorted(row["process"] for row in rows.values()) in ([0, 0, 1, 1], [0, 0, 0, 1])
    images = [folder / "images" / "healthy", folder / "images" / "diseased" / "4.png"]
    run_detect(model(), images, alone)
    own_rows = {path.name: json.loads(path.read_text()) for path in (alone / "rows").iterdir()}
    assert len(own_rows) == 4 and set(rows) == set(own_rows)
    for name, row in own_rows.items():
        assert rows[name]["anomaly_score"] == pytest.approx(row["anomaly_score"], abs=1e-5)
    assert (folder / "maps" / "results.csv").read_text().count("\n") == 5


def check_deblurring(folder, lines, done, alone):
    assert lines.count(["exit code", "deblur", 0]) == 2
    assert "6 images: 5 computed" in done.stdout and "2 processes" in done.stdout
    call = {"num_inference_steps": 2}
    deblur(prior(), folder / "images", alone, kernel=KERNEL, call_kwargs=call, progress=False)
    names = [{p.relative_to(root) for p in root.rglob("*.png")} for root in (alone, folder / "deblurred")]
    assert names[0] == names[1] and len(names[0]) == 6
    for name in names[0]:
        one, two = (np.asarray(Image.open(root / name)) for root in (alone, folder / "deblurred"))
        assert np.abs(one.astype(int) - two).max() <= 1


def check_evaluation(folder, lines, done, alone):
    shares = sorted(line[1:] for line in lines if line[0] == "evaluation")
    assert [(index, images) for index, images, _ in shares] == [(0, 3), (1, 2)]
    assert shares[0][2] == pixel_ap(BrightSpots(), alone) and shares[1][2] is None
