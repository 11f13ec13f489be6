"""Detection over files and folders: a panel and a map of each image, and a row in results.csv."""

import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..data.dicom_checks import warnings_of
from ..data.images import (
    PIL_SUFFIXES,
    check_has_contrast,
    describe_skipped,
    is_dicom,
    read_header,
    read_image,
    split_images,
)
from ..fingerprints import fingerprint
from ..processes import process_state
from .detection_folder import RESULTS, DetectionFolder, file_stamp
from .dicom_output import Algorithm, DicomOutputError, check_source, import_highdicom
from .out_of_distribution import unlikeness_warnings
from .reference_scores import kept_scores
from .trajectory import Trajectory, check_steps

WORKERS = max(2, min(8, os.cpu_count() or 1))  # threads that read, and threads that write


def detect(
    pipeline,
    images,
    output_dir,
    *,
    batch_size=8,
    map_format="png",
    save_counterfactual=False,
    save_trajectory=False,
    vmax=None,
    threshold=None,
    save_masks=False,
    save_panel=True,
    dicom=False,
    call_kwargs=None,
    progress=True,
):
    """Run an anomaly pipeline over files and folders.

    Written for every image, under a name made of its path below the folder:

        NAME.png                  unless `save_panel` is False: input | counterfactual | map over the input
        maps/NAME.png (or .npy)   the raw map at the input's own resolution: 16 bits, value / 65535 (or float32)
        masks/NAME.png            with `save_masks`: 255 where the map is above the threshold, else 0
        counterfactuals/NAME.png  with `save_counterfactual`: as the model made it, at its resolution
        dicom/NAME_seg.dcm        with `dicom`, of a DICOM file: the map above the threshold as a Segmentation, and
        dicom/NAME_overlay.dcm    the panel as a Secondary Capture, filed beside their source; see docs/clinic.md
        trajectories/NAME.webp    with `save_trajectory`: a film of the way to noise and back, see `Trajectory`
        rows/NAME.json            the row of results.csv; written last, so it says that the image is done

    and at the end results.csv, most abnormal first, and failed.csv, if images could not be computed (unreadable, of
    one single value, no such file). Run it again and it goes on where it stopped, kill -9 included: only files that
    are new, changed, or failed before are computed. Under `accelerate launch` each process takes its share (place
    the pipeline on its device first).

    Columns: `anomaly_score`, see `AnomalyOutput`; where the model keeps scores of n healthy images for the same
    settings, `healthy_percentile`, the percentage of them below this score, and `p_value`, conformal:
    (1 + number of healthy scores >= this one) / (n + 1); `abnormal_fraction`, of the pixels above the threshold (empty
    without one); `map_max`; `height` and `width` of the input; `seconds`, of the model alone; `warnings`: why the map
    may mean nothing (a lateral view, another body part, a colour image, an image unlike the training images).

    Args:
        pipeline: answers `pipeline(list of PIL images, output_type="np")` with an `AnomalyOutput`.
        images: files and folders; a folder is searched for png, jpg, bmp, tif, npy and DICOM files, with or without an
            extension; DICOM files without an image (reports, segmentations) are left out. For a model of four
            channels, the folders of MRI slices (see `data.load_brats`) and folders of such.
        output_dir: created if need be.
        batch_size: images a call.
        map_format: "png" or "npy".
        vmax: the map value of the last colour. None: three times the threshold, so all panels have one scale; without
            a threshold each panel's own 99.5 % quantile.
        threshold: map value in (0, 1) above which a pixel is abnormal. None: the model's, from healthy images.
        dicom: write DICOM objects, too; images that are no DICOM files get none.
        call_kwargs: arguments of the pipeline's call.

    Returns:
        {"images", "computed", "failed": {path: error}, "seconds_per_image" (None if nothing was computed), "skipped":
        {path: reason}, "warnings": {path: text}, "without_dicom": [path]} on the main process, None on the others.

    Raises:
        FileNotFoundError: no such file or folder, or no image in it.
        FileExistsError: `output_dir` holds results of another model or other settings.
        ValueError: `output_dir` is where the images are, an unknown `map_format`, a `vmax` of 0 or less, a `threshold`
            outside (0, 1), `save_trajectory` for a pipeline without steps; `dicom` or `save_masks` without a
            threshold; `dicom` without any DICOM file.
        OSError: a result cannot be written (disk full, no permission); the same call goes on afterwards.
        ImportError: `dicom`, and highdicom is not installed.
    """
    if map_format not in ("png", "npy"):
        raise ValueError(f"expected `map_format` png or npy, got {map_format!r}")
    if vmax is not None and not vmax > 0:
        raise ValueError(f"expected `vmax` above 0, got {vmax!r}")
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"expected `threshold` between 0 and 1, got {threshold!r}")
    call_kwargs = dict(call_kwargs or {})
    trajectory = None
    if save_trajectory:
        check_steps(pipeline)
        trajectory = Trajectory()
    state, output_dir = process_state(), Path(output_dir)
    threshold = threshold or pipeline.config.get("map_threshold")
    if save_masks and not threshold:
        raise ValueError(
            "expected `threshold`, or a model with one (`map_threshold`), for `save_masks`, got neither: run "
            "`cxr-diffusers calibrate MODEL --healthy DATA`"
        )
    channels = model_channels(pipeline)
    images, skipped = find_images(images, output_dir, channels)
    settings = {
        "model": str(pipeline.config.get("_name_or_path") or type(pipeline).__name__),
        "weights": fingerprint(pipeline, {}, 0),
        "call": call_kwargs,
        "map_format": map_format,
        "save_counterfactual": save_counterfactual,
        "save_trajectory": save_trajectory,
        "save_masks": save_masks,
        "save_panel": save_panel,
        "map_threshold": threshold,
        "vmax": 3 * threshold if vmax is None and threshold else vmax,
        "dicom": dicom,
    }
    folder = DetectionFolder(
        output_dir,
        settings,
        pipeline.config,
        algorithm=dicom_algorithm(pipeline, call_kwargs, [path for _, path in images], threshold) if dicom else None,
        reference=healthy_reference(pipeline, call_kwargs),
        main=state.is_main_process,
    )
    state.wait_for_everyone()  # results of unknown settings are gone before anyone lists what is done
    rows = folder.read_rows()
    files = folder.name_files(images, rows)
    pending = [(name, path) for name, path in files.items() if not is_done(rows.get(name), path)]
    state.wait_for_everyone()  # barrier: every process lists the pending files before any is written

    share, failed, seconds = pending[state.process_index :: state.num_processes], {}, []
    bar = tqdm(total=len(share), desc="detect", unit="image", disable=not (progress and state.is_main_process))
    try:
        run = Detection(pipeline, folder, call_kwargs, trajectory, failed, seconds, bar, state.process_index)
        run.process(share, batch_size, lambda name, path: read_input(name, path, channels, dicom))
        failed, seconds = dict(gather_object(list(failed.items()))), gather_object(seconds)
    finally:  # also after an error the tables hold what is done
        bar.close()
        if state.is_main_process:
            rows = folder.write_tables(failed)
    if not state.is_main_process:
        return None
    sources = {os.path.realpath(path) for path in files.values()}
    return {
        "images": len(files),
        "computed": len(seconds),
        "failed": failed,
        "seconds_per_image": float(np.mean(seconds)) if seconds else None,
        "skipped": {str(path): reason for path, reason in skipped.items()},
        "warnings": {
            row["image"]: row["warnings"] for row in rows if row.get("warnings") and row["file"][0] in sources
        },
        "without_dicom": [str(path) for path in files.values() if dicom and not is_dicom(path)],
    }


