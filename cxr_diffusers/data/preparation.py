"""The small grey copy of a data set: made once, by many processes, so that training does not shrink images for days."""

import csv as csv_files
import json
import os
import shutil
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
from tqdm.auto import tqdm

from ..files import keep_settings, new_file
from . import chexpert, nih, vindr
from .folder import MASK_ENDING, MASK_FOLDER
from .images import SUFFIXES, fit_boxes, fit_image, fit_mask, list_images, read_image
from .images import equalize as equalize_image
from .rows import parse_boxes

SETTINGS, SUMMARY, SKIPPED = "prepare_settings.json", "prepare_summary.json", "skipped.csv"
NOT_CARRIED = (
    "not carried over (of CSVs, only boxes.csv and those of CheXpert, ChestX-ray14 and VinDr-CXR are understood)"
)


def prepare(
    source_root,
    output_root,
    *,
    size=256,
    aspect="pad",
    equalize=False,
    image_format="png",
    frontal_only=False,
    num_workers=None,
    overwrite=False,
):
    """Copy a data set as grey `size` x `size` images; what the loaders open at `source_root`, they open at the copy.

    CheXpert (also Plus), ChestX-ray14 and VinDr-CXR keep their CSVs, with paths rewritten and rows dropped whose image
    is missing or broken. Any other folder keeps its tree. Boxes and masks move with their images. A run that was
    stopped goes on where it was; nothing is ever half-written. What was left out is listed in skipped.csv, with the
    reason, and counted in prepare_summary.json.

    Args:
        aspect: "pad", "crop" or "squash" (the original's), see `images.fit_image`.
        equalize: histogram equalisation at full resolution before the resize (the original's), see `images.equalize`.
        image_format: "png" (16 bit stay 16 bit) or "jpg" (8 bit, quality 95).
        frontal_only: leave CheXpert's lateral images out.
        num_workers: processes; None: one per CPU that this process may use.
        overwrite: delete the copies and make them anew, also with other settings than the folder's.

    Returns:
        The summary: {"images", "written", "kept", "skipped", "reasons", "seconds", "settings"}.

    Raises:
        NotADirectoryError: no such source.
        ValueError: an unknown option, another setting than the output folder was made with, no images, or a copy
            into the source itself.
    """
    source_root, output_root = Path(source_root), Path(output_root)
    settings = {"size": size, "aspect": aspect, "equalize": equalize, "image_format": image_format}
    settings |= {"frontal_only": frontal_only}
    _check(source_root, output_root, settings)
    plan = plan_copy(source_root, output_root, settings)
    jobs = plan.jobs
    output_root.mkdir(parents=True, exist_ok=True)
    if overwrite:  # first of all, so that a run stopped half-way does not mix two settings
        for path in [output_root / SETTINGS, *(output_root / output for _, output, _ in jobs)]:
            path.unlink(missing_ok=True)
    keep_settings(output_root / SETTINGS, settings, advice="give another folder or `overwrite`")

    begin = time.monotonic()
    results = _run(jobs, output_root, settings, num_workers)
    reasons = {job[0]: error for job, (_, error) in zip(jobs, results, strict=True) if error}
    done = {job[0] for job in jobs} - reasons.keys()
    plan.finish(done)
    skipped = plan.skipped + [(str(source), reason) for source, reason in reasons.items()]
    summary = {
        "images": len(done),
        "written": sum(state == "written" for state, _ in results),
        "kept": sum(state == "kept" for state, _ in results),
        "skipped": len(skipped),
        "reasons": dict(Counter(_kind(reason) for _, reason in skipped)),
        "seconds": round(time.monotonic() - begin, 1),
        "settings": settings,
    }
    _write_csv(output_root / SKIPPED, pd.DataFrame(skipped, columns=["file", "reason"]))
    _write_text(output_root / SUMMARY, json.dumps(summary, indent=2))
    print(f"{output_root}: {summary['images']} images ({summary['kept']} were there), {summary['skipped']} skipped")
    for reason, count in summary["reasons"].items():
        print(f"  {count} x {reason}")
    if skipped:
        print(f"  see {output_root / SKIPPED}")
    return summary


