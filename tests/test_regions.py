"""Boxes, outlines and lung zones of hand-made maps."""

import json

import numpy as np
import pytest
import torch

from cxr_diffusers import LungSegmenter
from cxr_diffusers.files import write_text
from cxr_diffusers.hub.loading import CHECKPOINTS
from cxr_diffusers.inference.regions import (
    MAX_POINTS,
    ZONES,
    coco_boxes,
    find_boxes,
    find_outlines,
    lung_zones,
    write_yolo,
    zone_columns,
)

TWO_LUNGS = torch.zeros(64, 64)
TWO_LUNGS[10:40, 10:26] = 1  # the patient's right lung is on the left of the image
TWO_LUNGS[16:46, 40:56] = 2


class DrawnLungs(LungSegmenter):
    """Recognises the lungs that `lungs` draws: 1 right, 2 left."""

    lungs = TWO_LUNGS

    def _logits(self, images):
        logits = torch.stack([self.lungs == 1, self.lungs == 2]).float() * 40 - 20
        return logits[None].expand(len(images), -1, -1, -1)


@pytest.fixture
def segmenter():
    return DrawnLungs(block_out_channels=(4, 4)).eval()


def two_regions():
    anomaly_map = np.full((20, 30), 0.1, np.float32)
    anomaly_map[2:6, 3:8] = 0.5
    anomaly_map[6, 8] = 0.9  # touches the region at a corner
    anomaly_map[19, 29] = 0.6
    return anomaly_map


def test_a_box_is_as_large_as_its_region_and_has_its_maximum_as_score():
    boxes = find_boxes(two_regions(), 0.4)
    assert [box[:4] for box in boxes] == [[3, 2, 6, 5], [29, 19, 1, 1]]
    assert [box[4] for box in boxes] == pytest.approx([0.9, 0.6])
    assert find_boxes(two_regions(), 0.95) == []


def test_pycocotools_opens_the_coco_file_and_scores_its_boxes_as_detections(tmp_path):
    from pycocotools.coco import COCO

    rows = [
        dict(name="b", image="in/b.png", height=20, width=30, boxes=find_boxes(two_regions(), 0.4)),
        dict(name="a", image="in/a.png", height=9, width=8, boxes=[]),
    ]
    write_text(tmp_path / "boxes.json", json.dumps(coco_boxes(rows)))
    coco = COCO(tmp_path / "boxes.json")
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["in/a.png", "in/b.png"]
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[2]))
    assert [annotation["bbox"] for annotation in annotations] == [[3, 2, 6, 5], [29, 19, 1, 1]]
    assert coco.getAnnIds(imgIds=[1]) == [] and coco.loadCats([1])[0]["name"] == "abnormal"
    detections = coco.loadRes(json.loads(json.dumps(annotations)))
    assert detections.loadAnns([1])[0]["score"] == pytest.approx(0.9)


def test_yolo_lines_hold_the_centre_and_size_as_shares_of_the_image(tmp_path):
    write_yolo(tmp_path / "a.txt", [[3, 2, 6, 5, 0.9]], 20, 30)
    numbers = [float(word) for word in (tmp_path / "a.txt").read_text().split()]
    assert numbers == pytest.approx([0, 6 / 30, 4.5 / 20, 6 / 30, 5 / 20, 0.9], abs=1e-6)
    write_yolo(tmp_path / "a.txt", [], 20, 30)
    assert (tmp_path / "a.txt").read_text() == ""


def inside_polygon(outline, height, width):
    from skimage.draw import polygon2mask

    return polygon2mask((height, width), outline[:, ::-1] - 0.5)


def test_an_outline_is_closed_and_surrounds_its_region():
    mask = two_regions() > 0.4
    outlines = find_outlines(mask)
    assert len(outlines) == 2
    for outline in outlines:
        np.testing.assert_array_equal(outline[0], outline[-1])
        assert outline.min() >= 0 and outline[:, 0].max() <= 30 and outline[:, 1].max() <= 20
    filled = sum(inside_polygon(outline, *mask.shape) for outline in outlines) > 0
    np.testing.assert_array_equal(filled, mask)


