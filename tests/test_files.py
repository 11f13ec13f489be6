"""Crash-safe writing, the settings of a folder, and names that every file system takes."""

import copy
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from cxr_diffusers.files import (
    as_json,
    cache_folder,
    check_settings,
    keep_settings,
    new_file,
    new_folder,
    remove_dead,
    remove_dead_of,
    safe_name,
    write_file,
)
from cxr_diffusers.fingerprints import fingerprint, image_digest


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "below" / "a.txt"
    write_file(path, b"old")
    with pytest.raises(RuntimeError), new_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert contents(tmp_path) == {"below/a.txt": "old"}
    write_file(path, b"new")
    assert contents(tmp_path) == {"below/a.txt": "new"}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), new_folder(folder) as temporary:
        (temporary / "new.txt").write_text("half")
        raise RuntimeError
    assert contents(tmp_path) == {"model/old.txt": "old"}
    with new_folder(folder) as temporary:
        (temporary / "new.txt").write_text("new")
    assert contents(tmp_path) == {"model/new.txt": "new"}
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "settings.json"
    keep_settings(path, {"size": (64, 64), "model": "a"})
    keep_settings(path, {"size": [64, 64], "model": "b"}, ignore=("model",))
    keep_settings(path, {"size": [64, 64], "model": "a", "later": 0}, defaults={"later": 0})
    for error in (FileExistsError, ValueError):
        with pytest.raises(error, match=r"other settings \(size: \[64, 64\], now 32\): give another folder"):
            check_settings(path, {"size": 32, "model": "a"})
    with pytest.raises(ValueError, match="later: None, now 1"):
        check_settings(path, {"size": [64, 64], "model": "a", "later": 1})
    with pytest.raises(ValueError, match="model: 'a', now None"):
        check_settings(path, {"size": [64, 64]})


def test_a_safe_name_stays_in_its_folder():
    assert safe_name("../a b:c/ä.png") == ".._a_b_c_ä.png"


def test_what_a_killed_process_left_beside_a_folder_is_removed_or_put_back(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(timeout=60)
    half, aside = tmp_path / f".model.{ended.pid}.tmp", tmp_path / f".model.{ended.pid}.old.tmp"
    living, other = tmp_path / f".model.{os.getppid()}.tmp", tmp_path / f".model.x.{ended.pid}.tmp"
    for folder in (half, aside, living, other):
        folder.mkdir()
    (aside / "weights").write_text("1")
    remove_dead_of(tmp_path / "model")  # killed between the two renames
    assert (tmp_path / "model" / "weights").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, other.name, "model"])
    aside.mkdir()
    with new_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("2")
    assert (tmp_path / "model" / "weights").read_text() == "2" and not aside.exists()
    remove_dead(tmp_path)  # folders, too
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "model"])


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_settings_that_are_large_arrays_differ_by_one_of_their_values(tmp_path, kind):
    """`repr` and `str` of an array of more than 1,000 values show six of them."""
    array = np.zeros((64, 64), np.float32)
    changed = array.copy()
    changed[30, 30] = 1
    first, second = {"kernel": kind(array)}, {"kernel": kind(changed)}
    assert as_json(first) == as_json({"kernel": kind(array.copy())}) != as_json(second)
    network = torch.nn.Linear(1, 1)
    assert fingerprint(network, first, 0) == fingerprint(network, {"kernel": kind(array.copy())}, 0)
    assert fingerprint(network, first, 0) != fingerprint(network, second, 0)
    keep_settings(tmp_path / "settings.json", first)
    with pytest.raises(ValueError):
        check_settings(tmp_path / "settings.json", second)


def test_the_digest_of_an_image_depends_on_its_palette():
    image = PIL.Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    other = image.copy()
    other.putpalette(image.getpalette()[::-1])
    assert image.tobytes() == other.tobytes()
    digests = [image_digest("", {"image": i}) for i in (image, image.copy(), other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1.0], dtype=torch.float64), torch.tensor([1 + 1e-10], dtype=torch.float64)),
        (torch.tensor([2**24]), torch.tensor([2**24 + 1])),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 3j])),
        (torch.tensor([True]), torch.tensor([1])),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0])),
        (torch.eye(3).to_sparse(), 2 * torch.eye(3).to_sparse()),
        (np.array([None] * 2000), np.array([None] * 1999 + [1])),
        (PIL.Image.new("L", (4, 4), 1), PIL.Image.new("L", (4, 4), 2)),
    ],
)
def test_values_that_differ_are_different_settings(one, other):
    assert as_json([one]) == as_json([copy.deepcopy(one)]) != as_json([other])


def test_a_palette_image_has_one_digest_before_and_after_it_is_decoded(tmp_path):
    PIL.Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P").save(tmp_path / "a.bmp")
    opened, decoded = PIL.Image.open(tmp_path / "a.bmp"), PIL.Image.open(tmp_path / "a.bmp")
    decoded.load()
    first = image_digest("", {"image": opened})
    assert first == image_digest("", {"image": opened}) == image_digest("", {"image": decoded})


def test_a_cache_that_cannot_be_made_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXR_DIFFUSERS_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="expected a cache that can be written, got .*file.*: set CXR_DIFFUSERS_CACHE"):
        cache_folder("exports")
    monkeypatch.setenv("CXR_DIFFUSERS_CACHE", str(tmp_path / "new"))
    assert cache_folder("exports").is_dir()
