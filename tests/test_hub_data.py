"""Data sets on the Hub, against a stand-in on 127.0.0.1: sent, read back, streamed, trained on, measured on."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets import Image as DatasetImage
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from cxr_diffusers import load_folder, load_hub, load_phantom, publish_dataset
from cxr_diffusers.cli import build_parser, main
from cxr_diffusers.data.hub import check_columns
from cxr_diffusers.data.images import decode_image
from cxr_diffusers.hub.datasets import (
    agreement_of,
    card,
    count_table,
    pseudonymised,
    size_category,
    with_relative_paths,
    with_same_columns,
    with_texts,
    without_metadata,
)
from cxr_diffusers.hub.metadata import strip_metadata
from local_hub import local_hub, run_script

ROOT = Path(__file__).parent.parent
NET = ["unet.sample_size=16", "unet.block_out_channels=[8, 8, 8]", "unet.attention_head_dim=8"]
NET += ["unet.norm_num_groups=4", "unet.attn_norm_num_groups=4"]
NOISY = ["classifier.block_out_channels=[8, 16]", "classifier.norm_num_groups=4", "classifier.attention_head_dim=8"]
NOISY += ["classifier.down_block_types=[ResnetDownsampleBlock2D, AttnDownBlock2D]", "diffusion.model=runs/train_cfg"]
GAN = ["generator.sample_size=16", "generator.base_channels=4", "generator.num_res_blocks=1"]
GAN += ["discriminator.base_channels=4", "train.n_critic=1"]
SCRIPTS = {"train_cfg": NET, "train_unconditional": NET, "train_classifier": NOISY, "train_fixed_point_gan": GAN}
CODE = {
    "train_cfg": "pipeline_cfg_anomaly_",
    "train_unconditional": "pipeline_diffpir_deblur_",
    "train_classifier": "classifier/noisy_classifier_",
    "train_fixed_point_gan": "generator/fixed_point_gan_",
}


@pytest.fixture
def folder(tmp_path):
    """healthy/ with one 16-bit image, diseased/ with one that has a mask and one that has a box; named patients."""
    rng = np.random.default_rng(0)
    for home, name in (("healthy", "ADA"), ("diseased", "BOB"), ("diseased", "CLEO")):
        (tmp_path / "mine" / home / name).mkdir(parents=True)
        depth = np.uint16 if name == "ADA" else np.uint8
        image = rng.integers(0, np.iinfo(depth).max, (20, 40)).astype(depth)
        Image.fromarray(image).save(tmp_path / "mine" / home / name / "scan_of_somebody.png")
    mask = np.zeros((20, 40), np.uint8)
    mask[4:12, 8:20] = 255
    Image.fromarray(mask).save(tmp_path / "mine" / "diseased" / "BOB" / "scan_of_somebody_mask.png")
    (tmp_path / "mine" / "diseased" / "CLEO" / "scan_of_somebody.txt").write_text("4 2 8 6\n")
    return tmp_path / "mine"


def same(a, b):
    """Every row of two data sets is the same, images to the pixel; of `path`, the end."""
    for ours, theirs in zip(a, b, strict=True):
        for name, value in ours.items():
            if name == "path":
                assert value.endswith(theirs[name])
            elif isinstance(value, Image.Image):
                assert value.mode == theirs[name].mode
                np.testing.assert_array_equal(value, theirs[name])
            else:
                assert value == theirs[name], name
    return True


STORY = """if True:
    import importlib.util, json, warnings
    from pathlib import Path
    import numpy as np
    import torch
    from cxr_diffusers import load_folder, load_hub, load_phantom
    from cxr_diffusers.cli import main
    from cxr_diffusers.data.hub import datasets
    from test_hub_data import ROOT, SCRIPTS, same
    torch.set_num_threads(1)

    licence = ["--license", "cc-by-4.0"]
    test_split = ["--split", "test=phantom:n=4,seed=1,size=32"]
    assert main(["publish-data", "phantom:n=8,size=32", "me/phantoms", *test_split, *licence, "--about", "Drawn."]) == 0
    assert main(["publish-data", "mine", "me/mine", *licence, "--private"]) == 0
    assert main(["publish-data", "mine", "me/numbered", *licence, "--pseudonyms"]) == 0
    # what is there and public is not made private by saying so
    assert main(["publish-data", "mine", "me/numbered", *licence, "--private"]) == 2

    assert same(load_phantom(8, size=32), load_hub("me/phantoms"))
    assert same(load_phantom(4, seed=1, size=32), load_hub("me/phantoms", split="test"))
    mine, numbered = load_hub("me/mine"), load_hub("me/numbered")
    assert same(load_folder("mine"), mine)
    assert same(mine.remove_columns(["patient", "path"]), numbered.remove_columns(["patient", "path"]))
    assert len(load_hub("me/phantoms", limit=3)) == 3

    whole = load_hub("me/mine", streaming=True)
    assert same(mine, whole), "a stream loses nothing"
    assert same(load_phantom(2, size=32), load_hub("me/phantoms", streaming=True, limit=2))
    small = load_hub("me/mine", streaming=True, size=16)
    # diseased/BOB, diseased/CLEO, healthy/ADA: 40 x 20 shrinks to 16 x 8 in the middle of 16 x 16
    assert {row["image"].size for row in small} == {(16, 16)} and small[2]["image"].mode == "I;16"
    found = np.argwhere(np.asarray(small[0]["mask"]) > 0)
    assert (found.min(0) == [4 + 2, 3]).all() and (found.max(0) == [4 + 4, 7]).all(), found
    np.testing.assert_allclose(small[1]["boxes"], [[1.6, 4.8, 3.2, 2.4]], rtol=1e-6)
    before = small.cache_files
    assert load_hub("me/mine", streaming=True, size=16).cache_files == before, "kept, not streamed again"
    assert load_hub("me/mine", streaming=True, size=8).cache_files != before

    for name, options in SCRIPTS.items():
        spec = importlib.util.spec_from_file_location(name, ROOT / "training" / f"{name}.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        data = ["data.name=hub", "data.path=me/phantoms", f"train.output_dir=runs/{name}"]
        data += ["validation.split=test"] if name != "train_unconditional" else []
        hub = ["--push_to_hub", "--hub_model_id", f"me/{name}"]
        data += ["train.validation_images=1"] if name != "train_classifier" else []
        script.main([*options, *data, "train.max_steps=2", "train.batch_size=4", *hub])
    quick = ["--bootstrap", "10", "--num-inference-steps", "4"]
    assert main(["evaluate", "hub:path=me/phantoms,split=test", "--model", "me/train_cfg", "--out", "out", *quick]) == 0
    print(json.dumps(numbered.remove_columns(["image", "mask"])[:]))
"""


def test_a_data_set_goes_to_the_hub_and_comes_back_to_be_trained_and_measured_on(folder, tmp_path):
    with local_hub() as hub:
        script = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n{STORY}"
        numbered = json.loads(run_script(hub, script, tmp_path))
        assert hub.private == {"datasets/me/mine"}
        files = {name: hub.files(name) for name in hub.repositories}

    assert set(numbered["patient"]) == {"patient000001", "patient000002", "patient000003"}
    assert numbered["path"] == ["train/000001", "train/000002", "train/000003"]
    shards = b"".join(content for path, content in files["datasets/me/numbered"].items() if path.endswith(".parquet"))
    assert b"somebody" not in shards and b"BOB" not in shards and str(tmp_path).encode() not in shards
    shards = b"".join(files["datasets/me/mine"].values())
    assert b"somebody" in shards and str(tmp_path).encode() not in shards, "no path of the disk at home"

    text = DatasetCard(files["datasets/me/phantoms"]["README.md"].decode())
    assert text.data.license == "cc-by-4.0" and text.data.task_categories == [
        "image-classification",
        "image-segmentation",
    ]
    assert {split["name"]: split["num_examples"] for split in text.data.dataset_info["splits"]} == {
        "train": 8,
        "test": 4,
    }
    assert "| train | 8 | 8 | 4 | 4 | 8 |" in text.text and "Drawn." in text.text

    for name in SCRIPTS:
        model = files[f"me/{name}"]
        assert {"model_index.json", "README.md"} <= set(model)
        assert sum(path.startswith(CODE[name]) and path.endswith(".py") for path in model) == 1
        assert not [path for path in model if path.startswith(("checkpoint", "validation", "log", "run"))]
        about = ModelCard(model["README.md"].decode())
        assert about.data.datasets == ["me/phantoms"] and "path=me/phantoms" in about.text
        assert f'from_pretrained("me/{name}", trust_remote_code=True)' in about.text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["n_images"], summary["n_with_region"]) == (4, 2), "masks come along"
    assert summary["method"]["pixel_ap"]["value"] > 0


def test_nothing_goes_out_without_a_licence(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["publish-data", "phantom:n=2", "me/x"])
    assert "--license" in capsys.readouterr().err
    for license in ("", None, "my own words"):
        with pytest.raises(ValueError, match="identifier as cc-by-4.0"):
            publish_dataset(load_phantom(2), "me/x", license=license)
    assert build_parser().parse_args(["publish-data", "d", "me/x", "--license", "mit"]).license == "mit"


@pytest.mark.parametrize(
    ("words", "paths", "agreement"),
    [
        ("chexpert:root=/data/small", ["train/1.jpg"], "CheXpert"),
        ("/data/copy", ["/data/copy/train/patient00001/study1/view1_frontal.png"], "CheXpert"),
        ("vindr:root=/data/v", ["train/1.png"], "VinDr-CXR"),
        ("hub:path=them/MIMIC-CXR", ["train/1.png"], "MIMIC-CXR"),
        ("/data/mine", ["/data/mine/patient1/1.png"], None),
        ("", ["phantom/seed0/000001"], None),
    ],
)
def test_images_under_an_agreement_are_recognised(words, paths, agreement):
    assert agreement_of({"train": {"path": ["a", *paths]}}, words) == agreement


def test_images_under_an_agreement_are_refused_before_anything_is_made():
    """Nothing listens where the Hub would be: whoever asked it would get another error."""
    data = load_phantom(2, size=16)
    splits = {"train": data, "test": with_texts(data, path=["CheXpert-v1.0/train/a.jpg"] * 2)}
    with pytest.raises(PermissionError, match="CheXpert.*`private`.*`may_share`"):
        publish_dataset(splits, "me/x", license="other")
    with pytest.raises(PermissionError, match="VinDr"):
        publish_dataset(data, "me/x", license="other", opened_as="vindr:root=/data")


def test_splits_are_made_alike(folder):
    plain = load_phantom(2, size=16).remove_columns("mask")
    boxed = plain.add_column("boxes", [[[1.0, 2.0, 3.0, 4.0]], []])
    made = with_same_columns({"train": plain, "test": load_phantom(2, seed=1, size=16), "boxes": boxed})
    assert {tuple(result.column_names) for result in made.values()} == {
        ("image", "label", "patient", "view", "path", "mask", "boxes")
    }
    assert all(split.features == made["train"].features for split in made.values())
    assert made["train"]["mask"][:] == [None, None] and made["train"]["boxes"][:] == [[], []]
    assert made["boxes"]["boxes"][:] == [[[1, 2, 3, 4]], []] and made["test"][1]["mask"].size == (16, 16)


def test_paths_lose_their_common_folders_only(folder):
    data = load_folder(folder)
    assert with_relative_paths(data)["path"][:] == [
        "diseased/BOB/scan_of_somebody.png",
        "diseased/CLEO/scan_of_somebody.png",
        "healthy/ADA/scan_of_somebody.png",
    ]
    assert with_relative_paths(data.select([0]))["path"][:] == ["scan_of_somebody.png"]
    assert with_relative_paths(data).column_names == data.column_names


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/x/y/a.png", "/x/b.png", ""], ["y/a.png", "b.png", ""]),
        (["{here}/c/a.png", "c/d/b.png"], ["a.png", "d/b.png"]),
        (["", ""], ["", ""]),
    ],
)
def test_unknown_paths_and_mixed_absolute_and_relative_paths_are_handled(paths, expected):
    paths = [path.format(here=Path.cwd()) for path in paths]
    data = Dataset.from_dict({"path": paths, "label": [0] * len(paths)})
    assert with_relative_paths(data)["path"][:] == expected


def test_no_name_of_a_mask_goes_out_under_a_pseudonym(tmp_path):
    for name in ("SOMEBODY.png", "SOMEBODY_mask.png"):
        Image.new("L", (16, 16), 255).save(tmp_path / name)
    rows = {"image": [str(tmp_path / "SOMEBODY.png")] * 2, "mask": [str(tmp_path / "SOMEBODY_mask.png"), None]}
    data = Dataset.from_dict({**rows, "patient": ["S", "S"], "path": ["SOMEBODY", "SOMEBODY"]})
    data = data.cast_column("image", DatasetImage()).cast_column("mask", DatasetImage())
    made = without_metadata(data, keep_names=False)
    bare = made.cast_column("image", DatasetImage(decode=False)).cast_column("mask", DatasetImage(decode=False))
    assert [bare[0]["image"]["path"], bare[0]["mask"]["path"], bare[1]["mask"]] == [None, None, None]
    assert bare[0]["mask"]["bytes"] == (tmp_path / "SOMEBODY_mask.png").read_bytes()


def file_with_metadata(mode, suffix):
    """An image file whose metadata name somebody, as its format can hold them."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (24, 40), dtype=np.uint8))
    deep = np.uint16 if mode == "I;16" else np.float32
    image = Image.fromarray((np.asarray(image) * 257.0).astype(deep)) if mode in ("I;16", "F") else image.convert(mode)
    exif = Image.Exif()
    exif[0x010E] = "SOMEBODY"
    options = {"exif": exif}
    if suffix == "png":
        text = PngInfo()
        text.add_text("Patient", "SOMEBODY")
        text.add_text("Long", "SOMEBODY" * 9, zip=True)
        options |= {"pnginfo": text, "icc_profile": b"SOMEBODY"}
    elif suffix == "jpg":
        options |= {"comment": b"SOMEBODY", "icc_profile": b"SOMEBODY", "dpi": (72, 72)}
    elif suffix == "progressive.jpg":
        options |= {"comment": b"SOMEBODY", "progressive": True}
    elif suffix == "tif":
        options = {"description": "SOMEBODY", "software": "SOMEBODY"}
    elif suffix == "bmp":
        options = {}
    with io.BytesIO() as buffer:
        image.save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix.split(".")[-1], suffix), **options)
        return buffer.getvalue() + b"SOMEBODY"


