"""Methods and controls on one data set: from the arguments to the summary."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..data.rows import column_of
from ..files import remove_dead
from ..fingerprints import changed_settings
from ..processes import Shard, process_state
from ..version import __version__
from . import metrics, statistics
from .controls import Maps, controls, grey_images, image_controls, image_score, is_control, lung_gates
from .counterfactuals import counterfactual_level, joined
from .grid import RESOLUTION, check_resolution
from .judge import check_judge, name_of
from .lazy import Lazy, stored
from .masks import healthy_threshold
from .predictions import Method, predict
from .report import sheet_rows, write
from .statistics import Measured, Table
from .tables import counts, describe_method, image_table
from .truth import INTERNAL, ImageSet, has_region, open_images


@dataclass
class Evaluation:
    """The results of `compare`.

    Attributes:
        per_image: a row for each image and method: path, patient, label, view, part ("dataset" | "healthy"), score,
            pixel_ap, pixel_auroc, dice, iou, hit, prevalence, psnr_outside, ssim_outside, seconds, and with a judge
            p_healthy, p_healthy_counterfactual and flipped. Undefined values are NaN.
        summary: settings, counts, `rows` {name: {metric: {value, low, high, undefined}}}, `differences` (paired,
            "a - b"), `strata` and `counterfactuals`, as in summary.json.
        rankings: {name: `metrics.Ranking`} of all pixels pooled, for curves.
    """

    per_image: pd.DataFrame
    summary: dict[str, Any]
    rankings: dict[str, metrics.Ranking]


def compare(
    pipelines: Mapping[str, Any],
    dataset: Any,
    *,
    healthy: Any = None,
    output_dir: Path | str | None = None,
    batch_size: int = 8,
    n_bootstrap: int = 1000,
    seed: int = 0,
    call_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    smoothing: float = 0.0,
    quantile: float = 0.99,
    strata: Sequence[str] = (),
    judge: Any = None,
    maps_dir: Path | str | None = None,
    lung_segmenter: Any = None,
    resolution: int = RESOLUTION,
    shard: Shard | None = None,
) -> Evaluation | None:
    """Several methods in one table, with the paired difference of the first to each other one.

    Maps are compared with the truth at each image's own resolution (at `resolution`, if it has more), so pipelines of
    different sizes are comparable. Pixel metrics are over the images with a true region (`mask`, else the union of
    `boxes`); image metrics are over all images, label 0 against the rest, with `healthy` among the 0. Intervals are
    95 % bootstrap intervals over patients (an image without a patient is its own). The controls are in the same table,
    and each difference method - control is over the same replicates:

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

    Images that cannot be read, or of a single value, are left out: the log and the summary (`failed`, `n_failed`) name
    them. An image labelled healthy that has a true region counts for the pixels alone (`n_contradicted`); in `healthy`
    it is left out, too.

    Pixel sensitivity and specificity are pooled over the pixels, at the same threshold as Dice. Image sensitivity and
    specificity are those of scores above the 95 % quantile of the healthy images' scores, over the data set's own
    images; without `healthy` they are left out. A pipeline whose model is conditioned on the view is told the view of
    each image where the data set has it (`view`), and none where it is unknown.

    "Dice" and "IoU" are per-image means at one threshold for the whole set. A control's threshold marks as many pixels
    as the (first) method's does. "best Dice" and everything else need no threshold.

    Under `accelerate launch` each process takes its share of the rows (place the pipeline on its device first), and
    `output_dir` must be given. Started again, it resumes: `maps/` holds a file for each image, named by image, weights,
    settings and seed. A pipeline without diffusers components or torch weights has no such name, so its maps are
    computed anew. Maps are read from these files one at a time: beyond 1 GB, memory grows by a bit a pixel for the
    true regions, and by 0.1 MB an image (see `metrics.Ranking`). Without `output_dir` all predictions stay in memory.

    Args:
        pipelines: {name: pipeline} or {name: (pipeline, call_kwargs)}, the latter over the common `call_kwargs`; a
            pipeline is anything that answers `pipeline(list of PIL images, output_type="np")` with an `AnomalyOutput`.
        dataset: rows with `image` and, if known, `label` (0 healthy), `patient`, `view`, `path`, `mask`, `boxes`.
        healthy: rows of healthy VALIDATION images, with label 0 or without a label: their maps' `quantile` is the
            threshold. Without them it is the pipeline's own `config.map_threshold`; without that, and with `smoothing`
            or other settings than the pipeline's own, Dice and IoU are not defined.
        output_dir: folder for per_image.csv, summary.json, summary.md, contact_sheet.png, precision_recall.png,
            roc.png and maps/; None writes nothing.
        batch_size: images a call.
        n_bootstrap: replicates.
        seed: of the bootstrap, of the random map, and of the generator handed to the pipeline for each image; not to
            one with `has_fixed_noise`, whose scores are then those of `detect`.
        call_kwargs: further arguments of the call, e.g. {"guidance_scale": 4}.
        progress: show bars.
        smoothing: sigma of a Gaussian over every map, as a fraction of the image's shorter side (0.01 is 2.6 pixels
            of 256); 0: none.
        quantile: of the healthy maps' pixels.
        strata: names of further columns to split by. `view` is split by itself where there are both AP and PA.
        judge: an image classifier that had no part in making the counterfactuals, as a pipeline (`GradCAMPipeline`,
            `load_pipeline("cxr_grad_cam_128")`): it says how many of them it calls healthy, and its features how far
            they are from healthy images; see `counterfactuals.counterfactual_level`. Its class 0 is healthy.
            None: no such metrics.
        maps_dir: where the predictions are kept; None: maps/ of `output_dir`. Evaluations may share one.
        lung_segmenter: a `LungSegmenter`, which gives the controls with the lung gate; None: without them.
        resolution: the shorter side, in pixels, at which larger images are measured. A pixel of this coarser grid has
            the truth at its centre, and maps, counterfactuals, controls and lung gates are resampled to the grid; the
            pipelines get the whole image. 0: all images at their full size, which takes longer.
        shard: the share of the images to predict, without the tables; None: all of them, and the tables. See `Shard`.

    Returns:
        `Evaluation`; None in a shard, and in all processes but the main one.

    Raises:
        ValueError: an empty data set, an unknown stratum, rows in `healthy` that are not healthy, an invalid
            `resolution`, a mask of another size than its image, no image with contrast, a judge without an image
            classifier, or several processes or a shard without `output_dir`.
    """
    healthy = healthy or []
    shard = shard or Shard()
    check(pipelines, dataset, healthy, output_dir, strata, shard, resolution)
    check_judge(judge)
    if lung_segmenter is not None and not hasattr(lung_segmenter, "field"):
        raise ValueError(f"expected a LungSegmenter as `lung_segmenter`, got {lung_segmenter!r}")
    folder = maps_dir or (output_dir and Path(output_dir) / "maps")
    comparison = Comparison(
        [as_method(name, pipeline, call_kwargs or {}) for name, pipeline in pipelines.items()],
        open_images(dataset, strata, resolution),
        open_images(healthy, resolution=resolution, healthy=True),
        resolution=resolution,
        n_bootstrap=n_bootstrap,
        seed=seed,
        smoothing=smoothing,
        quantile=quantile,
        strata=strata,
        judge=judge,
        lung_segmenter=lung_segmenter,
        progress=progress,
        folder=Path(folder) if folder else None,
    )
    for place in (output_dir, folder):
        if place and process_state().is_main_process:
            remove_dead(place)
    comparison.predict(batch_size, shard)
    if not process_state().is_main_process or not shard.is_all:
        return None
    result = comparison.evaluate()
    if output_dir is not None:
        write(result, Path(output_dir), comparison.sheet_rows())
    return result


def evaluate(pipeline: Any, dataset: Any, *, name: str = "method", **options: Any) -> Evaluation | None:
    """Evaluate one pipeline: `compare` with one method, called `name`, and the same options, result and errors."""
    return compare({name: pipeline}, dataset, **options)


@dataclass
class Comparison:
    """Methods on one data set: `predict`, then `evaluate`; attributes as the arguments of `compare`."""

    methods: list[Method]
    images: ImageSet
    healthy: ImageSet
    resolution: int
    n_bootstrap: int
    seed: int
    smoothing: float
    quantile: float
    strata: Sequence[str]
    judge: Any
    lung_segmenter: Any
    progress: bool
    folder: Path | None

    def predict(self, batch_size: int, shard: Shard) -> None:
        """Run every method on the shard's images, nearly all of the work; predictions are kept in `folder`."""
        run: dict[str, Any] = dict(folder=self.folder, batch_size=batch_size, seed=self.seed, progress=self.progress)
        run |= dict(shard=shard)
        for method in self.methods:
            for part, desc in ((self.images, method.name), (self.healthy, f"{method.name}, healthy")):
                part.predictions[method.name] = predict(method, part.dataset, desc=desc, **run)

    def evaluate(self) -> Evaluation:
        """Measure the predictions of all methods, and the controls."""
        for method in self.methods:
            method.threshold = self.threshold_of(method)
        images = self.stored_images(self.images, "read images")
        healthy = self.stored_images(self.healthy, "read healthy images")
        with images as grey, healthy as healthy_grey:
            return self.evaluate_with(grey, healthy_grey)

    def stored_images(self, part: ImageSet, desc: str) -> AbstractContextManager[Maps]:
        """The `grey_images` of a part, read once where `lazy.stored` can store them."""
        shapes = [(row["height"], row["width"]) for row in part.rows]
        shown = desc if self.progress and part.rows else None
        return stored(grey_images(part.dataset, part.rows), shapes, self.folder, shown)

    def evaluate_with(self, grey: Maps, healthy_grey: Maps) -> Evaluation:
        """`evaluate`, with the `grey_images` of the data set and of the healthy images."""
        gates = lung_gates(self.lung_segmenter, grey)
        image_maps = image_controls(grey, gates, self.smoothing)
        maps = self.maps_with_region(image_maps, gates)
        rows = [self.images.rows[i] for i in self.with_region]
        strata = statistics.strata_of(rows, self.strata)
        weights = statistics.replicate_weights(rows, self.n_bootstrap, self.seed) if rows else np.ones((1, 0))
        measured: dict[str, Measured] = {}
        if rows:
            measured = statistics.measure(maps, rows, self.methods, weights, strata, self.folder, self.progress)
        pixels = statistics.as_table({name: each.samples for name, each in measured.items()}, weights)
        scores = self.scores(image_maps, healthy_grey)
        per_image = self.image_table(measured)
        quality = self.counterfactual_level(per_image)  # adds columns to the table
        summary = {
            "settings": self.settings(scores),
            **counts(self.images, self.healthy),
            "seconds_per_image": {
                m.name: float(np.mean(self.images.predictions[m.name].numbers("seconds"))) for m in self.methods
            },
            **self.intervals(pixels, scores, list(maps)),
            "strata": statistics.stratified(measured, rows, [m.name for m in self.methods], weights, strata),
            "counterfactuals": quality,
            # an infinite PSNR (of an image that is kept exactly) does not count in the mean either
            "undefined": {c: int(n) for c, n in (~np.isfinite(per_image.select_dtypes("number"))).sum().items() if n},
        }
        summary["method"] = summary["rows"].get(self.methods[0].name, {})
        return Evaluation(per_image, summary, {name: each.ranking for name, each in measured.items()})

    @property
    def with_region(self) -> list[int]:
        """Indices of the images with a true region."""
        return [i for i, row in enumerate(self.images.rows) if has_region(row)]

    def threshold_of(self, method: Method) -> float | None:
        """From the healthy images, else the pipeline's own, which holds for its own settings; None without either."""
        if not self.healthy.rows:
            changed = self.smoothing or changed_settings(method.pipeline, method.call_kwargs)
            return None if changed else method.option("map_threshold")
        predictions = self.healthy.predictions[method.name]
        return healthy_threshold(method.maps(predictions, self.healthy.rows, self.smoothing), self.quantile)

    def method_maps(self) -> dict[str, Maps]:
        """{method: maps} of the images with a true region."""
        images = self.images
        return {
            m.name: m.maps(images.predictions[m.name], images.rows, self.smoothing).at(self.with_region)
            for m in self.methods
        }

    def maps_with_region(self, image_maps: Mapping[str, Maps], gates: np.ndarray | None) -> dict[str, Maps]:
        """{name: maps} of methods and controls, of the images with a true region."""
        chosen, maps = self.with_region, self.method_maps()
        rows = [self.images.rows[i] for i in chosen]
        own_image_maps = {name: each.at(chosen) for name, each in image_maps.items()}
        own_gates = None if gates is None else gates[chosen]
        return maps | controls(maps, rows, own_image_maps, own_gates, self.seed, self.smoothing)

    def scores(self, image_maps: Mapping[str, Maps], healthy_grey: Maps) -> dict[str, list[float]]:
        """{name: scores of the data set's images, then of the healthy ones} of methods and image controls."""
        parts = (self.images, self.healthy)
        scores = {
            m.name: [score for part in parts for score in part.predictions[m.name].numbers("score")]
            for m in self.methods
        }
        healthy_maps = image_controls(healthy_grey, lung_gates(self.lung_segmenter, healthy_grey), self.smoothing)
        for name in tqdm(image_maps, "scores of controls", disable=not self.progress):
            scores[name] = [image_score(m) for each in (image_maps, healthy_maps) for m in each[name]]
        return scores

    def intervals(self, pixels: Table, scores: Mapping[str, list[float]], names: Sequence[str]) -> dict[str, Any]:
        """The sections `rows`, `differences` and `image_level_by_view` of the summary."""
        rows = self.images.rows
        bootstrap = self.n_bootstrap, self.seed
        everything = rows + self.healthy.rows
        thresholds = statistics.score_thresholds(scores, len(rows))
        tables = [
            pixels,
            statistics.image_level(scores, everything, *bootstrap),
            statistics.image_rates(scores, rows, thresholds, *bootstrap),
        ]
        return {
            "rows": statistics.intervals(tables),
            "differences": statistics.differences(tables, [method.name for method in self.methods], names),
            "image_level_by_view": statistics.image_level_by_view(scores, everything, *bootstrap),
        }

    def image_table(self, measured: Mapping[str, Measured]) -> pd.DataFrame:
        """The table `per_image`, without the judge's columns."""
        tables = []
        for method in self.methods:
            per_image = measured[method.name].per_image if measured else []
            by_index = dict(zip(self.with_region, per_image, strict=True))
            tables.append(image_table(method, self.images, self.healthy, by_index, self.progress))
        return pd.concat(tables, ignore_index=True)

    def counterfactual_level(self, per_image: pd.DataFrame) -> dict[str, Any]:
        """The section `counterfactuals` of the summary; adds the judge's columns to `per_image`."""
        return counterfactual_level(
            {m.name: m.pipeline for m in self.methods},
            {m.name: joined(*(part.predictions[m.name] for part in (self.images, self.healthy))) for m in self.methods},
            self.images.rows,
            self.healthy.rows,
            per_image,
            judge=self.judge,
            n_bootstrap=self.n_bootstrap,
            seed=self.seed,
            progress=self.progress,
        )

    def settings(self, scores: Mapping[str, list[float]]) -> dict[str, Any]:
        """The section `settings` of the summary."""
        return {
            "cxr_diffusers": __version__,
            "methods": {method.name: describe_method(method) for method in self.methods},
            "threshold": {method.name: method.threshold for method in self.methods},
            "threshold_from": f"{self.quantile} quantile of healthy maps"
            if self.healthy.rows
            else "config.map_threshold",
            "score_threshold": statistics.score_thresholds(scores, len(self.images.rows)),
            "smoothing": self.smoothing,
            "resolution": self.resolution,
            "n_bootstrap": self.n_bootstrap,
            "seed": self.seed,
            "judge": name_of(self.judge),
            "lung_segmenter": name_of(self.lung_segmenter),
        }

    def sheet_rows(self) -> list[dict[str, Any]]:
        """Rows of the contact sheet, see `report.sheet_rows`."""
        chosen = self.with_region
        rows = [self.images.rows[i] for i in chosen]
        return sheet_rows(Lazy(len(chosen), lambda k: self.images.dataset[chosen[k]]), rows, self.method_maps())


