"""The command line: cxr-diffusers detect | evaluate | prepare | deblur | publish | convert."""

import argparse
import sys
from pathlib import Path

from .version import __version__

# Imports of torch and diffusers take seconds, so each command imports what it needs when it runs.

PROCESSES = """\
several GPUs, or several processes on a CPU:
  accelerate launch --multi_gpu --num_processes 2 -m cxr_diffusers.cli {command} ...
"""
DETECT = f"""\
examples:
  cxr-diffusers detect chest.png --out maps
  cxr-diffusers detect /data/dicom --out maps --model runs/chexpert_cfg_256 --noise-level 500

{PROCESSES.format(command="detect")}"""
EVALUATE = f"""\
DATA is a folder of images (healthy/ and diseased/, masks or boxes beside them), or NAME:key=value,... where NAME is
brats, chexpert, folder, hub, nih, phantom, table or vindr and the keys are those of the loader load_NAME in
cxr_diffusers.data.

examples:
  cxr-diffusers evaluate /data/testing --healthy /data/validation/healthy --out report
  cxr-diffusers evaluate /data/testing --model default runs/mine USER/THEIRS --out report
  cxr-diffusers evaluate --config configs/evaluate.yaml root=/data/cxr --out report
  cxr-diffusers evaluate table:csv=val_implants.csv,mask=mask,patient=patient_id,view=view,label=diseased \\
      --healthy chexpert:root=/data/CheXpert-v1.0-small,split=valid,classes=[] --out report

{PROCESSES.format(command="evaluate")}"""
DEBLUR = f"""\
KERNEL is what blurred the pictures, in their own pixels:
  motion:size=10,intensity=0.5,seed=0   a random trajectory      linear:length=9,angle=30   a straight one
  gaussian:sigma=1.5                    disk:radius=2.5          file:path=kernel.png (or .npy)
  estimate                              each picture's own, from its steepest edges: see docs/deblurring.md how good

examples:
  cxr-diffusers deblur /data/CheXpert-v1.0 /data/chexpert-deblurred --kernel gaussian:sigma=1.5 --plan
  cxr-diffusers deblur /data/CheXpert-v1.0 /data/chexpert-deblurred --kernel gaussian:sigma=1.5 --model runs/prior

{PROCESSES.format(command="deblur")}"""
PUBLISH = """\
examples:
  cxr-diffusers publish runs/chexpert_cfg_256 me/chexpert-cfg
  cxr-diffusers publish model me/model --training "Trained on ..., licence ..., 50,000 steps, seed 0." \\
      --evaluation report
"""
CONVERT = """\
example (flags as in the original's README; those of training and sampling may stay, they are not needed):
  cxr-diffusers convert model.pt converted --image_size 256 --num_channels 128 --class_cond True --num_classes 2 \\
      --num_res_blocks 2 --num_heads 1 --learn_sigma True --use_scale_shift_norm False --attention_resolutions 16
and with the classifier that guides it, as in Wolleb's README: --classifier_path classifier.pt
"""
# the originals' flags that do not change what a checkpoint computes
NOT_NEEDED = (
    "anneal_lr batch_size classifier_scale classifier_use_fp16 data_dir dataset ema_rate eval_interval "
    "fp16_scale_growth guidance_scale log_interval lr lr_anneal_steps microbatch model_path "
    "noise_level num_samples p_uncond rescale_learned_sigmas resume_checkpoint save_interval schedule_sampler "
    "timestep_respacing use_checkpoint use_ddim use_fp16 use_kl weight_decay"
).split()
CALL = (
    "guidance_scale noise_level num_inference_steps negative_label source_label classifier_scale unet_label "
    "explained_label num_refinements compare_with direction smoothing"
).split()


