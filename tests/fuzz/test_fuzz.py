"""Damaged inputs give a result or an error that the command line shows in one line, in bounded time and memory.

CXR_FUZZ_SEED=N repeats a run; each failing input stays in pytest's temporary folder, and the message names it.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from mutators import mutate_bytes, mutate_text, mutate_values
from safetensors.torch import save_file

from cxr_diffusers import convert_checkpoint, load_pipeline, load_table, read_image
from cxr_diffusers.cli import ONE_LINE_ERRORS
from cxr_diffusers.data.boxes import image_size, read_boxes
from cxr_diffusers.data.chexlocalize import PATHOLOGIES, decode, read_segmentations
from cxr_diffusers.evaluation.plan import load_plan
from cxr_diffusers.training.recipe import load_recipe
from helpers import flags_of, random_original, write_source

CONFIGS = Path(__file__).parents[2] / "configs"
SEED = int(os.environ.get("CXR_FUZZ_SEED", "20260"))
SECONDS, BYTES = 5, 1.5e9


class TooSlow(BaseException):
    """Not an Exception, so that no handler of the library mistakes it for a damaged file."""


def stop(*_):
    raise TooSlow(f"more than {SECONDS} s")


def resident_bytes(field):
    """A field of /proc/self/status in bytes; on other systems the largest size so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bounded(run, path):
    """None, or what is wrong with how `run(path)` ended."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    except OSError:
        pass
    before = resident_bytes("VmRSS")
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        run(path)
    except ONE_LINE_ERRORS as error:
        if not str(error).strip():
            return f"an empty message of {type(error).__name__}"
    except (Exception, TooSlow) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    used = resident_bytes("VmHWM") - before
    return f"{used / 1e9:.1f} GB" if used > BYTES else None


def encoded_images():
    """[(suffix, bytes)] of small images in each format."""
    rng = np.random.default_rng(0)
    grey, deep = rng.integers(0, 256, (20, 16), np.uint8), rng.integers(0, 65536, (20, 16), np.uint16)
    for suffix, array in [
        (".png", grey),
        (".png", deep),
        (".jpg", grey),
        (".tif", grey),
        (".tif", deep),
        (".bmp", grey),
    ]:
        buffer = io.BytesIO()
        PIL.Image.fromarray(array).save(buffer, PIL.Image.registered_extensions()[suffix])
        yield suffix, buffer.getvalue()
    for array in (grey, deep, grey / np.float32(255)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        yield ".npy", buffer.getvalue()


def fuzz_images(folder):
    valid = list(encoded_images())

    def make(path, rng):
        suffix, content = rng.choice(valid)
        path = path.with_suffix(suffix)
        path.write_bytes(mutate_bytes(content, rng))
        return path

    return make, lambda path: (read_image(path), image_size(path))


def fuzz_dicom(folder):
    content = write_source(folder / "valid").read_bytes()

    def make(path, rng):
        path.write_bytes(content[:128] + b"DICM" + mutate_bytes(content[132:], rng))
        return path

    return make, lambda path: (read_image(path), image_size(path))


def fuzz_tables(folder):
    PIL.Image.fromarray(np.arange(320, dtype=np.uint8).reshape(20, 16) // 2).save(folder / "a.png")
    text = "file,label,patient_id,boxes\na.png,diseased,p1,1 2 3 4\na.png,healthy,p2,\na.png,1,p3,1 2 3 4;2 2 2 2\n"

    def make(path, rng):
        path.write_bytes(mutate_text(text, rng).encode() if rng.random() < 0.8 else mutate_bytes(text.encode(), rng))
        return path

    return make, lambda path: load_table(path, boxes="boxes", patient="patient_id", root=folder)


def fuzz_boxes(folder):
    text = "file,x,y,w,h,width,height\na.png,1,2,3,4,16,20\nb.png,1.5,2,3e0,4,32,40\nc.png,0,0,1,1,,\n"

    def make(path, rng):
        path.write_bytes(mutate_text(text, rng).encode() if rng.random() < 0.8 else mutate_bytes(text.encode(), rng))
        return path

    return make, read_boxes


def fuzz_yaml(names, run):
    contents = [(CONFIGS / name).read_text() for name in names]

    def make(path, rng):
        text = rng.choice(contents)
        if rng.random() < 0.8:
            text = yaml.safe_dump(mutate_values(yaml.safe_load(text), rng))
            path.write_text(text)
        else:
            path.write_bytes(mutate_bytes(text.encode(), rng))
        return path

    return make, run


def fuzz_recipes(folder):
    names = ["phantom_cfg_32.yaml", "phantom_classifier_32.yaml", "phantom_fixed_point_gan_32.yaml"]
    return fuzz_yaml(names, load_recipe)


def fuzz_plans(folder):
    return fuzz_yaml(["plans/evaluate.yaml"], lambda path: load_plan(path, ["root=data"]))


def fuzz_checkpoints(pipeline, folder):
    pipeline.save_pretrained(folder / "valid")
    files = [path.relative_to(folder / "valid") for path in sorted((folder / "valid").rglob("*")) if path.is_file()]
    files = [path for path in files if path.suffix in (".json", ".safetensors")]

    def make(path, rng):
        shutil.copytree(folder / "valid", path)
        changed = path / rng.choice(files)
        if rng.random() < 0.1:
            changed.unlink()
        elif changed.suffix == ".json" and rng.random() < 0.8:
            changed.write_text(json.dumps(mutate_values(json.loads(changed.read_text()), rng)))
        else:
            changed.write_bytes(mutate_bytes(changed.read_bytes(), rng))
        return path

    return make, load_pipeline


def fuzz_conversions(folder):
    net = random_original(mult=(1, 2), attention=(1,), classes=2, class_mlp=True)
    flags = flags_of(net)

    def make(path, rng):
        tensors = {name: tensor.clone() for name, tensor in net.tensors.items()}
        path = path.with_suffix(rng.choice([".pt", ".safetensors"]))
        name = rng.choice(sorted(tensors))
        change = rng.randrange(5)
        if change == 0:
            del tensors[name]
        elif change == 1:
            tensors[name] = rng.choice([tensors[name][..., :-1], tensors[name][None], torch.zeros(())]).contiguous()
        elif change == 2:
            tensors[rng.choice(["x", f"{name}.x", "output_blocks.99.0.conv.weight"])] = tensors.pop(name)
        elif change == 3:
            tensors[name] = tensors[name].to(rng.choice([torch.int64, torch.bool, torch.bfloat16, torch.complex64]))
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
        if change == 4:
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        return path

    return make, lambda path: convert_checkpoint(path, path.with_suffix(".out"), **flags)


def fuzz_segmentations(folder):
    pytest.importorskip("pycocotools")
    from pycocotools.mask import encode

    masks = [np.asfortranarray(np.eye(12, 10, k, dtype=np.uint8)) for k in range(2)]
    cells = [{"size": [12, 10], "counts": encode(mask)["counts"].decode()} for mask in masks]
    valid = {
        "patient1_study1_view1_frontal": {"Edema": cells[0], "Pneumothorax": cells[1]},
        "patient2_study1_view1_frontal": {"Cardiomegaly": cells[1]},
    }

    def make(path, rng):
        if rng.random() < 0.8:
            path.write_text(json.dumps(mutate_values(valid, rng)))
        else:
            path.write_bytes(mutate_bytes(json.dumps(valid).encode(), rng))
        return path

    return make, lambda path: [decode(entry, PATHOLOGIES) for entry in read_segmentations(path).values()]


COUNTS = {  # inputs in `make test`; together 2,000
    "images": 500,
    "dicom": 400,
    "tables": 200,
    "boxes": 250,
    "recipes": 200,
    "plans": 150,
    "checkpoints": 80,
    "conversions": 60,
    "segmentations": 160,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [1, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", COUNTS)
def test_damaged_inputs_end_in_a_result_or_a_one_line_error(target, factor, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [request.getfixturevalue("pipeline")] if target == "checkpoints" else []
    make, run = globals()[f"fuzz_{target}"](*arguments, tmp_path)
    count, failures, start = COUNTS[target] * factor, [], time.time()
    for number in range(count):
        rng = random.Random(f"{SEED}-{target}-{number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = make(tmp_path / f"{number:05d}", rng)
            fault = bounded(run, path)
        if fault:
            failures.append(f"{path}: {fault}")
        else:
            for used in tmp_path.glob(f"{number:05d}*"):
                shutil.rmtree(used) if used.is_dir() else used.unlink()
    print(f"\n{target}: {count} inputs of seed {SEED}, {len(failures)} failures, {time.time() - start:.1f} s")
    assert not failures, f"CXR_FUZZ_SEED={SEED}: {len(failures)} of {count} inputs\n" + "\n".join(failures[:20])
