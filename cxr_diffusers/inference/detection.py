"""Images in a folder -> a picture and a map each, and a row in results.csv."""

import csv
import hashlib
import io
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..data.dicom_checks import warnings_of
from ..data.images import SUFFIXES, describe_skipped, is_dicom, picture_size, read_header, read_image, split_images
from ..files import check_settings, keep_settings, save_map, save_png, write_file
from ..fingerprints import fingerprint
from ..pipelines.cxr_images import frame, prepare_image, restore_map
from ..processes import process_state
from ..visualization import side_by_side, to_grey
from .dicom_output import ENDINGS, Algorithm, DicomOutputError, check_source, import_highdicom, write_objects
from .trajectory import Trajectory, check_steps

FIELDS = ["image", "name", "anomaly_score", "abnormal_fraction", "map_max", "height", "width", "seconds", "warnings"]
WRITTEN = ("maps", "counterfactuals", "trajectories", "dicom")  # folders of results, which are no input
SETTINGS = "settings.json"
SHOWN = 512  # longer side of a panel: sharp enough to read the chest, three of them fit on a screen


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
    dicom=False,
    call_kwargs=None,
    progress=True,
):
    """Run an anomaly pipeline over files and folders.

    Written for every image, under a name made of its path below the folder:

        NAME.png                  input | counterfactual | map over the input, with its colour bar
        maps/NAME.png (or .npy)   the raw map at the input's own resolution: 16 bits, value / 65535 (or float32)
        counterfactuals/NAME.png  with `save_counterfactual`: as the model made it, at its resolution
        dicom/NAME_seg.dcm        with `dicom`, of a DICOM file: the map above the threshold as a Segmentation, and
        dicom/NAME_overlay.dcm    the picture as a Secondary Capture, filed beside their source; see docs/clinic.md
        trajectories/NAME.webp    with `save_trajectory`: a film of the way to noise and back, see `Trajectory`
        rows/NAME.json            the row of results.csv; written last, so it says that the image is done

    and at the end results.csv, most abnormal first, and failed.csv, if files could not be read. Run it again and it
    goes on where it stopped, kill -9 included: only files that are new, changed, or were broken before are computed.
    Under `accelerate launch` each process takes its share (place the pipeline on its device first).

    Columns: `anomaly_score`, see `AnomalyOutput`; `abnormal_fraction`, of the pixels above the model's threshold from
    healthy images (empty if it has none); `map_max`; `height` and `width` of the input; `seconds`, of the model alone;
    `warnings`, why the map may mean nothing, as the header of a DICOM file tells (a lateral view, another body part).

    Args:
        pipeline: answers `pipeline(list of PIL images, output_type="np")` with an `AnomalyOutput`.
        images: files and folders; a folder is searched for png, jpg, bmp, tif, npy and DICOM files, with or without an
            extension; DICOM files that are no picture (reports, segmentations) are left out. For a model of four
            channels, the folders of MRI slices (see `data.load_brats`) and folders of such.
        output_dir: created if need be.
        batch_size: images a call.
        map_format: "png" or "npy".
        vmax: the map value of the last colour. None: three times the model's threshold, so all its pictures have one
            scale; for a model without threshold each picture's own 99.5 % quantile.
        dicom: write DICOM objects, too; pictures that are no DICOM files get none.
        call_kwargs: arguments of the pipeline's call.

    Returns:
        {"images", "computed", "failed": {path: error}, "seconds_per_image" (None if nothing was computed), "skipped":
        {path: what it is}, "warnings": {path: text}, "without_dicom": [path]} on the main process, None on the others.

    Raises:
        FileNotFoundError: no such file or folder, or no image in it.
        FileExistsError: `output_dir` holds results of another model or other settings.
        ValueError: `output_dir` is where the images are, an unknown `map_format`, a `vmax` of 0 or less,
            `save_trajectory` for a pipeline without steps; or `dicom` for a model without a threshold, or without any
            DICOM file.
        ImportError: `dicom`, and highdicom is not installed.
    """
    if map_format not in ("png", "npy"):
        raise ValueError(f"expected `map_format` png or npy, got {map_format!r}")
    call_kwargs = dict(call_kwargs or {})
    trajectory = None
    if save_trajectory:
        check_steps(pipeline)
        trajectory = Trajectory()
    state, output_dir = process_state(), Path(output_dir)
    threshold = pipeline.config.get("map_threshold")
    if vmax is None:
        vmax = 3 * threshold if threshold else None
    elif not vmax > 0:
        raise ValueError(f"expected `vmax` above 0, got {vmax!r}")
    channels = model_channels(pipeline)
    found, skipped = find_images(images, output_dir, channels)
    algorithm = dicom_algorithm(pipeline, call_kwargs, [path for _, path in found]) if dicom else None
    settings = {
        "model": str(pipeline.config.get("_name_or_path") or type(pipeline).__name__),
        "weights": fingerprint(pipeline, {}, 0),
        "call": call_kwargs,
        "map_format": map_format,
        "save_counterfactual": save_counterfactual,
        "save_trajectory": save_trajectory,
        "map_threshold": threshold,
        "vmax": vmax,
        "dicom": dicom,
    }
    kept = dict(ignore=("model",), defaults={"save_trajectory": False, "dicom": False})  # of before there were these
    check_settings(output_dir / SETTINGS, settings, **kept)
    rows = read_rows(output_dir)
    files = name_files(found, rows)
    todo = [(name, path) for name, path in files.items() if name not in rows or rows[name]["file"] != stamp(path)]
    state.wait_for_everyone()  # all have looked before the first writes, or they would share out different lists

    stepwise = {"callback_on_step_end": trajectory} if trajectory else {}
    share, failed, seconds = todo[state.process_index :: state.num_processes], {}, []
    bar = tqdm(total=len(share), desc="detect", unit="image", disable=not (progress and state.is_main_process))
    try:
        for first in range(0, len(share), batch_size):
            batch = []
            for name, path in share[first : first + batch_size]:
                try:
                    batch.append((name, path, read_picture(path, channels), read_source(path, dicom)))
                except (ValueError, OSError) as error:
                    failed[str(path)] = str(error)
                    forget(output_dir, name)
                    bar.update()
            if not batch:
                continue
            start = time.perf_counter()
            output = pipeline([picture for _, _, picture, _ in batch], output_type="np", **call_kwargs, **stepwise)
            seconds += [(time.perf_counter() - start) / len(batch)] * len(batch)
            keep_settings(
                output_dir / SETTINGS, settings, **kept
            )  # now that there are answers: a call that was refused leaves nothing
            for i, (name, path, picture, source) in enumerate(batch):
                answer = (
                    output.image[i],
                    output.counterfactual[i],
                    output.anomaly_map[i],
                    float(output.anomaly_score[i]),
                )
                objects = (source, algorithm) if algorithm and source is not None else None
                try:
                    row = write_answer(
                        output_dir, name, path, picture, answer, pipeline.config, map_format, vmax, objects
                    )
                except DicomOutputError as error:
                    failed[str(path)] = f"{path}: {error}"
                    forget(output_dir, name)
                    seconds.pop()
                    bar.update()
                    continue
                row["warnings"] = "; ".join(warnings_of(source)) if source is not None else ""
                if save_counterfactual:
                    save_png(to_grey(answer[1].mean(-1)), output_dir / "counterfactuals" / f"{name}.png")
                if trajectory:
                    trajectory.save(output_dir / "trajectories" / f"{name}.webp", index=i)
                row |= {"seconds": round(seconds[-1], 4), "file": stamp(path), "process": state.process_index}
                write_file(row_file(output_dir, name), json.dumps(row).encode())
                bar.update()
        failed, seconds = dict(gather_object(list(failed.items()))), gather_object(seconds)
    finally:  # stopped or failed, what is done is in the tables
        bar.close()
        if state.is_main_process:
            rows = sorted(read_rows(output_dir).values(), key=lambda row: -row["anomaly_score"])
            write_csv(output_dir / "results.csv", FIELDS, rows)
            write_csv(output_dir / "failed.csv", ["image", "error"], [dict(image=k, error=failed[k]) for k in failed])
    if not state.is_main_process:
        return None
    mean = float(np.mean(seconds)) if seconds else None
    mine = {stamp(path)[0] for path in files.values()}
    return {
        "images": len(files),
        "computed": len(seconds),
        "failed": failed,
        "seconds_per_image": mean,
        "skipped": {str(path): what for path, what in skipped.items()},
        "warnings": {row["image"]: row["warnings"] for row in rows if row.get("warnings") and row["file"][0] in mine},
        "without_dicom": [str(path) for path in files.values() if dicom and not is_dicom(path)],
    }


