"""A data set in, the same data set deblurred out."""

import hashlib
import io
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..data.images import read_image
from ..data.preparation import plan_copy
from ..files import keep_settings, write_file
from ..fingerprints import fingerprint
from ..hub.loading import default_checkpoint, load_pipeline
from ..pipelines import DiffPIRDeblurPipeline
from ..processes import process_state
from .degradations import make_kernel
from .kernel_estimation import estimate_kernel

SETTINGS, SUMMARY, SKIPPED = "deblur_settings.json", "deblur_summary.json", "skipped.csv"
ESTIMATE = "estimate"
# the geometry of a copy is its source's
SAME = {"size": None, "aspect": "pad", "frontal_only": False}


def load_prior(name=None, trust_remote_code=False):
    """A `DiffPIRDeblurPipeline` around the UNet of any folder or Hub name of ours; None: the shipped model.

    A class-conditional model serves with its null label. Raises ValueError if it was trained without one, and what
    `hub.load_pipeline` raises.
    """
    pipeline = load_pipeline(name or default_checkpoint(), trust_remote_code)
    if isinstance(pipeline, DiffPIRDeblurPipeline):
        return pipeline
    config = pipeline.config
    if not config.get("has_null_label", True):
        raise ValueError(f"expected a prior without classes or with a null label, got {name}, which has only classes")
    prior = DiffPIRDeblurPipeline(
        pipeline.unet, pipeline.scheduler, data_range=config["data_range"], scaling=config["scaling"]
    )
    prior.register_to_config(_name_or_path=config.get("_name_or_path"))
    return prior


