"""CPU time and memory of `evaluate` after the predictions, compared with scikit-learn and an older version.

    python benchmarks/evaluation.py                                     (500 images of 256 px; minutes)
    python benchmarks/evaluation.py --images 5000                       (a quarter of an hour)
    git worktree add ../before 478b6e0; python benchmarks/evaluation.py --before ../before
    python benchmarks/evaluation.py --images 8 --size 2560 --every-pixel   (full-size images; what their grid changes)

Images are noise with a bright disc, and the maps are given: no network runs, so the time is that of reading images
and maps, controls, metrics, and bootstrap. Each evaluation is a process of its own with one thread.
"""

import argparse
import io
import json
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

BASES = 32  # different images; each map has noise of its own
MAPS = 7  # the method and six controls
MODEL_SIZE = 256  # side of the images and maps that a model returns
HERE = Path(__file__).resolve().parent.parent


def main(arguments=None):
    options = parser().parse_args(arguments)
    if options.worker:
        print(json.dumps(evaluate_images(options)))
        return
    print(f"{describe_machine()}\n")
    print(
        f"One map of {options.size} x {options.size} pixels, AP and AUROC together:\n\n{metrics_table(options.size)}\n"
    )
    results = {"this version": run_worker(options, HERE)}
    if options.every_pixel:
        results["every pixel"] = run_worker(options, HERE, "--resolution=0")
    if options.before:
        results["before"] = run_worker(options, options.before)
    print(
        f"`evaluate` of {options.images} images of {options.size} x {options.size} pixels, {MAPS} maps each, "
        f"{options.bootstrap} replicates:\n\n{evaluation_table(results, options.images)}"
    )
    if options.every_pixel:
        grid, every = (results[name]["rows"] for name in ("this version", "every pixel"))
        print(f"\nLargest difference from every pixel, over all maps but those of detail:\n\n{grid_table(grid, every)}")


