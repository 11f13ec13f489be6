"""Checkpoints are verified: a damaged one is passed over, and the run continues from an older one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cxr_diffusers.training.checkpoints import DIGESTS, FolderLock, checkpoints, find_damage
from helpers import assert_same, log_of, train_toy


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 6 steps with the checkpoints of steps 4 and 6, and the one to compare with, of 8 steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_toy(folder / "six", 6)
    return folder / "six", train_toy(folder / "eight", 8)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "ema.safetensors", "random_states_0.pkl"])
def test_a_damaged_file_of_the_newest_checkpoint_means_the_one_before(undisturbed, tmp_path, capsys, name, damage):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-0000006" / name)
    log, weights = train_toy(tmp_path / "run", 8)
    printed = capsys.readouterr().out
    assert f"checkpoint-0000006/{name}" in printed and "Traceback" not in printed
    assert log == undisturbed[1][0]
    assert_same(weights, undisturbed[1][1])
    assert all(find_damage(folder) is None for folder in checkpoints(tmp_path / "run"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model.safetensors": ', '{"ema.safetensors": 3}'])
def test_damaged_digests_mean_the_checkpoint_before(undisturbed, tmp_path, capsys, content):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint-0000006" / DIGESTS).write_text(content)
    assert train_toy(tmp_path / "run", 8)[0] == undisturbed[1][0]
    assert "checkpoint-0000006/" in capsys.readouterr().out


def test_stray_folders_beside_the_checkpoints_are_ignored(undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    for name in ("checkpoint-old", "checkpoint-0000007.bak", "checkpoint-", "checkpoint-best"):
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / "checkpoint-0000007").mkdir()
    (tmp_path / "run" / "checkpoint-0000009").write_text("a file")
    assert train_toy(tmp_path / "run", 8)[0] == undisturbed[1][0]
    assert "checkpoint-0000007" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-old").is_dir()


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])
@pytest.mark.parametrize("name", ["run.json", "log.jsonl"])
def test_a_damaged_record_of_the_run_is_restored_from_the_checkpoint(undisturbed, tmp_path, capsys, name, damage):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    before = (tmp_path / "run" / name).read_bytes()
    damage(tmp_path / "run" / name)
    if name == "run.json" and damage is flip_a_bit:
        (tmp_path / "run" / name).write_bytes(b"\xff" + before)
    log, weights = train_toy(tmp_path / "run", 8)
    assert log == undisturbed[1][0] and f"{name} is damaged" in capsys.readouterr().out
    if name == "run.json":
        assert (tmp_path / "run" / name).read_bytes() == before
    assert_same(weights, undisturbed[1][1])


def test_without_an_intact_checkpoint_training_starts_from_the_beginning_with_a_message(undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    for folder in checkpoints(tmp_path / "run"):
        empty(folder / "model.safetensors")
    log, weights = train_toy(tmp_path / "run", 8)
    assert "no intact checkpoint: training starts anew" in capsys.readouterr().out
    assert log == undisturbed[1][0]
    assert_same(weights, undisturbed[1][1])


def test_a_checkpoint_without_digests_of_an_older_version_is_resumed(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    for folder in checkpoints(tmp_path / "run"):
        for name in (DIGESTS, "run.json", "log.jsonl"):
            (folder / name).unlink()
    log, weights = train_toy(tmp_path / "run", 8)
    assert log == undisturbed[1][0]
    empty(tmp_path / "run" / "checkpoint-0000008" / "model.safetensors")
    (tmp_path / "run" / "checkpoint-0000008" / DIGESTS).unlink()
    with pytest.raises(ValueError, match="checkpoint-0000008 cannot be resumed from.*delete it"):
        train_toy(tmp_path / "run", 8)


def test_every_file_of_a_checkpoint_has_its_digest(undisturbed):
    newest = checkpoints(undisturbed[0])[-1]
    names = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    assert set(json.loads((newest / DIGESTS).read_text())) == names - {DIGESTS}
    assert {"run.json", "log.jsonl", "model.safetensors", "ema.safetensors"} <= names
    assert len(log_of(newest)) == 6


def test_leftovers_of_a_killed_run_are_removed(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint-0000007.tmp").mkdir()
    (tmp_path / "run" / ".0123456789abcdef.99999999.tmp").write_text("half")
    train_toy(tmp_path / "run", 8)
    assert not list((tmp_path / "run").rglob("*.tmp"))


HOLD = """if True:
    import sys, time
    from cxr_diffusers.training.checkpoints import FolderLock
    lock = FolderLock(sys.argv[1])
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_one_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match="is being written by another run"):
            train_toy(tmp_path, 2)
    finally:
        process.kill()
        process.wait(timeout=60)
    FolderLock(tmp_path).release()
    assert len(train_toy(tmp_path, 2)[0]) == 2
