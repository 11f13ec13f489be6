"""DICOM objects of an anomaly map, filed in the study of their source: Segmentation, Secondary Capture, GSPS."""

import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydicom.uid import PYDICOM_ROOT_UID, ExplicitVRLittleEndian, generate_uid

from ..data.dicom_checks import has_value, window_of
from ..files import write_file
from ..version import __version__
from .regions import find_outlines
from .thresholds import describe_threshold

NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns")
# type 2: mandatory, but possibly empty; many sources lack some
EMPTY_ALLOWED = (
    "AccessionNumber PatientBirthDate PatientID PatientName PatientSex ReferringPhysicianName StudyDate StudyID "
    "StudyTime"
).split()
# further elements that are copied from the source: identity, geometry, burned-in text, compression; no free text
COPIED = (
    "SpecificCharacterSet IssuerOfPatientID Modality SeriesNumber InstanceNumber NumberOfFrames FrameOfReferenceUID "
    "PositionReferenceIndicator ImagePositionPatient ImageOrientationPatient PixelSpacing ImagerPixelSpacing "
    "SliceThickness PatientOrientation Laterality BurnedInAnnotation LossyImageCompression LossyImageCompressionRatio "
    "LossyImageCompressionMethod"
).split()
# elements that decide how the pixels are displayed
DISPLAY = "ModalityLUTSequence RescaleSlope RescaleIntercept RescaleType VOILUTSequence".split()
# by an element's name, or by its value representation, for messages
EXPECTED = {
    "PatientSex": "M, F or O",
    "SpecificCharacterSet": "a character set of DICOM",
    "CS": "a code in capital letters",
    "DA": "a date YYYYMMDD",
    "DS": "a number",
    "IS": "an integer",
    "TM": "a time HHMMSS",
    "UI": "a UID",
}
WARNING = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"
SEGMENT_LABEL = "Unusual to the model (research)"
HOME = "https://github.com/cxr-diffusers/cxr_diffusers"
BANNER = (120, 0, 0)
# added to the number of the source's series
SEGMENTATION_SERIES, CAPTURE_SERIES, PRESENTATION_SERIES = 9000, 9500, 9700
ENDINGS = ("seg", "overlay", "gsps")  # NAME_seg.dcm, NAME_overlay.dcm, NAME_gsps.dcm


@dataclass
class Algorithm:
    """The maker of a map, as DICOM objects name it.

    name: of the pipeline's class.
    model: name of the checkpoint, without its path.
    fingerprint: of weights, settings and code version.
    threshold: map value above which a pixel is in the segment.
    healthy_quantile: the quantile of healthy images' pixels that gave the threshold; None for any other.
    has_counterfactual: whether the panel has one.
    """

    name: str
    model: str
    fingerprint: str
    threshold: float
    healthy_quantile: float | None = None
    has_counterfactual: bool = True

    def describe_threshold(self) -> str:
        """See the function of this name in `thresholds`."""
        return describe_threshold(self.threshold, self.healthy_quantile)


def import_highdicom() -> Any:
    """The module highdicom; ImportError with the command that installs it."""
    try:
        import highdicom
        import highdicom.pr
        import highdicom.sc
        import highdicom.seg
    except ImportError:
        raise ImportError("DICOM objects need highdicom: pip install 'cxr_diffusers[dicom]'") from None
    return highdicom


def check_source(dataset: Any, path: Path | str = "the source") -> None:
    """Raise ValueError unless this DICOM image names its study and series, so that objects can be filed beside it."""
    missing = [name for name in NEEDED if not dataset.get(name)]
    if missing:
        raise ValueError(f"{path}: no DICOM objects can be filed beside a source without {', '.join(missing)}")


def filing_header(dataset: Any) -> Any:
    """A new header with only those elements of the source that file objects beside it: no comments, no history.

    Raises:
        ValueError: see `check_source`.
    """
    check_source(dataset)
    header = pydicom_dataset(**{name: None for name in EMPTY_ALLOWED})
    header.file_meta = getattr(dataset, "file_meta", None)
    for name in (*NEEDED, *EMPTY_ALLOWED, *COPIED):
        if name in dataset and (name not in COPIED or has_value(dataset.get(name))):
            header[name] = dataset[name]
    return header


