"""DICOM objects of a detection: read back, they equal mask and panel and refer to their source."""

import csv
import shutil
import subprocess
import sys

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import Dataset

from cxr_diffusers import GradCAMPipeline
from cxr_diffusers.cli import main
from cxr_diffusers.data.images import read_header, read_image
from cxr_diffusers.files import load_map
from cxr_diffusers.inference import detection
from cxr_diffusers.inference.detection import detect
from cxr_diffusers.inference.dicom_output import (
    ENDINGS,
    Algorithm,
    DicomOutputError,
    make_capture,
    make_presentation_state,
    make_segmentation,
    write_objects,
)
from helpers import FEW_STEPS, run_detect, toy_resnet, write_source

ALGORITHM = Algorithm("CFGAnomalyPipeline", "toy", "0123456789abcdef", 0.05)
THRESHOLD = 0.05


@pytest.fixture
def model(pipeline):
    pipeline.register_to_config(map_threshold=THRESHOLD, settings=FEW_STEPS)
    return pipeline


@pytest.fixture
def detected(model, tmp_path):
    """A detection with DICOM objects -> (folder of the results, source)."""
    source = write_source(tmp_path / "mueller.dcm")
    run_detect(model, [source], tmp_path / "out", dicom=True, map_format="npy")
    return tmp_path / "out", pydicom.dcmread(source)


def test_the_segmentation_is_the_map_above_the_threshold_on_the_sources_pixels(detected):
    import highdicom

    out, source = detected
    segmentation = highdicom.seg.segread(out / "dicom" / "mueller_seg.dcm")
    expected = load_map(out / "maps" / "mueller.npy") > THRESHOLD
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(segmentation.pixel_array, expected)
    pixels = segmentation.get_pixels_by_source_instance([source.SOPInstanceUID], segment_numbers=[1])
    np.testing.assert_array_equal(pixels[0, ..., 0], expected)
    segment = segmentation.get_segment_description(1)
    assert segment.segmented_property_category.value == "49755003"  # SCT, Morphologically Abnormal Structure
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == "cxr_diffusers CFGAnomalyPipeline" and algorithm.AlgorithmVersion
    assert f"threshold={THRESHOLD}" in algorithm.AlgorithmParameters
    assert (segmentation.SegmentationType, segment.SegmentAlgorithmType) == ("BINARY", "AUTOMATIC")


def test_both_objects_file_into_the_study_and_name_their_source(detected):
    out, source = detected
    objects = [pydicom.dcmread(out / "dicom" / f"mueller_{ending}.dcm") for ending in ("seg", "overlay")]
    for made in objects:
        for name in ("StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate"):
            assert made[name].value == source[name].value, name
        assert str(made.PatientName) == "Müller^Jörg"
        assert made.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
        series = made.ReferencedSeriesSequence[0]
        assert series.SeriesInstanceUID == source.SeriesInstanceUID
        assert series.ReferencedInstanceSequence[0].ReferencedSOPClassUID == source.SOPClassUID
        assert "RESEARCH USE ONLY" in made.SeriesDescription
    uids = {uid for d in (source, *objects) for uid in (d.SOPInstanceUID, d.SeriesInstanceUID)}
    assert len(uids) == 6


def test_the_capture_is_the_panel_under_a_banner_and_without_the_files_name(detected, model, tmp_path):
    out, source = detected
    capture = pydicom.dcmread(out / "dicom" / "mueller_overlay.dcm")
    pixels = capture.pixel_array
    assert (capture.PhotometricInterpretation, pixels.dtype) == ("RGB", np.uint8)
    assert tuple(pixels[0, 0]) == (120, 0, 0) and (pixels[:44] > 200).any()  # white letters on dark red
    strip = np.asarray(Image.open(out / "mueller.png"))
    banner = len(pixels) - len(strip)
    same = (pixels[banner:] == strip).all(axis=(1, 2))
    title = np.flatnonzero(~same)
    assert same.mean() > 0.8 and len(title) and title.max() < 60  # all but the title, which has the file's name there
    shutil.copy(source.filename, tmp_path / "x.dcm")
    run_detect(model, [tmp_path / "x.dcm"], tmp_path / "other", dicom=True)
    renamed = pydicom.dcmread(tmp_path / "other" / "dicom" / "x_overlay.dcm").pixel_array
    np.testing.assert_array_equal(renamed, pixels)
    assert (np.asarray(Image.open(tmp_path / "other" / "x.png")) != strip).any()


