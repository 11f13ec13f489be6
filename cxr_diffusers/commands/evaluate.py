"""cxr-diffusers evaluate: one table for methods and controls."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .options import (
    SHARDS,
    add_command,
    add_pipeline_options,
    add_shard_option,
    batch_size_of,
    call_kwargs,
    counted,
    open_pipeline,
    print_shard,
    shard_of,
)

EVALUATE = f"""\
DATA is a folder of images (healthy/ and diseased/, masks or boxes beside them), or NAME:key=value,... where NAME is
brats, chestx_det, chexlocalize, chexmask, chexpert, folder, hub, mimic_cxr, nih, packed, padchest, phantom, rsna, siim,
table, vindr or vindr_pcxr and the keys are those of the loader load_NAME in cxr_diffusers.data (docs/datasets.md).
docs/evaluation.md defines each metric.

examples:
  cxr-diffusers evaluate /data/testing --healthy /data/validation/healthy --out report
  cxr-diffusers evaluate /data/testing --model default runs/mine USER/THEIRS --out report
  cxr-diffusers evaluate /data/testing --judge cxr_grad_cam_128 --out report
  cxr-diffusers evaluate --config evaluate root=/data/cxr --out report
  cxr-diffusers evaluate table:csv=val_implants.csv,mask=mask,patient=patient_id,view=view,label=diseased \\
      --healthy chexpert:root=/data/CheXpert-v1.0-small,split=valid,classes=[] --out report

{SHARDS.format(command="evaluate")}"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `cxr-diffusers`."""
    text = "metrics with bootstrap intervals, on images with masks or boxes"
    evaluate = add_command(commands, "evaluate", run, text, EVALUATE)
    evaluate.add_argument(
        "data", metavar="DATA", nargs="*", help="the data set, see below; section.key=value of a plan"
    )
    evaluate.add_argument("--config", type=Path, help="a plan: several methods on several data sets")
    evaluate.add_argument(
        "--only", metavar="METHOD", nargs="+", action="extend", default=[], help="only these methods of the plan"
    )
    evaluate.add_argument(
        "--skip", metavar="METHOD", nargs="+", action="extend", default=[], help="all methods of the plan but these"
    )
    evaluate.add_argument(
        "--on", metavar="NAME", nargs="+", action="extend", default=[], help="only these data sets of the plan"
    )
    evaluate.add_argument("--healthy", metavar="DATA", help="healthy validation images, which give the thresholds")
    evaluate.add_argument("--out", type=Path, required=True, help="folder for tables, images and maps")
    evaluate.add_argument("--bootstrap", type=int, help="replicates over patients (default: 1000)")
    text = "measure images with a shorter side of more than N pixels at N (default: 1024); 0: all at full size"
    evaluate.add_argument("--resolution", metavar="N", type=int, help=text)
    evaluate.add_argument(
        "--strata", nargs="*", action="extend", default=[], help="columns to report separately, e.g. source"
    )
    text = "a model with an image classifier that judges the counterfactuals, e.g. cxr_grad_cam_128"
    evaluate.add_argument("--judge", metavar="MODEL", help=text)
    text = "adds controls with its lung gate, e.g. cxr_lung_segmenter_64"
    evaluate.add_argument("--lung-segmenter", metavar="MODEL", help=text)
    add_shard_option(evaluate)
    add_pipeline_options(evaluate, several=True)


