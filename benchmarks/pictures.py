"""Draw the images of the documentation from the shipped models, on radiographs that may be shown.

    python benchmarks/pictures.py hero --root DATA --results RESULTS     # docs/images/hero.png
    python benchmarks/pictures.py examples --root DATA --results RESULTS # example.png of each shipped model
    python benchmarks/pictures.py sheet --results RESULTS                # docs/images/methods.jpg
    python benchmarks/pictures.py phantoms --model RUN                   # docs/images/phantoms.jpg
    python benchmarks/pictures.py stamp FILE MODEL...                    # mark an image that another program drew

DATA holds NIH radiographs in CheXpert's layout with `boxes.csv` beside it, RESULTS is the output folder of
`cxr-diffusers evaluate --config evaluate`, RUN a training of `training/train_cfg.py` on phantoms. The images are not
chosen by eye: of the images with boxes sorted by the model's pixel AP, those at the 75th, 50th and 25th percentile; the
first diseased phantoms. Every image of a shipped model carries a digest of the weights and settings that drew it;
tests/test_pictures.py says which images are older than the shipped models.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cxr_diffusers import build_dataset, load_phantom, load_pipeline
from cxr_diffusers.fingerprints import checkpoint_digest
from cxr_diffusers.hub.loading import CHECKPOINTS, DEFAULT, default_checkpoint
from cxr_diffusers.pipelines.cxr_images import restore_map
from cxr_diffusers.precision import use_dtype
from cxr_diffusers.visualization import side_by_side

IMAGES = Path(__file__).parent.parent / "docs" / "images"
CREDIT = "Radiograph: NIH Clinical Center, ChestX-ray14; boxes: radiologists. Not used for training."
PERCENTILES = (75, 50, 25)  # of the hero


def stamp(path: Path, models: list[str]) -> None:
    """Write the digests of shipped models into a PNG (text "weights") or JPEG (comment)."""
    text = " ".join(f"{name}={checkpoint_digest(default_checkpoint(name))}" for name in models)
    with Image.open(path) as image:
        image.load()
    if path.suffix == ".png":
        info = PngInfo()
        info.add_text("weights", text)
        image.save(path, pnginfo=info, optimize=True)
    else:
        image.convert("RGB").save(path, quality=88, comment=text.encode())


def at_percentiles(results: Path, percentiles: tuple[int, ...]) -> list[str]:
    """Paths of the boxed images at percentiles of the default model's pixel AP."""
    table = pd.read_csv(results / "boxes" / "per_image.csv")
    table = table[(table["method"] == "CFG") & table["pixel_ap"].notna()].sort_values("pixel_ap")
    return [table["path"].iloc[round(p / 100 * (len(table) - 1))] for p in percentiles]


def panel(pipeline, row: dict, title: str | None = None, note: bool = True) -> Image.Image:
    """Input with boxes, counterfactual and map of one image."""
    image = row["image"]
    output = pipeline(image, output_type="np", **({"view": row["view"]} if takes_view(pipeline, row) else {}))
    size, aspect = (image.height, image.width), pipeline.config.aspect
    counterfactual = None
    if pipeline.has_counterfactual:
        counterfactual = restore_map(output.counterfactual[0].mean(-1), *size, aspect)
    anomaly_map = restore_map(output.anomaly_map[0], *size, aspect)
    vmax = min(1.0, 3 * pipeline.config.map_threshold)  # as in `cxr-diffusers detect`
    options = {"boxes": row["boxes"], "vmax": vmax, "title": title, "note": note, "panel_size": 300}
    return side_by_side(image, counterfactual, anomaly_map, **options)


def phantoms(model: str, count: int = 2) -> Image.Image:
    """Input with the outline of the true mask, counterfactual and map of the first diseased phantoms of a new set."""
    pipeline = use_dtype(load_pipeline(model))
    chests = load_phantom(60, seed=5, size=64)
    diseased = [i for i, label in enumerate(chests["label"][:]) if label == 1][:count]
    panels = []
    for row in (chests[i] for i in diseased):
        size = (row["image"].height, row["image"].width)
        output = pipeline(row["image"], output_type="np")
        counterfactual = restore_map(output.counterfactual[0].mean(-1), *size, pipeline.config.aspect)
        anomaly_map = restore_map(output.anomaly_map[0], *size, pipeline.config.aspect)
        options = {"mask": np.asarray(row["mask"]) > 0, "vmax": 3 * pipeline.config.map_threshold, "panel_size": 220}
        note = len(panels) == len(diseased) - 1  # only below the last
        panels.append(side_by_side(row["image"], counterfactual, anomaly_map, note=note, **options))
    return above_each_other(panels)


def takes_view(pipeline, row: dict) -> bool:
    return row["view"] in ((pipeline.config.get("views") or {}).values())


def boxed_rows(root: Path) -> dict[str, dict]:
    """{path: row} of the validation images with boxes."""
    data = build_dataset("chexpert", root=str(root / "CheXpert-v1.0-small"), split="valid", other=True)
    paths, boxes = data["path"], data["boxes"]
    return {paths[i]: data[i] for i in range(len(data)) if boxes[i]}


def above_each_other(panels: list[Image.Image]) -> Image.Image:
    page = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels)), "white")
    for i, part in enumerate(panels):
        page.paste(part, (0, sum(p.height for p in panels[:i])))
    return page


def opened(name: str):
    pipeline = use_dtype(load_pipeline(name))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=["hero", "examples", "sheet", "phantoms", "stamp"])
    parser.add_argument("rest", nargs="*", help="of stamp: FILE MODEL...")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--model", default="runs/phantom_cfg_32")
    options = parser.parse_args(arguments)
    if options.figure == "stamp":
        stamp(Path(options.rest[0]), options.rest[1:])
    elif options.figure == "phantoms":
        phantoms(options.model).save(IMAGES / "phantoms.jpg", quality=88)
    elif options.figure == "sheet":
        with Image.open(options.results / "boxes" / "contact_sheet.png") as sheet:
            sheet.convert("RGB").save(IMAGES / "methods.jpg")
        shipped = sorted(path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))
        stamp(IMAGES / "methods.jpg", shipped)
    else:
        rows = boxed_rows(options.root)
        paths = at_percentiles(options.results, PERCENTILES)
        if options.figure == "hero":
            pipeline = opened(DEFAULT)
            panels = []
            for percentile, path in zip(PERCENTILES, paths, strict=True):
                title = f"{percentile}th percentile of pixel AP. {CREDIT}"
                panels.append(panel(pipeline, rows[path], title, note=percentile == PERCENTILES[-1]))
            above_each_other(panels).save(IMAGES / "hero.png")
            stamp(IMAGES / "hero.png", [DEFAULT])
        else:
            for folder in sorted(path.parent for path in CHECKPOINTS.glob("*/model_index.json")):
                pipeline = opened(folder.name)
                panel(pipeline, rows[paths[0]], CREDIT).save(folder / "example.png")
                shared = "unet" in pipeline.components and not (folder / "unet").is_dir()  # that of the default model
                stamp(folder / "example.png", [folder.name, *([DEFAULT] if shared else [])])


if __name__ == "__main__":
    main()
