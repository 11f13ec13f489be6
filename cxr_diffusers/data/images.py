"""Read image files as greyscale PIL images without loss: mode "L" (8 bit) or "I;16" (more)."""

import collections
import contextlib
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.TiffImagePlugin

from .dicom import DICOM_SUFFIXES, dicom_header, has_magic, is_dicom, read_header  # noqa: F401
from .dicom_checks import non_radiograph_type
from .dicom_pixels import read_dicom
from .limits import MAX_BYTES, check_byte_count, check_pixel_count, check_scans
from .tiff import as_black_is_zero, fits_16_bits, negative

logger = logging.getLogger(__name__)

PIL_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SUFFIXES = (*PIL_SUFFIXES, ".npy", *DICOM_SUFFIXES)
ASPECTS = ("pad", "edge", "crop", "squash")  # of `fit_image`
SUB_PAGES = 330  # the TIFF tag of further pages
MAX_PAGES = 16  # thumbnails and masks of a TIFF that are looked at: each costs time
UNREAD_SUFFIXES = (".gif", ".jp2", ".webp")  # of images, not read from folders: usually no radiographs
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "GIF", "WEBP", "JPEG2000")  # other formats may start external programs

NPY_MAGIC = b"\x93NUMPY"
ORIENTATION = 0x0112  # EXIF tag: how to turn the stored pixels

# table of contents of an exported CD: a DICOM file without an image
DICOM_CONTENTS = "DICOMDIR"


def read_image(path: Path | str, draft: int | None = None) -> PIL.Image.Image:
    """Read one radiograph.

    png, jpg, bmp, tif: as stored; colour becomes grey by PIL's weights, an EXIF orientation is applied, a TIFF whose
    zero is white is inverted.
    npy: uint8 (H, W) or (H, W, 1); uint16; or float in [0, 1], which becomes 16 bit.
    DICOM: modality LUT, then VOI LUT or the first window, then MONOCHROME1 inverted, so that bright is dense. The grey
    scale is that of the data type, not of the image: 0 and the maximum of the result correspond to the range of the
    *stored bits* after the modality LUT (or to the window, if there is one). Differences in exposure between images are
    therefore preserved; use `scaling="minmax"` to stretch each image. Padding pixels (PixelPaddingValue, with
    PixelPaddingRangeLimit) are ignored and set to the darkest value of the other pixels.

    Args:
        draft: None, or a side in pixels: a JPEG is decoded at a half, a quarter or an eighth of its size where both of
            its sides stay at least this long. Faster, and the pixels differ slightly from those of the whole image.

    Returns:
        PIL image, mode "L", or "I;16" for more than 8 bits stored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken, too large (see `limits`), or not one grey image; the message
            names the path, and quotes nothing of a DICOM header.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such image file: {path}")
    with errors_name(path):
        check_byte_count(path.stat().st_size)
        if path.suffix.lower() == ".npy":
            return _read_array(path)
        if path.suffix.lower() not in PIL_SUFFIXES and is_dicom(path):
            return read_dicom(path)
        image = decode_image(path.read_bytes(), draft)
        image = image if image.mode == "L" else to_grey(image)
        image.info = {}  # comments and colour profiles would follow the pixels into copies
        return image


@contextlib.contextmanager
def errors_name(path: Path | str) -> Iterator[None]:
    """Turn any exception into a ValueError on one line that begins with `path`.

    Pillow raises SyntaxError, struct.error and others for damaged files; whichever it is, the user needs the path.
    """
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {text}") from error


def decode_image(content: bytes, draft: int | None = None) -> PIL.Image.Image:
    """Decode the bytes of an image file (`FORMATS`) within the limits of `limits`.

    Args:
        draft: see `read_image`.

    Returns:
        PIL image in the file's own mode: EXIF orientation applied, a TIFF whose zero is white inverted.

    Raises:
        ValueError: too many bytes, pixels or scans, or none at all; more than one page; Pillow's errors for damaged
            files.
    """
    check_byte_count(len(content))
    content, white_is_zero = as_black_is_zero(content)
    PIL.Image.init()  # or the formats that are named are not all there
    try:
        opened = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
    except PIL.UnidentifiedImageError:  # its message shows a BytesIO
        raise ValueError("cannot be read as an image (damaged or of another format)") from None
    with opened as image:
        check_pixel_count(image.width, image.height)
        if image.format not in ("JPEG", "MPO"):  # behind its first image, an MPO has previews
            check_single(content)
        else:
            check_scans(content, image.width * image.height)
            if draft is not None:
                image.draft("L", (draft, draft))
        image.load()
        turned = PIL.ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
        if white_is_zero and isinstance(image, PIL.TiffImagePlugin.TiffImageFile):
            turned = negative(turned, image.tag_v2.get(258, (1,))[0], signed=image.tag_v2.get(339, (1,))[0] == 2)
        return turned


def check_single(content: bytes) -> None:
    """Refuse the bytes of an animation, and of a TIFF of several pages or whose first page is a thumbnail.

    Thumbnails and transparency masks behind the first page are no pages; neither is what cannot be read.

    Raises:
        ValueError: see above.
    """
    with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:  # apart: a page that fails spoils the others
        if not isinstance(image, PIL.TiffImagePlugin.TiffImageFile):
            if getattr(image, "is_animated", False):
                raise ValueError("expected one image, got an animation: save one of its frames as a file of its own")
            return
        is_thumbnail, has_more = _is_auxiliary(image), SUB_PAGES in image.tag_v2
        for page in range(1, MAX_PAGES + 1):
            try:
                image.seek(page)
            except Exception:  # the end, or a page that cannot be read
                break
            has_more = True
            if not _is_auxiliary(image):
                raise ValueError("expected one page, got several: save the one to be read as a file of its own")
            if page == MAX_PAGES:
                raise ValueError(f"expected at most {MAX_PAGES} thumbnails and masks in a TIFF, got more")
        if is_thumbnail and has_more:
            raise ValueError(
                "expected the image as the first page, got a thumbnail: save the image as a file of its own"
            )


def _is_auxiliary(page):
    """NewSubfileType says: a reduced image, or a transparency mask."""
    return bool(page.tag_v2.get(254, 0) & 0b101)


def check_has_contrast(image: PIL.Image.Image | np.ndarray, path: Path | str) -> None:
    """Raise ValueError naming `path` if all pixels of an image have the same value: its score would be meaningless.

    Args:
        image: PIL image or array.
    """
    array = np.asarray(image)
    if array.size == 0 or (array == array.flat[0]).all():
        raise ValueError(f"{path}: expected an image with contrast, got one value in all {array.size:,} pixels")


def without_suffix(path: Path | str) -> Path:
    """A path without the suffix of an image file; other dots belong to its name (DICOM files have UIDs as names)."""
    path = Path(path)
    return path.with_suffix("") if path.suffix.lower() in SUFFIXES else path


def height_and_width(image: PIL.Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) of a PIL image or of an (H, W) or (H, W, C) array."""
    return (image.height, image.width) if isinstance(image, PIL.Image.Image) else image.shape[:2]


