"""Parts of training and of its models: balanced batches, the power-function average, embedding ids, folding UNet."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image

from cxr_diffusers import build_dataset, load_packed, load_phantom
from cxr_diffusers.data.images import fit_image
from cxr_diffusers.data.packing import pack
from cxr_diffusers.data.views import fill_views
from cxr_diffusers.models.space_to_depth_unet import SpaceToDepthUNet
from cxr_diffusers.pipelines.cxr_conditions import Conditions
from cxr_diffusers.training.augmentation import augment
from cxr_diffusers.training.run import PowerEMA, ShuffledForever
from helpers import TOY_UNET, toy_unet


def test_a_folding_unet_is_the_plain_one_on_folded_images(tmp_path):
    folding = SpaceToDepthUNet(**TOY_UNET, patch_size=2).eval()
    plain = toy_unet(sample_size=8, in_channels=4, out_channels=4)
    folding.load_state_dict(plain.state_dict())
    x, labels = torch.randn(2, 1, 16, 16), torch.tensor([0, 2])
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), 7, labels).sample, 2)
    assert torch.equal(folding(x, 7, labels).sample, expected)
    assert (folding.config.sample_size, folding.config.in_channels, folding.config.patch_size) == (16, 1, 2)
    folding.save_pretrained(tmp_path)
    assert torch.equal(SpaceToDepthUNet.from_pretrained(tmp_path).eval()(x, 7, labels).sample, expected)


def test_a_folding_unet_of_patch_size_one_is_the_plain_one():
    plain, folding = toy_unet(), SpaceToDepthUNet(**TOY_UNET, patch_size=1).eval()
    folding.load_state_dict(plain.state_dict())
    x, labels = torch.randn(2, 1, 16, 16), torch.tensor([0, 1])
    assert torch.equal(folding(x, 7, labels).sample, plain(x, 7, labels).sample)
    with pytest.raises(ValueError, match="multiple of `patch_size`"):
        SpaceToDepthUNet(**TOY_UNET, patch_size=3)


@pytest.mark.parametrize("views", [(), ("PA", "AP")])
def test_every_condition_has_an_embedding_of_its_own(views):
    conditions = Conditions(3, views)
    ids = [conditions.of_class(k, v) for k in range(3) for v in range(len(views) or 1)]
    ids += [conditions.null(v) for v in range(len(views) or 1)]
    ids += [conditions.unlabelled] if views else []
    assert sorted(ids) == list(range(conditions.num_embeddings))
    assert Conditions.of_table(conditions.num_embeddings, views) == conditions
    if views:
        with pytest.raises(ValueError, match="class embeddings for the views"):
            Conditions.of_table(conditions.num_embeddings + 1, views)


def test_balanced_batches_draw_every_group_equally_often_and_resume():
    groups = [list(range(20)), list(range(20, 24)), list(range(24, 30))]
    batches = list(islice(ShuffledForever(groups, 3, seed=4), 60))
    drawn = [index for batch in batches for index in batch]
    assert [sum(index in group for index in drawn) for group in groups] == [60, 60, 60]
    assert all(drawn.count(index) == 15 for index in groups[1]), "each row of a group equally often"
    for start in (1, 7, 40):
        assert next(iter(ShuffledForever(groups, 3, seed=4, start=start))) == batches[start]
    assert next(iter(ShuffledForever(groups, 3, seed=5))) != batches[0]
    shares = [iter(ShuffledForever(groups, 1, 4, process_index=i, num_processes=3)) for i in range(3)]
    assert [sum((next(share) for share in shares), []) for _ in range(5)] == batches[:5]


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_power_average_has_the_relative_width_it_was_asked_for(width):
    """The profile is proportional to t^gamma; its standard deviation over the run is `width` (Karras et al. 2024)."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema, steps = PowerEMA([parameter], width), 400
    mean = 0.0  # after step t the parameter is t / steps: the average is the profile's centre of mass
    for step in range(1, steps + 1):
        parameter.data.fill_(step / steps)
        ema.step([parameter])
        mean = ema.shadow_params[0].item()
    gamma = ema.gamma
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(width, rel=1e-6)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=0.01)
    with pytest.raises(ValueError, match="ema_width"):
        PowerEMA([parameter], 0.3)


