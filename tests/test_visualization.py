import numpy as np
import pytest
from PIL import Image

from cxr_diffusers.evaluation.metrics import Ranking
from cxr_diffusers.figures import precision_recall_figure, roc_figure
from cxr_diffusers.files import load_map, save_map, save_png
from cxr_diffusers.visualization import (
    TRUTH,
    common_vmax,
    contact_sheet,
    overlay,
    side_by_side,
    to_grey,
    validation_strip,
)


@pytest.fixture
def image():
    return Image.fromarray(np.tile(np.linspace(40, 200, 48, dtype=np.uint8), (40, 1)))


@pytest.fixture
def anomaly_map():
    anomaly_map = np.zeros((40, 48), np.float32)
    anomaly_map[10:20, 10:20] = 0.2
    return anomaly_map


def colours(drawing, colour):
    """How many pixels have just this colour."""
    return int((np.asarray(drawing) == colour).all(-1).sum())


def test_the_radiograph_is_unchanged_where_the_map_is_0(image, anomaly_map):
    covered = np.asarray(overlay(image, anomaly_map, vmax=0.2))
    grey = np.asarray(image)[..., None].repeat(3, -1)
    outside = anomaly_map == 0
    assert (covered[outside] == grey[outside]).all()
    assert (covered[~outside] != grey[~outside]).any(-1).all()


def test_the_same_value_has_the_same_colour_in_every_image(anomaly_map):
    flat = np.full((40, 48), 128, np.uint8)
    hotter = anomaly_map.copy()
    hotter[30:, 30:] = 0.9
    one, other = (np.asarray(overlay(flat, m, vmax=1.0)) for m in (anomaly_map, hotter))
    assert (one[15, 15] == other[15, 15]).all()


def test_higher_values_are_brighter_up_to_vmax():
    ramp = np.tile(np.linspace(0, 1, 101, dtype=np.float32), (4, 1))
    covered = np.asarray(overlay(np.zeros((4, 101), np.uint8), ramp, vmax=0.5, opacity=1).convert("L"), int)[0]
    assert (np.diff(covered[:51:5]) > 0).all() and len(set(covered[50:])) == 1


def test_zero_opacity_is_the_radiograph(image, anomaly_map):
    assert (np.asarray(overlay(image, anomaly_map, vmax=0.2, opacity=0).convert("L")) == np.asarray(image)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vmax": 0}, "greater than 0, got 0"),
        ({"vmax": float("nan")}, "greater than 0"),
        ({"opacity": 2}, "from 0 to 1, got 2"),
    ],
)
def test_options_out_of_range_are_refused(image, anomaly_map, options, message):
    with pytest.raises(ValueError, match=message):
        overlay(image, anomaly_map, **options)


def test_a_map_of_another_size_is_refused(image):
    with pytest.raises(ValueError, match=r"\(40, 48\), got \(48, 40\)"):
        overlay(image, np.zeros((48, 40)))


def test_a_true_region_of_another_size_is_refused(image, anomaly_map):
    turned = np.zeros((48, 40), bool)
    turned[5:9, 5:9] = True
    with pytest.raises(ValueError, match=r"true region of the image's size \(40, 48\), got \(48, 40\)"):
        side_by_side(image, None, anomaly_map, mask=turned)
    with pytest.raises(ValueError, match=r"\(40, 48\), got \(48, 40\)"):
        contact_sheet([{"image": image, "mask": turned, "maps": {"a": anomaly_map}}], ["a"])


def test_the_true_region_is_drawn_if_it_is_given(image, anomaly_map):
    plain = side_by_side(image, image, anomaly_map, vmax=0.2)
    outlined = side_by_side(image, image, anomaly_map, vmax=0.2, mask=anomaly_map > 0)
    boxed = side_by_side(image, image, anomaly_map, vmax=0.2, boxes=[[10, 10, 10, 10]])
    assert plain.mode == "RGB" and plain.size == outlined.size == boxed.size
    assert colours(plain, TRUTH) == 0 and colours(outlined, TRUTH) > 200 and colours(boxed, TRUTH) > 200


def test_an_outline_leaves_the_inside_of_the_region_free(image):
    mask = np.zeros((40, 48), bool)
    mask[10:30, 10:30] = True
    drawing = np.asarray(side_by_side(image, image, np.zeros((40, 48)), vmax=1, mask=mask, panel_size=480))
    inside = drawing[:, :480][150:300, 120:280]  # of the first panel, well inside whatever the margins
    assert (inside[..., 0] == inside[..., 2]).all()


