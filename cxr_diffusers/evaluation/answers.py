"""Pictures -> a pipeline's answers, each kept in a file of its own: the hours of an evaluation."""

import inspect
import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ..files import safe_name, write_file
from ..fingerprints import config_of, fingerprint, image_digest
from ..pipelines.cxr_images import restore_map
from ..processes import process_state, quiet
from .lazy import Lazy
from .masks import smooth_map


@dataclass
class Method:
    """A pipeline on its way through `compare`: what it was asked, what it answered, what came of it."""

    name: str
    pipeline: object
    call_kwargs: dict
    answers: Lazy | None = None
    healthy_answers: Lazy | None = None
    maps: Lazy | None = None
    threshold: float | None = None

    def option(self, name, default=None):
        """A value of the pipeline's config, if it has one."""
        value = config_of(self.pipeline).get(name)
        return default if value is None else value

    def restore(self, array, row):
        """From the pipeline's square to the picture's own resolution."""
        return restore_map(array, row["height"], row["width"], self.option("aspect", "pad"))

    def restored(self, answers, rows, smoothing):
        """The maps of some answers at the pictures' own resolution, smoothed."""
        return Lazy(len(rows), lambda i: soften(self.restore(answers[i]["anomaly_map"], rows[i]), smoothing))


def soften(anomaly_map, smoothing):
    """Gaussian smoothing by a fraction of the shorter side; scipy's, since the pipelines' own has to do without it."""
    return smooth_map(anomaly_map, smoothing * min(anomaly_map.shape))


def detect(method, dataset, *, folder, batch_size, seed, progress, desc):
    """Run a method over a data set -> sequence of {anomaly_map, image, counterfactual, score, seconds}.

    Each process computes its share of what is not in `folder` yet; all meet at the end. Without a folder: in memory.
    """
    state = process_state()
    # all go by the main process's name for it: what has no fingerprint has another one in every process
    [key] = broadcast_object_list([fingerprint(method.pipeline, method.call_kwargs, seed)])
    digests = [image_digest(key_with_view(key, view_of(method, row)), row) for row in dataset]
    if folder is None:
        kept, files = {}, None
        missing = list(range(len(digests)))
    else:
        files = [folder / f"{stem(row)}-{d[:16]}.npz" for row, d in zip(dataset, digests, strict=True)]
        missing = [i for i, file in enumerate(files) if not file.exists()]
    state.wait_for_everyone()  # all have looked before the first writes, or they would share out different lists
    with state.split_between_processes(missing) as mine, quiet(method.pipeline):
        bar = tqdm(total=len(mine), desc=desc, disable=not (progress and state.is_main_process and mine), unit="image")
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            for i, answer in zip(batch, ask(method, dataset, batch, digests), strict=True):
                if files is None:
                    kept[i] = answer
                else:
                    save_answer(answer, files[i])
                bar.update()
        bar.close()
    state.wait_for_everyone()
    return Lazy(len(digests), kept.__getitem__ if files is None else lambda i: load_answer(files[i]))


def ask(method, dataset, batch, digests):
    """One call of the pipeline -> one answer a picture."""
    kwargs = dict(method.call_kwargs)
    if "generator" in inspect.signature(method.pipeline.__call__).parameters:
        # noise belongs to the picture: the same whatever the batch, the process, or where a run was taken up
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


def view_of(method, row):
    """The view of an image as the pipeline's `view` takes it.

    None where the view is unknown, where the pipeline's model is not conditioned on it, or where the call's own
    arguments name a view for all images.
    """
    names = (method.option("views") or {}).values()
    view = row.get("view")
    return view if view in names and "view" not in method.call_kwargs else None


def key_with_view(key, view):
    """A fingerprint of a pipeline, extended by the view of an image where the pipeline is told one."""
    return f"{key} view={view}" if view else key


def stem(row):
    """A file name to recognise a picture by: the end of its path, in harmless letters."""
    path = Path(row.get("path") or "image")
    name = "-".join([*path.parts[-3:-1], path.stem])
    return safe_name(name)[-80:].lstrip(".-")


def save_answer(answer, path):
    with io.BytesIO() as buffer:
        np.savez(buffer, **answer)
        write_file(path, buffer.getvalue())


def load_answer(path):
    with np.load(path) as file:
        return {name: file[name][()] for name in file.files}
