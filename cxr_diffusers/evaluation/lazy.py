"""A sequence whose elements are computed when they are used."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from tqdm.auto import tqdm

MAX_STORED = 2**32  # bytes of a temporary file of `stored`

T = TypeVar("T")


class Lazy(Generic[T]):
    """Lazily evaluated sequence: element i is `function(i)`, computed at each access and not kept."""

    def __init__(self, length: int, function: Callable[[int], T]) -> None:
        self.length, self.function = length, function

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> T:
        if not 0 <= i < self.length:
            raise IndexError(i)
        return self.function(i)

    def __iter__(self) -> Iterator[T]:
        return map(self.function, range(self.length))

    def at(self, indices: Sequence[int]) -> "Lazy[T]":
        """The sequence of the elements at `indices`."""
        return Lazy(len(indices), lambda i: self[indices[i]])


@contextmanager
def stored(
    maps: Lazy[np.ndarray], shapes: Sequence[tuple[int, int]], folder: Path | None, desc: str | None = None
) -> Iterator[Lazy[np.ndarray]]:
    """Yield the same float32 maps, each computed once and then read from a temporary file in `folder`.

    The file has no name, so nothing is left of it even if the process is killed. Without a folder, or if the file would
    exceed `MAX_STORED`, the maps are computed at each access.

    Args:
        maps: sequence of (H, W) float32 arrays.
        shapes: (H, W) of each.
        folder: an existing folder, or None.
        desc: of a progress bar while they are computed; None: no bar.
    """
    ends = [0, *np.cumsum([4 * height * width for height, width in shapes]).tolist()]
    if folder is None or ends[-1] > MAX_STORED:
        yield maps
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        for anomaly_map in tqdm(maps, desc, disable=desc is None):
            file.write(np.asarray(anomaly_map, np.float32).tobytes())

        def read(i: int) -> np.ndarray:
            file.seek(ends[i])
            return np.frombuffer(file.read(ends[i + 1] - ends[i]), np.float32).reshape(shapes[i])

        yield Lazy(len(maps), read)
