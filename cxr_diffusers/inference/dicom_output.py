"""An anomaly map -> DICOM objects that file beside their source: a Segmentation, and a Secondary Capture to look at."""

import io
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydicom.uid import PYDICOM_ROOT_UID, ExplicitVRLittleEndian, generate_uid

from ..files import write_file
from ..version import __version__

NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns")
# type 2: to be there, if need be empty; many sources lack some
EMPTY_ALLOWED = (
    "AccessionNumber PatientBirthDate PatientID PatientName PatientSex ReferringPhysicianName StudyDate StudyID "
    "StudyTime"
).split()
# of the source, besides: who is meant, how its pixels lie, and what is burned or lost in them; no free text
COPIED = (
    "SpecificCharacterSet IssuerOfPatientID Modality SeriesNumber InstanceNumber NumberOfFrames FrameOfReferenceUID "
    "PositionReferenceIndicator ImagePositionPatient ImageOrientationPatient PixelSpacing ImagerPixelSpacing "
    "SliceThickness PatientOrientation Laterality BurnedInAnnotation LossyImageCompression LossyImageCompressionRatio "
    "LossyImageCompressionMethod"
).split()
WARNING = "RESEARCH USE ONLY - NOT FOR DIAGNOSIS"
SEGMENT_LABEL = "Unusual to the model (research)"
HOME = "https://github.com/cxr-diffusers/cxr_diffusers"
BANNER = (120, 0, 0)
# added to the number of the source's series
SEGMENTATION_SERIES, CAPTURE_SERIES = 9000, 9500
ENDINGS = ("seg", "overlay")  # NAME_seg.dcm, NAME_overlay.dcm


@dataclass
class Algorithm:
    """What made a map, as the objects name it.

    name: of the pipeline's class.
    model: of the checkpoint, no path.
    fingerprint: of weights, settings and code version.
    threshold: map value above which a pixel is in the segment.
    """

    name: str
    model: str
    fingerprint: str
    threshold: float


def import_highdicom():
    """The module; ImportError that says what to install."""
    try:
        import highdicom
        import highdicom.sc
        import highdicom.seg
    except ImportError:
        raise ImportError("DICOM objects need highdicom: pip install 'cxr_diffusers[dicom]'") from None
    return highdicom


def check_source(dataset, path="the source"):
    """ValueError unless objects can be filed beside this DICOM image: it must say which study and series it is of."""
    missing = [name for name in NEEDED if not dataset.get(name)]
    if missing:
        raise ValueError(f"{path}: no DICOM objects can be filed beside a source without {', '.join(missing)}")


def filing_header(dataset):
    """A new header with what files objects beside this source, and nothing else of it: no comments, no history.

    Raises:
        ValueError: see `check_source`.
    """
    check_source(dataset)
    header = pydicom_dataset(**{name: None for name in EMPTY_ALLOWED})
    header.file_meta = getattr(dataset, "file_meta", None)
    for name in (*NEEDED, *EMPTY_ALLOWED, *COPIED):
        if name in dataset:
            header[name] = dataset[name]
    return header