def test_the_capture_of_a_method_without_counterfactual_does_not_name_one(tmp_path):
    source = pydicom.dcmread(write_source(tmp_path / "a.dcm"))
    for has_counterfactual, panels in (
        (True, "input, counterfactual and anomaly map"),
        (False, "input and anomaly map"),
    ):
        algorithm = Algorithm(**{**vars(ALGORITHM), "has_counterfactual": has_counterfactual})
        capture = make_capture(source, Image.new("RGB", (60, 30)), algorithm)
        assert capture.DerivationDescription.startswith(f"{panels} side by side.")
    classifier = GradCAMPipeline(toy_resnet(), sample_size=16, class_names=["healthy", "ill"], map_threshold=0.01)
    detect(classifier, [tmp_path / "a.dcm"], tmp_path / "out", dicom=True, progress=False)
    capture = pydicom.dcmread(tmp_path / "out" / "dicom" / "a_overlay.dcm")
    assert capture.DerivationDescription.startswith("input and anomaly map side by side.")


def test_the_presentation_state_outlines_the_region_on_its_source(detected):
    """Read back, the outlines enclose the pixels of the Segmentation, and no others."""
    from skimage.draw import polygon2mask

    out, source = detected
    state = pydicom.dcmread(out / "dicom" / "mueller_gsps.dcm")
    assert state.SOPClassUID.name == "Grayscale Softcopy Presentation State Storage"
    for name in ("StudyInstanceUID", "PatientID", "PatientName"):
        assert state[name].value == source[name].value, name
    series = state.ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == source.SeriesInstanceUID
    assert series.ReferencedImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    annotation = state.GraphicAnnotationSequence[0]
    assert annotation.TextObjectSequence[0].UnformattedTextValue.startswith("RESEARCH USE ONLY")
    inside = np.zeros((24, 18), int)
    for graphic in annotation.GraphicObjectSequence:
        assert (graphic.GraphicType, graphic.GraphicAnnotationUnits) == ("POLYLINE", "PIXEL")
        points = np.array(graphic.GraphicData).reshape(-1, 2)
        np.testing.assert_array_equal(points[0], points[-1])
        inside += polygon2mask((24, 18), points[:, ::-1] - 0.5)
    expected = pydicom.dcmread(out / "dicom" / "mueller_seg.dcm").pixel_array
    np.testing.assert_array_equal(inside % 2, expected)  # the outline of a hole takes its pixels out again


def test_the_presentation_state_displays_the_source_as_its_header_says(tmp_path):
    mask = np.ones((24, 18), bool)
    windows = dict(WindowCenter=[2000, 100], WindowWidth=[3000, 50], RescaleSlope=2, RescaleIntercept=-1)
    source = pydicom.dcmread(write_source(tmp_path / "a.dcm", **windows))
    state = make_presentation_state(source, mask, ALGORITHM)
    assert (state.RescaleSlope, state.RescaleIntercept, state.PresentationLUTShape) == (2, -1, "IDENTITY")
    window = state.SoftcopyVOILUTSequence[0]
    assert (window.WindowCenter, window.WindowWidth) == (2000, 3000)
    np.testing.assert_array_equal(
        np.array(state.GraphicAnnotationSequence[0].GraphicObjectSequence[0].GraphicData).reshape(-1, 2).max(axis=0),
        [18, 24],
    )
    source = pydicom.dcmread(write_source(tmp_path / "b.dcm", photometric="MONOCHROME1", WindowCenter=5, WindowWidth=0))
    state = make_presentation_state(source, ~mask, ALGORITHM)
    assert state.PresentationLUTShape == "INVERSE" and "SoftcopyVOILUTSequence" not in state
    assert "GraphicObjectSequence" not in state.GraphicAnnotationSequence[0]


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (dicom3tools) is not installed")
def test_dciodvfy_finds_no_error(detected, tmp_path):
    out, source = detected
    bare = write_source(tmp_path / "bare.dcm", 1)  # a source without elements that are often missing
    header = pydicom.dcmread(bare)
    for name in (
        "PatientName",
        "PatientBirthDate",
        "StudyDate",
        "StudyTime",
        "StudyID",
        "AccessionNumber",
        "SeriesNumber",
    ):
        del header[name]
    make_segmentation(header, np.zeros((24, 18), bool), ALGORITHM).save_as(tmp_path / "seg.dcm")
    assert not pydicom.dcmread(tmp_path / "seg.dcm").pixel_array.any()  # an empty segmentation is valid
    make_capture(header, Image.new("RGB", (200, 80)), ALGORITHM).save_as(tmp_path / "overlay.dcm")
    make_presentation_state(header, np.zeros((24, 18), bool), ALGORITHM).save_as(tmp_path / "gsps.dcm")
    objects = [tmp_path / f"{ending}.dcm" for ending in ENDINGS]
    for path in [*(out / "dicom").iterdir(), *objects]:
        report = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, timeout=600).stderr
        assert any(name in report for name in ("Segmentation", "SCImage", "GrayscaleSoftcopyPresentationState"))
        assert "Error" not in report, report


