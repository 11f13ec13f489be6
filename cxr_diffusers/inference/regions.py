"""Abnormal regions of a map: boxes (COCO, YOLO), outlines, and the lung zones in which the map lies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from ..files import write_text
from ..models.lung_segmenter import thirds
from ..pipelines.cxr_images import frame

BOX_FORMATS = ("coco", "yolo")
CATEGORY = "abnormal"  # id 1 in COCO, class 0 in YOLO
EIGHT = np.ones((3, 3))  # pixels that touch at a corner belong to one region
MAX_POINTS = 8000  # of an outline: a DICOM element of type FL holds 65,534 bytes, two floats a point
ZONES = tuple(f"{side} {level}" for side in ("right", "left") for level in ("upper", "middle", "lower"))


def find_boxes(anomaly_map: np.ndarray, threshold: float) -> list[list[float]]:
    """Boxes of the connected regions above a threshold, highest score first.

    Args:
        anomaly_map: (H, W).

    Returns:
        [[x, y, w, h, score]], in pixels of the map: x, y is the upper left corner of the region's first pixel, and w, h
        count pixels. score: the map's maximum in the region.
    """
    regions, count = ndimage.label(anomaly_map > threshold, structure=EIGHT)
    scores = ndimage.maximum(anomaly_map, regions, range(1, count + 1)) if count else []
    boxes = [
        [x.start, y.start, x.stop - x.start, y.stop - y.start, float(score)]
        for (y, x), score in zip(ndimage.find_objects(regions), scores, strict=True)
    ]
    return sorted(boxes, key=lambda box: -box[4])


def coco_boxes(rows: Sequence[dict]) -> dict:
    """Rows of a detection with `boxes` -> the content of a COCO file (https://cocodataset.org/#format-data).

    Every image is listed, with or without boxes. An annotation also has a `score`, as COCO results have.
    """
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id, row in enumerate(sorted(rows, key=lambda row: row["name"]), start=1):
        images.append(dict(id=image_id, file_name=row["image"], height=row["height"], width=row["width"]))
        for x, y, w, h, score in row["boxes"]:
            annotation = dict(id=len(annotations) + 1, image_id=image_id, category_id=1, bbox=[x, y, w, h])
            annotations.append(annotation | dict(area=w * h, iscrowd=0, score=score))
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": CATEGORY}]}


def write_yolo(path: Path, boxes: Sequence[Sequence[float]], height: int, width: int) -> None:
    """Write one line a box: class 0, centre x, centre y, width, height as shares of the image's sides, and the score.

    An image without boxes gets an empty file.
    """
    lines = []
    for x, y, w, h, score in boxes:
        shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height, score)
        lines.append(" ".join(["0", *(f"{share:.6f}" for share in shares)]) + "\n")
    write_text(path, "".join(lines))


def find_outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Closed outlines of the regions of a mask and of their holes.

    Args:
        mask: (H, W) booleans.

    Returns:
        [(N, 2) float]: columns and rows as DICOM counts them, where the image reaches from (0, 0) to (W, H). The first
        point is also the last. Lines run at most one pixel beside the edge, unless it has over `MAX_POINTS` points, of
        which only every second, third ... is kept.
    """
    from skimage.measure import approximate_polygon, find_contours

    outlines = []
    for edge in find_contours(np.pad(mask, 1).astype(float), 0.5, fully_connected="high"):
        edge = np.concatenate([edge[: -1 : -(-len(edge) // MAX_POINTS)], edge[-1:]])
        points = approximate_polygon(edge, 0.25)
        points = points if len(points) >= 4 else edge  # a region of one pixel must not vanish
        outlines.append(points[:, ::-1] - 0.5)  # minus the padding, plus half a pixel: DICOM counts from corners
    return outlines


def zone_columns(
    segmenter: Any, images: np.ndarray, maps: np.ndarray, sizes: Sequence[tuple[int, int]], aspect: str
) -> list[dict]:
    """Where in the lungs the maps lie.

    Args:
        segmenter: `LungSegmenter`, or None.
        images: (B, S, S, C) as the model saw them. maps: (B, S, S) of the same images, in [0, 1].
        sizes: (height, width) of the inputs. aspect: how they were fitted into the square.

    Returns:
        for each image {} without a segmenter or with an empty map, else
        zone: the zone of `ZONES` with the largest sum of map values, "" if no lung was recognised.
        zone_share: that sum divided by the sum of the whole map.
        outside_lungs: the share of the map's sum in none of the zones.
    """
    if segmenter is None:
        return [{} for _ in maps]
    grey = torch.from_numpy(np.ascontiguousarray(images)).mean(dim=-1)[:, None]
    zones = lung_zones(segmenter, grey.to(segmenter.device)).cpu().numpy()
    columns: list[dict] = []
    for anomaly_map, zone_masks, size in zip(maps, zones, sizes, strict=True):
        inside = np.zeros_like(anomaly_map)
        top, left, h, w = frame(*size, len(anomaly_map), aspect)  # without the bars beside the image
        inside[max(top, 0) : top + h, max(left, 0) : left + w] = 1
        total = float((anomaly_map * inside).sum())
        sums = (anomaly_map * inside * zone_masks).sum(axis=(1, 2))
        best = int(sums.argmax())
        if not total > 0:
            columns.append({})
            continue
        row = dict(zone=ZONES[best] if sums[best] > 0 else "", zone_share=round(float(sums[best]) / total, 4))
        columns.append(row | dict(outside_lungs=round(1 - float(sums.sum()) / total, 4)))
    return columns


def lung_zones(segmenter: Any, images: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) images -> (B, 6, H, W) booleans in the order of `ZONES`; no pixel is in two zones.

    The zones divide the lung gate (`LungSegmenter.field` of 0.5 or more), which covers a lung that fluid hides by the
    mirror image of the other one. The border between right and left runs halfway between the centres of the two lungs;
    in the middle of the image where a lung is not recognised. The patient's right is on the left of the image. The
    thirds divide each side of the gate by its own height.
    """
    gate = segmenter.field(images) >= 0.5
    columns = torch.arange(images.shape[-1], device=images.device, dtype=torch.float32)
    zones = segmenter.zones(images)
    areas = torch.stack([zones[side].sum(dim=(1, 2)) for side in ("right", "left")])
    centres = torch.stack([(zones[side].sum(dim=1) * columns).sum(dim=1) for side in ("right", "left")])
    middle = (centres / areas.clamp_min(1)).mean(dim=0)
    recognised = (areas > 0.01 * images.shape[-1] * images.shape[-2]).all(dim=0)
    middle = torch.where(recognised, middle, (images.shape[-1] - 1) / 2)
    is_right = (columns <= middle[:, None])[:, None, :]
    sides = (gate & is_right, gate & ~is_right)
    return torch.stack([side & (thirds(side) == level) for side in sides for level in range(3)], dim=1)
