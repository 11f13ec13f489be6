"""The lung segmenter: laws of its gate and its zones."""

import pytest
import torch

from cxr_diffusers import LungSegmenter

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


def test_it_is_the_same_when_loaded_from_a_folder(tmp_path):
    segmenter, images = toy_segmenter(), chests()
    segmenter.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert torch.equal(LungSegmenter.from_pretrained(tmp_path).field(images), segmenter.field(images))


@pytest.mark.parametrize(
    ("wrong", "got"), [(dict(sample_size=31), "31"), (dict(block_out_channels=(4, 7)), r"\(4, 7\)")]
)
def test_an_impossible_configuration_is_refused(wrong, got):
    with pytest.raises(ValueError, match=f"expected .*got {got}"):
        toy_segmenter(**wrong)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 1, H, W\), got \(3, 32, 32\)"):
        toy_segmenter().field(torch.zeros(3, 32, 32))