def test_a_rerun_gives_the_same_uids_and_another_model_or_threshold_others(tmp_path):
    source, mask = pydicom.dcmread(write_source(tmp_path / "a.dcm")), np.ones((24, 18), bool)
    uid = make_segmentation(source, mask, ALGORITHM).SOPInstanceUID
    assert make_segmentation(source, ~mask, ALGORITHM).SOPInstanceUID == uid
    for change in ({"fingerprint": "other"}, {"threshold": 0.06}, {"healthy_quantile": 0.99}):
        assert make_segmentation(source, mask, Algorithm(**{**vars(ALGORITHM), **change})).SOPInstanceUID != uid
    sibling = pydicom.dcmread(write_source(tmp_path / "b.dcm", SOPInstanceUID="1.2.3.4"))
    made = make_segmentation(sibling, mask, ALGORITHM)
    assert made.SOPInstanceUID != uid  # two images of one series: two objects in one series
    assert made.SeriesInstanceUID == make_segmentation(source, mask, ALGORITHM).SeriesInstanceUID


def test_objects_name_the_quantile_of_healthy_images_that_gave_the_threshold(tmp_path):
    source, mask = pydicom.dcmread(write_source(tmp_path / "a.dcm")), np.ones((24, 18), bool)
    algorithm = Algorithm(**{**vars(ALGORITHM), "threshold": 0.012345, "healthy_quantile": 0.9995})
    segmentation = make_segmentation(source, mask, algorithm)
    assert segmentation.ContentDescription == "map above 0.0123 (healthy 99.95% quantile)"
    parameters = segmentation.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
    assert "threshold=0.012345" in parameters and "quantile of healthy images=0.9995" in parameters
    plain = make_segmentation(source, mask, ALGORITHM)
    assert plain.ContentDescription == "map above 0.05"
    state = make_presentation_state(source, mask, algorithm)
    texts = [text.UnformattedTextValue for item in state.GraphicAnnotationSequence for text in item.TextObjectSequence]
    assert any("map above 0.0123 (healthy 99.95% quantile)" in text for text in texts)


def test_burned_in_text_compression_and_orientation_are_copied_to_the_capture(tmp_path):
    tags = {"BurnedInAnnotation": "YES", "LossyImageCompression": "01", "LossyImageCompressionRatio": 8}
    source = pydicom.dcmread(write_source(tmp_path / "a.dcm", PatientOrientation=["L", "F"], **tags))
    capture = make_capture(source, Image.new("RGB", (200, 80)), ALGORITHM)
    assert (capture.BurnedInAnnotation, capture.LossyImageCompression) == ("YES", "01")
    assert list(capture.PatientOrientation) == ["L", "F"]
    silent = make_capture(pydicom.dcmread(write_source(tmp_path / "b.dcm")), Image.new("RGB", (200, 80)), ALGORITHM)
    assert "BurnedInAnnotation" not in silent and not silent.PatientOrientation
    with pytest.raises(ValueError, match=r"\(24, 18\), got \(18, 24\)"):
        make_segmentation(source, np.zeros((18, 24), bool), ALGORITHM)