def test_a_panel_with_its_own_colour_scale_is_labelled(image, anomaly_map):
    # with a scale of its own, a map and its double look alike but for the numbers at the bar and the note below
    one, double = (np.asarray(side_by_side(image, image, m)) for m in (anomaly_map, 2 * anomaly_map))
    fixed = np.asarray(side_by_side(image, image, anomaly_map, vmax=0.2))
    rows = np.flatnonzero((one != double).any((1, 2)))
    assert len(rows) and rows.min() > 260  # the panels (267 high) are the same
    assert (one[-30:] != fixed[-30:]).any()  # the notes are not


def test_a_note_takes_no_room_beside_the_colour_bar(image, anomaly_map):
    noted, bare = (np.asarray(side_by_side(image, image, anomaly_map, vmax=0.2, note=n)) for n in (True, False))
    rows, columns = np.nonzero((noted != bare).any(-1))
    assert len(rows) and rows.min() > 260, "below the panels (267 high)"
    assert columns.max() < noted.shape[1] * 2 / 3, "at the left of the colour bar"


def test_a_note_that_does_not_fit_beside_the_colour_bar_is_below_it(image, anomaly_map):
    row = {"image": image, "maps": {"a": anomaly_map}}
    heights = [contact_sheet([row], columns, panel_size=60).height for columns in ([], ["a"])]
    assert heights[1] >= heights[0] + 20


def test_without_a_counterfactual_there_are_two_panels(image, anomaly_map):
    three, two = (np.asarray(side_by_side(image, x, anomaly_map, vmax=0.2, note=False)) for x in (image, None))
    removed = three.shape[1] - two.shape[1]
    assert len(two) == len(three) and two.shape[1] // 2 - 10 < removed < two.shape[1] // 2 + 10
    np.testing.assert_array_equal(two[:, removed:], three[:, 2 * removed :])


def test_a_second_line_of_the_title_is_drawn_above_the_same_panels(image, anomaly_map):
    """A warning in a line of its own is not cut, however long the first line is."""
    titles = ("words " * 90, "words " * 90 + "\nW")
    one, two = (np.asarray(side_by_side(image, image, anomaly_map, title=title)) for title in titles)
    higher = len(two) - len(one)
    assert 18 < higher < 30 and (two[40 + higher :] == one[40:]).all()
    assert (two[:26] == one[:26]).all() and (two[28:48, :30] < 200).any()


def test_a_title_and_a_long_name_fit_the_page(image, anomaly_map):
    name = "a method with a name that goes on and on and on and on and on"
    row = {"image": image, "maps": {name: anomaly_map}, "title": "a patient whose number is longer than the panel"}
    page = contact_sheet([row], [name], title="words " * 60)
    assert page.size == contact_sheet([row], [name], title="t").size
    assert (np.asarray(page)[:, -3:] == 255).all()


def test_a_contact_sheet_has_a_row_a_patient_and_a_column_a_method(image, anomaly_map):
    row = {"image": image, "maps": {"a": anomaly_map, "b": None}}
    small = contact_sheet([row], ["a"])
    assert contact_sheet([row, row], ["a"]).height > small.height
    assert contact_sheet([row], ["a", "b"]).width > small.width
    truth = contact_sheet([{**row, "mask": anomaly_map > 0}], ["a"])
    assert truth.width > small.width and colours(truth, TRUTH) > 0
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([], ["a"])


def test_a_sheet_without_maps_claims_no_colour_scale(image, anomaly_map):
    def foot(columns):
        page = np.asarray(contact_sheet([{"image": image, "maps": {"a": anomaly_map}}], columns))
        return page[-12:]

    assert (foot([]) == foot([])[0, 0]).all(), "nothing is written below"
    assert not (foot(["a"]) == foot(["a"])[0, 0]).all()


