"""The folder that a detection writes: names, rows, settings, files of each image, and the tables."""

import csv
import hashlib
import io
import json
import logging
import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.images import picture_size, without_suffix
from ..files import DamagedSettingsError, check_settings, keep_settings, remove_dead, save_map, save_png, write_file
from ..pipelines.cxr_images import restore_map
from ..visualization import side_by_side, to_grey
from .dicom_output import ENDINGS, write_objects
from .panels import PANEL_SIZE, same_frame

logger = logging.getLogger(__name__)

FIELDS = (
    "image name anomaly_score healthy_percentile p_value abnormal_fraction map_max height width seconds warnings"
).split()
REQUIRED = ("image", "name", "anomaly_score", "file")  # of a row that is whole
RESULTS = ("maps", "masks", "counterfactuals", "trajectories", "dicom")  # folders of results, which are no input
DEFAULTS = {"save_trajectory": False, "dicom": False, "save_masks": False, "save_panel": True}  # older files lack them
MAX_NAME = 150  # bytes: file systems allow 255, and endings follow


class DetectionFolder:
    """Results of one model and one set of settings.

    Args:
        path: created by the first write.
        settings: of the detection, see `detect`; those that decide what is written are read from here.
        config: the pipeline's.
        algorithm: `Algorithm` to write DICOM objects, None for none.
        reference: `ReferenceScores` of healthy images with the same settings, or None.
        main: True in the one process that may delete.

    Raises:
        OtherSettingsError: the folder holds results of other settings.
    """

    def __init__(self, path, settings, config, *, algorithm=None, reference=None, main=True):
        self.path, self.settings, self.config = Path(path), settings, config
        self.algorithm, self.reference = algorithm, reference
        self._settings_file = dict(path=self.path / "settings.json", settings=settings)
        self._settings_file |= dict(ignore=("model",), defaults=DEFAULTS)
        try:
            check_settings(**self._settings_file)
        except DamagedSettingsError as error:
            logger.warning("%s; nobody knows the settings of its results: all are computed anew", error)
            if main:
                for row in (self.path / "rows").glob("*.json"):
                    row.unlink(missing_ok=True)
                (self.path / "settings.json").unlink(missing_ok=True)
        if main and self.path.is_dir():
            remove_dead(self.path)

    def keep_settings(self):
        """Write the settings, unless they are there."""
        keep_settings(**self._settings_file)

    def read_rows(self):
        """{name: row} of all images that are done; a damaged row is left out, with a warning."""
        rows = {}
        for path in sorted((self.path / "rows").glob("*.json")):
            try:
                row = json.loads(path.read_bytes())
                if not all(key in row for key in REQUIRED) or len(row["file"]) != 3:
                    raise ValueError("incomplete")
                float(row["anomaly_score"])
            except (ValueError, TypeError):
                logger.warning("%s is damaged: its image is computed anew", path)
                continue
            rows[path.stem] = row
        return rows

    def name_files(self, images, rows):
        """[(path that gives the name, path)] -> {name: path}.

        "study/a.png" is "study__a". Two files that would share a name get a hash of their path; a file that has a row
        keeps its name.
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
                if name in owner_of:
                    name += "-" + hashlib.sha256(os.fsencode(source)).hexdigest()[:6]
                name_of[source], owner_of[name] = name, source
            files[name_of[source]] = path
        return files

    def row_file(self, name):
        return self.path / "rows" / f"{name}.json"

    def forget(self, name):
        """Delete the row and the DICOM objects of an earlier file of this name: they would be taken for this one's."""
        objects = [self.path / "dicom" / f"{name}_{ending}.dcm" for ending in ENDINGS]
        for path in (self.row_file(name), *objects):
            path.unlink(missing_ok=True)

    def write(self, name, path, stamp, image, answer, header=None, **columns):
        """Write the files of one image and, last, its row.

        Args:
            name, path, stamp: of the image's file, the stamp taken before it was read.
            image: as it was handed to the pipeline.
            answer: (image, counterfactual, map, score) of the pipeline's "np" answer.
            header: pydicom dataset of a DICOM file, for DICOM objects.
            columns: further columns of the row.

        Raises:
            DicomOutputError: no DICOM objects can be made from this header.
            OSError: a file cannot be written.
        """
        settings, (model_input, counterfactual, anomaly_map, score) = self.settings, answer
        threshold, size = settings["map_threshold"], picture_size(image)
        full_map = restore_map(anomaly_map, *size, self.config["aspect"])
        mask = full_map > threshold if threshold else None
        fraction = float(mask.mean()) if threshold else None
        save_map(full_map, self.path / "maps" / f"{name}.{settings['map_format']}")
        if settings["save_masks"]:
            save_png(Image.fromarray(mask.astype(np.uint8) * 255), self.path / "masks" / f"{name}.png")
        if settings["save_counterfactual"]:
            save_png(to_grey(counterfactual.mean(-1)), self.path / "counterfactuals" / f"{name}.png")
        with_objects = self.algorithm is not None and header is not None
        if settings["save_panel"] or with_objects:
            panels = same_frame(image, model_input, counterfactual, anomaly_map, self.config)
            draw = partial(side_by_side, *panels, vmax=settings["vmax"], panel_size=PANEL_SIZE)
            title = f"score {score:.3f}"
            title += f"    {fraction:.1%} of the image above the threshold" if threshold else ""
            title += f"    {columns['warnings']}" if columns.get("warnings") else ""
        if settings["save_panel"]:
            file_name = "".join(c if c.isprintable() else "\ufffd" for c in path.name)
            save_png(draw(title=f"{file_name}    {title}"), self.path / f"{name}.png")
        if with_objects:  # without the file's name, which may be the patient's
            write_objects(self.path / "dicom" / name, header, mask, draw(title=title), self.algorithm)
        row = dict(image=str(path), name=name, anomaly_score=score, abnormal_fraction=fraction)
        row |= dict(map_max=float(full_map.max()), height=size[0], width=size[1], file=stamp, **columns)
        write_file(self.row_file(name), json.dumps(row).encode())

    def write_tables(self, failed):
        """Write results.csv, most abnormal first, and failed.csv of {path: error}; return the rows of results.csv."""
        rows = sorted(self.read_rows().values(), key=lambda row: -row["anomaly_score"])
        if self.reference is not None:
            rows = [row | self._among_healthy(row["anomaly_score"]) for row in rows]
        write_table(self.path / "results.csv", FIELDS, rows)
        write_table(self.path / "failed.csv", ["image", "error"], [dict(image=k, error=failed[k]) for k in failed])
        return rows

    def _among_healthy(self, score):
        below, count = self.reference.share_below(score)
        # the conformal p-value: the image itself counts as one of them
        return dict(healthy_percentile=round(100 * below / count, 2), p_value=(1 + count - below) / (count + 1))


def file_stamp(path):
    """[real path, bytes, time of change in ns] of a file, or of a slice's folder; OSError where there is none."""
    stats = [file.stat() for file in (path.iterdir() if path.is_dir() else [path])]
    return [os.path.realpath(path), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]


def write_table(path, fields, rows):
    """Write a CSV table in UTF-8, bytes of file names that are not UTF-8 as \\udcXX; no rows, no file."""
    if not rows:
        return path.unlink(missing_ok=True)
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_file(path, text.getvalue().encode(errors="backslashreplace"))
