"""BraTS slices as Wolleb's anomaly code reads them: four MRI sequences, a NIfTI file each, are four channels."""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
from datasets.features.features import register_feature
from tqdm.auto import tqdm

from .folder import UNLABELLED, group_of
from .images import walk
from .rows import to_dataset
from .selection import select_rows
from .tables import check_encodable

SEQUENCES = ("t1", "t1ce", "t2", "flair")  # the order of the channels
SEGMENTATION = "seg"
SUFFIXES = (".nii", ".nii.gz")


def load_brats(
    root,
    *,
    masks=None,
    classes=("healthy", "tumour"),
    patient_pattern=None,
    per_class=None,
    seed=0,
    one_per_patient=False,
    holdout=0.0,
    part="train",
    holdout_seed=0,
):
    """A folder for each slice, below `root`, with files of t1, t1ce, t2, flair and, where it is known, seg -> data set.

    A file's sequence is a word of its name: `brats_train_001_t1_123_w.nii.gz` or `t1.nii.gz`. Values are read as they
    are stored: the original's slices were scaled to [0, 1] beforehand, which `scaling: dtype` wants; other ranges want
    `minmax`, which scales each sequence of a slice by itself. Sides are kept too: it is the model's `aspect: keep` that
    puts 240 pixels into 256.
    Label: 1 where any pixel of seg is above 0, else 0; without seg -1, unlabelled. Mask: seg above 0.
    Patient: the first group of `patient_pattern`, searched in the folder's path below `root`; else what stands before
    the sequence in the files' names (`brats_train_001`); else the folder's path below `root`, that is, every slice
    is its own.

    Args:
        root: e.g. data/brats/training.
        masks: folder of ID-label.nii.gz, the segmentation of slice folder ID (the original's test_labels), for slices
            without seg.
        classes: names of healthy and diseased.
        per_class, seed, one_per_patient, holdout, part, holdout_seed: see `selection.select_rows`.

    Returns:
        `datasets.Dataset` with columns image ((H, W, 4) float32 arrays, read when they are looked at), label, patient,
        view, path (the slice's folder), and mask if there are any.

    Raises:
        ImportError: nibabel is not installed. NotADirectoryError: no such folder.
        ValueError: no slice, a sequence that is missing or there twice, a volume instead of a slice, a segmentation
            of another size.
    """
    root = Path(root)
    slices = list_slices(root)
    if not slices:
        raise ValueError(f"no slice below {root}: expected folders with files of {', '.join(SEQUENCES)}")
    check_encodable([str(folder) for folder in slices], root)
    known = [{**files_of(folder), "folder": folder} for folder in slices]
    for files in known if masks else []:
        beside = Path(masks) / f"{files['folder'].name}-label.nii.gz"
        if SEGMENTATION not in files and beside.is_file():
            files[SEGMENTATION] = beside
    bar = tqdm(known, desc="reading segmentations", unit="slice", delay=2, leave=False)
    table = pd.DataFrame(
        {
            "label": [label_of(files) for files in bar],
            "patient": [patient_of(files, root, patient_pattern) for files in known],
            "key": [files["folder"].relative_to(root).as_posix() for files in known],
        }
    )
    table = select_rows(
        table,
        per_class=per_class,
        seed=seed,
        one_per_patient=one_per_patient,
        holdout=holdout,
        part=part,
        holdout_seed=holdout_seed,
    )
    rows = []
    for index, row in table.iterrows():
        files = known[index]
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


def list_slices(root):
    """Sorted folders below `root` (or `root` itself) that hold a NIfTI file of one of the sequences."""
    root = Path(root)
    if not root.is_dir():
        raise NotADirectoryError(f"expected a folder of slices, got {root}")
    folders = [Path(folder) for folder, _, files in walk(root) if any(map(sequence_of, files))]
    return sorted(folder for folder in folders if set(files_of(folder, check=False)) & set(SEQUENCES))


