"""The folder that a detection writes: names, rows, settings, files of each image, and the tables."""

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.images import height_and_width, without_suffix
from ..files import DamagedSettingsError, check_settings, keep_settings, remove_dead, save_map, save_png, write_file
from ..pipelines.cxr_images import restore_map
from ..visualization import side_by_side, to_grey
from .dicom_output import ENDINGS, Algorithm, write_objects
from .panels import crisp_counterfactual, panel_size, same_frame
from .reference_scores import ReferenceScores
from .regions import BOX_FORMATS, coco_boxes, find_boxes, write_yolo
from .thresholds import describe_threshold

logger = logging.getLogger(__name__)

FIELDS = (
    "image name healthy_percentile p_value healthy_images anomaly_score zone zone_share outside_lungs "
    "abnormal_fraction map_max height width seconds warnings"
).split()
REQUIRED = ("image", "name", "anomaly_score", "file")  # of a row that is whole
# folders of results, which are never inputs
RESULTS = ("maps", "masks", "labels", "counterfactuals", "trajectories", "dicom")
# of settings that older files lack
DEFAULTS = {"save_trajectory": False, "dicom": False, "save_masks": False, "save_boxes": None, "save_panel": True}
DEFAULTS |= {"healthy_quantile": None}
MAX_NAME = 150  # bytes: file systems allow 255, and endings follow


@dataclass
class Outputs:
    """What a detection writes for each image; the arguments of `detect` of these names say more.

    threshold: a map value. healthy_quantile: the quantile of healthy images' pixels that gave it; None for any other.
    """

    map_format: str = "png"
    save_counterfactual: bool = False
    save_trajectory: bool = False
    save_masks: bool = False
    save_boxes: str | None = None
    save_panel: bool = True
    dicom: bool = False
    threshold: float | None = None
    healthy_quantile: float | None = None
    vmax: float | None = None

    def complete(self, model_threshold: float | None, changed: Sequence[str] = ()) -> None:
        """Check the values, and set the threshold and `vmax` that were not given.

        Args:
            model_threshold: measured with the model's own settings; for others it only scales the colours.
            changed: names of the settings that are not the model's own.

        Raises:
            ValueError: an invalid value, or an output that needs a threshold without one.
        """
        if self.map_format not in ("png", "npy"):
            raise ValueError(f"expected `map_format` png or npy, got {self.map_format!r}")
        if self.vmax is not None and not self.vmax > 0:
            raise ValueError(f"expected `vmax` above 0, got {self.vmax!r}")
        if self.vmax is not None and not (self.save_panel or self.dicom):
            raise ValueError(f"expected `vmax` with panels or `dicom`, whose colours it scales, got {self.vmax!r}")
        if self.save_boxes not in (None, *BOX_FORMATS):
            raise ValueError(f"expected `save_boxes` coco or yolo, got {self.save_boxes!r}")
        scale = self.threshold or model_threshold
        self.threshold = self.threshold or (None if changed else model_threshold)
        for name in ("save_masks", "save_boxes", "dicom"):
            if not getattr(self, name) or self.threshold:
                continue
            if model_threshold:
                raise ValueError(
                    f"expected `threshold` for `{name}`, or the model's own settings, for which its threshold was "
                    f"measured, got other settings: {', '.join(changed)}"
                )
            if name != "dicom":  # `dicom_algorithm` says what it needs
                raise ValueError(
                    f"expected `threshold`, or a model with one (`map_threshold`), for `{name}`, got neither: run "
                    "`cxr-diffusers calibrate MODEL --healthy DATA`"
                )
        if self.vmax is None and scale:
            self.vmax = min(1.0, 3 * scale)  # a map has no higher values

    def settings(self) -> dict:
        """Plain values for settings.json."""
        settings = asdict(self)
        settings["map_threshold"] = settings.pop("threshold")
        return settings


