"""Detection in the workers of a Ray cluster: a callable class for `ray.data.Dataset.map_batches`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..hub.loading import load_pipeline
from ..precision import use_dtype
from ..processes import usable_device
from .detection import warn_of_unlike_images
from .inputs import model_channels, read_input


class RayDetector:
    """Reads images and computes their anomaly maps; each Ray actor loads the model once.

    It writes no files and does not import Ray: rows go in and rows come out, so that Ray, which repeats the batches of
    a worker that has died, loses no row and returns none twice.

        rows = ray.data.from_items([{"path": path} for path in paths])
        rows = rows.map_batches(RayDetector, concurrency=4, batch_size=8)
        rows.write_parquet("maps")

    Args:
        model: pipeline folder, Hub name, or name of a shipped model.
        call_kwargs: arguments of the pipeline's call.
        device: None: the best there is; a Ray worker sees the GPUs that Ray gives it.
        dtype: "auto", "float32", "bfloat16" or "float16", in which the networks compute.
        trust_remote_code: run the code that a Hub model brings along.
    """

    def __init__(
        self,
        model: str | Path = "default",
        call_kwargs: Mapping[str, Any] | None = None,
        device: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        place = usable_device(device)
        self.pipeline = load_pipeline(model, trust_remote_code)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(place)
        use_dtype(self.pipeline, dtype)
        self.channels = model_channels(self.pipeline)
        configs = [self.pipeline.config, *(getattr(part, "config", {}) for part in self.pipeline.components.values())]
        self.side = next(config["sample_size"] for config in configs if "sample_size" in config)
        self.call_kwargs = dict(call_kwargs or {})

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add columns to a batch of rows.

        Args:
            batch: {column: array with one entry a row}, with `path` among the columns: of the images' files.

        Returns:
            the columns of the batch, and

            anomaly_map     (B, S, S) float32 in [0, 1], of the model's square; zeros for a file that cannot be read
            anomaly_score   float64; NaN for a file that cannot be read
            warnings        texts joined by "; ", see `detect`
            error           why the file cannot be read; "" for all others
        """
        files = [read_input("", Path(path), self.channels, dicom=False) for path in batch["path"].tolist()]
        readable = [i for i, file in enumerate(files) if not file.error]
        maps = np.zeros((len(files), self.side, self.side), np.float32)
        scores = np.full(len(files), np.nan)
        if readable:
            images = [files[i].image for i in readable]
            output = self.pipeline(images, output_type="np", **self.call_kwargs)
            maps[readable], scores[readable] = output.anomaly_map, output.anomaly_score
            warn_of_unlike_images(self.pipeline, [files[i] for i in readable])
        texts = {name: np.array([getattr(file, name) for file in files], object) for name in ("warnings", "error")}
        return {**batch, "anomaly_map": maps, "anomaly_score": scores, **texts}
