"""How much an image file may unpack to: checked before it is decoded, so that no file fills the memory or an hour."""

MAX_PIXELS = 50_000_000  # the largest detectors have less than half of it
MAX_BYTES = 8 * MAX_PIXELS
# progressive JPEGs go over all pixels once a scan: about three seconds of work, 10 scans of 50 million pixels
MAX_SCANNED_PIXELS = 10 * MAX_PIXELS


def check_byte_count(size: int) -> None:
    """ValueError for an empty file, or one of more than `MAX_BYTES` bytes."""
    if not size:
        raise ValueError("the file is empty")
    if size > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES:,} bytes, got {size:,}")


def check_pixel_count(width: int, height: int) -> None:
    """ValueError unless an image has between 1 and `MAX_PIXELS` pixels."""
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"expected 1 to {MAX_PIXELS:,} pixels, got {width} x {height}")


def check_scans(content: bytes, pixels: int) -> None:
    """ValueError for the bytes of a JPEG that passes over its pixels more often than images do."""
    scans = content.count(b"\xff\xda") if content[:2] == b"\xff\xd8" else 1
    if scans * pixels > MAX_SCANNED_PIXELS:
        raise ValueError(f"expected at most {MAX_SCANNED_PIXELS // pixels} scans of {pixels:,} pixels, got {scans}")