def to_grey(image: PIL.Image.Image) -> PIL.Image.Image:
    """PIL image of any mode -> "L" or "I;16"; ValueError for 32-bit values that 16 bits cannot hold."""
    if image.mode.startswith("I;16"):
        return PIL.Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in ("I", "F"):
        array = np.asarray(image)
        return array_to_image(array.astype(np.uint16) if fits_16_bits(array) else array)
    return image.convert("L")


def array_to_image(array: np.ndarray) -> PIL.Image.Image:
    """(H, W) or (H, W, 1) array -> PIL image: uint8 -> "L"; uint16, or float in [0, 1] -> "I;16"; else ValueError."""
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected an array of shape (H, W) or (H, W, 1), got {array.shape}")
    if array.dtype in (np.uint8, np.uint16):
        return PIL.Image.fromarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"expected an array of uint8, uint16 or float in [0, 1], got {array.dtype}")
    if not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(f"expected floats in [0, 1], got values from {array.min():g} to {array.max():g}")
    return PIL.Image.fromarray((array * 65535).round().astype(np.uint16))


def list_images(folder: Path | str) -> list[Path]:
    """Sorted paths of all images below `folder`, among them DICOM files without extension, as a PACS exports them.

    Skips hidden files and folders, DICOM files without an image (reports, segmentations, presentation states) and files
    of `UNREAD_SUFFIXES`; the log lists the latter two. Raises NotADirectoryError.
    """
    images, skipped = split_images(folder)
    if skipped:
        logger.warning("%s: left out %s", folder, describe_skipped(skipped))
    return images


