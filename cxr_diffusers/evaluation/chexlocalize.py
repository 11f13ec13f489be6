"""CheXlocalize's own protocol (Saporta et al. 2022, https://doi.org/10.1038/s42256-022-00536-x).

As in their released scripts: maps stretched to their own minimum and maximum, Otsu's threshold or one for each
pathology that is best on the validation set, IoU on two slices of the data, the maximum as the most representative
point, and a bootstrap over images. docs/evaluation.md says what is different with maps of "abnormal".
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from tqdm.auto import tqdm

from ..data.chexlocalize import (
    PATHOLOGIES,
    TASKS,
    area,
    chexlocalize_images,
    cxr_id,
    decode,
    encode,
    read_segmentations,
)
from ..data.images import picture_size
from ..data.rows import to_dataset
from ..files import safe_name, save_png, write_file
from ..processes import process_state
from ..version import __version__
from ..visualization import contact_sheet
from .answers import detect
from .comparison import as_method
from .controls import CENTRE, centre_prior, resample
from .masks import drop_small
from .report import SHEET_ROWS, is_number, markdown, plain
from .tables import describe_method

ANY = "any pathology"  # the union of all but support devices: what one map of "abnormal" can be asked for
REGIONS = {**{task: (task,) for task in TASKS}, ANY: PATHOLOGIES}
THRESHOLDS = tuple(round(0.1 * k, 1) for k in range(2, 9))  # of the stretched map
CUTOFFS = tuple(round(0.1 * k, 1) for k in range(10))  # quantiles of the validation images' scores
NUMBERS = {  # the column that is averaged, and its heading
    "miou": ("iou", "mIoU"),
    "miou_full": ("iou_full", "mIoU, full set"),
    "miou_full_cutoff": ("iou_full_cutoff", "mIoU, full set, with a cutoff"),
    "hit_rate": ("hit", "hit rate"),
}


@dataclass
class Segmented:
    """A split: its pictures and their segmentations.

    images: `datasets.Dataset` with `image` and `path` (.../patient64541/study1/view1_frontal.jpg).
    segmentations: {cxr_id: {task: run lengths}} of those that have any, see `read_segmentations`.
    """

    images: object
    segmentations: dict


def open_split(root, segmentations, frontal_only=False):
    """A folder of CheXpert's images and the released JSON -> `Segmented`; arguments and errors as `load_chexlocalize`.

    The protocol takes lateral images, too; `frontal_only` leaves them out, also of the segmentations.
    """
    known = read_segmentations(segmentations)
    paths = chexlocalize_images(root, known, frontal_only)
    rows = [{"image": path, "path": str(path), "patient": path.parts[-3], "label": -1} for path in paths]
    there = {cxr_id(path) for path in paths}
    return Segmented(to_dataset(rows, ["healthy", "abnormal"]), {k: v for k, v in known.items() if k in there})


def evaluate_chexlocalize(
    pipelines,
    test,
    validation=None,
    *,
    output_dir=None,
    batch_size=8,
    n_bootstrap=1000,
    seed=0,
    call_kwargs=None,
    progress=True,
):
    """Methods in one table, measured as Saporta et al. measured theirs.

    Each number is by pathology, and for `ANY`, the union of all pathologies without support devices. A method has one
    map an image, which is held against each pathology's mask in turn. The centre prior is a control.

        miou              mean IoU over the images with a mask and a segmentation of the method (their "true positive
                          slice")
        miou_full         also over images with only one of the two, which count 0
        miou_full_cutoff  likewise, a segmentation being empty where the image's score is under a cutoff that is best on
                          the validation images (theirs: a cutoff of the classifier's probability)
        hit_rate          the share of the images with a mask whose map has its maximum inside

    Args:
        pipelines: {name: pipeline} or {name: (pipeline, call_kwargs)}, as for `compare`.
        test: `Segmented`, what is measured on; see `open_split`.
        validation: `Segmented`, other patients: they give each pathology the best of `THRESHOLDS` (where none of them
            has it, that of `ANY`). None: Otsu's threshold, found on each map itself, and no cutoff.
        output_dir: folder for summary.json, summary.md, per_image.csv, contact_sheet.png and maps/, and a folder of
            each method with segmentations.json (run lengths) and points.json (most representative points) in
            CheXlocalize's formats. None writes nothing.
        batch_size, call_kwargs, progress: as for `evaluate`.
        n_bootstrap: replicates. Images are drawn, not patients, as they did: intervals are too narrow where patients
            have several.
        seed: of the bootstrap, whose draws are those of their script.

    Returns:
        the summary: `rows` {method: {region: {number: {value, low, high, bootstrap_mean}}}}, `thresholds`, `cutoffs`,
        counts and settings; None in all processes but the main one.

    Raises:
        ValueError: a picture of another size than its segmentation, patients in both splits, a method that is named as
            the control is or that is no folder's name of its own, or several processes without `output_dir`.
    """
    splits = {"test": test} | ({"validation": validation} if validation else {})
    check(pipelines, splits, output_dir)
    methods = [as_method(name, pipeline, call_kwargs or {}) for name, pipeline in pipelines.items()]
    folder = None if output_dir is None else Path(output_dir) / "maps"
    run = dict(folder=folder, batch_size=batch_size, seed=seed, progress=progress)
    answers = {
        (m.name, split): detect(m, splits[split].images, desc=f"{m.name}, {split}", **run)
        for m in methods
        for split in splits
    }
    if not process_state().is_main_process:
        return None

    summary = {"rows": {}, "thresholds": {}, "cutoffs": {}, **counts(test)}
    tables = []
    for name, method in {**{m.name: m for m in methods}, CENTRE: None}.items():
        tried = THRESHOLDS if validation else (None,)
        found = {
            split: measure(maps_of(method, data, answers.get((name, split))), data, tried, progress, f"{name}, {split}")
            for split, data in splits.items()
        }
        thresholds = tune(found["validation"]) if validation else dict.fromkeys(REGIONS)
        cutoffs = cut_off(found["validation"], thresholds) if validation and method else dict.fromkeys(REGIONS)
        table = judged(found["test"], tried, thresholds, cutoffs)
        summary["rows"][name] = {
            region: numbers(table[table.region == region], n_bootstrap, seed) for region in REGIONS
        }
        summary["thresholds"][name], summary["cutoffs"][name] = thresholds, cutoffs
        tables.append(table.assign(method=name))
        if output_dir is not None and method:
            maps = maps_of(method, test, answers[name, "test"])
            write_predictions(maps, test, thresholds, Path(output_dir) / safe_name(name), progress, name)
    described = {method.name: describe_method(method) for method in methods}
    summary["settings"] = {"cxr_diffusers": __version__, "methods": described, "n_bootstrap": n_bootstrap, "seed": seed}
    if output_dir is not None:
        write_file(Path(output_dir) / "per_image.csv", pd.concat(tables).to_csv(index=False).encode())
        content = json.dumps(plain(summary), indent=2, allow_nan=False)
        write_file(Path(output_dir) / "summary.json", content.encode())
        write_file(Path(output_dir) / "summary.md", chexlocalize_table(summary).encode())
        write_sheet(methods, test, answers, Path(output_dir) / "contact_sheet.png")
    return summary


def check(pipelines, splits, output_dir):
    if not pipelines or CENTRE in pipelines:
        raise ValueError(f"expected at least one method, none of them named {CENTRE!r}, got {list(pipelines)}")
    folders = [safe_name(name) for name in pipelines]
    if len(set(folders)) < len(folders) or {"maps", "", ".", ".."} & set(folders):
        raise ValueError(f"expected methods whose names are folders of their own, got {list(pipelines)}")
    if process_state().num_processes > 1 and output_dir is None:
        raise ValueError("expected `output_dir` with several processes: they meet in its files")
    patients = [{cxr_id(path).split("_")[0] for path in split.images["path"]} for split in splits.values()]
    both = sorted(set.intersection(*patients)) if len(patients) > 1 else []
    if both:
        raise ValueError(f"expected other patients in the validation split, got {len(both)} in both, {both[0]} one")


def counts(test):
    entries = test.segmentations.values()
    found = {region: sum(area(entry, tasks) > 0 for entry in entries) for region, tasks in REGIONS.items()}
    return {"n_images": len(test.images), "n_segmented": len(test.segmentations), "n_with": found}


def maps_of(method, split, answers):
    """Yield (cxr_id, (H, W) map at the picture's own resolution, score) of each image; without a method, the centre."""
    for i, row in enumerate(split.images):
        height, width = picture_size(row["image"])
        size = split.segmentations.get(cxr_id(row["path"]), {"": {"size": [height, width]}})
        expected = next(iter(size.values()))["size"]
        if [height, width] != list(expected):
            raise ValueError(
                f"expected a picture of its segmentation's size {list(expected)}, got {[height, width]}: {row['path']}"
            )
        if method is None:
            yield cxr_id(row["path"]), resample(centre_prior(), height, width), np.nan
        else:
            found = method.restore(answers[i]["anomaly_map"], {"height": height, "width": width})
            yield cxr_id(row["path"]), found, float(answers[i]["score"])


def stretch(anomaly_map):
    """A map stretched to its own minimum and maximum; a constant one marks nothing at any threshold: zeros."""
    low, high = anomaly_map.min(), anomaly_map.max()
    return (anomaly_map - low) / (high - low) if high > low else np.zeros_like(anomaly_map)


def binarise(stretched, threshold):
    """A stretched map -> (H, W) booleans; `threshold` None: Otsu's, with holes filled and single pixels dropped."""
    if threshold is not None:
        return stretched > threshold
    from skimage.filters import threshold_otsu

    levels = (255 * stretched).astype(np.uint8)
    if levels.max() == 0:
        return np.zeros(levels.shape, bool)
    # their script draws the contours anew and fills them, and a contour of one point is none
    return drop_small(ndimage.binary_fill_holes(levels > threshold_otsu(levels)), 2)


def representative_point(anomaly_map):
    """(row, column) of the maximum, the first one where several share it."""
    return np.unravel_index(np.argmax(anomaly_map), anomaly_map.shape)


def measure(maps, split, thresholds, progress, desc):
    """A dict an image: id, covered (is there an entry), score, and pixel counts.

    marked: (K,) pixels above each threshold; and of each region, true: its pixels, both: (K,) those of it that are
    marked, hit: 1 or 0 (NaN without a pixel).
    """
    found = []
    for name, anomaly_map, score in tqdm(maps, desc, total=len(split.images), disable=not progress, unit="image"):
        entry, stretched = split.segmentations.get(name), stretch(anomaly_map)
        # thresholds rise, so each pixel is above so many of them: one count for all
        level = sum((binarise(stretched, t).astype(np.uint8) for t in thresholds), np.zeros(stretched.shape, np.uint8))
        point = representative_point(anomaly_map)
        record = {"id": name, "covered": entry is not None, "score": score, "true": {}, "both": {}, "hit": {}}
        record["marked"] = above(level, len(thresholds))
        for region, tasks in REGIONS.items():
            some = entry is not None and area(entry, tasks) > 0
            truth = decode(entry, tasks) if some else None
            record["true"][region] = int(truth.sum()) if some else 0
            record["both"][region] = above(level[truth], len(thresholds)) if some else 0 * record["marked"]
            record["hit"][region] = float(truth[point]) if some else np.nan
        found.append(record)
    return found


def above(level, n):
    """How many of these pixels are above the 1st, 2nd, ... n-th threshold."""
    return np.bincount(level.ravel(), minlength=n + 1)[::-1].cumsum()[::-1][1:]


def ious(records, region, full=False):
    """(N, K) IoU of each image at each threshold.

    Not `full`: NaN where either the truth or the segmentation is empty. `full`: NaN only where both are.
    """
    marked = np.array([r["marked"] for r in records], np.float64)
    true = np.array([r["true"][region] for r in records], np.float64)[:, None]
    both = np.array([r["both"][region] for r in records], np.float64)
    union = marked + true - both
    defined = (union > 0) if full else (marked > 0) & (true > 0)
    return np.divide(both, union, out=np.full(union.shape, np.nan), where=defined)


def tune(validation):
    """{region: the threshold with the best mean IoU over its validation images}; the lowest of equal ones."""
    covered = [record for record in validation if record["covered"]]
    best = {}
    for region in (ANY, *TASKS):
        means = mean(ious(covered, region))
        defined = np.isfinite(means).any()
        best[region] = THRESHOLDS[int(np.nanargmax(means))] if defined else best.get(ANY, THRESHOLDS[0])
    return {region: best[region] for region in REGIONS}


def cut_off(validation, thresholds):
    """{region: the score under which nothing is marked}: best for the mean IoU over all validation images."""
    scores = np.array([record["score"] for record in validation])
    tried = np.quantile(scores, CUTOFFS)
    best = {}
    for region, threshold in thresholds.items():
        full = ious(validation, region, full=True)[:, THRESHOLDS.index(threshold)]
        means = np.array([mean(emptied(full, validation, region, scores < cutoff)) for cutoff in tried])
        best[region] = float(tried[int(np.nanargmax(means))]) if np.isfinite(means).any() else float(tried[0])
    return best


def emptied(full, records, region, empty):
    """The IoU of the full set where some images' segmentations are empty: 0 with a mask, not defined without."""
    true = np.array([record["true"][region] > 0 for record in records])
    return np.where(empty, np.where(true, 0.0, np.nan), full)


def judged(records, tried, thresholds, cutoffs):
    """A line per image and region: cxr_id, region, covered, score, iou, iou_full, iou_full_cutoff, hit; by cxr_id."""
    records = sorted(records, key=lambda record: record["id"])
    scores = np.array([record["score"] for record in records])
    tables = []
    for region, threshold in thresholds.items():
        column = tried.index(threshold)
        full, cutoff = ious(records, region, full=True)[:, column], cutoffs[region]
        part = {
            "cxr_id": [record["id"] for record in records],
            "region": region,
            "covered": [record["covered"] for record in records],
            "score": scores,
            "iou": ious(records, region)[:, column],
            "iou_full": full,
            "iou_full_cutoff": np.nan if cutoff is None else emptied(full, records, region, scores < cutoff),
            "hit": [record["hit"][region] for record in records],
        }
        tables.append(pd.DataFrame(part))
    return pd.concat(tables, ignore_index=True)


def numbers(table, n_bootstrap, seed):
    """{number: {value, low, high, bootstrap_mean}} of one region."""
    found = {}
    for number, (column, _) in NUMBERS.items():
        # what nobody segmented is in the full set alone
        values = (table if "full" in number else table[table.covered])[column].to_numpy(np.float64)
        found[number] = {"value": float(mean(values)), **bootstrap(values, n_bootstrap, seed)}
    return found


def bootstrap(values, n, seed):
    """The interval of a mean as their script has it: sorted replicates, and of 1,000 the 25th and the 975th."""
    draw = np.random.RandomState(seed)  # the legacy stream, which is theirs
    replicates = np.sort([mean(values[draw.choice(len(values), len(values))]) for _ in range(n)])
    low, high = (max(int(share * n) - 1, 0) for share in (0.05 / 2, 1 - 0.05 / 2))
    return {"low": replicates[low], "high": replicates[high], "bootstrap_mean": float(mean(replicates))}


def mean(values):
    """The mean along the first axis without what is not defined; NaN where nothing is."""
    defined = np.isfinite(values)
    count = defined.sum(0)
    total = np.where(defined, values, 0.0).sum(0)
    return np.divide(total, count, out=np.full(np.shape(count), np.nan), where=count > 0)


def write_predictions(maps, split, thresholds, folder, progress, name):
    """segmentations.json and points.json, which CheXlocalize's own `eval.py` reads."""
    segmentations, points = {}, {}
    for image, anomaly_map, _ in tqdm(maps, f"{name}, write", total=len(split.images), disable=not progress):
        stretched = stretch(anomaly_map)
        cells = {t: encode(binarise(stretched, t)) for t in {thresholds[task] for task in TASKS}}
        row, column = map(int, representative_point(anomaly_map))
        segmentations[image] = {task: cells[thresholds[task]] for task in TASKS}
        points[image] = {task: [[column, row]] for task in TASKS}
    write_file(folder / "segmentations.json", json.dumps(segmentations).encode())
    write_file(folder / "points.json", json.dumps(points).encode())


def write_sheet(methods, test, answers, path):
    """The first picture of eight patients with `ANY`, evenly over the data set and not by success."""
    found = {}
    for i, image in enumerate(test.images["path"]):
        entry = test.segmentations.get(cxr_id(image))
        if entry and area(entry, PATHOLOGIES):
            found.setdefault(cxr_id(image).split("_")[0], i)
    if not found:
        return
    patients, rows = list(found), []
    for k in np.linspace(0, len(patients) - 1, min(SHEET_ROWS, len(patients))).round().astype(int):
        i = found[patients[k]]
        image = test.images[i]["image"]
        size = dict(zip(("height", "width"), picture_size(image), strict=True))
        maps = {m.name: m.restore(answers[m.name, "test"][i]["anomaly_map"], size) for m in methods}
        truth = decode(test.segmentations[cxr_id(test.images[i]["path"])], PATHOLOGIES)
        rows.append({"image": image, "mask": truth, "maps": maps, "title": patients[k]})
    title = f"{len(rows)} of {len(found)} patients with {ANY}, evenly over the data set"
    save_png(contact_sheet(rows, [method.name for method in methods], title=title), path)


def chexlocalize_table(summary):
    """Markdown: a table for each method, a row for each pathology, "value [low, high]"."""
    lines = [
        f"{summary['n_images']} images, {summary['n_segmented']} of them with segmentations. Brackets: 95 % bootstrap "
        f"intervals over images, {summary['settings']['n_bootstrap']} replicates.\n"
    ]
    for name, rows in summary["rows"].items():
        shown = {k: h for k, (_, h) in NUMBERS.items() if any(is_number(row[k]["value"]) for row in rows.values())}
        labelled = {
            f"{region} ({summary['n_with'][region]}; {summary['thresholds'][name][region] or 'Otsu'})": row
            for region, row in rows.items()
        }
        lines += [f"### {name}\n", markdown("pathology (images; threshold)", labelled, shown)]
    return "\n".join(lines)
