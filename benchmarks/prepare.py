"""`prepare` and `build_dataset`: images a second, and seconds for a folder as large as CheXpert.

    python benchmarks/prepare.py
    git worktree add /tmp/before 478b6e0 && python benchmarks/prepare.py --before /tmp/before

With `--before`, a checkout of another version is measured in the same run and ratios are added. Times are CPU times of
one process. The images are phantoms with noise, 2320 x 2828 pixels, JPEG of quality 90.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
from machine import describe_machine, markdown

HEADER = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Pleural Effusion,Pneumonia\n"
LINKS = 50_000  # files that share one inode: fewer than file systems allow


def main(arguments=None):
    options = parser().parse_args(arguments)
    if options.measure:
        return print(json.dumps(measure(options.measure, options.images)))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        folder = Path(folder)
        draw_images(folder / "large", options.images, options.size)
        link_chexpert(folder / "CheXpert-v1.0", options.rows)
        results = {"now": run(options, folder / "now", folder)}
        if options.before:
            results["before"] = run(options, folder / "before", folder, options.before)
    names = list(results["now"])
    rows = [[name, *(f"{result[name]:.3g}" for result in results.values())] for name in names]
    if options.before:
        rows = [[*row, f"{results['now'][row[0]] / results['before'][row[0]]:.2f}"] for row in rows]
    heads = ["", *results, *(["now / before"] if options.before else [])]
    print(f"{describe_machine('cpu')}\n{options.rows:,} rows\n\n{markdown(heads, rows)}")


def run(options, out, sources, checkout=None):
    """{name: number} of one version, measured in a process of its own.

    Args:
        out: folder for the copies; its `code` becomes the package of a checkout, whose pipelines lie beside it.
        checkout: root of another version; None: the installed one.
    """
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if checkout:
        package = out / "code" / "cxr_diffusers"
        package.mkdir(parents=True)
        for path in [*(checkout / "cxr_diffusers").iterdir(), checkout / "pipelines"]:
            (package / path.name).symlink_to(path.resolve())
        environment["PYTHONPATH"] = str(out / "code")
    out.mkdir(exist_ok=True)
    (out / "sources").symlink_to(sources)
    command = [sys.executable, __file__, "--measure", str(out), "--images", str(options.images)]
    lines = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return json.loads(lines[-1])


def measure(out, count):
    from cxr_diffusers.data import build_dataset, prepare
    from cxr_diffusers.pipelines import cxr_anomaly  # noqa: F401  (it takes seconds)

    os.fsync = lambda file: None  # the disk is not what is measured
    large, chexpert = out / "sources" / "large", out / "sources" / "CheXpert-v1.0"
    prepare(large, out / "warm", num_workers=1)
    results = {"images a second": count / seconds(lambda: prepare(large, out / "a", num_workers=1))}
    try:
        fast = seconds(lambda: prepare(large, out / "b", num_workers=1, fast_jpeg=True))
        results["images a second, fast_jpeg"] = count / fast
    except TypeError:  # a version that does not have it
        results["images a second, fast_jpeg"] = results["images a second"]
    prepare(chexpert, out / "copy", size=16)
    results["seconds, nothing to do"] = seconds(lambda: prepare(chexpert, out / "copy", size=16, num_workers=1))
    opened = {"classes": ["Pleural Effusion"], "other": True, "frontal_only": False}
    results["seconds, build_dataset"] = seconds(lambda: build_dataset("chexpert", root=out / "copy", **opened))
    return results


def seconds(call):
    begin = time.process_time()
    call()
    return time.process_time() - begin


def draw_images(folder, count, size):
    from cxr_diffusers.data.phantom import draw_chest

    folder.mkdir()
    for i in range(count):
        rng = np.random.default_rng(i)
        chest = PIL.Image.fromarray(draw_chest(rng, 256).image).resize(size, PIL.Image.Resampling.BICUBIC)
        noisy = np.asarray(chest, np.float32) + rng.normal(0, 3, (size[1], size[0]))
        PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=90)


def link_chexpert(root, count):
    """A folder like CheXpert's training set, of small images that are links to a few files."""
    root.mkdir()
    content, lines = root / "content.jpg", [HEADER]
    for i in range(count):
        path = root / f"train/patient{i // 4:05d}/study{i % 4 // 2 + 1}/view{i % 2 + 1}_frontal.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i % LINKS == 0:
            content.unlink(missing_ok=True)
            PIL.Image.new("L", (32, 32), 99).save(content)
        os.link(content, path)
        cells = f"Female,60,Frontal,AP,{'1.0,,' if i % 2 else ',1.0,'}"
        lines.append(f"{root.name}/{path.relative_to(root).as_posix()},{cells}\n")
    content.unlink()
    (root / "train.csv").write_text("".join(lines))


def parser():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=20, help="large images (default: 20)")
    options.add_argument("--size", type=int, nargs=2, default=(2320, 2828), help="their sides (default: 2320 2828)")
    options.add_argument("--rows", type=int, default=224_316, help="of the large table (default: 224316)")
    options.add_argument("--before", type=Path, help="checkout of a version to compare with")
    options.add_argument("--folder", help="for temporary files")
    options.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return options


if __name__ == "__main__":
    main()
