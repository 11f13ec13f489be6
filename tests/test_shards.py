"""Shards: shares of one job on machines that know nothing of each other, and the run that writes the tables."""

import json
import os
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_diffusers import DiffPIRDeblurPipeline
from cxr_diffusers.cli import main
from cxr_diffusers.commands.options import print_shard
from cxr_diffusers.data import load_folder
from cxr_diffusers.data.preparation import prepare
from cxr_diffusers.deblurring.dataset import deblur
from cxr_diffusers.evaluation import compare
from cxr_diffusers.files import new_file, remove_dead
from cxr_diffusers.processes import Shard
from helpers import run_detect, toy_unet

ORDER = (2, 0, 1, 0)  # of three shards: any order, one of them twice


@pytest.fixture
def folder(tmp_path):
    """Ten images in two folders with tables, and one that cannot be read."""
    folder = tmp_path / "images"
    for i in range(10):
        path = folder / ("healthy" if i % 2 else "diseased") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 256, (20, 20), dtype=np.uint8)
        Image.fromarray(values).save(path)
    (folder / "diseased" / "broken.png").write_bytes(b"no image")
    pd.DataFrame({"file": ["healthy/1.png", "diseased/2.png"], "age": [50, 60]}).to_csv(folder / "a.csv", index=False)
    return folder


CHANGING = {"seconds", "seconds_per_image", "process", "processes", "written", "kept", "computed"}  # from run to run


def without_changing(value):
    if isinstance(value, dict):
        return {key: without_changing(item) for key, item in value.items() if key not in CHANGING}
    return [without_changing(item) for item in value] if isinstance(value, list) else value