def main(arguments=None):
    """Run a command; the exit code: 0 done, 1 done except for some files, 2 not done."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    try:
        return options.run(options) or 0
    except (ValueError, OSError, ImportError) as error:
        # what a user can mend is a line, not a traceback
        print(f"cxr-diffusers {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cxr-diffusers {options.command}: stopped", file=sys.stderr)
        return 130


def build_parser():
    parser = argparse.ArgumentParser(
        prog="cxr-diffusers", description="See where a chest X-ray is abnormal. Research use only, not for diagnosis."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    detect = add_command(commands, "detect", run_detect, "an anomaly map for each image of a file or folder", DETECT)
    detect.add_argument("images", nargs="+", type=Path, help="png, jpg, tif, npy or DICOM files, or folders")
    detect.add_argument("--out", type=Path, required=True, help="folder for pictures, maps and results.csv")
    detect.add_argument("--map-format", choices=["png", "npy"], default="png", help="16-bit PNG or float32 npy")
    detect.add_argument("--save-counterfactual", action="store_true", help="as a PNG, at the model's resolution")
    detect.add_argument("--vmax", type=float, help="map value of the last colour (default: 3 x the model's threshold)")
    add_pipeline_options(detect)

    text = "figures with bootstrap intervals, on images with masks or boxes"
    evaluate = add_command(commands, "evaluate", run_evaluate, text, EVALUATE)
    evaluate.add_argument(
        "data", metavar="DATA", nargs="*", help="the data set, see below; section.key=value of a plan"
    )
    evaluate.add_argument("--config", type=Path, help="a plan: several methods on several data sets, one table each")
    evaluate.add_argument("--healthy", metavar="DATA", help="healthy validation images: they give the threshold")
    evaluate.add_argument("--out", type=Path, required=True, help="folder for tables, pictures and maps")
    evaluate.add_argument("--bootstrap", type=int, help="replicates over patients (default: 1000)")
    evaluate.add_argument("--strata", nargs="*", default=[], help="columns to report separately, e.g. source")
    add_pipeline_options(evaluate, several=True)

    text = "a small grey copy of a data set, paths in its CSVs rewritten"
    prepare = add_command(commands, "prepare", run_prepare, text)
    prepare.add_argument("source", type=Path, help="CheXpert or ChestX-ray14 as downloaded, or any folder")
    prepare.add_argument("output", type=Path)
    prepare.add_argument("--size", type=int, default=256, help="side, in pixels (default: 256)")
    prepare.add_argument("--aspect", choices=["pad", "crop", "squash"], default="pad", help="default: pad")
    prepare.add_argument("--equalize", action="store_true", help="histogram equalisation, as the original did")
    prepare.add_argument("--format", choices=["png", "jpg"], default="png")
    prepare.add_argument("--frontal-only", action="store_true", help="leave lateral views out")
    prepare.add_argument("--workers", type=int, default=None, help="processes (default: one for each CPU)")
    prepare.add_argument("--overwrite", action="store_true", help="make the copies anew")

    text = "a data set deblurred by a diffusion prior (DiffPIR), its layout, CSVs, boxes and masks kept"
    deblur = add_command(commands, "deblur", run_deblur, text, DEBLUR)
    deblur.add_argument("source", type=Path, help="CheXpert, ChestX-ray14 or VinDr-CXR as downloaded, or any folder")
    deblur.add_argument("output", type=Path)
    deblur.add_argument("--kernel", required=True, help="see below")
    deblur.add_argument("--model", help="the prior: pipeline folder or Hub name (default: the shipped model)")
    deblur.add_argument("--trust-remote-code", action="store_true", help="run the code that a Hub model brings along")
    deblur.add_argument("--num-inference-steps", type=int, help="evaluations of the prior (default: 100)")
    deblur.add_argument("--noise-std", type=float, help="of the pictures, white - black being 1 (default: 0.5 / 255)")
    deblur.add_argument("--lambda", type=float, dest="lambda_", help="weight of the prior (default: 7)")
    deblur.add_argument("--zeta", type=float, help="share of fresh noise in each step (default: 0.3)")
    deblur.add_argument("--tile-size", type=int, help="show the prior overlapping tiles, to save memory")
    deblur.add_argument("--batch-size", type=int, default=4, help="images of one size at once (default: 4)")
    deblur.add_argument("--format", choices=["png", "jpg"], default="png")
    deblur.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    deblur.add_argument("--device", help="cuda, mps, cpu (default: the best there is)")
    text = "only measure a few images and say how long N of them take (default: all of SOURCE)"
    deblur.add_argument("--plan", type=int, nargs="?", const=0, metavar="N", help=text)

    publish = add_command(
        commands, "publish", run_publish, "a trained model, with its code and card, to the Hub", PUBLISH
    )
    publish.add_argument("folder", type=Path, help="a run or pipeline folder")
    publish.add_argument("name", help="USER/NAME")
    publish.add_argument("--private", action="store_true", default=None)
    card = publish.add_argument_group("to write a new card")
    card.add_argument("--training", help="Markdown: the data, its licence, how the model was trained")
    card.add_argument("--evaluation", type=Path, help="a folder written by `evaluate`")
    card.add_argument("--evaluated-on", default="validation images", help="what its images are")
    card.add_argument("--license", default="apache-2.0", help="of the weights (default: apache-2.0)")
    card.add_argument("--picture", help="name of a PNG in the folder")

    text = "a guided-diffusion checkpoint to a diffusers folder"
    convert = add_command(commands, "convert", run_convert, text, CONVERT)
    convert.add_argument("checkpoint", type=Path, help=".pt or .safetensors")
    convert.add_argument("output", type=Path)
    convert.add_argument("--classifier_path", type=Path, help="checkpoint of the encoder classifier that guides it")
    convert.add_argument("--overwrite", action="store_true", help="replace the output folder")
    add_conversion_flags(convert)
    return parser


def add_command(commands, name, run, text, epilog=None):
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def add_pipeline_options(parser, several=False):
    text = "pipeline folder, Hub name or name of a shipped model (default: the default one)"
    if several:
        parser.add_argument("--model", nargs="+", help=f"{text}; several make one table")
    else:
        parser.add_argument("--model", help=text)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that a Hub model brings along")
    parser.add_argument("--batch-size", type=int, default=8, help="images at once, in each process (default: 8)")
    parser.add_argument("--device", help="cuda, mps, cpu (default: the best there is)")
    parser.add_argument(
        "--as-original",
        action="store_true",
        help="the procedure as guided-diffusion's CFG fork (or, with a classifier, Wolleb's code) ran it, offsets and "
        "clamp included (docs/faithfulness.md)",
    )
    call = parser.add_argument_group("of the pipeline (default: the model's own)")
    call.add_argument("--guidance-scale", type=float, help="w of (1 + w) target - w negative")
    call.add_argument("--noise-level", type=int, help="timestep where inversion stops; more may change more")
    call.add_argument("--num-inference-steps", type=int, help="of the whole chain")
    call.add_argument("--negative-label", help="class to be pushed away from: a name, an id, or null")
    call.add_argument("--source-label", help="class named while inverting")
    call.add_argument("--classifier-scale", type=float, help="s of classifier guidance")
    call.add_argument("--unet-label", help="class named to the UNet under classifier guidance")
    call.add_argument("--explained-label", help="class whose logit Grad-CAM explains")
    call.add_argument("--num-refinements", type=int, help="fixed-point iterations of each inversion step")
    call.add_argument("--compare-with", choices=["image", "reconstruction"])
    call.add_argument("--direction", choices=["both", "bright", "dark"])
    call.add_argument("--smoothing", type=float, help="sigma, in pixels of the model's resolution")


def call_kwargs(options):
    """The pipeline's arguments that were given; a label that is a number is an id, else a name."""
    given = {name: getattr(options, name) for name in CALL if getattr(options, name) is not None}
    return {k: int(v) if k.endswith("_label") and v.isdigit() else v for k, v in given.items()}


