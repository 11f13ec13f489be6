"""DICOM files whose header is empty, odd or wrong: the image, or an error that names the element and quotes nothing."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pydicom
import pytest
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from cxr_diffusers.data.dicom_checks import warnings_of
from cxr_diffusers.data.images import dicom_header, read_header, read_image
from helpers import write_dicom

# values in a narrow band of 12 bits; the left half is for padding
BAND = (np.arange(256, dtype=np.uint16).reshape(16, 16) * 4 + 1000)[:, ::-1].copy()


def greys(path):
    return np.asarray(read_image(path)).astype(int)


def lut(first, table, bits, n=None):
    item = Dataset()
    item.add_new(0x00283002, "SS" if first < 0 else "US", [n or len(table), first, bits])
    item.add_new(0x00283006, "US", list(map(int, table)))
    return [item]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 1500, "WindowWidth": 800}])
@pytest.mark.parametrize("padding, tags", [(0, {}), (4095, {}), (4050, {"PixelPaddingRangeLimit": 4095})])
def test_padding_takes_no_part_and_is_as_dark_as_the_darkest_pixel(tmp_path, photometric, window, padding, tags):
    tags = {"PixelPaddingValue": padding, **tags, **window}
    padded = BAND.copy()
    padded[:, :8] = padding
    padded[:8, :4] = tags.get("PixelPaddingRangeLimit", padding)
    image = greys(write_dicom(tmp_path / "p.dcm", padded, 12, photometric, **tags))
    plain = greys(write_dicom(tmp_path / "r.dcm", BAND, 12, photometric, **window))
    assert np.array_equal(image[:, 8:], plain[:, 8:])
    assert (image[:, :8] == plain[:, 8:].min()).all()


@pytest.mark.parametrize("syntax", [pydicom.uid.ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize(
    "pixels, bits, padding, vr, value",
    [
        (BAND.astype(np.int16) - 2000, 16, -2000, "US", 65536 - 2000),  # unsigned in a signed image
        (BAND.astype(np.int16) - 1500, 12, -2048, "US", 2048),  # as its 12 bits
        (BAND.astype(np.int16) - 1500, 12, -2000, "SS", -2000),
        (BAND + 30000, 16, 63536, "SS", 63536 - 65536),  # signed in an unsigned image
        (BAND, 12, 65535, "US", 65535),  # above the bits stored
    ],
)
def test_padding_is_seen_whatever_type_the_header_gives_it(tmp_path, syntax, pixels, bits, padding, vr, value):
    padded = pixels.copy()
    padded[:, :8] = padding
    made = pydicom.dcmread(write_dicom(tmp_path / "p.dcm", padded, bits))
    implicit = syntax == ImplicitVRLittleEndian  # which says of no value whether it is signed
    made.add_new(0x00280120, "US" if implicit else vr, value % 65536 if implicit else value)
    made.file_meta.TransferSyntaxUID = syntax
    made.save_as(tmp_path / "p.dcm", implicit_vr=implicit, little_endian=True)
    image, plain = greys(tmp_path / "p.dcm"), greys(write_dicom(tmp_path / "r.dcm", pixels, bits))
    assert np.array_equal(image[:, 8:], plain[:, 8:]) and (image[:, :8] == plain[:, 8:].min()).all()


def test_the_order_of_bytes_and_a_missing_preamble_change_nothing(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", BAND, 12, PixelPaddingValue=1000)
    expected, content = greys(path), path.read_bytes()
    meta = pydicom.filereader.read_file_meta_info(path)
    (tmp_path / "bare.dcm").write_bytes(content[144 + meta.FileMetaInformationGroupLength :])
    made = pydicom.dcmread(path)
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    made.PixelData = BAND.astype(">u2").tobytes()
    pydicom.dcmwrite(tmp_path / "big.dcm", made, implicit_vr=False, little_endian=False)
    for name in ("bare.dcm", "big.dcm"):
        assert np.array_equal(greys(tmp_path / name), expected)


def test_overlays_in_unused_bits_are_no_part_of_the_image(tmp_path):
    drawn = BAND.copy()
    drawn[0] |= 0x1000
    made = pydicom.dcmread(write_dicom(tmp_path / "o.dcm", drawn, 12))
    for tag, value in ((0x10, 16), (0x11, 16), (0x100, 16), (0x102, 12)):
        made.add_new(0x60000000 + tag, "US", value)
    made.save_as(tmp_path / "o.dcm")
    assert np.array_equal(greys(tmp_path / "o.dcm"), greys(write_dicom(tmp_path / "r.dcm", BAND, 12)))


def test_an_image_of_padding_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="all pixels are padding"):
        read_image(write_dicom(tmp_path / "p.dcm", np.zeros((4, 4), np.uint16), 12, PixelPaddingValue=0))


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_bits_that_are_stored_higher_are_shifted_down(tmp_path, dtype):
    pixels = (BAND.astype(dtype) - 1500) if dtype == np.int16 else BAND
    path = write_dicom(tmp_path / "h.dcm", pixels << 4, 12, HighBit=15)
    assert np.array_equal(greys(path), greys(write_dicom(tmp_path / "r.dcm", pixels, 12)))


def test_signed_bits_may_be_followed_by_zeros_or_by_their_sign(tmp_path):
    pixels = BAND.astype(np.int16) - 1500
    path = write_dicom(tmp_path / "z.dcm", pixels & 4095, 12)
    assert np.array_equal(greys(path), greys(write_dicom(tmp_path / "r.dcm", pixels, 12)))


@pytest.mark.parametrize(
    "pixels, bits, tags, match",
    [
        (BAND, 12, {"HighBit": 15}, "HighBit 15 contradicts the pixels"),
        (BAND, 12, {"HighBit": 10}, "HighBit 10 contradicts BitsStored 12"),
        (BAND, 12, {"HighBit": 16}, "HighBit 16 contradicts"),
        (BAND, 10, {}, "values above BitsStored 10"),
        (BAND.astype(np.int16) | 0x4000, 12, {}, "values above BitsStored 12"),
        (BAND.astype(np.uint32), 32, {}, "expected BitsStored of 1 to 16.*got 32"),
        (BAND, 20, {}, "expected BitsStored of 1 to 16.*got 20"),
        (BAND, 12, {"BitsStored": None}, "BitsStored is missing"),
        (BAND, 12, {"RescaleSlope": 0, "RescaleIntercept": 5}, "RescaleSlope is 0"),
        (BAND, 12, {"SamplesPerPixel": 3}, "SamplesPerPixel contradicts"),
        (BAND, 12, {"VOILUTSequence": lut(0, range(100), 12, n=200)}, "LUTDescriptor contradicts LUTData"),
        (BAND, 12, {"Rows": 0}, "pixels, got 16 x 0"),
        (BAND, 12, {"Rows": 17}, "cut short: 512 bytes of pixels, expected 544"),
        (BAND, 12, {"Rows": 60000, "Columns": 60000}, "expected 1 to 50,000,000 pixels"),
    ],
)
def test_a_header_that_contradicts_its_pixels_is_named(tmp_path, pixels, bits, tags, match):
    tags = {"HighBit": min(bits, pixels.itemsize * 8) - 1} | tags
    with pytest.raises(ValueError, match=match):
        read_image(write_dicom(tmp_path / "w.dcm", pixels, bits, **tags))


def test_32_bits_that_hold_12_are_read(tmp_path):
    path = write_dicom(tmp_path / "w.dcm", BAND.astype(np.uint32), 12)
    assert np.array_equal(greys(path), greys(write_dicom(tmp_path / "r.dcm", BAND, 12)))


@pytest.mark.parametrize(
    "tags",
    [
        {"RescaleSlope": None, "RescaleIntercept": None},
        {"RescaleSlope": None, "RescaleIntercept": -5},
        {"WindowCenter": None, "WindowWidth": 200},
        {"WindowCenter": 1500, "WindowWidth": None},
        {"WindowCenter": 0, "WindowWidth": 0},
        {"WindowCenter": 1500, "WindowWidth": 0.5},
        {"WindowCenter": 1500, "WindowWidth": -300},
        {"VOILUTSequence": [Dataset()]},
        {"VOILUTSequence": []},
        {"ModalityLUTSequence": [Dataset()]},
        {"PixelPaddingValue": None},
    ],
)
def test_empty_elements_are_absent_and_a_window_without_width_is_none(tmp_path, tags):
    path = write_dicom(tmp_path / "e.dcm", BAND, 12, **tags)
    assert np.array_equal(greys(path), greys(write_dicom(tmp_path / "r.dcm", BAND, 12)))
    told = [warning for warning in warnings_of(read_header(path)) if "WindowWidth" in warning]
    assert len(told) == (tags.get("WindowWidth") not in (None, 200))


def test_a_negative_slope_with_half_a_window_is_no_negative(tmp_path):
    path = write_dicom(tmp_path / "n.dcm", BAND, 12, RescaleSlope=-1, RescaleIntercept=4095, WindowWidth=200)
    assert np.abs(greys(path) / 65535 - (1 - BAND / 4095)).max() < 1e-4


@pytest.mark.parametrize("name", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_look_up_tables_of_any_depth_are_applied(tmp_path, name, bits):
    table = np.linspace(0, 2**bits - 1, 1024).round().astype(int)[::-1]  # turns the greys over
    path = write_dicom(tmp_path / "l.dcm", BAND, 12, **{name: lut(1000, table, bits)})
    expected = table[BAND - 1000] / (2**bits - 1)
    assert np.abs(greys(path) / 65535 - expected).max() < 1e-4


@pytest.mark.parametrize(
    "function, expected",
    [
        ("LINEAR_EXACT", ((BAND - 1500.0) / 400 + 0.5).clip(0, 1)),
        ("SIGMOID", 1 / (1 + np.exp(-4 * (BAND - 1500.0) / 400))),
        (None, ((BAND - 1499.5) / 399 + 0.5).clip(0, 1)),
    ],
)
def test_windows_follow_their_function(tmp_path, function, expected):
    tags = {"WindowCenter": 1500, "WindowWidth": 400} | ({"VOILUTFunction": function} if function else {})
    assert np.abs(greys(write_dicom(tmp_path / "f.dcm", BAND, 12, **tags)) / 65535 - expected).max() < 1e-4


def write_rle(path, segments, rows=16, columns=16):
    """16 bits, RLE; `segments`: the encoded high and low bytes."""
    write_dicom(path, np.zeros((rows, columns), np.uint16), 12)
    made = pydicom.dcmread(path)
    made.file_meta.TransferSyntaxUID = RLELossless
    offsets = [64, 64 + len(segments[0])]
    frame = struct.pack("<16I", 2, *offsets, *[0] * 13) + b"".join(segments)
    made.PixelData = encapsulate([frame + b"\0" * (len(frame) % 2)])
    made["PixelData"].is_undefined_length = True
    made.save_as(path)
    return path


def literal(values):
    values = bytes(values)
    return b"".join(bytes([len(part) - 1]) + part for i in range(0, len(values), 128) if (part := values[i : i + 128]))


def rle_of(pixels):
    return [literal((pixels >> 8).ravel().astype(np.uint8)), literal((pixels & 255).ravel().astype(np.uint8))]


def test_compressed_pixels_without_their_last_mark_are_all_there(tmp_path):
    path = write_rle(tmp_path / "rle.dcm", rle_of(BAND))
    whole = greys(path)
    content = path.read_bytes()
    assert content.endswith(b"\xfe\xff\xdd\xe0\0\0\0\0")
    path.write_bytes(content[:-8])
    assert np.array_equal(greys(path), whole)
    for cut in (20, 100, 400):
        path.write_bytes(content[:-cut])
        with pytest.raises(ValueError, match=r"rle\.dcm: .*cut short"):
            read_image(path)


def test_runs_that_unpack_to_gigabytes_are_refused_before_they_do(tmp_path):
    run = b"\x81\x00" * 100_000  # each two bytes are 128
    with pytest.raises(ValueError, match="unpack to more than their 256 pixels"):
        read_image(write_rle(tmp_path / "bomb.dcm", [run, run]))


def test_a_deflated_file_is_read_and_a_bomb_is_not(tmp_path):
    path = write_dicom(tmp_path / "d.dcm", BAND, 12)
    made = pydicom.dcmread(path)
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    made.save_as(tmp_path / "d.dcm")
    assert greys(path).max() > 0
    content = path.read_bytes()
    meta = pydicom.filereader.read_file_meta_info(path)
    begin = 144 + meta.FileMetaInformationGroupLength
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = b"\0" * (1 << 20)
    bomb = b"".join(squeeze.compress(zeros) for _ in range(500)) + squeeze.flush()
    path.write_bytes(content[:begin] + bomb)
    for read in (read_image, read_header, dicom_header):
        with pytest.raises(ValueError, match=r"d\.dcm: unpacks to more than"):
            read(path)


def test_a_stream_of_another_size_than_its_header_is_refused(tmp_path):
    buffer = io.BytesIO()
    PIL.Image.new("L", (64, 48), 9).save(buffer, "JPEG")
    write_dicom(tmp_path / "j.dcm", np.zeros((16, 16), np.uint8), 8)
    made = pydicom.dcmread(tmp_path / "j.dcm")
    made.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    made.PixelData = encapsulate([buffer.getvalue()])
    made["PixelData"].is_undefined_length = True
    made.save_as(tmp_path / "j.dcm")
    with pytest.raises(ValueError, match=r"expected 16 x 16 pixels \(Rows, Columns\), got 48 x 64"):
        read_image(tmp_path / "j.dcm")
    made.Rows, made.Columns = 48, 64
    made.save_as(tmp_path / "j.dcm")
    assert greys(tmp_path / "j.dcm").shape == (48, 64)


def test_empty_cut_and_foreign_files_are_told_apart(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", BAND, 12)
    content = path.read_bytes()
    for end in (145, 300, 700, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"a\.dcm: .*cut short"):
            read_image(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        read_image(path)
    for text in (b"a text, no picture at all\n" * 20, b"x", b"{}", bytes(range(256)) * 9):
        path.write_bytes(text)
        for read in (read_image, dicom_header):
            with pytest.raises(ValueError, match=r"a\.dcm: no DICOM file"):
                read(path)


@pytest.mark.parametrize(
    "name, vr, value",
    [
        ("Rows", "US", b"SECRET"),
        ("RescaleSlope", "DS", b"SECRET"),
        ("PixelPaddingValue", "US", b"S"),
        ("PhotometricInterpretation", "CS", b"SECRET"),
        ("NumberOfFrames", "IS", b"SECRET"),
        ("BitsStored", "US", b"SEC"),
        ("WindowWidth", "DS", b"SECRET"),
        ("PatientID", "DS", b"SECRET;"),
    ],
)
def test_no_error_and_no_warning_quotes_a_header(tmp_path, name, vr, value, capsys, caplog, recwarn):
    path = write_dicom(tmp_path / "q.dcm", BAND, 12, WindowCenter=1500)
    made = pydicom.dcmread(path)
    tag = pydicom.tag.Tag(name)
    made[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True)
    with open(path, "wb") as file:  # as it stands
        made.save_as(file)
    for read in (read_image, dicom_header):
        try:
            read(path)
        except ValueError as error:
            assert name in str(error) and "SECRET" not in str(error) and "\n" not in str(error)
    told = capsys.readouterr()
    warned = " ".join(str(warning.message) for warning in recwarn)
    assert "SECRET" not in told.out + told.err + caplog.text + warned
