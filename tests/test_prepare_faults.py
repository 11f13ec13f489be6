"""`prepare` when sources change, files are broken, disks are full and processes are killed."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cxr_diffusers.cli import main
from cxr_diffusers.data import list_images, load_folder, preparation, prepare, read_image
from cxr_diffusers.files import remove_dead, write
from helpers import save_image, write_chexpert

COMMAND = "from cxr_diffusers.cli import main; import sys; sys.exit(main(sys.argv[1:]))"


def start(*arguments, **options):
    command = [sys.executable, "-c", COMMAND, "prepare", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=Path(__file__).parent.parent, **pipes, **options)


def children(process):
    try:
        return [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except OSError:
        return []


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def many(tmp_path):
    """One large image under many names: each takes a tenth of a second."""
    folder = tmp_path / "many"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 65536, (1200, 1200), dtype=np.uint16)
    PIL.Image.fromarray(noise).save(folder / "000.png", compress_level=1)
    for i in range(1, 80):
        os.link(folder / "000.png", folder / f"{i:03d}.png")
    return folder


def test_a_changed_source_is_copied_anew(tmp_path):
    first, second = (save_image(tmp_path / "in" / f"{name}.png", 50) for name in "ab")
    prepare(tmp_path / "in", tmp_path / "out", size=16)
    stayed = (tmp_path / "out" / "b.png").stat().st_mtime_ns
    save_image(first, 200, size=(20, 20))
    summary = prepare(tmp_path / "in", tmp_path / "out", size=16)
    assert (summary["written"], summary["kept"]) == (1, 1)
    assert read_image(tmp_path / "out" / "a.png").getpixel((8, 8)) == 200
    assert (tmp_path / "out" / "b.png").stat().st_mtime_ns == stayed
    os.utime(second, (1, 1))  # as large as it was, and yet another
    assert prepare(tmp_path / "in", tmp_path / "out", size=16)["written"] == 1
    assert prepare(tmp_path / "in", tmp_path / "out", size=16)["kept"] == 2
    first.write_bytes(b"broken")
    assert prepare(tmp_path / "in", tmp_path / "out", size=16)["failed"] == 1
    assert not (tmp_path / "out" / "a.png").exists(), "the copy of an image that is no more"


def test_copies_of_sources_that_are_no_longer_there_are_deleted(tmp_path):
    source, copy = tmp_path / "in", tmp_path / "out"
    for name in ("healthy/a.png", "healthy/ä.png", "diseased/b.png", "diseased/b_mask.png"):
        save_image(source / name)
    (source / "diseased" / "b.txt").write_text("1 1 5 5\n")
    (source / "boxes.csv").write_text("file,x,y,w,h\ndiseased/b.png,2,2,3,3\n")
    prepare(source, copy, size=16)
    (source / "healthy" / "a.png").rename(source / "diseased" / "a.png")  # its label was wrong
    for name in ("healthy/ä.png", "diseased/b_mask.png", "diseased/b.txt", "boxes.csv"):
        (source / name).unlink()
    prepare(source, copy, size=16)
    ours, theirs = load_folder(copy), load_folder(source)
    assert ours["label"][:] == theirs["label"][:] == [1, 1]
    assert ours.column_names == theirs.column_names, "boxes or masks of the older copy are still there"


def test_copies_are_not_deleted_for_another_data_set(tmp_path):
    for name in ("one/healthy/a.png", "two/diseased/b.png"):
        save_image(tmp_path / name)
    prepare(tmp_path / "one", tmp_path / "out", size=16)
    with pytest.raises(
        ValueError, match="expected the data set that the 1 copies in .*out were made of, got one that none"
    ):
        prepare(tmp_path / "two", tmp_path / "out", size=16)
    assert (tmp_path / "out" / "healthy" / "a.png").is_file() and not (tmp_path / "out" / "diseased").exists()


def test_a_copy_that_is_made_anew_in_another_format_is_there_once(tmp_path):
    save_image(tmp_path / "in" / "diseased" / "a.png")
    (tmp_path / "in" / "diseased" / "a.txt").write_text("1 1 5 5\n")
    prepare(tmp_path / "in", tmp_path / "out", size=16)
    prepare(tmp_path / "in", tmp_path / "out", size=8, image_format="jpg", overwrite=True)
    assert [row["image"].size for row in load_folder(tmp_path / "out")] == [(8, 8)]


def test_a_source_that_changes_while_it_is_read_is_copied_anew_the_next_time(tmp_path, monkeypatch):
    source = save_image(tmp_path / "in" / "a.png", 50)

    def read_and_change(path, **options):
        image = read_image(path, **options)
        save_image(source, 200, size=(20, 20))
        return image

    monkeypatch.setattr(preparation, "read_image", read_and_change)
    prepare(tmp_path / "in", tmp_path / "out", size=16)
    monkeypatch.undo()
    assert prepare(tmp_path / "in", tmp_path / "out", size=16)["written"] == 1
    assert read_image(tmp_path / "out" / "a.png").getpixel((8, 8)) == 200


def test_a_list_of_sources_that_a_crash_cut_off_costs_only_time(tmp_path):
    for name in "abc":
        save_image(tmp_path / "in" / f"{name}.png", 50)
    prepare(tmp_path / "in", tmp_path / "out", size=16)
    stamps = tmp_path / "out" / "prepare_sources.jsonl"
    stamps.write_text(stamps.read_text()[:-5] + '\n{"a": 1}\n[[1], 2]\n\x00')
    summary = prepare(tmp_path / "in", tmp_path / "out", size=16)
    assert (summary["written"], summary["kept"]) == (1, 2)
    assert prepare(tmp_path / "in", tmp_path / "out", size=16)["kept"] == 3


def test_broken_images_are_told_by_the_exit_code(tmp_path, capsys):
    good = save_image(tmp_path / "in" / "good.png")
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--size", "16"]) == 0
    (tmp_path / "in" / "bad.png").write_bytes(b"broken")
    (tmp_path / "in" / "dangling.png").symlink_to("nowhere")
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--size", "16"]) == 1
    good.write_bytes(b"broken")
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--size", "16"]) == 1
    assert "0 images (0 were there), 3 skipped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is damaged"):
        (tmp_path / "out" / preparation.SETTINGS).write_text("")
        prepare(tmp_path / "in", tmp_path / "out", size=16)


def test_odd_names_are_copied(tmp_path):
    names = [b"\xff\xfe.png", b"two\nlines.png", ("胸" * 80 + ".png").encode()]
    image = save_image(tmp_path / "a.png").read_bytes()
    (tmp_path / "in").mkdir()
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path / "in"), name), "wb") as file:
            file.write(image)
    with open(os.path.join(os.fsencode(tmp_path / "in"), b"bad\xff.png"), "wb") as file:
        file.write(b"broken")
    summary = prepare(tmp_path / "in", tmp_path / "out", size=16)
    assert b"bad\xff.png,broken image" in (tmp_path / "out" / preparation.SKIPPED).read_bytes()
    assert summary["images"] == 3 and {os.fsencode(p.name) for p in list_images(tmp_path / "out")} == set(names)
    assert prepare(tmp_path / "in", tmp_path / "out", size=16)["kept"] == 3


def test_a_name_that_is_too_long_for_a_copy_is_one_broken_image(tmp_path):
    from helpers import write_dicom

    (tmp_path / "in").mkdir()
    save_image(tmp_path / "in" / "a.png")
    short = write_dicom(tmp_path / "in" / "short", np.arange(64, dtype=np.uint16).reshape(8, 8), 12)
    short.rename(tmp_path / "in" / ("d" * 254))
    summary = prepare(tmp_path / "in", tmp_path / "out", size=16)
    assert summary["images"] == 1 and summary["reasons"] == {"name too long for a copy": 1}


def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_failed_write_stops_the_run_in_one_line_and_leaves_nothing_behind(tmp_path, workers):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(40):
        PIL.Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(tmp_path / "in" / f"{i:02d}.png")
    process = start(tmp_path / "in", tmp_path / "out", "--size", 64, "--workers", workers, preexec_fn=limited)
    _, told = process.communicate(timeout=100)
    lines = [line for line in told.splitlines() if line.startswith("cxr-diffusers")]
    assert process.returncode == 2 and len(lines) == 1 and "cannot write" in lines[0] and "Traceback" not in told
    assert not list((tmp_path / "out").rglob("*.tmp")) and not list((tmp_path / "out").rglob("*.png"))
    summary = prepare(tmp_path / "in", tmp_path / "out", size=64, num_workers=1)
    assert summary["written"] == 40


def test_the_temporary_files_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=60)
    folder = tmp_path / "out" / "sub"
    folder.mkdir(parents=True)
    dead, living, old = (folder / f".a.png.{n}.tmp" for n in (gone.pid, os.getpid(), os.getppid()))
    others = [folder / name for name in ("notes.tmp", ".x.tmp", "a.12.tmp")]
    for path in (dead, living, old, *others):
        path.write_text("half")
    os.utime(old, (1, 1))
    left = remove_dead(tmp_path / "out")
    assert not dead.exists() and not old.exists() and living.exists() and all(path.exists() for path in others)
    assert left == {f"sub/{path.name}" for path in (living, *others)}


def test_a_write_that_fails_names_its_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*a\.txt: No space left on device"):
        write(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_killed_worker_costs_a_line_and_no_image(tmp_path, many):
    process = start(many, tmp_path / "out", "--size", 16, "--workers", 2)
    wait_for(lambda: list((tmp_path / "out").glob("*.png")))
    os.kill(children(process)[0], signal.SIGKILL)
    out, told = process.communicate(timeout=100)
    assert process.returncode == 0, told
    assert told.count("a worker was killed") == 1 and "Traceback" not in told
    assert len(list((tmp_path / "out").glob("*.png"))) == 80 and "80 images" in out


@pytest.mark.slow
def test_workers_that_are_killed_again_and_again_end_the_run(tmp_path, many):
    process = start(many, tmp_path / "out", "--size", 16, "--workers", 2)
    killed = set()
    while process.poll() is None and len(killed) < 100:
        for child in set(children(process)) - killed:
            killed.add(child)
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    _, told = process.communicate(timeout=100)
    assert process.returncode == 2 and "workers were killed 3 times" in told and "Traceback" not in told


def test_the_workers_of_a_killed_parent_end(tmp_path, many):
    process = start(many, tmp_path / "out", "--size", 16, "--workers", 2)
    wait_for(lambda: list((tmp_path / "out").glob("*.png")))
    workers = children(process)
    assert len(workers) == 2
    process.kill()
    process.wait(timeout=60)
    wait_for(lambda: not any(alive(worker) for worker in workers), seconds=10)
    summary = prepare(many, tmp_path / "out", size=16, num_workers=1)
    assert summary["images"] == 80 and not list((tmp_path / "out").rglob("*.tmp"))
    copies = {path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert len(copies) == 1, "each is the copy of the same image"


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_all_that_is_wrong_with_one_row_is_in_the_list(tmp_path):
    source = write_chexpert(tmp_path / "in")
    (source / "train/patient00000/study1/view1_frontal.jpg").write_bytes(b"")
    summary = prepare(source, tmp_path / "out", size=16, num_workers=1)
    assert summary["failed"] == 1 and summary["images"] == 47
    assert json.loads((tmp_path / "out" / preparation.SUMMARY).read_text()) == summary
    assert "the file is empty" in (tmp_path / "out" / preparation.SKIPPED).read_text()
