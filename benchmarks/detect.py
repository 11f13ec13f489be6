"""What a map costs: UNet forwards and seconds an image, all rows measured in one run, as ratios to the first.

    python benchmarks/detect.py                                  (the shipped model; minutes)
    python benchmarks/detect.py --model runs/mine --device cuda --threads 8

The images are phantoms: what an image shows does not change what it costs.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from machine import describe_machine, markdown

from cxr_diffusers import CFGAnomalyPipeline, default_checkpoint, load_phantom

HEADER = ["", "images a call", "forwards an image", "seconds an image", "of the original's time", "map moves by"]


def main(arguments=None):
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    images = load_phantom(options.batch_size, size=256, diseased_fraction=1.0)["image"][:]
    print(f"{describe_machine(options.device)}\n{options.model}, own settings over the original's\n")
    float32, bfloat16, last = (open_pipeline(options, variant) for variant in ("float32", "bfloat16", "channels_last"))
    original = {**CFGAnomalyPipeline.ORIGINAL_SETTINGS, "num_inference_steps": options.original_steps}
    rows = [
        ("original procedure", measure(float32, images[:1], original)),  # once: it takes long enough to be steady
        ("default", measure(float32, images[:1], {}, options.repeat)),
        ("default", measure(float32, images, {}, options.repeat)),
        ("default, bfloat16", measure(bfloat16, images, {}, options.repeat)),
        ("default, channels_last", measure(last, images, {}, options.repeat)),
    ]
    table = markdown(HEADER, [cells(name, row, rows[0][1], rows[2][1]) for name, row in rows])
    print(f"{table}\n\nlast column: mean |map - map of the default in float32, {len(images)} images a call|")


def measure(pipeline, images, settings, repeat=1):
    """{images, forwards, seconds, maps}: forwards as a hook counts them, the median seconds after one short call."""
    pipeline(images, **{**settings, "num_inference_steps": 3, "noise_level": 400})
    counted, seconds = [], []
    hook = pipeline.unet.register_forward_hook(lambda unet, inputs, output: counted.append(len(inputs[0])))
    for _ in range(repeat):
        start = time.perf_counter()
        output = pipeline(images, output_type="np", **settings)  # as arrays: a GPU has finished by then
        seconds.append((time.perf_counter() - start) / len(images))
    hook.remove()
    return {
        "images": len(images),
        "forwards": sum(counted) / repeat / len(images),
        "seconds": statistics.median(seconds),
        "maps": output.anomaly_map,
    }


def cells(name, row, original, reference):
    moved = np.abs(row["maps"] - reference["maps"][: row["images"]]).mean()
    return [
        name,
        str(row["images"]),
        f"{row['forwards']:.0f}",
        f"{row['seconds']:.3g}",
        f"{row['seconds'] / original['seconds']:.3f}",
        "0" if row is reference else f"{moved:.1e}",
    ]


def open_pipeline(options, variant):
    pipeline = CFGAnomalyPipeline.from_pretrained(options.model).to(options.device)
    if variant == "bfloat16":
        pipeline.to(torch.bfloat16)
    if variant == "channels_last":
        pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=default_checkpoint(), help="pipeline folder or Hub name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3, help="calls a row, of which the median counts")
    parser.add_argument("--original_steps", type=int, default=1000, help="fewer only to try this program out")
    return parser


if __name__ == "__main__":
    main()
