"""Deblur a whole data set; its layout, tables, boxes and masks are kept."""

import hashlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..data.copy_plans import CopyPlan, Job, SourceJournal, line_of, plan_copy
from ..data.images import read_binary_mask, read_image
from ..files import keep_settings, remove_dead, stamp_of, write_file
from ..fingerprints import fingerprint
from ..hub.loading import default_checkpoint, load_pipeline
from ..pipelines import DiffPIRDeblurPipeline
from ..processes import Shard, process_state, split_pending
from .degradations import make_kernel
from .kernel_estimation import estimate_kernel

logger = logging.getLogger(__name__)

SETTINGS, SUMMARY, SKIPPED, STAMPS = "deblur_settings.json", "deblur_summary.json", "skipped.csv", "deblur_sources"
ESTIMATE = "estimate"
# deblurring changes neither size nor shape
SAME_GEOMETRY = {"size": None, "aspect": "pad", "frontal_only": False}


def load_prior(name: str | Path | None = None, trust_remote_code: bool = False) -> DiffPIRDeblurPipeline:
    """A `DiffPIRDeblurPipeline` with the UNet of a pipeline folder or Hub name; None: of the shipped model.

    A class-conditional model is used with its null label.

    Raises:
        ValueError: the model was trained without a null label. Also the errors of `hub.load_pipeline`.
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
    pipeline: DiffPIRDeblurPipeline,
    source_root: str | Path,
    output_root: str | Path,
    *,
    kernel: np.ndarray | str,
    batch_size: int = 4,
    image_format: str = "png",
    seed: int = 0,
    call_kwargs: dict[str, Any] | None = None,
    shard: Shard | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Copy a data set with every radiograph deblurred at its own size; the copy is loaded in the same way.

    CheXpert (also Plus), ChestX-ray14 and VinDr-CXR keep their CSV files, with paths rewritten and without rows whose
    image is missing or broken; all other CSV files are copied, with the names of images in them rewritten. Boxes are
    unchanged. Masks, recognised by their names or by having at most two grey values, are copied.

    Run it again to resume, also after kill -9: an image is either complete or absent, and is not computed twice. Images
    whose sources have changed are computed again, those whose sources are no longer there are deleted. Under
    `accelerate launch` or torchrun each process takes its share (place the pipeline on its device first). The noise of
    an image depends on `seed` and its path only, so, apart from rounding, the result does not depend on the batch.

    Args:
        kernel: (h, w) array in pixels of the images, a text for `degradations.make_kernel`, or "estimate": each image
            with its own, by `kernel_estimation.estimate_kernel`.
        batch_size: images of one size at once.
        image_format: "png" (16 bit stay 16 bit) or "jpg" (8 bit, quality 95).
        call_kwargs: arguments of the pipeline's call (num_inference_steps, noise_std, ...).
        shard: the share of the images to deblur, without the tables; None: all of them, and the tables. See `Shard`.

    Returns:
        the summary {"images", "computed", "kept", "skipped", "reasons", "seconds_per_image" (of one process; None if
        nothing was computed), "processes", "settings"} on the main process, None on the others. A shard's summary is
        that of its own images.

    Raises:
        NotADirectoryError: no such source.
        ValueError: an unknown option or kernel, no images, a copy into the source itself, or an output folder that was
            made with other settings.
    """
    state, source_root, output_root = process_state(), Path(source_root), Path(output_root)
    check(source_root, output_root, image_format, batch_size)
    fixed_kernel, kernel_name = read_kernel(kernel)
    settings = {"kernel": kernel_name, "image_format": image_format, "seed": seed, "call": dict(call_kwargs or {})}
    settings = {**identify_model(pipeline), **settings}
    plan = plan_copy(source_root, output_root, {**SAME_GEOMETRY, "image_format": image_format})
    if state.is_main_process:
        remove_dead(output_root)
    keep_settings(output_root / SETTINGS, settings, ignore=("model",))
    shard = shard or Shard()
    jobs, sources = shard.of(plan.jobs), SourceJournal(output_root, STAMPS)
    if state.is_main_process and shard.is_all and (removed := sources.remove_others(jobs)):
        print(f"{output_root}: deleted {removed} copies of images that are no longer at their place in {source_root}")
    outdated = set(sources.outdated(jobs, plan.stamps, ()))
    todo, numbers = split_pending(range(len(jobs)), lambda i: i not in outdated)
    share = [jobs[i] for i in numbers]

    process = f"{shard.index}-of-{shard.count}.{state.process_index}-of-{state.num_processes}"
    journal = output_root / f"{STAMPS}.{process}.jsonl"
    worker = Worker(pipeline, output_root, fixed_kernel, batch_size, seed, call_kwargs or {}, journal)
    with tqdm(
        total=len(jobs),
        initial=len(jobs) - len(todo),
        desc="deblurring",
        unit="image",
        smoothing=0.05,
        disable=not (progress and state.is_main_process),
    ) as bar:
        failed = deblur_share(worker, share, lambda count: bar.update(count * state.num_processes))
        bar.update(len(jobs) - bar.n)
    failed = dict(gather_object(list(failed.items())))
    seconds = gather_object([[worker.computed, worker.seconds]])
    if not state.is_main_process:
        return None

    done = {source for source, output, _ in jobs if (output_root / output).is_file()}
    skipped = finish_tables(plan, source_root, output_root, done) if shard.is_all else []
    skipped += failed.items()
    computed, spent = (sum(values) for values in zip(*seconds, strict=True))
    summary: dict[str, Any] = {
        "images": len(done),
        "computed": computed,
        "kept": len(jobs) - len(todo),
        "skipped": len(skipped),
        "reasons": dict(Counter(reason.split(" (")[0].split(":")[0] for _, reason in skipped)),
        "seconds_per_image": spent / computed if computed else None,
        "processes": state.num_processes,
        "settings": settings,
    }
    if shard.is_all:
        write_reports(output_root, summary, skipped)
    return summary


