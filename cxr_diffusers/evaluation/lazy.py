"""A sequence whose elements are computed when they are used."""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

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
