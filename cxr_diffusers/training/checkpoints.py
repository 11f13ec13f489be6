"""The checkpoints of a run, verified by digests, and the finished model beside them: complete or absent."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..files import write_file

DIGESTS = "digests.json"  # {file name: SHA-256} of a checkpoint
RECORDS = ("run.json", "log.jsonl", "validation.jsonl")  # files of the run that a checkpoint keeps a copy of


def checkpoints(output_dir: Path | str) -> list[Path]:
    """The checkpoint folders of a run, oldest first; other folders with similar names are ignored."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in folders if p.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The number of steps after which a checkpoint was written."""
    return int(folder.name.split("-")[1])


def checkpoint(
    accelerator: Accelerator, ema: EMAModel, output_dir: Path | str, step: int, limit: int, seconds: float = 0.0
) -> None:
    """Write `checkpoint-STEP`, then delete the oldest ones over `limit` (0 keeps all).

    It is written under a temporary name and gets its own once every file is on the disk. It holds the state of the
    model, the optimizer and the random numbers, the averaged weights, copies of `RECORDS`, and the digest of each file.
    """
    final = Path(output_dir) / f"checkpoint-{step:07d}"
    temporary = final.with_suffix(".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    with removed_if_incomplete(temporary):
        accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()  # the digests cover the random states of all processes
    if accelerator.is_main_process:
        averages = {str(i): p.contiguous() for i, p in enumerate(ema.shadow_params)}
        metadata = {"optimization_step": str(ema.optimization_step), "seconds": str(seconds)}
        with removed_if_incomplete(temporary):
            save_file(averages, temporary / "ema.safetensors", metadata=metadata)
            for name in RECORDS:
                if (Path(output_dir) / name).is_file():
                    shutil.copyfile(Path(output_dir) / name, temporary / name)
            digests = {str(p.relative_to(temporary)): sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
            write_file(temporary / DIGESTS, json.dumps(digests, indent=2).encode())
            sync_folder(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(final.parent)
        for old in checkpoints(output_dir)[:-limit] if limit else ():
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


@contextmanager
def removed_if_incomplete(folder: Path) -> Iterator[None]:
    """Delete `folder` if it cannot be written completely, on a full disk for example.

    Raises:
        OSError: torch and safetensors have exceptions of their own for it.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, (RuntimeError, SafetensorError)):
            hint = "" if "space" in str(error) else " (is there space left on the disk?)"
            raise OSError(f"cannot write {folder}: {error}{hint}") from error
        raise


def sha256(path: Path | str) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path | str) -> None:
    """Flush a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for path in [*Path(folder).rglob("*"), folder]:
        sync(path)


def find_damage(folder: Path) -> str | None:
    """The reason why a checkpoint cannot be used, with the name of the file; None if it is intact.

    Checkpoints of versions that wrote no digests count as intact where their last file is present.
    """
    try:
        digests = json.loads((folder / DIGESTS).read_text())
    except FileNotFoundError:
        return None if (folder / "ema.safetensors").is_file() else f"{folder / 'ema.safetensors'} is missing"
    except (ValueError, OSError):
        return f"{folder / DIGESTS} is damaged"
    if not isinstance(digests, dict) or "ema.safetensors" not in digests:
        return f"{folder / DIGESTS} is damaged"
    for name, digest in digests.items():
        try:
            if sha256(folder / name) != digest:
                return f"{folder / name} is damaged"
        except OSError as error:
            return f"{folder / name}: {error.strerror}"
    return None


def newest_intact(accelerator: Accelerator, output_dir: Path | str) -> Path | None:
    """The newest checkpoint whose files all match their digests, or None; prints which ones are skipped.

    The main process verifies and sends the result to the others.
    """
    chosen: list[str | None] = [None]
    if accelerator.is_main_process:
        folders = checkpoints(output_dir)
        for folder in reversed(folders):
            damage = find_damage(folder)
            if damage is None:
                chosen = [str(folder)]
                break
            print(f"passing over a checkpoint: {damage}")
        if folders and chosen[0] is None:
            print(f"{output_dir} has no intact checkpoint: training starts anew")
    if accelerator.num_processes > 1:
        chosen = broadcast_object_list(chosen)
    return Path(chosen[0]) if chosen[0] else None


def restore_records(folder: Path, output_dir: Path | str) -> None:
    """Put the copies of `RECORDS` in a checkpoint back into the run's folder; prints which of them were damaged."""
    for name in RECORDS:
        record = Path(output_dir) / name
        if not (folder / name).is_file():  # of a version that kept no copies, or nothing was measured yet
            if (folder / DIGESTS).is_file():
                record.unlink(missing_ok=True)
            continue
        kept = (folder / name).read_bytes()
        content = record.read_bytes() if record.is_file() else b""
        if name == "run.json" and is_json(content):
            continue
        if not content.startswith(kept):
            print(f"{record} is damaged: restored from {folder.name}")
        if content != kept:
            write_file(record, kept)


def is_json(content: bytes) -> bool:
    """Whether bytes are a JSON object."""
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


def resume(accelerator: Accelerator, ema: EMAModel, folder: Path | None) -> tuple[int, float]:
    """Load a checkpoint, if one is given; (steps, seconds) of training already done.

    Raises:
        ValueError: the checkpoint does not fit the model.
    """
    if folder is None:
        return 0, 0.0
    try:
        accelerator.load_state(str(folder))
        averages = load_file(folder / "ema.safetensors")
        for i, parameter in enumerate(ema.shadow_params):
            parameter.copy_(averages[str(i)])
        with safe_open(folder / "ema.safetensors", "pt") as file:
            seconds = float((file.metadata() or {}).get("seconds", 0.0))
    except Exception as error:  # pickle, zip, safetensors and torch each raise their own, and none names the folder
        raise ValueError(f"{folder} cannot be resumed from: {error}; delete it to start from an older one") from error
    ema.optimization_step = step_of(folder)
    return ema.optimization_step, seconds


def replace_into(folder: Path, write: Callable[[Path], object]) -> None:
    """Move the files that `write(temporary)` writes into `folder`, `model_index.json` last: never half a model."""
    temporary = Path(folder) / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)
    with removed_if_incomplete(temporary):
        write(temporary)
        sync_folder(temporary)
    for item in sorted(temporary.iterdir(), key=lambda p: p.name == "model_index.json"):
        target = Path(folder) / item.name
        if item.is_dir() and target.exists():
            shutil.rmtree(target)
        os.replace(item, target)
    temporary.rmdir()


class FolderLock:
    """A lock on a run's folder (its file `.lock`), which the operating system releases when the process ends.

    Raises:
        BlockingIOError: another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self.file = open(Path(folder) / ".lock", "a+")
        try:
            import fcntl
        except ImportError:  # Windows has none
            return
        try:
            # of this process alone: a data loader's worker, forked later, does not keep it when this process is killed
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise BlockingIOError(f"{folder} is being written by another run: wait for it, or end it") from None

    def release(self) -> None:
        self.file.close()