def open_pipeline(options, model=None):
    """A model, or that of `--model`, on the device of this process; ValueError where its call lacks a given option."""
    from .evaluation.plan import checked_call
    from .hub import load_pipeline
    from .processes import process_state

    if options.batch_size < 1:
        raise ValueError(f"expected --batch-size of 1 or more, got {options.batch_size}")
    state = process_state()
    model = model or options.model or "default"
    pipeline = load_pipeline(model, options.trust_remote_code)
    on_terminal = state.is_main_process and sys.stderr.isatty()
    pipeline.set_progress_bar_config(disable=not on_terminal, leave=False, position=1)
    pipeline = pipeline.to(options.device or state.device)
    if not options.as_original:
        return checked_call(pipeline, call_kwargs(options), model)[0]
    from .original import OriginalProcedure

    scale = "classifier_scale" if "classifier" in pipeline.components else "guidance_scale"
    unknown = sorted(set(call_kwargs(options)) - {scale, "noise_level", "num_inference_steps"})
    if unknown:
        raise ValueError(f"the original procedure knows no {', '.join(unknown)}: leave it out with --as-original")
    return OriginalProcedure(pipeline)


def run_detect(options):
    from .detection import detect

    summary = detect(
        open_pipeline(options),
        options.images,
        options.out,
        batch_size=options.batch_size,
        map_format=options.map_format,
        save_counterfactual=options.save_counterfactual,
        vmax=options.vmax,
        call_kwargs=call_kwargs(options),
    )
    if summary is None:  # not the main process
        return 0
    computed, failed, seconds = summary["computed"], summary["failed"], summary["seconds_per_image"]
    there = summary["images"] - computed - len(failed)
    print(
        f"{summary['images']} images: {computed} computed{f' ({seconds:.2g} s each)' if computed else ''}, "
        f"{there} were there, {len(failed)} failed. See {options.out / 'results.csv'}"
    )
    for error in failed.values():
        print(f"failed: {error}", file=sys.stderr)
    return 1 if failed else 0


