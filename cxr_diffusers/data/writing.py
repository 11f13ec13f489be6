"""Files of a copy: whole or not there, and no temporary ones left behind."""

import hashlib
import os
import re
import shutil
import time
from pathlib import Path

TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
HOUR = 3600


def write(path, save):
    """`save(temporary)` beside `path`, then rename: there is a whole file or none.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    # a name of its own: the file's, with more behind it, may be too long
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """A text, in UTF-8; names that are none keep their bytes."""
    write(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", "surrogateescape")))


def write_csv(path, table):
    write_text(path, table.to_csv(index=False))


def copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, lambda temporary: shutil.copyfile(source, temporary))


def remove_dead(folder):
    """Delete the temporary files below a folder that processes left which no longer run."""
    for place, _, names in os.walk(folder):
        for name in names:
            match = TEMPORARY.fullmatch(name)
            path = Path(place, name)
            if match and (not _runs(int(match.group(1))) or time.time() - path.lstat().st_mtime > HOUR):
                path.unlink(missing_ok=True)


def _runs(process):
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True
