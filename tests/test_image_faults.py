"""Image files that lie about themselves, would never end, or have names and links that stop a walk."""

import io
import os
import struct

import datasets
import numpy as np
import PIL.Image
import pytest

from cxr_diffusers import load_folder, load_table
from cxr_diffusers.data.images import check_has_contrast, list_images, read_image, split_images, walk, without_suffix
from cxr_diffusers.data.limits import MAX_BYTES, MAX_PIXELS
from cxr_diffusers.data.rows import check_images, to_dataset
from helpers import write_dicom

RAMP = np.arange(64).reshape(8, 8)
TYPES = {"u1": (8, 1), "u2": (16, 1), "i2": (16, 2), "u4": (32, 1), "i4": (32, 2), "f4": (32, 3)}


def write_tiff(path, pixels, order="<", white_is_zero=False, bits=None):
    """An uncompressed TIFF of one strip, in either byte order; `bits` 1 or 4: packed."""
    dtype = f"{pixels.dtype.kind}{pixels.itemsize}"
    depth, sample = (bits, 1) if bits else TYPES[dtype]
    if bits:
        unpacked = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        content = np.packbits(unpacked.reshape(len(pixels), -1), axis=-1).tobytes()
    else:
        content = pixels.astype(order + dtype).tobytes()
    height, width = pixels.shape
    tags = [(256, width), (257, height), (258, depth), (259, 1), (262, int(not white_is_zero)), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(content)), (339, sample)]
    entries = b"".join(
        struct.pack(order + "2HI", tag, 3, 1) + struct.pack(order + "H", value) + b"\0\0" for tag, value in tags
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(content))
    path.write_bytes(head + content + struct.pack(order + "H", len(tags)) + entries + b"\0" * 4)
    return path


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    "pixels, white",
    [
        (RAMP.astype(np.uint8) * 4, 255),
        (RAMP.astype(np.uint16) * 1000, 65535),
        (RAMP.astype(np.int16) * 500, 32767),
        (RAMP.astype(np.int32) * 1000, 65535),
        (RAMP.astype(np.float32) * 1000, 65535),
    ],
)
def test_a_tiff_whose_zero_is_white_is_the_same_image(tmp_path, order, pixels, white):
    usual = write_tiff(tmp_path / "black.tif", pixels, order)
    turned = write_tiff(tmp_path / "white.tif", (white - pixels.astype(np.int64)).astype(pixels.dtype), order, True)
    assert np.array_equal(np.asarray(read_image(usual)), np.asarray(read_image(turned)))
    assert np.array_equal(np.asarray(read_image(usual)), pixels)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_tiff_of_few_bits_is_turned_too(tmp_path, bits):
    pixels = RAMP % 2**bits
    usual = write_tiff(tmp_path / "black.tif", pixels, bits=bits)
    turned = write_tiff(tmp_path / "white.tif", 2**bits - 1 - pixels, white_is_zero=True, bits=bits)
    expected = pixels * 255 // (2**bits - 1)
    assert np.array_equal(np.asarray(read_image(usual)), expected)
    assert np.array_equal(np.asarray(read_image(turned)), expected)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate", "packbits"])
def test_a_compressed_tiff_is_turned_too(tmp_path, compression):
    for name, pixels, tag in (("b", RAMP * 1000, 1), ("w", 65535 - RAMP * 1000, 0)):
        image = PIL.Image.fromarray(pixels.astype(np.uint16))
        image.save(tmp_path / f"{name}.tif", compression=compression, tiffinfo={262: tag})
        content = bytearray((tmp_path / f"{name}.tif").read_bytes())
        at = content.index(struct.pack("<2HI", 262, 3, 1))  # Pillow writes its own opinion
        content[at + 8] = tag
        (tmp_path / f"{name}.tif").write_bytes(content)
        assert np.array_equal(np.asarray(read_image(tmp_path / f"{name}.tif")), RAMP * 1000)


def test_floats_between_zero_and_one_are_turned_within_them(tmp_path):
    pixels = (RAMP / 64).astype(np.float32)
    path = write_tiff(tmp_path / "w.tif", 1 - pixels, white_is_zero=True)
    assert np.abs(np.asarray(read_image(path)) / 65535 - pixels).max() < 1e-4


def scans(n, size=(16, 16)):
    buffer = io.BytesIO()
    PIL.Image.new("L", size, 50).save(buffer, "JPEG", progressive=True, quality=90)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * n + b"\xff\xd9"


def test_scans_are_limited_by_the_work_they_make(tmp_path):
    (tmp_path / "usual.jpg").write_bytes(scans(1, (600, 600)))
    assert read_image(tmp_path / "usual.jpg").size == (600, 600)
    for name in ("bomb.jpg", "bomb.png"):  # the name says nothing
        (tmp_path / name).write_bytes(scans(2000, (600, 600)))
        with pytest.raises(ValueError, match=f"{name}: expected at most 1388 scans of 360,000 pixels, got 2005"):
            read_image(tmp_path / name)


