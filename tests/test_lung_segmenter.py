"""The lung segmenter: laws of its gate, zones and training images; the training program; shipped weights."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_diffusers import LungSegmenter, build_dataset, load_pipeline, load_table, read_image
from cxr_diffusers.data import list_images
from cxr_diffusers.fingerprints import checkpoint_digest, weights_digest
from cxr_diffusers.models.lung_segmenter import main_piece
from cxr_diffusers.pipelines.cxr_images import prepare_image
from cxr_diffusers.training.lungs import LungImages, augment_lungs, paint_opacities, split_lungs
from cxr_diffusers.training.script import run_program

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "cxr_diffusers" / "checkpoints" / "cxr_lung_segmenter_64"
SAMPLES = list_images(ROOT / "cxr_diffusers" / "samples")

TOY = {"sample_size": 32, "block_out_channels": (4, 8), "norm_num_groups": 2}


def toy_segmenter(**changes):
    torch.manual_seed(0)
    return LungSegmenter(**{**TOY, **changes}).eval()


def chests(count=3, height=40, width=48):
    return torch.rand(count, 1, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


class TwoDiscs(LungSegmenter):
    """A segmenter whose logits are two discs: the lung on the left of the image is higher up."""

    def _logits(self, images):
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        distances = [((y - row) ** 2 + (x - column) ** 2).sqrt() for row, column in ((12, 8), (18, 22))]
        return torch.stack([10 * (6 - distance) for distance in distances]).expand(len(images), -1, -1, -1)


def test_logits_and_gate_have_the_size_of_the_image():
    segmenter, images = toy_segmenter(), chests()
    assert segmenter(images).shape == (3, 2, 40, 48)
    gate = segmenter.field(images)
    assert gate.shape == (3, 40, 48) and gate.dtype == torch.float32
    assert gate.min() >= 0 and gate.max() <= 1


def test_the_gate_is_its_own_mirror_image():
    gate = toy_segmenter().field(chests())
    torch.testing.assert_close(gate, gate.flip(-1))
    assert gate.std() > 1e-3, "a constant gate would be symmetric, too"


def test_the_gate_of_a_batch_is_the_gate_of_its_images():
    segmenter, images = toy_segmenter(), chests()
    single = torch.cat([segmenter.field(image[None]) for image in images])
    torch.testing.assert_close(segmenter.field(images), single, atol=1e-5, rtol=1e-5)


def test_brightness_contrast_and_data_range_do_not_matter():
    segmenter, images = toy_segmenter(), chests()
    torch.testing.assert_close(segmenter.field(images), segmenter.field(40 * images + 100), atol=1e-4, rtol=1e-4)
    assert torch.isfinite(segmenter.field(torch.zeros(1, 1, 32, 32))).all()


def test_the_gate_grows_with_the_dilation_and_covers_the_lungs():
    segmenter, images = TwoDiscs(**TOY).eval(), torch.zeros(1, 1, 32, 32)
    bare, default = segmenter.field(images, dilation=0, sigma=0), segmenter.field(images)
    lungs = (segmenter(images) > 0).any(dim=1)
    assert (bare[lungs] > 0.5).all() and (default[lungs] > 0.5).all()
    assert default.sum() > bare.sum() and (segmenter.field(images, dilation=8, sigma=0) >= bare).all()
    assert default[0, 0, 16] < 0.01, "far from the lungs the gate is closed"


def test_the_recess_extends_the_outer_part_of_each_lung_downwards():
    bare = dict(dilation=0, sigma=0)
    images = torch.zeros(1, 1, 32, 32)
    plain = TwoDiscs(**TOY).eval().field(images, **bare)[0]
    deep = TwoDiscs(**TOY, recess=8).eval().field(images, **bare)[0]  # 8 of 64 pixels are 4 of 32
    assert (deep >= plain).all()
    torch.testing.assert_close(deep, deep.flip(-1))
    added = (deep > 0.5) & (plain <= 0.5)
    lung = plain > 0.5
    for column in range(16):  # the right half of the image is its mirror image
        if not lung[:, column].any():
            assert not added[:, column].any()
            continue
        lowest = lung[:, column].nonzero().max()
        new = added[:, column].nonzero().flatten().tolist()
        columns = lung[:, :16].any(dim=0).nonzero().flatten()
        outer = column + 0.5 < columns.min() + 0.4 * (columns.max() + 1 - columns.min())
        assert new == ([lowest + i for i in range(1, 5)] if outer else []), column
    assert added.any()


class TwoDiscsAndAStrayPixel(TwoDiscs):
    def _logits(self, images):
        logits = super()._logits(images).clone()
        logits[:, 0, 3, 15] = 9.0
        return logits


def test_a_stray_pixel_does_not_change_the_outer_part_of_a_lung():
    images, bare = torch.zeros(1, 1, 32, 32), dict(dilation=0, sigma=0)
    clean = TwoDiscs(**TOY, recess=8).eval().field(images, **bare)[0]
    stray = TwoDiscsAndAStrayPixel(**TOY, recess=8).eval().field(images, **bare)[0]
    same = torch.ones(32, 32, dtype=torch.bool)
    same[3:8, 15:17] = False  # the pixel, its mirror image, and what lies below
    torch.testing.assert_close(stray[same], clean[same])


def test_the_main_piece_is_the_densest_of_those_that_touch_at_sides_or_corners():
    mask = torch.zeros(1, 2, 24, 24, dtype=torch.bool)
    mask[0, 0, 2:12, 2:12] = True
    mask[0, 0, 12, 12] = mask[0, 0, 13, 13] = True  # at corners
    expected = mask.clone()
    mask[0, 0, 20:22, 2:20] = True  # another piece, long and thin
    assert torch.equal(main_piece(mask), expected) and not main_piece(mask)[0, 1].any()


def test_an_image_without_lungs_has_no_recess():
    segmenter = toy_segmenter(recess=8)
    segmenter.conv_out.bias.data.fill_(-1e3)
    gate = segmenter.field(chests())
    assert torch.isfinite(gate).all() and gate.max() < 1e-3


def test_every_shipped_gate_reaches_into_the_recess():
    shipped = LungSegmenter.from_pretrained(SHIPPED)
    assert shipped.config.recess == 3
    for folder in SHIPPED.parent.glob("*/lung_segmenter"):
        assert LungSegmenter.from_pretrained(folder).config.recess == 3, folder
    image = prepare_image(read_image(SAMPLES[0]), 64)
    plain = LungSegmenter.from_pretrained(SHIPPED, recess=0.0)
    added = shipped.field(image) - plain.field(image)
    assert added.min() > -1e-6 and added.max() > 0.2
    assert added[:, :32].max() < 0.01, "only the lower half of the chest changes"


def test_the_gate_is_part_of_a_models_digests(tmp_path):
    shutil.copytree(SHIPPED.parent / "cxr_pyramid_128", tmp_path / "model")
    before = checkpoint_digest(tmp_path / "model"), weights_digest(load_pipeline(tmp_path / "model"))
    path = tmp_path / "model" / "lung_segmenter" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "recess": 20.0}))
    after = checkpoint_digest(tmp_path / "model"), weights_digest(load_pipeline(tmp_path / "model"))
    assert before[0] != after[0] and before[1] != after[1], "healthy scores of one gate are not those of another"


def test_zones_are_two_lungs_and_their_thirds():
    zones = TwoDiscs(**TOY).eval().zones(torch.zeros(2, 1, 64, 64))
    right, left = zones["right"], zones["left"]
    assert right.any() and left.any() and not (right & left).any()
    columns = torch.arange(64).expand(2, 64, 64)
    assert columns[right].max() < columns[left].min(), "the right lung is on the left of the image"
    parts = torch.stack([zones[name] for name in ("upper", "middle", "lower")])
    assert torch.equal(parts.sum(dim=0), (right | left).long()), "each pixel of a lung lies in one third"
    rows = torch.arange(64)[:, None].expand(2, 64, 64)
    for lung in (right, left):
        upper, middle, lower = (rows[lung & part] for part in parts)
        assert upper.max() < middle.min() and middle.max() < lower.min()
        heights = [len(part.unique()) for part in (upper, middle, lower)]
        assert max(heights) - min(heights) <= 1, heights


def test_an_image_without_lungs_has_empty_zones():
    segmenter = toy_segmenter()
    segmenter.conv_out.bias.data.fill_(-1e3)
    assert not any(mask.any() for mask in segmenter.zones(chests()).values())
    assert segmenter.field(chests()).max() < 1e-3


def test_the_segmenter_is_unchanged_after_saving_and_loading(tmp_path):
    segmenter, images = toy_segmenter(), chests()
    segmenter.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert torch.equal(LungSegmenter.from_pretrained(tmp_path).field(images), segmenter.field(images))


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (dict(sample_size=31), "31"),
        (dict(block_out_channels=(4, 7)), r"\(4, 7\)"),
        (dict(recess=-1), "-1"),
        (dict(recess="deep"), "'deep'"),
    ],
)
def test_an_impossible_configuration_is_refused(wrong, got):
    with pytest.raises(ValueError, match=f"expected .*got {got}"):
        toy_segmenter(**wrong)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 1, H, W\), got \(3, 32, 32\)"):
        toy_segmenter().field(torch.zeros(3, 32, 32))


def drawn_chest(side, middle=0.5):
    """(image, mask) of uint8: two dark ellipses, the lungs, on a grey body; the right one (image left) is larger."""
    y, x = np.mgrid[:side, :side] / side
    lungs = [((x - middle - dx) / w) ** 2 + ((y - 0.45) / 0.3) ** 2 < 1 for dx, w in ((-0.22, 0.15), (0.22, 0.12))]
    mask = lungs[0] | lungs[1]
    return np.where(mask, 60, 180).astype(np.uint8) + (y * 20).astype(np.uint8), mask.astype(np.uint8) * 255


@pytest.fixture
def folder(tmp_path):
    """A table of ten drawn chests with masks and one without."""
    rows = []
    for i in range(11):
        image, mask = drawn_chest(48, 0.46 + 0.01 * i)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / f"{i}_lungs.png")
        lung_mask = f"{i}_lungs.png" if i < 10 else ""
        rows.append({"file": f"{i}.png", "lung_mask": lung_mask, "patient_id": i, "split": "val" if i < 4 else "train"})
    with open(tmp_path / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def lungs_of(folder, size=32, **options):
    dataset = load_table(
        folder / "manifest.csv", label="chest", classes=["chest"], mask="lung_mask", patient="patient_id"
    )
    return LungImages(dataset, size, **options)


def test_images_without_a_mask_are_left_out_and_the_right_lung_comes_first(folder):
    lungs = lungs_of(folder)
    assert len(lungs) == 10
    image, mask = lungs[3]["images"], lungs[3]["masks"]
    assert image.shape == (1, 32, 32) and mask.shape == (2, 32, 32) and set(mask.unique().tolist()) == {0, 1}
    assert image[0][mask.amax(dim=0) > 0].mean() < image[0][mask.amax(dim=0) == 0].mean() - 0.5, "mask and image agree"
    assert mask[0].sum() > mask[1].sum(), "the larger lung is drawn on the left of the image"
    columns = mask.sum(dim=1).argmax(dim=1)
    assert columns[0] < columns[1]


def test_masks_that_are_not_two_lungs_are_refused():
    with pytest.raises(ValueError, match="x.png: expected a mask of two lungs, got 1 connected"):
        split_lungs(np.ones((8, 8), bool), "x.png")
    with pytest.raises(ValueError, match="expected images with a lung mask, got none"):
        LungImages(build_dataset("phantom", n=4, size=32).remove_columns("mask"), 32)


def test_augmentation_moves_image_and_mask_alike(folder):
    lungs = lungs_of(folder, 64)
    torch.manual_seed(0)
    options = dict(degrees=12, zoom=0.3, stretch=0.3, shift=0.1, gamma=0.5, clip=0.2, mirror=0.5)
    images, masks = augment_lungs(lungs.images, lungs.masks, 32, **options)
    assert images.shape == (10, 1, 32, 32) and masks.shape == (10, 2, 32, 32)
    assert images.min() >= -1 and images.max() <= 1
    plain, unmoved = augment_lungs(lungs.images, lungs.masks, 32)
    assert (masks != unmoved).any() and (images - plain).abs().max() > 0.1
    for image, (right, left) in zip(images[:, 0], masks > 0, strict=True):
        body = image[~(right | left)]
        # the body beside the lungs is brighter than the lungs; black beyond the image's border is not body
        assert image[right].median() < body[body > image[right].median()].median()
        assert torch.nonzero(right)[:, 1].float().mean() < torch.nonzero(left)[:, 1].float().mean()


def test_without_settings_augmentation_only_resizes(folder):
    lungs = lungs_of(folder, 64)
    images, masks = augment_lungs(lungs.images, lungs.masks, 32)
    torch.testing.assert_close(images, torch.nn.functional.avg_pool2d(lungs.images, 2), atol=1e-5, rtol=0)
    assert (masks.sum(dim=(2, 3)) - lungs.masks.sum(dim=(2, 3)) / 4).abs().max() < 12


def test_painting_brightens_lungs_and_leaves_the_rest_and_the_masks(folder):
    lungs = lungs_of(folder, 64)
    masks = lungs.masks.clone()
    torch.manual_seed(0)
    painted = paint_opacities(lungs.images, masks, 1.0)
    change = painted - lungs.images
    assert torch.equal(masks, lungs.masks), "lung behind fluid is lung"
    assert change.min() >= 0 and painted.max() <= 1
    lung = masks.amax(dim=1, keepdim=True)
    assert ((change * lung).flatten(1).amax(dim=1) > 0.1).all(), "every image has an opacity to see"
    near = torch.nn.functional.max_pool2d(lung, 25, stride=1, padding=12)
    assert change[near == 0].max() == 0, "far from the lungs nothing is changed"
    assert torch.equal(paint_opacities(lungs.images, masks, 0.0), lungs.images)


@pytest.fixture(scope="module")
def script():
    path = ROOT / "training" / "train_lung_segmenter.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def short(folder, steps, *more):
    return [
        f"data.root={folder}",
        "segmenter.sample_size=32",
        "segmenter.block_out_channels=[4, 8]",
        "train.batch_size=2",
        f"train.max_steps={steps}",
        "train.lr_warmup_steps=0",
        "train.save_every=1",
        f"train.output_dir={folder / 'run'}",
        *more,
    ]


def test_training_leaves_a_segmenter_and_resumes(script, folder):
    script.main(short(folder, 2))
    script.main(short(folder, 3))
    run = folder / "run"
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3] and all(0 <= line["dice"] <= 1 for line in steps)
    measured = json.loads((run / "validation" / "step-0000003.json").read_text())
    assert set(measured) == {"dice", "dice with painted opacities"}
    assert (run / "validation" / "step-0000003.png").is_file()
    segmenter = LungSegmenter.from_pretrained(run)
    assert segmenter.config.sample_size == 32 and torch.isfinite(segmenter.field(chests())).all()


def test_an_unknown_key_of_the_augmentation_is_one_line(script, folder, capsys):
    assert run_program(script.main, short(folder, 1, "train.augment={angle: 3}"), "train") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert "train.augment: " in line and "'angle'" in line


def test_training_starts_from_given_weights(script, folder):
    start = toy_segmenter()
    start.save_pretrained(folder / "start")
    more = [f"train.init_from={folder / 'start'}", "train.learning_rate=1.0e-9"]
    script.main(short(folder, 1, *more))
    for ours, theirs in zip(
        LungSegmenter.from_pretrained(folder / "run").parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_training_learns_where_the_lungs_are(script, folder):
    deeper = "segmenter.block_out_channels=[4, 8, 16]"
    augment = "train.augment={degrees: 5, shift: 0.05}"
    settings = ["train.batch_size=6", "train.learning_rate=1.0e-2", "train.ema_decay=0.5", "train.save_every=1000"]
    script.main(short(folder, 80, deeper, augment, *settings))
    measured = json.loads((folder / "run" / "validation" / "step-0000080.json").read_text())
    assert measured["dice"] > 0.85, measured


def test_the_dice_coefficient(script):
    truth = torch.zeros(2, 2, 10, 10)
    truth[:, 0, :5] = 1
    half = truth.clone()
    half[:, 0, :, 5:] = 0
    torch.testing.assert_close(script.dice(truth, truth), torch.ones(2))
    torch.testing.assert_close(script.dice(half, truth), torch.full((2,), 51 / 76))


def test_publishing_is_refused_before_training(script, folder):
    with pytest.raises(ValueError, match="expected no train.push_to_hub"):
        script.main(short(folder, 1, "train.push_to_hub=true"))
    assert not (folder / "run").exists()


@pytest.fixture(scope="module")
def shipped():
    return LungSegmenter.from_pretrained(SHIPPED)


def test_the_shipped_segmenter_is_small_and_has_a_card(shipped):
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 400_000
    assert {path.suffix for path in SHIPPED.iterdir()} == {".json", ".md", ".safetensors"}
    card = " ".join((SHIPPED / "README.md").read_text().split())
    for part in ("V7 Labs", "CC BY 4.0", "Kermany", "paediatric", "Research use only", "Dice"):
        assert part in card, part
    assert sum(p.numel() for p in shipped.parameters()) < 160_000


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_shipped_segmenter_finds_two_lungs_in_a_sample(shipped, path):
    image = prepare_image(read_image(path), 64)
    zones, gate = shipped.zones(image), shipped.field(image)
    right, left = zones["right"][0], zones["left"][0]
    for lung in (right, left):
        assert 0.05 < lung.float().mean() < 0.3, "a lung takes a tenth to a fifth of a radiograph"
    columns = torch.arange(64).expand(64, 64).float()
    assert columns[right].mean() < 26 and columns[left].mean() > 38, "one on each side of the spine"
    assert gate[0][right | left].mean() > 0.9
    assert gate[0, :2].mean() < 0.1 and gate[0, :, :1].mean() < 0.2, "neck and arms are outside"
    assert 0.3 < gate.mean() < 0.8


def test_the_shipped_segmenter_still_finds_a_lung_that_is_painted_over(shipped):
    images = torch.cat([prepare_image(read_image(path), 64) for path in SAMPLES])
    zones = shipped.zones(images)
    lungs = torch.stack([zones["right"], zones["left"]], dim=1).float()
    torch.manual_seed(0)
    painted = shipped.zones(paint_opacities(images, lungs, 1.0))
    again = torch.stack([painted["right"], painted["left"]], dim=1).float()
    overlap = 2 * (lungs * again).flatten(1).sum(dim=1) / (lungs + again).flatten(1).sum(dim=1)
    assert overlap.mean() > 0.85, overlap