def identify_model(pipeline: DiffPIRDeblurPipeline) -> dict[str, str]:
    """The name of the model, and the fingerprint of its weights."""
    name = str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
    return {"model": name, "weights": fingerprint(pipeline, {}, 0)}


def finish_tables(plan: CopyPlan, source_root: Path, output_root: Path, done: set[str]) -> list[tuple[str, str]]:
    """Write the tables of the copy; returns the files that the plan left out, with their reasons."""
    carry_tables(source_root, output_root, plan)
    plan.finish(done)  # writes some of them anew
    return [item for item in plan.skipped if not item[0].endswith(".csv")]


def write_reports(output_root: Path, summary: dict[str, Any], skipped: list[tuple[str, str]]) -> None:
    """Write the summary of a run, and the table of skipped files and their reasons."""
    table = pd.DataFrame(skipped, columns=["file", "reason"])
    write_file(output_root / SKIPPED, table.to_csv(index=False).encode())
    write_file(output_root / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def deblur_share(worker: "Worker", share: Iterable[Job], on_done: Callable[[int], object]) -> dict[str, str]:
    """Deblur the images of one process; returns {source: reason} of those that cannot be deblurred.

    Args:
        share: (source, output, whether it is a mask) of each image.
        on_done: called with the number of images that are done since the last call. The processes are about equally
            fast, so the progress bar multiplies it by their number.
    """
    failed: dict[str, str] = {}
    before = 0
    for source, output, is_mask in share:
        stamp = stamp_of(source) or ()  # before it is read: a change meanwhile is seen the next time
        try:  # only errors of the image itself: an error of the run, such as a full disk, stops it
            image = read_binary_mask(source) if is_mask else read_image(source)
        except (ValueError, OSError) as error:
            failed[str(source)] = f"broken image: {str(error).removeprefix(f'{source}: ')}"
        else:
            try:
                worker.take(image, Path(output), is_mask, stamp)
            except TooSmall as error:
                failed[str(source)] = f"smaller than the kernel: {error}"
        if str(source) in failed:
            (worker.output_root / output).unlink(missing_ok=True)  # the copy of an older source
        done = worker.written + len(failed)
        on_done(done - before)
        before = done
    worker.finish()
    return failed


class TooSmall(Exception):
    """An image that is smaller than the kernel."""


class Worker:
    """Takes images one by one, deblurs images of one size together, and writes each under its name when complete."""

    def __init__(
        self,
        pipeline: DiffPIRDeblurPipeline,
        output_root: Path,
        kernel: np.ndarray | None,
        batch_size: int,
        seed: int,
        call_kwargs: dict[str, Any],
        journal: Path,
    ) -> None:
        self.pipeline, self.output_root, self.kernel, self.journal = pipeline, output_root, kernel, journal
        self.batch_size, self.seed, self.call_kwargs = batch_size, seed, call_kwargs
        self.waiting: dict[tuple, list] = {}  # size -> [(image, kernel, output, stamp of the source)]
        self.written, self.computed, self.seconds = 0, 0, 0.0

    def take(self, image: Image.Image, output: Path, is_mask: bool, stamp: Sequence[int]) -> None:
        """Raises `TooSmall` for an image that is smaller than the kernel, OSError if a result cannot be written."""
        if is_mask or len(np.unique(np.asarray(image))) <= 2:
            self.write(image, output, stamp)
            return
        kernel = kernel_of(image, self.kernel)
        # kernels of one size are one batch
        key = (image.size, kernel.shape)
        self.waiting.setdefault(key, []).append((image, kernel, output, stamp))
        if len(self.waiting[key]) == self.batch_size:
            self.run(key)
        elif sum(map(len, self.waiting.values())) >= 8 * self.batch_size:  # many sizes: limits the memory
            self.run(max(self.waiting, key=lambda key: len(self.waiting[key])))

    def finish(self) -> None:
        while self.waiting:
            self.run(next(iter(self.waiting)))

    def run(self, key: tuple) -> None:
        batch = self.waiting.pop(key)
        start = time.perf_counter()
        restored = self.pipeline(
            [image for image, *_ in batch],
            kernel=np.stack([kernel for _, kernel, *_ in batch]),
            generator=[generator_of(self.seed, output) for _, _, output, _ in batch],
            output_type="pil",
            **self.call_kwargs,
        ).restored
        self.seconds += time.perf_counter() - start
        self.computed += len(batch)
        for (_, _, output, stamp), image in zip(batch, restored, strict=True):
            self.write(image, output, stamp)

    def write(self, image: Image.Image, output: Path, stamp: Sequence[int]) -> None:
        """Write a result, and before it the line of its source: a file that is there has the source of that line."""
        (self.output_root / output).unlink(missing_ok=True)
        with open(self.journal, "a") as journal:  # an empty line, since a crash may have cut the one before
            journal.write(f"\n{line_of(output.as_posix(), stamp)}\n")
        write_file(self.output_root / output, encode(image, output.suffix))
        self.written += 1


def measure(
    pipeline: DiffPIRDeblurPipeline,
    source_root: str | Path,
    *,
    kernel: np.ndarray | str,
    batch_size: int = 4,
    call_kwargs: dict[str, Any] | None = None,
    sample: int | None = None,
) -> tuple[float, int]:
    """(seconds per image in one process, number of images), measured on `sample` images (None: two batches).

    The images are spread evenly over the data set; nothing is written, and a first call for warm-up does not count.
    Broken images, and those smaller than the kernel, are left out.

    Raises:
        ValueError: no image is left.
    """
    fixed_kernel, _ = read_kernel(kernel)
    plan = plan_copy(Path(source_root), Path(source_root) / ".planned", {**SAME_GEOMETRY, "image_format": "png"})
    sources = [source for source, _, is_mask in plan.jobs if not is_mask]
    count = min(sample or 2 * batch_size, len(sources))
    sources = [sources[i * len(sources) // count] for i in range(count)]
    images = []
    for source in sources:
        try:
            image = read_image(source)
            images.append((image, kernel_of(image, fixed_kernel)))
        except (ValueError, OSError, TooSmall) as error:
            reason = f"{source}: {str(error).removeprefix(f'{source}: ')}"
            logger.warning("left out: %s", reason)
    if not images:
        raise ValueError(f"expected an image that can be deblurred, got none: {reason}")
    image, kernel = images[0]
    pipeline(image, kernel=kernel, **{**(call_kwargs or {}), "num_inference_steps": 1})
    start = time.perf_counter()
    groups: dict[tuple, list] = {}
    for image, kernel in images:
        groups.setdefault((image.size, kernel.shape), []).append((image, kernel))
    for members in groups.values():
        for first in range(0, len(members), batch_size):
            some = members[first : first + batch_size]
            pipeline([p for p, _ in some], kernel=np.stack([k for _, k in some]), **(call_kwargs or {}))
    return (time.perf_counter() - start) / len(images), len(plan.jobs)


def describe_plan(images: int, seconds_per_image: float, processes: int = 1) -> str:
    """ "224,316 images: 3.10 images/s in 4 processes, 20.1 hours", from the seconds per image in one process.

    >>> describe_plan(224_316, 2.0, 4)
    '224,316 images: 2 images/s in 4 processes, 31.2 hours'
    """
    total = images * seconds_per_image / processes
    units = [("days", 86400, 2), ("hours", 3600, 1.5), ("minutes", 60, 1.5), ("seconds", 1, 0)]
    name, length, _ = next(unit for unit in units if total >= unit[1] * unit[2])
    many = f"{processes} processes" if processes > 1 else "1 process"
    return f"{images:,} images: {processes / seconds_per_image:.3g} images/s in {many}, {total / length:.1f} {name}"


def read_kernel(kernel: np.ndarray | str) -> tuple[np.ndarray | None, str]:
    """Array, text or "estimate" -> ((h, w) array, or None for "estimate"; its name in the settings)."""
    if isinstance(kernel, str):
        if kernel == ESTIMATE:
            return None, ESTIMATE
        array = make_kernel(kernel)
        return array, f"{kernel} ({hashlib.sha256(array.tobytes()).hexdigest()[:8]})"  # a file may change
    array = np.asarray(kernel, np.float32)
    return array, f"array of {array.shape} ({hashlib.sha256(array.tobytes()).hexdigest()[:8]})"


def kernel_of(image: Image.Image, kernel: np.ndarray | None) -> np.ndarray:
    """The kernel, or an estimated one where it is None; `TooSmall` if the image is smaller than it."""
    try:
        kernel = estimate_kernel(image) if kernel is None else kernel
    except ValueError as error:  # too small to estimate one
        raise TooSmall(str(error)) from None
    if max(kernel.shape) > min(image.size):
        raise TooSmall(f"{image.width} x {image.height} pixels, kernel {kernel.shape}")
    return kernel


def generator_of(seed: int, output: Path) -> torch.Generator:
    """A generator that depends only on the seed and the path of the image below the root."""
    digest = hashlib.sha256(f"{seed}:{Path(output).as_posix()}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def encode(image: Image.Image, suffix: str) -> bytes:
    """PIL image -> the bytes of a PNG, or of a JPEG of 8 bits."""
    with io.BytesIO() as buffer:
        if suffix == ".jpg":
            if image.mode != "L":
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            image.save(buffer, format="JPEG", quality=95)
        else:
            image.save(buffer, format="PNG")
        return buffer.getvalue()


def check(source_root: Path, output_root: Path, image_format: str, batch_size: int) -> None:
    if not source_root.is_dir():
        raise NotADirectoryError(f"expected the folder of a data set, got {source_root}")
    if source_root.resolve() == output_root.resolve():
        raise ValueError(f"the copy would overwrite its source: give another folder than {source_root}")
    if image_format not in ("png", "jpg"):
        raise ValueError(f"expected `image_format` png or jpg, got {image_format!r}")
    if batch_size < 1:
        raise ValueError(f"expected a `batch_size` of 1 or more, got {batch_size}")


def carry_tables(source_root: Path, output_root: Path, plan: CopyPlan) -> None:
    """Copy the CSV files, with the names of images in them rewritten."""
    outputs = {Path(source).resolve(): Path(output) for source, output, _ in plan.jobs}
    for csv in sorted(source_root.rglob("*.csv")):
        target = output_root / csv.relative_to(source_root)
        if output_root in csv.parents:
            continue
        places = (csv.parent, source_root.parent)  # CheXpert's paths begin with the data set's own name

        def renamed(cell, places=places):
            candidates = [outputs.get((place / cell).resolve()) for place in places] if 0 < len(cell) < 1000 else []
            output = next((output for output in candidates if output is not None), None)
            return cell if output is None else Path(cell).with_name(output.name).as_posix()

        table = pd.read_csv(csv, dtype=str, keep_default_na=False)
        table = table.apply(lambda column, renamed=renamed: column.map(renamed))
        write_file(target, table.to_csv(index=False).encode())