def test_objects_need_a_threshold_and_a_dicom_file_that_names_its_study(pipeline, tmp_path):
    whole, lost = write_source(tmp_path / "whole.dcm"), write_source(tmp_path / "lost.dcm", StudyInstanceUID="")
    Image.fromarray(pydicom.dcmread(whole).pixel_array).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="threshold from healthy .* got one without"):
        run_detect(pipeline, [whole], tmp_path / "out", dicom=True)
    pipeline.register_to_config(map_threshold=THRESHOLD, settings=FEW_STEPS)
    other = dict(call_kwargs={**FEW_STEPS, "guidance_scale": 3.0}, dicom=True, progress=False)
    with pytest.raises(ValueError, match="expected `threshold` for `dicom`, .*got other settings: guidance_scale"):
        detection.detect(pipeline, [whole], tmp_path / "other", **other)
    assert not (tmp_path / "other").exists()
    assert detection.detect(pipeline, [whole], tmp_path / "other", threshold=0.04, **other)["computed"] == 1
    with pytest.raises(ValueError, match="at least one DICOM file"):
        run_detect(pipeline, [tmp_path / "x.png"], tmp_path / "out", dicom=True)
    summary = run_detect(pipeline, [whole, lost, tmp_path / "x.png"], tmp_path / "out", dicom=True)
    assert "StudyInstanceUID" in summary["failed"][str(lost)] and summary["computed"] == 2
    assert summary["without_dicom"] == [str(tmp_path / "x.png")]
    assert {path.name for path in (tmp_path / "out" / "dicom").iterdir()} == {
        f"whole_{ending}.dcm" for ending in ENDINGS
    }


@pytest.mark.parametrize(
    "tags, reason",
    [
        ({"PatientSex": "UNKNOWN"}, "PatientSex: expected M, F or O"),
        ({"PatientBirthDate": "19.5.1950"}, "PatientBirthDate: expected a date YYYYMMDD"),
        ({"StudyTime": "ten o'clock"}, "StudyTime: expected a time HHMMSS"),
        ({"SpecificCharacterSet": "ISO_IR 999"}, "SpecificCharacterSet: expected a character set of DICOM"),
        ({"PatientSex": "QQ", "StudyDate": "1/2/26"}, "PatientSex: expected M, F or O, got another value, StudyDate: "),
    ],
)
def test_the_reason_names_each_element_and_what_was_expected(tmp_path, tags, reason):
    source = read_header(write_source(tmp_path / "a.dcm", **tags))
    with pytest.raises(DicomOutputError, match="no DICOM objects can be made from this header: ") as error:
        write_objects(tmp_path / "a", source, np.ones((24, 18), bool), Image.new("RGB", (60, 30)), ALGORITHM)
    assert reason in str(error.value) and not any(value in str(error.value) for value in tags.values())


@pytest.mark.parametrize(
    "tags, rescale",
    [
        ({"RescaleSlope": "-1"}, (-1, 0)),
        ({"RescaleIntercept": "-1024"}, (1, -1024)),
        ({"RescaleSlope": "2", "RescaleIntercept": ""}, (2, 0)),
        ({"RescaleSlope": "-0.5", "RescaleIntercept": "4095", "VOILUTSequence": [Dataset()]}, (-0.5, 4095)),
        ({"SpecificCharacterSet": None, "VOILUTSequence": []}, None),
    ],
)
def test_half_a_rescale_and_empty_elements_are_mended_as_the_reader_does(tmp_path, tags, rescale):
    path = write_source(tmp_path / "a.dcm", **tags)
    read_image(path)
    write_objects(tmp_path / "a", read_header(path), np.ones((24, 18), bool), Image.new("RGB", (60, 30)), ALGORITHM)
    state = pydicom.dcmread(tmp_path / "a_gsps.dcm")
    assert rescale is None or (state.RescaleSlope, state.RescaleIntercept) == rescale