def files_of(folder, check=True):
    """{sequence: path} of a slice's folder; ValueError where one of the four is missing, or there twice."""
    found = {}
    for path in sorted(folder.iterdir()):
        sequence = sequence_of(path.name)
        if sequence in found and check:
            raise ValueError(f"{folder}: expected one slice a folder, got two files of {sequence}: {path.name}")
        if sequence:
            found[sequence] = path
    missing = [sequence for sequence in SEQUENCES if sequence not in found]
    if missing and check:
        raise ValueError(f"{folder}: no NIfTI file of {', '.join(missing)}")
    return found


def sequence_of(name):
    """The sequence (or "seg") that a file name has among its words; None for other files."""
    if not name.endswith(SUFFIXES):
        return None
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((word for word in words if word in (*SEQUENCES, SEGMENTATION)), None)


def patient_of(files, root, pattern):
    folder = files["folder"]
    relative = folder.relative_to(root).as_posix() if folder != root else folder.name
    if pattern:
        return group_of(pattern, relative)
    before = re.split(rf"(?i)(?:^|[^a-z0-9])({'|'.join(SEQUENCES)})(?![a-z0-9])", files[SEQUENCES[0]].name)[0]
    return before or relative


def label_of(files):
    if SEGMENTATION not in files:
        return UNLABELLED
    return int((read_nifti(files[SEGMENTATION]) > 0).any())


def read_segmentation(files):
    """PIL "L" of 0 / 255; ValueError unless it is as large as its slice."""
    region = read_nifti(files[SEGMENTATION]) > 0
    expected = read_nifti(files[SEQUENCES[0]]).shape
    if region.shape != expected:
        raise ValueError(f"{files[SEGMENTATION]}: expected a mask of {expected}, as its slice, got {region.shape}")
    return PIL.Image.fromarray(region.astype(np.uint8) * 255)


def read_slice(folder):
    """A slice's folder -> (H, W, 4) float32, the sequences as stored."""
    files = files_of(Path(folder))
    return stack_channels([files[sequence] for sequence in SEQUENCES])


def stack_channels(paths):
    """Files of one size -> (H, W, C) float32."""
    channels = [read_nifti(path) for path in paths]
    if len({channel.shape for channel in channels}) > 1:
        sizes = ", ".join(f"{Path(path).name} {c.shape}" for path, c in zip(paths, channels, strict=True))
        raise ValueError(f"{Path(paths[0]).parent}: expected sequences of one size, got {sizes}")
    return np.stack(channels, axis=-1)


def read_nifti(path):
    """One NIfTI slice -> (H, W) float32, its axes as stored."""
    try:
        import nibabel
    except ImportError:
        raise ImportError(
            "BraTS slices are NIfTI files, which nibabel reads: pip install nibabel (or cxr_diffusers[brats])"
        ) from None
    try:
        array = np.asarray(nibabel.load(path).dataobj, dtype=np.float32)
    except FileNotFoundError:
        raise
    except Exception as error:  # nibabel, gzip and zlib raise many kinds; whatever it is, the user needs the path
        raise ValueError(f"{path}: {error}") from error
    array = array.reshape(array.shape[:2]) if array.ndim > 2 and set(array.shape[2:]) == {1} else array
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{path}: expected a slice (H, W), got shape {array.shape}: save a volume's slices first")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: expected finite values, got NaN or infinity")
    return array


@dataclass
class NiftiChannels:
    """A `datasets` feature: paths of NIfTI slices, which an example shows as one (H, W, C) float32 array.

    The paths stay paths: a data set that goes to another machine needs its files beside it.
    """

    dtype: ClassVar[str] = "float32"
    pa_type: ClassVar[pa.DataType] = pa.list_(pa.string())
    _type: str = field(default="NiftiChannels", init=False, repr=False)

    def __call__(self):
        return self.pa_type

    def encode_example(self, value):
        return [str(path) for path in value]

    def decode_example(self, value, token_per_repo_id=None):
        return stack_channels(value)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # "experimental"; without it a saved data set would not open
    register_feature(NiftiChannels, "NiftiChannels")
