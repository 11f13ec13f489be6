"""BraTS slices: read as the original read them, and through the whole house as four channels."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline, build_dataset, detect, evaluate, load_brats
from cxr_diffusers.data.brats import list_slices, read_slice
from cxr_diffusers.guided_diffusion.original import OriginalProcedure, run_as_original
from cxr_diffusers.pipelines.cxr_images import prepare_image
from cxr_diffusers.training.tensors import TensorImages
from helpers import toy_unet

nibabel = pytest.importorskip("nibabel")
ROOT = Path(__file__).parent.parent
CHANNELS = ("t1", "t1ce", "t2", "flair")  # in this order, whatever the loader says
FAST = {"num_inference_steps": 4, "noise_level": 500}


def write_nifti(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def slice_values(seed, side=12):
    """{sequence: (side, side)} in [0, 1] with a dark border, as a head lies in its slice."""
    random = np.random.default_rng(seed)
    values = {sequence: np.pad(random.random((side - 4, side - 4)), 2) for sequence in CHANNELS}
    return {sequence: array / array.max() for sequence, array in values.items()}


@pytest.fixture
def root(tmp_path):
    """Three patients of two slices, the second of each with a tumour; files named as in the original's data."""
    root = tmp_path / "brats" / "training"
    for i in range(6):
        patient, folder = f"brats_train_{i // 2:03d}", root / f"{i:06d}"
        for sequence, array in slice_values(i).items():
            write_nifti(folder / f"{patient}_{sequence}_{80 + i % 2}_w.nii.gz", array)
        region = np.zeros((12, 12))
        region[4:7, 3 : 3 + 3 * (i % 2)] = [[1], [2], [4]]  # BraTS numbers the parts of a tumour
        write_nifti(folder / f"{patient}_seg_{80 + i % 2}_w.nii.gz", region)
    return root


def test_channels_label_mask_and_patient_are_the_files(root):
    dataset = load_brats(root)
    assert dataset["label"][:] == [0, 1] * 3 and dataset.features["label"].names == ["healthy", "tumour"]
    assert dataset["patient"][:] == [f"brats_train_{i // 2:03d}" for i in range(6)]
    for i, row in enumerate(dataset):
        expected = slice_values(i)
        assert row["image"].shape == (12, 12, 4) and row["image"].dtype == np.float32
        for channel, sequence in enumerate(CHANNELS):
            np.testing.assert_allclose(row["image"][..., channel], expected[sequence], atol=1e-6)
        assert Path(row["path"]).name == f"{i:06d}" and (row["mask"] is None) == (i % 2 == 0)
    mask = np.asarray(dataset[1]["mask"])
    assert mask[4:7, 3:6].min() == 255 and mask.sum() == 9 * 255


def test_images_are_read_on_access_and_survive_filtering_and_saving(root, tmp_path):
    dataset = load_brats(root).filter(lambda label: label == 1, input_columns="label")
    assert len(dataset) == 3
    dataset.save_to_disk(tmp_path / "saved")
    opened = type(dataset).load_from_disk(tmp_path / "saved")
    np.testing.assert_array_equal(opened[1]["image"], dataset[1]["image"])
    for path in list_slices(root):
        (next(path.glob("*_t1ce_*"))).unlink()
    with pytest.raises(FileNotFoundError, match="t1ce"):
        dataset[0]["image"]
    assert dataset["label"][:] == [1, 1, 1]


def test_240_pixels_lie_in_256_as_the_original_padded_them():
    array = np.random.default_rng(0).random((240, 240, 4)).astype(np.float32)
    x = prepare_image(array, 256, scaling="dtype", aspect="keep", data_range=(0.0, 1.0), num_channels=4)
    assert x.shape == (1, 4, 256, 256)
    assert torch.equal(x[0, :, 8:-8, 8:-8], torch.from_numpy(array).permute(2, 0, 1))
    x[:, :, 8:-8, 8:-8] = 0
    assert not x.any()


