"""What a DICOM file says about itself: no picture at all, or a picture that the models here were not made for."""

import math
import re
import warnings

MODALITIES = ("CR", "DX", "RG", "DR", "XR")  # the last two are not in the standard, but in the world
CHEST = ("CHEST", "THORAX", "THORACIC", "LUNG", "TORAX", "POUMON")
CHEST_CODES = ("51185008", "816094009", "T-D3000", "39607008", "T-28000", "43799004")  # chest, thorax, lung
LATERAL = ("LL", "RL", "LAT", "LATERAL", "LLAT", "RLAT")
LATERAL_CODES = ("399173006", "399198007", "399067008", "R-10236", "R-10232", "R-102CD")  # CID 4010
UNUSUAL_VIEWS = ("LLD", "RLD", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "OBLIQUE", "DECUB", "DECUBITUS", "LORDOTIC")
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# beginnings of the classes of objects that are no picture, or none of a patient
NO_PICTURE = (
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


def no_picture(path):
    """What a DICOM file is, if it is no radiograph ("Enhanced SR Storage", "Segmentation Storage"); else "".

    Only the first few hundred bytes are read. "" also for a file that does not say what it is.
    """
    import pydicom

    try:
        kind = pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPClassUID")
        if kind == CAPTURE and "cxr_diffusers" == _manufacturer(path):
            return "Secondary Capture of cxr_diffusers"
    except Exception:  # pydicom has many; what a broken file is, `read_image` will say
        return ""
    if not kind or not kind.startswith(NO_PICTURE):
        return ""
    return kind.name if kind in pydicom.uid.UID_dictionary else "DICOM object without a picture"


def warnings_of(dataset):
    """Why the map of this DICOM image may mean nothing, as its own header tells: a list of sentences, often empty.

    A header that says nothing gives no warning; nothing is guessed from the pixels.

    Args:
        dataset: pydicom dataset; its pixels are not needed.
    """
    found = []
    for check in (_burned_in, _modality, _body_part, _view, _orientation, _greys, _window):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pydicom's quote what they are about
                found += check(dataset)
        except Exception as error:  # an entry that pydicom cannot read must not stop a run, and is worth a word
            found.append(f"a part of the header cannot be read ({type(error).__name__})")
    return [warning.replace(";", ",") for warning in found]


def window_of(dataset):
    """((center, width, function) of the first window or None, a sentence about a window that is none or "").

    Empty elements count as absent; a width below 1 (or not above 0, for the functions that have no such bound) is none.
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


def has_value(value):
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
        yield f"no plain radiograph (Modality {modality})"
    if _text(dataset, "PresentationIntentType") == "FOR PROCESSING":
        yield "raw data of the detector (PresentationIntentType FOR PROCESSING)"


def _body_part(dataset):
    part = _text(dataset, "BodyPartExamined")
    if part:
        if not any(name in part for name in CHEST):
            yield f"not of the chest (BodyPartExamined {part})"
        return
    found = _codes(dataset, "AnatomicRegionSequence")
    if found and not any(code in CHEST_CODES or any(c in meaning.upper() for c in CHEST) for code, meaning in found):
        yield f"not of the chest (AnatomicRegionSequence {found[0][1]})"


def _view(dataset):
    view = _text(dataset, "ViewPosition")
    words = re.split(r"[\s_/,-]+", view)
    codes = _codes(dataset, "ViewCodeSequence")
    if any(word in LATERAL for word in words):
        yield f"a lateral view (ViewPosition {view})"
    elif any(code in LATERAL_CODES for code, _ in codes):
        yield f"a lateral view (ViewCodeSequence {codes[0][1]})"
    elif any(word in UNUSUAL_VIEWS for word in words):
        yield f"no plain frontal view (ViewPosition {view})"
    elif any("oblique" in meaning.lower() for _, meaning in codes):
        yield f"no plain frontal view (ViewCodeSequence {codes[0][1]})"


def _orientation(dataset):
    """A frontal radiograph lies as if one faced the patient: rows run to the left (L), columns to the foot (F)."""
    value = dataset.get("PatientOrientation")
    if not value or isinstance(value, str) or len(value) != 2 or not all(value):
        return
    rows, columns = (str(direction)[0].upper() for direction in value)
    shown = f"PatientOrientation {value[0]}\\{value[1]}"
    if rows in "AP" and columns in "FH":
        yield f"a lateral view ({shown})"
    elif rows in "FH":
        yield f"lies on its side ({shown}, a frontal view has L\\F)"
    else:
        if rows == "R":
            yield f"left and right are exchanged ({shown}, a frontal view has L\\F)"
        if columns == "H":
            yield f"upside down ({shown}, a frontal view has L\\F)"


def _greys(dataset):
    """Bright means dense: where two entries disagree on that, the picture may be its own negative."""
    kind = _text(dataset, "PhotometricInterpretation")
    if kind and kind not in ("MONOCHROME1", "MONOCHROME2"):
        yield f"no grey picture (PhotometricInterpretation {kind})"
        return
    shape = {"MONOCHROME1": "INVERSE", "MONOCHROME2": "IDENTITY"}.get(kind)
    found = _text(dataset, "PresentationLUTShape")
    if shape and found in ("INVERSE", "IDENTITY") and found != shape:
        yield f"may be a negative (PhotometricInterpretation {kind}, PresentationLUTShape {found})"
    sign = dataset.get("PixelIntensityRelationshipSign")
    if (kind, sign) in (("MONOCHROME1", -1), ("MONOCHROME2", 1)):
        yield f"may be a negative (PhotometricInterpretation {kind}, PixelIntensityRelationshipSign {sign})"


def _text(dataset, name):
    return str(dataset.get(name) or "").strip().upper()


def _codes(dataset, name):
    """[(code, meaning)] of a code sequence."""
    items = dataset.get(name) or []
    return [(str(item.get("CodeValue") or ""), str(item.get("CodeMeaning") or "")) for item in items]


def _manufacturer(path):
    from .dicom import open_dicom

    return str(open_dicom(path, stop_before_pixels=True, specific_tags=["Manufacturer"]).get("Manufacturer"))