def dicom_algorithm(pipeline, call_kwargs, paths):
    """What the DICOM objects will name as their maker; ValueError or ImportError where none can be written."""
    import_highdicom()
    threshold = pipeline.config.get("map_threshold")
    if not threshold:
        raise ValueError(
            "expected a model with a threshold from healthy validation images (`map_threshold` in its "
            "model_index.json) to write DICOM segmentations, got one without"
        )
    if not any(map(is_dicom, paths)):
        raise ValueError("expected at least one DICOM file to write DICOM objects beside, got other pictures only")
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
    """Channels of the pictures that a pipeline's model takes; 1 where it does not say."""
    configs = [getattr(component, "config", None) or {} for component in pipeline.components.values()]
    return next((config["in_channels"] for config in configs if "in_channels" in config), 1)


def read_picture(path, channels):
    """An image file -> PIL image; the folder of an MRI slice -> (H, W, 4) array.

    Raises ValueError where it is broken, or where the model takes pictures of other `channels`.
    """
    if path.is_dir():
        from ..data.brats import read_slice

        picture = read_slice(path)
    else:
        picture = read_image(path)
    found = picture.shape[-1] if isinstance(picture, np.ndarray) else 1
    if found != channels and (found, channels) != (1, 3):
        raise ValueError(f"{path}: expected a picture of {channels} channels for this model, got {found}")
    return picture