@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("change", [{"clip": 0.2}, {"contrast": 1.0}, {"gamma": 0.5}])
def test_changes_of_exposure_keep_the_ends_of_the_range(data_range, change):
    low, high = data_range
    ramp = torch.linspace(low, high, 32).expand(4, 1, 32, 32)
    torch.manual_seed(0)
    changed = augment(ramp, data_range=data_range, **change)
    assert torch.allclose(changed[..., 0], torch.tensor(low)) and torch.allclose(changed[..., -1], torch.tensor(high))
    assert not torch.allclose(changed, ramp, atol=1e-3) and (changed.diff(dim=-1) >= -1e-6).all()


def as_png(values):
    return Image.fromarray(values.astype(np.uint8))


def noisy_chests(count, view, seed=0):
    """Rows of a data set whose view can be read from the image: the lower half is brighter in PA, the upper in AP."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 180, 40)[:: 1 if view == "PA" else -1, None]
    return [
        {
            "image": as_png(rng.normal(ramp, 8, (40, 30)).clip(0, 255)),
            "label": i % 2,
            "patient": f"{view}{seed}{i}",
            "view": view,
            "path": f"{view}{seed}{i}.png",
        }
        for i in range(count)
    ]


def as_dataset(rows):
    features = load_phantom(n=1, size=16).select_columns(["image", "label", "patient", "view", "path"]).features
    return Dataset.from_list(rows, features=features)


def test_a_packed_data_set_comes_back_with_labels_and_unlabelled_images(tmp_path):
    labelled, more = as_dataset(noisy_chests(4, "PA")), as_dataset(noisy_chests(3, "AP", seed=1))
    path = tmp_path / "train.parquet"
    pack(labelled, path, size=32, quality=95, unlabelled=[more])
    assert [p.name for p in tmp_path.iterdir()] == ["train.parquet"], "no temporary file stays"
    everything = load_packed(path)
    assert everything["label"][:] == [0, 1, 0, 1, -1, -1, -1]
    for name in ("patient", "view", "path"):
        assert everything[name][:] == labelled[name][:] + more[name][:]
    assert everything.features["label"].names == labelled.features["label"].names
    for original, packed in zip([*labelled, *more], everything, strict=True):
        expected = np.asarray(fit_image(original["image"], 32, "pad"), float)
        assert np.abs(np.asarray(packed["image"], float) - expected).mean() < 3, "JPEG of quality 95"
    assert load_packed(path, part="labelled")["path"][:] == labelled["path"][:]
    assert load_packed(path, part="unlabelled")["path"][:] == more["path"][:]
    assert len(build_dataset(name="packed", root=str(path), part="labelled")) == 4


def test_a_wrong_packed_data_set_is_refused(tmp_path):
    labelled = as_dataset(noisy_chests(2, "PA"))
    with pytest.raises(ValueError, match="`size` of 8 pixels"):
        pack(labelled, tmp_path / "x.parquet", size=4)
    with pytest.raises(FileNotFoundError, match="expected a packed data set"):
        load_packed(tmp_path / "nowhere.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(ValueError, match="expected a packed data set"):
        load_packed(tmp_path / "text.parquet")
    path = tmp_path / "x.parquet"
    pack(labelled, path, size=16)
    with pytest.raises(ValueError, match="`part` all, labelled or unlabelled"):
        load_packed(path, part="half")


def test_missing_views_are_predicted_from_the_images_whose_view_is_given():
    rows = noisy_chests(12, "PA") + noisy_chests(12, "AP")
    hidden = [{**row, "view": ""} for row in noisy_chests(3, "PA", seed=7) + noisy_chests(3, "AP", seed=8)]
    filled, auroc = fill_views(as_dataset(rows + hidden))
    assert filled["view"][:] == ["PA"] * 12 + ["AP"] * 12 + ["PA"] * 3 + ["AP"] * 3
    assert auroc > 0.95
    complete = as_dataset(rows)
    assert fill_views(complete) == (complete, None)
    with pytest.raises(ValueError, match="at least 10 images of each view .*'AP': 0"):
        fill_views(as_dataset(rows[:12] + hidden))
