"""`detect` around the network: images a second with a network that costs next to nothing, and memory.

    python benchmarks/detect_folder.py
    git worktree add ../before 478b6e0; python benchmarks/detect_folder.py --before ../before
    python benchmarks/detect_folder.py --images 500 5000            (does memory grow with the folder?)

Each row is a run of the command line in processes of its own. Start (imports, opening the model) is measured by a run
on one image and subtracted. Peak memory is the largest process's. The images are phantoms with noise, PNG.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe_machine, markdown
from PIL import Image

BASES = 16  # different images; the others are links to them
HEADER = ["", "images", "images a second", "CPU ms an image", "peak MB"]
VARIANTS = {"default": [], "float32 maps, no panel": ["--no-panel", "--map-format", "npy"]}
MODEL = """
import sys
from diffusers import DDIMScheduler, UNet2DModel
from cxr_diffusers import CFGAnomalyPipeline
network = dict(sample_size=16, in_channels=1, out_channels=1, num_class_embeds=3, layers_per_block=1)
network |= dict(add_attention=False, block_out_channels=(4,), norm_num_groups=4)
blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
scheduler = DDIMScheduler(clip_sample=False)
pipeline = CFGAnomalyPipeline(UNet2DModel(**network, **blocks), scheduler, ["healthy", "effusion"], map_threshold=0.02)
pipeline.save_pretrained(sys.argv[1])
"""
DETECT = "import sys; from cxr_diffusers.cli import main; sys.exit(main(sys.argv[1:]))"


def main(arguments=None):
    options = parser().parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        folder = Path(folder)
        for count in {1, *options.images}:
            draw_images(folder / f"images_{count}", count, options.size)
        versions = {"now": None, **({"before": options.before} if options.before else {})}
        for version, checkout in versions.items():
            for variant, extra in VARIANTS.items():
                if checkout is None or not extra:  # an old version need not have the other options
                    rows += [[f"{version}, {variant}", *row] for row in measure(options, folder, checkout, extra)]
    print(f"{describe_machine('cpu')}\n{options.size} px\n\n{markdown(HEADER, rows)}")


def measure(options, folder, checkout, extra):
    """Rows of numbers, one for each number of images."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=python_path(folder, checkout))
    model = folder / f"model_{'now' if checkout is None else 'before'}"
    subprocess.run([sys.executable, "-c", MODEL, str(model)], env=environment, check=True, capture_output=True)

    def run(count):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            command = [sys.executable, "-c", DETECT, "detect", str(folder / f"images_{count}"), "--out", f"{out}/maps"]
            settings = ["--num-inference-steps", "2", "--noise-level", "500", "--device", "cpu"]
            command += ["--model", str(model), *settings, *extra]
            before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            messages = process.stderr.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
            if process.returncode:
                raise RuntimeError(f"detect failed: {messages[-2000:]}")
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            return seconds, cpu, usage.ru_maxrss / 1024

    start_seconds, start_cpu, _ = run(1)
    for count in options.images:
        seconds, cpu, megabytes = run(count)
        rate, each = (count - 1) / (seconds - start_seconds), (cpu - start_cpu) / (count - 1)
        yield [f"{count:,}", f"{rate:.1f}", f"{1000 * each:.1f}", f"{megabytes:.0f}"]


def python_path(folder, checkout):
    """Where the package of a checkout is imported from: a folder of links, with its pipelines in their place."""
    if checkout is None:
        return os.environ.get("PYTHONPATH", "")
    package = folder / "code" / "cxr_diffusers"
    if not package.exists():
        package.mkdir(parents=True)
        for path in [*(checkout / "cxr_diffusers").iterdir(), checkout / "pipelines"]:
            (package / path.name).symlink_to(path.resolve())
    return str(folder / "code")


def draw_images(folder, count, size):
    from cxr_diffusers.data.phantom import draw_chest

    folder.mkdir()
    for i in range(count):
        path = folder / f"chest_{i:05d}.png"
        if i < BASES:
            rng = np.random.default_rng(i)
            noisy = draw_chest(rng, size).image.astype(np.float32) + rng.normal(0, 3, (size, size))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)
        else:
            os.link(folder / f"chest_{i % BASES:05d}.png", path)


def parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[500], help="sizes of the folder")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--before", type=Path, help="a checkout of an older version, to compare with")
    parser.add_argument("--folder", help="for temporary files")
    return parser


if __name__ == "__main__":
    main()
