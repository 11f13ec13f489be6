"""Files and folders: crash-safe writing, settings of a folder of results, the cache, safe names, maps and PNGs."""

import hashlib
import io
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MACHINE = r"(?:([0-9a-f]{8})-[0-9a-f]{8}\.)?"  # in the names of `new_file`, not in those of `new_folder`
TEMPORARY = re.compile(rf"\..+?\.{MACHINE}(\d+)(?:\.old)?\.tmp")  # the last number is the process id


def cache_folder(name: str) -> Path:
    """`name` in the cache: $CXR_DIFFUSERS_CACHE, else $XDG_CACHE_HOME/cxr_diffusers, else ~/.cache/cxr_diffusers.

    It is created. Raises OSError, which names the variable, if that fails.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("CXR_DIFFUSERS_CACHE") or Path(home, "cxr_diffusers")) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"expected a cache that can be written, got {folder} ({error.strerror}): set CXR_DIFFUSERS_CACHE"
        ) from None
    return folder


def save_png(image: Any, path: Path | str) -> None:
    """Write a PIL image or a matplotlib figure as PNG; `path` never holds half a file."""
    with io.BytesIO() as buffer:
        if isinstance(image, Image.Image):
            image.save(buffer, format="png", compress_level=1)  # three times as fast, a tenth larger
        else:
            image.savefig(buffer, format="png", dpi=150)
        write_file(path, buffer.getvalue())


def save_map(anomaly_map: np.ndarray, path: Path | str) -> None:
    """Write an (H, W) map in [0, 1] as .png (16 bits, value * 65535) or .npy (exact); `path` never holds half a file.

    Raises:
        ValueError: another ending, another shape, or values outside [0, 1].
    """
    anomaly_map = np.asarray(anomaly_map, np.float32)
    if anomaly_map.ndim != 2 or not (anomaly_map.min() >= 0 and anomaly_map.max() <= 1):
        low, high = anomaly_map.min(), anomaly_map.max()
        raise ValueError(f"expected an (H, W) map in [0, 1], got {anomaly_map.shape} from {low:g} to {high:g}")
    if _ending(path) == ".png":
        return save_png(Image.fromarray(np.rint(anomaly_map * 65535).astype(np.uint16)), path)
    with io.BytesIO() as buffer:
        np.save(buffer, anomaly_map)
        write_file(path, buffer.getvalue())


@contextmanager
def new_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is renamed to `path` if nothing fails, and deleted otherwise.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # random, because processes of other machines, or of other containers, may have the same id
    temporary = path.with_name(f".{_digest(path)}.{this_machine()}-{secrets.token_hex(4)}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path | str, content: bytes) -> None:
    """Write bytes, see `new_file`."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write(path: Path | str, save: Callable[[Path], Any]) -> None:
    """Let `save(temporary)` write a file, see `new_file`."""
    with new_file(path) as temporary:
        save(temporary)


def write_text(path: Path | str, text: str) -> None:
    """Write a text in UTF-8; file names in it that are not valid Unicode keep their bytes."""
    write_file(path, text.encode("utf-8", "surrogateescape"))


def write_csv(path: Path | str, table: Any) -> None:
    """Write a pandas table without its index."""
    write_text(path, table.to_csv(index=False))


def copy_file(source: Path | str, target: Path | str) -> None:
    """Copy the content of a file."""
    write(target, lambda temporary: shutil.copyfile(source, temporary))


def remove_dead(folder: Path | str) -> set[str]:
    """Delete temporary files and folders below a folder if their process has ended or they are older than an hour.

    Returns the other files, as paths below the folder with forward slashes; links to folders are not followed.
    """
    files, waiting, root = set(), [""], os.path.join(folder, "")
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(root + place) as iterator:
                entries = list(iterator)
        except OSError:  # removed meanwhile, or not readable
            continue
        for entry in entries:
            if entry.name.startswith(".") and _is_dead(Path(entry.path)):
                _remove(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                files.add(place + entry.name)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(f"{place}{entry.name}/")
    return files


def remove_dead_of(path: Path | str) -> None:
    """Delete the temporary files or folders that processes which have ended left beside `path` when they wrote it.

    A folder that was moved aside to be replaced, and never was, is put back.
    """
    path = Path(path).absolute()
    names = "|".join(re.escape(name) for name in (path.name, _digest(path)))
    for other in list(path.parent.iterdir()) if path.parent.is_dir() else ():
        match = re.fullmatch(rf"\.(?:{names})\.{MACHINE}(\d+)(\.old)?\.tmp", other.name)
        if match and _has_ended(match.group(1), match.group(2)):
            if match.group(3) and not path.exists():
                os.replace(other, path)
            _remove(other)


def stamp_of(path: Path | str) -> tuple[int, int] | None:
    """(bytes, time of the last change in nanoseconds) of a file; None where there is no file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


@lru_cache
def this_machine() -> str:
    """Eight hexadecimal digits, the same for processes that see each other's ids: of one container or machine."""
    name = platform.node()
    with suppress(OSError):  # Linux; containers may share their host's name
        name += Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _is_dead(path):
    match = TEMPORARY.fullmatch(path.name)
    with suppress(FileNotFoundError):  # its owner has just renamed it
        return bool(match) and (_has_ended(*match.groups()) or time.time() - path.lstat().st_mtime > 3600)
    return False


def _has_ended(machine, process):
    return machine in (None, this_machine()) and not _runs(int(process))


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _digest(path):
    # the file's own name with an ending added may be too long
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]


