"""Synthetic chests: the anatomy that matters, the fluid where it should be, and a mask that is exact."""

import numpy as np
import pytest

from cxr_diffusers.data import load_phantom
from cxr_diffusers.data.phantom import VISIBLE, draw_chest, draw_effusion

SIZE = 64


def chest(i, effusion=None, size=SIZE):
    return draw_chest(np.random.default_rng([0, i]), size, effusion)


@pytest.fixture(scope="module")
def healthy():
    return [chest(i).image.astype(float) for i in range(24)]


def test_the_same_seed_draws_the_same_chest_and_another_seed_another():
    assert np.array_equal(chest(3, {"left": 0.5}).image, chest(3, {"left": 0.5}).image)
    assert not np.array_equal(chest(3).image, chest(4).image)


def test_fluid_changes_nothing_but_the_fluid():
    with_fluid, without = chest(5, {"right": 0.6}), chest(5)
    assert np.array_equal(with_fluid.healthy, without.image)
    far = np.abs(with_fluid.image.astype(float) - with_fluid.healthy)[: SIZE // 4]
    assert far.max() <= 1


def test_the_mask_covers_exactly_the_changed_pixels():
    for i in range(12):
        drawn = chest(i, draw_effusion(np.random.default_rng(i)), size=128)
        change = np.abs(drawn.image.astype(float) - drawn.healthy) / 255
        assert drawn.mask.any()
        assert change[drawn.mask].mean() > 2 * VISIBLE
        assert change[~drawn.mask].mean() < VISIBLE / 4
        assert change[drawn.mask].sum() > 0.9 * change.sum()


def test_healthy_chests_have_an_empty_mask():
    assert not any(chest(i).mask.any() for i in range(6))


def test_fluid_lies_low_on_its_own_side_and_more_is_larger():
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for i in range(8):
        areas = []
        for amount in (0.2, 0.5, 0.9):
            mask = chest(i, {"right": amount}).mask  # the patient's right is left in the image
            areas.append(mask.sum())
            assert columns[mask].mean() < SIZE / 2 and rows[mask].mean() > SIZE / 2
            assert columns[chest(i, {"left": amount}).mask].mean() > SIZE / 2
        assert areas == sorted(areas) and areas[-1] > 3 * areas[0]


def test_the_upper_border_of_fluid_rises_towards_the_chest_wall():
    for i in range(8):
        mask = chest(i, {"left": 0.8}, size=128).mask
        columns = np.nonzero(mask.any(axis=0))[0]
        top = mask.argmax(axis=0)
        medial, lateral = columns[len(columns) // 4], columns[-len(columns) // 6]
        assert top[lateral] < top[medial]


def test_lungs_are_dark_and_belly_and_mediastinum_bright(healthy):
    mean = np.mean(healthy, axis=0)
    lungs = np.minimum(mean[20:34, 14:22].mean(), mean[20:34, 42:50].mean())
    assert mean[58:, 20:44].mean() > lungs + 60
    assert mean[24:40, 30:34].mean() > lungs + 60


def test_the_heart_lies_on_the_patients_left(healthy):
    mean = np.mean(healthy, axis=0)[34:44]
    assert mean[:, 38:44].mean() > mean[:, 20:26].mean() + 20


def test_the_right_diaphragm_is_higher(healthy):
    mean = np.mean(healthy, axis=0)
    assert mean[48:56, 12:16].mean() > mean[48:56, 48:52].mean() + 5  # same distance from the midline, beyond the heart


def test_chests_differ_from_each_other(healthy):
    assert np.std(healthy, axis=0).mean() > 8


def test_the_data_set_has_every_column_and_the_share_that_was_asked_for():
    dataset = load_phantom(20, size=32, seed=1, diseased_fraction=0.25)
    assert dataset.features["label"].names == ["healthy", "pleural effusion"]
    assert sum(dataset["label"]) == 5
    assert len(set(dataset["patient"])) == 20
    for row in dataset:
        assert row["image"].size == row["mask"].size == (32, 32) and row["image"].mode == row["mask"].mode == "L"
        values = set(np.unique(np.asarray(row["mask"])))
        assert values == ({0, 255} if row["label"] else {0})


def test_a_longer_data_set_begins_with_the_shorter_one():
    short, long = load_phantom(4, size=32), load_phantom(9, size=32)
    for a, b in zip(short, long, strict=False):
        assert a["label"] == b["label"] and a["image"].tobytes() == b["image"].tobytes()


@pytest.mark.parametrize("size", [16, 33, 200])
def test_any_size_can_be_drawn(size):
    assert chest(0, {"left": 1.0, "right": 1.0}, size).image.shape == (size, size)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="fraction in"):
        load_phantom(4, diseased_fraction=2)