def check(
    pipelines: Mapping[str, Any],
    dataset: Any,
    healthy: Any,
    output_dir: Path | str | None,
    strata: Sequence[str],
    shard: Shard,
    resolution: int,
) -> None:
    """Check the arguments before hours of inference; errors as in `compare`."""
    controls = [name for name in pipelines if is_control(name)]
    if controls or not pipelines:
        raise ValueError(f"expected at least one method, not named as a control is, got {controls or 'none'}")
    if len(dataset) == 0:
        raise ValueError("expected a data set with at least one row, got none")
    check_resolution(resolution)
    if output_dir is None and (process_state().num_processes > 1 or not shard.is_all):
        raise ValueError("expected `output_dir` with several processes or a shard, which keep their results there")
    columns = getattr(dataset, "column_names", None) or dataset[0]
    reserved = {*INTERNAL, "label", "method", "part"}  # of the tables
    unknown = [s for s in strata if s not in columns or s in reserved]
    if unknown:
        free = sorted(set(columns) - reserved)
        raise ValueError(f"expected `strata` among the columns {free}, got {unknown}")
    labels = set(column_of(healthy, "label")) - {0, -1, None}  # without a label: healthy by the user's word
    if labels:
        raise ValueError(f"expected healthy rows (label 0) in `healthy`, got labels {sorted(labels)}")


def as_method(name: str, pipeline: Any, common: Mapping[str, Any]) -> Method:
    """A `Method` of a pipeline, or of (pipeline, call_kwargs), the latter over the common ones."""
    pipeline, own = pipeline if isinstance(pipeline, tuple) else (pipeline, {})
    return Method(name, pipeline, {**common, **own})