FILES = [(mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
FILES += [(mode, suffix) for suffix in ("jpg", "progressive.jpg") for mode in ("L", "RGB", "CMYK")]
FILES += [(mode, "tif") for mode in ("1", "L", "RGB", "I;16", "F", "CMYK")]
FILES += [(mode, "bmp") for mode in ("L", "RGB")] + [("RGB", "webp"), ("P", "gif")]


@pytest.mark.parametrize(("mode", "suffix"), FILES)
def test_metadata_are_stripped_and_pixels_stay(mode, suffix):
    content = file_with_metadata(mode, suffix)
    assert b"SOMEBODY" in content
    stripped = strip_metadata(content)
    before, after = Image.open(io.BytesIO(content)), Image.open(io.BytesIO(stripped))
    assert after.mode == before.mode
    np.testing.assert_array_equal(after, before)
    if before.palette:
        np.testing.assert_array_equal(after.convert("RGBA"), before.convert("RGBA"))
    assert b"SOMEBODY" not in stripped and "exif" not in after.info and "icc_profile" not in after.info
    assert not getattr(after, "text", {}) and "comment" not in after.info
    assert strip_metadata(stripped) == stripped or suffix == "tif", "a stripped file has nothing left to lose"


@pytest.mark.parametrize("suffix", ["png", "jpeg", "tiff"])
def test_an_image_that_exif_turns_is_stored_turned(suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    with io.BytesIO() as buffer:
        Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12)).save(buffer, suffix, exif=exif)
        content = buffer.getvalue()
    after = Image.open(io.BytesIO(strip_metadata(content)))
    assert after.size == (8, 12) and after.getexif().get(0x0112, 1) == 1
    np.testing.assert_array_equal(after, ImageOps.exif_transpose(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white_is_not_published_as_a_negative(dtype):
    dark_to_bright = np.arange(96, dtype=dtype).reshape(8, 12) * (np.iinfo(dtype).max // 96)
    with io.BytesIO() as buffer:
        Image.fromarray(dark_to_bright).save(buffer, "tiff", tiffinfo={262: 0})
        content = buffer.getvalue()
    published = Image.open(io.BytesIO(strip_metadata(content)))
    np.testing.assert_array_equal(published, decode_image(content))


@pytest.mark.parametrize("suffix", ["png", "jpg", "progressive.jpg", "tif"])
def test_a_file_that_is_cut_is_refused_before_it_is_published(suffix):
    content = file_with_metadata("L", suffix)
    for length in (0, 1, 20, len(content) // 2, len(content) - 12):
        with pytest.raises(ValueError, match="expected a whole image file"):
            strip_metadata(content[:length])


def test_a_broken_image_is_named_without_its_folder(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    data = Dataset.from_dict({"image": [str(tmp_path / "broken.png")]}).cast_column("image", DatasetImage())
    with pytest.raises(ValueError, match="^broken.png: expected a whole image file"):
        without_metadata(data, keep_names=True)


def test_a_patient_has_one_number_in_all_splits():
    splits = {"train": load_phantom(3, size=16), "test": load_phantom(2, size=16)}
    made = pseudonymised(splits)
    assert made["train"]["patient"][:2] == made["test"]["patient"][:] != splits["test"]["patient"][:]
    assert same(made["train"].select_columns(["image", "label"]), splits["train"].select_columns(["image", "label"]))


def test_splits_that_do_not_go_together_are_refused():
    data = load_phantom(2, size=16)
    other = data.cast_column("label", ClassLabel(names=["healthy", "pneumonia"]))
    with pytest.raises(ValueError, match="same classes.*pneumonia"):
        publish_dataset({"train": data, "test": other}, "me/x", license="mit")
    with pytest.raises(ValueError, match="same further columns.*site"):
        publish_dataset({"train": data, "test": data.add_column("site", ["a", "b"])}, "me/x", license="mit")
    with pytest.raises(ValueError, match="'test' is empty"):
        publish_dataset({"train": data, "test": data.select([])}, "me/x", license="mit")
    with pytest.raises(ValueError, match="at least one split"):
        publish_dataset({}, "me/x", license="mit")
    with pytest.raises(ValueError, match="'label' to be datasets.ClassLabel"):
        publish_dataset(Dataset.from_dict({"image": data["image"][:], "label": [0, 1]}), "me/x", license="mit")


@pytest.mark.parametrize(
    ("column", "values"),
    [("mask", ["a.png", "b.png"]), ("boxes", [[1, 2, 3, 4], []]), ("boxes", ["1 2 3 4", ""])],
)
def test_masks_and_boxes_of_another_kind_are_refused(column, values):
    data = load_phantom(2, size=16).remove_columns("mask").add_column(column, values)
    with pytest.raises(ValueError, match=f"'{column}' to be"):
        check_columns(data.features, "me/x")


def test_a_card_describes_its_data_set(folder):
    splits = with_same_columns({"train": load_folder(folder), "test": load_folder(folder).select([1])})
    text = DatasetCard(card(splits, "me/mine", None, False, license="other", license_link="https://terms"))
    assert text.data.license == "other" and text.data.license_link == "https://terms"
    assert text.data.task_categories == ["image-classification", "image-segmentation", "object-detection"]
    assert (
        "has not described" in text.text
        and "Research use only" in text.text
        and "hub:path=me/mine,split=test" in text.text
    )
    # split, images, patients, healthy, diseased, with a region
    assert "| train | 3 | 3 | 1 | 2 | 2 |" in count_table(splits) and "| test | 1 | 1 | 0 | 1 | 1 |" in count_table(
        splits
    )
    for column in splits["train"].column_names:
        assert f"| `{column}` |" in text.text
    bare = load_folder(folder / "healthy" / "ADA")
    assert "| train | 1 | 1 | 0 | 0 | 1 | 0 |" in count_table({"train": bare}) and "not labelled" in count_table(
        {"train": bare}
    )


def test_size_categories_are_those_of_the_hub():
    assert [size_category(n) for n in (999, 1000, 99_999, 10**7)] == ["n<1K", "1K<n<10K", "10K<n<100K", "n>10M"]


def test_a_folder_is_not_streamed_and_a_size_is_only_for_streams(tmp_path):
    load_phantom(2, size=16).to_parquet(tmp_path / "a.parquet")
    assert load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "c")).num_rows == 2
    assert main(["evaluate", f"hub:path={tmp_path},streaming=true", "--out", str(tmp_path / "o")]) == 2
    assert main(["evaluate", f"hub:path={tmp_path},size=16", "--out", str(tmp_path / "o")]) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("one", {"split": "test"}, "one: expected `split` train, got 'test'"),
        ("two", {"split": "valid"}, "two: expected `split` train or test, got 'valid'"),
        ("one", {"config": "small"}, "one: expected no `config` of a saved data set, got 'small'"),
        ("one", {"revision": "v1"}, "expected `revision` of a data set on the Hub only, got 'v1' of the folder .*one"),
        ("one", {"aspect": "crop"}, "expected `aspect` with `size` only, got 'crop'"),
    ],
)
def test_an_option_that_a_saved_data_set_does_not_have_is_refused(tmp_path, name, options, message):
    data = load_phantom(2, size=16)
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "two")
    assert len(load_hub(tmp_path / name)) == 2 and len(load_hub(tmp_path / "two", split="test")) == 1
    with pytest.raises(ValueError, match=message):
        load_hub(tmp_path / name, **options)
