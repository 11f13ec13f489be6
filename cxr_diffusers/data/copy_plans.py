"""Plans of copies of data sets: the images, and the tables, lists, boxes and masks that belong to them."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from ..files import copy_file, stamp_of, write_csv, write_text
from . import chexpert, nih, vindr
from .boxes import UNITS, image_size, read_boxes, to_pixels, units_of
from .folder import box_rows, images_and_masks, text_of
from .images import SUFFIXES, fit_boxes, list_images
from .tables import columns_of, path_of, read_csv

# source, output below the copy's root, whether it is a mask; texts, because 200,000 `Path`s take many seconds
Job = tuple[str, str, bool]

NOT_COPIED = "not copied (of CSVs, only boxes.csv and the tables of CheXpert, ChestX-ray14 and VinDr-CXR are copied)"


class CopyPlan:
    """The images of a copy of a data set, and a function that writes the tables that belong to them.

    Attributes:
        jobs: [(source, output below the copy's root, whether it is a mask)].
        finish: `finish(done)` writes the tables, boxes and lists for the sources in the set `done`.
        skipped: [(file, reason)].
        stamps: {source: `files.stamp_of` it} of the sources that were looked at.

    Raises:
        ValueError: two sources with the same output.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        finish: Callable[[set[str]], None],
        skipped: Iterable[tuple[str, str]] = (),
        stamps: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    ) -> None:
        outputs: dict[str, str] = {}
        for source, output, _ in jobs:
            if outputs.setdefault(output, source) != source:
                raise ValueError(f"{outputs[output]} and {source} would both become {output}: rename one")
        self.jobs, self.finish, self.skipped, self.stamps = jobs, finish, list(skipped), stamps


class SourceJournal:
    """Files `STEM*.jsonl` of a copy, whose lines say of which source each output was made: `[output, [size, time]]`.

    Each process has a file of its own: on a network file system two writers could overwrite each other's lines. The
    latest line of an output counts.

    Args:
        folder: the copy.
        stem: begin of the names of the files.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem

    def files(self) -> list[Path]:
        """The files, the latest last."""
        return sorted(self.folder.glob(f"{self.stem}*.jsonl"), key=lambda path: path.stat().st_mtime_ns)

    @cached_property
    def lines(self) -> dict[str, str]:
        """{begin of a line, with the output: its end, with the stamp of the source}, as they are at first."""
        lines: dict[str, str] = {}
        for path in self.files():
            # compared as texts, which is quick, and a line that a crash cut short equals none
            rows = (line.rpartition(", [") for line in path.read_text(errors="replace").splitlines())
            lines |= {begin: end for begin, _, end in rows}
        return lines

    def outdated(self, jobs: Sequence[Job], stamps: Mapping[str, tuple[int, int]], there: Iterable[str]) -> list[int]:
        """Numbers of the jobs without a copy, or whose source has another size or time than when it was copied.

        Args:
            stamps: {source: `files.stamp_of` it}, of some or all sources.
            there: outputs that exist, some or all.
        """
        there, numbers = set(there), []
        for i, (source, output, _) in enumerate(jobs):
            begin, _, end = line_of(output, stamps.get(source) or stamp_of(source) or ()).rpartition(", [")
            if self.lines.get(begin) != end or not (output in there or (self.folder / output).is_file()):
                numbers.append(i)
        return numbers

    def remove_others(self, jobs: Sequence[Job]) -> int:
        """Delete the copies of sources that are no longer there, or have another place; returns their number.

        Raises:
            ValueError: there are jobs, and none of them is for one of the copies: these are of another data set.
        """
        wanted = {output for _, output, _ in jobs}
        stale, kept = [], 0
        for begin in self.lines:
            if begin[2:-1] in wanted:  # the usual case, quickly
                kept += 1
                continue
            try:
                output = json.loads(begin[1:])
                if output in wanted:
                    kept += 1
                elif (self.folder / path_of(output, self.folder)).is_file():
                    stale.append(self.folder / output)
            except (ValueError, TypeError, OSError):  # a line that a crash cut short
                continue
        if jobs and stale and not kept:
            raise ValueError(
                f"expected the data set that the {len(stale)} copies in {self.folder} were made of, got one that none "
                "of them belongs to: give another folder"
            )
        for path in stale:
            path.unlink()
            text_of(path).unlink(missing_ok=True)
        return len(stale)


def line_of(output: str, stamp: Sequence[int]) -> str:
    """A line of a `SourceJournal`: an output, and the size and time of the source that it was made of."""
    return f"[{json.dumps(output)}, {list(stamp)}]"


def plan_copy(source_root: Path, output_root: Path, settings: Mapping[str, Any]) -> CopyPlan:
    """The plan of a copy of a data set, for `prepare` and `deblur`.

    Args:
        settings: "size" (None: images keep their size, and boxes their coordinates), "aspect", "image_format" and
            "frontal_only", as `prepare` takes them.

    Raises:
        ValueError: no image, two files with the same output, a row whose path leaves the data set, a box or mask
            that belongs to no image, or "frontal_only" for a folder without a table of views.
    """
    plan = _layout_of(source_root)(source_root, output_root, settings)
    if not plan.jobs and not plan.skipped:
        raise ValueError(f"no image below {source_root}")
    return plan


def _layout_of(root):
    if any(root.glob("Data_Entry_2017*.csv")):
        return _plan_nih
    if any((root / "annotations").glob("annotations_*.csv")):
        return _plan_vindr
    return _plan_chexpert if any(_chexpert_tables(root, split) for split in chexpert.SPLITS) else _plan_folder


def _chexpert_tables(root, split):
    try:
        csv = chexpert.find_csv(root, split)
    except FileNotFoundError:
        return []
    return [csv] if _path_column(csv) in columns_of(csv) else []


def _path_column(csv):
    return "path_to_image" if chexpert.is_plus(csv) else "Path"


def _plan_chexpert(root, output_root, settings):
    """The images in train.csv, valid.csv and test.csv; also copies these CSVs, boxes.csv and Plus's label files."""
    splits = {split: csv for split in chexpert.SPLITS for csv in _chexpert_tables(root, split)}
    tables, jobs, skipped, keys, stamps = {}, {}, [], set(), {}
    first = next(iter(splits.values()))
    boxes = chexpert.find_boxes(first)
    for csv in dict.fromkeys(splits.values()):
        raw, column = read_csv(csv), _path_column(csv)
        paths = chexpert.clean_paths(raw[column], raw.index, csv)
        keys.update(map(chexpert.key_of, paths) if boxes else ())
        view = next((name for name in ("Frontal/Lateral", "frontal_lateral") if name in raw), None)
        if settings["frontal_only"]:
            frontal = raw[view].str.lower().str.startswith("frontal") if view else chexpert.are_frontal(paths)
            raw, paths = raw[frontal], list(itertools.compress(paths, frontal))
        files = chexpert.locate_images(csv, paths, raw.index, missing_ok=True, stamps=stamps)
        outputs = [_renamed(chexpert.from_split(path), settings) for path in paths]
        for file, output, cell, line in zip(files, outputs, raw[column], raw.index, strict=True):
            if file is None:
                skipped.append((cell, f"missing file ({csv.name}, line {line})"))
            else:
                jobs[file] = (file, output, False)
        tables[csv] = (raw, column, paths, files, outputs)
    chexpert.read_boxes(first, keys, splits, boxes)  # an invalid box is an error before anything is written

    def finish(done):
        copied = {}
        for csv, (raw, column, paths, files, outputs) in tables.items():
            keep = [file in done for file in files]
            # Plus's paths begin with the split, CheXpert's with the data set's name
            prefix = "" if chexpert.is_plus(csv) else f"{output_root.name}/".lstrip("/")
            table = raw.assign(**{column: [prefix + output for output in outputs]})[keep]
            write_csv(output_root / csv.name, table)
            rows = zip(paths, files, outputs, strict=True)
            copied |= {chexpert.key_of(path): (file, output) for path, file, output in rows if boxes and file in done}
            for labels in [*csv.parent.glob("*_fixed.json"), *csv.parent.glob("chexbert_labels/*_fixed.json")]:
                copy_file(labels, output_root / labels.relative_to(csv.parent))
        _write_boxes(boxes, chexpert.key_of, copied, output_root, output_root.name, settings)

    return CopyPlan(list(jobs.values()), finish, skipped, stamps)


def _write_boxes(source, key_of, copied, output_root, prefix, settings):
    """Write boxes.csv of the copy, with all columns; an older one is deleted where there is no box.

    Args:
        source: the table, or None.
        key_of: the path of a row (a text) -> key of `copied`.
        copied: {key: (source, output)} of the images in the copy.
    """
    table, rows = read_csv(source) if source else pd.DataFrame(), []
    for (_, row), (where, file, box, unit) in zip(table.iterrows(), read_boxes(source) if source else (), strict=True):
        key = key_of(str(path_of(file, where, absolute=True)))
        if key in copied:
            image, output = copied[key]
            size = image_size(Path(image))
            new = {"file": Path(prefix, output).as_posix()}
            for names in UNITS:
                if set(names) <= set(table.columns):
                    new |= dict(zip(names, _new_size(size, settings), strict=True))
            for moved in _fit([to_pixels(box, unit, size, image, where)], size, settings):
                rows.append(row.to_dict() | new | {k: round(v, 3) for k, v in zip("xywh", moved, strict=True)})
    if rows:
        write_csv(output_root / "boxes.csv", pd.DataFrame(rows))
    else:
        (output_root / "boxes.csv").unlink(missing_ok=True)


def _plan_nih(root, output_root, settings):
    """The images in Data_Entry_2017*.csv, as images/; also copies the CSV, the lists and the boxes."""
    csv = nih.find_csv(root)
    raw, keys = read_csv(csv), nih.read_table(csv)["key"]
    files, boxes, unit = nih.index_images(root), nih.read_boxes(root, set(keys)), nih.box_unit(root, raw)
    names = raw["Image Index"].str.strip()
    new = {key: _renamed(Path("images", name).as_posix(), settings) for key, name in zip(keys, names, strict=True)}
    sources = {key: str(files[key]) for key in new if key in files}
    missing = {line: name for (line, name), key in zip(names.items(), keys, strict=True) if key not in sources}
    skipped = [(name, f"missing file ({csv.name}, line {line})") for line, name in missing.items()]

    def finish(done):
        names = {key: new[key].removeprefix("images/") for key, file in sources.items() if file in done}
        kept = keys.isin(list(names))
        # the boxes of the copy are in its own pixels: its table must not have the original sizes
        table = raw[kept].drop(columns=[name for name in nih.ORIGINAL if boxes and name in raw])
        table["Image Index"] = [names[key] for key in keys[kept]]
        write_csv(output_root / csv.name, table)
        for name in nih.LISTS.values():
            if (root / name).is_file():
                stems = [Path(line).stem for line in (root / name).read_text(errors="surrogateescape").split()]
                write_text(output_root / name, "".join(f"{names[stem]}\n" for stem in stems if stem in names))
            else:
                (output_root / name).unlink(missing_ok=True)
        lines = [nih.BOX_HEADER]
        for key, name in names.items():
            image = files[key]
            size = image_size(image) if key in boxes else None
            for where, finding, box in boxes.get(key, []):
                for moved in _fit([to_pixels(box, unit, size, image, where)], size, settings):
                    lines.append(",".join(map(str, [name, finding, *moved])) + ",,,")
        if (root / nih.BOXES).is_file():
            write_text(output_root / nih.BOXES, "".join(f"{line}\n" for line in lines))
        else:
            (output_root / nih.BOXES).unlink(missing_ok=True)

    return CopyPlan([(file, new[key], False) for key, file in sources.items()], finish, skipped)


def _plan_vindr(root, output_root, settings):
    """The images of train/ and test/; also copies the tables of labels, and those of boxes in the copy's pixels."""
    own = {s: {path.stem: path for path in list_images(root / s)} for s in vindr.SPLITS if (root / s).is_dir()}
    files = {key: path for images in own.values() for key, path in images.items()}
    all_files = [file for images in own.values() for file in images.values()]
    jobs = [(str(file), _renamed(file.relative_to(root).as_posix(), settings), False) for file in all_files]
    tables = {csv: vindr.read_table(csv) for csv in sorted((root / "annotations").glob("*.csv"))}
    for csv, table in tables.items():  # an invalid box is an error before anything is written
        if set(vindr.CORNERS) <= set(table.columns):
            vindr.rows_of(table, csv)
            vindr.check_images(table, csv, root, csv.stem.rpartition("_")[2], files)

    def finish(done):
        (output_root / "annotations").mkdir(exist_ok=True)
        for csv, table in tables.items():
            kept = table[table["image_id"].map(lambda key: str(files.get(key)) in done).astype(bool)]
            if set(vindr.CORNERS) <= set(kept.columns):
                kept = _move_corners(root, kept, csv, files, settings)
            write_csv(output_root / "annotations" / csv.name, kept)

    return CopyPlan(jobs, finish)


def _move_corners(root, table, csv, files, settings):
    """Rows with x_min, y_min, x_max, y_max -> the same for the copies, with their size; rows without a box stay."""
    moved, names = [], [*vindr.CORNERS, *UNITS[1]]
    rows, units = vindr.rows_of(table, csv), units_of(table, csv)
    for (line, row), box, unit in zip(table.iterrows(), rows, units, strict=True):
        row, image = row.to_dict(), files[row["image_id"]]
        if box is None:
            moved.append(row)
            continue
        where, size = f"{csv}, line {line}", image_size(image)
        vindr.check_unit(root, image, unit, where)
        new_size = _new_size(size, settings)
        for x, y, w, h in _fit([to_pixels(box, unit, size, image, where)], size, settings):
            moved.append(row | dict(zip(names, (x, y, x + w, y + h, *new_size), strict=True)))
    return pd.DataFrame(moved, columns=[*table.columns, *(name for name in UNITS[1] if name not in table.columns)])


def _plan_folder(root, output_root, settings):
    """Every image below a folder; also copies masks, NAME.txt and boxes.csv."""
    if settings["frontal_only"]:
        raise ValueError(f"expected CheXpert for `frontal_only`, got {root}, which has no table of views")
    images, masks = images_and_masks(root, [path for path in list_images(root) if output_root not in path.parents])
    boxes = box_rows(root, images)
    png = {**settings, "image_format": "png"}
    jobs = [(str(source), _renamed(source.relative_to(root).as_posix(), settings), False) for source in images]
    for mask in dict.fromkeys(masks.values()):
        jobs.append((str(mask), _renamed(mask.relative_to(root).as_posix(), png), True))
    jobs.sort(key=lambda job: Path(job[0]))
    skipped = [(str(path), NOT_COPIED) for path in sorted(root.glob("*.csv")) if path.name != "boxes.csv"]

    def finish(done):
        copied = {source: (source, output) for source, output, mask in jobs if source in done and not mask}
        for source, output in ((Path(source), output) for source, output in copied.values()):
            if text_of(source).is_file():
                size = image_size(source)
                own = [to_pixels(box, unit, size, source, where) for where, box, unit in boxes.get(source, [])]
                lines = (" ".join(f"{n:g}" for n in box) + "\n" for box in _fit(own, size, settings))
                write_text(text_of(output_root / output), "".join(lines))
            else:
                text_of(output_root / output).unlink(missing_ok=True)
        table = root / "boxes.csv" if (root / "boxes.csv").is_file() else None
        _write_boxes(table, lambda path: str(root / path), copied, output_root, "", settings)

    return CopyPlan(jobs, finish, skipped if jobs else ())


def _new_size(size, settings):
    """(width, height) of the copy of an image of `size`."""
    return size if settings["size"] is None else (settings["size"], settings["size"])


def _fit(boxes, size, settings):
    """Boxes in pixels of an image of `size` (width, height) -> those of its copy, without boxes that a crop removes."""
    return boxes if settings["size"] is None else fit_boxes(boxes, *size, settings["size"], settings["aspect"])


def _renamed(path, settings):
    """Output path of an image: the new suffix replaces an image suffix, and follows any other (of DICOM names)."""
    stem, suffix = os.path.splitext(path)
    return f"{stem if suffix.lower() in SUFFIXES else path}.{settings['image_format']}"
