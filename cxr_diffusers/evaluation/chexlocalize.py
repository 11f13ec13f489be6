"""The protocol of CheXlocalize (Saporta et al. 2022, https://doi.org/10.1038/s42256-022-00536-x).

As in their released scripts: maps stretched to their own minimum and maximum, Otsu's threshold or, for each pathology,
the best one on the validation set, IoU on two slices of the data, the maximum as the most representative point, and a
bootstrap over images. docs/evaluation.md explains the differences for maps of "abnormal".
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from ..data.images import height_and_width
from ..data.rows import to_dataset
from ..files import safe_name, save_png, write_file
from ..processes import Shard, process_state
from ..version import __version__
from ..visualization import contact_sheet
from .comparison import as_method
from .controls import CENTRE, centre_prior, resample
from .masks import drop_small
from .predictions import Method, Predictions, predict
from .report import SHEET_ROWS, is_number, markdown, plain
from .tables import describe_method

ANY = "any pathology"  # the union of all but support devices, which a map of "abnormal" should mark
SEED = 0  # of the bootstrap, as in their script
REGIONS = {**{task: (task,) for task in TASKS}, ANY: PATHOLOGIES}
THRESHOLDS = tuple(round(0.1 * k, 1) for k in range(2, 9))  # of the stretched map
CUTOFFS = tuple(round(0.1 * k, 1) for k in range(10))  # quantiles of the validation images' scores
NUMBERS = {  # {metric: (the column that is averaged, heading)}
    "miou": ("iou", "mIoU"),
    "miou_full": ("iou_full", "mIoU, full set"),
    "miou_full_cutoff": ("iou_full_cutoff", "mIoU, full set, with a cutoff"),
    "hit_rate": ("hit", "hit rate"),
}

Record = dict[str, Any]  # the pixel counts of an image, see `measure`
Maps = Iterator[tuple[str, np.ndarray, float]]  # (cxr_id, map, score), see `maps_of`


@dataclass
class Segmented:
    """A split: its images and their segmentations.

    Attributes:
        images: `datasets.Dataset` with `image` and `path` (.../patient64541/study1/view1_frontal.jpg).
        segmentations: {cxr_id: {task: run lengths}} of the images that have any, see `read_segmentations`.
    """

    images: Any
    segmentations: dict[str, Any]


def open_split(root: Path | str, segmentations: Path | str, frontal_only: bool = False) -> Segmented:
    """A folder of CheXpert's images and the released JSON -> `Segmented`; arguments and errors as `load_chexlocalize`.

    The protocol includes lateral images; with `frontal_only` they and their segmentations are left out.
    """
    entries = read_segmentations(segmentations)
    paths = chexlocalize_images(root, entries, frontal_only)
    rows = [{"image": path, "path": str(path), "patient": path.parts[-3], "label": -1} for path in paths]
    names = {cxr_id(path) for path in paths}
    return Segmented(to_dataset(rows, ["healthy", "abnormal"]), {k: v for k, v in entries.items() if k in names})


def evaluate_chexlocalize(
    pipelines: Mapping[str, Any],
    test: Segmented,
    validation: Segmented | None = None,
    *,
    output_dir: Path | str | None = None,
    batch_size: int = 8,
    n_bootstrap: int = 1000,
    call_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    shard: Shard | None = None,
) -> dict[str, Any] | None:
    """Methods in one table, measured by the protocol of Saporta et al.

    Each metric is given by pathology, and for `ANY`, the union of all pathologies without support devices. A method has
    one map for each image, which is compared with each pathology's mask in turn. The centre prior is a control.

        miou              mean IoU over the images with a mask and a segmentation of the method (their "true positive
                          slice")
        miou_full         also over images with only one of the two, which count 0
        miou_full_cutoff  likewise, a segmentation being empty where the image's score is under a cutoff that is best on
                          the validation images (theirs: a cutoff of the classifier's probability)
        hit_rate          the share of the images with a mask whose map has its maximum inside

    Args:
        pipelines: {name: pipeline} or {name: (pipeline, call_kwargs)}, as for `compare`.
        test: the images to measure; see `open_split`.
        validation: images of other patients, which give each pathology the best of `THRESHOLDS` (that of `ANY` where
            none of them has the pathology). None: Otsu's threshold of each map, and no cutoff.
        output_dir: folder for summary.json, summary.md, per_image.csv, contact_sheet.png and maps/, and a folder for
            each method with segmentations.json (run lengths) and points.json (most representative points) in
            CheXlocalize's formats. None writes nothing.
        batch_size, call_kwargs, progress: as for `compare`.
        n_bootstrap: replicates. Images are drawn, not patients, as in their scripts: intervals are too narrow where
            patients have several images.
        shard: the share of the images to predict, without the tables; None: all of them, and the tables. See `Shard`.

    Returns:
        the summary: `rows` {method: {region: {metric: {value, low, high, bootstrap_mean}}}}, `thresholds`, `cutoffs`,
        counts and settings; None in a shard, and in all processes but the main one.

    Raises:
        ValueError: an image of another size than its segmentation, patients in both splits, a method named like the
            control, names that do not give each method a folder of its own, or several processes or a
            shard without `output_dir`.
    """
    shard = shard or Shard()
    splits = {"test": test} | ({"validation": validation} if validation else {})
    check(pipelines, splits, output_dir, shard)
    methods = [as_method(name, pipeline, call_kwargs or {}) for name, pipeline in pipelines.items()]
    folder = None if output_dir is None else Path(output_dir) / "maps"
    predictions = {
        method.name: {
            name: predict(
                method,
                split.images,
                folder=folder,
                batch_size=batch_size,
                seed=SEED,
                progress=progress,
                desc=f"{method.name}, {name}",
                shard=shard,
            )
            for name, split in splits.items()
        }
        for method in methods
    }
    if not process_state().is_main_process or not shard.is_all:
        return None

    summary: dict[str, Any] = {"rows": {}, "thresholds": {}, "cutoffs": {}, **counts(test)}
    tables = []
    candidates = THRESHOLDS if validation else (None,)
    for name, method in {**{m.name: m for m in methods}, CENTRE: None}.items():
        table, thresholds, cutoffs = measure_method(name, method, predictions.get(name), splits, candidates, progress)
        regions = {region: table[table.region == region] for region in REGIONS}
        summary["rows"][name] = {region: numbers(own, n_bootstrap) for region, own in regions.items()}
        summary["thresholds"][name], summary["cutoffs"][name] = thresholds, cutoffs
        tables.append(table.assign(method=name))
        if output_dir is not None and method:
            maps = maps_of(method, test, predictions[name]["test"])
            write_predictions(maps, test, thresholds, Path(output_dir) / safe_name(name), progress, name)
    described = {method.name: describe_method(method) for method in methods}
    summary["settings"] = {"cxr_diffusers": __version__, "methods": described, "n_bootstrap": n_bootstrap, "seed": SEED}
    if output_dir is not None:
        write(summary, pd.concat(tables), Path(output_dir))
        write_sheet(methods, test, predictions, Path(output_dir) / "contact_sheet.png")
    return summary


def measure_method(
    name: str,
    method: Method | None,
    predictions: Mapping[str, Predictions] | None,
    splits: Mapping[str, Segmented],
    candidates: Sequence[float | None],
    progress: bool,
) -> tuple[pd.DataFrame, dict[str, Any], dict[str, Any]]:
    """Measure one method, or the centre prior (`method` None): (`image_rows`, thresholds, cutoffs) by region."""
    records = {
        split: measure(
            maps_of(method, data, predictions[split] if predictions else None),
            data,
            candidates,
            progress,
            f"{name}, {split}",
        )
        for split, data in splits.items()
    }
    thresholds: dict[str, Any] = dict.fromkeys(REGIONS)
    cutoffs: dict[str, Any] = dict.fromkeys(REGIONS)
    if "validation" in records:
        thresholds = best_thresholds(records["validation"])
        cutoffs = best_cutoffs(records["validation"], thresholds) if method else cutoffs
    return image_rows(records["test"], candidates, thresholds, cutoffs), thresholds, cutoffs


def write(summary: Mapping[str, Any], per_image: pd.DataFrame, folder: Path) -> None:
    """Write the tables of `output_dir`."""
    write_file(folder / "per_image.csv", per_image.to_csv(index=False).encode())
    write_file(folder / "summary.json", json.dumps(plain(summary), indent=2, allow_nan=False).encode())
    write_file(folder / "summary.md", chexlocalize_table(summary).encode())


def check(
    pipelines: Mapping[str, Any], splits: Mapping[str, Segmented], output_dir: Path | str | None, shard: Shard
) -> None:
    """Check the arguments before hours of inference; errors as in `evaluate_chexlocalize`."""
    if not pipelines or CENTRE in pipelines:
        raise ValueError(f"expected at least one method, none of them named {CENTRE!r}, got {list(pipelines)}")
    folders = [safe_name(name) for name in pipelines]
    if len(set(folders)) < len(folders) or {"maps", "", ".", ".."} & set(folders):
        raise ValueError(f"expected methods whose names are folders of their own, got {list(pipelines)}")
    if output_dir is None and (process_state().num_processes > 1 or not shard.is_all):
        raise ValueError("expected `output_dir` with several processes or a shard, which keep their results there")
    patients = [{cxr_id(path).split("_")[0] for path in split.images["path"]} for split in splits.values()]
    both = sorted(set.intersection(*patients)) if len(patients) > 1 else []
    if both:
        raise ValueError(f"expected other patients in the validation split, got {len(both)} in both, {both[0]} one")


def counts(test: Segmented) -> dict[str, Any]:
    """How many images there are, with segmentations, and with each region."""
    entries = test.segmentations.values()
    with_region = {region: sum(area(entry, tasks) > 0 for entry in entries) for region, tasks in REGIONS.items()}
    return {"n_images": len(test.images), "n_segmented": len(test.segmentations), "n_with": with_region}


def maps_of(method: Method | None, split: Segmented, predictions: Predictions | None) -> Maps:
    """Yield (cxr_id, (H, W) map at the image's own resolution, score) of each image.

    Without a method or predictions: the centre prior, whose score is NaN.

    Raises:
        ValueError: an image of another size than its segmentation.
    """
    for i, row in enumerate(split.images):
        height, width = height_and_width(row["image"])
        size = split.segmentations.get(cxr_id(row["path"]), {"": {"size": [height, width]}})
        expected = next(iter(size.values()))["size"]
        if [height, width] != list(expected):
            raise ValueError(
                f"expected an image of its segmentation's size {list(expected)}, got {[height, width]}: {row['path']}"
            )
        if method is None or predictions is None:
            yield cxr_id(row["path"]), resample(centre_prior(), height, width), np.nan
        else:
            prediction = predictions[i]
            anomaly_map = method.restore(prediction["anomaly_map"], full_size(height, width))
            yield cxr_id(row["path"]), anomaly_map, float(prediction["score"])


def full_size(height: int, width: int) -> dict[str, Any]:
    """The row of `Method.restore` for an image that is measured at its own size."""
    return {"height": height, "width": width, "full_size": (height, width)}


def stretch(anomaly_map: np.ndarray) -> np.ndarray:
    """A map stretched to its own minimum and maximum; zeros for a constant map, so that no threshold marks anything."""
    low, high = anomaly_map.min(), anomaly_map.max()
    return (anomaly_map - low) / (high - low) if high > low else np.zeros_like(anomaly_map)


def binarise(stretched: np.ndarray, threshold: float | None) -> np.ndarray:
    """A stretched map -> (H, W) booleans; `threshold` None: Otsu's, with holes filled and single pixels dropped."""
    if threshold is not None:
        return stretched > threshold
    from skimage.filters import threshold_otsu

    levels = (255 * stretched).astype(np.uint8)
    if levels.max() == 0:
        return np.zeros(levels.shape, bool)
    # as their script, which fills the contours of the mask; a contour of one point has no area
    return drop_small(ndimage.binary_fill_holes(levels > threshold_otsu(levels)), 2)


def representative_point(anomaly_map: np.ndarray) -> tuple[Any, ...]:
    """(row, column) of the maximum, the first one where several share it."""
    return np.unravel_index(np.argmax(anomaly_map), anomaly_map.shape)


def measure(
    maps: Maps, split: Segmented, thresholds: Sequence[float | None], progress: bool, desc: str
) -> list[Record]:
    """A dict for each image: id, covered (whether it has an entry), score, and pixel counts.

    marked: (K,) pixels above each threshold; and of each region, true: its pixels, both: (K,) those of it that are
    marked, hit: 1 or 0 (NaN without a pixel).
    """
    records = []
    for name, anomaly_map, score in tqdm(maps, desc, total=len(split.images), disable=not progress, unit="image"):
        entry, stretched = split.segmentations.get(name), stretch(anomaly_map)
        # thresholds rise, so each pixel is above so many of them: one count for all
        level = sum((binarise(stretched, t).astype(np.uint8) for t in thresholds), np.zeros(stretched.shape, np.uint8))
        point = representative_point(anomaly_map)
        record: Record = {"id": name, "covered": entry is not None, "score": score, "true": {}, "both": {}, "hit": {}}
        record["marked"] = above(level, len(thresholds))
        for region, tasks in REGIONS.items():
            record["true"][region], record["both"][region] = 0, 0 * record["marked"]
            record["hit"][region] = np.nan
            if entry is not None and area(entry, tasks) > 0:
                truth = decode(entry, tasks)
                record["true"][region] = int(truth.sum())
                record["both"][region] = above(level[truth], len(thresholds))
                record["hit"][region] = float(truth[point])
        records.append(record)
    return records


def above(level: np.ndarray, n: int) -> np.ndarray:
    """(n,) number of pixels above each threshold; `level`: the number of thresholds below each pixel."""
    return np.bincount(level.ravel(), minlength=n + 1)[::-1].cumsum()[::-1][1:]


def ious(records: Sequence[Record], region: str, full: bool = False) -> np.ndarray:
    """(N, K) IoU of each image at each threshold.

    Not `full`: NaN where either the truth or the segmentation is empty. `full`: NaN only where both are.
    """
    marked = np.array([r["marked"] for r in records], np.float64)
    true = np.array([r["true"][region] for r in records], np.float64)[:, None]
    both = np.array([r["both"][region] for r in records], np.float64)
    union = marked + true - both
    defined = (union > 0) if full else (marked > 0) & (true > 0)
    return np.divide(both, union, out=np.full(union.shape, np.nan), where=defined)


def best_thresholds(validation: Sequence[Record]) -> dict[str, float]:
    """{region: the threshold with the best mean IoU over its validation images}; the lowest of equal ones."""
    covered = [record for record in validation if record["covered"]]
    best: dict[str, float] = {}
    for region in (ANY, *TASKS):
        means = mean(ious(covered, region))
        defined = np.isfinite(means).any()
        best[region] = THRESHOLDS[int(np.nanargmax(means))] if defined else best.get(ANY, THRESHOLDS[0])
    return {region: best[region] for region in REGIONS}


def best_cutoffs(validation: Sequence[Record], thresholds: Mapping[str, float]) -> dict[str, float]:
    """{region: the score under which nothing is marked}: best for the mean IoU over all validation images."""
    scores = np.array([record["score"] for record in validation])
    candidates = np.quantile(scores, CUTOFFS)
    best = {}
    for region, threshold in thresholds.items():
        full = ious(validation, region, full=True)[:, THRESHOLDS.index(threshold)]
        means = np.array([mean(emptied(full, validation, region, scores < cutoff)) for cutoff in candidates])
        defined = np.isfinite(means).any()
        best[region] = float(candidates[int(np.nanargmax(means)) if defined else 0])
    return best


def emptied(full: np.ndarray, records: Sequence[Record], region: str, empty: np.ndarray) -> np.ndarray:
    """The IoU of the full set where some images' segmentations are empty: 0 with a mask, NaN without."""
    true = np.array([record["true"][region] > 0 for record in records])
    return np.where(empty, np.where(true, 0.0, np.nan), full)


def image_rows(
    records: Sequence[Record],
    candidates: Sequence[float | None],
    thresholds: Mapping[str, float | None],
    cutoffs: Mapping[str, float | None],
) -> pd.DataFrame:
    """A row for each image and region, sorted: cxr_id, region, covered, score, iou, iou_full, iou_full_cutoff, hit."""
    records = sorted(records, key=lambda record: record["id"])
    scores = np.array([record["score"] for record in records])
    tables = []
    for region, threshold in thresholds.items():
        column = candidates.index(threshold)
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


def numbers(table: pd.DataFrame, n_bootstrap: int) -> dict[str, dict[str, float]]:
    """{metric: {value, low, high, bootstrap_mean}} of one region."""
    measured = {}
    for metric, (column, _) in NUMBERS.items():
        # images without an entry belong to the full set only
        values = (table if "full" in metric else table[table.covered])[column].to_numpy(np.float64)
        measured[metric] = {"value": float(mean(values)), **bootstrap(values, n_bootstrap)}
    return measured


def bootstrap(values: np.ndarray, n: int) -> dict[str, float]:
    """The interval of a mean as in their script: of 1,000 sorted replicates the 25th and the 975th."""
    draw = np.random.RandomState(SEED)  # NumPy's legacy generator, as in their script
    replicates = np.sort([mean(values[draw.choice(len(values), len(values))]) for _ in range(n)])
    low, high = (max(int(share * n) - 1, 0) for share in (0.05 / 2, 1 - 0.05 / 2))
    return {"low": replicates[low], "high": replicates[high], "bootstrap_mean": float(mean(replicates))}


def mean(values: np.ndarray) -> np.ndarray:
    """The mean of the defined values along the first axis; NaN where there is none."""
    defined = np.isfinite(values)
    count = defined.sum(0)
    total = np.where(defined, values, 0.0).sum(0)
    return np.divide(total, count, out=np.full(np.shape(count), np.nan), where=count > 0)


def write_predictions(
    maps: Maps,
    split: Segmented,
    thresholds: Mapping[str, float | None],
    folder: Path,
    progress: bool,
    name: str,
) -> None:
    """Write segmentations.json and points.json, which CheXlocalize's own `eval.py` reads."""
    segmentations, points = {}, {}
    for image, anomaly_map, _ in tqdm(maps, f"{name}, write", total=len(split.images), disable=not progress):
        stretched = stretch(anomaly_map)
        masks = {t: encode(binarise(stretched, t)) for t in {thresholds[task] for task in TASKS}}
        row, column = map(int, representative_point(anomaly_map))
        segmentations[image] = {task: masks[thresholds[task]] for task in TASKS}
        points[image] = {task: [[column, row]] for task in TASKS}
    write_file(folder / "segmentations.json", json.dumps(segmentations).encode())
    write_file(folder / "points.json", json.dumps(points).encode())


def write_sheet(
    methods: Sequence[Method],
    test: Segmented,
    predictions: Mapping[str, Mapping[str, Predictions]],
    path: Path,
) -> None:
    """Write the contact sheet: the first image of eight patients with `ANY`, evenly over the data set.

    Without such a patient there is none; that of an earlier run is deleted.
    """
    first_images: dict[str, int] = {}
    for i, image_path in enumerate(test.images["path"]):
        entry = test.segmentations.get(cxr_id(image_path))
        if entry and area(entry, PATHOLOGIES):
            first_images.setdefault(cxr_id(image_path).split("_")[0], i)
    if not first_images:
        path.unlink(missing_ok=True)
        return
    patients, rows = list(first_images), []
    for k in np.linspace(0, len(patients) - 1, min(SHEET_ROWS, len(patients))).round().astype(int):
        i = first_images[patients[k]]
        image = test.images[i]["image"]
        size = full_size(*height_and_width(image))
        maps = {m.name: m.restore(predictions[m.name]["test"][i]["anomaly_map"], size) for m in methods}
        truth = decode(test.segmentations[cxr_id(test.images[i]["path"])], PATHOLOGIES)
        rows.append({"image": image, "mask": truth, "maps": maps, "title": patients[k]})
    title = f"{len(rows)} of {len(first_images)} patients with {ANY}, evenly over the data set"
    save_png(contact_sheet(rows, [method.name for method in methods], title=title), path)


def chexlocalize_table(summary: Mapping[str, Any]) -> str:
    """Markdown: a table for each method, a row for each pathology, "value [low, high]"."""
    lines = [
        f"{summary['n_images']} images, {summary['n_segmented']} of them with segmentations. Brackets: 95 % bootstrap "
        f"intervals over images, {summary['settings']['n_bootstrap']} replicates.\n"
    ]
    for name, rows in summary["rows"].items():
        columns = {k: h for k, (_, h) in NUMBERS.items() if any(is_number(row[k]["value"]) for row in rows.values())}
        labelled = {
            f"{region} ({summary['n_with'][region]}; {summary['thresholds'][name][region] or 'Otsu'})": row
            for region, row in rows.items()
        }
        lines += [f"### {name}\n", markdown("pathology (images; threshold)", labelled, columns)]
    return "\n".join(lines)
