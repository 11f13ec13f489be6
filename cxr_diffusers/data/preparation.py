"""A small grey copy of a data set, made once by several processes, so that training reads small images."""

import contextlib
import errno
import json
import logging
import multiprocessing.connection
import os
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import PIL.Image
from tqdm.auto import tqdm

from ..files import keep_settings, remove_dead, write, write_csv, write_text
from .boxes import PREPARED as SETTINGS
from .copy_plans import NOT_COPIED, SourceJournal, line_of, plan_copy
from .images import ASPECTS, fit_image, fit_mask, read_binary_mask, read_image
from .images import equalize as equalize_image

if TYPE_CHECKING:  # imports torch, which takes seconds
    from ..processes import Shard

logger = logging.getLogger(__name__)

SUMMARY, SKIPPED, STAMPS = "prepare_summary.json", "skipped.csv", "prepare_sources"
BREAKS = 3  # how many times a worker may be killed


def prepare(
    source_root: Path | str,
    output_root: Path | str,
    *,
    size: int = 256,
    aspect: str = "pad",
    equalize: bool = False,
    image_format: str = "png",
    frontal_only: bool = False,
    fast_jpeg: bool = False,
    num_workers: int | None = None,
    overwrite: bool = False,
    shard: "Shard | None" = None,
) -> dict[str, Any]:
    """Copy a data set as grey `size` x `size` images; the loaders open the copy as they open `source_root`.

    CheXpert (also Plus), ChestX-ray14 and VinDr-CXR keep their CSVs, with paths rewritten and rows dropped whose image
    is missing or broken. Any other folder keeps its subfolders. Boxes and masks are transformed with their images. A
    run that was stopped resumes, repeats the copies whose sources have changed, and deletes those whose sources are no
    longer there (so a folder is the copy of one source); no file is ever incomplete. Files that are left out are listed
    in skipped.csv, with the reason, and counted in prepare_summary.json.

    Args:
        aspect: "pad", "edge", "crop" or "squash" (the original's), see `images.fit_image`.
        equalize: histogram equalisation at full resolution before the resize (the original's), see `images.equalize`.
        image_format: "png" (16 bit stay 16 bit) or "jpg" (8 bit, quality 95).
        frontal_only: leave out CheXpert's lateral images (ChestX-ray14 and VinDr-CXR have none).
        fast_jpeg: decode large JPEG files at a half, a quarter or an eighth of their size, with at least twice `size`
            pixels a side. Several times faster, but it changes pixels: copies are no longer exact area means, boxes
            may be off by half a pixel of the copy, and `equalize` sees the smaller image.
        num_workers: processes; None: one per CPU that this process may use.
        overwrite: delete the copies and make them again, also with other settings than the folder's.
        shard: the share of the images to copy, without the tables; None: all of them, and the tables. See `Shard`.

    Returns:
        The summary: {"images", "written", "kept", "skipped", "failed", "reasons", "seconds", "settings"}; `failed`
        counts the images among the skipped. A shard's summary is that of its own images.

    Raises:
        NotADirectoryError: no such source.
        ValueError: an unknown option, `overwrite` in a shard, another setting than the output folder was made with, no
            images, or a copy into the source itself; see also `plan_copy`.
        OSError: a file cannot be written, or workers were killed repeatedly; the same call resumes later.
    """
    source_root, output_root = Path(source_root), Path(output_root)
    settings = {"size": size, "aspect": aspect, "equalize": equalize, "image_format": image_format}
    settings |= {"frontal_only": frontal_only, "fast_jpeg": fast_jpeg}
    _check(source_root, output_root, settings)
    part = None if shard is None or shard.is_all else shard
    if overwrite and part:
        raise ValueError(f"expected `overwrite` without a shard, got {part}: it deletes the copies of all shards")
    plan = plan_copy(source_root, output_root, settings)
    jobs = plan.jobs if shard is None else shard.of(plan.jobs)
    output_root.mkdir(parents=True, exist_ok=True)
    there = set() if part else remove_dead(output_root)
    sources = SourceJournal(output_root, STAMPS)
    if overwrite:  # first of all, so that a run stopped half-way does not mix two settings
        sources.remove_others([])
        for path in [output_root / SETTINGS, *sources.files(), *(output_root / output for _, output, _ in jobs)]:
            path.unlink(missing_ok=True)
        sources, there = SourceJournal(output_root, STAMPS), set()
    advice = "give another folder or `overwrite`"
    keep_settings(output_root / SETTINGS, settings, defaults={"fast_jpeg": False}, advice=advice)

    begin = time.monotonic()
    removed = 0 if part else sources.remove_others(jobs)
    journal = STAMPS if part is None else f"{STAMPS}.{part.index}-of-{part.count}"
    todo = sources.outdated(jobs, plan.stamps, there)
    results = _run(jobs, todo, output_root, settings, num_workers, output_root / f"{journal}.jsonl")
    reasons = {job[0]: error for job, (_, error) in zip(jobs, results, strict=True) if error}
    done = {job[0] for job in jobs} - reasons.keys()
    skipped = list(reasons.items())
    if not part:
        plan.finish(done)
        skipped = plan.skipped + skipped
    summary = {
        "images": len(done),
        "written": sum(state == "written" for state, _ in results),
        "kept": sum(state == "kept" for state, _ in results),
        "skipped": len(skipped),
        "failed": sum(reason != NOT_COPIED for _, reason in skipped),
        "reasons": dict(Counter(_short(reason) for _, reason in skipped)),
        "seconds": round(time.monotonic() - begin, 1),
        "settings": settings,
    }
    if not part:
        write_csv(output_root / SKIPPED, pd.DataFrame(skipped, columns=["file", "reason"], dtype=object))
        write_text(output_root / SUMMARY, json.dumps(summary, indent=2))
    if removed:
        print(f"{output_root}: deleted {removed} copies of images that are no longer at their place in {source_root}")
    _print_summary(summary, output_root, with_table=not part)
    return summary