def png_header(width, height):
    import zlib

    head = b"IHDR" + struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    chunks = [struct.pack(">I", 13), head, struct.pack(">I", zlib.crc32(head)), struct.pack(">I", 9), b"IDAT"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def lazily_opened(path):
    """How `load_folder`, `load_table`, `load_packed` and `load_hub` open an image file, by path and by its bytes."""
    cells = [{"path": str(path), "bytes": None}, {"path": path.name, "bytes": path.read_bytes()}]
    rows = [{"image": path, "label": 0}]
    yield to_dataset(rows, ["healthy", "diseased"])
    features = datasets.Features({"image": datasets.Image()})
    for cell in cells:
        yield check_images(datasets.Dataset.from_dict({"image": [cell]}, features=features))
    if path.suffix == ".png":
        yield load_folder(path.parent)
        (path.parent / "t.csv").write_text(f"file\n{path.name}\n")
        yield load_table(path.parent / "t.csv", label="healthy")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jpg", lambda: scans(2000, (600, 600)), "expected at most 1388 scans of 360,000 pixels, got 2005"),
        ("a.png", lambda: png_header(10000, 10000), "expected 1 to 50,000,000 pixels, got 10000 x 10000"),
        ("a.png", lambda: png_header(30000, 30000), "decompression bomb"),
        ("a.png", lambda: b"", "the file is empty"),
        ("a.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as an image"),
    ],
)
def test_images_that_a_data_set_opens_later_have_the_same_limits(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content())
    for dataset in lazily_opened(path):
        with pytest.raises(ValueError, match=f"{name}: .*({message})"):
            dataset[0]["image"]


def test_a_file_that_has_more_bytes_than_an_image_may_have_is_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: no byte is written
    dataset = to_dataset([{"image": tmp_path / "a.png", "label": 0}], ["healthy", "diseased"])
    with pytest.raises(ValueError, match=f"a.png: expected at most {MAX_BYTES:,} bytes, got {MAX_BYTES + 1:,}"):
        dataset[0]["image"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="a.png: no such image file"):
        dataset[0]["image"]


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "P", "RGBA", "1"])
def test_a_data_set_keeps_the_mode_and_pixels_of_its_images(tmp_path, mode):
    grey = (
        PIL.Image.fromarray((RAMP * 1000).astype(np.uint16))
        if mode == "I;16"
        else PIL.Image.fromarray((RAMP * 4).astype(np.uint8)).convert(mode)
    )
    grey.save(tmp_path / "a.png")
    image = to_dataset([{"image": tmp_path / "a.png", "label": 0}], ["healthy", "diseased"])[0]["image"]
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image), np.asarray(grey))


def test_exif_orientation_is_applied_and_columns_are_stored_as_plain_images(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(RAMP[:4].astype(np.uint8) * 4).save(tmp_path / "a.png", exif=exif)
    dataset = to_dataset([{"image": tmp_path / "a.png", "label": 0}], ["healthy", "diseased"])
    np.testing.assert_array_equal(np.asarray(dataset[0]["image"]), np.rot90(RAMP[:4] * 4, -1))
    dataset.save_to_disk(tmp_path / "saved")
    stored = datasets.load_from_disk(tmp_path / "saved")
    assert type(stored.features["image"]) is datasets.Image
    assert stored.features == dataset.features and dataset.features == stored.features


def test_comments_and_profiles_of_a_file_do_not_follow_its_pixels(tmp_path):
    image = PIL.Image.fromarray(RAMP.astype(np.uint8))
    image.save(tmp_path / "a.jpg", comment=b"Miller", icc_profile=b"Miller")
    read_image(tmp_path / "a.jpg").save(tmp_path / "b.jpg")
    assert b"Miller" not in (tmp_path / "b.jpg").read_bytes()


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(30000, 30000))
    array = np.lib.format.magic(1, 0)
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (300000, 300000), }"
    (tmp_path / "a.npy").write_bytes(array + struct.pack("<H", len(text) + 1) + text + b"\n")
    (tmp_path / "b.png").write_bytes(png_header(MAX_PIXELS + 1, 1))
    for name, message in {"a.png": "bomb", "b.png": "got 50000001 x 1", "a.npy": "mmap length"}.items():
        with pytest.raises(ValueError, match=f"{name}: .*({message})"):
            read_image(tmp_path / name)


def test_empty_files_and_npz_archives_are_refused(tmp_path):
    for name in ("a.png", "a.jpg", "a.tif", "a.npy", "a.dcm"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name}: the file is empty"):
            read_image(tmp_path / name)
    np.savez(tmp_path / "x.npz", a=RAMP)
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="expected one array, got an archive"):
        read_image(tmp_path / "x.npy")


def test_a_file_that_would_start_a_program_is_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("value", [0, 7, 255])
def test_an_image_of_one_value_is_refused(value):
    for image in (PIL.Image.new("L", (4, 3), value), np.full((5, 5), value, np.uint16), np.full((1, 1), value)):
        with pytest.raises(ValueError, match=r"x\.png: expected an image with contrast"):
            check_has_contrast(image, "x.png")
    check_has_contrast(PIL.Image.fromarray(RAMP.astype(np.uint8)), "x.png")


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(RAMP.astype(np.uint8)).save(path)
    return path