def find_images(images, output_dir, channels=1):
    """Files and folders -> [(path that names it, path)], {path: what it is} of DICOM files without a picture.

    What an earlier run has written below a folder is in neither.
    """
    output, found, skipped = output_dir.resolve(), [], {}
    for item in map(Path, images):
        if not item.exists():
            raise FileNotFoundError(f"no such file or folder: {item}")
        folder = item if item.is_dir() else item.parent
        if folder.resolve() in [output / name for name in ("", *WRITTEN)]:
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


def name_files(found, rows):
    """-> {name: path}: "study/a.png" is "study__a". Two files that would share a name get a hash of their path; a file
    that has a row keeps its name, whatever has come beside it."""
    taken = {name: row["file"][0] for name, row in rows.items()}
    name_of = {source: name for name, source in taken.items()}
    files = {}
    for relative, path in found:
        source = stamp(path)[0]
        if source not in name_of:
            # what follows the last dot of a DICOM file without extension is part of its UID
            plain = relative.with_suffix("") if relative.suffix.lower() in SUFFIXES else relative
            name = "__".join(plain.parts)[-150:]
            if name in taken:
                name += "-" + hashlib.sha256(source.encode()).hexdigest()[:6]
            name_of[source], taken[name] = name, source
        files[name_of[source]] = path
    return files


def stamp(path):
    """What tells a file, or a slice's folder, and its content from another: [path, bytes, time of change in ns]."""
    found = [file.stat() for file in (path.iterdir() if path.is_dir() else [path])]
    return [str(path.resolve()), sum(s.st_size for s in found), max(s.st_mtime_ns for s in found)]


