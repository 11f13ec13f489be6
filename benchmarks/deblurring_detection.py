"""Does deblurring help to find what is abnormal? Pixel AP with and without it, of blurred and of unblurred radiographs.

    python benchmarks/deblurring_detection.py                    (the shipped model as detector and as prior; minutes)

Real healthy validation radiographs with an implanted effusion or opacity, whose masks are exact, at the detector's
resolution. They are found as they are; deblurred although nobody blurred them ("taken as blurred already", as the
original does); blurred by a known kernel; and blurred, then deblurred with that kernel.
"""

import argparse
from pathlib import Path

import torch
from deblurring import ROOT
from machine import describe_machine, markdown

from cxr_diffusers import CFGAnomalyPipeline, compare, default_checkpoint, load_prior, load_table
from cxr_diffusers.deblurring.degradations import degrade, make_kernel
from cxr_diffusers.pipelines.cxr_images import prepare_image

NAMES = {
    "as they are": [],
    "deblurred": ["deblur"],
    "blurred": ["blur"],
    "blurred, deblurred": ["blur", "deblur"],
}
PAIRS = [("deblurred", "as they are"), ("blurred", "as they are"), ("blurred, deblurred", "blurred")]


class After:
    """A detector that sees its images only after something was done to them."""

    def __init__(self, detector, treat):
        self.detector, self.treat, self.config = detector, treat, detector.config

    def __call__(self, images, **options):
        size = self.detector.unet.config.sample_size
        radiographs = prepare_image(images, size, "dtype", self.config["aspect"], (0.0, 1.0))
        return self.detector(self.treat(radiographs), **options)


def main(arguments=None):
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    detector = CFGAnomalyPipeline.from_pretrained(options.model).to(options.device)
    prior = load_prior(options.prior).to(options.device)
    for pipeline in (detector, prior):
        pipeline.set_progress_bar_config(disable=True)
    kernel = make_kernel(options.kernel)
    what = dict(image="file", mask="mask", patient="patient_id", view="view", label="diseased")
    implants = load_table(options.data / "val_implants" / "val_implants.csv", **what)
    if options.images:
        implants = implants.select([i * len(implants) // options.images for i in range(options.images)])

    def treat(steps):
        def treated(radiographs):
            for step in steps:
                generators = [torch.Generator().manual_seed(i) for i in range(len(radiographs))]
                if step == "blur":
                    blurred = degrade(radiographs, torch.from_numpy(kernel), options.noise_std, generator=generators[0])
                    radiographs = blurred.clamp(0, 1)
                else:
                    call = dict(num_inference_steps=options.steps, generator=generators, output_type="pt")
                    radiographs = prior(radiographs, kernel, options.noise_std, **call).restored
            return radiographs

        return treated

    ways = {name: After(detector, treat(steps)) for name, steps in NAMES.items()}
    print(describe_machine(options.device))
    print(f"{options.kernel}, noise {options.noise_std * 255:g}/255; DiffPIR, {options.steps} steps")
    print(f"{len(implants)} images, seen at {detector.unet.config.sample_size} pixels\n")
    common = dict(n_bootstrap=options.bootstrap, batch_size=options.batch_size)
    # one table with each way in front, since differences are those of the first to the others
    answers = remembered(ways)
    summaries = {a: compare({a: answers[a], b: answers[b]}, implants, **common).summary for a, b in PAIRS}
    rows = {name: row for summary in summaries.values() for name, row in summary["rows"].items() if name in NAMES}
    cells = [[name, show(rows[name]["pixel_ap"]), show(rows[name]["pixel_auroc"])] for name in NAMES]
    print(markdown(["images", "pixel AP", "pixel AUROC"], cells) + "\n")
    cells = [[f"{a} - {b}", show(summaries[a]["differences"][f"{a} - {b}"]["pixel_ap"], "+")] for a, b in PAIRS]
    print(markdown(["paired difference", "pixel AP"], cells))


def remembered(ways):
    """The same detectors; asked again for the same images, they do not compute."""

    def remember(way):
        seen = {}

        def answer(images, **options):
            options.pop("generator", None)  # the detector decodes without noise
            key = tuple(image.tobytes() for image in images)
            if key not in seen:
                seen[key] = way(images, **options)
            return seen[key]

        answer.config = way.config
        return answer

    return {name: remember(way) for name, way in ways.items()}


def show(result, sign=""):
    return f"{result['value']:{sign}.3f} [{result['low']:{sign}.3f}, {result['high']:{sign}.3f}]"


def parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=default_checkpoint(), help="the detector")
    parser.add_argument("--prior", help="pipeline folder or Hub name (default: the shipped model)")
    parser.add_argument("--data", type=Path, default=ROOT, help="folder with val_implants/")
    parser.add_argument("--kernel", default="motion:size=10,intensity=0.5,seed=0", help="see `cxr-diffusers deblur -h`")
    parser.add_argument("--noise-std", type=float, default=0.5 / 255)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, help="so many of them, evenly (default: all)")
    parser.add_argument("--bootstrap", type=int, default=1000, help="replicates over patients")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    return parser


if __name__ == "__main__":
    main()
