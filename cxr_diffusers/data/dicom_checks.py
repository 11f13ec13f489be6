"""Checks of a DICOM header: is the image a radiograph of the chest, frontal and upright, as the models expect it?

Warnings name elements of the header. They quote a value only if it is one of the words listed here: any other value
may be a patient's name, whatever the element.
"""

import math
import re
import warnings
from pathlib import Path
from typing import Any

MODALITIES = ("CR", "DX", "RG", "DR", "XR")  # the last two are not in the standard, but are in use
CHEST = ("CHEST", "THORAX", "THORACIC", "LUNG", "TORAX", "POUMON")
CHEST_CODES = ("51185008", "816094009", "T-D3000", "39607008", "T-28000", "43799004")  # chest, thorax, lung
LATERAL = ("LL", "RL", "LAT", "LATERAL", "LLAT", "RLAT")
LATERAL_CODES = ("399173006", "399198007", "399067008", "R-10236", "R-10232", "R-102CD")  # CID 4010
UNUSUAL_VIEWS = ("LLD", "RLD", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "OBLIQUE", "DECUB", "DECUBITUS", "LORDOTIC")
# values that a warning may quote
OTHER_MODALITIES = ("CT", "MG", "MR", "NM", "OT", "PT", "PX", "IO", "RF", "SC", "US", "XA", "XC")
OTHER_PARTS = (
    *("ABDOMEN", "ANKLE", "ARM", "BREAST", "CLAVICLE", "COCCYX", "CSPINE", "ELBOW", "EXTREMITY", "FINGER", "FOOT"),
    *("FOREARM", "HAND", "HEAD", "HIP", "HUMERUS", "JAW", "KNEE", "LEG", "LSPINE", "NECK", "PELVIS", "SHOULDER"),
    *("SKULL", "SPINE", "TOE", "TSPINE", "WHOLEBODY", "WRIST"),
)
PHOTOMETRIC = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420")
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# beginnings of the UIDs of object types that are not images of a patient
NO_RADIOGRAPH = (
    "1.2.840.10008.1.3.10",  # table of contents (DICOMDIR)
    "1.2.840.10008.5.1.4.1.1.4.2",  # MR spectroscopy
    "1.2.840.10008.5.1.4.1.1.9.",  # waveforms
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.30",  # parametric maps
    "1.2.840.10008.5.1.4.1.1.66",  # raw data, registrations, segmentations
    "1.2.840.10008.5.1.4.1.1.67",  # real-world value mappings
    "1.2.840.10008.5.1.4.1.1.88.",  # reports, key objects
    "1.2.840.10008.5.1.4.1.1.104.",  # encapsulated documents
    "1.2.840.10008.5.1.4.1.1.481.",  # radiotherapy
    "1.2.840.10008.5.1.4.3",  # (and below) hanging protocols, colour palettes, implants
    "1.2.840.10008.5.1.4.4",
)


def non_radiograph_type(path: Path | str) -> str:
    """The object type of a DICOM file that is not an image ("Enhanced SR Storage", ...); "" for an image.

    Reads only the first few hundred bytes. Returns "" also for a file without an object type.
    """
    import pydicom

    from .dicom import quiet

    try:
        with quiet():
            object_class = pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPClassUID")
        if object_class == CAPTURE and "cxr_diffusers" == _manufacturer(path):
            return "Secondary Capture of cxr_diffusers"
    except Exception:  # of many types; `read_image` reports the fault of a damaged file
        return ""
    if not object_class or not object_class.startswith(NO_RADIOGRAPH):
        return ""
    return object_class.name if object_class in pydicom.uid.UID_dictionary else "DICOM object without an image"


def warnings_of(dataset: Any) -> list[str]:
    """Reasons in a DICOM header why the map of its image may be meaningless: a list of sentences, often empty.

    Missing elements give no warning. The pixels are not examined.

    Args:
        dataset: pydicom dataset; its pixels are not needed.
    """
    sentences = []
    for check, elements in CHECKS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pydicom's warnings quote values
                sentences += check(dataset)
        except Exception:  # an element that pydicom cannot read must not stop a run
            broken = [name for name in elements if not _can_be_read(dataset, name)] or elements
            sentences.append(f"a part of the header cannot be read ({', '.join(broken)})")
    return [sentence.replace(";", ",") for sentence in sentences]


def window_of(dataset: Any) -> tuple[tuple[float, float, str] | None, str]:
    """((center, width, function) of the first window, or None; a warning about an invalid window, or "").

    Empty elements count as absent. A width is invalid below 1, or, for LINEAR_EXACT and SIGMOID, if it is not above 0.
    """
    try:
        center, width = (_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
        center, width = (None if v is None else float(v) for v in (center, width))
    except Exception:
        return None, "WindowCenter or WindowWidth cannot be read, shown without a window"
    if center is None or width is None:
        return None, ""
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    function = function if function in ("LINEAR_EXACT", "SIGMOID") else "LINEAR"
    if not (math.isfinite(center) and math.isfinite(width) and (width >= 1 if function == "LINEAR" else width > 0)):
        return None, "WindowWidth is too small for a window, shown without one"
    return (center, width, function), ""


def has_value(value: Any) -> bool:
    """Whether an element's value is neither None nor empty."""
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)