def make_segmentation(source: Any, mask: np.ndarray, algorithm: Algorithm) -> Any:
    """The thresholded map as a DICOM Segmentation of one binary segment, pixel by pixel on its source.

    There is no fractional map: DICOM's fractions are a probability or an occupancy, and a map value is neither.

    Args:
        source: pydicom dataset of the image; its pixels are not needed.
        mask: (Rows, Columns) booleans; may be empty.
        algorithm: `Algorithm`.

    Returns:
        `highdicom.seg.Segmentation`.

    Raises:
        ValueError: a mask of another size than the source, or a source that `check_source` refuses.
    """
    hd = import_highdicom()
    from pydicom.sr.codedict import codes

    source = filing_header(source)
    if mask.shape != (source.Rows, source.Columns):
        raise ValueError(f"expected a mask of the source's size {(source.Rows, source.Columns)}, got {mask.shape}")
    parameters = {
        "model": algorithm.model,
        "fingerprint": algorithm.fingerprint,
        "threshold": f"{algorithm.threshold:g}",
    }
    if algorithm.healthy_quantile is not None:
        parameters["quantile of healthy images"] = f"{algorithm.healthy_quantile:g}"
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label=SEGMENT_LABEL,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,  # CID 7150
        segmented_property_type=codes.CID7194.Lesion,  # the least specific code
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=f"cxr_diffusers {algorithm.name}",
            family=codes.CID7162.ArtificialIntelligence,
            version=__version__,
            source=HOME,
            parameters=parameters,
        ),
        anatomic_regions=[codes.CID4.Thorax],
        display_color=hd.color.CIELabColor.from_string("orangered"),
    )
    segmentation = hd.seg.Segmentation(
        source_images=[source],
        pixel_array=mask.astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[segment],
        **instance("seg", source, SEGMENTATION_SERIES, algorithm),
        **equipment(algorithm),
        content_label="ANOMALY",
        content_description=f"map above {algorithm.describe_threshold()}",
        series_description=f"RESEARCH USE ONLY: {algorithm.name} segmentation",
        omit_empty_frames=False,  # "nothing above the threshold" is a result, too
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    dimensions = make_uid("dimensions", source.SOPInstanceUID, algorithm)
    for item in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions
    return complete(segmentation, source)


def make_capture(source: Any, image: Image.Image, algorithm: Algorithm) -> Any:
    """A colour image as a DICOM Secondary Capture, under a banner that says that it is for research only.

    Args:
        source: pydicom dataset of the radiograph.
        image: RGB PIL image without text about the patient.
        algorithm: `Algorithm`.

    Returns:
        `highdicom.sc.SCImage`.
    """
    hd = import_highdicom()
    from pydicom.sr.codedict import codes

    source = filing_header(source)
    banner = f"{WARNING}     {algorithm.name} {algorithm.model}, cxr_diffusers {__version__}"
    pixels = np.asarray(with_banner(image, banner))
    capture = hd.sc.SCImage.from_ref_dataset(
        source,
        pixels,
        "RGB",
        8,
        "PATIENT",
        # the pixels are hashed as well: another colour scale gives another image
        **instance("capture", source, CAPTURE_SERIES, algorithm, f" {sha256(pixels.tobytes()).hexdigest()}"),
        manufacturer="cxr_diffusers",
        patient_orientation=("L", "F"),  # mandatory in highdicom; replaced below
        transfer_syntax_uid=ExplicitVRLittleEndian,
        series_description=f"RESEARCH USE ONLY: {algorithm.name} overlay",
    )
    capture.Laterality = source.get("Laterality") or ""
    capture.ConversionType = "WSD"  # made by a workstation's software
    capture.ManufacturerModelName = f"{algorithm.name} {algorithm.model}"[:64]
    capture.SoftwareVersions, capture.DeviceSerialNumber = __version__, algorithm.fingerprint
    panels = "input, counterfactual and anomaly map" if algorithm.has_counterfactual else "input and anomaly map"
    capture.DerivationDescription = f"{panels} side by side. {WARNING}"
    # the banner and title name no patient, but text in the source's pixels is visible in the capture
    if source.get("BurnedInAnnotation"):
        capture.BurnedInAnnotation = source.BurnedInAnnotation
    if source.get("LossyImageCompression") == "01":
        for name in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if name in source:
                setattr(capture, name, source.get(name))
    reference = hd.content.ReferencedImageSequence([source])[0]
    reference.PurposeOfReferenceCodeSequence = [
        hd.sr.CodedConcept(*codes.CID7202.SourceImageForImageProcessingOperation)
    ]
    capture.SourceImageSequence = [reference]
    return complete(capture, source)


def make_presentation_state(source: Any, mask: np.ndarray, algorithm: Algorithm) -> Any:
    """The outlines of the thresholded map as a Grayscale Softcopy Presentation State, drawn on the source by a viewer.

    The source is displayed as its own header says (modality LUT, VOI LUT or first window, polarity). A line of text
    says that the outlines are for research only.

    Args:
        source: pydicom dataset of the image; its pixels are not needed.
        mask: (Rows, Columns) booleans; an empty mask gives the line of text without outlines.
        algorithm: `Algorithm`.

    Returns:
        `highdicom.pr.GrayscaleSoftcopyPresentationState`.

    Raises:
        ValueError: a source that `check_source` refuses.
    """
    hd = import_highdicom()
    header = filing_header(source)
    copy_display(source, header)
    layer = hd.pr.GraphicLayer("ANOMALY", 1, "Research use only", hd.color.CIELabColor.from_string("orangered"))
    warning = hd.pr.TextObject(
        f"{WARNING}: {algorithm.name} {algorithm.model}, map above {algorithm.describe_threshold()}",
        "DISPLAY",
        bounding_box=(0.02, 0.02, 0.98, 0.07),
        text_justification="LEFT",
    )
    outlines = [hd.pr.GraphicObject("POLYLINE", outline, "PIXEL") for outline in find_outlines(mask)]
    annotation = hd.pr.GraphicAnnotation([header], layer, graphic_objects=outlines, text_objects=[warning])
    shape = "INVERSE" if header.PhotometricInterpretation == "MONOCHROME1" else "IDENTITY"
    state = hd.pr.GrayscaleSoftcopyPresentationState(
        [header],
        **instance("presentation", header, PRESENTATION_SERIES, algorithm),
        **equipment(algorithm),
        content_label="ANOMALY",
        content_description=f"outlines of the map above {algorithm.threshold:g}",
        graphic_annotations=[annotation],
        graphic_layers=[layer],
        presentation_lut_transformation=hd.PresentationLUTTransformation(presentation_lut_shape=shape),
        series_description=f"RESEARCH USE ONLY: {algorithm.name} outlines",
    )
    state.Laterality = header.get("Laterality") or ""
    if header.get("IssuerOfPatientID"):
        state.IssuerOfPatientID = header.IssuerOfPatientID
    return state


def copy_display(source: Any, header: Any) -> None:
    """Copy the elements that decide the display of the pixels: LUTs, the first window, polarity."""
    header.SamplesPerPixel = source.get("SamplesPerPixel") or 1
    header.PhotometricInterpretation = source.get("PhotometricInterpretation") or "MONOCHROME2"
    for name in ("ModalityLUTSequence", "VOILUTSequence"):
        tables = [item for item in source.get(name) or () if {"LUTDescriptor", "LUTData"} <= set(item.dir())]
        if tables:
            setattr(header, name, tables)
    rescale = {name: source.get(name) for name in ("RescaleSlope", "RescaleIntercept")}
    if any(map(has_value, rescale.values())) and "ModalityLUTSequence" not in header:
        # one alone is mended as `read_image` reads it; a type is mandatory beside them, US: unspecified
        defaults = {"RescaleSlope": 1, "RescaleIntercept": 0, "RescaleType": "US"}
        for name, default in defaults.items():
            setattr(header, name, source.get(name) if has_value(source.get(name)) else default)
    window = window_of(source)[0]
    if window is not None and "VOILUTSequence" not in header:
        header.WindowCenter, header.WindowWidth, header.VOILUTFunction = window


def complete(made: Any, source: Any) -> Any:
    """Add to an object of highdicom the elements that file it in its study."""
    if source.get("IssuerOfPatientID"):
        made.IssuerOfPatientID = source.IssuerOfPatientID
    made.PatientOrientation = source.get("PatientOrientation") or ""  # the panels have the orientation of the source
    instance = pydicom_dataset(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)
    series = pydicom_dataset(SeriesInstanceUID=source.SeriesInstanceUID, ReferencedInstanceSequence=[instance])
    made.ReferencedSeriesSequence = [series]  # Common Instance Reference
    return made


def equipment(algorithm: Algorithm) -> dict[str, str]:
    """The keywords with which highdicom describes the equipment: this program, and its model as the device."""
    return {
        "manufacturer": "cxr_diffusers",
        "manufacturer_model_name": f"{algorithm.name} {algorithm.model}"[:64],
        "software_versions": __version__,
        "device_serial_number": algorithm.fingerprint,
    }


def instance(role: str, source: Any, offset: int, algorithm: Algorithm, content: str = "") -> dict[str, Any]:
    """The keywords with which highdicom numbers an object: its series and its instance, both after the source's.

    Args:
        offset: added to the number of the source's series.
        content: added to `role` in the instance's UID, for objects whose content may differ.
    """
    return {
        "series_instance_uid": make_uid(f"{role} series", source.SeriesInstanceUID, algorithm),
        "series_number": int(source.get("SeriesNumber") or 0) + offset,
        "sop_instance_uid": make_uid(f"{role}{content}", source.SOPInstanceUID, algorithm),
        "instance_number": max(int(source.get("InstanceNumber") or 1), 1),
    }


def pydicom_dataset(**values: Any) -> Any:
    """A pydicom dataset with these elements."""
    from pydicom import Dataset

    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def make_uid(role: str, source_uid: str, algorithm: Algorithm) -> str:
    """A UID below pydicom's root, always the same for the same source, weights, settings and threshold."""
    entropy = ["cxr_diffusers", role, str(source_uid), algorithm.fingerprint, repr(algorithm.threshold)]
    entropy += [] if algorithm.healthy_quantile is None else [f"healthy:{algorithm.healthy_quantile!r}"]
    return generate_uid(prefix=PYDICOM_ROOT_UID, entropy_srcs=entropy)


def with_banner(image: Image.Image, text: str) -> Image.Image:
    """An RGB image under a dark red line of text."""
    size = max(14, image.width // 70)
    canvas = Image.new("RGB", (image.width, image.height + 2 * size), BANNER)
    canvas.paste(image, (0, 2 * size))
    draw = ImageDraw.Draw(canvas)
    draw.text((size, size), text, "white", ImageFont.load_default(size), anchor="lm")
    return canvas


class DicomOutputError(ValueError):
    """The header of a source is too damaged to make DICOM objects from it."""


def make_objects(source: Any, mask: np.ndarray, image: Image.Image, algorithm: Algorithm) -> tuple[Any, Any, Any]:
    """(`make_segmentation`, `make_capture`, `make_presentation_state`)."""
    return (
        make_segmentation(source, mask, algorithm),
        make_capture(source, image, algorithm),
        make_presentation_state(source, mask, algorithm),
    )


def refused_elements(source: Any, algorithm: Algorithm) -> list[str]:
    """["NAME: expected ..., got another value"] for each element that, alone beside `NEEDED`, gives no objects.

    No value is quoted: any may be a patient's name.
    """
    needed = {name: source.get(name) for name in NEEDED} | {"Rows": 8, "Columns": 8}  # small: it is tried often
    refused = []
    for name in (*EMPTY_ALLOWED, *COPIED, *DISPLAY):
        if name not in source:
            continue
        header = pydicom_dataset(**needed)
        header[name] = source.get_item(name)
        try:
            make_objects(header, np.zeros((8, 8), bool), Image.new("RGB", (8, 8)), algorithm)
        except Exception:
            expected = EXPECTED.get(name) or EXPECTED.get(str(source.get_item(name).VR), "a value that DICOM allows")
            refused.append(f"{name}: expected {expected}, got another value")
    return refused


def write_objects(stem: Path, source: Any, mask: np.ndarray, image: Image.Image, algorithm: Algorithm) -> None:
    """Write STEM_seg.dcm, STEM_overlay.dcm and STEM_gsps.dcm.

    See `make_segmentation`, `make_capture` and `make_presentation_state`.

    Raises:
        DicomOutputError: no valid objects can be made from the header of `source`.
    """
    try:
        made = make_objects(source, mask, image, algorithm)
    except Exception as error:  # highdicom and pydicom raise many types, for example for an invalid date
        # their messages are not repeated: they quote the header, and a birth date must not get into failed.csv
        reasons = refused_elements(source, algorithm) or [f"expected a valid DICOM header, got {type(error).__name__}"]
        raise DicomOutputError(f"no DICOM objects can be made from this header: {', '.join(reasons)}") from error
    for ending, dataset in zip(ENDINGS, made, strict=True):
        save_dicom(dataset, stem.with_name(f"{stem.name}_{ending}.dcm"))


def save_dicom(dataset: Any, path: Path) -> None:
    """Write a DICOM object; `path` never holds half a file."""
    with io.BytesIO() as buffer:
        dataset.save_as(buffer, enforce_file_format=True)
        write_file(path, buffer.getvalue())