def deblur(
    pipeline,
    source_root,
    output_root,
    *,
    kernel,
    batch_size=4,
    image_format="png",
    seed=0,
    call_kwargs=None,
    progress=True,
):
    """Copy a data set with every radiograph deblurred, each at its own size. What loads there loads here.

    CheXpert (also Plus), ChestX-ray14 and VinDr-CXR keep their CSVs, with paths rewritten and rows dropped whose image
    is missing or broken; all other CSVs are carried over, the names of pictures in them rewritten. Boxes stay what they
    are. Masks, known by their names or by having no more than two grey values, are copied.

    Run it again and it goes on where it stopped, kill -9 included: a picture is there when it is whole, and is not
    computed twice. Under `accelerate launch` or torchrun each process takes its share (place the pipeline on its device
    first). The noise of a picture depends on `seed` and its path alone, so a picture comes out the same, but for
    rounding, in whatever company it is computed.

    Args:
        kernel: (h, w) array in pixels of the pictures, a text for `degradations.make_kernel`, or "estimate": each
            picture's own, by `kernel_estimation.estimate_kernel`.
        batch_size: pictures of one size at once.
        image_format: "png" (16 bit stay 16 bit) or "jpg" (8 bit, quality 95).
        call_kwargs: arguments of the pipeline's call (num_inference_steps, noise_std, ...).

    Returns:
        the summary {"images", "computed", "kept", "skipped", "reasons", "seconds_per_image" (of one process; None if
        nothing was computed), "processes", "settings"} on the main process, None on the others.

    Raises:
        NotADirectoryError: no such source.
        ValueError: an unknown option or kernel, no images, a copy into the source itself, or an output folder that was
            made with other settings.
    """
    state, source_root, output_root = process_state(), Path(source_root), Path(output_root)
    check(source_root, output_root, image_format, batch_size)
    kernel, called = read_kernel(kernel)
    settings = {
        "model": str(pipeline.config.get("_name_or_path") or type(pipeline).__name__),
        "weights": fingerprint(pipeline, {}, 0),
        "kernel": called,
        "image_format": image_format,
        "seed": seed,
        "call": dict(call_kwargs or {}),
    }
    plan = plan_copy(source_root, output_root, {**SAME, "image_format": image_format})
    keep_settings(output_root / SETTINGS, settings, ignore=("model",))
    todo = [job for job in plan.jobs if not (output_root / job[1]).is_file()]
    state.wait_for_everyone()  # all have looked before the first writes, or they would share out different lists

    share, failed = todo[state.process_index :: state.num_processes], {}
    worker = Worker(pipeline, output_root, kernel, batch_size, seed, call_kwargs or {})
    # the bar speaks for all processes: they are about equally fast
    bar = tqdm(
        total=len(plan.jobs),
        initial=len(plan.jobs) - len(todo),
        desc="deblurring",
        unit="image",
        smoothing=0.05,
        disable=not (progress and state.is_main_process),
    )
    seen = 0
    for source, output, is_mask in share:
        try:
            worker.take(source, output, is_mask)
        except TooSmall as error:
            failed[str(source)] = f"smaller than the kernel: {error}"
        except (ValueError, OSError) as error:
            failed[str(source)] = f"broken image: {str(error).removeprefix(f'{source}: ')}"
        bar.update((worker.written + len(failed) - seen) * state.num_processes)
        seen = worker.written + len(failed)
    worker.finish()
    bar.update(len(plan.jobs) - bar.n)
    bar.close()
    failed = dict(gather_object(list(failed.items())))
    seconds = gather_object([[worker.computed, worker.seconds]])
    if not state.is_main_process:
        return None

    done = {source for source, output, _ in plan.jobs if (output_root / output).is_file()}
    plan.finish(done)
    carry_tables(source_root, output_root, plan)
    skipped = [item for item in plan.skipped if not item[0].endswith(".csv")] + list(failed.items())
    computed, spent = (sum(values) for values in zip(*seconds, strict=True))
    summary = {
        "images": len(done),
        "computed": computed,
        "kept": len(plan.jobs) - len(todo),
        "skipped": len(skipped),
        "reasons": dict(Counter(reason.split(" (")[0].split(":")[0] for _, reason in skipped)),
        "seconds_per_image": spent / computed if computed else None,
        "processes": state.num_processes,
        "settings": settings,
    }
    table = pd.DataFrame(skipped, columns=["file", "reason"])
    write_file(output_root / SKIPPED, table.to_csv(index=False).encode())
    write_file(output_root / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary


class TooSmall(Exception):
    """A picture that the kernel does not fit into."""


class Worker:
    """Takes pictures one by one, deblurs those of one size together, and writes each when it is whole."""

    def __init__(self, pipeline, output_root, kernel, batch_size, seed, call_kwargs):
        self.pipeline, self.output_root, self.kernel = pipeline, output_root, kernel
        self.batch_size, self.seed, self.call_kwargs = batch_size, seed, call_kwargs
        self.waiting = {}  # size -> [(picture, kernel, output)]
        self.written, self.computed, self.seconds = 0, 0, 0.0

    def take(self, source, output, is_mask):
        """ValueError or OSError if `source` cannot be read, `TooSmall` if the kernel does not fit into it."""
        picture = read_image(source)
        if is_mask or len(np.unique(np.asarray(picture))) <= 2:
            self.write(picture, output)
            return
        kernel = kernel_of(picture, self.kernel)
        if max(kernel.shape) > min(picture.size):
            raise TooSmall(f"{picture.width} x {picture.height} pixels, kernel {kernel.shape}")
        # kernels of one size are one batch
        key = (picture.size, kernel.shape)
        self.waiting.setdefault(key, []).append((picture, kernel, output))
        if len(self.waiting[key]) == self.batch_size:
            self.run(key)
        elif sum(map(len, self.waiting.values())) >= 8 * self.batch_size:  # many sizes: memory is not without end
            self.run(max(self.waiting, key=lambda key: len(self.waiting[key])))

    def finish(self):
        while self.waiting:
            self.run(next(iter(self.waiting)))

    def run(self, key):
        batch = self.waiting.pop(key)
        start = time.perf_counter()
        restored = self.pipeline(
            [picture for picture, _, _ in batch],
            kernel=np.stack([kernel for _, kernel, _ in batch]),
            generator=[generator_of(self.seed, output) for _, _, output in batch],
            output_type="pil",
            **self.call_kwargs,
        ).restored
        self.seconds += time.perf_counter() - start
        self.computed += len(batch)
        for (_, _, output), picture in zip(batch, restored, strict=True):
            self.write(picture, output)

    def write(self, picture, output):
        write_file(self.output_root / output, encode(picture, output.suffix))
        self.written += 1


def measure(pipeline, source_root, *, kernel, batch_size=4, call_kwargs=None, sample=None):
    """(seconds an image in one process, pictures in the data set), from `sample` pictures (None: two batches).

    They are taken evenly from all of the set; nothing is written, and a first call, to warm up, does not count.
    """
    kernel, _ = read_kernel(kernel)
    plan = plan_copy(Path(source_root), Path(source_root) / ".planned", {**SAME, "image_format": "png"})
    sources = [source for source, _, is_mask in plan.jobs if not is_mask]
    count = min(sample or 2 * batch_size, len(sources))
    sources = [sources[i * len(sources) // count] for i in range(count)]
    pictures = [read_image(source) for source in sources]
    pipeline(pictures[0], kernel=kernel_of(pictures[0], kernel), **{**(call_kwargs or {}), "num_inference_steps": 1})
    start = time.perf_counter()
    groups = {}
    for picture in pictures:
        own = kernel_of(picture, kernel)
        groups.setdefault((picture.size, own.shape), []).append((picture, own))
    for members in groups.values():
        for first in range(0, len(members), batch_size):
            some = members[first : first + batch_size]
            pipeline([p for p, _ in some], kernel=np.stack([k for _, k in some]), **(call_kwargs or {}))
    return (time.perf_counter() - start) / len(pictures), len(plan.jobs)


def describe_plan(images, seconds_per_image, processes=1):
    """ "224,316 images: 3.10 images/s in 4 processes, 20.1 hours", from seconds an image in one process.

    >>> describe_plan(224_316, 2.0, 4)
    '224,316 images: 2 images/s in 4 processes, 31.2 hours'
    """
    total = images * seconds_per_image / processes
    units = [("days", 86400, 2), ("hours", 3600, 1.5), ("minutes", 60, 1.5), ("seconds", 1, 0)]
    name, length, _ = next(unit for unit in units if total >= unit[1] * unit[2])
    many = f"{processes} processes" if processes > 1 else "1 process"
    return f"{images:,} images: {processes / seconds_per_image:.3g} images/s in {many}, {total / length:.1f} {name}"


def read_kernel(kernel):
    """Array, text or "estimate" -> ((h, w) array or None, how it is called)."""
    if isinstance(kernel, str):
        if kernel == ESTIMATE:
            return None, ESTIMATE
        array = make_kernel(kernel)
        return array, f"{kernel} ({hashlib.sha256(array.tobytes()).hexdigest()[:8]})"  # a file may change
    array = np.asarray(kernel, np.float32)
    return array, f"array of {array.shape} ({hashlib.sha256(array.tobytes()).hexdigest()[:8]})"


def kernel_of(picture, kernel):
    return estimate_kernel(picture) if kernel is None else kernel


def generator_of(seed, output):
    """A generator that depends on the seed and a picture's path below the root, and on nothing else."""
    digest = hashlib.sha256(f"{seed}:{Path(output).as_posix()}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def encode(picture, suffix):
    """PIL image -> the bytes of a PNG, or of a JPEG of 8 bits."""
    with io.BytesIO() as buffer:
        if suffix == ".jpg":
            if picture.mode != "L":
                picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
            picture.save(buffer, format="JPEG", quality=95)
        else:
            picture.save(buffer, format="PNG")
        return buffer.getvalue()


def check(source_root, output_root, image_format, batch_size):
    if not source_root.is_dir():
        raise NotADirectoryError(f"expected the folder of a data set, got {source_root}")
    if source_root.resolve() == output_root.resolve():
        raise ValueError(f"the copy would overwrite its source: give another folder than {source_root}")
    if image_format not in ("png", "jpg"):
        raise ValueError(f"expected `image_format` png or jpg, got {image_format!r}")
    if batch_size < 1:
        raise ValueError(f"expected a `batch_size` of 1 or more, got {batch_size}")


def carry_tables(source_root, output_root, plan):
    """Copy the CSVs that the plan did not write, with the names of pictures in them rewritten."""
    outputs = {source.resolve(): output for source, output, _ in plan.jobs}
    for csv in sorted(source_root.rglob("*.csv")):
        target = output_root / csv.relative_to(source_root)
        if target.exists() or output_root in csv.parents:
            continue
        places = (csv.parent, source_root.parent)  # CheXpert's paths begin with the data set's own name

        def renamed(cell, places=places):
            found = [outputs.get((place / cell).resolve()) for place in places] if 0 < len(cell) < 1000 else []
            output = next((output for output in found if output is not None), None)
            return cell if output is None else Path(cell).with_name(output.name).as_posix()

        table = pd.read_csv(csv, dtype=str, keep_default_na=False)
        table = table.apply(lambda column, renamed=renamed: column.map(renamed))
        write_file(target, table.to_csv(index=False).encode())