@dataclass
class Input:
    """One file, read. stamp: `file_stamp` before it was read. header: of a DICOM file. error: why it was not read."""

    name: str
    path: Path
    stamp: list | None = None
    image: object = None
    header: object = None
    warnings: str = ""
    error: str = ""


@dataclass
class Detection:
    """The loop over files: they are read ahead and written behind in threads, so that the network need not wait."""

    pipeline: object
    folder: DetectionFolder
    call_kwargs: dict
    trajectory: Trajectory | None
    failed: dict
    seconds: list
    bar: tqdm
    process_index: int

    def process(self, files, batch_size, read):
        """Run the pipeline over [(name, path)]; `read(name, path)` -> `Input`.

        Raises:
            OSError: a result cannot be written.
        """
        stepwise = {"callback_on_step_end": self.trajectory} if self.trajectory else {}
        with ThreadPoolExecutor(WORKERS) as readers, ThreadPoolExecutor(WORKERS) as writers:
            writing = deque()
            for batch in in_batches(map_ahead(readers, read, files, 2 * batch_size), batch_size):
                for file in batch:
                    if file.error:
                        self.fail(file, file.error)
                batch = [file for file in batch if not file.error]
                if not batch:
                    continue
                start = time.perf_counter()
                output = self.pipeline([file.image for file in batch], output_type="np", **self.call_kwargs, **stepwise)
                each = (time.perf_counter() - start) / len(batch)
                warn_of_unlike_images(self.pipeline, batch)
                self.folder.keep_settings()  # only now: a call that was refused leaves nothing
                for i, file in enumerate(batch):
                    if self.trajectory:  # it records the last call alone
                        self.trajectory.save(self.folder.path / "trajectories" / f"{file.name}.webp", index=i)
                    answer = (output.image[i], output.counterfactual[i], output.anomaly_map[i])
                    answer = (*answer, float(output.anomaly_score[i]))
                    writing.append((file, each, writers.submit(self.write, file, answer, each)))
                while len(writing) > 2 * batch_size:
                    self.finish(*writing.popleft())
            while writing:
                self.finish(*writing.popleft())

    def write(self, file, answer, seconds):
        columns = dict(warnings=file.warnings, seconds=round(seconds, 4), process=self.process_index)
        self.folder.write(file.name, file.path, file.stamp, file.image, answer, file.header, **columns)

    def finish(self, file, seconds, written):
        """Wait until a file's results are written; a header that gives no DICOM objects is that file's failure."""
        try:
            written.result()
        except DicomOutputError as error:
            return self.fail(file, f"{file.path}: {error}")
        self.seconds.append(seconds)
        self.bar.update()

    def fail(self, file, error):
        self.failed[str(file.path)] = error
        self.folder.forget(file.name)
        self.bar.update()