@pytest.mark.parametrize(
    ("columns", "vmax", "message"),
    [
        (["b"], None, "expected columns among the maps a, got .'b'."),
        (["a"], {"b": 0.5}, "expected `vmax` for some of the columns a, got .'b'."),
    ],
)
def test_a_column_or_a_colour_scale_without_a_map_is_refused(image, anomaly_map, columns, vmax, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet([{"image": image, "maps": {"a": anomaly_map}}], columns, vmax=vmax)


def test_all_rows_of_a_column_share_their_colours():
    grey = np.full((32, 32), 128, np.uint8)
    rows = [{"image": grey, "maps": {"m": np.full((32, 32), v, np.float32)}} for v in (0.1, 0.4)]
    alone, both = contact_sheet(rows[:1], ["m"], panel_size=100), contact_sheet(rows, ["m"], panel_size=100)
    first_overlay = np.s_[60, 180]
    assert (np.asarray(alone)[first_overlay] != np.asarray(both)[first_overlay]).any()  # the scale is the set's
    fixed = [contact_sheet(r, ["m"], panel_size=100, vmax=1.0) for r in (rows[:1], rows)]
    assert (np.asarray(fixed[0])[first_overlay] == np.asarray(fixed[1])[first_overlay]).all()


def test_images_of_different_shapes_share_a_sheet(anomaly_map, image):
    tall = Image.fromarray(np.zeros((96, 40), np.uint8))
    rows = [
        {"image": image, "maps": {"m": anomaly_map}},
        {"image": tall, "maps": {"m": np.zeros((96, 40), np.float32)}, "boxes": [[1, 1, 9, 9]]},
    ]
    assert contact_sheet(rows, ["m"]).height > 2 * 100


def test_a_validation_strip_takes_the_output_of_a_pipeline():
    rng = np.random.default_rng(0)
    images, maps = rng.random((3, 16, 16, 1)).astype(np.float32), rng.random((3, 16, 16)).astype(np.float32)
    strip = validation_strip(images, 1 - images, maps, titles=["healthy", "effusion", "effusion"], title="step 10")
    assert strip.width > 3 * 128 and strip.height > 3 * 128


def test_the_common_scale_is_never_0_and_uses_every_map():
    assert common_vmax([np.zeros((4, 4))]) == 1 and common_vmax([]) == 1 and common_vmax([None]) == 1
    assert common_vmax([np.zeros(10), np.ones(10)], quantile=0.75) == 1
    assert common_vmax([np.linspace(0, 1, 1001)]) == pytest.approx(0.995, abs=1e-3)


def test_exposure_is_kept_for_8_bits_and_stretched_for_more():
    assert np.asarray(to_grey(np.full((4, 4), 77, np.uint8)))[0, 0] == 77
    assert np.asarray(to_grey(np.full((4, 4, 1), 0.5)))[0, 0] == 128
    deep = np.linspace(100, 4000, 16).astype(np.uint16).reshape(4, 4)
    for drawing in (deep, Image.fromarray(deep)):
        assert np.asarray(to_grey(drawing)).min() == 0 and np.asarray(to_grey(drawing)).max() == 255
    with pytest.raises(ValueError, match="grey image"):
        to_grey(np.zeros((4, 4, 3)))


@pytest.mark.parametrize("ending, error", [("png", 1 / 131070 + 1e-7), ("npy", 0)])
def test_a_map_comes_back_as_it_was_saved(tmp_path, ending, error):
    anomaly_map = np.random.default_rng(0).random((9, 7)).astype(np.float32)
    save_map(anomaly_map, tmp_path / "deep" / f"map.{ending}")
    again = load_map(tmp_path / "deep" / f"map.{ending}")
    assert again.dtype == np.float32 and again.shape == (9, 7) and np.abs(again - anomaly_map).max() <= error
    assert [p.name for p in (tmp_path / "deep").iterdir()] == [f"map.{ending}"]


@pytest.mark.parametrize("bad", [np.full((4, 4), 1.5), np.full((4, 4), np.nan), np.zeros((1, 4, 4))])
def test_an_invalid_map_is_not_saved(tmp_path, bad):
    with pytest.raises(ValueError, match="map in"):
        save_map(bad, tmp_path / "map.png")
    with pytest.raises(ValueError, match=".png or .npy"):
        save_map(np.zeros((4, 4)), tmp_path / "map.jpg")
    assert not list(tmp_path.iterdir())


def test_an_8_bit_image_is_not_read_as_a_map(tmp_path, image):
    save_png(image, tmp_path / "x.png")
    with pytest.raises(ValueError, match="16-bit map, got a PNG of mode L"):
        load_map(tmp_path / "x.png")


def test_a_failed_save_leaves_the_old_file(tmp_path, image):
    save_png(image, tmp_path / "x.png")
    before = (tmp_path / "x.png").read_bytes()
    with pytest.raises((OSError, ValueError, KeyError)):
        save_png(Image.fromarray(np.zeros((4, 4), np.float32)), tmp_path / "x.png")  # mode F is no PNG
    assert (tmp_path / "x.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_curves_carry_their_area_and_leave_no_figure_open(tmp_path):
    rng = np.random.default_rng(0)
    truths = [rng.random((30, 30)) < 0.2 for _ in range(3)]
    good = Ranking([t + 0.7 * rng.random(t.shape) for t in truths], truths)
    bad = Ranking([rng.random(t.shape) for t in truths], truths)
    for figure in (precision_recall_figure({"good": good, "bad": bad}), roc_figure({"good": good, "bad": bad})):
        save_png(figure, tmp_path / "curve.png")
        assert Image.open(tmp_path / "curve.png").size[0] > 500
        labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert labels[0].startswith("good") and labels[-1].startswith("chance")
    assert f"{good.auroc():.3f}" in labels[0]
    x, y = figure.axes[0].lines[0].get_data()
    assert np.trapezoid(y, x) == pytest.approx(good.auroc(), abs=1e-6)
    import matplotlib.pyplot

    assert matplotlib.pyplot.get_fignums() == []
