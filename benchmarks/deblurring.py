"""How well is a known blur undone, and by whom? Validation radiographs, blurred by us: PSNR and SSIM with intervals.

    python benchmarks/deblurring.py                                        (the shipped prior; a quarter of an hour)
    python benchmarks/deblurring.py --model runs/cxr_unconditional_64 --images 20 --figure deblurring.png

All methods get the same images and the true kernel. As radiographs are, they are cut out of a blurred scene that goes
on beyond their borders. What Wiener's filter and Richardson-Lucy (scikit-image) need to be told, how much to smooth and
when to stop, is chosen on training images, anew for each blur; they see a mirrored margin. DiffPIR is told the noise.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from machine import describe_machine, markdown
from PIL import Image, ImageDraw
from skimage import restoration

from cxr_diffusers.deblurring.dataset import load_prior
from cxr_diffusers.deblurring.degradations import degrade, make_kernel
from cxr_diffusers.evaluation.metrics import interval_of, mean_of, patient_weights, psnr, ssim
from cxr_diffusers.files import save_png
from cxr_diffusers.pipelines.cxr_images import prepare_image

ROOT = Path(__file__).parent.parent.parent / "shared" / "cxr"
BLURS = {  # name: kernel, noise
    "motion, size 10": ("motion:size=10,intensity=0.5,seed=0", 0.5 / 255),
    "the same, ten times the noise": ("motion:size=10,intensity=0.5,seed=0", 5 / 255),
    "Gaussian, sigma 1.5": ("gaussian:sigma=1.5", 0.5 / 255),
    "disk, radius 2.5": ("disk:radius=2.5", 0.5 / 255),
}
BALANCES = [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]  # of Wiener's filter
ROUNDS = [5, 10, 20, 40, 80]  # of Richardson-Lucy
BEYOND = 12  # pixels of the scene around an image
MARGIN = 24  # mirrored around an image for the classical methods, so that they do not ring either


def main(arguments=None):
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    prior = load_prior(options.model).to(options.device)
    prior.set_progress_bar_config(disable=True)
    print(f"{describe_machine(options.device)}\nprior: {options.model or 'the shipped model, null label'}\n")
    size = options.size or prior.unet.config.sample_size
    scenes, patients = load_scenes(options.data, "val", options.images, size)
    images = inside(scenes)
    training, _ = load_scenes(options.data, "train", 8, size)
    weights = patient_weights(patients, 1000)
    restored_by_blur = []
    for name in options.blurs:
        text, noise_std = BLURS[name]
        kernel = make_kernel(text)
        blurred = measure(scenes, kernel, noise_std, seed=0)
        answers, seconds = {"blurred": blurred}, {"blurred": 0.0}
        for method, restore in methods(prior, options, training, kernel, noise_std).items():
            start = time.perf_counter()
            answers[method] = restore(blurred)
            seconds[method] = (time.perf_counter() - start) / len(images)
        print(f"{name} ({text}), noise {noise_std * 255:g}/255: {len(images)} images of {size} pixels\n")
        print(table(images, answers, seconds, weights) + "\n", flush=True)
        restored_by_blur.append((name, answers))
    if options.figure:
        save_png(sheet(images, restored_by_blur), options.figure)
        print(f"figure: {options.figure}")


def load_scenes(root, split, count, size):
    """((N, 1, H, W) scenes in [0, 1], patients): adult radiographs of as many patients, evenly from all of the split.

    The image of a scene is its middle, (size, size); see `inside`.
    """
    manifest = pd.read_csv(Path(root) / "manifest.csv", keep_default_na=False)
    rows = manifest[(manifest["split"] == split) & manifest["source"].str.startswith("nih")]
    rows = rows.drop_duplicates("patient_id").reset_index(drop=True)
    rows = rows.loc[[i * len(rows) // count for i in range(count)]]
    images = [Image.open(Path(root) / file).convert("L") for file in rows["file"]]
    return prepare_image(images, size + 2 * BEYOND, "dtype", "pad", (0.0, 1.0)), rows["patient_id"].tolist()


def inside(scenes):
    return scenes[..., BEYOND:-BEYOND, BEYOND:-BEYOND]


def measure(scenes, kernel, noise_std, seed):
    """The middle of the scenes when they are blurred, with noise, within [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return inside(degrade(scenes, torch.from_numpy(kernel), noise_std, "reflect", generator)).clamp(0, 1)


def methods(prior, options, training, kernel, noise_std):
    """{name: function of (N, 1, H, W) blurred images}"""
    blurred = measure(training, kernel, noise_std, seed=1)

    def best(function, values):
        scores = [psnr_of(function(blurred, value), inside(training)).mean() for value in values]
        return values[int(np.argmax(scores))]

    balance, rounds = best(wiener(kernel), BALANCES), best(richardson_lucy(kernel), ROUNDS)
    methods = {
        f"Wiener, balance {balance:g}": lambda y: wiener(kernel)(y, balance),
        f"Richardson-Lucy, {rounds} rounds": lambda y: richardson_lucy(kernel)(y, rounds),
    }
    for steps in options.steps:
        methods[f"DiffPIR, {steps} steps"] = diffpir(prior, kernel, noise_std, num_inference_steps=steps)
    fewest = min(options.steps)
    for what in options.variants:
        change = {"num_inference_steps": fewest, **VARIANTS[what]}
        methods[f"DiffPIR, {fewest} steps, {what}"] = diffpir(prior, kernel, noise_std, **change)
    return methods


VARIANTS = {
    "border continued (closed form)": {"boundary": "extend"},
    "uniform steps": {"timestep_spacing": "uniform"},
    "zeta 1": {"zeta": 1.0},
    "lambda 1": {"lambda_": 1.0},
    "lambda 20": {"lambda_": 20.0},
    "tiles of 64": {"tile_size": 64},
}


def diffpir(prior, kernel, noise_std, **options):
    def restore(blurred):
        generators = [torch.Generator().manual_seed(i) for i in range(len(blurred))]
        return prior(blurred, kernel, noise_std, generator=generators, output_type="pt", **options).restored

    return restore


def wiener(kernel):
    return classical(lambda y, balance: restoration.wiener(y, odd(kernel), balance))


def richardson_lucy(kernel):
    return classical(lambda y, rounds: restoration.richardson_lucy(y, odd(kernel), num_iter=rounds))


def odd(kernel):
    """The same kernel with odd sides, which leaves no doubt where its centre is."""
    return np.pad(kernel.astype(np.float64), [(0, 1 - side % 2) for side in kernel.shape])


def classical(function):
    """A function of one (H, W) array -> of (N, 1, H, W) tensors, with a mirrored margin."""

    def restore(blurred, value):
        answers = []
        for y in blurred[:, 0].numpy().astype(np.float64):
            answer = function(np.pad(y, MARGIN, mode="reflect"), value)
            answers.append(answer[MARGIN:-MARGIN, MARGIN:-MARGIN].clip(0, 1))
        return torch.from_numpy(np.stack(answers)[:, None]).float()

    return restore


def psnr_of(answers, images):
    return np.array([psnr(a[0], p[0]) for a, p in zip(answers.numpy(), images.numpy(), strict=True)])


def ssim_of(answers, images):
    return np.array([ssim(a[0], p[0]) for a, p in zip(answers.numpy(), images.numpy(), strict=True)])


def table(images, answers, seconds, weights):
    rows = []
    gain = {name: psnr_of(answer, images) for name, answer in answers.items()}
    for name, answer in answers.items():
        cells = [name, interval(gain[name], weights, 2), interval(ssim_of(answer, images), weights, 4)]
        cells.append(interval(gain[name] - gain["blurred"], weights, 2) if name != "blurred" else "")
        rows.append([*cells, f"{seconds[name]:.2g}" if seconds[name] else ""])
    return markdown(["", "PSNR, dB", "SSIM", "PSNR gained over the blurred image", "seconds an image"], rows)


def interval(values, weights, digits):
    estimate = interval_of(mean_of(values), weights)
    if estimate.low != estimate.low:  # one patient has no interval
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def sheet(images, restored_by_blur, count=2, scale=3):
    """Rows: blurs and images; columns: truth, blurred, methods. Pixels are not interpolated."""
    side, count = images.shape[-1] * scale, min(count, len(images))
    columns = ["truth", *(name for name in restored_by_blur[0][1])]
    page = Image.new("L", (len(columns) * (side + 4), len(restored_by_blur) * (count * (side + 4) + 16) + 16), 255)
    draw = ImageDraw.Draw(page)
    for k, column in enumerate(columns):
        draw.text((k * (side + 4) + 3, 2), column.split(",")[0] if "DiffPIR" not in column else column, 0)
    for r, (name, answers) in enumerate(restored_by_blur):
        top = 16 + r * (count * (side + 4) + 16)
        draw.text((3, top + 1), name, 0)
        for i in range(count):
            for k, answer in enumerate([images, *answers.values()][: len(columns)]):
                array = (answer[i, 0].clamp(0, 1).numpy() * 255).round().astype(np.uint8)
                image = Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST)
                page.paste(image, (k * (side + 4), top + 16 + i * (side + 4)))
    return page


def parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the prior: pipeline folder or Hub name (default: the shipped model)")
    parser.add_argument("--data", type=Path, default=ROOT, help="folder with manifest.csv")
    parser.add_argument("--images", type=int, default=8, help="validation images, one a patient")
    parser.add_argument("--size", type=int, help="of the images, in pixels (default: the prior's)")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--blurs", nargs="+", default=list(BLURS), choices=list(BLURS), metavar="BLUR")
    text = f"other settings of DiffPIR as well, some of: {'; '.join(VARIANTS)}"
    parser.add_argument("--variants", nargs="+", default=[], choices=list(VARIANTS), metavar="VARIANT", help=text)
    parser.add_argument("--figure", type=Path, help="a PNG of the first two images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    return parser


if __name__ == "__main__":
    main()