def split_images(folder: Path | str) -> tuple[list[Path], dict[Path, str]]:
    """(sorted image paths, {path: reason} of what is left out, sorted by path).

    That is, DICOM files without an image (the reason is their object type) and files of `UNREAD_SUFFIXES` (it is that).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"expected a folder of images, got {folder}")
    paths = []
    for parent, _, files in walk(folder):
        paths += [Path(parent, name) for name in files if not name.startswith(".")]
    images, skipped = [], {}
    for path in sorted(paths):
        suffix = path.suffix.lower()
        if suffix in PIL_SUFFIXES or suffix == ".npy":
            images.append(path)
        elif suffix in UNREAD_SUFFIXES:
            skipped[path] = suffix
        elif suffix in DICOM_SUFFIXES or _is_bare_dicom(path):
            object_type = non_radiograph_type(path) if os.path.isfile(path) else ""
            if object_type:
                skipped[path] = object_type
            else:
                images.append(path)
    return images, skipped


def walk(folder: Path | str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Like `os.walk`, top down: skips hidden folders, follows links, and visits each folder once."""
    entered = set()

    def is_new(path):
        try:
            status = os.stat(path)
        except OSError:
            return False
        key = (status.st_dev, status.st_ino)
        new = key not in entered
        entered.add(key)
        return new

    def enter(parent):
        if not is_new(parent):
            return
        for place, folders, files in os.walk(parent, onerror=_unreadable):
            visible = sorted(name for name in folders if not name.startswith("."))
            links = [name for name in visible if os.path.islink(os.path.join(place, name))]
            yield place, visible, files
            folders[:] = [n for n in visible if n not in links and is_new(os.path.join(place, n))]
            waiting.extend(os.path.join(place, name) for name in links)

    waiting = [os.fspath(folder)]
    while waiting:  # links last, so that a file is listed under its real path
        yield from enter(waiting.pop(0))


def describe_skipped(skipped: Mapping[Path, str]) -> str:
    """{path: reason} -> "3 DICOM files without a radiograph (2 Enhanced SR Storage, 1 Segmentation Storage)".

    Reasons are those of `split_images`.
    """
    unread = [reason for reason in skipped.values() if reason in UNREAD_SUFFIXES]
    dicom = [reason for reason in skipped.values() if reason not in UNREAD_SUFFIXES]
    parts = [(dicom, "DICOM file", "without a radiograph"), (unread, "file", "of a format that is not read")]
    return ", ".join(
        f"{len(reasons)} {noun}{'s' * (len(reasons) > 1)} {what} "
        f"({', '.join(f'{count} {reason}' for reason, count in sorted(collections.Counter(reasons).items()))})"
        for reasons, noun, what in parts
        if reasons
    )


def fit_image(image: PIL.Image.Image, size: int, aspect: str = "pad") -> PIL.Image.Image:
    """PIL image ("L" or "I;16") -> the same mode, `size` x `size`, in the geometry of `pipelines.cxr_images.frame`.

    Area means along a side that shrinks, bicubic along one that grows.

    Args:
        aspect: "pad" (adds bars of the darkest pixel value, which keeps the range of grey values), "edge" (bars that
            repeat the border of the image), "crop" (the centre) or "squash" (changes the aspect ratio, as the
            preparation script of the original does).
    """

    def shrink(image, size):
        return image.resize(size, PIL.Image.Resampling.BOX)

    return _fit(image, size, aspect, PIL.Image.Resampling.BICUBIC, shrink, fill=np.min)


def fit_mask(mask: PIL.Image.Image, size: int, aspect: str = "pad") -> PIL.Image.Image:
    """PIL mask -> PIL "L" of 0 / 255, `size` x `size`, moved exactly as `fit_image` moves its image; nearest.

    Of a region that is too small for the pixels of the result, one is kept.
    """
    return _fit(binary_mask(mask), size, aspect, PIL.Image.Resampling.NEAREST, shrink_mask, fill=None)


