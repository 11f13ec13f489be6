"""Reading one image file, whatever it is, and fitting it to a square."""

import numpy as np
import PIL.Image
import PIL.ImageOps
import pydicom
import pytest
from pydicom.uid import JPEGLSLossless
from scipy import ndimage

from cxr_diffusers.data.images import (
    dicom_header,
    equalize,
    fit_boxes,
    fit_image,
    fit_mask,
    is_dicom,
    list_images,
    read_image,
    split_images,
)
from cxr_diffusers.data.run_lengths import mask_image
from cxr_diffusers.pipelines.cxr_images import prepare_image
from helpers import write_dicom


@pytest.fixture
def ramp():
    return np.arange(64, dtype=np.uint16).reshape(8, 8) * 65  # 0 .. 4095


def test_8_bit_dicom_comes_back_pixel_by_pixel(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    image = read_image(write_dicom(tmp_path / "a.dcm", pixels, 8))
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), pixels)


def test_12_bit_dicom_is_scaled_by_its_type_and_not_by_its_own_values(tmp_path, ramp):
    full = read_image(write_dicom(tmp_path / "full.dcm", ramp, 12))
    dark = read_image(write_dicom(tmp_path / "dark.dcm", ramp // 4, 12))
    assert full.mode == "I;16"
    assert np.asarray(full).max() == 65535
    assert np.array_equal(np.asarray(dark), (ramp // 4 / 4095 * 65535).round())


def test_monochrome1_is_the_inverse_of_monochrome2(tmp_path, ramp):
    positive = read_image(write_dicom(tmp_path / "2.dcm", ramp, 12))
    negative = read_image(write_dicom(tmp_path / "1.dcm", ramp, 12, "MONOCHROME1"))
    assert np.abs(65535.0 - np.asarray(negative) - np.asarray(positive)).max() <= 1


def test_a_window_clips_and_stretches_grey_values(tmp_path, ramp):
    path = write_dicom(tmp_path / "w.dcm", ramp, 12, WindowCenter=2048, WindowWidth=1024)
    expected = ((ramp - 2047.5) / 1023 + 0.5).clip(0, 1) * 65535  # DICOM PS3.3 C.11.2.1.2.1
    assert np.abs(np.asarray(read_image(path)) - expected).max() <= 17  # one 12-bit grey


@pytest.mark.parametrize("slope, intercept", [(2.0, -1000.0), (-1.0, 4095.0)])
@pytest.mark.parametrize("windowed", [False, True])
def test_a_rescale_changes_units_but_brighter_still_means_a_larger_value(tmp_path, ramp, slope, intercept, windowed):
    ends = sorted((intercept, 4095 * slope + intercept))
    window = {"WindowCenter": sum(ends) / 2, "WindowWidth": ends[1] - ends[0]} if windowed else {}
    tags = {"RescaleSlope": slope, "RescaleIntercept": intercept, "RescaleType": "US", **window}
    image = np.asarray(read_image(write_dicom(tmp_path / "r.dcm", ramp, 12, **tags))).astype(float)
    expected = ramp / 4095 if slope > 0 else 1 - ramp / 4095
    assert np.abs(image / 65535 - expected).max() < 1 / 2000


def test_signed_pixels_are_read(tmp_path, ramp):
    image = read_image(write_dicom(tmp_path / "s.dcm", ramp.astype(np.int16) - 2048, 12))
    assert np.abs(np.asarray(image) - ramp / 4095 * 65535).max() <= 1


def test_padding_pixels_are_black_also_after_inversion(tmp_path, ramp):
    path = write_dicom(tmp_path / "p.dcm", ramp, 12, "MONOCHROME1", PixelPaddingValue=0)
    image = np.asarray(read_image(path))
    assert image[0, 0] == 0 and image[0, 1] > 60000


def test_dicom_without_extension_is_recognised_by_its_magic_word(tmp_path, ramp):
    path = write_dicom(tmp_path / "IM000001", ramp, 12)
    (tmp_path / "notes").write_text("no picture")
    (tmp_path / "DICOMDIR").write_bytes(path.read_bytes())
    assert is_dicom(path) and not is_dicom(tmp_path / "notes")
    assert read_image(path).size == (8, 8)
    assert dicom_header(path) == ("p7", "PA")
    assert list_images(tmp_path) == [path]


def test_an_error_for_a_missing_decoder_names_the_package_to_install(tmp_path, ramp):
    if pydicom.pixels.get_decoder(JPEGLSLossless).is_available:
        pytest.skip("a JPEG-LS decoder is installed here")
    path = write_dicom(tmp_path / "c.dcm", ramp, 12, syntax=JPEGLSLossless)
    with pytest.raises(ValueError, match=r"c\.dcm.*JPEG-LS.*pylibjpeg"):
        read_image(path)


def test_dicom_that_is_not_one_grey_image_is_refused(tmp_path, ramp):
    colour = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="rgb.dcm.*MONOCHROME.*RGB"):
        read_image(write_dicom(tmp_path / "rgb.dcm", colour, 8, "RGB", PlanarConfiguration=0))
    frames = np.concatenate([ramp, ramp])
    with pytest.raises(ValueError, match="film.dcm.*one frame, got 2"):
        read_image(write_dicom(tmp_path / "film.dcm", frames, 12, NumberOfFrames=2, Rows=8))


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.npy", "x.dcm", "x.tif"])
def test_a_broken_file_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an image at all")
    with pytest.raises(ValueError, match=name):
        read_image(tmp_path / name)


def test_a_truncated_file_is_an_error_that_names_it(tmp_path):
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut.png"):
        read_image(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        read_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_files_stay_16_bit(tmp_path, ramp, suffix):
    PIL.Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.mode == "I;16" and np.array_equal(np.asarray(image), ramp)


def test_colour_becomes_grey(tmp_path):
    PIL.Image.new("RGB", (4, 4), (90, 90, 90)).save(tmp_path / "rgb.png")
    assert read_image(tmp_path / "rgb.png").mode == "L"
    assert read_image(tmp_path / "rgb.png").getpixel((0, 0)) == 90


def test_arrays_are_read_by_their_type(tmp_path):
    cases = {
        "u8": (np.full((4, 5, 1), 7, np.uint8), "L", 7),
        "u16": (np.full((4, 5), 700, np.uint16), "I;16", 700),
        "f4": (np.full((4, 5), 0.5, np.float32), "I;16", 32768),
    }
    for name, (array, mode, value) in cases.items():
        np.save(tmp_path / f"{name}.npy", array)
        image = read_image(tmp_path / f"{name}.npy")
        assert (image.mode, image.size, image.getpixel((0, 0))) == (mode, (5, 4), value)


@pytest.mark.parametrize(
    "array, message",
    [(np.zeros((4, 4, 3), np.uint8), "shape"), (np.zeros((4, 4), int), "int64"), (np.full((4, 4), 2.0), r"\[0, 1\]")],
)
def test_arrays_that_are_not_images_are_refused(tmp_path, array, message):
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(ValueError, match=f"bad.npy.*{message}"):
        read_image(tmp_path / "bad.npy")


def disc(height, width, radius, dtype=np.uint8):
    y, x = np.mgrid[:height, :width]
    inside = (y - height / 2) ** 2 + (x - width / 2) ** 2 < radius**2
    return PIL.Image.fromarray((inside * np.iinfo(dtype).max).astype(dtype))


def extent(image):
    ys, xs = np.nonzero(np.asarray(image) > np.asarray(image).max() / 2)
    return np.ptp(xs) + 1, np.ptp(ys) + 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [64, 300])
def test_a_circle_stays_a_circle_unless_it_is_squashed(dtype, size):
    image = disc(120, 200, 40, dtype)
    for aspect in ("pad", "edge", "crop"):
        fitted = fit_image(image, size, aspect)
        wide, high = extent(fitted)
        assert fitted.size == (size, size) and fitted.mode == image.mode
        assert abs(wide - high) <= 1
    wide, high = extent(fit_image(image, size, "squash"))
    assert high / wide == pytest.approx(200 / 120, rel=0.05)


def test_shrinking_keeps_the_mean_so_no_pixel_is_skipped():
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    assert np.asarray(fit_image(PIL.Image.fromarray(pixels), 16)).mean() == pytest.approx(pixels.mean(), abs=0.5)


@pytest.mark.parametrize("aspect", ["pad", "edge", "crop", "squash"])
@pytest.mark.parametrize("shape", [(90, 200), (200, 90), (33, 33)])
def test_boxes_and_masks_move_with_the_image(aspect, shape):
    height, width = shape
    pixels = np.zeros(shape, np.uint8)
    box = [width // 2 - 8, height // 2 - 6, 14, 10]
    pixels[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = 255
    image = PIL.Image.fromarray(pixels)
    (x, y, w, h) = fit_boxes([box], width, height, 128, aspect)[0]
    for moved in (fit_image(image, 128, aspect), fit_mask(image, 128, aspect)):
        ys, xs = np.nonzero(np.asarray(moved) > 127)
        result = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.allclose(result, [x, y, x + w, y + h], atol=1.01)


def test_bars_repeat_the_border_of_the_image_but_not_that_of_a_mask():
    pixels = np.random.default_rng(0).integers(60, 200, (16, 8), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    for square in (
        np.asarray(fit_image(image, 16, "edge")),
        prepare_image(image, 16, "dtype", "edge", (0, 255))[0, 0].round().numpy(),
    ):
        assert np.array_equal(square[:, 4:12], pixels)
        assert (square[:, :4] == pixels[:, :1]).all() and (square[:, 12:] == pixels[:, -1:]).all()
    mask = np.asarray(fit_mask(PIL.Image.fromarray(np.ones((16, 8), np.uint8)), 16, "edge"))
    assert (mask[:, 4:12] == 255).all() and not mask[:, :4].any() and not mask[:, 12:].any()


def test_images_of_formats_that_are_not_read_from_folders_are_named(tmp_path, caplog):
    for name in ("a.png", "b.gif", "c.webp", "d.txt"):
        (tmp_path / name).write_bytes(b"x")
    images, skipped = split_images(tmp_path)
    assert images == [tmp_path / "a.png"] and skipped == {tmp_path / "b.gif": ".gif", tmp_path / "c.webp": ".webp"}
    assert list_images(tmp_path) == images
    assert "left out 2 files of a format that is not read (1 .gif, 1 .webp)" in caplog.text


def test_a_box_that_the_crop_removes_is_left_out():
    assert fit_boxes([[0, 0, 10, 10]], 200, 100, 64, "crop") == []
    assert fit_boxes([[45, 0, 10, 10]], 200, 100, 64, "crop")[0][0] == 0  # half of it remains


def test_masks_of_zero_and_one_count_as_masks():
    assert set(np.unique(np.asarray(fit_mask(PIL.Image.fromarray(np.eye(8, dtype=np.uint8)), 8)))) == {0, 255}


@pytest.mark.parametrize("aspect", ["pad", "edge", "squash"])
def test_a_region_that_is_smaller_than_a_pixel_of_the_copy_is_kept(aspect):
    mask = np.zeros((300, 600), np.uint8)
    mask[101:105, 401:405] = mask[150:200, 100:200] = 1
    small = np.asarray(fit_mask(PIL.Image.fromarray(mask), 30, aspect)) > 0
    assert ndimage.label(small)[1] == 2
    [box] = fit_boxes([[401, 101, 4, 4]], 600, 300, 30, aspect)
    assert small[int(box[1] + box[3] / 2), int(box[0] + box[2] / 2)]
    assert ndimage.label(np.asarray(mask_image(mask > 0, (60, 30), "row")))[1] == 2
    assert not np.asarray(mask_image(mask > 1, (60, 30), "row")).any()


def test_equalize_follows_its_formula():
    pixels = np.array([[10, 10, 20], [20, 20, 30]], np.uint8)
    # counts 2, 3, 1: (cdf - 2) / (6 - 2) * 255
    assert np.asarray(equalize(PIL.Image.fromarray(pixels))).tolist() == [[0, 0, 191], [191, 191, 255]]


def test_equalize_flattens_the_histogram_and_keeps_the_order():
    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.uint16):
        pixels = (rng.beta(2, 8, (200, 200)) * np.iinfo(dtype).max).astype(dtype)
        equal = np.asarray(equalize(PIL.Image.fromarray(pixels)))
        order = np.argsort(pixels, axis=None)
        assert (np.diff(equal.ravel()[order].astype(int)) >= 0).all()
        quarters = np.quantile(equal / np.iinfo(dtype).max, [0.25, 0.5, 0.75])
        assert np.allclose(quarters, [0.25, 0.5, 0.75], atol=0.03)


def test_equalize_leaves_an_image_of_one_value_alone():
    assert np.asarray(equalize(PIL.Image.new("L", (4, 4), 77))).tolist() == [[77] * 4] * 4


def test_pil_equalizes_by_another_formula_so_it_does_not_do():
    pixels = np.random.default_rng(0).integers(60, 200, (64, 64)).astype(np.uint8)
    pixels[:24] = 0  # the black of a padded radiograph
    image = PIL.Image.fromarray(pixels)
    difference = np.asarray(equalize(image)).astype(int) - np.asarray(PIL.ImageOps.equalize(image))
    assert np.abs(difference).max() > 50


@pytest.mark.parametrize("aspect", ["pad", "edge", "crop", "squash"])
def test_a_prepared_copy_has_the_grey_values_that_the_model_gets_from_the_original(aspect):
    y, x = np.mgrid[:300, :390]
    image = PIL.Image.fromarray((60 + 120 * (np.hypot(y - 150, x - 195) < 90)).astype(np.uint8))
    raw = prepare_image(image, 64, aspect=aspect)
    copy = prepare_image(fit_image(image, 256, aspect), 64, aspect=aspect)
    assert (raw - copy).abs().mean() < 0.05
