"""Pictures -> a pipeline's answers, each kept in a file of its own: the hours of an evaluation."""

import hashlib
import inspect
import io
import json
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ..masks import smooth_map
from ..pipelines.cxr_anomaly import restore_map
from ..processes import process_state
from ..version import __version__
from ..visualization import write_file
from .lazy import Lazy


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
    digests = [picture_digest(key, row) for row in dataset]
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


def fingerprint(pipeline, call_kwargs, seed):
    """What decides a map, as a hash: code version, class, configuration, weights, arguments, seed."""
    components = getattr(pipeline, "components", {"": pipeline})
    known = hasattr(pipeline, "components") or isinstance(pipeline, torch.nn.Module)
    digest = hashlib.blake2b(digest_size=16)
    # what cannot be told apart must not be taken for the same
    digest.update((f"{type(pipeline).__qualname__} {__version__}" if known else uuid.uuid4().hex).encode())
    for part in (pipeline, *components.values()):
        config = config_of(part)
        config.pop("map_threshold", None)  # it comes after the map
        digest.update(json.dumps(config, sort_keys=True, default=repr).encode())
        if isinstance(part, torch.nn.Module):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode() + str(tensor.dtype).encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps([call_kwargs, seed], sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def config_of(part):
    """The config of a pipeline or component without its library's own bookkeeping; {} for what has none."""
    config = getattr(part, "config", None) or part
    # transformers' configs and image processors have `to_dict`
    config = config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, dict) else {}
    return {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}


def picture_digest(key, row):
    """The name of a picture under `key`, whatever its file is called and wherever it lies."""
    image = row["image"]
    # a PIL picture, or an array of several channels
    kind = f"{image.mode} {image.size}" if hasattr(image, "mode") else f"{image.dtype} {image.shape}"
    content = f"{key} {kind}".encode() + image.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def stem(row):
    """A file name to recognise a picture by: the end of its path, in harmless letters."""
    path = Path(row.get("path") or "image")
    name = "-".join([*path.parts[-3:-1], path.stem])
    return harmless(name)[-80:].lstrip(".-")


def harmless(name):
    """A name in letters that every file system takes, in one folder."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def save_answer(answer, path):
    with io.BytesIO() as buffer:
        np.savez(buffer, **answer)
        write_file(path, buffer.getvalue())


def load_answer(path):
    with np.load(path) as file:
        return {name: file[name][()] for name in file.files}


@contextmanager
def quiet(pipeline):
    """No progress bar of the pipeline's own inside ours."""
    if not hasattr(pipeline, "set_progress_bar_config"):
        yield
        return
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
