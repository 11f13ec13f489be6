"""Run a pipeline over a data set; each image's prediction is kept in a file of its own."""

import inspect
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ..files import safe_name, write_file
from ..fingerprints import config_of, fingerprint, image_digest
from ..pipelines.cxr_images import restore_map
from ..processes import Shard, process_state, quiet, split_pending
from .grid import at_centres
from .lazy import Lazy
from .masks import smooth_map

Prediction = dict[str, Any]  # anomaly_map, image, counterfactual, score, seconds; see `run_pipeline`


class Predictions(Lazy[Prediction]):
    """The predictions of a data set's images, in memory or in files.

    Args:
        length: number of images.
        read: `read(i, name)` returns one entry of prediction i, or the whole prediction if `name` is None.
    """

    def __init__(self, length: int, read: Callable[[int, str | None], Any]) -> None:
        super().__init__(length, lambda i: read(i, None))
        self.read = read

    def column(self, name: str) -> Lazy[Any]:
        """One entry of each prediction; nothing else is read."""
        return Lazy(len(self), lambda i: self.read(i, name))

    def numbers(self, name: str) -> list[float]:
        """`column` of "score" or "seconds", as a list."""
        return [float(value) for value in self.column(name)]


@dataclass
class Method:
    """A pipeline to evaluate, with the arguments of its call.

    Attributes:
        name: in the tables.
        pipeline: `pipeline(list of PIL images, output_type="np", **call_kwargs)` returns an `AnomalyOutput`.
        call_kwargs: further arguments of the call.
        threshold: of its anomaly maps; None: masks are not defined.
    """

    name: str
    pipeline: Any
    call_kwargs: dict[str, Any]
    threshold: float | None = None

    @property
    def is_random(self) -> bool:
        """Whether the noise of its calls is drawn by a generator; a fixed noise is left as `detect` uses it."""
        takes_generator = "generator" in inspect.signature(self.pipeline.__call__).parameters
        return takes_generator and not getattr(self.pipeline, "has_fixed_noise", False)

    def option(self, name: str, default: Any = None) -> Any:
        """A value of the pipeline's config; `default` where it has none."""
        value = config_of(self.pipeline).get(name)
        return default if value is None else value

    def restore(self, array: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        """(S, S) array of the pipeline's square -> the size at which the image is measured."""
        aspect, size = self.option("aspect", "pad"), (row["height"], row["width"])
        if aspect == "keep":  # its frame is in the image's own pixels
            return at_centres(restore_map(array, *row["full_size"], aspect), *size)
        return restore_map(array, *size, aspect)

    def maps(self, predictions: Predictions, rows: Sequence[Mapping[str, Any]], smoothing: float) -> Lazy[np.ndarray]:
        """The anomaly maps of some predictions, see `restore`, smoothed by `smooth_by_side`."""
        squares = predictions.column("anomaly_map")
        return Lazy(len(rows), lambda i: smooth_by_side(self.restore(squares[i], rows[i]), smoothing))


def smooth_by_side(anomaly_map: np.ndarray, smoothing: float) -> np.ndarray:
    """Gaussian smoothing of an (H, W) map; sigma is `smoothing` times the shorter side."""
    return smooth_map(anomaly_map, smoothing * min(anomaly_map.shape))


def predict(
    method: Method,
    dataset: Any,
    *,
    folder: Path | None,
    batch_size: int,
    seed: int,
    progress: bool,
    desc: str,
    shard: Shard,
) -> Predictions:
    """Run a method over a data set.

    Each process computes its share of the shard's predictions that `folder` lacks; all wait for each other at the end.

    Args:
        method: its `call_kwargs` go to every call.
        dataset: rows with `image` and, where they are known, `path` and `view`.
        folder: of the files, one an image. None: predictions are kept in memory.
        batch_size: images a call.
        seed: part of the files' names of a random method.
        progress, desc: show a bar of this description.
        shard: the share of the images to compute. Those of other shards may not exist yet.
    """
    state = process_state()
    # every process uses the main process's fingerprint: that of a pipeline without weights is random
    own_seed = seed if method.is_random else None
    [key] = broadcast_object_list([fingerprint(method.pipeline, method.call_kwargs, own_seed)])
    digests = [image_digest(key_with_view(key, view_of(method, row)), row) for row in dataset]
    computed: dict[int, Prediction] = {}
    files: list[Path] = []
    if folder is not None:
        files = [folder / f"{stem(row)}-{d[:16]}.npz" for row, d in zip(dataset, digests, strict=True)]
    _, share = split_pending(shard.of(range(len(digests))), lambda i: folder is not None and files[i].exists())
    with quiet(method.pipeline):
        show = progress and state.is_main_process and share
        bar = tqdm(total=len(share), desc=desc, disable=not show, unit="image")
        for start in range(0, len(share), batch_size):
            batch = share[start : start + batch_size]
            for i, prediction in zip(batch, run_pipeline(method, dataset, batch, digests), strict=True):
                if folder is None:
                    computed[i] = prediction
                else:
                    save_prediction(prediction, files[i])
                bar.update()
        bar.close()
    state.wait_for_everyone()
    if folder is None:
        return Predictions(len(digests), lambda i, name: computed[i] if name is None else computed[i][name])
    return Predictions(len(digests), lambda i, name: load_prediction(files[i], name))


def run_pipeline(method: Method, dataset: Any, batch: Sequence[int], digests: Sequence[str]) -> Iterator[Prediction]:
    """Call the pipeline once on the images at the indices `batch`; yields a prediction for each.

    A prediction holds `anomaly_map` (S, S) float32, `image` and `counterfactual` (S, S) float16 in [0, 1], all as the
    pipeline returns them, the mean over channels; the image's `score`; and `seconds`, its share of the call's time.

    Raises:
        ValueError: the pipeline returned another number or shape of maps.
    """
    kwargs = dict(method.call_kwargs)
    if method.is_random:
        # an image's noise does not depend on the batch, the process, or where an interrupted run resumed
        kwargs.setdefault("generator", [torch.Generator().manual_seed(int(digests[i][:8], 16)) for i in batch])
    views = [view_of(method, dataset[i]) for i in batch]
    if any(views):
        kwargs["view"] = views
    start = time.perf_counter()
    output = method.pipeline([dataset[i]["image"] for i in batch], output_type="np", **kwargs)
    seconds = (time.perf_counter() - start) / len(batch)
    if np.shape(output.anomaly_map)[:1] != (len(batch),) or np.ndim(output.anomaly_map) != 3:
        raise ValueError(f"expected {len(batch)} maps (B, H, W) of the pipeline, got {np.shape(output.anomaly_map)}")
    for k in range(len(batch)):
        yield {
            "anomaly_map": np.asarray(output.anomaly_map[k], np.float32),
            "image": np.asarray(output.image[k].mean(-1), np.float16),
            "counterfactual": np.asarray(output.counterfactual[k].mean(-1), np.float16),
            "score": float(output.anomaly_score[k]),
            "seconds": seconds,
        }


def view_of(method: Method, row: Mapping[str, Any]) -> str | None:
    """The view of an image as the pipeline's `view` takes it.

    None where the view is unknown, where the pipeline's model is not conditioned on it, or where the call's own
    arguments name a view for all images.
    """
    names = (method.option("views") or {}).values()
    view = row.get("view")
    return view if view in names and "view" not in method.call_kwargs else None


def key_with_view(key: str, view: str | None) -> str:
    """A fingerprint of a pipeline, extended by the view of an image where the pipeline is told one."""
    return f"{key} view={view}" if view else key


def stem(row: Mapping[str, Any]) -> str:
    """A readable file name for an image: the last folders of its path and its name, in safe characters."""
    path = Path(row.get("path") or "image")
    name = "-".join([*path.parts[-3:-1], path.stem])
    return safe_name(name)[-80:].lstrip(".-")


def save_prediction(prediction: Prediction, path: Path) -> None:
    """Write a prediction as .npz, under its name only when complete."""
    with io.BytesIO() as buffer:
        np.savez(buffer, **prediction)
        write_file(path, buffer.getvalue())


def load_prediction(path: Path, name: str | None = None) -> Any:
    """What `save_prediction` wrote; with `name`, that entry alone."""
    with np.load(path) as file:
        return {key: file[key][()] for key in file.files} if name is None else file[name][()]
