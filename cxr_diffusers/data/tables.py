"""CSV files: reading and checking their cells, with errors that name the line."""

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import TextIO, cast

import pandas as pd


def read_csv(
    path: Path | str,
    columns: Iterable[str] = (),
    only: Callable[[str], bool] | None = None,
    keep: Callable[[dict[str, str]], bool] | None = None,
) -> pd.DataFrame:
    """A CSV -> table of texts, whose index is the line of each row in the file; blank lines are left out.

    A file whose name ends in .gz is unpacked. Commas at the end of a row, behind the last column, say nothing.

    Args:
        columns: names that must be there.
        only: a function of a column's name: which to keep.
        keep: a function of a row, {column: text}: which to keep; the others never take up memory.

    Raises:
        ValueError: no table, a missing column, or a row with more cells than there are columns, or not in UTF-8.
    """
    lines, rows = [], []
    with open_text(path) as file:
        reader = csv.reader(file, strict=True)
        try:
            header = _unique([name.strip() for name in next(reader, [])])
            check_encodable(header, path)
            missing_columns(columns, header, path)
            kept = [i for i, name in enumerate(header) if only is None or only(name)]
            whole = kept == list(range(len(header)))
            begin = reader.line_num + 1
            for row in reader:
                text = "".join(row)
                if text.strip():
                    if len(row) > len(header) and "".join(row[len(header) :]).strip():
                        raise ValueError(f"{path}, line {begin}: expected {len(header)} cells, got {len(row)}")
                    if keep is None or keep(dict(zip(header, row, strict=False))):
                        lines.append(begin)
                        if not whole or len(row) != len(header):
                            row = [row[i] if i < len(row) else "" for i in kept]
                        rows.append(tuple(row))  # the garbage collector looks at each list, again and again
                        if not text.isascii():
                            check_encodable(row, f"{path}, line {begin}")
                begin = reader.line_num + 1
        except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return pd.DataFrame(rows, index=lines, columns=[header[i] for i in kept], dtype=object)


def open_text(path: Path | str) -> TextIO:
    """A table's file, unpacked if its name ends in .gz, opened for `csv.reader`."""
    opener = gzip.open if str(path).lower().endswith(".gz") else open
    return cast(TextIO, opener(path, "rt", newline="", encoding="utf-8-sig", errors="surrogateescape"))


def check_encodable(texts: Iterable[str], where: Path | str) -> None:
    """Raise ValueError naming a text that is not UTF-8, which neither a table nor a data set can hold."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        wrong = next(text for text in texts if any(0xD800 <= ord(letter) < 0xE000 for letter in text))
        raise ValueError(f"{where}: expected names and texts in UTF-8, got {brief(wrong, 400)}") from None


def columns_of(path: Path | str) -> list[str]:
    """The names in the first line of a CSV."""
    with open_text(path) as file:
        return [name.strip() for name in next(csv.reader(file), [])]


def missing_columns(expected: Iterable[str], names: Iterable[str], where: Path | str) -> None:
    """Raise ValueError naming the columns that `where` lacks, and those it has."""
    missing = [name for name in expected if name not in names]
    if missing:
        raise ValueError(f"{where}: expected column {', '.join(map(repr, missing))}, got {in_words(names)}")


def numbers(table: pd.DataFrame, column: str, path: Path | str) -> pd.Series:
    """A column as floats, NaN where a cell is blank; ValueError naming the first line that holds another text."""
    values = {}
    for cell in table[column].unique():
        try:
            values[cell] = float(cell) if str(cell).strip() else math.nan
        except ValueError:
            line = table.index[table[column] == cell][0]
            raise ValueError(
                f"{path}, line {line}: expected a number in column {column!r}, got {brief(cell)}"
            ) from None
    return table[column].map(values).astype(float)


def path_of(cell: object, where: Path | str, absolute: bool = False) -> PurePosixPath:
    """A cell that names a file, with either kind of slash -> `PurePosixPath`.

    Raises:
        ValueError: blank, or a path that leaves its folder: "..", or an absolute one unless `absolute`.
    """
    text = str(cell).strip().replace("\\", "/")
    path = PurePosixPath(text)
    if not path.name or "\0" in text:
        raise ValueError(f"{where}: expected the name of a file, got {brief(cell)}")
    if ".." in path.parts or (path.is_absolute() and not absolute):
        raise ValueError(f"{where}: expected a path inside its folder, without '..', got {brief(cell)}")
    return path


def existing_file(root: Path, cell: object, where: Path | str) -> Path:
    """The file below `root`, or the absolute one, that a cell names; FileNotFoundError, or as `path_of`."""
    path = root / path_of(cell, where, absolute=True)
    if not is_file(path):
        raise FileNotFoundError(f"{where}: no file {brief(path, 400)}")
    return path


def is_file(path: Path) -> bool:
    """`path.is_file()`, False also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def brief(value: object, length: int = 80) -> str:
    """A value for a message: in quotes, on one line, of at most `length` characters."""
    text = str(value)
    text = repr(text) if text.isprintable() else ascii(text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _unique(names):
    taken, unique = set(), []
    for i, name in enumerate(names):
        own = name or f"Unnamed: {i}"
        while own in taken:
            own += ".1"
        taken.add(own)
        unique.append(own)
    return unique


def in_words(names: Iterable[object]) -> str:
    """Names of columns for a message."""
    text = ", ".join(str(name) if str(name).isprintable() else ascii(name) for name in names)
    return (text if len(text) <= 600 else f"{text[:597]}...") or "none"
