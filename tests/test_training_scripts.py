"""Each script, started as a user starts it: it trains, resumes, and leaves something that loads."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file

from cxr_diffusers import CFGAnomalyPipeline, DiffPIRDeblurPipeline, FixedPointGANPipeline, load_hub, load_phantom
from cxr_diffusers.cli import main
from cxr_diffusers.config import CONFIGS
from cxr_diffusers.training import script
from cxr_diffusers.training.datasets import open_data, open_validation, patients_of
from cxr_diffusers.training.recipe import RECIPE_TYPES, load_recipe
from cxr_diffusers.training.script import PROGRAMS, load_program, run_program
from helpers import save_image

ROOT = Path(__file__).parent.parent
SMALL = ["data.n=24", "train.batch_size=4", "train.validation_images=2", "unet.block_out_channels=[8, 16, 16]"]
SMALL += ["unet.attention_head_dim=8", "unet.norm_num_groups=4", "unet.attn_norm_num_groups=4"]
SMALL += ["pipeline.num_inference_steps=4"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(arguments, folder):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=600
    )


def launch(script, output_dir, *overrides):
    options = [*SMALL, f"train.output_dir={output_dir}", *overrides]
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "1")
    return start([*launcher, str(ROOT / "training" / script), *options], output_dir.parent)


def run_here(script, output_dir, *overrides):
    """The same in this process, without the seconds that importing takes; how it is started is another test."""
    load_program(script).main([*small(script), f"train.output_dir={output_dir}", *overrides])


def small(script):
    """The overrides `SMALL`; the recipe of an unconditional UNet has no section `pipeline`."""
    return [item for item in SMALL if script != "train_unconditional" or not item.startswith("pipeline.")]


def steps(output_dir):
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


def test_train_cfg_without_arguments_trains_resumes_and_saves_a_pipeline_and_an_image(tmp_path, capsys):
    run = tmp_path / "run"
    first = launch("train_cfg.py", run, "train.max_steps=2", "train.save_every=2", "train.report_to=tensorboard")
    assert first.returncode == 0, first.stderr
    assert "chexpert_cfg_256.yaml" in first.stdout and "cxr-diffusers detect" in first.stdout
    run_here("train_cfg", run, "train.max_steps=3", "train.save_every=2", "train.report_to=tensorboard")
    assert "resumed from" in capsys.readouterr().out
    assert [line["step"] for line in steps(run)] == [1, 2, 3]
    assert (run / "validation" / "step-0000003.png").is_file()
    assert list((run / "logs").rglob("*tfevents*"))

    pipeline = CFGAnomalyPipeline.from_pretrained(run)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.class_names == ["healthy", "pleural effusion"]
    output = pipeline(load_phantom(n=2, seed=3)["image"][:], num_inference_steps=5, output_type="pt")
    assert output.anomaly_map.shape == (2, 32, 32) and torch.isfinite(output.anomaly_map).all()
    assert "phantom" in (run / "README.md").read_text()


def test_train_unconditional_leaves_a_prior_that_deblurs(tmp_path, capsys):
    run = tmp_path / "run"
    run_here("train_unconditional", run, "train.max_steps=1", "images.scaling=dtype")
    assert (run / "validation" / "step-0000001.png").is_file()
    assert "cxr-diffusers deblur" in capsys.readouterr().out
    assert "DiffPIR" in (run / "README.md").read_text()
    prior = DiffPIRDeblurPipeline.from_pretrained(run)
    prior.set_progress_bar_config(disable=True)
    assert prior.unet.config.num_class_embeds is None and prior.config.scaling == "dtype"
    image = load_phantom(n=1, seed=3)["image"][:]
    restored = prior(image, kernel=torch.full((3, 3), 1 / 9), num_inference_steps=2, output_type="pt").restored
    assert restored.shape == (1, 1, 64, 64) and torch.isfinite(restored).all()


# each run is two processes, forked from one that has imported the libraries, in the environment that torchrun would set
RUNS = """if True:
    import json, os, socket, sys
    from cxr_diffusers.training.script import load_program

    main = load_program("train_cfg").main
    for arguments in json.loads(sys.argv[1]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
        children = []
        for rank in "01":
            os.environ.update(RANK=rank, LOCAL_RANK=rank)
            if not (child := os.fork()):
                sys.exit(main(arguments))
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


def two_processes(folder, *runs):
    """Each run: its folder and its overrides."""
    arguments = [[*SMALL, "train.batch_size=2", f"train.output_dir={output}", *more] for output, *more in runs]
    return start(["-c", RUNS, json.dumps(arguments)], folder)


def test_two_processes_train_one_model_and_resume_and_so_does_a_run_of_one_process(tmp_path, capsys):
    """The run of one process does step 2 with two, then step 3 with one again, each from the weights before."""
    run, straight, moved = tmp_path / "two", tmp_path / "straight", tmp_path / "moved"
    run_here("train_cfg", moved, "train.max_steps=1", "train.batch_size=2")
    weights = load_file(moved / "checkpoint-0000001" / "model.safetensors")
    assert "number of processes" not in capsys.readouterr().out

    two, three = "train.max_steps=2", "train.max_steps=3"
    done = two_processes(tmp_path, (run, two), (run, three), (straight, three), (moved, two))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 process(es)") == 4 and done.stdout.count("resumed from") == 2
    assert [line["step"] for line in steps(run)] == [1, 2, 3]
    assert len(list((run / "checkpoint-0000003").glob("random_states_*"))) == 2
    assert steps(run)[2]["loss"] == pytest.approx(steps(straight)[2]["loss"], rel=1e-5)
    CFGAnomalyPipeline.from_pretrained(run)

    warning = "has changed (1, then 2): it continues from the same weights, but its numbers are no longer"
    assert done.stdout.count(warning) == 1
    after = load_file(moved / "checkpoint-0000002" / "model.safetensors")
    assert max((after[key] - weights[key]).abs().max() for key in weights) < 1e-3, "one step away from those weights"
    run_here("train_cfg", moved, "train.max_steps=3", "train.batch_size=2")
    assert "(1, then 2, then 1)" in capsys.readouterr().out
    assert [line["step"] for line in steps(moved)] == [1, 2, 3]


def test_starting_from_other_weights_is_not_starting_anew(tmp_path):
    run_here("train_cfg", tmp_path / "a", "train.max_steps=1", "train.lr_warmup_steps=0")
    run_here("train_cfg", tmp_path / "b", "train.max_steps=1", f"train.init_from={tmp_path / 'a'}")
    assert steps(tmp_path / "a")[0]["loss"] != steps(tmp_path / "b")[0]["loss"]
    with pytest.raises(ValueError, match="init_from: expected unet.dropout 0.3, as in this recipe, got 0.* in .*a"):
        run_here("train_cfg", tmp_path / "c", f"train.init_from={tmp_path / 'a'}", "unet.dropout=0.3")


@pytest.mark.parametrize("program", RECIPE_TYPES)
def test_every_setting_that_a_recipe_accepts_is_read(program):
    """A setting without a reader would be accepted and have no effect."""
    recipe, config = RECIPE_TYPES[program]
    library = ROOT / "cxr_diffusers" / "training"
    loop = "adversarial_loop.py" if program == "train_fixed_point_gan" else "loop.py"
    text = (ROOT / "training" / f"{program}.py").read_text()
    shared = {"diseased_rows": "datasets.py", "open_data": "datasets.py", "initial_unet": "networks.py"}
    files = {"run.py", "script.py", loop} | {file for name, file in shared.items() if name in text}
    text += "".join((library / file).read_text() for file in files)
    names = {field.name for field in (*fields(config), *fields(recipe))}
    unread = {
        n for n in names if not re.search(rf"(config|train|recipe)\.{n}\b|getattr\((recipe|self.config), .{n}", text)
    }
    assert not unread


@pytest.mark.parametrize(
    ("script", "override"),
    [
        ("train_unconditional", "train.p_uncond=0.2"),
        ("train_unconditional", "validation.n=3"),
        ("train_classifier", "train.snr_gamma=5"),
        ("train_classifier", "train.validation_loss_images=8"),
        ("train_lung_segmenter", "train.vlb_weight=0"),
        ("train_fixed_point_gan", "train.compile=true"),
    ],
)
def test_a_setting_of_another_kind_of_training_is_refused(script, override):
    recipe = {"train_lung_segmenter": "cxr_lung_segmenter_64"}.get(script, f"phantom_{script[6:]}_32")
    with pytest.raises(ValueError, match="unknown key '(p_uncond|validation|snr_gamma|vlb_weight|compile)"):
        load_recipe(recipe, ["data.root=here", override] if "lung" in recipe else [override])


@pytest.mark.parametrize("script", ["train_cfg", "train_fixed_point_gan", "train_classifier"])
def test_a_class_that_no_image_has_is_refused(tmp_path, script):
    for name in ("healthy/0.png", "healthy/1.png", "diseased/2.png", "diseased/3.png"):
        save_image(tmp_path / "in" / name)
    data = ["data.name=folder", f"data.root={tmp_path / 'in'}", "data.classes=[healthy, fracture, diseased]"]
    with pytest.raises(ValueError, match="data: expected images of each class of .*, got none of fracture"):
        load_program(script).main([*data, f"train.output_dir={tmp_path / 'run'}"])


def test_patients_that_are_trained_on_and_validated_with_are_counted(capsys):
    recipe = load_recipe("phantom_cfg_32", ["data.n=24"])
    open_validation(recipe, open_data(recipe)[0])
    assert "too good" not in capsys.readouterr().err
    recipe = load_recipe("phantom_cfg_32", ["data.n=24", "validation.seed=0", "validation.n=8"])
    open_validation(recipe, open_data(recipe)[0])
    assert "8 of 8 patients of the validation images are among the training images" in capsys.readouterr().err


def test_rows_that_are_numbered_in_place_of_patients_are_not_taken_for_the_same(tmp_path):
    rows = load_phantom(n=4, seed=0, size=16).remove_columns(["patient", "path"])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    train, test = (load_hub(tmp_path / "saved", split=split) for split in ("train", "test"))
    assert train["patient"][:] == test["patient"][:]
    assert not patients_of(train) & patients_of(test) and len(patients_of(train) & patients_of(train)) == 4


def test_a_class_that_no_image_of_a_view_has_is_refused(tmp_path):
    rows = [("a", "healthy", "PA"), ("b", "diseased", "PA"), ("c", "healthy", "AP")]
    for name, _, _ in rows:
        save_image(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("file,label,view\n" + "".join(f"{a}.png,{b},{c}\n" for a, b, c in rows))
    data = ["data.name=table", f"data.csv={tmp_path / 't.csv'}", "data.view=view", "conditions.views=[PA, AP]"]
    with pytest.raises(ValueError, match="expected images of each class in each view, got none of diseased, AP"):
        load_program("train_cfg").main([*data, f"train.output_dir={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [("unet.num_class_embeds=2", "num_class_embeds=3"), ("train.batchsize=2", "unknown key 'batchsize'")],
)
def test_an_invalid_recipe_is_refused_with_the_reason(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        run_here("train_cfg", tmp_path / "run", override)


@pytest.mark.parametrize(
    ("script", "override", "message"),
    [
        ("train_cfg", "unet.chanels=3", "unet: .*chanels"),
        ("train_cfg", "unet.in_channels=one", "unet.*: "),
        ("train_cfg", "scheduler.beta_schedule=square", "got .square"),
        ("train_cfg", "scheduler.betas=3", "scheduler: .*betas"),
        ("train_cfg", "images.scalling=minmax", "images: .*scalling"),
        ("train_cfg", "data.amount=3", "data.*: .*amount"),
        ("train_cfg", "validation.amount=3", "validation.*: .*amount"),
        ("train_cfg", "unet.sample_size=30", "unet: expected sample_size to be a multiple of 4, got 30"),
        ("train_cfg", "train.logit_normal=[1]", "logit_normal"),
        ("train_cfg", "pipeline.nois_level=3", "pipeline, images: .*nois_level"),
        ("train_cfg", "train.augment.angle=3", "train.augment: .*angle"),
        ("train_cfg", "unet=3", "section.key=value"),
        ("train_cfg", "conditions.views=[PA, ap]", "conditions: expected labelled images .* got none of 'ap'"),
        ("train_unconditional", "unet.chanels=3", "unet: .*chanels"),
        ("train_fixed_point_gan", "generator.depth=3", "generator, discriminator: .*depth"),
        ("train_fixed_point_gan", "train.augment.angle=3", "train.augment: .*angle"),
        ("train_fixed_point_gan", "train.adam_betas=[0.5]", "train.adam_betas"),
        ("train_classifier", "classifier.depth=3", "diffusion.model|classifier: .*depth"),
        ("train_lung_segmenter", "segmenter.depth=3", "segmenter: .*depth|data"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, script, override, message):
    unet = ("train_cfg", "train_unconditional")
    options = small(script) if script in unet else ["data.n=24", "train.batch_size=4"]
    if "segmenter" in script:
        options = ["data.root=/nowhere", "validation.root=/nowhere"]
    arguments = [*options, f"train.output_dir={tmp_path / 'run'}", override]
    monkeypatch.setattr("sys.argv", [f"training/{script}.py", *arguments])
    assert run_program(load_program(script).main) == 2
    lines = re.split("[\r\n]", capsys.readouterr().err)
    (line,) = [line for line in lines if line.startswith(f"{script}.py: ")]
    assert re.search(message, line), line


def test_a_bug_keeps_its_traceback_and_ctrl_c_is_a_line(capsys):
    def broken(_):
        raise AssertionError("a bug")

    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(AssertionError, match="a bug"):
        run_program(broken)
    assert run_program(interrupted) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_the_train_command_runs_the_program_of_the_recipe(tmp_path, capsys):
    """A recipe by its name; its program is known from its sections."""
    values = ["data.n=24", "train.batch_size=4", "train.max_steps=1", f"train.output_dir={tmp_path / 'gan'}"]
    values += ["generator.base_channels=4", "generator.num_res_blocks=1", "discriminator.base_channels=4"]
    assert main(["train", "phantom_fixed_point_gan_32", *values, "--n_critic", "1"]) == 0
    assert "program: train_fixed_point_gan" in capsys.readouterr().out
    assert len(steps(tmp_path / "gan")) == 1
    FixedPointGANPipeline.from_pretrained(tmp_path / "gan")


def test_the_closing_hint_can_be_run_where_the_program_runs(monkeypatch):
    assert script.train_command("train_cfg", "phantom_cfg_32") == (
        "accelerate launch training/train_cfg.py configs/phantom_cfg_32.yaml"
    )
    monkeypatch.setattr(script, "PROGRAMS", script.PACKAGE / "training_programs")  # as in an installed package
    assert script.train_command("train_cfg", "phantom_cfg_32") == "cxr-diffusers train phantom_cfg_32"


def test_the_train_command_lists_every_recipe_with_its_program(capsys):
    assert main(["train", "--list"]) == 0
    output = capsys.readouterr().out
    for path in CONFIGS.glob("*.yaml"):
        (program,) = re.findall(rf"^{path.stem}  \((\w+)\)$", output, re.MULTILINE)
        assert f"training/{program}.py" in path.read_text()
        assert (PROGRAMS / f"{program}.py").is_file()
    assert "accelerate launch --multi_gpu --num_processes 2 -m cxr_diffusers.cli train" in output
    assert ".yaml" not in output, "recipes are named as the command takes them; a wheel has no folder configs/"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a recipe"),
        (["phantom"], "expected a YAML file or one of .*phantom_cfg_32.*, got phantom$"),
        (["missing.yaml"], "got missing.yaml$"),
        (["evaluate"], "expected a YAML file or one of"),
        (["phantom_cfg_32", "train.batchsize=2"], "unknown key 'batchsize'"),
        (["chexpert_cfg_256"], "give data.root"),
    ],
)
def test_an_error_of_the_train_command_is_one_line(capsys, arguments, message):
    assert main(["train", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cxr-diffusers train: ") and re.search(message, line)
