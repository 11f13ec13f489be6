"""Detection over files and folders: a panel and a map of each image, and a row in results.csv."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.images import height_and_width, is_dicom
from ..fingerprints import changed_settings, fingerprint
from ..processes import Shard, process_state, split_pending
from .detection_folder import DetectionFolder, Outputs, file_stamp
from .dicom_output import Algorithm, DicomOutputError, import_highdicom
from .inputs import Input, find_images, model_channels, read_input
from .out_of_distribution import unlikeness_warnings
from .panels import has_counterfactual
from .reference_scores import ReferenceScores, kept_scores
from .regions import zone_columns
from .thresholds import HEALTHY, parse_threshold
from .trajectory import Trajectory, check_steps

WORKERS = max(2, min(8, os.cpu_count() or 1))  # threads that read, and threads that write


def detect(
    pipeline: Any,
    images: Iterable[Path | str],
    output_dir: Path | str,
    *,
    batch_size: int = 8,
    map_format: str = "png",
    save_counterfactual: bool = False,
    save_trajectory: bool = False,
    vmax: float | None = None,
    threshold: float | str | None = None,
    save_masks: bool = False,
    save_boxes: str | None = None,
    save_panel: bool = True,
    dicom: bool = False,
    call_kwargs: dict | None = None,
    shard: Shard | None = None,
    progress: bool = True,
) -> dict | None:
    """Run an anomaly pipeline over files and folders.

    Files for every image; NAME is made of its path below the input folder:

        NAME.png                  unless `save_panel` is False: input | counterfactual, if any | map over the input
        maps/NAME.png (or .npy)   the raw map at the input's own resolution: 16 bits, value / 65535 (or float32)
        masks/NAME.png            with `save_masks`: 255 where the map is above the threshold, else 0
        labels/NAME.txt           with `save_boxes="yolo"`: boxes of the regions above the threshold, see `write_yolo`
        counterfactuals/NAME.png  with `save_counterfactual`: as the model made it, at its resolution
        counterfactuals/NAME_crisp.png      and the input plus the enlarged change, at the input's resolution
        dicom/NAME_seg.dcm        with `dicom`, of a DICOM file: the map above the threshold as a Segmentation,
        dicom/NAME_overlay.dcm    the panel as a Secondary Capture, and
        dicom/NAME_gsps.dcm       outlines of the Segmentation as a Presentation State; see docs/clinic.md
        trajectories/NAME.webp    with `save_trajectory`: an animation of inversion and decoding, see `Trajectory`
        rows/NAME.json            the row of results.csv; written last, which marks the image as done

    At the end: results.csv, most abnormal first; boxes.json with `save_boxes="coco"` (see `coco_boxes`); and
    failed.csv, if images could not be computed (unreadable, all pixels of one value, no such file). A second call
    resumes, also after kill -9: only files that are new, changed, or failed before are computed. Under
    `accelerate launch` each process takes its share (place the pipeline on its device first).

    Columns of results.csv; a column that does not apply is empty:

        healthy_percentile        percentage of the `healthy_images` with a lower score; only if the model's folder
                                  has scores of healthy images for the same settings (see `ReferenceScores`)
        p_value                   conformal: (1 + number of healthy scores >= this one) / (healthy_images + 1)
        anomaly_score             see `AnomalyOutput`
        zone, zone_share, outside_lungs     where the map lies, if the pipeline has a lung segmenter: see `zone_columns`
        abnormal_fraction         share of the pixels above the threshold; only with `threshold`, or with a threshold
                                  of the model and its own settings, for which that was measured
        map_max, height, width    of the map; of the input
        seconds                   of the model alone
        warnings                  reasons why the map may be meaningless (a lateral view, another body part, colour,
                                  an image unlike the training images)

    Args:
        pipeline: `pipeline(list of PIL images, output_type="np")` returns an `AnomalyOutput`.
        images: files and folders; a folder is searched for png, jpg, bmp, tif, npy and DICOM files, with or without an
            extension; DICOM files without an image (reports, segmentations) are skipped. For a model of four
            channels: folders of MRI slices (see `data.load_brats`), and folders that contain such folders.
        output_dir: created if it does not exist.
        batch_size: images in each call of the pipeline.
        map_format: "png" or "npy".
        save_counterfactual, save_trajectory, save_masks, save_boxes ("coco" or "yolo"), save_panel: see above.
        vmax: the map value of the last colour, in panels and in `dicom`. None: three times the threshold (with other
            settings, the model's), at most 1, so all panels have one scale; without a threshold each panel's own 99.5 %
            quantile.
        threshold: map value in (0, 1) above which a pixel is abnormal; or, as "healthy:0.99", the value that a share
            of 0.99 of the pixels of healthy images stays below: from a calibrated model (see `calibrate_model`), for
            its own settings only. None: the model's `map_threshold`, from healthy images, if the call has the model's
            own settings, else none. Settings of the score or the counterfactual alone may differ.
        dicom: write DICOM objects, too, for those images that are DICOM files.
        call_kwargs: arguments of the pipeline's call.
        shard: the share of the images to compute, without the tables; None: all of them, and the tables. See `Shard`.

    Returns:
        {"images", "computed", "failed": {path: error}, "seconds_per_image" (None if nothing was computed), "skipped":
        {path: reason}, "warnings": {path: text} (none for a shard), "without_dicom": [path]} on the main process, None
        on the others. A shard's summary is that of its own images.

    Raises:
        FileNotFoundError: no such file or folder, or no image in it.
        FileExistsError: `output_dir` holds results of another model or other settings.
        ValueError: `output_dir` is the folder of the images; an unknown `map_format`, a `vmax` of 0 or less, a
            threshold outside (0, 1), a quantile outside the measured range, of a model without quantiles of healthy
            maps, or with other settings than the model's, an unknown `save_boxes`, `save_trajectory` for a pipeline
            without steps, `save_counterfactual` for one without counterfactual, `vmax` without an output that it
            scales; `dicom`, `save_masks` or `save_boxes` without a threshold; `dicom` without any DICOM file.
        OSError: a result cannot be written (disk full, no permission); the same call resumes afterwards.
        ImportError: `dicom`, and highdicom is not installed.
    """
    value, quantile = (None, None) if threshold is None else parse_threshold(threshold)
    if quantile is not None:
        value = healthy_map_value(pipeline, call_kwargs or {}, quantile)
    outputs = Outputs(
        map_format=map_format,
        save_counterfactual=save_counterfactual,
        save_trajectory=save_trajectory,
        save_masks=save_masks,
        save_boxes=save_boxes,
        save_panel=save_panel,
        dicom=dicom,
        threshold=value,
        healthy_quantile=quantile,
        vmax=vmax,
    )
    outputs.complete(pipeline.config.get("map_threshold"), changed_settings(pipeline, call_kwargs or {}))
    if save_trajectory:
        check_steps(pipeline)
    if save_counterfactual and not has_counterfactual(pipeline):
        raise ValueError(f"expected a method with a counterfactual to save, got a {type(pipeline).__name__}")
    call_kwargs, state, shard = dict(call_kwargs or {}), process_state(), shard or Shard()
    named_paths, skipped = find_images(images, Path(output_dir), model_channels(pipeline))
    paths = [path for _, path in named_paths]
    deletes = state.is_main_process and shard.is_all
    folder = open_folder(pipeline, output_dir, outputs, call_kwargs, paths, deletes)
    state.wait_for_everyone()  # results of unknown settings are deleted before any process lists the rows
    done = folder.read_rows()
    files = shard.of(list(folder.name_files(named_paths, done).items()))
    _, share = split_pending(files, lambda file: is_done(done.get(file[0]), file[1]))
    detection = Detection(pipeline, folder, call_kwargs, state)
    rows = detection.run(share, batch_size, progress, tables=shard.is_all)
    return summarise(detection, dict(files), skipped, rows) if state.is_main_process else None


def open_folder(
    pipeline: Any, path: Path | str, outputs: Outputs, call_kwargs: dict, paths: list[Path], may_delete: bool
) -> DetectionFolder:
    """The folder of the results, checked against its earlier settings; see `DetectionFolder` and `dicom_algorithm`.

    Args:
        paths: of the input images.
        may_delete: True in one process; in none of a shard.
    """
    settings = {
        "model": str(pipeline.config.get("_name_or_path") or type(pipeline).__name__),
        "weights": fingerprint(pipeline, {}, 0),
        "call": call_kwargs,
        **outputs.settings(),
    }
    return DetectionFolder(
        path,
        settings,
        pipeline.config,
        algorithm=dicom_algorithm(pipeline, call_kwargs, paths, outputs) if outputs.dicom else None,
        reference=healthy_reference(pipeline, call_kwargs),
        may_delete=may_delete,
    )


def is_done(row: dict | None, path: Path) -> bool:
    """Whether a row belongs to this file as it is now."""
    try:
        return row is not None and row["file"] == file_stamp(path)
    except OSError:  # reading the file will give the reason
        return False


def summarise(detection: "Detection", files: dict[str, Path], skipped: dict[Path, str], rows: list[dict]) -> dict:
    """What `detect` returns. files: {name: path} of all input files. rows: of results.csv."""
    sources = {os.path.realpath(path) for path in files.values()}
    dicom, seconds = detection.folder.settings["dicom"], detection.seconds
    return {
        "images": len(files),
        "computed": len(seconds),
        "failed": detection.failed,
        "seconds_per_image": float(np.mean(seconds)) if seconds else None,
        "skipped": {str(path): reason for path, reason in skipped.items()},
        "warnings": {
            row["image"]: row["warnings"] for row in rows if row.get("warnings") and row["file"][0] in sources
        },
        "without_dicom": [str(path) for path in files.values() if dicom and not is_dicom(path)],
    }


class Detection:
    """The loop over files. Threads read ahead and write behind, so that the network need not wait.

    Args:
        pipeline, call_kwargs: see `detect`.
        folder: of the results.
        state: accelerate's `PartialState` of this process.

    Attributes:
        failed: {path: error}; after `run`, of all processes.
        seconds: of the model, one number an image; after `run`, of all processes.
    """

    def __init__(self, pipeline: Any, folder: DetectionFolder, call_kwargs: dict, state: Any) -> None:
        self.pipeline, self.folder, self.call_kwargs, self.state = pipeline, folder, call_kwargs, state
        self.trajectory = Trajectory() if folder.settings["save_trajectory"] else None
        self.channels = model_channels(pipeline)
        self.failed: dict[str, str] = {}
        self.seconds: list[float] = []

    def run(self, share: list[tuple[str, Path]], batch_size: int, progress: bool, tables: bool) -> list[dict]:
        """Compute [(name, path)], this process's share, and write the tables, also after an error.

        Returns:
            the rows of results.csv on the main process, if it writes `tables`, else [].

        Raises:
            OSError: a result cannot be written.
        """
        main, rows = self.state.is_main_process, []
        with tqdm(total=len(share), desc="detect", unit="image", disable=not (progress and main)) as self.bar:
            try:
                self.process(share, batch_size)
                self.failed = dict(gather_object(list(self.failed.items())))
                self.seconds = gather_object(self.seconds)
            finally:
                if main and tables:
                    rows = self.folder.write_tables(self.failed)
        return rows

    def process(self, files: list[tuple[str, Path]], batch_size: int) -> None:
        """Read, compute and write [(name, path)]."""
        with ThreadPoolExecutor(WORKERS) as readers, ThreadPoolExecutor(WORKERS) as writers:
            writing: deque = deque()
            for batch in in_batches(map_ahead(readers, self.read, files, 2 * batch_size), batch_size):
                for file in batch:
                    if file.error:
                        self.fail(file, file.error)
                writing += self.compute([file for file in batch if not file.error], writers)
                while writing and (len(writing) > 2 * batch_size or writing[0][2].done()):
                    self.finish(*writing.popleft())
            while writing:
                self.finish(*writing.popleft())

    def read(self, name: str, path: Path) -> Input:
        return read_input(name, path, self.channels, self.folder.settings["dicom"])

    def compute(self, batch: list[Input], writers: ThreadPoolExecutor) -> list[tuple[Input, float, Future]]:
        """Run the pipeline over a batch -> [(file, seconds, future of its writing)]."""
        if not batch:
            return []
        on_step = {"callback_on_step_end": self.trajectory} if self.trajectory else {}
        start = time.perf_counter()
        output = self.pipeline([file.image for file in batch], output_type="np", **self.call_kwargs, **on_step)
        seconds = (time.perf_counter() - start) / len(batch)
        warn_of_unlike_images(self.pipeline, batch)
        self.folder.keep_settings()  # only now: a refused call leaves nothing behind
        sizes = [height_and_width(file.image) for file in batch]
        segmenter = self.pipeline.components.get("lung_segmenter")
        zones = zone_columns(segmenter, output.image, output.anomaly_map, sizes, self.pipeline.config["aspect"])
        writing = []
        for i, file in enumerate(batch):
            if self.trajectory:  # it holds the last call only
                self.trajectory.save(self.folder.path / "trajectories" / f"{file.name}.webp", index=i)
            counterfactual = output.counterfactual[i] if has_counterfactual(self.pipeline) else None
            result = (output.image[i], counterfactual, output.anomaly_map[i], float(output.anomaly_score[i]))
            writing.append((file, seconds, writers.submit(self.write, file, result, seconds, zones[i])))
        return writing

    def write(self, file: Input, result: tuple, seconds: float, zones: dict) -> None:
        columns = dict(warnings=file.warnings, seconds=round(seconds, 4), process=self.state.process_index) | zones
        self.folder.write(file.name, file.path, file.stamp, file.image, result, file.header, **columns)

    def finish(self, file: Input, seconds: float, written: Future) -> None:
        """Wait until a file's results are written. A header that gives no DICOM objects is that file's failure."""
        try:
            written.result()
        except DicomOutputError as error:
            return self.fail(file, f"{file.path}: {error}")
        self.seconds.append(seconds)
        self.bar.update()

    def fail(self, file: Input, error: str) -> None:
        self.failed[str(file.path)] = error
        self.folder.forget(file.name)
        self.bar.update()


def warn_of_unlike_images(pipeline: Any, batch: list[Input]) -> None:
    """Extend the warnings of each file whose image is unlike the training images, see `unlikeness_warnings`."""
    for file, unlike in zip(batch, unlikeness_warnings(pipeline, [file.image for file in batch]), strict=True):
        file.warnings = "; ".join([file.warnings] * bool(file.warnings) + unlike)


def map_ahead(pool: ThreadPoolExecutor, function: Callable, arguments: Iterable[tuple], ahead: int) -> Iterator:
    """`function(*arguments)` of each, in order, with at most `ahead` results waiting."""
    waiting: deque = deque()
    try:
        for item in arguments:
            waiting.append(pool.submit(function, *item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def in_batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items; the last may be shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def healthy_reference(pipeline: Any, call_kwargs: dict) -> ReferenceScores | None:
    """The scores of healthy images in the model's folder; None where it has none for these settings."""
    model = pipeline.config.get("_name_or_path")
    if not model or not hasattr(pipeline, "settings"):
        return None
    reference = kept_scores(model)
    return reference if reference is not None and reference.scores and reference.fits(pipeline, call_kwargs) else None


def healthy_map_value(pipeline: Any, call_kwargs: dict, quantile: float) -> float:
    """The map value at a quantile of the pixels of the healthy images that a model was calibrated on.

    Raises:
        ValueError: other settings than the model's own, a model without quantiles of healthy maps or with those of
            other weights, a quantile outside the measured range.
    """
    option, changed = f"`threshold` {HEALTHY}{quantile:g}", changed_settings(pipeline, call_kwargs)
    if changed:
        raise ValueError(
            f"expected the model's own settings for {option}, for which its quantiles of healthy maps were measured, "
            f"got other settings: {', '.join(changed)}"
        )
    model = pipeline.config.get("_name_or_path")
    reference = kept_scores(model) if model else None
    advice = "run `cxr-diffusers calibrate MODEL --healthy DATA`"
    if reference is None or not reference.map_quantiles:
        raise ValueError(f"expected a model with quantiles of healthy maps for {option}, got one without: {advice}")
    if not reference.fits(pipeline, {}):  # the settings that differ, if any, do not change the map
        raise ValueError(
            f"expected quantiles of healthy maps of the model's present weights and settings for {option}, got those "
            f"of earlier ones: {advice}"
        )
    return reference.map_value(quantile)


def dicom_algorithm(pipeline: Any, call_kwargs: dict, paths: Iterable[Path], outputs: Outputs) -> Algorithm:
    """`Algorithm` that DICOM objects name as their maker.

    Raises:
        ImportError: highdicom is not installed.
        ValueError: no threshold, or no DICOM file among `paths`.
    """
    import_highdicom()
    if not outputs.threshold:
        raise ValueError(
            "expected a model with a threshold from healthy validation images (`map_threshold`) to write DICOM "
            "segmentations, got one without: run `cxr-diffusers calibrate MODEL --healthy DATA`"
        )
    if not any(map(is_dicom, paths)):
        raise ValueError("expected at least one DICOM file to write DICOM objects beside, got other images only")
    name = str(pipeline.config.get("_name_or_path") or "")
    model = Path(name).resolve().name if Path(name).is_dir() else name
    weights = fingerprint(pipeline, call_kwargs, 0)
    threshold = outputs.threshold, outputs.healthy_quantile
    return Algorithm(type(pipeline).__name__, model or "unnamed", weights, *threshold, has_counterfactual(pipeline))