def test_a_hole_has_an_outline_and_a_ragged_edge_few_enough_points():
    mask = np.zeros((60, 60), bool)
    mask[10:50, 10:50], mask[20:40, 20:40] = True, False
    assert len(find_outlines(mask)) == 2
    assert find_outlines(np.zeros((8, 8), bool)) == []
    comb = np.zeros((60, 1000), bool)
    comb[20:40], comb[10:30, ::2] = True, True
    assert 4 <= max(map(len, find_outlines(comb))) <= MAX_POINTS


@pytest.mark.parametrize(
    "row, column, zone", [(12, 12, "right upper"), (25, 20, "right middle"), (44, 50, "left lower")]
)
def test_the_zone_is_the_one_with_most_of_the_map(segmenter, row, column, zone):
    """The patient's right is on the left of the image."""
    anomaly_map = np.zeros((1, 64, 64), np.float32)
    anomaly_map[0, row, column], anomaly_map[0, 62, 2] = 0.6, 0.2
    (columns,) = zone_columns(segmenter, np.zeros((1, 64, 64, 1), np.float32), anomaly_map, [(64, 64)], "pad")
    assert columns == {"zone": zone, "zone_share": 0.75, "outside_lungs": 0.25}


def test_zones_do_not_overlap_and_their_border_lies_between_the_lungs(segmenter):
    zones = lung_zones(segmenter, torch.zeros(1, 1, 64, 64))[0]
    assert zones.sum(dim=0).max() == 1 and all(zone.any() for zone in zones)
    right, left = zones[:3].any(dim=0), zones[3:].any(dim=0)
    assert right[:, :32].any() and not right[:, 34:].any() and left[:, 34:].any() and not left[:, :32].any()


def test_a_map_in_a_lung_that_is_not_recognised_lies_in_its_zone(segmenter):
    """Fluid hides the left lung: the mirror image of the right one says where it is."""
    segmenter.lungs = torch.where(TWO_LUNGS == 1, TWO_LUNGS, 0.0)
    anomaly_map = np.zeros((1, 64, 64), np.float32)
    anomaly_map[0, 36, 46] = 0.5
    (columns,) = zone_columns(segmenter, np.zeros((1, 64, 64, 1), np.float32), anomaly_map, [(64, 64)], "pad")
    assert columns == {"zone": "left lower", "zone_share": 1, "outside_lungs": 0}


def test_bars_beside_the_image_do_not_count(segmenter):
    anomaly_map = np.zeros((1, 64, 64), np.float32)
    anomaly_map[0, 12, 20], anomaly_map[0, 30, 2] = 0.5, 0.5  # the second in the left bar of a narrow image
    (columns,) = zone_columns(segmenter, np.zeros((1, 64, 64, 1), np.float32), anomaly_map, [(128, 96)], "pad")
    assert columns["outside_lungs"] == 0 and columns["zone"] == "right upper"


def test_without_a_segmenter_or_a_map_the_columns_are_empty(segmenter):
    blank = np.zeros((1, 64, 64), np.float32)
    assert zone_columns(None, blank[..., None], blank + 1, [(64, 64)], "pad") == [{}]
    assert zone_columns(segmenter, blank[..., None], blank, [(64, 64)], "pad") == [{}]
    segmenter.lungs = torch.zeros(64, 64)
    (columns,) = zone_columns(segmenter, blank[..., None], blank + 1, [(64, 64)], "pad")
    assert columns == {"zone": "", "zone_share": 0, "outside_lungs": 1}


def test_the_shipped_segmenter_gives_six_zones_of_a_sample():
    from PIL import Image

    from cxr_diffusers.pipelines.cxr_images import prepare_image

    segmenter = LungSegmenter.from_pretrained(CHECKPOINTS / "cxr_lung_segmenter_64")
    image = Image.open(CHECKPOINTS.parent / "samples" / "sample_1.png")
    zones = lung_zones(segmenter, prepare_image(image, 128))[0]
    assert len(zones) == len(ZONES) and all(zone.float().mean() > 0.01 for zone in zones)
