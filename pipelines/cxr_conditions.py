"""The class embeddings of a UNet that is conditioned on the class and, possibly, on the view."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # a type checker sees the methods of the pipeline that the mixin is put before
    from diffusers import DiffusionPipeline as Base
else:
    Base = object


@dataclass(frozen=True)
class Conditions:
    """Ids of the class embeddings of a UNet that is conditioned on the class and, if `views` are named, on the view.

    Without views: the classes, then the null label. With V views, id = class * V + view; then come the null labels of
    the views, and last one embedding for images whose class and view are both unknown.

    Args:
        num_classes: number of classes; the first is healthy.
        views: names of the views, for example ("PA", "AP"); () for a model that is not conditioned on the view.
        has_null_label: False for a model that was trained without dropping labels.
    """

    num_classes: int
    views: tuple[str, ...] = ()
    has_null_label: bool = True

    @classmethod
    def of_table(
        cls, num_embeddings: int | None, views: Sequence[str] | None = (), has_null_label: bool = True
    ) -> "Conditions":
        """The conditions of a UNet with `num_embeddings` class embeddings; ValueError: the views do not divide them."""
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
    def num_embeddings(self) -> int:
        """The number of the UNet's class embeddings."""
        views = len(self.views)
        return (self.num_classes + 1) * views + 1 if views else self.num_classes + self.has_null_label

    def of_class(self, label: Any, view: Any = 0) -> Any:
        """Class id and index of the view (numbers or tensors) -> id of the embedding."""
        return label * len(self.views) + view if self.views else label

    def null(self, view: Any = 0) -> Any:
        """The id of a view's null label (no class given); None for a model without a null label."""
        return self.of_class(self.num_classes, view) if self.has_null_label else None

    @property
    def unlabelled(self) -> int:
        """The id for images whose class or view is unknown: without views the null label."""
        return self.num_embeddings - 1


class ViewsMixin(Base):
    """For a pipeline with a `unet` that may be conditioned on the view, and a method `predict(x, t, labels)`.

    `conditions` are the UNet's `Conditions`, set by `register_views`; None for a UNet without class embeddings.
    """

    conditions: Conditions = None  # type: ignore[assignment]  # without class embeddings no label is used

    def register_views(
        self, views: Sequence[str] | dict[str, str] | None, has_null_label: bool, num_embeddings: int | None
    ) -> None:
        """Set `conditions`, and write the names of the views, a list or a dict from index to name, into the config.

        Raises:
            ValueError: the views do not divide the class embeddings of the UNet.
        """
        views = list(views.values()) if isinstance(views, dict) else views
        # not a list: diffusers takes a list in a pipeline's config for a component
        self.register_to_config(
            views=views and {str(i): name for i, name in enumerate(views)}, has_null_label=has_null_label
        )
        if views or num_embeddings:
            self.conditions = Conditions.of_table(num_embeddings, views, has_null_label)

    def view_indices(
        self, view: str | Sequence[str | None] | None, image: torch.Tensor, view_errors: Callable
    ) -> torch.Tensor | None:
        """(B,) index of each image's view, as given or else the one that explains it best; None without views.

        Args:
            view: a name, "" or None for unknown, or a list of them, one for each image.
            image: (B, C, H, W) in the model's range.
            view_errors: the function of `cxr_inversion`.

        Raises:
            ValueError: an unknown view, any with a model that is not conditioned on it, or a number of views that
                differs from the number of images.
        """
        names = self.conditions.views if self.conditions else ()
        given = [view] * len(image) if view is None or isinstance(view, str) else list(view)
        if len(given) != len(image):
            raise ValueError(f"expected a `view` for each of {len(image)} images, got {len(given)}")
        if any(given) and not names:
            raise ValueError(f"expected no `view` with a model that is not conditioned on the view, got {view!r}")
        if unknown := [name for name in given if name and name not in names]:
            raise ValueError(f"expected `view` among {', '.join(names)}, got {unknown[0]!r}")
        if not names:
            return None
        indices = torch.tensor([names.index(name) if name else -1 for name in given], device=image.device)
        missing = indices < 0
        if missing.any():
            indices[missing] = self.predict_views(image[missing], view_errors)
        return indices

    def predict_views(self, image: torch.Tensor, view_errors: Callable) -> torch.Tensor:
        """(B, C, H, W) images in the model's range -> (B,) index of the view whose null label explains each best."""
        views = torch.arange(len(self.conditions.views), device=image.device)
        labels = self.conditions.null(views).repeat_interleave(len(image))

        def predict(x, t):
            return self.predict(torch.cat([x] * len(views)), t, labels)

        return view_errors(predict, image, self.scheduler, len(views)).argmin(dim=0)
