"""A thousand maps that need not fit into memory."""


class Lazy:
    """A sequence whose i-th element is `function(i)`, made anew each time."""

    def __init__(self, length, function):
        self.length, self.function = length, function

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(i)
        return self.function(i)

    def at(self, indices):
        """The sequence of the elements at `indices`."""
        return Lazy(len(indices), lambda i: self[indices[i]])