def plan_copy(source_root, output_root, settings):
    """What a copy of a data set consists of, for `prepare` and whoever else writes one.

    Args:
        settings: "size" (None: pictures keep their geometry, and so do boxes), "aspect", "image_format" and
            "frontal_only", as `prepare` takes them.

    Returns:
        a plan with `jobs` [(source, output below the root, is it a mask)], `skipped` [(file, reason)] and
        `finish(done)`, which writes the tables, boxes and lists for those sources that are done.

    Raises:
        ValueError: no image, or two files that would become one.
    """
    plan = _layout_of(source_root)(source_root, output_root, settings)
    if not plan.jobs and not plan.skipped:
        raise ValueError(f"no image below {source_root}")
    return plan


class _Plan:
    """What is to be copied: jobs (source, output below the root, is it a mask); and how the tables follow."""

    def __init__(self, jobs, finish, skipped=()):
        outputs = {}
        for source, output, _ in jobs:
            if outputs.setdefault(output, source) != source:
                raise ValueError(f"{outputs[output]} and {source} would both become {output}: rename one")
        self.jobs, self.finish, self.skipped = jobs, finish, list(skipped)


def _layout_of(root):
    if any(root.glob("Data_Entry_2017*.csv")):
        return _plan_nih
    if any((root / "annotations").glob("annotations_*.csv")):
        return _plan_vindr
    tables = [csv for split in ("train", "valid", "test") for csv in _chexpert_tables(root, split)]
    return _plan_chexpert if tables else _plan_folder


def _chexpert_tables(root, split):
    try:
        csv = chexpert.find_csv(root, split)
    except FileNotFoundError:
        return []
    column = "path_to_image" if chexpert.is_plus(csv) else "Path"
    return [csv] if column in pd.read_csv(csv, nrows=0).columns else []


def _plan_chexpert(root, output_root, settings):
    """Rows of train.csv, valid.csv and test.csv; their CSVs, boxes.csv and Plus's label files follow."""
    tables = {csv: None for split in ("train", "valid", "test") for csv in _chexpert_tables(root, split)}
    jobs, skipped = {}, []
    for csv in tables:
        raw = pd.read_csv(csv, dtype=str, keep_default_na=False)
        column = "path_to_image" if chexpert.is_plus(csv) else "Path"
        view = next((name for name in ("Frontal/Lateral", "frontal_lateral") if name in raw), None)
        if settings["frontal_only"] and view:
            raw = raw[raw[view].str.lower().str.startswith("frontal")]
        rows = pd.DataFrame({"Path": raw[column], "line": raw.index + 2})
        files = chexpert.locate_images(csv, rows, missing_ok=True)
        outputs = [_renamed(Path(*chexpert.parts_from_split(path)), settings) for path in raw[column]]
        for file, output, row in zip(files, outputs, rows.itertuples(), strict=True):
            if file is None:
                skipped.append((row.Path, f"missing file ({csv.name}, line {row.line})"))
            else:
                jobs[file] = (file, output, False)
        tables[csv] = (raw, column, files, outputs)

    def finish(done):
        sizes = {}
        for csv, (raw, column, files, outputs) in tables.items():
            keep = [file in done for file in files]
            # Plus's paths begin with the split, CheXpert's with the data set's name
            prefix = Path() if chexpert.is_plus(csv) else Path(output_root.name)
            table = raw.assign(**{column: [(prefix / output).as_posix() for output in outputs]})[keep]
            _write_csv(output_root / csv.name, table)
            sizes |= {o.with_suffix("").as_posix(): (f, o) for f, o in zip(files, outputs, strict=True) if f in done}
            for labels in [*csv.parent.glob("*_fixed.json"), *csv.parent.glob("chexbert_labels/*_fixed.json")]:
                _copy(labels, output_root / labels.relative_to(csv.parent))
        _write_chexpert_boxes(next(iter(tables)), sizes, output_root, settings)

    return _Plan(list(jobs.values()), finish, skipped)


def _write_chexpert_boxes(csv, files, output_root, settings):
    """boxes.csv of the copy, all columns kept; `files`: {key: (source, output)}."""
    source = next((p for p in (csv.parent / "boxes.csv", csv.parent.parent / "boxes.csv") if p.is_file()), None)
    if source is None:
        return
    rows = []
    for row in pd.read_csv(source).to_dict("records"):
        key = Path(*chexpert.parts_from_split(row["file"])).with_suffix("").as_posix()
        if key in files:
            rows += _moved_box(row, *files[key], output_root.name, settings)
    if rows:
        _write_csv(output_root / "boxes.csv", pd.DataFrame(rows))