def make_segmentation(source, mask, algorithm):
    """The thresholded map as a DICOM Segmentation of one binary segment, pixel by pixel on its source.

    There is no fractional map: DICOM's fractions are a probability or an occupancy, and a map value is neither.

    Args:
        source: pydicom dataset of the image; its pixels are not needed.
        mask: (Rows, Columns) booleans; none inside is allowed.
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
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label=SEGMENT_LABEL,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,  # CID 7150
        segmented_property_type=codes.CID7194.Lesion,  # the least that can be said of what is found
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=f"cxr_diffusers {algorithm.name}",
            family=codes.CID7162.ArtificialIntelligence,
            version=__version__,
            source=HOME,
            parameters={
                "model": algorithm.model,
                "fingerprint": algorithm.fingerprint,
                "threshold": f"{algorithm.threshold:g}",
            },
        ),
        anatomic_regions=[codes.CID4.Thorax],
        display_color=hd.color.CIELabColor.from_string("orangered"),
    )
    segmentation = hd.seg.Segmentation(
        source_images=[source],
        pixel_array=mask.astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[segment],
        series_instance_uid=make_uid("seg series", source.SeriesInstanceUID, algorithm),
        series_number=series_number(source, SEGMENTATION_SERIES),
        sop_instance_uid=make_uid("seg", source.SOPInstanceUID, algorithm),
        instance_number=instance_number(source),
        manufacturer="cxr_diffusers",
        manufacturer_model_name=f"{algorithm.name} {algorithm.model}"[:64],
        software_versions=__version__,
        device_serial_number=algorithm.fingerprint,  # there is no device: this tells one set of weights from another
        content_label="ANOMALY",
        content_description=f"map above {algorithm.threshold:g}, a threshold from healthy images",
        series_description=f"RESEARCH USE ONLY: {algorithm.name} segmentation",
        omit_empty_frames=False,  # "nothing above the threshold" is an answer, too
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    dimensions = make_uid("dimensions", source.SOPInstanceUID, algorithm)
    for item in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions
    return complete(segmentation, source)


def make_capture(source, picture, algorithm):
    """A picture as a DICOM Secondary Capture in colour, under a banner that says what it is not for.

    Args:
        source: pydicom dataset of the image.
        picture: RGB PIL image without text about the patient.
        algorithm: `Algorithm`.

    Returns:
        `highdicom.sc.SCImage`.
    """
    hd = import_highdicom()
    from pydicom.sr.codedict import codes

    source = filing_header(source)
    shown = np.asarray(
        with_banner(picture, f"{WARNING}     {algorithm.name} {algorithm.model}, cxr_diffusers {__version__}")
    )
    capture = hd.sc.SCImage.from_ref_dataset(
        source,
        shown,
        "RGB",
        8,
        "PATIENT",
        series_instance_uid=make_uid("capture series", source.SeriesInstanceUID, algorithm),
        series_number=series_number(source, CAPTURE_SERIES),
        # of its pixels, too: colours on another scale are another picture
        sop_instance_uid=make_uid(f"capture {sha256(shown.tobytes()).hexdigest()}", source.SOPInstanceUID, algorithm),
        instance_number=instance_number(source),
        manufacturer="cxr_diffusers",
        patient_orientation=("L", "F"),  # highdicom wants one: it is replaced below
        transfer_syntax_uid=ExplicitVRLittleEndian,
        series_description=f"RESEARCH USE ONLY: {algorithm.name} overlay",
    )
    capture.Laterality = source.get("Laterality") or ""
    capture.ConversionType = "WSD"  # made by a workstation's software
    capture.ManufacturerModelName = f"{algorithm.name} {algorithm.model}"[:64]
    capture.SoftwareVersions, capture.DeviceSerialNumber = __version__, algorithm.fingerprint
    capture.DerivationDescription = f"input, counterfactual and anomaly map side by side. {WARNING}"
    # the text that is drawn here is none about the patient; what stands in the source's own pixels is seen again
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


def complete(made, source):
    """Add to an object of highdicom what files it into its study."""
    if source.get("IssuerOfPatientID"):
        made.IssuerOfPatientID = source.IssuerOfPatientID
    made.PatientOrientation = source.get("PatientOrientation") or ""  # of each panel, too: they lie as the source does
    instance = pydicom_dataset(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)
    series = pydicom_dataset(SeriesInstanceUID=source.SeriesInstanceUID, ReferencedInstanceSequence=[instance])
    made.ReferencedSeriesSequence = [series]  # Common Instance Reference
    return made


def pydicom_dataset(**values):
    from pydicom import Dataset

    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def make_uid(kind, source_uid, algorithm):
    """A UID below pydicom's root, the same whenever the same source meets the same weights, settings and threshold."""
    entropy = ["cxr_diffusers", kind, str(source_uid), algorithm.fingerprint, repr(algorithm.threshold)]
    return generate_uid(prefix=PYDICOM_ROOT_UID, entropy_srcs=entropy)


def series_number(source, offset):
    return int(source.get("SeriesNumber") or 0) + offset


def instance_number(source):
    return max(int(source.get("InstanceNumber") or 1), 1)


def with_banner(picture, text):
    """An RGB picture under a dark red line of text."""
    size = max(14, picture.width // 70)
    canvas = Image.new("RGB", (picture.width, picture.height + 2 * size), BANNER)
    canvas.paste(picture, (0, 2 * size))
    draw = ImageDraw.Draw(canvas)
    draw.text((size, size), text, "white", ImageFont.load_default(size), anchor="lm")
    return canvas


class DicomOutputError(ValueError):
    """Of a source whose header is so broken that no objects can be made from it."""


def write_objects(stem, source, mask, picture, algorithm):
    """Write STEM_seg.dcm and STEM_overlay.dcm, see `make_segmentation` and `make_capture`. Raises DicomOutputError."""
    try:
        made = (make_segmentation(source, mask, algorithm), make_capture(source, picture, algorithm))
    except Exception as error:  # highdicom and pydicom have many, for a date or a sex that is none, say
        # not their words, which quote the header: a birth date, say, in failed.csv
        reason = f"no DICOM objects can be made from this header ({type(error).__name__})"
        raise DicomOutputError(f"{reason}: check it, for example with dciodvfy") from error
    for ending, dataset in zip(ENDINGS, made, strict=True):
        save_dicom(dataset, stem.with_name(f"{stem.name}_{ending}.dcm"))


def save_dicom(dataset, path):
    """Write a DICOM object, under its name only when complete."""
    with io.BytesIO() as buffer:
        dataset.save_as(buffer, enforce_file_format=True)
        write_file(path, buffer.getvalue())