def run_evaluate(options):
    from .data import open_dataset
    from .evaluation import compare, load_plan, run_plan
    from .evaluation.plan import plan_table

    shared = {"batch_size": options.batch_size, "call_kwargs": call_kwargs(options)}
    shared |= {"n_bootstrap": options.bootstrap} if options.bootstrap else {}
    if options.config:
        if options.model or options.healthy or options.strata or shared["call_kwargs"]:
            raise ValueError("expected models, data and arguments of the call in the plan, not beside --config")
        plan = load_plan(options.config, options.data)
        results = run_plan(plan, lambda model: open_pipeline(options, model), options.out, **shared)
    else:
        if len(options.data) != 1:
            raise ValueError(f"expected one data set, or a plan with --config, got {options.data}")
        healthy = open_dataset(options.healthy) if options.healthy else None
        result = compare(
            open_methods(options),
            open_dataset(options.data[0]),
            healthy=healthy,
            output_dir=options.out,
            strata=tuple(options.strata),
            **shared,
        )
        results = result and {options.out.name: result}
    if results is not None:  # the main process
        folders = [options.out / name for name in results] if options.config else [options.out]
        print(plan_table(results))
        print("See " + ", ".join(f"{folder / 'summary.md'} and {folder / 'contact_sheet.png'}" for folder in folders))


def open_methods(options):
    """{name: pipeline} of `--model`; a name is that of the folder, or "method" for one alone."""
    if len(options.model or []) < 2:
        return {"method": open_pipeline(options, options.model and options.model[0])}
    names = [Path(model).name for model in options.model]
    if len(set(names)) < len(names):
        raise ValueError(f"expected models of different names, got {names}: a plan (--config) can name them")
    return {name: open_pipeline(options, model) for name, model in zip(names, options.model, strict=True)}


def run_prepare(options):
    from .data.preparation import prepare

    prepare(
        options.source,
        options.output,
        size=options.size,
        aspect=options.aspect,
        equalize=options.equalize,
        image_format=options.format,
        frontal_only=options.frontal_only,
        num_workers=options.workers,
        overwrite=options.overwrite,
    )


def run_deblur(options):
    from .deblurring import deblur, describe_plan, load_prior, measure
    from .processes import process_state

    state = process_state()
    pipeline = load_prior(options.model, options.trust_remote_code).to(options.device or state.device)
    pipeline.set_progress_bar_config(disable=True)
    names = ("num_inference_steps", "noise_std", "lambda_", "zeta", "tile_size")
    call = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    common = dict(kernel=options.kernel, batch_size=options.batch_size, call_kwargs=call)
    if options.plan is not None:
        seconds, images = measure(pipeline, options.source, **common)
        if state.is_main_process:
            print(describe_plan(options.plan or images, seconds, state.num_processes))
        return 0
    summary = deblur(pipeline, options.source, options.output, image_format=options.format, seed=options.seed, **common)
    if summary is None:  # not the main process
        return 0
    counts = f"{summary['computed']} computed, {summary['kept']} were there, {summary['skipped']} skipped"
    print(f"{summary['images']} images: {counts}. See {options.output}")
    if summary["computed"]:
        print(f"all of them: {describe_plan(summary['images'], summary['seconds_per_image'], state.num_processes)}")
    return 1 if summary["skipped"] else 0


def run_publish(options):
    from .hub import publish, write_model_card

    if options.training:
        write_model_card(
            options.folder,
            training=options.training,
            evaluation=options.evaluation,
            evaluated_on=options.evaluated_on,
            name=options.name,
            license=options.license,
            picture=options.picture,
        )
    elif options.evaluation or options.picture:
        raise ValueError("expected --training beside it: a new card names the data, its licence and the training")
    elif options.folder.is_dir() and not (options.folder / "README.md").is_file():
        raise ValueError(f"no card (README.md) in {options.folder}: give --training TEXT to write one")
    print(publish(options.folder, options.name, private=options.private))


def add_conversion_flags(parser):
    """The originals' flags, in their own spelling."""
    from dataclasses import fields

    from .convert.flags import ConversionFlags

    group = parser.add_argument_group("the flags that the checkpoint was trained with")
    for field in fields(ConversionFlags):
        text = field.metadata["help"] + (f" (default: {field.default})" if field.default is not None else "")
        group.add_argument(f"--{field.name}", metavar="VALUE", help=text)
    for name in NOT_NEEDED:
        group.add_argument(f"--{name}", help=argparse.SUPPRESS)


def run_convert(options):
    from dataclasses import fields

    from .convert import ConversionFlags, convert_checkpoint, parse_flag

    given = {field.name: getattr(options, field.name) for field in fields(ConversionFlags)}
    flags = {}
    for name, text in given.items():
        try:
            flags |= {name: parse_flag(name, text)} if text is not None else {}
        except ValueError as error:
            raise ValueError(f"--{name} {text}: {error}") from None
    more = {"classifier_path": options.classifier_path, "overwrite": options.overwrite}
    info = convert_checkpoint(options.checkpoint, options.output, **more, **flags)
    what = info["pipeline"] or "a network and its scheduler/ (no classes or no model to guide, hence no pipeline)"
    print(f"{options.output}: {what}. What was read from the tensors: {options.output / 'conversion.json'}")


if __name__ == "__main__":
    sys.exit(main())
