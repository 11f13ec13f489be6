"""Methods and controls on one data set: from the arguments to the summary."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..processes import process_state
from ..version import __version__
from .answers import Method, detect
from .controls import controls, image_controls, image_score, is_control, lung_gates
from .counterfactuals import counterfactual_level
from .judge import check_judge, name_of
from .report import sheet_rows, write
from .statistics import (
    differences,
    equal_thresholds,
    image_level,
    image_level_by_view,
    image_rates,
    intervals,
    measure,
    pixel_level,
    score_thresholds,
    stratified,
    threshold_of,
)
from .tables import counts, describe_method, image_table
from .truth import describe


@dataclass
class Evaluation:
    """What `evaluate` found.

    per_image: a row per image and method: path, patient, label, view, part ("dataset" | "healthy"), score, pixel_ap,
        pixel_auroc, dice, iou, hit, prevalence, psnr_outside, ssim_outside, seconds, and with a judge p_healthy,
        p_healthy_counterfactual and flipped. What is not defined is NaN.
    summary: settings, counts, `rows` {name: {number: {value, low, high, undefined}}}, `differences` (paired, "a - b"),
        `strata` and `counterfactuals`, as they stand in summary.json.
    rankings: {name: `metrics.Ranking`} of the pixels, for curves.
    """

    per_image: pd.DataFrame
    summary: dict
    rankings: dict


def compare(
    pipelines,
    dataset,
    *,
    healthy=None,
    output_dir=None,
    batch_size=8,
    n_bootstrap=1000,
    seed=0,
    call_kwargs=None,
    progress=True,
    smoothing=0.0,
    quantile=0.99,
    strata=(),
    judge=None,
    maps_dir=None,
    lung_segmenter=None,
):
    """Several methods in one table, with the paired difference of the first to each other one.

    Maps are compared with the truth at each picture's own resolution, so pipelines of different sizes are comparable.
    Pixel numbers are over the images with a true region (`mask`, else the union of `boxes`); image numbers are over all
    images, label 0 against the rest, with `healthy` among the 0. Intervals are 95 % bootstrap intervals over patients
    (an image without a patient is its own). The controls are in the same table, and each difference method - control
    is over the same replicates:

        chance           a constant map: the share of positive pixels
        random map       uniform noise
        centre prior     a Gaussian in the middle, sigma a quarter of each side
        mean map         the mean of the method's own maps, the same for every image
        location prior   the mean of the OTHER patients' true regions, smoothed: where lesions tend to be
        |x - blurred x|  local detail, without a model

    With a `lung_segmenter` its soft lung gate joins them, alone and as a factor, and none of these knows disease:

        lung gate          1 in the lungs, 0 far from them
        mean map x gate, location prior x gate
        brightness x gate  the image stretched to [0, 1], smoothed by a Gaussian of 2/64 of the shorter side
        mirror x gate      likewise max(0, image - its left-right mirror image): brighter than the other lung

    Pixel sensitivity and specificity are pooled over the pixels, at the same threshold as Dice. Image sensitivity and
    specificity are those of scores above the 95 % quantile of the healthy images' scores, over the data set's own
    images; without `healthy` they are left out. A pipeline whose model is conditioned on the view is told the view of
    each image where the data set has it (`view`), and none where it is unknown.

    "Dice" and "IoU" are per-image means at one threshold for the whole set. A control's threshold marks as many pixels
    as the (first) method's does. "best Dice" and everything else need no threshold.

    Under `accelerate launch` each process takes its share of the rows (place the pipeline on its device first), and
    `output_dir` must be given. Started again, it takes up what lies there: `maps/` holds a file for each picture,
    named by picture, weights, settings and seed. A pipeline without diffusers components or torch weights has no such
    name, so its maps are computed anew.

    Args:
        pipelines: {name: pipeline} or {name: (pipeline, call_kwargs)}, the latter over the common `call_kwargs`; a
            pipeline is anything that answers `pipeline(list of PIL images, output_type="np")` with an `AnomalyOutput`.
        dataset: rows with `image` and, if known, `label` (0 healthy), `patient`, `view`, `path`, `mask`, `boxes`.
        healthy: rows of healthy VALIDATION images: their maps' `quantile` is the threshold. Without them it is the
            pipeline's own `config.map_threshold`; without that, Dice and IoU are not defined.
        output_dir: folder for per_image.csv, summary.json, summary.md, contact_sheet.png, precision_recall.png,
            roc.png and maps/; None writes nothing.
        batch_size: images a call.
        n_bootstrap: replicates.
        seed: of the bootstrap, of the random map, and of the generator handed to the pipeline for each picture.
        call_kwargs: further arguments of the call, e.g. {"guidance_scale": 4}.
        progress: show bars.
        smoothing: sigma of a Gaussian over every map, as a fraction of the picture's shorter side (0.01 is 2.6 pixels
            of 256); 0: none.
        quantile: of the healthy maps' pixels.
        strata: names of further columns to split by. `view` is split by itself where there are both AP and PA.
        judge: an image classifier that had no part in making the counterfactuals, as a pipeline (`GradCAMPipeline`,
            `load_pipeline("cxr_grad_cam_128")`): it says how many of them it calls healthy, and its features how far
            they are from healthy pictures; see `counterfactuals.counterfactual_level`. Its class 0 is healthy.
            None: no such numbers.
        maps_dir: where the answers are kept; None: maps/ of `output_dir`. Evaluations may share one.
        lung_segmenter: a `LungSegmenter`, which gives the controls with the lung gate; None: without them.

    Returns:
        `Evaluation`; None in all processes but the main one.

    Raises:
        ValueError: an empty data set, an unknown stratum, healthy rows that are not, a mask of another size than its
            picture, a judge without an image classifier, or several processes without `output_dir`.
    """
    healthy = healthy or []
    check(pipelines, dataset, healthy, output_dir, strata)
    check_judge(judge)
    if lung_segmenter is not None and not hasattr(lung_segmenter, "field"):
        raise ValueError(f"expected a LungSegmenter as `lung_segmenter`, got {lung_segmenter!r}")
    rows, healthy_rows = describe(dataset, strata), describe(healthy)
    methods = [as_method(name, pipeline, call_kwargs or {}) for name, pipeline in pipelines.items()]

    # 1. pictures -> answers, the hours of it; the rest is the main process's alone
    folder = maps_dir or (output_dir and Path(output_dir) / "maps")
    run = dict(folder=folder and Path(folder), batch_size=batch_size, seed=seed, progress=progress)
    for method in methods:
        method.answers = detect(method, dataset, desc=method.name, **run)
        method.healthy_answers = detect(method, healthy, desc=f"{method.name}, healthy", **run)
    if not process_state().is_main_process:
        return None

    # 2. answers -> maps at the pictures' own resolution, and those of the controls
    for method in methods:
        method.maps = method.restored(method.answers, rows, smoothing)
        method.threshold = threshold_of(method, healthy_rows, quantile, smoothing)
    gates = lung_gates(lung_segmenter, dataset)
    image_maps = image_controls(dataset, gates, smoothing)
    healthy_maps = image_controls(healthy, lung_gates(lung_segmenter, healthy), smoothing)
    found = [i for i, row in enumerate(rows) if row["truth"] is not None and row["truth"].any()]
    seen = [rows[i] for i in found]
    maps = {method.name: method.maps.at(found) for method in methods}
    image_maps_with_truth = {name: image_maps[name].at(found) for name in image_maps}
    maps |= controls(maps, seen, image_maps_with_truth, None if gates is None else gates[found], seed, smoothing)

    # 3. maps -> numbers
    measured = measure(maps, seen, equal_thresholds(maps, methods), progress)
    scores = {m.name: [a["score"] for a in [*m.answers, *m.healthy_answers]] for m in methods}
    for name in image_maps:
        scores[name] = [image_score(m) for part in (image_maps, healthy_maps) for m in part[name]]
    pixels = pixel_level(measured, seen, n_bootstrap, seed)
    score_threshold = score_thresholds(scores, len(rows))
    tables = [
        pixels,
        image_level(scores, rows + healthy_rows, n_bootstrap, seed),
        image_rates(scores, rows, score_threshold, n_bootstrap, seed),
    ]

    # 4. numbers -> tables
    names = [method.name for method in methods]
    per_image = pd.concat(
        [image_table(m, rows, healthy_rows, dict(zip(found, measured[m.name][0], strict=True))) for m in methods],
        ignore_index=True,
    )
    quality = counterfactual_level(
        methods, rows, healthy_rows, per_image, judge=judge, n_bootstrap=n_bootstrap, seed=seed, progress=progress
    )
    summary = {
        "settings": {
            "cxr_diffusers": __version__,
            "methods": {method.name: describe_method(method) for method in methods},
            "threshold": {method.name: method.threshold for method in methods},
            "threshold_from": f"{quantile} quantile of healthy maps" if healthy_rows else "config.map_threshold",
            "score_threshold": score_threshold,
            "smoothing": smoothing,
            "n_bootstrap": n_bootstrap,
            "seed": seed,
            "judge": name_of(judge),
            "lung_segmenter": name_of(lung_segmenter),
        },
        **counts(rows, seen, healthy_rows),
        "seconds_per_image": {m.name: float(np.mean([a["seconds"] for a in m.answers])) for m in methods},
        "rows": intervals(tables),
        "differences": differences(tables, names, list(maps)),
        "image_level_by_view": image_level_by_view(scores, rows + healthy_rows, n_bootstrap, seed),
        "strata": stratified(pixels, seen, strata, list(maps)),
        "counterfactuals": quality,
        "undefined": {c: int(n) for c, n in per_image.select_dtypes("number").isna().sum().items() if n},
    }
    summary["method"] = summary["rows"].get(names[0], {})
    result = Evaluation(per_image, summary, {name: ranking for name, (_, ranking) in measured.items()})
    if output_dir is not None:
        write(result, Path(output_dir), sheet_rows(dataset, seen, found, methods))
    return result


def evaluate(pipeline, dataset, *, name="method", **options):
    """Evaluate one pipeline: `compare` with one method, called `name`, and the same options, result and errors."""
    return compare({name: pipeline}, dataset, **options)


def check(pipelines, dataset, healthy, output_dir, strata):
    """The door: what can be refused before hours of inference."""
    taken = [name for name in pipelines if is_control(name)]
    if taken or not pipelines:
        raise ValueError(f"expected at least one method, not named as a control is, got {taken or 'none'}")
    if len(dataset) == 0:
        raise ValueError("expected a data set with at least one row, got none")
    if process_state().num_processes > 1 and output_dir is None:
        raise ValueError("expected `output_dir` with several processes: they meet in its files")
    unknown = [s for s in strata if s not in dataset[0]]
    if unknown:
        raise ValueError(f"expected `strata` among the columns {sorted(dataset[0])}, got {unknown}")
    labels = {row.get("label") for row in healthy} - {0, None}
    if labels:
        raise ValueError(f"expected healthy rows (label 0) in `healthy`, got labels {sorted(labels)}")


def as_method(name, pipeline, common):
    pipeline, own = pipeline if isinstance(pipeline, tuple) else (pipeline, {})
    return Method(name, pipeline, {**common, **own})