def warn_of_unlike_images(pipeline, batch):
    """Extend the warnings of each `Input` whose image is unlike the training images, see `unlikeness_warnings`."""
    for file, unlike in zip(batch, unlikeness_warnings(pipeline, [file.image for file in batch]), strict=True):
        file.warnings = "; ".join([file.warnings] * bool(file.warnings) + unlike)


def map_ahead(pool, function, arguments, ahead):
    """`function(*arguments)` of each, in order, with at most `ahead` results waiting."""
    waiting = deque()
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


def in_batches(items, size):
    """Lists of `size` items; the last may be shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def read_input(name, path, channels, dicom):
    """Read one file -> `Input`, with its error where it cannot be read."""
    file = Input(name, path)
    try:
        file.stamp = file_stamp(path)  # before it is read: a file that is replaced meanwhile is computed again
        file.image = read_model_input(path, channels)
        check_has_contrast(file.image, path)
        file.header = read_source(path, dicom)
        found = warnings_of(file.header) if file.header is not None else colour_warnings(path)
        file.warnings = "; ".join(found)
    except (ValueError, OSError) as error:
        file.error = str(error)
    return file


def is_done(row, path):
    """Whether a row is of this file as it is now."""
    try:
        return row is not None and row["file"] == file_stamp(path)
    except OSError:  # reading it will say why
        return False


def colour_warnings(path):
    """[a warning] of an image file that is a colour photograph; grey values stored as RGB are none."""
    if path.suffix.lower() not in PIL_SUFFIXES or not path.is_file():
        return []
    with Image.open(path) as image:
        if image.mode not in ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
            return []
        image.draft("RGB", (128, 128))
        small = np.asarray(image.convert("RGB").resize((64, 64)), np.int16)
    return ["a colour image: radiographs are grey"] if np.ptp(small, axis=-1).mean() > 8 else []


def healthy_reference(pipeline, call_kwargs):
    """`ReferenceScores` kept with the model, None where there are none for these settings."""
    model = pipeline.config.get("_name_or_path")
    if not model or not hasattr(pipeline, "settings"):
        return None
    reference = kept_scores(model)
    return reference if reference is not None and reference.scores and reference.fits(pipeline, call_kwargs) else None


def dicom_algorithm(pipeline, call_kwargs, paths, threshold):
    """`Algorithm` that DICOM objects name as their maker; ValueError or ImportError where none can be written."""
    import_highdicom()
    if not threshold:
        raise ValueError(
            "expected a model with a threshold from healthy validation images (`map_threshold`) to write DICOM "
            "segmentations, got one without: run `cxr-diffusers calibrate MODEL --healthy DATA`"
        )
    if not any(map(is_dicom, paths)):
        raise ValueError("expected at least one DICOM file to write DICOM objects beside, got other images only")
    name = str(pipeline.config.get("_name_or_path") or "")
    model = Path(name).resolve().name if Path(name).is_dir() else name
    return Algorithm(type(pipeline).__name__, model or "unnamed", fingerprint(pipeline, call_kwargs, 0), threshold)


def read_source(path, dicom):
    """The header of a DICOM file, None for another; ValueError where it lacks what `dicom` objects need."""
    if not is_dicom(path):
        return None
    header = read_header(path)
    if dicom:
        check_source(header, path)
    return header


def model_channels(pipeline):
    """Channels of the images that a pipeline's model takes; 1 where it does not say."""
    configs = [getattr(component, "config", None) or {} for component in pipeline.components.values()]
    return next((config["in_channels"] for config in configs if "in_channels" in config), 1)