def test_patients_are_split_and_drawn_as_elsewhere(root):
    aside = load_brats(root, holdout=0.5, part="holdout", holdout_seed=1)
    rest = load_brats(root, holdout=0.5, holdout_seed=1)
    assert not set(aside["patient"]) & set(rest["patient"]) and len(aside) + len(rest) == 6
    assert sorted(load_brats(root, per_class=2)["label"]) == [0, 0, 1, 1]
    assert load_brats(root, patient_pattern=r"0000(\d+)")["patient"][:] == [f"{i:02d}" for i in range(6)]


def test_plain_names_and_masks_in_a_folder_of_their_own(tmp_path):
    folder = tmp_path / "test" / "000246"
    for sequence, array in slice_values(0).items():
        write_nifti(folder / f"{sequence}.nii", array[..., None])  # one slice of a volume may keep its third axis
    assert load_brats(tmp_path / "test")["label"][:] == [-1]
    region = np.zeros((12, 12))
    region[5, 5] = 1
    write_nifti(tmp_path / "test_labels" / "000246-label.nii.gz", region)
    dataset = load_brats(tmp_path / "test", masks=tmp_path / "test_labels")
    assert dataset["label"][:] == [1] and dataset["patient"][:] == ["000246"]
    with pytest.raises(NotADirectoryError, match="expected a folder of segmentations as `masks`, got .*nowhere"):
        load_brats(tmp_path / "test", masks=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected 000246-label.nii.gz or those of other slices, got none"):
        load_brats(tmp_path / "test", masks=tmp_path)
    with pytest.raises(ValueError, match="expected `classes` the names of healthy and diseased"):
        load_brats(tmp_path / "test", classes=["healthy", "tumour", "oedema"])
    assert np.asarray(dataset[0]["mask"]).sum() == 255


def test_the_names_since_brats_2023_are_read_and_examinations_of_a_patient_stay_together(tmp_path):
    renamed = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}
    for i, name in enumerate(("BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-MEN-00006-000")):
        folder = tmp_path / "slices" / f"{name}_080"
        for sequence, array in slice_values(i).items():
            write_nifti(folder / f"{name}-{renamed[sequence]}_080.nii.gz", array)
        region = np.zeros((12, 12))
        region[4:7, 3 : 3 + i] = 3  # the enhancing tumour, 4 in the earlier years
        write_nifti(folder / f"{name}-seg_080.nii.gz", region)
    dataset = load_brats(tmp_path / "slices")
    assert dataset["label"][:] == [0, 1, 1]
    assert dataset["patient"][:] == ["BraTS-GLI-00005", "BraTS-GLI-00005", "BraTS-MEN-00006"]
    for channel, sequence in enumerate(CHANNELS):
        np.testing.assert_allclose(dataset[0]["image"][..., channel], slice_values(0)[sequence], atol=1e-6)
    write_nifti(tmp_path / "slices" / f"{name}_080" / "t1.nii.gz", np.zeros((12, 12)))
    with pytest.raises(ValueError, match="two files of t1"):
        load_brats(tmp_path / "slices")


def test_a_file_that_is_not_a_slice_is_named(root, tmp_path, monkeypatch):
    first = root / "000000"
    with pytest.raises(ValueError, match="no slice below"):
        load_brats(ROOT / "docs")
    with pytest.raises(NotADirectoryError):
        load_brats(root / "nowhere")
    flair = next(first.glob("*_flair_*"))
    whole = flair.read_bytes()
    flair.unlink()
    with pytest.raises(ValueError, match=r"000000: no NIfTI file of flair"):
        load_brats(root)
    flair.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=flair.name):
        read_slice(first)
    write_nifti(flair, np.zeros((12, 12, 3)))
    with pytest.raises(ValueError, match=r"expected a slice .* got shape \(12, 12, 3\)"):
        read_slice(first)
    write_nifti(flair, np.zeros((10, 12)))
    with pytest.raises(ValueError, match="of one size"):
        TensorImages(load_brats(root), 16, num_channels=4)
    write_nifti(first / "other_flair.nii.gz", np.zeros((12, 12)))
    with pytest.raises(ValueError, match="two files of flair"):
        load_brats(root)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImportError, match=r"cxr_diffusers\[brats\]"):
        read_slice(root / "000001")