def metrics_table(size):
    """Markdown: milliseconds of one map's AP and AUROC, those of scikit-learn, and the difference of the results."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    from cxr_diffusers.evaluation.metrics import SortedScores

    truth, rng = disc(size, 0), np.random.default_rng(0)
    anomaly_map = (0.2 * truth + rng.random((size, size))).astype(np.float32)

    def own():
        ranked = SortedScores(anomaly_map, truth)
        return ranked.average_precision(), ranked.auroc()

    def scikit_learn():
        flat = truth.ravel(), anomaly_map.ravel()
        return average_precision_score(*flat), roc_auc_score(*flat)

    seconds = {function: quickest(function) for function in (scikit_learn, own)}
    difference = np.abs(np.subtract(own(), scikit_learn())).max()
    rows = [
        [name, f"{1e3 * seconds[f]:.1f}", f"{seconds[f] / seconds[scikit_learn]:.2f}", off]
        for name, f, off in (("scikit-learn", scikit_learn, "0"), ("one sort", own, f"{difference:.0e}"))
    ]
    return markdown(["", "ms", "of scikit-learn's time", "differs by"], rows)


def quickest(function, repeat=7):
    """CPU seconds of the quickest of several calls."""
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def evaluation_table(results, images):
    """Markdown: {version: result of `evaluate_images`}; ratios to the last version."""
    last = list(results.values())[-1]
    rows = [
        [
            name,
            f"{result['seconds']:.0f}",
            f"{images / result['seconds']:.1f}",
            f"{1e3 * result['seconds'] / images / MAPS:.1f}",
            f"{result['seconds'] / last['seconds']:.2f}",
            f"{result['peak']:.2f}",
            f"{result['start']:.2f}",
        ]
        for name, result in results.items()
    ]
    header = ["", "CPU seconds", "images a second", "ms a map", "of the last row's time", "peak GB", "GB at the start"]
    return markdown(header, rows)


def grid_table(grid, every):
    """Markdown: the largest difference of each pooled metric of two {map: {metric: value}}.

    Two maps have detail that a coarser grid cannot hold: the random one, and |x - blurred x| of these noisy images.
    """
    metrics = ("pixel_ap", "pixel_auroc", "aupro", "best_dice")
    names = grid.keys() - {"random map", "|x - blurred x|"}
    moved = {m: max(abs(grid[name][m] - every[name][m]) for name in names) for m in metrics}
    return markdown(list(moved), [[f"{value:.0e}" for value in moved.values()]])


def run_worker(options, folder, *arguments):
    """Evaluate with the version of cxr_diffusers in `folder`, in a process of its own."""
    values = (options.images, options.size, options.bootstrap)
    sizes = [f"--{name}={value}" for name, value in zip(("images", "size", "bootstrap"), values, strict=True)]
    environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", *sizes, *arguments]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def evaluate_images(options):
    """{seconds: CPU time; peak, start: the largest memory in GB, in all and before; rows: {map: {metric: value}}}."""
    from cxr_diffusers.evaluation import evaluate
    from cxr_diffusers.pipelines import AnomalyOutput

    class GivenMaps:
        """Its maps are the images plus noise; its images and counterfactuals differ. All have at most 256 pixels."""

        components: dict = {}
        config: dict = {"map_threshold": 0.9}
        count = 0

        def __call__(self, image, output_type="np"):
            self.count += 1
            side = min(options.size, MODEL_SIZE)
            pixels = np.stack([np.asarray(one.resize((side, side)), np.float32) / 255 for one in image])
            noise = np.random.default_rng(self.count).random(pixels.shape, dtype=np.float32)
            maps = 0.7 * pixels + 0.3 * noise
            return AnomalyOutput(pixels[..., None], 0.9 * pixels[..., None], maps, maps.mean((1, 2)))

    dataset, start, peak = Images(options.images, options.size), time.process_time(), peak_memory()
    choice = {} if options.resolution is None else {"resolution": options.resolution}  # older versions have none
    with tempfile.TemporaryDirectory() as folder:
        run = dict(output_dir=folder, n_bootstrap=options.bootstrap, progress=False)
        result = evaluate(GivenMaps(), dataset, **run, **choice)
    rows = {
        name: {metric: each["value"] for metric, each in row.items()} for name, row in result.summary["rows"].items()
    }
    return {"seconds": time.process_time() - start, "peak": peak_memory(), "start": peak, "rows": rows}


class Images:
    """Rows with `image`, `mask`, `label`, `patient` and `path`, decoded from PNG at each access."""

    def __init__(self, n, size):
        self.n, rng = n, np.random.default_rng(0)
        self.files = []
        for i in range(min(n, BASES)):
            mask = disc(size, i)
            pixels = (100 + 60 * mask + 90 * rng.random((size, size))).astype(np.uint8)
            self.files.append((as_png(pixels), as_png(255 * mask.astype(np.uint8))))

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError(i)
        image, mask = (Image.open(io.BytesIO(file)) for file in self.files[i % len(self.files)])
        return {"image": image, "mask": mask, "label": 1, "patient": f"p{i}", "path": f"{i}.png"}


def disc(size, i):
    """(size, size) booleans: a disc of 5 % of the area, at another place for each i."""
    y, x = np.mgrid[:size, :size] / size
    return (y - 0.3 - 0.4 * (i % 7) / 7) ** 2 + (x - 0.3 - 0.4 * (i % 5) / 5) ** 2 < 0.05 / np.pi


def as_png(pixels):
    with io.BytesIO() as buffer:
        Image.fromarray(pixels).save(buffer, format="png", compress_level=1)
        return buffer.getvalue()


def peak_memory():
    """The largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--size", type=int, default=256, help="side of images and maps in pixels")
    parser.add_argument("--bootstrap", type=int, default=1000, help="replicates")
    parser.add_argument("--before", type=Path, help="a checkout of an older version, to compare with")
    parser.add_argument("--every-pixel", action="store_true", help="also without the coarser grid of large images")
    parser.add_argument("--resolution", type=int, help=argparse.SUPPRESS)  # of `evaluate`
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