def read_model_input(path, channels):
    """An image file -> PIL image; the folder of an MRI slice -> (H, W, 4) array.

    Raises ValueError where it is broken, or where the model takes images of other `channels`.
    """
    if path.is_dir():
        from ..data.brats import read_slice

        image = read_slice(path)
    else:
        image = read_image(path)
    depth = image.shape[-1] if isinstance(image, np.ndarray) else 1
    if depth != channels and (depth, channels) != (1, 3):
        raise ValueError(f"{path}: expected an image of {channels} channels for this model, got {depth}")
    return image


def find_images(images, output_dir, channels=1):
    """Files and folders -> [(path that names it, path)], {path: what it is} of DICOM files without a picture.

    What an earlier run has written below a folder is in neither.
    """
    output, found, skipped = output_dir.resolve(), [], {}
    for item in map(Path, images):
        if not item.exists():
            raise FileNotFoundError(f"no such file or folder: {item}")
        folder = item if item.is_dir() else item.parent
        if folder.resolve() in [output / name for name in ("", *RESULTS)]:
            raise ValueError(f"expected an output folder of its own, got {output_dir}, where the images are")
        slices = list_slices_of(item) if channels == 4 and item.is_dir() else []
        if not item.is_dir() or item in slices:
            found.append((Path(item.name), item))
            continue
        paths, others = (slices, {}) if slices else split_images(item)
        if item.resolve() in output.parents:
            paths = [path for path in paths if output not in path.resolve().parents]
            others = {path: what for path, what in others.items() if output not in path.resolve().parents}
        if not paths:
            beside = f" ({describe_skipped(others)})" if others else ""
            raise FileNotFoundError(f"no png, jpg, bmp, tif, npy or DICOM image in {item}{beside}")
        found += [(path.relative_to(item), path) for path in paths]
        skipped |= others
    return found, skipped


def list_slices_of(folder):
    from ..data.brats import list_slices

    return list_slices(folder)