def _plan_nih(root, output_root, settings):
    """Rows of Data_Entry_2017*.csv to images/; the CSV, the lists and the boxes follow."""
    csv = nih.find_csv(root)
    raw = pd.read_csv(csv, dtype=str, keep_default_na=False)
    files = nih.index_images(root)
    new = {name: _renamed(Path("images", name), settings) for name in raw["Image Index"]}
    found = {name: files[Path(name).stem] for name in new if Path(name).stem in files}
    skipped = [(name, f"missing file ({csv.name}, line {i + 2})") for i, name in enumerate(new) if name not in found]

    def finish(done):
        keep = raw[raw["Image Index"].map(lambda name: found.get(name) in done)]
        renamed = keep["Image Index"].map(lambda name: new[name].name)
        _write_csv(output_root / csv.name, keep.assign(**{"Image Index": renamed}))
        kept = dict(zip(keep["Image Index"], renamed, strict=True))
        for name in nih.LISTS.values():
            if (root / name).is_file():
                names = (root / name).read_text().split()
                _write_text(output_root / name, "".join(f"{kept[n]}\n" for n in names if n in kept))
        _write_nih_boxes(root / nih.BOXES, {n: (found[n], new[n]) for n in kept}, output_root, settings)

    return _Plan([(file, new[name], False) for name, file in found.items()], finish, skipped)


def _write_nih_boxes(source, files, output_root, settings):
    if not source.is_file():
        return
    with open(source, newline="") as file:
        header, *rows = csv_files.reader(file)
    moved = [header]
    for name, finding, *numbers in rows:
        if name in files:
            box = [float(n) for n in numbers[:4]]
            moved += [[files[name][1].name, finding, *b] for b in _fit_boxes_of(files[name][0], [box], settings)]
    _write_text(output_root / source.name, "".join(",".join(map(str, row)) + "\n" for row in moved))


def _plan_vindr(root, output_root, settings):
    """train/ and test/; the label tables follow as they are, the boxes' move with their images."""
    folders = [root / split for split in vindr.SPLITS if (root / split).is_dir()]
    files = {path.stem: path for folder in folders for path in list_images(folder)}
    outputs = {file: _renamed(file.relative_to(root), settings) for file in files.values()}

    def finish(done):
        (output_root / "annotations").mkdir(exist_ok=True)
        for csv in sorted((root / "annotations").glob("*.csv")):
            table = pd.read_csv(csv)
            table = table[table["image_id"].map(lambda key: files.get(key) in done)]
            if set(vindr.CORNERS) <= set(table.columns):
                table = _move_corners(table, files, settings)
            _write_csv(output_root / "annotations" / csv.name, table)

    return _Plan([(file, output, False) for file, output in outputs.items()], finish)


def _move_corners(table, files, settings):
    """Rows with x_min, y_min, x_max, y_max -> the same for the copies; rows without a box stay as they are."""
    moved = []
    for row in table.to_dict("records"):
        x0, y0, x1, y1 = (row[name] for name in vindr.CORNERS)
        if x0 == x0:  # not NaN
            for x, y, w, h in _fit_boxes_of(files[row["image_id"]], [[x0, y0, x1 - x0, y1 - y0]], settings):
                moved.append(row | dict(zip(vindr.CORNERS, (x, y, x + w, y + h), strict=True)))
        else:
            moved.append(row)
    return pd.DataFrame(moved, columns=table.columns)


def _plan_folder(root, output_root, settings):
    """Every image below a folder; masks, NAME.txt and boxes.csv follow."""
    sources = [path for path in list_images(root) if output_root not in path.parents]
    jobs = []
    for source in sources:
        relative = source.relative_to(root)
        mask = relative.parts[0] == MASK_FOLDER and len(relative.parts) > 1 or source.stem.endswith(MASK_ENDING)
        output = _renamed(relative, settings)
        jobs.append((source, output.with_suffix(".png") if mask else output, mask))
    skipped = [(str(path), NOT_CARRIED) for path in sorted(root.glob("*.csv")) if path.name != "boxes.csv"]

    def finish(done):
        outputs = {source: output for source, output, mask in jobs if source in done and not mask}
        for source, output in outputs.items():
            text = source.with_suffix(".txt")
            if text.is_file():
                boxes = _fit_boxes_of(source, parse_boxes(text.read_text(), text), settings)
                lines = (" ".join(f"{n:g}" for n in box) + "\n" for box in boxes)
                _write_text((output_root / output).with_suffix(".txt"), "".join(lines))
        if (root / "boxes.csv").is_file():
            rows = []
            for row in pd.read_csv(root / "boxes.csv").to_dict("records"):
                source = root / row["file"]
                if source in outputs:
                    rows += _moved_box(row, source, outputs[source], "", settings)
            if rows:
                _write_csv(output_root / "boxes.csv", pd.DataFrame(rows))

    return _Plan(jobs, finish, skipped if jobs else ())


