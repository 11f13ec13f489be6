"""A data set of images -> a torch data set of tensors, ready for a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from ..pipelines.cxr_images import prepare_image

if TYPE_CHECKING:
    from datasets import Dataset


class TensorImages(torch.utils.data.Dataset):
    """{"images": (num_channels, size, size) float32 in `data_range`, "labels": int64, "views": int64} for each row.

    Args:
        dataset: has the columns image and label, and optionally path and view.
        size, scaling, aspect, data_range, num_channels: of `pipelines.cxr_images.prepare_image`; a model is trained on
            images prepared as in its pipeline.
        cache_bytes: a data set that fits into so many bytes is prepared once and kept in memory as float32; `batch`
            then returns many rows at once.
        views: names of views; "views" is the index of a row's view among them, -1 for any other.

    Raises:
        ValueError: an image cannot be read; names its file.
    """

    def __init__(
        self,
        dataset: "Dataset",
        size: int,
        scaling: str = "minmax",
        aspect: str = "pad",
        data_range: Sequence[float] = (-1.0, 1.0),
        num_channels: int = 1,
        cache_bytes: int = 2 << 30,
        views: Sequence[str] = (),
    ) -> None:
        self.size, self.images = size, dataset.select_columns(["image"])
        self.paths = dataset["path"][:] if "path" in dataset.column_names else [f"row {i}" for i in range(len(dataset))]
        self.labels = torch.tensor(dataset["label"][:], dtype=torch.int64)
        names = dataset["view"][:] if views else [None] * len(dataset)
        index = {name: i for i, name in enumerate(views)}
        self.views = torch.tensor([index.get(name or "", -1) for name in names], dtype=torch.int64)
        self.options = {"size": size, "scaling": scaling, "aspect": aspect, "data_range": tuple(data_range)}
        self.options["num_channels"] = num_channels
        self.cache: torch.Tensor | None = None
        if len(dataset) * num_channels * size * size * 4 <= cache_bytes:
            self.cache = self._prepare_all()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        images = self._prepare(index) if self.cache is None else self.cache[index]
        return {"images": images, "labels": self.labels[index], "views": self.views[index]}

    @property
    def in_memory(self) -> bool:
        """Whether all images are in memory, so that `batch` can be called."""
        return self.cache is not None

    def batch(self, indices: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows of a list of indices, stacked; only if all images are in memory."""
        if self.cache is None:
            raise ValueError("expected images in memory, got a data set larger than `cache_bytes`")
        indices = torch.as_tensor(indices, device=self.cache.device)
        return {"images": self.cache[indices], "labels": self.labels[indices], "views": self.views[indices]}

    def to(self, device: torch.device | str) -> "TensorImages":
        """Move the images in memory to a device; returns the data set itself."""
        if self.cache is not None:
            self.cache, self.labels, self.views = (x.to(device) for x in (self.cache, self.labels, self.views))
        return self

    def _prepare_all(self):
        size = self.options["size"]
        cache = torch.empty(len(self), self.options["num_channels"], size, size)
        # one thread: on a busy machine, threads of many small operations wait ten times as long as they work
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for i in tqdm(range(len(self)), desc="preparing images", unit="image", delay=2):
                cache[i] = self._prepare(i)
        finally:
            torch.set_num_threads(threads)
        return cache

    def _prepare(self, index):
        try:
            return prepare_image(self.images[int(index)]["image"], **self.options)[0]
        except Exception as error:  # PIL and datasets raise many types, none of which names the file
            text = str(error).removeprefix(f"{self.paths[index]}: ")
            raise ValueError(f"{self.paths[index]}: {text}") from error
