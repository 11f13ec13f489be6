"""What runs the network fastest on a CPU: torch, ONNX Runtime or OpenVINO, as ratios of one run on one machine.

    python benchmarks/backends.py                                (the shipped model, one thread each; minutes)
    python benchmarks/backends.py --model runs/mine --threads 8

The backends take turns, and of each the quickest call counts: on a machine that is busy with other things, the others
are the ones that were disturbed.
"""

import argparse
import time

import numpy as np
import torch
from machine import describe_machine, markdown

from cxr_diffusers import default_checkpoint, load_phantom, load_pipeline
from cxr_diffusers.commands.options import BACKENDS
from cxr_diffusers.inference.export import with_backend
from cxr_diffusers.precision import has_fast_bfloat16, use_dtype

HEADER = ["backend", "images a call", "seconds an image", "times as fast as torch", "map differs by at most"]


def main(arguments=None):
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)  # of the other two as well, when they are opened
    pipeline = load_pipeline(options.model)
    pipelines = {name: with_backend(pipeline, name) for name in options.backends}
    if has_fast_bfloat16("cpu"):  # what the command line does by default
        pipelines["torch, bfloat16"] = load_pipeline(options.model)
        use_dtype(pipelines["torch, bfloat16"], "bfloat16")
    use_dtype(pipeline, "float32")  # channels_last, as on the command line
    for each in pipelines.values():
        each.set_progress_bar_config(disable=True)
    print(f"{describe_machine()}\n{options.model}, the quickest of {options.repeat} calls\n")
    images = load_phantom(options.batch_size, size=256, diseased_fraction=1.0)["image"][:]
    rows = [row for n in sorted({1, len(images)}) for row in measure(pipelines, images[:n], options.repeat)]
    print(markdown(HEADER, rows))


def measure(pipelines, images, repeat):
    """The rows of one batch size: every backend after the other, `repeat` times."""
    seconds, maps = {name: [] for name in pipelines}, {}
    for turn in range(repeat + 1):
        for name, pipeline in pipelines.items():
            start = time.perf_counter()
            maps[name] = pipeline(images, output_type="np").anomaly_map
            if turn:  # the first call warms up
                seconds[name].append((time.perf_counter() - start) / len(images))
    first = next(iter(pipelines))
    return [
        [
            name,
            str(len(images)),
            f"{min(seconds[name]):.3g}",
            f"{min(seconds[first]) / min(seconds[name]):.2f}",
            f"{np.abs(maps[name] - maps[first]).max():.1e}",
        ]
        for name in pipelines
    ]


def parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=default_checkpoint(), help="pipeline folder, Hub name or a shipped model")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="the first is compared with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=8, help="images a call, beside one")
    parser.add_argument("--repeat", type=int, default=4, help="calls of each")
    return parser


if __name__ == "__main__":
    main()
