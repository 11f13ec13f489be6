"""BraTS slices: four MRI sequences, a NIfTI file each, are the four channels of an image."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Unpack

import datasets
import numpy as np
import pandas as pd
import PIL.Image
from tqdm.auto import tqdm

from .folder import UNLABELLED, group_of
from .images import walk
from .rows import PathsFeature, registered, to_dataset
from .selection import Selection, select_rows
from .tables import check_encodable

SEQUENCES = ("t1", "t1ce", "t2", "flair")  # the order of the channels
NAMES_2023 = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"}  # names of the same since BraTS 2023
SEGMENTATION = "seg"
SUFFIXES = (".nii", ".nii.gz")


def load_brats(
    root: Path | str,
    *,
    masks: Path | str | None = None,
    classes: Sequence[str] = ("healthy", "tumour"),
    patient_pattern: str | None = None,
    **selection: Unpack[Selection],
) -> datasets.Dataset:
    """Slices of brain MRI -> data set: a folder for each slice, with files of four sequences, and seg if it is known.

    The sequences are t1, t1ce, t2, flair, or t1n, t1c, t2w, t2f as they are called since BraTS 2023. A file's sequence
    is a word of its name: `brats_train_001_t1_123_w.nii.gz`, `BraTS-GLI-00005-000-t1n_080.nii.gz`, `t1.nii.gz`.
    Values are read as stored: the slices of Wolleb et al. (2022) were scaled to [0, 1] beforehand, which fits
    `scaling: dtype`; other ranges need `minmax`, which scales each sequence of a slice by itself. The size is kept,
    too: the model's `aspect: keep` puts 240 pixels into 256.
    Label: 1 where any pixel of seg is above 0, else 0; without seg -1, unlabelled. Mask: seg above 0.
    Patient: the first group of `patient_pattern`, searched in the folder's path below `root`; else the part of the
    files' names before the sequence (`brats_train_001`; `BraTS-GLI-00005`, without the number of the examination); else
    the folder's path below `root`, so that every slice is its own patient.

    Args:
        root: e.g. data/brats/training.
        masks: a folder with ID-label.nii.gz, the segmentation of slice folder ID (the test_labels of Wolleb et al.),
            for slices without seg.
        classes: names of healthy and diseased.
        selection: `per_class`, `holdout` and the other keywords of `selection.select_rows`.

    Returns:
        `datasets.Dataset` with columns image ((H, W, 4) float32 arrays, read on access), label, patient, view, path
        (the slice's folder), and mask if there are any.

    Raises:
        ImportError: nibabel is not installed. NotADirectoryError: no such folder.
        ValueError: no slice, `masks` without any of their segmentations, another number of classes than two, a missing
            sequence or two files of one, a volume instead of a slice, a segmentation of another size.
    """
    root = Path(root)
    if len(classes) != 2:
        raise ValueError(f"expected `classes` the names of healthy and diseased, got {classes!r}")
    slices = list_slices(root)
    if not slices:
        raise ValueError(f"no slice below {root}: expected folders with files of {', '.join(SEQUENCES)}")
    check_encodable([str(folder) for folder in slices], root)
    files_of_slices = [{**files_of(folder), "folder": folder} for folder in slices]
    if masks is not None:
        add_segmentations(files_of_slices, Path(masks))
    bar = tqdm(files_of_slices, desc="reading segmentations", unit="slice", delay=2, leave=False)
    table = pd.DataFrame(
        {
            "label": [label_of(files) for files in bar],
            "patient": [patient_of(files, root, patient_pattern) for files in files_of_slices],
            "key": [files["folder"].relative_to(root).as_posix() for files in files_of_slices],
        }
    )
    table = select_rows(table, **selection)
    rows = []
    for index, row in table.iterrows():
        files = files_of_slices[index]
        rows.append(
            {
                "image": [str(files[sequence]) for sequence in SEQUENCES],
                "label": row["label"],
                "patient": row["patient"],
                "path": str(files["folder"]),
                "mask": read_segmentation(files) if row["label"] == 1 else None,
            }
        )
    return to_dataset(rows, classes, image=NiftiChannels())


def add_segmentations(files_of_slices: Sequence[dict[str, Path]], folder: Path) -> None:
    """Add ID-label.nii.gz of a folder to the files of each slice without a segmentation.

    Raises:
        NotADirectoryError: no such folder. ValueError: it has the segmentation of none of these slices.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"expected a folder of segmentations as `masks`, got {folder}")
    missing = [files for files in files_of_slices if SEGMENTATION not in files]
    for files in missing:
        separate = folder / f"{files['folder'].name}-label.nii.gz"
        if separate.is_file():
            files[SEGMENTATION] = separate
    if missing and not any(SEGMENTATION in files for files in missing):
        name = f"{missing[0]['folder'].name}-label.nii.gz"
        raise ValueError(f"{folder}: expected {name} or those of other slices, got none")