def row_file(output_dir, name):
    return output_dir / "rows" / f"{name}.json"


def forget(output_dir, name):
    """Take away the row and the DICOM objects of the file that was here before: they would be taken for this one's."""
    objects = [output_dir / "dicom" / f"{name}_{ending}.dcm" for ending in ENDINGS]
    for path in (row_file(output_dir, name), *objects):
        path.unlink(missing_ok=True)


def read_rows(output_dir):
    """{name: row} of all images that are done."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((output_dir / "rows").glob("*.json"))}


def write_answer(output_dir, name, path, picture, answer, config, map_format, vmax, objects=None):
    """Write the map and the picture of one image, and its DICOM `objects` = (source, algorithm); return its row."""
    image, counterfactual, anomaly_map, score = answer
    aspect, threshold, size = config["aspect"], config.get("map_threshold"), picture_size(picture)
    own = restore_map(anomaly_map, *size, aspect)
    fraction = float(np.mean(own > threshold)) if threshold else None
    save_map(own, output_dir / "maps" / f"{name}.{map_format}")

    shown, counterfactual, small = same_frame(picture, image, counterfactual, anomaly_map, config)
    title = f"score {score:.3f}"
    title += f"    {fraction:.1%} of the picture above the threshold" if threshold else ""
    show = partial(side_by_side, shown, counterfactual, small, vmax=vmax, panel_size=SHOWN)
    save_png(show(title=f"{path.name}    {title}"), output_dir / f"{name}.png")
    if objects:  # their picture is without the file's name, which may be the patient's
        source, algorithm = objects
        write_objects(output_dir / "dicom" / name, source, own > threshold, show(title=title), algorithm)
    values = (str(path), name, score, fraction, float(own.max()), *size)
    return dict(zip(FIELDS, values, strict=False))


def same_frame(picture, image, counterfactual, anomaly_map, config, longest=SHOWN):
    """What belongs side by side: (input, counterfactual, map), (h, w) each, without the bars of the model's square.

    Args:
        picture: as it was handed to the pipeline. image, counterfactual, anomaly_map: one picture's of its "np" answer.
        config: the pipeline's. longest: side of the result, in pixels.
    """
    aspect, size = config["aspect"], picture_size(picture)
    if aspect == "keep" or isinstance(picture, np.ndarray):  # pixel by pixel; of several channels their mean
        return [restore_map(x, *size, aspect) for x in (image.mean(-1), counterfactual.mean(-1), anomaly_map)]
    shown = in_model_greys(picture, anomaly_map.shape[-1], config["scaling"], aspect, longest)
    return [shown, *(restore_map(x, *shown.shape, aspect) for x in (counterfactual.mean(-1), anomaly_map))]


def in_model_greys(picture, size, scaling, aspect, longest=SHOWN):
    """PIL picture -> (h, w) float32 in [0, 1], the longer side `longest` pixels: the radiograph at its own sharpness.

    It is black and white where the model that works at `size` pixels has them: comparable with the counterfactual.
    """
    scale = longest / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    shown = Image.fromarray(np.asarray(picture, np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    shown = np.asarray(shown) / (255 if picture.mode == "L" else 65535)
    if scaling == "minmax":
        top, left, h, w = frame(picture.height, picture.width, size, aspect)
        seen = prepare_image(picture, size, "dtype", aspect, (0.0, 1.0))[0, 0]
        seen = seen[max(top, 0) : max(top, 0) + h, max(left, 0) : max(left, 0) + w].numpy()  # without the bars
        shown = (shown - seen.min()) / max(np.ptp(seen), 1e-12)
    return shown.clip(0, 1)


def write_csv(path, fields, rows):
    """A table, under its name only when complete; no rows, no file."""
    if not rows:
        return path.unlink(missing_ok=True)
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_file(path, text.getvalue().encode())