def contents(folder):
    """{path: bytes} of all files but journals; tables without seconds, and JSON without `CHANGING`."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name in ("results.csv", "per_image.csv"):
            content = pd.read_csv(path, dtype=str).drop(columns=["seconds"], errors="ignore").to_csv().encode()
        elif path.suffix == ".json":
            content = json.dumps(without_changing(json.loads(content))).encode()
        if path.suffix != ".jsonl":
            files[path.relative_to(folder).as_posix()] = content
    return files


def tables(folder):
    return {path.name for path in folder.glob("*.csv")} | {path.name for path in folder.glob("*summary*")}


@pytest.mark.parametrize("late", [False, True])
def test_shards_of_detect_and_a_collecting_run_equal_one_run(pipeline, folder, tmp_path, late):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = dict(batch_size=1, save_panel=False)
    run_detect(pipeline, [folder], whole, **options)
    computed = {}
    for index in ORDER[: 2 if late else None]:
        summary = run_detect(pipeline, [folder], parts, shard=Shard(index, 3), **options)
        computed.setdefault(index, summary["computed"])
        assert not tables(parts)
    assert sum(computed.values()) < 10 if late else sum(computed.values()) == 10
    collected = run_detect(pipeline, [folder], parts, **options)
    assert collected["computed"] == 10 - sum(computed.values()) and len(collected["failed"]) == 1
    assert contents(parts) == contents(whole) and "failed.csv" in tables(parts)
    if late:  # the last shard arrives after the tables
        summary = run_detect(pipeline, [folder], parts, shard=Shard(1, 3), **options)
        assert summary["computed"] == 0 and contents(parts) == contents(whole)


def test_a_shard_takes_every_nth_image_of_all_also_when_others_are_done(pipeline, folder, tmp_path):
    shard = Shard(1, 4)
    run_detect(pipeline, [folder], tmp_path / "out", shard=Shard(0, 4), save_panel=False)
    first = {path.stem for path in (tmp_path / "out" / "rows").iterdir()}
    run_detect(pipeline, [folder], tmp_path / "out", shard=shard, save_panel=False)
    names = sorted(
        path.relative_to(folder).with_suffix("").as_posix().replace("/", "__") for path in folder.rglob("*.png")
    )
    assert first == set(names[::4]) - {"diseased__broken"} and shard.items == len(names[1::4])
    second = {path.stem for path in (tmp_path / "out" / "rows").iterdir()} - first
    assert second == set(names[1::4]) - {"diseased__broken"}


def test_shards_of_prepare_and_a_collecting_run_equal_one_run(folder, tmp_path):
    whole, parts = tmp_path / "whole" / "copy", tmp_path / "parts" / "copy"
    prepare(folder, whole, size=16, num_workers=1)
    for index in ORDER:
        prepare(folder, parts, size=16, num_workers=1, shard=Shard(index, 3))
        assert not tables(parts)
    summary = prepare(folder, parts, size=16, num_workers=1)
    assert (summary["images"], summary["written"]) == (10, 0)
    assert contents(parts) == contents(whole) and "skipped.csv" in tables(parts)
    # a late shard, after a source has changed and was copied again by a run without a shard
    Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(folder / "healthy" / "1.png")
    assert prepare(folder, parts, size=16, num_workers=1)["written"] == 1
    assert prepare(folder, parts, size=16, num_workers=1)["written"] == 0
    with pytest.raises(ValueError, match="expected `overwrite` without a shard, got 0/3"):
        prepare(folder, parts, size=16, overwrite=True, shard=Shard(0, 3))


def test_shards_of_deblur_and_a_collecting_run_equal_one_run(folder, tmp_path, scheduler):
    prior = DiffPIRDeblurPipeline(toy_unet(num_class_embeds=None), scheduler)
    options = dict(kernel="gaussian:sigma=1", batch_size=1, call_kwargs={"num_inference_steps": 2}, progress=False)
    whole, parts = tmp_path / "whole" / "copy", tmp_path / "parts" / "copy"
    deblur(prior, folder, whole, **options)
    for index in ORDER:
        deblur(prior, folder, parts, shard=Shard(index, 3), **options)
        assert not tables(parts)
    assert deblur(prior, folder, parts, **options)["computed"] == 0
    assert contents(parts) == contents(whole) and {"a.csv", "skipped.csv"} < tables(parts)


def test_shards_of_evaluate_and_a_collecting_run_equal_one_run(pipeline, folder, tmp_path):
    (folder / "diseased" / "broken.png").unlink()
    dataset = load_folder(folder)
    options = dict(
        batch_size=1, n_bootstrap=5, progress=False, call_kwargs={"num_inference_steps": 4, "noise_level": 500}
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    compare({"method": pipeline}, dataset, output_dir=whole, **options)
    for index in ORDER:
        assert compare({"method": pipeline}, dataset, output_dir=parts, shard=Shard(index, 3), **options) is None
        assert not tables(parts)
    maps = {path: path.stat().st_mtime_ns for path in (parts / "maps").iterdir()}
    assert len(maps) == len(dataset)
    compare({"method": pipeline}, dataset, output_dir=parts, **options)
    assert maps == {path: path.stat().st_mtime_ns for path in (parts / "maps").iterdir()}
    for name in ("summary.json", "per_image.csv"):
        assert contents(parts)[name] == contents(whole)[name]
    with pytest.raises(ValueError, match="`output_dir` with several processes or a shard"):
        compare({"method": pipeline}, dataset, shard=Shard(0, 3), **options)


@pytest.mark.parametrize("text", ["3/3", "4/2", "-1/3", "0/0", "1", "a/b", "1/3/4", "", "/3"])
def test_a_wrong_shard_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"expected --shard i/n with 0 <= i < n, got {text}")):
        Shard.parse(text, {})


def slurm(task, count, first=0, **others):
    names = {"ID": task, "COUNT": count, "MIN": first, **others}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


def test_a_job_array_gives_the_shard():
    assert Shard.parse(None, {}) == Shard() and Shard().is_all
    assert Shard.parse("1/4", slurm(0, 9)) == Shard(1, 4)
    assert Shard.parse(None, slurm(3, 9)) == Shard(3, 9)
    assert Shard.parse(None, slurm(1, 9, first=1)) == Shard(0, 9)
    assert Shard.parse(None, slurm(8, 3, STEP=4)) == Shard(2, 3)
    assert Shard.parse("/16", slurm(7, 2, first=3)) == Shard(7, 16)  # --array=3,7 repeats two of sixteen tasks
    assert Shard.parse(None, {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "5"}) == Shard(2, 5)
    assert Shard.parse("/8", {"JOB_COMPLETION_INDEX": "2"}) == Shard(2, 8)
    assert Shard.parse("0/1", slurm(3, 9)).is_all
    with pytest.raises(ValueError, match="expected the number of shards in JOB_COMPLETIONS, got none"):
        Shard.parse(None, {"JOB_COMPLETION_INDEX": "2"})
    with pytest.raises(ValueError, match="expected --shard i/n with 0 <= i < n, got 4/2"):
        Shard.parse(None, slurm(7, 2, first=3))


def test_the_command_takes_the_array_and_prints_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    for name, value in slurm(1, 3).items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "copy"
    assert main(["prepare", str(folder), str(out), "--size", "16", "--workers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"shard 1/3: \d of its 4 images are done", lines[-2])
    assert lines[-1] == f"  cxr-diffusers prepare {folder} {out} --size 16 --workers 1" and not tables(out)
    assert main(["prepare", str(folder), str(out), "--size", "16", "--workers", "1", "--shard", "5/3"]) == 2
    assert "expected --shard i/n with 0 <= i < n, got 5/3" in capsys.readouterr().err
    assert main(["prepare", str(folder), str(out), "--size", "16", "--workers", "1", "--shard", "0/1"]) == 1
    assert "skipped.csv" in tables(out)


def test_the_printed_command_has_no_shard(capsys):
    class Options:
        arguments = ["detect", "my images", "--shard", "1/3", "--out", "maps", "--shard=1/3"]

    print_shard(Options, Shard(1, 3))
    assert capsys.readouterr().out.splitlines()[-1] == "  cxr-diffusers detect 'my images' --out maps"


def test_two_writers_of_one_file_with_one_process_id_do_not_meet(tmp_path):
    """In containers all processes may be number 1."""
    with new_file(tmp_path / "a") as first, new_file(tmp_path / "a") as second:
        first.write_text("whole")
        second.write_text("whole")
        assert first != second
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_temporary_files_of_other_machines_stay_for_an_hour(tmp_path):
    with new_file(tmp_path / "a") as own:
        own.write_text("half")
        machine, _ = own.name.split(".")[2].split("-")
        other = tmp_path / own.name.replace(machine, "0" * 8).replace(f".{os.getpid()}.", ".99999999.")
        dead = tmp_path / own.name.replace(f".{os.getpid()}.", ".99999999.")
        old = tmp_path / other.name.replace(".99999999.", ".99999998.")
        for path in (other, dead, old):
            path.write_text("half")
        os.utime(old, (1, 1))
        remove_dead(tmp_path)
        assert own.exists() and other.exists() and not dead.exists() and not old.exists()


def test_settings_of_shards_are_the_same_and_others_are_refused(pipeline, folder, tmp_path):
    run_detect(pipeline, [folder], tmp_path / "out", shard=Shard(0, 3))
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    run_detect(pipeline, [folder], tmp_path / "out", shard=Shard(1, 3))
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == settings
    with pytest.raises(ValueError, match="other settings"):
        run_detect(pipeline, [folder], tmp_path / "out", shard=Shard(2, 3), save_counterfactual=True)