def run(options: argparse.Namespace) -> int:
    """Run the command; prints the tables and the names of the files that hold them. Returns the exit code."""
    from ..config import PLANS, config_file
    from ..data import open_dataset
    from ..evaluation import compare, load_plan, run_plan
    from ..evaluation.grid import check_resolution
    from ..evaluation.plan import plan_table
    from ..processes import process_state

    shard = shard_of(options)
    plan = None
    if options.config:
        plan = load_plan(config_file(options.config, PLANS), options.data, options.only, options.on, options.skip)
    if options.batch_size is None and plan:
        options.batch_size = plan.options.get("batch_size")
    shared: dict[str, Any] = {"batch_size": batch_size_of(options), "shard": shard}
    if options.bootstrap is not None:
        if options.bootstrap < 1:
            raise ValueError(f"expected --bootstrap of 1 or more, got {options.bootstrap}")
        shared["n_bootstrap"] = options.bootstrap
    if options.resolution is not None:
        check_resolution(options.resolution)
        shared["resolution"] = options.resolution
    if plan:
        if options.model or options.healthy or options.strata or call_kwargs(options):
            raise ValueError("expected models, data and arguments of the call in the plan, not beside --config")
        shared |= open_judge(options, options.judge or plan.options.get("judge"))
        shared |= open_lung_segmenter(options.lung_segmenter or plan.options.get("lung_segmenter"), options.device)
        results: dict[str, Any] | None = run_plan(
            plan, lambda model: open_pipeline(options, model), options.out, **shared
        )
    else:
        if options.only or options.on or options.skip:
            raise ValueError("expected a plan (--config) of which --only, --skip and --on name parts, got none")
        if len(options.data) != 1:
            raise ValueError(f"expected one data set, or a plan with --config, got {options.data}")
        data = open_dataset(options.data[0])  # before the models, so that a wrong name is an error at once
        healthy = open_dataset(options.healthy) if options.healthy else None
        shared |= open_judge(options, options.judge)
        shared |= open_lung_segmenter(options.lung_segmenter, options.device)
        result = compare(
            open_methods(options),
            data,
            healthy=healthy,
            output_dir=options.out,
            strata=tuple(options.strata),
            call_kwargs=call_kwargs(options),
            **shared,
        )
        results = None if result is None else {options.out.name: result}
    if not shard.is_all and process_state().is_main_process:
        print_shard(options, shard, noun="maps")
    if results is not None:  # the main process
        folders = [options.out / name for name in results] if options.config else [options.out]
        print(plan_table(results))
        files = [folder / name for folder in folders for name in ("summary.md", "contact_sheet.png")]
        print("See " + ", ".join(str(file) for file in files if file.is_file()))
        failed = sum(result.summary["n_failed"] for result in results.values())
        if failed:
            print(f"left out: {counted(failed, 'image')}, see `failed` in summary.json", file=sys.stderr)
        return 1 if failed else 0
    return 0


def open_judge(options: argparse.Namespace, name: str | None) -> dict[str, Any]:
    """{"judge": pipeline on `--device` or the device of this process} of a model's name; {} without one."""
    from ..hub.loading import load_pipeline
    from ..processes import usable_device

    return {"judge": load_pipeline(name, options.trust_remote_code).to(usable_device(options.device))} if name else {}


def open_lung_segmenter(name: str | None, device: str | None = None) -> dict[str, Any]:
    """{"lung_segmenter": model on a device} of a shipped name, folder or Hub name; {} without one.

    Args:
        device: None: that of this process.
    """
    from ..connection import cache_if_unreachable
    from ..hub.loading import CHECKPOINTS, hub_file, is_hub_name
    from ..models.lung_segmenter import LungSegmenter
    from ..processes import usable_device

    if not name:
        return {}
    folders = [folder for folder in (CHECKPOINTS / name, Path(name)) if (folder / "config.json").is_file()]
    if not folders and not is_hub_name(name):
        raise FileNotFoundError(f"expected a lung segmenter: a folder with a config.json or USER/NAME, got {name}")
    if not folders:
        hub_file(name, "config.json")  # an error that names the repository, where there is none
    with cache_if_unreachable() if not folders else nullcontext():
        model = LungSegmenter.from_pretrained(folders[0] if folders else name)
    return {"lung_segmenter": model.eval().to(usable_device(device))}


def open_methods(options: argparse.Namespace) -> dict[str, Any]:
    """{name: pipeline} of `--model`; a name is that of the folder, or "method" for one alone."""
    if len(options.model or []) < 2:
        return {"method": open_pipeline(options, options.model and options.model[0])}
    names = [Path(model).name for model in options.model]
    if len(set(names)) < len(names):
        raise ValueError(f"expected models of different names, got {names}: a plan (--config) can name them")
    return {name: open_pipeline(options, model) for name, model in zip(names, options.model, strict=True)}