def _first(value):
    if not has_value(value):
        return None
    value = value if isinstance(value, (str, float, int)) else value[0]
    return value if has_value(value) else None


def _window(dataset):
    problem = "" if has_value(dataset.get("VOILUTSequence")) else window_of(dataset)[1]
    if problem:
        yield problem


def _burned_in(dataset):
    if _text(dataset, "BurnedInAnnotation") == "YES":
        yield "text burned into the pixels (BurnedInAnnotation YES)"


def _modality(dataset):
    modality = _text(dataset, "Modality")
    if modality and modality not in MODALITIES:
        yield f"no plain radiograph ({_quoted('Modality', modality, OTHER_MODALITIES)})"
    if _text(dataset, "PresentationIntentType") == "FOR PROCESSING":
        yield "raw data of the detector (PresentationIntentType FOR PROCESSING)"


def _body_part(dataset):
    part = _text(dataset, "BodyPartExamined")
    if part:
        if not any(name in part for name in CHEST):
            yield f"not of the chest ({_quoted('BodyPartExamined', part, OTHER_PARTS)})"
        return
    codes = _codes(dataset, "AnatomicRegionSequence")
    if codes and not any(code in CHEST_CODES or any(c in meaning.upper() for c in CHEST) for code, meaning in codes):
        yield f"not of the chest ({_quoted('AnatomicRegionSequence', codes[0][1].strip().upper(), OTHER_PARTS)})"


def _view(dataset):
    words = re.split(r"[\s_/,-]+", _text(dataset, "ViewPosition"))
    lateral, unusual = (next((w for w in words if w in views), None) for views in (LATERAL, UNUSUAL_VIEWS))
    codes = _codes(dataset, "ViewCodeSequence")
    if lateral:
        yield f"a lateral view (ViewPosition {lateral})"
    elif any(code in LATERAL_CODES for code, _ in codes):
        yield "a lateral view (ViewCodeSequence)"
    elif unusual:
        yield f"no plain frontal view (ViewPosition {unusual})"
    elif any("oblique" in meaning.lower() for _, meaning in codes):
        yield "no plain frontal view (ViewCodeSequence: oblique)"


def _orientation(dataset):
    """A frontal radiograph is displayed facing the patient: rows run to the left (L), columns to the feet (F)."""
    value = dataset.get("PatientOrientation")
    if not value or isinstance(value, str) or len(value) != 2 or not all(value):
        return
    rows, columns = (str(direction).strip().upper()[:1] for direction in value)
    if not (rows and columns and {rows, columns} <= set("APLRFH")):
        return
    element = f"PatientOrientation {rows}\\{columns}"
    if rows in "AP" and columns in "FH":
        yield f"a lateral view ({element})"
    elif rows in "FH":
        yield f"lies on its side ({element}, a frontal view has L\\F)"
    else:
        if rows == "R":
            yield f"left and right are exchanged ({element}, a frontal view has L\\F)"
        if columns == "H":
            yield f"upside down ({element}, a frontal view has L\\F)"


def _greys(dataset):
    """Dense tissue should be bright: if two elements disagree on the polarity, the image may be a negative."""
    photometric = _text(dataset, "PhotometricInterpretation")
    if photometric and photometric not in ("MONOCHROME1", "MONOCHROME2"):
        yield f"no grey image ({_quoted('PhotometricInterpretation', photometric, PHOTOMETRIC)})"
        return
    expected = {"MONOCHROME1": "INVERSE", "MONOCHROME2": "IDENTITY"}.get(photometric)
    shape = _text(dataset, "PresentationLUTShape")
    if expected and shape in ("INVERSE", "IDENTITY") and shape != expected:
        yield f"may be a negative (PhotometricInterpretation {photometric}, PresentationLUTShape {shape})"
    sign = dataset.get("PixelIntensityRelationshipSign")
    if (photometric, sign) in (("MONOCHROME1", -1), ("MONOCHROME2", 1)):
        yield f"may be a negative (PhotometricInterpretation {photometric}, PixelIntensityRelationshipSign {int(sign)})"


CHECKS = {  # a check -> the elements that it reads
    _burned_in: ("BurnedInAnnotation",),
    _modality: ("Modality", "PresentationIntentType"),
    _body_part: ("BodyPartExamined", "AnatomicRegionSequence"),
    _view: ("ViewPosition", "ViewCodeSequence"),
    _orientation: ("PatientOrientation",),
    _greys: ("PhotometricInterpretation", "PresentationLUTShape", "PixelIntensityRelationshipSign"),
    _window: ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
}


def _can_be_read(dataset, name):
    try:
        str(dataset.get(name))
    except Exception:
        return False
    return True


def _quoted(name, value, allowed):
    """The name of an element, with its value only if that is one of `allowed`."""
    return f"{name} {value}" if value in allowed else name


def _text(dataset, name):
    return str(dataset.get(name) or "").strip().upper()


def _codes(dataset, name):
    """[(code, meaning)] of a code sequence."""
    items = dataset.get(name) or []
    return [(str(item.get("CodeValue") or ""), str(item.get("CodeMeaning") or "")) for item in items]


def _manufacturer(path):
    from .dicom import open_dicom

    return str(open_dicom(path, stop_before_pixels=True, specific_tags=["Manufacturer"]).get("Manufacturer"))