def test_an_invalid_header_fails_only_its_own_file(model, tmp_path):
    (tmp_path / "in").mkdir()
    strange = write_source(tmp_path / "in" / "strange.dcm", 1, PatientSex="UNKNOWN")
    write_source(tmp_path / "in" / "whole.dcm", 2)
    summary = run_detect(model, [tmp_path / "in"], tmp_path / "out", dicom=True)
    assert summary["computed"] == 1 and list(summary["failed"]) == [str(strange)]
    assert "strange.dcm: no DICOM objects can be made" in summary["failed"][str(strange)]
    assert "UNKNOWN" not in (tmp_path / "out" / "failed.csv").read_text(), "header values must not be copied"
    assert {path.name for path in (tmp_path / "out" / "rows").iterdir()} == {"whole.json"}


def test_objects_of_a_replaced_file_are_deleted(model, tmp_path):
    source, out = write_source(tmp_path / "a.dcm"), tmp_path / "out"
    for broken in (lambda: write_source(source, 1, PatientSex="UNKNOWN"), lambda: source.write_bytes(b"cut off")):
        write_source(source, 2)
        assert (
            run_detect(model, [source], out, dicom=True)["computed"] == 1 and len(list((out / "dicom").iterdir())) == 3
        )
        broken()
        assert list(run_detect(model, [source, write_source(tmp_path / "b.dcm", 3)], out, dicom=True)["failed"]) == [
            str(source)
        ]
        assert {path.name for path in (out / "dicom").iterdir()} == {f"b_{ending}.dcm" for ending in ENDINGS}
        (tmp_path / "b.dcm").unlink()
        for path in [*(out / "dicom").iterdir(), *(out / "rows").iterdir()]:
            path.unlink()


def test_two_panels_of_one_map_are_two_captures(tmp_path):
    source = pydicom.dcmread(write_source(tmp_path / "a.dcm"))
    uids = [
        make_capture(source, Image.new("RGB", (90, 80), c), ALGORITHM).SOPInstanceUID for c in ("red", "blue", "red")
    ]
    assert uids[0] != uids[1] and uids[0] == uids[2]


