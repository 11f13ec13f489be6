"""Runs a pipeline on an uploaded image and reports its steps while it runs."""

import queue
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import PIL.Image

from ..fingerprints import changed_settings
from ..inference.panels import has_counterfactual, same_frame
from ..inference.regions import zone_columns
from ..inference.trajectory import Trajectory, check_steps
from ..pipelines.cxr_images import restore_map
from ..visualization import common_vmax
from .uploads import Upload

DISPLAY_SIZE = 640  # longer side of the images on the page, in pixels
LIVE_IMAGES, LIVE_EVERY = 20, 5  # the live view has about 20 images a run, or one in 5 steps of a long run
Result = TypeVar("Result")


@dataclass
class Analysis:
    """The answer for one uploaded image, without the uploaded image itself.

    image, counterfactual: (h, w) floats in [0, 1], longer side `DISPLAY_SIZE`; `counterfactual` is None where the
        method makes none.
    display_map: (h, w), the anomaly map at the same size. square_map: the map as the model returns it.
    size: (height, width) of the uploaded image.
    threshold: the checkpoint's map threshold; without one, and with other settings than those it was measured with
        (`has_own_threshold` False), a third of `vmax`.
    vmax: the map value at the end of the colour scale.
    trajectory: the recorded steps; None for a method of one step.
    zone: the lung zone with the largest part of the map, see `zone_columns`; "" where it is unknown.
    """

    name: str
    model: str
    size: tuple[int, int]
    aspect: str
    image: np.ndarray
    counterfactual: np.ndarray | None
    display_map: np.ndarray
    square_map: np.ndarray
    score: float
    threshold: float
    has_own_threshold: bool
    vmax: float
    trajectory: Trajectory | None
    zone: str = ""

    def full_map(self) -> np.ndarray:
        """(H, W) anomaly map at the resolution of the uploaded image; computed on demand because it may be large."""
        return restore_map(self.square_map, *self.size, self.aspect)


@dataclass
class Step:
    """The end of one step of a run. number: from 1 to `total`. stage: "inversion", "decoding" or "inpainting".

    panels: the noisy image and, where the scheduler allows it, the model's estimate of the clean image; [] for
        the steps in between, see `LIVE_EVERY`.
    """

    number: int
    total: int
    stage: str
    panels: list[PIL.Image.Image]


class Stopped(Exception):
    """The run was stopped before its end."""


def analyse(
    pipeline: Any,
    model: str,
    upload: Upload,
    call_kwargs: Mapping[str, Any],
    on_step: Callable[[Step], None] | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Analysis:
    """Run a pipeline on an upload.

    Args:
        model: its name on the page.
        on_step: called at the end of each step; methods of one step never call it.
        is_stopped: called at the end of each step. True makes the pipeline leave out the other steps.

    Raises:
        Stopped: `is_stopped` returned True.
        ValueError: the pipeline refuses the settings.
    """
    config, image = pipeline.config, upload.image
    trajectory, call = None, dict(call_kwargs)
    if has_steps(pipeline):
        trajectory = Trajectory()

        def step_end(pipeline: Any, i: int, t: int, kwargs: dict[str, Any]) -> dict[str, Any]:
            changed = trajectory(pipeline, i, t, kwargs)
            if is_stopped():
                pipeline._interrupt = True
            elif on_step is not None and trajectory.last is not None:
                total = pipeline.num_timesteps
                every = max(1, min(LIVE_EVERY, total // LIVE_IMAGES))
                panels = trajectory.last_panels(DISPLAY_SIZE // 2) if i % every == 0 or i + 1 == total else []
                on_step(Step(i + 1, total, trajectory.last.direction, panels))
            return changed

        call["callback_on_step_end"] = step_end
    output = pipeline(image, output_type="np", **call)
    if is_stopped():
        raise Stopped
    square, anomaly_map = output.image[0], output.anomaly_map[0]
    counterfactual = output.counterfactual[0] if has_counterfactual(pipeline) else None
    grey, healthy, display_map = same_frame(image, square, counterfactual, anomaly_map, config, DISPLAY_SIZE)
    segmenter = pipeline.components.get("lung_segmenter")
    [zones] = zone_columns(segmenter, output.image, output.anomaly_map, [(image.height, image.width)], config["aspect"])
    own_threshold = None if changed_settings(pipeline, call_kwargs) else config.get("map_threshold")
    threshold = float(own_threshold or common_vmax([anomaly_map]) / 3)
    return Analysis(
        name=upload.name,
        model=model,
        size=(image.height, image.width),
        aspect=config["aspect"],
        image=grey,
        counterfactual=healthy,
        display_map=display_map,
        square_map=anomaly_map,
        score=float(output.anomaly_score[0]),
        threshold=threshold,
        has_own_threshold=bool(own_threshold),
        vmax=min(1.0, 3 * threshold),  # a map has no higher values
        trajectory=trajectory,
        zone=zones.get("zone", ""),
    )


@dataclass
class Scored:
    """Progress of the measurement of healthy scores: `number` of `total` images."""

    number: int
    total: int


Report = Step | Scored


def stream(
    work: Callable[[Callable[[Report], None], Callable[[], bool]], Result], lock: threading.Lock
) -> Generator[Report | Result, None, None]:
    """Run `work(report, is_stopped)` in a thread; yields the latest report while it runs, and its result at the end.

    Closing the generator makes `is_stopped()` True. Reports that the reader is too slow for are left out.

    Args:
        lock: held by `work`, which may need a moment to stop after the generator is closed.
    """
    messages: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        try:
            with lock:
                messages.put(("result", work(lambda report: messages.put(("report", report)), stop.is_set)))
        except BaseException as error:  # raised again in the reader's thread
            messages.put(("error", error))

    threading.Thread(target=run, daemon=True, name="analysis").start()
    try:
        status = "report"
        while status == "report":
            status, content = messages.get()
            while status == "report" and not messages.empty():
                skipped = content
                status, content = messages.get()
                if isinstance(content, Step) and not content.panels:
                    content.panels = skipped.panels
            if status == "error":
                raise content
            yield content
    finally:
        stop.set()


def has_steps(pipeline: Any) -> bool:
    """True where the pipeline reports its steps through `callback_on_step_end`."""
    try:
        check_steps(pipeline)
    except ValueError:
        return False
    return True
