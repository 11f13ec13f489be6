"""A data set of pictures -> a torch data set of tensors, ready for a model."""

import torch
from tqdm.auto import tqdm

from ..pipelines.cxr_images import prepare_image


class TensorImages(torch.utils.data.Dataset):
    """{"images": (num_channels, size, size) float32 in `data_range`, "labels": int64, "views": int64} for each row.

    `size`, `scaling`, `aspect`, `data_range`, `num_channels`: of `pipelines.cxr_images.prepare_image`, so that a model
    is trained on what its pipeline will show it. A set that fits into `cache_bytes` is prepared once, here, and kept as
    float32 (half precision would move images by up to 1/4096); `batch` then gives many rows at once.

    `views`: names of the views whose index is each row's "views"; -1 for any other.
    """

    def __init__(
        self,
        dataset,
        size,
        scaling="minmax",
        aspect="pad",
        data_range=(-1.0, 1.0),
        num_channels=1,
        cache_bytes=2 << 30,
        views=(),
    ):
        self.size, self.pictures = size, dataset.select_columns(["image"])
        self.paths = dataset["path"][:] if "path" in dataset.column_names else [f"row {i}" for i in range(len(dataset))]
        self.labels = torch.tensor(dataset["label"][:], dtype=torch.int64)
        names = dataset["view"][:] if views else [None] * len(dataset)
        index = {name: i for i, name in enumerate(views)}
        self.views = torch.tensor([index.get(name, -1) for name in names], dtype=torch.int64)
        self.options = {"size": size, "scaling": scaling, "aspect": aspect, "data_range": tuple(data_range)}
        self.options["num_channels"] = num_channels
        self.cache = None
        if len(dataset) * num_channels * size * size * 4 <= cache_bytes:
            self.cache = self._prepare_all()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        images = self._prepare(index) if self.cache is None else self.cache[index]
        return {"images": images, "labels": self.labels[index], "views": self.views[index]}

    @property
    def in_memory(self):
        """Whether `batch` is there."""
        return self.cache is not None

    def batch(self, indices):
        """The rows of a list of indices, stacked; only where all are in memory."""
        indices = torch.as_tensor(indices, device=self.cache.device)
        return {"images": self.cache[indices], "labels": self.labels[indices], "views": self.views[indices]}

    def to(self, device):
        """Keep what is in memory on a device; the data set itself."""
        if self.in_memory:
            self.cache, self.labels, self.views = (x.to(device) for x in (self.cache, self.labels, self.views))
        return self

    def _prepare_all(self):
        size = self.options["size"]
        cache = torch.empty(len(self), self.options["num_channels"], size, size)
        # one thread: on a busy machine the many small operations wait for each other, ten times as long as they work
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
            return prepare_image(self.pictures[int(index)]["image"], **self.options)[0]
        except Exception as error:  # PIL and datasets raise many kinds, none of which names the file
            raise ValueError(f"{self.paths[index]}: {error}") from error