def list_slices(root: Path | str) -> list[Path]:
    """Sorted folders below `root` (or `root` itself) that hold a NIfTI file of one of the sequences."""
    root = Path(root)
    if not root.is_dir():
        raise NotADirectoryError(f"expected a folder of slices, got {root}")
    folders = [Path(folder) for folder, _, files in walk(root) if any(map(sequence_of, files))]
    return sorted(folder for folder in folders if set(files_of(folder, check=False)) & set(SEQUENCES))


def files_of(folder: Path, check: bool = True) -> dict[str, Path]:
    """{sequence or "seg": path} of a slice's folder; ValueError where one of the four is missing, or there twice."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        sequence = sequence_of(path.name)
        if sequence in files and check:
            raise ValueError(f"{folder}: expected one slice a folder, got two files of {sequence}: {path.name}")
        if sequence:
            files[sequence] = path
    missing = [sequence for sequence in SEQUENCES if sequence not in files]
    if missing and check:
        raise ValueError(f"{folder}: no NIfTI file of {', '.join(missing)}")
    return files


def sequence_of(name: str) -> str | None:
    """The sequence (of `SEQUENCES`, or "seg") that a file name has among its words; None for other files."""
    if not name.endswith(SUFFIXES):
        return None
    words = (NAMES_2023.get(word, word) for word in re.split(r"[^a-z0-9]+", name.lower()))
    return next((word for word in words if word in (*SEQUENCES, SEGMENTATION)), None)


def patient_of(files: Mapping[str, Path], root: Path, pattern: str | None) -> str:
    """Patient of a slice, see `load_brats`."""
    folder = files["folder"]
    relative = folder.relative_to(root).as_posix() if folder != root else folder.name
    if pattern:
        return group_of(pattern, relative)
    names = "|".join((*SEQUENCES, *NAMES_2023))
    before = re.split(rf"(?i)(?:^|[^a-z0-9])({names})(?![a-z0-9])", files[SEQUENCES[0]].name)[0]
    examination = re.fullmatch(r"(?i)(BraTS-[a-z]+-\d+)-\d+", before)  # patient and number of the examination
    return examination.group(1) if examination else before or relative


def label_of(files: Mapping[str, Path]) -> int:
    """1 where any pixel of the segmentation is above 0, else 0; `UNLABELLED` without one."""
    if SEGMENTATION not in files:
        return UNLABELLED
    return int((read_nifti(files[SEGMENTATION]) > 0).any())


def read_segmentation(files: Mapping[str, Path]) -> PIL.Image.Image:
    """PIL "L" of 0 / 255; ValueError unless it is as large as its slice."""
    region = read_nifti(files[SEGMENTATION]) > 0
    expected = read_nifti(files[SEQUENCES[0]]).shape
    if region.shape != expected:
        raise ValueError(f"{files[SEGMENTATION]}: expected a mask of {expected}, as its slice, got {region.shape}")
    return PIL.Image.fromarray(region.astype(np.uint8) * 255)


def read_slice(folder: Path | str) -> np.ndarray:
    """The folder of a slice -> (H, W, 4) float32, the values as stored."""
    files = files_of(Path(folder))
    return stack_channels([files[sequence] for sequence in SEQUENCES])


def stack_channels(paths: Sequence[Path | str]) -> np.ndarray:
    """Files of one size -> (H, W, C) float32."""
    channels = [read_nifti(path) for path in paths]
    if len({channel.shape for channel in channels}) > 1:
        sizes = ", ".join(f"{Path(path).name} {c.shape}" for path, c in zip(paths, channels, strict=True))
        raise ValueError(f"{Path(paths[0]).parent}: expected sequences of one size, got {sizes}")
    return np.stack(channels, axis=-1)


def read_nifti(path: Path | str) -> np.ndarray:
    """One NIfTI slice -> (H, W) float32, its axes as stored."""
    try:
        import nibabel
    except ImportError:
        raise ImportError(
            "BraTS slices are NIfTI files, which nibabel reads: pip install nibabel (or cxr_diffusers[brats])"
        ) from None
    try:
        image: Any = nibabel.load(path)  # its stubs know the base class of all formats only
        array = np.asarray(image.dataobj, dtype=np.float32)
    except FileNotFoundError:
        raise
    except Exception as error:  # nibabel, gzip and zlib raise errors of many types; the user needs the path with each
        raise ValueError(f"{path}: {error}") from error
    array = array.reshape(array.shape[:2]) if array.ndim > 2 and set(array.shape[2:]) == {1} else array
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{path}: expected a slice (H, W), got shape {array.shape}: save a volume's slices first")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: expected finite values, got NaN or infinity")
    return array


@registered
@dataclass
class NiftiChannels(PathsFeature):
    """A `datasets` feature: the paths of NIfTI slices, read on access as one (H, W, C) float32 array."""

    dtype: ClassVar[str] = "float32"
    _type: str = field(default="NiftiChannels", init=False, repr=False)

    def decode_example(self, value: Sequence[str], token_per_repo_id: Any = None) -> np.ndarray:
        return stack_channels(value)
