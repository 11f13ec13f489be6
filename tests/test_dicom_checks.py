"""Warnings and object types from DICOM headers, without their pixels."""

import logging
import re

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from cxr_diffusers.data.dicom_checks import non_radiograph_type, warnings_of
from cxr_diffusers.data.images import describe_skipped, list_images, read_image, split_images
from helpers import write_dicom

PIXELS = np.arange(64, dtype=np.uint16).reshape(8, 8)


def dataset(**values):
    made = Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def code(value, meaning):
    return [dataset(CodeValue=value, CodingSchemeDesignator="SCT", CodeMeaning=meaning)]


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"Modality": "DX", "BodyPartExamined": "CHEST", "ViewPosition": "PA", "BurnedInAnnotation": "NO"},
        {"Modality": "CR", "BodyPartExamined": "PORT CHEST", "ViewPosition": "AP SUPINE"},
        {"Modality": "DX", "PatientOrientation": ["L", "F"], "PresentationIntentType": "FOR PRESENTATION"},
        {
            "AnatomicRegionSequence": code("816094009", "Chest"),
            "ViewCodeSequence": code("399348003", "antero-posterior"),
        },
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME2", "PixelIntensityRelationshipSign": -1},
        {"PatientOrientation": ""},
    ],
)
def test_a_plain_chest_radiograph_and_a_silent_header_give_no_warning(header):
    assert warnings_of(dataset(**header)) == []


@pytest.mark.parametrize(
    ("header", "warning"),
    [
        ({"BurnedInAnnotation": "YES"}, "text burned into"),
        ({"Modality": "MG"}, "no plain radiograph"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "raw data"),
        ({"BodyPartExamined": "ABDOMEN"}, "not of the chest"),
        (
            {"AnatomicRegionSequence": code("818983003", "Abdomen")},
            r"not of the chest \(AnatomicRegionSequence ABDOMEN",
        ),
        ({"ViewPosition": "LL"}, "a lateral view"),
        ({"ViewPosition": "LAT"}, "a lateral view"),
        ({"ViewCodeSequence": code("399173006", "left lateral")}, "a lateral view .ViewCodeSequence"),
        ({"ViewCodeSequence": code("399260004", "medial-lateral oblique")}, "no plain frontal view"),
        ({"ViewPosition": "LLD"}, "no plain frontal view"),
        ({"PatientOrientation": ["P", "F"]}, "a lateral view"),
        ({"PatientOrientation": ["R", "F"]}, "left and right are exchanged"),
        ({"PatientOrientation": ["L", "H"]}, "upside down"),
        ({"PatientOrientation": ["F", "R"]}, "on its side"),
        ({"PhotometricInterpretation": "RGB"}, "no grey image"),
        ({"PhotometricInterpretation": "MONOCHROME2", "PresentationLUTShape": "INVERSE"}, "a negative"),
        ({"PhotometricInterpretation": "MONOCHROME1", "PixelIntensityRelationshipSign": -1}, "a negative"),
    ],
)
def test_each_unusual_header_gives_one_warning(header, warning):
    [sentence] = warnings_of(dataset(**header))
    assert re.search(warning, sentence)
    assert ";" not in sentence  # the separator of warnings in results.csv


@pytest.mark.parametrize(
    "header",
    [
        {"Modality": "MILLER"},
        {"BodyPartExamined": "MILLER"},
        {"AnatomicRegionSequence": code("1", "Miller")},
        {"ViewPosition": "LL MILLER"},
        {"ViewPosition": "LLD_MILLER"},
        {"ViewCodeSequence": code("399173006", "Miller")},
        {"ViewCodeSequence": code("1", "oblique Miller")},
        {"PatientOrientation": ["RMILLER", "F"]},
        {"PhotometricInterpretation": "MILLER"},
    ],
)
def test_warnings_name_the_element_and_never_quote_free_text(header):
    [warning] = warnings_of(dataset(**header))
    assert next(iter(header)) in warning and "MILLER" not in warning.upper()


def test_a_broken_entry_is_a_warning_and_stops_nothing():
    made = dataset(PhotometricInterpretation="MONOCHROME2", ViewPosition="LL", BodyPartExamined="HAND;FOOT")
    tag = Tag("PixelIntensityRelationshipSign")
    made[tag] = RawDataElement(tag, "SS", 1, b"\x01", 0, False, True)  # one byte where there should be two
    sentences = warnings_of(made)
    assert (
        len(sentences) == 3
        and "cannot be read (PixelIntensityRelationshipSign)" in sentences[-1]
        and ";" not in "".join(sentences)
    )


def test_reports_and_presentation_states_in_a_tree_are_left_out_with_a_note(tmp_path, caplog):
    image = write_dicom(tmp_path / "IM0001", PIXELS, 12)
    object_classes = {"SR0001": "1.2.840.10008.5.1.4.1.1.88.33", "PR0001.dcm": "1.2.840.10008.5.1.4.1.1.11.1"}
    for name, object_class in object_classes.items():
        made = dcmread(write_dicom(tmp_path / name, PIXELS, 12))
        made.file_meta.MediaStorageSOPClassUID = object_class
        made.save_as(tmp_path / name)
    (tmp_path / "broken.dcm").write_bytes(b"not a DICOM file")  # an error to report, not a file to leave out
    with caplog.at_level(logging.WARNING):
        assert list_images(tmp_path) == [image, tmp_path / "broken.dcm"]
    assert "2 DICOM files without a radiograph" in caplog.text
    images, skipped = split_images(tmp_path)
    assert skipped[tmp_path / "SR0001"] == "Comprehensive SR Storage"
    assert "1 Grayscale Softcopy Presentation State Storage" in describe_skipped(skipped)
    with pytest.raises(ValueError, match="SR0001: expected a radiograph, got a Comprehensive SR Storage"):
        read_image(tmp_path / "SR0001")


def test_object_types_are_read_without_pixels(tmp_path):
    """Cut off after the file's own header, each still says what it is."""
    path = write_dicom(tmp_path / "a", PIXELS, 12)
    path.write_bytes(path.read_bytes()[:400])
    assert non_radiograph_type(path) == "" and list_images(tmp_path) == [path]