def _print_summary(summary, output_root, with_table):
    print(f"{output_root}: {summary['images']} images ({summary['kept']} were there), {summary['skipped']} skipped")
    for reason, count in summary["reasons"].items():
        print(f"  {count} x {reason}")
    if summary["skipped"] and with_table:
        print(f"  see {output_root / SKIPPED}")


def _run(jobs, todo, output_root, settings, num_workers, journal_file):
    """(state, reason) for each job: "written", "kept" or "skipped"; those with a number in `todo` are done."""
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    results = [("kept", None)] * len(jobs)
    with open(journal_file, "a") as journal:
        journal.write("\n" * (journal.tell() > 0))  # a line that a crash cut short stays separate
        left = len(jobs) - len(todo)
        with tqdm(total=len(jobs), initial=left, desc="preparing", unit="image", delay=2) as bar:
            for i, state, reason, stamp in _results(jobs, todo, output_root, settings, num_workers):
                results[i] = state, reason
                if state == "written":
                    journal.write(f"{line_of(jobs[i][1], stamp)}\n")
                    journal.flush()
                bar.update()
    return results


def _results(jobs, numbers, output_root, settings, num_workers):
    """Yield (number of the job, state, reason, stamp) of each job of these numbers, as they are done."""
    work = partial(_some, output_root=output_root, settings=settings)
    todo = {i: (i, *jobs[i]) for i in numbers}
    if num_workers <= 1 or len(todo) < 32:
        for job in todo.values():
            yield from work([job])
        return
    # here, before the workers are made, so that they share it: it takes seconds
    from ..pipelines import cxr_anomaly  # noqa: F401

    for left in reversed(range(BREAKS)):
        rest = list(todo.values())
        chunk = max(1, min(64, len(rest) // (8 * num_workers)))
        pool = ProcessPoolExecutor(num_workers, initializer=_end_with_parent)
        try:
            futures = [pool.submit(work, rest[k : k + chunk]) for k in range(0, len(rest), chunk)]
            for future in as_completed(futures):
                for result in future.result():
                    del todo[result[0]]
                    yield result
            return
        except BrokenProcessPool:
            if not left:
                raise ChildProcessError(
                    f"workers were killed {BREAKS} times (is the memory full?): run it again with fewer workers"
                ) from None
            logger.warning("a worker was killed (is the memory full?): %d images are tried again", len(todo))
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent():
    """A worker's first act: watch its parent, whose death, even a sudden one, ends it."""

    def watch():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    def count():  # a sibling may hold the other end of the sentinel
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    for target in (watch, count):
        threading.Thread(target=target, daemon=True).start()


def _some(jobs, output_root, settings):
    return [(i, *_one(job, output_root, settings)) for i, *job in jobs]


def _one(job, output_root, settings):
    """(state, reason, stamp) of one job; only errors of its source are a reason, all others are raised."""
    source, relative, is_mask = job
    output = output_root / relative
    try:
        status = os.stat(source)  # before it is read: a change meanwhile is seen the next time
        draft = 2 * settings["size"] if settings["fast_jpeg"] else None
        image = read_binary_mask(source) if is_mask else read_image(source, draft=draft)
    except (ValueError, OSError) as error:
        with contextlib.suppress(OSError):
            output.unlink(missing_ok=True)  # the copy of an older source
        return "skipped", f"broken image: {str(error).removeprefix(f'{source}: ')}", None
    if is_mask:
        image = fit_mask(image, settings["size"], settings["aspect"])
    else:
        image = equalize_image(image) if settings["equalize"] else image
        image = fit_image(image, settings["size"], settings["aspect"])
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write(output, lambda temporary: _save(image, temporary, output.suffix))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return "skipped", "name too long for a copy", None
        raise
    return "written", None, (status.st_size, status.st_mtime_ns)


def _save(image, path, suffix):
    if suffix == ".png":
        return image.save(path, format="PNG", compress_level=1)  # three times as fast, a tenth larger
    if image.mode != "L":
        image = PIL.Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    image.save(path, format="JPEG", quality=95)


def _check(source_root, output_root, settings):
    if not source_root.is_dir():
        raise NotADirectoryError(f"expected the folder of a data set, got {source_root}")
    if source_root.resolve() == output_root.resolve():
        raise ValueError(f"the copy would overwrite its source: give another folder than {source_root}")
    choices = {"aspect": ASPECTS, "image_format": ("png", "jpg")}
    for key, allowed in choices.items():
        if settings[key] not in allowed:
            raise ValueError(f"expected `{key}` {' or '.join(allowed)}, got {settings[key]!r}")
    if not isinstance(settings["size"], int) or settings["size"] < 8:
        raise ValueError(f"expected `size` in pixels, 8 or more, got {settings['size']!r}")


def _short(reason):
    """The countable part of a reason: without line numbers and details."""
    return reason.split(" (")[0].split(":")[0]