def test_links_that_go_in_circles_are_entered_once(tmp_path):
    root = tmp_path / "root"
    images = [save(root / name) for name in ("a/x.png", "b/c/y.png", "z.png")]
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "again").symlink_to("..")
    (root / "b" / "self").symlink_to(".")
    (root / "0first").symlink_to("b/c")  # a file keeps its own path
    assert list_images(root) == sorted(images)
    elsewhere = save(tmp_path / "elsewhere" / "e.png")
    (root / "linked").symlink_to(elsewhere.parent)
    (root / "linked2").symlink_to(elsewhere.parent)
    assert list_images(root) == sorted([*images, root / "linked" / "e.png"])
    assert len(list(walk(root))) == 5


def test_bad_names_and_links_stop_no_list(tmp_path):
    good = save(tmp_path / "good.png")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop.dcm").symlink_to("loop.dcm")
    os.mkfifo(tmp_path / "pipe.dcm")
    os.mkfifo(tmp_path / "pipe")
    names = ["胸" * 80 + ".png", "two\nlines.png"]
    paths = [save(tmp_path / name) for name in names]
    raw = os.path.join(os.fsencode(tmp_path), b"\xff\xfe.png")
    with open(raw, "wb") as file:
        file.write(good.read_bytes())
    images, skipped = split_images(tmp_path)
    expected = {good, *paths, tmp_path / "dangling.png", tmp_path / "loop.dcm", tmp_path / "pipe.dcm"}
    assert set(images) == expected | {type(good)(os.fsdecode(raw))} and not skipped
    for path in images:
        if path.is_file():
            assert read_image(path).size == (8, 8)
        else:
            with pytest.raises(OSError):
                read_image(path)


def test_a_name_loses_the_suffix_of_an_image_alone(tmp_path):
    for name, expected in {"a.png": "a", "1.2.840.7": "1.2.840.7", "b.v2.DCM": "b.v2", "c": "c"}.items():
        assert without_suffix(tmp_path / name).name == expected


def test_a_bare_dicom_file_is_listed(tmp_path):
    assert list_images(tmp_path) == []
    path = write_dicom(tmp_path / "IM1", RAMP.astype(np.uint16), 12)
    assert list_images(tmp_path) == [path]


def pages(path, *kinds):
    """A TIFF of pages (NewSubfileType of each), the first a ramp."""
    images = [PIL.Image.fromarray((RAMP if i == 0 else RAMP[::-1]).astype(np.uint8) * 4) for i in range(len(kinds))]
    with PIL.TiffImagePlugin.AppendingTiffWriter(str(path), new=True) as file:
        for image, kind in zip(images, kinds, strict=True):
            image.save(file, format="TIFF", tiffinfo={254: kind})
            file.newFrame()
    return path


def test_a_file_of_several_pages_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.tif: expected one page, got several"):
        read_image(pages(tmp_path / "a.tif", 0, 0, 0))
    frames = [PIL.Image.fromarray((RAMP * i).astype(np.uint8)) for i in (1, 2, 3)]
    for suffix in ("gif", "png", "webp"):
        path = tmp_path / f"{suffix}.png"  # the content decides
        frames[0].save(path, format=suffix.upper(), save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match=f"{suffix}.png: expected one image, got an animation"):
            read_image(path)


def test_thumbnails_and_transparency_masks_of_a_tiff_are_no_pages(tmp_path):
    assert np.array_equal(np.asarray(read_image(pages(tmp_path / "a.tif", 0, 1, 4))), RAMP * 4)
    assert np.array_equal(np.asarray(read_image(pages(tmp_path / "alone.tif", 1))), RAMP * 4)
    with pytest.raises(ValueError, match="expected one page, got several"):
        read_image(pages(tmp_path / "b.tif", 0, 1, 2))
    with pytest.raises(ValueError, match="expected the image as the first page, got a thumbnail"):
        read_image(pages(tmp_path / "c.tif", 1, 1))
    with pytest.raises(ValueError, match="expected at most 16 thumbnails"):
        read_image(pages(tmp_path / "d.tif", 0, *[1] * 20))


def test_a_tiff_whose_next_page_lies_beyond_its_end_is_read(tmp_path):
    path = write_tiff(tmp_path / "a.tif", (RAMP * 4).astype(np.uint8))
    content = bytearray(path.read_bytes())
    (begin,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, begin)
    assert struct.unpack_from("<I", content, begin + 2 + 12 * count) == (0,), "the offset of the next page"
    struct.pack_into("<I", content, begin + 2 + 12 * count, 10**6)
    path.write_bytes(content)
    assert np.array_equal(np.asarray(read_image(path)), RAMP * 4)


def test_the_previews_of_a_photograph_of_several_pictures_are_ignored(tmp_path):
    image = PIL.Image.fromarray((RAMP * 4).astype(np.uint8)).convert("RGB")
    image.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[image.transpose(1)], quality=100)
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg")).astype(int) - RAMP * 4).max() < 4