class DetectionFolder:
    """Results of one model and one set of settings.

    Args:
        path: created by the first write.
        settings: of the detection, see `open_folder`; `Outputs` among them.
        config: the pipeline's.
        algorithm: `Algorithm` to write DICOM objects, None for none.
        reference: `ReferenceScores` of healthy images with the same settings, or None.
        may_delete: results of unknown settings; True in one process only.

    Raises:
        OtherSettingsError: the folder holds results of other settings.
    """

    def __init__(
        self,
        path: Path | str,
        settings: dict,
        config: Mapping,
        *,
        algorithm: Algorithm | None = None,
        reference: ReferenceScores | None = None,
        may_delete: bool = True,
    ) -> None:
        self.path, self.settings, self.config = Path(path), settings, config
        self.algorithm, self.reference = algorithm, reference
        self._settings_file: dict[str, Any] = dict(path=self.path / "settings.json", settings=settings)
        self._settings_file |= dict(ignore=("model",), defaults=DEFAULTS)
        try:
            check_settings(**self._settings_file)
        except DamagedSettingsError as error:
            logger.warning("%s; the settings of its results are unknown: all images are computed again", error)
            if may_delete:
                for row in (self.path / "rows").glob("*.json"):
                    row.unlink(missing_ok=True)
                (self.path / "settings.json").unlink(missing_ok=True)
        if may_delete and self.path.is_dir():
            remove_dead(self.path)

    def keep_settings(self) -> None:
        """Write the settings if the folder has none."""
        keep_settings(**self._settings_file)

    def read_rows(self) -> dict[str, dict]:
        """{name: row} of all images that are done; a damaged row is skipped with a warning."""
        rows = {}
        for path in sorted((self.path / "rows").glob("*.json")):
            try:
                row = json.loads(path.read_bytes())
                if not all(key in row for key in REQUIRED) or len(row["file"]) != 3:
                    raise ValueError("incomplete")
                float(row["anomaly_score"])
            except (ValueError, TypeError):
                logger.warning("%s is damaged: its image is computed again", path)
                continue
            rows[path.stem] = row
        return rows

    def name_files(self, images: Iterable[tuple[Path, Path]], rows: Mapping[str, dict]) -> dict[str, Path]:
        """Give each file a name of its own: [(relative path, path)] -> {name: path}.

        "study/a.png" becomes "study__a". If two files would share a name, the second one gets a hash of its path. A
        file that has a row keeps its name.
        """
        owner_of = {name: row["file"][0] for name, row in rows.items()}
        name_of = {source: name for name, source in owner_of.items()}
        files = {}
        for relative, path in images:
            source = os.path.realpath(path)
            if source not in name_of:
                name = "__".join(without_suffix(relative).parts)
                name = "".join(c if c.isprintable() else "_" for c in name)  # line breaks, bytes that are not UTF-8
                name = name.encode()[-MAX_NAME:].decode(errors="ignore")
                # the second file of an image's counterfactual is NAME_crisp.png
                crisp = (f"{name}_crisp", name.removesuffix("_crisp")) if self.settings["save_counterfactual"] else ()
                if any(taken in owner_of for taken in (name, *crisp)):
                    name += "-" + hashlib.sha256(os.fsencode(source)).hexdigest()[:6]
                name_of[source], owner_of[name] = name, source
            files[name_of[source]] = path
        return files

    def row_file(self, name: str) -> Path:
        return self.path / "rows" / f"{name}.json"

    def forget(self, name: str) -> None:
        """Delete all results of an earlier file of this name: they are not this one's."""
        ours = {
            "": [".png"],
            "maps": [".png", ".npy"],
            "masks": [".png"],
            "labels": [".txt"],
            "counterfactuals": [".png", "_crisp.png"],
            "trajectories": [".webp"],
            "dicom": [f"_{ending}.dcm" for ending in ENDINGS],
        }
        self.row_file(name).unlink(missing_ok=True)
        for folder, endings in ours.items():
            for ending in endings:
                (self.path / folder / f"{name}{ending}").unlink(missing_ok=True)

    def write(
        self,
        name: str,
        path: Path,
        stamp: list | None,
        image: Image.Image | np.ndarray,
        output: tuple,
        header: Any = None,
        **columns: Any,
    ) -> None:
        """Write the files of one image and, last, its row.

        Args:
            name, path, stamp: of the image's file, the stamp taken before it was read.
            image: the input of the pipeline.
            output: (image, counterfactual, map, score) of the pipeline's "np" output; the counterfactual is None for a
                method without.
            header: pydicom dataset of a DICOM file, for DICOM objects.
            columns: further columns of the row.

        Raises:
            DicomOutputError: no DICOM objects can be made from this header.
            OSError: a file cannot be written.
        """
        settings, (model_input, counterfactual, anomaly_map, score) = self.settings, output
        threshold, size = settings["map_threshold"], height_and_width(image)
        full_map = restore_map(anomaly_map, *size, self.config["aspect"])
        mask = full_map > (threshold or 1)  # without a threshold no pixel is abnormal
        fraction = float(mask.mean()) if threshold else None
        save_map(full_map, self.path / "maps" / f"{name}.{settings['map_format']}")
        if settings["save_masks"]:
            save_png(Image.fromarray(mask.astype(np.uint8) * 255), self.path / "masks" / f"{name}.png")
        boxes = find_boxes(full_map, threshold) if settings["save_boxes"] else []
        if settings["save_boxes"] == "yolo":
            write_yolo(self.path / "labels" / f"{name}.txt", boxes, *size)
        if settings["save_counterfactual"]:
            save_png(to_grey(counterfactual.mean(-1)), self.path / "counterfactuals" / f"{name}.png")
            crisp = crisp_counterfactual(image, model_input, counterfactual, self.config)
            save_png(to_grey(crisp), self.path / "counterfactuals" / f"{name}_crisp.png")
        algorithm = self.algorithm if header is not None else None
        if settings["save_panel"] or algorithm is not None:
            longest = panel_size(image)
            panels = same_frame(image, model_input, counterfactual, anomaly_map, self.config, longest)
            draw = partial(side_by_side, *panels, vmax=settings["vmax"], panel_size=longest)
            title = f"{self.reference.headline(score)}    " if self.reference is not None else ""
            title += f"score {score:.3f}"
            where = [f"largest part in the {columns['zone']} zone"] if columns.get("zone") else []
            quantile = settings["healthy_quantile"]
            threshold_text = "the threshold" if quantile is None else describe_threshold(threshold, quantile)
            where += [f"{fraction:.1%} of the image above {threshold_text}"] if threshold else []
            separator = "\n" if counterfactual is None else "    "  # the first line of two panels has no room for it
            title += "".join([separator, "    ".join(where)] if where else [])
            title += f"\n{columns['warnings']}" if columns.get("warnings") else ""
        if settings["save_panel"]:
            save_png(draw(title=f"{name}    {title}"), self.path / f"{name}.png")
        if algorithm is not None:  # without the file's name, which may be the patient's
            write_objects(self.path / "dicom" / name, header, mask, draw(title=title), algorithm)
        row = dict(image=str(path), name=name, anomaly_score=score, abnormal_fraction=fraction)
        row |= dict(map_max=float(full_map.max()), height=size[0], width=size[1], file=stamp, **columns)
        row |= dict(boxes=boxes) if settings["save_boxes"] else {}
        write_file(self.row_file(name), json.dumps(row).encode())

    def write_tables(self, failed: Mapping[str, str]) -> list[dict]:
        """Write results.csv, most abnormal first, failed.csv of {path: error}, and boxes.json of `save_boxes="coco"`.

        Returns:
            the rows of results.csv.
        """
        rows = sorted(self.read_rows().values(), key=lambda row: -row["anomaly_score"])
        if self.reference is not None:
            rows = [row | self._among_healthy(row["anomaly_score"]) for row in rows]
        write_table(self.path / "results.csv", FIELDS, rows)
        write_table(self.path / "failed.csv", ["image", "error"], [dict(image=k, error=failed[k]) for k in failed])
        if self.settings["save_boxes"] == "coco":
            if rows:
                write_file(self.path / "boxes.json", json.dumps(coco_boxes(rows)).encode())
            else:
                (self.path / "boxes.json").unlink(missing_ok=True)
        return rows

    def _among_healthy(self, score):
        below, count = self.reference.share_below(score)
        percentile, p_value = round(100 * below / count, 2), float(f"{self.reference.p_value(score):.6g}")
        return dict(healthy_percentile=percentile, p_value=p_value, healthy_images=count)


def file_stamp(path: Path) -> list:
    """[real path, bytes, time of the last change in ns] of a file, or of the folder of an MRI slice.

    Raises:
        OSError: no such file.
    """
    stats = [file.stat() for file in (path.iterdir() if path.is_dir() else [path])]
    return [os.path.realpath(path), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]


def write_table(path: Path, fields: list[str], rows: list[dict]) -> None:
    """Write a CSV table in UTF-8; bytes of file names that are not UTF-8 become \\udcXX. No rows: delete the file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_file(path, text.getvalue().encode(errors="backslashreplace"))