def _runs(process):
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    try:  # a zombie has ended, although it can still be signalled
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return True


def check_output_folder(folder: Path | str) -> None:
    """Raise ValueError if files cannot be written into a folder, which need not exist; it is not made."""
    folder = Path(folder).absolute()
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=place).cleanup()
    except OSError as error:
        raise ValueError(f"expected a folder that can be written, got {folder}: {error.strerror}") from None


class OtherSettingsError(FileExistsError, ValueError):
    """A folder holds results of other settings."""


class DamagedSettingsError(ValueError):
    """A file of settings cannot be read."""


def check_settings(
    path: Path | str,
    settings: Mapping,
    *,
    ignore: tuple[str, ...] = (),
    defaults: Mapping | None = None,
    advice: str = "give another folder",
) -> None:
    """Refuse a folder whose results were computed with other settings.

    Args:
        path: the JSON file of the settings in that folder; without this file nothing is refused.
        settings: plain values.
        ignore: keys that may differ.
        defaults: values of keys that older files lack.
        advice: end of the error message.

    Raises:
        OtherSettingsError: a FileExistsError and a ValueError; names the keys that differ.
        DamagedSettingsError: a ValueError.
    """
    path = Path(path)
    if not path.is_file():
        return
    try:
        old = {**(defaults or {}), **json.loads(path.read_text())}
    except (ValueError, TypeError):
        raise DamagedSettingsError(f"{path} is damaged: delete it, or {advice}") from None
    settings = as_json(settings)
    differing = [key for key in [*settings, *(old.keys() - settings.keys())] if old.get(key) != settings.get(key)]
    changes = [f"{key}: {old.get(key)!r}, now {settings.get(key)!r}" for key in differing if key not in ignore]
    if changes:
        raise OtherSettingsError(f"{path.parent} holds results of other settings ({', '.join(changes)}): {advice}")


def keep_settings(path: Path | str, settings: Mapping, **options: Any) -> None:
    """Check the settings as `check_settings` does; write them if the folder has none yet."""
    check_settings(path, settings, **options)
    if not Path(path).is_file():
        write_file(path, (json.dumps(as_json(settings), indent=2) + "\n").encode())


def as_json(values: Any) -> Any:
    """Plain values after writing them to JSON and reading them back: a tuple becomes a list."""
    return json.loads(json.dumps(values, default=plain))


def plain(value: Any, otherwise: Callable[[Any], str] = str) -> Any:
    """An array, tensor or PIL image -> [type, shape, digest of its content]; any other value -> its text.

    For values that JSON does not have. The text of a large array leaves most of it out.
    """
    if isinstance(value, Image.Image):
        return [value.mode, list(value.size), hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()]
    dtype = str(getattr(value, "dtype", ""))
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.to_dense() if value.is_sparse or value.is_sparse_csr else value).resolve_conj()
        value = (value.float() if dtype == "torch.bfloat16" else value).numpy()
    if isinstance(value, np.ndarray):
        content = repr(value.tolist()).encode() if value.dtype == object else value.tobytes()
        return [dtype, list(value.shape), hashlib.blake2b(content, digest_size=16).hexdigest()]
    return otherwise(value)


def load_map(path: Path | str) -> np.ndarray:
    """Read a map written by `save_map` -> (H, W) float32 in [0, 1]; a PNG is exact to 1 / 131070."""
    if _ending(path) == ".npy":
        return np.load(path)
    with Image.open(path) as image:
        if not image.mode.startswith("I"):
            raise ValueError(f"expected a 16-bit map, got a PNG of mode {image.mode}: {path}")
        return np.asarray(image).astype(np.float32) / 65535


def _ending(path):
    ending = Path(path).suffix.lower()
    if ending not in (".png", ".npy"):
        raise ValueError(f"expected a map file that ends in .png or .npy, got {path}")
    return ending


def safe_name(name: str) -> str:
    """A file name without path separators and other characters that a file system may refuse."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


@contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """Yield a temporary folder, which replaces `folder` if nothing fails, and is deleted otherwise.

    Until then an old `folder` stays in place. If another process has replaced it meanwhile, that folder is kept.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_dead_of(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{word}") for word in ("tmp", "old.tmp"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    before = folder.stat().st_mtime_ns if folder.is_dir() else None
    try:
        yield temporary
        if before and folder.is_dir() and folder.stat().st_mtime_ns == before:
            os.replace(folder, old)
        if not folder.is_dir():
            os.replace(temporary, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