def _moved_box(row, source, output, prefix, settings):
    """A row of boxes.csv -> [the same row for the copy], or [] where a crop cut the box off."""
    moved = _fit_boxes_of(source, [[row[k] for k in "xywh"]], settings)
    new = {"file": Path(prefix, output).as_posix()}
    new |= {k: settings["size"] for k in ("image_w", "image_h") if k in row and settings["size"]}
    return [row | new | {k: round(v, 3) for k, v in zip("xywh", box, strict=True)} for box in moved]


def _fit_boxes_of(source, boxes, settings):
    if settings["size"] is None:
        return boxes
    image = read_image(source)
    return fit_boxes(boxes, image.width, image.height, settings["size"], settings["aspect"])


def _run(jobs, output_root, settings, num_workers):
    """(state, reason) for each job: "written", "kept" or "skipped"."""
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    work = partial(_one, output_root=output_root, settings=settings)
    show = partial(tqdm, total=len(jobs), desc="preparing", unit="image", delay=2)
    if num_workers <= 1 or len(jobs) < 32:
        return list(show(map(work, jobs)))
    # here, before the workers are made, so that they share it: it takes seconds
    from ..pipelines import cxr_anomaly  # noqa: F401

    chunk = max(1, min(64, len(jobs) // (8 * num_workers)))
    with ProcessPoolExecutor(num_workers) as pool:
        return list(show(pool.map(work, jobs, chunksize=chunk)))


def _one(job, output_root, settings):
    source, relative, is_mask = job
    output = output_root / relative
    if output.is_file():
        return "kept", None
    try:
        image = read_image(source)
    except (ValueError, OSError) as error:
        return "skipped", f"broken image: {str(error).removeprefix(f'{source}: ')}"
    if is_mask:
        image = fit_mask(image, settings["size"], settings["aspect"])
    else:
        image = equalize_image(image) if settings["equalize"] else image
        image = fit_image(image, settings["size"], settings["aspect"])
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(output, lambda temporary: _save(image, temporary, output.suffix))
    return "written", None


def _save(image, path, suffix):
    if suffix == ".png":
        return image.save(path, format="PNG")
    if image.mode != "L":
        image = PIL.Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    image.save(path, format="JPEG", quality=95)


def _check(source_root, output_root, settings):
    if not source_root.is_dir():
        raise NotADirectoryError(f"expected the folder of a data set, got {source_root}")
    if source_root.resolve() == output_root.resolve():
        raise ValueError(f"the copy would overwrite its source: give another folder than {source_root}")
    choices = {"aspect": ("pad", "crop", "squash"), "image_format": ("png", "jpg")}
    for key, known in choices.items():
        if settings[key] not in known:
            raise ValueError(f"expected `{key}` {' or '.join(known)}, got {settings[key]!r}")
    if not isinstance(settings["size"], int) or settings["size"] < 8:
        raise ValueError(f"expected `size` in pixels, 8 or more, got {settings['size']!r}")


def _renamed(path, settings):
    """Output path of an image: the new suffix in place of a known one, behind any other (DICOM names have dots)."""
    suffix = f".{settings['image_format']}"
    return path.with_suffix(suffix) if path.suffix.lower() in SUFFIXES else path.with_name(path.name + suffix)


def _kind(reason):
    """The countable part of a reason: without line numbers and details."""
    return reason.split(" (")[0].split(":")[0]


def _write(path, save):
    with new_file(path) as temporary:
        save(temporary)


def _write_text(path, text):
    _write(path, lambda temporary: temporary.write_text(text))


def _write_csv(path, table):
    _write(path, lambda temporary: table.to_csv(temporary, index=False))


def _copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, lambda temporary: shutil.copyfile(source, temporary))