def test_without_highdicom_the_error_names_the_package(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    source = write_source(tmp_path / "a.dcm")
    with pytest.raises(ImportError, match=r"pip install 'cxr_diffusers\[dicom\]'"):
        run_detect(model, [source], tmp_path / "out", dicom=True)
    assert not (tmp_path / "out").exists() and run_detect(model, [source], tmp_path / "out")["computed"] == 1


def test_a_run_with_objects_resumes_and_is_not_mixed_with_one_without(model, tmp_path):
    """Of a PACS's tree: files without extension; a report; our own objects of an earlier run."""
    tree, out = tmp_path / "tree", tmp_path / "tree" / "out"
    (tree / "ST1").mkdir(parents=True)
    write_source(tree / "ST1" / "IM0001", 0, ViewPosition="LL")
    write_source(tree / "ST1" / "IM0002", 1)
    make_capture(pydicom.dcmread(tree / "ST1" / "IM0002"), Image.new("RGB", (90, 80)), ALGORITHM).save_as(tree / "SC1")
    make_segmentation(pydicom.dcmread(tree / "ST1" / "IM0002"), np.ones((24, 18), bool), ALGORITHM).save_as(
        tree / "SG1"
    )
    first = run_detect(model, [tree], out, dicom=True)
    assert (first["images"], first["computed"], first["failed"]) == (2, 2, {})
    assert set(first["skipped"].values()) == {"Secondary Capture of cxr_diffusers", "Segmentation Storage"}
    written = {path: path.stat().st_mtime_ns for path in (out / "dicom").iterdir()}
    again = run_detect(model, [tree], out, dicom=True)
    assert len(written) == 6 and (again["computed"], again["skipped"]) == (0, first["skipped"])
    assert {path: path.stat().st_mtime_ns for path in (out / "dicom").iterdir()} == written
    assert again["warnings"] == {str(tree / "ST1" / "IM0001"): "a lateral view (ViewPosition LL)"}
    with open(out / "results.csv", newline="") as file:
        rows = {row["name"]: row["warnings"] for row in csv.DictReader(file)}
    assert rows == {"ST1__IM0001": "a lateral view (ViewPosition LL)", "ST1__IM0002": ""}
    with pytest.raises(FileExistsError, match="dicom: True, now False"):
        run_detect(model, [tree], out)
    with pytest.raises(ValueError, match="an output folder of its own"):
        run_detect(model, [out / "dicom"], out)


def test_the_command_line_prints_the_warnings(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    write_source(tmp_path / "images" / "a.dcm", 0)
    write_source(tmp_path / "images" / "b.dcm", 1, BodyPartExamined="HAND", BurnedInAnnotation="YES")
    settings = ["--model", str(tmp_path / "model"), "--num-inference-steps", "20", "--noise-level", "300"]
    assert main(["detect", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--dicom", *settings]) == 0
    printed = capsys.readouterr().out
    assert "1 image with warnings" in printed
    assert "1 x not of the chest (BodyPartExamined HAND)" in printed and "1 x text burned into" in printed
    assert len(list((tmp_path / "out" / "dicom").iterdir())) == 6


def test_invalid_header_values_are_not_quoted(model, tmp_path, capsys, recwarn):
    model.save_pretrained(tmp_path / "model")
    source = write_source(tmp_path / "a.dcm", StudyInstanceUID="1.2.MUELLER")
    with pytest.warns(UserWarning, match="MUELLER"):
        assert pydicom.dcmread(source).StudyInstanceUID
    recwarn.clear()
    settings = ["--model", str(tmp_path / "model"), "--num-inference-steps", "20", "--noise-level", "300"]
    main(["detect", str(source), "--out", str(tmp_path / "out"), "--dicom", *settings])
    assert not [str(warning.message) for warning in recwarn if "MUELLER" in str(warning.message)]
    printed = capsys.readouterr()
    assert "MUELLER" not in printed.out + printed.err


def test_results_of_an_older_version_are_read(model, tmp_path):
    """A folder of results that an older version wrote is gone on with."""
    source = write_source(tmp_path / "a.dcm", ViewPosition="RL")
    run_detect(model, [source], tmp_path / "out")
    for path in [tmp_path / "out" / "settings.json", *(tmp_path / "out" / "rows").iterdir()]:
        text = path.read_text()
        path.write_text(
            text.replace(',\n  "dicom": false', "").replace(', "warnings": "a lateral view (ViewPosition RL)"', "")
        )
        assert path.read_text() != text
    summary = detection.detect(model, [source], tmp_path / "out", call_kwargs=FEW_STEPS, progress=False)
    assert summary["computed"] == 0 and summary["warnings"] == {}


def test_objects_copy_only_the_elements_that_file_them(model, tmp_path):
    source = write_source(tmp_path / "a.dcm")
    header = pydicom.dcmread(source)
    secrets = {
        "PatientComments": "SECRET comment",
        "AdditionalPatientHistory": "SECRET history",
        "Allergies": "SECRET allergy",
        "MedicalAlerts": "SECRET alert",
        "Occupation": "SECRET work",
        "EthnicGroup": "SECRET group",
        "OtherPatientNames": "SECRET^NAME",
        "PatientAddress": "SECRET street",
        "StudyDescription": "SECRET reason",
        "AdmittingDiagnosesDescription": "SECRET diagnosis",
        "NameOfPhysiciansReadingStudy": "SECRET^READER",
        "ImageComments": "SECRET image",
        "SeriesDescription": "SECRET series",
        "InstitutionName": "SECRET house",
    }
    for name, value in secrets.items():
        setattr(header, name, value)
    header.FrameOfReferenceUID = "1.2.3.4"
    header.save_as(source)
    run_detect(model, [source], tmp_path / "out", dicom=True)
    for ending in ENDINGS:
        path = tmp_path / "out" / "dicom" / f"a_{ending}.dcm"
        assert b"SECRET" not in path.read_bytes(), ending
        made = pydicom.dcmread(path)
        assert made.PatientName == header.PatientName and made.StudyInstanceUID == header.StudyInstanceUID
    segmentation = pydicom.dcmread(tmp_path / "out" / "dicom" / "a_seg.dcm")
    assert segmentation.FrameOfReferenceUID == "1.2.3.4"