def program(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "training" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOY = """unet.sample_size=16 unet.block_out_channels=[8,8] unet.layers_per_block=1 unet.norm_num_groups=4
unet.down_block_types=[DownBlock2D,AttnDownBlock2D] unet.up_block_types=[AttnUpBlock2D,UpBlock2D]
unet.attention_head_dim=8 unet.attn_norm_num_groups=4 data.holdout=0.5 data.holdout_seed=1 train.max_steps=2
train.batch_size=2 train.validation_images=2 train.dataloader_num_workers=0 pipeline.num_inference_steps=4"""


def test_the_recipe_trains_detects_and_evaluates_four_channels(root, tmp_path):
    run = tmp_path / "run"
    recipe = str(ROOT / "configs" / "brats_cfg_256.yaml")
    program("train_cfg").main([recipe, f"data.root={root}", f"train.output_dir={run}", *TOY.split()])
    pipeline = CFGAnomalyPipeline.from_pretrained(run)
    assert pipeline.class_names == ["healthy", "tumour"] and pipeline.config.aspect == "keep"
    with Image.open(run / "validation" / "step-0000002.png") as strip:
        assert strip.mode == "RGB"

    summary = detect(pipeline, [root], tmp_path / "maps", map_format="npy", call_kwargs=FAST, progress=False)
    assert (summary["images"], summary["computed"], summary["failed"]) == (6, 6, {})
    again = detect(pipeline, [root / "000003"], tmp_path / "maps", map_format="npy", call_kwargs=FAST, progress=False)
    assert (again["images"], again["computed"]) == (1, 0)
    # as the original ran it, too
    steps = {"num_inference_steps": 50, "noise_level": 2}
    detect(OriginalProcedure(pipeline), [root / "000003"], tmp_path / "theirs", call_kwargs=steps, progress=False)
    assert (tmp_path / "theirs" / "maps" / "000003.png").is_file()
    expected = pipeline(read_slice(root / "000003"), output_type="np", **FAST).anomaly_map[0]
    np.testing.assert_allclose(np.load(tmp_path / "maps" / "maps" / "000003.npy"), expected[2:-2, 2:-2], atol=1e-6)

    dataset = load_brats(root)
    result = evaluate(
        pipeline, dataset, output_dir=tmp_path / "report", call_kwargs=FAST, n_bootstrap=5, progress=False
    )
    assert result.summary["n_with_region"] == 3 and result.summary["n_images"] == 6
    assert 0 < result.summary["method"]["pixel_ap"]["value"] <= 1
    assert (tmp_path / "report" / "contact_sheet.png").is_file()


def test_a_model_of_one_channel_and_a_slice_do_not_meet_in_silence(root, tmp_path, scheduler):
    pipeline = CFGAnomalyPipeline(toy_unet(in_channels=4, out_channels=4), scheduler)
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(tmp_path / "chest.png")
    summary = detect(pipeline, [tmp_path / "chest.png"], tmp_path / "out", call_kwargs=FAST, progress=False)
    assert "4 channels for this model, got 1" in summary["failed"][str(tmp_path / "chest.png")]
    with pytest.raises(FileNotFoundError, match="no png"):
        detect(CFGAnomalyPipeline(toy_unet(), scheduler), [root], tmp_path / "other", progress=False)


def test_our_map_is_the_originals_sum_over_channels_divided_by_their_number(scheduler):
    unet = toy_unet(in_channels=4, out_channels=8)
    x0 = torch.rand(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    output = run_as_original(unet, x0, noise_level=3, num_steps=50, scheduler=scheduler, progress=False)
    assert torch.equal(output.maps["summed"], (x0 - output.sample).abs().sum(dim=1))
    torch.testing.assert_close(output.anomaly_map * 4, output.maps["summed"])


def test_the_loader_has_its_name():
    with pytest.raises(ValueError, match="give 'root'"):
        build_dataset("brats")
