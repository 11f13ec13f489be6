"""Which class embedding of a UNet means which class, seen in which view."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Conditions:
    """Ids of the class embeddings of a UNet that is conditioned on the class and, if `views` are named, on the view.

    Without views: the classes, then the null label. With V views, id = class * V + view; then come the null labels of
    the views, and last one embedding for images of which nothing is known.

    Args:
        num_classes: how many classes there are, healthy first.
        views: names of the views, for example ("PA", "AP"); () for a model that is not told the view.
        has_null_label: False for a model that was trained without dropping labels.
    """

    num_classes: int
    views: tuple = ()
    has_null_label: bool = True

    @classmethod
    def of_table(cls, num_embeddings, views=(), has_null_label=True):
        """Of a UNet with `num_embeddings` class embeddings; ValueError where the views do not divide them."""
        views = tuple(views or ())
        if not views:
            return cls((num_embeddings or 0) - has_null_label, (), has_null_label)
        rows = (num_embeddings or 0) - 1
        if rows % len(views) or not has_null_label:
            raise ValueError(
                f"expected (classes + 1) x {len(views)} views + 1 class embeddings for the views {list(views)}, got "
                f"{num_embeddings}"
            )
        return cls(rows // len(views) - 1, views)

    @property
    def num_embeddings(self):
        """How many class embeddings the UNet has."""
        views = len(self.views)
        return (self.num_classes + 1) * views + 1 if views else self.num_classes + self.has_null_label

    def of_class(self, label, view=0):
        """Class id and index of the view (numbers or tensors) -> id of the embedding."""
        return label * len(self.views) + view if self.views else label

    def null(self, view=0):
        """The id that names no class, in a view; None for a model without a null label."""
        return self.of_class(self.num_classes, view) if self.has_null_label else None

    @property
    def unlabelled(self):
        """The id for images whose class or view is unknown: without views the null label."""
        return self.num_embeddings - 1