def shrink_mask(mask: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """PIL "L" of 0 / 255 -> `size` (width, height), nearest; one pixel is kept of a region that falls between them."""
    if mask.size == tuple(size):
        return mask
    small = np.asarray(mask.resize(size, PIL.Image.Resampling.NEAREST)) > 0
    return PIL.Image.fromarray(with_lost_regions(small, np.asarray(mask) > 0).astype(np.uint8) * 255)


def with_lost_regions(small: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(h, w) booleans, a shrunk mask -> the same, with one pixel for each 8-connected region that has none in it.

    Args:
        mask: (H, W) booleans, the mask at its full size.
    """
    from scipy import ndimage

    (h, w), (height, width) = small.shape, mask.shape
    y, x = mask.nonzero()
    regions, count = ndimage.label(mask, np.ones((3, 3)))
    there = np.bincount(regions[y, x], weights=small[y * h // height, x * w // width], minlength=count + 1)
    lost = [i for i in range(1, count + 1) if not there[i]]
    small = small.copy()
    for row, column in ndimage.center_of_mass(mask, regions, lost):
        small[int((row + 0.5) * h / height), int((column + 0.5) * w / width)] = True
    return small


def fit_boxes(
    boxes: Iterable[Sequence[float]], width: int, height: int, size: int, aspect: str = "pad"
) -> list[list[float]]:
    """[[x, y, w, h]] in pixels of a `width` x `height` image -> the same anatomy's boxes after `fit_image`.

    What a crop cuts off is cut off the boxes; a box that is gone altogether is left out.
    """
    from ..pipelines.cxr_images import frame

    top, left, h, w = frame(height, width, size, aspect)
    fitted = []
    for x, y, box_w, box_h in boxes:
        x0, x1 = (min(max(left + v * w / width, 0.0), float(size)) for v in (x, x + box_w))
        y0, y1 = (min(max(top + v * h / height, 0.0), float(size)) for v in (y, y + box_h))
        if x1 > x0 and y1 > y0:
            fitted.append([x0, y0, x1 - x0, y1 - y0])
    return fitted


def binary_mask(mask: PIL.Image.Image) -> PIL.Image.Image:
    """PIL image -> "L" of 0 / 255: everything above 0 is inside (so masks of 0 / 1 work as well)."""
    return PIL.Image.fromarray((np.asarray(to_grey(mask)) > 0).astype(np.uint8) * 255)


def read_binary_mask(path: Path | str) -> PIL.Image.Image:
    """A mask's file -> "L" of 0 / 255. Inside is above 0, or in a JPEG, whose edges are blurred, above half its top."""
    mask = read_image(path)
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        half = np.asarray(mask).max() / 2
        mask = mask.point(lambda value: 255 * (value > half))
    return binary_mask(mask)


def equalize(image: PIL.Image.Image) -> PIL.Image.Image:
    """Histogram equalisation, v -> round(max * (cdf(v) - cdf(v_min)) / (N - cdf(v_min))), as OpenCV's equalizeHist.

    8 bit -> 8 bit, 16 bit -> 16 bit. An image of one value stays as it is. (`PIL.ImageOps.equalize` is another formula:
    it counts the pixels *below* v with a step rounded to whole pixels, so the black of a padded radiograph, a third of
    its pixels, shifts every grey by a different amount.)
    """
    array = np.asarray(image)
    top = np.iinfo(array.dtype).max
    cdf = np.bincount(array.ravel(), minlength=top + 1).cumsum()
    first = cdf[array.min()]
    if first == array.size:
        return image.copy()
    # float32 as in OpenCV, so that halves round alike; at 16 bit that would cost the last bit
    real = np.float32 if top == 255 else np.float64
    table = np.rint((cdf - first).clip(0).astype(real) * (real(top) / real(array.size - first)))
    return PIL.Image.fromarray(table.clip(0, top).astype(array.dtype)[array])


def _fit(image, size, aspect, grow, shrink, fill):
    from ..pipelines.cxr_images import frame  # here: it imports torch, which reading a file does not need

    if image.mode not in ("L", "I;16"):
        raise ValueError(f"expected an image of mode L or I;16, got {image.mode}")
    if aspect not in ASPECTS:
        raise ValueError(f"expected `aspect` among {', '.join(ASPECTS)}, got {aspect!r}")
    top, left, h, w = frame(image.height, image.width, size, aspect)
    dtype = np.uint8 if image.mode == "L" else np.uint16
    # 16 bits are resized as floats: exact, and bicubic overshoot is clipped instead of wrapped
    values = image if dtype == np.uint8 else PIL.Image.fromarray(np.asarray(image).astype(np.float32))
    values = shrink(values, (min(w, image.width), min(h, image.height))).resize((w, h), grow)
    resized = np.asarray(values)[max(-top, 0) : max(-top, 0) + size, max(-left, 0) : max(-left, 0) + size]
    if dtype != np.uint8:
        resized = resized.round().clip(0, 65535).astype(dtype)
    top, left = max(top, 0), max(left, 0)
    bars = ((top, size - resized.shape[0] - top), (left, size - resized.shape[1] - left))
    if aspect == "edge" and fill:
        return PIL.Image.fromarray(np.pad(resized, bars, mode="edge"))
    return PIL.Image.fromarray(np.pad(resized, bars, constant_values=fill(resized) if fill else 0))


def _unreadable(error):
    logger.warning("left out a folder that cannot be read: %s", error)


def _read_array(path):
    with open(path, "rb") as file:
        begin = file.read(len(NPY_MAGIC))
    if begin.startswith(b"PK"):
        raise ValueError("expected one array, got an archive")
    if begin != NPY_MAGIC:  # NumPy's own message advises to load it unsafely
        raise ValueError("cannot be read as an array (damaged or of another format)")
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # its header alone, however much that promises
    if array.ndim >= 2:
        check_pixel_count(array.shape[1], array.shape[0])
    return array_to_image(np.array(array) if array.size <= MAX_BYTES else array)


def _is_bare_dicom(path):
    return path.name != DICOM_CONTENTS and path.suffix.lower() not in (".csv", ".txt", ".json") and has_magic(path)
